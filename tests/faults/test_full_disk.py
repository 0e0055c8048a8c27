"""A disk that fills up under PostgreSQL, where the balances are and where they're staged."""

import asyncio
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest
from engine import Engine, make_config
from structlog.testing import capture_logs

from balancesync.embedded import PostgresServer
from balancesync.errors import PostgresUnavailable, Transient
from faults.figures import Figures
from faults.ground import RETRY, SMALL, Ground, connected, until


class Disk:
    """A small file system of its own, `folder`, that can be filled to the last byte."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"

    def fill(self) -> None:
        """Leave no room."""
        with self._ballast.open("wb", buffering=0) as file:
            for size in (65_536, 4096, 1):
                try:
                    while file.write(bytes(size)) == size:
                        pass
                except OSError:
                    continue

    def free(self) -> None:
        """Make room again."""
        self._ballast.unlink()


def tool(name: str, *arguments: str) -> bool:
    """Whether a program of the system is there and does as told."""
    path = shutil.which(name)
    return bool(path) and not subprocess.run([path or "", *arguments], check=False).returncode


@contextmanager
def mount(folder: Path, size: str) -> Iterator[Disk]:
    """A disk of this size there; skips the test where that can't be had."""
    folder.mkdir()
    if not tool("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)):
        folder.rmdir()
        pytest.skip("mounting a small file system needs root's rights")
    try:
        yield Disk(folder)
    finally:
        assert tool("umount", "--lazy", str(folder))
        folder.rmdir()


@pytest.fixture
def mounted(frail_postgres: PostgresServer) -> Iterator[Disk]:
    """A small disk in PostgreSQL's folder, with a folder `tablespace` for it."""
    with mount(frail_postgres.folder / "small", "2m") as disk:
        owner = (frail_postgres.folder / "data").stat()
        place = disk.folder / "tablespace"
        place.mkdir(0o700)
        os.chown(place, owner.st_uid, owner.st_gid)
        yield disk


@pytest.fixture
async def disk(frail_postgres: PostgresServer, mounted: Disk) -> AsyncIterator[Disk]:
    """It's PostgreSQL's tablespace `small`."""
    async with connected(frail_postgres.dsn) as admin:
        await admin.execute(f"CREATE TABLESPACE small LOCATION '{mounted.folder / 'tablespace'}'")
    yield mounted
    async with connected(frail_postgres.dsn) as admin:
        await admin.execute("DROP DATABASE IF EXISTS full_disk WITH (FORCE)")
        await admin.execute("DROP TABLESPACE small")


@pytest.fixture
async def dsn(frail_postgres: PostgresServer, disk: Disk) -> str:
    """A database of its own on that server, gone with the disk."""
    async with connected(frail_postgres.dsn) as admin:
        await admin.execute("CREATE DATABASE full_disk TEMPLATE template0 ENCODING 'UTF8'")
    return urlsplit(frail_postgres.dsn)._replace(path="/full_disk").geturl()


TARGET = """
    CREATE TABLE balances (
        user_id bigint PRIMARY KEY, balance numeric(20, 2), synced_at timestamptz
    ) TABLESPACE small
"""
STAGING = "ALTER DATABASE full_disk SET temp_tablespaces = small"


@pytest.mark.parametrize("where", [TARGET, STAGING], ids=["the table", "staging"])
async def test_a_full_disk_costs_attempts_and_no_balance(
    disk: Disk, dsn: str, redis_url: str, figures: Figures, where: str
) -> None:
    async with connected(dsn) as pg:
        await pg.execute(where)
    ground = Ground(dsn, redis_url, figures)
    await ground.begin()
    await ground.write(ground.ledger.keys)
    disk.fill()
    figures.fault()
    engine = Engine(make_config(dsn, redis_url, **SMALL, retry={**RETRY, "attempts": 2}))
    line = await engine.failed(Transient)
    assert "is short of space" in line
    await engine.close()
    async with connected(dsn) as pg:
        await ground.ledger.check(pg)
    # Room is made while a run goes on trying.
    patient = Engine(make_config(dsn, redis_url, **SMALL, retry={**RETRY, "attempts": 1000}))
    with capture_logs() as logs:
        task = asyncio.create_task(patient.good())
        async with asyncio.timeout(20):
            while not any("short of space" in str(each.get("error")) for each in logs):
                await asyncio.wait({task}, timeout=0.02)
        disk.free()
        run = await task
    assert run.attempts > 1
    await patient.close()
    async with connected(dsn) as pg:
        await ground.prove(pg)
    await ground.close()


@pytest.fixture
def cramped(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Disk, PostgresServer]]:
    """A PostgreSQL that has all it has on one small disk, its log of changes included."""
    parent = Path(
        tempfile.mkdtemp(prefix="balancesync-disk-", dir="/tmp")
    )  # where PostgreSQL's user can go
    parent.chmod(0o755)
    with mount(parent / "disk", "320m") as disk:
        disk.folder.chmod(0o755)
        monkeypatch.setattr(tempfile, "tempdir", str(disk.folder))
        with PostgresServer({"max_wal_size": "32MB"}, durable=False) as server:
            yield disk, server
    parent.rmdir()


async def burn(pg: asyncpg.Connection) -> None:
    """Write to the log of changes, a megabyte at a time, until PostgreSQL dies of it."""
    while True:
        await pg.execute("SELECT pg_logical_emit_message(true, 'x', repeat('x', 1000000))")


async def test_a_disk_too_full_for_postgres_to_live(
    cramped: tuple[Disk, PostgresServer], redis_url: str, figures: Figures
) -> None:
    disk, server = cramped
    ground = Ground(server.dsn, redis_url, figures)
    await ground.begin()
    await ground.write(ground.ledger.keys)
    engine = Engine(make_config(server.dsn, redis_url, **SMALL, retry={**RETRY, "attempts": 2}))
    async with connected(server.dsn) as other:
        transaction = other.transaction()
        await transaction.start()
        await other.execute("SELECT FROM balances WHERE user_id = 150 FOR UPDATE")
        task = asyncio.create_task(engine.failed(PostgresUnavailable))
        async with connected(server.dsn) as pg:
            await until(pg, "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)")
            disk.fill()
            figures.fault()
            # In the middle of the run it can't write to its log any more, and gives up at once.
            with pytest.raises((asyncpg.PostgresConnectionError, asyncpg.InterfaceError)):
                await burn(pg)
    await task
    await engine.close()
    assert "No space left on device" in server.log
    disk.free()
    await asyncio.to_thread(server.start)
    async with asyncio.timeout(30):
        while True:
            with suppress(asyncpg.CannotConnectNowError, OSError):
                async with connected(server.dsn) as pg:
                    await ground.prove(pg)
                break
    await ground.close()
