"""Verify proves that the two agree: what is drift, what isn't, and that nothing is written."""

from collections.abc import Callable, Iterable
from decimal import Decimal

import asyncpg
import pytest
from engine import Engine
from redis import Redis as BlockingRedis
from redis.asyncio import Redis

from balancesync.errors import TargetMismatch
from balancesync.model import Run
from balancesync.part import Progress

Make = Callable[..., Engine]


async def fill(redis: Redis, ids: Iterable[int], value: str = "100.00") -> None:
    await redis.mset({f"balance:{each}": value for each in ids})


def drift(run: Run) -> tuple[int, int, int]:
    return run.counts.inserted, run.counts.updated, run.counts.deleted


@pytest.fixture
async def ten(engine: Make, redis: Redis) -> Engine:
    """An engine after one success with ten keys."""
    await fill(redis, range(10))
    made = engine()
    await made.good()
    return made


@pytest.fixture
async def deleting(engine: Make, redis: Redis) -> Engine:
    """An engine that deletes what is absent, after one success with ten keys."""
    await fill(redis, range(10))
    made = engine({"on_absent": "delete"})
    await made.good()
    return made


def at_phase(engine: Engine, phase: str, strike: Callable[[], object]) -> None:
    """Call `strike` once, when a run first comes to this phase."""
    waiting = [strike]

    def on_progress(progress: Progress) -> None:
        if progress.phase == phase and waiting:
            waiting.pop()()

    engine.on_progress = on_progress


async def test_what_agrees_has_no_drift(ten: Engine, pg: asyncpg.Connection) -> None:
    before = await pg.fetch("SELECT *, xmin FROM balances ORDER BY user_id")
    run = await ten.verify()
    assert (run.status, run.counts.unchanged, run.counts.scanned) == ("succeeded", 10, 10)
    assert drift(run) == (0, 0, 0)
    assert ten.reports[0].rows == {}
    assert await pg.fetch("SELECT *, xmin FROM balances ORDER BY user_id") == before


async def test_a_changed_row_is_drift_and_stays_as_it_is(
    ten: Engine, pg: asyncpg.Connection
) -> None:
    await pg.execute("UPDATE balances SET balance = 99.5 WHERE user_id = 3")
    run = await ten.verify()
    assert drift(run) == (0, 1, 0)
    assert run.counts.unchanged == 9
    [row] = ten.reports[0].rows["u"]
    assert (row.key, row.old, row.new) == (("3",), ("99.50",), ("100.00",))
    assert ten.reports[0].totals == {"balance": "0.50"}
    assert await pg.fetchval("SELECT balance FROM balances WHERE user_id = 3") == Decimal("99.5")
    assert drift(await ten.verify()) == (0, 1, 0)


async def test_a_missing_row_is_drift(ten: Engine, pg: asyncpg.Connection) -> None:
    await pg.execute("DELETE FROM balances WHERE user_id IN (3, 4)")
    run = await ten.verify()
    assert drift(run) == (2, 0, 0)
    assert [row.key for row in ten.reports[0].rows["i"]] == [("3",), ("4",)]
    assert await pg.fetchval("SELECT count(*) FROM balances") == 8


async def test_everything_missing_is_drift(ten: Engine, pg: asyncpg.Connection) -> None:
    await pg.execute("TRUNCATE balances")
    assert drift(await ten.verify()) == (10, 0, 0)


async def test_a_row_without_key_is_drift_with_delete_only(
    ten: Engine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await redis.delete("balance:3")
    run = await ten.verify()
    assert drift(run) == (0, 0, 0)
    assert run.counts.absent == 1


async def test_a_deleted_key_is_drift_with_delete(
    deleting: Engine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await redis.delete("balance:3", "balance:4")
    await fill(redis, [7], "101.00")
    run = await deleting.verify()
    assert drift(run) == (0, 1, 2)
    assert (run.counts.absent, run.counts.unchanged) == (2, 7)
    [report] = deleting.reports
    assert [row.key for row in report.rows["d"]] == [("3",), ("4",)]
    assert [row.key for row in report.rows["u"]] == [("7",)]
    assert report.totals == {"balance": "-199.00"}
    assert await pg.fetchval("SELECT count(*) FROM balances") == 10


async def test_a_key_that_comes_back_meanwhile_is_no_drift(
    deleting: Engine, redis: Redis, redis_url: str
) -> None:
    await redis.delete("balance:3")
    with BlockingRedis.from_url(redis_url) as client:
        at_phase(deleting, "compare", lambda: client.set("balance:3", "100.00"))
        run = await deleting.verify()
    assert drift(run) == (0, 0, 0)
    assert deleting.reports[0].rows == {}


async def test_rows_of_others_are_no_drift_with_delete(
    deleting: Engine, pg: asyncpg.Connection
) -> None:
    await pg.execute("INSERT INTO balances (user_id, balance) VALUES (77, 1)")
    run = await deleting.verify()
    assert drift(run) == (0, 0, 0)
    assert run.counts.absent == 1


async def test_what_settles_on_a_second_look_is_no_drift(
    ten: Engine, redis: Redis, redis_url: str, pg: asyncpg.Connection
) -> None:
    await fill(redis, [3, 4], "101.00")
    with BlockingRedis.from_url(redis_url) as client:
        # The application sets one of them back before it's read again.
        at_phase(ten, "compare", lambda: client.set("balance:3", "100.00"))
        run = await ten.verify()
    assert drift(run) == (0, 1, 0)
    assert [row.key for row in ten.reports[0].rows["u"]] == [("4",)]


async def test_a_key_that_goes_meanwhile_is_no_drift(
    ten: Engine, redis: Redis, redis_url: str
) -> None:
    await fill(redis, [3], "101.00")
    with BlockingRedis.from_url(redis_url) as client:
        at_phase(ten, "compare", lambda: client.delete("balance:3"))
        run = await ten.verify()
    assert drift(run) == (0, 0, 0)


async def test_what_moves_again_is_judged_by_the_second_look(
    ten: Engine, redis: Redis, redis_url: str
) -> None:
    await fill(redis, [3], "101.00")
    with BlockingRedis.from_url(redis_url) as client:
        at_phase(ten, "compare", lambda: client.set("balance:3", "102.00"))
        run = await ten.verify()
    assert drift(run) == (0, 1, 0)
    assert [row.new for row in ten.reports[0].rows["u"]] == [("102.00",)]


async def test_rejects_are_told_beside_drift(ten: Engine, redis: Redis) -> None:
    await fill(redis, [3], "garbage")
    run = await ten.verify()
    assert drift(run) == (0, 0, 0)
    assert (run.status, run.counts.rejected, run.counts.absent) == ("succeeded", 1, 0)
    # Only an apply run keeps them.
    assert await ten.rejects() == {}


async def test_a_key_without_row_in_an_update_table_is_no_drift(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute(
        "CREATE TABLE users"
        " (user_id bigint PRIMARY KEY, balance numeric(20,2), synced_at timestamptz)"
    )
    await pg.execute("INSERT INTO users SELECT n FROM generate_series(0, 4) AS n")
    await fill(redis, range(10))
    made = engine({"table": "users", "mode": "update"})
    await made.good()
    run = await made.verify()
    assert drift(run) == (0, 0, 0)
    assert (run.counts.not_found, run.counts.unchanged) == (5, 5)
    await pg.execute("UPDATE users SET balance = NULL WHERE user_id = 2")
    run = await made.verify()
    assert drift(run) == (0, 1, 0)
    assert (run.counts.not_found, run.counts.unchanged) == (5, 4)


async def test_a_mapping_is_verified_by_itself(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    await fill(redis, range(10))
    await redis.set("points:1", "5")
    made = engine({}, {"name": "points", "key": "points:{user_id}", "table": "points"})
    await made.good()
    await pg.execute("UPDATE points SET balance = 6")
    run = await made.good(job="verify", mode="verify", mapping="balances")
    assert drift(run) == (0, 0, 0)
    assert [*run.mappings] == ["balances"]
    assert run.mapping == "balances"
    assert drift(await made.good(job="verify", mode="verify", mapping="points")) == (0, 1, 0)


async def test_verify_makes_no_table(engine: Make, redis: Redis, pg: asyncpg.Connection) -> None:
    await fill(redis, range(10))
    await engine().good()
    other = engine({"table": "others"})
    line = await other.failed(TargetMismatch, job="verify", mode="verify")
    assert "others does not exist yet" in line
    assert await pg.fetchval("SELECT to_regclass('others')") is None


async def test_verify_moves_neither_baseline_nor_last_success(
    ten: Engine, pg: asyncpg.Connection
) -> None:
    before = await pg.fetch("SELECT * FROM balancesync.baselines")
    success = await ten.records.last_success(pg)
    run = await ten.verify()
    assert await pg.fetch("SELECT * FROM balancesync.baselines") == before
    assert await ten.records.last_success(pg) == success
    assert await ten.recorded(run) == run


async def test_verify_is_done_however_young_the_last_success(engine: Make, redis: Redis) -> None:
    await fill(redis, range(10))
    made = engine(schedule={"min_interval": 3600})
    await made.good()
    assert (await made.sync(force=False)).status == "skipped"
    run = await made.sync(job="verify", mode="verify", force=False)
    assert (run.status, run.counts.unchanged) == ("succeeded", 10)
