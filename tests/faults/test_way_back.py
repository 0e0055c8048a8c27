"""The road back under fire: a restore that loses its servers leaves no half of a balance."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from engine import Engine, make_config
from proxy import Proxy
from redis.asyncio import Redis

from balancesync.embedded import RedisServer
from balancesync.model import Request
from balancesync.sync import Sync
from faults.figures import Figures
from faults.ground import RETRY, spread, through

ACCOUNTS = 200
MAPPING = {
    "name": "accounts",
    "key": "account:{id}",
    "type": "hash",
    "table": "accounts",
    "columns": {"id": "bigint", "amount": "numeric(20,2)", "held": "numeric(20,2)"},
}


async def accounts(redis: Redis) -> dict[bytes, dict[Any, Any]]:
    """All there are, by key."""
    keys = [key async for key in redis.scan_iter(match="account:*", count=1000)]
    return {key: await redis.hgetall(key) for key in keys}


@pytest.fixture
async def durable(private_redis: Callable[..., RedisServer]) -> RedisServer:
    server = private_redis({"appendonly": "yes", "appendfsync": "always"})
    async with Redis.from_url(server.url) as client:
        for number in range(ACCOUNTS):
            await client.hset(
                f"account:{number}", items=["amount", f"{number}.5", "held", str(number * 3)]
            )
    return server


@pytest.mark.parametrize(
    ("side", "fault"),
    [
        ("postgres", "reset"),
        ("postgres", "lose_next_reply"),
        ("redis", "reset"),
        ("redis", "lose_next_reply"),
        ("redis", "kill"),
    ],
)
async def test_a_restore_that_fails_at_any_step(
    durable: RedisServer,
    postgres_dsn: str,
    figures: Figures,
    *,
    side: str,
    fault: str,
    torture: bool,
) -> None:
    chance = random.Random(4711)  # noqa: S311  # which steps, the same each time
    straight = Engine(make_config(postgres_dsn, durable.url, MAPPING))
    await straight.good()
    async with Redis.from_url(durable.url) as client:
        whole = await accounts(client)
    assert len(whole) == ACCOUNTS

    def kill() -> None:
        durable.kill()
        durable.start()

    port = int(postgres_dsn.rpartition(":")[2].partition("/")[0])
    async with Proxy(port) as before, Proxy(durable.port) as source:
        url = f"redis://127.0.0.1:{source.port}/0"
        sections: dict[str, Any] = {"retry": {**RETRY, "attempts": 1}, "redis": {"scan_count": 10}}
        failing = Engine(make_config(through(postgres_dsn, before), url, MAPPING, **sections))
        proxy = source if side == "redis" else before

        async def restore() -> str:
            sync = Sync(failing.config, failing.database, failing.source)
            figures.ran()
            return (await sync.run(Request("restore", "cli"))).status

        async with Redis.from_url(durable.url) as client:
            await client.flushall()
            began = proxy.chunks
            assert await restore() == "succeeded"
            steps = proxy.chunks - began
        failed = 0
        for step in spread(chance, steps, 40 if torture else 3):
            async with Redis.from_url(durable.url) as client:
                await client.flushall()
            proxy.at_step(step, kill if fault == "kill" else getattr(proxy, fault))
            failed += await restore() != "succeeded"
            proxy.forget_steps()
            async with Redis.from_url(durable.url) as client:
                there = await accounts(client)
                wrong = [key for key, fields in there.items() if whole[key] != fields]
                figures.checked(len(there), len(wrong))
                assert not wrong
                # A second one completes it, and both sides agree.
                assert (await straight.sync(job="restore")).status == "succeeded"
                assert (await accounts(client)) == whole
            run = await straight.verify()
            assert (run.counts.unchanged, run.counts.written) == (ACCOUNTS, 0)
        assert failed
        await failing.close()
    await straight.close()
