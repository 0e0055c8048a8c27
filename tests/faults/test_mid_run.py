"""Servers that die, hang, lose replies or hold locks in mid-run.

After each fault every row has an old or a new value of its own key, the lock is free, a rerun
completes, and verify finds no drift.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from decimal import Decimal
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import pytest
from engine import Engine, make_config
from proxy import Proxy
from redis import Redis as BlockingRedis
from redis.asyncio import Redis
from structlog.testing import capture_logs

from balancesync import apply
from balancesync.database import lock_key
from balancesync.embedded import PostgresServer, RedisServer
from balancesync.errors import (
    BalanceSyncError,
    ConfigError,
    Locked,
    PostgresUnavailable,
    RedisUnavailable,
    Refused,
    SourceChanged,
    TargetMismatch,
    Transient,
)
from balancesync.model import RawBatch, Request
from balancesync.nodes import Identity
from balancesync.part import Progress
from balancesync.reading import Reading
from balancesync.source import Source
from balancesync.sync import Sync

Make = Callable[..., Engine]

WRITER = lock_key("writer", "balancesync")
COUNT = 60
OLD = Decimal(100)
NEW = Decimal(101)
# Quick, for nothing here gets better by waiting.
RETRY = {"attempts": 5, "initial": 0.1, "maximum": 0.1}
SMALL = {"scan_count": 10}
UPDATE = rb'UPDATE "public"\."balances"'


async def fill(redis: Redis, value: Decimal, count: int = COUNT) -> None:
    await redis.mset({f"balance:{each}": str(value) for each in range(count)})


def through(dsn: str, proxy: Proxy) -> str:
    return urlsplit(dsn)._replace(netloc=f"postgres@127.0.0.1:{proxy.port}").geturl()


def at(engine: Engine, phase: str, strike: Callable[[], object], *, nth: int = 1) -> None:
    """Call `strike` when a run comes to this phase for the nth time; once."""
    left = [nth]

    def on_progress(progress: Progress) -> None:
        if progress.phase == phase and left[0]:
            left[0] -= 1
            if not left[0]:
                strike()

    engine.on_progress = on_progress


async def soon(event: asyncio.Event) -> None:
    """Wait for it, but not for ever."""
    async with asyncio.timeout(20):
        await event.wait()


@asynccontextmanager
async def connected(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(dsn)
    yield connection
    await connection.close()


async def values(pg: asyncpg.Connection) -> list[Decimal]:
    return [row[0] for row in await pg.fetch("SELECT balance FROM balances ORDER BY user_id")]


async def until_free(pg: asyncpg.Connection) -> None:
    """Wait until nobody has the writer's lock: PostgreSQL notices a moment later."""
    async with asyncio.timeout(10):
        while not await pg.fetchval("SELECT pg_try_advisory_lock($1)", WRITER):
            await pg.fetchval("SELECT pg_sleep(0.01)")
    await pg.execute("SELECT pg_advisory_unlock($1)", WRITER)


async def sound(engine: Engine, dsn: str) -> None:
    """Check what has to hold after every fault."""
    engine.on_progress = lambda progress: None
    async with connected(dsn) as pg:
        found = await values(pg)
        assert len(found) == COUNT
        assert {*found} <= {OLD, NEW}
        await until_free(pg)
        await engine.good()
        assert {*await values(pg)} == {NEW}
        assert (
            await pg.fetchval("SELECT count(*) FROM balancesync.runs WHERE status='running'") == 0
        )
    run = await engine.verify()
    assert (run.counts.unchanged, run.counts.scanned) == (COUNT, COUNT)


# --- Redis ----------------------------------------------------------------------------------------


@pytest.fixture
async def durable_redis(private_redis: Callable[..., RedisServer]) -> RedisServer:
    """A Redis of the test's own that comes back with everything."""
    server = private_redis({"appendonly": "yes", "appendfsync": "always"})
    async with Redis.from_url(server.url) as client:
        await fill(client, OLD)
    return server


@pytest.fixture
async def on_durable(durable_redis: RedisServer, postgres_dsn: str) -> AsyncIterator[Engine]:
    """An engine after one success on it, and with new values to sync."""
    made = Engine(make_config(postgres_dsn, durable_redis.url, redis=SMALL, retry=RETRY))
    await made.good()
    async with Redis.from_url(durable_redis.url) as client:
        await fill(client, NEW)
    yield made
    await made.close()


async def test_redis_killed_in_mid_scan_and_back_with_everything(
    on_durable: Engine, durable_redis: RedisServer, postgres_dsn: str
) -> None:
    def strike() -> None:
        durable_redis.kill()
        durable_redis.start()

    at(on_durable, "scan", strike)
    run = await on_durable.good()
    assert (run.attempts, run.counts.updated) == (2, COUNT)
    assert any("restarted or replaced" in warning for warning in run.warnings)
    await sound(on_durable, postgres_dsn)


async def test_redis_killed_in_mid_scan_and_back_empty(
    private_redis: Callable[..., RedisServer], postgres_dsn: str
) -> None:
    server = private_redis()
    async with Redis.from_url(server.url) as client:
        await fill(client, OLD)
    engine = Engine(make_config(postgres_dsn, server.url, redis=SMALL, retry=RETRY))
    await engine.good()

    def strike() -> None:
        server.kill()
        server.start()

    at(engine, "scan", strike)
    run = await engine.sync()
    assert (run.status, run.attempts) == ("refused", 2)
    assert isinstance(engine.failure, Refused)
    async with Redis.from_url(server.url) as client:
        engine.on_progress = lambda progress: None
        await fill(client, OLD)
        assert (await engine.good()).counts.unchanged == COUNT
        await fill(client, NEW)
    await sound(engine, postgres_dsn)
    await engine.close()


class SecondScan(Source):
    """Something strikes after the scan of a first mapping, before that of a second."""

    strikes: list[Callable[[], object]]

    async def scan(
        self, reading: Reading, *, identity: Identity | None = None
    ) -> AsyncGenerator[RawBatch, None]:
        if self.strikes and reading.match == b"points:*":
            self.strikes.pop()()
        async with aclosing(super().scan(reading, identity=identity)) as batches:
            async for batch in batches:
                yield batch


async def test_a_restart_between_two_mappings_makes_no_whole(
    durable_redis: RedisServer, postgres_dsn: str
) -> None:
    points = {"name": "points", "key": "points:{user_id}", "table": "points"}
    config = make_config(postgres_dsn, durable_redis.url, {}, points, redis=SMALL, retry=RETRY)
    engine = Engine(config, SecondScan)
    source = engine.source
    assert isinstance(source, SecondScan)
    source.strikes = []
    await engine.good()

    def strike() -> None:
        durable_redis.kill()
        durable_redis.start()

    source.strikes = [strike]
    run = await engine.good()
    assert (source.strikes, run.attempts) == ([], 2)
    await engine.close()


async def test_a_redis_that_is_loading_is_waited_for(
    private_redis: Callable[..., RedisServer], postgres_dsn: str
) -> None:
    server = private_redis()
    async with Redis.from_url(server.url) as client:
        await fill(client, NEW)
        await client.mset({f"cache:{each}": each for each in range(3000)})
        await client.save()
    server.kill()
    server.settings |= {
        "key-load-delay": "500",  # microseconds
        "loading-process-events-interval-bytes": "1024",
        "save": "3600 1",
    }
    server.start(wait=False)
    engine = Engine(make_config(postgres_dsn, server.url))
    line = ""
    async with asyncio.timeout(20):
        while "loading" not in line:
            # Until it listens, it refuses.
            line = await engine.failed(RedisUnavailable)
    assert engine.failure is not None
    assert engine.failure.exit_code == 75
    patient = Engine(
        make_config(
            postgres_dsn, server.url, retry={"attempts": 100, "initial": 0.1, "maximum": 0.2}
        )
    )
    run = await patient.good()
    assert run.counts.inserted == COUNT
    assert run.attempts > 1
    await sound(patient, postgres_dsn)
    await patient.close()
    await engine.close()


async def test_a_connection_to_redis_reset_in_mid_scan(
    on_durable: Engine, durable_redis: RedisServer, postgres_dsn: str
) -> None:
    async with Proxy(durable_redis.port) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}/0"
        engine = Engine(make_config(postgres_dsn, url, redis=SMALL, retry=RETRY))
        at(engine, "scan", lambda: proxy.cut_after(100))
        run = await engine.good()
        assert (run.attempts, run.counts.updated) == (2, COUNT)
        await sound(engine, postgres_dsn)
        once = Engine(make_config(postgres_dsn, url, redis=SMALL))
        at(once, "scan", lambda: proxy.cut_after(100))
        await once.failed(SourceChanged)
        await once.close()
        await engine.close()


async def test_a_redis_that_hangs_in_mid_scan_is_given_up(
    on_durable: Engine, durable_redis: RedisServer, postgres_dsn: str
) -> None:
    engine = Engine(
        make_config(postgres_dsn, durable_redis.url, redis={"timeout": 0.5, "scan_count": 10})
    )
    at(engine, "scan", durable_redis.suspend)
    async with asyncio.timeout(5):
        line = await engine.failed(RedisUnavailable)
    durable_redis.resume()
    assert "redis.timeout = 0.5" in line
    await sound(engine, postgres_dsn)
    await engine.close()


# --- PostgreSQL -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """A PostgreSQL that these tests may do anything to."""
    with PostgresServer(durable=False) as made:
        yield made


@pytest.fixture
async def frail_dsn(server: PostgresServer) -> AsyncIterator[str]:
    """A new database on it."""
    name = f"test_{uuid4().hex}"
    async with connected(server.dsn) as admin:
        await admin.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'")
    yield urlsplit(server.dsn)._replace(path=f"/{name}").geturl()
    server.resume()
    async with connected(server.dsn) as admin:
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
async def make(redis: Redis, redis_url: str, frail_dsn: str) -> AsyncIterator[Make]:
    """Makes engines on it after one success, and with new values to sync."""
    made: list[Engine] = []
    await fill(redis, OLD)
    first = Engine(make_config(frail_dsn, redis_url))
    await first.good()
    await first.close()
    await fill(redis, NEW)

    def engine(dsn: str = frail_dsn, **sections: Any) -> Engine:
        sections = {"redis": SMALL, "retry": RETRY, **sections}
        made.append(Engine(make_config(dsn, redis_url, **sections)))
        return made[-1]

    yield engine
    for each in made:
        await each.close()


@pytest.fixture
async def proxy(server: PostgresServer) -> AsyncIterator[Proxy]:
    """A proxy before it."""
    async with Proxy(server.port) as made:
        yield made


@pytest.mark.parametrize(
    ("phase", "nth"), [("scan", 1), ("scan", 3), ("diff", 1), ("apply", 1), ("apply", 4)]
)
async def test_postgres_killed_in_mid_run(
    make: Make, server: PostgresServer, frail_dsn: str, phase: str, nth: int
) -> None:
    engine = make(postgres={"apply_batch": 10})

    def strike() -> None:
        server.kill()
        server.start()

    at(engine, phase, strike, nth=nth)
    run = await engine.good()
    assert (run.attempts, run.counts.updated) == (2, COUNT)
    await sound(engine, frail_dsn)


async def test_postgres_that_stays_away_fails_the_run(
    make: Make, server: PostgresServer, frail_dsn: str
) -> None:
    engine = make(postgres={"apply_batch": 10}, retry={**RETRY, "attempts": 3})
    at(engine, "apply", server.kill, nth=3)
    run = await engine.sync()
    server.start()
    assert (run.status, run.attempts) == ("failed", 3)
    assert isinstance(engine.failure, PostgresUnavailable)
    assert engine.failure.exit_code == 75
    async with connected(frail_dsn) as pg:
        found = await values(pg)
        assert found.count(NEW) == run.counts.updated == 20
        [newest] = await engine.records.runs(pg, limit=1)
        assert (newest.id, newest.status) == (run.id, "interrupted")
    await sound(engine, frail_dsn)


async def test_a_lost_reply_to_a_committed_slice(make: Make, proxy: Proxy, frail_dsn: str) -> None:
    engine = make(through(frail_dsn, proxy), postgres={"apply_batch": 20})
    lost = proxy.lose_reply(UPDATE, later=1)
    run = await engine.good()
    await soon(lost)
    # Only what this program saw committed counts: the first slice was there already.
    assert (run.attempts, run.counts.updated, run.counts.unchanged) == (2, 40, 20)
    await sound(engine, frail_dsn)


async def test_a_lost_reply_to_the_last_commit(make: Make, proxy: Proxy, frail_dsn: str) -> None:
    engine = make(through(frail_dsn, proxy), schedule={"min_interval": 3600})
    lost = asyncio.Event()

    def strike() -> None:
        nonlocal lost
        lost = proxy.lose_reply(b"COMMIT")

    at(engine, "apply", strike)
    async with connected(frail_dsn) as pg:
        await pg.execute("UPDATE balancesync.runs SET started_at = now() - interval '2 h'")
    run = await engine.good(force=False)
    assert lost.is_set()
    # Its own success, which PostgreSQL has and this program didn't hear of, is none to skip for.
    assert (run.attempts, run.counts.updated) == (2, COUNT)
    assert await engine.recorded(run) == run
    await sound(engine, frail_dsn)


@pytest.mark.parametrize(
    ("pattern", "later"),
    [
        (b"SELECT pg_try_advisory_lock", 0),
        (b'COPY "pg_temp', 0),
        (b"ANALYZE", 0),
        (UPDATE, 1),
        (b"COMMIT", 0),
        (rb'INSERT INTO "balancesync"\.runs', 1),
    ],
)
async def test_a_network_that_swallows_everything_is_given_up(
    make: Make, proxy: Proxy, frail_dsn: str, pattern: bytes, later: int
) -> None:
    engine = make(
        through(frail_dsn, proxy), postgres={"timeout": 0.5}, retry={**RETRY, "attempts": 1}
    )
    held = proxy.hold(pattern, later=later)
    task = asyncio.create_task(engine.sync())
    await soon(held)
    # A wait, a probe, and the try to record it, with time to spare for a busy machine.
    async with asyncio.timeout(4):
        run = await task
    assert run.status == "failed"
    assert isinstance(engine.failure, PostgresUnavailable)
    proxy.reset()
    proxy.resume()
    await sound(engine, frail_dsn)


@pytest.mark.parametrize("phase", ["scan", "diff", "apply"])
async def test_a_postgres_that_hangs_is_given_up(
    make: Make, server: PostgresServer, frail_dsn: str, phase: str
) -> None:
    engine = make(postgres={"timeout": 0.5}, retry={**RETRY, "attempts": 1})
    at(engine, phase, server.suspend)
    try:
        async with asyncio.timeout(5):
            run = await engine.sync()
    finally:
        server.resume()
    assert run.status == "failed"
    assert isinstance(engine.failure, PostgresUnavailable)
    await sound(engine, frail_dsn)


async def test_a_postgres_that_hangs_for_a_while_is_waited_for(
    make: Make, server: PostgresServer, frail_dsn: str
) -> None:
    engine = make(postgres={"timeout": 0.5})
    at(engine, "apply", server.suspend)
    with capture_logs() as logs:
        task = asyncio.create_task(engine.sync())
        async with asyncio.timeout(20):
            while not logs:
                await asyncio.wait({task}, timeout=0.05)
        server.resume()
        run = await task
    assert run.status == "succeeded", run.error
    assert run.attempts > 1
    await sound(engine, frail_dsn)


# --- locks of others ------------------------------------------------------------------------------


async def until(pg: asyncpg.Connection, sql: str) -> None:
    """Wait until this is true."""
    async with asyncio.timeout(20):
        while not await pg.fetchval(sql):
            await pg.fetchval("SELECT pg_sleep(0.01)")


WAITING = "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND locktype <> 'advisory')"


async def test_a_locked_row_holds_up_its_own_slice_only(make: Make, frail_dsn: str) -> None:
    engine = make(postgres={"apply_batch": 10, "lock_timeout": 0.1})
    async with connected(frail_dsn) as pg, connected(frail_dsn) as application:
        blocked = application.transaction()
        await blocked.start()
        await application.execute("UPDATE balances SET synced_at = now() WHERE user_id = 15")
        task = asyncio.create_task(engine.sync())
        await until(pg, f"SELECT count(*) = {COUNT - 10} FROM balances WHERE balance = {NEW}")
        assert {*(await values(pg))[10:20]} == {OLD}
        assert not task.done()
        await blocked.commit()
        run = await task
    assert (run.status, run.attempts, run.counts.updated) == ("succeeded", 1, COUNT)
    await sound(engine, frail_dsn)


async def test_a_row_locked_for_too_long_fails_the_attempt(
    make: Make, frail_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apply, "_LOCK_ATTEMPTS", 2)
    engine = make(postgres={"apply_batch": 10, "lock_timeout": 0.1}, retry={**RETRY, "attempts": 2})
    async with connected(frail_dsn) as application, application.transaction():
        await application.execute("UPDATE balances SET synced_at = now() WHERE user_id = 15")
        line = await engine.failed(Locked)
        assert "stay locked" in line
    await sound(engine, frail_dsn)


@pytest.mark.parametrize(
    "request_",
    [{}, {"mode": "dry_run"}, {"job": "verify", "mode": "verify"}],
    ids=["sync", "dry run", "verify"],
)
async def test_a_table_locked_for_too_long_fails_the_attempt(
    make: Make, frail_dsn: str, request_: dict[str, Any]
) -> None:
    engine = make(postgres={"lock_timeout": 0.1}, retry={**RETRY, "attempts": 2})
    async with connected(frail_dsn) as application, application.transaction():
        await application.execute("LOCK TABLE balances IN ACCESS EXCLUSIVE MODE")
        line = await engine.failed(Locked, **request_)
    assert line == (
        "public.balances or rows of it stay locked by another session: canceling statement due to"
        " lock timeout; see postgres.lock_timeout"
    )
    await sound(engine, frail_dsn)


async def test_a_slice_that_deadlocks_with_the_application_is_done_again(
    make: Make, frail_dsn: str
) -> None:
    engine = make(postgres={"lock_timeout": 10.0})
    async with connected(frail_dsn) as pg, connected(frail_dsn) as application:
        # Ours looks for a deadlock first, and so is the victim.
        await application.execute("SET deadlock_timeout = '1min'")
        async with application.transaction():
            await application.execute("UPDATE balances SET synced_at = now() WHERE user_id = 50")
            task = asyncio.create_task(engine.sync())
            await until(pg, WAITING)
            await application.execute("UPDATE balances SET synced_at = now() WHERE user_id = 10")
        run = await task
        log = await pg.fetchval(
            "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        )
    assert (run.status, run.attempts, run.counts.updated) == ("succeeded", 1, COUNT)
    assert log == 1
    await sound(engine, frail_dsn)


RAISE = """
    CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN RAISE EXCEPTION 'no room in file 7' USING ERRCODE = '{}'; END $$;
    CREATE TRIGGER fail BEFORE UPDATE ON balancesync.runs FOR EACH ROW EXECUTE FUNCTION fail()
"""


@pytest.mark.parametrize(
    ("state", "kind", "said"),
    [
        ("53400", Transient, "is at a limit: no room in file 7; raise it there"),
        ("55000", Transient, "can't do that for now: no room in file 7; its log may say why"),
        ("58030", Transient, "is in trouble: no room in file 7; see its log"),
        ("XX001", Transient, "is in trouble: no room in file 7; see its log"),
        ("25P04", PostgresUnavailable, "cancelled a statement: no room in file 7"),
        ("22012", BalanceSyncError, "refused a statement: no room in file 7 (SQLSTATE 22012)"),
    ],
)
async def test_whatever_postgres_raises_is_a_failed_run(
    make: Make, frail_dsn: str, state: str, kind: type[BalanceSyncError], said: str
) -> None:
    engine = make()
    async with connected(frail_dsn) as pg:
        await pg.execute(RAISE.format(state))
        line = await engine.failed(kind)
        assert line.endswith(said)
        await pg.execute("DROP FUNCTION fail CASCADE")
    await sound(engine, frail_dsn)


async def test_a_cancelled_statement_is_tried_again(make: Make, frail_dsn: str) -> None:
    engine = make()
    async with connected(frail_dsn) as pg, connected(frail_dsn) as application:
        blocked = application.transaction()
        await blocked.start()
        await application.execute("UPDATE balances SET synced_at = now() WHERE user_id = 15")
        task = asyncio.create_task(engine.sync())
        await until(pg, WAITING)
        await pg.execute("SELECT pg_cancel_backend(pid) FROM pg_locks WHERE NOT granted")
        await blocked.commit()
        run = await task
    assert (run.status, run.attempts, run.counts.updated) == ("succeeded", 2, COUNT)
    await sound(engine, frail_dsn)


async def test_a_table_that_goes_in_mid_run_is_one_clear_line(
    make: Make, proxy: Proxy, frail_dsn: str
) -> None:
    engine = make(through(frail_dsn, proxy))
    begun = proxy.hold(b"ANALYZE")
    task = asyncio.create_task(engine.sync())
    await soon(begun)
    async with connected(frail_dsn) as pg:
        await pg.execute("ALTER TABLE balances RENAME balance TO amount")
    proxy.resume()
    run = await task
    assert (run.status, run.attempts) == ("failed", 2)
    assert isinstance(engine.failure, TargetMismatch)
    async with connected(frail_dsn) as pg:
        await pg.execute("ALTER TABLE balances RENAME amount TO balance")
    await sound(engine, frail_dsn)


# --- attempts -------------------------------------------------------------------------------------


async def test_attempts_and_pauses_are_those_of_retry(
    private_redis: Callable[..., RedisServer], postgres_dsn: str
) -> None:
    server = private_redis()
    server.kill()
    engine = Engine(
        make_config(postgres_dsn, server.url, retry={"attempts": 4, "initial": 0.1, "maximum": 0.2})
    )
    with capture_logs() as logs:
        run = await engine.sync()
    assert (run.status, run.attempts) == ("failed", 4)
    assert isinstance(engine.failure, RedisUnavailable)
    assert engine.failure.exit_code == 75
    assert (await engine.recorded(run)) == run
    pauses = [each["pause_s"] for each in logs if "pause_s" in each]
    assert len(pauses) == 3
    for pause, ceiling in zip(pauses, (0.1, 0.2, 0.2), strict=True):
        assert 0 <= pause <= ceiling
    await engine.close()


async def test_what_no_repetition_heals_is_tried_once(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute("CREATE VIEW balances AS SELECT 1 AS user_id")
    await fill(redis, OLD)
    made = engine(retry=RETRY)
    run = await made.sync()
    assert (run.attempts, type(made.failure)) == (1, TargetMismatch)
    run = await made.sync(mapping="none")
    assert (run.attempts, type(made.failure)) == (1, ConfigError)


async def test_deleting_in_two_attempts_counts_and_remembers_each_row_once(
    redis: Redis, redis_url: str, server: PostgresServer, frail_dsn: str
) -> None:
    await fill(redis, NEW)
    engine = Engine(
        make_config(
            frail_dsn,
            redis_url,
            {"on_absent": "delete"},
            retry=RETRY,
            postgres={"apply_batch": 1},
        )
    )
    await engine.good()
    await redis.delete(*[f"balance:{each}" for each in range(10)])

    def strike() -> None:
        server.kill()
        server.start()

    at(engine, "apply", strike, nth=4)
    run = await engine.good()
    assert (run.attempts, run.counts.deleted, run.counts.absent) == (2, 10, 10)
    async with connected(frail_dsn) as pg:
        found = await pg.fetchrow("SELECT present, absent FROM balancesync.baselines")
        assert found is not None
        assert tuple(found) == (COUNT - 10, 0)
    await engine.close()


async def test_redis_that_is_emptied_between_two_attempts_is_refused(
    make: Make, server: PostgresServer, redis_url: str, frail_dsn: str
) -> None:
    engine = make(postgres={"apply_batch": 10})
    with BlockingRedis.from_url(redis_url) as client:

        def strike() -> None:
            server.kill()
            client.flushall()
            server.start()

        at(engine, "apply", strike, nth=3)
        run = await engine.sync()
    assert (run.status, run.attempts) == ("refused", 2)
    async with connected(frail_dsn) as pg:
        assert (await values(pg)).count(NEW) == 20
    async with Redis.from_url(redis_url) as back:
        await fill(back, NEW)
    engine.on_progress = lambda progress: None
    await engine.good(accept_loss=True)
    await sound(engine, frail_dsn)


async def test_a_run_is_no_interrupted_one_between_its_attempts(
    private_redis: Callable[..., RedisServer], postgres_dsn: str
) -> None:
    redis = private_redis()
    retry = {"attempts": 9, "initial": 60.0}
    engine = Engine(make_config(postgres_dsn, redis.url, retry=retry))
    try:
        await engine.good()
        redis.kill()
        sync = Sync(engine.config, engine.database, engine.source)
        with capture_logs() as logs:
            task = asyncio.create_task(sync.run(Request("sync", "cli")))
            async with asyncio.timeout(20):
                while not [each for each in logs if each["event"].startswith("attempt failed")]:
                    await asyncio.wait({task}, timeout=0.02)
        async with engine.database.acquire() as connection:
            # What the next writer does, while this run waits.
            await engine.records.mark_interrupted(connection)
            [last, _] = await engine.records.runs(connection, limit=2)
            assert (last.status, last.error) == ("running", None)
        sync.stop("enough")
        run = await task
        recorded = await engine.recorded(run)
        assert recorded is not None
        assert (run.status, recorded.status) == ("cancelled", "cancelled")
    finally:
        await engine.close()
