"""Whether Redis was emptied: what a server tells proves it, what it doesn't tell proves nothing."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from decimal import Decimal
from typing import Any

import asyncpg
import pytest
from engine import Engine, make_config
from redis import Redis as BlockingRedis
from redis.asyncio import Redis
from service import Service

from balancesync.check import check
from balancesync.embedded import RedisServer
from balancesync.errors import Refused
from balancesync.overview import health

Make = Callable[..., Engine]
PrivateRedis = Callable[..., RedisServer]

KEYS = 100


async def fill(redis: Redis, value: object, ids: Iterable[int] = range(KEYS)) -> None:
    await redis.mset({f"balance:{each}": str(value) for each in ids})


async def refused(engine: Engine) -> str:
    run = await engine.sync()
    assert run.status == "refused", (run.status, run.error, run.counts)
    assert isinstance(engine.failure, Refused)
    return str(engine.failure)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Ask until it holds."""
    async with asyncio.timeout(20):
        while True:
            if await condition():
                return
            await asyncio.sleep(0.01)


async def says(client: Redis, section: str, name: str, value: object) -> bool:
    """Whether a field of INFO has this value."""
    return bool((await client.info(section)).get(name) == value)


async def total(pg: asyncpg.Connection) -> Decimal:
    return Decimal(await pg.fetchval("SELECT sum(balance) FROM balances"))


@pytest.fixture
async def synced(engine: Make, redis: Redis) -> Engine:
    """An engine after one success with a hundred keys at 50."""
    await fill(redis, 50)
    made = engine()
    await made.good()
    return made


# --- statistics that are reset --------------------------------------------------------------------


async def test_a_flush_that_was_forgotten_by_resetstat_is_no_proof(
    synced: Engine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await redis.flushall()
    await fill(redis, 0)
    await redis.config_resetstat()
    line = await refused(synced)
    assert "the statistics of Redis were reset (CONFIG RESETSTAT) since the last success" in line
    assert "100 of 100 known keys came back changed" in line
    assert await total(pg) == 5000


@pytest.mark.parametrize("flushes", [0, 1, 2])
async def test_as_many_flushes_after_a_reset_as_before_are_no_proof(
    engine: Make, redis: Redis, pg: asyncpg.Connection, flushes: int
) -> None:
    for _ in range(flushes):
        await redis.flushall()
    await fill(redis, 50)
    made = engine()
    await made.good()
    await redis.config_resetstat()
    for _ in range(max(flushes, 1)):
        await redis.flushall()
    await fill(redis, 0)
    await refused(made)
    assert await total(pg) == 5000


async def test_statistics_that_were_reset_before_the_success_prove_it(
    synced: Engine, redis: Redis
) -> None:
    await fill(redis, 60)
    assert (await synced.good()).counts.updated == KEYS
    await redis.config_resetstat()
    # Reset, and few have changed: nothing to refuse.
    await fill(redis, 70, range(KEYS // 2))
    assert (await synced.good()).counts.updated == KEYS // 2
    await fill(redis, 80)
    assert (await synced.good()).counts.updated == KEYS


async def test_flushdb_alone_is_a_flush(
    synced: Engine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await redis.flushdb()
    await fill(redis, 0)
    assert "emptied by FLUSHALL or FLUSHDB since the last success: 100 of 100" in await refused(
        synced
    )
    assert await total(pg) == 5000


async def test_databases_that_were_swapped_are_no_proof(
    synced: Engine, redis: Redis, redis_url: str, pg: asyncpg.Connection
) -> None:
    async with Redis.from_url(redis_url.replace("/0", "/1")) as other:
        await fill(other, 0)
        await redis.swapdb(0, 1)
        assert "swapped by SWAPDB since the last success: 100 of 100" in await refused(synced)
    assert await total(pg) == 5000


async def test_a_reset_while_a_run_reads_is_noticed_by_the_next(
    synced: Engine, redis: Redis, pg: asyncpg.Connection
) -> None:

    with BlockingRedis.from_url(synced.config.redis.url.get_secret_value()) as client:
        done = False

        def strike(progress: object) -> None:
            nonlocal done
            if not done:
                done = True
                client.flushall()
                client.mset({f"balance:{each}": "50" for each in range(KEYS)})
                client.config_resetstat()

        synced.on_progress = strike
        await synced.sync()
        synced.on_progress = lambda progress: None
        await fill(redis, 0)
        await refused(synced)
    assert await total(pg) == 5000


# --- what a service leaves out --------------------------------------------------------------------

LACKING: dict[str, dict[str, Any]] = {
    "no statistics": {"sections": ["commandstats"]},
    "no run_id": {"hidden": ["run_id"]},
    "no replication id": {"hidden": ["master_replid", "master_replid2"]},
    "no count of keys loaded": {"hidden": ["rdb_last_load_keys_loaded"]},
    "no count of keys by database": {"sections": ["keyspace"]},
    "a run_id that never changes": {"fixed": {"run_id": "0" * 40}},
    "next to nothing": {
        "sections": ["commandstats", "persistence", "stats"],
        "hidden": ["run_id", "uptime_in_seconds", "server_time_usec", "master_replid"],
    },
}


@pytest.fixture(params=list(LACKING))
async def service(
    request: pytest.FixtureRequest, private_redis: PrivateRedis
) -> AsyncIterator[tuple[RedisServer, Service]]:
    """A service that leaves something out, and the server behind it."""
    server = private_redis()
    async with Service(server.port, **LACKING[request.param]) as made:
        yield server, made


@pytest.mark.parametrize("loss", ["flushall", "flushdb", "restart"])
async def test_a_loss_that_a_service_does_not_tell_of_is_refused(
    service: tuple[RedisServer, Service], postgres_dsn: str, pg: asyncpg.Connection, loss: str
) -> None:
    server, front = service
    made = Engine(make_config(postgres_dsn, front.url))
    async with Redis.from_url(server.url) as client:
        await fill(client, 50)
        await made.good()
        if loss == "restart":
            await client.aclose()
            server.kill()
            server.start()
        else:
            await (client.flushall() if loss == "flushall" else client.flushdb())
        await fill(client, 0)
        line = await refused(made)
    assert "100 of 100 known keys came back changed, more than guard.max_loss = 0.5" in line
    assert await total(pg) == 5000
    await made.close()


async def test_what_a_service_does_not_tell_is_said_with_the_ways_out(
    private_redis: PrivateRedis, postgres_dsn: str, pg: asyncpg.Connection
) -> None:
    server = private_redis()
    async with Service(server.port, sections=["commandstats"], hidden=["master_replid"]) as front:
        made = Engine(make_config(postgres_dsn, front.url))
        async with Redis.from_url(server.url) as client:
            await fill(client, 50)
            await made.good()
            # Half of them may change, on any Redis.
            await fill(client, 60, range(KEYS // 2))
            await made.good()
            await fill(client, 70)
            line = await refused(made)
            assert (
                "Redis doesn't tell whether it was emptied since the last success: its INFO" in line
            )
            assert "lacks master_replid and commandstats" in line
            assert "sync more often, follow live, or raise guard.max_loss" in line
            assert await pg.fetchval("SELECT redis_flushes IS NULL FROM balancesync.baselines")
            await made.good(accept_loss=True)
        await made.close()


# --- restarts -------------------------------------------------------------------------------------


async def restart(server: RedisServer, client: Redis) -> None:
    """In good order: what the settings keep is kept."""
    await client.aclose()
    await asyncio.to_thread(server.stop)
    await asyncio.to_thread(server.start)


@pytest.mark.parametrize("changed", ["before", "after", "after, one by one"])
async def test_an_append_only_file_that_was_never_rewritten_brings_the_keys_back(
    private_redis: PrivateRedis, postgres_dsn: str, changed: str
) -> None:
    server = private_redis({"appendonly": "yes"})
    made = Engine(make_config(postgres_dsn, server.url))
    async with Redis.from_url(server.url) as client:
        await fill(client, 50)
        await made.good()
        if changed == "before":
            await fill(client, 60)
        await restart(server, client)
        pipeline = client.pipeline(transaction=False)
        for number in range(15_000):
            pipeline.get(f"balance:{number % KEYS}")
        await pipeline.execute()
        if changed == "after":
            await fill(client, 60)
        elif changed != "before":
            for number in range(KEYS):
                await client.incrby(f"balance:{number}", 10)
        assert (await made.good()).counts.updated == KEYS
    await made.close()


async def test_an_append_only_file_that_ends_in_a_flush_brings_nothing_back(
    private_redis: PrivateRedis, postgres_dsn: str, pg: asyncpg.Connection
) -> None:
    server = private_redis({"appendonly": "yes"})
    made = Engine(make_config(postgres_dsn, server.url))
    async with Redis.from_url(server.url) as client:
        await fill(client, 50)
        await made.good()
        await client.flushall()
        await restart(server, client)
        await fill(client, 0)
        assert "was restarted or replaced since the last success" in await refused(made)
        assert await total(pg) == 5000
    await made.close()


async def test_a_file_that_was_rewritten_empty_brings_nothing_back(
    private_redis: PrivateRedis, postgres_dsn: str, pg: asyncpg.Connection
) -> None:
    server = private_redis({"appendonly": "yes"})
    made = Engine(make_config(postgres_dsn, server.url))
    async with Redis.from_url(server.url) as client:
        await fill(client, 50)
        await made.good()
        await client.flushall()
        await client.bgrewriteaof()
        await until(lambda: says(client, "persistence", "aof_rewrite_in_progress", 0))
        await restart(server, client)
        for number in range(KEYS):
            await client.set(f"balance:{number}", "0")
        await refused(made)
        assert await total(pg) == 5000
    await made.close()


async def test_a_rewritten_file_with_a_flush_after_it_brings_nothing_back(
    private_redis: PrivateRedis, postgres_dsn: str, pg: asyncpg.Connection
) -> None:
    server = private_redis({"appendonly": "yes"})
    made = Engine(make_config(postgres_dsn, server.url))
    async with Redis.from_url(server.url) as client:
        await fill(client, 50)
        await client.bgrewriteaof()
        await until(lambda: says(client, "persistence", "aof_rewrite_in_progress", 0))
        await made.good()
        await client.flushall()
        await restart(server, client)
        assert (await client.info("persistence"))["rdb_last_load_keys_loaded"] == KEYS
        await fill(client, 0)
        await refused(made)
        assert await total(pg) == 5000
    await made.close()


async def test_an_empty_server_in_between_is_told_by_the_replication_id(
    private_redis: PrivateRedis, postgres_dsn: str, pg: asyncpg.Connection
) -> None:
    server, empty = private_redis(), private_redis({"repl-diskless-sync-delay": "0"})
    made = Engine(make_config(postgres_dsn, server.url))
    async with Redis.from_url(server.url) as client:
        await fill(client, 50)
        await made.good()
        await client.replicaof("127.0.0.1", empty.port)
        await until(lambda: says(client, "keyspace", "db0", None))
        await client.replicaof("NO", "ONE")
        await fill(client, 0)
        assert "Redis was a replica of another server since the last success" in await refused(made)
        assert await total(pg) == 5000
    await made.close()


# --- failovers ------------------------------------------------------------------------------------


@pytest.fixture
async def pair(private_redis: PrivateRedis) -> tuple[RedisServer, RedisServer]:
    """A primary, and a replica that was attached while it was empty."""
    primary = private_redis({"repl-diskless-sync-delay": "0"})
    replica = private_redis({"replicaof": f"127.0.0.1 {primary.port}"})
    async with Redis.from_url(replica.url) as client:
        await until(lambda: says(client, "replication", "master_link_status", "up"))
        assert (await client.info("persistence"))["rdb_last_load_keys_loaded"] == 0
    return primary, replica


def engine_of(dsn: str, server: RedisServer) -> Engine:
    return Engine(make_config(dsn, server.url))


async def until_equal(old: Redis, new: Redis) -> None:
    """Until the replica has all that the primary has."""

    async def is_equal() -> bool:
        offset = (await old.info("replication"))["master_repl_offset"]
        return await says(new, "replication", "master_repl_offset", offset)

    await until(is_equal)


async def test_a_replica_that_takes_over_is_followed(
    pair: tuple[RedisServer, RedisServer], postgres_dsn: str
) -> None:
    primary, replica = pair
    one, other = engine_of(postgres_dsn, primary), engine_of(postgres_dsn, replica)
    async with Redis.from_url(primary.url) as old, Redis.from_url(replica.url) as new:
        await fill(old, 50)
        await one.good()
        await until_equal(old, new)
        await old.execute_command("FAILOVER")  # type: ignore[no-untyped-call] # redis-py
        await until(lambda: says(new, "replication", "role", "master"))
        await fill(new, 60)
        assert (await other.good()).counts.updated == KEYS
        await fill(new, 70)
        assert (await other.good()).counts.updated == KEYS
    await one.close()
    await other.close()


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_replica_that_took_over_and_was_emptied_is_refused(
    pair: tuple[RedisServer, RedisServer], postgres_dsn: str, pg: asyncpg.Connection, when: str
) -> None:
    primary, replica = pair
    one, other = engine_of(postgres_dsn, primary), engine_of(postgres_dsn, replica)
    async with Redis.from_url(primary.url) as old, Redis.from_url(replica.url) as new:
        await fill(old, 50)
        await one.good()
        if when == "before":
            await old.flushall()
            await fill(old, 0)
        await until_equal(old, new)
        await new.replicaof("NO", "ONE")
        if when == "after":
            await new.flushall()
            await fill(new, 0)
        assert "has run FLUSHALL, FLUSHDB or SWAPDB" in await refused(other)
    assert await total(pg) == 5000
    await one.close()
    await other.close()


async def test_a_replica_that_lacks_what_was_read_went_back(
    pair: tuple[RedisServer, RedisServer], postgres_dsn: str, pg: asyncpg.Connection
) -> None:
    primary, replica = pair
    one, other = engine_of(postgres_dsn, primary), engine_of(postgres_dsn, replica)
    async with Redis.from_url(primary.url) as old, Redis.from_url(replica.url) as new:
        await until_equal(old, new)
        await asyncio.to_thread(replica.suspend)
        await fill(old, 50)
        await one.good()
        await asyncio.to_thread(primary.kill)
        await asyncio.to_thread(replica.resume)
        await new.replicaof("NO", "ONE")
        if not await new.dbsize():
            await fill(new, 0)
            assert "Redis went back since the last success" in await refused(other)
    assert await total(pg) == 5000
    await one.close()
    await other.close()


# --- what is said ---------------------------------------------------------------------------------


@pytest.mark.parametrize("max_loss", [0.5, 1.0])
async def test_check_and_health_say_what_a_service_does_not_tell(
    private_redis: PrivateRedis, postgres_dsn: str, max_loss: float
) -> None:
    front = Service(private_redis().port, sections={"commandstats"}, refused={"CLIENT TRACKING"})
    async with front:
        made = Engine(make_config(postgres_dsn, front.url, guard={"max_loss": max_loss}))
        servers = (made.config, made.database, made.source)
        [finding] = [each async for each in check(*servers) if each.topic == "guard"]
        assert finding.level == "warning"
        assert "doesn't tell whether it was emptied" in finding.text
        assert "its INFO lacks commandstats" in finding.text
        assert "nobody can hear it" in finding.text
        ways = "sync more often" if max_loss < 1 else "set it below 1"
        assert ways in finding.text
        said = (await health(*servers))["checks"]["guard"]
        assert said["status"] == ("ok" if max_loss < 1 else "degraded")
        assert "its INFO lacks commandstats" in said["detail"]
        # A user that may use CLIENT TRACKING has an ear.
        front.refused.clear()
        [finding] = [each async for each in check(*servers) if each.topic == "guard"]
        assert (finding.level, "a daemon hears it" in finding.text) == ("ok", True)
        front.sections.clear()
        [finding] = [each async for each in check(*servers) if each.topic == "guard"]
        assert finding.text == "Redis tells whether it was emptied since the last success"
        assert (await health(*servers))["checks"]["guard"]["status"] == "ok"
        await made.close()


# --- what 0.1.0 kept ------------------------------------------------------------------------------


async def as_0_1_0_keeps_it(pg: asyncpg.Connection) -> None:
    """Leave of the baseline what 0.1.0 writes: its columns, and nothing beside them."""
    await pg.execute(
        "UPDATE balancesync.baselines"
        " SET redis_seen = NULL, known_at = NULL, gone = NULL, deleted = 0, refused_on = NULL"
    )
    kept = "SELECT redis_run_id IS NULL OR redis_flushes IS NULL FROM balancesync.baselines"
    assert not await pg.fetchval(kept)


@pytest.mark.parametrize(("flushes", "config_used"), [(0, False), (2, True)])
async def test_a_first_sync_after_an_upgrade_follows_what_was_not_emptied(
    private_redis: PrivateRedis,
    postgres_dsn: str,
    pg: asyncpg.Connection,
    flushes: int,
    *,
    config_used: bool,
) -> None:
    server = private_redis()
    made = engine_of(postgres_dsn, server)
    async with Redis.from_url(server.url) as client:
        for _ in range(flushes):
            await client.flushall()
        if config_used:
            # From 7 on each is counted alone: it isn't taken for CONFIG RESETSTAT.
            await client.config_get("hz")
            await client.config_set("hz", "10")
        await fill(client, 50)
        await made.good()
        await as_0_1_0_keeps_it(pg)
        await fill(client, 60)
        assert (await made.good(mode="dry_run")).warnings == []
        run = await made.good()
        assert (run.counts.updated, run.warnings) == (KEYS, [])
        # From then on it knows what this program keeps.
        await fill(client, 70)
        assert (await made.good()).counts.updated == KEYS
    await made.close()


@pytest.mark.parametrize("loss", ["flushall", "flushdb", "flushall, resetstat", "restart"])
async def test_a_first_sync_after_an_upgrade_refuses_what_was_emptied(
    private_redis: PrivateRedis, postgres_dsn: str, pg: asyncpg.Connection, loss: str
) -> None:
    server = private_redis()
    made = engine_of(postgres_dsn, server)
    async with Redis.from_url(server.url) as client:
        await fill(client, 50)
        await made.good()
        await as_0_1_0_keeps_it(pg)
        if loss == "restart":
            await restart(server, client)
        else:
            await (client.flushdb() if loss == "flushdb" else client.flushall())
        if loss == "flushall, resetstat":
            await client.config_resetstat()
        await fill(client, 0)
        line = await refused(made)
    assert f"{KEYS} of {KEYS} known keys came back changed" in line
    told = loss in ("flushall", "flushdb")
    assert ("Redis was emptied by FLUSHALL or FLUSHDB" in line) == told
    assert ("an older balancesync made the last success" in line) == (not told)
    assert await total(pg) == 5000
    await made.close()
