"""What a run counts, over distinct keys, and which runs are remembered as the last success."""

from collections.abc import Callable
from typing import Any, cast

import asyncpg
import pytest
from engine import Engine, Twice
from redis.asyncio import Redis

from balancesync.errors import ConfigError, RunFailed, SourceChanged, TargetMismatch
from balancesync.model import Counts, Run
from balancesync.part import Progress
from balancesync.source import Source
from balancesync.target import Writer

MakeEngine = Callable[..., Engine]


def nonzero(counts: Counts) -> dict[str, int]:
    """Give the counts that aren't 0, without `scanned`, once that is their sum."""
    assert counts.scanned == (
        counts.ignored
        + counts.vanished
        + counts.rejected
        + counts.inserted
        + counts.updated
        + counts.unchanged
        + counts.not_found
    )
    return {name: count for name, count in counts.as_dict().items() if count and name != "scanned"}


async def total(pg: asyncpg.Connection, table: str = "balances") -> str:
    """Give the sum of the balances."""
    found: str = await pg.fetchval(f"SELECT coalesce(sum(balance), 0)::text FROM {table}")
    return found


async def last_success(sync: Engine) -> Run | None:
    async with sync.database.acquire() as connection:
        return await sync.records.last_success(connection)


async def test_every_count(engine: MakeEngine, redis: Redis, pg: asyncpg.Connection) -> None:
    sync = engine({"ignore": ["balance:9*"], "tolerance": "0.000001", "on_absent": "delete"})
    await redis.mset({f"balance:{number}": "1" for number in range(10, 40)})
    assert nonzero((await sync.good()).counts) == {"inserted": 30}

    await redis.mset({f"balance:{number}": "2" for number in range(10, 15)})
    await redis.mset({f"balance:{number}": "x" for number in range(15, 18)})
    await redis.mset({"balance:50": "5", "balance:51": "x", "balance:7x": "1"})
    await redis.mset({"balance:90": "5", "balance:91": "x"})
    await redis.set("balance:52", "1.5700000000000006")
    await redis.delete("balance:38", "balance:39")
    expected = {
        "ignored": 2,
        "rejected": 5,
        "snapped": 1,
        "inserted": 2,
        "updated": 5,
        "unchanged": 20,
        "absent": 2,
        "deleted": 2,
    }
    # Dry run and verify give the counts that would be.
    assert nonzero((await sync.good(mode="dry_run")).counts) == expected
    assert nonzero((await sync.verify()).counts) == expected
    assert await total(pg) == "30.00"
    run = await sync.good()
    assert nonzero(run.counts) == expected
    assert run.counts.scanned == 34
    assert await total(pg) == "39.57"
    again = {"ignored": 2, "rejected": 5, "snapped": 1, "unchanged": 27}
    assert nonzero((await sync.good()).counts) == again


async def test_counts_of_update_mode(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute(
        "CREATE TABLE balances (user_id bigint PRIMARY KEY, balance numeric(20,2),"
        " synced_at timestamptz);"
        " INSERT INTO balances SELECT n, 1, NULL FROM generate_series(1, 10) AS n"
    )
    await redis.mset({f"balance:{number}": "1" for number in range(6, 16)})
    await redis.mset({"balance:6": "2", "balance:7": "x"})
    sync = engine({"mode": "update"})
    expected = {"not_found": 5, "unchanged": 3, "updated": 1, "rejected": 1, "absent": 5}
    assert nonzero((await sync.good(mode="dry_run")).counts) == expected
    assert nonzero((await sync.good()).counts) == expected
    assert await total(pg) == "11.00"
    again = {"not_found": 5, "unchanged": 4, "rejected": 1, "absent": 5}
    assert nonzero((await sync.verify()).counts) == again
    assert nonzero((await sync.good()).counts) == again


async def test_counts_add_up_over_mappings(engine: MakeEngine, redis: Redis) -> None:
    bonus = {"name": "bonus", "key": "bonus:{user_id}", "table": "bonus"}
    await redis.mset({"balance:1": "1", "balance:2": "x", "bonus:1": "1", "bonus:2": "2"})
    run = await engine({}, bonus).good()
    assert nonzero(run.mappings["balances"]) == {"inserted": 1, "rejected": 1}
    assert nonzero(run.mappings["bonus"]) == {"inserted": 2}
    assert nonzero(run.counts) == {"inserted": 3, "rejected": 1}


async def test_nothing_changed_writes_nothing(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    sync = engine()
    await redis.mset({f"balance:{number}": "1.10" for number in range(2000)})
    await sync.good()
    rows = "SELECT array_agg(ctid::text || xmin::text ORDER BY user_id) FROM balances"
    before = await pg.fetchval(rows)
    await redis.mset({f"balance:{number}": "1.1000" for number in range(2000)})
    assert nonzero((await sync.good()).counts) == {"unchanged": 2000}
    assert await pg.fetchval(rows) == before


# --- keys that SCAN returns twice -----------------------------------------------------------------

# What the key holds at the first reading and at the second, None for nothing; then what its row
# holds in the end (0: what it held before), and its counts.
TWICE: dict[str, tuple[str | None, str | None, str | None, dict[str, int]]] = {
    "the same": ("5", "5", "5.00", {"updated": 1}),
    "two values": ("5", "6", "6.00", {"updated": 1}),
    "changed back": ("5", "0", "0.00", {"unchanged": 1}),
    "good, then bad": ("5", "x", "0.00", {"rejected": 1}),
    "bad, then good": ("x", "5", "5.00", {"updated": 1}),
    "bad, then as the row is": ("x", "0", "0.00", {"unchanged": 1}),
    "bad, then bad otherwise": ("x", "1.505", "0.00", {"rejected": 1}),
}


@pytest.mark.parametrize("joined", [False, True], ids=["two batches", "one batch"])
@pytest.mark.parametrize("case", TWICE.values(), ids=TWICE)
async def test_key_that_scan_returns_twice(
    engine: MakeEngine,
    redis: Redis,
    pg: asyncpg.Connection,
    case: tuple[str, str, str, dict[str, int]],
    joined: bool,
) -> None:
    first, second, row, counts = case
    await redis.mset({"balance:1": "0", "balance:2": "0", "balance:3": "0"})
    sync = engine(source=Twice)
    source = cast(Twice, sync.source)
    source.joined = joined
    source.between = lambda: redis.set("balance:2", second)
    await redis.set("balance:2", "0")
    await engine().good()

    await redis.set("balance:2", first)
    run = await sync.good()
    others = {"unchanged": 2}
    assert nonzero(run.counts) == {
        name: counts.get(name, 0) + others.get(name, 0) for name in {*counts, *others}
    }
    assert run.counts.scanned == 3
    assert await pg.fetchval("SELECT balance::text FROM balances WHERE user_id = 2") == row
    kept = await sync.rejects()
    if "rejected" in counts:
        assert {key: reject.value for key, reject in kept.items()} == {
            b"balance:2": second.encode()
        }
    else:
        assert kept == {}


async def test_many_duplicates_of_composite_keys(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    """Key columns of every form that SQL has to print again for the rejects to be found."""
    mapping = {
        "key": "b:{at}|{name}|{n}",
        "columns": {"at": "timestamptz", "name": "text", "n": "numeric(10,3)", "balance": "bigint"},
    }
    keys = [
        f"b:2026-01-0{day}T03:04:05{part}Z|{name}|{number}"
        for day in (1, 2)
        for part in ("", ".5", ".000001")
        for name in ("a", "tab\t\\", "\u00fc")
        for number in ("0", "-1.5", "100")
    ]
    sync = engine(mapping, source=Twice)
    source = cast(Twice, sync.source)
    await redis.mset(dict.fromkeys(keys, "x"))
    source.between = lambda: redis.mset(dict.fromkeys(keys[:-1], "7"))
    run = await sync.good()
    assert nonzero(run.counts) == {"inserted": len(keys) - 1, "rejected": 1}
    assert await sync.reasons() == {keys[-1].encode(): "not_a_number"}
    assert await total(pg) == str(7 * (len(keys) - 1))


async def test_rejects_without_a_row_count_once(engine: MakeEngine, redis: Redis) -> None:
    await redis.mset({"balance:007": "1", "balance:x": "1", "balance:1": "1"})
    sync = engine(source=Twice)
    cast(Twice, sync.source).between = redis.ping
    run = await sync.good()
    assert nonzero(run.counts) == {"inserted": 1, "rejected": 2}
    assert run.counts.scanned == 3


# --- rows that move while a run applies -----------------------------------------------------------


async def test_row_inserted_by_another_since_the_diff(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    """A slice that meets it is done again; nobody's row is lost or doubled."""
    await pg.execute(
        "CREATE TABLE balances (user_id bigint PRIMARY KEY, balance numeric(20,2),"
        " synced_at timestamptz);"
        # The first row that the engine inserts brings another along that it was about to insert.
        " CREATE FUNCTION another() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN"
        " IF NEW.user_id = 1 AND pg_trigger_depth() = 1 THEN"
        " INSERT INTO balances VALUES (2, 77, NULL), (3, 3, NULL); END IF; RETURN NEW; END$$;"
        " CREATE TRIGGER another BEFORE INSERT ON balances"
        " FOR EACH ROW EXECUTE FUNCTION another()"
    )
    await redis.mset({f"balance:{number}": f"{number}" for number in range(1, 6)})
    sync = engine(postgres={"apply_batch": 1})
    run = await sync.good()
    # 2 had another value, and 3 was the very same.
    assert nonzero(run.counts) == {"inserted": 4, "unchanged": 1}
    assert await total(pg) == "15.00"
    assert nonzero((await sync.good()).counts) == {"unchanged": 5}


async def test_row_gone_since_the_diff(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    sync = engine({"mode": "update"}, postgres={"apply_batch": 1})
    await redis.mset({"balance:1": "1", "balance:2": "2"})
    await pg.execute(
        "CREATE TABLE balances (user_id bigint PRIMARY KEY, balance numeric(20,2),"
        " synced_at timestamptz); INSERT INTO balances VALUES (1, 0), (2, 0);"
        " CREATE FUNCTION gone() RETURNS trigger LANGUAGE plpgsql AS"
        " $$BEGIN DELETE FROM balances WHERE user_id = 2; RETURN NEW; END$$;"
        " CREATE TRIGGER gone AFTER UPDATE ON balances FOR EACH ROW EXECUTE FUNCTION gone()"
    )
    assert nonzero((await sync.good()).counts) == {"updated": 1, "not_found": 1}


# --- attempts -------------------------------------------------------------------------------------


async def test_second_attempt_counts_what_the_first_committed(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    retry = {"attempts": 3, "initial": 0.1}
    sync = engine({"on_absent": "delete"}, postgres={"apply_batch": 10}, retry=retry)
    await redis.mset({f"balance:{number}": "1" for number in range(100)})
    await sync.good()
    await redis.mset({f"balance:{number}": "2" for number in range(50)})
    await redis.delete(*(f"balance:{number}" for number in range(70, 100)))
    await redis.mset({f"balance:{number}": "3" for number in range(200, 230)})
    cuts = [45, 95]

    def cut(progress: Progress) -> None:
        if progress.phase == "apply" and cuts and progress.done >= cuts[0] % 50:
            cuts.pop(0)
            raise SourceChanged

    sync.on_progress = cut
    run = await sync.good()
    assert run.attempts == 3
    assert nonzero(run.counts) == {
        "inserted": 30,
        "updated": 50,
        "unchanged": 20,
        "absent": 30,
        "deleted": 30,
    }
    assert await pg.fetchval("SELECT (present, absent)::text FROM balancesync.baselines") == (
        "(100,0)"
    )


class Broken(Source):
    """A Redis in which `between` happens after the first attempt, before the second one reads."""

    between: Callable[[], Any]
    attempts = 0

    async def listen(self) -> None:
        self.attempts += 1
        if self.attempts == 2:
            await self.between()
        await super().listen()


def break_off(sync: Engine, done: int, between: Callable[[], Any]) -> None:
    """Have the first attempt end behind `done` committed rows."""
    source = cast(Broken, sync.source)
    source.attempts, source.between = 0, between

    def cut(progress: Progress) -> None:
        if progress.phase == "apply" and progress.done >= done and source.attempts == 1:
            raise SourceChanged

    sync.on_progress = cut


SYNCED_AT = {
    "with a zone": "synced_at timestamptz",
    "without a zone": "synced_at timestamp",
}


@pytest.mark.parametrize("column", SYNCED_AT.values(), ids=SYNCED_AT)
@pytest.mark.parametrize("keep", [False, True], ids=["", "history"])
async def test_what_becomes_of_a_row_in_two_attempts_counts_once(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection, column: str, keep: bool
) -> None:
    """Each thing that can happen to a row that an earlier attempt wrote, beside rows that stay."""
    await pg.execute(
        f"CREATE TABLE balances (user_id bigint PRIMARY KEY, balance numeric(20,2), {column},"
        " CHECK (balance < 1000))"
    )
    sync = engine(
        {"on_absent": "delete"},
        postgres={"apply_batch": 8},
        retry={"attempts": 2, "initial": 0.1},
        history={"enabled": keep},
        source=Broken,
    )
    await redis.mset({f"balance:{number}": "1" for number in range(100)})
    await sync.good()
    await redis.mset({f"balance:{number}": "2" for number in range(12)})

    async def between() -> None:
        # Of the eight that were updated: written again, as before, bad, refused, and gone.
        await redis.mset({"balance:0": "3", "balance:1": "3", "balance:2": "1"})
        await redis.mset({"balance:4": "x", "balance:5": "2000"})
        await redis.delete("balance:6")

    break_off(sync, 8, between)
    run = await sync.good()
    assert run.attempts == 2
    assert nonzero(run.counts) == {
        "updated": 9,
        "rejected": 2,
        "unchanged": 88,
        "absent": 1,
        "deleted": 1,
    }
    assert run.counts.scanned == 99


async def test_a_row_that_one_attempt_inserts_and_the_next_updates_is_inserted(
    engine: MakeEngine, redis: Redis
) -> None:
    sync = engine(postgres={"apply_batch": 4}, retry={"attempts": 2, "initial": 0.1}, source=Broken)
    await redis.mset({f"balance:{number}": "1" for number in range(10, 20)})
    await sync.good()
    await redis.mset({f"balance:{number}": "2" for number in range(8)})
    break_off(sync, 4, lambda: redis.mset({"balance:0": "3", "balance:12": "4"}))
    run = await sync.good()
    assert run.attempts == 2
    assert nonzero(run.counts) == {"inserted": 8, "updated": 1, "unchanged": 9}


async def test_rows_updated_twice_in_update_mode_count_once(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute(
        "CREATE TABLE balances (user_id bigint PRIMARY KEY, balance numeric(20,2),"
        " synced_at timestamptz); INSERT INTO balances SELECT n, 1 FROM generate_series(1, 20) AS n"
    )
    sync = engine(
        {"mode": "update"},
        postgres={"apply_batch": 2},
        retry={"attempts": 2, "initial": 0.1},
        source=Broken,
    )
    await redis.mset({f"balance:{number}": "1" for number in range(1, 26)})
    await redis.mset({f"balance:{number}": "2" for number in range(1, 7)})

    async def between() -> None:
        await redis.mset({"balance:1": "3"})
        await pg.execute("DELETE FROM balances WHERE user_id = 2")

    break_off(sync, 2, between)
    run = await sync.good()
    assert run.attempts == 2
    assert nonzero(run.counts) == {"updated": 5, "unchanged": 14, "not_found": 6}


async def test_attempts_that_all_fail(engine: MakeEngine, redis: Redis) -> None:
    await redis.set("balance:1", "1")
    sync = engine(retry={"attempts": 3, "initial": 0.1})

    def fail(progress: Progress) -> None:
        raise SourceChanged

    sync.on_progress = fail
    await sync.failed(SourceChanged)
    async with sync.database.acquire() as connection:
        runs = await sync.records.runs(connection)
    assert [(run.status, run.attempts) for run in runs] == [("failed", 3)]


# --- runs and the last success --------------------------------------------------------------------


async def test_runs_are_recorded_as_they_were(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    await redis.mset({"balance:1": "1", "balance:2": "x"})
    sync = engine()
    good = await sync.good(trigger="cron:hourly")
    verified = await sync.verify()
    dry = await sync.good(mode="dry_run")
    await redis.set("balance:1", "2")
    await pg.execute("ALTER TABLE balances RENAME COLUMN balance TO b")
    await sync.failed(TargetMismatch)
    async with sync.database.acquire() as connection:
        failed, *runs = await sync.records.runs(connection)
    assert runs == [dry, verified, good]
    assert (failed.status, failed.mappings) == ("failed", {})
    assert failed.error == str(sync.failure)
    assert good.duration_s is not None
    assert good.finished_at is not None
    assert 0 < good.duration_s < 30
    assert good.started_at < good.finished_at
    assert good.redis_run_id == dry.redis_run_id
    assert good.redis_run_id is not None
    assert len(good.redis_run_id) == 40
    ids = [run.id for run in (good, verified, dry, failed)]
    assert ids == sorted(ids)
    assert {run_id.version for run_id in ids} == {7}
    assert (good.trigger, good.job, verified.job) == ("cron:hourly", "sync", "verify")


async def test_what_is_the_last_success(engine: MakeEngine, redis: Redis) -> None:
    bonus = {"name": "bonus", "key": "bonus:{user_id}", "table": "bonus"}
    sync = engine({}, bonus, guard={"max_rejects": 0.5})
    await redis.mset({"balance:1": "1", "bonus:1": "1"})
    await sync.good(mode="dry_run")
    await sync.good(mapping="bonus")
    await sync.good(mapping="balances")
    assert await last_success(sync) is None

    first = await sync.good()
    assert await last_success(sync) == first
    await sync.good(mapping="bonus")
    await sync.verify()
    await sync.good(mode="dry_run")
    await redis.mset({"balance:1": "x", "bonus:1": "x"})
    await sync.failed(RunFailed)
    assert await last_success(sync) == first

    await redis.set("balance:1", "2")
    assert await last_success(sync) == first
    second = await sync.good()
    assert await last_success(sync) == second


async def test_min_interval(engine: MakeEngine, redis: Redis, pg: asyncpg.Connection) -> None:
    sync = engine(schedule={"min_interval": 3600})
    await redis.set("balance:1", "1")
    # The first of all isn't too early.
    await sync.good(force=False)
    await redis.set("balance:1", "2")
    skipped = await sync.sync(force=False)
    assert (skipped.status, skipped.error, sync.failure) == ("skipped", None, None)
    assert "schedule.min_interval = 3600" in skipped.warnings[0]
    assert await total(pg) == "1.00"
    await sync.good()
    assert await total(pg) == "2.00"

    # Measured from start to start, and by the last success alone.
    await redis.set("balance:1", "3")
    await pg.execute("UPDATE balancesync.runs SET started_at = started_at - interval '1 hour'")
    run = await sync.good(force=False)
    assert await last_success(sync) == run
    assert await total(pg) == "3.00"


async def test_a_success_of_the_future_holds_up_nothing_for_long(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    sync = engine(schedule={"min_interval": 1800})
    await redis.set("balance:1", "1")
    await sync.good()
    await pg.execute("UPDATE balancesync.runs SET started_at = started_at + interval '1 hour'")
    await sync.good(force=False)


async def test_mapping_that_isn_t_there(engine: MakeEngine) -> None:
    assert '"other"' in await engine().failed(ConfigError, mapping="other")


# --- reports --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["dry_run", "verify"])
async def test_report_of_what_would_be(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection, mode: str
) -> None:
    sync = engine({"on_absent": "delete"})
    await redis.mset({f"balance:{number}": "1" for number in range(100)})
    await sync.good()
    await redis.mset({"balance:5": "3.5", "balance:6": "x", "balance:200": "7"})
    await redis.delete("balance:98", "balance:99")
    job = "verify" if mode == "verify" else "sync"
    run = await sync.good(job=job, mode=mode)
    assert (run.counts.inserted, run.counts.updated, run.counts.deleted) == (1, 1, 2)
    [report] = sync.reports
    found: dict[str, Any] = {
        op: [(row.key, row.new, row.old) for row in rows] for op, rows in report.rows.items()
    }
    assert found == {
        "i": [(("200",), ("7.00",), (None,))],
        "u": [(("5",), ("3.50",), ("1.00",))],
        "d": [(("98",), (None,), ("1.00",)), (("99",), (None,), ("1.00",))],
    }
    assert report.totals == {"balance": "7.50"}
    assert await total(pg) == "100.00"


@pytest.mark.parametrize(
    ("key", "order", "expected"),
    [
        ("bigint", "user_id", True),
        ("bigint", "user_id DESC", True),
        ("bigint", "hashint8(user_id::bigint)", False),
        ("text", "user_id", False),
    ],
)
async def test_the_same_comes_of_it_however_the_table_lies(
    engine: MakeEngine,
    redis: Redis,
    pg: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    *,
    key: str,
    order: str,
    expected: bool,
) -> None:
    found: list[bool] = []
    look = Writer._sorts_first

    async def looked(writer: Writer) -> bool:
        found.append(await look(writer))
        return found[-1]

    monkeypatch.setattr(Writer, "_sorts_first", looked)
    await pg.execute(
        f"CREATE TABLE balances (user_id {key} PRIMARY KEY, balance numeric(20,2) NOT NULL,"
        " synced_at timestamptz)"
    )
    await pg.execute(
        "INSERT INTO balances SELECT user_id, 1, now() FROM"
        f" (SELECT n::{key} AS user_id FROM generate_series(1, 2000) AS n) AS s ORDER BY {order}"
    )
    await pg.execute("ANALYZE balances")
    wanted = {number: 2 if number % 7 == 0 else 1 for number in range(101, 2101)}
    await redis.mset({f"balance:{number}": str(balance) for number, balance in wanted.items()})

    run = await engine(
        {"on_absent": "delete", "columns": {"user_id": key, "balance": "numeric(20,2)"}}
    ).good()
    assert found == [expected]
    assert nonzero(run.counts) == {
        "inserted": 100,
        "updated": 271,
        "unchanged": 1629,
        "absent": 100,
        "deleted": 100,
    }
    rows = await pg.fetch("SELECT user_id::bigint AS number, balance FROM balances")
    assert {row["number"]: row["balance"] for row in rows} == wanted
