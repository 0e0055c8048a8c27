"""Live mode and full runs at once, in any order, under an application that never pauses.

Whatever comes between: no row goes back to an older balance, none that was deleted comes back, and
once the application pauses, live mode alone makes both sides equal.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import asyncpg
import pytest
from engine import Engine, make_config
from redis.asyncio import Redis
from running import Inside, daemon_config

from balancesync import leadership, live, probing, tracking
from balancesync.model import Request
from balancesync.sync import Sync
from faults.figures import Figures

KEYS = 40
STEPS, TORTURE_STEPS = 500, 10_000
STEPS_TO_A_PAUSE = 250
LONGEST_STEP_S = 0.004

# An older balance over a newer one, also if the row was deleted in between.
AUDIT = """
    CREATE TABLE marks (key bigint PRIMARY KEY, balance numeric);
    CREATE TABLE backwards (key bigint, mark numeric, new numeric);
    CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        INSERT INTO backwards SELECT key, balance, NEW.balance FROM marks
        WHERE key = NEW.user_id AND balance >= NEW.balance;
        INSERT INTO marks VALUES (NEW.user_id, NEW.balance)
        ON CONFLICT (key) DO UPDATE SET balance = EXCLUDED.balance;
        RETURN NULL;
    END $$;
    CREATE TRIGGER audit AFTER INSERT OR UPDATE ON balances FOR EACH ROW EXECUTE FUNCTION audit()
"""
# Any session that flushes or runs, but not the leader's, whose own name is longer.
VICTIMS = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = 'balancesync'
    ORDER BY random() LIMIT 1
"""


class Spender:
    """Sets and deletes balances as fast as Redis answers; each set is larger than all before."""

    def __init__(self, redis: Redis, chance: random.Random) -> None:
        self.writes = 0
        self.turns = asyncio.Lock()
        self._redis = redis
        self._chance = chance
        self._ends = False

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._serve())
        try:
            yield
        finally:
            self._ends = True
            await task

    async def _serve(self) -> None:
        while not self._ends:
            async with self.turns:
                await self.write()
            await asyncio.sleep(0)

    async def write(self) -> None:
        key = f"balance:{self._chance.randrange(KEYS)}"
        self.writes += 1
        match self._chance.randrange(10):
            case 0:
                await self._redis.delete(key)
            case 1:
                await self._redis.set(key, self.writes, px=self._chance.randrange(1, 20))
            case _:
                await self._redis.set(key, self.writes)


class Story:
    """One daemon, another process' engine, and what happens to them."""

    def __init__(
        self,
        daemon: Inside,
        other: Engine,
        *,
        redis: Redis,
        pg: asyncpg.Connection,
        figures: Figures,
        chance: random.Random,
    ) -> None:
        self.daemon = daemon
        self.other = other
        self.redis = redis
        self.pg = pg
        self.figures = figures
        self.chance = chance
        self.under_way: set[asyncio.Task[None]] = set()

    async def step(self) -> None:
        await asyncio.sleep(self.chance.uniform(0, LONGEST_STEP_S))
        events: dict[Callable[[], Awaitable[None]], int] = {
            self.run: 30,
            self.run_elsewhere: 15,
            self.compare: 10,
            self.lose_a_connection: 4,
            self.lose_a_session: 2,
            self.clear: 2,
            self.nothing: 937,
        }
        [event] = self.chance.choices([*events], [*events.values()])
        await event()

    async def nothing(self) -> None:
        """Time goes by: the application has written on."""

    async def run(self) -> None:
        self.daemon.runner.submit(Request("sync", "cli"))

    async def compare(self) -> None:
        self.daemon.runner.submit(Request("verify", "cli", mode="verify"))

    async def run_elsewhere(self) -> None:
        async def sync() -> None:
            work = Sync(self.other.config, self.other.database, self.other.source)
            run = await work.run(Request("sync", "cli"), wait_s=30)
            assert run.status == "succeeded", run.error
            self.figures.ran()

        if not self.under_way:
            task = asyncio.create_task(sync())
            self.under_way.add(task)
            task.add_done_callback(self.under_way.discard)

    async def lose_a_connection(self) -> None:
        self.figures.fault()
        clients = [each for each in await self.redis.client_list() if each["name"] == "balancesync"]
        if clients:
            await self.redis.client_kill_filter(_id=self.chance.choice(clients)["id"])

    async def lose_a_session(self) -> None:
        if not self.under_way:
            self.figures.fault()
            await self.pg.execute(VICTIMS)

    async def clear(self) -> None:
        await self.daemon.api.ask("/clear-cache", "DELETE")

    async def check(self) -> None:
        """The application pauses: live mode makes it equal, and nothing has ever gone back."""
        await asyncio.gather(*self.under_way)
        async with asyncio.timeout(30):
            while (rows := await self.rows()) != (held := await self.held()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        backwards = await self.pg.fetch("SELECT * FROM backwards")
        self.figures.checked(len(rows), len(backwards))
        assert rows == held
        assert not backwards

    async def rows(self) -> dict[int, int]:
        return {
            row["user_id"]: int(row["balance"])
            for row in await self.pg.fetch("SELECT user_id, balance FROM balances")
        }

    async def held(self) -> dict[int, int]:
        values = await self.redis.mget([f"balance:{key}" for key in range(KEYS)])
        return {key: int(value) for key, value in enumerate(values) if value is not None}


async def test_flushes_and_runs_never_undo_each_other(
    postgres_dsn: str,
    redis_url: str,
    redis: Redis,
    pg: asyncpg.Connection,
    *,
    figures: Figures,
    torture: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module, name in (
        (probing, "_CALM_S"),
        (probing, "_TROUBLED_S"),
        (leadership, "_POLL_S"),
        (tracking, "_PROVE_S"),
        (live, "_PAUSE_S"),
        (live, "_LONGEST_PAUSE_S"),
    ):
        monkeypatch.setattr(module, name, 0.02)
    mapping = {"on_absent": "delete"}
    sections = {"guard": {"max_loss": 1.0}, "redis": {"scan_count": 10}}
    chance = random.Random(8128)  # noqa: S311
    await redis.mset({f"balance:{key}": 0 for key in range(KEYS)})
    config = daemon_config(
        postgres_dsn,
        redis_url,
        mapping,
        live={"enabled": True, "flush_interval": 0.01, "rescan_interval": 0},
        log={"level": "critical"},
        **sections,
    )
    other = Engine(make_config(postgres_dsn, redis_url, mapping, **sections))
    spender = Spender(redis, chance)
    async with Inside(config) as daemon:
        await daemon.log.next("live", state="up")
        await pg.execute(AUDIT)
        story = Story(daemon, other, redis=redis, pg=pg, figures=figures, chance=chance)
        async with spender.at_work():
            for step in range(1, 1 + (TORTURE_STEPS if torture else STEPS)):
                await story.step()
                if step % STEPS_TO_A_PAUSE == 0:
                    async with spender.turns:
                        await story.check()
        runs = daemon.log.all("run_finished")
        for _ in runs:
            figures.ran()
    await other.close()
    assert {run["status"] for run in runs} <= {"succeeded", "postponed"}
    assert spender.writes > STEPS
