"""Connections, pooled or not: what they bring along, who may have them, what their servers say."""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit

import pytest
from proxy import Proxy
from pydantic import SecretStr

from balancesync import overview
from balancesync.config import PostgresConfig, RedisConfig
from balancesync.database import NO_LIMIT, Connection, Database
from balancesync.embedded import PostgresServer
from balancesync.errors import ConfigError, PostgresUnavailable
from balancesync.session import Session
from balancesync.source import Source


async def test_a_pooled_connection_keeps_its_settings(postgres_dsn: str) -> None:
    database = Database(PostgresConfig(dsn=SecretStr(postgres_dsn), pool_size=1))
    try:
        for _ in range(2):
            async with database.acquire() as connection:
                assert await connection.fetchval("SHOW application_name") == "balancesync"
                # In milliseconds, as a number or with a unit: versions differ. 0 if it's unset.
                assert (await connection.fetchval("SHOW tcp_user_timeout")).startswith("7")
    finally:
        await database.close()


async def test_a_transaction_left_open_is_rolled_back(postgres_dsn: str) -> None:
    database = Database(PostgresConfig(dsn=SecretStr(postgres_dsn), pool_size=1))
    try:
        async with database.acquire() as connection:
            await connection.execute("BEGIN; CREATE TABLE left_open (id int)")
        async with database.acquire() as connection:
            assert not connection.is_in_transaction()
            assert await connection.fetchval("SELECT to_regclass('left_open')") is None
    finally:
        await database.close()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("no_such_setting=1", 'unrecognized configuration parameter "no_such_setting"'),
        ("statement_timeout=soon", 'invalid value for parameter "statement_timeout": "soon"'),
        ("shared_buffers=1", 'parameter "shared_buffers" cannot be changed without restarting'),
    ],
)
async def test_a_setting_of_the_dsn_that_the_server_refuses(
    postgres_dsn: str, setting: str, said: str
) -> None:
    dsn = f"{postgres_dsn}{'&' if '?' in postgres_dsn else '?'}{setting}"
    database = Database(PostgresConfig(dsn=SecretStr(dsn)))
    where = f"PostgreSQL at {database.address} can't be asked as postgres.dsn says: {said}"
    try:
        with pytest.raises(ConfigError) as caught:
            await database.connect()
        assert str(caught.value).startswith(where)
        with pytest.raises(ConfigError) as caught:
            async with database.acquire():
                pass
        assert str(caught.value).startswith(where)
    finally:
        await database.close()


async def test_a_server_that_hangs_is_told_in_time(
    private_postgres: Callable[..., PostgresServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overview, "_PROBE_S", 0.3)
    server = private_postgres()
    database = Database(PostgresConfig(dsn=SecretStr(server.dsn)))
    try:
        assert (await overview.probe_postgres(database)).connected
        server.suspend()
        # The pool takes its connection back only when the server has confirmed that it gave up.
        for _ in range(4):
            async with asyncio.timeout(1.5):
                found = await overview.probe_postgres(database)
            assert "didn't answer in 0.3 s" in (found.error or "")
        server.resume()
        async with asyncio.timeout(10):
            while not (await overview.probe_postgres(database)).connected:
                pass
    finally:
        server.resume()
        await database.close()


async def test_a_redis_that_is_silent_may_speak_no_tls(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overview, "_PROBE_S", 0.3)
    config = RedisConfig(url=SecretStr(redis_url.replace("redis://", "rediss://")))
    async with Source(config) as source:
        found = await overview.probe_redis(config, source)
    assert found.error == "Redis didn't answer in 0.3 s; does it speak TLS?"


async def test_a_pool_that_is_used_up_is_no_dead_server(postgres_dsn: str) -> None:
    database = Database(PostgresConfig(dsn=SecretStr(postgres_dsn), pool_size=1, timeout=0.5))
    alive = asyncio.Event()
    try:
        async with database.acquire():
            assert (await overview.probe_postgres(database)).connected
            session = await Session.open(database, alive.set)
            sleep = session.connection.execute("SELECT pg_sleep(1.2)", timeout=NO_LIMIT)
            await session.watch(sleep)
            assert alive.is_set()
            await session.close()
    finally:
        await database.close()


async def select(connection: Connection) -> int:
    return int(await connection.fetchval("SELECT 1"))


async def warm_up(database: Database, count: int) -> None:
    """Have so many connections in the pool, and one in reserve."""
    borrowed = asyncio.Barrier(count)

    async def borrow(connection: Connection) -> None:
        await select(connection)
        await borrowed.wait()

    await asyncio.gather(*(database.ask(borrow, 10) for _ in range(count)))
    await database.ask(select, 10, reserved=True)


@pytest.fixture
async def proxy(postgres_dsn: str) -> AsyncIterator[Proxy]:
    """A proxy before the test's PostgreSQL."""
    async with Proxy(urlsplit(postgres_dsn).port or 0) as made:
        yield made


def database_through(proxy: Proxy, dsn: str, **settings: Any) -> Database:
    dsn = urlsplit(dsn)._replace(netloc=f"postgres@127.0.0.1:{proxy.port}").geturl()
    return Database(PostgresConfig(dsn=SecretStr(dsn), **settings))


LATE = r"didn't answer in 0\.2 s"


async def test_a_late_question_costs_its_own_connection(proxy: Proxy, postgres_dsn: str) -> None:
    database = database_through(proxy, postgres_dsn, pool_size=1)
    await warm_up(database, 1)
    proxy.strand()
    with pytest.raises(PostgresUnavailable, match=LATE):
        await database.ask(select, 0.2)
    assert await database.ask(select, 5) == 1
    await database.close()


async def test_a_late_probe_costs_all_connections(proxy: Proxy, postgres_dsn: str) -> None:
    database = database_through(proxy, postgres_dsn)
    await warm_up(database, 4)
    proxy.strand()
    with pytest.raises(PostgresUnavailable, match=LATE):
        await database.ask(select, 0.2, reserved=True)
    assert await database.ask(select, 5, reserved=True) == 1
    await warm_up(database, 4)
    await database.close()


async def test_a_server_that_hangs_leaves_nothing_in_the_log(
    private_postgres: Callable[..., PostgresServer],
) -> None:
    heard: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context))
    before = asyncio.all_tasks()
    server = private_postgres()
    database = Database(PostgresConfig(dsn=SecretStr(server.dsn), timeout=0.3))
    await warm_up(database, 2)
    server.suspend()
    # Late by itself, and given up while the pool would still wait for its connection.
    for within_s in (0.1, 0.45):
        with pytest.raises(PostgresUnavailable):
            await database.ask(select, within_s)
    while left := asyncio.all_tasks() - before:
        await asyncio.wait(left)
        del left
    gc.collect()
    # What is found by then is told in the loop's next turn.
    await asyncio.sleep(0)
    assert heard == []
    server.resume()
    await database.close()
