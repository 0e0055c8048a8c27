"""Connections, pooled or not: what they bring along, who may have them, what their servers say."""

import asyncio
from collections.abc import Callable

import pytest
from pydantic import SecretStr

from balancesync import overview
from balancesync.config import PostgresConfig, RedisConfig
from balancesync.database import NO_LIMIT, Database
from balancesync.embedded import PostgresServer
from balancesync.errors import ConfigError
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
