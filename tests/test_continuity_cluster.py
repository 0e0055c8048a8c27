"""A cluster: each primary is judged alone, against its own keys, also when one joins or leaves."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
from engine import Engine, make_config
from test_source_cluster import Cluster, running_cluster

KEYS = 300


def rewrite(cluster: Cluster, value: str, node: int | None = None) -> int:
    """Give all keys this value, or those of one node; how many they are."""
    written = 0
    for number in range(KEYS):
        name = f"balance:{number}"
        owner = cluster.owner(name.encode())
        if node in (None, owner):
            cluster.clients[owner].set(name, value)
            written += 1
    return written


def restart(cluster: Cluster, node: int) -> None:
    """In good order: it keeps what its settings say."""
    cluster.clients[node].close()
    cluster.servers[node].stop()
    cluster.servers[node].start()
    cluster.wait(cluster.settled)


@asynccontextmanager
async def synced(dsn: str, **settings: str) -> AsyncIterator[tuple[Cluster, Engine]]:
    """A cluster of three, and an engine after a first success."""
    with running_cluster(**settings) as cluster:
        rewrite(cluster, "50")
        made = Engine(
            make_config(
                dsn,
                f"redis://127.0.0.1:{cluster.servers[0].port}",
                redis={"cluster": True},
                retry={"attempts": 5, "initial": 0.1, "maximum": 0.1},
            )
        )
        await made.good()
        yield cluster, made
        await made.close()


async def refused(made: Engine) -> str:
    run = await made.sync()
    assert run.status == "refused", (run.status, run.error, run.counts)
    return str(run.error)


async def test_one_primary_that_restarts_with_its_file_is_followed(postgres_dsn: str) -> None:
    async with synced(postgres_dsn, appendonly="yes") as (cluster, made):
        restart(cluster, 1)
        rewrite(cluster, "60")
        assert (await made.good()).counts.updated == KEYS
        rewrite(cluster, "70")
        assert (await made.good()).counts.updated == KEYS


async def test_one_primary_that_restarts_empty_is_refused_for_its_own_keys(
    postgres_dsn: str, pg: asyncpg.Connection
) -> None:
    async with synced(postgres_dsn) as (cluster, made):
        restart(cluster, 1)
        lost = rewrite(cluster, "0", node=1)
        line = await refused(made)
        assert "restarted or replaced since the last success, with 0 keys" in line
        assert "(this is about 1 of 3 primaries)" in line
        assert f"{lost} of {KEYS} known keys came back changed" in line
    assert await pg.fetchval("SELECT min(balance) FROM balances") == 50


async def test_one_primary_that_is_flushed_is_refused_for_its_own_keys(
    postgres_dsn: str, pg: asyncpg.Connection
) -> None:
    async with synced(postgres_dsn) as (cluster, made):
        cluster.clients[2].flushall()
        rewrite(cluster, "0", node=2)
        assert "emptied by FLUSHALL or FLUSHDB" in await refused(made)
        await made.good(accept_loss=True)
        rewrite(cluster, "1")
        assert (await made.good()).counts.updated == KEYS
    assert await pg.fetchval("SELECT sum(balance) FROM balances") == KEYS
