"""What tracking owes to those who rely on it, on a real server and one fault at a time."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from pydantic import SecretStr
from redis.asyncio import Redis
from service import Service

from balancesync.config import RedisConfig
from balancesync.connection import Connection
from balancesync.embedded import RedisServer
from balancesync.errors import Gap, SourceChanged
from balancesync.nodes import Identity
from balancesync.source import Source
from balancesync.tracking import Tracking


@pytest.fixture
async def tracking(redis_url: str) -> AsyncIterator[Tracking]:
    """Of the keys of balances, up to 100,000 at once."""
    async with Source(RedisConfig(url=SecretStr(redis_url))) as source:
        made = await Tracking.open(
            source, [b"balance:"], limit=1, stirred=asyncio.Event(), hurry=asyncio.Event()
        )
        yield made
        await made.close()


async def test_what_was_changed_before_is_there_once_it_has_settled(
    tracking: Tracking, redis: Redis
) -> None:
    for number in range(200):
        await redis.set(f"balance:{number}", "1")
        await redis.set(f"other:{number}", "1")
        await tracking.settle()
        keys, arrivals = tracking.take()
        assert keys == {b"balance:%d" % number}
        assert len(arrivals) == 1
    assert tracking.take() == (set(), [])


async def test_what_was_heard_before_a_gap_is_forgotten_and_so_is_what_comes_after(
    tracking: Tracking, redis: Redis
) -> None:
    await redis.set("balance:1", "1")
    await tracking.settle()
    await redis.flushall()
    await redis.set("balance:2", "1")
    with pytest.raises(Gap, match="emptied by FLUSHALL or FLUSHDB"):
        await tracking.settle()
    assert tracking.take()[0] == set()
    # The first reason is the one that counts.
    tracking.miss("was closed")
    with pytest.raises(Gap, match="emptied by FLUSHALL or FLUSHDB"):
        await tracking.settle()


async def test_nothing_is_proven_after_a_gap_and_a_proof_never_goes_back(
    tracking: Tracking,
) -> None:
    assert tracking.proven_at is None
    for at, proven_at in ((5.0, 5.0), (4.0, 5.0), (6.0, 6.0)):
        tracking.prove(at)
        assert tracking.proven_at == proven_at
    tracking.miss("was closed")
    tracking.prove(7.0)
    assert tracking.proven_at == 6.0


async def test_a_proof_is_of_the_time_before_the_server_was_asked(
    tracking: Tracking, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, asked, check = asyncio.get_running_loop(), [], tracking._check
    looked = asyncio.Event()

    async def ask() -> None:
        asked.append(loop.time())
        await check()
        looked.set()

    monkeypatch.setattr(tracking, "_check", ask)
    watching = asyncio.create_task(tracking.watch())
    async with asyncio.timeout(20):
        await looked.wait()
        assert tracking.proven_at is not None
        assert tracking.proven_at <= asked[0]
        # It isn't the last to notice, though nothing of it is heard.
        await redis.swapdb(0, 1)
        await watching
    assert tracking.gap is not None
    assert "swapped by SWAPDB" in tracking.gap


@pytest.mark.parametrize("which", [0, 1])
async def test_either_connection_that_is_lost_is_a_gap(
    tracking: Tracking, redis: Redis, which: int
) -> None:
    lost = (tracking._hearing, tracking._asking)[which]
    for client in await redis.client_list():
        if (int(client["sub"]) > 0) == (lost is tracking._hearing) and client["lib-name"] == "":
            await redis.client_kill_filter(_id=client["id"])
    await asyncio.wait_for(lost.ended, 20)
    await asyncio.wait_for(tracking._hurry.wait(), 20)
    assert tracking.gap is not None
    assert "was lost" in tracking.gap


async def test_both_connections_lead_to_the_same_server(
    private_redis: Callable[..., RedisServer],
) -> None:
    first, second = private_redis(), private_redis()
    async with Service(first.port) as front:

        class Moving(Source):
            """Behind a proxy that leads the next connection to another server."""

            async def open_own(self) -> tuple[Connection, Identity]:
                made = await super().open_own()
                front.server_port = second.port
                return made

        async with Moving(RedisConfig(url=SecretStr(front.url))) as source:
            events = {"stirred": asyncio.Event(), "hurry": asyncio.Event()}
            with pytest.raises(SourceChanged, match="was restarted or replaced"):
                await Tracking.open(source, [b"balance:"], limit=1, **events)
