"""Existing tables: those that fit are written, those that don't get one line with the way out."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import pytest
from engine import USERS, Engine, waiting
from faults.ground import connected
from pydantic import ValidationError
from redis.asyncio import Redis

from balancesync.errors import ConfigError, RightMissing, TargetMismatch, Transient

MakeEngine = Callable[..., Engine]

COLUMNS = "user_id bigint PRIMARY KEY, balance numeric(20,2), synced_at timestamptz"
UPDATE = {"mode": "update"}


@dataclass(frozen=True)
class Role:
    """A role that may log in and, in the test's database, nothing more than it's given."""

    name: str
    dsn: str


@pytest.fixture
async def role(pg: asyncpg.Connection, postgres_dsn: str) -> AsyncIterator[Role]:
    name = f"test_{uuid4().hex}"
    await pg.execute(f"CREATE ROLE {name} LOGIN PASSWORD 's3cret'")
    url = urlsplit(postgres_dsn)
    host = url.netloc.rpartition("@")[2]
    yield Role(name, url._replace(netloc=f"{name}:s3cret@{host}").geturl())
    await pg.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


# What is made, settings of the mapping, and words of the error.
MISFITS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "no table": ("", UPDATE, ["balances does not exist", "update"]),
    "no value column": (
        "CREATE TABLE balances (user_id bigint PRIMARY KEY, synced_at timestamptz)",
        {},
        ['no column "balance"'],
    ),
    "no key column": (
        "CREATE TABLE balances (id bigint PRIMARY KEY, balance numeric(20,2),"
        " synced_at timestamptz)",
        UPDATE,
        ['no column "user_id"'],
    ),
    "no synced_at": (
        "CREATE TABLE balances (user_id bigint PRIMARY KEY, balance numeric(20,2))",
        {},
        [
            'no column "synced_at"',
            'ALTER TABLE "public"."balances" ADD COLUMN "synced_at" timestamptz, or',
            'synced_at = ""',
        ],
    ),
    "synced_at of a wrong type": (
        "CREATE TABLE balances (user_id bigint PRIMARY KEY, balance numeric(20,2), synced_at date)",
        {},
        ['"synced_at" is date', "timestamptz"],
    ),
    "numeric(10,2)": (
        "CREATE TABLE balances (user_id bigint PRIMARY KEY, balance numeric(10,2),"
        " synced_at timestamptz)",
        {},
        ['"balance" is numeric(10,2), not numeric(20,2)'],
    ),
    "numeric without a scale": (
        "CREATE TABLE balances (user_id bigint PRIMARY KEY, balance numeric,"
        " synced_at timestamptz)",
        {},
        ['"balance" is numeric, not numeric(20,2)'],
    ),
    "float": (
        "CREATE TABLE balances (user_id bigint PRIMARY KEY, balance float8, synced_at timestamptz)",
        {},
        ['"balance" is double precision, not numeric(20,2)'],
    ),
    "everything in one line": (
        "CREATE TABLE balances (user_id integer, balance text)",
        {},
        ['"user_id" is integer', '"balance" is text', 'no column "synced_at"', "no unique index"],
    ),
    "view": (
        f"CREATE TABLE t ({COLUMNS}); CREATE VIEW balances AS TABLE t",
        {},
        ["balances is a view"],
    ),
    "materialized view": (
        f"CREATE TABLE t ({COLUMNS}); CREATE MATERIALIZED VIEW balances AS TABLE t",
        {},
        ["balances is a materialized view"],
    ),
    "foreign table": (
        "CREATE FOREIGN DATA WRAPPER w; CREATE SERVER s FOREIGN DATA WRAPPER w;"
        " CREATE FOREIGN TABLE balances (user_id bigint, balance numeric(20,2),"
        " synced_at timestamptz) SERVER s",
        {},
        ["balances is a foreign table"],
    ),
    "sequence": ("CREATE SEQUENCE balances", {}, ["balances is a sequence"]),
    "index": (
        "CREATE TABLE t (id int); CREATE INDEX balances ON t (id)",
        {},
        ["balances is an index"],
    ),
    "index on more columns": (
        "CREATE TABLE balances (user_id bigint, balance numeric(20,2), synced_at timestamptz,"
        " UNIQUE (user_id, balance))",
        {},
        ["no unique index"],
    ),
    "partial index": (
        "CREATE TABLE balances (user_id bigint, balance numeric(20,2), synced_at timestamptz);"
        " CREATE UNIQUE INDEX ON balances (user_id) WHERE balance > 0",
        {},
        ["no unique index"],
    ),
    "index on an expression": (
        "CREATE TABLE balances (user_id bigint, balance numeric(20,2), synced_at timestamptz);"
        " CREATE UNIQUE INDEX ON balances ((user_id + 0))",
        {},
        ["no unique index"],
    ),
    "deferrable constraint": (
        "CREATE TABLE balances (user_id bigint UNIQUE DEFERRABLE, balance numeric(20,2),"
        " synced_at timestamptz)",
        {},
        ["no unique index"],
    ),
    "index that isn't unique": (
        "CREATE TABLE balances (user_id bigint, balance numeric(20,2), synced_at timestamptz);"
        " CREATE INDEX ON balances (user_id)",
        {},
        ["no unique index"],
    ),
    "children by inheritance": (
        f"CREATE TABLE balances ({COLUMNS}); CREATE TABLE child () INHERITS (balances)",
        UPDATE,
        ["inherit"],
    ),
    "generated value": (
        "CREATE TABLE balances (user_id bigint PRIMARY KEY, synced_at timestamptz,"
        " balance numeric(20,2) GENERATED ALWAYS AS (user_id * 2) STORED)",
        UPDATE,
        ['"balance" is generated'],
    ),
    "generated key to insert": (
        "CREATE TABLE balances (user_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,"
        " balance numeric(20,2), synced_at timestamptz)",
        {},
        ['"user_id" is generated'],
    ),
    "generated synced_at": (
        "CREATE TABLE balances (user_id bigint PRIMARY KEY, balance numeric(20,2),"
        " synced_at timestamptz GENERATED ALWAYS AS ('2026-01-01Z') STORED)",
        UPDATE,
        ['"synced_at" is generated'],
    ),
    "column that must be given": (
        f"CREATE TABLE balances ({COLUMNS}, email text NOT NULL)",
        {},
        ['"email"', "default"],
    ),
}


@pytest.mark.parametrize("misfit", MISFITS.values(), ids=MISFITS)
async def test_misfit_is_named_and_nothing_written(
    engine: MakeEngine,
    redis: Redis,
    pg: asyncpg.Connection,
    misfit: tuple[str, dict[str, Any], list[str]],
) -> None:
    sql, settings, words = misfit
    await redis.set("balance:1", "1")
    if sql:
        await pg.execute(sql)
    line = await engine(settings).failed(TargetMismatch)
    for word in ['"balances"', *words]:
        assert word in line
    if "CREATE TABLE balances" in sql:
        assert await pg.fetchval("SELECT count(*) FROM balances") == 0


async def test_index_the_message_gives_makes_the_table_fit(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await redis.set("balance:1", "1")
    await pg.execute(
        "CREATE SCHEMA app; CREATE TABLE app.balances"
        " (user_id bigint, balance numeric(20,2), synced_at timestamptz);"
        " INSERT INTO app.balances VALUES (1, 5), (1, 6)"
    )
    sync = engine({"table": "app.balances"})
    line = await sync.failed(TargetMismatch)
    statement = line[line.index("CREATE UNIQUE INDEX CONCURRENTLY") :]
    with pytest.raises(asyncpg.UniqueViolationError):
        await pg.execute(statement)
    # The index that is left behind is invalid, and proves nothing.
    assert await sync.failed(TargetMismatch) == line
    await pg.execute("DELETE FROM app.balances WHERE balance = 6")
    await pg.execute(statement)
    assert (await sync.good()).counts.updated == 1


async def test_indexes_that_do(engine: MakeEngine, redis: Redis, pg: asyncpg.Connection) -> None:
    mapping = {
        "key": "balance:{user_id}:{currency}",
        "columns": {"user_id": "bigint", "currency": "text", "balance": "numeric(20,2)"},
    }
    await redis.set("balance:1:eur", "1")
    await pg.execute(
        "CREATE TABLE balances (user_id bigint, currency text, balance numeric(20,2),"
        " synced_at timestamptz);"
        " CREATE UNIQUE INDEX ON balances (currency, user_id) INCLUDE (balance)"
    )
    sync = engine(mapping)
    assert (await sync.good()).counts.inserted == 1
    await pg.execute("DROP INDEX balances_currency_user_id_balance_idx")
    await pg.execute("CREATE UNIQUE INDEX ON balances (user_id)")
    assert '("user_id", "currency")' in await sync.failed(TargetMismatch)


async def test_application_table(engine: MakeEngine, redis: Redis, pg: asyncpg.Connection) -> None:
    """The second yardstick: bare ids among other keys, a table of the application's."""
    await pg.execute(
        "CREATE TABLE users (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,"
        " telegram_id bigint UNIQUE, email text NOT NULL, balance bigint NOT NULL DEFAULT 0,"
        " sync_at timestamp);"
        " INSERT INTO users (telegram_id, email, balance) VALUES"
        " (111, 'a', 5), (222, 'b', 6), (333, 'c', 7), (NULL, 'd', 8), (NULL, 'e', 9)"
    )
    await redis.mset({"111": "5000000", "222": "6", "999": "1", "cache:1": "x", "555x": "1"})
    sync = engine(USERS)
    counts = (await sync.good()).counts
    assert (counts.scanned, counts.ignored, counts.not_found) == (5, 2, 1)
    assert (counts.updated, counts.unchanged, counts.inserted, counts.absent) == (1, 1, 0, 1)
    found = await pg.fetch("SELECT email, balance, sync_at IS NOT NULL AS s FROM users ORDER BY id")
    assert [tuple(row) for row in found] == [
        ("a", 5000000, True),
        ("b", 6, False),
        ("c", 7, False),
        ("d", 8, False),
        ("e", 9, False),
    ]


async def test_key_that_the_table_generates_is_only_read_in_update_mode(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute(
        "CREATE TABLE balances (user_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,"
        " balance numeric(20,2), synced_at timestamptz); INSERT INTO balances (balance) VALUES (1)"
    )
    await redis.set("balance:1", "2")
    assert (await engine(UPDATE).good()).counts.updated == 1


async def test_unmapped_columns_that_fill_themselves(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute(
        f"CREATE TABLE balances ({COLUMNS}, n int NOT NULL DEFAULT 7, free text,"
        " g int NOT NULL GENERATED ALWAYS AS (1) STORED,"
        " i int NOT NULL GENERATED ALWAYS AS IDENTITY)"
    )
    await redis.set("balance:1", "2")
    assert (await engine().good()).counts.inserted == 1
    assert await pg.fetchval("SELECT (n, free, g, i)::text FROM balances") == "(7,,1,1)"


async def test_partitioned_table(engine: MakeEngine, redis: Redis, pg: asyncpg.Connection) -> None:
    await pg.execute(
        f"CREATE TABLE balances ({COLUMNS}) PARTITION BY RANGE (user_id);"
        " CREATE TABLE low PARTITION OF balances FOR VALUES FROM (0) TO (100);"
        " CREATE TABLE high PARTITION OF balances FOR VALUES FROM (100) TO (200)"
    )
    await redis.mset({"balance:1": "1", "balance:150": "2", "balance:500": "3"})
    sync = engine({"on_absent": "delete"})
    run = await sync.good()
    # Without a partition for it, the table refuses this one row.
    assert await sync.reasons() == {b"balance:500": "refused_by_table"}
    assert (run.counts.inserted, run.counts.rejected) == (2, 1)
    await redis.mset({"balance:1": "5", "balance:160": "6"})
    await redis.delete("balance:500", "balance:150")
    counts = (await sync.good()).counts
    assert (counts.inserted, counts.updated, counts.deleted) == (1, 1, 1)
    assert await pg.fetchval("SELECT array_agg(user_id::int) FROM high") == [160]


async def test_key_under_a_collation_that_folds_case(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    # The catalog's word is all that counts; only ICU, which may be missing, has it by itself.
    await pg.execute(
        "CREATE COLLATION ci (provider = libc, locale = 'C');"
        " UPDATE pg_collation SET collisdeterministic = false WHERE collname = 'ci';"
        " CREATE TABLE balances (name text COLLATE ci PRIMARY KEY, balance bigint,"
        " synced_at timestamptz)"
    )
    await redis.set("balance:a", "1")
    mapping = {"key": "balance:{name}", "columns": {"name": "text", "balance": "bigint"}}
    assert '"name" has a collation' in await engine(mapping).failed(TargetMismatch)


async def test_an_index_under_another_collation_than_the_key_s(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute(
        'CREATE TABLE balances (name text COLLATE "C" NOT NULL, balance bigint,'
        ' synced_at timestamptz); CREATE UNIQUE INDEX other ON balances (name COLLATE "POSIX")'
    )
    await redis.set("balance:a", "1")
    mapping = {"key": "balance:{name}", "columns": {"name": "text", "balance": "bigint"}}
    sync = engine(mapping)
    line = await sync.failed(TargetMismatch)
    await pg.execute(line[line.index("CREATE UNIQUE INDEX CONCURRENTLY") :])
    assert (await sync.good()).counts.inserted == 1


async def test_value_under_a_collation_that_folds_case(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    try:
        await pg.execute(
            "CREATE COLLATION ci"
            " (provider = icu, locale = 'und-u-ks-level2', deterministic = false)"
        )
    except asyncpg.FeatureNotSupportedError:
        pytest.skip("this PostgreSQL is built without ICU")
    await pg.execute(
        "CREATE TABLE balances (user_id bigint PRIMARY KEY, tier text COLLATE ci,"
        " synced_at timestamptz)"
    )
    sync = engine({"columns": {"user_id": "bigint", "tier": "text"}})
    await redis.set("balance:1", "gold")
    await sync.good()
    await redis.set("balance:1", "GOLD")
    assert (await sync.verify()).counts.updated == 1
    assert (await sync.good()).counts.updated == 1
    assert await pg.fetchval("SELECT tier FROM balances") == "GOLD"
    assert (await sync.good()).counts.unchanged == 1


async def test_key_under_another_collation_is_joined_by_it(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute(
        'CREATE TABLE balances (name text COLLATE "C" PRIMARY KEY, balance bigint,'
        " synced_at timestamptz)"
    )
    mapping = {"key": "balance:{name}", "columns": {"name": "text", "balance": "bigint"}}
    await redis.mset({"balance:a": "1", "balance:A": "2", "balance:\u00e4": "3"})
    sync = engine(mapping)
    assert (await sync.good()).counts.inserted == 3
    await redis.set("balance:A", "5")
    counts = (await sync.good()).counts
    assert (counts.updated, counts.unchanged) == (1, 2)


async def test_row_level_security(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection, role: Role
) -> None:
    await pg.execute(
        f"CREATE TABLE balances ({COLUMNS}); ALTER TABLE balances ENABLE ROW LEVEL SECURITY;"
        f" CREATE POLICY low ON balances USING (user_id < 100);"
        f" GRANT ALL ON balances TO {role.name};"
        f" CREATE SCHEMA balancesync AUTHORIZATION {role.name}"
    )
    await redis.mset({"balance:1": "1", "balance:500": "2"})
    assert "BYPASSRLS" in await engine(dsn=role.dsn).failed(TargetMismatch)
    # The owner sees all rows.
    assert (await engine().good()).counts.inserted == 2


async def test_role_who_may_not_create(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection, role: Role
) -> None:
    await redis.set("balance:1", "1")
    sync = engine(dsn=role.dsn)
    line = await sync.failed(RightMissing)
    assert "permission denied for database" in line
    assert "s3cret" not in line
    await pg.execute(f"CREATE SCHEMA balancesync AUTHORIZATION {role.name}")
    assert "permission denied for schema public" in await sync.failed(RightMissing)
    await pg.execute(f"GRANT CREATE ON SCHEMA public TO {role.name}")
    assert (await sync.good()).counts.inserted == 1


async def test_role_without_each_right(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection, role: Role
) -> None:
    """From nothing to just enough, right by right, each missed before anything is read."""
    await redis.mset({"balance:1": "1", "balance:2": "2"})
    await pg.execute(
        f"CREATE SCHEMA app; CREATE TABLE app.balances ({COLUMNS}, secret text);"
        " INSERT INTO app.balances VALUES (1, 0, now(), 'x'), (3, 0, now(), 'y');"
        f" CREATE SCHEMA balancesync AUTHORIZATION {role.name}"
    )
    sync = engine({"table": "app.balances", "on_absent": "delete"}, dsn=role.dsn)

    async def lacks(*words: str) -> None:
        line = await sync.failed(RightMissing)
        for word in words:
            assert word in line

    async def grant(right: str) -> None:
        await pg.execute(f"GRANT {right} TO {role.name}")

    await lacks("schema app")
    await grant("USAGE ON SCHEMA app")
    misfit = engine({"table": "app.balances", "synced_at": "at"}, dsn=role.dsn)
    line = await misfit.failed(TargetMismatch)
    assert 'no column "at"' in line
    assert 'this role lacks rights on app.balances: GRANT SELECT ("user_id", "balance"), UP' in line
    await lacks('SELECT ("user_id", "balance", "synced_at")')
    await grant("SELECT (user_id, balance, synced_at) ON app.balances")
    await lacks('UPDATE ("balance", "synced_at"), INSERT ("user_id", "balance", "synced_at")')
    await grant("UPDATE (balance) ON app.balances")
    await lacks('UPDATE ("synced_at")')
    line = await sync.failed(RightMissing)
    assert line.endswith(f'DELETE ON "app"."balances" TO "{role.name}"')
    # The line has the statement as it is.
    await pg.execute(line[line.index("GRANT") :])
    counts = (await sync.good()).counts
    assert (counts.inserted, counts.updated, counts.deleted) == (1, 1, 1)


async def test_role_who_may_only_update(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection, role: Role
) -> None:
    await redis.set("111", "5")
    await pg.execute(
        "CREATE TABLE users (telegram_id bigint PRIMARY KEY, balance bigint, sync_at timestamptz,"
        " secret text); INSERT INTO users VALUES (111, 1, NULL, 'x');"
        f" CREATE SCHEMA balancesync AUTHORIZATION {role.name};"
        f" GRANT SELECT (telegram_id, balance) ON users TO {role.name};"
        f" GRANT UPDATE (balance, sync_at) ON users TO {role.name}"
    )
    assert (await engine(USERS, dsn=role.dsn).good()).counts.updated == 1


async def test_odd_identifiers(engine: MakeEngine, redis: Redis, pg: asyncpg.Connection) -> None:
    columns = {'a"b': "text", "{v1}": "numeric(20,2)", "%s $1": "boolean", "\u00fc;--": "uuid"}
    mapping = {
        "key": 'balance:{a"b}',
        "type": "hash",
        "table": '"sch""ema."."""; drop {table}"',
        "synced_at": "it's",
        "columns": columns,
        "on_absent": "delete",
    }
    one = "0189abcd-0000-7000-8000-00000000000a"
    fields = {"{v1}": "1.5", "%s $1": "t", "\u00fc;--": one}
    for key in ("x", "y"):
        for field, value in fields.items():
            await redis.hset(f"balance:{key}", field, value)
    sync = engine(mapping, postgres={"schema": 'it\'s "{mine}"'})
    assert (await sync.good()).counts.inserted == 2
    await redis.delete("balance:y")
    await redis.hset("balance:x", "{v1}", "2.5")
    assert (await sync.sync(mode="dry_run")).counts.deleted == 1
    counts = (await sync.good()).counts
    assert (counts.updated, counts.deleted) == (1, 1)
    assert (await sync.verify()).counts.unchanged == 1
    found = await pg.fetchrow('SELECT * FROM "sch""ema."."""; drop {table}"')
    kept = engine(
        {**mapping, "on_absent": "keep"},
        postgres={"schema": 'it\'s "{mine}"'},
        history={"enabled": True},
        prune={"enabled": True},
    )
    await redis.hset("balance:x", "{v1}", "2.4")
    await kept.good()
    await redis.hset("balance:x", "{v1}", "2.5")
    assert (await kept.good()).counts.updated == 1
    history = await pg.fetch('SELECT old FROM "it\'s ""{mine}""".changes ORDER BY at')
    assert [json.loads(row["old"])["{v1}"] for row in history] == ["2.50", "2.40"]
    assert (await kept.sync(job="prune", idle_s=0)).counts.deleted == 1
    assert (await kept.good(job="restore")).counts.inserted == 1
    assert found is not None
    assert [str(found[name]) for name in columns] == ["x", "2.50", "True", one]
    assert await pg.fetchval('SELECT count(*) FROM "it\'s ""{mine}""".runs') == 8


async def test_names_that_the_engine_uses_itself(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection, postgres_dsn: str
) -> None:
    """Its temporary tables are meant, also where the search path puts them last."""
    database = urlsplit(postgres_dsn).path[1:]
    await pg.execute(f"ALTER DATABASE {database} SET search_path = public, pg_temp")
    await redis.set("balance:1", "1")
    mapping = {"key": "balance:{k1}", "columns": {"k1": "bigint", "v1": "bigint"}, "synced_at": "n"}
    names = ["staging_0", "diff_1", "staged_rejects"]
    sync = engine(*({**mapping, "name": name, "table": name} for name in names))
    assert (await sync.good()).counts.inserted == 3
    await redis.set("balance:1", "2")
    assert (await sync.good()).counts.updated == 3
    for name in names:
        assert await pg.fetchval(f"SELECT (k1, v1)::text FROM public.{name}") == "(1,2)"


async def test_synced_at_without_time_zone_is_utc(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection, postgres_dsn: str
) -> None:
    database = urlsplit(postgres_dsn).path[1:]
    await pg.execute(
        f"ALTER DATABASE {database} SET timezone = 'Asia/Tokyo';"
        " CREATE TABLE balances (user_id bigint PRIMARY KEY, balance numeric(20,2),"
        " synced_at timestamp)"
    )
    sync = engine()
    for value in ("1", "2"):
        await redis.set("balance:1", value)
        await sync.good()
        at = await pg.fetchval("SELECT synced_at FROM balances")
        assert abs(at.replace(tzinfo=UTC) - datetime.now(UTC)) < timedelta(minutes=5)


async def test_synced_at_moves_only_when_the_row_changes(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    sync = engine()
    await redis.mset({"balance:1": "1", "balance:2": "2"})
    await sync.good()
    first = await pg.fetch("SELECT synced_at FROM balances ORDER BY user_id")
    # One time for all rows of a run.
    assert first[0] == first[1]
    await redis.set("balance:2", "3")
    await sync.good()
    second = await pg.fetch("SELECT synced_at FROM balances ORDER BY user_id")
    assert second[0] == first[0]
    assert second[1]["synced_at"] > first[1]["synced_at"]


async def test_no_synced_at(engine: MakeEngine, redis: Redis, pg: asyncpg.Connection) -> None:
    sync = engine({"synced_at": ""})
    await redis.set("balance:1", "1")
    await sync.good()
    await redis.set("balance:1", "2")
    await sync.good()
    assert [dict(row) for row in await pg.fetch("SELECT *, balance::int FROM balances")] == [
        {"user_id": 1, "balance": 2}
    ]


async def test_schema_that_must_be_created(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await redis.set("balance:1", "1")
    sync = engine({"table": "app.balances"})
    dry = await sync.good(mode="dry_run")
    assert dry.counts.inserted == 1
    # A dry run creates nothing, and so has nowhere to be recorded.
    assert await pg.fetchval("SELECT to_regnamespace('app')") is None
    assert await pg.fetchval("SELECT to_regnamespace('balancesync')") is None
    await sync.good()
    columns = await pg.fetch(
        "SELECT attname, format_type(atttypid, atttypmod), attnotnull FROM pg_attribute"
        " WHERE attrelid = 'app.balances'::regclass AND attnum > 0 ORDER BY attnum"
    )
    assert [tuple(column) for column in columns] == [
        ("user_id", "bigint", True),
        ("balance", "numeric(20,2)", True),
        ("synced_at", "timestamp with time zone", False),
    ]
    key = await pg.fetchval(
        "SELECT pg_get_constraintdef(oid) FROM pg_constraint"
        " WHERE conrelid = 'app.balances'::regclass AND contype = 'p'"
    )
    assert key == "PRIMARY KEY (user_id)"


async def test_search_path_without_a_schema(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection, postgres_dsn: str
) -> None:
    await pg.execute(f"ALTER DATABASE {urlsplit(postgres_dsn).path[1:]} SET search_path = ''")
    await redis.set("balance:1", "1")
    sync = engine({"table": "balances"})
    assert "schema" in await sync.failed(TargetMismatch)
    assert (await engine({"table": "public.balances"}).good()).counts.inserted == 1


async def test_database_that_is_not_utf8(
    engine: MakeEngine, postgres_admin: asyncpg.Connection, postgres_admin_dsn: str
) -> None:
    name = f"test_{uuid4().hex}"
    await postgres_admin.execute(
        f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'"
    )
    try:
        dsn = urlsplit(postgres_admin_dsn)._replace(path=f"/{name}").geturl()
        sync = engine(dsn=dsn)
        assert "LATIN1" in await sync.failed(ConfigError)
    finally:
        await postgres_admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


async def test_isolation_that_the_database_sets_is_not_taken(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection, postgres_dsn: str
) -> None:
    """Under `serializable`, a row that another writes meanwhile would be an error."""
    await pg.execute(
        f"ALTER DATABASE {urlsplit(postgres_dsn).path[1:]}"
        " SET default_transaction_isolation = 'serializable';"
        f" CREATE TABLE balances ({COLUMNS}, isolation text);"
        " CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS"
        " $$BEGIN NEW.isolation := current_setting('transaction_isolation'); RETURN NEW; END$$;"
        " CREATE TRIGGER note BEFORE INSERT ON balances FOR EACH ROW EXECUTE FUNCTION note()"
    )
    await redis.set("balance:1", "1")
    await engine().good()
    assert await pg.fetchval("SELECT isolation FROM balances") == "read committed"


SHARED_TABLE = (
    "CREATE TABLE users (telegram_id bigint PRIMARY KEY, balance bigint, bonus bigint,"
    " sync_at timestamptz, bonus_at timestamptz); INSERT INTO users VALUES (111, 0, 0), (222, 0, 0)"
)
BONUS = {
    **USERS,
    "name": "bonus",
    "key": "bonus:{telegram_id}",
    "synced_at": "bonus_at",
    "columns": {"telegram_id": "bigint", "bonus": "bigint"},
}


async def test_two_mappings_on_one_table(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute(SHARED_TABLE)
    await redis.mset({"111": "1", "222": "0", "bonus:222": "7"})
    run = await engine(USERS, BONUS).good()
    assert (run.mappings["users"].updated, run.mappings["bonus"].updated) == (1, 1)
    rows = await pg.fetch("SELECT balance, bonus FROM users ORDER BY telegram_id")
    assert [tuple(row) for row in rows] == [(1, 0), (0, 7)]


FORBIDDEN = {
    "an upsert": {"mode": "upsert"},
    "other keys": {"key": "bonus:{id}", "columns": {"id": "bigint", "bonus": "bigint"}},
    "the same value": {"columns": {"telegram_id": "bigint", "balance": "bigint"}},
}


@pytest.mark.parametrize("change", FORBIDDEN.values(), ids=FORBIDDEN)
def test_two_mappings_that_may_not_share_a_table(
    engine: MakeEngine, change: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError, match="on one table"):
        engine(USERS, {**BONUS, **change})


ALTERED = {
    "narrowed": "ALTER TABLE balances ALTER balance TYPE numeric(20,1)",
    "replaced": "ALTER TABLE balances RENAME TO b; CREATE TABLE balances (LIKE b INCLUDING ALL)",
    "without its column": "ALTER TABLE balances DROP balance",
}


@pytest.mark.parametrize("history", [False, True], ids=["", "with history"])
@pytest.mark.parametrize("change", ALTERED.values(), ids=ALTERED)
async def test_nothing_is_written_to_a_table_that_was_altered_in_mid_run(
    engine: MakeEngine,
    redis: Redis,
    pg: asyncpg.Connection,
    change: str,
    history: bool,
) -> None:
    made = engine(postgres={"apply_batch": 1}, history={"enabled": history})
    await redis.mset({f"balance:{number}": "1.50" for number in range(3)})
    await made.good()
    await redis.mset({f"balance:{number}": "7.77" for number in range(3)})
    async with connected(made.config.postgres.dsn.get_secret_value()) as other:
        async with pg.transaction():
            await pg.execute("SELECT FROM balances WHERE user_id = 0 FOR UPDATE")
            running = asyncio.create_task(made.failed(Transient))
            await waiting(pg, 1)
            # It comes between the first slice and the second, which has its plan already.
            altering = asyncio.create_task(other.execute(change))
            await waiting(pg, 2)
        await altering
    line = await running
    assert line.startswith('mapping "balances": the table public.balances was altered or replaced')
    if change == ALTERED["narrowed"]:
        found = await pg.fetch("SELECT balance::text FROM balances ORDER BY user_id")
        # The first one was written before, and rounded by whoever altered the table.
        assert [row[0] for row in found] == ["7.8", "1.5", "1.5"]
        assert "numeric(20,1)" in await made.failed(TargetMismatch)


async def test_two_names_of_one_table(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute(SHARED_TABLE)
    await redis.mset({"111": "1", "bonus:111": "2"})
    line = await engine(USERS, {**BONUS, "table": "public.users"}).failed(TargetMismatch)
    for word in ('"users"', '"bonus"', "public.users"):
        assert word in line
    # Neither of the two has a table of its own to start from.
    first = {"key": "a:{user_id}", "name": "a", "table": "balances"}
    own = first, {"name": "b", "table": "public.balances"}
    assert "same table" in await engine(*own).failed(TargetMismatch)
