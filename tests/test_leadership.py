"""Leader and standby: who leads, and who takes over when, on a real PostgreSQL."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest
from proxy import Proxy
from pydantic import SecretStr
from redis.asyncio import Redis
from running import VANISHING, Inside, Outside, Processes, daemon_config, free_port, processes
from structlog.testing import capture_logs

from balancesync import leadership, runner
from balancesync.config import PostgresConfig
from balancesync.database import Database, Steps, lock_key
from balancesync.leadership import Leadership
from balancesync.model import Request

LEADER = lock_key("leader", "balancesync")
# As pg_locks shows it: the lower half.
WRITER_LOW = lock_key("writer", "balancesync") & 0xFFFFFFFF
END_LEADER = (
    "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'"
    " AND (classid::bigint << 32) | objid::bigint = $1"
)
TAKEOVER_S = 10.0


@pytest.fixture
async def started(tmp_path: Path, postgres_dsn: str, redis_url: str) -> AsyncIterator[Processes]:
    """Starts processes on the test's servers; all are gone after the test."""
    async with processes(tmp_path, postgres_dsn, redis_url) as made:
        yield made


async def pair(started: Processes) -> tuple[Outside, Outside]:
    """A leader and its standby."""
    leader = await started.daemon(port=free_port())
    await leader.log.next("leading")
    standby = await started.daemon(port=free_port())
    await standby.log.next("standing by")
    return leader, standby


async def test_a_standby_is_healthy_runs_nothing_and_names_the_leader(
    started: Processes, redis: Redis, pg: asyncpg.Connection
) -> None:
    await redis.set("balance:1", "1")
    leader, standby = await pair(started)
    assert (await leader.api.sync())["status"] == "succeeded"
    name = (await leader.api.document("/status"))["name"]
    status = await standby.api.until("/status", lambda found: found["postgres"]["connected"])
    assert (status["state"], status["leader"]) == ("standby", name)
    assert status["next_run_at"] is None
    assert (await standby.api.ask("/health"))[0] == 200
    assert '"ready"' in await standby.api.text("/readyz")
    for method, path in (("POST", "/force-sync"), ("DELETE", "/clear-cache")):
        code, answer = await standby.api.ask(path, method)
        assert (code, answer["error"]["code"]) == (409, "standby")
        assert name in answer["error"]["message"]
    standby.send(signal.SIGHUP)
    await standby.log.next("a standby runs nothing", leader=name)
    assert await standby.api.sample("leader") == 0
    assert await leader.api.sample("leader") == 1
    # What a standby tells of the runs is what PostgreSQL knows of them.
    ended = 'last_success_timestamp_seconds{job="sync"}'
    await standby.api.until_sample(ended, lambda value: value is not None)
    assert await pg.fetchval("SELECT count(*) FROM balancesync.runs") == 1
    # And it takes over from a leader that is told to stop.
    leader.send(signal.SIGTERM)
    assert await leader.ended() == 0
    await standby.log.next("leading", within_s=3)
    assert (await standby.api.sync())["status"] == "succeeded"


async def test_a_killed_leader_is_replaced(started: Processes, redis: Redis) -> None:
    await redis.set("balance:1", "1")
    leader, standby = await pair(started)
    leader.send(signal.SIGKILL)
    await standby.log.next("leading", within_s=TAKEOVER_S)
    assert (await standby.api.document("/status"))["state"] == "idle"
    assert (await standby.api.sync())["status"] == "succeeded"


async def until(pg: asyncpg.Connection, sql: str, within_s: float = 20) -> None:
    async with asyncio.timeout(within_s):
        while not await pg.fetchval(sql):
            await pg.fetchval("SELECT pg_sleep(0.02)")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can make a host vanish like this")
async def test_a_leader_whose_host_vanishes_in_mid_run_is_replaced(
    started: Processes, redis: Redis, pg: asyncpg.Connection
) -> None:
    await redis.set("balance:1", "1")
    more = "[schedule]\non_start = true\njobs = {}\n"
    file = started.file(port=free_port(), more=more)
    file.write_text(file.read_text().replace("[http]", "lock_timeout = 60.0\n[http]"))
    leader = await started.daemon(file=file, program=VANISHING)
    await leader.log.next("run", trigger="startup", status="succeeded")
    standby = await started.daemon(port=free_port())
    await standby.log.next("standing by")
    await redis.set("balance:1", "2")
    async with pg.transaction():
        await pg.execute("SELECT FROM balances FOR UPDATE")
        leader.send(signal.SIGHUP)
        await until(pg, "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)")
        leader.send(signal.SIGUSR1)
        await standby.log.next("leading", within_s=TAKEOVER_S)
        # Its other session is in the middle of a statement, and ends all the same.
        await until(pg, f"SELECT NOT EXISTS (SELECT FROM pg_locks WHERE objid = {WRITER_LOW})")
    run = await standby.api.sync()
    assert (run["status"], run["updated"]) == ("succeeded", 1)
    rows = await pg.fetch("SELECT trigger, status FROM balancesync.runs ORDER BY id")
    assert [tuple(row) for row in rows] == [
        ("startup", "succeeded"),
        ("sighup", "interrupted"),
        ("http", "succeeded"),
    ]


async def test_a_leader_that_loses_its_session_leads_again(
    redis: Redis,
    redis_url: str,
    postgres_dsn: str,
    pg: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What fires meanwhile has run before it leads again: else the run of that would join it.
    monkeypatch.setattr(leadership, "_POLL_S", 3.0)
    monkeypatch.setattr(runner, "_COMPANY_S", 0.01)
    await redis.set("balance:1", "1")
    jobs = {"often": {"cron": "0 0 1 1 *", "job": "sync"}}
    schedule = {"on_start": True, "jobs": jobs}
    config = daemon_config(postgres_dsn, redis_url, schedule=schedule)
    async with Inside(config) as inside:
        await inside.finished(trigger="startup", status="succeeded")
        await inside.leads()
        await pg.execute(END_LEADER, LEADER)
        await inside.log.next("leader", leads=False)
        await inside.leads()
        # Nobody else has led in between: that is no start.
        await inside.finished(trigger="recovery", status="succeeded")
        await pg.execute(END_LEADER, LEADER)
        await inside.log.next("leader", leads=False)
        # Nobody leads: what fires now must not be lost.
        inside.daemon.fire("often", config.schedule.jobs["often"])
        await inside.finished(trigger="cron:often", status="succeeded")
        assert len(inside.log.all("run_finished", trigger="startup")) == 1


async def test_a_loss_is_told_before_the_lock_is_given_back(
    postgres_dsn: str, pg: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Giving it back takes two seconds where the server hangs.
    monkeypatch.setattr(leadership, "_PROVE_S", 0.1)
    heard: asyncio.Queue[str] = asyncio.Queue()

    class Heard(Leadership):
        async def release(self) -> None:
            heard.put_nowait("released")
            await super().release()

    def hear(leads: bool, leader: str | None) -> None:
        heard.put_nowait(f"leads: {leads}")

    database = Database(PostgresConfig(dsn=SecretStr(postgres_dsn)))
    serving = asyncio.create_task(Heard(database, "here:1", hear).serve())
    try:
        async with asyncio.timeout(20):
            assert await heard.get() == "leads: True"
            await pg.execute(END_LEADER, LEADER)
            assert [await heard.get(), await heard.get()] == ["leads: False", "released"]
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


async def test_an_outage_is_warned_of_once(
    postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_POLL_S", "_PROVE_S", "_LONGEST_PAUSE_S"):
        monkeypatch.setattr(leadership, name, 0.02)
    heard: asyncio.Queue[bool] = asyncio.Queue()
    parts = urlsplit(postgres_dsn)
    async with Proxy(parts.port or 5432) as proxy, asyncio.timeout(20):
        dsn = parts._replace(netloc=f"postgres@127.0.0.1:{proxy.port}").geturl()
        database = Database(PostgresConfig(dsn=SecretStr(dsn)))
        leader = Leadership(database, "here:1", lambda leads, _: heard.put_nowait(leads))
        with capture_logs() as lines:
            serving = asyncio.create_task(leader.serve())
            for _ in range(2):
                while not await heard.get():
                    pass
                await proxy.refuse()
                # Each is another attempt in vain; the last is told before its line is written.
                for _ in range(4):
                    assert not await heard.get()
                await proxy.accept()
            while not await heard.get():
                pass
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
    told = [line["log_level"] for line in lines if line["event"].startswith("not leading")]
    assert told.count("warning") == 2, lines
    assert told.count("debug") >= 6


async def test_what_fires_when_the_leader_is_just_gone_is_made_up_for(
    redis_url: str,
    postgres_dsn: str,
    pg: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leadership, "_POLL_S", 0.05)
    monkeypatch.setattr(runner, "_COMPANY_S", 0.01)
    cron = "0 0 1 1 *"
    jobs = {"daily": {"cron": cron, "job": "sync"}, "proof": {"cron": cron, "job": "verify"}}
    config = daemon_config(postgres_dsn, redis_url, schedule={"jobs": jobs})
    await pg.execute("SET application_name = 'balancesync elsewhere:1'")
    await pg.execute("SELECT pg_advisory_lock($1)", LEADER)
    async with Inside(config) as inside:
        await inside.log.next("leader", leads=False, leader="elsewhere:1")
        # That the other one is dead, PostgreSQL doesn't know yet.
        with monkeypatch.context() as earlier:
            earlier.setattr(asyncio.get_running_loop(), "time", lambda: 0.0, raising=False)
            inside.daemon.fire("proof", config.schedule.jobs["proof"])
        inside.daemon.fire("daily", config.schedule.jobs["daily"])
        inside.daemon.fire("daily", config.schedule.jobs["daily"])
        await pg.execute("SELECT pg_advisory_unlock_all()")
        await inside.leads()
        await inside.finished(trigger="cron:daily", status="succeeded")
        # What was due long before has been the other one's.
        assert [run["job"] for run in inside.log.all("run_queued")] == ["sync"]


async def test_a_lock_on_the_schema_is_waited_for(
    postgres_dsn: str, pg: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_POLL_S", "_LONGEST_PAUSE_S"):
        monkeypatch.setattr(leadership, name, 0.02)
    database = Database(PostgresConfig(dsn=SecretStr(postgres_dsn)))
    await Steps(database).upgrade(pg)
    name = await pg.fetchval("SELECT current_database()")
    await pg.execute(f"ALTER DATABASE {name} SET lock_timeout = '20ms'")
    heard: asyncio.Queue[bool] = asyncio.Queue()
    leader = Leadership(database, "here:1", lambda leads, _: heard.put_nowait(leads))
    async with asyncio.timeout(20):
        async with pg.transaction():
            await pg.execute("LOCK TABLE balancesync.steps IN ACCESS EXCLUSIVE MODE")
            serving = asyncio.create_task(leader.serve())
            # One attempt after the other.
            assert [await heard.get(), await heard.get()] == [False, False]
        while not await heard.get():
            pass
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


async def test_a_standby_owes_nothing(
    redis: Redis, redis_url: str, postgres_dsn: str, pg: asyncpg.Connection
) -> None:
    await pg.execute("SET application_name = 'balancesync elsewhere:1'")
    await pg.execute("SELECT pg_advisory_lock($1)", LEADER)
    async with Inside(daemon_config(postgres_dsn, redis_url)) as inside:
        await inside.log.next("leader", leads=False, leader="elsewhere:1")
        assert inside.runner.owed == {}
        inside.runner.submit(Request("sync", "http"))
        await pg.execute("SELECT pg_advisory_unlock_all()")
        await inside.leads()
