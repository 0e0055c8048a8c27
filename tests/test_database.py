"""Connections, pooled or not: what they bring along, who may have them, what their servers say."""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from engine import Engine
from proxy import Proxy
from pydantic import SecretStr
from redis.asyncio import Redis

from balancesync import overview
from balancesync.config import PostgresConfig, RedisConfig
from balancesync.database import NO_LIMIT, Connection, Database
from balancesync.dsn import postgres_place
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


# What libpq makes of each: {user}, {host}, {port} and {name} are the test's own, all others wrong.
DSNS = [
    "postgresql://{user}@{host}/{name}?port={port}",
    "postgresql://{user}@{host}:1/{name}?port={port}",
    "postgresql://{user}@no.such.host/{name}?host={host}&port={port}",
    "postgresql://{user}@no.such.host:1/none?host={host}&port={port}&dbname={name}",
    "postgresql://nobody@{host}:{port}/{name}?user={user}",
    "postgresql:///{name}?user={user}&host={host}&port={port}",
    "postgresql://?user={user}&host={host}&port={port}&dbname={name}",
    "postgresql://?user={user}&host={host},{host}&port=1,{port}&database={name}",
    "postgresql://{user}@{host},{host}/{name}?port={port}",
    "postgresql://{user}@{host}:{port}?dbname=none&dbname={name}",
    "postgresql:///?service=mine",
    "postgresql://{user}@{host}/{name}?service=elsewhere&port={port}",
    "postgresql://{host}/?service=mine&sslmode=prefer",
]


@pytest.mark.parametrize("dsn", DSNS)
async def test_a_dsn_leads_where_libpq_would_go(
    postgres_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dsn: str
) -> None:
    parts = urlsplit(postgres_dsn)
    place = {"user": parts.username, "host": parts.hostname, "port": parts.port}
    place["name"] = parts.path[1:]
    services = tmp_path / "services"
    services.write_text(
        "# Ours\n[mine]\nhost={host}\nport={port}\nuser={user}\ndbname={name}\n"
        "password=50%\n[elsewhere]\nhost=no.such.host\nport=1\ndbname=none\n".format(**place)
    )
    monkeypatch.setenv("PGSERVICEFILE", str(services))
    filled = dsn.format(**place)
    database = Database(PostgresConfig(dsn=SecretStr(filled)))
    sql = "SELECT current_user || ' ' || current_database() || ' ' || inet_server_port()"
    try:
        for _ in range(2):
            async with database.acquire() as connection:
                found = await connection.fetchval(sql)
            assert found == "{user} {name} {port}".format(**place)
        assert str(parts.port) in database.address
        assert postgres_place(filled).endswith(f":{parts.port}{parts.path}")
    finally:
        await database.close()


# A role or a database may bring these along.
ODD = {
    "datestyle": "German, DMY",
    "intervalstyle": "iso_8601",
    "extra_float_digits": "0",
    "bytea_output": "escape",
    "standard_conforming_strings": "off",
    "quote_all_identifiers": "on",
    "timezone": "Asia/Kolkata",
    "statement_timeout": "7s",
    "lock_timeout": "7s",
    "idle_in_transaction_session_timeout": "7s",
    "default_transaction_isolation": "serializable",
    "default_transaction_deferrable": "on",
    "client_encoding": "LATIN1",
    "transform_null_equals": "on",
    "search_path": "nowhere",
    "row_security": "on",
    "enable_seqscan": "off",
}


async def test_what_a_role_or_a_database_sets_changes_nothing(
    engine: Callable[..., Engine], pg: Connection, postgres_dsn: str, redis: Redis
) -> None:
    name = await pg.fetchval("SELECT current_database()")
    for setting, value in ODD.items():
        quoted = ", ".join(f"'{each}'" for each in value.split(", "))
        await pg.execute(f"ALTER DATABASE {name} SET {setting} = {quoted}")
    mapping = {
        "key": "b:{who}",
        "type": "hash",
        "table": "public.odd",
        "columns": {"who": "text", "balance": "numeric(20,2)", "at": "timestamptz"},
    }
    at = "2026-05-06T07:08:09.123456+02:00"
    await redis.hset("b:\\\u00e9\u4e16'", mapping={"balance": "1.50", "at": at})
    made = engine(mapping, history={"enabled": True})
    assert (await made.good()).counts.inserted == 1
    row = await pg.fetchrow("SELECT who, balance, at FROM public.odd")
    assert row is not None
    assert (row["who"], str(row["balance"])) == ("\\\u00e9\u4e16'", "1.50")
    assert row["at"] == datetime.fromisoformat(at)
    assert (await made.good()).counts.unchanged == 1
    await redis.delete("b:\\\u00e9\u4e16'")
    assert (await made.good(job="restore", mapping="balances")).counts.inserted == 1
    assert (await made.good()).counts.unchanged == 1


async def test_limits_are_those_of_the_configuration(postgres_dsn: str, pg: Connection) -> None:
    name = await pg.fetchval("SELECT current_database()")
    limits = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
    for limit in limits:
        await pg.execute(f"ALTER DATABASE {name} SET {limit} = 1000")
    dsn = f"{postgres_dsn}?statement_timeout=1000&options=-clock_timeout%3D1000"
    database = Database(PostgresConfig(dsn=SecretStr(dsn), timeout=40.0, lock_timeout=3.0))
    session = await Session.open(database)
    async with database.acquire() as connection:
        for each in (connection, session.connection):
            shown = [await each.fetchval(f"SHOW {limit}") for limit in limits]
            assert shown == ["0", "3s", "80s"]
    await session.close()
    await database.close()


async def test_a_session_that_checks_nothing_is_refused(postgres_dsn: str, pg: Connection) -> None:
    name = await pg.fetchval("SELECT current_database()")
    await pg.execute(f"ALTER DATABASE {name} SET session_replication_role = replica")
    database = Database(PostgresConfig(dsn=SecretStr(postgres_dsn)))
    with pytest.raises(ConfigError, match="its session_replication_role is replica: take that"):
        await database.connect()
    await database.close()


async def test_a_database_that_is_read_only_says_what_to_look_at(
    engine: Callable[..., Engine], pg: Connection, redis: Redis
) -> None:
    name = await pg.fetchval("SELECT current_database()")
    await pg.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    line = await engine().failed(PostgresUnavailable)
    assert "see default_transaction_read_only of the server, the database and the role" in line


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
