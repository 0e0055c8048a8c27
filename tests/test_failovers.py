"""Failovers with the guard and live mode: what goes on is followed, what was emptied isn't.

Each replica is attached while its primary is empty, so that the keys it was loaded with prove
nothing.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import asyncpg
import pytest
from engine import Engine, make_config
from following import until
from redis import Redis as BlockingRedis
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff
from redis.exceptions import RedisError
from running import Inside, daemon_config
from test_source_cluster import Cluster, running_cluster, wait_until

from balancesync.embedded import RedisServer

PrivateRedis = Callable[..., RedisServer]
KEYS = 200
SUM = "SELECT sum(balance) FROM balances"


async def fill(redis: Redis, value: int) -> None:
    await redis.mset({f"balance:{each}": str(value) for each in range(KEYS)})


async def field(client: Redis, name: str) -> Any:
    return (await client.info("replication")).get(name)


async def attached(replica: Redis, primary: Redis) -> None:
    """Until the replica has all that its primary has."""

    async def lag() -> tuple[Any, int]:
        behind = await field(primary, "master_repl_offset")
        return (
            await field(replica, "master_link_status"),
            behind - await field(replica, "master_repl_offset"),
        )

    await until(lag, ("up", 0))


def engine_of(dsn: str, url: str, redis: dict[str, Any]) -> Engine:
    # The first attempt after a failover may find that Redis is another one.
    retry = {"attempts": 5, "initial": 0.1, "maximum": 0.1}
    return Engine(make_config(dsn, url, redis=redis, retry=retry))


# --- Sentinel -------------------------------------------------------------------------------------


class Watched:
    """A primary and a replica that a Sentinel watches."""

    def __init__(self, old: Redis, new: Redis, control: Redis, sentinel: str, port: int) -> None:
        self.old = old
        self.new = new
        self.redis = {"sentinel": [sentinel], "sentinel_service": "shop"}
        self._control = control
        self._port = port

    async def fail_over(self) -> None:
        """As an operator asks for it: the replica has all by then."""
        await attached(self.new, self.old)
        await self._control.execute_command("SENTINEL FAILOVER", "shop")  # type: ignore[no-untyped-call] # redis-py
        ask: Callable[..., Awaitable[Any]] = self._control.sentinel_get_master_addr_by_name
        await until(lambda: ask("shop"), (b"127.0.0.1", self._port))
        # Until then an open connection to the old one leads to somebody who calls himself primary.
        await until(lambda: field(self.old, "role"), "slave")


@pytest.fixture
async def watched(private_redis: PrivateRedis) -> AsyncIterator[Watched]:
    primary = private_redis({"repl-diskless-sync-delay": "0"})
    replica = private_redis(
        {"replicaof": f"127.0.0.1 {primary.port}", "repl-diskless-sync-delay": "0"}
    )
    # Sentinel cuts the connections of those whose role it changes.
    retry = Retry(ConstantBackoff(0.05), 10)
    async with AsyncExitStack() as stack:
        old, new = [
            await stack.enter_async_context(Redis.from_url(server.url, retry=retry))
            for server in (primary, replica)
        ]
        await attached(new, old)
        assert await new.dbsize() == 0
        sentinel = private_redis(
            {
                "sentinel monitor": f"shop 127.0.0.1 {primary.port} 1",
                "sentinel down-after-milliseconds": "shop 5000",
                "sentinel failover-timeout": "shop 2000",
            }
        )
        control = await stack.enter_async_context(Redis(port=sentinel.port))
        slaves: Callable[..., Awaitable[list[Any]]] = control.sentinel_slaves

        async def known() -> int:
            return len(await slaves("shop"))

        await until(known, 1)
        yield Watched(old, new, control, f"127.0.0.1:{sentinel.port}", replica.port)


@asynccontextmanager
async def traffic(redis: Redis) -> AsyncIterator[None]:
    """Writes all keys over and over; what a failover refuses is written the next time."""
    stop = asyncio.Event()

    async def write() -> None:
        value = 1000
        while not stop.is_set():
            value += 1
            with suppress(RedisError):
                await fill(redis, value)
            await asyncio.sleep(0.005)

    task = asyncio.create_task(write())
    try:
        yield
    finally:
        stop.set()
        await task


async def test_a_sync_after_a_sentinel_failover_is_not_refused(
    watched: Watched, postgres_dsn: str
) -> None:
    made = engine_of(postgres_dsn, "redis://ignored:6379/0", watched.redis)
    await fill(watched.old, 50)
    await made.good()
    await fill(watched.old, 60)
    await watched.fail_over()
    await fill(watched.new, 70)
    assert (await made.good()).counts.updated == KEYS
    await made.close()


async def test_keys_made_again_as_zero_after_a_sentinel_failover_are_refused(
    watched: Watched, postgres_dsn: str, pg: asyncpg.Connection
) -> None:
    made = engine_of(postgres_dsn, "redis://ignored:6379/0", watched.redis)
    await fill(watched.old, 50)
    await made.good()
    await watched.fail_over()
    await watched.new.flushall()
    await fill(watched.new, 0)
    run = await made.sync()
    assert run.status == "refused"
    assert f"{KEYS} of {KEYS} known keys came back changed" in str(run.error)
    assert await pg.fetchval(SUM) == 50 * KEYS
    await made.close()


@pytest.mark.usefixtures("quick")
async def test_live_mode_follows_a_sentinel_failover_under_traffic(
    watched: Watched, postgres_dsn: str, pg: asyncpg.Connection
) -> None:
    config = daemon_config(
        postgres_dsn,
        "redis://ignored:6379/0",
        redis=watched.redis,
        live={"enabled": True, "flush_interval": 0.02, "rescan_interval": 0},
    )
    await fill(watched.old, 50)
    async with Inside(config) as daemon:
        await daemon.log.next("live", state="up")
        async with traffic(watched.old):
            await until(lambda: _exceeds(pg, 1000 * KEYS), True)
            await watched.fail_over()
        async with traffic(watched.new):
            await daemon.log.next("live", state="catching up")
            await daemon.log.next("live", state="up")
        await fill(watched.new, 7)
        await until(lambda: pg.fetchval(SUM), 7 * KEYS)
        assert daemon.daemon.state.live == "up"
        assert not daemon.log.all("run_finished", status="refused")
        # And it's still on its guard.
        await watched.new.flushall()
        await fill(watched.new, 0)
        await daemon.finished(status="refused")
        assert await pg.fetchval(SUM) == 7 * KEYS


async def _exceeds(pg: asyncpg.Connection, amount: int) -> bool:
    return bool(await pg.fetchval(f"{SUM} HAVING sum(balance) > {amount}"))


# --- a cluster ------------------------------------------------------------------------------------


def rewrite(cluster: Cluster, value: int, node: int | None = None) -> int:
    """Give all keys this value, or those of one node; how many they are."""
    written = 0
    for number in range(KEYS):
        name = f"balance:{number}"
        owner = cluster.owner(name.encode())
        if node in (None, owner):
            cluster.clients[owner].set(name, value)
            written += 1
    return written


def fail_over(cluster: Cluster, node: int, replica: BlockingRedis) -> None:
    """Promote the replica, which takes the place of this node in `cluster`."""

    def has_all() -> bool:
        found, primary = replica.info("replication"), cluster.clients[node].info("replication")
        is_up = found["master_link_status"] == "up"
        return bool(is_up and found["master_repl_offset"] == primary["master_repl_offset"])

    wait_until(has_all)
    replica.execute_command("CLUSTER FAILOVER")  # type: ignore[no-untyped-call] # redis-py
    wait_until(lambda: replica.info("replication")["role"] == "master")
    wait_until(lambda: cluster.clients[node].info("replication")["role"] == "slave")
    cluster.clients[node] = replica
    # Else one of them might be asked who doesn't know yet.
    cluster.wait(lambda each: _owns(cluster, each, replica.cluster("MYID")))


def _owns(cluster: Cluster, node: int, name: Any) -> bool:
    nodes = cluster.clients[node].cluster("NODES").values()
    wanted = name.decode() if isinstance(name, bytes) else str(name)
    return any(each["node_id"] == wanted and each["slots"] for each in nodes)


@pytest.fixture
async def cluster(postgres_dsn: str) -> AsyncIterator[tuple[Cluster, BlockingRedis, Engine]]:
    """Three primaries, a replica of the second, and an engine after a first success."""
    settings = {"cluster-enabled": "yes", "cluster-node-timeout": "1000"}
    with (
        running_cluster(**{"repl-diskless-sync-delay": "0"}) as made,
        RedisServer(settings) as server,
        BlockingRedis(port=server.port) as replica,
    ):
        made.call(0, "CLUSTER MEET", "127.0.0.1", server.port)
        name = made.name(1)
        wait_until(lambda: name in str(replica.execute_command("CLUSTER NODES")))
        replica.execute_command("CLUSTER REPLICATE", name)
        wait_until(lambda: replica.info("replication").get("master_link_status") == "up")
        assert replica.info("persistence")["rdb_last_load_keys_loaded"] == 0
        rewrite(made, 50)
        url = f"redis://127.0.0.1:{made.servers[0].port}"
        engine = engine_of(postgres_dsn, url, {"cluster": True})
        await engine.good()
        yield made, replica, engine
        await engine.close()


async def test_a_replica_that_a_cluster_promotes_is_followed(
    cluster: tuple[Cluster, BlockingRedis, Engine],
) -> None:
    servers, replica, made = cluster
    fail_over(servers, 1, replica)
    for value in (60, 70):
        rewrite(servers, value)
        assert (await made.good()).counts.updated == KEYS


async def test_a_replica_that_a_cluster_promotes_and_somebody_flushes_is_refused(
    cluster: tuple[Cluster, BlockingRedis, Engine], pg: asyncpg.Connection
) -> None:
    servers, replica, made = cluster
    fail_over(servers, 1, replica)
    replica.flushall()
    lost = rewrite(servers, 0, node=1)
    run = await made.sync()
    assert run.status == "refused"
    assert "has run FLUSHALL, FLUSHDB or SWAPDB" in str(run.error)
    assert "(this is about 1 of 3 primaries)" in str(run.error)
    assert f"{lost} of {KEYS} known keys came back changed" in str(run.error)
    assert await pg.fetchval("SELECT min(balance) FROM balances") == 50
