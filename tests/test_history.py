"""The history: every change with what the row held, and what a row was at a past moment."""

import asyncio
import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from secrets import token_hex
from threading import Thread
from typing import Any
from urllib.parse import quote

import asyncpg
import pytest
from daemon_site import Site
from engine import USERS, Engine, waiting
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from balancesync import table as tables
from balancesync.config import MappingConfig
from balancesync.errors import HistoryGap
from balancesync.history import History
from balancesync.part import Progress

MakeEngine = Callable[..., Engine]
KEPT = {"enabled": True}
COLUMNS = "user_id bigint PRIMARY KEY, balance numeric(20,2), synced_at timestamptz"


async def changes(pg: asyncpg.Connection, mapping: str = "balances") -> list[tuple[Any, ...]]:
    """Give all changes as (key, op, old, new), in the order of time and key."""
    rows = await pg.fetch(
        "SELECT key, op::text AS op, old, new FROM balancesync.changes WHERE mapping = $1"
        " ORDER BY at, key",
        mapping,
    )
    return [(tuple(row["key"]), row["op"], load(row["old"]), load(row["new"])) for row in rows]


def load(text: str | None) -> Any:
    """What a jsonb holds; one value column's text by itself."""
    found = None if text is None else json.loads(text)
    return found["balance"] if found and list(found) == ["balance"] else found


async def all_as_of(
    engine: Engine, moment: datetime, mapping: MappingConfig | None = None
) -> dict[Any, Any]:
    """Give key and values of each row at that moment."""
    mapping = mapping or engine.config.mapping[0]
    history = History(engine.database, engine.config.history)
    async with engine.database.acquire() as connection:
        await history.require(connection, mapping, moment)
        table = await tables.inspect(connection, mapping)
        rows = await connection.fetch(history.all_as_of(mapping, table), mapping.name, moment)
    count, end = len(mapping.key_columns), len(mapping.columns)
    found = {tuple(map(str, tuple(row)[:count])): tuple(row)[count:end] for row in rows}
    assert all(tuple(row)[end] is not None for row in rows)
    assert len(found) == len(rows)
    return found


async def one_as_of(engine: Engine, moment: datetime, *key: str) -> Any:
    """Give the values of one row at that moment; a single one by itself."""
    mapping = engine.config.mapping[0]
    history = History(engine.database, engine.config.history)
    async with engine.database.acquire() as connection:
        table = await tables.inspect(connection, mapping)
        values = await history.one_as_of(connection, mapping, table, key, moment)
    return next(iter(values.values())) if values and len(values) == 1 else values


async def now(pg: asyncpg.Connection) -> datetime:
    """PostgreSQL's time."""
    found: datetime = await pg.fetchval("SELECT clock_timestamp()")
    return found


async def test_every_change_of_a_balance(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    sync = engine({"on_absent": "delete"}, history=KEPT, guard={"max_loss": 1.0})
    await redis.mset({"balance:1": "1", "balance:2": "2", "balance:3": "3"})
    first = await sync.good()
    await redis.set("balance:1", "1.5")
    await redis.delete("balance:2")
    second = await sync.good()
    await redis.set("balance:2", "22")
    await sync.good()
    assert await changes(pg) == [
        (("1",), "i", None, "1.00"),
        (("2",), "i", None, "2.00"),
        (("3",), "i", None, "3.00"),
        (("1",), "u", "1.00", "1.50"),
        (("2",), "d", "2.00", None),
        (("2",), "i", None, "22.00"),
    ]
    times = await pg.fetch(
        "SELECT run_id, array_agg(DISTINCT at) AS at FROM balancesync.changes GROUP BY run_id"
        " ORDER BY 2"
    )
    assert [row["run_id"] for row in times][:2] == [first.id, second.id]
    moments = [at for row in times for at in row["at"]]
    # One time for each run, and it's the rows' own.
    assert len(moments) == 3
    rows = await pg.fetch("SELECT user_id, synced_at FROM balances ORDER BY user_id")
    assert [row["synced_at"] for row in rows] == [moments[1], moments[2], moments[0]]

    before = dict.fromkeys(["1", "2", "3"])
    expected = [
        {"1": "1.00", "2": "2.00", "3": "3.00"},
        {"1": "1.50", "2": None, "3": "3.00"},
        {"1": "1.50", "2": "22.00", "3": "3.00"},
    ]
    for moment, values in zip(moments, expected, strict=True):
        assert {key: await one_as_of(sync, moment, key) for key in before} == values
        rows_then = {(key,): text for key, text in values.items() if text}
        found = await all_as_of(sync, moment)
        assert {key: str(row[0]) for key, row in found.items()} == rows_then


async def test_nothing_changed_and_nothing_kept(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await redis.set("balance:1", "1")
    sync = engine(history=KEPT)
    await sync.good()
    await sync.good()
    assert len(await changes(pg)) == 1
    await engine().good()
    await redis.set("balance:1", "2")
    await engine().good()
    assert len(await changes(pg)) == 1


async def test_all_types_are_kept_as_the_column_prints_them(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    mapping = {
        "name": "it-s",
        "key": "w:{owner}|{at}|{n}",
        "type": "hash",
        "table": "wallets",
        "columns": {
            "owner": "text",
            "at": "timestamptz",
            "n": "numeric",
            "amount": "numeric(10,3)",
            "any": "numeric",
            "it's \\ {x}": "text",
            "on": "boolean",
            "seen": "timestamptz",
        },
        "fields": {"it's \\ {x}": "note"},
    }
    await pg.execute(
        'CREATE TABLE wallets (owner text COLLATE "POSIX", at timestamptz, n numeric,'
        ' amount numeric(10,3), "any" numeric, "it\'s \\ {x}" text COLLATE "C",'
        ' "on" boolean, seen timestamptz, synced_at timestamptz, PRIMARY KEY (owner, at, n))'
    )
    sync = engine(mapping, history=KEPT)
    key = 'w:Zoë "q"|2026-01-31T02:00:00.5Z|1.5'
    await redis.hset(key, mapping={"amount": "1.5", "any": "1.10", "on": "t"})
    await redis.hset(key, "seen", "2026-01-31T02:00:00+02:00")
    await sync.good()
    then = await now(pg)
    await redis.hset(key, mapping={"note": "a\nb\\", "any": "1.2"})
    await redis.hdel(key, "on")
    await sync.good()
    texts = ('Zoë "q"', "2026-01-31T02:00:00.5Z", "1.5")
    old = {
        "amount": "1.500",
        "any": "1.10",
        "it's \\ {x}": None,
        "on": "true",
        "seen": "2026-01-31 00:00:00+00",
    }
    new = old | {"any": "1.2", "it's \\ {x}": "a\nb\\", "on": None}
    kept = await changes(pg, "it-s")
    assert kept == [(texts, "i", None, old), (texts, "u", old, new)]
    assert await one_as_of(sync, then, *texts) == old
    assert await one_as_of(sync, await now(pg), *texts) == new
    [row] = (await all_as_of(sync, then)).values()
    assert [str(value) for value in row[:4]] == ["1.500", "1.10", "None", "True"]
    assert row[4] == datetime(2026, 1, 31, tzinfo=UTC)


# --- truth against those who write at the same time -----------------------------------------------


def meanwhile(engine: Engine, sql: str, then: Callable[[], None] = lambda: None) -> None:
    """Have others do this in the next run, when its diff is made and nothing applied yet."""

    async def act() -> None:
        connection = await asyncpg.connect(engine.config.postgres.dsn.get_secret_value())
        await connection.execute(sql)
        await connection.close()

    def on_progress(progress: Progress) -> None:
        if progress.phase == "apply" and not done:
            done.append(True)
            thread = Thread(target=asyncio.run, args=[act()])
            thread.start()
            thread.join()
            then()

    done: list[bool] = []
    engine.on_progress = on_progress


async def test_old_is_what_the_row_held_and_not_what_the_diff_saw(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    sync = engine({"on_absent": "delete"}, history=KEPT, guard={"max_loss": 1.0})
    await redis.mset({f"balance:{number}": "1" for number in range(1, 8)})
    await sync.good()
    await pg.execute("DELETE FROM balancesync.changes")
    await redis.mset({f"balance:{number}": "2" for number in (1, 2, 3, 4, 8, 9, 10)})
    await redis.delete("balance:5", "balance:6", "balance:7")
    meanwhile(
        sync,
        "UPDATE balances SET balance = 77 WHERE user_id IN (2, 6);"
        " UPDATE balances SET balance = 2 WHERE user_id = 3;"
        " DELETE FROM balances WHERE user_id IN (4, 7);"
        " INSERT INTO balances VALUES (9, 99), (10, 2)",
    )
    counts = (await sync.good()).counts
    assert sorted(await changes(pg), key=lambda change: int(change[0][0])) == [
        (("1",), "u", "1.00", "2.00"),
        (("2",), "u", "77.00", "2.00"),
        (("3",), "u", "2.00", "2.00"),
        (("5",), "d", "1.00", None),
        (("6",), "d", "77.00", None),
        (("8",), "i", None, "2.00"),
        (("9",), "u", "99.00", "2.00"),
    ]
    rows = await pg.fetch("SELECT user_id, balance::int AS b FROM balances ORDER BY user_id")
    assert [(row["user_id"], row["b"]) for row in rows] == [
        (number, 2) for number in (1, 2, 3, 8, 9, 10)
    ]
    assert (counts.updated, counts.inserted, counts.deleted, counts.not_found) == (3, 2, 2, 1)


async def test_a_row_that_another_is_just_changing(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    sync = engine(history=KEPT)
    await redis.mset({"balance:1": "1", "balance:2": "1"})
    await sync.good()
    await redis.mset({"balance:1": "2", "balance:2": "2"})
    # What a transaction sees of others' waiting is what it saw first.
    async with sync.database.acquire() as watching:
        await pg.execute("BEGIN; UPDATE balances SET balance = 50 WHERE user_id = 1")
        run = asyncio.create_task(sync.good())
        await waiting(watching, 1)
    await pg.execute("COMMIT")
    await run
    assert (await changes(pg))[2:] == [
        (("1",), "u", "50.00", "2.00"),
        (("2",), "u", "1.00", "2.00"),
    ]


async def test_a_row_that_changes_again_while_it_is_settled(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    sync = engine(history=KEPT)
    await redis.set("balance:1", "1")
    await sync.good()
    await redis.set("balance:1", "2")
    dsn = sync.config.postgres.dsn.get_secret_value()

    async def change_again() -> None:
        connection = await asyncpg.connect(dsn)
        # Goes on when the test frees the lock.
        await connection.execute(
            "BEGIN; UPDATE balances SET balance = 60; SELECT pg_advisory_xact_lock(7); COMMIT"
        )
        await connection.close()

    async def until_it_waits() -> None:
        connection = await asyncpg.connect(dsn)
        await waiting(connection, 1)
        await connection.close()

    again = Thread(target=asyncio.run, args=[change_again()])

    def then() -> None:
        again.start()
        thread = Thread(target=asyncio.run, args=[until_it_waits()])
        thread.start()
        thread.join()

    await pg.execute("SELECT pg_advisory_lock(7)")
    meanwhile(sync, "UPDATE balances SET balance = 50", then)
    run = asyncio.create_task(sync.good())
    await waiting(pg, 2)
    await pg.execute("SELECT pg_advisory_unlock(7)")
    await run
    again.join()
    assert (await changes(pg))[1:] == [(("1",), "u", "60.00", "2.00")]


async def test_what_the_table_refuses_is_in_no_history(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute(f"CREATE TABLE balances ({COLUMNS}, CHECK (balance >= 0))")
    await redis.mset({f"balance:{number}": "1" for number in range(20)})
    sync = engine(history=KEPT)
    await sync.good()
    await redis.mset({f"balance:{number}": "2" for number in range(30)})
    await redis.mset({"balance:3": "-3", "balance:23": "-3"})
    counts = (await sync.good()).counts
    assert (counts.updated, counts.inserted, counts.rejected) == (19, 9, 2)
    kept = (await changes(pg))[20:]
    assert len(kept) == 28
    assert {key for key, *_ in kept} == {(str(n),) for n in range(30)} - {("3",), ("23",)}


async def test_what_a_trigger_makes_of_it_is_what_is_kept(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute(
        f"CREATE TABLE balances ({COLUMNS});"
        " CREATE FUNCTION bend() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN"
        " IF NEW.user_id = 2 THEN RETURN NULL; END IF;"
        " NEW.balance := NEW.balance + 1; RETURN NEW; END$$;"
        " CREATE TRIGGER bend BEFORE INSERT OR UPDATE ON balances FOR EACH ROW"
        " EXECUTE FUNCTION bend()"
    )
    await redis.mset({"balance:1": "1", "balance:2": "2"})
    sync = engine(history=KEPT)
    await sync.good()
    await sync.good()
    assert await changes(pg) == [(("1",), "i", None, "2.00")]
    await redis.set("balance:1", "5")
    await sync.good()
    assert (await changes(pg))[1:] == [(("1",), "u", "2.00", "6.00")]


async def test_a_slice_and_its_changes_are_one(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    """Whatever a run that dies has written of the rows, it has written of their changes."""
    await redis.mset({f"balance:{number}": "1" for number in range(50)})
    sync = engine(history=KEPT, postgres={"apply_batch": 10})
    await sync.good()
    await redis.mset({f"balance:{number}": "2" for number in range(50)})

    def fail(progress: Progress) -> None:
        if progress.phase == "apply" and progress.done >= 20:
            raise ConnectionResetError("the connection is lost")

    sync.on_progress = fail
    assert (await sync.sync()).status == "failed"
    sync.on_progress = lambda progress: None
    rows = "SELECT count(*) FROM balances WHERE balance = 2"
    assert await pg.fetchval(rows) == len(await changes(pg)) - 50 == 20
    # The next has a time of its own, and what is done is done once.
    await sync.good()
    kept = await changes(pg)
    assert len(kept) == 100
    assert len(set(kept)) == 100


# --- since when -----------------------------------------------------------------------------------


async def test_a_history_begins_anew_where_something_may_be_missing(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    columns = {"user_id": "bigint", "balance": "bigint"}
    mapping = {"type": "hash", "columns": columns}
    wider = {"type": "hash", "columns": columns | {"bonus": "bigint"}}
    await pg.execute(
        "CREATE TABLE balances (user_id bigint PRIMARY KEY, balance bigint, bonus bigint,"
        " synced_at timestamptz)"
    )
    sync = engine(mapping, history=KEPT)
    number = 0

    async def since(engine: Engine) -> datetime | None:
        nonlocal number
        number += 1
        await redis.hset("balance:1", mapping={"balance": number, "bonus": number})
        await engine.good()
        async with engine.database.acquire() as connection:
            history = History(engine.database, engine.config.history)
            return await history.since(connection, engine.config.mapping[0])

    first = await since(sync)
    assert first is not None
    assert await since(sync) == first
    # Off for a run that writes, and only then.
    assert await since(engine(mapping)) is None
    second = await since(sync)
    assert second is not None
    assert second > first
    await engine(mapping).good()
    assert await since(sync) == second
    # Another value column.
    third = await since(engine(wider, history=KEPT))
    assert third is not None
    assert third > second
    # A program that knows of no history.
    fourth = await since(sync)
    assert fourth is not None
    await pg.execute(
        "INSERT INTO balancesync.runs (id, job, trigger, mode, status, started_at,"
        " attempts, mappings, warnings, lock_key) VALUES (gen_random_uuid(), 'sync', 'cli',"
        " 'apply', 'succeeded', now(), 1, '{}', '{}', 1)"
    )
    with pytest.raises(HistoryGap, match="no past is known yet"):
        await one_as_of(sync, await now(pg), "1")
    fifth = await since(sync)
    assert fifth is not None
    assert fifth > fourth
    assert await since(sync) == fifth
    with pytest.raises(HistoryGap, match="is known since"):
        await one_as_of(sync, fourth, "1")
    assert await one_as_of(sync, fifth, "1") == "8"


@pytest.mark.parametrize("meanwhile", [{}, {"history": KEPT}], ids=["without history", "with it"])
async def test_a_history_ends_where_its_mapping_had_another_name(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection, meanwhile: dict[str, Any]
) -> None:
    """What was kept under the other name isn't found under this one."""
    sync = engine(history=KEPT)
    other = engine({"name": "wallets", "table": "public.balances"}, **meanwhile)
    moments = []
    for balance, each in enumerate((sync, other, other, sync)):
        await redis.set("balance:1", balance)
        await each.good()
        moments.append(await now(pg))
    for moment in moments[:3]:
        with pytest.raises(HistoryGap, match="is known since"):
            await one_as_of(sync, moment, "1")
    assert await one_as_of(sync, moments[3], "1") == "3.00"


async def test_mappings_of_other_columns_of_one_table_have_histories_of_their_own(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute(
        "CREATE TABLE users (telegram_id bigint PRIMARY KEY, balance bigint, bonus bigint,"
        " sync_at timestamptz); INSERT INTO users VALUES (1)"
    )
    columns = {"telegram_id": "bigint", "bonus": "bigint"}
    bonus = {**USERS, "name": "bonus", "key": "bonus:{telegram_id}", "columns": columns}
    sync = engine(USERS, bonus, history=KEPT)
    moments = []
    for number in range(3):
        await redis.mset({"1": number, "bonus:1": number})
        await sync.good()
        moments.append(await now(pg))
    assert [await one_as_of(sync, moment, "1") for moment in moments] == ["0", "1", "2"]


async def test_errors_are_never_guesses(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await redis.set("balance:1", "1")
    sync = engine(history=KEPT)
    await engine().good()
    before = await now(pg)
    with pytest.raises(HistoryGap, match="no past is known yet"):
        await one_as_of(sync, before, "1")
    await sync.good()
    with pytest.raises(HistoryGap, match="is known since"):
        await one_as_of(sync, before, "1")
    with pytest.raises(HistoryGap, match="yet to come"):
        await one_as_of(sync, before + timedelta(hours=1), "1")
    with pytest.raises(HistoryGap, match="not enabled"):
        await one_as_of(engine(), await now(pg), "1")
    assert await one_as_of(sync, await now(pg), "1") == "1.00"
    assert await one_as_of(sync, await now(pg), "2") is None


async def test_what_is_too_old_is_forgotten_and_known_to_be(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await redis.set("balance:1", "1")
    sync = engine(history={"enabled": True, "keep_days": 30})
    await sync.good()
    await pg.execute(
        "UPDATE balancesync.changes SET at = at - interval '31 days';"
        " UPDATE balancesync.histories SET since = since - interval '31 days';"
        " INSERT INTO balancesync.changes (mapping, key, at, run_id, op)"
        " SELECT 'gone', ARRAY[n::text], now() - interval '32 days', gen_random_uuid(), 'i'"
        " FROM generate_series(1, 25000) AS n;"
        " INSERT INTO balancesync.changes (mapping, key, at, run_id, op)"
        " VALUES ('gone', '{0}', now() - interval '29 days', gen_random_uuid(), 'i')"
    )
    with pytest.raises(HistoryGap, match="is known since"):
        await one_as_of(sync, await now(pg) - timedelta(days=30, seconds=5), "1")
    await redis.set("balance:1", "2")
    await sync.good()
    assert await pg.fetchval("SELECT count(*) FROM balancesync.changes") == 2
    # Kept longer from now on: what is gone stays unknown.
    longer = engine(history={"enabled": True, "keep_days": 60})
    with pytest.raises(HistoryGap, match="is known since"):
        await one_as_of(longer, await now(pg) - timedelta(days=30, seconds=5), "1")
    assert await one_as_of(longer, await now(pg) - timedelta(days=29), "1") == "1.00"


async def test_a_clock_that_goes_back_puts_no_change_before_another(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await redis.set("balance:1", "1")
    sync = engine(history=KEPT)
    await sync.good()
    # As if PostgreSQL's clock had been an hour ahead.
    await pg.execute("UPDATE balancesync.changes SET at = at + interval '1 hour'")
    await redis.set("balance:1", "2")
    run = await sync.good()
    assert [change[1] for change in await changes(pg)] == ["i", "u"]
    assert any("gone back" in warning for warning in run.warnings)


# --- against a recorded ledger --------------------------------------------------------------------

PAIR = {
    "key": "w:{owner}:{n}",
    "type": "hash",
    "on_absent": "delete",
    "columns": {"owner": "text", "n": "bigint", "amount": "numeric(10,3)", "note": "text"},
}
KEYS = [("a", "-1"), ("a", "2"), ("bö", "2"), ('q"\\ {}', "30"), (",", "4")]
# What one run finds changed: a key, and its amount and note; no amount: the key is gone.
Edit = tuple[int, str | None, str | None]
Ledger = dict[Any, tuple[Any, ...]]
EDITS = st.lists(
    st.tuples(
        st.integers(0, len(KEYS) - 1),
        st.none() | st.decimals(-999, 999, places=3, allow_nan=False).map("{:f}".format),
        st.sampled_from([None, "", "x", "y\n\\"]),
    ),
    max_size=4,
)


async def run_and_record(
    sync: Engine, redis: Redis, pg: asyncpg.Connection, runs: Sequence[Sequence[Edit]]
) -> list[tuple[datetime, Ledger]]:
    """Make these changes run by run; return what the table was, with a moment after each run."""
    ledger: list[tuple[datetime, Ledger]] = []
    for edits in runs:
        for number, amount, note in edits:
            owner, n = KEYS[number]
            key = f"w:{owner}:{n}"
            await redis.delete(key)
            if amount is not None:
                await redis.hset(key, "amount", amount)
            if amount is not None and note is not None:
                await redis.hset(key, "note", note)
        await sync.good(accept_loss=True)
        rows = await pg.fetch("SELECT owner, n::text, amount, note FROM wallets")
        table = {(row["owner"], row["n"]): (row["amount"], row["note"]) for row in rows}
        ledger.append((await now(pg), table))
    return ledger


@settings(
    max_examples=4,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(runs=st.lists(EDITS, min_size=3, max_size=6), batch=st.sampled_from([1, 2, 10_000]))
async def test_any_past_is_what_a_ledger_says(
    engine: MakeEngine,
    redis: Redis,
    pg: asyncpg.Connection,
    runs: list[list[Edit]],
    batch: int,
) -> None:
    await redis.flushdb()
    await pg.execute(
        "DROP SCHEMA IF EXISTS balancesync CASCADE; DROP TABLE IF EXISTS wallets;"
        " CREATE TABLE wallets (owner text, n bigint, amount numeric(10,3), note text,"
        " synced_at timestamptz, PRIMARY KEY (owner, n))"
    )
    sync = engine({**PAIR, "table": "wallets"}, history=KEPT, postgres={"apply_batch": batch})
    ledger = await run_and_record(sync, redis, pg, runs)
    # The moments in between are those just before the next run's own.
    times = await pg.fetch("SELECT DISTINCT at FROM balancesync.changes ORDER BY at")
    starts = [row["at"] for row in times]
    for moment, table in ledger:
        later = [at for at in starts if at > moment]
        until = later[0] - timedelta(microseconds=1) if later else moment
        for each in (moment, until):
            assert await all_as_of(sync, each) == table
            for owner, n in KEYS:
                row = await one_as_of(sync, each, owner, n)
                amount, note = table.get((owner, n), (None, None))
                expected = None if amount is None else {"amount": f"{amount:f}", "note": note}
                assert row == expected


# --- who asks -------------------------------------------------------------------------------------


async def test_a_past_balance_by_http(
    postgres_dsn: str, redis_url: str, redis: Redis, pg: asyncpg.Connection
) -> None:
    await redis.mset({"balance:1": "1", "balance:2": "2"})
    mapping = {"on_absent": "delete"}
    async with Site.on(
        postgres_dsn, redis_url, mapping, history=KEPT, guard={"max_loss": 1.0}
    ) as site:
        early = (await now(pg)).isoformat()

        async def ask(key: str, moment: str) -> tuple[int, Any]:
            return await site.ask(f"/balances/balances/{key}?as_of={quote(moment)}")

        status, found = await ask("1", early)
        assert (status, found["error"]["code"]) == (409, "no_history")
        await site.sync()
        then = await now(pg)
        await redis.set("balance:1", "5")
        await redis.delete("balance:2")
        await site.sync()
        status, found = await ask("1", then.isoformat())
        assert (status, datetime.fromisoformat(found.pop("as_of"))) == (200, then)
        assert found == {
            "mapping": "balances",
            "key": {"user_id": "1"},
            "values": {"balance": "1.00"},
            "source": "postgres",
        }
        assert (await ask("2", then.isoformat()))[1]["values"] == {"balance": "2.00"}
        after = (await now(pg)).isoformat()
        assert (await ask("1", after))[1]["values"] == {"balance": "5.00"}
        assert [(await ask("2", after))[0], (await ask("3", after))[0]] == [404, 404]
        status, found = await ask("1", early)
        assert (status, found["error"]["code"]) == (409, "no_history")
        assert "is known since" in found["error"]["message"]
        for moment in ("yesterday", "2026-01-01", "2026-01-01T00:00:00", "9999999"):
            assert (await ask("1", moment))[0] == 422
        assert (await ask("007", then.isoformat()))[0] == 422
        # The exact time of a change is a moment to be asked for.
        at = await pg.fetchval("SELECT max(at) FROM balancesync.changes")
        assert (await ask("1", at.isoformat()))[1]["values"] == {"balance": "5.00"}
        before = (at - timedelta(microseconds=1)).isoformat()
        assert (await ask("1", before))[1]["values"] == {"balance": "1.00"}


async def test_the_longest_keys_fit_its_index(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    columns = dict.fromkeys("abcdefgh", "text") | {"balance": "bigint"}
    mapping = {
        "name": "n" * 63,
        "key": "|".join(f"{{{name}}}" for name in "abcdefgh") + "|",
        "columns": columns,
        "table": "longest",
    }
    # Random, or it would be compressed.
    texts = [token_hex(150) for _ in range(8)]
    await redis.set("|".join(texts) + "|", "1")
    sync = engine(mapping, history=KEPT)
    counts = (await sync.good()).counts
    assert (counts.inserted, counts.rejected) == (1, 0)
    assert await one_as_of(sync, await now(pg), *texts) == "1"
