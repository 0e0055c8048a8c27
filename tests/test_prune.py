"""Freeing Redis of idle balances: only what PostgreSQL holds exactly goes, and the guard knows."""

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from engine import Engine
from proxy import Proxy
from redis.asyncio import Redis
from running import processes

from balancesync.errors import BalanceSyncError, ConfigError, Refused, RunFailed
from balancesync.model import Run

Make = Callable[..., Engine]

ON = {"enabled": True}
ACCOUNT = {
    "key": "account:{user_id}",
    "table": "accounts",
    "columns": {"user_id": "bigint", "amount": "numeric(20,2)", "note": "text"},
}
ACCOUNTS = (
    "CREATE TABLE accounts (user_id bigint PRIMARY KEY, amount numeric(20,2), note text,"
    " synced_at timestamptz)"
)


async def fill(redis: Redis, ids: Iterable[int], value: object = "100.50") -> None:
    await redis.mset({f"balance:{each}": str(value) for each in ids})


async def pruned(engine: Engine, **request: Any) -> Run:
    """Execute a prune that has to succeed."""
    run = await engine.sync(job="prune", **request)
    assert (run.status, run.error) == ("succeeded", None)
    counts = run.counts
    assert counts.scanned == counts.deleted + counts.absent + counts.kept + counts.ignored
    return run


async def refuses(engine: Engine, kind: type[BalanceSyncError], said: str) -> None:
    run = await engine.sync(job="prune")
    assert type(engine.failure) is kind
    assert said in str(run.error)


async def written(pg: asyncpg.Connection) -> set[str]:
    """The keys that are written down as pruned; the guard's number agrees."""
    rows = await pg.fetch("SELECT key[1] AS key FROM balancesync.pruned")
    count = await pg.fetchval("SELECT sum(pruned)::bigint FROM balancesync.baselines")
    assert count == len(rows)
    return {row["key"] for row in rows}


async def idle(pg: asyncpg.Connection, ids: Iterable[int]) -> None:
    """Make these rows unchanged for a day."""
    await pg.execute(
        "UPDATE balances SET synced_at = now() - interval '1 day' WHERE user_id = ANY($1::int[])",
        [*ids],
    )


async def test_idle_balances_go_and_the_guard_knows(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    made = engine(prune=ON)
    await fill(redis, range(10))
    await made.good()
    await idle(pg, range(8))
    await redis.set("balance:1", "7")
    await redis.set("balance:2", "100.5")
    await redis.delete("balance:3")
    dry = await pruned(made, mode="dry_run", idle_s=3600)
    assert (dry.counts.deleted, dry.counts.kept, dry.counts.absent) == (6, 1, 1)
    assert len(made.reports[0].rows["d"]) == 6
    assert await redis.dbsize() == 9
    run = await pruned(made, idle_s=3600)
    assert run.counts == dry.counts
    # What has changed since the sync stays, and so do those that aren't idle.
    assert {*await redis.keys()} == {b"balance:1", b"balance:8", b"balance:9"}
    assert await written(pg) == {"0", "2", "4", "5", "6", "7"}
    # Seven keys of ten are gone, one of them lost: no refusal.
    run = await made.good()
    assert (run.counts.absent, run.counts.updated) == (7, 1)
    assert await written(pg) == set()
    # It may come back by itself, or by a restore.
    await redis.set("balance:0", "100.50")
    run = await made.sync(job="restore")
    assert (run.counts.inserted, run.counts.unchanged) == (6, 4)
    assert (await made.good()).counts.absent == 0


async def test_pruned_keys_hide_no_loss(engine: Make, redis: Redis, pg: asyncpg.Connection) -> None:
    made = engine(prune=ON)
    await fill(redis, range(20))
    await made.good()
    await idle(pg, range(16))
    await pruned(made, idle_s=3600)
    # Four are left: to lose three of them is to lose more than a half.
    await redis.delete("balance:16", "balance:17", "balance:18")
    run = await made.sync()
    assert run.status == "refused"
    assert "3 of 4 known keys are gone" in str(run.error)
    # Pruned keys that have come back don't make up for those that are lost.
    await fill(redis, range(1))
    assert "3 of 5 known keys are gone" in str((await made.sync()).error)
    await fill(redis, range(16, 20))
    assert (await made.good()).counts.absent == 15


async def test_what_is_pruned_comes_back_and_is_pruned_again_counts_once(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    made = engine(prune=ON)
    await fill(redis, range(10))
    await made.good()
    await idle(pg, range(6))
    for _ in range(3):
        assert (await pruned(made, idle_s=3600)).counts.deleted == 6
        assert len(await written(pg)) == 6
        await fill(redis, range(6))
    await pruned(made, idle_s=3600)
    await redis.delete(*[f"balance:{each}" for each in range(6, 9)])
    assert "3 of 4 known keys are gone" in str((await made.sync()).error)
    # While a refusal stands, nothing more is taken out.
    await refuses(made, Refused, "3 of 4 known keys are gone")


async def test_all_may_be_pruned(engine: Make, redis: Redis, pg: asyncpg.Connection) -> None:
    made = engine(prune=ON)
    await fill(redis, range(3))
    await made.good()
    assert (await pruned(made)).counts.deleted == 3
    run = await made.good()
    assert run.counts.absent == 3
    assert run.warnings == ['mapping "balances": Redis has no key of it']


async def test_what_a_restore_brings_back_is_missed_when_it_goes(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    made = engine({}, prune=ON)
    await fill(redis, range(100))
    assert (await made.sync()).status == "succeeded"
    await idle(pg, range(100))
    await pruned(made)
    # With all of them pruned, no key is known any more.
    assert (await made.sync()).status == "succeeded"
    assert (await made.sync(job="restore")).counts.inserted == 100
    assert await written(pg) == set()
    await redis.flushall()
    assert (await made.sync()).status == "refused"


async def test_what_was_written_since_an_empty_success_is_missed_when_it_goes(
    engine: Make, redis: Redis
) -> None:
    made = engine({})
    assert (await made.sync()).status == "succeeded"
    await fill(redis, range(100))
    # No run of one mapping moves what is known.
    assert (await made.sync(mapping="balances")).counts.inserted == 100
    await redis.flushall()
    assert (await made.sync()).status == "refused"


async def test_what_is_left_is_missed_when_more_was_pruned_than_a_success_knew_of(
    engine: Make, redis: Redis, pg: asyncpg.Connection
) -> None:
    made = engine({}, prune=ON)
    await fill(redis, range(2))
    await made.good()
    await fill(redis, range(42))
    assert (await made.sync(mapping="balances")).counts.inserted == 40
    await idle(pg, range(32))
    assert (await pruned(made, idle_s=3600)).counts.deleted == 32
    # All that is left, and that an application now makes anew from nothing.
    await redis.flushall()
    await fill(redis, range(32, 36), "0")
    assert (await made.sync()).status == "refused"
    assert await pg.fetchval("SELECT count(*) FROM balances WHERE balance = 0") == 0


@pytest.mark.parametrize("member", [False, True])
async def test_what_another_mapping_reads_stays(
    engine: Make, redis: Redis, pg: asyncpg.Connection, *, member: bool
) -> None:
    """The other would take it for lost, or, as here, delete its rows."""
    key = {"key": "balances" if member else "balance:{user_id}"}
    if member:
        key |= {"member": "{user_id}", "type": "hash"}
    other = {"name": "other", "table": "copies", "on_absent": "delete"}
    made = engine(key, key | other, prune=ON)
    await fill(redis, range(10))
    await redis.hset("balances", mapping=dict.fromkeys(map(str, range(10)), "100.50"))
    await made.good()
    for mode in ("apply", "dry_run"):
        run = await made.sync(job="prune", mapping="balances", mode=mode)
        assert (run.status, type(made.failure)) == ("failed", ConfigError)
        assert 'is read by mapping "other", too' in str(run.error)
    assert (await redis.dbsize(), await redis.hlen("balances")) == (11, 10)
    assert (await made.good()).counts.absent == 0


@pytest.mark.parametrize("kind", ["string", "hash", "json", "member"])
async def test_only_what_postgres_holds_whole_goes(
    engine: Make, redis: Redis, pg: asyncpg.Connection, kind: str
) -> None:
    """Nobody else has the fields that no column holds."""
    await pg.execute(ACCOUNTS)
    mappings: dict[str, dict[str, Any]] = {
        "string": {"tolerance": "0.001"},
        "hash": {**ACCOUNT, "type": "hash"},
        "json": {**ACCOUNT, "type": "json"},
        "member": {"key": "balances", "type": "hash", "member": "{user_id}"},
    }
    made = engine(mappings[kind], prune=ON)
    match kind:
        case "string":
            await redis.mset({"balance:1": "1.50", "balance:2": "1.50000000000000006"})
        case "hash":
            await redis.hset("account:1", mapping={"amount": "1.5", "note": "n"})
            await redis.hset("account:2", mapping={"amount": "1.5", "other": "o"})
            await redis.hset("account:3", mapping={"amount": "1.5"})
        case "json":
            await redis.set("account:1", '{"amount": 1.50, "note": "n"}')
            await redis.set("account:2", '{"amount": 1.5, "other": 7}')
            await redis.set("account:3", '{"note": null, "amount": 1.5}')
        case "member":
            await redis.hset("balances", mapping={"1": "1.5", "2": "x"})
    await made.good()
    run = await pruned(made)
    if kind == "member":
        assert await redis.hgetall("balances") == {b"2": b"x"}
        return
    keys = sorted(await redis.keys())
    assert keys == [b"balance:2" if kind == "string" else b"account:2"]
    assert run.counts.deleted == (1 if kind == "string" else 2)


async def test_a_balance_that_changes_between_reading_and_deleting_stays(
    engine: Make, redis: Redis, redis_url: str, pg: asyncpg.Connection
) -> None:
    made = engine()
    await fill(redis, range(3))
    await made.good()
    async with Proxy(int(redis_url.rpartition(":")[2].split("/")[0])) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}/0"
        through = engine(prune=ON, redis={"url": url})
        held = proxy.hold(rb"EVAL")
        pruning = asyncio.create_task(through.sync(job="prune"))
        async with asyncio.timeout(20):
            await held.wait()
        # It is written down already, and Redis hasn't got the command yet.
        assert len(await written(pg)) == 1
        number = (await written(pg)).pop()
        await redis.set(f"balance:{number}", "777")
        proxy.resume()
        run = await pruning
    assert (run.counts.deleted, run.counts.kept) == (2, 1)
    assert await redis.get(f"balance:{number}") == b"777"
    assert len(await written(pg)) == 2
    assert number not in await written(pg)
    assert (await made.good()).counts.updated == 1


async def test_against_an_application_that_never_rests(
    engine: Make, redis: Redis, redis_url: str, pg: asyncpg.Connection
) -> None:
    """No increment is ever lost: what it found gone it reads back, as prune demands."""
    made = engine(prune=ON)
    await fill(redis, range(200), "0")
    await made.good()
    stop, added = asyncio.Event(), 0
    read_back = (
        "if redis.call('EXISTS', KEYS[1]) == 0 then redis.call('SET', KEYS[1], ARGV[1]) end"
        " return redis.call('INCR', KEYS[1])"
    )

    async def application() -> None:
        nonlocal added
        async with Redis.from_url(redis_url) as client:
            while not stop.is_set():
                number = added * 7 % 100
                stored = await pg.fetchval(
                    "SELECT trim_scale(balance)::text FROM balances WHERE user_id = $1", number
                )
                await client.eval(read_back, 1, f"balance:{number}", stored)
                added += 1

    writer = asyncio.create_task(application())
    deleted = 0
    for _ in range(3):
        deleted += (await pruned(made)).counts.deleted
    stop.set()
    await writer
    assert deleted > 0
    assert added > 0
    await made.good()
    assert await pg.fetchval("SELECT sum(balance) FROM balances") == added


async def test_a_prune_that_was_killed_is_no_loss(
    engine: Make, redis: Redis, pg: asyncpg.Connection, tmp_path: Path
) -> None:
    made = engine()
    await fill(redis, range(2_000))
    await made.good()
    dsn, url = made.config.postgres.dsn, made.config.redis.url
    async with processes(tmp_path, dsn.get_secret_value(), url.get_secret_value()) as programs:
        file = programs.file(more="[prune]\nenabled = true\n")
        text = file.read_text()
        file.write_text(text.replace("[redis]\n", "[redis]\nmax_keys_per_second = 1000\n"))
        process = await programs.start("prune", "--idle-for", "0", file=file)
        async with asyncio.timeout(30):
            while await redis.dbsize() > 1_200:  # noqa: ASYNC110  # Redis tells of no event
                await asyncio.sleep(0.01)
        process.kill()
        await process.communicate()
    there = {int(key[8:]) for key in await redis.keys()}
    keys = {int(key) for key in await written(pg)}
    # Whatever is gone is written down; what is written down and there is one piece at most.
    assert {*range(2_000)} - there <= keys
    assert len(keys & there) <= 20
    async with asyncio.timeout(20):
        while (await made.sync()).status != "succeeded":
            pass
    rows = await pg.fetch("SELECT status FROM balancesync.runs WHERE job = 'prune'")
    assert [row["status"] for row in rows] == ["interrupted"]


async def test_what_prune_needs(engine: Make, redis: Redis, pg: asyncpg.Connection) -> None:
    await fill(redis, range(2))
    made = engine(prune=ON)
    await made.good(mapping="balances")
    await refuses(made, RunFailed, "no sync of all mappings has succeeded yet")
    await refuses(engine(), ConfigError, "prune.enabled is false")
    await refuses(engine({"on_absent": "delete"}, prune=ON), ConfigError, "would delete the rows")
    await refuses(engine({"synced_at": ""}, prune=ON), ConfigError, "has no synced_at")
    await made.good()
    # A row that balancesync has never written isn't idle.
    await pg.execute("UPDATE balances SET synced_at = NULL WHERE user_id = 0")
    assert (await pruned(made)).counts.scanned == 1
    await redis.set("balance:1", "5")
    assert (await made.sync(job="restore")).status == "failed"
    way = "its last restore hasn't succeeded; run `balancesync restore` again"
    await refuses(made, RunFailed, way)
