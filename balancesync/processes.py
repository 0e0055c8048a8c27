"""This machine's processes: who begot whom, in what state they are, and signals to them."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

_PROC = Path("/proc")


def living() -> dict[int, tuple[int, str]]:
    """Parent and state (a letter as `ps` prints it) of each process that hasn't ended."""
    rows = _from_proc() if (_PROC / "self" / "stat").exists() else _from_ps()
    return {pid: (parent, state) for pid, parent, state in rows if state not in "ZX"}


def children(pid: int) -> set[int]:
    """The processes that a process has started and that haven't ended."""
    return {child for child, (parent, _) in living().items() if parent == pid}


def stopped() -> set[int]:
    """The processes that a SIGSTOP holds."""
    return {pid for pid, (_, state) in living().items() if state == "T"}


def send(pids: Iterable[int], what: signal.Signals) -> None:
    """Sends a signal to each process that still exists."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, what)


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Blocks until the condition holds; False: it didn't come to hold in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _from_proc() -> list[tuple[int, int, str]]:
    rows = []
    for file in _PROC.glob("[0-9]*/stat"):
        # A process may end between the listing and the reading.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            pid, rest = file.read_text().split(" ", 1)
            # The name stands in brackets, and may hold blanks and brackets itself.
            state, parent = rest.rpartition(")")[2].split()[:2]
            rows.append((int(pid), int(parent), state))
    return rows


def _from_ps() -> list[tuple[int, int, str]]:
    ps = [shutil.which("ps") or "/bin/ps", "-axo", "pid=,ppid=,state="]
    listed = subprocess.run(ps, check=True, capture_output=True, text=True)
    rows = [line.split() for line in listed.stdout.splitlines()]
    return [(int(pid), int(parent), state[0]) for pid, parent, state in rows]
