"""docs/security.md, held to its word: everything works with just the rights that it gives."""

import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest
from pydantic import SecretStr
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError

from balancesync.check import check
from balancesync.config import Config, MappingConfig, PostgresConfig, RedisConfig
from balancesync.database import Database
from balancesync.embedded import RedisServer
from balancesync.model import Request, Run
from balancesync.source import Source
from balancesync.sync import Sync

PAGE = (Path(__file__).parent.parent / "docs" / "security.md").read_text()
SQL = re.findall(r"^```sql\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
[ACL] = re.findall(r"^```acl\nuser (\S+) (.*?)\n```", PAGE, re.MULTILINE | re.DOTALL)
OWN = MappingConfig()
OWN_IN_SCHEMA = MappingConfig(table="balancesync.balances")
USERS = MappingConfig(
    name="users",
    key="{telegram_id}",
    table="users",
    mode="update",
    synced_at="sync_at",
    columns={"telegram_id": "bigint", "balance": "bigint"},
)


@pytest.fixture
async def role_dsn(pg: asyncpg.Connection, postgres_dsn: str) -> AsyncIterator[str]:
    """DSN of the role that the page's first block makes, in a database closed to all others."""
    database = await pg.fetchval("SELECT current_database()")
    await pg.execute(f"REVOKE ALL ON DATABASE {database} FROM PUBLIC")
    await pg.execute("REVOKE ALL ON SCHEMA public FROM PUBLIC")
    await pg.execute("DROP ROLE IF EXISTS balancesync")
    await pg.execute(SQL[0].replace("DATABASE app", f"DATABASE {database}"))
    parts = urlsplit(postgres_dsn)
    host = parts.netloc.rpartition("@")[2]
    yield parts._replace(netloc=f"balancesync:change-me@{host}").geturl()
    await pg.execute("DROP OWNED BY balancesync CASCADE")
    await pg.execute("DROP ROLE balancesync")


@pytest.fixture
async def limited_redis(private_redis: Callable[..., RedisServer]) -> str:
    """URL of the page's user, on a Redis with balances, bare ids, a hash and other keys."""
    name, rules = ACL
    # The second form of the page, for bare ids; one user each, on one server.
    bare = rules.replace("%R~balance:*", "%R~*")
    hashes = rules.replace("+mget", "+hmget +hscan +hexists")
    server = private_redis(
        {f"user {name}": rules, "user bare": bare, "user hashes": hashes, "save": "3600 1"}
    )
    async with Redis.from_url(server.url, protocol=2) as client:
        await client.mset({"balance:1": "1.50", "balance:2": "x", "123": "7", "cache:1": "y"})
        await client.hset("balance:all", mapping={"1": "1.50"})
        await client.rpush("queue", "job")
    return server.url


def as_user(url: str, name: str) -> RedisConfig:
    """The same Redis, as this user."""
    return RedisConfig(url=SecretStr(url.replace("redis://", f"redis://{name}:change-me@")))


async def all_of_it(config: Config) -> list[Run]:
    """Check, dry run, sync, verify; nothing may be missing."""
    database = Database(config.postgres)
    runs = []
    try:
        async with Source(config.redis) as source:
            found = [each async for each in check(config, database, source)]
            assert not [each for each in found if each.level in ("error", "unreachable")]
            for request in (
                Request("sync", "cli", mode="dry_run"),
                Request("sync", "cli"),
                Request("verify", "cli", mode="verify"),
            ):
                sync = Sync(config, database, source)
                runs.append(await sync.run(request))
                assert sync.failure is None
    finally:
        await database.close()
    return runs


def configure(dsn: str, redis: RedisConfig, mapping: MappingConfig) -> Config:
    """One mapping; rejects are no failure here."""
    return Config(
        redis=redis,
        postgres=PostgresConfig(dsn=SecretStr(dsn)),
        mapping=(mapping,),
        guard={"max_rejects": 1.0},  # type: ignore[arg-type]  # pydantic makes a GuardConfig of it
    )


async def test_a_table_in_its_own_schema_needs_no_more(role_dsn: str, limited_redis: str) -> None:
    user = as_user(limited_redis, "balancesync")
    _, sync, verify = await all_of_it(configure(role_dsn, user, OWN_IN_SCHEMA))
    # The big hash is a key of the mapping's form, and so a reject.
    assert (sync.counts.inserted, sync.counts.rejected) == (1, 2)
    assert verify.counts.unchanged == 1


async def test_a_table_elsewhere(role_dsn: str, limited_redis: str, pg: asyncpg.Connection) -> None:
    await pg.execute(SQL[1])
    config = configure(role_dsn, as_user(limited_redis, "balancesync"), OWN)
    assert (await all_of_it(config))[1].counts.inserted == 1
    await pg.execute("REVOKE CREATE ON SCHEMA public FROM balancesync")
    assert (await all_of_it(config))[1].counts.unchanged == 1


async def test_the_table_of_an_application(
    role_dsn: str, limited_redis: str, pg: asyncpg.Connection
) -> None:
    await pg.execute(
        "CREATE TABLE users (telegram_id bigint PRIMARY KEY, phone text, balance bigint,"
        " sync_at timestamptz)"
    )
    await pg.execute("INSERT INTO users VALUES (123, 'secret')")
    await pg.execute(SQL[2])
    config = configure(role_dsn, as_user(limited_redis, "bare"), USERS)
    assert (await all_of_it(config))[1].counts.updated == 1
    connection = await asyncpg.connect(role_dsn)
    try:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.fetch("SELECT phone FROM users")
    finally:
        await connection.close()


async def test_hashes(role_dsn: str, limited_redis: str) -> None:
    big = MappingConfig(
        key="balance:all", type="hash", member="{user_id}", table="balancesync.balances"
    )
    config = configure(role_dsn, as_user(limited_redis, "hashes"), big)
    assert (await all_of_it(config))[1].counts.inserted == 1


async def test_the_user_of_redis_can_do_nothing_else(limited_redis: str) -> None:
    url = as_user(limited_redis, "balancesync").url.get_secret_value()
    async with Redis.from_url(url, protocol=2) as client:
        assert await client.mget("balance:1") == [b"1.50"]
        for forbidden in (
            lambda: client.set("balance:1", "9"),
            lambda: client.delete("balance:1"),
            lambda: client.mget("cache:1"),
            client.flushall,
            client.keys,
        ):
            with pytest.raises(NoPermissionError):
                await forbidden()
