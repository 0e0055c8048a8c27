"""balancesync's own schema: nothing else lies in it, and all in it can be published."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import pytest
from engine import Engine, make_config
from pydantic import ValidationError
from redis.asyncio import Redis
from running import Inside, daemon_config

from balancesync.check import check
from balancesync.errors import TargetMismatch
from balancesync.history import History
from balancesync.part import Progress
from balancesync.source import Source

MakeEngine = Callable[..., Engine]
COLUMNS = "user_id bigint PRIMARY KEY, balance numeric(20,2), synced_at timestamptz"


@pytest.fixture
async def namesake(pg: asyncpg.Connection, postgres_dsn: str) -> AsyncIterator[tuple[str, str]]:
    """A role with rights in public, and a schema of its name, which is ours; and its DSN."""
    name = f"test_{uuid4().hex}"
    await pg.execute(
        f"CREATE ROLE {name} LOGIN PASSWORD 's3cret'; CREATE SCHEMA {name} AUTHORIZATION {name};"
        f" GRANT USAGE, CREATE ON SCHEMA public TO {name}"
    )
    url = urlsplit(postgres_dsn)
    host = url.netloc.rpartition("@")[2]
    yield name, url._replace(netloc=f"{name}:s3cret@{host}").geturl()
    await pg.execute(
        f"DROP SCHEMA IF EXISTS {name} CASCADE; DROP OWNED BY {name}; DROP ROLE {name}"
    )


async def findings(engine: Engine) -> list[tuple[str, str]]:
    """What `check` says of the mapping: level and text."""
    async with Source(engine.config.redis) as source:
        found = check(engine.config, engine.database, source)
        return [(each.level, each.text) async for each in found if each.topic == "balances"]


@pytest.mark.parametrize("table", [{}, {"table": "balances"}], ids=["default", "no schema"])
async def test_a_new_table_lies_in_public(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection, namesake: Any, table: dict[str, str]
) -> None:
    name, dsn = namesake
    await redis.set("balance:1", "1")
    sync = engine(table, dsn=dsn, postgres={"schema": name})
    assert ("ok", "the first sync creates the table public.balances") in await findings(sync)
    assert (await sync.good()).counts.inserted == 1
    assert await pg.fetchval("SELECT count(*) FROM public.balances") == 1
    assert await pg.fetchval(f"SELECT to_regclass('{name}.balances')") is None
    assert (await sync.good()).counts.unchanged == 1


@pytest.mark.parametrize("table", [{}, {"table": "balances"}], ids=["default", "no schema"])
async def test_a_table_that_lies_in_our_own_schema_is_to_be_moved(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection, namesake: Any, table: dict[str, str]
) -> None:
    """As 0.1.0 made it. What the message says is done, and history and guard go on."""
    name, dsn = namesake
    await redis.mset({"balance:1": "1", "balance:2": "2"})
    options = {"postgres": {"schema": name}, "history": {"enabled": True}}
    sync = engine(dsn=dsn, **options)
    await sync.good()
    await pg.execute(f"ALTER TABLE public.balances SET SCHEMA {name}")
    await pg.execute(
        f"""UPDATE {name}.histories SET shape = jsonb_set(shape::jsonb, '{{table}}', $1)::text""",
        json.dumps([None, "balances"]),
    )
    since = await pg.fetchval(f"SELECT since FROM {name}.histories")

    statement = f'ALTER TABLE "{name}"."balances" SET SCHEMA "public"'
    for _ in range(2):
        refused = engine(table, dsn=dsn, **options)
        line = await refused.failed(TargetMismatch)
        assert f'{statement}, and write table = "public.balances"' in line
        assert await pg.fetchval("SELECT to_regclass('public.balances')") is None
        assert ("error", line) in await findings(refused)
        assert line in await refused.failed(TargetMismatch, mode="dry_run")

    await pg.execute(statement)
    await redis.set("balance:1", "5")
    again = engine({"table": "public.balances"}, dsn=dsn, **options)
    counts = (await again.good()).counts
    assert (counts.updated, counts.unchanged) == (1, 1)
    assert await pg.fetchval(f"SELECT since FROM {name}.histories") == since
    async with again.database.acquire() as connection:
        history = History(again.database, again.config.history)
        assert await history.since(connection, again.config.mapping[0]) == since
    # The documented uninstall.
    await pg.execute(f"DROP SCHEMA {name} CASCADE")
    assert await pg.fetchval("SELECT count(*) FROM public.balances") == 2


async def test_two_tables_of_one_name_are_the_operator_s_to_sort_out(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection, namesake: Any
) -> None:
    name, dsn = namesake
    await redis.set("balance:1", "1")
    await pg.execute(f"CREATE TABLE {name}.balances ({COLUMNS}); CREATE TABLE balances ({COLUMNS})")
    sync = engine({"table": "balances"}, dsn=dsn, postgres={"schema": name})
    assert "there is a table public.balances, too" in await sync.failed(TargetMismatch)


async def test_our_own_tables_are_no_targets(
    engine: MakeEngine, redis: Redis, namesake: Any, postgres_dsn: str, redis_url: str
) -> None:
    name, dsn = namesake
    await redis.set("balance:1", "1")
    sync = engine({"table": "public.runs"}, dsn=dsn, postgres={"schema": name})
    await sync.good()
    # A search path leads to our table of runs, and there is another one behind it.
    line = await engine({"table": "runs"}, dsn=dsn, postgres={"schema": name}).failed(
        TargetMismatch
    )
    assert f"the table {name}.runs lies in postgres.schema" in line
    assert "ALTER" not in line
    with pytest.raises(ValidationError, match='ALTER TABLE "balancesync"'):
        make_config(postgres_dsn, redis_url, {"table": "balancesync.balances"})


# --- publications ---------------------------------------------------------------------------------


async def test_every_table_of_ours_has_a_replica_identity(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await redis.set("balance:1", "1")
    await engine().good()
    rows = await pg.fetch(
        "SELECT c.relname FROM pg_class AS c WHERE c.relnamespace = 'balancesync'::regnamespace"
        " AND c.relkind = 'r' AND c.relreplident <> 'f' AND NOT (c.relreplident = 'd' AND EXISTS"
        " (SELECT FROM pg_index AS i WHERE i.indrelid = c.oid AND i.indisprimary))"
    )
    assert rows == []
    tables = await pg.fetch(
        "SELECT relname FROM pg_class WHERE relnamespace = 'balancesync'::regnamespace"
        " AND relkind = 'r' ORDER BY 1"
    )
    page = (Path(__file__).parent.parent / "docs" / "operations.md").read_text()
    *most, last = (f"`{row[0]}`" for row in tables)
    assert f"lists {', '.join(most)} and {last}" in page
    assert f"(the tables {', '.join([*most, last])})" in page


async def test_a_database_that_publishes_all_its_tables(
    postgres_dsn: str, redis_url: str, redis: Redis, engine: MakeEngine, pg: asyncpg.Connection
) -> None:
    await pg.execute("CREATE PUBLICATION dbz FOR ALL TABLES")
    await redis.mset({"balance:1": "1", "balance:2": "2", "balance:3": "x"})
    options: dict[str, Any] = {"history": {"enabled": True, "keep_days": 1}}
    options |= {"guard": {"max_loss": 1.0, "max_rejects": 1.0}, "prune": {"enabled": False}}
    sync = engine({"on_absent": "delete"}, **options)
    await sync.good()
    await pg.execute("UPDATE balancesync.changes SET at = at - interval '3 days'")
    await redis.mset({"balance:1": "5", "balance:3": "3"})
    await redis.delete("balance:2")
    counts = (await sync.good()).counts
    assert (counts.inserted, counts.updated, counts.deleted) == (1, 1, 1)
    await sync.verify()
    pruning = engine(prune={"enabled": True})
    await pg.execute("UPDATE balances SET synced_at = '2020-01-01'")
    pruned = await pruning.sync(job="prune", idle_s=10.0)
    assert (pruned.status, pruned.counts.deleted) == ("succeeded", 2)
    await pruning.good(job="restore")
    await pruning.good()
    live = {"enabled": True, "flush_interval": 0.02}
    async with Inside(daemon_config(postgres_dsn, redis_url, live=live)) as daemon:
        await daemon.log.next("live", state="up")


PUBLISHED = {
    "no replica identity": (
        "CREATE TABLE balances (user_id bigint NOT NULL, balance numeric(20,2),"
        " synced_at timestamptz); CREATE UNIQUE INDEX ON balances (user_id)",
        "balances",
        'ALTER TABLE "public"."balances" REPLICA IDENTITY FULL',
    ),
    "a partition without": (
        f"CREATE TABLE balances ({COLUMNS}) PARTITION BY RANGE (user_id);"
        " CREATE TABLE low PARTITION OF balances FOR VALUES FROM (0) TO (100);"
        " ALTER TABLE low REPLICA IDENTITY NOTHING",
        "balances",
        "REPLICA IDENTITY FULL",
    ),
    "row filter": (
        f"CREATE TABLE balances ({COLUMNS})",
        "balances WHERE (balance > 0)",
        "row filter",
    ),
    "column list": (
        f"CREATE TABLE balances ({COLUMNS})",
        "balances (balance)",
        "column list",
    ),
}


@pytest.mark.parametrize("case", PUBLISHED.values(), ids=PUBLISHED)
async def test_a_target_whose_rows_a_publication_keeps_from_changing(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection, case: tuple[str, str, str]
) -> None:
    sql, what, way = case
    await pg.execute(sql)
    await redis.mset({"balance:1": "1", "balance:2": "2"})
    sync = engine(retry={"attempts": 3, "initial": 0.1})
    await sync.good()
    await pg.execute(f"CREATE PUBLICATION p FOR TABLE {what}")
    await redis.mset({"balance:1": "5", "balance:2": "5"})
    line = await sync.failed(TargetMismatch)
    assert "the table public.balances is published" in line
    assert way in line
    assert ("error", line) in await findings(sync)
    assert await sync.reasons() == {}
    # Insertions alone are nobody's trouble.
    await pg.execute("ALTER PUBLICATION p SET (publish = 'insert')")
    assert (await sync.good()).counts.updated == 2


async def test_a_target_that_is_published_in_mid_run(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    """Found by the statement that fails: no row's fault."""
    await pg.execute(f"CREATE TABLE balances ({COLUMNS}); INSERT INTO balances VALUES (1, 1)")
    await redis.set("balance:1", "5")
    sync = engine()

    async def publish() -> None:
        connection = await asyncpg.connect(sync.config.postgres.dsn.get_secret_value())
        await connection.execute("CREATE PUBLICATION p FOR TABLE balances WHERE (balance > 0)")
        await connection.close()

    def on_progress(progress: Progress) -> None:
        if progress.phase == "apply":
            thread = Thread(target=asyncio.run, args=[publish()])
            thread.start()
            thread.join()

    sync.on_progress = on_progress
    assert "is published" in await sync.failed(TargetMismatch)
    assert await sync.reasons() == {}
