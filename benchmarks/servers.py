"""The benchmark's own servers, its data in them, and workers: processes that are measured."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, Final
from urllib.parse import urlsplit

import asyncpg
from pydantic import SecretStr

from balancesync.config import RedisConfig
from balancesync.embedded import PostgresServer, RedisServer
from balancesync.source import Source
from benchmarks import data, noise
from benchmarks.data import STRINGS, Dataset

# Durable, as in production. No checkpoint and no autovacuum falls into a measurement by chance:
# both are done by hand before each.
POSTGRES: Final = {
    "shared_buffers": "512MB",
    "effective_cache_size": "4GB",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "1h",
    "autovacuum": "off",
}
_POLL_S: Final = 0.02
_POLLS: Final = 3000
_LOG_LINES: Final = 20


class Broken(Exception):
    """The benchmark itself doesn't work: a worker failed, or did other work than it was to do."""


@dataclass
class Bench:
    """Both servers, the sizes asked for, and what is in Redis now."""

    keys: int
    runs: int
    quick: bool
    dsn: str
    url: str
    sql: asyncpg.Connection
    servers: tuple[int, int]
    details: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    noise: list[float] = field(default_factory=list)
    seed: int = 0
    _holds: tuple[str, int] = ("", 0)

    async def hold(self, dataset: Dataset, keys: int = 0) -> None:
        """Make Redis hold this dataset with `keys` records (0: as many as asked for) alone."""
        wanted = (dataset.name, keys or self.keys)
        if self._holds != wanted:
            data.flush(self.url)
            self.seed += 1
            data.fill(self.url, dataset, range(1, wanted[1] + 1), self.seed)
            self._holds = wanted

    def change(self, dataset: Dataset, step: int) -> int:
        """Give every `step`th record a new balance; returns how many."""
        self.seed += 1
        numbers = range(1 + self.seed % step, self._holds[1] + 1, step)
        data.fill(self.url, dataset, numbers, self.seed)
        return len(numbers)

    async def work(self, action: str, **parameters: Any) -> dict[str, Any]:
        """Run one action of `worker` in a process of its own; returns what it reports."""
        before, begun = noise.cpu_seconds(*self.servers), perf_counter()
        found = await finish(await self.start(action, **parameters))
        after = noise.cpu_seconds(*self.servers)
        found |= {name: after[name] - before[name] for name in after}
        if after:
            share = found["others"] / (perf_counter() - begun) / (os.cpu_count() or 1)
            found["others"] = max(0.0, share)
            self.noise.append(found["others"])
        return found

    async def start(self, action: str, **parameters: Any) -> asyncio.subprocess.Process:
        """Start one action of `worker` without waiting for it; `finish` does."""
        given = {"url": self.url, "dsn": self.dsn} | parameters
        return await start("benchmarks.worker", action, json.dumps(given))

    async def seconds(self, action: str, **parameters: Any) -> float:
        """The seconds that one action takes."""
        found = await self.work(action, **parameters)
        self.details.setdefault(f"floor: {action}", []).append(found)
        return float(found["seconds"])

    async def sync(
        self,
        case: str,
        dataset: Dataset = STRINGS,
        expect: dict[str, int] | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """Run one sync; raises Broken if its counts aren't those of `expect`."""
        found = await self.work("sync", **({"mapping": dataset.mapping} | more))
        wrong = {
            k: (found["counts"][k], v) for k, v in (expect or {}).items() if found["counts"][k] != v
        }
        if wrong:
            raise Broken(f"{case}: counts are not as they should be (found, expected): {wrong}")
        self.details.setdefault(case, []).append(found)
        return found

    async def synced(self, dataset: Dataset = STRINGS) -> None:
        """Make Redis hold the dataset and the table agree with it."""
        await self.hold(dataset)
        # The guard refuses what another case has left: a Redis that was emptied and filled anew.
        found = await self.work("sync", mapping=dataset.mapping, accept_loss=True)
        counts = found["counts"]
        if counts["scanned"] != self.keys or counts["rejected"]:
            raise Broken(f"preparing {dataset.name}: {counts}")
        await self.rest(dataset.mapping["table"])

    async def versions(self) -> str:
        """Of both servers, in words."""
        postgres = await self.sql.fetchval("SHOW server_version")
        async with Source(RedisConfig(url=SecretStr(self.url))) as source:
            identity = await source.identity()
        return f"PostgreSQL {postgres}, {identity.server} {identity.version}"

    @asynccontextmanager
    async def twin(self) -> AsyncIterator["Bench"]:
        """A Redis and a database of their own beside these, empty, for the length of a block."""
        await self.sql.execute("CREATE DATABASE twin")
        dsn = urlsplit(self.dsn)._replace(path="/twin").geturl()
        with RedisServer() as redis:
            connection = await asyncpg.connect(dsn)
            try:
                yield replace(
                    self,
                    dsn=dsn,
                    url=redis.url,
                    sql=connection,
                    servers=(self.servers[0], redis.pid),
                    _holds=("", 0),
                )
            finally:
                connection.terminate()
                await self.sql.execute("DROP DATABASE twin WITH (FORCE)")

    async def settle(self) -> None:
        """Wait for the end of all other sessions, which then have told their statistics."""
        others = (
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )
        for _ in range(_POLLS):
            if not await self.sql.fetchval(others):
                return
            await asyncio.sleep(_POLL_S)
        raise Broken("another session of the benchmark's PostgreSQL doesn't end")

    async def rest(self, *tables: str) -> None:
        """Leave nothing to be done in the background: sessions end, vacuum, checkpoint."""
        await self.settle()
        for table in tables:
            await self.sql.execute(f"VACUUM (ANALYZE) {table}")
        await self.sql.execute("CHECKPOINT")


@asynccontextmanager
async def bench(keys: int, runs: int, *, quick: bool) -> AsyncIterator[Bench]:
    """Start both servers for the length of a block."""
    with PostgresServer(POSTGRES) as postgres, RedisServer() as redis:
        connection = await asyncpg.connect(postgres.dsn)
        try:
            yield Bench(
                keys,
                runs,
                quick,
                postgres.dsn,
                redis.url,
                connection,
                servers=(postgres.pid, redis.pid),
            )
        except (Broken, asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
            said = postgres.log.splitlines()[-_LOG_LINES:]
            raise Broken("\n".join([str(error), "PostgreSQL's log ends with:", *said])) from error
        finally:
            connection.terminate()


async def start(module: str, *arguments: str) -> asyncio.subprocess.Process:
    """Start one of this package's modules in a process of its own; `finish` waits for it."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 24,
    )


def tell(found: dict[str, Any]) -> None:
    """Say what a worker has found, for `finish`."""
    # By a buffer of its own: with PYTHONUNBUFFERED, print drops what a pipe doesn't take at once.
    with open(sys.stdout.fileno(), "w", closefd=False) as output:
        output.write(json.dumps(found))


async def finish(process: asyncio.subprocess.Process) -> dict[str, Any]:
    """What a worker reports at its end; one that works until its stdin ends is told so."""
    output, _ = await process.communicate(b"")
    if process.returncode:
        raise Broken("a worker failed; its error is above")
    found: dict[str, Any] = json.loads(output or b"{}")
    return found
