"""Up to when everything is in PostgreSQL: what live mode has proven, whoever is gone since."""

import asyncio
import json
import signal
from collections.abc import Callable
from datetime import UTC, datetime
from math import inf
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from engine import Engine
from redis.asyncio import Redis
from running import Inside, daemon_config, processes

from balancesync import cli
from balancesync.config import Config
from balancesync.embedded import RedisServer
from balancesync.model import Request
from balancesync.pending import Pending

LIVE: dict[str, Any] = {"enabled": True, "flush_interval": 0.05, "rescan_interval": 0}


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def status(config: Config, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What the command says where no daemon answers."""
    capsys.readouterr()
    assert cli.execute(["status", "--json"], config) == 0
    return dict(json.loads(capsys.readouterr().out))


async def copied(pg: asyncpg.Connection, number: int, balance: int) -> datetime:
    """Wait until the row has this balance; returns PostgreSQL's time then."""
    async with asyncio.timeout(30):
        while True:
            sql = "SELECT balance, clock_timestamp() FROM balances WHERE user_id = $1"
            row = await pg.fetchrow(sql, number)
            if row is not None and row[0] == balance:
                return datetime.fromisoformat(row[1].isoformat())
            await asyncio.sleep(0.01)


@pytest.fixture
def on_private_redis(
    postgres_dsn: str, private_redis: Callable[..., RedisServer]
) -> tuple[Config, RedisServer]:
    server = private_redis({"appendonly": "yes"})
    return daemon_config(postgres_dsn, server.url, live=LIVE), server


async def test_what_live_mode_has_copied_is_known_when_redis_is_gone(
    on_private_redis: tuple[Config, RedisServer],
    pg: asyncpg.Connection,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, server = on_private_redis
    async with Redis.from_url(server.url) as redis:
        await redis.mset({f"balance:{n}": "1" for n in range(100)})
        async with Inside(config) as daemon:
            await daemon.log.next("live", state="up")
            began = await pg.fetchval("SELECT max(started_at) FROM balancesync.runs")
            # So that the last full run began in another second than the last change.
            earlier = "UPDATE balancesync.runs SET started_at = started_at - interval '4 min'"
            await pg.execute(earlier)
            changed_at = await pg.fetchval("SELECT clock_timestamp()")
            await redis.set("balance:7", "8")
            await copied(pg, 7, 8)

            def covers(found: dict[str, Any]) -> bool:
                return bool(moment(found["safe_until"]) > changed_at)

            await daemon.api.until("/status", covers)
            server.kill()
            gone_at = await pg.fetchval("SELECT clock_timestamp()")
            found = await daemon.api.until("/status", lambda it: not it["redis"]["connected"])
            until = moment(found["safe_until"])
            assert began < changed_at < until <= gone_at
            said = until.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            kept = f"Redis doesn't answer; everything up to {said} is in PostgreSQL"
            assert found["verdict"]["line"].startswith(kept)
            assert found["verdict"]["level"] == "act"
            # It stays so for as long as Redis is away, and after the daemon.
            later = await daemon.api.document("/status")
            assert later["safe_until"] == found["safe_until"]
        alone = await asyncio.to_thread(status, config, capsys)
        assert alone["safe_until"] == found["safe_until"]
        assert said in alone["verdict"]["line"]
        check = alone["health"]["checks"]["live"]
        assert (check["status"], "no daemon leads" in check["detail"]) == ("degraded", True)
        async with Inside(config) as again:
            await again.leads()
            known = await again.api.until("/status", lambda it: it["safe_until"] is not None)
            assert known["safe_until"] == found["safe_until"]


async def test_a_daemon_that_was_killed_leaves_what_it_knew(
    on_private_redis: tuple[Config, RedisServer],
    tmp_path: Path,
    pg: asyncpg.Connection,
    postgres_dsn: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, server = on_private_redis
    async with Redis.from_url(server.url) as redis:
        await redis.mset({f"balance:{n}": "1" for n in range(100)})
        async with processes(tmp_path, postgres_dsn, server.url) as started:
            live = "[live]\nenabled = true\nrescan_interval = 0\n"
            daemon = await started.daemon(file=started.file(more=live))
            await daemon.log.next("live mode is up")
            changed_at = await pg.fetchval("SELECT clock_timestamp()")
            await redis.set("balance:7", "8")
            await copied(pg, 7, 8)
            await daemon.api.until(
                "/status", lambda it: it["safe_until"] and moment(it["safe_until"]) > changed_at
            )
            daemon.send(signal.SIGKILL)
            await daemon.ended()
        server.kill()
        found = await asyncio.to_thread(status, config, capsys)
        assert moment(found["safe_until"]) > changed_at
        assert found["verdict"]["line"].startswith("Redis doesn't answer; everything up to ")
        assert any("balancesync restore" in each for each in found["verdict"]["advice"])


async def test_what_waits_for_a_writer_is_not_said_to_be_there(
    postgres_dsn: str, redis_url: str, redis: Redis, pg: asyncpg.Connection
) -> None:
    config = daemon_config(postgres_dsn, redis_url, live=LIVE)
    await redis.mset({f"balance:{n}": "1" for n in range(100)})
    async with Inside(config) as daemon:
        await daemon.log.next("live", state="up")
        async with pg.transaction():
            # The flush can't write this row, and nothing that changes later is there before it.
            await pg.execute("SELECT FROM balances WHERE user_id = 7 FOR UPDATE")
            held_at = await pg.fetchval("SELECT clock_timestamp()")
            await redis.set("balance:7", "8")
            await daemon.api.until("/status", lambda it: it["live_pending"] > 0)
            for _ in range(30):
                await redis.set("balance:8", "9")
                await asyncio.sleep(0.05)
            found = await daemon.api.document("/status")
            assert found["live_pending"] > 0
            assert moment(found["safe_until"]) < held_at
            until = await pg.fetchval("SELECT until FROM balancesync.followed")
            assert until is None or until < held_at
        await copied(pg, 8, 9)
        await daemon.api.until("/status", lambda it: moment(it["safe_until"]) > held_at)


async def test_a_verify_waits_for_live_mode_and_lets_its_run_go_first(
    postgres_dsn: str, redis_url: str, redis: Redis
) -> None:
    config = daemon_config(postgres_dsn, redis_url, live=LIVE)
    await redis.mset({f"balance:{n}": "1" for n in range(100)})
    async with Inside(config) as daemon:
        await daemon.log.next("live", state="up")
        await redis.set("balance:7", "8")
        # As after an outage: the verify was asked for first, and the run that closes the gap later.
        daemon.daemon._live.restart()
        await daemon.log.next("live", state="catching up")
        ticket, _ = daemon.runner.submit(Request("verify", "recovery", mode="verify"))
        run = await ticket.done
        assert (run.status, run.drift, run.warnings) == ("succeeded", 0, [])
        kinds = [found["job"] for kind, found in daemon.log.entries if kind == "run_started"]
        assert kinds[-2:] == ["sync", "verify"]


@pytest.mark.slow
async def test_a_hot_key_is_no_drift_while_live_mode_brings_it_over(
    postgres_dsn: str, redis_url: str, redis: Redis, capsys: pytest.CaptureFixture[str]
) -> None:
    config = daemon_config(postgres_dsn, redis_url, live=LIVE)
    await redis.mset({f"balance:{n}": "1" for n in range(1000)})

    cool = asyncio.Event()

    async def heat() -> None:
        while not cool.is_set():
            await redis.incr("balance:7")
            await asyncio.sleep(0.003)

    async with Inside(config) as daemon:
        await daemon.log.next("live", state="up")
        heating = asyncio.create_task(heat())
        try:
            for _ in range(3):
                ticket, _ = daemon.runner.submit(Request("verify", "http", mode="verify"))
                run = await ticket.done
                assert (run.status, run.drift, run.warnings) == ("succeeded", 0, [])
                assert run.counts.scanned == run.counts.seen
                assert run.counts.unchanged + sum((run.moving or {}).values()) == 1000
            # And by a command, for which the daemon is another process.
            assert await asyncio.to_thread(cli.execute, ["verify"], config) == 0
        finally:
            # A client that is cancelled in mid-command may go on.
            cool.set()
            await heating
    assert "Redis and PostgreSQL agree" in capsys.readouterr().out


async def test_a_verify_has_what_is_pending_brought_over_before_it_looks_again(
    postgres_dsn: str, redis_url: str, redis: Redis
) -> None:
    config = daemon_config(postgres_dsn, redis_url, live=LIVE | {"flush_interval": 10.0})
    await redis.mset({f"balance:{n}": "1" for n in range(100)})
    async with Inside(config) as daemon:
        await daemon.log.next("live", state="up")
        await redis.set("balance:7", "8")
        ticket, _ = daemon.runner.submit(Request("verify", "http", mode="verify"))
        run = await ticket.done
        assert (run.status, run.drift, run.warnings) == ("succeeded", 0, [])


async def test_a_row_that_stays_behind_is_drift_in_live_mode_too(
    postgres_dsn: str, redis_url: str, redis: Redis, pg: asyncpg.Connection
) -> None:
    config = daemon_config(postgres_dsn, redis_url, live=LIVE)
    await redis.mset({f"balance:{n}": "1" for n in range(100)})
    async with Inside(config) as daemon:
        await daemon.log.next("live", state="up")
        await pg.execute("UPDATE balances SET balance = 2 WHERE user_id = 7")
        ticket, _ = daemon.runner.submit(Request("verify", "http", mode="verify"))
        run = await ticket.done
        assert (run.drift, run.warnings) == (1, [])
        verdict = (await daemon.api.document("/status"))["verdict"]
        assert verdict["line"].startswith("drift: the last verify found that 1 row differs")
        await daemon.api.until_sample('drift_records{mapping="balances"}', lambda rows: rows == 1)
        await daemon.api.sync()
        await daemon.api.until_sample('drift_records{mapping="balances"}', lambda rows: rows == 0)
        found = await daemon.api.document("/status")
        assert found["verdict"]["level"] == "safe"


def pending(engine: Engine) -> Pending:
    return Pending(engine.config.mapping, 1000)


def until(waits: Pending) -> float | None:
    return waits.done_until


def batch(waits: Pending, now: float = 0.0) -> list[dict[str, list[bytes]]]:
    waits.begin()
    pieces = []
    while piece := waits.take(1000, now):
        pieces.append(piece)
    return pieces


async def test_up_to_when_all_is_done_is_known_at_the_end_of_a_batch_alone(
    engine: Callable[..., Engine],
) -> None:
    waits = pending(engine())
    waits.add(set(), [], 1.0)
    assert until(waits) == 1.0
    waits.add({b"balance:1"}, [], 2.0)
    assert until(waits) is None
    [piece] = batch(waits)
    # What comes meanwhile is another batch's: all before it was told by then is done.
    waits.add({b"balance:2"}, [], 3.0)
    assert until(waits) == 2.0
    [piece] = batch(waits)
    waits.put_back(piece)
    assert until(waits) is None
    [piece] = batch(waits)
    assert until(waits) == 3.0
    waits.forget()
    assert until(waits) is None


async def test_a_big_hash_that_rests_holds_it_back(engine: Callable[..., Engine]) -> None:
    made = engine({"key": "balances", "member": "{user_id}", "type": "hash"})
    waits = pending(made)
    waits.add(set(), [], 1.0)
    waits.add({b"balances"}, [], 2.0)
    [piece] = batch(waits)
    assert piece == {"balances": []}
    # It holds another type: it couldn't be read.
    waits.rest(piece, (), 2.0, 3.0)
    waits.add(set(), [], 4.0)
    assert until(waits) == 1.0
    waits.add({b"balances"}, [], 5.0)
    assert batch(waits, now=3.0) == []
    assert (waits.done_until, waits.due_at < inf) == (1.0, True)
    # Somebody waits for all of it.
    waits.hurry()
    [piece] = batch(waits)
    waits.rest(piece, piece, 5.0, 6.0)
    assert until(waits) == 5.0
