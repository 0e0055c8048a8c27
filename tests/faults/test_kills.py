"""SIGKILL at any step of a run, of the daemon, of PostgreSQL, of Redis, under traffic."""

import asyncio
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest
from proxy import Proxy
from running import free_port

from faults.figures import Figures
from faults.forked import Forked
from faults.ground import Frail, Ground, spread, through, until, until_free


@pytest.mark.parametrize("history", [False, True], ids=["plain", "history"])
async def test_the_daemon_killed_at_any_step_under_traffic(
    figures: Figures,
    pg: asyncpg.Connection,
    postgres_dsn: str,
    redis_url: str,
    *,
    tmp_path: Path,
    torture: bool,
    history: bool,
) -> None:
    ground = Ground(postgres_dsn, redis_url, figures, history={"enabled": history})
    await ground.begin()
    async with Proxy(urlsplit(postgres_dsn).port or 0) as proxy:
        config = tmp_path / "config.toml"
        config.write_text(
            f'[redis]\nurl = "{redis_url}"\nscan_count = 20\n'
            f'[postgres]\ndsn = "{through(postgres_dsn, proxy)}"\napply_batch = 20\n'
            f"[http]\nport = {free_port()}\n[schedule]\njobs = {{}}\n"
            f"[history]\nenabled = {str(history).lower()}\n"
        )

        def start() -> Forked:
            return Forked(tmp_path / "log", "run", "--config", str(config))

        async with ground.application.at_work():
            # How many steps it takes from its start to the end of its first run.
            before = await pg.fetchval("SELECT count(*) FROM balancesync.runs")
            began = proxy.chunks
            daemon = start()
            done = "SELECT count(*) > $1 AND bool_and(status <> 'running') FROM balancesync.runs"
            await until(pg, done, before)
            steps = proxy.chunks - began
            daemon.kill()
            await daemon.ended()
            await ground.prove(pg)
            interrupted = 0
            for step in spread(ground.chance, steps, 200 if torture else 8):
                before = await pg.fetchval("SELECT count(*) FROM balancesync.runs")
                daemon = start()
                struck = proxy.at_step(step, daemon.kill)
                async with asyncio.timeout(60):
                    # A run may take fewer steps than the first one did.
                    while not struck.is_set() and not await pg.fetchval(done, before):
                        await pg.fetchval("SELECT pg_sleep(0.01)")
                proxy.forget_steps()
                daemon.kill()
                ground.figures.fault()
                assert await daemon.ended() == -9, daemon.log.read_text()
                await until_free(pg)
                [left] = await ground.engine.records.runs(pg, limit=1)
                assert left.status in ("interrupted", "succeeded")
                interrupted += left.status == "interrupted"
                await ground.prove(pg)
    await ground.close()
    # Else this test has looked at starts and ends alone.
    assert interrupted > 1


# --- the servers ----------------------------------------------------------------------------------


async def test_postgres_killed_at_any_step_under_traffic(frail: Frail, *, torture: bool) -> None:
    await frail.survive(frail.kill_postgres, count=100 if torture else 4)


async def test_redis_killed_at_any_step_of_the_reading_under_traffic(
    frail: Frail, *, torture: bool
) -> None:
    await frail.survive(frail.kill_redis, source_steps=True, count=100 if torture else 4)


async def test_both_killed_at_once_under_traffic(frail: Frail, *, torture: bool) -> None:
    await frail.survive(frail.kill_both, count=50 if torture else 2)
