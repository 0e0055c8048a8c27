"""One run at a time: what joins what, what waits, and what comes of it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import asyncpg
import pytest
from engine import make_config
from proxy import Proxy
from redis.asyncio import Redis
from running import Log

from balancesync.config import Config
from balancesync.database import Database, lock_key
from balancesync.embedded import RedisServer
from balancesync.model import Request, Run
from balancesync.runner import Runner, Ticket
from balancesync.source import Source

# Before anything is read from Redis, and right after the first keys are: what is sent there.
BEFORE = b"CREATE TEMP TABLE"
AFTER = b'^.{0,5}COPY "pg_temp'
UPDATE = rb'UPDATE "public"\."balances"'
SYNC = Request("sync", "http")


class Running:
    """A runner at work; `log` has what it publishes."""

    def __init__(self, config: Config) -> None:
        self.log = Log()
        self.database = Database(config.postgres)
        self.source = Source(config.redis)
        self.runner = Runner(config, self.database, self.source, self.log.add)

    def submit(self, request: Request = SYNC) -> tuple[Ticket, str]:
        return self.runner.submit(request)

    async def good(self, request: Request = SYNC) -> None:
        run = await ended(self.submit(request)[0])
        assert (run.status, run.error) == ("succeeded", None)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.runner.serve())
        try:
            yield
        finally:
            self.runner.drain()
            await task
            await self.source.close()
            await self.database.close()


Make = Callable[..., Awaitable[Running]]


@pytest.fixture
async def proxy(postgres_admin_dsn: str) -> AsyncIterator[Proxy]:
    """A proxy before PostgreSQL."""
    port = urlsplit(postgres_admin_dsn).port
    assert port is not None
    async with Proxy(port) as made:
        yield made


@pytest.fixture
async def running(
    proxy: Proxy, postgres_dsn: str, redis_url: str, redis: Redis
) -> AsyncIterator[Running]:
    """A runner whose PostgreSQL is behind the proxy, and a few keys; the schema is made."""
    await redis.mset({f"balance:{each}": "1.5" for each in range(20)})
    parts = urlsplit(postgres_dsn)
    user = parts.netloc.rpartition("@")[0]
    dsn = parts._replace(netloc=f"{user}@127.0.0.1:{proxy.port}").geturl()
    made = Running(make_config(dsn, redis_url, redis={"scan_count": 10}, postgres={"timeout": 3.0}))
    async with made.serving():
        await made.good()
        yield made
        proxy.resume()


async def ended(ticket: Ticket) -> Run:
    async with asyncio.timeout(20):
        return await asyncio.shield(ticket.done)


async def soon(event: asyncio.Event) -> None:
    async with asyncio.timeout(20):
        await event.wait()


async def test_a_request_joins_a_run_that_has_read_nothing(running: Running, proxy: Proxy) -> None:
    held = proxy.hold(BEFORE)
    first, state = running.submit()
    assert state == "started"
    await soon(held)
    second, state = running.submit(Request("sync", "sighup"))
    assert (second, state) == (first, "started")
    proxy.resume()
    assert (await ended(first)).status == "succeeded"
    assert running.runner.queued == ()


async def test_a_request_after_the_first_read_is_a_run_of_its_own(
    running: Running, proxy: Proxy, redis: Redis, pg: asyncpg.Connection
) -> None:
    held = proxy.hold(AFTER)
    first, _ = running.submit()
    await soon(held)
    # Read already, not yet staged: what changes now is for a later run.
    await redis.mset({f"balance:{each}": "2.5" for each in range(20)})
    second, state = running.submit()
    assert second is not first
    assert state == "queued"
    third, state = running.submit()
    assert (third, state) == (second, "queued")
    proxy.resume()
    assert (await ended(first)).status == "succeeded"
    assert (await ended(second)).status == "succeeded"
    assert await pg.fetchval("SELECT min(balance) FROM balances") == 2.5


async def test_a_request_joins_no_run_over_an_empty_redis_that_was_read(
    running: Running, proxy: Proxy, redis: Redis
) -> None:
    await redis.flushdb()
    held = proxy.hold(b"ANALYZE")
    first, _ = running.submit(Request("sync", "http", mode="dry_run"))
    await soon(held)
    second, _ = running.submit(Request("sync", "http", mode="dry_run"))
    assert second is not first
    proxy.resume()
    await ended(first)
    await ended(second)


@pytest.mark.parametrize(
    "other",
    [
        Request("sync", "http", mapping="balances"),
        Request("sync", "http", mode="dry_run"),
        Request("sync", "http", accept_loss=True),
        Request("verify", "http", mode="verify"),
    ],
    ids=["mapping", "mode", "accept_loss", "job"],
)
async def test_requests_of_another_kind_join_nothing(
    running: Running, proxy: Proxy, other: Request
) -> None:
    held = proxy.hold(BEFORE)
    first, _ = running.submit()
    await soon(held)
    second, state = running.submit(other)
    third, _ = running.submit(SYNC)
    assert (second is first, state) == (False, "queued")
    assert third is first
    again, _ = running.submit(other)
    assert again is second
    proxy.resume()
    run = await ended(second)
    assert (run.status, run.mode, run.mapping) == ("succeeded", other.mode, other.mapping)


async def test_a_forced_request_joins_no_run_that_may_be_skipped(
    proxy: Proxy, postgres_dsn: str, redis_url: str, redis: Redis
) -> None:
    await redis.set("balance:1", "1")
    dsn = urlsplit(postgres_dsn)._replace(netloc=f"postgres@127.0.0.1:{proxy.port}").geturl()
    made = Running(make_config(dsn, redis_url, schedule={"min_interval": 3600}))
    async with made.serving():
        await made.good()
        held = proxy.hold(rb"last_success|extract|status = 'succeeded'")
        unforced, _ = made.submit(Request("sync", "cron:hourly", force=False))
        await soon(held)
        forced, _ = made.submit()
        assert forced is not unforced
        # One that waits takes the force over, whoever comes first.
        assert made.submit(Request("sync", "cron:daily", force=False))[0] in (forced, unforced)
        proxy.resume()
        assert (await ended(unforced)).status == "skipped"
        assert (await ended(forced)).status == "succeeded"


async def test_a_queued_request_takes_over_the_force_of_one_that_joins(
    proxy: Proxy, postgres_dsn: str, redis_url: str, redis: Redis
) -> None:
    await redis.set("balance:1", "1")
    made = Running(make_config(postgres_dsn, redis_url, schedule={"min_interval": 3600}))
    async with made.serving():
        await made.good()
        # Cron waits a second for company: long enough for the other to come.
        unforced, _ = made.submit(Request("sync", "cron:hourly", force=False))
        begun = asyncio.get_running_loop().time()
        forced, state = made.submit()
        assert (forced, state) == (unforced, "queued")
        assert (await ended(forced)).status == "succeeded"
        # Nobody who forces has to wait for company.
        assert asyncio.get_running_loop().time() - begun < 0.9


async def test_cron_jobs_of_one_minute_make_one_run(running: Running) -> None:
    first, _ = running.submit(Request("sync", "cron:hourly", force=False))
    second, _ = running.submit(Request("sync", "cron:daily", force=False))
    assert second is first
    assert (await ended(first)).trigger == "cron:hourly"
    assert len(running.log.all("run_started")) == 2


async def test_events_tell_a_run_from_its_queue_to_its_end(running: Running) -> None:
    ticket, _ = running.submit(Request("sync", "sighup"))
    await ended(ticket)
    own = [
        (kind, document.get("status"))
        for kind, document in running.log.entries
        if str(ticket.run.id) in (document.get("id"), document.get("run_id"))
        and kind != "run_progress"
    ]
    assert own == [
        ("run_queued", "queued"),
        ("run_started", "queued"),
        ("run_finished", "succeeded"),
    ]


async def test_cancelling_the_running_and_the_queued(
    running: Running, proxy: Proxy, pg: asyncpg.Connection, redis: Redis
) -> None:
    held = proxy.hold(BEFORE)
    first, _ = running.submit()
    await soon(held)
    second, _ = running.submit(Request("verify", "http", mode="verify"))
    assert running.runner.cancel(second.run.id) is second
    assert (await ended(second)).status == "cancelled"
    assert running.runner.cancel() is first
    proxy.resume()
    run = await ended(first)
    assert (run.status, run.error) == ("cancelled", "cancelled on demand")
    assert running.runner.cancel() is None
    assert running.runner.cancel(first.run.id) is None
    row = await pg.fetchrow("SELECT status FROM balancesync.runs WHERE id = $1", first.run.id)
    assert row is not None
    assert row["status"] == "cancelled"


async def test_draining_ends_what_runs_and_what_waits(
    proxy: Proxy, postgres_dsn: str, redis_url: str, redis: Redis
) -> None:
    await redis.mset({f"balance:{each}": "1.5" for each in range(20)})
    dsn = urlsplit(postgres_dsn)._replace(netloc=f"postgres@127.0.0.1:{proxy.port}").geturl()
    made = Running(make_config(dsn, redis_url, redis={"scan_count": 10}, postgres={"timeout": 3.0}))
    async with made.serving():
        held = proxy.hold(AFTER)
        first, _ = made.submit()
        await soon(held)
        second, _ = made.submit(Request("verify", "http", mode="verify"))
        made.runner.drain()
        proxy.resume()
    assert [first.done.result().status, second.done.result().status] == ["interrupted"] * 2


async def test_a_postponed_request_is_owed_until_its_kind_has_run(
    private_redis: Callable[..., RedisServer], postgres_dsn: str
) -> None:
    server = private_redis()
    made = Running(make_config(postgres_dsn, server.url))
    async with made.serving():
        await made.good()
        server.kill()
        run = await ended(made.submit(Request("sync", "cron:hourly", force=False))[0])
        assert (run.status, run.attempts) == ("postponed", 1)
        assert "can't be reached" in (run.error or "")
        [owed] = made.runner.owed.values()
        assert (owed.request.job, owed.request.force) == ("sync", False)
        assert owed.error == run.error
        server.start()
        await made.good()
        assert made.runner.owed == {}


async def test_no_loss_is_accepted_by_a_run_that_comes_later(
    private_redis: Callable[..., RedisServer], postgres_dsn: str
) -> None:
    server = private_redis()
    made = Running(make_config(postgres_dsn, server.url))
    async with made.serving():
        server.kill()
        run = await ended(made.submit(Request("sync", "http", accept_loss=True))[0])
        assert run.status == "postponed"
        # Whoever accepted a loss knew what was lost then, not what Redis comes back with.
        [owed] = made.runner.owed.values()
        assert not owed.request.accept_loss
        server.start()
        await ended(made.submit(owed.request)[0])
        assert made.runner.owed == {}


async def test_a_run_waits_for_no_lock_but_is_postponed(
    running: Running, pg: asyncpg.Connection
) -> None:
    await pg.execute("SELECT pg_advisory_lock($1)", lock_key("writer", "balancesync"))
    run = await ended(running.submit()[0])
    assert run.status == "postponed"
    assert "Another balancesync is writing" in (run.error or "")
    assert len(running.runner.owed) == 1


async def test_a_runner_that_has_just_begun_is_not_stuck(postgres_dsn: str, redis_url: str) -> None:
    made = Running(make_config(postgres_dsn, redis_url))
    async with made.serving():
        # The watchdog may ask before the runner has had its first turn.
        assert not made.runner.is_stuck
