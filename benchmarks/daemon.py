"""The daemon: its answers while a run is under way, its reads, its page, what it takes idle."""

import asyncio
import json
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any, Final

from balancesync.server import HOST
from benchmarks import noise
from benchmarks.browser import chromium
from benchmarks.data import STRINGS
from benchmarks.servers import Bench, Broken, finish, start
from benchmarks.table import Row, measured
from benchmarks.visitors import SYNC, Visit

_PATHS: Final = ("/health", "/metrics")
_RATE: Final = 200
_WINDOW_S: Final = 10.0
_AT_ONCE: Final = 32
_LOADS: Final = 15
_IDLE_S: Final = 60.0
_START_S: Final = 30.0
_SETTLE_S: Final = 2.0
_POLL_S: Final = 0.05
_MEGABYTE: Final = 1e6

# No run but those that are asked for; all else at its defaults.
_CONFIG: Final = """\
[redis]
url = "{url}"
[postgres]
dsn = "{dsn}"
[http]
port = {port}
[schedule]
on_start = false
[schedule.jobs]
[log]
level = "error"
"""


@dataclass
class Server:
    """A process that serves HTTP; what it has found itself is there when it has ended."""

    port: int
    pid: int
    found: dict[str, Any] = field(default_factory=dict)


@asynccontextmanager
async def _serving(module: str, *arguments: str, port: int) -> AsyncIterator[Server]:
    process = await start(module, *arguments)
    server = Server(port, process.pid)
    try:
        await _ready(port, process)
        yield server
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        server.found |= await finish(process)


async def _ready(port: int, process: asyncio.subprocess.Process) -> None:
    deadline = perf_counter() + _START_S
    while True:
        try:
            # It is well once both servers were asked how they are.
            visit = await Visit.to(port)
            await visit.ask(b"GET /health")
            visit.close()
        except ConnectionError as error:
            if process.returncode is not None or perf_counter() > deadline:
                raise Broken(f"the server on port {port} doesn't get ready: {error}") from None
            await asyncio.sleep(_POLL_S)
        else:
            return


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def daemon(
    bench: Bench, *, url: str = "", watched: bool = False, more: str = ""
) -> AsyncIterator[Server]:
    """`balancesync run`, or the same with its loop watched; `more` is of its configuration."""
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.toml"
        file.write_text(_CONFIG.format(url=url or bench.url, dsn=bench.dsn, port=port) + more)
        command = ["balancesync", "run", "--config", str(file)]
        if watched:
            command = ["benchmarks.serving", "daemon", str(file)]
        async with _serving(*command, port=port) as server:
            yield server


def _bare(kind: str = "bare") -> AbstractAsyncContextManager[Server]:
    port = _free_port()
    return _serving("benchmarks.serving", kind, str(port), port=port)


async def http(bench: Bench) -> list[Row]:
    """Answers at a pace while runs are under way: a first load, then others of nothing changed."""
    await bench.synced()
    pace: dict[str, Any] = {"rate": _RATE, "seconds": _WINDOW_S, "paths": _PATHS}
    floors: list[float] = []
    took: dict[str, list[float]] = {path: [] for path in _PATHS}
    blocked: list[float] = []
    busy: list[float] = []
    for _ in range(bench.runs):
        async with _bare() as server:
            await bench.sql.execute("DROP TABLE balances")
            runs = await bench.start("sync_for", mapping=STRINGS.mapping, seconds=_WINDOW_S)
            found = await bench.work("pace", port=server.port, syncs=False, **pace)
            await finish(runs)
        floors.append(_percentile([*chain(*found["took"].values())], 99))
        async with daemon(bench, watched=True) as server:
            await bench.sql.execute("DROP TABLE balances")
            found = await bench.work("pace", port=server.port, syncs=True, **pace)
        _check_runs(bench, found["runs"])
        for path in _PATHS:
            took[path].append(_percentile(found["took"][path], 99))
        late = [each for each in server.found["late"] if found["from"] < each[0] < found["to"]]
        blocked.append(max(lag for _, lag, _ in late) * 1000)
        busy.append(max(used for _, _, used in late) * 1000)
    floor = f"bare aiohttp beside a run {median(floors):.2f} ms"
    return [
        *(
            measured(
                f"{path} while a run is under way, p99", took[path], "ms", floor=floor, at_most=20
            )
            for path in _PATHS
        ),
        measured("the longest that the loop was blocked", blocked, "ms", at_most=50),
        measured("the most CPU time between two turns of the loop", busy, "ms"),
    ]


def _check_runs(bench: Bench, runs: list[dict[str, Any]]) -> None:
    counted = [(run["status"], run["inserted"] + run["unchanged"]) for run in runs]
    if set(counted) != {("succeeded", bench.keys)}:
        raise Broken(f"the daemon's runs are not as they should be: {counted}")


def _percentile(took: list[float], percent: int) -> float:
    return quantiles(took, n=100)[percent - 1] * 1000


async def reads(bench: Bench) -> list[Row]:
    """Balances read on many connections at once, with Redis and without it."""
    await bench.synced()
    flood: dict[str, Any] = {"at_once": _AT_ONCE, "seconds": _WINDOW_S, "keys": bench.keys}
    bare: list[float] = []
    redis: list[float] = []
    postgres: list[float] = []
    with_redis: list[float] = []
    without: list[float] = []
    for _ in range(bench.runs):
        async with _bare() as server:
            bare.append((await bench.work("anything", port=server.port, **flood))["rate"])
        redis.append((await bench.work("redis_reads", **flood))["rate"])
        async with daemon(bench) as server:
            asked = flood | {"port": server.port, "source": "redis"}
            with_redis.append((await bench.work("balances", **asked))["rate"])
        postgres.append((await bench.work("postgres_reads", **flood))["rate"])
        nobody = f"redis://{HOST}:{_free_port()}/0"
        async with daemon(bench, url=nobody) as server:
            asked = flood | {"port": server.port, "source": "postgres"}
            without.append((await bench.work("balances", **asked))["rate"])
    case = f"balance reads, {_AT_ONCE} connections"
    http = f"bare aiohttp {median(bare):,.0f}/s"
    return [
        measured(
            f"{case}: from Redis", with_redis, "/s",
            floor=f"{http}, redis-py alone {median(redis):,.0f}/s", at_least=3000,
        ),
        measured(
            f"{case}: from PostgreSQL, Redis down", without, "/s",
            floor=f"{http}, asyncpg alone {median(postgres):,.0f}/s", at_least=1500,
        ),
    ]  # fmt: skip


async def page(bench: Bench) -> list[Row]:
    """The status page in a warm Chromium, loaded after one run, beside a page of one line."""
    if chromium() is None:
        print("no Chromium on this machine: the status page isn't measured", file=sys.stderr)
        return []
    await bench.synced()
    async with daemon(bench) as server, _bare("line") as line:
        visit = await Visit.to(server.port)
        _check_runs(bench, [json.loads(await visit.ask(SYNC))])
        visit.close()
        found = await bench.work(
            "paints",
            page=f"http://{HOST}:{server.port}/",
            bare=f"http://{HOST}:{line.port}/",
            complete="#charts canvas",
            loads=_LOADS,
        )
    bench.details.setdefault(f"the status page, {_LOADS} loads, and its floor", []).append(found)
    floor = f"a page of one line {median(found['bare']):.0f} ms"
    kilobytes = [each / 1000 for each in found["bytes"]]
    return [
        measured(
            f"the status page: first paint, {_LOADS} loads",
            found["page"], "ms", floor=floor, at_most=200,
        ),
        measured("the status page: all it loads", kilobytes, "kB", at_most=120),
    ]  # fmt: skip


async def idle(bench: Bench) -> list[Row]:
    """What a daemon takes that has made a run and then does nothing."""
    await bench.synced()
    used: list[float] = []
    memory: list[float] = []
    fresh: list[float] = []
    for _ in range(bench.runs):
        async with daemon(bench) as server:
            fresh.append(noise.resident_bytes(server.pid) / _MEGABYTE)
            visit = await Visit.to(server.port)
            _check_runs(bench, [json.loads(await visit.ask(SYNC))])
            visit.close()
            await asyncio.sleep(_SETTLE_S)
            begun, before = perf_counter(), noise.process_seconds(server.pid)
            await asyncio.sleep(_IDLE_S)
            spent = noise.process_seconds(server.pid) - before
            used.append(spent / (perf_counter() - begun) * 100)
            memory.append(noise.resident_bytes(server.pid) / _MEGABYTE)
    span = f"idle for {_IDLE_S:g} s after a run"
    return [
        measured("a daemon that has just started: resident memory", fresh, "MB", at_most=70),
        measured(f"{span}: resident memory", memory, "MB", at_most=70),
        measured(f"{span}: of one CPU", used, "%", at_most=0.5),
    ]
