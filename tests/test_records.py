"""What is remembered from run to run: by the guard, of rejects, restores and prunes, and when."""

import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import asyncpg
import pytest
from engine import Engine
from redis.asyncio import Redis

from balancesync.errors import Refused
from balancesync.model import Run, new_run_id

MakeEngine = Callable[..., Engine]
PRUNING = {"enabled": True}


async def fill(redis: Redis, ids: Iterable[int], value: object = 1) -> None:
    await redis.mset({f"balance:{each}": str(value) for each in ids})


async def drop(redis: Redis, ids: Iterable[int]) -> None:
    await redis.delete(*(f"balance:{each}" for each in ids))


async def done(engine: Engine, **request: Any) -> Run:
    """Execute a request that has to succeed, whatever its job counts."""
    run = await engine.sync(**request)
    assert (run.status, run.error) == ("succeeded", None)
    return run


async def refused(engine: Engine) -> str:
    run = await engine.sync()
    assert isinstance(engine.failure, Refused), run.error
    return str(run.error)


async def prune(engine: Engine, pg: asyncpg.Connection, ids: Iterable[int]) -> int:
    """Prune these rows; return how many keys went."""
    await pg.execute("UPDATE balances SET synced_at = now()")
    await pg.execute(
        "UPDATE balances SET synced_at = now() - interval '1 day' WHERE user_id = ANY($1::int[])",
        [*ids],
    )
    return (await done(engine, job="prune", idle_s=3600.0)).counts.deleted


async def test_what_was_pruned_and_restored_is_pruned_again_or_missed(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    sync = engine(prune=PRUNING)
    await fill(redis, range(20))
    await sync.good()
    assert await prune(sync, pg, range(12)) == 12
    await done(sync, job="restore")
    assert await redis.dbsize() == 20
    assert await pg.fetchval("SELECT count(*) FROM balancesync.pruned") == 0
    baseline = "SELECT (present, absent, pruned)::text FROM balancesync.baselines"
    assert await pg.fetchval(baseline) == "(20,0,0)"

    # Pruned again they are no loss.
    assert await prune(sync, pg, range(12)) == 12
    assert await pg.fetchval(baseline) == "(20,0,12)"
    await sync.good()
    assert await pg.fetchval(baseline) == "(8,12,0)"

    # Restored once more, and lost, they are one.
    await done(sync, job="restore")
    assert await pg.fetchval(baseline) == "(20,0,0)"
    await drop(redis, range(12))
    assert "12 of 20 known keys are gone" in await refused(sync)


async def test_what_a_restore_brought_back_of_many_is_known(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    """Fewer keys than were known: what is known stays so, and a loss is one of all of them."""
    sync = engine(guard={"max_loss": 0.5, "max_rejects": 1.0})
    await fill(redis, range(20))
    await sync.good()
    await pg.execute("DELETE FROM balances WHERE user_id >= 15")
    await drop(redis, range(20))
    await refused(sync)
    run = await done(sync, job="restore")
    assert run.counts.inserted == 15
    assert await pg.fetchval("SELECT present FROM balancesync.baselines") == 20
    await drop(redis, range(8))
    assert "of 20 known keys are gone" in await refused(sync)


async def test_a_killed_restore_is_not_made_good_by_a_dry_run(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    sync = engine({"on_absent": "delete"})
    await fill(redis, range(20))
    await sync.good()
    await done(sync, job="restore")
    await pg.execute("UPDATE balancesync.runs SET status = 'running' WHERE job = 'restore'")
    await drop(redis, [3])
    await done(sync, job="restore", mode="dry_run")
    run = await sync.good()
    assert (run.counts.absent, run.counts.deleted) == (1, 0)
    assert any("until its restore has succeeded" in warning for warning in run.warnings)
    # Of another mapping it says nothing; of this one, a restore that succeeds does.
    await done(sync, job="restore")
    await drop(redis, [3])
    assert (await sync.good()).counts.deleted == 1


async def test_a_restore_of_one_mapping_says_nothing_of_another(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    bonus = {"name": "bonus", "key": "bonus:{user_id}", "table": "bonus", "on_absent": "delete"}
    sync = engine({"on_absent": "delete"}, bonus)
    await fill(redis, range(20))
    await redis.mset({f"bonus:{number}": "1" for number in range(20)})
    await sync.good()
    await done(sync, job="restore", mapping="bonus")
    await pg.execute("UPDATE balancesync.runs SET status = 'failed' WHERE job = 'restore'")
    await drop(redis, [3])
    await redis.delete("bonus:3")
    run = await sync.good()
    assert [counts.deleted for counts in run.mappings.values()] == [1, 0]


async def test_rejects_of_a_mapping_that_is_configured_no_more(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    bonus = {"name": "bonus", "key": "bonus:{user_id}", "table": "bonus"}
    other = {"name": "other", "key": "other:{user_id}", "table": "other"}
    await redis.mset({"balance:1": "x", "bonus:1": "x", "other:1": "x"})
    await engine({}, bonus, other).good()
    fewer = engine({}, other)
    # A run of one mapping says nothing of the others, nor does one that writes nothing.
    await fewer.good(mapping="other")
    await fewer.good(mode="dry_run")
    await fewer.verify()
    assert len(await fewer.reasons()) == 3
    await fewer.good()
    assert set(await fewer.reasons()) == {b"balance:1", b"other:1"}
    assert set(await fewer.rejects(healed=True)) == {b"balance:1", b"bonus:1", b"other:1"}


async def test_a_refusal_of_a_mapping_that_is_configured_no_more(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    bonus = {"name": "bonus", "key": "bonus:{user_id}", "table": "bonus"}
    await fill(redis, range(3))
    await redis.mset({f"bonus:{number}": "1" for number in range(3)})
    await engine({}, bonus).good()
    await redis.delete(*(f"bonus:{number}" for number in range(3)))
    await refused(engine({}, bonus))
    standing = "SELECT array_agg(mapping) FROM balancesync.baselines WHERE refusal IS NOT NULL"
    assert await pg.fetchval(standing) == ["bonus"]
    alone = engine({})
    await alone.good(mapping="balances")
    assert await pg.fetchval(standing) == ["bonus"]
    await alone.good()
    assert await pg.fetchval(standing) is None


async def test_moments_are_strictly_later_also_when_the_clock_was_set_back(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    sync = engine(history={"enabled": True})
    moments = []
    for value in (1, 2, 3):
        await fill(redis, [1], value)
        run = await sync.good()
        at = await pg.fetchval("SELECT max(at) FROM balancesync.changes")
        moments.append(at)
        # As if PostgreSQL's clock had been an hour ahead until now.
        ahead = timedelta(hours=1) if value == 1 else timedelta()
        await pg.execute("UPDATE balancesync.changes SET at = at + $1::interval", ahead)
        await pg.execute("UPDATE balancesync.histories SET since = since + $1::interval", ahead)
        moments[-1] = at + ahead
        assert any("clock" in warning for warning in run.warnings) == (value > 1)
    assert moments == sorted(set(moments))
    assert moments[2] - moments[1] == timedelta(microseconds=1) == moments[1] - moments[0]
    found = await pg.fetch("SELECT new ->> 'balance' FROM balancesync.changes ORDER BY at")
    assert [row[0] for row in found] == ["1.00", "2.00", "3.00"]


def test_ids_of_runs_are_strictly_later_also_when_the_clock_was_set_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = [new_run_id() for _ in range(5)]
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now - 3_600_000_000_000)
    ids += [new_run_id() for _ in range(5)]
    assert ids == sorted(set(ids))
    assert all((each.version, each.variant) == (7, "specified in RFC 4122") for each in ids)
