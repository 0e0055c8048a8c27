"""The road back: what PostgreSQL has comes back into Redis, exactly, and nothing else changes."""

import asyncio
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from engine import Engine, make_config
from redis import Redis as BlockingRedis
from redis.asyncio import Redis
from running import processes

from balancesync.embedded import RedisServer
from balancesync.errors import (
    ConfigError,
    HistoryGap,
    LockHeld,
    RedisUnavailable,
    RightMissing,
    RunFailed,
    SourceChanged,
    TargetMismatch,
)
from balancesync.model import Run, new_run_id
from balancesync.part import Progress

Make = Callable[..., Engine]

DAY = timedelta(days=1)

HASH = {
    "key": "account:{user_id}",
    "type": "hash",
    "table": "accounts",
    "columns": {"user_id": "bigint", "amount": "numeric(20,2)", "note": "text"},
    "fields": {"amount": "a"},
}
JSON = {**HASH, "type": "json"}
MEMBER = {"key": "balances", "type": "hash", "member": "{user_id}"}
ACCOUNTS = (
    "CREATE TABLE accounts (user_id bigint PRIMARY KEY, amount numeric(20,2), note text,"
    " synced_at timestamptz)"
)


async def fill(redis: Redis, ids: Iterable[int], value: object = "100.5") -> None:
    await redis.mset({f"balance:{each}": str(value) for each in ids})


async def restored(engine: Engine, **request: Any) -> Run:
    """Execute a restore that has to succeed."""
    run = await engine.sync(job="restore", **request)
    assert (run.status, run.error) == ("succeeded", None)
    counts = run.counts
    parts = (counts.ignored, counts.rejected, counts.inserted, counts.updated, counts.unchanged)
    assert counts.scanned == sum(parts) + counts.kept
    return run


async def agreed(engine: Engine, count: int) -> None:
    """Check that a verify and a dry run of a sync find so many keys and nothing to do."""
    for request in ({"job": "verify", "mode": "verify"}, {"mode": "dry_run"}):
        run = await engine.good(**request)
        assert run.counts.written == 0
        assert (run.counts.scanned, run.counts.unchanged) == (count, count)


async def standing(pg: asyncpg.Connection) -> list[str]:
    rows = await pg.fetch("SELECT mapping FROM balancesync.baselines WHERE refusal IS NOT NULL")
    return [row["mapping"] for row in rows]


# --- what comes back ------------------------------------------------------------------------------


async def test_a_redis_that_was_emptied_gets_everything_back(engine: Make, redis: Redis) -> None:
    await fill(redis, range(5_000))
    made = engine()
    await made.good()
    await redis.flushall()
    assert (await made.sync()).status == "refused"
    run = await restored(made)
    assert run.counts.inserted == run.counts.scanned == 5_000
    assert await redis.dbsize() == 5_000
    await agreed(made, 5_000)
    # The refusal is lifted: a sync goes through, and finds nothing to write.
    assert (await made.good()).counts.unchanged == 5_000


@pytest.mark.parametrize(
    ("kind", "was", "comes"),
    [
        ("smallint", "-32768", "-32768"),
        ("integer", "1e2", "100"),
        ("bigint", "9223372036854775807", "9223372036854775807"),
        ("numeric", "1.500", "1.5"),
        ("numeric", "1e30", "1" + "0" * 30),
        ("numeric", "1e-30", "0." + "0" * 29 + "1"),
        ("numeric(20,2)", "100.00", "100"),
        ("numeric(20,2)", "-0.50", "-0.5"),
        ("numeric(20,2)", "-0", "0"),
        ("text", 'ta\tb\nc\\N "é"', 'ta\tb\nc\\N "é"'),
        ("text", "", ""),
        ("varchar(5)", "häß", "häß"),
        ("uuid", "0DF9B9E6-6E2F-4B3C-9F0A-2F0F3F6C1B11", "0df9b9e6-6e2f-4b3c-9f0a-2f0f3f6c1b11"),
        ("boolean", "1", "true"),
        ("timestamptz", "2026-01-02T03:04:05.600+02:00", "2026-01-02T01:04:05.6Z"),
        ("timestamptz", "0001-01-01T00:00:00Z", "0001-01-01T00:00:00Z"),
    ],
)
async def test_each_type_comes_back_in_its_shortest_exact_form(
    engine: Make, redis: Redis, kind: str, was: str, comes: str
) -> None:
    made = engine({"columns": {"user_id": "bigint", "balance": kind}})
    await redis.set("balance:1", was)
    await made.good()
    # What is there is another way to write the same.
    assert (await restored(made)).counts.unchanged == 1
    assert await redis.get("balance:1") == was.encode()
    await redis.flushall()
    assert (await restored(made)).counts.inserted == 1
    assert await redis.get("balance:1") == comes.encode()
    await agreed(made, 1)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("bigint", "-5"),
        ("numeric", "1.5"),
        ("numeric(20,2)", "100"),
        ("text", 'a:b%\t"\\é'),
        ("uuid", "0df9b9e6-6e2f-4b3c-9f0a-2f0f3f6c1b11"),
        ("boolean", "false"),
        ("timestamptz", "2026-01-02T03:04:05.6Z"),
    ],
)
async def test_keys_of_each_type_come_back_as_they_were(
    engine: Make, redis: Redis, kind: str, text: str
) -> None:
    made = engine(
        {
            "key": "100%:{{x}}:{id}:{n}*",
            "columns": {"id": kind, "n": "integer", "balance": "bigint"},
        }
    )
    key = f"100%:{{x}}:{text}:7*".encode()
    await redis.set(key, "5")
    await made.good()
    await redis.flushall()
    await restored(made)
    assert await redis.keys() == [key]
    await agreed(made, 1)


async def test_hashes_come_back_whole_and_without_nulls(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute(ACCOUNTS)
    await redis.hset("account:1", mapping={"a": "1.50", "note": "x y", "other": "is lost"})
    await redis.hset("account:2", mapping={"a": "2"})
    await redis.hset("account:3", mapping={"other": "is all there was"})
    made = engine(HASH)
    await made.good()
    await redis.flushall()
    assert (await restored(made)).counts.inserted == 2
    assert await redis.hgetall("account:1") == {b"a": b"1.5", b"note": b"x y"}
    assert await redis.hgetall("account:2") == {b"a": b"2"}
    await agreed(made, 2)


async def test_objects_come_back_with_numbers_as_numbers(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute(ACCOUNTS)
    exact = "12345678901234567.89"
    await redis.set("account:1", f'{{"a": "{exact}", "note": "q\\"\\u00e9"}}')
    await redis.set("account:2", '{"a": null}')
    made = engine(JSON)
    await made.good()
    await redis.flushall()
    assert (await restored(made)).counts.inserted == 2
    assert await redis.get("account:1") == f'{{"a":{exact},"note":"q\\"é"}}'.encode()
    assert await redis.get("account:2") == b"{}"
    await agreed(made, 2)


async def test_fields_of_one_big_hash_come_back(engine: Make, redis: Redis) -> None:
    await redis.hset("balances", mapping={str(each): f"{each}.50" for each in range(300)})
    made = engine(MEMBER)
    await made.good()
    await redis.flushall()
    await redis.hset("balances", "7", "8")
    run = await made.sync(job="restore")
    assert (run.counts.inserted, run.counts.kept) == (299, 1)
    assert isinstance(made.failure, RunFailed)
    run = await restored(made, overwrite=True)
    assert (run.counts.updated, run.counts.unchanged) == (1, 299)
    assert await redis.hget("balances", "7") == b"7.5"
    await agreed(made, 300)


async def test_a_table_of_the_application(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    """Rows never written that hold no more than a zero are users who may never have had a key."""
    await pg.execute(
        "CREATE TABLE users (telegram_id bigint UNIQUE, balance bigint DEFAULT 0,"
        " sync_at timestamp, name text NOT NULL DEFAULT 'x')"
    )
    await pg.execute("INSERT INTO users (telegram_id) SELECT generate_series(1, 6)")
    await pg.execute("INSERT INTO users (telegram_id) VALUES (NULL)")
    await pg.execute("UPDATE users SET balance = 50 WHERE telegram_id = 3")
    await pg.execute("UPDATE users SET balance = NULL WHERE telegram_id = 6")
    await redis.mset({"1": "10", "2": "20", "3": "50", "4": "40", "9": "90", "cache:1": "x"})
    users = {
        "key": "{telegram_id}",
        "table": "users",
        "mode": "update",
        "synced_at": "sync_at",
        "columns": {"telegram_id": "bigint", "balance": "bigint"},
    }
    made = engine(users)
    await made.good()
    await redis.set("4", "0")
    await made.good()
    await redis.flushall()
    assert (await restored(made)).counts.inserted == 4
    found = {key: await redis.get(key) for key in await redis.keys()}
    # 3 is as it was before balancesync came; 4 was drained; 5 is new, 6 and NULL hold nothing.
    assert found == {b"1": b"10", b"2": b"20", b"3": b"50", b"4": b"0"}
    await agreed(made, 4)
    # Without synced_at nobody can tell: whatever isn't NULL comes back.
    await redis.flushall()
    assert (await restored(engine({**users, "synced_at": ""}))).counts.inserted == 5


async def test_rows_that_can_be_no_key_are_counted_and_named(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute(
        "CREATE TABLE t (a text, b text, v numeric, synced_at timestamptz, PRIMARY KEY (a, b))"
    )
    await pg.execute(
        "INSERT INTO t VALUES ('x', 'y', 1), ('x:y', 'z', 2), ('p', 'q', 'NaN'), ('tmp', '1', 3)"
    )
    made = engine(
        {
            "key": "k:{a}:{b}",
            "table": "t",
            "ignore": ["k:tmp:*"],
            "columns": {"a": "text", "b": "text", "v": "numeric"},
        }
    )
    run = await restored(made)
    counts = run.counts
    assert (counts.inserted, counts.rejected, counts.ignored) == (1, 2, 1)
    assert await redis.keys() == [b"k:x:y"]
    [warning] = run.warnings
    assert "2 rows can't be keys" in warning
    assert '"k:x:y:z"' in warning


# --- what is there already ------------------------------------------------------------------------


async def test_what_has_another_value_is_kept_and_makes_exit_1(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    await fill(redis, range(10))
    made = engine()
    await made.good()
    await redis.flushall()
    await redis.mset({"balance:1": "7", "balance:2": "100.50", "balance:3": "garbage"})
    await redis.rpush("balance:4", "x")
    assert (await made.sync()).status == "refused"
    run = await made.sync(job="restore")
    assert (run.status, run.counts.inserted, run.counts.unchanged) == ("failed", 6, 1)
    assert run.counts.kept == 3
    assert isinstance(made.failure, RunFailed)
    assert made.failure.exit_code == 1
    assert "3 keys hold another value" in str(made.failure)
    assert "--overwrite" in str(made.failure)
    assert await redis.get("balance:1") == b"7"
    assert await redis.get("balance:3") == b"garbage"
    # Wrong values are still there: the refusal stands.
    assert await standing(pg) == ["balances"]
    await redis.expire("balance:1", 1000)
    run = await made.sync(job="restore", overwrite=True)
    # Not even an order to overwrite destroys what is no balance at all.
    assert (run.status, run.counts.updated, run.counts.kept) == ("failed", 2, 1)
    assert await redis.get("balance:1") == b"100.5"
    assert await redis.ttl("balance:1") > 900
    assert await redis.get("balance:3") == b"100.5"
    assert await redis.lrange("balance:4", 0, -1) == [b"x"]
    await redis.delete("balance:4")
    await restored(made)
    assert await standing(pg) == []


async def test_overwrite_leaves_the_other_fields_of_a_hash(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute(ACCOUNTS)
    await redis.hset("account:1", mapping={"a": "1", "note": "n", "other": "o"})
    await redis.hset("account:2", mapping={"a": "1"})
    made = engine(HASH)
    await made.good()
    await redis.hset("account:1", mapping={"a": "2", "other": "changed"})
    await redis.hdel("account:1", "note")
    await redis.hset("account:2", mapping={"a": "2", "note": "where the row has NULL"})
    run = await made.sync(job="restore", overwrite=True)
    assert (run.counts.updated, run.counts.kept) == (1, 1)
    assert await redis.hgetall("account:1") == {b"a": b"1", b"note": b"n", b"other": b"changed"}
    assert await redis.hget("account:2", "a") == b"2"
    assert "a field where the row has NULL" in str(made.failure)


async def test_overwrite_leaves_the_other_members_of_an_object(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute(ACCOUNTS)
    await redis.set("account:1", '{"a": 1.5}')
    await redis.set("account:2", '{"a": "1.5", "note": "n"}')
    await redis.mset({f"account:{number}": '{"a": 1}' for number in range(3, 7)})
    made = engine(JSON)
    await made.good()
    rest = '"big":12345678901234567890.10,"x":[1.0,{"é":null}],"n":NaN,"y":1,"y":2'
    await redis.set("account:1", f'{{"note":"new",{rest},"a":9}}')
    await redis.set("account:2", '{"a": "9"}')
    # An array has no members that could be set, of two members of one name nobody knows which one
    # is meant, and half a character can't be written back; nor can what is nested too deeply.
    left = {
        "account:3": b"[1]",
        "account:4": b'{"a":2,"a":3}',
        "account:5": b'{"a":2,"other":"\\ud800"}',
        "account:6": b'{"a":2,"other":%b1%b}' % (b"[" * 5_000, b"]" * 5_000),
    }
    await redis.mset(left)
    run = await made.sync(job="restore", overwrite=True)
    assert (run.counts.updated, run.counts.kept) == (2, 4)
    assert "an object that can't be changed in one member alone" in str(made.failure)
    assert await redis.get("account:1") == f'{{"note":null,{rest},"a":1.5}}'.encode()
    # A string stays a string: the application may count on it.
    assert await redis.get("account:2") == b'{"a":"1.5","note":"n"}'
    assert await redis.mget(left) == [*left.values()]


async def test_a_dry_run_writes_nothing_and_shows_what_would_be(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    await fill(redis, range(4))
    made = engine()
    await made.good()
    await redis.delete("balance:0")
    await redis.mset({"balance:1": "7", "balance:2": "garbage"})
    for overwrite in (False, True):
        run = await restored(made, mode="dry_run", overwrite=overwrite)
        counts = run.counts
        assert (counts.inserted, counts.unchanged) == (1, 1)
        assert (counts.updated, counts.kept) == ((2, 0) if overwrite else (0, 2))
        [report] = made.reports
        rows = {op: [(r.key, r.old, r.new) for r in each] for op, each in report.rows.items()}
        assert rows["i"] == [(("0",), (None,), ("100.50",))]
        assert rows["u" if overwrite else "k"] == [
            (("1",), ("7.00",), ("100.50",)),
            (("2",), ('"garbage"',), ("100.50",)),
        ]
        assert len(run.warnings) == (not overwrite)
    assert await redis.exists("balance:0") == 0
    assert await redis.get("balance:1") == b"7"
    # It takes no lock, and leaves no trace that could hold back deletions.
    statuses = await pg.fetch("SELECT mode FROM balancesync.runs WHERE job = 'restore'")
    assert [row["mode"] for row in statuses] == ["dry_run", "dry_run"]


# --- the past -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["upsert", "update"])
async def test_as_of_brings_back_what_was(
    engine: Make, redis: Redis, pg: asyncpg.Connection, mode: str
) -> None:
    await pg.execute(
        "CREATE TABLE balances (user_id bigint PRIMARY KEY, balance numeric(20,2) DEFAULT 0,"
        " synced_at timestamp)"
    )
    if mode == "update":
        await pg.execute("INSERT INTO balances (user_id) SELECT generate_series(1, 5)")
    made = engine({"mode": mode}, history={"enabled": True})
    await redis.mset({"balance:1": "1", "balance:2": "2.5"})
    await made.good()
    moment = await pg.fetchval("SELECT clock_timestamp()")
    await redis.mset({"balance:1": "100", "balance:3": "3"})
    await made.good()
    # Newer values are left, as ever; with overwrite all is as it was.
    run = await made.sync(job="restore", as_of=moment)
    assert (run.status, run.counts.unchanged) == ("failed", 1)
    assert run.counts.kept == (1 if mode == "upsert" else 2)
    await redis.flushall()
    run = await restored(made, as_of=moment)
    assert await redis.mget("balance:1", "balance:2") == [b"1", b"2.5"]
    # Nobody knows any more that 3 had no key: the table had a row for it, which held nothing.
    assert await redis.get("balance:3") == (None if mode == "upsert" else b"0")
    # Not all that the last success knew is back.
    run = await made.good(accept_loss=mode == "upsert")
    assert run.counts.updated == (1 if mode == "upsert" else 2)


async def test_as_of_a_time_that_nobody_knows_is_an_error(engine: Make, redis: Redis) -> None:
    await fill(redis, range(3))
    made = engine(history={"enabled": True})
    await made.good()
    await redis.flushall()
    await made_failed(made, HistoryGap, "the past is known since", as_of=datetime.now(UTC) - DAY)
    await made_failed(made, HistoryGap, "is yet to come", as_of=datetime.now(UTC) + DAY)
    await made_failed(engine(), HistoryGap, "[history] is not enabled", as_of=datetime.now(UTC))
    assert await redis.dbsize() == 0


# --- faults ---------------------------------------------------------------------------------------


def after(engine: Engine, rows: int, strike: Callable[[], object]) -> None:
    """Call `strike` once, when a restore has gone through so many rows."""
    waiting = [strike]

    def on_progress(progress: Progress) -> None:
        if progress.phase == "restore" and progress.done >= rows and waiting:
            waiting.pop()()

    engine.on_progress = on_progress


RETRY = {"attempts": 10, "initial": 0.1, "maximum": 0.1}


@pytest.fixture
async def accounts(
    private_redis: Callable[..., RedisServer], pg: asyncpg.Connection
) -> RedisServer:
    """A table of 3,000 accounts, and a durable Redis without any."""
    await pg.execute(ACCOUNTS)
    await pg.execute(
        "INSERT INTO accounts SELECT n, n, 'note ' || n, now() FROM generate_series(1, 3000) AS n"
    )
    return private_redis({"appendonly": "yes", "appendfsync": "always"})


@pytest.mark.parametrize("shape", [HASH, JSON])
async def test_redis_killed_half_way_has_no_half_record_and_a_retry_completes(
    accounts: RedisServer, postgres_dsn: str, shape: dict[str, Any]
) -> None:
    made = Engine(make_config(postgres_dsn, accounts.url, shape, retry=RETRY))
    seen: list[dict[bytes, dict[bytes, bytes]]] = []

    def strike() -> None:
        accounts.kill()
        accounts.start()
        with BlockingRedis(port=accounts.port) as client:
            found = (
                {key: client.hgetall(key) for key in client.scan_iter()} if shape is HASH else {}
            )
            seen.append(found)

    after(made, 1_000, strike)
    run = await restored(made)
    assert run.attempts > 1
    assert ["restarted or replaced" in warning for warning in run.warnings] == [True]
    assert run.counts.inserted + run.counts.unchanged == 3000
    for fields in seen[0].values():
        assert sorted(fields) == [b"a", b"note"]
    assert (await made.verify()).counts.unchanged == 3000
    await made.close()


async def test_the_first_run_that_meets_another_redis_says_so_be_it_a_restore(
    accounts: RedisServer, postgres_dsn: str
) -> None:
    made = Engine(make_config(postgres_dsn, accounts.url, HASH, retry=RETRY))
    first = await restored(made)
    assert (first.warnings, first.redis_run_id is None) == ([], False)
    accounts.kill()
    accounts.start()
    again = await restored(made)
    assert again.redis_run_id not in (None, first.redis_run_id)
    assert ["restarted or replaced" in warning for warning in again.warnings] == [True]
    run = await made.good()
    assert (run.warnings, run.redis_run_id) == ([], again.redis_run_id)
    await made.close()


async def test_redis_that_stays_away_ends_with_75(accounts: RedisServer, postgres_dsn: str) -> None:
    retry = {"attempts": 2, "initial": 0.1, "maximum": 0.1}
    made = Engine(make_config(postgres_dsn, accounts.url, HASH, retry=retry))
    after(made, 1_000, accounts.kill)
    run = await made.sync(job="restore")
    assert isinstance(made.failure, RedisUnavailable)
    assert (run.status, run.attempts, made.failure.exit_code) == ("failed", 2, 75)
    assert await made.recorded(run) == run
    await made.close()


@pytest.mark.parametrize("far", [100, 2_900])
async def test_a_redis_emptied_on_the_way_is_noticed(
    engine: Make, redis: Redis, redis_url: str, far: int
) -> None:
    await fill(redis, range(3_000))
    made = engine(redis={"max_keys_per_second": 100_000})
    await made.good()
    await redis.flushall()
    client = BlockingRedis.from_url(redis_url)
    after(made, far, client.flushall)
    run = await made.sync(job="restore")
    assert isinstance(made.failure, SourceChanged)
    assert "was emptied by FLUSHALL or FLUSHDB" in str(run.error)
    client.close()


async def test_keys_deleted_on_the_way_are_noticed(
    engine: Make, redis: Redis, redis_url: str
) -> None:
    await fill(redis, range(3_000))
    made = engine(redis={"max_keys_per_second": 100_000})
    await made.good()
    await redis.flushall()
    client = BlockingRedis.from_url(redis_url)
    after(made, 2_900, lambda: client.delete(*client.keys()))
    run = await made.sync(job="restore")
    assert isinstance(made.failure, SourceChanged)
    assert "3,000 were restored" in str(run.error)
    client.close()


async def test_a_part_of_what_is_known_lifts_no_refusal(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    made = engine(history={"enabled": True})
    await fill(redis, range(5))
    await made.good()
    moment = await pg.fetchval("SELECT clock_timestamp()")
    await fill(redis, range(100))
    await made.good()
    await redis.flushall()
    assert (await made.sync()).status == "refused"
    run = await restored(made, as_of=moment)
    [warning] = run.warnings
    assert "5 of 100 known keys are back, so the refusal stands" in warning
    # An application that starts the others from zero isn't followed.
    await redis.mset({f"balance:{number}": "0" for number in range(5, 100)})
    assert (await made.sync()).status == "refused"
    # Those that came back changed are left, and the way on is named.
    run = await made.sync(job="restore")
    assert (run.status, run.counts.kept) == ("failed", 95)
    assert str(run.error).endswith("if Redis is, `balancesync sync --accept-loss`")
    assert (await made.sync()).status == "refused"
    await restored(made, overwrite=True)
    assert (await made.good()).counts.unchanged == 100


async def test_what_an_application_writes_meanwhile_stays(
    accounts: RedisServer, postgres_dsn: str
) -> None:
    """A key that comes up between being missed and being made is the application's."""
    made = Engine(make_config(postgres_dsn, accounts.url, HASH))
    with BlockingRedis(port=accounts.port) as client:
        after(made, 500, lambda: client.hset("account:3000", "a", "7"))
        run = await made.sync(job="restore")
        assert (run.counts.inserted, run.counts.kept) == (2999, 1)
        assert client.hgetall("account:3000") == {b"a": b"7"}
    await made.close()


async def test_a_restore_that_was_killed_is_remembered_and_deletes_nothing(
    postgres_dsn: str, redis_url: str, redis: Redis, pg: asyncpg.Connection, tmp_path: Path
) -> None:
    mapping = {"on_absent": "delete"}
    made = Engine(make_config(postgres_dsn, redis_url, mapping))
    await fill(redis, range(3_000))
    await made.good()
    await redis.flushall()
    async with processes(tmp_path, postgres_dsn, redis_url) as programs:
        file = programs.file(more='[[mapping]]\non_absent = "delete"\n')
        text = file.read_text()
        file.write_text(text.replace("[redis]\n", "[redis]\nmax_keys_per_second = 2000\n"))
        process = await programs.start("restore", file=file)
        async with asyncio.timeout(30):
            while await redis.dbsize() < 1_600:  # noqa: ASYNC110  # Redis tells of no event
                await asyncio.sleep(0.01)
        process.kill()
        await process.communicate()
    # More than half of the keys are there: the guard has nothing against it.
    run = await made.sync()
    async with asyncio.timeout(20):
        while isinstance(made.failure, LockHeld):
            run = await made.sync()
    assert (run.status, run.counts.deleted) == ("succeeded", 0)
    assert run.counts.absent > 0
    assert any("nothing is deleted until its restore has succeeded" in w for w in run.warnings)
    assert await pg.fetchval("SELECT count(*) FROM balances") == 3_000
    rows = await pg.fetch("SELECT status FROM balancesync.runs WHERE job = 'restore'")
    assert [row["status"] for row in rows] == ["interrupted"]
    # Once it has succeeded, rows whose keys are deleted go again.
    await restored(made)
    await redis.delete("balance:1")
    assert (await made.good()).counts.deleted == 1
    await made.close()


async def test_the_last_restore_is_that_of_postgresql_s_clock(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    made = engine({"on_absent": "delete"})
    await fill(redis, range(10))
    await made.good()
    await restored(made)
    # The clock of the process that made this one was ahead.
    ahead = UUID(int=new_run_id().int + (3_600_000 << 80))
    await pg.execute("UPDATE balancesync.runs SET id = $1 WHERE job = 'restore'", ahead)
    await redis.delete(*(f"balance:{number}" for number in range(4)))

    def fail(progress: Progress) -> None:
        if progress.phase == "restore" and progress.done:
            raise ConnectionResetError("the connection is lost")

    made.on_progress = fail
    assert (await made.sync(job="restore")).status == "failed"
    made.on_progress = lambda progress: None
    await redis.delete("balance:0")
    run = await made.good()
    assert (run.counts.deleted, run.counts.absent > 0) == (0, True)
    assert any("nothing is deleted until its restore has succeeded" in w for w in run.warnings)


async def test_no_sync_meets_a_restore(engine: Make, redis: Redis, postgres_dsn: str) -> None:
    await fill(redis, range(10))
    made, other = engine(), engine()
    await made.good()
    met: list[asyncio.Task[Run]] = []
    after(made, 0, lambda: met.append(asyncio.create_task(other.sync())))
    await restored(made)
    await met[0]
    # Either it was told to try again, or it came when all was over.
    assert other.failure is None or isinstance(other.failure, LockHeld)


# --- other Redises, other rights ------------------------------------------------------------------


async def test_what_can_not_be_restored_from(
    engine: Make, redis: Redis, pg: asyncpg.Connection, postgres_dsn: str
) -> None:
    await made_failed(engine(), TargetMismatch, "does not exist: there is nothing to restore from")
    await made_failed(engine(), ConfigError, 'no mapping "x"', mapping="x")


async def made_failed(made: Engine, kind: type[Exception], said: str, **request: Any) -> None:
    run = await made.sync(job="restore", **request)
    assert type(made.failure) is kind
    assert said in str(run.error)


async def test_an_acl_without_the_right_to_write_is_named(
    private_redis: Callable[..., RedisServer], postgres_dsn: str, pg: asyncpg.Connection
) -> None:
    server = private_redis()
    with BlockingRedis(port=server.port) as client:
        rights = ["-@all", "+select", "+info", "+dbsize", "+ping", "+mget", "+type"]
        client.acl_setuser("reader", True, passwords=["+pw"], keys=["*"], commands=rights)
    await pg.execute(
        "CREATE TABLE balances (user_id bigint PRIMARY KEY, balance numeric(20,2),"
        " synced_at timestamptz); INSERT INTO balances VALUES (1, 2)"
    )
    url = server.url.replace("redis://", "redis://reader:pw@")
    made = Engine(make_config(postgres_dsn, url))
    await made_failed(made, RightMissing, "doesn't let this user run SET; ACL SETUSER ... +set")
    await made.close()


READS = (
    "+select +scan +mget +type +exists +pttl +ping +info +dbsize +client|info +client|setname"
    " +hmget +hscan +hexists"
)


@pytest.mark.parametrize("shape", ["string", "hash", "member"])
async def test_the_rights_that_the_docs_name_are_enough(
    engine: Make, private_redis: Callable[..., RedisServer], pg: asyncpg.Connection, shape: str
) -> None:
    mapping, key, rights, more = {
        "string": ({}, "balance:1", "+set", "+get +eval"),
        "hash": (HASH, "account:1", "+hset +eval", "+hget"),
        "member": (MEMBER, "balances", "+hsetnx", "+hget +hset +eval"),
    }[shape]
    server = private_redis()
    await pg.execute(ACCOUNTS)
    await pg.execute(
        "INSERT INTO accounts VALUES (1, 1.5), (2, 2);"
        "CREATE TABLE balances AS SELECT user_id, amount AS balance, synced_at FROM accounts;"
        "ALTER TABLE balances ADD PRIMARY KEY (user_id)"
    )
    made = engine(mapping, redis={"url": server.url.replace("redis://", "redis://writer:pw@")})
    with BlockingRedis(port=server.port) as client:

        def allow(*rights: str) -> None:
            words = f"reset on >pw ~balance* ~account:* -@all {READS} {' '.join(rights)}".split()
            client.execute_command("ACL SETUSER", "writer", *words)

        allow(rights)
        assert (await restored(made)).counts.inserted == 2
        if shape == "string":
            client.set(key, "7")
        else:
            client.hset(key, "a" if shape == "hash" else "1", "7")
        allow(rights, more)
        assert (await restored(made, overwrite=True)).counts.updated == 1
