"""The daemon's look at each probe: what it finds proven is stored, and what it doubts is not."""

import asyncio
from collections.abc import Callable

import asyncpg
from engine import Engine, make_config
from redis.asyncio import Redis

from balancesync.embedded import RedisServer
from balancesync.errors import Refused
from balancesync.renewal import Renewal

Make = Callable[..., Engine]
BIG = {"name": "big", "key": "all", "member": "{user_id}", "type": "hash", "table": "big"}


async def fill(redis: Redis, value: int) -> None:
    await redis.mset({f"balance:{each}": str(value) for each in range(10)})


async def refused(engine: Engine) -> str:
    run = await engine.sync()
    assert run.status == "refused", (run.status, run.error, run.counts)
    assert isinstance(engine.failure, Refused)
    return str(engine.failure)


def look_of(engine: Engine) -> Renewal:
    return Renewal(engine.config, engine.database, engine.source)


async def test_a_flush_that_a_probe_has_seen_is_still_doubted(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    made = engine()
    await fill(redis, 50)
    await made.good()
    await redis.flushall()
    for _ in range(2):
        await look_of(made).renew()
    await fill(redis, 0)
    await look_of(made).renew()
    assert "emptied by FLUSHALL or FLUSHDB since the last success" in await refused(made)
    assert await pg.fetchval("SELECT sum(balance) FROM balances") == 500


async def test_a_big_hash_may_lack_no_key_after_a_start_that_a_probe_has_seen(
    private_redis: Callable[..., RedisServer], postgres_dsn: str, pg: asyncpg.Connection
) -> None:
    server = private_redis()
    made = Engine(make_config(postgres_dsn, server.url, {}, BIG))
    async with Redis.from_url(server.url) as client:
        await fill(client, 50)
        await client.save()
        await client.hset("all", mapping=dict.fromkeys(map(str, range(100)), "50"))
        await made.good()
    await asyncio.to_thread(server.kill)
    await asyncio.to_thread(server.start)
    async with Redis.from_url(server.url) as client:
        assert await client.dbsize() == 10
        # The shared connections are the old server's, as they are for the daemon's first look.
        await made.source.close()
        await look_of(made).renew()
        await client.hset("all", mapping=dict.fromkeys(map(str, range(100)), "0"))
    assert "100 of 100 known keys came back changed" in await refused(made)
    assert await pg.fetchval("SELECT sum(balance) FROM big") == 5000
    await made.close()
