"""What systemd is told, on real datagram sockets."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import pytest
from proxy import Proxy
from redis.asyncio import Redis
from running import Inside, daemon_config

from balancesync import overview, probing, runner
from balancesync.embedded import PostgresServer
from balancesync.model import Request
from balancesync.notify import Notifier


class Systemd:
    """The other end of $NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self.environ = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "300000"}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)

    def close(self) -> None:
        self._socket.close()

    async def hear(self) -> list[str]:
        """The next message's lines."""
        async with asyncio.timeout(20):
            message = await asyncio.get_running_loop().sock_recv(self._socket, 4096)
        return message.decode().splitlines()

    async def until(self, wanted: str) -> list[str]:
        """All lines up to this one."""
        lines: list[str] = []
        while wanted not in lines:
            lines += await self.hear()
        return lines

    def drain(self) -> list[str]:
        """All lines that have come by now."""
        lines: list[str] = []
        while True:
            try:
                lines += self._socket.recv(4096).decode().splitlines()
            except BlockingIOError:
                return lines


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    made = Systemd(str(tmp_path / "notify"))
    yield made
    made.close()


@pytest.fixture
async def proxy(postgres_admin_dsn: str) -> AsyncIterator[Proxy]:
    async with Proxy(urlsplit(postgres_admin_dsn).port or 0) as made:
        yield made


def through(dsn: str, proxy: Proxy) -> str:
    user = urlsplit(dsn).netloc.rpartition("@")[0]
    return urlsplit(dsn)._replace(netloc=f"{user}@127.0.0.1:{proxy.port}").geturl()


async def test_ready_status_watchdog_and_stopping(
    systemd: Systemd, redis: Redis, redis_url: str, postgres_dsn: str
) -> None:
    await redis.set("balance:1", "1")
    async with Inside(daemon_config(postgres_dsn, redis_url), Notifier(systemd.environ)) as inside:
        assert (await systemd.hear())[0] == "READY=1"
        await inside.leads()
        await systemd.until("STATUS=idle")
        await systemd.until("WATCHDOG=1")
        await systemd.until("WATCHDOG=1")
    assert systemd.drain()[-1] == "STOPPING=1"


async def test_ready_without_any_server(systemd: Systemd) -> None:
    config = daemon_config("postgresql://127.0.0.1:1/none", "redis://127.0.0.1:2/0")
    async with Inside(config, Notifier(systemd.environ)):
        assert (await systemd.hear())[0] == "READY=1"
        while True:
            [line] = await systemd.hear()
            if line.startswith("STATUS=") and "Redis at" in line:
                break
        assert "PostgreSQL down: " in line
        await systemd.until("WATCHDOG=1")


async def test_a_socket_without_a_file(redis_url: str, postgres_dsn: str) -> None:
    systemd = Systemd(f"@balancesync-{uuid4().hex}")
    Notifier(systemd.environ).send("READY=1", "STATUS=one")
    assert await systemd.hear() == ["READY=1", "STATUS=one"]
    systemd.close()


def test_without_systemd_nothing_is_said(tmp_path: Path) -> None:
    assert Notifier({}).watchdog_s is None
    Notifier({}).send("READY=1")
    # One that has gone is no reason to fail.
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).send("READY=1")


def test_the_watchdog_of_another_process_is_not_ours() -> None:
    environ = {"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "2000000"}
    assert Notifier(environ).watchdog_s == 2.0
    assert Notifier(environ | {"WATCHDOG_PID": str(os.getpid())}).watchdog_s == 2.0
    assert Notifier(environ | {"WATCHDOG_PID": "1"}).watchdog_s is None


async def test_a_stuck_runner_stops_the_watchdog(
    systemd: Systemd,
    redis_url: str,
    postgres_dsn: str,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = daemon_config(
        through(postgres_dsn, proxy), redis_url, postgres={"timeout": 60.0}, retry={"maximum": 1.0}
    )
    # What no time-out can explain is, for this test, half a second more than two of the runner.
    monkeypatch.setattr(runner, "_GRACE_S", 1.5 - 2 * 60.0 - 1.0)
    async with Inside(config, Notifier(systemd.environ)) as inside:
        await inside.leads()
        held = proxy.hold(b"ANALYZE")
        inside.runner.submit(Request("sync", "http"))
        async with asyncio.timeout(20):
            await held.wait()
        async with asyncio.timeout(20):
            while True:
                if inside.runner.is_stuck:
                    break
                await asyncio.sleep(0.02)
        systemd.drain()
        # Its loop turns, and yet it says nothing, three times as long as it's asked to.
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.9):
                await systemd.until("WATCHDOG=1")
        assert '"stuck"' in await inside.api.text("/livez")
        proxy.reset()
        proxy.resume()
        await systemd.until("WATCHDOG=1")


async def test_a_long_statement_under_way_is_no_stuck_runner(
    redis: Redis,
    redis_url: str,
    postgres_dsn: str,
    pg: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await redis.set("balance:1", "1")
    config = daemon_config(postgres_dsn, redis_url, postgres={"timeout": 0.2, "lock_timeout": 60.0})
    monkeypatch.setattr(runner, "_GRACE_S", 1.0 - config.retry.maximum - 0.4)
    async with Inside(config) as inside:
        await inside.leads()
        assert (await inside.api.sync())["status"] == "succeeded"
        await redis.set("balance:1", "2")
        async with pg.transaction():
            await pg.execute("SELECT FROM balances FOR UPDATE")
            ticket, _ = inside.runner.submit(Request("sync", "http"))
            async with asyncio.timeout(20):
                while not await pg.fetchval(
                    "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)"
                ):
                    await pg.fetchval("SELECT pg_sleep(0.01)")
            loop = asyncio.get_running_loop()
            begun = loop.time()
            while loop.time() - begun < 1.5:
                await pg.fetchval("SELECT pg_sleep(0.05)")
                assert not inside.runner.is_stuck
            assert not ticket.done.done()
        run = await inside.finished(id=str(ticket.run.id))
        assert (run["status"], run["updated"]) == ("succeeded", 1)


async def test_a_postgres_that_hangs_is_no_stuck_runner(
    systemd: Systemd,
    redis: Redis,
    redis_url: str,
    private_postgres: Callable[..., PostgresServer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = private_postgres()
    await redis.set("balance:1", "1")
    config = daemon_config(server.dsn, redis_url, postgres={"timeout": 1.5})
    monkeypatch.setattr(probing, "_TROUBLED_S", 0.05)
    monkeypatch.setattr(probing, "_CALM_S", 0.05)
    monkeypatch.setattr(overview, "_PROBE_S", 1.5)
    async with Inside(config, Notifier(systemd.environ)) as inside:
        await inside.leads()
        await inside.api.sync()
        server.suspend()
        # Begun before anybody has noticed, it waits for PostgreSQL, and is given up in time.
        run = await inside.api.sync()
        assert run["status"] == "postponed"
        await inside.log.next("postgres", connected=False)
        systemd.drain()
        # The runner goes on with its turns, and so does what tells systemd of them.
        async with asyncio.timeout(60):
            for _ in range(3):
                before = inside.runner.beat
                while inside.runner.beat == before:
                    await systemd.until("WATCHDOG=1")
        assert '"alive"' in await inside.api.text("/livez")
        assert (await inside.api.ask("/health"))[0] == 503
        server.resume()
        await inside.finished(trigger="recovery", status="succeeded")
        await inside.api.until("/health", lambda found: found["status"] == "healthy")
