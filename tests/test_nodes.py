"""Who Redis is: one difference at a time, between two looks at real servers."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from pydantic import SecretStr
from redis.asyncio import Redis

from balancesync.config import RedisConfig
from balancesync.embedded import RedisServer
from balancesync.errors import RedisUnavailable, SourceChanged
from balancesync.nodes import Identity, Node, check_settled
from balancesync.reading import Reading
from balancesync.source import Source

BALANCES = Reading("string", match=b"balance:*")


async def look(url: str) -> Node:
    async with Source(RedisConfig(url=SecretStr(url))) as source:
        (node,) = (await source.identity()).nodes
    return node


def altered(node: Node, **fields: Any) -> Node:
    """The node, told apart by one thing alone."""
    of_primary = {name: value for name, value in fields.items() if hasattr(node.primary, name)}
    own = {name: value for name, value in fields.items() if name not in of_primary}
    return replace(node, primary=replace(node.primary, **of_primary), **own)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("run_id", "another", "was restarted"),
        ("started", 1.0, "was restarted"),
        ("history", "another", "began a new history of replication"),
        ("client", "another 0", "was reached over another connection"),
        ("swaps", 7, "had databases swapped by SWAPDB"),
        ("slots", ("a 0-16383",), "and its cluster shared out their slots anew"),
        ("epoch", "8", "and its cluster shared out their slots anew"),
    ],
)
async def test_each_difference_makes_it_another(
    redis_url: str, field: str, value: object, reason: str
) -> None:
    node = await look(redis_url)
    node.check_same(node)
    # What comes and goes in any run makes no difference.
    node.check_same(altered(node, keys=5, flushes=9, dbsize=5, offset=10**12))
    with pytest.raises(SourceChanged) as caught:
        node.check_same(altered(node, **{field: value}))
    assert str(caught.value) == f"Redis at {node.address} {reason} in mid-run"


async def test_a_primary_is_known_again_by_its_run_id(
    redis_url: str, private_redis: Callable[..., RedisServer]
) -> None:
    node, other = await look(redis_url), await look(private_redis().url)
    both = Identity((node, other))
    for each in (node, other):
        # Whichever connection it's asked over.
        both.check(altered(each, client="another 0"))
    with pytest.raises(SourceChanged, match="was restarted or replaced"):
        Identity((node,)).check(other)
    with pytest.raises(SourceChanged, match="had databases swapped"):
        both.check(altered(other, swaps=3))


async def test_one_without_a_run_id_is_known_again_by_its_address(
    redis_url: str, private_redis: Callable[..., RedisServer]
) -> None:
    node, other = [
        altered(await look(url), run_id=None, history=None)
        for url in (redis_url, private_redis().url)
    ]
    Identity((node, other)).check(other)
    with pytest.raises(SourceChanged, match="was restarted or replaced"):
        Identity((node,)).check(other)
    with pytest.raises(SourceChanged, match="was restarted"):
        Identity((node,)).check(altered(node, started=1.0))


async def test_a_cluster_is_settled_when_all_agree(redis_url: str) -> None:
    node = await look(redis_url)
    one, two = ("a 0-8191", "b 8192-16383"), ("a 0-16383", "b")
    first, second = altered(node, slots=one), altered(node, slots=one)
    check_settled([node], whole=True)
    check_settled([first, second], whole=True)
    for nodes, whole in (([first], True), ([first, altered(node, slots=two)], False)):
        with pytest.raises(SourceChanged, match="doesn't agree on its slots yet"):
            check_settled(nodes, whole=whole)
    # Some of it is no whole, and needn't be one.
    check_settled([first], whole=False)
    with pytest.raises(SourceChanged, match="is moving slots: a scan would miss keys"):
        check_settled([first, altered(second, moving=True)], whole=True)


async def test_the_version_is_the_oldest(redis_url: str) -> None:
    node = await look(redis_url)

    def of(version: str) -> Node:
        return altered(node, version=version, info={**node.info, "redis_version": version})

    assert Identity((of("7.10.1"), of("7.9.3"), of("8.0.0"))).version == "7.9.3"
    assert Identity((of("7.0.15"),)).nodes[0].release == (7, 0, 15)


async def test_nothing_is_read_from_another_server_than_before(
    redis_url: str, redis: Redis, private_redis: Callable[..., RedisServer]
) -> None:
    server = private_redis()
    await redis.set("balance:1", "1")
    async with Source(RedisConfig(url=SecretStr(redis_url))) as source:
        identity = await source.identity()
        assert (await source.fetch(BALANCES, [b"balance:1"], identity=identity)).values == [b"1"]
        async with Source(RedisConfig(url=SecretStr(server.url))) as other:
            with pytest.raises(SourceChanged, match="was restarted or replaced"):
                await other.fetch(BALANCES, [b"balance:1"], identity=identity)


@pytest.mark.parametrize("question", ["fetch", "exists"])
async def test_one_that_has_become_a_replica_is_asked_nothing_more(
    private_redis: Callable[..., RedisServer], question: str
) -> None:
    server = private_redis()
    async with (
        Redis.from_url(server.url) as client,
        Source(RedisConfig(url=SecretStr(server.url))) as source,
    ):
        await client.set("balance:1", "1")
        assert await source.exists(BALANCES, [b"balance:1", b"balance:2"]) == [True, False]
        # It keeps its data, its connections and its run_id.
        await client.replicaof("127.0.0.1", "1")
        with pytest.raises(RedisUnavailable, match="is a replica; only a primary is read"):
            await getattr(source, question)(BALANCES, [b"balance:1"])
