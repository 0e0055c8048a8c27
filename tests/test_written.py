"""Written means written: what a table's rules and triggers make of what it's asked to hold."""

import asyncio
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest
from engine import Engine
from redis.asyncio import Redis
from running import Inside, daemon_config

MakeEngine = Callable[..., Engine]

COLUMNS = "user_id bigint PRIMARY KEY, balance numeric(20,2), synced_at timestamptz"
KEEPING = pytest.mark.parametrize("keep", [False, True], ids=["without history", "with history"])


def trigger(name: str, when: str, body: str, table: str = "balances") -> str:
    """The SQL of a row trigger."""
    return (
        f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN {body} END$$;"
        f" CREATE TRIGGER {name} {when} ON {table} FOR EACH ROW EXECUTE FUNCTION {name}();"
    )


def kept(keep: bool) -> dict[str, Any]:
    """The section of the history."""
    return {"history": {"enabled": keep}}


def nonzero(counts: Any) -> dict[str, int]:
    """The counts that tell anything but how many keys were scanned."""
    return {k: v for k, v in counts.as_dict().items() if v and k != "scanned"}


async def balances(pg: asyncpg.Connection) -> dict[int, str]:
    """The balances by id."""
    rows = await pg.fetch("SELECT user_id, balance::text AS b FROM balances ORDER BY user_id")
    return {row["user_id"]: row["b"] for row in rows}


async def changes(pg: asyncpg.Connection) -> list[tuple[str, str, str | None, str | None]]:
    """The kept changes: key, op, old and new balance."""
    rows = await pg.fetch(
        "SELECT key[1] AS k, op::text AS op, old ->> 'balance' AS o, new ->> 'balance' AS n"
        " FROM balancesync.changes ORDER BY at, key"
    )
    return [(row["k"], row["op"], row["o"], row["n"]) for row in rows]


# What drops a row that is inserted, of a table `other` beside it.
DROPPED_INSERTS = {
    "rule": "CREATE RULE ru AS ON INSERT TO balances DO INSTEAD NOTHING",
    "rule for some": "CREATE RULE ru AS ON INSERT TO balances WHERE NEW.user_id > 3"
    " DO INSTEAD NOTHING",
    # PostgreSQL reports the rows of this one as inserted.
    "rule that writes elsewhere": "CREATE RULE ru AS ON INSERT TO balances"
    " DO INSTEAD INSERT INTO other VALUES (NEW.user_id, NEW.balance)",
    "trigger": trigger("drops", "BEFORE INSERT", "RETURN NULL;"),
    "trigger for some": trigger(
        "drops", "BEFORE INSERT", "IF NEW.user_id > 3 THEN RETURN NULL; END IF; RETURN NEW;"
    ),
    "trigger that deletes it again": trigger(
        "drops", "AFTER INSERT", "DELETE FROM balances WHERE user_id = NEW.user_id; RETURN NULL;"
    ),
    "trigger that changes the key": trigger(
        "drops", "BEFORE INSERT", "NEW.user_id := NEW.user_id + 1000; RETURN NEW;"
    ),
}


@KEEPING
@pytest.mark.parametrize("sql", DROPPED_INSERTS.values(), ids=DROPPED_INSERTS)
async def test_a_row_that_is_not_inserted_is_a_reject(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection, sql: str, keep: bool
) -> None:
    await pg.execute(f"CREATE TABLE balances ({COLUMNS}); CREATE TABLE other (u bigint, b numeric)")
    await pg.execute(sql)
    await redis.mset({f"balance:{number}": f"{number}" for number in range(1, 7)})
    sync = engine(**kept(keep))
    first = await sync.good()
    there = await balances(pg)
    missing = set(range(1, 7)) - set(there)
    assert there == ({} if len(missing) == 6 else {n: f"{n}.00" for n in range(1, 4)})
    counts = {"inserted": len(there), "rejected": len(missing)}
    assert first.counts.as_dict() | counts == first.counts.as_dict()
    # As often as it is tried.
    counts = {"unchanged": len(there), "rejected": len(missing), "inserted": 0, "not_found": 0}
    second = await sync.good()
    assert second.counts.as_dict() | counts == second.counts.as_dict()
    assert await sync.reasons() == {
        f"balance:{number}".encode(): "refused_by_table" for number in missing
    }
    reject = (await sync.rejects())[b"balance:5"]
    assert reject.value == b"5"
    assert "balances refuses it: it was not written, as by" in reject.detail
    assert "ru" in reject.detail or "drops" in reject.detail
    if keep:
        assert await changes(pg) == [(str(n), "i", None, f"{n}.00") for n in there]

    # It heals when the table takes it.
    await pg.execute("DROP RULE IF EXISTS ru ON balances; DROP TRIGGER IF EXISTS drops ON balances")
    assert (await sync.good()).counts.inserted == len(missing)
    assert await sync.reasons() == {}
    assert await balances(pg) == {number: f"{number}.00" for number in range(1, 7)}


DROPPED_UPDATES = {
    "rule": "CREATE RULE ru AS ON UPDATE TO balances WHERE NEW.user_id = 2 DO INSTEAD NOTHING",
    "trigger": trigger(
        "drops", "BEFORE UPDATE", "IF NEW.user_id = 2 THEN RETURN NULL; END IF; RETURN NEW;"
    ),
    "trigger that changes the key": trigger(
        "drops", "BEFORE UPDATE", "IF NEW.user_id = 2 THEN NEW.user_id := 1000; END IF; RETURN NEW;"
    ),
}


MODES = [(mode, keep) for mode in ("upsert", "update") for keep in (False, True)]


@pytest.mark.parametrize("case", MODES)
@pytest.mark.parametrize("sql", DROPPED_UPDATES.values(), ids=DROPPED_UPDATES)
async def test_a_row_that_is_not_updated_is_a_reject_and_not_missing(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection, sql: str, case: tuple[str, bool]
) -> None:
    mode, keep = case
    await pg.execute(
        f"CREATE TABLE balances ({COLUMNS}); INSERT INTO balances VALUES (1, 1), (2, 1), (3, 1)"
    )
    await pg.execute(sql)
    await redis.mset({f"balance:{number}": "7" for number in range(1, 4)})
    sync = engine({"mode": mode}, **kept(keep))
    assert nonzero((await sync.good()).counts) == {"updated": 2, "rejected": 1}
    assert nonzero((await sync.good()).counts) == {"unchanged": 2, "rejected": 1}
    assert await balances(pg) == {1: "7.00", 2: "1.00", 3: "7.00"}
    assert await sync.reasons() == {b"balance:2": "refused_by_table"}
    if keep:
        assert await changes(pg) == [("1", "u", "1.00", "7.00"), ("3", "u", "1.00", "7.00")]
    await redis.set("balance:2", "1")
    assert nonzero((await sync.good()).counts) == {"unchanged": 3}
    assert await sync.reasons() == {}


DROPPED_DELETES = {
    "rule": "CREATE RULE ru AS ON DELETE TO balances WHERE OLD.user_id = 2 DO INSTEAD NOTHING",
    "rule for all": "CREATE RULE ru AS ON DELETE TO balances DO INSTEAD"
    " UPDATE balances SET balance = balance WHERE user_id = OLD.user_id",
    "trigger": trigger(
        "stays", "BEFORE DELETE", "IF OLD.user_id = 2 THEN RETURN NULL; END IF; RETURN OLD;"
    ),
}


@KEEPING
@pytest.mark.parametrize("sql", DROPPED_DELETES.values(), ids=DROPPED_DELETES)
async def test_a_row_that_is_not_deleted_is_said_each_time(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection, sql: str, keep: bool
) -> None:
    sync = engine({"on_absent": "delete"}, **kept(keep))
    await redis.mset({f"balance:{number}": "1" for number in range(50)})
    await sync.good()
    await pg.execute(sql)
    await redis.delete("balance:2", "balance:3")
    stay = 2 if "UPDATE" in sql else 1
    run = await sync.good()
    assert (run.counts.absent, run.counts.deleted) == (2, 2 - stay)
    assert set(await balances(pg)) == set(range(50)) - ({3} if stay == 1 else set())
    for _ in range(2):
        [warning] = run.warnings
        assert f"{stay} rows whose keys are gone can't be deleted" in warning
        assert '"balance:2"' in warning
        assert "it was not deleted, as by" in warning
        run = await sync.good()
        assert (run.counts.absent, run.counts.deleted) == (stay, 0)
    assert await sync.reasons() == {}
    if keep:
        assert [each for each in await changes(pg) if each[1] == "d"] == (
            [("3", "d", "1.00", None)] if stay == 1 else []
        )


@KEEPING
async def test_a_rule_that_does_something_also_gets_in_nothing_s_way(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection, keep: bool
) -> None:
    await pg.execute(
        f"CREATE TABLE balances ({COLUMNS}); CREATE TABLE other (user_id bigint);"
        " CREATE RULE also AS ON INSERT TO balances DO ALSO INSERT INTO other VALUES (NEW.user_id);"
        " CREATE RULE also_u AS ON UPDATE TO balances DO ALSO INSERT INTO other VALUES (0)"
    )
    await redis.mset({f"balance:{number}": "1" for number in range(1, 4)})
    sync = engine(**kept(keep))
    assert nonzero((await sync.good()).counts) == {"inserted": 3}
    await redis.set("balance:2", "2")
    assert nonzero((await sync.good()).counts) == {"updated": 1, "unchanged": 2}
    found = await pg.fetch("SELECT DISTINCT user_id FROM other ORDER BY user_id")
    assert [row["user_id"] for row in found] == [0, 1, 2, 3]
    if keep:
        assert len(await changes(pg)) == 4


@KEEPING
async def test_a_partition_s_trigger_is_the_table_s(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection, keep: bool
) -> None:
    await pg.execute(
        f"CREATE TABLE balances ({COLUMNS}) PARTITION BY RANGE (user_id);"
        " CREATE TABLE low PARTITION OF balances FOR VALUES FROM (0) TO (10);"
        " CREATE TABLE high PARTITION OF balances FOR VALUES FROM (10) TO (20);"
        + trigger(
            "drops",
            "BEFORE INSERT OR UPDATE",
            "IF NEW.user_id = 12 THEN RETURN NULL; END IF;"
            " NEW.balance := least(NEW.balance, 50); RETURN NEW;",
            "high",
        )
    )
    await redis.mset({f"balance:{number}": f"{number}00" for number in (1, 11, 12)})
    sync = engine(**kept(keep))
    run = await sync.good()
    assert nonzero(run.counts) == {"inserted": 2, "rejected": 1}
    assert await balances(pg) == {1: "100.00", 11: "50.00"}
    assert len(run.warnings) == 1
    run = await sync.good()
    assert nonzero(run.counts) == {"unchanged": 2, "rejected": 1}
    assert run.warnings == []


async def rows(pg: asyncpg.Connection) -> list[tuple[Any, ...]]:
    """The table's rows with what changes when one is written."""
    found = await pg.fetch("SELECT *, xmin::text, ctid::text FROM balances ORDER BY user_id")
    return [tuple(row) for row in found]


CAPS = {
    "before": trigger(
        "cap",
        "BEFORE INSERT OR UPDATE",
        "NEW.balance := least(NEW.balance, 50); RETURN NEW;",
    ),
    "after": trigger(
        "cap",
        "AFTER INSERT OR UPDATE",
        "UPDATE balances SET balance = 50 WHERE user_id = NEW.user_id AND balance > 50;"
        " RETURN NULL;",
    ),
    "at the end of the transaction": trigger("cap", "BEFORE DELETE", "RETURN OLD;")
    .replace(
        "CREATE TRIGGER cap BEFORE DELETE ON balances",
        "CREATE CONSTRAINT TRIGGER cap AFTER INSERT OR UPDATE ON balances"
        " DEFERRABLE INITIALLY DEFERRED",
    )
    .replace(
        "RETURN OLD;",
        "UPDATE balances SET balance = 50 WHERE user_id = NEW.user_id AND balance > 50;"
        " RETURN NULL;",
    ),
}


@KEEPING
@pytest.mark.parametrize("sql", CAPS.values(), ids=CAPS)
async def test_what_the_table_makes_of_a_value_is_said_once_and_not_written_again(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection, sql: str, keep: bool
) -> None:
    await pg.execute(f"CREATE TABLE balances ({COLUMNS}); {sql}")
    await redis.mset({"balance:1": "10", "balance:2": "100", "balance:3": "200"})
    sync = engine(**kept(keep))
    run = await sync.good()
    assert nonzero(run.counts) == {"inserted": 3}
    [warning] = run.warnings
    assert "2 rows hold other values than Redis" in warning
    assert "trigger cap" in warning
    assert '"balance:2"' in warning
    assert "100" not in warning
    assert await sync.reasons() == {}

    before = await rows(pg)
    run = await sync.good()
    assert (nonzero(run.counts), run.warnings) == ({"unchanged": 3}, [])
    verify = await sync.verify()
    assert (verify.counts.written, len(verify.warnings)) == (0, 1)
    assert "2 rows hold" in verify.warnings[0]
    assert await rows(pg) == before

    # What Redis asks for anew is written, and remembered in its turn; so is what others change.
    await redis.mset({"balance:2": "150", "balance:3": "20"})
    run = await sync.good()
    assert nonzero(run.counts) == {"updated": 2, "unchanged": 1}
    assert "1 rows hold" in run.warnings[0]
    assert await pg.fetchval("SELECT count(*) FROM balancesync.altered") == 1
    await pg.execute("UPDATE balances SET balance = 7 WHERE user_id = 2")
    assert nonzero((await sync.good()).counts) == {"updated": 1, "unchanged": 2}
    assert nonzero((await sync.good()).counts) == {"unchanged": 3}
    assert await balances(pg) == {1: "10.00", 2: "50.00", 3: "20.00"}

    # A table that caps no more is asked again.
    await pg.execute("DROP TRIGGER cap ON balances")
    assert nonzero((await sync.good()).counts) == {"updated": 1, "unchanged": 2}
    assert await balances(pg) == {1: "10.00", 2: "150.00", 3: "20.00"}
    assert await pg.fetchval("SELECT count(*) FROM balancesync.altered") == 0
    if keep:
        old_new = [each[1:] for each in await changes(pg) if each[0] == "2"]
        assert [new for _, _, new in old_new] == ["50.00", "50.00", "50.00", "150.00"]


async def test_a_trigger_that_is_replaced_is_asked_again(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection
) -> None:
    body = "NEW.balance := least(NEW.balance, {}); RETURN NEW;"
    await pg.execute(
        f"CREATE TABLE balances ({COLUMNS});"
        + trigger("cap", "BEFORE INSERT OR UPDATE", body.format(50))
    )
    await redis.set("balance:1", "100")
    sync = engine()
    await sync.good()
    await sync.good()
    assert await balances(pg) == {1: "50.00"}
    await pg.execute(
        "CREATE OR REPLACE FUNCTION cap() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$BEGIN {body.format(80)} END$$"
    )
    assert nonzero((await sync.good()).counts) == {"updated": 1}
    assert await balances(pg) == {1: "80.00"}


# --- many refused rows ----------------------------------------------------------------------------

PARENTS = "CREATE TABLE users (id bigint PRIMARY KEY); INSERT INTO users SELECT generate_series(%s)"
REFERENCES = {
    "at once": "REFERENCES users",
    "at the end": "REFERENCES users DEFERRABLE INITIALLY DEFERRED",
}


@KEEPING
@pytest.mark.parametrize("reference", REFERENCES.values(), ids=REFERENCES)
async def test_however_many_rows_a_table_refuses_the_others_are_written(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection, reference: str, keep: bool
) -> None:
    await pg.execute(PARENTS % "1501, 2000")
    await pg.execute(
        f"CREATE TABLE balances (user_id bigint PRIMARY KEY {reference}, balance numeric(20,2),"
        " synced_at timestamptz)"
    )
    await redis.mset({f"balance:{number}": f"{number}" for number in range(1, 2001)})
    sync = engine(**kept(keep))
    run = await sync.good()
    assert nonzero(run.counts) == {"inserted": 500, "rejected": 1500}
    assert await balances(pg) == {number: f"{number}.00" for number in range(1501, 2001)}
    rejects = await sync.rejects()
    assert set(rejects) == {f"balance:{number}".encode() for number in range(1, 1501)}
    assert {reject.reason for reject in rejects.values()} == {"refused_by_table"}
    assert all(reject.value == key.rpartition(b":")[2] for key, reject in rejects.items())
    assert all("foreign key" in reject.detail for reject in rejects.values())
    if keep:
        assert len(await changes(pg)) == 500
    await pg.execute("INSERT INTO users SELECT generate_series(1, 1000)")
    assert nonzero((await sync.good()).counts) == {
        "inserted": 1000,
        "rejected": 500,
        "unchanged": 500,
    }


@KEEPING
async def test_bad_rows_among_good_ones_of_many_slices(
    engine: MakeEngine, redis: Redis, pg: asyncpg.Connection, keep: bool
) -> None:
    """Inserted and updated, one in three refused, the slices wider than what is written singly."""
    await pg.execute(f"CREATE TABLE balances ({COLUMNS}, CHECK (balance < 1000))")
    sync = engine(postgres={"apply_batch": 1300}, **kept(keep))
    keys = range(3000)
    await redis.mset({f"balance:{number}": f"{2000 if number % 3 else 1}" for number in keys})
    run = await sync.good()
    assert nonzero(run.counts) == {"inserted": 1000, "rejected": 2000}
    await redis.mset({f"balance:{number}": f"{2 if number % 2 else 2000}" for number in keys})
    run = await sync.good()
    assert nonzero(run.counts) == {"inserted": 1000, "updated": 500, "rejected": 1500}
    there = await balances(pg)
    assert {number for number, value in there.items() if value == "2.00"} == set(range(1, 3000, 2))
    assert {number for number, value in there.items() if value == "1.00"} == set(range(0, 3000, 6))


# --- in live mode ---------------------------------------------------------------------------------

FOLLOWED = {"live": {"enabled": True, "flush_interval": 0.02}}


async def until(pg: asyncpg.Connection, sql: str) -> None:
    """Ask until it's so."""
    async with asyncio.timeout(60):
        # PostgreSQL tells nobody.
        while not await pg.fetchval(sql):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@KEEPING
async def test_live_mode_holds_what_it_wrote_against_what_it_was_to_write(
    postgres_dsn: str, redis_url: str, redis: Redis, pg: asyncpg.Connection, keep: bool
) -> None:
    await pg.execute(
        f"CREATE TABLE balances ({COLUMNS});"
        + trigger(
            "bends",
            "BEFORE INSERT OR UPDATE",
            "IF NEW.balance = 13 THEN RETURN NULL; END IF;"
            " NEW.balance := least(NEW.balance, 50); RETURN NEW;",
        )
        + trigger("stays", "BEFORE DELETE", "RETURN NULL;")
    )
    await redis.mset({f"balance:{number}": "1" for number in range(10)})
    mapping = {"on_absent": "delete"}
    sections = {**FOLLOWED, **kept(keep), "guard": {"max_rejects": 1.0}}
    config = daemon_config(postgres_dsn, redis_url, mapping, **sections)
    async with Inside(config) as daemon:
        await daemon.log.next("live", state="up")
        await redis.mset(
            {"balance:1": "13", "balance:2": "100", "balance:3": "3", "balance:x": "1"}
        )
        await redis.mset({"balance:20": "13", "balance:21": "100"})
        await redis.delete("balance:9")
        await until(pg, "SELECT count(*) = 3 FROM balancesync.rejects")
        await until(pg, "SELECT count(*) = 2 FROM balancesync.altered")
        await until(pg, "SELECT balance = 3 FROM balances WHERE user_id = 3")
        there = await balances(pg)
        assert {key: there.get(key) for key in (1, 2, 9, 20, 21)} == {
            1: "1.00",
            2: "50.00",
            9: "1.00",
            20: None,
            21: "50.00",
        }
        reasons = await pg.fetch("SELECT key, reason FROM balancesync.rejects")
        assert {row["key"]: row["reason"] for row in reasons} == {
            b"balance:1": "refused_by_table",
            b"balance:20": "refused_by_table",
            b"balance:x": "key_syntax",
        }
        before = await rows(pg)
        # The same again: what the table makes of it is known.
        await redis.mset({"balance:2": "100", "balance:21": "100", "balance:1": "2"})
        await until(pg, "SELECT balance = 2 FROM balances WHERE user_id = 1")
        assert [row for row in await rows(pg) if row[0] != 1] == [
            row for row in before if row[0] != 1
        ]
        await until(pg, "SELECT count(*) = 2 FROM balancesync.rejects WHERE healed_at IS NULL")
    [run] = [run for run in daemon.log.all("run_finished") if run["job"] == "live"]
    assert (run["rejected"], run["not_found"], run["deleted"]) == (3, 0, 0)
    said = " ".join(run["warnings"])
    assert "hold other values than Redis" in said
    assert "can't be deleted" in said
