"""What verify calls drift, and what not: keys that move, and rows that the table refuses."""

from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from engine import Engine
from redis.asyncio import Redis

from balancesync.model import RawBatch, Run
from balancesync.nodes import Identity
from balancesync.reading import Reading
from balancesync.source import Source

Make = Callable[..., Engine]
TABLE = "user_id bigint PRIMARY KEY, balance numeric(20,2), synced_at timestamptz"


class Watched(Source):
    """A Redis to which something happens each time before keys are read again."""

    before: Callable[[int], Awaitable[object]]
    looks = 0

    async def fetch(
        self, reading: Reading, keys: list[bytes], *, identity: Identity | None = None
    ) -> RawBatch:
        self.looks += 1
        await self.before(self.looks)
        return await super().fetch(reading, keys, identity=identity)


def drift(run: Run) -> tuple[int, int, int, int | None]:
    assert run.moving is not None
    return run.counts.inserted, run.counts.updated, run.counts.deleted, sum(run.moving.values())


async def ten(
    make: Make, redis: Redis, before: Callable[[int], Awaitable[object]], **mapping: Any
) -> Engine:
    """An engine after one success with ten keys, whose further looks are watched."""
    await redis.mset({f"balance:{n}": "100" for n in range(10)})
    made = make(mapping, source=Watched)
    assert isinstance(made.source, Watched)
    made.source.before = before
    await made.good()
    return made


async def test_a_key_whose_value_and_row_move_at_each_look_is_moving(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    async def before(look: int) -> None:
        await redis.set("balance:3", 200 + look)
        await pg.execute("UPDATE balances SET balance = $1 WHERE user_id = 3", 100 + look)

    made = await ten(engine, redis, before)
    await redis.set("balance:3", "200")
    run = await made.verify()
    assert drift(run) == (0, 0, 0, 1)
    assert run.drift == 0
    # It's none of the others, neither equal nor different.
    assert (run.counts.scanned, run.counts.unchanged) == (9, 9)
    [report] = made.reports
    assert (report.rows, report.moving) == ({}, 1)
    assert set(report.totals.values()) <= {"0", "0.00"}
    assert await made.recorded(run) == run


@pytest.mark.parametrize("last", [1, 2])
async def test_a_moving_key_whose_row_is_not_written_again_is_drift(
    engine: Make, redis: Redis, pg: asyncpg.Connection, last: int
) -> None:
    async def before(look: int) -> None:
        await redis.set("balance:3", 200 + look)
        if look <= last:
            await pg.execute("UPDATE balances SET balance = $1 WHERE user_id = 3", 100 + look)

    made = await ten(engine, redis, before)
    await redis.set("balance:3", "200")
    run = await made.verify()
    assert drift(run) == (0, 1, 0, 0)
    assert run.drift == 1
    assert [row.key for row in made.reports[0].rows["u"]] == [("3",)]
    assert (run.counts.scanned, run.counts.unchanged) == (10, 9)


async def test_a_moving_key_that_is_brought_over_at_last_is_equal(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    async def before(look: int) -> None:
        await redis.set("balance:3", 200 + look)
        row = 100 + look if look < 3 else 200 + look
        await pg.execute("UPDATE balances SET balance = $1 WHERE user_id = 3", row)

    made = await ten(engine, redis, before)
    await redis.set("balance:3", "200")
    run = await made.verify()
    assert drift(run) == (0, 0, 0, 0)
    assert run.counts.unchanged == 10


async def test_a_row_that_moves_under_a_value_that_stays_is_drift(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    async def before(look: int) -> None:
        await pg.execute("UPDATE balances SET balance = $1 WHERE user_id = 3", look)

    made = await ten(engine, redis, before)
    await pg.execute("UPDATE balances SET balance = 0 WHERE user_id = 3")
    assert drift(await made.verify()) == (0, 1, 0, 0)


async def test_rows_that_come_and_go_with_their_values_are_moving(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    async def before(look: int) -> None:
        await redis.set("balance:3", 200 + look)
        if look % 2:
            await pg.execute("DELETE FROM balances WHERE user_id = 3")
        else:
            await pg.execute("INSERT INTO balances VALUES (3, $1)", look)

    made = await ten(engine, redis, before)
    await redis.set("balance:3", "200")
    assert drift(await made.verify()) == (0, 0, 0, 1)


async def test_what_is_gone_or_spoilt_at_the_second_look_is_counted_as_that(
    engine: Make, redis: Redis
) -> None:
    async def before(look: int) -> None:
        await redis.delete("balance:3")
        await redis.set("balance:4", "garbage")

    made = await ten(engine, redis, before)
    await redis.mset({"balance:3": "7", "balance:4": "8"})
    run = await made.verify()
    assert drift(run) == (0, 0, 0, 0)
    counts = run.counts
    assert (counts.vanished, counts.rejected, counts.unchanged) == (1, 1, 8)
    assert counts.scanned == 10


async def test_a_key_that_a_scan_missed_is_compared_as_any_other(
    engine: Make, redis: Redis
) -> None:
    async def nothing(look: int) -> None:
        pass

    await ten(engine, redis, nothing, on_absent="delete")
    await redis.delete("balance:3", "balance:4")

    values = {"balance:3": "100", "balance:4": "999"}

    class Late(Watched):
        async def exists(self, reading: Reading, keys: list[bytes]) -> list[bool]:
            await redis.mset(values)
            return await super().exists(reading, keys)

    late = engine({"on_absent": "delete"}, source=Late)
    assert isinstance(late.source, Late)
    late.source.before = nothing
    run = await late.verify()
    # One came back as it was, the other not: nobody had compared that one.
    assert drift(run) == (0, 1, 0, 0)
    assert (run.counts.unchanged, run.counts.scanned, run.counts.absent) == (9, 10, 0)


REFUSING = {
    "a check": "ALTER TABLE balances ADD CHECK (balance < 1000) NOT VALID",
    "a key of another table": "ALTER TABLE balances ADD FOREIGN KEY (user_id) REFERENCES people",
}


@pytest.mark.parametrize("how", REFUSING)
async def test_a_row_that_the_table_refuses_is_a_reject_and_no_drift(
    engine: Make, redis: Redis, pg: asyncpg.Connection, how: str
) -> None:
    await pg.execute(f"CREATE TABLE balances ({TABLE})")
    await pg.execute("CREATE TABLE people (id bigint PRIMARY KEY)")
    await pg.execute("INSERT INTO people SELECT n FROM generate_series(0, 9) AS n")
    await pg.execute(REFUSING[how])
    await redis.mset({f"balance:{n}": "100" for n in range(10)} | {"balance:77": "1000.50"})
    made = engine()
    run = await made.good()
    assert (run.counts.inserted, run.counts.rejected) == (10, 1)
    run = await made.verify()
    assert drift(run) == (0, 0, 0, 0)
    assert (run.counts.rejected, run.counts.unchanged, run.counts.scanned) == (1, 10, 11)
    assert made.reports[0].rows == {}
    # Another value is another matter: nobody knows yet whether the table takes it.
    await redis.set("balance:77", "1000.51")
    assert drift(await made.verify()) == (1, 0, 0, 0)
    # And so is one whose reject has healed.
    await redis.set("balance:77", "1000.50")
    await pg.execute("UPDATE balancesync.rejects SET healed_at = now()")
    assert drift(await made.verify()) == (1, 0, 0, 0)


async def test_an_update_that_the_table_refuses_is_no_drift_either(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute(f"CREATE TABLE balances ({TABLE}, CHECK (balance < 1000))")
    await redis.mset({f"balance:{n}": "100" for n in range(10)})
    made = engine()
    await made.good()
    await redis.mset({"balance:3": "2e3", "balance:4": "5000"})
    run = await made.good()
    assert run.counts.rejected == 2
    run = await made.verify()
    assert drift(run) == (0, 0, 0, 0)
    assert (run.counts.rejected, run.counts.unchanged) == (2, 8)
    # The row of one of them is changed by somebody else: it isn't known to be refused any less.
    await redis.set("balance:4", "5001")
    run = await made.verify()
    assert drift(run) == (0, 1, 0, 0)
    assert (run.counts.rejected, run.counts.unchanged) == (1, 8)


async def test_a_hash_that_no_partition_takes_is_no_drift(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute(
        "CREATE TABLE balances (user_id bigint PRIMARY KEY, usd numeric(20,2), eur numeric(20,2),"
        " synced_at timestamptz) PARTITION BY RANGE (user_id)"
    )
    await pg.execute("CREATE TABLE low PARTITION OF balances FOR VALUES FROM (0) TO (10)")
    for n in (1, 2, 77):
        await redis.hset(f"balance:{n}", mapping={"usd": "1.50", "eur": n})
    columns = {"user_id": "bigint", "usd": "numeric(20,2)", "eur": "numeric(20,2)"}
    made = engine({"type": "hash", "columns": columns})
    assert (await made.good()).counts.rejected == 1
    assert drift(await made.verify()) == (0, 0, 0, 0)
    await redis.hset("balance:77", mapping={"eur": "1"})
    assert drift(await made.verify()) == (1, 0, 0, 0)


async def test_fields_of_a_big_hash_that_the_table_refuses_are_no_drift(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute(f"CREATE TABLE balances ({TABLE}, CHECK (balance < 1000))")
    fields: dict[Any, Any] = {str(n): "100" for n in range(10)} | {"77": "1000"}
    await redis.hset("balances", mapping=fields)
    made = engine({"key": "balances", "member": "{user_id}", "type": "hash"})
    assert (await made.good()).counts.rejected == 1
    run = await made.verify()
    assert drift(run) == (0, 0, 0, 0)
    assert (run.counts.rejected, run.counts.unchanged) == (1, 10)


async def test_where_live_mode_is_wanted_and_nobody_leads_verify_says_so(
    engine: Make, redis: Redis
) -> None:
    await redis.mset({f"balance:{n}": "100" for n in range(10)})
    made = engine(live={"enabled": True})
    await made.good()
    assert (await made.verify()).warnings == []
    await redis.set("balance:3", "1")
    run = await made.verify()
    assert run.drift == 1
    assert run.warnings == [
        "live mode isn't up: no daemon leads: what it has yet to bring over counts as drift"
    ]


async def test_drift_stands_until_a_sync_that_began_after_the_verify(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    await redis.mset({f"balance:{n}": "100" for n in range(10)})
    await redis.set("points:1", "5")
    made = engine({}, {"name": "points", "key": "points:{user_id}", "table": "points"})

    async def known() -> dict[str, int]:
        return (await made.records.known(pg)).drift

    await made.good()
    # What no verify has looked at isn't known to be equal.
    assert await known() == {}
    await made.verify()
    assert await known() == {"balances": 0, "points": 0}
    await redis.mset({"balance:3": "1", "points:1": "6"})
    run = await made.verify()
    assert run.drift == 2
    assert await known() == {"balances": 1, "points": 1}
    # A dry run, and a restore that finds nothing missing, change nothing about it.
    await made.good(mode="dry_run")
    assert await known() == {"balances": 1, "points": 1}
    await made.good(mapping="points")
    assert await known() == {"balances": 1, "points": 0}
    # One that was at work already while the verify looked has read before it.
    await pg.execute(
        "UPDATE balancesync.runs SET started_at = started_at - interval '1 hour'"
        " WHERE job = 'sync' AND mapping = 'points'"
    )
    assert await known() == {"balances": 1, "points": 1}
    await made.good()
    assert await known() == {"balances": 0, "points": 0}
