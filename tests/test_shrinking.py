"""A Redis that loses keys while a run reads it, and a big hash that went and came back."""

from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any, cast

import asyncpg
import pytest
from engine import Engine
from pydantic import SecretStr
from redis import Redis as BlockingRedis
from redis.asyncio import Redis

from balancesync.config import RedisConfig
from balancesync.errors import Shrunk
from balancesync.model import RawBatch
from balancesync.nodes import Identity
from balancesync.part import Progress
from balancesync.reading import Reading
from balancesync.source import Source

Make = Callable[..., Engine]

BIG: dict[str, Any] = {"key": "all", "member": "{user_id}", "type": "hash"}


async def fill(redis: Redis, ids: Iterable[int], value: object = "100.00") -> None:
    await redis.mset({f"balance:{each}": str(value) for each in ids})


async def fill_big(redis: Redis, ids: Iterable[int], value: object = "100.00") -> None:
    await redis.hset("all", mapping={str(each): str(value) for each in ids})


async def balances(pg: asyncpg.Connection) -> dict[int, Decimal]:
    return {row[0]: row[1] for row in await pg.fetch("SELECT user_id, balance FROM balances")}


def at_readings(engine: Engine, strike: Callable[[], object], times: int = 1) -> None:
    """Call `strike` after each of the first readings of the run, before it is judged."""
    left = times

    def on_progress(progress: Progress) -> None:
        nonlocal left
        if progress.phase == "diff" and left:
            left -= 1
            strike()

    engine.on_progress = on_progress


def purge(client: BlockingRedis) -> Callable[[], object]:
    """Removes all caches."""
    return lambda: client.delete(*client.keys("cache:*"))


@pytest.fixture
def client(redis_url: str) -> Iterable[BlockingRedis]:
    with BlockingRedis.from_url(redis_url) as blocking:
        yield blocking


async def caches(redis: Redis) -> None:
    await redis.mset({f"cache:{each}": "x" for each in range(90)})


async def test_caches_purged_in_mid_run_have_it_read_again(
    engine: Make, redis: Redis, client: BlockingRedis, pg: asyncpg.Connection
) -> None:
    await fill(redis, range(10))
    made = engine()
    await made.good()
    await caches(redis)
    # Most balances changed: no key of theirs went, so that is no reason to doubt them.
    await fill(redis, range(8), "7.00")
    at_readings(made, purge(client))
    run = await made.good()
    assert (run.attempts, run.counts.updated, run.warnings) == (2, 8, [])
    [remembered] = await pg.fetch("SELECT refusal, doubt FROM balancesync.baselines")
    assert tuple(remembered) == (None, None)


@pytest.mark.parametrize("attempts", [1, 3])
async def test_what_falls_at_each_reading_fails_and_nothing_stands(
    engine: Make, redis: Redis, client: BlockingRedis, pg: asyncpg.Connection, attempts: int
) -> None:
    await fill(redis, range(10))
    made = engine(retry={"attempts": attempts, "initial": 0.1})
    await made.good()
    await redis.mset({f"cache:{each}": "x" for each in range(990)})
    await fill(redis, range(10), "7.00")

    def purge_most() -> None:
        names = client.keys("cache:*")
        client.delete(*names[: len(names) * 2 // 3])

    at_readings(made, purge_most, times=attempts + 1)
    run = await made.sync()
    assert type(made.failure) is Shrunk
    assert (run.status, run.attempts) == ("failed", max(attempts, 2))
    assert "Redis fell from " in (run.error or "")
    assert "while it was read, and guard.max_loss = 0.5" in (run.error or "")
    assert set((await balances(pg)).values()) == {Decimal(100)}
    assert await pg.fetchval("SELECT refusal FROM balancesync.baselines") is None
    assert (await made.good()).counts.updated == 10


async def test_a_fall_of_exactly_max_loss_is_no_reason_to_read_again(
    engine: Make, redis: Redis, client: BlockingRedis
) -> None:
    await fill(redis, range(10))
    made = engine()
    await made.good()
    at_readings(made, lambda: client.delete(*[f"balance:{each}" for each in range(5)]))
    assert (await made.good()).attempts == 1


@pytest.mark.parametrize("request_", [{"mode": "dry_run"}, {"job": "verify", "mode": "verify"}])
async def test_what_writes_nothing_reads_again_too(
    engine: Make, redis: Redis, client: BlockingRedis, pg: asyncpg.Connection, request_: Any
) -> None:
    await fill(redis, range(10))
    made = engine()
    await made.good()
    await caches(redis)
    at_readings(made, purge(client))
    run = await made.good(**request_)
    assert (run.attempts, run.warnings, run.counts.unchanged) == (2, [], 10)
    # What is gone then is judged by the reading that sees it so.
    at_readings(made, client.flushall)
    run = await made.good(**request_)
    assert run.attempts == 2
    assert "a sync would be refused" in run.warnings[0]
    assert await pg.fetchval("SELECT doubt FROM balancesync.baselines") is None


class Remade(Source):
    """A Redis whose application begins again from zero as soon as somebody has seen it empty."""

    remake: Callable[[], object]

    async def fetch(
        self, reading: Reading, keys: list[bytes], *, identity: Identity | None = None
    ) -> RawBatch:
        found = await super().fetch(reading, keys, identity=identity)
        self.remake()
        return found

    async def fields_of(self, key: bytes) -> int | None:
        found = await super().fields_of(key)
        if found == 0:
            self.remake()
        return found


async def test_balances_made_again_before_the_next_reading_are_refused(
    engine: Make, redis: Redis, client: BlockingRedis, pg: asyncpg.Connection
) -> None:
    await fill(redis, range(10))
    made = engine(source=Remade)
    await made.good()
    names = [f"balance:{each}" for each in range(10)]
    cast(Remade, made.source).remake = lambda: client.mset(dict.fromkeys(names, "0"))
    at_readings(made, lambda: client.delete(*names))
    run = await made.sync()
    assert (run.status, run.attempts) == ("refused", 2)
    assert "10 of 10 keys were seen to go while they were read: 10 of 10" in (run.error or "")
    assert set((await balances(pg)).values()) == {Decimal(100)}
    await fill(redis, range(10))
    await made.good()
    assert await pg.fetchval("SELECT doubt FROM balancesync.baselines") is None


async def test_what_was_accepted_leaves_no_doubt(
    engine: Make, redis: Redis, client: BlockingRedis, pg: asyncpg.Connection
) -> None:
    await fill(redis, range(10))
    made = engine(source=Remade)
    await made.good()
    names = [f"balance:{each}" for each in range(10)]
    cast(Remade, made.source).remake = lambda: client.mset(dict.fromkeys(names, "0"))
    at_readings(made, lambda: client.delete(*names))
    await made.sync()
    run = await made.good(accept_loss=True)
    assert run.counts.updated == 10
    await fill(redis, range(10), "3.00")
    assert (await made.good()).counts.updated == 10


# --- big hashes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("begun_again", [False, True])
async def test_a_big_hash_that_goes_in_mid_run_counts_as_what_it_held(
    engine: Make, redis: Redis, client: BlockingRedis, pg: asyncpg.Connection, begun_again: bool
) -> None:
    await caches(redis)
    await fill_big(redis, range(10))
    made = engine(BIG, source=Remade)
    cast(Remade, made.source).remake = lambda: None
    await made.good()
    await fill_big(redis, range(10), "55.00")
    zeros: dict[Any, Any] = {str(each): "0" for each in range(10)}
    if begun_again:
        cast(Remade, made.source).remake = lambda: client.hset("all", mapping=zeros)
    # DBSIZE falls by one.
    at_readings(made, lambda: client.delete("all"))
    run = await made.sync()
    assert (run.status, run.attempts) == ("refused", 2)
    seen = "the big hash was seen to fall from 10 fields to 0" if begun_again else "no key at all"
    assert seen in (run.error or "")
    assert set((await balances(pg)).values()) == {Decimal(100)}


async def test_fields_that_went_while_others_came_do_not_pass(
    engine: Make, redis: Redis, client: BlockingRedis
) -> None:
    await fill_big(redis, range(10))
    made = engine(BIG)
    await made.good()
    at_readings(made, lambda: client.hdel("all", *map(str, range(6))))
    run = await made.sync()
    assert (run.status, run.attempts) == ("refused", 2)
    assert "6 of 10 known keys are gone" in (run.error or "")


async def test_a_user_without_hlen_is_told_by_type_that_the_hash_is_gone(
    redis: Redis, redis_url: str
) -> None:
    acl: Any = redis.execute_command
    await acl("ACL", "SETUSER", "plain", "on", "nopass", "~all", "+@all", "-hlen")
    try:
        url = redis_url.replace("redis://", "redis://plain:x@")
        async with Source(RedisConfig(url=SecretStr(url))) as source:
            assert await source.fields_of(b"all") == 0
            await fill_big(redis, range(3))
            assert await source.fields_of(b"all") is None
        async with Source(RedisConfig(url=SecretStr(redis_url))) as source:
            assert await source.fields_of(b"all") == 3
            await redis.delete("all")
            await redis.set("all", "1")
            assert await source.fields_of(b"all") is None
    finally:
        await redis.acl_deluser("plain")


# --- runs of one mapping --------------------------------------------------------------------------


async def test_what_a_run_of_one_mapping_has_seen_is_known(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    await fill(redis, range(10))
    made = engine()
    await made.good()
    await fill(redis, range(10, 100))
    await made.good(mapping="balances")
    await redis.delete(*[f"balance:{each}" for each in range(10, 16)])
    run = await made.good()
    assert run.counts.absent == 6
    # Of fewer it makes no fewer.
    await redis.delete(*[f"balance:{each}" for each in range(16, 36)])
    await made.good(mapping="balances")
    assert await pg.fetchval("SELECT present FROM balancesync.baselines") == 94
    await redis.delete(*[f"balance:{each}" for each in range(36, 64)])
    run = await made.sync()
    assert "48 of 94 known keys are gone" in (run.error or "")


async def test_keys_of_rows_that_were_absent_are_known_to_a_run_of_one_mapping(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute(
        "CREATE TABLE users (user_id bigint PRIMARY KEY, balance numeric(20,2),"
        " synced_at timestamptz)"
    )
    await pg.execute("INSERT INTO users SELECT n FROM generate_series(0, 99) AS n")
    await fill(redis, range(10))
    made = engine({"table": "users", "mode": "update"})
    await made.good()
    await fill(redis, range(100))
    await made.good(mapping="balances")
    [known] = await pg.fetch("SELECT present, absent FROM balancesync.baselines")
    assert tuple(known) == (100, 0)
    await redis.delete(*[f"balance:{each}" for each in range(51)])
    assert "51 of 100 known keys are gone" in ((await made.sync()).error or "")
