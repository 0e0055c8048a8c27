"""What people see: in place on a terminal, narrow or without colour, and whole lines in a pipe."""

import asyncio
import fcntl
import json
import os
import pty
import re
import signal
import struct
import sys
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from balancesync import standing

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_COLOUR = re.compile(r"\x1b\[(?:[0-9]+;)*[34][0-9]")
UP = "\x1b[1A"
SOON_S = 30


@pytest.fixture
async def config(tmp_path: Path, postgres_dsn: str, redis_url: str, redis: Redis) -> Path:
    """A configuration on the test's servers, with balances of which two are rejects."""
    await redis.mset({f"balance:{n}": "1.5" for n in range(1, 300)})
    await redis.mset({"balance:007": "1", "balance:8": "1.505"})
    file = tmp_path / "config.toml"
    file.write_text(
        f'[redis]\nurl = "{redis_url}"\n[postgres]\ndsn = "{postgres_dsn}"\n[http]\nport = 1\n'
    )
    return file


class Terminal:
    """A pseudo terminal with a process on it; `seen` is all that it was sent."""

    def __init__(self, ours: int) -> None:
        self.seen = ""
        self._ours = ours
        self._changed = asyncio.Event()
        asyncio.get_running_loop().add_reader(ours, self._read)

    def _read(self) -> None:
        # Linux says EIO, not end of file, when the other side has gone.
        try:
            piece = os.read(self._ours, 65_536).decode()
        except OSError:
            piece = ""
        self.seen += piece
        self._changed.set()
        if not piece:
            self.close()

    def close(self) -> None:
        """Read no more."""
        asyncio.get_running_loop().remove_reader(self._ours)

    async def until(self, text: str, times: int = 1) -> None:
        """Wait until it was sent a text so many times."""
        async with asyncio.timeout(SOON_S):
            while self.seen.count(text) < times:
                self._changed.clear()
                await self._changed.wait()

    @property
    def lines(self) -> list[str]:
        """What it was sent, without escapes and blank lines."""
        plain = _ESCAPES.sub("", self.seen)
        return [line.rstrip() for line in re.split("[\r\n]+", plain) if line.strip()]


@asynccontextmanager
async def on_terminal(
    config: Path, *arguments: str, columns: int = 100, rows: int = 40, **environ: str
) -> AsyncIterator[tuple[Terminal, asyncio.subprocess.Process]]:
    """Run a command on a terminal of so many columns and rows."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "balancesync", *arguments, "--config", str(config)),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=clean | {"TERM": "xterm-256color"} | environ,
    )
    os.close(theirs)
    terminal = Terminal(ours)
    try:
        yield terminal, process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        terminal.close()
        os.close(ours)


async def seen_on_terminal(config: Path, *arguments: str, **how: Any) -> tuple[int, Terminal]:
    """Run a command to its end."""
    async with on_terminal(config, *arguments, **how) as (terminal, process):
        async with asyncio.timeout(SOON_S):
            code = await process.wait()
        await asyncio.sleep(0)
        terminal._read()
        return code, terminal


async def piped(config: Path, *arguments: str) -> asyncio.subprocess.Process:
    """Run a command into a pipe."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "balancesync", *arguments, "--config", str(config)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )


async def test_watch_draws_in_place_until_ctrl_c(config: Path) -> None:
    assert (await (await piped(config, "sync")).wait()) == 0
    async with on_terminal(config, "status", "--watch", "0.1") as (terminal, process):
        await terminal.until("Ctrl-C ends this", 3)
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(SOON_S):
            assert await process.wait() == 0
    assert UP in terminal.seen
    assert "in PostgreSQL, but for 2 rejects" in terminal.seen
    assert "interrupted" not in terminal.seen
    # It shows the cursor again.
    assert terminal.seen.rindex("\x1b[?25h") > terminal.seen.rindex(UP)


async def test_watch_into_a_pipe_is_a_block_each_time_until_nobody_reads(config: Path) -> None:
    assert (await (await piped(config, "sync")).wait()) == 0
    command = f"{sys.executable} -m balancesync status --watch 0.1 --config {config}"
    script = f"{command} | grep --line-buffered -A 1 Z: | head -8"
    process = await asyncio.create_subprocess_shell(script, stdout=asyncio.subprocess.PIPE)
    async with asyncio.timeout(SOON_S):
        out, _ = await process.communicate()
    lines = out.decode().splitlines()
    assert len(lines) == 8
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ:", each) for each in lines[::3])
    assert all(each.startswith("safe: everything up to ") for each in lines[1::3])


async def test_watch_as_json_is_a_document_a_line(config: Path) -> None:
    assert (await (await piped(config, "sync")).wait()) == 0
    process = await piped(config, "status", "--watch", "0.1", "--json")
    assert process.stdout is not None
    async with asyncio.timeout(SOON_S):
        found = [json.loads(await process.stdout.readline()) for _ in range(2)]
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    assert [each["last_run"]["status"] for each in found] == ["succeeded"] * 2
    assert found[0]["at"] <= found[1]["at"]


async def test_forty_columns_are_enough(config: Path) -> None:
    slow = {"BALANCESYNC_REDIS__MAX_KEYS_PER_SECOND": "300", "BALANCESYNC_REDIS__SCAN_COUNT": "50"}
    code, terminal = await seen_on_terminal(config, "sync", columns=40, **slow)
    assert code == 0
    assert "reading balances" in terminal.seen
    assert "…" not in terminal.seen
    # The log of rejects is folded by the terminal itself.
    result = next(n for n, line in enumerate(terminal.lines) if line.startswith("sync succeeded"))
    shown = terminal.lines[result:]
    for command in ("status", "runs"):
        shown += (await seen_on_terminal(config, command, columns=40))[1].lines
    assert "balances" in " ".join(shown)
    # What is to be copied stays in one piece.
    assert any(re.fullmatch(" *[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", line) for line in shown)
    assert any(re.search(r" 127\.0\.0\.1:[0-9]+[,/ ]", f"{line} ") for line in shown)
    assert [line for line in shown if len(line) > 40] == []


async def test_no_color_means_no_colour(config: Path) -> None:
    for more, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        code, terminal = await seen_on_terminal(config, "check", **more)
        assert code == 0
        assert bool(_COLOUR.search(terminal.seen)) == coloured


UP_SERVER = {
    "connected": True,
    "address": "localhost:1",
    "version": "9",
    "latency_ms": 0.1,
    "error": None,
}
DOWN = {**dict.fromkeys(UP_SERVER), "connected": False, "error": "refused"}
RUN = {"job": "sync", "trigger": "cli", "mode": "apply", "status": "succeeded", "error": None}
GOOD_RUN = RUN | {"id": "0", "started_at": "2026-01-31T02:00:00.000Z", "duration_s": 1.0}
GOOD: dict[str, Any] = {
    "state": "idle",
    "redis": UP_SERVER,
    "postgres": UP_SERVER,
    "safe_until": "2026-01-31T02:00:00.000Z",
    "last_success_at": "2026-01-31T02:00:01.000Z",
    "last_success_age_s": 60.0,
    "last_run": GOOD_RUN,
    "current_run": None,
    "refusal": None,
    "rejects": {},
    "without_keys": [],
    "drift": {},
    "not_found": 0,
    "verdict": {"level": "safe", "line": "safe: all is well", "advice": []},
    "no_daemon": "no daemon answers at localhost:1: connection refused",
    "leader": None,
}
REFUSAL = [{"mapping": "m", "reason": "no key", "refused_at": None}]
RETURNED = [REFUSAL[0] | {"reason": "60 keys are gone and 40 came back changed"}]

LIVE: dict[str, Any] = {
    "name": "a:1",
    "leader": "a:1",
    "live": "up",
    "live_reason": None,
    "live_lag_s": 0.12,
    "live_copied_at": "2026-01-31T02:00:02.000Z",
    "live_pending": 3,
    "next_run_at": None,
    "queued_runs": [],
}


def test_a_daemon_tells_more(capsys: pytest.CaptureFixture[str]) -> None:
    progress = {"phase": "scan", "mapping": "m", "done": 10, "total": 40, "ratio": 0.25}
    current = GOOD["last_run"] | {"status": "running", "duration_s": None, "progress": progress}
    standing.show_status(GOOD | LIVE | {"current_run": current, "state": "running"})
    cells = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()]
    at = "2026-01-31T02:00:02Z"
    assert ["live mode", f"up, the last changes took 120 ms at {at}, 3 keys wait"] in cells
    assert ["progress", "reading m: 10 of 40 (25%)"] in cells
    assert ["daemon", "running, a:1"] in cells


@pytest.mark.parametrize(
    ("otherwise", "said"),
    [
        ({}, "connection refused; nothing runs by itself"),
        ({"leader": "there:2"}, "connection refused; there:2 leads"),
        ({"leader": ""}, "connection refused; another one leads"),
        ({"postgres": DOWN}, "connection refused"),
    ],
)
def test_who_leads_where_no_daemon_answers(
    otherwise: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    standing.show_status(GOOD | otherwise)
    cells = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()]
    assert ["daemon", f"none answers at localhost:1: {said}"] in cells


@pytest.mark.parametrize(("refusal", "overwrites"), [(REFUSAL, False), (RETURNED, True)])
def test_what_to_do_stands_right_below_a_refusal(
    refusal: list[dict[str, Any]], *, overwrites: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    standing.show_status(GOOD | {"refusal": refusal})
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith('the guard refuses mapping "m" since -: ')
    ways = [line.strip() for line in lines if line.startswith("    ")]
    assert ways == [
        "balancesync restore --dry-run",
        "balancesync restore",
        *(["balancesync restore --overwrite"] if overwrites else []),
        "balancesync sync --accept-loss",
    ]
    assert "stop the application, bring the keys back, then start it again" in "\n".join(lines)
    assert lines.index("    balancesync sync --accept-loss") < lines.index(
        next(line for line in lines if line.startswith("redis "))
    )


async def test_a_window_that_is_too_low_says_so_and_shows_the_refusal(
    config: Path, redis: Redis
) -> None:
    assert (await (await piped(config, "sync")).wait()) == 0
    await redis.flushdb()
    assert (await (await piped(config, "sync")).wait()) == 3
    watch = on_terminal(config, "status", "--watch", "60", columns=60, rows=20)
    async with watch as (terminal, process):
        await terminal.until("make the window taller")
        seen = "\n".join(terminal.lines)
        assert "Redis has no key at all" in seen
        assert "balancesync sync --accept-loss" in seen
        assert "lines more: make the window taller" in terminal.lines[-1]
        assert len(terminal.lines) <= 20
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(SOON_S):
            assert await process.wait() == 0


def test_stats_count_what_they_tell_of(capsys: pytest.CaptureFixture[str]) -> None:
    made = {"job": "sync", "mode": "apply", "status": "succeeded", "seconds": 1.0}
    dry = made | {"mode": "dry_run", "runs": 9}
    document: dict[str, Any] = {
        "durations": {"p50_s": 0.2, "p95_s": 0.3},
        "last_success_age_s": None,
        "rejects": {},
    }
    for runs, last, said in (
        (1, {"succeeded": 1}, ["the last run: 1 succeeded", "the one successful sync took 200 ms"]),
        (
            2,
            {"failed": 1, "succeeded": 1},
            [
                "the last 2 runs: 1 failed, 1 succeeded",
                "the last 2 successful syncs took 200 ms at the median, 300 ms at 95 %",
            ],
        ),
        (200, {"succeeded": 100}, ["the last 100 runs: 100 succeeded"]),
    ):
        totals = [made | {"runs": runs}, dry]
        standing.show_stats(document | {"totals": totals, "last_runs": last})
        lines = capsys.readouterr().out.splitlines()
        assert [line for line in lines if line.startswith("the ")][: len(said)] == said
