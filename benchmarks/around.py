"""What surrounds a run: distance, another client of the same Redis, memory."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from statistics import median, quantiles
from typing import Any, Final
from urllib.parse import urlsplit

from benchmarks.data import STRINGS
from benchmarks.servers import Bench, Broken, finish, start
from benchmarks.table import Row, measured, timed

_DELAY_S: Final = 0.0005
_RATE: Final = 200
_WINDOW_S: Final = 10.0
_SMALL: Final = 100_000
_TIMES: Final = 5
_MEGABYTE: Final = 1e6


@asynccontextmanager
async def _distance(bench: Bench) -> AsyncIterator[dict[str, Any]]:
    """The addresses of both servers behind the delaying proxy."""
    both = [urlsplit(bench.url), urlsplit(bench.dsn)]
    targets = [(each.hostname, each.port) for each in both]
    proxy = await start("benchmarks.proxy", json.dumps({"delay": _DELAY_S, "targets": targets}))
    assert proxy.stdin is not None
    assert proxy.stdout is not None
    try:
        ports = json.loads(await proxy.stdout.readline())
        url, dsn = (
            each._replace(netloc=each.netloc.replace(f":{each.port}", f":{port}")).geturl()
            for each, port in zip(both, ports, strict=True)
        )
        yield {"url": url, "dsn": dsn}
    finally:
        proxy.stdin.close()
        await proxy.wait()


async def latency(bench: Bench) -> list[Row]:
    """Half a millisecond more each way, to both servers."""
    await bench.synced()
    far_reads: list[float] = []
    far: list[float] = []
    near: list[float] = []
    async with _distance(bench) as there:
        for _ in range(bench.runs):
            near.append((await bench.sync("nothing changed"))["seconds"])
            far_reads.append(await bench.seconds("bare_read", match=STRINGS.match, **there))
            found = await bench.sync("nothing changed, far", **there)
            far.append(found["seconds"])
        trip = await bench.work("gets", keys=bench.keys, rate=_RATE, seconds=2, **there)
    case = f"nothing changed, {_DELAY_S * 1000:g} ms farther each way"
    return [
        timed(case, far, bench.keys, "bare read, as far,", far_reads),
        timed(case, far, bench.keys, "the same near", near),
        measured("a GET as far", [median(trip["took"]) * 1000], "ms"),
    ]


async def client(bench: Bench) -> list[Row]:
    """What another client feels: its GETs while nothing else runs, and while a run reads."""
    await bench.synced()
    idle: list[list[float]] = []
    busy: list[list[float]] = []
    pace: dict[str, Any] = {"keys": bench.keys, "rate": _RATE, "seconds": _WINDOW_S}
    for _ in range(bench.runs):
        idle.append((await bench.work("gets", **pace))["took"])
        runs = await bench.start("sync_for", mapping=STRINGS.mapping, seconds=_WINDOW_S + 2)
        await asyncio.sleep(1)
        found = await bench.work("gets", **pace)
        reading = (await finish(runs))["reading"]
        busy.append(
            [
                took
                for sent, took in zip(found["sent"], found["took"], strict=True)
                if any(begun <= sent <= ended for begun, ended in reading)
            ]
        )
    if min(map(len, busy)) < _RATE:
        raise Broken("too few GETs fell into the reading of a run")
    return [
        measured("another client's GET, p50: idle", _percentile(idle, 50), "ms"),
        measured("another client's GET, p99: idle", _percentile(idle, 99), "ms"),
        measured("another client's GET, p50: while a run reads", _percentile(busy, 50), "ms"),
        measured(
            "another client's GET, p99: while a run reads",
            _percentile(busy, 99),
            "ms",
            floor=f"idle {median(_percentile(idle, 99)):.2f} ms",
            at_most=3,
        ),
    ]


def _percentile(windows: list[list[float]], percent: int) -> list[float]:
    return [quantiles(window, n=100)[percent - 1] * 1000 for window in windows]


async def memory(bench: Bench) -> list[Row]:
    """The most resident memory of the process that syncs."""
    rows = []
    sizes = {_SMALL, bench.keys} | (set() if bench.quick else {bench.keys * _TIMES})
    for size in sorted(sizes):
        await bench.hold(STRINGS, size)
        table = f"memory_{size}"
        mapping = STRINGS.mapping | {"name": table, "table": table}
        for case, count in (("first load", "inserted"), ("nothing changed", "unchanged")):
            found = await bench.sync(f"{case}, {size:,}", expect={count: size}, mapping=mapping)
            rows.append(
                measured(
                    f"resident memory, {case}, {size:,} keys",
                    [found["memory"] / _MEGABYTE], "MB", at_most=80,
                )
            )  # fmt: skip
        await bench.sql.execute(f"DROP TABLE {table}")
    return rows
