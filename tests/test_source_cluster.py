import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, aclosing, contextmanager
from itertools import chain

import asyncpg
import pytest
import redis as blocking
from engine import Engine, make_config
from pydantic import SecretStr
from redis.crc import key_slot
from redis.exceptions import MovedError

from balancesync.access import Address, parse
from balancesync.config import RedisConfig
from balancesync.embedded import RedisServer
from balancesync.errors import ConfigError, RedisUnavailable, SourceChanged
from balancesync.model import RawValue, WrongType
from balancesync.nodes import ask_cluster
from balancesync.reading import Reading
from balancesync.source import Source

BALANCES = Reading("string", match=b"balance:*")
ACCOUNTS = Reading("hash", match=b"account:*", fields=(b"amount", b"note"))
SHARES = ((0, 5460), (5461, 10922), (10923, 16383))


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


class Cluster:
    """Three primaries without replicas."""

    def __init__(self, servers: list[RedisServer]) -> None:
        self.servers = servers
        self.clients = [blocking.Redis(port=server.port) for server in servers]

    def call(self, node: int, *words: object) -> object:
        return self.clients[node].execute_command(*words)  # type: ignore[no-untyped-call] # redis-py

    def name(self, node: int) -> str:
        reply = self.call(node, "CLUSTER MYID")
        assert isinstance(reply, bytes)
        return reply.decode()

    def wait(self, condition: Callable[[int], bool]) -> None:
        """Until `condition` holds for each node."""
        wait_until(lambda: all(condition(node) for node in range(3)))

    def settled(self, node: int) -> bool:
        state = self.clients[node].cluster("INFO")
        return bool(state["cluster_state"] == "ok" and state["cluster_known_nodes"] == "3")

    def view(self, node: int) -> dict[str, tuple[str, list[list[str]]]]:
        nodes = self.clients[node].cluster("NODES").values()
        return {one["node_id"]: (one["epoch"], one["slots"]) for one in nodes}

    def wait_for_agreement(self) -> None:
        self.wait(lambda node: self.view(node) == self.view(0))

    def owner(self, key: bytes) -> int:
        slot = key_slot(key)
        return next(n for n, (first, last) in enumerate(SHARES) if first <= slot <= last)

    def empty(self) -> None:
        for client in self.clients:
            client.flushall()

    def fill(self, count: int) -> dict[bytes, RawValue]:
        keys = {b"balance:%d" % number: b"%d.25" % number for number in range(count)}
        pipelines = [client.pipeline(transaction=False) for client in self.clients]
        for key, value in keys.items():
            pipelines[self.owner(key)].set(key, value)
        for pipeline in pipelines:
            pipeline.execute()
        return {**keys}


@contextmanager
def running_cluster(**more: str) -> Iterator[Cluster]:
    settings = {"cluster-enabled": "yes", "cluster-node-timeout": "1000", **more}
    with ExitStack() as stack:
        cluster = Cluster([stack.enter_context(RedisServer(settings)) for _ in SHARES])
        for client in cluster.clients:
            stack.callback(client.close)
        for node, (first, last) in enumerate(SHARES):
            cluster.call(node, "CLUSTER ADDSLOTS", *range(first, last + 1))
            cluster.call(node, "CLUSTER SET-CONFIG-EPOCH", node + 1)
            if node:
                cluster.call(0, "CLUSTER MEET", "127.0.0.1", cluster.servers[node].port)
        cluster.wait(cluster.settled)
        yield cluster


@pytest.fixture(scope="module")
def _cluster() -> Iterator[Cluster]:
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(_cluster: Cluster) -> Cluster:
    _cluster.empty()
    return _cluster


def source_of(server: RedisServer, **settings: object) -> Source:
    config = {"url": SecretStr(server.url), "cluster": True, "scan_count": 100, **settings}
    return Source(RedisConfig(**config))  # type: ignore[arg-type] # the test's own settings


async def read(source: Source, reading: Reading) -> dict[bytes, RawValue]:
    async with aclosing(source.scan(reading)) as found:
        batches = [batch async for batch in found]
    pairs = (zip(batch.keys, batch.values, strict=True) for batch in batches)
    return dict(chain.from_iterable(pairs))


async def interrupted(source: Source, act: Callable[[], object]) -> None:
    """Scan, and in the middle do `act`."""
    async with aclosing(source.scan(BALANCES)) as batches:
        await anext(batches)
        act()
        async for _ in batches:
            pass


async def test_every_primary_is_read(cluster: Cluster) -> None:
    expected = cluster.fill(5_000)
    cluster.clients[cluster.owner(b"balance:list")].rpush("balance:list", "1")
    expected[b"balance:list"] = WrongType("list")
    async with source_of(cluster.servers[1]) as source:
        assert await read(source, BALANCES) == expected
        identity = await source.identity()
        run_ids = {client.info()["run_id"] for client in cluster.clients}
        assert set((identity.run_id or "").split(",")) == identity.run_ids == run_ids
        assert identity.dbsize == 5_001
        assert await source.dbsize() == {
            f"127.0.0.1:{server.port}": client.dbsize()
            for server, client in zip(cluster.servers, cluster.clients, strict=True)
        }


async def test_keys_by_name_are_asked_of_their_owners(cluster: Cluster) -> None:
    expected = cluster.fill(1_000)
    keys = [b"nothing", *expected]
    async with source_of(cluster.servers[2]) as source:
        batch = await source.fetch(BALANCES, keys)
        assert batch.values == [None, *expected.values()]
        assert await source.exists(BALANCES, keys) == [False, *[True] * 1_000]
        sample = await source.sample(BALANCES, 700)
        assert len(sample.batch.keys) == 700
        assert sample.batch.values == [expected[key] for key in sample.batch.keys]


async def test_hashes(cluster: Cluster) -> None:
    for number in range(300):
        key = b"account:%d" % number
        cluster.clients[cluster.owner(key)].hset(key, "amount", number)
    cluster.clients[cluster.owner(b"big")].hset("big", "7", "1.5")
    async with source_of(cluster.servers[0]) as source:
        found = await read(source, ACCOUNTS)
        assert found == {b"account:%d" % n: [b"%d" % n, None] for n in range(300)}
        big = Reading("hash", member_key=b"big")
        assert await read(source, big) == {b"7": b"1.5"}
        assert (await source.fetch(big, [b"7", b"8"])).values == [b"1.5", None]
        assert await source.exists(big, [b"7", b"8"]) == [True, False]


async def test_slots_that_move_break_a_scan(cluster: Cluster) -> None:
    cluster.fill(5_000)
    # A slot without keys, so that it can be given away and taken back at once.
    held = {key_slot(b"balance:%d" % number) for number in range(5_000)}
    slot = next(slot for slot in range(5460) if slot not in held)
    names = [cluster.name(node) for node in range(3)]

    def give(old: int, new: int) -> None:
        # In the order that the documentation of CLUSTER SETSLOT gives.
        cluster.call(new, "CLUSTER SETSLOT", slot, "IMPORTING", names[old])
        for node in (new, *{0, 1, 2} - {new}):
            cluster.call(node, "CLUSTER SETSLOT", slot, "NODE", names[new])
        # Else the next new epoch might be none that the others take for newer.
        cluster.wait_for_agreement()

    def give_and_take() -> None:
        give(0, 1)
        give(1, 0)

    async with source_of(cluster.servers[0]) as source:
        with pytest.raises(SourceChanged, match="shared out their slots anew"):
            await interrupted(source, lambda: give(0, 1))
        give(1, 0)
        with pytest.raises(SourceChanged, match="shared out their slots anew"):
            await interrupted(source, give_and_take)
        cluster.call(0, "CLUSTER SETSLOT", slot, "MIGRATING", names[1])
        with pytest.raises(SourceChanged, match="is moving slots"):
            await anext(source.scan(BALANCES))
        cluster.call(0, "CLUSTER SETSLOT", slot, "STABLE")
        # One node alone believes otherwise.
        cluster.call(0, "CLUSTER SETSLOT", slot, "NODE", names[1])
        with pytest.raises((SourceChanged, RedisUnavailable), match=r"doesn't agree"):
            await read(source, BALANCES)
        cluster.call(0, "CLUSTER SETSLOT", slot, "NODE", names[0])
        assert len(await read(source, BALANCES)) == 5_000


async def test_a_key_whose_slot_has_moved_is_found_the_second_time(cluster: Cluster) -> None:
    slot, names = key_slot(b"balance:x"), [cluster.name(node) for node in range(3)]
    old = cluster.owner(b"balance:x")
    new = (old + 1) % 3
    async with source_of(cluster.servers[0]) as source:
        assert (await source.fetch(BALANCES, [b"balance:x"])).values == [None]
        for node in (new, *{0, 1, 2} - {new}):
            cluster.call(node, "CLUSTER SETSLOT", slot, "NODE", names[new])
        cluster.clients[new].set("balance:x", "5")
        try:
            with pytest.raises(SourceChanged, match="has given slots to another node"):
                await source.fetch(BALANCES, [b"balance:x"])
            assert (await source.fetch(BALANCES, [b"balance:x"])).values == [b"5"]
        finally:
            cluster.clients[new].delete("balance:x")
            for node in (old, *{0, 1, 2} - {old}):
                cluster.call(node, "CLUSTER SETSLOT", slot, "NODE", names[old])


async def test_a_lost_node_breaks_a_scan_and_the_next() -> None:
    with running_cluster() as cluster:
        cluster.fill(5_000)
        async with source_of(cluster.servers[0], timeout=1.0) as source:
            with pytest.raises(SourceChanged, match="closed the connection in mid-run"):
                await interrupted(source, cluster.servers[2].kill)
            with pytest.raises(RedisUnavailable, match=r"refused|cluster is down|serves only"):
                await read(source, BALANCES)
            cluster.servers[2].start()
            cluster.wait(cluster.settled)
            assert (await source.identity()).dbsize == len(await read(source, BALANCES)) > 3_000


@pytest.mark.parametrize("missing", [0, 9_000, 16_383])
async def test_a_cluster_that_lacks_one_slot_is_not_read(
    private_redis: Callable[..., RedisServer], missing: int
) -> None:
    server = private_redis({"cluster-enabled": "yes", "cluster-require-full-coverage": "no"})
    with blocking.Redis(port=server.port) as client:
        slots = [slot for slot in range(16_384) if slot != missing]
        client.execute_command("CLUSTER ADDSLOTS", *slots)
        wait_until(lambda: client.cluster("INFO")["cluster_state"] == "ok")
        async with source_of(server) as source:
            with pytest.raises(RedisUnavailable, match=r"serves only 16,383 of its 16,384 slots"):
                await read(source, BALANCES)
            client.execute_command("CLUSTER ADDSLOTS", missing)
            assert await read(source, BALANCES) == {}


async def test_any_node_that_was_met_can_tell_of_the_cluster(cluster: Cluster) -> None:
    address, access = parse(cluster.servers[1].url, timeout=5, clustered=True)
    layout = await ask_cluster([Address("127.0.0.1", 1), address], access)
    ports = [server.port for server in cluster.servers]
    assert [address.port for address in layout.addresses] == ports
    for key in (b"balance:1", b"balance:2", b"{balance:1}:2"):
        assert layout.owner(key).port == ports[cluster.owner(key)]


async def test_an_empty_hash_tag_is_none(cluster: Cluster) -> None:
    """A key of which nothing stands between the first braces belongs where the whole of it does:
    https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/#hash-tags
    """
    forms = ("balance:{}:%d", "balance:{}{%d}", "balance:{%d", "balance:%d}{", "balance:{{%d}}")
    keys = [(form % number).encode() for form in forms for number in range(40)]
    for key in keys:
        # A node takes a key of its own slots alone, whatever redis-py and we think of that.
        [owner] = [node for node in range(3) if takes(cluster, node, key)]
        assert cluster.owner(key) == owner
    async with source_of(cluster.servers[0]) as source:
        batch = await source.fetch(BALANCES, keys)
        assert dict(zip(batch.keys, batch.values, strict=True)) == dict.fromkeys(keys, b"1")
        assert await read(source, BALANCES) == dict.fromkeys(keys, b"1")


def takes(cluster: Cluster, node: int, key: bytes) -> bool:
    try:
        return cluster.call(node, "SET", key, "1") is True
    except MovedError:
        return False


async def test_a_cluster_that_is_not_whole_is_not_read() -> None:
    partly = {"cluster-require-full-coverage": "no", "cluster-node-timeout": "60000"}
    with running_cluster(**partly) as cluster:
        # The node itself serves the slot no more; the others haven't heard of that.
        cluster.call(0, "CLUSTER DELSLOTS", 0)
        async with source_of(cluster.servers[0]) as source:
            with pytest.raises(RedisUnavailable, match=r"serves only 16,383 of its 16,384 slots"):
                await read(source, BALANCES)
        async with source_of(cluster.servers[1]) as source:
            with pytest.raises(SourceChanged, match="doesn't agree on its slots yet"):
                await read(source, BALANCES)


async def test_the_wrong_setting_is_named(cluster: Cluster, redis_url: str) -> None:
    async with source_of(cluster.servers[0], cluster=False) as source:
        with pytest.raises(ConfigError, match=r"set redis\.cluster = true"):
            await read(source, BALANCES)
    async with Source(RedisConfig(url=SecretStr(redis_url), cluster=True)) as source:
        with pytest.raises(ConfigError, match=r"set redis\.cluster = false"):
            await read(source, BALANCES)


def sentinel_for(primary: RedisServer, **more: str) -> dict[str, str]:
    return {
        "sentinel monitor": f"shop 127.0.0.1 {primary.port} 1",
        "sentinel down-after-milliseconds": "shop 1000",
        "sentinel failover-timeout": "shop 5000",
        **more,
    }


def watched_by(*sentinels: RedisServer, service: str = "shop", password: str = "") -> Source:
    secret = f":{password}@" if password else ""
    return Source(
        RedisConfig(
            url=SecretStr(f"redis://{secret}ignored:6379/0"),
            sentinel=("127.0.0.1:1", *(f"127.0.0.1:{server.port}" for server in sentinels)),
            sentinel_service=service,
            scan_count=100,
        )
    )


async def test_a_failover_by_sentinel(private_redis: Callable[..., RedisServer]) -> None:
    primary = private_redis({"repl-diskless-sync-delay": "0"})
    replica = private_redis({"replicaof": f"127.0.0.1 {primary.port}"})
    clients = [blocking.Redis(port=server.port) for server in (primary, replica)]
    clients[0].mset({f"balance:{number}": "1" for number in range(5_000)})
    # A link that is up may have keys under way still, and a failover would lose them.
    wait_until(lambda: clients[1].dbsize() == 5_000)
    sentinel = private_redis(sentinel_for(primary))
    with blocking.Redis(port=sentinel.port) as control:

        def accepted() -> bool:
            try:
                return bool(control.sentinel_failover("shop"))
            except blocking.ResponseError:
                return False  # it doesn't know the replica well enough yet

        def fail_over() -> None:
            wait_until(accepted)
            wait_until(lambda: control.sentinel_get_master_addr_by_name("shop")[1] == replica.port)
            assert clients[0].info()["role"] == "master"

        async with watched_by(sentinel) as source, watched_by(sentinel) as other:
            assert len(await read(source, BALANCES)) == 5_000
            assert await other.exists(BALANCES, [b"balance:1"]) == [True]
            first = await source.identity()
            # The old primary doesn't know yet that it's none any more.
            with pytest.raises(SourceChanged, match="have replaced Redis at"):
                await interrupted(source, fail_over)
            with pytest.raises(SourceChanged, match="have replaced Redis at"):
                await source.fetch(BALANCES, [b"balance:1"])
            with pytest.raises(SourceChanged, match="have replaced Redis at"):
                await other.exists(BALANCES, [b"balance:1"])
            second = await source.identity()
            assert second.run_id == clients[1].info()["run_id"] != first.run_id
            assert len(await read(source, BALANCES)) == 5_000
    for client in clients:
        client.close()


async def test_sentinels_that_do_not_help(private_redis: Callable[..., RedisServer]) -> None:
    primary = private_redis(password="s3cret")
    guarded = private_redis(
        sentinel_for(primary, **{"sentinel auth-pass": "shop s3cret"}), password="s3cret"
    )
    async with watched_by(guarded, password="s3cret") as source:
        assert (await source.identity()).dbsize == 0
    async with watched_by(guarded) as source:
        with pytest.raises(ConfigError, match="wants a password"):
            await source.identity()
    for source in (watched_by(), watched_by(guarded, service="other", password="s3cret")):
        async with source:
            with pytest.raises(RedisUnavailable, match=r"none of the Sentinels 127\.0\.0\.1:1"):
                await source.identity()
    async with Source(RedisConfig(url=SecretStr(guarded.url))) as source:
        with pytest.raises(ConfigError, match="is a Sentinel"):
            await source.identity()


def test_a_cluster_gets_each_key_where_it_belongs(
    cluster: Cluster, postgres_admin_dsn: str
) -> None:
    async def scenario() -> None:
        connection = await asyncpg.connect(postgres_admin_dsn)
        await connection.execute(
            "DROP TABLE IF EXISTS scattered; CREATE TABLE scattered (user_id bigint PRIMARY KEY,"
            " balance numeric(20,2), synced_at timestamptz)"
        )
        await connection.execute("INSERT INTO scattered SELECT n, n FROM generate_series(1, 900) n")
        url = f"redis://127.0.0.1:{cluster.servers[0].port}"
        made = Engine(
            make_config(
                postgres_admin_dsn,
                url,
                {"table": "scattered"},
                redis={"cluster": True},
                postgres={"schema": "scattered_runs"},
            )
        )
        run = await made.sync(job="restore")
        assert (run.status, run.counts.inserted) == ("succeeded", 900)
        assert sum(client.dbsize() for client in cluster.clients) == 900
        assert (await made.sync(job="restore")).counts.unchanged == 900
        cluster.clients[cluster.owner(b"balance:5")].set("balance:5", "1")
        assert (await made.sync(job="restore", overwrite=True)).counts.updated == 1
        assert (await made.verify()).counts.unchanged == 900
        await made.close()
        await connection.execute("DROP TABLE scattered; DROP SCHEMA scattered_runs CASCADE")
        await connection.close()

    asyncio.run(scenario())
