"""Live mode: how soon changes follow, how many of them, and what that takes."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, quantiles
from time import perf_counter
from typing import Any, Final

from benchmarks import noise
from benchmarks.daemon import Server, daemon
from benchmarks.data import STRINGS, sql_cents
from benchmarks.servers import Bench, Broken, finish
from benchmarks.table import Row, measured
from benchmarks.visitors import SYNC, Visit

_WINDOW_S: Final = 20.0
_FLUSH_S: Final = 0.25
_START_S: Final = 2.0
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
async def _following(bench: Bench, interval: float = _FLUSH_S) -> AsyncIterator[_Daemon]:
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
    alone: list[_Spent] = []
    heard: list[_Spent] = []
    followed: list[_Spent] = []
    beside: list[float] = []
    async with bench.twin() as twin:
        await twin.hold(STRINGS)
        for _ in range(bench.runs):
            # With live mode in the middle, so that a machine that changes its speed favours none.
            alone_first, heard_first = await _spend(bench, 20_000), await _heard(bench)
            async with _following(bench) as live:
                followed.append(_mean([await _spend(bench, 20_000) for _ in range(2)]))
                pairs = [await asyncio.gather(*(_spend(b, 10_000) for b in (bench, twin)))]
                await live.drained()
            heard.append(_mean([heard_first, await _heard(bench)]))
            alone.append(_mean([alone_first, await _spend(bench, 20_000)]))
            pairs.append(await asyncio.gather(*(_spend(b, 10_000) for b in (bench, twin))))
            (one, other), (idle, idle_twin) = pairs
            # Both are as fast as one another, but for what two processes have of luck.
            beside.append(_growth(one.micros / other.micros, idle.micros / idle_twin.micros))
    case = "Redis' CPU time for a write"
    floor = "a bare listener that reads each changed key once"
    grown = [_growth(x.micros, y.micros) for x, y in zip(followed, alone, strict=True)]
    least = [_growth(x.micros, y.micros) for x, y in zip(heard, alone, strict=True)]
    return [
        measured(f"{case}, 20,000/s", [each.micros for each in alone], "us"),
        measured(f"{case}, 20,000/s, with {floor}", [each.micros for each in heard], "us"),
        measured(f"{case}, 20,000/s, with live mode", [each.micros for each in followed], "us"),
        measured(
            f"{case} grows with live mode, 20,000/s, by",
            grown,
            "%",
            floor=f"{floor} {median(least):.0f} %",
            at_most=15,
        ),
        measured(f"{case} grows, 10,000/s beside a Redis that isn't followed, by", beside, "%"),
        measured(
            "a writer paced at 20,000/s, with live mode",
            [each.pace for each in followed],
            "/s",
            at_least=19_800,
        ),
    ]


async def _heard(bench: Bench) -> "_Spent":
    """The same while somebody is told of each change and reads its key, as live mode has to."""
    hearing = await bench.start("hear", interval=_FLUSH_S)
    await asyncio.sleep(_START_S)
    spent = await _spend(bench, 20_000)
    await asyncio.sleep(2 * _FLUSH_S)
    found = await finish(hearing)
    # A key is told once for a turn of Redis' event loop, and read once for an interval.
    if found["told"] < 0.99 * spent.written or found["read"] < 0.9 * spent.written:
        raise Broken(f"the bare listener missed changes: {found} of {spent.written:,}")
    return spent


@dataclass(frozen=True)
class _Spent:
    """Microseconds of Redis' CPU time for a write; how many there were, and how many a second."""

    micros: float
    written: int
    pace: float


async def _spend(bench: Bench, rate: int) -> _Spent:
    before = noise.process_seconds(bench.servers[1])
    bench.seed += 1
    load: dict[str, Any] = {"keys": bench.keys, "rate": rate, "seconds": _WINDOW_S / 2}
    found = await finish(await bench.start("spend", seed=bench.seed, **load, **_LOAD))
    spent = noise.process_seconds(bench.servers[1]) - before
    written = found["written"]
    return _Spent(1e6 * spent / written, written, written / found["seconds"])


def _mean(found: list[_Spent]) -> _Spent:
    return _Spent(
        fmean(each.micros for each in found),
        sum(each.written for each in found),
        min(each.pace for each in found),
    )


def _growth(more: float, less: float) -> float:
    """By how many percent `more` is above `less`."""
    return (more / less - 1) * 100


async def cost(bench: Bench) -> list[Row]:
    """The same changes over few keys and over many, in turn; and changes all over the many."""
    size = bench.keys if bench.quick else _MANY
    few: list[float] = []
    same: list[float] = []
    spread: list[float] = []
    async with bench.twin() as small:
        for each, keys in ((small, _FEW), (bench, size)):
            await each.hold(STRINGS, keys)
            found = await each.work("sync", mapping=STRINGS.mapping, accept_loss=True)
            if found["counts"]["scanned"] != keys:
                raise Broken(f"preparing {keys:,} keys: {found['counts']}")
            await each.sql.execute("VACUUM (ANALYZE) balances")
        await bench.sql.execute("CHECKPOINT")
        for _ in range(bench.runs):
            async with _following(small) as less, _following(bench) as more:
                changes = [(small, less, _FEW), (bench, more, _FEW), (bench, more, size)]
                spent = await _changes_cost(changes)
            for kept, seconds in zip((few, same, spread), spent, strict=True):
                kept.append(seconds)
    ratios = [more / less for less, more in zip(few, same, strict=True)]
    case = f"CPU time of {_CHANGES:,} changes"
    return [
        measured(f"{case} of {_FEW:,} keys", [1000 * x for x in few], "ms"),
        measured(f"{case} of {_FEW:,} among {size:,} keys", [1000 * x for x in same], "ms"),
        measured(f"{case} of {size:,} keys", [1000 * x for x in spread], "ms"),
        measured(f"{case}: {size:,} to {_FEW:,} keys", ratios, "times", at_most=1.2),
    ]


async def _changes_cost(places: list[tuple[Bench, _Daemon, int]]) -> list[float]:
    """CPU seconds of balancesync and PostgreSQL for a round of changes of the first keys of each.

    They take turns, so that a machine that changes its speed favours none; who waits does nothing.
    """
    spent = [0.0] * len(places)
    for turn in range(1 + _ROUNDS):
        for at, (bench, live, among) in enumerate(places):
            before = _spent(bench, live)
            await _change(bench, live, among)
            # The first round warms up.
            spent[at] += (_spent(bench, live) - before) if turn else 0.0
    return [each / _ROUNDS for each in spent]


async def _change(bench: Bench, live: _Daemon, among: int) -> None:
    load: dict[str, Any] = {"keys": among, "rate": 100_000, "connections": 1, "depth": _CHANGES}
    bench.seed += 1
    seconds = _CHANGES / load["rate"]
    worker = await bench.start("spend", seconds=seconds, seed=bench.seed, distinct=False, **load)
    await finish(worker)
    await live.drained()


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
