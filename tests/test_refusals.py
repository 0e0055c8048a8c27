"""A refusal that was met on another Redis stands there alone; one that was met here stands here."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import asyncpg
import pytest
from engine import Engine, make_config
from redis.asyncio import Redis
from running import Inside, daemon_config

from balancesync.embedded import RedisServer
from balancesync.errors import Refused
from balancesync.overview import health, status
from balancesync.standing import status_lines

Make = Callable[..., Engine]
PrivateRedis = Callable[..., RedisServer]
KEYS = 10


async def fill(redis: Redis, value: object, first: int = 0) -> None:
    await redis.mset({f"balance:{each}": str(value) for each in range(first, KEYS)})


@pytest.fixture
async def here(engine: Make, redis: Redis) -> Engine:
    """An engine after a success with ten keys."""
    await fill(redis, 50)
    made = engine()
    await made.good()
    return made


@pytest.fixture(params=["another server", "another database", "another template"])
async def wrong(
    request: pytest.FixtureRequest,
    here: Engine,
    postgres_dsn: str,
    redis_url: str,
    private_redis: PrivateRedis,
) -> AsyncIterator[Engine]:
    """The same tables, and another Redis, by mistake."""
    url, mapping = redis_url, {}
    match request.param:
        case "another server":
            url = private_redis().url
        case "another database":
            url = redis_url.replace("/0", "/5")
        case _:
            mapping = {"key": "wallet:{user_id}"}
    made = Engine(make_config(postgres_dsn, url, mapping))
    yield made
    await made.close()


async def refused(engine: Engine, **request: Any) -> str:
    run = await engine.sync(**request)
    assert run.status == "refused", (run.status, run.error)
    assert isinstance(engine.failure, Refused)
    return str(engine.failure)


async def test_a_refusal_on_another_redis_does_not_hold_up_the_right_one(
    here: Engine, wrong: Engine, redis: Redis
) -> None:
    assert "no key at all" in await refused(wrong)
    # Ordinary changes: while a refusal stands, none may be.
    await fill(redis, 60, first=6)
    dry = await here.good(mode="dry_run")
    assert any("refused on another Redis, database or key template" in w for w in dry.warnings)
    run = await here.good()
    assert run.counts.updated == 4
    [warning] = [each for each in run.warnings if "another Redis" in each]
    assert "no key at all" in warning
    assert "are redis.url and the key template right" in warning
    # And there it would be refused as before.
    await refused(wrong)


async def test_everyone_who_reads_refusals_knows_where_it_holds(
    here: Engine, wrong: Engine, redis: Redis
) -> None:
    await refused(wrong)
    for engine, stands in ((here, False), (wrong, True)):
        servers = (engine.config, engine.database, engine.source)
        said = (await health(*servers))["checks"]["refusal"]
        assert said["status"] == ("degraded" if stands else "ok")
        assert ("another Redis" in said["detail"]) == (not stands)
        document = await status(*servers)
        assert bool(document["refusal"]) == stands
        assert bool(document["refused_elsewhere"]) == (not stands)
        printed = " ".join(map(str, status_lines(document | {"no_daemon": "no daemon answers"})))
        assert ("are redis.url and the key template right" in printed) == (not stands)
    # A restore here is about this Redis.
    await fill(redis, 60, first=6)
    run = await here.sync(job="restore")
    assert run.error is not None
    assert "--accept-loss" not in run.error


async def test_a_refusal_that_stands_here_is_never_replaced_by_another(
    here: Engine, wrong: Engine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await redis.delete(*[f"balance:{each}" for each in range(6)])
    assert "6 of 10 known keys are gone" in await refused(here)
    await refused(wrong)
    assert "6 of 10" in await pg.fetchval("SELECT refusal FROM balancesync.baselines")
    # The keys are made again: it still stands.
    await fill(redis, 0)
    assert "10 of 10 known keys came back changed, and the refusal stands" in await refused(here)
    await refused(wrong)
    await refused(here)


async def test_a_refusal_elsewhere_makes_room_for_one_here(
    here: Engine, wrong: Engine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await refused(wrong)
    await redis.delete(*[f"balance:{each}" for each in range(6)])
    assert "6 of 10" in await refused(here)
    assert "6 of 10" in await pg.fetchval("SELECT refusal FROM balancesync.baselines")
    await fill(redis, 0)
    await refused(here)


async def test_a_refusal_by_an_older_program_stands_everywhere(
    here: Engine, redis: Redis, pg: asyncpg.Connection
) -> None:
    # As 0.1.0 writes it, beside what is there of ours.
    await pg.execute("UPDATE balancesync.baselines SET refusal = 'gone', refused_at = now()")
    await redis.set("balance:1", "7")
    assert "the refusal stands until none is" in await refused(here)
    await redis.set("balance:1", "50")
    await here.good()


async def test_a_success_of_an_older_program_has_the_last_word_on_redis(
    here: Engine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute("UPDATE balancesync.baselines SET redis_flushes = 7")
    await fill(redis, 60)
    await refused(here)
    await here.good(accept_loss=True)
    # Without ours beside it, its own two facts are all there is.
    await redis.flushall()
    flushes = (await redis.info("commandstats"))["cmdstat_flushall"]["calls"]
    await redis.mset({f"balance:{each}": "70" for each in range(KEYS)})
    await here.good(accept_loss=True)
    await pg.execute("UPDATE balancesync.baselines SET redis_seen = NULL")
    assert flushes == await pg.fetchval("SELECT redis_flushes FROM balancesync.baselines")
    await redis.flushall()
    await fill(redis, 80)
    assert "emptied by FLUSHALL or FLUSHDB since the last success" in await refused(here)


async def test_a_restart_of_the_redis_that_was_refused_is_not_elsewhere(
    private_redis: PrivateRedis, postgres_dsn: str
) -> None:
    server = private_redis({"appendonly": "yes", "appendfsync": "always"})
    made = Engine(make_config(postgres_dsn, server.url))
    async with Redis.from_url(server.url) as client:
        await fill(client, 50)
        await made.good()
        await client.delete(*[f"balance:{each}" for each in range(6)])
        assert "6 of 10" in await refused(made)
        await fill(client, 50)
        await client.aclose()
        await asyncio.to_thread(server.stop)
        await asyncio.to_thread(server.start)
        await client.set("balance:1", "7")
        assert "came back changed, and the refusal stands" in await refused(made)
    await made.close()


async def test_live_goes_on_beside_a_sync_with_a_wrong_url(
    postgres_dsn: str, redis_url: str, redis: Redis, private_redis: PrivateRedis, pg: Any
) -> None:
    await fill(redis, 50)
    config = daemon_config(postgres_dsn, redis_url, live={"enabled": True, "flush_interval": 0.02})
    other = Engine(make_config(postgres_dsn, private_redis().url))
    async with Inside(config) as daemon:
        await daemon.log.next("live", state="up")
        await refused(other)
        await redis.set("balance:1", "51")
        async with asyncio.timeout(20):
            sql = "SELECT balance FROM balances WHERE user_id = 1"
            while True:
                if await pg.fetchval(sql) == 51:
                    break
                await asyncio.sleep(0.01)
        assert daemon.daemon.state.live == "up"
        assert not daemon.log.all("live", state="catching up", reason=lambda text: "guard" in text)
        await daemon.api.until_sample("guard_refused", lambda found: found == 0)
    await other.close()
