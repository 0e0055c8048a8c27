"""Live mode when something comes in between: other writers, failures, servers that are others."""

import asyncio
from collections.abc import Callable
from decimal import Decimal
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from engine import Engine, make_config
from following import KEYS, OWN, Start, kill_tracking, rows, until, until_balance
from redis import Redis as BlockingRedis
from redis.asyncio import Redis

from balancesync import flush, live, tracking
from balancesync.database import lock_key
from balancesync.embedded import RedisServer
from balancesync.errors import RedisUnavailable, SourceChanged
from balancesync.keyed import KeyedWriter
from balancesync.mapping import Mapping
from balancesync.part import reading_of, scan
from balancesync.source import Source
from balancesync.target import Diff

pytestmark = pytest.mark.usefixtures("quick", "filled")

LONG = {"rescan_interval": 3600}
BIG: dict[str, Any] = {
    "name": "big",
    "key": "big",
    "type": "hash",
    "member": "{user_id}",
    "table": "bigs",
}
WRITER = lock_key("writer", "balancesync")


@pytest.fixture
def client(redis_url: str) -> Any:
    with BlockingRedis.from_url(redis_url) as blocking:
        yield blocking


def after_reading(monkeypatch: pytest.MonkeyPatch, strike: Callable[[], object]) -> None:
    """Call `strike` once, when a flush has read and compared, and has written nothing."""
    diff, left = KeyedWriter.diff, [strike]

    async def struck(writer: KeyedWriter) -> Diff:
        found = await diff(writer)
        if left:
            left.pop()()
        return found

    monkeypatch.setattr(KeyedWriter, "diff", struck)


# --- other writers --------------------------------------------------------------------------------


async def test_a_writer_that_comes_between_two_pieces_gets_the_lock_and_nothing_is_lost(
    start: Start, redis: Redis, pg: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_PIECE", 10)
    daemon = await start(live=LONG)
    await until(lambda: pg.fetchval("SELECT pg_try_advisory_lock($1)", WRITER), True)
    await redis.mset({f"balance:{each}": "2" for each in range(1000)})
    await daemon.api.until_sample("live_pending_keys", lambda keys: keys == 1000)
    await pg.execute("SELECT pg_advisory_unlock($1)", WRITER)
    await until(lambda: pg.fetchval("SELECT count(*) > 0 FROM balances WHERE balance = 2"), True)
    # As soon as one of the hundred pieces is done.
    await until(lambda: pg.fetchval("SELECT pg_try_advisory_lock($1)", WRITER), True)
    done = await pg.fetchval("SELECT count(*) FROM balances WHERE balance = 2")
    assert 0 < done < 1000
    # What has been written changes again, and what hasn't, too.
    await redis.mset({f"balance:{each}": "3" for each in range(0, 1000, 2)})
    await daemon.api.until_sample("live_pending_keys", lambda keys: bool(keys and keys > 500))
    await pg.execute("SELECT pg_advisory_unlock($1)", WRITER)
    wanted = {each: Decimal(3 if each % 2 == 0 else 2) for each in range(1000)}
    await until(lambda: rows(pg), wanted)
    await daemon.api.until_sample("live_pending_keys", lambda keys: keys == 0)
    assert daemon.daemon.state.live == "up"
    assert len(daemon.log.all("run_finished", job="sync")) == 1


async def test_a_big_hash_whose_flush_fails_is_read_again(
    start: Start, redis: Redis, pg: asyncpg.Connection
) -> None:
    await redis.hset("big", mapping={"1": "1", "2": "2"})
    daemon = await start(BIG, live=LONG)
    await redis.hset("big", "1", "5")
    await until(lambda: pg.fetchval("SELECT balance FROM bigs WHERE user_id = 1"), 5)
    # That flush is over when the lock is free.
    await until(lambda: pg.fetchval("SELECT pg_try_advisory_lock($1)", WRITER), True)
    killed = await pg.fetchval(
        """SELECT pg_terminate_backend(l.pid) FROM pg_locks AS l, balancesync.runs AS r
           WHERE l.locktype = 'advisory' AND r.job = 'live'
               AND (l.classid::bigint << 32) | l.objid::bigint = r.lock_key"""
    )
    assert killed
    # Told once, and never again.
    await redis.hset("big", "1", "6")
    await pg.execute("SELECT pg_advisory_unlock($1)", WRITER)
    await daemon.log.next("live", state="down")
    await until(lambda: pg.fetchval("SELECT balance FROM bigs WHERE user_id = 1"), 6)
    await daemon.log.next("live", state="up")
    assert len(daemon.log.all("run_finished", job="sync")) == 1


async def test_no_row_is_deleted_while_the_last_restore_is_unfinished(
    start: Start, redis: Redis, pg: asyncpg.Connection
) -> None:
    daemon = await start(OWN, live=LONG)
    restore = (
        "INSERT INTO balancesync.runs (id, job, trigger, mode, status, started_at, attempts,"
        " mappings, warnings, lock_key)"
        " VALUES ($1, 'restore', 'cli', 'apply', $2, now(), 1, '{}', '{}', 0)"
    )
    await pg.execute(restore, UUID(int=1), "failed")
    await redis.delete("balance:3")
    await redis.set("balance:4", "2")
    await until_balance(pg, 4, "2.00")
    seen = "SELECT (gone, deleted) = (1, 0) FROM balancesync.baselines"
    await until(lambda: pg.fetchval(seen), True)
    assert len(await rows(pg)) == KEYS
    await pg.execute(restore, UUID(int=2), "succeeded")
    await redis.delete("balance:5")
    await until_balance(pg, 5, None)
    # What wasn't deleted then is the next full run's.
    await daemon.api.sync()
    assert set(await rows(pg)) == set(range(KEYS)) - {3, 5}


async def test_a_refusal_of_another_process_stands_for_live_mode(
    start: Start, redis: Redis, engine: Callable[..., Engine], pg: asyncpg.Connection
) -> None:
    daemon = await start(live=LONG)
    strict = engine(guard={"max_loss": 0.05})
    await redis.delete("balance:0", "balance:1")
    await until(lambda: pg.fetchval("SELECT gone FROM balancesync.baselines"), 2)
    sync = await strict.sync()
    assert sync.status == "refused"
    await redis.set("balance:5", "9")
    await daemon.log.next(
        "live", state="catching up", reason=lambda text: "refusal of mapping" in (text or "")
    )
    assert set((await rows(pg)).values()) == {Decimal("1.50")}


async def test_more_changes_than_allowed_at_once_are_for_a_full_run_to_judge(
    start: Start, redis: Redis, pg: asyncpg.Connection
) -> None:
    daemon = await start(OWN, guard={"max_change": 0.3, "max_loss": 0.5}, live=LONG)
    # Just as many as may be: updates and deletions.
    async with redis.pipeline(transaction=True) as once:
        once.mset({f"balance:{each}": "2" for each in range(4)})
        once.delete("balance:18", "balance:19")
        await once.execute()
    await until_balance(pg, 3, "2.00")
    await until_balance(pg, 19, None)
    assert daemon.daemon.state.live == "up"
    async with redis.pipeline(transaction=True) as once:
        once.mset({f"balance:{each}": "3" for each in range(6)})
        once.delete("balance:17")
        await once.execute()
    told = await daemon.log.next("live", state="catching up", reason=lambda text: "at once" in text)
    assert "7 rows would be changed at once, more than guard.max_change = 0.3" in told["reason"]
    run = await daemon.finished(status="refused")
    assert "7 of 18 rows would be updated or deleted" in run["error"]
    assert (await rows(pg))[3] == Decimal(2)


# --- between reading and writing ------------------------------------------------------------------


async def test_what_a_flushall_took_after_it_was_read_is_not_written(
    start: Start,
    redis: Redis,
    client: Any,
    pg: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    daemon = await start(live=LONG)
    after_reading(monkeypatch, client.flushall)
    await redis.set("balance:1", "2")
    await daemon.log.next("live", state="catching up", reason=lambda text: "FLUSHALL" in text)
    await daemon.finished(status="refused")
    assert set((await rows(pg)).values()) == {Decimal("1.50")}


async def test_a_big_hash_made_again_at_once_after_a_flushall_is_not_followed(
    start: Start,
    redis: Redis,
    client: Any,
    pg: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await redis.hset("big", mapping={"1": "5", "2": "5"})
    daemon = await start(BIG, live=LONG)
    left = [1]

    async def struck(*args: Any) -> None:
        if left:
            left.clear()
            # It never has fewer fields: only what is told of the FLUSHALL tells zeros from changes.
            with client.pipeline(transaction=True) as once:
                once.flushall()
                once.hset("big", mapping={"1": "0", "2": "0"})
                once.execute()
        await scan(*args)

    monkeypatch.setattr(flush, "scan", struck)
    await redis.hset("big", "1", "6")
    await daemon.log.next("live", state="catching up", reason=lambda text: "FLUSHALL" in text)
    await daemon.finished(status="refused")
    assert await pg.fetchval("SELECT DISTINCT balance FROM bigs") == Decimal(5)


async def test_a_key_that_is_back_before_its_row_is_deleted_keeps_it(
    start: Start,
    redis: Redis,
    client: Any,
    pg: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await pg.execute("CREATE TABLE deleted (user_id bigint)")
    daemon = await start(OWN, live=LONG)
    await pg.execute(
        """CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
           $$ BEGIN INSERT INTO deleted VALUES (old.user_id); RETURN old; END $$;
           CREATE TRIGGER note BEFORE DELETE ON balances FOR EACH ROW EXECUTE FUNCTION note()"""
    )
    after_reading(monkeypatch, lambda: client.set("balance:1", "8"))
    await redis.delete("balance:1", "balance:2")
    await until_balance(pg, 2, None)
    await until_balance(pg, 1, "8.00")
    assert await pg.fetchval("SELECT array_agg(user_id) FROM deleted") == [2]
    await until(
        lambda: pg.fetchval("SELECT (gone, deleted) = (1, 1) FROM balancesync.baselines"), True
    )
    assert daemon.daemon.state.live == "up"


# --- gaps -----------------------------------------------------------------------------------------


async def test_a_run_of_one_mapping_or_one_that_fails_closes_no_gap(
    start: Start, redis: Redis, pg: asyncpg.Connection
) -> None:
    daemon = await start(live=LONG, guard={"max_rejects": 0.1})
    for _ in range(2):
        await kill_tracking(redis)
        await daemon.log.next("live", state="catching up", reason="waiting for a full run")
        if _ == 0:
            await daemon.log.next("live", state="up")
    assert (await daemon.api.sync(mapping="balances"))["status"] == "succeeded"
    assert daemon.daemon.state.live == "catching up"
    await redis.mset({f"balance:{each}": "bad" for each in range(5)})
    assert (await daemon.api.sync())["status"] == "failed"
    assert daemon.daemon.state.live == "catching up"
    await redis.mset({f"balance:{each}": "1" for each in range(5)})
    await daemon.api.sync()
    await daemon.log.next("live", state="up")


async def test_swapped_databases_are_a_gap_and_never_read_as_changes(
    start: Start, redis: Redis, redis_url: str, pg: asyncpg.Connection
) -> None:
    daemon = await start(OWN, live=LONG)
    async with Redis.from_url(redis_url.replace("/0", "/1")) as other:
        await other.mset({f"balance:{each}": "7" for each in range(3)})
    swap: Any = redis.execute_command
    await swap("SWAPDB", 0, 1)
    try:
        await redis.set("balance:1", "8")
        await daemon.log.next("live", state="catching up", reason=lambda text: "SWAPDB" in text)
        await daemon.finished(status="refused")
        assert set((await rows(pg)).values()) == {Decimal("1.50")}
        assert len(await rows(pg)) == KEYS
    finally:
        await swap("SWAPDB", 0, 1)


async def test_swapped_databases_are_noticed_where_nothing_changes(
    start: Start, redis: Redis
) -> None:
    daemon = await start(live=LONG)
    swap: Any = redis.execute_command
    await swap("SWAPDB", 0, 1)
    try:
        await daemon.log.next("live", state="catching up", reason=lambda text: "SWAPDB" in text)
    finally:
        await swap("SWAPDB", 0, 1)


async def test_a_lead_that_is_lost_and_regained_in_one_turn_is_a_gap(
    start: Start, redis: Redis, pg: asyncpg.Connection
) -> None:
    daemon = await start(live=LONG)
    name = daemon.daemon.state.name
    daemon.daemon._live.lead(False, None, None)
    daemon.daemon._live.lead(True, name, None)
    # Another daemon may have led in between, and have written what is older by now.
    await pg.execute("UPDATE balances SET balance = 0 WHERE user_id = 1")
    await daemon.log.next("live", state="catching up", reason="waiting for a full run")
    await daemon.log.next("live", state="up")
    await until_balance(pg, 1, "1.50")


async def test_a_change_that_is_pending_when_the_daemon_ends_is_brought_over(
    start: Start, redis: Redis, pg: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What Redis tells is read late: it has to be waited for.
    monkeypatch.setattr(tracking, "_REST_S", 0.5)
    daemon = await start(live={**LONG, "flush_interval": 5})
    # The first one goes at once, and from then on the interval holds the next one back.
    await redis.set("balance:1", "2")
    await until_balance(pg, 1, "2.00")
    await redis.mset({"balance:1": "3", "balance:2": "3"})
    async with asyncio.timeout(4):
        await daemon.stop()
    assert (await rows(pg))[1] == (await rows(pg))[2] == Decimal(3)


# --- who answers ----------------------------------------------------------------------------------


@pytest.fixture
async def served(private_redis: Callable[..., RedisServer], postgres_dsn: str) -> Any:
    """A server with keys, a Source on it that knows who it is, and how to read there."""
    server = private_redis()
    config = make_config(postgres_dsn, server.url)
    async with Redis.from_url(server.url) as client, Source(config.redis) as source:
        await client.set("balance:1", "1")
        await client.save()
        yield server, client, source, reading_of(Mapping(config.mapping[0]))


async def test_a_server_that_was_restarted_is_not_read_for_the_one_that_was_met(
    served: Any,
) -> None:
    server, _, source, reading = served
    identity = await source.identity()
    found = await source.fetch(reading, [b"balance:1"], identity=identity)
    assert found.values == [b"1"]
    server.kill()
    server.start()
    # The first to ask meets the end of the connection; who asks then meets the other server.
    with pytest.raises((SourceChanged, RedisUnavailable)):
        await source.fetch(reading, [b"balance:1"], identity=identity)
    with pytest.raises(SourceChanged, match="was restarted or replaced"):
        await source.fetch(reading, [b"balance:1"], identity=identity)
    assert (await source.fetch(reading, [b"balance:1"])).values == [b"1"]


@pytest.mark.parametrize("asked", ["values", "values of the one that was met", "presence"])
async def test_a_primary_that_was_demoted_answers_nothing(
    served: Any, private_redis: Callable[..., RedisServer], asked: str
) -> None:
    _, client, source, reading = served
    keys = [b"balance:1", b"balance:2"]
    identity = None if asked == "values" else await source.identity()

    async def ask() -> Any:
        if asked == "presence":
            return await source.exists(reading, keys)
        return (await source.fetch(reading, keys, identity=identity)).values

    assert await ask() == ([True, False] if asked == "presence" else [b"1", None])
    other = private_redis()
    await client.replicaof("127.0.0.1", other.port)
    # The first to ask does so by a connection that is open, and the next one can't open another.
    for _ in range(2):
        with pytest.raises(RedisUnavailable, match="is a replica"):
            await ask()
