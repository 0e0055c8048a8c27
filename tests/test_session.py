"""The session that writes: who is let in, how it ends, and what is lost or given up in it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from engine import Engine, waiting
from pooler import PgBouncer, find_pgbouncer
from proxy import Proxy
from pydantic import SecretStr
from redis.asyncio import Redis

from balancesync import leadership, opening, session
from balancesync.config import PostgresConfig
from balancesync.database import NO_LIMIT, Database, lock_key
from balancesync.errors import Cancelled, Interrupted, LockHeld, PostgresUnavailable
from balancesync.leadership import Leadership
from balancesync.model import Request
from balancesync.session import Session
from balancesync.sync import Sync

Make = Callable[..., Engine]

WRITER, WANTED = lock_key("writer", "balancesync"), lock_key("writer wanted", "balancesync")
LEADER = lock_key("leader", "balancesync")
HOLDERS = """SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'
    AND (classid::bigint << 32) | objid::bigint = $1"""


def database_at(dsn: str, **settings: Any) -> Database:
    return Database(PostgresConfig(dsn=SecretStr(dsn), **settings))


def through(dsn: str, proxy: Proxy) -> str:
    parts = urlsplit(dsn)
    return parts._replace(netloc=f"{parts.username}@127.0.0.1:{proxy.port}").geturl()


async def holders(pg: asyncpg.Connection, key: int) -> int:
    """How many sessions have the lock, or a share of it."""
    return int(await pg.fetchval(HOLDERS, key))


async def until_held(pg: asyncpg.Connection, key: int) -> None:
    async with asyncio.timeout(20):
        while not await holders(pg, key):
            await pg.fetchval("SELECT pg_sleep(0.01)")


async def watched(made: Session, sql: str) -> None:
    """Execute a statement that may take as long as it takes."""
    await made.watch(made.connection.execute(sql, timeout=NO_LIMIT))


@pytest.fixture
async def database(postgres_dsn: str) -> AsyncIterator[Database]:
    made = database_at(postgres_dsn)
    yield made
    await made.close()


# --- the writer's lock ----------------------------------------------------------------------------


async def test_a_writer_that_waits_is_let_in(database: Database, pg: asyncpg.Connection) -> None:
    live, run = await Session.open(database), await Session.open(database)
    assert await live.yield_writer()
    entering = asyncio.create_task(run.lock_writer(60, lambda: None))
    await until_held(pg, WANTED)
    # It wants it back at once, four times a second.
    await live.unlock_writer()
    assert not await live.yield_writer()
    await entering
    assert not await live.yield_writer()
    # Who is in waits no more, and what it has goes back to live mode.
    assert await holders(pg, WANTED) == 0
    await run.unlock_writer()
    assert await live.yield_writer()
    for each in (live, run):
        await each.close()


async def test_a_lock_that_is_free_is_left_to_who_waits(
    database: Database, pg: asyncpg.Connection
) -> None:
    live = await Session.open(database)
    await pg.execute("SELECT pg_advisory_lock_shared($1)", WANTED)
    assert not await live.yield_writer()
    assert await holders(pg, WRITER) == 0
    await pg.execute("SELECT pg_advisory_unlock_shared($1)", WANTED)
    assert await live.yield_writer()
    # Who asks leaves nothing behind that would look like somebody who waits.
    assert (await holders(pg, WRITER), await holders(pg, WANTED)) == (1, 0)
    await live.close()


async def test_who_waits_in_vain_is_in_nobodys_way(
    database: Database, pg: asyncpg.Connection
) -> None:
    await pg.execute("SELECT pg_advisory_lock($1)", WRITER)
    made = await Session.open(database)
    turns: list[None] = []
    with pytest.raises(LockHeld):
        await made.lock_writer(0.3, lambda: turns.append(None))
    assert turns
    assert await holders(pg, WRITER) == 1
    await made.close()
    assert await holders(pg, WANTED) == 0


async def test_a_run_that_waits_for_the_lock_can_be_stopped(
    engine: Make, pg: asyncpg.Connection, redis: Redis
) -> None:
    await redis.set("balance:1", "1")
    made = engine()
    await made.good()
    await pg.execute("SELECT pg_advisory_lock($1)", WRITER)
    sync = Sync(made.config, made.database, made.source)
    running = asyncio.create_task(sync.run(Request("sync", "cli"), wait_s=600))
    await until_held(pg, WANTED)
    sync.stop("enough of it")
    async with asyncio.timeout(20):
        run = await running
    assert (run.status, run.error) == ("cancelled", "enough of it")
    assert isinstance(sync.failure, Cancelled)
    assert (await holders(pg, WRITER), await holders(pg, WANTED)) == (1, 0)


def test_the_locks_have_the_same_numbers_for_ever() -> None:
    """Programs of other versions and on other hosts know them, too."""
    assert (WRITER, WANTED, LEADER) == (
        2512141678185139327,
        8367306461699348843,
        7108344319459555770,
    )
    assert lock_key("writer", "other") != WRITER
    assert lock_key("a", "bc") != lock_key("ab", "c")


# --- its ends -------------------------------------------------------------------------------------


async def test_the_lock_is_free_before_close_returns(
    database: Database, pg: asyncpg.Connection
) -> None:
    for end in (None, "BEGIN; CREATE TABLE left_open (id int)"):
        made = await Session.open(database)
        await made.lock_writer(0, lambda: None)
        await made.prepare()
        if end:
            await made.connection.execute(end)
        await made.close()
        assert await holders(pg, WRITER) == 0
    assert await pg.fetchval("SELECT to_regclass('left_open')") is None


async def test_a_session_frees_its_locks_before_it_drops_its_connection(postgres_dsn: str) -> None:
    async with Proxy(urlsplit(postgres_dsn).port or 0) as proxy:
        database = database_at(through(postgres_dsn, proxy))
        made = await Session.open(database)
        held = proxy.hold(b"pg_advisory_unlock_all")
        closing = asyncio.create_task(made.close())
        async with asyncio.timeout(20):
            await held.wait()
        assert not made.connection.is_closed()
        assert not closing.done()
        proxy.resume()
        await closing
        assert made.connection.is_closed()
        await database.close()


async def test_the_end_of_a_dropped_session_is_waited_for(
    database: Database, pg: asyncpg.Connection
) -> None:
    made = await Session.open(database)
    await made.lock_writer(0, lambda: None)
    await pg.execute("SELECT pg_advisory_lock(4711)")
    await made.connection.execute("SET lock_timeout = 0")
    blocked = asyncio.create_task(watched(made, "SELECT pg_advisory_lock(4711)"))
    await waiting(pg, 1)
    made.drop()
    await asyncio.gather(blocked, return_exceptions=True)
    await made.close()
    assert await holders(pg, WRITER) == 0


async def test_a_commit_under_way_is_not_called_off(
    database: Database, pg: asyncpg.Connection
) -> None:
    await pg.execute(
        "CREATE TABLE written (id int);"
        "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN PERFORM pg_advisory_xact_lock(4711); RETURN NULL; END';"
        "CREATE CONSTRAINT TRIGGER wait AFTER INSERT ON written DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION wait()"
    )
    ending = asyncio.get_running_loop().create_future()
    made = await Session.open(database, ending=ending)
    await made.connection.execute("SET lock_timeout = 0")

    async def write() -> None:
        async with made.transaction():
            await watched(made, "INSERT INTO written VALUES (1)")

    await pg.execute("SELECT pg_advisory_lock(4711)")
    writing = asyncio.create_task(write())
    await waiting(pg, 1)
    ending.set_result(Interrupted())
    # What would call it off has had its turns once PostgreSQL has answered somebody so often.
    for _ in range(20):
        await pg.fetchval("SELECT pg_sleep(0.02)")
    assert not writing.done()
    await pg.execute("SELECT pg_advisory_unlock(4711)")
    await writing
    assert await pg.fetchval("SELECT count(*) FROM written") == 1
    # And what comes after it is called off at once.
    with pytest.raises(Interrupted):
        await watched(made, "SELECT pg_sleep(600)")
    await made.close()


async def test_what_ends_a_run_ends_its_connecting_and_its_pauses(postgres_dsn: str) -> None:
    ending = asyncio.get_running_loop().create_future()
    async with Proxy(urlsplit(postgres_dsn).port or 0) as proxy:
        database = database_at(through(postgres_dsn, proxy), timeout=600.0)
        made = await Session.open(database, ending=ending)
        pausing = asyncio.create_task(made.pause(600))
        proxy.stall()
        connecting = asyncio.create_task(Session.open(database, ending=ending))
        await asyncio.sleep(0)
        ending.set_result(Interrupted())
        async with asyncio.timeout(20):
            await pausing
            with pytest.raises(Interrupted):
                await connecting
        proxy.resume()
        await made.close()
        await database.close()


async def test_a_session_has_the_settings_of_its_work(database: Database) -> None:
    made = await Session.open(database)

    async def shown(*names: str) -> list[str]:
        return [await made.connection.fetchval(f"SHOW {name}") for name in names]

    plans = ("enable_seqscan", "enable_hashjoin", "enable_mergejoin")
    assert await shown("work_mem", "temp_buffers", "jit") == ["64MB", "32MB", "off"]
    assert await shown(*plans) == ["on"] * 3
    await made.plan_by_index()
    assert await shown(*plans) == ["off"] * 3
    await made.use_any_plan()
    assert await shown(*plans) == ["on"] * 3
    async with made.transaction("REPEATABLE READ"):
        assert await shown("transaction_isolation") == ["repeatable read"]
    async with made.transaction():
        assert await shown("transaction_isolation") == ["read committed"]
    await made.close()


# --- the leader's ---------------------------------------------------------------------------------


async def test_a_leader_that_gets_no_answer_leads_no_more(
    postgres_dsn: str, pg: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_PROVE_S", "_ANSWER_S"):
        monkeypatch.setattr(leadership, name, 0.3)
    heard: asyncio.Queue[bool] = asyncio.Queue()
    async with Proxy(urlsplit(postgres_dsn).port or 0) as proxy, asyncio.timeout(20):
        database = database_at(through(postgres_dsn, proxy))
        leader = Leadership(database, "here:1", lambda leads, _: heard.put_nowait(leads))
        serving = asyncio.create_task(leader.serve())
        while not await heard.get():
            pass
        await proxy.mute(b"SELECT 1").wait()
        assert not await heard.get()
        # The lock that the lost session has is PostgreSQL's to take back.
        while not await heard.get():
            pass
        assert await holders(pg, LEADER) == 1
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        assert await holders(pg, LEADER) == 0
        await database.close()


async def test_a_long_name_is_cut(database: Database, pg: asyncpg.Connection) -> None:
    heard: asyncio.Queue[tuple[bool, str | None]] = asyncio.Queue()
    name = "h" * 60
    leaders = [
        Leadership(database, each, lambda leads, who: heard.put_nowait((leads, who)))
        for each in (name, "standby")
    ]
    serving = [asyncio.create_task(leaders[0].serve())]
    async with asyncio.timeout(20):
        assert await heard.get() == (True, name)
        serving.append(asyncio.create_task(leaders[1].serve()))
        # 63 bytes, of which the program's name and a blank take 12.
        assert await heard.get() == (False, "h" * 51)
    for each in serving:
        each.cancel()
    await asyncio.gather(*serving, return_exceptions=True)


# --- what is lost or given up ---------------------------------------------------------------------


@pytest.fixture(params=["plain", "role", "untracked", "pooler", "pooler and role"])
async def odd_dsn(
    request: pytest.FixtureRequest, postgres_dsn: str, pg: asyncpg.Connection
) -> AsyncIterator[str]:
    """The DSN of a session that others don't see by what the driver says of it."""
    kind: str = request.param
    if "pooler" in kind and find_pgbouncer() is None:
        pytest.skip("there is no pgbouncer here")
    dsn, name = postgres_dsn, await pg.fetchval("SELECT current_database()")
    login, worker = f"login_{name}", f"worker_{name}"
    await pg.execute(f"CREATE ROLE {login} LOGIN NOINHERIT; CREATE ROLE {worker}")
    await pg.execute(f"GRANT {worker} TO {login}; GRANT ALL ON DATABASE {name} TO {worker}")
    await pg.execute(f"GRANT ALL ON SCHEMA public TO {worker}")
    if "role" in kind:
        await pg.execute(f"ALTER ROLE {login} SET role = {worker}")
        dsn = dsn.replace("//postgres@", f"//{login}@")
    if kind == "untracked":
        await pg.execute(f"ALTER DATABASE {name} SET track_activities = off")
    if "pooler" in kind:
        with PgBouncer(dsn, "session") as made:
            yield made.dsn
    else:
        yield dsn
    await pg.execute(f"DROP OWNED BY {worker}; DROP ROLE {login}; DROP ROLE {worker}")


@pytest.mark.parametrize("in_transaction", [False, True])
async def test_a_long_statement_is_waited_for(
    odd_dsn: str, pg: asyncpg.Connection, *, in_transaction: bool
) -> None:
    alive = asyncio.Event()
    database = database_at(odd_dsn, timeout=1.0)
    made = await Session.open(database, alive.set)
    await made.connection.execute("SET lock_timeout = 0")
    await pg.execute("SELECT pg_advisory_lock(4711)")
    if in_transaction:
        await made.connection.execute("BEGIN")
    blocked = asyncio.create_task(watched(made, "SELECT pg_advisory_lock(4711)"))
    async with asyncio.timeout(20):
        for _ in range(2):
            await alive.wait()
            alive.clear()
        await pg.execute("SELECT pg_advisory_unlock(4711)")
        await blocked
    await made.close()
    await database.close()


async def test_a_long_statement_of_a_run_is_waited_for(
    odd_dsn: str, engine: Make, pg: asyncpg.Connection, redis: Redis
) -> None:
    await redis.set("balance:1", "1")
    made = engine(dsn=odd_dsn, postgres={"timeout": 1.0})
    await made.good()
    await pg.execute(
        "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN PERFORM pg_sleep(2.5); RETURN NEW; END';"
        "CREATE TRIGGER wait BEFORE UPDATE ON balances FOR EACH ROW EXECUTE FUNCTION wait()"
    )
    await redis.set("balance:1", "2")
    assert (await made.good()).counts.updated == 1


@pytest.mark.parametrize("in_transaction", [False, True])
async def test_a_reply_that_is_lost_is_noticed(
    odd_dsn: str,
    pg: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    *,
    in_transaction: bool,
) -> None:
    monkeypatch.setattr(session, "_REPLY_S", 0.1)
    monkeypatch.setattr(opening, "_IDLE_S", 2.0)
    async with Proxy(urlsplit(odd_dsn).port or 0) as proxy:
        database = database_at(through(odd_dsn, proxy), timeout=1.0)
        made = await Session.open(database)
        await made.lock_writer(0, lambda: None)
        await made.connection.execute("CREATE TEMP TABLE kept (id int)")
        if in_transaction:
            await made.connection.execute("BEGIN")
        silent = proxy.mute(rb"INSERT INTO kept")
        with pytest.raises(PostgresUnavailable):
            await watched(made, "INSERT INTO kept VALUES (1)")
        assert silent.is_set()
        await made.close()
        assert await holders(pg, WRITER) == 0
        await database.close()


async def test_a_run_that_is_stopped_calls_its_statement_off(
    odd_dsn: str, pg: asyncpg.Connection
) -> None:
    database = database_at(odd_dsn)
    ending = asyncio.get_running_loop().create_future()
    made = await Session.open(database, ending=ending)
    await made.lock_writer(0, lambda: None)
    await made.connection.execute("SET lock_timeout = 0")
    await pg.execute("SELECT pg_advisory_lock(1)")
    blocked = asyncio.create_task(watched(made, "SELECT pg_advisory_lock(1)"))
    await waiting(pg, 1)
    ending.set_result(Interrupted())
    with pytest.raises(Interrupted):
        await blocked
    await made.close()
    assert await holders(pg, WRITER) == 0
    await database.close()


async def test_what_is_given_up_is_not_committed(
    odd_dsn: str, pg: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A statement that the connection was lost to is ended before another attempt may begin."""
    await pg.execute("CREATE TABLE written (id int)")
    await pg.execute("GRANT ALL ON written TO public")
    async with Proxy(urlsplit(odd_dsn).port or 0) as proxy:
        database = database_at(through(odd_dsn, proxy))
        made = await Session.open(database)
        await made.lock_writer(0, lambda: None)
        async with pg.transaction():
            await pg.execute("LOCK TABLE written")
            insert = "INSERT INTO written VALUES (1)"
            await made.connection.execute("SET lock_timeout = 0")
            writing = asyncio.create_task(watched(made, insert))
            await waiting(pg, 1)
            proxy.reset()
            with pytest.raises(PostgresUnavailable):
                await writing
            await made.close()
            assert await holders(pg, WRITER) == 0
        assert await pg.fetchval("SELECT count(*) FROM written") == 0
        await database.close()
