"""Live mode: how soon changes follow, how many of them, and what that takes."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import quantiles
from time import perf_counter
from typing import Any, Final

from benchmarks import noise
from benchmarks.daemon import Server, daemon
from benchmarks.data import STRINGS, sql_cents
from benchmarks.servers import Bench, Broken, finish
from benchmarks.table import Row, measured
from benchmarks.visitors import SYNC, Visit

_WINDOW_S: Final = 20.0
_LOAD: Final = {"connections": 32, "depth": 1, "distinct": False}
_HEAVY: Final = {"connections": 32, "depth": 8, "distinct": True}
_STATUS: Final = b"GET /sync-management/status"
_METRICS: Final = b"GET /metrics"
_RUNS: Final = b"GET /sync-management/runs?limit=1000"
_UP_S: Final = 300.0
_POLL_S: Final = 0.05
_MEGABYTE: Final = 1e6
_IDLE_S: Final = 30.0
_CHANGES: Final = 1000
_ROUNDS: Final = 30
_FEW, _MANY = 100_000, 5_000_000

_FOLLOWING: Final = """
[live]
enabled = true
flush_interval = {interval}
"""


class _Daemon:
    """A daemon that follows changes, and what it's asked."""

    def __init__(self, server: Server, visit: Visit) -> None:
        self.pid = server.pid
        self._visit = visit

    async def ask(self, what: bytes) -> bytes:
        return await self._visit.ask(what)

    async def metric(self, name: str) -> float:
        for line in (await self.ask(_METRICS)).decode().splitlines():
            if line.startswith(f"balancesync_{name} "):
                return float(line.rpartition(" ")[2])
        raise Broken(f"there is no metric {name}")

    async def is_up(self) -> bool:
        return bool(json.loads(await self.ask(_STATUS))["live"] == "up")

    async def drained(self) -> None:
        """Wait until nothing is pending; live mode must have been up throughout."""
        await asyncio.sleep(_POLL_S)
        while await self.metric("live_pending_keys"):  # noqa: ASYNC110  # it's another process
            await asyncio.sleep(_POLL_S)
        if not await self.is_up():
            raise Broken("live mode isn't up any more")

    async def full_runs(self) -> int:
        runs = json.loads(await self.ask(_RUNS))["runs"]
        return sum(run["job"] == "sync" for run in runs)


@asynccontextmanager
async def _following(bench: Bench, interval: float = 0.25) -> AsyncIterator[_Daemon]:
    """A daemon whose live mode is up."""
    async with daemon(bench, more=_FOLLOWING.format(interval=interval)) as server:
        visit = await Visit.to(server.port)
        made = _Daemon(server, visit)
        deadline = perf_counter() + _UP_S
        while not await made.is_up():
            if perf_counter() > deadline:
                raise Broken("live mode doesn't come up")
            await asyncio.sleep(_POLL_S)
        yield made
        visit.close()


async def _watched(bench: Bench, *, rate: int, load: dict[str, Any]) -> list[float]:
    """How long changes take to be seen while there are `rate` others a second."""
    bench.seed += 1
    writing = await bench.start(
        "spend", keys=bench.keys - 1, rate=rate, seconds=_WINDOW_S, seed=bench.seed, **load
    )
    found = await bench.work("watch", key=bench.keys, seconds=_WINDOW_S)
    written = await finish(writing)
    bench.details.setdefault(f"live: {rate:,} writes/s", []).append(written)
    return [1000 * each for each in found["took"]]


def _percentiles(took: list[float]) -> tuple[float, float]:
    cuts = quantiles(took, n=100)
    return cuts[49], cuts[98]


async def lag(bench: Bench) -> list[Row]:
    """10,000 random writes a second: from the write in Redis to the row in PostgreSQL."""
    await bench.synced()
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(bench.runs):
        async with _following(bench):
            took = await _watched(bench, rate=10_000, load=_LOAD)
            found.setdefault("between runs", []).append(_percentiles(took))
        async with _following(bench) as live:
            runs = asyncio.create_task(_sync_for(live, _WINDOW_S))
            took = await _watched(bench, rate=10_000, load=_LOAD)
            await runs
            found.setdefault("one full run after the other", []).append(_percentiles(took))
        async with _following(bench, 0.05):
            took = await _watched(bench, rate=10_000, load=_LOAD)
            found.setdefault("flush_interval = 0.05", []).append(_percentiles(took))
    case = "10,000 random writes/s, to visible"
    limits = {"between runs": (400.0, 1000.0), "flush_interval = 0.05": (150.0, None)}
    rows = []
    for name, pairs in found.items():
        p50, p99 = limits.get(name, (None, None))
        rows += [
            measured(f"{case}, {name}: p50", [each[0] for each in pairs], "ms", at_most=p50),
            measured(f"{case}, {name}: p99", [each[1] for each in pairs], "ms", at_most=p99),
        ]
    return rows


async def _sync_for(live: _Daemon, seconds: float) -> None:
    until = perf_counter() + seconds
    while perf_counter() < until:
        run = json.loads(await live.ask(SYNC))
        if run["status"] != "succeeded":
            raise Broken(f"a run beside live mode: {run['status']}, {run['error']}")


async def throughput(bench: Bench) -> list[Row]:
    """40,000 distinct changed keys a second; then all keys at once."""
    await bench.synced()
    kept: list[float] = []
    slowest: list[float] = []
    burst: list[float] = []
    memory: list[float] = []
    for _ in range(bench.runs):
        async with _following(bench) as live:
            took = await _watched(bench, rate=40_000, load=_HEAVY)
            await live.drained()
            written = bench.details["live: 40,000 writes/s"][-1]
            # What it's behind by at the end belongs to it.
            kept.append(written["written"] / (written["seconds"] + took[-1] / 1000))
            slowest.append(max(took))
        async with _following(bench) as live:
            runs = await live.full_runs()
            begun = perf_counter()
            bench.change(STRINGS, 1)
            await live.drained()
            burst.append(perf_counter() - begun)
            if await live.full_runs() != runs:
                raise Broken("the burst took a full run")
            memory.append(_peak_bytes(live.pid) / _MEGABYTE)
        await _check_all(bench)
    case = f"a burst of {bench.keys:,} changed keys"
    return [
        measured("40,000 distinct changes/s, kept up", kept, "/s", at_least=39_000),
        measured("40,000 distinct changes/s, to visible: longest", slowest, "ms"),
        measured(f"{case}: absorbed without a full run in", burst, "s"),
        measured(f"{case}: peak memory of the daemon", memory, "MB", at_most=250),
    ]


async def _check_all(bench: Bench) -> None:
    """Every row is what Redis was given last, for whoever is fast and wrong is no good."""
    wrong = await bench.sql.fetchval(
        f"SELECT count(*) FROM balances WHERE user_id <= $1"
        f" AND balance * 100 <> {sql_cents('user_id', bench.seed)}",
        bench.keys,
    )
    if wrong:
        raise Broken(f"{wrong:,} rows are wrong")


def _peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


async def redis_cost(bench: Bench) -> list[Row]:
    """What live mode adds to Redis' own work for a write, and whether a writer keeps its pace."""
    await bench.synced()
    ratios: list[float] = []
    paces: list[float] = []
    for _ in range(bench.runs):
        # With live mode in the middle, so that a machine that speeds up or slows down favours none.
        bare, followed = [await _redis_seconds(bench)], []
        async with _following(bench) as live:
            for _ in range(2):
                spent, pace = await _redis_seconds(bench)
                followed.append(spent)
                paces.append(pace)
            await live.drained()
        bare.append(await _redis_seconds(bench))
        ratios.append((sum(followed) / sum(spent for spent, _ in bare) - 1) * 100)
    return [
        measured("Redis' CPU time for a write grows with live mode by", ratios, "%", at_most=15),
        measured("a writer paced at 20,000/s, with live mode", paces, "/s", at_least=19_800),
    ]


async def _redis_seconds(bench: Bench) -> tuple[float, float]:
    before = noise.process_seconds(bench.servers[1])
    bench.seed += 1
    load: dict[str, Any] = {"keys": bench.keys, "rate": 20_000, "seconds": _WINDOW_S / 2}
    found = await finish(await bench.start("spend", seed=bench.seed, **load, **_LOAD))
    spent = noise.process_seconds(bench.servers[1]) - before
    return spent / found["written"], found["written"] / found["seconds"]


async def cost(bench: Bench) -> list[Row]:
    """The same changes over few keys and over many, and changes all over the many."""
    many = bench.keys if bench.quick else _MANY
    same: dict[int, list[float]] = {}
    spread: list[float] = []
    for size in (_FEW, many):
        await bench.hold(STRINGS, size)
        found = await bench.work("sync", mapping=STRINGS.mapping, accept_loss=True)
        if found["counts"]["scanned"] != size:
            raise Broken(f"preparing {size:,} keys: {found['counts']}")
        await bench.rest("balances")
        for _ in range(bench.runs):
            async with _following(bench) as live:
                same.setdefault(size, []).append(await _changes_cost(bench, live, _FEW))
                if size == many:
                    spread.append(await _changes_cost(bench, live, many))
    ratios = [more / less for less, more in zip(same[_FEW], same[many], strict=True)]
    case = f"CPU time of {_CHANGES:,} changes"
    return [
        measured(f"{case} of {_FEW:,} keys", [1000 * each for each in same[_FEW]], "ms"),
        measured(f"{case} of {_FEW:,} among {many:,} keys", [1000 * x for x in same[many]], "ms"),
        measured(f"{case} of {many:,} keys", [1000 * each for each in spread], "ms"),
        measured(f"{case}: {many:,} to {_FEW:,} keys", ratios, "times", at_most=1.2),
    ]


async def _changes_cost(bench: Bench, live: _Daemon, among: int) -> float:
    """CPU seconds of balancesync and PostgreSQL for a round of changes of the first keys."""
    load: dict[str, Any] = {"keys": among, "rate": 100_000, "connections": 1, "depth": _CHANGES}
    seconds = _CHANGES / load["rate"]

    async def change() -> None:
        bench.seed += 1
        worker = await bench.start(
            "spend", seconds=seconds, seed=bench.seed, distinct=False, **load
        )
        await finish(worker)
        await live.drained()

    await change()
    before = _spent(bench, live)
    for _ in range(_ROUNDS):
        await change()
    return (_spent(bench, live) - before) / _ROUNDS


def _spent(bench: Bench, live: _Daemon) -> float:
    return noise.cpu_seconds(*bench.servers)["postgres"] + noise.process_seconds(live.pid)


async def idle(bench: Bench) -> list[Row]:
    """What live mode takes while nothing changes."""
    await bench.synced()
    used: list[float] = []
    for _ in range(bench.runs):
        async with _following(bench) as live:
            begun, before = perf_counter(), noise.process_seconds(live.pid)
            await asyncio.sleep(_IDLE_S)
            spent = noise.process_seconds(live.pid) - before
            used.append(spent / (perf_counter() - begun) * 100)
    return [measured("idle live mode: of one CPU", used, "%", at_most=1)]
