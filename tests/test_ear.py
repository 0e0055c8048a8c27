"""A daemon hears whether Redis is emptied, and keeps the proof that it wasn't fresh."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from engine import Engine, make_config
from pydantic import SecretStr
from redis import Redis as BlockingRedis
from redis.asyncio import Redis
from running import Inside, daemon_config
from service import Service

from balancesync.config import RedisConfig
from balancesync.ear import Ear
from balancesync.embedded import RedisServer
from balancesync.source import Source

PrivateRedis = Callable[..., RedisServer]
KEYS = 20
# Nothing in INFO proves anything.
DUMB: dict[str, Any] = {
    "sections": ["commandstats", "stats", "persistence"],
    "hidden": ["run_id", "master_replid", "master_replid2", "uptime_in_seconds"],
}


async def fill(redis: Redis, value: object) -> None:
    await redis.mset({f"balance:{each}": str(value) for each in range(KEYS)})


async def until(condition: Callable[[], Awaitable[bool]], within_s: float = 30) -> None:
    async with asyncio.timeout(within_s):
        while True:
            if await condition():
                return
            await asyncio.sleep(0.02)


async def follows(pg: asyncpg.Connection, redis: Redis) -> None:
    """Until the daemon has stored that it's this server now."""
    run_id = (await redis.info("server"))["run_id"]

    async def is_stored() -> bool:
        stored = await pg.fetchval("SELECT redis_run_id FROM balancesync.baselines")
        return bool(stored == run_id)

    await until(is_stored)


async def caught_up(replica: Redis, primary: Redis) -> None:
    """Until the replica is attached and has all that the primary has."""

    async def has_all() -> bool:
        found = await replica.info("replication")
        offset = (await primary.info("replication"))["master_repl_offset"]
        is_up = found.get("master_link_status") == "up"
        return is_up and bool(found["master_repl_offset"] == offset)

    await until(has_all)


@pytest.fixture
async def dumb(private_redis: PrivateRedis) -> AsyncIterator[tuple[Service, Redis]]:
    """A service whose INFO proves nothing, and a client of the server behind it."""
    server = private_redis()
    async with Service(server.port, **DUMB) as front, Redis.from_url(server.url) as client:
        await fill(client, 50)
        yield front, client


@pytest.mark.parametrize("refused", ["HELLO", "SUBSCRIBE"])
async def test_an_open_ear_proves_what_info_does_not_tell(
    refused: str, dumb: tuple[Service, Redis], postgres_dsn: str, pg: asyncpg.Connection
) -> None:
    front, client = dumb
    # Redis tells over RESP3, or over a second connection.
    front.refused = {refused}
    async with Inside(daemon_config(postgres_dsn, front.url)) as daemon:
        await daemon.leads()
        assert (await daemon.api.sync())["status"] == "succeeded"
        for value in (60, 70):
            await fill(client, value)
            run = await daemon.api.sync()
            assert (run["status"], run["updated"]) == ("succeeded", KEYS)
        await client.flushall()
        await fill(client, 0)
        run = await daemon.api.sync()
        assert run["status"] == "refused"
        assert "doesn't tell whether it was emptied since the last success" in run["error"]
    assert await pg.fetchval("SELECT sum(balance) FROM balances") == 70 * KEYS


async def test_a_broken_ear_proves_nothing(
    dumb: tuple[Service, Redis], postgres_dsn: str, pg: asyncpg.Connection
) -> None:
    front, client = dumb
    async with Inside(daemon_config(postgres_dsn, front.url)) as daemon:
        await daemon.leads()
        assert (await daemon.api.sync())["status"] == "succeeded"
        front.drop()
        await fill(client, 0)
        assert (await daemon.api.sync())["status"] == "refused"
        assert (await daemon.api.sync(accept_loss="true"))["status"] == "succeeded"
        await fill(client, 10)
        assert (await daemon.api.sync())["status"] == "succeeded"


async def test_a_command_before_the_ear_was_open_is_not_covered_by_it(
    dumb: tuple[Service, Redis], postgres_dsn: str
) -> None:
    front, client = dumb
    made = Engine(make_config(postgres_dsn, front.url))
    await made.good()
    await client.flushall()
    await fill(client, 0)
    async with Inside(daemon_config(postgres_dsn, front.url)) as daemon:
        await daemon.leads()
        assert (await daemon.api.sync())["status"] == "refused"
        await made.good(accept_loss=True)
        # This command's success began with the ear open already.
        await fill(client, 10)
        assert (await daemon.api.sync())["status"] == "succeeded"
    await made.close()


async def _moment() -> int:
    return 7


async def test_what_happened_before_the_question_is_heard_before_the_answer(redis_url: str) -> None:
    async with Source(RedisConfig(url=SecretStr(redis_url))) as source:
        (node,) = (await source.identity()).nodes
        ear = Ear(source, _moment)
        await ear.tend()
        assert await ear.heard_since(node.address, node.primary) == 7
        # Nothing that Redis tells can be read while this waits for its reply.
        with BlockingRedis.from_url(redis_url) as client:
            client.flushall()
        assert await ear.heard_since(node.address, node.primary) is None
        await ear.close()


async def test_an_ear_on_one_server_proves_nothing_of_another_at_the_same_address(
    private_redis: PrivateRedis,
) -> None:
    first, second = private_redis(), private_redis()
    async with (
        Service(first.port) as front,
        Source(RedisConfig(url=SecretStr(front.url))) as source,
    ):
        (node,) = (await source.identity()).nodes
        ear = Ear(source, _moment)
        await ear.tend()
        front.server_port = second.port
        await source.close()
        (other,) = (await source.identity()).nodes
        assert other.address == node.address
        assert await ear.heard_since(node.address, other.primary) is None
        assert await ear.heard_since(node.address, node.primary) == 7
        await ear.close()


async def test_a_service_without_tracking_is_told_once(
    private_redis: PrivateRedis, postgres_dsn: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server = private_redis()
    async with (
        Service(server.port, **DUMB, refused={"CLIENT TRACKING"}) as front,
        Redis.from_url(server.url) as client,
    ):
        await fill(client, 50)
        async with Inside(daemon_config(postgres_dsn, front.url)) as daemon:
            await daemon.leads()
            assert (await daemon.api.sync())["status"] == "succeeded"
            await fill(client, 60)
            assert (await daemon.api.sync())["status"] == "refused"
    assert capsys.readouterr().out.count("can't be listened to for FLUSHALL") == 1


@pytest.mark.parametrize("live", [False, True])
async def test_two_failovers_between_two_runs_are_followed_one_by_one(
    private_redis: PrivateRedis, postgres_dsn: str, pg: asyncpg.Connection, *, live: bool
) -> None:
    quick = {"repl-diskless-sync-delay": "0"}
    first = private_redis(quick)
    attached = quick | {"replicaof": f"127.0.0.1 {first.port}"}
    servers = [first, private_redis(attached), private_redis(attached)]
    clients = [Redis.from_url(server.url) for server in servers]
    # While the primary is empty.
    for other in clients[1:]:
        await caught_up(other, clients[0])
    await fill(clients[0], 50)
    config = {"live": {"enabled": live, "rescan_interval": 0}}
    async with Service(first.port) as front:
        async with Inside(daemon_config(postgres_dsn, front.url, **config)) as daemon:
            await daemon.leads()
            assert (await daemon.api.sync())["status"] == "succeeded"
            for number in (1, 2):
                old, new = clients[number - 1], clients[number]
                await caught_up(new, old)
                await new.replicaof("NO", "ONE")
                for rest in clients[number + 1 :]:
                    await rest.replicaof("127.0.0.1", str(servers[number].port))
                    await caught_up(rest, new)
                front.server_port = servers[number].port
                front.drop()
                await follows(pg, new)
                if live:
                    await fill(new, 50 + number)
                    await daemon.log.next("live", state="up")
                    sql = "SELECT sum(balance) FROM balances"
                    await until(lambda: _is(pg, sql, (50 + number) * KEYS))  # noqa: B023
        # A command finds what the daemon saw.
        made = Engine(make_config(postgres_dsn, front.url))
        await fill(clients[2], 60)
        assert (await made.good()).counts.updated == KEYS
        await made.close()
    for client in clients:
        await client.aclose()


async def test_what_is_not_known_of_a_start_stays_unknown_at_the_next(
    private_redis: PrivateRedis, postgres_dsn: str, pg: asyncpg.Connection
) -> None:
    server = private_redis()
    # INFO has no count of all keys; CLIENT TRACKING is refused.
    front = Service(server.port, sections={"keyspace"}, refused={"CLIENT TRACKING"})
    async with front, Inside(daemon_config(postgres_dsn, front.url)) as daemon:
        await daemon.leads()
        async with Redis.from_url(server.url) as client:
            await fill(client, 50)
            await client.save()
            assert (await daemon.api.sync())["status"] == "succeeded"
        server.kill()
        server.start()
        async with Redis.from_url(server.url) as client:
            # No command has made a key since, and so all that are there came with the start.
            await follows(pg, client)
            await client.flushall()
            await client.save()
        server.kill()
        server.start()
        async with Redis.from_url(server.url) as client:
            await fill(client, 0)
        assert (await daemon.api.sync())["status"] == "refused"
    assert await pg.fetchval("SELECT sum(balance) FROM balances") == 50 * KEYS


async def test_what_one_start_has_cost_counts_at_the_next(
    private_redis: PrivateRedis, postgres_dsn: str, pg: asyncpg.Connection
) -> None:
    server = private_redis()
    front = Service(server.port, refused={"CLIENT TRACKING"})
    async with front, Inside(daemon_config(postgres_dsn, front.url)) as daemon:
        await daemon.leads()
        async with Redis.from_url(server.url) as client:
            await fill(client, 50)
            assert (await daemon.api.sync())["status"] == "succeeded"
        # Each start comes with more than half of what the one before had, and the two don't.
        for rest in (12, 7):
            async with Redis.from_url(server.url) as client:
                await client.delete(*[f"balance:{each}" for each in range(rest, KEYS)])
                await client.save()
            server.kill()
            server.start()
            if rest == 12:
                async with Redis.from_url(server.url) as client:
                    await follows(pg, client)
        async with Redis.from_url(server.url) as client:
            for each in range(7, KEYS):
                await client.set(f"balance:{each}", "0")
        run = await daemon.api.sync()
        assert (run["status"], "with 7 keys: 13 of 20" in run["error"]) == ("refused", True)
    assert await pg.fetchval("SELECT sum(balance) FROM balances") == 50 * KEYS


async def _is(pg: asyncpg.Connection, sql: str, value: object) -> bool:
    return bool(await pg.fetchval(sql) == value)
