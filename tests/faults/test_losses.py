"""Redis loses its balances, in every way that was thought of: nothing good is overwritten."""

import asyncio
from collections.abc import AsyncIterator, Callable
from decimal import Decimal

import asyncpg
import pytest
from engine import Engine, make_config
from redis import Redis as BlockingRedis
from redis.asyncio import Redis

from balancesync.embedded import RedisServer
from balancesync.overview import health
from balancesync.part import Progress
from faults.figures import Figures
from faults.ground import KEYS, SMALL, connected

Rows = dict[int, Decimal]
NAMES = [f"balance:{key}" for key in range(KEYS)]


class Losing:
    """Redis with balances that PostgreSQL has, too, and an application that changes them."""

    def __init__(self, dsn: str, url: str, figures: Figures, **sections: object) -> None:
        self.dsn = dsn
        self.url = url
        self.figures = figures
        self.engine = Engine(make_config(dsn, url, **SMALL, **sections))
        self.client = BlockingRedis.from_url(url)
        self.before: Rows = {}

    async def begin(self) -> None:
        """A first success; what PostgreSQL has then is good."""
        self.client.mset({name: f"{1000 + number}.25" for number, name in enumerate(NAMES)})
        await self.engine.good()
        self.before = await self.rows()
        assert len(self.before) == KEYS

    async def close(self) -> None:
        self.client.close()
        await self.engine.close()

    async def rows(self) -> Rows:
        async with connected(self.dsn) as pg:
            return {
                row["user_id"]: row["balance"]
                for row in await pg.fetch("SELECT user_id, balance FROM balances")
            }

    async def untouched(self) -> None:
        """Every row has the balance that it had before the loss."""
        now = await self.rows()
        lost = sum(now.get(key) != balance for key, balance in self.before.items())
        self.figures.checked(len(self.before), lost)
        assert now == self.before

    async def refused(self) -> str:
        """A sync is refused, and health says so; why."""
        run = await self.engine.sync()
        assert run.status == "refused", (run.status, run.error, run.counts)
        await self.untouched()
        said = await health(self.engine.config, self.engine.database, self.engine.source)
        assert said["status"] == "degraded"
        assert said["checks"]["refusal"]["status"] == "degraded"
        assert run.error is not None
        return run.error

    def lose(self, names: list[str] | None = None) -> None:
        """Delete these keys, or all by FLUSHALL."""
        self.figures.fault()
        if names is None:
            self.client.flushall()
        elif names:
            self.client.delete(*names)

    def start_from_zero(self, names: list[str]) -> None:
        """What an application does that finds no balance: INCRBY makes one."""
        pipeline = self.client.pipeline()
        for name in names:
            pipeline.incrby(name, 7)
        pipeline.execute()

    def at_batch(self, number: int, strike: Callable[[], None]) -> None:
        """Do it when so many batches of the scan have been read."""
        seen = 0

        def on_progress(progress: Progress) -> None:
            nonlocal seen
            seen += progress.phase == "scan"
            if progress.phase == "scan" and seen == number:
                strike()

        self.engine.on_progress = on_progress

    def at(self, phase: str, strike: Callable[[], None]) -> None:
        """Do it when the run comes to this phase; once."""
        struck = False

        def on_progress(progress: Progress) -> None:
            nonlocal struck
            if progress.phase == phase and not struck:
                struck = True
                strike()

        self.engine.on_progress = on_progress


@pytest.fixture
async def losing(postgres_dsn: str, redis_url: str, figures: Figures) -> AsyncIterator[Losing]:
    made = Losing(postgres_dsn, redis_url, figures)
    await made.begin()
    yield made
    await made.close()


# --- FLUSHALL, and an application that starts again from zero -------------------------------------


@pytest.mark.parametrize("restarted", [0, 100, KEYS], ids=["none", "a third", "all"])
async def test_flushed_before_the_scan(losing: Losing, restarted: int) -> None:
    losing.lose()
    assert "no key at all" in await losing.refused()
    for _ in range(2):
        losing.start_from_zero(NAMES[:restarted])
        await losing.refused()
    # What heals it is that the balances are back.
    losing.client.mset({f"balance:{key}": str(each) for key, each in losing.before.items()})
    run = await losing.engine.good()
    assert (run.counts.unchanged, run.counts.written) == (KEYS, 0)


@pytest.mark.parametrize("batch", [1, 4, 8])
@pytest.mark.parametrize("restarted", [0, 100], ids=["none", "a third"])
async def test_flushed_in_the_middle_of_the_scan(
    losing: Losing, batch: int, restarted: int
) -> None:
    def strike() -> None:
        losing.lose()
        losing.start_from_zero(NAMES[:restarted])

    losing.at_batch(batch, strike)
    await losing.refused()
    assert losing.client.dbsize() == restarted
    losing.engine.on_progress = lambda progress: None
    losing.start_from_zero(NAMES)
    await losing.refused()


@pytest.mark.parametrize("restarted", [0, 100], ids=["none", "a third"])
async def test_flushed_after_the_scan(losing: Losing, restarted: int) -> None:
    def strike() -> None:
        losing.lose()
        losing.start_from_zero(NAMES[:restarted])

    losing.at("diff", strike)
    line = await losing.refused()
    # It was read again, and what was seen to go is doubted when it is back.
    assert ("keys were seen to go while they were read" in line) == bool(restarted)


async def test_flushed_while_it_is_applied(losing: Losing) -> None:
    losing.client.mset({name: f"{2000 + number}.5" for number, name in enumerate(NAMES)})
    losing.at("apply", losing.lose)
    # All that it writes was read before.
    run = await losing.engine.good()
    assert run.counts.updated == KEYS
    losing.before = {key: Decimal(f"{2000 + key}.5") for key in range(KEYS)}
    losing.engine.on_progress = lambda progress: None
    losing.start_from_zero(NAMES[:140])
    await losing.refused()


async def test_a_loss_that_is_accepted_is_the_truth_from_then_on(losing: Losing) -> None:
    losing.lose()
    # All of them were made anew before anybody looked: that it was emptied is told by Redis.
    losing.start_from_zero(NAMES)
    assert "emptied by FLUSHALL or FLUSHDB" in await losing.refused()
    await losing.engine.good(accept_loss=True)
    losing.before = {}
    await losing.engine.good()


# --- keys that go ---------------------------------------------------------------------------------


async def test_half_the_keys_gone_pass_and_one_more_does_not(losing: Losing) -> None:
    losing.lose(NAMES[: KEYS // 2])
    run = await losing.engine.good()
    assert (run.counts.absent, run.counts.written) == (KEYS // 2, 0)
    # Kept: nothing was told to delete.
    await losing.untouched()
    losing.lose(NAMES[KEYS // 2 : KEYS // 2 + KEYS // 4 + 1])
    await losing.refused()


@pytest.mark.parametrize("on_absent", ["keep", "delete"])
async def test_a_storm_of_dels_during_the_scan(
    postgres_dsn: str, redis_url: str, figures: Figures, on_absent: str
) -> None:
    losing = Losing(postgres_dsn, redis_url, figures)
    config = make_config(postgres_dsn, redis_url, {"on_absent": on_absent}, **SMALL)
    losing.engine = Engine(config)
    await losing.begin()
    left = list(NAMES)

    def on_progress(progress: Progress) -> None:
        # Each batch, ten are deleted, half of which come back changed.
        if progress.phase == "scan" and len(left) > KEYS // 2:
            gone = [left.pop() for _ in range(10)]
            losing.lose(gone)
            losing.client.mset(dict.fromkeys(gone[:5], "5000.75"))

    losing.engine.on_progress = on_progress
    run = await losing.engine.sync()
    assert run.status == "succeeded", run.error
    losing.engine.on_progress = lambda progress: None
    await losing.engine.good()
    there = {
        int(name.rpartition(":")[2]): Decimal(value.decode() if isinstance(value, bytes) else value)
        for name, value in zip(NAMES, losing.client.mget(NAMES), strict=True)
        if value is not None
    }
    rows = await losing.rows()
    expected = there if on_absent == "delete" else losing.before | there
    figures.checked(len(expected), sum(rows.get(key) != each for key, each in expected.items()))
    assert rows == expected
    await losing.close()


async def test_a_storm_of_dels_beyond_the_limit(losing: Losing) -> None:
    left = list(NAMES)

    def on_progress(progress: Progress) -> None:
        if progress.phase == "scan" and len(left) > 100:
            losing.lose([left.pop() for _ in range(20)])

    losing.engine.on_progress = on_progress
    await losing.refused()


# --- values that change as a whole ----------------------------------------------------------------


@pytest.mark.parametrize("form", ["json", "hash", "comma", "empty"])
async def test_a_change_of_the_whole_format(
    postgres_dsn: str, redis_url: str, figures: Figures, form: str
) -> None:
    losing = Losing(postgres_dsn, redis_url, figures, guard={"max_rejects": 0.1})
    await losing.begin()
    losing.figures.fault()
    for name in NAMES:
        match form:
            case "hash":
                losing.client.delete(name)
                losing.client.hset(name, "balance", "1")
            case "json":
                losing.client.set(name, '{"balance": 1}')
            case "comma":
                losing.client.set(name, "1,50")
            case _:
                losing.client.set(name, "")
    run = await losing.engine.sync()
    # It's no loss, since all keys are there, and it's no success.
    assert (run.status, run.counts.rejected, run.counts.written) == ("failed", KEYS, 0)
    assert run.error is not None
    assert "300 of 300 keys are rejects" in run.error
    await losing.untouched()
    assert len(await losing.engine.rejects()) == KEYS
    said = await health(losing.engine.config, losing.engine.database, losing.engine.source)
    assert said["checks"]["rejects"]["status"] == "degraded"
    losing.client.mset(dict.fromkeys(NAMES, "3.5"))
    run = await losing.engine.good()
    assert (run.counts.updated, await losing.engine.rejects()) == (KEYS, {})
    await losing.close()


async def test_an_old_file_loaded(
    private_redis: Callable[..., RedisServer], postgres_dsn: str, figures: Figures
) -> None:
    server = private_redis({"dbfilename": "dump.rdb"})
    losing = Losing(postgres_dsn, server.url, figures)
    await losing.begin()
    losing.client.save()
    async with Redis.from_url(server.url) as client:
        await client.mset(dict.fromkeys(NAMES, "9.75"))
    assert (await losing.engine.good()).counts.updated == KEYS
    await asyncio.to_thread(server.kill)
    server.settings["save"] = "3600 1"
    await asyncio.to_thread(server.start)
    # Redis is the truth, and has gone back: that can't be known, only said.
    run = await losing.engine.good()
    assert run.counts.updated == KEYS
    assert [warning for warning in run.warnings if "may have gone back in time" in warning]
    await losing.untouched()
    assert await losing.engine.recorded(run) == run
    await losing.close()


async def test_no_loss_is_healed_by_anything_but_keys_or_consent(
    losing: Losing, pg: asyncpg.Connection
) -> None:
    losing.lose()
    await losing.refused()
    losing.start_from_zero(NAMES)
    for request in ({"force": False}, {"force": True}, {"mapping": "balances"}):
        run = await losing.engine.sync(**request)
        assert run.status == "refused"
    await losing.untouched()
    for request in ({"mode": "dry_run"}, {"job": "verify", "mode": "verify"}):
        run = await losing.engine.sync(**request)
        assert run.status == "succeeded"
        assert any("would be refused" in warning for warning in run.warnings)
    assert await pg.fetchval("SELECT refusal IS NOT NULL FROM balancesync.baselines")
    await losing.refused()
    run = await losing.engine.good(accept_loss=True)
    assert run.counts.updated == KEYS
    assert set((await losing.rows()).values()) == {Decimal(7)}
