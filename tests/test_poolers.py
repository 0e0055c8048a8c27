"""PgBouncer before PostgreSQL: sessions of one's own are used, any other kind is known at once."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from engine import Engine
from pooler import PgBouncer, find_pgbouncer
from pydantic import SecretStr
from redis.asyncio import Redis
from running import Inside, Processes, daemon_config, processes

from balancesync import opening
from balancesync.config import PostgresConfig
from balancesync.database import Connection, Database
from balancesync.errors import ConfigError, PostgresUnavailable
from balancesync.leadership import Leadership
from balancesync.session import Session

pytestmark = pytest.mark.skipif(find_pgbouncer() is None, reason="there is no pgbouncer here")

Start = Callable[..., PgBouncer]
WAY_OUT = "let postgres.dsn name PostgreSQL's own port, or a port of the pooler that gives sessions"
# What any of our connections would leave in a session that others get next.
LEFT = """SELECT
    (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory')
    + (SELECT count(*) FROM pg_class WHERE relpersistence = 't')
    + (SELECT count(*) FROM pg_namespace WHERE nspname = 'balancesync')
    + (SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'balancesync%')"""
# By the simple protocol, for the unnamed statement of the other one may be in another session.
OF_SESSION = """SELECT (SELECT count(*) FROM pg_prepared_statements),
    current_setting('lock_timeout'), current_setting('idle_in_transaction_session_timeout')"""


@pytest.fixture
def pooler(postgres_dsn: str) -> Iterator[Start]:
    """Starts a PgBouncer before the test's database; takes PgBouncer's arguments but the DSN."""
    with ExitStack() as stack:

        def start(mode: str, **more: Any) -> PgBouncer:
            return stack.enter_context(PgBouncer(postgres_dsn, mode, **more))

        yield start


@pytest.fixture
async def started(tmp_path: Path, postgres_dsn: str, redis_url: str) -> AsyncIterator[Processes]:
    async with processes(tmp_path, postgres_dsn, redis_url) as made:
        yield made


async def plain(dsn: str) -> Connection:
    """A connection of the application's, which prepares nothing by name."""
    return await asyncpg.connect(dsn, statement_cache_size=0)


async def warm_up(dsn: str, count: int) -> None:
    """Have so many sessions in the pool, as an application's traffic leaves them."""
    clients = [await plain(dsn) for _ in range(count)]
    for client in clients:
        await client.execute("BEGIN")
    for client in clients:
        await client.execute("ROLLBACK")
        await client.close()


def database_at(dsn: str, **settings: Any) -> Database:
    return Database(PostgresConfig(dsn=SecretStr(dsn), **settings))


async def one(connection: Connection) -> int:
    return int(await connection.fetchval("SELECT 1"))


async def by_connect(database: Database) -> None:
    (await database.connect()).terminate()


async def by_pool(database: Database) -> None:
    async with database.acquire() as connection:
        await one(connection)


async def by_probe(database: Database) -> None:
    await database.ask(one, 10, reserved=True)


async def by_session(database: Database) -> None:
    await (await Session.open(database)).close()


KINDS: list[Callable[[Database], Awaitable[None]]] = [by_connect, by_pool, by_probe, by_session]


@pytest.mark.parametrize("turns", ["0", "1"], ids=["last-used", "in-turn"])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("mode", ["transaction", "statement"])
async def test_a_pool_without_sessions_is_known_at_once(
    pooler: Start, pg: asyncpg.Connection, mode: str, count: int, turns: str
) -> None:
    settings = {"default_pool_size": str(count), "server_round_robin": turns}
    made = pooler(mode, settings=settings)
    if mode == "transaction":
        await warm_up(made.dsn, count)
    # For this the driver asks a question of its own, before anybody else does.
    database = database_at(f"{made.dsn}?target_session_attrs=primary")
    try:
        for begin in KINDS:
            with pytest.raises(ConfigError) as caught:
                await begin(database)
            assert str(caught.value).startswith(
                f"PostgreSQL at {database.address} is behind a pooler that gives us no session of"
                f" our own: {WAY_OUT}"
            )
            assert "\n" not in str(caught.value)
        client = await plain(made.dsn)
        for _ in range(2 * count):
            assert await opening._ask(client, OF_SESSION) == ["0", "0", "0"]
        await client.close()
        assert await pg.fetchval(LEFT) == 0
    finally:
        await database.close()


async def test_a_pool_without_sessions_is_known_among_others(
    pooler: Start, pg: asyncpg.Connection
) -> None:
    made = pooler("transaction", settings={"default_pool_size": "3"})
    busy = True

    async def traffic() -> None:
        client = await plain(made.dsn)
        while busy:
            await client.execute("SELECT pg_sleep(0.001)")
        await client.close()

    others = [asyncio.create_task(traffic()) for _ in range(2)]
    database = database_at(made.dsn)
    for begin in KINDS * 5:
        with pytest.raises(ConfigError, match=WAY_OUT):
            await begin(database)
    busy = False
    await asyncio.gather(*others)
    assert await pg.fetchval(LEFT) == 0
    await database.close()


@pytest.mark.parametrize("mode", ["transaction", "statement"])
@pytest.mark.parametrize("command", ["init", "check", "sync", "verify", "status"])
async def test_every_command_says_so(
    pooler: Start, started: Processes, pg: asyncpg.Connection, mode: str, command: str
) -> None:
    file = started.file(dsn=pooler(mode).dsn)
    code, out, err = await started.command(command, file=file)
    # Of a run there's a line in the log, too.
    told = [line for line in err if line.startswith("balancesync: ")]
    said = [line for line in (*out.splitlines(), *told) if WAY_OUT in line]
    assert (code, len(said)) == (2, 1), (out, err)
    assert await pg.fetchval(LEFT) == 0


async def test_a_leader_has_a_session_or_leads_not(pooler: Start, pg: asyncpg.Connection) -> None:
    heard: asyncio.Queue[bool] = asyncio.Queue()
    for mode, leads in (("transaction", False), ("session", True)):
        database = database_at(pooler(mode).dsn)
        leader = Leadership(database, "here:1", lambda leads, _: heard.put_nowait(leads))
        serving = asyncio.create_task(leader.serve())
        async with asyncio.timeout(20):
            assert await heard.get() is leads
        if not leads:
            assert await pg.fetchval(LEFT) == 0
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


@pytest.mark.parametrize("state", ["42P05", "26000"])
async def test_a_pool_that_is_changed_under_way_is_known_by_what_it_says(
    pooler: Start, state: str
) -> None:
    made = pooler("transaction", settings={"default_pool_size": "1"})
    database = database_at(made.dsn)
    one, other = [await asyncpg.connect(made.dsn) for _ in range(2)]
    prepared = await one.prepare("SELECT 1", name="one")
    await prepared.fetchval()
    if state == "26000":
        await other.execute("DEALLOCATE ALL")
    with pytest.raises(ConfigError, match=WAY_OUT) as caught, database.translated():
        await (prepared.fetchval() if state == "26000" else other.prepare("SELECT 1", name="one"))
    assert getattr(caught.value.__cause__, "sqlstate", None) == state
    for each in (one, other):
        each.terminate()
    await database.close()


async def test_a_pool_that_is_used_up_is_waited_for_and_no_longer(
    pooler: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "_POOLER_S", 0.3)
    made = pooler("session", settings={"default_pool_size": "1"})
    database = database_at(made.dsn)
    with pytest.raises(PostgresUnavailable, match="no second session for us in"):
        await database.connect()
    await database.close()


async def test_a_setting_of_the_dsn_gets_through_a_pooler(pooler: Start) -> None:
    made = pooler("session", entry="client_encoding=LATIN1")
    options = "?search_path=app,public&options=-c%20work_mem%3D5MB%20--my.own=7"
    database = database_at(made.dsn + options)
    async with database.acquire() as connection:
        shown = [await connection.fetchval(f"SHOW {name}") for name in ("search_path", "work_mem")]
        assert (*shown, await connection.fetchval("SHOW my.own")) == ("app,public", "5MB", "7")
        assert await connection.fetchval("SHOW client_encoding") == "UTF8"
    await database.close()


async def test_all_jobs_work_in_sessions_of_a_pooler(
    pooler: Start, engine: Callable[..., Engine], pg: asyncpg.Connection, redis: Redis
) -> None:
    await redis.mset({f"balance:{each}": "1.50" for each in range(10)})
    made = engine(dsn=pooler("session").dsn, history={"enabled": True}, prune={"enabled": True})
    assert (await made.good()).counts.inserted == 10
    assert (await made.verify()).counts.unchanged == 10
    assert (await made.good(mode="dry_run")).counts.unchanged == 10
    await redis.delete("balance:1", "balance:2")
    await made.good(job="restore")
    assert await redis.mget("balance:1", "balance:2") == [b"1.5", b"1.5"]
    assert await pg.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0


async def test_live_mode_works_in_sessions_of_a_pooler(
    pooler: Start, pg: asyncpg.Connection, redis: Redis, redis_url: str
) -> None:
    await redis.set("balance:1", "1")
    config = daemon_config(pooler("session").dsn, redis_url, live={"enabled": True})
    async with Inside(config) as inside:
        await inside.leads()
        await inside.api.until("/status", lambda found: found["live"] == "up")
        await redis.set("balance:1", "2")
        async with asyncio.timeout(20):
            while await pg.fetchval("SELECT balance FROM balances") != 2:
                await pg.fetchval("SELECT pg_sleep(0.01)")
