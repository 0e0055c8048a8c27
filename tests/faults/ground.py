"""Servers, an application that writes all the time, and what has to hold after each fault."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import asyncpg
from engine import Engine, make_config
from proxy import Proxy
from redis.asyncio import Redis

from balancesync.database import lock_key
from balancesync.embedded import PostgresServer, RedisServer
from balancesync.model import Request, Run
from balancesync.sync import Sync
from faults.figures import Figures
from faults.ledger import Application, Ledger

KEYS = 300
# So small that each run takes many steps.
SMALL: dict[str, Any] = {"redis": {"scan_count": 20}, "postgres": {"apply_batch": 20}}
# Quick, for nothing here gets better by waiting.
RETRY = {"attempts": 5, "initial": 0.1, "maximum": 0.1}
STILL_RUNNING = "SELECT count(*) FROM balancesync.runs WHERE status = 'running'"
# Changes that don't begin with what the one before had left, and rows that aren't as the last one
# left them: nobody else writes.
GAPS = """
    WITH chain AS (
        SELECT key, old ->> 'balance' AS old, new ->> 'balance' AS new,
            lag(new ->> 'balance') OVER (PARTITION BY key ORDER BY at) AS before,
            lead(at) OVER (PARTITION BY key ORDER BY at) IS NULL AS last
        FROM balancesync.changes)
    SELECT count(*) FROM chain JOIN balances AS b ON b.user_id::text = key[1]
    WHERE old IS DISTINCT FROM before OR last AND new <> b.balance::text
"""
WRITER = lock_key("writer", "balancesync")


async def until(pg: asyncpg.Connection, sql: str, *arguments: object, within_s: float = 20) -> None:
    """Wait until this is true."""
    async with asyncio.timeout(within_s):
        while not await pg.fetchval(sql, *arguments):
            await pg.fetchval("SELECT pg_sleep(0.01)")


async def until_free(pg: asyncpg.Connection, within_s: float = 10) -> None:
    """Wait until nobody has the writer's lock: PostgreSQL notices a moment later."""
    taken = "SELECT pg_try_advisory_lock($1)"
    await until(pg, taken, WRITER, within_s=within_s)
    await pg.execute("SELECT pg_advisory_unlock($1)", WRITER)


@asynccontextmanager
async def connected(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection for the length of a block."""
    connection = await asyncpg.connect(dsn)
    try:
        yield connection
    finally:
        await connection.close()


def through(dsn: str, proxy: Proxy) -> str:
    """The DSN by way of the proxy."""
    user = urlsplit(dsn).netloc.rpartition("@")[0]
    return urlsplit(dsn)._replace(netloc=f"{user}@127.0.0.1:{proxy.port}").geturl()


def spread(chance: random.Random, whole: int, count: int) -> Sequence[int]:
    """So many of the steps from 1 to `whole`, at random but everywhere."""
    return [1 + int(whole * (number + chance.random()) / count) for number in range(count)]


class Ground:
    """Both servers, an application that writes, and an engine that looks after each fault."""

    def __init__(self, dsn: str, url: str, figures: Figures, **sections: Any) -> None:
        # Which steps and keys are chosen: the same each time.
        self.chance = random.Random(4711)  # noqa: S311
        self.figures = figures
        self.ledger = Ledger(KEYS, figures)
        self.application = Application(url, self.ledger, self.chance)
        self.url = url
        self.engine = Engine(make_config(dsn, url, **SMALL, **sections))

    async def begin(self) -> None:
        """A first success."""
        await self.write(self.ledger.keys)
        await self.engine.good()

    async def close(self) -> None:
        """Close its connections."""
        await self.engine.close()

    async def write(self, keys: Iterable[int]) -> None:
        """New balances of these keys."""
        async with Redis.from_url(self.url) as client:
            await client.mset(self.ledger.write(keys))

    async def prove(self, pg: asyncpg.Connection) -> None:
        """What has to hold after every fault; the application waits meanwhile."""
        async with self.application.paused:
            await self.ledger.check(pg)
            await until_free(pg)
            await self.engine.good()
            async with Redis.from_url(self.url) as client:
                await self.ledger.check_equal(pg, client)
            run = await self.engine.verify()
            assert (run.counts.unchanged, run.counts.scanned) == (KEYS, KEYS)
            assert not await pg.fetchval(STILL_RUNNING)
            if self.engine.config.history.enabled:
                self.figures.checked(KEYS, gaps := await pg.fetchval(GAPS))
                assert not gaps


# A Redis that is started again under such traffic can't prove to a command, which wasn't there to
# look, that it came with its keys; most of them differ by then: docs/guarantees.md, "The guard".
TRUSTING = {"max_loss": 1.0}


class Frail(Ground):
    """A ground whose servers may be killed."""

    def __init__(self, postgres: PostgresServer, redis: RedisServer, figures: Figures) -> None:
        super().__init__(postgres.dsn, redis.url, figures, guard=TRUSTING)
        self.postgres = postgres
        self.server = redis

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[tuple[Engine, Proxy, Proxy]]:
        """An engine, and the proxies that it goes through to PostgreSQL and to Redis."""
        async with Proxy(self.postgres.port) as before, Proxy(self.server.port) as source:
            sections: dict[str, Any] = {
                "redis": {**SMALL["redis"], "timeout": 0.5},
                "postgres": {**SMALL["postgres"], "timeout": 0.5},
                "retry": RETRY,
                "guard": TRUSTING,
            }
            url = f"redis://127.0.0.1:{source.port}/0"
            made = Engine(make_config(through(self.postgres.dsn, before), url, **sections))
            yield made, before, source
            await made.close()

    async def survive(
        self, strike: Callable[[Proxy], None], *, source_steps: bool = False, count: int
    ) -> None:
        """A run for each fault, which strikes at steps all over it, and succeeds all the same."""
        async with self.watched() as (engine, before, source), self.application.at_work():
            proxy = source if source_steps else before
            began = proxy.chunks
            await self._run(engine)
            steps = proxy.chunks - began
            again = 0
            for step in spread(self.chance, steps, count):
                again += await self._strike(engine, proxy, step, strike)
                async with connected(self.postgres.dsn) as pg:
                    await self.prove(pg)
        # Not each costs an attempt, but if none did, nothing was struck.
        assert again >= count / 4

    async def _strike(
        self, engine: Engine, proxy: Proxy, step: int, strike: Callable[[Proxy], None]
    ) -> bool:
        """A run that is struck at a step; whether it was attempted again."""
        while True:
            await self.write(self.ledger.keys)
            struck = proxy.at_step(step, partial(strike, proxy))
            run = await self._run(engine)
            proxy.forget_steps()
            if struck.is_set():
                return run.attempts > 1
            # On a busy machine what is sent comes in fewer and larger pieces.
            step = max(1, step * 3 // 4)

    async def _run(self, engine: Engine) -> Run:
        # Not the engine's own `sync`, whose questions afterwards would be steps, too.
        sync = Sync(engine.config, engine.database, engine.source)
        async with asyncio.timeout(60):
            run = await sync.run(Request("sync", "cli"))
        self.figures.ran()
        assert run.status == "succeeded", run.error
        assert await self.engine.recorded(run) == run
        return run

    def kill_postgres(self, _proxy: Proxy | None = None) -> None:
        """And back at once."""
        self.postgres.kill()
        self.postgres.start()

    def kill_redis(self, _proxy: Proxy | None = None) -> None:
        """And back at once, with everything."""
        self.server.kill()
        self.server.start()

    def kill_both(self, _proxy: Proxy | None = None) -> None:
        """And back at once."""
        self.postgres.kill()
        self.kill_redis()
        self.postgres.start()
