"""Every column type as key and as value, in every Redis type, mode and policy, exactly."""

import json
import re
from collections.abc import Awaitable, Callable
from itertools import product
from typing import Any, cast

import asyncpg
import pytest
from engine import Engine
from redis.asyncio import Redis

from balancesync.reading import Reading
from balancesync.source import Source

MakeEngine = Callable[..., Engine]

UUID = "0189abcd-0000-7000-8000-00000000000a"
BIG = "9" * 40
ZEROS = "0" * 19

# What Redis holds, and what the column prints for it (in UTC).
VALUES: dict[str, dict[str, str]] = {
    "smallint": {"0": "0", "-32768": "-32768", "32767": "32767", "1e2": "100"},
    "integer": {"-2147483648": "-2147483648", "2147483647": "2147483647", "5.0": "5"},
    "bigint": {
        "-9223372036854775808": "-9223372036854775808",
        "9223372036854775807": "9223372036854775807",
    },
    "numeric": {
        "1.500": "1.500",
        f"{BIG}.{BIG}": f"{BIG}.{BIG}",
        "-0": "0",
        "1e-20": f"0.{ZEROS}1",
    },
    "numeric(20,2)": {"999999999999999999.99": "999999999999999999.99", "-0.1": "-0.10"},
    "text": {"": "", "NULL": "NULL", "\\N": "\\N", "tab\tline\nback\\": "tab\tline\nback\\"},
    "varchar(3)": {"abc": "abc", "\u00e4\u00f6\u00fc": "\u00e4\u00f6\u00fc", "a  ": "a  "},
    "uuid": {UUID: UUID, UUID.upper(): UUID},
    "boolean": {"true": "true", "t": "true", "0": "false", "f": "false"},
    "timestamptz": {
        "2026-01-02T03:04:05Z": "2026-01-02 03:04:05+00",
        "2026-01-02 03:04:05.678901+02:00": "2026-01-02 01:04:05.678901+00",
    },
}

KEYS: dict[str, list[str]] = {
    "smallint": ["0", "-32768", "32767"],
    "integer": ["0", "-2147483648", "2147483647"],
    "bigint": ["1", "-9223372036854775808", "9223372036854775807"],
    "numeric": ["0", "1.5", "-0.25", f"{BIG}.{BIG[1:]}"],
    "numeric(10,2)": ["0", "1.5", "-99999999.99", "100"],
    "text": ["", "a", "A", "\u00e4", "tab\tline\nback\\ ", "x" * 1000, "*?[a]"],
    "varchar(3)": ["", "abc", "a  ", "\u00e4\u00f6\u00fc"],
    "uuid": [UUID, "ffffffff-ffff-ffff-ffff-ffffffffffff"],
    "boolean": ["true", "false"],
    "timestamptz": [
        "2026-01-02T03:04:05Z",
        "2026-01-02T03:04:05.6Z",
        "1969-12-31T23:59:59.000001Z",
        "0001-01-01T00:00:00Z",
        "9999-12-31T23:59:59.999999Z",
    ],
}


def table_of(sql: str) -> str:
    """Give a name for the mapping and the table of one type."""
    return re.sub(r"\W+", "_", sql).strip("_")


async def printed(pg: asyncpg.Connection, column: str, table: str = "balances") -> dict[str, Any]:
    """Give a column's values as PostgreSQL prints them, by the key `id`."""
    await pg.execute("SET timezone = 'UTC'")
    rows = await pg.fetch(f"SELECT id::text, {column}::text AS value FROM {table}")
    return {row["id"]: row["value"] for row in rows}


KINDS: dict[str, dict[str, Any]] = {
    "string": {"type": "string", "key": "{table}:{{id}}"},
    "hash": {"type": "hash", "key": "{table}:{{id}}", "fields": {"value": "amount"}},
    "json": {"type": "json", "key": "{table}:{{id}}", "fields": {"value": "amount"}},
    "member": {"type": "hash", "key": "{table}", "member": "{id}"},
}


def mapping_of(kind: str, sql: str, columns: dict[str, str]) -> dict[str, Any]:
    """Make the mapping of one type, in records of this kind."""
    table = table_of(sql)
    settings = KINDS[kind]
    return {
        **settings,
        "key": settings["key"].format(table=table),
        "name": table,
        "table": table,
        "columns": columns,
        "on_absent": "delete",
    }


async def put(redis: Redis, kind: str, sql: str, key: str, value: str) -> None:
    """Set one record of this kind."""
    table = table_of(sql)
    if kind == "string":
        await redis.set(f"{table}:{key}", value)
    elif kind == "hash":
        await redis.hset(f"{table}:{key}", "amount", value)
    elif kind == "json":
        await redis.set(f"{table}:{key}", json.dumps({"amount": value, "other": [1]}))
    else:
        await redis.hset(table, key, value)


@pytest.mark.parametrize("kind", KINDS)
async def test_values_of_every_type(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection, kind: str
) -> None:
    for sql, values in VALUES.items():
        for number, value in enumerate(values):
            await put(redis, kind, sql, str(number), value)
    sync = engine(*(mapping_of(kind, sql, {"id": "bigint", "value": sql}) for sql in VALUES))
    await sync.good()
    for sql, values in VALUES.items():
        expected = {str(number): text for number, text in enumerate(values.values())}
        assert await printed(pg, "value", table_of(sql)) == expected
    # All of it is unchanged to the next run, however PostgreSQL prints it.
    count = sum(map(len, VALUES.values()))
    assert (await sync.good()).counts.unchanged == count
    assert (await sync.verify()).counts.unchanged == count


@pytest.mark.parametrize("kind", KINDS)
async def test_keys_of_every_type(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection, kind: str
) -> None:
    """Each key goes to a row and, printed by PostgreSQL, leads back from the row to the key."""
    for sql, keys in KEYS.items():
        for number, key in enumerate(keys):
            await put(redis, kind, sql, key, str(number))
    mappings = [mapping_of(kind, sql, {"id": sql, "value": "bigint"}) for sql in KEYS]
    sync = engine(*mappings, guard={"max_loss": 1.0})
    count = sum(map(len, KEYS.values()))
    assert (await sync.good()).counts.inserted == count
    assert (await sync.good()).counts.unchanged == count
    for sql, keys in KEYS.items():
        found = await pg.fetchval(f"SELECT array_agg(value ORDER BY value) FROM {table_of(sql)}")
        assert found == list(range(len(keys)))

    # Verify reads again what differs, by the keys that PostgreSQL prints.
    await pg.execute("; ".join(f"UPDATE {table_of(sql)} SET value = value + 100" for sql in KEYS))
    run = await sync.verify()
    assert run.counts.updated == count
    for report, keys in zip(sync.reports, KEYS.values(), strict=True):
        by_key = {row.key: row.new for row in report.rows["u"]}
        assert by_key == {(key,): (str(number),) for number, key in enumerate(keys)}
    assert (await sync.good()).counts.updated == count

    # A row whose key is gone goes, and only that one.
    for sql, keys in KEYS.items():
        if kind == "member":
            await redis.hdel(table_of(sql), keys[0])
        else:
            await redis.delete(f"{table_of(sql)}:{keys[0]}")
    counts = (await sync.good()).counts
    assert (counts.deleted, counts.unchanged) == (len(KEYS), count - len(KEYS))
    for sql in KEYS:
        assert await pg.fetchval(f"SELECT min(value) FROM {table_of(sql)}") == 1


class ComingBack(Source):
    """A Redis that has more keys when it's asked for those that its scan didn't give."""

    come_back: Callable[[], Awaitable[object]]

    async def exists(self, reading: Reading, keys: list[bytes]) -> list[bool]:
        await self.come_back()
        return await super().exists(reading, keys)


async def test_keys_that_the_scan_missed_are_not_deleted(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    """SCAN may miss a key that is made anew meanwhile: the printed key finds it after all."""
    mappings = [mapping_of("string", sql, {"id": sql, "value": "bigint"}) for sql in KEYS]
    keys = [f"{table_of(sql)}:{key}" for sql in KEYS for key in KEYS[sql]]
    await redis.mset(dict.fromkeys(keys, "1"))
    sync = engine(*mappings, source=ComingBack)
    await sync.good()
    await redis.delete(*keys)
    cast(ComingBack, sync.source).come_back = lambda: redis.mset(dict.fromkeys(keys, "1"))
    counts = (await sync.good(accept_loss=True)).counts
    assert (counts.deleted, counts.absent) == (0, 0)
    for sql, texts in KEYS.items():
        assert await pg.fetchval(f"SELECT count(*) FROM {table_of(sql)}") == len(texts)


async def test_composite_keys_in_any_order(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    # Declared in another order than the template has them, around the value.
    mapping = {
        "key": "w:{user_id}:{currency}:{frozen}",
        "columns": {
            "frozen": "boolean",
            "balance": "numeric(20,2)",
            "user_id": "bigint",
            "currency": "varchar(4)",
        },
        "on_absent": "delete",
    }
    keys = list(product(("1", "2", "-3"), ("eur", "EUR", "usdt"), ("true", "false")))
    await redis.mset({f"w:{':'.join(key)}": number for number, key in enumerate(keys)})
    sync = engine(mapping)
    assert (await sync.good()).counts.inserted == len(keys)
    rows = await pg.fetch(
        "SELECT user_id::text, currency, frozen::text, balance::int FROM balances"
    )
    found = {tuple(row)[:3]: row["balance"] for row in rows}
    assert found == {key: number for number, key in enumerate(keys)}
    await redis.set("w:1:eur:true", "500")
    await redis.set("w:1:eur:false", "x")
    await redis.delete("w:1:EUR:true")
    counts = (await sync.good()).counts
    assert (counts.updated, counts.deleted, counts.rejected) == (1, 1, 1)
    assert (await sync.verify()).counts.unchanged == len(keys) - 2
    assert (await sync.rejects()).keys() == {b"w:1:eur:false"}


async def test_several_values_and_nulls(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    """NULL where the field is missing and the column allows it; a change to or from it is one."""
    await pg.execute(
        "CREATE TABLE balances (id bigint PRIMARY KEY, cash numeric(20,2) NOT NULL, bonus bigint,"
        " note text, at timestamptz, synced_at timestamptz)"
    )
    columns = {
        "id": "bigint",
        "cash": "numeric(20,2)",
        "bonus": "bigint",
        "note": "text",
        "at": "timestamptz",
    }
    sync = engine({"key": "b:{id}", "type": "hash", "columns": columns})
    full = {"cash": "1.5", "bonus": "7", "note": "\\N", "at": "2026-01-02T03:04:05Z"}
    for field, value in full.items():
        await redis.hset("b:1", field, value)
    await redis.hset("b:2", "cash", "2")
    await redis.hset("b:3", "bonus", "3")
    run = await sync.good()
    assert (run.counts.inserted, run.counts.rejected) == (2, 1)
    assert await sync.reasons() == {b"b:3": "missing_field"}

    row = "SELECT (cash, bonus, note)::text FROM balances WHERE id = "
    assert await pg.fetchval(f"{row} 1") == '(1.50,7,"\\\\N")'
    assert await pg.fetchval(f"{row} 2") == "(2.00,,)"
    assert (await sync.good()).counts.unchanged == 2

    await redis.hdel("b:1", "bonus", "note", "at")
    await redis.hset("b:2", "note", "")
    assert (await sync.verify()).counts.updated == 2
    assert (await sync.good()).counts.updated == 2
    assert await pg.fetchval(f"{row} 1") == "(1.50,,)"
    assert await pg.fetchval(f"{row} 2") == '(2.00,,"")'
    assert (await sync.good()).counts.unchanged == 2


async def test_json_nulls_and_numbers_with_all_their_digits(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute(
        "CREATE TABLE balances (id bigint PRIMARY KEY, value numeric, ok boolean,"
        " synced_at timestamptz)"
    )
    documents = {
        "1": '{"value": 0.1000000000000000055511151231257827, "ok": true}',
        "2": '{"value": 12345678901234567890123456789, "ok": null}',
        "3": '{"value": "1e2", "ok": "f"}',
        "4": "{}",
        "5": '{"ok": false, "value": -1.5E-3}',
    }
    await redis.mset({f"b:{key}": text for key, text in documents.items()})
    sync = engine(
        {
            "key": "b:{id}",
            "type": "json",
            "columns": {"id": "bigint", "value": "numeric", "ok": "boolean"},
        }
    )
    assert (await sync.good()).counts.inserted == 5
    assert await printed(pg, "value") == {
        "1": "0.1000000000000000055511151231257827",
        "2": "12345678901234567890123456789",
        "3": "100",
        "4": None,
        "5": "-0.0015",
    }
    assert await printed(pg, "ok") == {
        "1": "true",
        "2": None,
        "3": "false",
        "4": None,
        "5": "false",
    }
    assert (await sync.good()).counts.unchanged == 5


ROWS = "SELECT array_agg(user_id::int ORDER BY user_id) FROM balances"


@pytest.mark.parametrize(
    ("mode", "on_absent"), [("upsert", "keep"), ("upsert", "delete"), ("update", "keep")]
)
async def test_modes_and_policies(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection, mode: str, on_absent: str
) -> None:
    """Rows 1 and 2 were there before; 2 and 3 have keys; only what is ours is ever deleted."""
    await pg.execute(
        "CREATE TABLE balances (user_id bigint PRIMARY KEY, balance numeric(20,2),"
        " synced_at timestamptz); INSERT INTO balances VALUES (1, 1, NULL), (2, 1, NULL)"
    )
    sync = engine({"mode": mode, "on_absent": on_absent})
    await redis.mset({"balance:2": "2", "balance:3": "3", "balance:4": "4"})
    counts = (await sync.good()).counts
    inserts = mode == "upsert"
    assert (counts.updated, counts.inserted, counts.not_found, counts.absent, counts.deleted) == (
        1,
        2 if inserts else 0,
        0 if inserts else 2,
        1,
        0,
    )
    assert await pg.fetchval(ROWS) == ([1, 2, 3, 4] if inserts else [1, 2])

    await redis.delete("balance:2")
    deletes = on_absent == "delete"
    for request in ({"mode": "dry_run"}, {"job": "verify", "mode": "verify"}, {}):
        counts = (await sync.good(**request)).counts
        assert (counts.absent, counts.deleted) == (2, 1 if deletes else 0)
    expected = [1, 2, 3, 4] if inserts else [1, 2]
    assert await pg.fetchval(ROWS) == [row for row in expected if not (deletes and row == 2)]


@pytest.mark.parametrize("keys", [1, 50])
async def test_few_keys_and_many_rows(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection, keys: int
) -> None:
    """The diff looks into the table's key index then, and finds the same."""
    await pg.execute(
        "CREATE TABLE balances (user_id bigint PRIMARY KEY, balance numeric(20,2),"
        " synced_at timestamptz);"
        " INSERT INTO balances SELECT n, 1, NULL FROM generate_series(1, 5000) AS n"
    )
    await redis.mset({f"balance:{number * 100}": "1" for number in range(1, keys + 1)})
    await redis.mset({"balance:100": "2", "balance:9000": "3", "balance:77": "x"})
    sync = engine({"on_absent": "delete"}, guard={"max_loss": 1.0})
    counts = (await sync.good()).counts
    assert (counts.inserted, counts.updated, counts.unchanged) == (1, 1, keys - 1)
    assert (counts.rejected, counts.absent, counts.deleted) == (1, 5000 - keys - 1, 0)
