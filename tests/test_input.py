"""What bad input gets: a reject with its reason and an untouched row, or a clear error."""

import csv
import gzip
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
import redis as blocking
from engine import Engine, Twice, make_config
from redis.asyncio import Redis

from balancesync.embedded import PostgresServer, RedisServer
from balancesync.errors import ConfigError, RightMissing, RunFailed
from balancesync.model import RawBatch
from balancesync.nodes import Identity
from balancesync.reading import Reading
from balancesync.source import Source

MakeEngine = Callable[..., Engine]
Row = tuple[Any, ...]

TEXT_IDS = {"columns": {"user_id": "text", "balance": "numeric(20,2)"}}
UUID_IDS = {"columns": {"user_id": "uuid", "balance": "numeric(20,2)"}}
TWO_KEYS = {
    "key": "balance:{user_id}:{currency}",
    "columns": {"user_id": "text", "currency": "text", "balance": "numeric(20,2)"},
}


async def rows(pg: asyncpg.Connection, table: str = "balances") -> list[Row]:
    """Give the rows without `synced_at`, as text, in order."""
    found = await pg.fetch(f"SELECT * FROM {table}")
    return sorted(
        tuple(str(value) for name, value in row.items() if name != "synced_at") for row in found
    )


async def version(pg: asyncpg.Connection, key: str) -> Row:
    """Give what changes when a row is written, even to the same."""
    row = await pg.fetchrow(
        "SELECT ctid::text, xmin::text, b.* FROM balances AS b WHERE user_id::text = $1", key
    )
    assert row is not None
    return tuple(row)


BAD_VALUES = {
    "empty": (b"", "not_a_number"),
    "letters": (b"abc", "not_a_number"),
    "nan": (b"NaN", "not_a_number"),
    "infinity": (b"Infinity", "not_a_number"),
    "minus infinity": (b"-Infinity", "not_a_number"),
    "1e400": (b"1e400", "out_of_range"),
    "1e999999999999": (b"1e999999999999", "out_of_range"),
    "40 digits": (b"9" * 40, "out_of_range"),
    "40 decimals": (b"0." + b"7" * 40, "too_many_decimals"),
    "three decimals": (b"1.505", "too_many_decimals"),
    "tail of INCRBYFLOAT": (b"1234.57000000000000006", "residue"),
    "hexadecimal": (b"0x10", "not_a_number"),
    "leading blank": (b" 1", "not_a_number"),
    "trailing newline": (b"1\n", "not_a_number"),
    "plus": (b"+5", "not_a_number"),
    "full-width digits": ("\uff11\uff12".encode(), "not_a_number"),
    "underscore": (b"1_000", "not_a_number"),
    "NUL": (b"1\x00", "not_a_number"),
    "1 MB": (b"1" * 1_048_576, "value_too_large"),
    "not UTF-8": (b"\xff\xfe", "not_a_number"),
    "COPY's NULL": (rb"\N", "not_a_number"),
    "COPY's end": (rb"\.", "not_a_number"),
    "two fields": (b"1\t2", "not_a_number"),
}


async def test_bad_values_are_rejects_and_their_rows_stay(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection, subtests: pytest.Subtests
) -> None:
    sync = engine()
    # Each as the value of a key that has a row, and of one that has none, among good ones.
    await redis.mset({f"balance:{number}": f"{number}.50" for number in range(100)})
    await sync.good()
    before = {number: await version(pg, str(number)) for number in range(len(BAD_VALUES))}
    for number, (value, _) in enumerate(BAD_VALUES.values()):
        await redis.mset({f"balance:{number}": value, f"balance:{1000 + number}": value})
    await redis.mset({"balance:99": "3", "balance:2000": "4"})
    run = await sync.good()

    kept = await sync.rejects()
    for number, (name, (value, reason)) in enumerate(BAD_VALUES.items()):
        with subtests.test(name):
            for key in (number, 1000 + number):
                reject = kept.pop(f"balance:{key}".encode())
                assert (reject.reason, reject.value) == (reason, value[:65_536])
            assert await version(pg, str(number)) == before[number]
            assert (
                await pg.fetchrow("SELECT FROM balances WHERE user_id = $1", 1000 + number) is None
            )
    assert not kept
    counts = run.counts
    assert (counts.scanned, counts.rejected) == (101 + len(BAD_VALUES), 2 * len(BAD_VALUES))
    assert (counts.inserted, counts.updated) == (1, 1)
    # A rejected key is there: its row isn't one without a key.
    assert counts.absent == 0


async def test_values_that_look_bad_and_are_exact(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    values = {"1": "1e2", "2": "1.500", "3": "-0", "4": "007", "5": "150e-2", "6": "0e999999999"}
    await redis.mset({f"balance:{key}": value for key, value in values.items()})
    run = await engine().good()
    assert run.counts.inserted == 6
    assert await rows(pg) == [
        ("1", "100.00"),
        ("2", "1.50"),
        ("3", "0.00"),
        ("4", "7.00"),
        ("5", "1.50"),
        ("6", "0.00"),
    ]


async def test_tails_of_real_increments_with_and_without_tolerance(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    for cents in range(500_000, 500_200):
        await redis.set(f"balance:{cents}", f"{cents / 100:.2f}")
        await redis.incrbyfloat(f"balance:{cents}", 0.1)
    left = {key: await redis.get(f"balance:{key}") or b"" for key in range(500_000, 500_200)}
    tails = {key for key, value in left.items() if len(value) > 8}
    assert 100 < len(tails) < 200

    strict = engine()
    run = await strict.good()
    assert set(await strict.reasons()) == {f"balance:{key}".encode() for key in tails}
    assert set((await strict.reasons()).values()) == {"residue"}
    assert "tolerance" in (await strict.rejects())[f"balance:{min(tails)}".encode()].detail
    assert (run.counts.snapped, run.counts.inserted) == (0, 200 - len(tails))

    lenient = engine({"tolerance": "0.000001"})
    run = await lenient.good()
    assert (run.counts.snapped, run.counts.rejected) == (len(tails), 0)
    assert run.counts.inserted == len(tails)
    found = {row["user_id"]: row["balance"] for row in await pg.fetch("SELECT * FROM balances")}
    assert {key: round(balance * 100) for key, balance in found.items()} == {
        key: key + 10 for key in range(500_000, 500_200)
    }
    assert await lenient.reasons() == {}


async def test_bad_and_odd_text_ids(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    odd = ["tab\tin", "line\nend", "return\rin", "back\\slash", "\\.", "\\N", "ü", "", " ", "a'b"]
    cases = ["Ada", "ada", "ADA"]
    good = {f"balance:{name}".encode(): str(at) for at, name in enumerate([*odd, *cases], 1)}
    bad = {
        b"balance:nul\x00": "nul_byte",
        b"balance:\xff\xfe": "not_utf8",
        b"balance:" + b"x" * 3000: "key_too_long",
    }
    for key in (*good, *bad):
        await redis.set(key, good.get(key, "5"))
    sync = engine(TEXT_IDS)
    run = await sync.good()

    assert await sync.reasons() == bad
    assert (run.counts.inserted, run.counts.rejected) == (len(good), len(bad))
    found = {row["user_id"]: int(row["balance"]) for row in await pg.fetch("TABLE balances")}
    assert found == {name: at for at, name in enumerate([*odd, *cases], 1)}
    assert (await sync.good()).counts.unchanged == len(good)


BAD_IDS = {
    "beyond bigint": (b"balance:9223372036854775808", "out_of_range"),
    "leading zeros": (b"balance:007", "key_syntax"),
    "plus": (b"balance:+7", "key_syntax"),
    "minus zero": (b"balance:-0", "key_syntax"),
    "letters": (b"balance:abc", "key_syntax"),
    "empty": (b"balance:", "key_syntax"),
    "NUL": (b"balance:7\x00", "key_syntax"),
    "newline": (b"balance:7\n", "key_syntax"),
    "full-width digits": ("balance:\uff17".encode(), "key_syntax"),
}


async def test_bad_numeric_ids_touch_no_row(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    sync = engine()
    await redis.set("balance:7", "7")
    await redis.set("balance:9223372036854775807", "1")
    await sync.good()
    before = await version(pg, "7")
    for key, _ in BAD_IDS.values():
        await redis.set(key, "999")
    run = await sync.good()
    assert await sync.reasons() == dict(BAD_IDS.values())
    assert await version(pg, "7") == before
    assert (run.counts.rejected, run.counts.unchanged, run.counts.absent) == (len(BAD_IDS), 2, 0)


async def test_bare_ids_leave_other_keys_alone(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await redis.mset({"123456789": "1", "cache:1": "x", "007": "2", "9223372036854775808": "3"})
    await redis.rpush("queue", "a")
    await redis.rpush("5", "a")
    sync = engine({"key": "{user_id}"})
    run = await sync.good()
    assert await rows(pg) == [("123456789", "1.00")]
    assert await sync.reasons() == {b"5": "wrong_type"}
    assert (run.counts.scanned, run.counts.ignored, run.counts.rejected) == (6, 4, 1)


async def test_upper_case_uuid(engine: MakeEngine, redis: Redis, pg: asyncpg.Connection) -> None:
    lower = "0189abcd-0000-7000-8000-00000000000a"
    await redis.mset({f"balance:{lower}": "1", f"balance:{lower.upper()}": "2"})
    sync = engine(UUID_IDS)
    await sync.good()
    assert await rows(pg) == [(lower, "1.00")]
    assert await sync.reasons() == {f"balance:{lower.upper()}".encode(): "key_syntax"}


async def test_key_that_splits_two_ways(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await redis.mset({"balance:a:eur": "1", "balance:a:b:eur": "2"})
    sync = engine(TWO_KEYS)
    await sync.good()
    assert await rows(pg) == [("a", "eur", "1.00")]
    assert await sync.reasons() == {b"balance:a:b:eur": "key_ambiguous"}


async def test_other_redis_types_where_a_string_is_expected(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    sync = engine()
    await redis.mset({f"balance:{number}": "1" for number in range(1, 6)})
    await sync.good()
    before = [await version(pg, str(number)) for number in range(1, 6)]
    await redis.delete(*(f"balance:{number}" for number in range(1, 6)))
    await redis.rpush("balance:1", "5")
    await redis.hset("balance:2", "balance", "5")
    await redis.sadd("balance:3", "5")
    await redis.zadd("balance:4", {"5": 5})
    await redis.xadd("balance:5", {"balance": "5"})
    run = await sync.good()
    kept = await sync.rejects()
    assert {reject.reason for reject in kept.values()} == {"wrong_type"}
    found = ["list", "hash", "set", "zset", "stream"]
    for number, kind in enumerate(found, 1):
        assert kind in kept[f"balance:{number}".encode()].detail
    assert (run.counts.rejected, run.counts.absent) == (5, 0)
    assert [await version(pg, str(number)) for number in range(1, 6)] == before


async def test_hash_without_the_field(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    mapping = {"type": "hash", "fields": {"balance": "amount"}}
    await redis.hset("balance:1", mapping={"amount": "1.5", "other": "x"})
    await redis.hset("balance:2", "other", "5")
    await redis.hset("balance:3", "amount", "abc")
    await redis.set("balance:4", "4")
    sync = engine(mapping)
    await sync.good()
    assert await rows(pg) == [("1", "1.50")]
    assert await sync.reasons() == {
        b"balance:2": "missing_field",
        b"balance:3": "not_a_number",
        b"balance:4": "wrong_type",
    }


BAD_JSON = {
    b'{"balance": 1': "not_json",
    b"": "not_json",
    b"5": "not_json",
    b"[5]": "not_json",
    b'{"balance": 1e999}': "out_of_range",
    b'{"balance": 0.1000000000000000055}': "residue",
    b'{"balance": 1.505}': "too_many_decimals",
    b'{"balance": NaN}': "not_json",
    b'{"balance": Infinity}': "not_json",
    b'{"balance": true}': "not_a_number",
    b'{"balance": [1]}': "not_a_number",
    b'{"balance": "+5"}': "not_a_number",
    b'{"balance": 1, "balance": 2}': "not_json",
    b'{"balance": null}': "missing_field",
    b"{}": "missing_field",
    b'\xff{"balance": 1}': "not_utf8",
    b"[" * 50_000: "not_json",
}


async def test_bad_json(engine: MakeEngine, redis: Redis, pg: asyncpg.Connection) -> None:
    await redis.mset({f"balance:{at}": text for at, text in enumerate(BAD_JSON)})
    await redis.mset({"balance:100": '{"balance": 12345678901234567.89}', "balance:101": "{}"})
    await redis.set("balance:101", '{"balance": "1.5", "other": {"deep": [1e999]}}')
    sync = engine({"type": "json"})
    await sync.good()
    assert await sync.reasons() == {
        f"balance:{at}".encode(): reason for at, reason in enumerate(BAD_JSON.values())
    }
    assert await rows(pg) == [("100", "12345678901234567.89"), ("101", "1.50")]


class DeletedMeanwhile(Source):
    """A Redis whose key `balance:2` is deleted between its SCAN and its read."""

    url = ""

    def scan(
        self, reading: Reading, *, identity: Identity | None = None
    ) -> AsyncGenerator[RawBatch, None]:
        assert reading.select is not None
        own = reading.select

        def select(keys: list[bytes]) -> list[bytes]:
            # SCAN has answered, and the values of what it answered are about to be asked for.
            with blocking.Redis.from_url(self.url) as client:
                client.delete("balance:2")
            return own(keys)

        return super().scan(replace(reading, select=select), identity=identity)


async def test_key_deleted_between_scan_and_read(
    engine: MakeEngine, redis: Redis, redis_url: str, pg: asyncpg.Connection
) -> None:
    await redis.mset({"balance:1": "1", "balance:2": "2"})
    await engine().good()
    before = await version(pg, "2")
    sync = engine(source=DeletedMeanwhile)
    assert isinstance(sync.source, DeletedMeanwhile)
    sync.source.url = redis_url
    counts = (await sync.good()).counts
    assert (counts.scanned, counts.vanished, counts.unchanged) == (2, 1, 1)
    assert (counts.rejected, counts.absent) == (0, 1)
    assert await version(pg, "2") == before


async def test_ids_that_differ_by_case_only(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await redis.mset({"balance:Bob": "1", "balance:bob": "2"})
    sync = engine(TEXT_IDS)
    await sync.good()
    assert await rows(pg) == [("Bob", "1.00"), ("bob", "2.00")]


async def test_key_returned_twice_with_two_values(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    sync = engine(source=Twice)
    await redis.mset({"balance:1": "1", "balance:2": "1"})
    assert isinstance(sync.source, Twice)
    sync.source.between = lambda: redis.set("balance:2", "2")
    run = await sync.good()
    assert await rows(pg) == [("1", "1.00"), ("2", "2.00")]
    assert (run.counts.scanned, run.counts.inserted) == (2, 2)


async def test_big_hash_of_members(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    mapping = {"type": "hash", "key": "balances", "member": "{user_id}"}
    good = {"1": "1.50", "2": "2"}
    bad = {"3": "x", "4": "1" * 70_000}
    for field, value in {**good, **bad, "007": "1", "b": "2"}.items():
        await redis.hset("balances", field, value)
    sync = engine(mapping)
    run = await sync.good()
    assert await rows(pg) == [("1", "1.50"), ("2", "2.00")]
    assert await sync.reasons() == {b"3": "not_a_number", b"4": "value_too_large"}
    assert (run.counts.scanned, run.counts.ignored) == (6, 2)

    await redis.delete("balances")
    await redis.set("balances", "1")
    assert "balances" in await sync.failed(RunFailed)
    assert await rows(pg) == [("1", "1.50"), ("2", "2.00")]


async def test_big_hash_of_a_wrong_type_fails_its_mapping_alone(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    big = {"name": "big", "key": "big", "type": "hash", "member": "{user_id}", "table": "bigs"}
    made = engine(big, {"name": "strings"})
    await redis.hset("big", "1", "5")
    await redis.set("balance:1", "1")
    await made.good()
    await redis.delete("big")
    await redis.set("big", "oops")
    await redis.set("balance:1", "2")
    said = await made.failed(RunFailed)
    assert said.startswith('mapping "big": the big hash big in Redis at ')
    assert said.endswith(" holds a string")
    assert await pg.fetchval("SELECT balance FROM balances") == 2
    # No success: the guard judges by what it knew before.
    assert await pg.fetchval("SELECT balance FROM bigs") == 5
    await redis.delete("big")
    await redis.hset("big", "1", "6")
    await made.good()
    assert await pg.fetchval("SELECT balance FROM bigs") == 6


async def test_nothing_anywhere_is_a_success_with_a_warning(
    engine: MakeEngine, pg: asyncpg.Connection
) -> None:
    run = await engine().good()
    assert (run.counts.scanned, run.counts.inserted) == (0, 0)
    assert len(run.warnings) == 1
    assert await rows(pg) == []


@pytest.mark.parametrize("command", ["scan", "mget", "type", "dbsize"])
async def test_redis_user_who_may_not(
    engine: MakeEngine, redis: Redis, redis_url: str, pg: asyncpg.Connection, command: str
) -> None:
    # `balance:2` is a list, or nothing would have to be asked for its type.
    await redis.set("balance:1", "1")
    await redis.rpush("balance:2", "1")
    await redis.acl_setuser(
        "limited", True, passwords=["+s3cret"], keys=["*"], commands=["+@all", f"-{command}"]
    )
    try:
        url = urlsplit(redis_url)
        limited = url._replace(netloc=f"limited:s3cret@{url.hostname}:{url.port}").geturl()
        line = await engine(redis={"url": limited}).failed(RightMissing)
    finally:
        await redis.acl_deluser("limited")
    assert command.upper() in line
    assert "s3cret" not in line
    assert await rows(pg) == []


async def test_wrong_redis_password_is_told_without_it(engine: MakeEngine, redis_url: str) -> None:
    url = urlsplit(redis_url)
    wrong = url._replace(netloc=f"nobody:s3cret@{url.hostname}:{url.port}").geturl()
    assert "s3cret" not in await engine(redis={"url": wrong}).failed(ConfigError)


async def test_passwords_that_a_url_must_escape(
    private_postgres: Callable[..., PostgresServer], private_redis: Callable[..., RedisServer]
) -> None:
    password = "p@ss%40/w:rd#?"
    postgres, server = private_postgres(password=password), private_redis(password=password)
    assert password not in postgres.dsn
    sync = Engine(make_config(postgres.dsn, server.url))
    try:
        async with Redis.from_url(server.url) as client:
            await client.set("balance:1", "1")
        assert (await sync.good()).counts.inserted == 1
    finally:
        await sync.close()


async def test_real_balances_to_the_last_wei(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    """The allocation of Ethereum's genesis block: 8,893 balances of up to 26 digits."""
    file = resources.files("balancesync") / "data" / "ethereum-genesis.csv.gz"
    with file.open("rb") as raw, gzip.open(raw, "rt", newline="") as lines:
        balances = {f"balance:{address}": wei for address, wei in list(csv.reader(lines))[1:]}
    assert len(balances) > 8_000
    await redis.mset(balances)
    sync = engine(
        {"columns": {"address": "text", "wei": "numeric(30,0)"}, "key": "balance:{address}"}
    )
    run = await sync.good()
    assert run.counts.inserted == len(balances)
    total = await pg.fetchval("SELECT sum(wei)::text FROM balances")
    assert total == "72009990499480000000000000"
    assert (await sync.verify()).counts.unchanged == len(balances)
