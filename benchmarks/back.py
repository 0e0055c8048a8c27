"""The road back: an emptied Redis gets its balances again."""

from benchmarks import data
from benchmarks.data import HASHES, STRINGS, Dataset
from benchmarks.servers import Bench, Broken
from benchmarks.table import Row, measured, timed

_MEGABYTE = 1_000_000


async def restore(bench: Bench) -> list[Row]:
    """All rows into an empty Redis."""
    await bench.synced()
    ours: list[float] = []
    pipelines: list[float] = []
    limits: list[float] = []
    memory: list[float] = []
    for _ in range(bench.runs):
        for action, found in (("sets", pipelines), ("raw_sets", limits)):
            data.flush(bench.url)
            found.append(await bench.seconds(action, keys=bench.keys, seed=bench.seed))
        ended = await _restored(bench, STRINGS, "restore")
        ours.append(ended["seconds"])
        memory.append(ended["memory"] / _MEGABYTE)
    await bench.synced(HASHES)
    hashes = [(await _restored(bench, HASHES, "restore of hashes"))["seconds"]]
    keys = bench.keys
    return [
        timed("restore", ours, keys, "bare pipelined SETs", pipelines, at_most=1.5),
        timed("restore", ours, keys, "raw SETs (the limit of writing)", limits),
        timed("restore of hashes, three fields", hashes, keys),
        measured("restore: memory", memory, "MB"),
    ]


async def _restored(bench: Bench, dataset: Dataset, case: str) -> dict[str, float]:
    """Empty Redis and restore; leaves it as it was before."""
    await bench.rest(dataset.mapping["table"])
    data.flush(bench.url)
    found = await bench.work("restore", mapping=dataset.mapping)
    if found["counts"]["inserted"] != bench.keys:
        raise Broken(f"{case}: {found['counts']}")
    bench.details.setdefault(case, []).append(found)
    return found
