"""Runs the engine on a test's own servers."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

import asyncpg
from pydantic import TypeAdapter

from balancesync.config import Config
from balancesync.database import Database
from balancesync.errors import BalanceSyncError
from balancesync.model import RawBatch, Request, Run
from balancesync.nodes import Identity
from balancesync.part import Progress
from balancesync.reading import Reading
from balancesync.records import KeptReject, Records
from balancesync.report import Report
from balancesync.source import Source
from balancesync.sync import Sync

# The table of an application: bare Telegram ids, whole micro-units, rows that are never inserted.
USERS: dict[str, Any] = {
    "name": "users",
    "key": "{telegram_id}",
    "table": "users",
    "mode": "update",
    "synced_at": "sync_at",
    "columns": {"telegram_id": "bigint", "balance": "bigint"},
}
_CONFIG = TypeAdapter(Config)


class Twice(Source):
    """A Redis whose SCAN gives every key again, with what a write between the two reads left.

    SCAN may do so at any time; it's only rare. `between` is called before the second reading, and
    `joined` gives both readings of a page in one batch.
    """

    between: Callable[[], Any]
    joined = False

    async def scan(
        self, reading: Reading, *, identity: Identity | None = None
    ) -> AsyncGenerator[RawBatch, None]:
        first: list[RawBatch] = []
        async with aclosing(super().scan(reading, identity=identity)) as batches:
            async for batch in batches:
                first.append(batch)
                if not self.joined:
                    yield batch
        await self.between()
        async with aclosing(super().scan(reading, identity=identity)) as batches:
            async for batch in batches:
                if self.joined:
                    one = first.pop(0)
                    batch.keys[:0], batch.values[:0] = one.keys, one.values
                    batch.scanned += one.scanned
                yield batch


class Engine:
    """One configuration; `failure`, `reports` and the run of the last `sync`."""

    def __init__(self, config: Config, source: type[Source] = Source) -> None:
        self.config = config
        self.database = Database(config.postgres)
        self.source = source(config.redis)
        self.records = Records(self.database)
        self.on_progress: Callable[[Progress], None] = lambda progress: None
        self.failure: BalanceSyncError | None = None
        self.reports: list[Report] = []

    async def close(self) -> None:
        """Close its connections."""
        await self.source.close()
        await self.database.close()

    async def sync(self, **request: Any) -> Run:
        """Execute a request for a sync, whatever comes of it; a run's record equals the run."""
        sync = Sync(self.config, self.database, self.source, self.on_progress)
        run = await sync.run(Request(**{"job": "sync", "trigger": "cli", **request}))
        self.failure, self.reports = sync.failure, sync.reports
        if run.status in ("succeeded", "skipped") and run.mode == "apply":
            assert await self.recorded(run) == run
        return run

    async def good(self, **request: Any) -> Run:
        """Execute a request that has to succeed."""
        run = await self.sync(**request)
        assert (run.status, run.error) == ("succeeded", None)
        assert run.counts.scanned == run.counts.seen
        return run

    async def failed(self, kind: type[BalanceSyncError], **request: Any) -> str:
        """Execute a request that has to fail, with an error of this very kind; return its line."""
        run = await self.sync(**request)
        assert type(self.failure) is kind, run.error
        assert run.status == "failed"
        line = str(self.failure)
        assert line == run.error
        assert "\n" not in line
        return line

    async def verify(self) -> Run:
        """Execute a verify."""
        return await self.good(job="verify", mode="verify")

    async def recorded(self, run: Run) -> Run | None:
        """Give the run as PostgreSQL holds it."""
        async with self.database.acquire() as connection:
            found: Sequence[Run] = await self.records.runs(connection, one=run.id, limit=1)
        return found[0] if found else None

    async def rejects(self, *, healed: bool = False) -> dict[bytes, KeptReject]:
        """Give the kept rejects by key."""
        async with self.database.acquire() as connection:
            found = await self.records.rejects(connection, limit=10_000, healed=healed)
        return {reject.key: reject for reject in found}

    async def reasons(self) -> dict[bytes, str]:
        """Give the reasons of the open rejects by key."""
        return {key: reject.reason for key, reject in (await self.rejects()).items()}


def make_config(dsn: str, url: str, *mappings: dict[str, Any], **sections: Any) -> Config:
    """Make a configuration that gives up at the first failure and minds no rejects, by default."""
    table = {
        "redis": {"url": url, **sections.pop("redis", {})},
        "postgres": {"dsn": dsn, **sections.pop("postgres", {})},
        "mapping": list(mappings) or [{}],
        "retry": {"attempts": 1, **sections.pop("retry", {})},
        "guard": {"max_rejects": 1.0, **sections.pop("guard", {})},
        **sections,
    }
    return _CONFIG.validate_python(table)


async def waiting(pg: asyncpg.Connection, count: int) -> None:
    """Return when so many sessions of the test's database wait for locks."""
    sql = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE wait_event_type = 'Lock' AND datname = current_database()"
    )
    async with asyncio.timeout(20):
        while await pg.fetchval(sql) < count:
            await asyncio.sleep(0.01)
            # A transaction sees the activity as it first saw it.
            await pg.execute("SELECT pg_stat_clear_snapshot()")
