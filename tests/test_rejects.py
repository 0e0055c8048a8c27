"""Rejects as they're kept: merged, healed, counted; and what a table refuses by itself."""

import asyncio
import sys
from asyncio.subprocess import PIPE
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from engine import Engine
from redis.asyncio import Redis

from balancesync.errors import RunFailed
from balancesync.model import Request, new_run
from balancesync.part import Progress
from balancesync.session import Session

MakeEngine = Callable[..., Engine]
COLUMNS = "user_id bigint PRIMARY KEY, balance numeric(20,2), synced_at timestamptz"


async def kept(pg: asyncpg.Connection) -> dict[str, dict[str, Any]]:
    """Give the table of rejects by key, with what changes when a row is written."""
    rows = await pg.fetch("SELECT *, xmin::text, ctid::text FROM balancesync.rejects")
    return {row["key"].decode(): dict(row) for row in rows}


async def balances(pg: asyncpg.Connection) -> dict[int, str]:
    """Give the balances by id."""
    rows = await pg.fetch("SELECT user_id, balance::text FROM balances ORDER BY user_id")
    return {row["user_id"]: row["balance"] for row in rows}


async def test_a_reject_from_first_to_last(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    sync = engine()
    await redis.mset({"balance:1": "x", "balance:2": "y", "balance:3": "3"})
    first = await sync.good()
    one = await kept(pg)
    assert {key: (row["reason"], row["value"], row["run_id"]) for key, row in one.items()} == {
        "balance:1": ("not_a_number", b"x", first.id),
        "balance:2": ("not_a_number", b"y", first.id),
    }
    assert all(row["healed_at"] is None for row in one.values())
    assert all(row["first_seen"] == row["changed_at"] for row in one.values())

    # Nothing new: not written.
    await sync.good()
    assert await kept(pg) == one

    # Another value: the one row is written, the other isn't.
    await redis.set("balance:2", "1.505")
    third = await sync.good()
    two = await kept(pg)
    assert two["balance:1"] == one["balance:1"]
    changed = two["balance:2"]
    assert (changed["reason"], changed["value"]) == ("too_many_decimals", b"1.505")
    assert changed["first_seen"] == one["balance:2"]["first_seen"]
    assert changed["changed_at"] > one["balance:2"]["changed_at"]
    assert changed["run_id"] == third.id

    # One is good now, one is gone: both healed, and left alone afterwards.
    await redis.set("balance:1", "5")
    await redis.delete("balance:2")
    await sync.good()
    healed = await kept(pg)
    assert all(row["healed_at"] is not None for row in healed.values())
    assert await sync.reasons() == {}
    assert set(await sync.rejects(healed=True)) == {b"balance:1", b"balance:2"}
    await sync.good()
    assert await kept(pg) == healed

    # Bad again: it begins anew.
    await redis.set("balance:1", "x")
    await sync.good()
    again = await kept(pg)
    assert again["balance:1"]["healed_at"] is None
    assert again["balance:1"]["first_seen"] > one["balance:1"]["first_seen"]
    assert again["balance:2"] == healed["balance:2"]
    assert await balances(pg) == {1: "5.00", 3: "3.00"}


async def test_a_thousand_rejects(engine: MakeEngine, redis: Redis, pg: asyncpg.Connection) -> None:
    await redis.mset({f"balance:{number}": f"x{number}" for number in range(1000)})
    await redis.mset({f"balance:{number}": "1" for number in range(1000, 4000)})
    sync = engine()
    run = await sync.good()
    assert (run.counts.scanned, run.counts.rejected, run.counts.inserted) == (4000, 1000, 3000)
    assert set((await sync.reasons()).values()) == {"not_a_number"}
    one = await kept(pg)
    assert len(one) == 1000
    assert (await sync.good()).counts.rejected == 1000
    assert await kept(pg) == one


async def test_one_mapping_s_run_leaves_the_others_rejects(
    engine: MakeEngine, redis: Redis
) -> None:
    await redis.mset({"balance:1": "x", "bonus:1": "y"})
    bonus = {"name": "bonus", "key": "bonus:{user_id}", "table": "bonus"}
    sync = engine({}, bonus)
    await sync.good()
    await redis.mset({"balance:1": "1", "bonus:1": "1"})
    await sync.good(mapping="bonus")
    assert await sync.reasons() == {b"balance:1": "not_a_number"}


async def test_dry_run_and_verify_keep_none(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    sync = engine()
    await redis.mset({"balance:1": "1", "balance:2": "x"})
    await sync.good()
    before = await kept(pg)
    await redis.mset({"balance:1": "y", "balance:2": "2"})
    for mode in ({"mode": "dry_run"}, {"job": "verify", "mode": "verify"}):
        assert (await sync.good(**mode)).counts.rejected == 1
        assert await kept(pg) == before


async def test_more_rejects_than_the_guard_allows(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    """The good ones are applied and the bad ones kept, but it's no success."""
    sync = engine(guard={"max_rejects": 0.1}, schedule={"min_interval": 3600})
    await redis.mset({f"balance:{number}": "1" for number in range(9)})
    await redis.set("balance:9", "x")
    # One of ten is a tenth, and not more.
    success = await sync.good()

    await redis.mset({"balance:0": "2", "balance:8": "x"})
    line = await sync.failed(RunFailed)
    assert "2 of 10" in line
    assert "guard.max_rejects = 0.1" in line
    assert sync.failure is not None
    assert sync.failure.exit_code == 1
    assert (await balances(pg))[0] == "2.00"
    assert len(await sync.reasons()) == 2
    async with sync.database.acquire() as connection:
        newest = (await sync.records.runs(connection, limit=1))[0]
        last = await sync.records.last_success(connection)
    assert (newest.status, newest.error) == ("failed", line)
    assert (newest.counts.updated, newest.counts.rejected) == (1, 2)
    assert newest.counts.scanned == newest.counts.seen == 10
    assert newest.finished_at is not None
    assert last == success
    baseline = await pg.fetchval("SELECT (present, absent)::text FROM balancesync.baselines")
    assert baseline == "(10,0)"


TRIGGERS = {
    "raises": "RAISE EXCEPTION 'no %', NEW.user_id;",
    "raises with a code of its own": "RAISE EXCEPTION 'no' USING ERRCODE = '45000';",
    "asserts": "ASSERT NEW.user_id <> 500, 'no';",
    "divides by zero": "NEW.balance := 1 / 0;",
    "finds too many rows": "SELECT 1 INTO STRICT NEW.balance FROM generate_series(1, 2);",
    "calls what isn't there": "PERFORM not_there(NEW.balance);",
}


@pytest.mark.parametrize("body", TRIGGERS.values(), ids=TRIGGERS)
async def test_row_that_a_trigger_refuses(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection, body: str
) -> None:
    await pg.execute(
        f"CREATE TABLE balances ({COLUMNS});"
        f" CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$BEGIN IF NEW.user_id = 500 THEN {body} END IF; RETURN NEW; END$$;"
        " CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON balances"
        " FOR EACH ROW EXECUTE FUNCTION refuse()"
    )
    await redis.mset({f"balance:{number}": "1" for number in range(1000)})
    sync = engine(postgres={"apply_batch": 300})
    run = await sync.good()
    assert (run.counts.inserted, run.counts.rejected) == (999, 1)
    assert set(await balances(pg)) == set(range(1000)) - {500}
    assert await sync.reasons() == {b"balance:500": "refused_by_table"}


async def test_rows_that_constraints_refuse(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute(
        f"CREATE TABLE balances ({COLUMNS}, CHECK (balance >= 0), EXCLUDE (balance WITH =));"
        " INSERT INTO balances VALUES (1, 1, NULL), (2, 2, NULL), (3, 3, NULL)"
    )
    # To insert and to update, below zero and what another row has already.
    await redis.mset({"balance:1": "-1", "balance:2": "3", "balance:3": "30"})
    await redis.mset({"balance:4": "-4", "balance:5": "2", "balance:6": "60"})
    sync = engine()
    run = await sync.good()
    assert await balances(pg) == {1: "1.00", 2: "2.00", 3: "30.00", 6: "60.00"}
    rejects = await sync.rejects()
    assert {key: reject.value for key, reject in rejects.items()} == {
        b"balance:1": b"-1",
        b"balance:2": b"3",
        b"balance:4": b"-4",
        b"balance:5": b"2",
    }
    assert {reject.reason for reject in rejects.values()} == {"refused_by_table"}
    assert "balances_balance_check" in rejects[b"balance:1"].detail
    counts = run.counts
    assert (counts.scanned, counts.inserted, counts.updated, counts.rejected) == (6, 1, 1, 4)

    await redis.mset({"balance:1": "10", "balance:2": "20"})
    await redis.delete("balance:4")
    run = await sync.good()
    assert await sync.reasons() == {b"balance:5": "refused_by_table"}
    assert (run.counts.updated, run.counts.unchanged, run.counts.rejected) == (2, 2, 1)


async def test_a_unique_column_that_isn_t_the_key(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    mapping = {
        "type": "hash",
        "columns": {"user_id": "bigint", "balance": "bigint", "card": "text"},
    }
    await pg.execute(
        "CREATE TABLE balances (user_id bigint PRIMARY KEY, balance bigint, card text UNIQUE,"
        " synced_at timestamptz)"
    )
    for number, card in enumerate(["a", "b", "a", "c"], 1):
        await redis.hset(f"balance:{number}", "balance", "1")
        await redis.hset(f"balance:{number}", "card", card)
    sync = engine(mapping)
    run = await sync.good()
    assert (run.counts.inserted, run.counts.rejected) == (3, 1)
    assert await sync.reasons() == {b"balance:3": "refused_by_table"}
    assert (await sync.rejects())[b"balance:3"].value == b"1\ta"


async def test_row_that_may_not_be_deleted(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    """It's no key of Redis, so none of those that were scanned."""
    sync = engine({"on_absent": "delete"})
    await redis.mset({f"balance:{number}": "1" for number in range(10)})
    await sync.good()
    await pg.execute(
        "CREATE TABLE orders (user_id bigint REFERENCES balances); INSERT INTO orders VALUES (8)"
    )
    await redis.delete("balance:8", "balance:9")
    run = await sync.good()
    assert set(await balances(pg)) == set(range(9))
    counts = run.counts
    assert (counts.scanned, counts.unchanged, counts.rejected) == (8, 8, 0)
    assert (counts.absent, counts.deleted) == (2, 1)
    assert any("orders" in warning and "balance:8" in warning for warning in run.warnings)
    assert await sync.reasons() == {}


async def test_table_that_refuses_everything(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute(f"CREATE TABLE balances ({COLUMNS}, CHECK (balance < 0))")
    await redis.mset({f"balance:{number}": "1" for number in range(1500)})
    sync = engine(guard={"max_rejects": 0.1})
    assert "1,500 of 1,500 keys are rejects" in await sync.failed(RunFailed)
    assert await balances(pg) == {}
    assert len(await sync.reasons()) == 1500


async def test_refused_rows_count_once_in_a_run_of_two_attempts(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute(f"CREATE TABLE balances ({COLUMNS}, CHECK (balance >= 0))")
    await redis.mset({f"balance:{number}": "1" for number in range(20)})
    await redis.set("balance:0", "-1")
    sync = engine(postgres={"apply_batch": 5}, retry={"attempts": 2, "initial": 0.1})
    failed = False

    def fail_once(progress: Progress) -> None:
        nonlocal failed
        if progress.phase == "apply" and progress.done > 5 and not failed:
            failed = True
            raise ConnectionResetError("the connection is lost")

    sync.on_progress = fail_once
    run = await sync.good()
    assert failed
    assert run.attempts == 2
    counts = run.counts
    assert (counts.scanned, counts.inserted, counts.rejected, counts.unchanged) == (20, 19, 1, 0)


PEAK = """
import pathlib, sys
from balancesync import cli
code = cli.main(["sync", "--config", sys.argv[1]])
status = pathlib.Path("/proc/self/status").read_text()
print("peak", next(line.split()[1] for line in status.splitlines() if "VmHWM" in line), code)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the peak of memory")
async def test_many_rejects_fill_neither_memory_nor_log(
    redis_url: str, postgres_dsn: str, redis: Redis, pg: asyncpg.Connection, tmp_path: Path
) -> None:
    """25,000 of a kilobyte: what is held of each would show as 25 MB and more."""
    file = tmp_path / "config.toml"
    file.write_text(
        f'[redis]\nurl = "{redis_url}"\n[postgres]\ndsn = "{postgres_dsn}"\n'
        "[guard]\nmax_rejects = 1.0\n"
    )

    async def sync() -> tuple[int, int]:
        """Peak of memory in kilobytes, and the lines of the log."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", PEAK, str(file)), stdout=PIPE, stderr=PIPE
        )
        out, err = await process.communicate()
        _, peak, code = out.decode().splitlines()[-1].split()
        assert code == "0", err
        return int(peak), len(err.splitlines())

    await redis.mset({f"balance:{number}": "x" for number in range(1_000)})
    few, _ = await sync()
    for begin in range(0, 25_000, 1_000):
        keys = range(begin, begin + 1_000)
        await redis.mset({f"balance:{number}": "x" * 1_000 for number in keys})
    many, lines = await sync()
    assert await pg.fetchval("SELECT count(*) FROM balancesync.rejects") == 25_000
    assert many - few < 15_000
    assert lines < 120


MANY = 30_000


async def test_what_live_mode_does_for_each_of_many_keys_costs_each_the_same(
    engine: MakeEngine, pg: asyncpg.Connection
) -> None:
    """Held each against each they would take minutes, and PostgreSQL cuts such a statement off."""
    sync = engine(postgres={"timeout": 20.0})
    await sync.good()
    session = await Session.open(sync.database)
    try:
        connection = session.connection
        await session.prepare()
        await session.plan_by_index()
        run = new_run(Request("live", "live"))
        await sync.records.begin(connection, run)
        keys = [b"balance:x%d" % number for number in range(MANY)]
        read = {"balances": keys}

        async def merge(value: bytes, rejected: list[bytes]) -> None:
            await connection.copy_records_to_table(
                "staged_rejects",
                schema_name="pg_temp",
                records=[("balances", key, value, "not_a_number", "no") for key in rejected],
                columns=["mapping", "key", "value", "reason", "detail"],
            )
            at = await session.clock()
            await sync.records.merge_keyed_rejects(connection, run, at, read, staged=True)

        def count(value: bytes) -> Any:
            sql = "SELECT count(*) FROM balancesync.rejects WHERE value = $1 AND healed_at IS NULL"
            return pg.fetchval(sql, value)

        # New ones, the same again, others of the same keys, and half of them no more.
        for value, rejected in ((b"x", keys), (b"x", keys), (b"y", keys), (b"y", keys[1::2])):
            await merge(value, rejected)
            assert await count(value) == len(rejected)
        await merge(b"y", [])
        assert await count(b"y") == 0

        texts = [(str(number),) for number in range(MANY)]
        await sync.records.record_pruned(connection, "balances", run.id, texts)
        pruned = await sync.records.pruned(connection, "balances", [*texts[1:], ("x",)])
        assert set(pruned) == set(texts[1:])
        await sync.records.withdraw_pruned(connection, "balances", texts[1:])
        assert await pg.fetchval("SELECT array_agg(key) FROM balancesync.pruned") == [["0"]]
        assert await pg.fetchval("SELECT pruned FROM balancesync.baselines") == 1
    finally:
        await session.close()
