"""Live mode in a daemon on real servers: changes follow, and no gap is ever trusted."""

import asyncio
from collections.abc import Awaitable, Callable
from decimal import Decimal
from typing import Any

import asyncpg
import pytest
from engine import USERS, Engine
from faults.ground import connected
from following import (
    KEYS,
    OWN,
    Start,
    acl,
    is_of_a_connection,
    kill_tracking,
    rows,
    until,
    until_balance,
)
from redis.asyncio import Redis
from running import Inside, daemon_config

from balancesync import flushruns, keyed, pending, probing, target
from balancesync.database import lock_key
from balancesync.embedded import PostgresServer, RedisServer
from balancesync.model import Job, Request, Run
from balancesync.sync import Sync

pytestmark = pytest.mark.usefixtures("quick", "filled")


async def test_every_kind_of_change_follows_in_one_run(
    start: Start, redis: Redis, pg: asyncpg.Connection
) -> None:
    daemon = await start()
    await redis.mset({"balance:1": "2.25", "balance:100": "7", "balance:2": "bad"})
    await redis.incrby("balance:100", 1)
    await redis.delete("balance:3")
    await redis.pexpire("balance:4", 1)
    await until_balance(pg, 1, "2.25")
    await until_balance(pg, 100, "8.00")
    open_rejects = "SELECT count(*) FROM balancesync.rejects WHERE healed_at IS NULL"
    await until(lambda: pg.fetchval(open_rejects), 1)
    await redis.set("balance:2", "3")
    await until_balance(pg, 2, "3.00")
    await until(lambda: pg.fetchval(open_rejects), 0)
    await redis.pexpire("balance:5", 1)
    status = await daemon.api.document("/status")
    # A flush is no run to those who ask what runs.
    assert (status["live"], status["state"], status["current_run"]) == ("up", "idle", None)
    assert status["last_run"]["trigger"] == "live"
    assert status["last_run"]["job"] == "sync"
    [run] = [r for r in (await daemon.api.document("/runs"))["runs"] if r["job"] == "live"]
    assert run["status"] == "running"
    code, refused = await daemon.api.ask(f"/runs/{run['id']}", "DELETE")
    assert (code, refused["error"]["code"]) == (409, "live")
    await daemon.stop()
    ended = await daemon.finished(job="live")
    [recorded] = await pg.fetch("SELECT * FROM balancesync.runs WHERE job = 'live'")
    assert (str(recorded["id"]), recorded["status"]) == (ended["id"], "succeeded")
    read = await pg.fetch("SELECT DISTINCT redis_run_id FROM balancesync.runs")
    assert len(read) == 1
    assert ended["id"] == run["id"]
    named = ("scanned", "vanished", "rejected", "inserted", "updated", "unchanged", "not_found")
    counts = {name: ended[name] for name in named}
    assert counts["scanned"] == sum(counts.values()) - counts["scanned"]
    assert (counts["inserted"], counts["updated"], counts["rejected"]) == (1, 2, 1)
    # Those that are gone stay, and are counted: on_absent is keep.
    assert (ended["absent"], ended["deleted"], len(await rows(pg))) == (3, 0, KEYS + 1)


async def test_what_flushes_leave_in_temporary_tables_is_cleared_up(
    start: Start, redis: Redis, pg: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (target, keyed):
        monkeypatch.setattr(module, "VACUUM_ROWS", 0)
    daemon = await start(OWN)
    for number in range(2, 5):
        await redis.set("balance:1", number)
        await redis.delete(f"balance:{number}")
        await until_balance(pg, 1, f"{number}.00")
        await until(lambda: pg.fetchval("SELECT count(*) FROM balances"), KEYS + 1 - number)
    await daemon.stop()
    run = await daemon.finished(job="live")
    assert (run["status"], run["updated"], run["deleted"]) == ("succeeded", 3, 3)


async def test_a_run_of_flushes_that_has_ended_is_no_last_run(
    start: Start, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flushruns, "_RUN_S", 0.0)
    daemon = await start()
    success = (await daemon.api.document("/status"))["last_success_at"]
    await redis.set("balance:1", "2.25")
    flushed = await daemon.finished(job="live")
    assert (await daemon.api.document(f"/runs/{flushed['id']}"))["status"] == "succeeded"
    status = await daemon.api.document("/status")
    assert (status["last_run"]["job"], status["last_success_at"]) == ("sync", success)
    stats = await daemon.api.document("/stats")
    assert [run["job"] for run in stats["recent_runs"]] == ["sync"]
    assert sorted(each["job"] for each in stats["totals"]) == ["live", "sync"]


async def test_rows_of_keys_that_are_gone_are_deleted_where_that_is_wanted(
    start: Start, redis: Redis, pg: asyncpg.Connection
) -> None:
    await start(OWN)
    await redis.delete("balance:3")
    await redis.pexpire("balance:4", 1)
    await redis.set("balance:5", "bad")
    await until(lambda: pg.fetchval("SELECT count(*) FROM balances"), KEYS - 2)
    # A reject is a key that is there.
    assert set(await rows(pg)) == set(range(KEYS)) - {3, 4}


async def test_a_flushall_is_looked_at_before_the_application_can_start_again(
    start: Start, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = await start(live={"rescan_interval": 3600})
    # After a first gap the next one would wait for as long.
    await kill_tracking(redis)
    await daemon.log.next("live", state="catching up", reason="waiting for a full run")
    await daemon.log.next("live", state="up")
    # From the next probe on it takes its time.
    for name in ("_CALM_S", "_TROUBLED_S"):
        monkeypatch.setattr(probing, name, 3600)
    probes = asyncio.Event()
    monkeypatch.setattr(daemon.daemon._probing, "_recover", probes.set)
    async with asyncio.timeout(20):
        await probes.wait()
    await redis.flushall()
    run = await daemon.finished(status="refused")
    assert run["trigger"] == "recovery"


@pytest.mark.parametrize("left", [0, 12], ids=["all", "more than half"])
async def test_keys_made_anew_at_once_after_a_flushall_are_refused(
    start: Start, redis: Redis, pg: asyncpg.Connection, left: int
) -> None:
    # The run at the start is none that a gap has asked for, so this one's needn't wait.
    daemon = await start(live={"rescan_interval": 3600})
    again = [f"balance:{number}" for number in range(left or KEYS)]
    async with redis.pipeline(transaction=True) as flushed:
        flushed.flushall()
        flushed.mset(dict.fromkeys(again, "0"))
        await flushed.execute()
    run = await daemon.finished(status="refused")
    assert "emptied by FLUSHALL or FLUSHDB" in run["error"]
    await daemon.log.next("live", reason=lambda text: "refusal stands" in (text or ""))
    assert set((await rows(pg)).values()) == {Decimal("1.50")}


async def test_a_redis_that_came_back_empty_is_never_followed(
    start: Start, private_redis: Callable[..., RedisServer], pg: asyncpg.Connection
) -> None:
    server = private_redis()
    async with Redis.from_url(server.url) as client:
        await client.mset({f"balance:{number}": "1.50" for number in range(KEYS)})
    daemon = await start(live={"rescan_interval": 3600}, redis={"url": server.url})
    server.kill()
    server.start()
    async with Redis.from_url(server.url) as client:
        await client.mset({f"balance:{number}": "0" for number in range(KEYS)})
    run = await daemon.finished(status="refused")
    assert f"with 0 keys: {KEYS} of {KEYS} known keys came back changed" in run["error"]
    assert set((await rows(pg)).values()) == {Decimal("1.50")}


async def test_what_a_flushall_took_is_never_taken_for_deleted(
    start: Start, redis: Redis, pg: asyncpg.Connection
) -> None:
    daemon = await start(OWN)
    await redis.flushall()
    await daemon.log.next("live", state="catching up", reason=lambda text: "FLUSHALL" in text)
    await daemon.finished(status="refused")
    # The application starts again from zero: nothing of it is followed while the refusal stands.
    await redis.mset({f"balance:{number}": "0" for number in range(KEYS)})
    await daemon.finished(status="refused")
    assert (await daemon.api.document("/status"))["live"] == "catching up"
    code, health = await daemon.api.ask("/health")
    assert (code, health["checks"]["live"]["status"]) == (200, "degraded")
    assert await daemon.api.sample("live_up") == 0
    assert set((await rows(pg)).values()) == {Decimal("1.50")}
    await daemon.api.sync(accept_loss="true")
    await daemon.log.next("live", state="up")
    await redis.set("balance:1", "2")
    await until_balance(pg, 1, "2.00")


async def test_a_lost_connection_is_a_gap_that_a_full_run_closes(
    start: Start, redis: Redis, pg: asyncpg.Connection
) -> None:
    daemon = await start()
    await kill_tracking(redis)
    await redis.set("balance:1", "2")  # nobody is told of it
    await daemon.log.next("live", state="catching up", reason=is_of_a_connection)
    run = await daemon.finished(job="sync", trigger="live", status="succeeded", updated=1)
    await daemon.log.next("live", state="up")
    assert run["updated"] == 1
    await redis.set("balance:1", "3")
    await until_balance(pg, 1, "3.00")


async def test_full_runs_are_asked_for_no_more_often_than_allowed_and_any_will_do(
    start: Start, redis: Redis, pg: asyncpg.Connection
) -> None:
    daemon = await start(live={"rescan_interval": 3600})
    # The run that it began with is none that a gap has asked for.
    await kill_tracking(redis)
    await daemon.log.next("live", state="catching up", reason="waiting for a full run")
    await daemon.log.next("live", state="up")
    await kill_tracking(redis)
    await daemon.log.next("live", state="catching up", reason="waiting for a full run")
    # Of this it's told, but isn't to write it: what came before it may be missing.
    await redis.set("balance:1", "2")
    await daemon.api.until_sample("live_pending_keys", lambda keys: keys == 1)
    assert len(daemon.log.all("run_started")) == 2
    assert (await rows(pg))[1] == Decimal("1.50")
    # A dry run proves nothing.
    await daemon.api.sync(dry_run="true")
    assert daemon.daemon.state.live == "catching up"
    await daemon.api.sync()
    await daemon.log.next("live", state="up")
    assert (await rows(pg))[1] == Decimal("2.00")


@pytest.mark.parametrize("job", ["restore", "sync"])
async def test_what_another_process_has_cleared_up_is_not_waited_for(
    start: Start,
    redis: Redis,
    engine: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
    job: Job,
) -> None:
    monkeypatch.setattr(probing, "_REFRESH_S", 0.1)
    daemon = await start(live={"rescan_interval": 3600})
    await daemon.api.until_sample("guard_refused", lambda value: value == 0)
    await (redis.flushall() if job == "restore" else kill_tracking(redis))
    await daemon.log.next("live", state="catching up", reason="waiting for a full run")
    if job == "restore":
        await daemon.api.sync()
        await daemon.api.until_sample("guard_refused", lambda value: value == 1)
    made = engine()
    work = Sync(made.config, made.database, made.source)
    assert (await work.run(Request(job, "cli"), wait_s=20)).status == "succeeded"
    # By live mode, or by who saw that the refusal stands no more, whichever looked first.
    await daemon.finished(
        trigger=lambda found: found in ("live", "recovery"), status="succeeded", unchanged=KEYS
    )
    await daemon.log.next("live", state="up")


async def test_too_many_pending_keys_are_forgotten_for_a_full_run(
    start: Start, redis: Redis, pg: asyncpg.Connection
) -> None:
    daemon = await start(live={"max_pending": 10})
    await redis.mset({f"balance:{number}": "2" for number in range(11)})
    await daemon.log.next("live", state="catching up", reason=lambda text: "max_pending" in text)
    await daemon.finished(job="sync", trigger="live", status="succeeded", updated=11)
    await daemon.log.next("live", state="up")


async def test_absences_add_up_against_the_guard(
    start: Start, redis: Redis, pg: asyncpg.Connection
) -> None:
    daemon = await start(OWN, guard={"max_loss": 0.25})
    for number in range(5):
        await redis.delete(f"balance:{number}")
        await until(lambda: pg.fetchval("SELECT count(*) FROM balances"), KEYS - 1 - number)
    await redis.delete("balance:5")
    await daemon.log.next(
        "live",
        state="catching up",
        reason=lambda text: "6 of 20 known keys are gone since the last full run" in text,
    )
    assert set(await rows(pg)) >= set(range(5, KEYS))
    # The full run judges by the keys that the last one knew, also where their rows are gone.
    run = await daemon.finished(status="refused")
    assert "6 of 20 known keys are gone" in run["error"]
    await daemon.api.sync(accept_loss="true")
    await daemon.log.next("live", state="up")


async def test_fields_of_a_big_hash_add_up_against_the_guard(
    start: Start, redis: Redis, pg: asyncpg.Connection
) -> None:
    await redis.hset("all", mapping={str(number): "1.50" for number in range(KEYS)})
    daemon = await start({"key": "all", "member": "{user_id}", "type": "hash", **OWN})
    await redis.hdel("all", *map(str, range(10)))
    await until(lambda: pg.fetchval("SELECT count(*) FROM balances"), KEYS - 10)
    await redis.hdel("all", "10")
    run = await daemon.finished(status="refused")
    assert f"11 of {KEYS} known keys are gone" in run["error"]
    assert len(await rows(pg)) == KEYS - 10


async def test_what_was_pruned_and_read_back_can_be_lost(
    start: Start, redis: Redis, engine: Callable[..., Engine], pg: asyncpg.Connection
) -> None:
    daemon = await start(live={"rescan_interval": 3600})
    await pg.execute("UPDATE balances SET synced_at = '2026-01-01' WHERE user_id < 8")
    made = engine(prune={"enabled": True})
    assert (await made.sync(job="prune", idle_s=3600.0)).counts.deleted == 8
    pruned = "SELECT pruned FROM balancesync.baselines"
    assert await pg.fetchval(pruned) == 8
    await redis.mset({f"balance:{number}": "1.50" for number in range(8)})
    await until(lambda: pg.fetchval(pruned), 0)
    await redis.delete(*[f"balance:{number}" for number in range(11)])
    await daemon.log.next(
        "live",
        state="catching up",
        reason=lambda text: f"11 of {KEYS} known keys are gone" in text,
    )


async def test_keys_that_no_full_run_knew_are_known_once_they_are_brought_over(
    start: Start, redis: Redis, engine: Callable[..., Engine], pg: asyncpg.Connection
) -> None:
    daemon = await start()
    made = engine(prune={"enabled": True})
    assert (await made.sync(job="prune", idle_s=0.0)).counts.deleted == KEYS
    await redis.mset({f"balance:{number}": "7" for number in range(100, 105)})
    await until(lambda: pg.fetchval("SELECT count(*) FROM balances"), KEYS + 5)
    await redis.delete("balance:100", "balance:101")
    await daemon.api.until("/runs", lambda found: found["runs"][0]["absent"] == KEYS + 2)
    assert daemon.daemon.state.live == "up"
    await redis.delete("balance:102")
    run = await daemon.finished(status="refused")
    assert "3 of 5 known keys are gone" in run["error"]


async def test_keys_wait_while_another_writer_is_at_work(
    start: Start, redis: Redis, pg: asyncpg.Connection
) -> None:
    daemon = await start()
    key = lock_key("writer", "balancesync")
    # The lock is given back between two flushes.
    await until(lambda: pg.fetchval("SELECT pg_try_advisory_lock($1)", key), True)
    await redis.set("balance:1", "2")
    await daemon.api.until_sample("live_pending_keys", lambda keys: keys == 1)
    await redis.set("balance:1", "3")
    await redis.set("balance:2", "3")
    await daemon.api.until_sample("live_pending_keys", lambda keys: keys == 2)
    assert set((await rows(pg)).values()) == {Decimal("1.50")}
    assert daemon.daemon.state.live == "up"
    await pg.execute("SELECT pg_advisory_unlock($1)", key)
    await until_balance(pg, 1, "3.00")
    await until_balance(pg, 2, "3.00")


async def test_whoever_waits_for_the_lock_gets_it_however_busy_live_mode_is(
    start: Start, redis: Redis, pg: asyncpg.Connection, engine: Callable[..., Any]
) -> None:
    daemon = await start(live={"flush_interval": 0.01})

    # Told and not cancelled: the client may take a cancellation for a broken connection.
    ends = asyncio.Event()

    async def write() -> None:
        number = 0
        while not ends.is_set():
            number += 1
            await redis.set(f"balance:{number % KEYS}", number)

    writing = asyncio.create_task(write())
    try:
        for _ in range(3):
            assert (await daemon.api.sync())["status"] == "succeeded"
            # Another process, which may wait a little.
            other = engine()
            sync = Sync(other.config, other.database, other.source)
            assert (await sync.run(Request("sync", "cli"), wait_s=2)).status == "succeeded"
    finally:
        ends.set()
        await writing
    assert daemon.daemon.state.live == "up"


async def test_verify_finds_no_drift_in_what_moves(
    start: Start, redis: Redis, pg: asyncpg.Connection
) -> None:
    daemon = await start(live={"flush_interval": 0.2})
    for turn in range(2, 5):
        await redis.mset({f"balance:{number}": turn for number in range(KEYS)})
        ticket, _ = daemon.runner.submit(Request("verify", "cli", mode="verify"))
        run = await ticket.done
        assert (run.status, run.counts.written, run.counts.unchanged) == ("succeeded", 0, KEYS)


async def test_clearing_the_cache_begins_with_a_full_run(start: Start, redis: Redis) -> None:
    daemon = await start(live={"rescan_interval": 3600})
    _, cleared = await daemon.api.ask("/clear-cache", "DELETE")
    assert cleared["cleared"]["live"] is True
    await daemon.log.next("live", state="catching up", reason=lambda text: "demand" in text)
    await daemon.log.next("live", state="up")
    assert [run["trigger"] for run in daemon.log.all("run_finished", job="sync")] == ["live"] * 2


async def test_the_session_is_made_anew_and_nothing_is_lost(
    start: Start, redis: Redis, pg: asyncpg.Connection
) -> None:
    daemon = await start()
    await redis.set("balance:1", "2")
    await until_balance(pg, 1, "2.00")
    # The session that shows the open run as running.
    killed = await pg.fetchval(
        """SELECT pg_terminate_backend(l.pid) FROM pg_locks AS l, balancesync.runs AS r
           WHERE l.locktype = 'advisory' AND r.job = 'live'
               AND (l.classid::bigint << 32) | l.objid::bigint = r.lock_key"""
    )
    assert killed
    await redis.set("balance:1", "3")
    await until_balance(pg, 1, "3.00")
    await daemon.log.next("live", state="down")
    await daemon.log.next("live", state="up")
    assert len(daemon.log.all("run_finished", job="sync")) == 1


async def test_a_full_run_makes_up_for_a_restart_of_postgres(
    redis: Redis, redis_url: str, private_postgres: Callable[..., PostgresServer]
) -> None:
    server = private_postgres()
    following = {"enabled": True, "flush_interval": 0.02, "rescan_interval": 3600}
    schedule = {"on_start": True, "jobs": {}}
    config = daemon_config(server.dsn, redis_url, live=following, schedule=schedule)
    async with Inside(config) as daemon:
        await daemon.log.next("live", state="up")
        await redis.set("balance:1", "2")
        async with connected(server.dsn) as pg:
            await until_balance(pg, 1, "2.00")
        server.kill()
        server.start()
        await daemon.log.next("live", state="catching up")
        await daemon.log.next("live", state="up")
        await redis.set("balance:1", "3")
        async with connected(server.dsn) as pg:
            await until_balance(pg, 1, "3.00")


async def test_what_the_acl_forbids_is_said_once_and_the_schedule_goes_on(
    start: Start, redis: Redis, redis_url: str, pg: asyncpg.Connection
) -> None:
    await acl(
        redis,
        "on nopass ~balance:* +@all -client +client|id +client|info +client|setname resetchannels",
    )
    url = redis_url.replace("redis://", "redis://plain:x@")
    try:
        daemon = await start(redis={"url": url}, up=False)
        told = await daemon.log.next("live", state="down")
        assert told["reason"].endswith(
            "ACL SETUSER ... &__redis__:invalidate, see docs/security.md"
        )
        await daemon.api.sync()
        assert len(await rows(pg)) == KEYS
        await acl(redis, "&__redis__:invalidate")
        told = await daemon.log.next("live", state="down")
        # Before Redis 7 it is the whole command.
        assert "ACL SETUSER ... +client" in told["reason"]
        assert len(daemon.log.all("live")) == 2
        await acl(redis, "+client|tracking")
        await daemon.log.next("live", state="up")
    finally:
        await redis.acl_deluser("plain")


async def test_each_flush_keeps_its_changes(
    start: Start, redis: Redis, pg: asyncpg.Connection
) -> None:
    await start(OWN, history={"enabled": True}, guard={"max_loss": 1.0})
    for amount in ("2", "3"):
        await redis.mset({"balance:1": amount, "balance:2": amount})
        await until_balance(pg, 1, f"{amount}.00")
    await redis.delete("balance:1")
    await until_balance(pg, 1, None)
    changes = await pg.fetch(
        "SELECT at, op::text, old ->> 'balance' AS old, new ->> 'balance' AS new"
        " FROM balancesync.changes WHERE key = '{1}' ORDER BY at"
    )
    assert [(row["op"], row["old"], row["new"]) for row in changes] == [
        ("i", None, "1.50"),
        ("u", "1.50", "2.00"),
        ("u", "2.00", "3.00"),
        ("d", "3.00", None),
    ]
    assert len({row["at"] for row in changes}) == 4
    # What one flush wrote has one time, and it's the rows' own.
    [other] = await pg.fetch("SELECT synced_at FROM balances WHERE user_id = 2")
    assert other["synced_at"] == changes[2]["at"]


async def test_live_mode_without_history_ends_one_that_another_has_begun(
    start: Start, redis: Redis, pg: asyncpg.Connection, engine: Callable[..., Engine]
) -> None:
    await start()
    await redis.set("balance:1", "2")
    await until_balance(pg, 1, "2.00")
    # The configuration has changed, and the daemon wasn't started again.
    await engine(history={"enabled": True}).good()
    assert await pg.fetchval("SELECT count(*) FROM balancesync.histories") == 1
    await redis.set("balance:1", "3")
    await until_balance(pg, 1, "3.00")
    assert await pg.fetchval("SELECT count(*) FROM balancesync.histories") == 0


async def test_a_restore_and_a_prune_leave_the_rows_alone(
    start: Start, redis: Redis, pg: asyncpg.Connection, engine: Callable[..., Engine]
) -> None:
    daemon = await start()
    before = await pg.fetch("SELECT *, xmin FROM balances ORDER BY user_id")
    await redis.flushall()
    await daemon.log.next("live", state="catching up")
    await daemon.finished(status="refused")
    made = engine(prune={"enabled": True})

    async def run(job: Job) -> Run:
        work = Sync(made.config, made.database, made.source)
        return await work.run(Request(job, "cli"), wait_s=20)

    restored = await run("restore")
    assert (restored.status, restored.counts.inserted) == ("succeeded", KEYS)
    await daemon.log.next("live", state="up")
    pruned = await run("prune")
    assert (pruned.status, pruned.counts.deleted) == ("succeeded", KEYS)
    await redis.set("balance:0", "7")
    await until(lambda: rows(pg), {**dict.fromkeys(range(1, KEYS), Decimal("1.50")), 0: Decimal(7)})
    # Not one of the keys that went was taken for a loss.
    assert (await daemon.api.document("/status"))["live"] == "up"
    after = await pg.fetch("SELECT *, xmin FROM balances ORDER BY user_id")
    assert after[1:] == before[1:]


async def test_every_kind_of_mapping_follows(
    start: Start, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute(
        """CREATE TABLE users (telegram_id bigint PRIMARY KEY, balance bigint, sync_at timestamptz);
           INSERT INTO users VALUES (7, 70), (8, 80)"""
    )
    await redis.flushall()
    await redis.mset({"7": "70", "8": "80", "cache:7": "x", "9": "90"})
    await redis.hset("account:1", mapping={"free": "1", "held": "2"})
    await redis.set("doc:1", '{"balance": "1"}')
    await redis.hset("members", mapping={"1": "1", "2": "2"})
    columns = {"user_id": "bigint", "balance": "numeric(20,2)"}
    daemon = await start(
        USERS,
        {
            "name": "accounts",
            "key": "account:{user_id}",
            "type": "hash",
            "table": "accounts",
            "columns": {"user_id": "bigint", "free": "bigint", "held": "bigint"},
        },
        {
            "name": "docs",
            "key": "doc:{user_id}",
            "type": "json",
            "table": "docs",
            "columns": columns,
        },
        {
            "name": "members",
            "key": "members",
            "type": "hash",
            "member": "{user_id}",
            "table": "members",
            "on_absent": "delete",
            "columns": columns,
        },
    )
    await redis.mset({"7": "71", "cache:8": "x", "9": "91", "10": "1"})
    await redis.hincrby("account:1", "held", 5)
    await redis.set("doc:1", '{"balance": 2.5}')
    await redis.hset("members", "1", "1.5")
    await redis.hdel("members", "2")
    await until(lambda: pg.fetchval("SELECT balance FROM users WHERE telegram_id = 7"), 71)
    await until(lambda: pg.fetchval("SELECT held FROM accounts"), 7)
    await until(lambda: pg.fetchval("SELECT balance FROM docs"), Decimal("2.50"))
    await until(
        lambda: pg.fetchval("SELECT array_agg(balance ORDER BY user_id) FROM members"),
        [Decimal("1.50")],
    )
    # No row is ever made in a table of the application.
    assert await pg.fetchval("SELECT count(*) FROM users") == 2
    await daemon.stop()
    run = await daemon.finished(job="live")
    assert run["mappings"]["users"]["not_found"] == 2
    assert (run["mappings"]["members"]["deleted"], run["warnings"]) == (1, [])


async def test_a_big_hash_of_a_wrong_type_holds_up_no_other_mapping(
    start: Start, redis: Redis, pg: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pending, "_LEAST_PAUSE_S", 0.0)
    await redis.hset("big", "1", "5")
    big = {"name": "big", "key": "big", "type": "hash", "member": "{user_id}", "table": "bigs"}
    daemon = await start(big, {"name": "strings"})
    for balance in ("2", "3", "4"):
        await redis.mset({"big": "oops", "balance:1": balance})
        await until_balance(pg, 1, f"{balance}.00")
    await redis.eval(
        "redis.call('DEL', KEYS[1]) return redis.call('HSET', KEYS[1], '1', '6')", 1, "big"
    )
    await until(lambda: pg.fetchval("SELECT balance FROM bigs WHERE user_id = 1"), 6)
    assert (await daemon.api.document("/status"))["live"] == "up"
    await daemon.stop()
    run = await daemon.finished(job="live")
    [warning] = run["warnings"]
    assert warning.startswith('mapping "big": the big hash big in Redis at ')
    assert run["status"] == "succeeded"


async def test_a_table_that_is_altered_is_written_no_more(
    start: Start, redis: Redis, pg: asyncpg.Connection
) -> None:
    daemon = await start()
    await redis.mset({"balance:1": "2.25", "balance:100": "1"})
    await until_balance(pg, 100, "1.00")
    await pg.execute("ALTER TABLE balances ALTER balance TYPE numeric(20,1)")
    await redis.mset({"balance:1": "7.77", "balance:101": "8.88"})
    told = await daemon.log.next("live", state="down")
    assert "the table public.balances was altered or replaced" in told["reason"]
    told = await daemon.log.next("live", state="down")
    assert 'column "balance" is numeric(20,1), not numeric(20,2)' in told["reason"]
    assert await pg.fetchval("SELECT count(*) FROM balances WHERE balance > 7") == 0
    await pg.execute("ALTER TABLE balances ALTER balance TYPE numeric(20,2)")
    await until_balance(pg, 1, "7.77")
    await until_balance(pg, 101, "8.88")


async def test_a_cluster_is_told_that_it_has_the_schedule_alone(start: Start) -> None:
    daemon = await start(redis={"cluster": True}, up=False)
    told = await daemon.log.next("live", state="down")
    assert "live mode isn't available for a cluster yet" in told["reason"]
    assert (await daemon.api.document("/health"))["checks"]["live"]["status"] == "degraded"


async def test_a_standby_follows_nothing_until_it_leads(
    start: Start, redis: Redis, pg: asyncpg.Connection
) -> None:
    first = await start()
    second = await start(up=False)
    await second.log.next("leader", leads=False, leader=first.daemon.state.name)
    _, health = await second.api.ask("/health")
    assert health["checks"]["live"]["status"] == "ok"
    assert health["checks"]["live"]["detail"].startswith("off: ")
    await first.stop()
    await second.log.next("live", state="up")
    await redis.set("balance:1", "2")
    await until_balance(pg, 1, "2.00")


async def test_a_failover_is_a_gap(
    postgres_dsn: str, private_redis: Callable[..., RedisServer], pg: asyncpg.Connection
) -> None:
    primary = private_redis({"repl-diskless-sync-delay": "0"})
    replica = private_redis({"replicaof": f"127.0.0.1 {primary.port}"})
    watch = {
        "sentinel monitor": f"shop 127.0.0.1 {primary.port} 1",
        "sentinel down-after-milliseconds": "shop 500",
        "sentinel failover-timeout": "shop 2000",
    }
    async with Redis(port=primary.port) as old, Redis(port=replica.port) as new:
        await old.mset({f"balance:{number}": "1.50" for number in range(KEYS)})
        await until(new.dbsize, KEYS)
        sentinel = private_redis(watch)
        async with Redis(port=sentinel.port) as control:
            slaves: Callable[..., Awaitable[Any]] = control.sentinel_slaves
            await until(lambda: _count(slaves("shop")), 1)
        config = daemon_config(
            postgres_dsn,
            "redis://ignored:6379/0",
            redis={"sentinel": [f"127.0.0.1:{sentinel.port}"], "sentinel_service": "shop"},
            live={"enabled": True, "flush_interval": 0.02, "rescan_interval": 0},
        )
        async with Inside(config) as daemon:
            await daemon.log.next("live", state="up")
            primary.kill()
            await daemon.log.next("live", state="catching up", reason=is_of_a_connection)
            await until(lambda: _role(new), "master")
            await new.set("balance:1", "2")
            await daemon.log.next("live", state="up")
            await until_balance(pg, 1, "2.00")
            await new.set("balance:1", "3")
            await until_balance(pg, 1, "3.00")


async def _count(found: Awaitable[Any]) -> int:
    return len(await found)


async def _role(client: Redis) -> str:
    return str((await client.info("replication"))["role"])


async def test_a_lead_that_was_lost_for_a_moment_is_a_gap(
    start: Start, redis: Redis, pg: asyncpg.Connection
) -> None:
    daemon = await start()
    await pg.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name LIKE 'balancesync _%'"
    )
    await daemon.log.next("leader", leads=False)
    await daemon.log.next("live", state="down")
    await daemon.log.next("live", state="up")
    assert len(daemon.log.all("run_finished", job="sync", status="succeeded")) == 2
    await redis.set("balance:1", "2")
    await until_balance(pg, 1, "2.00")
