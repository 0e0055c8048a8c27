"""Writing a diff: which rows are locked, spared, refused, and what a run that breaks off leaves."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from engine import Engine, waiting
from redis.asyncio import Redis

from balancesync import table as tables
from balancesync.errors import RightMissing, SourceChanged
from balancesync.mapping import Mapping
from balancesync.model import RawBatch
from balancesync.nodes import Identity
from balancesync.part import Progress
from balancesync.reading import Reading
from balancesync.session import Session
from balancesync.source import Source
from balancesync.target import Diff, Writer

MakeEngine = Callable[..., Engine]

COLUMNS = "user_id bigint PRIMARY KEY, balance numeric(20,2), synced_at timestamptz"
KEEPING = pytest.mark.parametrize("keep", [False, True], ids=["without history", "with history"])


def nonzero(counts: Any) -> dict[str, int]:
    """The counts that tell anything but how many keys were scanned."""
    return {k: v for k, v in counts.as_dict().items() if v and k != "scanned"}


async def ids(pg: asyncpg.Connection) -> list[int]:
    """The ids that have a row."""
    return [row[0] for row in await pg.fetch("SELECT user_id FROM balances ORDER BY 1")]


def once(engine: Engine, dsn: str, sql: str) -> None:
    """Have somebody else execute this just before the engine applies."""

    async def act() -> None:
        connection = await asyncpg.connect(dsn)
        await connection.execute(sql)
        await connection.close()

    def on_progress(progress: Progress) -> None:
        if progress.phase == "apply" and not done:
            done.append(True)
            thread = Thread(target=asyncio.run, args=[act()])
            thread.start()
            thread.join()

    done: list[bool] = []
    engine.on_progress = on_progress


class Misses(Source):
    """A Redis whose SCAN misses a key, as it may one that is deleted and made again meanwhile."""

    async def scan(
        self, reading: Reading, *, identity: Identity | None = None
    ) -> AsyncGenerator[RawBatch, None]:
        async with aclosing(super().scan(reading, identity=identity)) as batches:
            async for batch in batches:
                if b"balance:10" in batch.keys:
                    place = batch.keys.index(b"balance:10")
                    del batch.keys[place], batch.values[place]
                    batch.scanned -= 1
                yield batch


@KEEPING
async def test_a_delete_that_is_spared_beside_an_update(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection, keep: bool
) -> None:
    await redis.mset({f"balance:{number}": "1" for number in range(50)})
    history = {"enabled": keep}
    await engine({"on_absent": "delete"}, history=history).good()
    await redis.mset({f"balance:{number}": "2" for number in (3, 4, 40)})
    await redis.delete("balance:9", "balance:11")
    sync = engine({"on_absent": "delete"}, source=Misses, history=history)
    counts = (await sync.good()).counts
    assert nonzero(counts) == {"updated": 3, "unchanged": 44, "absent": 2, "deleted": 2}
    assert await ids(pg) == [number for number in range(50) if number not in (9, 11)]


@KEEPING
async def test_an_update_that_violates_a_unique_column(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection, keep: bool
) -> None:
    await pg.execute(
        "CREATE TABLE balances (user_id bigint PRIMARY KEY, balance bigint, card text UNIQUE,"
        " synced_at timestamptz);"
        " INSERT INTO balances VALUES (1, 1, 'a'), (2, 1, 'b'), (3, 1, 'c'), (4, 1, 'd')"
    )
    columns = {"user_id": "bigint", "balance": "bigint", "card": "text"}
    for number, card in enumerate(("a", "a", "x", "d"), 1):
        await redis.hset(f"balance:{number}", mapping={"balance": "5", "card": card})
    sync = engine({"type": "hash", "columns": columns}, history={"enabled": keep})
    assert nonzero((await sync.good()).counts) == {"updated": 3, "rejected": 1}
    found = await pg.fetch("SELECT user_id, balance, card FROM balances ORDER BY user_id")
    assert [tuple(row) for row in found] == [(1, 5, "a"), (2, 1, "b"), (3, 5, "x"), (4, 5, "d")]
    assert await sync.reasons() == {b"balance:2": "refused_by_table"}
    if keep:
        assert await pg.fetchval("SELECT count(*) FROM balancesync.changes") == 3


@KEEPING
@pytest.mark.parametrize("bad", ["1", "-1"], ids=["all at once", "row by row"])
async def test_a_right_that_is_revoked_in_mid_run_is_no_row_s_fault(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection, bad: str, keep: bool
) -> None:
    await pg.execute(
        f"CREATE TABLE balances ({COLUMNS}, CHECK (balance >= 0)); CREATE TABLE audit (n bigint);"
        # What the trigger may not do any more, the writer is to be told of.
        " CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN"
        " INSERT INTO audit VALUES (NEW.user_id); RETURN NEW; END$$;"
        " CREATE TRIGGER audit AFTER INSERT ON balances FOR EACH ROW EXECUTE FUNCTION audit();"
        " CREATE ROLE auditor; GRANT CREATE ON SCHEMA public TO auditor;"
    )
    try:
        await pg.execute(
            "GRANT SELECT, INSERT, UPDATE ON balances TO auditor; GRANT INSERT ON audit TO auditor;"
            " GRANT CREATE, TEMPORARY ON DATABASE "
            + await pg.fetchval("SELECT current_database()")
            + " TO auditor; ALTER ROLE auditor LOGIN"
        )
        admin = engine().config.postgres.dsn.get_secret_value()
        url = urlsplit(admin)
        dsn = url._replace(netloc=f"auditor@{url.netloc.rpartition('@')[2]}").geturl()
        await redis.mset({f"balance:{number}": "1" for number in range(5)})
        await redis.set("balance:0", bad)
        sync = engine(dsn=dsn, history={"enabled": keep})
        once(sync, admin, "REVOKE INSERT ON audit FROM auditor")
        assert "permission denied for table audit" in await sync.failed(RightMissing)
        assert await sync.reasons() == {}
        assert await ids(pg) == []
        await pg.execute("GRANT INSERT ON audit TO auditor")
        counts = (await engine(dsn=dsn, history={"enabled": keep}).good()).counts
        assert counts.inserted == (5 if bad == "1" else 4)
    finally:
        await pg.execute("DROP OWNED BY auditor CASCADE; DROP ROLE auditor")


@KEEPING
@pytest.mark.parametrize("nested", ["on", "off"], ids=["", "no nested loops"])
async def test_rows_are_locked_in_key_order(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection, keep: bool, nested: str
) -> None:
    """However they lie in the table, and whatever the planner of that database is allowed: an
    application that does the same never meets a deadlock.
    """
    database = await pg.fetchval("SELECT current_database()")
    await pg.execute(f"ALTER DATABASE {database} SET enable_nestloop = {nested}")
    await pg.execute(
        f"CREATE TABLE balances ({COLUMNS});"
        " INSERT INTO balances SELECT g, 1 FROM generate_series(400, 1, -1) AS g; ANALYZE balances"
    )
    await redis.mset({f"balance:{number}": "2" for number in range(1, 401)})
    sync = engine(history={"enabled": keep})
    await pg.execute("BEGIN; UPDATE balances SET balance = 1 WHERE user_id = 150")
    async with sync.database.acquire() as other:
        run = asyncio.create_task(sync.good())
        await waiting(other, 1)
        free = await other.fetch("SELECT user_id FROM balances FOR UPDATE SKIP LOCKED")
        await pg.execute("ROLLBACK")
    assert (await run).counts.updated == 400
    assert {row[0] for row in free} == set(range(151, 401))


class Meanwhile(Writer):
    """A writer beside which somebody inserts a row between the count of the rows and the join."""

    other: asyncpg.Connection

    async def _join(self, target_rows: int) -> None:
        await self.other.execute("INSERT INTO balances VALUES (2, 2)")
        await super()._join(target_rows)


async def staged(engine: Engine, redis_keys: dict[bytes, bytes], writer: Writer) -> None:
    """Stage these keys with their values."""
    raw = RawBatch(list(redis_keys), list(redis_keys.values()), len(redis_keys))
    await writer.stage(writer.mapping.parse(raw))


@pytest.fixture
async def writing(engine: MakeEngine, pg: asyncpg.Connection) -> Any:
    """Makes writers, in a session of their own, on the table `balances`."""
    await pg.execute(f"CREATE TABLE balances ({COLUMNS}); INSERT INTO balances VALUES (1, 1)")
    made = engine()
    await made.good(mode="dry_run")
    session = await Session.open(made.database)
    await session.prepare()
    [config] = made.config.mapping

    async def make(kind: type[Writer]) -> Writer:
        table = await tables.inspect(session.connection, config)
        writer = kind(session, Mapping(config), table, 0)
        await writer.prepare()
        return writer

    yield make
    await session.close()


async def test_a_row_inserted_between_count_and_join_is_not_in_the_picture(
    writing: Any, engine: MakeEngine, pg: asyncpg.Connection
) -> None:
    writer = await writing(Meanwhile)
    writer.other = pg
    await staged(engine(), {b"balance:1": b"1", b"balance:2": b"2"}, writer)
    found: Diff = await writer.diff()
    assert (found.target_rows, found.inserted.rows, found.absent) == (1, 1, 0)


async def test_what_was_read_before_the_reading_broke_off_is_forgotten(
    writing: Any, engine: MakeEngine
) -> None:
    """A big hash that turns out to be something else in mid-read is read from the beginning."""
    writer = await writing(Writer)
    await staged(engine(), {b"balance:1": b"7", b"balance:5": b"5"}, writer)
    await writer.clear()
    await staged(engine(), {b"balance:1": b"1", b"balance:8": b"8"}, writer)
    found: Diff = await writer.diff()
    assert (found.stored, found.rejected) == (2, 0)
    assert (found.inserted.rows, found.updated.rows, found.absent) == (1, 0, 0)
    assert [row.key for row in await writer.sample("i", 10)] == [("8",)]


@KEEPING
@pytest.mark.parametrize("mode", ["upsert", "update"])
async def test_rows_whose_key_is_null_in_part_are_nobody_s(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection, mode: str, keep: bool
) -> None:
    await pg.execute(
        "CREATE TABLE balances (user_id bigint, currency text, balance bigint,"
        " synced_at timestamptz, UNIQUE (user_id, currency));"
        " INSERT INTO balances VALUES (1, 'eur', 1, now()), (1, NULL, 9, now()),"
        " (NULL, 'eur', 9, now()), (NULL, NULL, 9, now()),"
        " (2, 'eur', 1, now()), (3, 'eur', 1, now())"
    )
    mapping = {
        "key": "balance:{user_id}:{currency}",
        "columns": {"user_id": "bigint", "currency": "text", "balance": "bigint"},
        "mode": mode,
        "on_absent": "delete" if mode == "upsert" else "keep",
    }
    await redis.mset({"balance:1:eur": "5", "balance:2:eur": "1"})
    sync = engine(mapping, history={"enabled": keep})
    counts = nonzero((await sync.good()).counts)
    assert counts.pop("deleted", 0) == (mode == "upsert")
    assert counts == {"updated": 1, "unchanged": 1, "absent": 1}
    found = await pg.fetch("SELECT user_id, currency, balance FROM balances WHERE balance = 9")
    assert len(found) == 3
    assert nonzero((await sync.good()).counts) == {"unchanged": 2} | (
        {"absent": 1} if mode == "update" else {}
    )


async def test_two_mappings_that_both_have_rejects(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute(f"CREATE TABLE bonus ({COLUMNS}, CHECK (balance < 100))")
    bonus = {"name": "bonus", "key": "bonus:{user_id}", "table": "bonus"}
    await redis.mset({f"balance:{number}": "x" for number in range(3)})
    await redis.mset({"bonus:0": "y", "bonus:1": "100", "balance:7": "7", "bonus:7": "7"})
    sync = engine({}, bonus)
    run = await sync.good()
    both = {name: nonzero(counts) for name, counts in run.mappings.items()}
    assert both == {
        "balances": {"rejected": 3, "inserted": 1},
        "bonus": {"rejected": 2, "inserted": 1},
    }
    assert await sync.reasons() == {
        **{f"balance:{number}".encode(): "not_a_number" for number in range(3)},
        b"bonus:0": "not_a_number",
        b"bonus:1": "refused_by_table",
    }
    await redis.mset({"balance:1": "1", "bonus:1": "1"})
    run = await sync.good()
    assert [counts.rejected for counts in run.mappings.values()] == [2, 1]
    assert set(await sync.reasons()) == {b"balance:0", b"balance:2", b"bonus:0"}


async def test_a_row_that_both_attempts_update_counts_once(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await redis.mset({f"balance:{number}": "1" for number in range(6)})
    sync = engine(postgres={"apply_batch": 2}, retry={"attempts": 2, "initial": 0.1})
    await sync.good()
    await redis.mset({f"balance:{number}": "2" for number in range(6)})
    dsn_url = sync.config.redis.url.get_secret_value()
    failed: list[bool] = []

    async def change() -> None:
        async with Redis.from_url(dsn_url) as other:
            await other.mset({"balance:0": "3", "balance:1": "3"})

    def fail_once(progress: Progress) -> None:
        if progress.phase == "apply" and progress.done == 4 and not failed:
            failed.append(True)
            thread = Thread(target=asyncio.run, args=[change()])
            thread.start()
            thread.join()
            raise SourceChanged

    sync.on_progress = fail_once
    run = await sync.good()
    assert (run.attempts, failed) == (2, [True])
    assert nonzero(run.counts) == {"updated": 6}
    found = await pg.fetch("SELECT balance::int FROM balances ORDER BY user_id")
    assert [row[0] for row in found] == [3, 3, 2, 2, 2, 2]
