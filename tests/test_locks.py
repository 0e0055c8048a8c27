"""One writer at a time, a lock that is free after every end, and a schema that two may make."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from engine import Engine
from proxy import Proxy
from redis.asyncio import Redis

from balancesync.database import Database, Steps, lock_key
from balancesync.errors import LockHeld, SchemaMissing, SchemaTooNew, TargetMismatch
from balancesync.model import Request, Run
from balancesync.part import Progress
from balancesync.session import Session
from balancesync.sync import Sync

Make = Callable[..., Engine]

WRITER = lock_key("writer", "balancesync")
INSERT = rb'INSERT INTO "public"\."balances"'
OURS = """SELECT count(*) FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'"""
# Ends by itself if nobody kills it, so that a failed test leaves nothing behind.
SCRIPT = """
import asyncio, sys
from engine import Engine, make_config
from balancesync.model import Request
from balancesync.sync import Sync

async def main(dsn, url, phase):
    config = make_config(dsn, url, redis={"scan_count": 10}, postgres={"apply_batch": 1})
    engine = Engine(config)

    def on_progress(progress):
        if progress.phase == phase and progress.done:
            print("there", flush=True)
            sys.stdin.read()

    await Sync(config, engine.database, engine.source, on_progress).run(Request("sync", "cli"))

asyncio.run(main(*sys.argv[1:]))
"""


async def fill(redis: Redis, count: int, value: str = "100.00") -> None:
    await redis.mset({f"balance:{each}": value for each in range(count)})


async def soon(event: asyncio.Event) -> None:
    """Wait for it, but not for ever."""
    async with asyncio.timeout(20):
        await event.wait()


async def held(pg: asyncpg.Connection) -> bool:
    """Whether anybody has the writer's lock."""
    if free := await pg.fetchval("SELECT pg_try_advisory_lock($1)", WRITER):
        await pg.execute("SELECT pg_advisory_unlock($1)", WRITER)
    return not free


async def until_free(pg: asyncpg.Connection) -> None:
    """Wait until PostgreSQL has noticed that a session is gone."""
    async with asyncio.timeout(10):
        while await held(pg):
            await pg.fetchval("SELECT pg_sleep(0.01)")


def through(dsn: str, proxy: Proxy) -> str:
    return urlsplit(dsn)._replace(netloc=f"postgres@127.0.0.1:{proxy.port}").geturl()


@pytest.fixture
async def proxy(postgres_dsn: str) -> AsyncIterator[Proxy]:
    """A proxy before the test's PostgreSQL."""
    async with Proxy(urlsplit(postgres_dsn).port or 5432) as made:
        yield made


async def run(engine: Engine, *, wait_s: float = 0.0, **request: Any) -> tuple[Run, Sync]:
    sync = Sync(engine.config, engine.database, engine.source, engine.on_progress)
    return await sync.run(
        Request(**{"job": "sync", "trigger": "cli", **request}), wait_s=wait_s
    ), sync


# --- two writers ----------------------------------------------------------------------------------


async def test_a_second_writer_waits_for_the_first(
    engine: Make, proxy: Proxy, postgres_dsn: str, redis: Redis
) -> None:
    await fill(redis, 10)
    first = engine(dsn=through(postgres_dsn, proxy))
    inserting = proxy.hold(INSERT)
    one = asyncio.create_task(run(first))
    await soon(inserting)
    async with Proxy(urlsplit(postgres_dsn).port or 5432) as other_proxy:
        second = engine(dsn=through(postgres_dsn, other_proxy))
        trying = other_proxy.seen(b"pg_try_advisory_lock", later=3)
        two = asyncio.create_task(run(second, wait_s=30))
        await soon(trying)
        assert not two.done()
        proxy.resume()
        (done, _), (after, _) = await one, await two
    assert (done.status, done.counts.inserted) == ("succeeded", 10)
    assert (after.status, after.counts.unchanged) == ("succeeded", 10)


async def test_a_writer_that_waits_in_vain_reads_nothing(
    engine: Make, pg: asyncpg.Connection, redis: Redis
) -> None:
    await fill(redis, 10)
    made = engine(retry={"attempts": 5})
    await made.good()
    await pg.execute("SELECT pg_advisory_lock($1)", WRITER)
    await redis.config_resetstat()
    result, sync = await run(made, wait_s=0.3)
    assert result.status == "failed"
    assert isinstance(sync.failure, LockHeld)
    assert sync.failure.exit_code == 75
    assert result.attempts == 1
    assert result.duration_s is not None
    assert result.duration_s >= 0.3
    assert not {"cmdstat_scan", "cmdstat_mget"} & {*await redis.info("commandstats")}


async def test_who_waits_in_vain_is_told_for_whom(
    engine: Make, proxy: Proxy, postgres_dsn: str, redis: Redis
) -> None:
    await fill(redis, 10)
    inserting = proxy.hold(INSERT)
    one = asyncio.create_task(run(engine(dsn=through(postgres_dsn, proxy)), trigger="cron:hourly"))
    await soon(inserting)
    told = [(await run(engine(), trigger=each))[0].error or "" for each in ("cli", "http")]
    proxy.resume()
    await one
    for each in told:
        assert each.startswith(
            "Another balancesync is writing to this database: sync (cron:hourly) since 20"
        )
    by_command, by_daemon = (each.rpartition("; ")[2] for each in told)
    assert by_command == "try again later or raise `--wait`"
    # An option of the command line is none of the daemon's.
    assert by_daemon == "this run is postponed"


async def test_dry_run_and_verify_need_no_lock(
    engine: Make, pg: asyncpg.Connection, redis: Redis
) -> None:
    await fill(redis, 10)
    made = engine()
    await made.good()
    await pg.execute("SELECT pg_advisory_lock($1)", WRITER)
    await made.good(mode="dry_run")
    await made.verify()


async def test_another_schema_is_another_lock(
    engine: Make, pg: asyncpg.Connection, redis: Redis
) -> None:
    await fill(redis, 10)
    await pg.execute("SELECT pg_advisory_lock($1)", WRITER)
    await engine(postgres={"schema": "other"}).good()


# --- every end ------------------------------------------------------------------------------------


class Bug(Exception):
    """What the engine doesn't expect."""


async def end_well(engine: Engine, redis: Redis, pg: asyncpg.Connection) -> str:
    return (await engine.sync()).status


async def end_refused(engine: Engine, redis: Redis, pg: asyncpg.Connection) -> str:
    await redis.flushall()
    return (await engine.sync()).status


async def end_mismatched(engine: Engine, redis: Redis, pg: asyncpg.Connection) -> str:
    await pg.execute("ALTER TABLE balances RENAME balance TO amount")
    run = await engine.sync()
    await pg.execute("ALTER TABLE balances RENAME amount TO balance")
    assert isinstance(engine.failure, TargetMismatch)
    return run.status


def at(phase: str, strike: Callable[[], object]) -> Callable[[Progress], None]:
    def on_progress(progress: Progress) -> None:
        if progress.phase == phase:
            strike()

    return on_progress


async def end_cancelled(phase: str, engine: Engine, redis: Redis, pg: asyncpg.Connection) -> str:
    sync = Sync(
        engine.config,
        engine.database,
        engine.source,
        at(phase, lambda: sync.stop("enough of it")),
    )
    await fill(redis, 10, "3.00")
    run = await sync.run(Request("sync", "cli"))
    assert run.error == "enough of it"
    return run.status


async def end_by_a_bug(phase: str, engine: Engine, redis: Redis, pg: asyncpg.Connection) -> str:
    def fail() -> None:
        raise Bug

    await fill(redis, 10, "3.00")
    engine.on_progress = at(phase, fail)
    with pytest.raises(Bug):
        await engine.sync()
    return "bug"


async def end_by_cancellation(
    phase: str, engine: Engine, redis: Redis, pg: asyncpg.Connection
) -> str:
    await fill(redis, 10, "3.00")
    task = asyncio.create_task(engine.sync())
    engine.on_progress = at(phase, task.cancel)
    with pytest.raises(asyncio.CancelledError):
        await task
    return "gone"


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (end_well, "succeeded"),
        (end_refused, "refused"),
        (end_mismatched, "failed"),
    ],
)
async def test_the_lock_is_free_after(
    engine: Make,
    redis: Redis,
    pg: asyncpg.Connection,
    end: Callable[[Engine, Redis, asyncpg.Connection], Any],
    status: str,
) -> None:
    await fill(redis, 10)
    made = engine()
    await made.good()
    assert await end(made, redis, pg) == status
    assert not await held(pg)
    await fill(redis, 10)
    await made.good()


@pytest.mark.parametrize("phase", ["scan", "diff", "apply"])
@pytest.mark.parametrize(
    ("end", "status"),
    [(end_cancelled, "cancelled"), (end_by_a_bug, "bug"), (end_by_cancellation, "gone")],
)
async def test_the_lock_is_free_after_an_end_in_mid_run(
    engine: Make,
    redis: Redis,
    pg: asyncpg.Connection,
    *,
    end: Callable[[str, Engine, Redis, asyncpg.Connection], Any],
    status: str,
    phase: str,
) -> None:
    await fill(redis, 10)
    made = engine(retry={"attempts": 5}, postgres={"apply_batch": 1})
    await made.good()
    assert await end(phase, made, redis, pg) == status
    assert not await held(pg)
    made.on_progress = lambda progress: None
    written = await pg.fetchval("SELECT count(*) FROM balances WHERE balance = 3")
    assert written <= 1
    assert await pg.fetchval("SELECT count(*) FROM balances WHERE balance = 100") == 10 - written
    assert (await made.good()).counts.updated == 10 - written
    newest, before, *_ = [
        row["status"]
        for row in await pg.fetch("SELECT status FROM balancesync.runs ORDER BY id DESC")
    ]
    assert (newest, before) == ("succeeded", "cancelled" if end is end_cancelled else "interrupted")


async def test_the_lock_lives_on_the_connection_that_writes(
    engine: Make, proxy: Proxy, postgres_dsn: str, redis: Redis, pg: asyncpg.Connection
) -> None:
    await fill(redis, 10)
    made = engine(
        dsn=through(postgres_dsn, proxy), retry={"attempts": 3, "initial": 0.1, "maximum": 0.1}
    )
    inserting = proxy.hold(INSERT)
    task = asyncio.create_task(made.sync())
    await soon(inserting)
    ended = await pg.fetch(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_locks WHERE locktype = 'advisory'"
        " AND (classid::bigint << 32) | objid::bigint = $1",
        WRITER,
    )
    assert [row[0] for row in ended] == [True]
    # Its lock is lost, and what it was about to write can't be written any more.
    assert not await held(pg)
    assert await pg.fetchval("SELECT count(*) FROM balances") == 0
    proxy.resume()
    result = await task
    assert (result.status, result.attempts, result.counts.inserted) == ("succeeded", 2, 10)
    assert not await held(pg)


@pytest.mark.parametrize("phase", ["scan", "apply"])
async def test_a_killed_process_leaves_an_interrupted_run_and_no_lock(
    engine: Make,
    postgres_dsn: str,
    redis_url: str,
    *,
    redis: Redis,
    pg: asyncpg.Connection,
    phase: str,
) -> None:
    await fill(redis, 100)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", SCRIPT, postgres_dsn, redis_url, phase),
        cwd=str(__file__).rpartition("/")[0],
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    async with asyncio.timeout(30):
        async for line in process.stdout:
            if line == b"there\n":
                break
    assert await held(pg)
    made = engine(postgres={"apply_batch": 1})
    [running] = await made.records.runs(pg)
    assert running.status == "running"
    process.send_signal(signal.SIGKILL)
    await process.wait()
    await until_free(pg)
    [left] = await made.records.runs(pg)
    assert (left.id, left.status) == (running.id, "interrupted")
    if phase == "apply":
        assert 0 < await pg.fetchval("SELECT count(*) FROM balances") < 100
    done = await made.good()
    assert done.counts.inserted + done.counts.unchanged == 100
    recorded = "SELECT status, finished_at IS NOT NULL FROM balancesync.runs WHERE id = $1"
    [kept] = await pg.fetch(recorded, running.id)
    assert tuple(kept) == ("interrupted", True)
    assert (await made.verify()).counts.unchanged == 100


# --- the schema's steps ---------------------------------------------------------------------------


async def test_two_may_make_the_schema_at_once(postgres_dsn: str, engine: Make) -> None:
    steps = Steps(Database(engine().config.postgres))
    connections = [await asyncpg.connect(postgres_dsn) for _ in range(4)]
    taken = await asyncio.gather(*[steps.upgrade(connection) for connection in connections])
    assert sorted(taken) == [0, 0, 0, steps.newest]
    for connection in connections:
        assert await steps.current(connection) == steps.newest
        await steps.check(connection)
        await connection.close()


async def test_two_first_runs_at_once_both_succeed(engine: Make, redis: Redis) -> None:
    await fill(redis, 10)
    results = await asyncio.gather(*[run(engine(), wait_s=30) for _ in range(3)])
    assert [result.status for result, _ in results] == ["succeeded"] * 3
    assert sorted(result.counts.inserted for result, _ in results) == [0, 0, 10]


async def ahead(pg: asyncpg.Connection, engine: Engine, steps: int) -> None:
    """Make the schema as a program that knows more steps would leave it."""
    newest = Steps(engine.database).newest
    for step in range(newest + 1, newest + 1 + steps):
        await pg.execute("INSERT INTO balancesync.steps (step) VALUES ($1)", step)


@pytest.mark.parametrize("request_", [{}, {"mode": "dry_run"}, {"job": "verify", "mode": "verify"}])
async def test_a_schema_one_step_ahead_fits_and_two_do_not(
    engine: Make, redis: Redis, pg: asyncpg.Connection, request_: dict[str, str]
) -> None:
    await fill(redis, 10)
    made = engine(retry={"attempts": 3})
    await made.good()
    await ahead(pg, made, 1)
    await made.good(**request_)
    await pg.execute("DELETE FROM balancesync.steps WHERE step > $1", Steps(made.database).newest)
    await ahead(pg, made, 2)
    await made.failed(SchemaTooNew, **request_)
    assert made.failure is not None
    assert made.failure.exit_code == 2


async def test_verify_wants_a_schema_and_makes_none(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    await fill(redis, 10)
    line = await engine().failed(SchemaMissing, job="verify", mode="verify")
    assert "balancesync init" in line
    assert await pg.fetchval(OURS) == 0


async def test_a_dry_run_without_a_schema_makes_nothing(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    await fill(redis, 10)
    made = engine()
    run = await made.good(mode="dry_run")
    assert run.counts.inserted == 10
    assert await pg.fetchval(OURS) == 0
    assert made.reports[0].totals == {"balance": "1000.00"}


async def test_a_session_waits_for_locks_as_configured_all_along(
    engine: Make, pg: asyncpg.Connection
) -> None:
    name = await pg.fetchval("SELECT current_database()")
    await pg.execute(f"ALTER DATABASE {name} SET lock_timeout = '50ms'")
    session = await Session.open(engine(postgres={"lock_timeout": 7}).database)
    for turn in (session.plan_by_index, session.use_any_plan):
        assert await session.connection.fetchval("SHOW lock_timeout") == "7s"
        await turn()
    assert await session.connection.fetchval("SHOW lock_timeout") == "7s"
    await session.close()


async def test_an_empty_table_of_steps_is_a_clear_line(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    await fill(redis, 1)
    sync = engine()
    await sync.good()
    await pg.execute("TRUNCATE balancesync.steps")
    line = await sync.failed(SchemaMissing)
    assert 'has an empty table "balancesync".steps, as a dump without data leaves it' in line
    assert "restore that table's rows, or drop the schema" in line
