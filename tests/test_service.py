"""The commands that ask a daemon, with one and without, and what they say of each answer."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest
from proxy import Proxy
from pydantic import SecretStr
from redis.asyncio import Redis
from running import Inside, Processes, daemon_config, processes

from balancesync import cli
from balancesync.config import Config
from balancesync.database import lock_key
from balancesync.embedded import PostgresServer
from balancesync.model import Request

Command = Callable[..., Awaitable[tuple[int, str, str]]]
TOKEN = "a-token-of-some-length"


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process: its exit code, what it printed, and its errors."""

    async def run(config: Config, *argv: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = await asyncio.to_thread(cli.execute, argv, config)
        out, err = capfd.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("balancesync: ")]
        return code, out, "\n".join(lines)

    return run


@pytest.fixture
async def started(tmp_path: Path, postgres_dsn: str, redis_url: str) -> AsyncIterator[Processes]:
    """Starts processes on the test's servers; all are gone after the test."""
    async with processes(tmp_path, postgres_dsn, redis_url) as made:
        yield made


async def test_without_a_daemon(
    command: Command, redis: Redis, redis_url: str, postgres_dsn: str
) -> None:
    await redis.set("balance:1", "1.5")
    jobs = {"hourly": {"cron": "0 * * * *", "job": "sync"}}
    config = daemon_config(postgres_dsn, redis_url, schedule={"jobs": jobs})
    assert (await command(config, "sync"))[0] == 0
    code, out, _ = await command(config, "status", "--json")
    assert (code, json.loads(out)["last_run"]["trigger"]) == (0, "cli")
    code, out, _ = await command(config, "stats", "--json")
    assert (code, json.loads(out)["totals"][0]["runs"]) == (0, 1)
    code, out, _ = await command(config, "health", "--json")
    assert (code, json.loads(out)["status"]) == (0, "healthy")
    code, out, _ = await command(config, "schedule")
    assert code == 0
    assert "hourly" in out
    assert "no daemon answers" in out
    for asked in ("cancel", "events"):
        code, out, err = await command(config, asked)
        assert (code, out) == (75, "")
        assert err.startswith(f"balancesync: no daemon answers at 127.0.0.1:{config.http.port}: ")
        assert "connection refused; start one with `balancesync run`" in err
        assert "ssl" not in err


async def test_an_old_success_is_told_without_a_daemon(
    command: Command, redis: Redis, redis_url: str, postgres_dsn: str, pg: asyncpg.Connection
) -> None:
    await redis.set("balance:1", "1.5")
    jobs = {"hourly": {"cron": "0 * * * *", "job": "sync"}}
    config = daemon_config(postgres_dsn, redis_url, schedule={"jobs": jobs})
    assert (await command(config, "sync"))[0] == 0
    await pg.execute("UPDATE balancesync.runs SET finished_at = finished_at - interval '119 min'")
    assert (await command(config, "health"))[0] == 0
    await pg.execute("UPDATE balancesync.runs SET finished_at = finished_at - interval '2 min'")
    code, out, _ = await command(config, "health")
    assert (code, out.splitlines()[0]) == (1, "unhealthy")
    assert "more than two intervals of the schedule" in out
    assert (await command(config, "status"))[1].startswith("not safe: nothing newer than ")
    # Where nothing is planned, nothing is late.
    idle = daemon_config(postgres_dsn, redis_url)
    assert (await command(idle, "health"))[0] == 0


async def test_with_a_daemon(
    command: Command, redis: Redis, redis_url: str, postgres_dsn: str
) -> None:
    await redis.set("balance:1", "1.5")
    jobs = {"hourly": {"cron": "0 * * * *", "job": "sync"}}
    config = daemon_config(postgres_dsn, redis_url, schedule={"jobs": jobs})
    async with Inside(config) as inside:
        await inside.leads()
        await inside.api.sync()
        code, out, _ = await command(config, "status", "--json")
        assert (code, json.loads(out)["name"]) == (0, inside.daemon.state.name)
        assert (await command(config, "status"))[0] == 0
        code, out, _ = await command(config, "stats", "--json")
        assert (code, json.loads(out)["since_start"]["records"]["inserted"]) == (0, 1)
        code, out, _ = await command(config, "schedule")
        assert (code, "no daemon" in out) == (0, False)
        code, out, _ = await command(config, "health")
        assert (code, out.splitlines()[0]) == (0, "healthy")
        assert "no run waits for a server" in out
        code, out, err = await command(config, "cancel", "--json")
        assert (code, out, err) == (1, "", "balancesync: nothing runs, and nothing waits")
        code, _, err = await command(config, "cancel", "01900000-0000-7000-8000-000000000000")
        assert (code, "there is no run 01900000" in err) == (1, True)


ASKING = ("status", "stats", "health", "schedule")
TOLD = ("cancel", "events")


@asynccontextmanager
async def answering(kind: str, body: bytes) -> AsyncIterator[int]:
    """The port of a server that says the same to everybody, and isn't balancesync."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1")
    async with server:
        yield server.sockets[0].getsockname()[1]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("text/html", b"<html>"),
        ("text/event-stream", b"event: x\n\n"),
        ("application/json", b"[]"),
        ("application/json", b"{}"),
        ("application/json", b'{"error": '),
        ("application/json", b"\xff"),
    ],
)
async def test_something_else_that_listens_is_not_taken_for_the_daemon(
    command: Command, redis_url: str, postgres_dsn: str, kind: str, body: bytes
) -> None:
    async with answering(kind, body) as port:
        config = daemon_config(postgres_dsn, redis_url, http={"port": port})
        assert (await command(config, "init"))[0] == 0
        where = f"answers at 127.0.0.1:{port}: something else listens there"
        for asked in ASKING:
            code, out, err = await command(config, asked)
            assert (code, err) == (0, ""), asked
            if asked in ("status", "schedule"):
                assert where in out
        for asked in TOLD:
            code, out, err = await command(config, asked)
            assert (code, out) == (75, "")
            assert err.startswith(f"balancesync: no daemon {where}; set http.host and http.port")


async def test_the_daemon_of_another_installation_is_not_taken_for_ours(
    command: Command, redis_url: str, postgres_dsn: str
) -> None:
    theirs = daemon_config(postgres_dsn, redis_url, postgres={"schema": "theirs"})
    port = theirs.http.port
    ours = daemon_config(postgres_dsn, redis_url, http={"port": port})
    assert (await command(ours, "init"))[0] == 0
    async with Inside(theirs) as inside:
        await inside.leads()
        ticket, _ = inside.runner.submit(Request("sync", "cron:hourly"))
        ticket.due += 600
        said = f"the daemon at 127.0.0.1:{port} is of another database, localhost:"
        code, out, _ = await command(ours, "status", "--json")
        assert (code, json.loads(out)["schema"]) == (0, "balancesync")
        assert json.loads(out)["no_daemon"].startswith(said)
        code, out, _ = await command(ours, "stats", "--json")
        assert (code, "since_start" in json.loads(out)) == (0, False)
        assert said in (await command(ours, "schedule"))[1]
        for asked in (("cancel",), ("cancel", str(ticket.run.id)), ("events",)):
            code, out, err = await command(ours, *asked)
            assert (code, out) == (75, "")
            assert err.startswith(f"balancesync: {said}")
            assert " with the schema theirs, and not of " in err
        assert inside.runner.queued == (ticket,)
        # However its database is named.
        named = urlsplit(postgres_dsn.replace("127.0.0.1", "localhost"))
        same = replace(theirs, postgres=replace(theirs.postgres, dsn=SecretStr(named.geturl())))
        assert (await command(same, "cancel"))[0] == 0


async def test_a_daemon_that_leads_elsewhere_is_named(
    command: Command, redis_url: str, postgres_dsn: str
) -> None:
    config = daemon_config(postgres_dsn, redis_url)
    async with Inside(config) as inside:
        await inside.leads()
        elsewhere = daemon_config(postgres_dsn, redis_url)
        code, out, _ = await command(elsewhere, "status")
    name = inside.daemon.state.name
    refused = f"none answers at 127.0.0.1:{elsewhere.http.port}: connection refused; {name} leads"
    assert (code, refused in out) == (0, True)


async def test_stats_while_postgres_is_away_says_so_with_a_daemon_too(
    command: Command, redis_url: str, private_postgres: Callable[..., PostgresServer]
) -> None:
    server = private_postgres()
    config = daemon_config(server.dsn, redis_url)
    async with Inside(config) as inside:
        await inside.leads()
        server.kill()
        await inside.log.next("postgres", connected=False)
        code, out, err = await command(config, "stats")
    assert (code, out) == (75, "")
    assert "can't be reached: connection refused" in err


async def test_cancel_ends_what_runs_and_then_what_waits(
    command: Command, redis: Redis, redis_url: str, postgres_dsn: str
) -> None:
    await redis.set("balance:1", "1.5")
    async with Proxy(urlsplit(postgres_dsn).port or 0) as proxy:
        user = urlsplit(postgres_dsn).netloc.rpartition("@")[0]
        dsn = urlsplit(postgres_dsn)._replace(netloc=f"{user}@127.0.0.1:{proxy.port}").geturl()
        config = daemon_config(dsn, redis_url)
        async with Inside(config) as inside:
            await inside.leads()
            held = proxy.hold(b'^.{0,5}COPY "pg_temp')
            running, _ = inside.runner.submit(Request("sync", "http"))
            async with asyncio.timeout(20):
                await held.wait()
            waiting, _ = inside.runner.submit(Request("verify", "http", mode="verify"))
            # Later than this test takes.
            waiting.due += 600
            code, out, _ = await command(config, "cancel")
            proxy.resume()
            assert (code, f"{running.run.id} is being cancelled" in out) == (0, True)
            await inside.finished(id=str(running.run.id), status="cancelled")
            code, out, _ = await command(config, "cancel")
            assert (code, f"{waiting.run.id} is cancelled: it was waiting" in out) == (0, True)
            await inside.finished(id=str(waiting.run.id), status="cancelled")
            code, _, err = await command(config, "cancel", str(waiting.run.id))
            assert (code, "this run has ended: cancelled" in err) == (1, True)


async def test_a_token(command: Command, redis_url: str, postgres_dsn: str) -> None:
    config = daemon_config(postgres_dsn, redis_url, http={"token": TOKEN})
    wrong = replace(config, http=replace(config.http, token=SecretStr("another-token-of-length")))
    async with Inside(config) as inside:
        await inside.leads()
        ticket, _ = inside.runner.submit(Request("sync", "cron:hourly"))
        ticket.due += 600
        # What isn't secret is told to everybody.
        assert (await command(wrong, "status"))[0] == 0
        code, out, err = await command(wrong, "cancel")
        assert (code, out) == (1, "")
        assert err.startswith("balancesync: the daemon says: this needs http.token")
        assert TOKEN not in err
        code, out, _ = await command(config, "cancel")
        assert (code, "it was waiting" in out) == (0, True)


async def test_a_standby(
    command: Command, redis_url: str, postgres_dsn: str, pg: asyncpg.Connection
) -> None:
    await pg.execute("SET application_name = 'balancesync elsewhere:1'")
    await pg.execute("SELECT pg_advisory_lock($1)", lock_key("leader", "balancesync"))
    config = daemon_config(postgres_dsn, redis_url)
    async with Inside(config) as inside:
        await inside.log.next("leader", leads=False, leader="elsewhere:1")
        code, out, _ = await command(config, "status", "--json")
        document = json.loads(out)
        assert (code, document["state"], document["leader"]) == (0, "standby", "elsewhere:1")
        assert (await command(config, "health"))[0] == 0
        code, _, err = await command(config, "cancel", "01900000-0000-7000-8000-000000000000")
        assert (code, "a standby: elsewhere:1 leads" in err) == (1, True)


async def heard(following: asyncio.subprocess.Process, inside: Inside) -> None:
    """See a run that is made until it shows."""
    assert following.stdout is not None
    coming = asyncio.ensure_future(following.stdout.readline())
    async with asyncio.timeout(20):
        while not coming.done():
            await inside.api.sync()
            await asyncio.wait({coming}, timeout=0.2)
        line = coming.result()
        # One event a line, as it happens.
        while json.loads(line)["event"] != "run_finished":
            line = await following.stdout.readline()


async def test_events_are_followed_to_a_good_end(
    started: Processes, redis: Redis, redis_url: str, postgres_dsn: str
) -> None:
    await redis.set("balance:1", "1.5")
    config = daemon_config(postgres_dsn, redis_url)
    async with Inside(config) as inside, Proxy(config.http.port) as proxy:
        await inside.leads()
        left, gone, stayed = [
            await started.start("events", "--json", file=started.file(port=port))
            for port in (config.http.port, proxy.port, config.http.port)
        ]
        for each in (left, gone, stayed):
            await heard(each, inside)
        left.send_signal(signal.SIGINT)
        proxy.reset()
        await inside.stop()
        async with asyncio.timeout(20):
            errors = [(await each.communicate())[1].decode() for each in (left, gone, stayed)]
        said = f"balancesync: the daemon at 127.0.0.1:{proxy.port} has gone\n"
        assert errors == ["", said, ""]
        assert [each.returncode for each in (left, gone, stayed)] == [0, 75, 0]
