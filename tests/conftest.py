"""The servers that every test runs on, and what a test gets of them.

They're private ones of this session (of each worker, with xdist), or those that
BALANCESYNC_TEST_POSTGRES (a superuser's DSN) and BALANCESYNC_TEST_REDIS (the URL of a database that
the tests empty over and over) name.
"""

import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import pytest
import structlog
from engine import Engine, make_config
from following import filled, quick, start  # noqa: F401  # fixtures of the tests of live mode
from redis.asyncio import Redis

from balancesync.embedded import PostgresServer, RedisServer
from balancesync.source import Source

POSTGRES = "BALANCESYNC_TEST_POSTGRES"
REDIS = "BALANCESYNC_TEST_REDIS"

_MEMORY = Path("/dev/shm")  # noqa: S108  # only the parent: what lies in it has unguessable names
_ROOM_BYTES = 4 << 30


def pytest_configure() -> None:
    """Set up what every test and program under test takes for granted."""
    # Shells ignore it for what they run in the background, and so would the programs under test.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _keep_files_in_memory()


def _keep_files_in_memory() -> None:
    """Have all files in memory where there's room, unless TMPDIR says where they're to be.

    Nearly every test has a database of its own, which is three hundred files.
    """
    if "TMPDIR" in os.environ or not os.access(_MEMORY, os.W_OK | os.X_OK):
        return
    runs_programs = not os.statvfs(_MEMORY).f_flag & os.ST_NOEXEC
    if runs_programs and shutil.disk_usage(_MEMORY).free > _ROOM_BYTES:
        os.environ["TMPDIR"] = str(_MEMORY)
        tempfile.tempdir = None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are CPUs: a third of the time tests wait for servers and timers."""
    return (os.cpu_count() or 1) + 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the fault suite has done, as its tests tell it: see `faults/conftest.py`."""
    total: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            told = dict(getattr(report, "user_properties", ()))
            if getattr(report, "when", "") == "call" and "figures" in told:
                total.update(told["figures"])
    if total:
        terminalreporter.write_sep("=", "faults")
        terminalreporter.write_line(
            f"{total['faults']:,} faults injected, {total['runs']:,} runs,"
            f" {total['keys']:,} balances checked:"
            f" {total['losses']:,} lost, wrong or gone backwards"
        )


@pytest.fixture(autouse=True)
def _same_logs() -> Iterator[None]:
    """A test that sets up the logs does so for itself alone."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)


@pytest.fixture(scope="session")
def postgres_admin_dsn() -> Iterator[str]:
    """A superuser's DSN on the session's PostgreSQL; tests leave this database alone."""
    if given := os.environ.get(POSTGRES):
        yield given
        return
    with PostgresServer(durable=False) as server:
        yield server.dsn


@pytest.fixture(scope="session")
async def postgres_admin(postgres_admin_dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """A superuser's connection, to make databases and roles with."""
    connection = await asyncpg.connect(postgres_admin_dsn)
    yield connection
    await connection.close()


@pytest.fixture
async def postgres_dsn(
    postgres_admin: asyncpg.Connection, postgres_admin_dsn: str
) -> AsyncIterator[str]:
    """DSN of a new, empty UTF8 database; after the test it's gone, whoever is connected."""
    name = f"test_{uuid4().hex}"
    # Copying files is twice as fast here as writing it all to the WAL, the default since 15.
    strategy = "STRATEGY file_copy" if postgres_admin.get_server_version() >= (15,) else ""
    await postgres_admin.execute(
        f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8' {strategy}"
    )
    yield urlsplit(postgres_admin_dsn)._replace(path=f"/{name}").geturl()
    await postgres_admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
async def pg(postgres_dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """A superuser's connection to the test's own database."""
    connection = await asyncpg.connect(postgres_dsn)
    yield connection
    await connection.close()


@pytest.fixture(scope="session")
async def _redis_server_url() -> AsyncIterator[str]:
    if given := os.environ.get(REDIS):
        if "PYTEST_XDIST_WORKER" in os.environ:
            pytest.exit(f"{REDIS} is one database for all workers: run with -n 0")
        async with Redis.from_url(given) as client:
            if await client.dbsize():
                pytest.exit(f"the database that {REDIS} names holds keys: the tests would empty it")
            yield given
            await client.flushdb()
        return
    with RedisServer() as server:
        yield server.url


@pytest.fixture
async def redis_url(_redis_server_url: str) -> str:
    """URL of an empty Redis database (0 on the private server)."""
    async with Redis.from_url(_redis_server_url) as client:
        if REDIS in os.environ:
            await client.flushdb()
        else:
            await client.flushall()
            await client.config_resetstat()
    return _redis_server_url


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    """A raw client of the test's Redis, with bytes for replies."""
    async with Redis.from_url(redis_url, protocol=2, decode_responses=False) as client:
        yield client


@pytest.fixture
async def engine(postgres_dsn: str, redis_url: str) -> AsyncIterator[Callable[..., Engine]]:
    """Makes engines on the test's servers, of mappings and sections as the configuration has them.

    `dsn` and `source` stand in for the superuser's DSN and for the class that reads Redis.
    """
    made: list[Engine] = []

    def make(
        *mappings: dict[str, Any],
        dsn: str = postgres_dsn,
        source: type[Source] = Source,
        **sections: Any,
    ) -> Engine:
        made.append(Engine(make_config(dsn, redis_url, *mappings, **sections), source))
        return made[-1]

    yield make
    for each in made:
        await each.close()


@pytest.fixture
def private_postgres() -> Iterator[Callable[..., PostgresServer]]:
    """Starts PostgreSQL servers for tests that kill or hang them; takes PostgresServer's arguments.

    Each takes a second; all are gone after the test.
    """
    with ExitStack() as stack:

        def start(
            settings: dict[str, str] | None = None, *, password: str = "", durable: bool = False
        ) -> PostgresServer:
            server = PostgresServer(settings, password=password, durable=durable)
            return stack.enter_context(server)

        yield start


@pytest.fixture
def private_redis() -> Iterator[Callable[..., RedisServer]]:
    """Starts Redis servers for tests that kill, hang or configure them; RedisServer's arguments."""
    with ExitStack() as stack:

        def start(settings: dict[str, str] | None = None, *, password: str = "") -> RedisServer:
            return stack.enter_context(RedisServer(settings, password=password))

        yield start
