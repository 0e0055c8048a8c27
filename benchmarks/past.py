"""What it costs to keep the history: the same runs with it and without, in turn."""

from typing import Final

from benchmarks.data import STRINGS
from benchmarks.servers import Bench
from benchmarks.table import Row, measured, timed

_SHARES: Final = {"1 % changed": 100, "all changed": 1}
_SIZE: Final = "SELECT pg_total_relation_size('balancesync.changes')"


async def history(bench: Bench) -> list[Row]:
    """1 % and all changed, with history beside without; the room that a change takes."""
    await bench.synced()
    rows: list[Row] = []
    for name, step in _SHARES.items():
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(bench.runs):
            for kept, taken in seconds.items():
                changed = bench.change(STRINGS, step)
                await bench.rest("balances")
                case = f"{name}, with history" if kept else f"{name}, without"
                found = await bench.sync(case, expect={"updated": changed}, history=kept)
                taken.append(found["seconds"])
        floor = "the same without history"
        rows.append(
            timed(f"{name}, with history", seconds[True], bench.keys, floor, seconds[False])
        )
    kept_rows = await bench.sql.fetchval("SELECT count(*) FROM balancesync.changes")
    size = await bench.sql.fetchval(_SIZE) / kept_rows
    await bench.sql.execute("TRUNCATE balancesync.changes, balancesync.histories")
    return [*rows, measured("history: room for each change, indexes included", [size], "bytes")]
