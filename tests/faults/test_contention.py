"""An application that updates the rows of the same table, in another order, all the time."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from engine import USERS, Engine, make_config
from redis.asyncio import Redis

from faults.figures import Figures
from faults.ground import connected

COUNT = 60
TABLE = """
    CREATE TABLE users (
        telegram_id bigint PRIMARY KEY, balance bigint, sync_at timestamptz,
        seen bigint NOT NULL DEFAULT 0
    );
    INSERT INTO users (telegram_id) SELECT g FROM generate_series(1, $count$) AS g
""".replace("$count$", str(COUNT))


class Users:
    """The application: it counts up `seen` of some rows, from the last to the first of them."""

    def __init__(self, dsn: str) -> None:
        self.seen = dict.fromkeys(range(1, COUNT + 1), 0)
        self.deadlocks = 0
        self._dsn = dsn
        self._is_at_work = False

    @asynccontextmanager
    async def at_work(self, tasks: int) -> AsyncIterator[None]:
        self._is_at_work = True
        async with asyncio.TaskGroup() as group:
            for number in range(tasks):
                group.create_task(self._work(random.Random(number)))  # noqa: S311  # any will do
            try:
                yield
            finally:
                # Cancelled in its COMMIT, nobody would know whether it has counted.
                self._is_at_work = False

    async def _work(self, chance: random.Random) -> None:
        async with connected(self._dsn) as connection:
            while self._is_at_work:
                users = sorted(chance.sample(range(1, COUNT + 1), 12), reverse=True)
                try:
                    async with connection.transaction():
                        for user in users:
                            await connection.execute(
                                "UPDATE users SET seen = seen + 1 WHERE telegram_id = $1", user
                            )
                except asyncpg.DeadlockDetectedError:
                    self.deadlocks += 1
                else:
                    for user in users:
                        self.seen[user] += 1
                await asyncio.sleep(0.001)


async def deadlocks(pg: asyncpg.Connection) -> int:
    found: int = await pg.fetchval(
        "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    )
    return found


async def test_rows_that_an_application_locks_in_the_opposite_order(
    redis: Redis,
    redis_url: str,
    postgres_dsn: str,
    pg: asyncpg.Connection,
    figures: Figures,
    *,
    torture: bool,
) -> None:
    await pg.execute(TABLE)
    name = await pg.fetchval("SELECT current_database()")
    await pg.execute(f"ALTER DATABASE {name} SET deadlock_timeout = '10ms'")
    sections: dict[str, Any] = {"postgres": {"lock_timeout": 0.2, "apply_batch": 20}}
    engine = Engine(make_config(postgres_dsn, redis_url, USERS, **sections))
    application = Users(postgres_dsn)
    async with application.at_work(3):
        for turn in range(200 if torture else 10):
            await redis.mset({str(user): turn * 1000 + user for user in application.seen})
            run = await engine.sync()
            # Slices are done again, runs aren't.
            assert (run.status, run.attempts, run.counts.updated) == ("succeeded", 1, COUNT)
            rows = await pg.fetch("SELECT telegram_id, balance FROM users")
            wrong = [row for row in rows if row["balance"] != turn * 1000 + row["telegram_id"]]
            figures.checked(len(rows), len(wrong))
            assert not wrong
    await engine.close()
    # What the application wrote beside is all there.
    rows = await pg.fetch("SELECT telegram_id, seen FROM users")
    assert {row["telegram_id"]: row["seen"] for row in rows} == application.seen
    figures.fault(await deadlocks(pg))


async def test_time_outs_that_others_are_bound_to(
    redis: Redis, redis_url: str, postgres_dsn: str, pg: asyncpg.Connection
) -> None:
    await pg.execute(TABLE)
    name = await pg.fetchval("SELECT current_database()")
    settings = ["statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"]
    if pg.get_server_version() >= (17,):
        settings.append("transaction_timeout")
    for setting in settings:
        await pg.execute(f"ALTER DATABASE {name} SET {setting} = '50ms'")
    await redis.mset({str(user): user for user in range(1, COUNT + 1)})
    engine = Engine(make_config(postgres_dsn, redis_url, USERS))
    async with pg.transaction():
        await pg.execute("SELECT FROM users WHERE telegram_id = 30 FOR UPDATE")
        task = asyncio.create_task(engine.good())
        done, _ = await asyncio.wait({task}, timeout=0.4)
        assert not done
    run = await task
    assert (run.attempts, run.counts.updated) == (1, COUNT)
    assert (await engine.verify()).counts.unchanged == COUNT
    await engine.close()
