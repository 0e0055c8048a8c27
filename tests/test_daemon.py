"""The daemon on real servers: what makes it run, what it does without them, how it ends."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import pytest
from engine import Engine
from faults.ground import connected
from proxy import Proxy
from redis.asyncio import Redis
from redis.exceptions import ResponseError
from running import Inside, Processes, daemon_config, processes
from structlog.testing import capture_logs

from balancesync import daemon, leadership, probing
from balancesync.database import load_sql, lock_key
from balancesync.embedded import PostgresServer, RedisServer
from balancesync.model import Mode, Request

KEYS = 20
UPDATE = rb'UPDATE "public"\."balances"'


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the daemon asks over and over is asked often, so that no test has to wait for it."""
    for name in ("_CALM_S", "_TROUBLED_S"):
        monkeypatch.setattr(probing, name, 0.05)
    monkeypatch.setattr(probing, "_LONGEST_PAUSE_S", 0.2)
    monkeypatch.setattr(probing, "_REFRESH_S", 0.1)
    monkeypatch.setattr(leadership, "_POLL_S", 0.1)
    monkeypatch.setattr(leadership, "_PROVE_S", 0.1)
    monkeypatch.setattr(leadership, "_LONGEST_PAUSE_S", 0.2)


@pytest.fixture(scope="module")
def frail_postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL that these tests may do anything to."""
    with PostgresServer(durable=False) as made:
        yield made


@pytest.fixture
async def frail_dsn(frail_postgres: PostgresServer) -> AsyncIterator[str]:
    """A new database on it."""
    name = f"test_{uuid4().hex}"
    admin = await asyncpg.connect(frail_postgres.dsn)
    await admin.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'")
    await admin.close()
    yield urlsplit(frail_postgres.dsn)._replace(path=f"/{name}").geturl()
    frail_postgres.start()
    frail_postgres.resume()
    admin = await asyncpg.connect(frail_postgres.dsn)
    await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await admin.close()


@pytest.fixture
async def started(tmp_path: Path, postgres_dsn: str, redis_url: str) -> AsyncIterator[Processes]:
    """Starts processes on the test's servers; all are gone after the test."""
    async with processes(tmp_path, postgres_dsn, redis_url) as made:
        yield made


async def fill(redis: Redis, value: str = "1.50", count: int = KEYS) -> None:
    await redis.mset({f"balance:{each}": value for each in range(count)})


async def fill_server(server: RedisServer, value: str = "1.50", count: int = KEYS) -> None:
    async with Redis.from_url(server.url) as client:
        await fill(client, value, count)


async def soon(event: asyncio.Event) -> None:
    async with asyncio.timeout(20):
        await event.wait()


def through(dsn: str, proxy: Proxy) -> str:
    user = urlsplit(dsn).netloc.rpartition("@")[0]
    return urlsplit(dsn)._replace(netloc=f"{user}@127.0.0.1:{proxy.port}").geturl()


# --- what makes it run ----------------------------------------------------------------------------


async def test_a_run_by_each_trigger(
    quick: None, redis: Redis, redis_url: str, postgres_dsn: str, pg: asyncpg.Connection
) -> None:
    await fill(redis)
    jobs = {"on_start": True, "jobs": {"often": {"cron": "* * * * *", "job": "sync"}}}
    config = daemon_config(postgres_dsn, redis_url, schedule=jobs)
    async with Inside(config) as inside:
        run = await inside.finished(trigger="startup")
        assert (run["status"], run["inserted"], run["error"]) == ("succeeded", KEYS, None)
        # What the scheduler calls when the minute comes.
        inside.daemon.fire("often", config.schedule.jobs["often"])
        run = await inside.finished(trigger="cron:often")
        assert (run["status"], run["unchanged"]) == ("succeeded", KEYS)
        run = await inside.api.sync()
        assert (run["status"], run["trigger"]) == ("succeeded", "http")
        os.kill(os.getpid(), signal.SIGHUP)
        run = await inside.finished(trigger="sighup")
        assert run["status"] == "succeeded"
        recorded = await pg.fetch("SELECT trigger, status FROM balancesync.runs ORDER BY id")
        assert [tuple(row) for row in recorded] == [
            ("startup", "succeeded"),
            ("cron:often", "succeeded"),
            ("http", "succeeded"),
            ("sighup", "succeeded"),
        ]


async def test_both_jobs_of_one_minute_make_one_run(
    quick: None, redis: Redis, redis_url: str, postgres_dsn: str
) -> None:
    await fill(redis)
    jobs = {
        "hourly": {"cron": "0 * * * *", "job": "sync"},
        "daily": {"cron": "0 2 * * *", "job": "sync"},
    }
    config = daemon_config(postgres_dsn, redis_url, schedule={"jobs": jobs})
    async with Inside(config) as inside:
        await inside.leads()
        for name, job in config.schedule.jobs.items():
            inside.daemon.fire(name, job)
        await inside.finished(trigger="cron:hourly")
        assert len(inside.log.all("run_queued")) == len(inside.log.all("run_started")) == 1
        assert inside.runner.queued == ()


async def test_min_interval_skips_what_nobody_forces(
    quick: None, redis: Redis, redis_url: str, postgres_dsn: str
) -> None:
    await fill(redis)
    schedule = {"min_interval": 3600, "jobs": {"often": {"cron": "* * * * *", "job": "sync"}}}
    config = daemon_config(postgres_dsn, redis_url, schedule=schedule)
    async with Inside(config) as inside:
        await inside.leads()
        assert (await inside.api.sync())["status"] == "succeeded"
        inside.daemon.fire("often", config.schedule.jobs["often"])
        run = await inside.finished(trigger="cron:often")
        assert run["status"] == "skipped"
        assert "younger than schedule.min_interval" in run["warnings"][0]
        assert (await inside.api.sync())["status"] == "succeeded"


async def test_a_verify_job_verifies(
    quick: None, redis: Redis, redis_url: str, postgres_dsn: str
) -> None:
    await fill(redis)
    jobs = {"proof": {"cron": "0 3 * * *", "job": "verify"}}
    config = daemon_config(postgres_dsn, redis_url, schedule={"jobs": jobs})
    async with Inside(config) as inside:
        await inside.leads()
        await inside.api.sync()
        await redis.set("balance:1", "7")
        inside.daemon.fire("proof", config.schedule.jobs["proof"])
        run = await inside.finished(trigger="cron:proof")
        assert (run["job"], run["mode"], run["updated"]) == ("verify", "verify", 1)
        name = 'drift_records{mapping="balances"}'
        await inside.api.until_sample(name, lambda value: value == 1)


async def test_signals_during_a_run_make_exactly_one_more(
    quick: None, redis: Redis, redis_url: str, postgres_dsn: str, postgres_admin_dsn: str
) -> None:
    await fill(redis)
    async with Proxy(urlsplit(postgres_admin_dsn).port or 0) as proxy:
        config = daemon_config(through(postgres_dsn, proxy), redis_url)
        async with Inside(config) as inside:
            await inside.leads()
            held = proxy.hold(b'^.{0,5}COPY "pg_temp')
            first, _ = inside.runner.submit(Request("sync", "http"))
            await soon(held)
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGHUP)
            await inside.log.next("run_queued", trigger="sighup")
            proxy.resume()
            await inside.finished(id=str(first.run.id))
            run = await inside.finished(trigger="sighup")
            assert run["status"] == "succeeded"
            assert len(inside.log.all("run_started")) == 2
            assert inside.runner.queued == ()


# --- servers that are away ------------------------------------------------------------------------


async def test_redis_away_at_the_start(
    quick: None, private_redis: Callable[..., RedisServer], postgres_dsn: str
) -> None:
    server = private_redis()
    server.kill()
    config = daemon_config(postgres_dsn, server.url, schedule={"on_start": True})
    async with Inside(config) as inside:
        run = await inside.finished(trigger="startup")
        assert (run["status"], run["attempts"]) == ("postponed", 1)
        assert "can't be reached" in run["error"]
        health = await inside.api.document("/health")
        assert health["status"] == "degraded"
        assert "can't be reached" in health["checks"]["redis"]["detail"]
        waiting = health["checks"]["postponed"]
        assert waiting["status"] == "degraded"
        assert run["error"] in waiting["detail"]
        assert await inside.api.sample("redis_up") == 0
        assert await inside.api.sample("postgres_up") == 1
        server.start()
        await fill_server(server)
        run = await inside.finished(trigger="recovery", status="succeeded")
        assert (run["status"], run["inserted"]) == ("succeeded", KEYS)
        assert (await inside.api.ask("/health"))[1]["status"] == "healthy"
        assert await inside.api.sample("redis_up") == 1


async def test_redis_away_in_the_middle(
    quick: None, private_redis: Callable[..., RedisServer], postgres_dsn: str
) -> None:
    server = private_redis({"appendonly": "yes", "appendfsync": "always"})
    await fill_server(server)
    async with Inside(daemon_config(postgres_dsn, server.url)) as inside:
        await inside.leads()
        await inside.api.sync()
        server.kill()
        told = await inside.log.next("redis", connected=False)
        assert "can't be reached" in told["error"] or "closed" in told["error"]
        run = await inside.api.sync()
        assert run["status"] == "postponed"
        assert await inside.api.sample('runs_total{job="sync",status="postponed",trigger="http"}')
        assert await inside.api.sample('errors_total{kind="RedisUnavailable"}') == 1
        server.start()
        run = await inside.finished(trigger="recovery", status="succeeded")
        assert (run["status"], run["unchanged"]) == ("succeeded", KEYS)
        # Owed once, made up for once.
        assert inside.runner.owed == {}
        assert len(inside.log.all("run_finished", trigger="recovery", status="succeeded")) == 1


async def test_postgres_away_at_the_start(
    quick: None,
    redis: Redis,
    redis_url: str,
    frail_postgres: PostgresServer,
    frail_dsn: str,
) -> None:
    await fill(redis)
    frail_postgres.kill()
    async with Inside(daemon_config(frail_dsn, redis_url)) as inside:
        await inside.log.next("postgres", connected=False)
        status, health = await inside.api.ask("/health")
        assert (status, health["status"]) == (503, "unhealthy")
        assert "can't be reached" in health["checks"]["postgres"]["detail"]
        assert '"alive"' in await inside.api.text("/livez")
        run = await inside.api.sync()
        assert run["status"] == "postponed"
        assert "can't be reached" in run["error"]
        frail_postgres.start()
        done = await inside.finished(trigger="recovery", status="succeeded")
        assert (done["status"], done["inserted"]) == ("succeeded", KEYS)
        assert (await inside.api.ask("/health"))[0] == 200
        # The run that PostgreSQL couldn't be told of is there, too, in its place.
        async with connected(frail_dsn) as pg, asyncio.timeout(10):
            while await pg.fetchval("SELECT count(*) FROM balancesync.runs") < 2:
                await pg.fetchval("SELECT pg_sleep(0.01)")
            rows = await pg.fetch(
                "SELECT id::text, status, error FROM balancesync.runs ORDER BY id"
            )
        assert [(row["id"], row["status"]) for row in rows] == [
            (run["id"], "postponed"),
            (done["id"], "succeeded"),
        ]
        assert rows[0]["error"] == run["error"]


async def test_postgres_killed_in_the_middle_of_a_run(
    quick: None,
    redis: Redis,
    redis_url: str,
    frail_postgres: PostgresServer,
    frail_dsn: str,
) -> None:
    await fill(redis)
    async with Proxy(frail_postgres.port) as proxy:
        config = daemon_config(through(frail_dsn, proxy), redis_url, postgres={"apply_batch": 5})
        async with Inside(config) as inside:
            await inside.leads()
            await inside.api.sync()
            await fill(redis, "2.50")
            held = proxy.hold(UPDATE, later=1)
            ticket, _ = inside.runner.submit(Request("sync", "http"))
            await soon(held)
            frail_postgres.kill()
            proxy.reset()
            proxy.resume()
            run = await inside.finished(id=str(ticket.run.id))
            assert run["status"] == "postponed"
            await inside.log.next("postgres", connected=False)
            assert (await inside.api.ask("/health"))[0] == 503
            frail_postgres.start()
            run = await inside.finished(trigger="recovery", status="succeeded")
            assert (run["status"], run["updated"] + run["unchanged"]) == ("succeeded", KEYS)
            async with connected(frail_dsn) as pg, asyncio.timeout(10):
                while (
                    await pg.fetchval(
                        "SELECT status FROM balancesync.runs WHERE id = $1", ticket.run.id
                    )
                    != "postponed"
                ):
                    await pg.fetchval("SELECT pg_sleep(0.01)")
                assert await pg.fetchval("SELECT min(balance) FROM balances") == 2.5


async def test_both_away(
    quick: None,
    private_redis: Callable[..., RedisServer],
    frail_postgres: PostgresServer,
    frail_dsn: str,
) -> None:
    server = private_redis({"appendonly": "yes", "appendfsync": "always"})
    await fill_server(server)
    server.kill()
    frail_postgres.kill()
    async with Inside(daemon_config(frail_dsn, server.url)) as inside:
        assert (await inside.api.sync())["status"] == "postponed"
        await inside.log.next("postgres", connected=False)
        health = await inside.api.document("/health")
        assert [health["checks"][name]["status"] for name in ("redis", "postgres")] == [
            "degraded",
            "failed",
        ]
        frail_postgres.start()
        await inside.leads()
        assert (await inside.api.sync())["status"] == "postponed"
        server.start()
        run = await inside.finished(trigger="recovery", status="succeeded")
        assert (run["status"], run["inserted"]) == ("succeeded", KEYS)
        await inside.api.until("/health", lambda found: found["status"] == "healthy")


async def test_a_postgres_that_hangs(
    quick: None, redis: Redis, redis_url: str, frail_postgres: PostgresServer, frail_dsn: str
) -> None:
    await fill(redis)
    config = daemon_config(frail_dsn, redis_url, postgres={"timeout": 1.0})
    async with Inside(config) as inside:
        await inside.leads()
        await inside.api.sync()
        frail_postgres.suspend()
        told = await inside.log.next("postgres", connected=False)
        assert "in time" in told["error"]
        assert (await inside.api.ask("/health"))[0] == 503
        run = await inside.api.sync()
        assert run["status"] == "postponed"
        frail_postgres.resume()
        await inside.finished(trigger="recovery", status="succeeded")
        await inside.api.until("/health", lambda found: found["status"] == "healthy")


# --- servers that answer, but not as they should --------------------------------------------------


async def test_a_redis_that_is_a_replica(
    quick: None, private_redis: Callable[..., RedisServer], postgres_dsn: str
) -> None:
    server = private_redis()
    await fill_server(server)
    async with Inside(daemon_config(postgres_dsn, server.url)) as inside:
        await inside.leads()
        await inside.api.sync()
        async with Redis.from_url(server.url) as client:
            await client.replicaof("127.0.0.1", "1")
            told = await inside.log.next("redis", connected=False)
            assert "replica" in told["error"]
            assert (await inside.api.sync())["status"] == "postponed"
            health = await inside.api.document("/health")
            assert health["status"] == "degraded"
            assert "replica" in health["checks"]["redis"]["detail"]
            await client.replicaof("NO", "ONE")
        run = await inside.finished(trigger="recovery", status="succeeded")
        assert run["unchanged"] == KEYS


async def test_a_redis_that_is_loading(
    quick: None, private_redis: Callable[..., RedisServer], postgres_dsn: str
) -> None:
    server = private_redis({"save": "3600 1", "loading-process-events-interval-bytes": "1024"})
    await fill_server(server)
    async with Inside(daemon_config(postgres_dsn, server.url)) as inside:
        await inside.leads()
        async with Redis.from_url(server.url) as client:
            await fill(client, count=2_000)
            await client.save()
        server.kill()
        server.settings["key-load-delay"] = "1000"
        server.start(wait=False)
        told = await inside.log.next(
            "redis", connected=False, error=lambda said: said and "is loading its data" in said
        )
        assert told["version"] is None
        assert (await inside.api.sync())["status"] == "postponed"
        run = await inside.finished(trigger="recovery", status="succeeded")
        assert run["inserted"] == 2_000


async def test_a_redis_that_cannot_save_is_read_all_the_same(
    quick: None, private_redis: Callable[..., RedisServer], postgres_dsn: str
) -> None:
    server = private_redis({"save": "3600 1", "dir": "."})
    await fill_server(server)
    async with Inside(daemon_config(postgres_dsn, server.url)) as inside:
        await inside.leads()
        (server.folder / "dump.rdb").mkdir()
        async with Redis.from_url(server.url) as client:
            await client.bgsave()
            async with asyncio.timeout(10):
                while True:
                    if (await client.info("persistence"))["rdb_last_bgsave_status"] != "ok":
                        break
            with pytest.raises(ResponseError, match="MISCONF"):
                await client.set("balance:1", "3")
        # It takes no writes, but nothing is written to it.
        run = await inside.api.sync()
        assert (run["status"], run["inserted"]) == ("succeeded", KEYS)


async def test_a_redis_without_memory_is_read_all_the_same(
    quick: None, private_redis: Callable[..., RedisServer], postgres_dsn: str
) -> None:
    server = private_redis({"maxmemory-policy": "noeviction"})
    await fill_server(server)
    async with Inside(daemon_config(postgres_dsn, server.url)) as inside:
        await inside.leads()
        async with Redis.from_url(server.url) as client:
            await client.config_set("maxmemory", 1)
            with pytest.raises(ResponseError, match=r"OOM|maxmemory"):
                await client.set("balance:1", "3")
        run = await inside.api.sync()
        assert (run["status"], run["inserted"]) == ("succeeded", KEYS)
        assert (await inside.api.document("/health"))["checks"]["redis"]["status"] == "ok"


async def test_a_postgres_that_is_read_only(
    quick: None, redis: Redis, redis_url: str, frail_postgres: PostgresServer, frail_dsn: str
) -> None:
    await fill(redis)
    name = urlsplit(frail_dsn).path.lstrip("/")
    async with Inside(daemon_config(frail_dsn, redis_url)) as inside:
        await inside.leads()
        await inside.api.sync()
        await fill(redis, "2.50")
        async with connected(frail_postgres.dsn) as admin:
            await admin.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
            run = await inside.api.sync()
            assert run["status"] == "postponed"
            assert "is read-only or a standby" in run["error"]
            await admin.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
        run = await inside.finished(trigger="recovery", status="succeeded")
        assert run["updated"] == KEYS


async def test_a_postgres_that_is_a_standby_until_it_is_promoted(
    quick: None,
    redis: Redis,
    redis_url: str,
    private_postgres: Callable[..., PostgresServer],
) -> None:
    server = private_postgres()
    await fill(redis)
    async with Inside(daemon_config(server.dsn, redis_url)) as inside:
        await inside.leads()
        await inside.log.next("postgres", connected=True)
        await inside.api.sync()
        await fill(redis, "2.50")
        server.kill()
        await inside.log.next("postgres", connected=False)
        (server.folder / "data" / "standby.signal").touch()
        server.start(wait=False)
        # It answers, and is asked; only a run hears that it takes no writes.
        await inside.log.next("postgres", connected=True)
        run = await inside.api.sync()
        assert run["status"] == "postponed"
        assert "is read-only or a standby" in run["error"]
        async with connected(server.dsn) as pg:
            assert await pg.fetchval("SELECT pg_promote()")
            run = await inside.finished(trigger="recovery", status="succeeded")
            assert run["updated"] == KEYS
            assert await pg.fetchval("SELECT min(balance) FROM balances") == 2.5
        await inside.leads()
        await inside.api.until("/health", lambda found: found["status"] == "healthy")


async def test_a_postgres_without_a_free_connection(
    quick: None, redis: Redis, redis_url: str, frail_postgres: PostgresServer, frail_dsn: str
) -> None:
    await fill(redis)
    name = urlsplit(frail_dsn).path.lstrip("/")
    async with connected(frail_postgres.dsn) as admin:
        await admin.execute("DROP ROLE IF EXISTS plain")
        await admin.execute("CREATE ROLE plain LOGIN")
        await admin.execute(f"ALTER DATABASE {name} OWNER TO plain")
        dsn = urlsplit(frail_dsn)
        dsn = dsn._replace(netloc=f"plain@127.0.0.1:{frail_postgres.port}")
        async with connected(dsn._replace(netloc=dsn.netloc).geturl()) as owner:
            await owner.execute(
                "CREATE TABLE balances (user_id bigint PRIMARY KEY,"
                " balance numeric(20,2), synced_at timestamptz)"
            )
        async with Inside(daemon_config(dsn.geturl(), redis_url)) as inside:
            await inside.leads()
            await admin.execute("ALTER ROLE plain CONNECTION LIMIT 1")
            run = await inside.api.sync()
            assert run["status"] == "postponed"
            assert "has no free connection" in run["error"]
            await admin.execute("ALTER ROLE plain CONNECTION LIMIT -1")
            run = await inside.finished(trigger="recovery", status="succeeded")
            assert run["inserted"] == KEYS


async def test_a_lock_on_the_target_holds_up_and_fails_nothing_else(
    redis: Redis,
    redis_url: str,
    postgres_dsn: str,
    pg: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await fill(redis)
    config = daemon_config(
        postgres_dsn, redis_url, postgres={"lock_timeout": 0.1, "apply_batch": 5}
    )
    monkeypatch.setattr("balancesync.apply._LOCK_ATTEMPTS", 2)
    async with Inside(config) as inside:
        await inside.leads()
        await inside.api.sync()
        await fill(redis, "2.50")
        async with pg.transaction():
            await pg.execute("SELECT FROM balances WHERE user_id = 7 FOR UPDATE")
            run = await inside.api.sync()
        assert run["status"] == "failed"
        assert "stay locked by another session" in run["error"]
        assert run["updated"] == KEYS - 5
        assert (await inside.api.sync())["updated"] == 5


@pytest.mark.parametrize("told", [("cancelled", "dry_run"), ("interrupted", "apply")])
async def test_a_run_that_waits_for_a_lock_ends_when_told(
    redis: Redis,
    redis_url: str,
    postgres_dsn: str,
    pg: asyncpg.Connection,
    told: tuple[str, Mode],
) -> None:
    ending, mode = told
    await fill(redis)
    config = daemon_config(postgres_dsn, redis_url, postgres={"lock_timeout": 60.0})
    async with Inside(config) as inside:
        await inside.leads()
        await inside.api.sync()
        async with pg.transaction():
            await pg.execute("LOCK TABLE balances IN ACCESS EXCLUSIVE MODE")
            ticket, _ = inside.runner.submit(Request("sync", "http", mode=mode))
            await until(pg, "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)")
            async with asyncio.timeout(5):
                if ending == "cancelled":
                    await inside.api.ask(f"/runs/{ticket.run.id}", "DELETE")
                else:
                    await inside.stop()
                run = await inside.finished(id=str(ticket.run.id))
            assert run["status"] == ending
            # Whoever comes next needn't wait until PostgreSQL has missed a lost connection.
            assert await pg.fetchval(
                "SELECT pg_try_advisory_xact_lock($1)", lock_key("writer", "balancesync")
            )
            status = "SELECT status FROM balancesync.runs WHERE id = $1"
            assert await pg.fetchval(status, ticket.run.id) == ending


async def test_a_slice_that_waits_for_its_next_try_ends_when_told(
    redis: Redis,
    redis_url: str,
    postgres_dsn: str,
    pg: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await fill(redis)
    monkeypatch.setattr("balancesync.apply._LOCK_PAUSE_S", 1e6)
    config = daemon_config(postgres_dsn, redis_url, postgres={"lock_timeout": 0.1})
    async with Inside(config) as inside:
        await inside.leads()
        await inside.api.sync()
        await fill(redis, "2.50")
        async with pg.transaction():
            await pg.execute("SELECT FROM balances WHERE user_id = 7 FOR UPDATE")
            ticket, _ = inside.runner.submit(Request("sync", "http"))
            waiting = "SELECT {}EXISTS (SELECT FROM pg_locks WHERE NOT granted)"
            await until(pg, waiting.format(""))
            await until(pg, waiting.format("NOT "))
            inside.runner.cancel()
            run = await inside.finished(id=str(ticket.run.id), within_s=5)
        assert run["status"] == "cancelled"


async def test_what_nobody_foresaw_is_a_failed_run_and_no_end(
    quick: None, redis: Redis, redis_url: str, postgres_dsn: str, pg: asyncpg.Connection
) -> None:
    await fill(redis)
    async with Inside(daemon_config(postgres_dsn, redis_url)) as inside:
        await inside.leads()
        await inside.api.sync()
        await pg.execute(
            "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE division_by_zero; END $$;"
            "CREATE TRIGGER fail BEFORE INSERT OR UPDATE ON balancesync.runs"
            " FOR EACH ROW EXECUTE FUNCTION fail()"
        )
        run = await inside.api.sync()
        assert run["status"] == "failed"
        assert "refused a statement: division_by_zero (SQLSTATE 22012)" in run["error"]
        # Nor does it end what records it later.
        await pg.execute("DROP FUNCTION fail CASCADE")
        await until(pg, f"SELECT EXISTS (SELECT FROM balancesync.runs WHERE id = '{run['id']}')")


async def test_a_bug_ends_it_with_its_traceback_in_the_log(
    redis_url: str, postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stumble(*_: object, **__: object) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr("balancesync.sync.Sync.run", stumble)
    config = daemon_config(postgres_dsn, redis_url, schedule={"on_start": True})
    with capture_logs() as lines, pytest.raises(TypeError, match="a bug"):
        await daemon.run(config)
    [line] = [each for each in lines if each["log_level"] == "critical"]
    assert isinstance(line["exc_info"], TypeError)


async def test_a_table_of_its_own_that_is_gone_or_locked_ends_nothing(
    quick: None, redis: Redis, redis_url: str, postgres_dsn: str, pg: asyncpg.Connection
) -> None:
    await fill(redis)
    name = urlsplit(postgres_dsn).path[1:]
    await pg.execute(f"ALTER DATABASE {name} SET lock_timeout = '50ms'")

    async def checked(fits: Callable[[str], bool]) -> tuple[int, str]:
        await inside.api.until(
            "/health", lambda found: fits(found["checks"].get("schema", {}).get("detail", ""))
        )
        code, found = await inside.api.ask("/health")
        return code, found["checks"]["schema"]["status"]

    async with Inside(daemon_config(postgres_dsn, redis_url)) as inside:
        await inside.leads()
        await inside.api.sync()
        async with pg.transaction():
            await pg.execute("LOCK TABLE balancesync.baselines IN ACCESS EXCLUSIVE MODE")
            found = await checked(lambda said: "stay locked by another session" in said)
            assert found == (200, "degraded")
        await pg.execute("ALTER TABLE balancesync.baselines RENAME TO elsewhere")
        assert await checked(lambda said: "does not exist" in said) == (503, "failed")
        assert (await inside.api.sync())["status"] == "failed"
        await pg.execute("ALTER TABLE balancesync.elsewhere RENAME TO baselines")
        assert (await inside.api.sync())["status"] == "succeeded"
        # All of them are counted, the one in between, too.
        totals = (await inside.api.document("/stats"))["since_start"]["totals"]
        assert {each["status"]: each["runs"] for each in totals} == {"succeeded": 2, "failed": 1}


async def test_a_killed_backend_is_made_up_for(
    quick: None, redis: Redis, redis_url: str, postgres_dsn: str, pg: asyncpg.Connection
) -> None:
    await fill(redis)
    async with Inside(daemon_config(postgres_dsn, redis_url)) as inside:
        await inside.leads()
        await inside.api.sync()
        await fill(redis, "2.50")
        async with pg.transaction():
            await pg.execute("LOCK TABLE balances IN SHARE MODE")
            ticket, _ = inside.runner.submit(Request("sync", "http"))
            async with asyncio.timeout(10):
                while not await pg.fetchval(
                    "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE NOT granted"
                    " AND locktype = 'relation'"
                ):
                    await pg.fetchval("SELECT pg_sleep(0.01)")
        run = await inside.finished(id=str(ticket.run.id))
        assert run["status"] == "postponed"
        assert "isn't there" in run["error"]
        run = await inside.finished(trigger="recovery", status="succeeded")
        assert run["updated"] == KEYS


# --- a clock that is set --------------------------------------------------------------------------

LIBFAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
# The schedule looks at the clock often, so that no test has to wait for it.
HASTY = (
    "-c",
    "from balancesync import cli, schedule; schedule._BEAT = 0.1; raise SystemExit(cli.main())",
)


@pytest.mark.skipif(LIBFAKETIME is None, reason="needs Debian's faketime, to set a clock with")
async def test_a_clock_set_by_an_hour_and_back(
    started: Processes, redis: Redis, pg: asyncpg.Connection, tmp_path: Path
) -> None:
    await fill(redis)
    clock = tmp_path.parent / f"{tmp_path.name}.clock"
    clock.write_text("+0\n")
    # Due once within the next hour, and not within the seconds of this test.
    minute = (datetime.now(UTC) + timedelta(minutes=30)).minute
    cron = f'often = {{ cron = "{minute} * * * *" }}'
    more = f"[schedule]\non_start = false\njobs = {{ {cron} }}\n"
    daemon = await started.daemon(
        file=started.file(more=more),
        program=HASTY,
        LD_PRELOAD=str(LIBFAKETIME),
        FAKETIME_TIMESTAMP_FILE=str(clock),
        FAKETIME_NO_CACHE="1",
        FAKETIME_DONT_FAKE_MONOTONIC="1",
    )
    await daemon.log.next("leading")
    assert (await daemon.api.sync())["status"] == "succeeded"
    began = await pg.fetchval("SELECT max(started_at) FROM balancesync.runs")
    clock.write_text("+1h\n")
    # What was missed is one run.
    run = await daemon.log.next("run", trigger="cron:often")
    assert (run["status"], run["unchanged"]) == ("succeeded", KEYS)
    late = await pg.fetchval("SELECT max(started_at) FROM balancesync.runs")
    assert 3500 < (late - began).total_seconds() < 3700
    clock.write_text("+0\n")
    await daemon.log.next("the clock was set back: the schedule is planned anew")
    await redis.set("balance:1", "2.50")
    newest = await daemon.api.sync()
    assert (newest["status"], newest["updated"]) == ("succeeded", 1)
    # It's the last of them, though its clock shows an earlier time than that of the one before.
    runs = (await daemon.api.document("/runs"))["runs"]
    assert runs[0]["id"] == newest["id"]
    assert [each["trigger"] for each in runs] == ["http", "cron:often", "http"]
    status = await daemon.api.document("/status")
    assert status["last_success_at"] == newest["finished_at"]
    left = datetime.fromisoformat(status["next_run_at"]) - datetime.now(UTC)
    assert 0 < left.total_seconds() <= 1801
    assert (await daemon.api.ask("/health"))[0] == 200


# --- losses ---------------------------------------------------------------------------------------


async def test_a_redis_that_comes_back_empty_is_refused_at_once(
    quick: None, private_redis: Callable[..., RedisServer], postgres_dsn: str
) -> None:
    server = private_redis()
    await fill_server(server)
    async with Inside(daemon_config(postgres_dsn, server.url)) as inside:
        await inside.leads()
        await inside.api.sync()
        server.kill()
        server.start()
        # Nobody asks for a run, and the schedule is empty.
        run = await inside.finished(trigger="recovery")
        assert run["status"] == "refused"
        assert any("restarted or replaced" in each for each in run["warnings"])
        health = await inside.api.until(
            "/health", lambda found: found["checks"]["refusal"]["status"] == "degraded"
        )
        assert health["status"] == "degraded"
        assert "no key" in health["checks"]["refusal"]["detail"]
        status = await inside.api.document("/status")
        assert status["refusal"][0]["mapping"] == "balances"
        await inside.api.until_sample("guard_refused", lambda value: value == 1)
        # It's said once, and not run into again and again.
        assert inside.runner.owed == {}
        await fill_server(server)
        assert (await inside.api.sync())["status"] == "succeeded"


async def test_what_is_pruned_is_no_loss(
    quick: None, postgres_dsn: str, redis_url: str, redis: Redis, engine: Callable[..., Engine]
) -> None:
    await fill(redis)

    async def asked() -> int:
        return int((await redis.info("commandstats"))["cmdstat_dbsize"]["calls"])

    async def probed() -> None:
        """Wait until Redis' size has been asked since now, and judged."""
        seen = await asked()
        async with asyncio.timeout(20):
            # Redis tells nobody.
            while (await asked()) < seen + 3:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async with Inside(daemon_config(postgres_dsn, redis_url)) as inside:
        await inside.leads()
        await inside.api.sync()
        await probed()
        pruned = await engine(prune={"enabled": True}).sync(job="prune")
        assert (pruned.status, pruned.counts.deleted) == ("succeeded", KEYS)
        await probed()
        assert inside.log.all("run_queued", trigger="recovery") == []
        # What goes beside them is one.
        await fill(redis)
        await probed()
        await redis.flushdb()
        await inside.finished(trigger="recovery")


# --- beginning and ending -------------------------------------------------------------------------


async def test_a_port_that_is_taken(started: Processes) -> None:
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    file = started.file(port=port)
    code, out, err = await started.command("run", file=file)
    server.close()
    said = [line for line in err if not line.startswith("{")]
    assert (code, out) == (2, "")
    assert said == [
        f"balancesync: http.port {port} on 127.0.0.1 is taken: stop what listens there, or set"
        " another http.port"
    ]


async def test_a_database_without_the_schema(started: Processes, pg: asyncpg.Connection) -> None:
    daemon = await started.daemon()
    await daemon.log.next("leading")
    assert await pg.fetchval("SELECT max(step) FROM balancesync.steps") == len(load_sql("steps"))
    daemon.send(signal.SIGTERM)
    assert await daemon.ended() == 0
    assert not [line for line in daemon.lines if not line.startswith("{")]


async def test_a_schema_of_a_much_newer_program(started: Processes, pg: asyncpg.Connection) -> None:
    assert (await started.command("init"))[0] == 0
    newest = len(load_sql("steps"))
    await pg.execute("INSERT INTO balancesync.steps (step) VALUES ($1)", newest + 1)
    daemon = await started.daemon()
    await daemon.log.next("leading")
    daemon.send(signal.SIGTERM)
    assert await daemon.ended() == 0
    await pg.execute("INSERT INTO balancesync.steps (step) VALUES ($1)", newest + 2)
    daemon = await started.begin()
    assert await daemon.ended() == 2
    said = [line for line in daemon.lines if not line.startswith("{")]
    assert said == [
        "balancesync: The schema in PostgreSQL was made by a newer balancesync; upgrade this"
        " program."
    ]


HOLD_AT_7 = """
    CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        PERFORM pg_advisory_xact_lock(4711);
        RETURN NEW;
    END $$;
    CREATE TRIGGER hold BEFORE UPDATE ON balances FOR EACH ROW WHEN (NEW.user_id = 7)
    EXECUTE FUNCTION hold()
"""
HELD = "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND objid = 4711)"


@pytest.fixture
async def held(started: Processes, redis: Redis, pg: asyncpg.Connection) -> asyncpg.Connection:
    """A table whose second batch of five rows waits until this connection lets go."""
    await fill(redis)
    assert (await started.command("sync"))[0] == 0
    await pg.execute(HOLD_AT_7)
    await pg.execute("SELECT pg_advisory_lock(4711)")
    await fill(redis, "2.50")
    return pg


async def until(pg: asyncpg.Connection, sql: str) -> None:
    async with asyncio.timeout(20):
        while not await pg.fetchval(sql):
            await pg.fetchval("SELECT pg_sleep(0.01)")


async def test_sigterm_in_the_middle_of_an_apply(
    started: Processes, held: asyncpg.Connection
) -> None:
    more = "[schedule]\non_start = true\njobs = {}\n"
    file = started.file(more=more)
    text = file.read_text().replace("[http]", "apply_batch = 5\nlock_timeout = 60.0\n[http]")
    file.write_text(text)
    daemon = await started.daemon(file=file)
    await until(held, HELD)
    status, asked = await daemon.api.ask("/force-sync", "POST")
    assert (status, asked["state"]) == (202, "queued")
    daemon.send(signal.SIGTERM)
    await daemon.log.next("stopping: the current batch ends, nothing new is started")
    status = await daemon.api.document("/status")
    assert status["state"] == "draining"
    assert (await daemon.api.ask("/health"))[0] == 200
    assert (await daemon.api.ask("/force-sync", "POST"))[0] == 503
    await held.execute("SELECT pg_advisory_unlock(4711)")
    assert await daemon.ended() == 0
    # The batch that was under way is whole, and the next one didn't begin.
    counts = await held.fetch("SELECT balance, count(*) FROM balances GROUP BY 1 ORDER BY 1")
    assert [tuple(row) for row in counts] == [(1.5, 10), (2.5, 10)]
    runs = await held.fetch(
        "SELECT trigger, status, error, mappings->'balances'->'updated' AS updated"
        " FROM balancesync.runs ORDER BY id DESC LIMIT 2"
    )
    assert [tuple(row) for row in runs] == [
        ("http", "interrupted", "balancesync is stopping", None),
        ("startup", "interrupted", "The run was interrupted: balancesync is stopping.", "10"),
    ]
    [line] = daemon.log.all("run")
    assert (line["status"], line["updated"], line["level"]) == ("interrupted", 10, "error")
    code, _, _ = await started.command("sync")
    assert code == 0
    assert await held.fetchval("SELECT min(balance) FROM balances") == 2.5


async def test_sigterm_while_postgres_hangs_in_the_middle_of_an_apply(
    redis: Redis,
    redis_url: str,
    frail_postgres: PostgresServer,
    frail_dsn: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await fill(redis)
    for name in ("session._ENDING_S", "sync._RECORD_S", "leadership._PROVE_S"):
        monkeypatch.setattr(f"balancesync.{name}", 0.2)
    config = daemon_config(frail_dsn, redis_url, postgres={"lock_timeout": 60.0})
    async with Inside(config) as inside, connected(frail_dsn) as pg:
        await inside.leads()
        await inside.api.sync()
        await fill(redis, "2.50")
        transaction = pg.transaction()
        await transaction.start()
        await pg.execute("SELECT FROM balances FOR UPDATE")
        ticket, _ = inside.runner.submit(Request("sync", "http"))
        await until(pg, "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)")
        frail_postgres.suspend()
        async with asyncio.timeout(10):
            await inside.stop()
        assert ticket.run.status == "interrupted"
        frail_postgres.resume()
        await transaction.rollback()


async def test_a_second_sigterm_ends_it_at_once(
    started: Processes, held: asyncpg.Connection
) -> None:
    file = started.file(more="[schedule]\non_start = true\njobs = {}\n")
    daemon = await started.daemon(file=file)
    await until(held, HELD)
    daemon.send(signal.SIGTERM)
    await daemon.log.next("stopping: the current batch ends, nothing new is started")
    daemon.send(signal.SIGTERM)
    assert await daemon.ended() == 1
    await held.execute("SELECT pg_advisory_unlock(4711)")
    # One batch, whole or not at all: PostgreSQL may have had its statement already.
    assert await held.fetchval("SELECT count(DISTINCT balance) FROM balances") == 1
    code, out, _ = await started.command("runs", "--json")
    assert code == 0
    assert '"status": "interrupted"' in out
    # Its lock is free, and the next one closes what it left behind.
    assert (await started.command("sync"))[0] == 0
    rows = await held.fetch("SELECT status FROM balancesync.runs ORDER BY id")
    assert [row["status"] for row in rows] == ["succeeded", "interrupted", "succeeded"]


# --- beside others --------------------------------------------------------------------------------


async def test_a_command_beside_a_running_daemon(
    started: Processes, redis: Redis, pg: asyncpg.Connection
) -> None:
    await fill(redis)
    daemon = await started.daemon()
    await daemon.log.next("leading")
    assert (await started.command("sync"))[0] == 0
    [run] = (await daemon.api.document("/runs"))["runs"]
    assert (run["trigger"], run["status"], run["inserted"]) == ("cli", "succeeded", KEYS)
    # The writer's lock is somebody else's: the command waits for it, the daemon doesn't.
    await pg.execute("SELECT pg_advisory_lock($1)", lock_key("writer", "balancesync"))
    waiting = await started.start("sync")
    assert (await daemon.api.sync())["status"] == "postponed"
    code, _, err = await started.command("sync", "--wait", "0")
    assert code == 75
    assert "Another balancesync is writing" in err[-1]
    await pg.execute("SELECT pg_advisory_unlock_all()")
    async with asyncio.timeout(20):
        await waiting.communicate()
    assert waiting.returncode == 0
    await daemon.api.until(
        "/runs",
        lambda found: (
            ("recovery", "succeeded")
            in [(each["trigger"], each["status"]) for each in found["runs"]]
        ),
    )


async def test_metrics_after_a_restart(
    quick: None, redis: Redis, redis_url: str, postgres_dsn: str, pg: asyncpg.Connection
) -> None:
    await fill(redis)
    await redis.set("balance:x", "1")
    config = daemon_config(postgres_dsn, redis_url)
    async with Inside(config) as inside:
        await inside.leads()
        await inside.api.sync()
        assert await inside.api.sample("leader") == 1
    finished = await pg.fetchval(
        "SELECT max(extract(epoch FROM finished_at)) FROM balancesync.runs"
    )
    async with Inside(daemon_config(postgres_dsn, redis_url)) as inside:
        name = 'last_success_timestamp_seconds{job="sync"}'
        await inside.api.until_sample(name, lambda value: value is not None)
        assert await inside.api.sample(name) == pytest.approx(float(finished))
        assert await inside.api.sample('rejects{mapping="balances"}') == 1
        assert await inside.api.sample("run_in_progress") == 0
        assert await inside.api.sample('runs_total{job="sync"}') is None
