"""`balancesync check` on servers that have each of the troubles it knows."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from decimal import Decimal
from urllib.parse import urlsplit

import asyncpg
import pytest
from pydantic import SecretStr
from redis.asyncio import Redis

from balancesync.check import check
from balancesync.config import Config, LiveConfig, MappingConfig, PostgresConfig, RedisConfig
from balancesync.database import Database, Steps
from balancesync.embedded import PostgresServer, RedisServer
from balancesync.findings import Finding
from balancesync.model import Request
from balancesync.sampling import SAMPLED_KEYS
from balancesync.source import Source
from balancesync.sync import Sync

Check = Callable[..., Awaitable[list[Finding]]]


@pytest.fixture
def config(postgres_dsn: str, redis_url: str) -> Config:
    """The default mapping on the test's servers."""
    return Config(
        redis=RedisConfig(url=SecretStr(redis_url)),
        postgres=PostgresConfig(dsn=SecretStr(postgres_dsn)),
    )


async def examine(config: Config, *mappings: MappingConfig) -> list[Finding]:
    """All findings, with these mappings in place of the default one."""
    if mappings:
        config = replace(config, mapping=mappings)
    database = Database(config.postgres)
    try:
        async with Source(config.redis) as source:
            return [finding async for finding in check(config, database, source)]
    finally:
        await database.close()


def texts(findings: Sequence[Finding], level: str, topic: str | None = None) -> list[str]:
    """What the findings of a level say."""
    return [f.text for f in findings if f.level == level and topic in (None, f.topic)]


async def _as_role(pg: asyncpg.Connection, config: Config) -> Config:
    """The same configuration as a new role without any right; the database is closed to others."""
    database = await pg.fetchval("SELECT current_database()")
    await pg.execute("DROP ROLE IF EXISTS checked")
    await pg.execute("CREATE ROLE checked LOGIN PASSWORD 'checked'")
    await pg.execute(f"REVOKE ALL ON DATABASE {database} FROM PUBLIC")
    await pg.execute(f"GRANT CONNECT ON DATABASE {database} TO checked")
    await pg.execute("REVOKE ALL ON SCHEMA public FROM PUBLIC")
    parts = urlsplit(config.postgres.dsn.get_secret_value())
    netloc = f"checked:checked@{parts.netloc.rpartition('@')[2]}"
    dsn = SecretStr(parts._replace(netloc=netloc).geturl())
    return replace(config, postgres=replace(config.postgres, dsn=dsn))


async def test_all_is_well_before_the_first_sync(config: Config, redis: Redis) -> None:
    await redis.mset({"balance:1": "1", "balance:2": "2.5"})
    found = await examine(config)
    assert not texts(found, "error")
    assert not texts(found, "unreachable")
    assert "schema balancesync isn't there yet" in " ".join(texts(found, "ok", "postgres"))
    assert texts(found, "ok", "balances") == [
        "the first sync creates the table public.balances",
        "2 of 2 sampled values fit",
        "none of the sampled keys expires",
    ]


async def test_nothing_is_written(config: Config, redis: Redis, pg: asyncpg.Connection) -> None:
    await redis.set("balance:1", "1")
    await examine(config)
    assert await pg.fetchval("SELECT to_regclass('balances')") is None
    assert await pg.fetchval("SELECT to_regnamespace('balancesync')") is None
    assert await redis.keys() == [b"balance:1"]


async def test_values_that_would_be_rejects(config: Config, redis: Redis) -> None:
    await redis.mset({"balance:1": "1", "balance:2": "x", "balance:3": "y", "balance:4": "1e400"})
    [first, second] = texts(await examine(config), "warning", "balances")
    assert first.startswith("2 of 4 sampled values would be rejects (not_a_number), such as")
    assert second.startswith("1 of 4 sampled values would be rejects (out_of_range)")
    assert "tolerance" not in first + second


@pytest.mark.parametrize(
    ("column", "tail", "advice"),
    [
        ("numeric(20,2)", "1234.57000000000000006", Decimal("0.000001")),
        ("numeric(20,8)", "1234.57000001000000006", Decimal("0.00000000001")),
    ],
)
async def test_tails_of_incrbyfloat_lead_to_a_tolerance_that_can_be_set(
    config: Config, redis: Redis, column: str, tail: str, advice: Decimal
) -> None:
    await redis.mset({"balance:1": tail, "balance:2": "2"})
    columns = {"user_id": "bigint", "balance": column}
    [warning] = texts(await examine(config, MappingConfig(columns=columns)), "warning", "balances")
    assert f'Set tolerance = "{advice:f}"' in warning
    healed = MappingConfig(columns=columns, tolerance=advice)
    assert not texts(await examine(config, healed), "warning", "balances")


async def test_balances_that_expire(config: Config, redis: Redis) -> None:
    await redis.mset({f"balance:{n}": "1" for n in range(4)})
    await redis.expire("balance:2", 1_000)
    [warning] = texts(await examine(config), "warning", "balances")
    assert warning.startswith("1 of 4 sampled keys expire, the next in 1,000 s")


async def test_no_key_of_the_mapping(config: Config, redis: Redis) -> None:
    await redis.set("cache:1", "1")
    [warning] = texts(await examine(config), "warning", "balances")
    assert "no key like balance:{user_id} was found" in warning


async def test_a_sample_is_bounded(config: Config, redis: Redis) -> None:
    await redis.mset({f"balance:{n}": "1" for n in range(5 * SAMPLED_KEYS)})
    found = " ".join(texts(await examine(config), "ok", "balances"))
    sampled = int(found.partition(" of ")[2].partition(" ")[0].replace(",", ""))
    assert SAMPLED_KEYS <= sampled < 3 * SAMPLED_KEYS


@pytest.mark.parametrize(
    ("settings", "level", "said"),
    [
        ({}, "warning", "keeps nothing on disk"),
        ({"appendonly": "yes"}, "ok", "keeps an append-only file"),
        ({"save": "3600 1"}, "ok", "saves snapshots only (save 3600 1)"),
        (
            {"maxmemory": "100mb", "maxmemory-policy": "allkeys-lru"},
            "warning",
            "will evict balances when its memory is full",
        ),
        (
            {"maxmemory": "100mb", "maxmemory-policy": "volatile-ttl"},
            "warning",
            "will evict balances with a TTL",
        ),
        ({"maxmemory-policy": "allkeys-lru"}, "ok", "would evict keys, were maxmemory set"),
        ({}, "ok", "never evicts: maxmemory-policy is noeviction"),
    ],
)
async def test_redis_that_forgets(
    config: Config,
    private_redis: Callable[..., RedisServer],
    settings: dict[str, str],
    level: str,
    said: str,
) -> None:
    server = private_redis(settings)
    found = await examine(replace(config, redis=RedisConfig(url=SecretStr(server.url))))
    assert said in " ".join(texts(found, level, "redis"))


async def test_a_redis_that_may_keep_nothing_for_all_this_user_may_ask(
    config: Config, private_redis: Callable[..., RedisServer]
) -> None:
    server = private_redis({"user least": "on >least ~* +@all -config"})
    url = server.url.replace("redis://", "redis://least:least@")
    found = await examine(replace(config, redis=RedisConfig(url=SecretStr(url))))
    said = " ".join(texts(found, "warning", "redis"))
    assert "may keep nothing on disk at all: this user may not ask for its save points" in said


async def test_evicted_keys(config: Config, private_redis: Callable[..., RedisServer]) -> None:
    server = private_redis({"maxmemory": "4mb", "maxmemory-policy": "allkeys-random"})
    async with Redis.from_url(server.url, protocol=2) as client:
        for n in range(100):
            await client.set(f"other:{n}", "x" * 100_000)
    found = await examine(replace(config, redis=RedisConfig(url=SecretStr(server.url))))
    assert "keys since its start" in " ".join(texts(found, "warning", "redis"))


async def test_a_redis_user_without_rights(
    config: Config, private_redis: Callable[..., RedisServer]
) -> None:
    server = private_redis({"user poor": "on >poor ~* +info +dbsize +client +select +ping"})
    url = server.url.replace("redis://", "redis://poor:poor@")
    found = await examine(replace(config, redis=RedisConfig(url=SecretStr(url))))
    [error] = texts(found, "error")
    assert "SCAN" in error


@pytest.mark.parametrize("enabled", [True, False])
async def test_whether_live_mode_is_possible(
    config: Config, private_redis: Callable[..., RedisServer], enabled: bool
) -> None:
    rights = "on >deaf ~* &* +@read +@connection +@pubsub +info +config|get -client|tracking"
    server = private_redis({"user deaf": rights})
    config = replace(config, live=LiveConfig(enabled=enabled))
    [able] = texts(await examine(config), "ok", "live")
    assert able.endswith("Redis tells what changes, and this user may hear it")
    assert ("isn't enabled, but could be" in able) == (not enabled)
    url = server.url.replace("redis://", "redis://deaf:deaf@")
    found = await examine(replace(config, redis=RedisConfig(url=SecretStr(url))))
    [deaf] = texts(found, "error" if enabled else "ok", "live")
    assert "CLIENT TRACKING" in deaf.upper().replace("|", " ")
    assert deaf.startswith("live mode isn't enabled, and couldn't be: ") == (not enabled)


async def test_servers_that_are_not_there(config: Config) -> None:
    nowhere = RedisConfig(url=SecretStr("redis://127.0.0.1:1/0"))
    found = await examine(replace(config, redis=nowhere))
    assert [f.topic for f in found if f.level == "unreachable"] == ["redis"]
    assert texts(found, "ok", "postgres")
    away = PostgresConfig(dsn=SecretStr("postgresql://postgres@127.0.0.1:1/postgres"))
    found = await examine(replace(config, postgres=away))
    assert [f.topic for f in found if f.level == "unreachable"] == ["postgres"]
    assert texts(found, "warning", "balances")  # the sample was taken all the same


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("CREATE TABLE balances (user_id bigint PRIMARY KEY)", 'no column "balance"'),
        (
            "CREATE TABLE balances (user_id bigint, balance numeric(20,2), synced_at timestamptz)",
            "CREATE UNIQUE INDEX CONCURRENTLY",
        ),
        ("CREATE VIEW balances AS SELECT 1 AS user_id", "is a view"),
    ],
)
async def test_tables_that_do_not_fit(
    config: Config, pg: asyncpg.Connection, statement: str, said: str
) -> None:
    await pg.execute(statement)
    [error] = texts(await examine(config), "error", "balances")
    assert said in error


async def test_a_refusal_that_stands(config: Config, redis: Redis) -> None:
    database = Database(config.postgres)
    await redis.mset({f"balance:{n}": "1" for n in range(4)})
    async with Source(config.redis) as source:
        await Sync(config, database, source).run(Request("sync", "cli"))
        await redis.flushall()
        await Sync(config, database, source).run(Request("sync", "cli"))
    await database.close()
    said = texts(await examine(config), "warning", "balances")
    refusal = "the guard refuses to follow Redis: Redis has no key at all, but 4 were known"
    assert f"{refusal}; `balancesync status` has the ways out" in said


async def test_a_schema_that_is_missing(config: Config, pg: asyncpg.Connection) -> None:
    own = MappingConfig(table="shop.balances")
    there = "the table shop.balances isn't there, nor is its schema shop"
    assert f"{there}: the first sync creates both" in texts(await examine(config, own), "ok")
    poor = await _as_role(pg, config)
    [said] = texts(await examine(poor, own), "error", "balances")
    assert said.startswith(f"{there}, and role checked may not create it")
    assert said.endswith('CREATE SCHEMA "shop" AUTHORIZATION "checked"')
    users = MappingConfig(table="shop.users", mode="update")
    [said] = texts(await examine(config, users), "error", "balances")
    assert "the table shop.users does not exist, nor does its schema, and mode" in said
    poor = replace(poor, postgres=replace(poor.postgres, schema="ledger"))
    assert any(
        "there is no schema ledger" in said for said in texts(await examine(poor, own), "error")
    )


async def test_keys_without_a_row(config: Config, redis: Redis, pg: asyncpg.Connection) -> None:
    await pg.execute("CREATE TABLE users (telegram_id bigint PRIMARY KEY, balance bigint)")
    columns = {"telegram_id": "bigint", "balance": "bigint"}
    users = MappingConfig(
        key="{telegram_id}", table="users", mode="update", synced_at="", columns=columns
    )
    await redis.mset({"7": "1", "8": "2", "9": "no number", "cache:9": "x"})
    [said] = texts(await examine(config, users), "warning", "balances")[1:]
    assert said.startswith("none of the 3 sampled keys has a row in users, such as ")
    assert "is telegram_id the column" in said
    await pg.execute("INSERT INTO users VALUES (7, 1), (9, 1)")
    said = texts(await examine(config, users), "ok", "balances")[-1]
    assert said.startswith('1 of 3 sampled keys have no row in users, such as "8": a sync counts')
    await pg.execute("INSERT INTO users VALUES (8, 1)")
    said = texts(await examine(config, users), "ok", "balances")[-1]
    assert said == "each of the 3 sampled keys has its row"


async def test_one_table_under_two_names(config: Config, pg: asyncpg.Connection) -> None:
    await pg.execute(
        "CREATE TABLE users (telegram_id bigint PRIMARY KEY, balance bigint, bonus bigint)"
    )
    one, other = (
        MappingConfig(
            name=value,
            key=f"{value}:{{telegram_id}}",
            table=table,
            mode="update",
            synced_at="",
            columns={"telegram_id": "bigint", value: "bigint"},
        )
        for value, table in (("balance", "users"), ("bonus", "public.users"))
    )
    [error] = texts(await examine(config, one, other), "error")
    assert "name the same table" in error


async def test_two_mappings_that_set_one_synced_at(config: Config, pg: asyncpg.Connection) -> None:
    await pg.execute(
        "CREATE TABLE users (telegram_id bigint PRIMARY KEY, balance bigint, bonus bigint,"
        " sync_at timestamptz, bonus_at timestamptz)"
    )
    mappings = [
        MappingConfig(
            name=value,
            key=f"{value}:{{telegram_id}}",
            table="users",
            mode="update",
            synced_at="sync_at",
            columns={"telegram_id": "bigint", value: "bigint"},
        )
        for value in ("balance", "bonus")
    ]
    [warning] = texts(await examine(config, *mappings), "warning", "configuration")
    assert 'mappings "balance" and "bonus" share the column sync_at of users' in warning
    mappings[1] = replace(mappings[1], synced_at="bonus_at")
    assert not texts(await examine(config, *mappings), "warning", "configuration")


async def test_triggers(config: Config, pg: asyncpg.Connection) -> None:
    await pg.execute(
        "CREATE TABLE balances (user_id bigint PRIMARY KEY, balance numeric(20,2) NOT NULL,"
        " synced_at timestamptz)"
    )
    await pg.execute(
        "CREATE FUNCTION noisy() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'"
    )
    await pg.execute(
        "CREATE TRIGGER tell BEFORE UPDATE ON balances FOR EACH ROW EXECUTE FUNCTION noisy()"
    )
    found = texts(await examine(config), "warning", "balances")
    assert "the table public.balances has triggers (tell)" in found[0]


async def test_rules_without_the_language_that_sees_to_them(
    config: Config, pg: asyncpg.Connection
) -> None:
    await pg.execute(
        "CREATE TABLE balances (user_id bigint PRIMARY KEY, balance numeric(20,2) NOT NULL,"
        " synced_at timestamptz); CREATE RULE ru AS ON INSERT TO balances DO INSTEAD NOTHING"
    )
    text = "can't use the language plpgsql"

    async def said() -> list[str]:
        return [
            each for each in texts(await examine(config), "warning", "balances") if text in each
        ]

    assert await said() == []
    await pg.execute("DROP EXTENSION plpgsql")
    [lacks] = await said()
    assert "CREATE EXTENSION plpgsql" in lacks
    assert lacks.endswith("of public.balances")
    await pg.execute("DROP RULE ru ON balances")
    assert await said() == []


async def test_a_role_without_rights(config: Config, pg: asyncpg.Connection) -> None:
    poor = await _as_role(pg, config)
    errors = texts(await examine(poor), "error")
    assert len(errors) == 3
    assert "may make no temporary tables" in errors[0]
    assert 'CREATE SCHEMA "balancesync" AUTHORIZATION checked' in errors[1]
    assert 'GRANT USAGE, CREATE ON SCHEMA "public" TO "checked"' in errors[2]
    database = await pg.fetchval("SELECT current_database()")
    await pg.execute(f"GRANT TEMPORARY ON DATABASE {database} TO checked")
    await pg.execute('CREATE SCHEMA "balancesync" AUTHORIZATION checked')
    await pg.execute('GRANT USAGE, CREATE ON SCHEMA "public" TO "checked"')
    assert not texts(await examine(poor), "error")


async def test_a_role_that_may_not_use_the_schema(config: Config, pg: asyncpg.Connection) -> None:
    await Steps(Database(config.postgres)).upgrade(pg)
    poor = await _as_role(pg, config)
    assert any("may not use schema" in text for text in texts(await examine(poor), "error"))
    await pg.execute("GRANT USAGE ON SCHEMA balancesync TO checked")
    assert any("denies a right" in text for text in texts(await examine(poor), "error"))
    await pg.execute("GRANT SELECT ON ALL TABLES IN SCHEMA balancesync TO checked")
    errors = texts(await examine(poor), "error", "postgres")
    assert any("may not read and write altered, baselines, changes, " in e for e in errors)
    await pg.execute(
        "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA balancesync TO checked"
    )
    assert "schema balancesync is up to date" in texts(await examine(poor), "ok", "postgres")


async def test_a_schema_of_a_newer_program(config: Config, pg: asyncpg.Connection) -> None:
    steps = Steps(Database(config.postgres))
    await steps.upgrade(pg)
    await pg.execute("INSERT INTO balancesync.steps (step) VALUES ($1)", steps.newest + 2)
    assert any("newer balancesync" in text for text in texts(await examine(config), "error"))


async def test_a_database_that_takes_no_writes(config: Config, pg: asyncpg.Connection) -> None:
    database = await pg.fetchval("SELECT current_database()")
    await pg.execute(f"ALTER DATABASE {database} SET default_transaction_read_only = on")
    assert "is read-only" in texts(await examine(config), "unreachable", "postgres")[0]


async def test_a_database_that_may_lose_what_is_written(
    config: Config, private_postgres: Callable[..., PostgresServer], pg: asyncpg.Connection
) -> None:
    database = await pg.fetchval("SELECT current_database()")
    await pg.execute(f"ALTER DATABASE {database} SET synchronous_commit = off")
    [warning] = texts(await examine(config), "warning", "postgres")
    assert "crash of PostgreSQL can lose" in warning


async def test_a_schema_without_tables_needs_nothing_done(
    config: Config, pg: asyncpg.Connection
) -> None:
    await pg.execute("CREATE SCHEMA balancesync")
    said = texts(await examine(config), "ok", "postgres")
    none = "schema balancesync has no tables of balancesync's own yet"
    assert f"{none}: `balancesync init` or a sync creates them" in said
