"""Runs over other shapes: hashes, one big hash, a large table of an application's own."""

from typing import Any, Final

from benchmarks.data import BARE, BIG, HASHES, STRIDE
from benchmarks.servers import Bench, Broken
from benchmarks.table import Row, measured, timed

_PART: Final = 100


async def hashes(bench: Bench) -> list[Row]:
    """Hashes with three fields, nothing changed."""
    await bench.synced(HASHES)
    ours: list[float] = []
    pipelines: list[float] = []
    limits: list[float] = []
    how: dict[str, Any] = {"match": HASHES.match, "fields": HASHES.fields}
    case = "hash, three fields: nothing changed"
    for _ in range(bench.runs):
        pipelines.append(await bench.seconds("hmget", **how))
        limits.append(await bench.seconds("raw_hmget", **how))
        found = await bench.sync(case, HASHES, {"unchanged": bench.keys})
        ours.append(found["seconds"])
    return [
        timed(case, ours, bench.keys, "pipelined HMGET", pipelines, at_least=3),
        timed(case, ours, bench.keys, "raw HMGETs (the read limit)", limits),
    ]


async def big(bench: Bench) -> list[Row]:
    """One big hash, nothing changed."""
    await bench.synced(BIG)
    ours: list[float] = []
    floors: list[float] = []
    case = "one big hash: nothing changed"
    for _ in range(bench.runs):
        floors.append(await bench.seconds("hscan", key=BIG.member))
        found = await bench.sync(case, BIG, {"unchanged": bench.keys})
        ours.append(found["seconds"])
    return [timed(case, ours, bench.keys, "bare HSCAN", floors)]


async def users(bench: Bench) -> list[Row]:
    """An application's users, ten rows for each key, 300 bytes each."""
    await _create_users(bench)
    await bench.synced(BARE)
    before = await _statistics(bench)
    nothings: list[float] = []
    ones: list[float] = []
    reads: list[float] = []
    rows = f"{bench.keys * STRIDE:,} users"
    for _ in range(bench.runs):
        reads.append(await bench.seconds("bare_read", match=None))
        found = await bench.sync(f"{rows}: nothing changed", BARE, {"unchanged": bench.keys})
        nothings.append(found["seconds"])
        changed = bench.change(BARE, _PART)
        await bench.rest()
        found = await bench.sync(f"{rows}: 1 % changed", BARE, {"updated": changed})
        ones.append(found["seconds"])
        await bench.rest("users")
    after = await _statistics(bench)
    await bench.sql.execute("DROP TABLE users")
    passes = after["seq_scan"] - before["seq_scan"]
    lookups = (after["fetched"] - before["fetched"]) / (2 * bench.runs)
    return [
        timed(f"{rows}: nothing changed", nothings, bench.keys, "bare read", reads),
        timed(f"{rows}: 1 % changed", ones, bench.keys, "nothing changed", nothings),
        measured(f"{rows}: passes over the table", [passes], "passes", at_most=0),
        measured(
            f"{rows}: rows fetched by a run, through the index", [lookups], "rows",
            floor=f"{after['bytes']:.0f} bytes a row",
        ),
    ]  # fmt: skip


async def _create_users(bench: Bench) -> None:
    await bench.sql.execute("DROP TABLE IF EXISTS users")
    await bench.sql.execute(
        """CREATE TABLE users (
               id bigint GENERATED ALWAYS AS IDENTITY,
               telegram_id bigint NOT NULL,
               username text NOT NULL,
               profile text NOT NULL,
               created_at timestamptz NOT NULL DEFAULT now(),
               balance bigint NOT NULL DEFAULT 0,
               sync_at timestamptz)"""
    )
    await bench.sql.execute(
        f"""INSERT INTO users (telegram_id, username, profile)
            SELECT n, 'user' || n, repeat(md5(n::text), 6)
            FROM generate_series(1, {bench.keys * STRIDE}::bigint) AS n"""
    )
    await bench.sql.execute("ALTER TABLE users ADD PRIMARY KEY (id), ADD UNIQUE (telegram_id)")
    await bench.sql.execute("VACUUM (ANALYZE) users")


async def _statistics(bench: Bench) -> dict[str, float]:
    await bench.settle()
    await bench.sql.execute("SELECT pg_stat_clear_snapshot()")
    row = await bench.sql.fetchrow(
        """SELECT seq_scan, idx_tup_fetch AS fetched,
                  pg_table_size(relid) / greatest(n_live_tup, 1)::float8 AS bytes
           FROM pg_stat_user_tables WHERE relname = 'users'"""
    )
    if row is None:
        raise Broken("there are no statistics of the table users")
    return dict(row)
