"""Losing Redis never empties PostgreSQL: what the guard refuses, and what lifts a refusal."""

from collections.abc import AsyncIterator, Callable, Iterable
from decimal import Decimal
from fractions import Fraction
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from engine import Engine, make_config
from hypothesis import given
from hypothesis import strategies as st
from redis import Redis as BlockingRedis
from redis.asyncio import Redis

from balancesync.embedded import RedisServer
from balancesync.errors import Refused
from balancesync.model import Baseline, Observed, Refusal, guard
from balancesync.part import Progress

Make = Callable[..., Engine]

DELETE = {"on_absent": "delete"}
USERS = (
    "CREATE TABLE users (user_id bigint PRIMARY KEY, balance numeric(20,2), synced_at timestamptz)"
)


async def fill(redis: Redis, ids: Iterable[int], value: object = "100.00") -> None:
    await redis.mset({f"balance:{each}": str(value) for each in ids})


async def drop(redis: Redis, ids: Iterable[int]) -> None:
    await redis.delete(*[f"balance:{each}" for each in ids])


async def table(pg: asyncpg.Connection, name: str = "balances") -> dict[int, Decimal]:
    return {row[0]: row[1] for row in await pg.fetch(f"SELECT user_id, balance FROM {name}")}


async def standing(pg: asyncpg.Connection) -> dict[str, str]:
    rows = await pg.fetch("SELECT mapping, refusal FROM balancesync.baselines")
    return {row["mapping"]: row["refusal"] for row in rows if row["refusal"] is not None}


async def refused(engine: Engine, attempts: int = 1, **request: Any) -> str:
    """Execute a request that the guard has to refuse; return its line."""
    run = await engine.sync(**request)
    assert run.status == "refused", run.error
    assert isinstance(engine.failure, Refused)
    assert engine.failure.exit_code == 3
    assert run.attempts == attempts
    counts = run.counts
    assert (counts.inserted, counts.updated, counts.deleted) == (0, 0, 0)
    assert await engine.recorded(run) == run
    line = str(engine.failure)
    assert line == run.error
    assert "\n" not in line
    assert "--accept-loss" in line
    return line


def at_phase(engine: Engine, phase: str, strike: Callable[[], object]) -> None:
    """Call `strike` once, when a run first comes to this phase."""
    waiting = [strike]

    def on_progress(progress: Progress) -> None:
        if progress.phase == phase and waiting:
            waiting.pop()()

    engine.on_progress = on_progress


@pytest.fixture
async def ten(engine: Make, redis: Redis) -> Engine:
    """An engine after one success with ten keys."""
    await fill(redis, range(10))
    made = engine()
    await made.good()
    return made


# --- loss -----------------------------------------------------------------------------------------


async def test_a_loss_that_is_allowed_is_told_if_it_is_large(ten: Engine, redis: Redis) -> None:
    await drop(redis, [0])
    assert (await ten.good()).warnings == []
    await drop(redis, [1])
    assert (await ten.good()).warnings == [
        'mapping "balances": 1 of 9 known keys are gone; guard.max_loss = 0.5 allows it'
    ]
    assert (await ten.good()).warnings == []


async def test_an_empty_redis_is_refused(ten: Engine, redis: Redis, pg: asyncpg.Connection) -> None:
    before = await pg.fetch("SELECT *, xmin FROM balances ORDER BY user_id")
    await redis.flushall()
    assert "no key at all, but 10 were known" in await refused(ten)
    assert await pg.fetch("SELECT *, xmin FROM balances ORDER BY user_id") == before
    assert "balances" in await standing(pg)


async def test_force_never_overrides_the_guard(ten: Engine, redis: Redis) -> None:
    await redis.flushall()
    await refused(ten, force=False)
    await refused(ten, force=True)


async def test_keys_of_others_do_not_stand_in_for_balances(ten: Engine, redis: Redis) -> None:
    await drop(redis, range(10))
    await redis.mset({f"cache:{each}": "1" for each in range(50)})
    assert "no key at all" in await refused(ten)


@pytest.mark.parametrize("column", ["user_id", "nothing"])
async def test_nothing_known_and_nothing_there_is_a_success_with_a_warning(
    engine: Make, pg: asyncpg.Connection, column: str
) -> None:
    if column == "user_id":
        await pg.execute(
            "CREATE TABLE balances (user_id bigint PRIMARY KEY,"
            " balance numeric(20,2) NOT NULL, synced_at timestamptz)"
        )
    run = await engine().good()
    assert run.counts.scanned == 0
    assert run.warnings == ['mapping "balances": Redis has no key of it']


async def test_exactly_max_loss_passes_and_one_more_does_not(
    ten: Engine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await drop(redis, range(5))
    run = await ten.good()
    assert run.counts.absent == 5
    # From now on five are known, and five more rows were absent before.
    await drop(redis, range(5, 8))
    assert "3 of 5 known keys are gone" in await refused(ten)
    assert len(await table(pg)) == 10


async def test_a_share_means_what_is_written(engine: Make, redis: Redis) -> None:
    # In binary floating point 0.29 * 100 is less than 29, and (1 - 0.7) * 10 more than 3.
    await fill(redis, range(100))
    one = engine(guard={"max_loss": 0.29})
    await one.good()
    await drop(redis, range(29))
    await one.good()

    await redis.flushall()
    await fill(redis, range(200, 210))
    other = engine({"table": "others"}, guard={"max_loss": 0.7}, postgres={"schema": "other"})
    await other.good()
    client = BlockingRedis.from_url(other.config.redis.url.get_secret_value())
    at_phase(other, "diff", lambda: client.delete(*[f"balance:{id_}" for id_ in range(200, 207)]))
    await other.good()
    client.close()


async def test_more_than_max_loss_is_refused(
    ten: Engine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await drop(redis, range(6))
    await fill(redis, [8, 77], "5.00")
    assert "6 of 10 known keys are gone" in await refused(ten)
    assert await table(pg) == dict.fromkeys(range(10), Decimal(100))


async def test_a_reject_is_present(ten: Engine, redis: Redis, pg: asyncpg.Connection) -> None:
    await fill(redis, range(10), "garbage")
    run = await ten.good()
    assert (run.counts.rejected, run.counts.absent) == (10, 0)
    assert await table(pg) == dict.fromkeys(range(10), Decimal(100))


async def test_rows_of_a_table_filled_by_others_are_known(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute(
        "CREATE TABLE balances (user_id bigint PRIMARY KEY,"
        " balance numeric(20,2) NOT NULL, synced_at timestamptz)"
    )
    await pg.execute("INSERT INTO balances SELECT n, 1 FROM generate_series(0, 9) AS n")
    one = engine()
    assert "no key at all, but 10 were known" in await refused(one)
    await fill(redis, range(4))
    await refused(one)
    await fill(redis, range(10), "1.00")
    await one.good()


async def test_update_knows_nothing_before_its_first_success(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute(USERS)
    await pg.execute("INSERT INTO users SELECT n FROM generate_series(0, 99) AS n")
    await fill(redis, range(10))
    one = engine({"table": "users", "mode": "update"})
    run = await one.good()
    assert (run.counts.updated, run.counts.absent) == (10, 90)
    await drop(redis, range(6))
    await refused(one)


async def test_new_users_without_a_balance_are_no_loss_where_no_key_was_known(
    engine: Make, pg: asyncpg.Connection
) -> None:
    await pg.execute(USERS)
    await pg.execute("INSERT INTO users SELECT n FROM generate_series(0, 9) AS n")
    one = engine({"table": "users", "mode": "update"})
    await one.good()
    await pg.execute("INSERT INTO users VALUES (10)")
    run = await one.good()
    assert run.counts.absent == 11


async def test_accepting_a_loss_lifts_the_refusal(
    ten: Engine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await redis.flushall()
    await refused(ten)
    run = await ten.good(accept_loss=True)
    assert any("accepted" in warning and "10 were known" in warning for warning in run.warnings)
    assert run.counts.absent == 10
    assert await standing(pg) == {}
    assert len(await table(pg)) == 10
    # What was accepted is the new normal.
    await ten.good()
    await fill(redis, range(3), "7.00")
    run = await ten.good()
    assert (run.counts.updated, run.counts.absent) == (3, 7)


# --- a refusal stands -----------------------------------------------------------------------------


@pytest.mark.parametrize("recreated", [5, 10])
async def test_keys_created_again_from_zero_do_not_heal_a_refusal(
    ten: Engine, redis: Redis, pg: asyncpg.Connection, recreated: int
) -> None:
    await redis.flushall()
    await refused(ten)
    for each in range(recreated):
        await redis.incrby(f"balance:{each}", 5)
    await refused(ten)
    assert await table(pg) == dict.fromkeys(range(10), Decimal(100))
    await ten.good(accept_loss=True)
    assert (await table(pg))[0] == 5
    assert await standing(pg) == {}


async def test_the_same_keys_coming_back_heal_a_refusal(
    ten: Engine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await redis.flushall()
    await refused(ten)
    # As long as one is missing or another than it was, somebody may have made them anew.
    await fill(redis, range(9))
    assert "1 of 10 known keys are gone, and the refusal stands" in await refused(ten)
    await fill(redis, [9], "90.00")
    assert "1 of 10 known keys came back changed, and the refusal stands" in await refused(ten)
    await fill(redis, range(10))
    assert (await ten.good()).counts.unchanged == 10
    assert await standing(pg) == {}


# --- emptied, and made anew before anybody looked -------------------------------------------------


async def test_keys_made_anew_after_a_flush_are_refused(
    ten: Engine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await redis.flushall()
    await fill(redis, range(10), "0")
    line = await refused(ten)
    assert "Redis was emptied by FLUSHALL or FLUSHDB since the last success: 10 of 10" in line
    assert await table(pg) == dict.fromkeys(range(10), Decimal(100))
    # It's a refusal as any other: what is equal by chance heals nothing.
    await fill(redis, range(9), "100.00")
    await refused(ten)


async def test_a_flush_of_another_database_costs_nothing(ten: Engine, redis_url: str) -> None:
    async with Redis.from_url(redis_url.replace("/0", "/1")) as other:
        await other.set("cache", "x")
        await other.flushdb()
    async with Redis.from_url(redis_url) as client:
        await fill(client, range(4), "7.00")
        assert (await ten.good()).counts.updated == 4
        # With that success it's over.
        await fill(client, range(10), "8.00")
        assert (await ten.good()).counts.updated == 10


async def test_a_redis_that_came_back_without_its_keys_is_refused(
    private_redis: Callable[..., RedisServer], postgres_dsn: str, pg: asyncpg.Connection
) -> None:
    server = private_redis()
    engine = Engine(make_config(postgres_dsn, server.url))
    async with Redis.from_url(server.url) as client:
        await fill(client, range(10))
        await engine.good()
    server.kill()
    server.start()
    async with Redis.from_url(server.url) as client:
        await fill(client, range(10), "0")
        line = await refused(engine)
        assert "was restarted or replaced since the last success, with 0 keys: 10 of 10" in line
        assert await table(pg) == dict.fromkeys(range(10), Decimal(100))
        assert (await engine.good(accept_loss=True)).counts.updated == 10
        await fill(client, range(10), "1")
        await engine.good()
    await engine.close()


@pytest.fixture
async def restarted(
    private_redis: Callable[..., RedisServer], postgres_dsn: str
) -> AsyncIterator[tuple[Engine, Redis]]:
    """Ten keys, a success that knows them, and a Redis that was restarted with them since."""
    server = private_redis()
    engine = Engine(make_config(postgres_dsn, server.url))
    async with Redis.from_url(server.url) as client:
        await fill(client, range(10))
        await client.save()
        await engine.good()
    server.kill()
    server.start()
    async with Redis.from_url(server.url) as client:
        yield engine, client
    await engine.close()


async def test_a_redis_that_came_back_with_its_keys_is_followed(
    restarted: tuple[Engine, Redis],
) -> None:
    engine, client = restarted
    await fill(client, range(10), "7.00")
    run = await engine.good()
    assert run.counts.updated == 10
    assert any("may have gone back in time" in each for each in run.warnings)


async def test_a_redis_that_came_back_with_its_keys_and_was_emptied_then_is_refused(
    restarted: tuple[Engine, Redis],
) -> None:
    engine, client = restarted
    await client.flushall()
    await fill(client, range(10), "0")
    line = await refused(engine)
    assert "and emptied by FLUSHALL or FLUSHDB since its start: 10 of 10" in line


async def test_rejects_that_are_gone_hold_no_refusal_up(ten: Engine, redis: Redis) -> None:
    await fill(redis, [20, 21], "garbage")
    await ten.good()
    await redis.flushall()
    await refused(ten)
    # No row was theirs.
    await fill(redis, range(10))
    assert (await ten.good()).counts.unchanged == 10


async def test_a_big_hash_that_came_back_from_zero_is_refused(
    private_redis: Callable[..., RedisServer], postgres_dsn: str
) -> None:
    server = private_redis()
    mapping = {"key": "all", "member": "{user_id}", "type": "hash"}
    engine = Engine(make_config(postgres_dsn, server.url, mapping))
    async with Redis.from_url(server.url) as client:
        await client.hset("all", mapping=dict.fromkeys(map(str, range(10)), "100.00"))
        await engine.good()
    server.kill()
    server.start()
    async with Redis.from_url(server.url) as client:
        await client.hset("all", mapping=dict.fromkeys(map(str, range(10)), "0"))
    assert "with 0 keys: 10 of 10 known keys came back changed" in await refused(engine)
    await engine.close()


async def test_what_another_mapping_knew_long_ago_is_no_suspicion(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    await fill(redis, range(10))
    await engine({"name": "before"}).good()
    await pg.execute("UPDATE balancesync.baselines SET redis_run_id = 'x', redis_flushes = 9")
    now = engine()
    await now.good()
    await fill(redis, range(10), "7.00")
    assert (await now.good()).counts.updated == 10


async def test_zeros_that_were_zero_before_do_not_heal_a_refusal(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    made = engine()
    await fill(redis, range(60), "0")
    await fill(redis, range(60, 100))
    await made.good()
    await redis.flushall()
    await refused(made)
    await fill(redis, range(100), "0")
    assert "40 of 100 known keys came back changed" in await refused(made)
    assert sum((await table(pg)).values()) == 4000


# --- fewer keys, and fewer rows with them ---------------------------------------------------------


async def test_rows_that_go_with_their_keys_hide_no_loss(
    ten: Engine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await drop(redis, range(9))
    await pg.execute("DELETE FROM balances WHERE user_id < 8")
    assert "9 of 10 known keys are gone" in await refused(ten)


async def test_keys_without_a_row_are_lost_like_others(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute(USERS)
    await pg.execute("INSERT INTO users SELECT n FROM generate_series(0, 9) AS n")
    made = engine({"table": "users", "mode": "update"})
    await fill(redis, range(30))
    assert (await made.good()).counts.not_found == 20
    await drop(redis, range(2, 30))
    assert "28 of 30 known keys are gone" in await refused(made)


# --- whose baseline ------------------------------------------------------------------------------


async def test_a_run_of_one_mapping_does_not_move_the_baseline(
    ten: Engine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await drop(redis, range(4))
    await ten.good(mapping="balances")
    await drop(redis, [4, 5])
    # Of the six that the run of one mapping saw, two would be no reason to refuse.
    assert "6 of 10 known keys are gone" in await refused(ten)


async def test_one_refusal_and_nothing_of_any_mapping_is_written(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    one = engine(
        {"name": "cash"},
        {"name": "points", "key": "points:{user_id}", "table": "points"},
    )
    await fill(redis, range(10))
    await redis.mset({f"points:{each}": "1" for each in range(10)})
    await one.good()
    await drop(redis, range(10))
    await redis.set("points:1", "2")
    line = await refused(one)
    assert 'mapping "cash"' in line
    assert "points" not in line
    assert (await table(pg, "points"))[1] == 1
    # The other mapping by itself is another matter, and heals nothing.
    run = await one.good(mapping="points")
    assert run.counts.updated == 1
    assert [*await standing(pg)] == ["cash"]
    await refused(one)
    # Nor does a run without it while it is configured; once it isn't, nobody else could lift it.
    other = engine({"name": "points", "key": "points:{user_id}", "table": "points"})
    await other.good(mode="dry_run")
    assert [*await standing(pg)] == ["cash"]
    await other.good()
    assert await standing(pg) == {}


async def test_keys_that_go_after_the_scan_are_refused_before_anything_is_written(
    ten: Engine, redis: Redis, redis_url: str, pg: asyncpg.Connection
) -> None:
    await fill(redis, range(10), "55.00")
    with BlockingRedis.from_url(redis_url) as client:
        at_phase(ten, "diff", client.flushall)
        assert "no key at all, but 10 were known" in await refused(ten, 2)
    assert await table(pg) == dict.fromkeys(range(10), Decimal(100))
    assert "balances" in await standing(pg)


@pytest.mark.parametrize("max_loss", [0.5, 1.0])
async def test_a_primary_that_was_emptied_is_refused_whatever_the_limit(
    engine: Make, redis: Redis, redis_url: str, max_loss: float
) -> None:
    await fill(redis, range(10))
    one = engine(guard={"max_loss": max_loss})
    await one.good()
    with BlockingRedis.from_url(redis_url) as client:
        at_phase(one, "diff", client.flushall)
        await refused(one, 2)


async def test_what_is_accepted_is_what_redis_held_when_it_was_read_again(
    ten: Engine, redis: Redis, redis_url: str, pg: asyncpg.Connection
) -> None:
    await fill(redis, range(10), "55.00")
    with BlockingRedis.from_url(redis_url) as client:
        at_phase(ten, "diff", client.flushall)
        run = await ten.good(accept_loss=True)
    assert run.attempts == 2
    assert any("accepted" in warning and "no key at all" in warning for warning in run.warnings)
    assert await table(pg) == dict.fromkeys(range(10), Decimal(100))


@pytest.mark.parametrize("request_", [{"mode": "dry_run"}, {"job": "verify", "mode": "verify"}])
async def test_what_writes_nothing_only_warns(
    ten: Engine, redis: Redis, pg: asyncpg.Connection, request_: dict[str, str]
) -> None:
    await redis.flushall()
    run = await ten.good(**request_)
    assert any("a sync would be refused" in warning for warning in run.warnings)
    assert await standing(pg) == {}


async def test_a_restarted_redis_is_told_once(
    private_redis: Callable[..., RedisServer], postgres_dsn: str
) -> None:
    server = private_redis({"appendonly": "yes", "appendfsync": "always"})
    async with Redis.from_url(server.url) as client:
        await fill(client, range(10))
    one = Engine(make_config(postgres_dsn, server.url))
    assert (await one.good()).warnings == []
    server.kill()
    server.start()
    # One that only looks has it told once more.
    for request in ({"mode": "dry_run"}, {"job": "verify", "mode": "verify"}, {}):
        [warning] = (await one.good(**request)).warnings
        assert "restarted or replaced" in warning
    assert (await one.good()).warnings == []
    await one.close()


# --- change ---------------------------------------------------------------------------------------


async def test_too_many_changes_are_refused_and_leave_nothing_standing(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    await fill(redis, range(10))
    one = engine(guard={"max_change": 0.3})
    await one.good()
    await fill(redis, range(4), "1.00")
    assert "4 of 10 rows would be updated or deleted" in await refused(one)
    assert await standing(pg) == {}
    assert await table(pg) == dict.fromkeys(range(10), Decimal(100))
    await fill(redis, range(1))
    assert (await one.good()).counts.updated == 3
    await fill(redis, range(10), "2.00")
    await refused(one)
    assert (await one.good(accept_loss=True)).counts.updated == 10


async def test_deletions_are_changes(engine: Make, redis: Redis) -> None:
    await fill(redis, range(10))
    one = engine(DELETE, guard={"max_change": 0.3})
    await one.good()
    await drop(redis, range(2))
    await fill(redis, [8, 9], "1.00")
    assert "4 of 10 rows" in await refused(one)


# --- deleting -------------------------------------------------------------------------------------


@pytest.fixture
async def deleting(engine: Make, redis: Redis) -> Engine:
    """An engine that deletes what is absent, after one success with ten keys."""
    await fill(redis, range(10))
    made = engine(DELETE)
    await made.good()
    return made


async def test_only_rows_of_our_own_are_deleted(
    deleting: Engine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute("INSERT INTO balances (user_id, balance) VALUES (77, 1)")
    await drop(redis, [3])
    run = await deleting.good()
    assert (run.counts.deleted, run.counts.absent) == (1, 2)
    assert sorted(await table(pg)) == [0, 1, 2, 4, 5, 6, 7, 8, 9, 77]


async def test_what_the_scan_missed_is_not_deleted(
    deleting: Engine, redis: Redis, redis_url: str, pg: asyncpg.Connection
) -> None:
    await drop(redis, [3, 4])
    with BlockingRedis.from_url(redis_url) as client:
        at_phase(deleting, "diff", lambda: client.set("balance:3", "8.00"))
        run = await deleting.good()
    assert (run.counts.deleted, run.counts.absent) == (1, 1)
    assert sorted(await table(pg)) == [0, 1, 2, 3, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("mapping", [None, "balances"])
async def test_nothing_is_deleted_while_a_restore_is_unfinished(
    deleting: Engine, redis: Redis, pg: asyncpg.Connection, mapping: str | None
) -> None:
    restore = (
        "INSERT INTO balancesync.runs (id, job, trigger, mode, status, mapping, started_at,"
        " attempts, mappings, warnings, lock_key)"
        " VALUES ($1, 'restore', 'cli', 'apply', $2, $3, now(), 1, '{}', '{}', 0)"
    )
    await pg.execute(restore, UUID(int=1), "failed", mapping)
    await drop(redis, [3])
    run = await deleting.good()
    assert (run.counts.deleted, run.counts.absent) == (0, 1)
    assert any("until its restore has succeeded" in warning for warning in run.warnings)
    assert len(await table(pg)) == 10
    await pg.execute(restore, UUID(int=2), "succeeded", mapping)
    assert (await deleting.good()).counts.deleted == 1


async def test_the_guard_counts_what_would_be_deleted(
    deleting: Engine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await drop(redis, range(6))
    await refused(deleting)
    assert len(await table(pg)) == 10
    await fill(redis, range(6))
    await deleting.good()
    await drop(redis, range(2))
    assert (await deleting.good()).counts.deleted == 2
    # What was deleted isn't absent any more: 5 of 8 would be too many, 4 of 8 are not.
    await drop(redis, range(2, 7))
    assert "5 of 8" in await refused(deleting)
    await fill(redis, range(2, 7))
    await deleting.good()
    await drop(redis, range(2, 6))
    assert (await deleting.good()).counts.deleted == 4
    assert sorted(await table(pg)) == [6, 7, 8, 9]


# --- the pure rule --------------------------------------------------------------------------------

counts = st.integers(min_value=0, max_value=10**9)
percents = st.integers(min_value=0, max_value=100)
baselines = st.builds(Baseline, present=counts, absent=counts)
observed = st.builds(
    Observed, present=counts, absent=counts, changed=counts, deletable=counts, target_rows=counts
)


def judge(
    seen: Observed,
    baseline: Baseline | None,
    *,
    standing: bool = False,
    suspicion: str | None = None,
    max_loss: float = 0.5,
    max_change: float = 1.0,
) -> Refusal | None:
    return guard(
        "m",
        seen,
        baseline,
        standing=standing,
        suspicion=suspicion,
        max_loss=max_loss,
        max_change=max_change,
    ).refusal


def looks(present: int, absent: int, changed: int = 0) -> Observed:
    return Observed(present, absent, changed, deletable=0, target_rows=present + absent)


@given(st.integers(min_value=1, max_value=10**6), counts, percents, st.data())
def test_loss_is_judged_by_the_exact_share(
    known: int, absent_before: int, percent: int, data: st.DataObject
) -> None:
    lost = data.draw(st.integers(min_value=0, max_value=known - 1))
    refusal = judge(
        looks(known - lost, absent_before + lost),
        Baseline(known, absent_before),
        max_loss=percent / 100,
    )
    assert (refusal is not None) == (lost > Fraction(percent, 100) * known)
    assert refusal is None or refusal.kind == "loss"


@given(observed, st.booleans(), percents)
def test_where_nothing_was_known_nothing_is_lost(
    seen: Observed, standing: bool, percent: int
) -> None:
    for baseline in (None, Baseline(0, seen.absent // 2), Baseline(5, 0, pruned=5)):
        assert judge(seen, baseline, standing=standing, max_loss=percent / 100) is None


@given(counts, counts, percents)
def test_no_key_at_all_is_refused_whatever_the_limit(known: int, absent: int, percent: int) -> None:
    refusal = judge(looks(0, absent), Baseline(known + 1, 0), max_loss=percent / 100)
    assert refusal is not None
    assert refusal.kind == "loss"


@given(observed, baselines, percents, percents)
def test_a_standing_refusal_never_makes_the_guard_milder(
    seen: Observed, baseline: Baseline, loss: int, change: int
) -> None:
    for suspicion in (None, "Redis was emptied"):
        limits: Any = {"max_loss": loss / 100, "max_change": change / 100, "suspicion": suspicion}
        if judge(seen, baseline, standing=False, **limits) is not None:
            assert judge(seen, baseline, standing=True, **limits) is not None


@given(baselines, counts, counts, percents)
def test_losing_more_is_never_judged_milder(
    baseline: Baseline, lost: int, more: int, percent: int
) -> None:
    def at(absent: int) -> Refusal | None:
        return judge(looks(1, baseline.absent + absent), baseline, max_loss=percent / 100)

    if at(lost) is not None:
        assert at(lost + more) is not None


@given(st.integers(min_value=2, max_value=10**6), st.data())
def test_pruned_keys_are_no_loss(known: int, data: st.DataObject) -> None:
    pruned = data.draw(st.integers(min_value=0, max_value=known - 1))
    assert judge(looks(known - pruned, pruned), Baseline(known, 0, pruned), max_loss=0.0) is None


@given(st.integers(min_value=1, max_value=10**6), percents, st.data())
def test_change_is_judged_by_the_exact_share_of_the_rows(
    rows: int, percent: int, data: st.DataObject
) -> None:
    changed = data.draw(st.integers(min_value=0, max_value=rows))
    deleted = data.draw(st.integers(min_value=0, max_value=rows - changed))
    seen = Observed(rows, 0, changed, deleted, rows)
    refusal = judge(seen, None, max_change=percent / 100)
    assert (refusal is not None) == (changed + deleted > Fraction(percent, 100) * rows)
    assert refusal is None or refusal.kind == "change"
