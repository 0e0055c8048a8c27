"""A run over string keys: first load, nothing changed, a part changed, all changed; rivals."""

from typing import Final

from benchmarks.data import STRINGS
from benchmarks.servers import Bench
from benchmarks.table import Row, measured, timed

_ROW: Final = "user_id bigint PRIMARY KEY, balance numeric(20,2) NOT NULL, synced_at timestamptz"
_SAMPLE: Final = 2000
_PART: Final = 100
_MEGABYTE: Final = 1_000_000
_WAL_KEYS: Final = 1_000_000


async def _create(bench: Bench, table: str, *, filled: bool) -> None:
    await bench.sql.execute(f"DROP TABLE IF EXISTS {table}")
    # With the storage options of balancesync's own table: rivals and floors get the same.
    options = await bench.sql.fetchval(
        "SELECT array_to_string(reloptions, ', ') FROM pg_class WHERE oid = 'balances'::regclass"
    )
    stored = f" WITH ({options})" if options else ""
    await bench.sql.execute(f"CREATE TABLE {table} ({_ROW}){stored}")
    if filled:
        await bench.sql.execute(
            f"INSERT INTO {table} SELECT user_id, balance, synced_at FROM balances ORDER BY user_id"
        )


async def _read(bench: Bench) -> float:
    return await bench.seconds("bare_read", match=STRINGS.match)


async def first(bench: Bench) -> list[Row]:
    """First load: no table yet."""
    await bench.synced()
    ours: list[float] = []
    floors: list[float] = []
    scripts: list[float] = []
    for _ in range(bench.runs):
        await _create(bench, "plain", filled=False)
        await _create(bench, "scripted", filled=False)
        await bench.sql.execute("DROP TABLE balances")
        await bench.rest()
        read = await _read(bench)
        insert = await bench.seconds("insert", table="plain", keys=bench.keys, seed=bench.seed)
        await bench.rest()
        found = await bench.sync("first load", expect={"inserted": bench.keys})
        await bench.rest()
        scripts.append(await bench.seconds("script", table="scripted"))
        ours.append(found["seconds"])
        floors.append(read + insert)
    await bench.sql.execute("DROP TABLE plain, scripted")
    floor = "bare read + plain sorted INSERT"
    return [
        timed("first load", ours, bench.keys, floor, floors, at_most=1.5),
        timed("first load", ours, bench.keys, "good short script", scripts, at_least=1.3),
    ]


async def nothing(bench: Bench) -> list[Row]:
    """Nothing changed, with the floors of reading and of staging."""
    await bench.synced()
    await _create(bench, "scripted", filled=True)
    ours: list[float] = []
    reads: list[float] = []
    sources: list[float] = []
    copies: list[float] = []
    scripts: list[float] = []
    for _ in range(bench.runs):
        await bench.rest("balances", "scripted")
        reads.append(await _read(bench))
        found = await bench.sync("nothing changed", expect={"unchanged": bench.keys})
        ours.append(found["seconds"])
        sources.append(await bench.seconds("source_read", match=STRINGS.match))
        copies.append(await bench.seconds("copy", keys=bench.keys, seed=bench.seed))
        scripts.append(await bench.seconds("script", table="scripted"))
    await bench.sql.execute("DROP TABLE scripted")
    keys = bench.keys
    return [
        timed("floor: bare read", reads, keys),
        timed("floor: our own read, parsing nothing", sources, keys, "bare read", reads),
        timed("floor: bare COPY", copies, keys),
        timed("nothing changed", ours, keys, "bare read", reads, at_most=1.5),
        timed("nothing changed", ours, keys, "good short script", scripts, at_least=2.5),
    ]


async def one(bench: Bench) -> list[Row]:
    """1 % changed."""
    await bench.synced()
    ours: list[float] = []
    nothings: list[float] = []
    for _ in range(bench.runs):
        found = await bench.sync("nothing changed", expect={"unchanged": bench.keys})
        nothings.append(found["seconds"])
        changed = bench.change(STRINGS, _PART)
        await bench.rest()
        found = await bench.sync("1 % changed", expect={"updated": changed})
        ours.append(found["seconds"])
        await bench.rest("balances")
    return [timed("1 % changed", ours, bench.keys, "nothing changed", nothings, at_most=1.25)]


async def every(bench: Bench) -> list[Row]:
    """All changed."""
    await bench.synced()
    await _create(bench, "plain", filled=True)
    ours: list[float] = []
    floors: list[float] = []
    for _ in range(bench.runs):
        bench.change(STRINGS, 1)
        await bench.rest("balances", "plain")
        read = await _read(bench)
        update = await bench.seconds("update", table="plain", keys=bench.keys, seed=bench.seed)
        await bench.rest("plain")
        found = await bench.sync("all changed", expect={"updated": bench.keys})
        ours.append(found["seconds"])
        floors.append(read + update)
    await bench.sql.execute("DROP TABLE plain")
    floor = "bare read + plain UPDATE from staged"
    return [timed("all changed", ours, bench.keys, floor, floors, at_most=1.3)]


async def orm(bench: Bench) -> list[Row]:
    """The ORM way: it can't tell what has changed, and stamps every row."""
    await bench.synced()
    await _create(bench, "mapped", filled=True)
    nothings: list[float] = []
    alls: list[float] = []
    orms: list[float] = []
    for _ in range(bench.runs):
        await bench.rest("balances", "mapped")
        orms.append(
            await bench.seconds(
                "orm", table="mapped", keys=bench.keys, sample=_SAMPLE, seed=bench.seed + 1
            )
        )
        found = await bench.sync("nothing changed", expect={"unchanged": bench.keys})
        nothings.append(found["seconds"])
        bench.change(STRINGS, 1)
        await bench.rest()
        found = await bench.sync("all changed", expect={"updated": bench.keys})
        alls.append(found["seconds"])
    await bench.sql.execute("DROP TABLE mapped")
    floor = f"the ORM way, {_SAMPLE:,} users extrapolated,"
    return [
        timed("nothing changed", nothings, bench.keys, floor, orms, at_least=200),
        timed("all changed", alls, bench.keys, floor, orms, faster=True),
    ]


async def written(bench: Bench) -> list[Row]:
    """What a run with nothing changed writes."""
    await bench.synced()
    wal: list[float] = []
    dead: list[float] = []
    versions: list[float] = []
    for _ in range(bench.runs):
        await bench.rest("balances")
        before = await _statistics(bench)
        await bench.sync("nothing changed", expect={"unchanged": bench.keys})
        await bench.settle()
        after = await _statistics(bench)
        wal.append((after[0] - before[0]) / _MEGABYTE)
        versions.append(after[1] - before[1])
        dead.append(after[2])
    return [
        measured("nothing changed: WAL", wal, "MB", at_most=max(1, bench.keys / _WAL_KEYS)),
        measured("nothing changed: row versions", versions, "rows", at_most=0),
        measured("nothing changed: dead tuples", dead, "rows", at_most=0),
    ]


async def _statistics(bench: Bench) -> tuple[int, int, int]:
    await bench.sql.execute("SELECT pg_stat_clear_snapshot()")
    row = await bench.sql.fetchrow(
        """SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint AS wal,
                  n_tup_ins + n_tup_upd + n_tup_del AS versions, n_dead_tup AS dead
           FROM pg_stat_user_tables WHERE relname = 'balances'"""
    )
    assert row is not None
    return row["wal"], row["versions"], row["dead"]
