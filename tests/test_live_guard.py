"""The guard beside live mode: what live mode has brought is known, and what it saw go is lost."""

from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any

import asyncpg
import pytest
from engine import USERS, Engine
from following import KEYS, OWN, Start, kill_tracking, rows, until, until_balance
from redis.asyncio import Redis
from running import Inside

from balancesync import pending
from balancesync.model import Request
from balancesync.sync import Sync

pytestmark = pytest.mark.usefixtures("quick", "filled")

BIG: dict[str, Any] = {
    "name": "big",
    "key": "big",
    "type": "hash",
    "member": "{user_id}",
    "table": "bigs",
}
LONG = {"rescan_interval": 3600}


async def fill(redis: Redis, ids: Iterable[int], value: object = "1.50") -> None:
    await redis.mset({f"balance:{each}": str(value) for each in ids})


async def drop(redis: Redis, ids: Iterable[int]) -> None:
    await redis.delete(*[f"balance:{each}" for each in ids])


async def until_rows(pg: asyncpg.Connection, count: int, table: str = "balances") -> None:
    await until(lambda: pg.fetchval(f"SELECT count(*) FROM {table}"), count)


async def until_seen(pg: asyncpg.Connection, gone: int, deleted: int = 0) -> None:
    """Until live mode has told that so many keys are gone."""

    async def seen() -> tuple[Any, ...]:
        [row] = await pg.fetch("SELECT gone, deleted FROM balancesync.baselines")
        return tuple(row)

    await until(seen, (gone, deleted))


# --- what live mode has brought is known ----------------------------------------------------------


@pytest.mark.parametrize("mapping", [{}, OWN], ids=["keep", "delete"])
async def test_keys_that_live_mode_has_brought_are_known(
    start: Start,
    redis: Redis,
    engine: Callable[..., Engine],
    pg: asyncpg.Connection,
    mapping: dict[str, Any],
) -> None:
    daemon = await start(mapping, live=LONG)
    await fill(redis, range(KEYS, 200))
    await until_rows(pg, 200)
    # More than half of what the last full run knew.
    await drop(redis, range(100, 115))
    await until_seen(pg, 15, 15 if mapping else 0)
    assert daemon.daemon.state.live == "up"
    # To another process they are known, too: nothing of it is in memory alone.
    dry = await engine(mapping).good(mode="dry_run")
    assert "15 of 200 known keys are gone" not in str(dry.warnings)
    await drop(redis, range(86))
    run = await daemon.finished(status="refused")
    assert "101 of 200 known keys are gone" in run["error"]
    code, _ = await daemon.api.ask("/force-sync", "POST", params={"wait": "true"})
    assert code == 200
    again = await daemon.finished(status="refused")
    assert "the refusal stands" in again["error"]
    assert set(await rows(pg)) >= set(range(86))


@pytest.mark.parametrize("mapping", [{}, OWN], ids=["keep", "delete"])
async def test_a_restarted_daemon_knows_what_its_predecessor_has_brought(
    start: Start, redis: Redis, pg: asyncpg.Connection, mapping: dict[str, Any]
) -> None:
    daemon = await start(mapping)
    await fill(redis, range(KEYS, 200))
    await until_rows(pg, 200)
    await drop(redis, range(100, 115))
    await until_seen(pg, 15, 15 if mapping else 0)
    await daemon.stop()
    second = await start(mapping)
    [run] = second.log.all("run_finished", job="sync")
    assert run["status"] == "succeeded"
    present = await pg.fetchval("SELECT present FROM balancesync.baselines")
    assert present == 185


@pytest.mark.parametrize("mapping", [{}, OWN], ids=["keep", "delete"])
async def test_what_is_lost_while_no_daemon_looks_counts_against_what_was_brought(
    start: Start,
    redis: Redis,
    engine: Callable[..., Engine],
    pg: asyncpg.Connection,
    mapping: dict[str, Any],
) -> None:
    daemon = await start(mapping)
    await fill(redis, range(KEYS, 200))
    await until_rows(pg, 200)
    await drop(redis, range(60))
    await until_seen(pg, 60, 60 if mapping else 0)
    await daemon.stop()
    await drop(redis, range(60, 101))
    made = engine(mapping)
    run = await made.sync()
    assert (run.status, run.counts.deleted) == ("refused", 0)
    assert "101 of 200 known keys are gone" in (run.error or "")


async def test_keys_deleted_and_made_again_and_again_are_neither_lost_nor_more(
    start: Start, redis: Redis, engine: Callable[..., Engine], pg: asyncpg.Connection
) -> None:
    daemon = await start(OWN, live=LONG, guard={"max_loss": 0.25})
    for _ in range(4):
        await drop(redis, range(5))
        await until_rows(pg, KEYS - 5)
        await until_seen(pg, 5, 5)
        await fill(redis, range(5))
        await until_rows(pg, KEYS)
        await until_seen(pg, 0)
    assert daemon.daemon.state.live == "up"
    assert len(daemon.log.all("live", state="catching up")) == 1
    # Twenty were ever known, not forty: fifteen are there, and that is what may be.
    await drop(redis, range(5))
    await until_seen(pg, 5, 5)
    assert (await engine(OWN, guard={"max_loss": 0.25}).good(mode="dry_run")).warnings == [
        'mapping "balances": 5 of 20 known keys are gone; guard.max_loss = 0.25 allows it'
    ]
    await redis.delete("balance:5")
    run = await daemon.finished(status="refused")
    assert "6 of 20 known keys are gone" in run["error"]


async def test_rejects_that_heal_make_no_more_known(
    start: Start, redis: Redis, engine: Callable[..., Engine], pg: asyncpg.Connection
) -> None:
    await fill(redis, range(100, 115), "garbage")
    daemon = await start(live=LONG)
    await fill(redis, range(100, 115))
    await until_rows(pg, KEYS + 15)
    run = await engine().good(mode="dry_run")
    assert (run.warnings, run.counts.unchanged) == ([], KEYS + 15)
    assert daemon.daemon.state.live == "up"


async def test_rows_of_the_application_that_get_their_keys_are_known(
    start: Start, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute(
        """CREATE TABLE users (telegram_id bigint PRIMARY KEY, balance bigint, sync_at timestamptz);
           INSERT INTO users SELECT n FROM generate_series(1, 100) AS n"""
    )
    await redis.flushall()
    await redis.config_resetstat()
    await redis.mset({str(each): "7" for each in range(1, 11)})
    daemon = await start(USERS, live=LONG)
    # Some rows were there, and others come with their keys. One without a row is never brought.
    await pg.execute("INSERT INTO users SELECT n FROM generate_series(101, 200) AS n")
    await redis.mset({str(each): "7" for each in range(11, 202)})
    written = "SELECT count(*) FROM users WHERE sync_at IS NOT NULL"
    await until(lambda: pg.fetchval(written), 200)
    await redis.delete(*map(str, range(50, 56)))
    await until_seen(pg, 6)
    assert daemon.daemon.state.live == "up"
    await redis.delete(*map(str, range(56, 150)))
    run = await daemon.finished(status="refused")
    # Those that the last full run had known and nobody wrote since can't be told from the others.
    assert "100 of 190 known keys are gone" in run["error"]


async def test_rows_of_the_application_that_lose_their_new_keys_have_lost_them(
    start: Start, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute(
        """CREATE TABLE users (telegram_id bigint PRIMARY KEY, balance bigint, sync_at timestamptz);
           INSERT INTO users SELECT n FROM generate_series(1, 100) AS n"""
    )
    await redis.flushall()
    await redis.config_resetstat()
    await redis.mset({str(each): "7" for each in range(1, 11)})
    daemon = await start(USERS, live=LONG)
    await redis.mset({str(each): "7" for each in range(11, 101)})
    written = "SELECT count(*) FROM users WHERE sync_at IS NOT NULL"
    await until(lambda: pg.fetchval(written), 100)
    # More rows have a key than at the last full run, and fewer than live mode has brought.
    await redis.delete(*map(str, range(40, 100)))
    run = await daemon.finished(status="refused")
    assert "60 of 90 known keys are gone" in run["error"]


async def test_what_another_process_has_found_is_what_counts_from_then_on(
    start: Start, redis: Redis, engine: Callable[..., Engine], pg: asyncpg.Connection
) -> None:
    daemon = await start(live=LONG)
    await drop(redis, range(8))
    await until_seen(pg, 8)
    await engine().good()
    # Of the twelve that are left, four more may go, though eight and four are more than half.
    await drop(redis, range(8, 12))
    await until_seen(pg, 4)
    assert daemon.daemon.state.live == "up"
    await drop(redis, range(12, 15))
    run = await daemon.finished(status="refused")
    assert "7 of 12 known keys are gone" in run["error"]


async def test_a_program_of_before_these_columns_leaves_nothing_that_counts(
    start: Start, redis: Redis, engine: Callable[..., Engine], pg: asyncpg.Connection
) -> None:
    daemon = await start(OWN, live=LONG)
    await drop(redis, range(8))
    await until_seen(pg, 8, 8)
    await daemon.stop()
    await pg.execute("UPDATE balancesync.baselines SET doubt = 'x', doubted_at = now()")
    [before] = await pg.fetch(
        "SELECT known_at, gone, deleted, doubt, doubted_at FROM balancesync.baselines"
    )
    await engine(OWN).good(accept_loss=True)
    # It saved its success, and knew nothing of these.
    await pg.execute(
        "UPDATE balancesync.baselines SET known_at = $1, gone = $2, deleted = $3, doubt = $4,"
        " doubted_at = $5",
        *before,
    )
    await fill(redis, range(8, KEYS), "9.00")
    run = await engine(OWN).good(mode="dry_run")
    assert (run.warnings, run.counts.updated) == ([], KEYS - 8)


async def test_nothing_is_noted_of_a_flush_that_brings_nothing_new(
    start: Start, redis: Redis, pg: asyncpg.Connection
) -> None:
    await start(live=LONG)
    await redis.set("balance:1", "2")
    await until_seen(pg, 0)
    before = await pg.fetchval("SELECT xmin FROM balancesync.baselines")
    await redis.mset({"balance:1": "3", "balance:100": "4"})
    await until_balance(pg, 100, "4.00")
    await redis.set("balance:2", "5")
    await until_balance(pg, 2, "5.00")
    assert await pg.fetchval("SELECT xmin FROM balancesync.baselines") == before


# --- what live mode saw go is not made good by keys made from zero --------------------------------


async def begun_with_a_gap(start: Start, redis: Redis, *mappings: dict[str, Any]) -> Inside:
    """A daemon whose next gap asks for no run, on a database that is mostly of others."""
    await redis.mset({f"cache:{each}": "x" for each in range(1000)})
    daemon = await start(*mappings, live=LONG)
    await kill_tracking(redis)
    await daemon.log.next("live", state="catching up", reason="waiting for a full run")
    await daemon.log.next("live", state="up")
    return daemon


async def test_keys_that_live_mode_saw_go_are_doubted_when_they_are_back_with_other_values(
    start: Start, redis: Redis, engine: Callable[..., Engine], pg: asyncpg.Connection
) -> None:
    daemon = await begun_with_a_gap(start, redis)
    await drop(redis, range(12))
    await daemon.log.next("live", state="catching up", reason=lambda text: "12 of 20" in text)
    # The application begins again before any run has looked.
    await fill(redis, range(12), "0")
    made = engine()
    run = await made.sync()
    assert run.status == "refused"
    assert "12 of 20 known keys were seen to be gone: 12 of 20 known keys came back" in str(run)
    assert set((await rows(pg)).values()) == {Decimal("1.50")}
    await fill(redis, range(12))
    await made.good()
    await fill(redis, range(KEYS), "9")
    await made.good()


async def test_a_big_hash_that_was_seen_to_be_gone_is_doubted(
    start: Start, redis: Redis, pg: asyncpg.Connection
) -> None:
    await redis.hset("big", mapping={str(each): "1.50" for each in range(KEYS)})
    daemon = await begun_with_a_gap(start, redis, BIG)
    await redis.delete("big")
    # By a flush, by a look before it is due, or by a probe: whichever is first.
    doubted = "SELECT doubt LIKE 'the big hash was seen %' FROM balancesync.baselines"
    await until(lambda: pg.fetchval(doubted), True)
    await redis.hset("big", mapping={str(each): "0" for each in range(KEYS)})
    # The daemon's own run may have been as fast, and then it's a refusal that stands.
    run = await daemon.api.sync()
    assert run["status"] == "refused"
    assert "20 of 20 known keys came back changed" in run["error"]
    assert await pg.fetchval("SELECT DISTINCT balance FROM bigs") == Decimal("1.50")
    assert (await daemon.api.sync(accept_loss="true"))["status"] == "succeeded"
    # It may have begun while live mode was just opening its ears again.
    await daemon.api.sync()
    await daemon.log.next("live", state="up")
    # What fell by some of its fields alone is none to doubt.
    await redis.hdel("big", *map(str, range(10)))
    await redis.hset("big", mapping={str(each): "7" for each in range(10, KEYS)})
    await until(lambda: pg.fetchval("SELECT count(*) FROM bigs WHERE balance = 7"), 10)
    assert daemon.daemon.state.live == "up"


async def test_fields_that_live_mode_has_brought_are_known(
    start: Start,
    redis: Redis,
    engine: Callable[..., Engine],
    pg: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pending, "_LEAST_PAUSE_S", 0.0)
    await redis.hset("big", mapping={str(each): "1.50" for each in range(KEYS)})
    mapping = {**BIG, **OWN}
    daemon = await start(mapping, live=LONG)
    await redis.hset("big", mapping={str(each): "1.50" for each in range(KEYS, 200)})
    await until_rows(pg, 200, "bigs")
    await redis.hdel("big", *map(str, range(100, 115)))
    await until_rows(pg, 185, "bigs")
    await redis.hset("big", mapping={str(each): "1.50" for each in range(100, 115)})
    await until_rows(pg, 200, "bigs")
    assert await pg.fetchval("SELECT present FROM balancesync.baselines") == 200
    await redis.hdel("big", *map(str, range(101)))
    run = await daemon.finished(status="refused")
    assert "101 of 200 known keys are gone" in run["error"]
    assert await pg.fetchval("SELECT count(*) FROM bigs") == 200


async def test_fields_that_were_pruned_are_not_seen_to_be_lost(
    start: Start, redis: Redis, engine: Callable[..., Engine], pg: asyncpg.Connection
) -> None:
    await redis.hset("big", mapping={str(each): "1.50" for each in range(KEYS)})
    daemon = await start(BIG, live=LONG)
    balance = "SELECT balance::text FROM bigs WHERE user_id = 19"
    # It is looked at when it changes.
    await redis.hset("big", "19", "2")
    await until(lambda: pg.fetchval(balance), "2.00")
    await pg.execute("UPDATE bigs SET synced_at = '2026-01-01' WHERE user_id < 15")
    made = engine(BIG, prune={"enabled": True})
    prune = Sync(made.config, made.database, made.source)
    # What that flush has committed may be seen before it lets go of the lock.
    run = await prune.run(Request("prune", "cli", idle_s=3600.0), wait_s=20)
    assert (run.status, run.counts.deleted) == ("succeeded", 15)
    await redis.hset("big", "19", "3")
    await until(lambda: pg.fetchval(balance), "3.00")
    assert daemon.daemon.state.live == "up"
    assert len(daemon.log.all("live", state="catching up")) == 1


async def test_the_probe_sees_a_big_hash_that_is_gone_beside_other_keys(
    start: Start, redis: Redis, engine: Callable[..., Engine], pg: asyncpg.Connection
) -> None:
    await redis.mset({f"cache:{each}": "x" for each in range(100)})
    await redis.hset("big", mapping={str(each): "1.50" for each in range(KEYS)})
    daemon = await start(BIG, live={"enabled": False}, up=False)
    await daemon.leads()
    await daemon.api.sync()
    await daemon.api.until_sample("guard_refused", lambda value: value == 0)
    await redis.delete("big")
    run = await daemon.finished(trigger="recovery")
    assert run["status"] == "refused"
    assert await pg.fetchval("SELECT doubt FROM balancesync.baselines") is not None
