"""What the guard does in doubt, and what moves what it remembers."""

import asyncio
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any

import asyncpg
import pytest
from engine import Engine, make_config
from redis import Redis as BlockingRedis
from redis.asyncio import Redis

from balancesync.embedded import RedisServer
from balancesync.errors import Refused, RunFailed
from balancesync.part import Progress

Make = Callable[..., Engine]
POINTS = {"name": "points", "key": "points:{user_id}", "table": "points"}


async def fill(redis: Redis, value: object, ids: Iterable[int], kind: str = "balance") -> None:
    await redis.mset({f"{kind}:{each}": str(value) for each in ids})


async def drop(redis: Redis, ids: Iterable[int]) -> None:
    await redis.delete(*[f"balance:{each}" for each in ids])


async def refused(engine: Engine, **request: Any) -> str:
    run = await engine.sync(**request)
    assert run.status == "refused", (run.status, run.error, run.counts)
    assert isinstance(engine.failure, Refused)
    return str(engine.failure)


async def rows(pg: asyncpg.Connection) -> dict[int, Decimal]:
    return {row[0]: row[1] for row in await pg.fetch("SELECT user_id, balance FROM balances")}


@pytest.fixture
async def hundred(engine: Make, redis: Redis) -> Engine:
    """An engine after one success with a hundred keys at 50."""
    await fill(redis, 50, range(100))
    made = engine()
    await made.good()
    return made


async def test_what_is_gone_and_what_differs_add_up_in_doubt(
    hundred: Engine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await redis.flushall()
    await fill(redis, 50, range(40))
    await fill(redis, 0, range(40, 70))
    line = await refused(hundred)
    assert "30 of 100 known keys are gone and 30 came back changed" in line
    assert set((await rows(pg)).values()) == {50}


async def test_without_doubt_they_do_not(hundred: Engine, redis: Redis) -> None:
    await drop(redis, range(70, 100))
    await fill(redis, 0, range(40, 70))
    run = await hundred.good()
    assert (run.counts.updated, run.counts.absent) == (30, 30)


async def test_a_loss_by_del_that_was_refused_is_not_healed_by_keys_made_anew(
    hundred: Engine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await drop(redis, range(60))
    assert "60 of 100 known keys are gone" in await refused(hundred)
    await fill(redis, 0, range(60))
    assert "60 of 100 known keys came back changed, and the refusal stands" in await refused(
        hundred
    )
    # One is enough, however few that is.
    await fill(redis, 50, range(1, 60))
    assert "1 of 100 known keys came back changed" in await refused(hundred)
    assert set((await rows(pg)).values()) == {50}
    await fill(redis, 50, [0])
    await hundred.good()


async def test_a_flush_and_a_refill_between_scan_and_judgement(
    hundred: Engine, redis: Redis, redis_url: str, pg: asyncpg.Connection
) -> None:
    with BlockingRedis.from_url(redis_url) as client:
        struck = False

        def on_progress(progress: Progress) -> None:
            nonlocal struck
            if progress.phase == "diff" and not struck:
                struck = True
                client.flushall()
                client.mset({f"balance:{each}": "0" for each in range(100)})

        hundred.on_progress = on_progress
        # All that it read was there before.
        await hundred.sync()
    hundred.on_progress = lambda progress: None
    assert set((await rows(pg)).values()) == {50}
    assert "emptied by FLUSHALL or FLUSHDB since the last success" in await refused(hundred)
    assert set((await rows(pg)).values()) == {50}


async def test_a_refusal_stands_whatever_the_limit_but_one(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    await fill(redis, 50, range(10))
    one = engine(guard={"max_loss": 1.0})
    await one.good()
    await redis.flushall()
    # No key at all is refused also then.
    assert "no key at all" in await refused(one)
    await fill(redis, 0, range(3))
    # Whoever allows every loss wants no refusal to stand because of one.
    run = await one.good()
    assert (run.counts.updated, run.counts.absent) == (3, 7)
    assert await pg.fetchval("SELECT refusal FROM balancesync.baselines") is None


async def test_a_run_with_too_many_rejects_leaves_what_the_guard_remembers(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    await fill(redis, 50, range(100))
    one = engine(guard={"max_rejects": 0.1})
    await one.good()
    before = await pg.fetchrow("SELECT * FROM balancesync.baselines")
    await drop(redis, range(40))
    await fill(redis, "garbage", range(40, 60))
    run = await one.sync()
    assert (run.status, type(one.failure)) == ("failed", RunFailed)
    assert await pg.fetchrow("SELECT * FROM balancesync.baselines") == before
    # Of the sixty that it saw, eleven more would be no reason to refuse.
    await fill(redis, 50, range(40, 60))
    await drop(redis, range(40, 51))
    assert "51 of 100 known keys are gone" in await refused(one)


async def test_a_loss_of_one_mapping_is_accepted_alone(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    one = engine({}, POINTS)
    await fill(redis, 50, range(10))
    await fill(redis, 5, range(10), "points")
    await one.good()
    await redis.flushall()
    await fill(redis, 7, range(10))
    await fill(redis, 0, range(10), "points")
    await refused(one)
    run = await one.good(mapping="balances", accept_loss=True)
    assert run.counts.updated == 10
    standing = "SELECT mapping FROM balancesync.baselines WHERE refusal IS NOT NULL"
    assert [row[0] for row in await pg.fetch(standing)] == ["points"]
    # What was accepted is known from then on; the other one isn't.
    await fill(redis, 8, range(10))
    assert (await one.good(mapping="balances")).counts.updated == 10
    assert 'mapping "points"' in await refused(one)
    assert await pg.fetchval("SELECT sum(balance) FROM points") == 50


BIG = {"name": "big", "key": "all", "member": "{user_id}", "type": "hash", "table": "big"}


async def test_a_restart_beside_a_big_hash_is_followed(
    private_redis: Callable[..., RedisServer], postgres_dsn: str
) -> None:
    server = private_redis()
    made = Engine(make_config(postgres_dsn, server.url, {}, BIG))
    async with Redis.from_url(server.url) as client:
        await fill(client, 50, range(10))
        await client.hset("all", mapping=dict.fromkeys(map(str, range(1000)), "50"))
        await client.save()
        await made.good()
    await asyncio.to_thread(server.kill)
    await asyncio.to_thread(server.start)
    async with Redis.from_url(server.url) as client:
        # All its fields are one key.
        assert await client.dbsize() == 11
        await fill(client, 60, range(10))
        await client.hset("all", mapping=dict.fromkeys(map(str, range(1000)), "60"))
        assert (await made.good()).counts.updated == 1010
    await made.close()


async def test_a_restart_that_lacks_the_big_hash_alone_is_refused(
    private_redis: Callable[..., RedisServer], postgres_dsn: str, pg: asyncpg.Connection
) -> None:
    server = private_redis()
    made = Engine(make_config(postgres_dsn, server.url, {}, BIG))
    async with Redis.from_url(server.url) as client:
        await fill(client, 50, range(10))
        await client.save()
        await client.hset("all", mapping=dict.fromkeys(map(str, range(1000)), "50"))
        await made.good()
    await asyncio.to_thread(server.kill)
    await asyncio.to_thread(server.start)
    async with Redis.from_url(server.url) as client:
        assert await client.dbsize() == 10
        await client.hset("all", mapping=dict.fromkeys(map(str, range(1000)), "0"))
    assert "1,000 of 1,000 known keys came back changed" in await refused(made)
    assert await pg.fetchval("SELECT sum(balance) FROM big") == 50_000
    await made.close()
