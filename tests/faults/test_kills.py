"""SIGKILL at any step of a run, of the daemon, of PostgreSQL, of Redis, under traffic."""

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest
from engine import Engine, make_config
from proxy import Proxy
from redis.asyncio import Redis
from running import free_port

from faults.figures import Figures
from faults.forked import Forked
from faults.ground import Application, Ledger, spread, until, until_free

KEYS = 300
SMALL = {"redis": {"scan_count": 20}, "postgres": {"apply_batch": 20}}
NEWEST = "SELECT status FROM balancesync.runs ORDER BY id DESC LIMIT 1"
# As whoever asks for the runs is told: one whose process is gone is interrupted.
STILL_RUNNING = "SELECT count(*) FROM balancesync.runs WHERE status = 'running'"


def through(dsn: str, proxy: Proxy) -> str:
    return urlsplit(dsn)._replace(netloc=f"postgres@127.0.0.1:{proxy.port}").geturl()


class Ground:
    """Both servers, an application that writes, and an engine that looks after each fault."""

    def __init__(self, dsn: str, url: str, figures: Figures, **sections: object) -> None:
        self.chance = random.Random(4711)  # noqa: S311  # which steps, the same each time
        self.figures = figures
        self.ledger = Ledger(KEYS, figures)
        self.application = Application(url, self.ledger, self.chance)
        self.engine = Engine(make_config(dsn, url, **SMALL, **sections))
        self._url = url

    async def begin(self) -> None:
        """A first success."""
        async with Redis.from_url(self._url) as client:
            await client.mset(self.ledger.write(self.ledger.keys))
        await self.engine.good()

    async def prove(self, pg: asyncpg.Connection) -> None:
        """What has to hold after every fault; the application waits meanwhile."""
        async with self.application.paused:
            await self.ledger.check(pg)
            await until_free(pg)
            await self.engine.good()
            await self.ledger.check_equal(pg)
            run = await self.engine.verify()
            assert (run.counts.unchanged, run.counts.scanned) == (KEYS, KEYS)
            assert not await pg.fetchval(STILL_RUNNING)


@pytest.fixture
async def ground(postgres_dsn: str, redis_url: str, figures: Figures) -> AsyncIterator[Ground]:
    made = Ground(postgres_dsn, redis_url, figures)
    await made.begin()
    yield made
    await made.engine.close()


async def test_the_daemon_killed_at_any_step_under_traffic(
    ground: Ground,
    pg: asyncpg.Connection,
    postgres_dsn: str,
    redis_url: str,
    *,
    tmp_path: Path,
    torture: bool,
) -> None:
    async with Proxy(urlsplit(postgres_dsn).port or 0) as proxy:
        config = tmp_path / "config.toml"
        config.write_text(
            f'[redis]\nurl = "{redis_url}"\nscan_count = 20\n'
            f'[postgres]\ndsn = "{through(postgres_dsn, proxy)}"\napply_batch = 20\n'
            f"[http]\nport = {free_port()}\n[schedule]\njobs = {{}}\n"
        )

        def start() -> Forked:
            return Forked(tmp_path / "log", "run", "--config", str(config))

        async with ground.application.at_work():
            # How many steps it takes from its start to the end of its first run.
            before = await pg.fetchval("SELECT count(*) FROM balancesync.runs")
            began = proxy.chunks
            daemon = start()
            done = "SELECT count(*) > $1 FROM balancesync.runs WHERE status = 'succeeded'"
            await until(pg, done, before)
            steps = proxy.chunks - began
            daemon.kill()
            await daemon.ended()
            await ground.prove(pg)
            interrupted = 0
            for step in spread(ground.chance, steps, 400 if torture else 15):
                daemon = start()
                struck = proxy.at_step(step, daemon.kill)
                try:
                    async with asyncio.timeout(5):
                        await struck.wait()
                except TimeoutError:
                    daemon.kill()  # the run took fewer steps this time
                ground.figures.fault()
                assert await daemon.ended() == -9, daemon.log.read_text()
                await until_free(pg)
                [left] = await ground.engine.records.runs(pg, limit=1)
                assert left.status in ("interrupted", "succeeded")
                interrupted += left.status == "interrupted"
                await ground.prove(pg)
    # Else this test has looked at starts and ends alone.
    assert interrupted > 2
