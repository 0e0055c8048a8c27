"""Services that don't tell whether they were emptied: live, restore, prune, dry run, verify."""

from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import asyncpg
import pytest
from engine import Engine, make_config
from following import until
from redis import Redis as BlockingRedis
from redis.asyncio import Redis
from running import Inside, daemon_config
from service import Service

from balancesync.errors import SourceChanged
from balancesync.overview import health
from balancesync.part import Progress

KEYS = 200
SUM = "SELECT sum(balance) FROM balances"
LACKING: dict[str, dict[str, Any]] = {
    "no replication id": {"hidden": ["master_replid", "master_replid2"]},
    "next to nothing": {
        "sections": ["commandstats", "persistence", "stats"],
        "hidden": ["run_id", "uptime_in_seconds", "server_time_usec", "master_replid"],
    },
}


@pytest.fixture(params=list(LACKING))
async def front(request: pytest.FixtureRequest, redis_url: str) -> AsyncIterator[Service]:
    """A service that leaves something out, before the test's Redis."""
    port = int(redis_url.rpartition(":")[2].partition("/")[0])
    async with Service(port, **LACKING[request.param]) as made:
        yield made


@pytest.fixture
async def behind(front: Service, postgres_dsn: str, redis: Redis) -> AsyncIterator[Engine]:
    """An engine that reads the service, after a first success."""
    await fill(redis, 50)
    made = Engine(make_config(postgres_dsn, front.url, prune={"enabled": True}))
    await made.good()
    yield made
    await made.close()


async def fill(redis: Redis, value: object, ids: Iterable[int] = range(KEYS)) -> None:
    await redis.mset({f"balance:{each}": str(value) for each in ids})


# --- restore --------------------------------------------------------------------------------------


def watch(
    engine: Engine, phase: str, strike: Callable[[], object] = lambda: None, far: int = KEYS // 2
) -> list[int]:
    """Call `strike` once, when a restore has gone through so many rows in this phase; how far it
    came in "compare" is kept."""
    waiting, compared = [strike], list[int]()

    def on_progress(progress: Progress) -> None:
        if progress.phase == "compare":
            compared.append(progress.done)
        if progress.phase == phase and progress.done >= far and waiting:
            waiting.pop()()

    engine.on_progress = on_progress
    return compared


async def test_a_restore_reads_again_what_it_has_put_there(behind: Engine, redis: Redis) -> None:
    await redis.flushall()
    # Others are left as they are, and are no loss.
    await fill(redis, 70, range(5))
    compared = watch(behind, "restore")
    run = await behind.sync(job="restore")
    assert (run.status, run.counts.inserted, run.counts.kept) == ("failed", KEYS - 5, 5)
    assert "5 keys hold another value" in str(run.error)
    assert compared[-1] == KEYS
    compared.clear()
    run = await behind.good(job="restore", overwrite=True)
    assert (run.counts.updated, run.counts.unchanged) == (5, KEYS - 5)
    assert compared[-1] == KEYS
    assert await redis.get("balance:1") == b"50"


@pytest.mark.parametrize(("far", "again"), [(1, False), (KEYS, True)], ids=["gone", "made again"])
async def test_a_restore_into_a_redis_that_is_emptied_meanwhile_is_no_success(
    behind: Engine, redis: Redis, redis_url: str, pg: asyncpg.Connection, far: int, *, again: bool
) -> None:
    await redis.flushall()
    with BlockingRedis.from_url(redis_url) as client:

        def strike() -> None:
            there = client.keys()
            client.flushall()
            if again:
                client.mset(dict.fromkeys(there, "0"))

        # All is there by then, and a page of it or all has been read again.
        watch(behind, "compare", strike, far)
        run = await behind.sync(job="restore")
    assert isinstance(behind.failure, SourceChanged), run.counts
    assert "restored records are gone or changed" in str(run.error)
    behind.on_progress = lambda progress: None
    # Nothing is taken for restored, and so no loss for accepted.
    sql = "SELECT status FROM balancesync.runs WHERE job = 'restore'"
    assert await pg.fetchval(sql) == "failed"
    await fill(redis, 0)
    assert (await behind.sync()).status == "refused"
    assert await pg.fetchval(SUM) == 50 * KEYS


# --- dry run, verify, prune -----------------------------------------------------------------------


async def test_a_dry_run_and_a_verify_warn_of_what_a_sync_would_refuse(
    behind: Engine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await redis.flushall()
    await fill(redis, 0)
    said = f"{KEYS} of {KEYS} known keys came back changed"
    dry = await behind.good(mode="dry_run")
    assert any("would be refused" in each and said in each for each in dry.warnings)
    why = ("doesn't tell whether it was emptied", "was emptied by FLUSHALL or FLUSHDB")
    assert any(each in " ".join(dry.warnings) for each in why)
    verify = await behind.verify()
    assert verify.drift == KEYS
    assert any(said in each for each in verify.warnings), verify.warnings
    assert await pg.fetchval(SUM) == 50 * KEYS


async def test_prune_takes_nothing_that_came_back_as_zero(
    behind: Engine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute("UPDATE balances SET synced_at = now() - interval '90 days'")
    await redis.flushall()
    await fill(redis, 0)
    run = await behind.sync(job="prune", idle_s=86_400)
    assert (run.counts.deleted, run.counts.kept) == (0, KEYS)
    assert await redis.dbsize() == KEYS
    # Nor does that one make the loss pass.
    assert (await behind.sync()).status == "refused"
    assert await pg.fetchval(SUM) == 50 * KEYS


# --- live mode ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("database", [0, 5])
async def test_live_mode_does_not_follow_keys_made_again_as_zero(
    front: Service, postgres_dsn: str, redis: Redis, pg: asyncpg.Connection, database: int
) -> None:
    await fill(redis, 50)
    own = {"enabled": True, "flush_interval": 0.02, "rescan_interval": 0}
    async with Inside(daemon_config(postgres_dsn, front.url, live=own)) as daemon:
        await daemon.log.next("live", state="up")
        await fill(redis, 60)
        await until(lambda: pg.fetchval(SUM), 60 * KEYS)
        async with redis.client() as client:
            # FLUSHALL empties every database, whichever it is sent to.
            await client.select(database)
            await client.flushall()
            await client.select(0)
            await client.mset({f"balance:{each}": "0" for each in range(KEYS)})
        run = await daemon.finished(status="refused")
        assert f"{KEYS} of {KEYS} known keys came back changed" in run["error"]
        assert daemon.daemon.state.live != "up"
        # What comes then isn't followed either.
        await fill(redis, 1)
        assert (await daemon.api.sync())["status"] == "refused"
        assert await pg.fetchval(SUM) == 60 * KEYS


@pytest.mark.parametrize(("max_loss", "status"), [(1.0, "degraded"), (0.5, "ok")])
async def test_health_is_degraded_where_nothing_would_notice_a_loss(
    front: Service, postgres_dsn: str, redis: Redis, max_loss: float, status: str
) -> None:
    front.refused = {"CLIENT TRACKING", "CLIENT|TRACKING"}
    await fill(redis, 50)
    config = daemon_config(postgres_dsn, front.url, guard={"max_loss": max_loss})
    async with Inside(config) as daemon:
        await daemon.leads()
        assert (await daemon.api.sync())["status"] == "succeeded"
        found = await daemon.api.until("/health", lambda each: "guard" in each["checks"])
        said = found["checks"]["guard"]
        assert said["status"] == status
        assert found["status"] == status.replace("ok", "healthy")
        assert "doesn't tell whether it was emptied" in said["detail"]
        assert ("set it below 1" in said["detail"]) == (max_loss == 1)
    made = Engine(config)
    command = (await health(made.config, made.database, made.source))["checks"]["guard"]
    assert command["status"] == status
    await made.close()
