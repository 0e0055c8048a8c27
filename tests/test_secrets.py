"""A secret of the configuration shows up nowhere: one planted in each place, all that is said read.

Whoever may read a process' environment or its configuration file has the secrets anyway; what is
held to here is that nothing else carries them on.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest
from redis.asyncio import Redis
from running import Api, Outside, free_port, processes

from balancesync import cli
from balancesync.embedded import PostgresServer, RedisServer

PLANTED = "plant3d"
# Each with what has to be quoted in a URL, so that its two forms differ.
REDIS, POSTGRES, TOKEN = f"{PLANTED}@r%dis", f"{PLANTED}@p%g", f"{PLANTED}-token"
# A bug: an exception of Python's own, whose text and traceback hold a DSN.
BUG = (
    "-c",
    "import sys\n"
    "from balancesync import cli, overview\n"
    "async def boom(database, *more):\n"
    "    raise ValueError(f'so much for {database.config.dsn.get_secret_value()}')\n"
    "overview.read = boom\n"
    "sys.exit(cli.main(sys.argv[1:]))",
)
COMMANDS = (
    "sync",
    "sync --dry-run",
    "verify",
    "rejects",
    "runs",
    "status",
    "stats",
    "health",
    "check",
    "init",
    "history 1",
    "restore",
    "restore --dry-run",
    "prune --idle-for 1",
    "schedule",
    "cancel",
)


@dataclass(frozen=True)
class Site:
    """Servers that want passwords, and a configuration that has them."""

    file: Path
    redis: str
    port: int
    text: str

    def write(self, old: str = "", new: str = "") -> None:
        """Write the configuration, with `old` replaced by `new`."""
        self.file.write_text(self.text.replace(old, new) if old else self.text)


@pytest.fixture
def site(
    tmp_path: Path,
    private_redis: Callable[..., RedisServer],
    private_postgres: Callable[..., PostgresServer],
) -> Site:
    """Servers with users and passwords, and a token."""
    redis = private_redis({"user teller": f"on >{REDIS} ~* &* +@all", "user default": "off"})
    netloc = f"teller:{quote(REDIS, safe='')}@127.0.0.1:{redis.port}"
    dsn = private_postgres(password=POSTGRES).dsn
    assert quote(POSTGRES, safe="") in dsn
    port = free_port()
    text = (
        f'[redis]\nurl = "redis://{netloc}"\n[postgres]\ndsn = "{dsn}"\n'
        f'[http]\nport = {port}\ntoken = "{TOKEN}"\n[log]\nlevel = "debug"\n'
        "[schedule]\non_start = true\njobs = {}\n[retry]\nattempts = 1\n"
        "[guard]\nmax_rejects = 1.0\n"
        "[live]\nenabled = true\n[history]\nenabled = true\n[prune]\nenabled = true\n"
    )
    made = Site(tmp_path / "config.toml", f"redis://{netloc}", port, text)
    made.write()
    (tmp_path / "daemons").mkdir()
    return made


async def heard(api: Api, daemon: Outside) -> list[str]:
    """All that a daemon says of itself, over HTTP and to `ps`."""
    paths = ("/metrics", "/openapi.json", "/health", "/livez", "/readyz", "/")
    below = ("status", "health", "stats", "runs", "schedule", "rejects", "balances/balances/1")
    texts = [await api.text(path) for path in paths]
    texts += [await api.text(f"/sync-management/{path}") for path in below]
    proc = Path("/proc") / str(daemon.process.pid)
    if proc.exists():
        texts += [(proc / name).read_text() for name in ("cmdline", "comm")]
    return texts


@asynccontextmanager
async def client(site: Site) -> AsyncIterator[Api]:
    """A client that has the token."""
    api = Api(f"http://127.0.0.1:{site.port}", TOKEN)
    try:
        yield api
    finally:
        await api.close()


async def events_of_a_run(api: Api, listening: asyncio.Event) -> str:
    """What is streamed up to the end of a run."""
    text = ""
    async with api._client.get("/sync-management/events") as response:
        listening.set()
        async for line in response.content:
            text += line.decode()
            if "run_finished" in text and line == b"\n":
                break
    return text


async def typed(site: Site, line: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What a command prints, and what it says."""
    capsys.readouterr()
    await asyncio.to_thread(cli.main, [*line.split(), "--config", str(site.file)])
    return list(capsys.readouterr())


async def test_a_daemon_and_its_clients_tell_no_secret(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with Redis.from_url(site.redis, protocol=2) as redis:
        await redis.mset({"balance:1": "1.50", "balance:2": "x"})
    async with processes(tmp_path / "daemons", "", "") as outside:
        daemon = await outside.daemon(file=site.file, port=site.port)
        await daemon.log.next("run", job="sync", status="succeeded")
        async with client(site) as api:
            said = await heard(api, daemon)
            listening = asyncio.Event()
            events = asyncio.create_task(events_of_a_run(api, listening))
            await listening.wait()
            await api.sync()
            said.append(await events)
        for command in COMMANDS:
            for flag in ("--verbose", "--json"):
                printed = await typed(site, f"{command} {flag}", capsys)
                assert any(printed), command
                said += printed
        await daemon.close()
    assert [text for text in (*said, *daemon.lines) if PLANTED in text] == []


async def test_a_bug_and_wrong_passwords_tell_no_secret(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with processes(tmp_path / "daemons", "", "") as outside:
        daemon = await outside.begin(file=site.file, port=site.port, program=BUG)
        await daemon.log.next("balancesync is up")
        async with client(site) as api, asyncio.timeout(20):
            # Until PostgreSQL is known to be up, it isn't asked.
            said = [await api.text("/sync-management/status")]
            while "internal_error" not in said[-1]:
                await asyncio.sleep(0.05)
                said.append(await api.text("/sync-management/status"))
        await daemon.close()
    assert any("so much for postgresql://postgres:***@" in line for line in daemon.lines)

    for secret, server in ((REDIS, "redis.url"), (POSTGRES, "postgres.dsn")):
        coded = quote(secret, safe="")
        site.write(coded, f"{coded}-not")
        for command in ("sync --verbose", "check --json", "status --json", "health --verbose"):
            said += await typed(site, command, capsys)
        wrong = [text for text in said if "rejects the user or password" in text]
        assert [text for text in wrong if server in text]
    assert [text for text in (*said, *daemon.lines) if PLANTED in text] == []
