"""Who takes the CPUs while we measure: our processes and others, from Linux's /proc.

https://man7.org/linux/man-pages/man5/proc_stat.5.html and proc_pid_stat.5.html
"""

import os
from pathlib import Path
from typing import Final

_TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")
_PROC: Final = Path("/proc")
_IDLE: Final = (3, 4)  # idle and iowait
_GUEST: Final = 8  # from here on it is counted in user and nice already
_PROCESS_TIMES: Final = slice(11, 15)  # behind the name: utime, stime, and those of reaped children


def cpu_seconds(postgres: int, redis: int) -> dict[str, float]:
    """CPU seconds so far of both servers, by their process ids, and of all that isn't ours.

    Empty where there's no /proc.
    """
    if not (_PROC / "stat").exists():
        return {}
    ticks = [int(word) for word in (_PROC / "stat").read_text().splitlines()[0].split()[1:]]
    busy = sum(ticks[:_GUEST]) - sum(ticks[at] for at in _IDLE)
    # The servers are children of this process, too.
    found = {
        "postgres": _ticks(postgres),
        "redis": _ticks(redis),
        "others": busy - _ticks(os.getpid()),
    }
    return {name: ticks * _TICK_S for name, ticks in found.items()}


def _ticks(pid: int) -> int:
    """Of a process, its ended children, and those that live."""
    try:
        stat = (_PROC / str(pid) / "stat").read_text()
        children = (_PROC / str(pid) / "task" / str(pid) / "children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):  # it has ended; its parent counts it
        return 0
    own = sum(map(int, stat.rpartition(")")[2].split()[_PROCESS_TIMES]))
    return own + sum(_ticks(int(child)) for child in children)


def process_seconds(pid: int) -> float:
    """CPU seconds so far of one process, without its children's."""
    return int((_PROC / str(pid) / "schedstat").read_text().split()[0]) / 1e9


def resident_bytes(pid: int) -> int:
    """What one process has resident."""
    return int((_PROC / str(pid) / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
