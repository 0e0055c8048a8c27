"""An application whose every balance tells whose it is and when it was written.

A balance is version * 1000 + key. So whatever row is looked at, it shows whether it's one of its
own key's, and whether it has gone back. Nobody else writes, hence the ledger is complete.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from decimal import Decimal

import asyncpg
from redis.asyncio import Redis

from balancesync.database import lock_key
from faults.figures import Figures

WRITER = lock_key("writer", "balancesync")
_PER_KEY = 1000
_AT_ONCE = 8
_PAUSE_S = 0.004


class Ledger:
    """What each key was ever set to, and what was last seen of it in PostgreSQL."""

    def __init__(self, keys: int, figures: Figures) -> None:
        assert keys < _PER_KEY
        self.keys = range(keys)
        self._figures = figures
        self._version = 0
        self._written: dict[int, list[int]] = {key: [] for key in self.keys}
        self._seen: dict[int, int] = {}

    def write(self, keys: Iterable[int]) -> dict[str, str]:
        """New balances for these keys, noted before anybody can read them."""
        made = {}
        for key in keys:
            self._version += 1
            self._written[key].append(self._version)
            made[f"balance:{key}"] = str(self._version * _PER_KEY + key)
        return made

    def newest(self) -> dict[int, Decimal]:
        """The balance that each key has now."""
        return {
            key: Decimal(versions[-1] * _PER_KEY + key)
            for key, versions in self._written.items()
            if versions
        }

    async def check(self, pg: asyncpg.Connection) -> None:
        """Look at every row: a balance of its own key, none of before what was seen, none gone."""
        rows = {
            row["user_id"]: row["balance"]
            for row in await pg.fetch("SELECT user_id, balance FROM balances")
        }
        wrong = [f"{key} is gone" for key in self._seen.keys() - rows.keys()]
        for key, balance in rows.items():
            version, owner = divmod(int(balance), _PER_KEY)
            if balance != int(balance) or owner != key or version not in self._written[key]:
                wrong.append(f"{key} has {balance}, which it never had in Redis")
            elif version < self._seen.get(key, 0):
                wrong.append(f"{key} went back from {self._seen[key]} to {version}")
            else:
                self._seen[key] = version
        self._figures.checked(len(rows), len(wrong))
        assert not wrong, wrong

    async def check_equal(self, pg: asyncpg.Connection) -> None:
        """Look at every row: what its key has in Redis now."""
        await self.check(pg)
        found = {
            row["user_id"]: row["balance"]
            for row in await pg.fetch("SELECT user_id, balance FROM balances")
        }
        assert found == self.newest()


class Application:
    """Writes balances without a pause, except within `async with application.paused`."""

    def __init__(self, url: str, ledger: Ledger, chance: random.Random) -> None:
        self.paused = asyncio.Lock()
        self._url = url
        self._ledger = ledger
        self._chance = chance

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """Write for the length of a block; a failure to do so fails it."""
        task = asyncio.create_task(self._serve())
        try:
            yield
            assert not task.done(), task.exception()
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def _serve(self) -> None:
        async with Redis.from_url(self._url) as client:
            while True:
                async with self.paused:
                    keys = self._chance.sample(self._ledger.keys, _AT_ONCE)
                    await client.mset(self._ledger.write(keys))
                await asyncio.sleep(_PAUSE_S)


async def until(pg: asyncpg.Connection, sql: str, *arguments: object, within_s: float = 20) -> None:
    """Wait until this is true."""
    async with asyncio.timeout(within_s):
        while not await pg.fetchval(sql, *arguments):
            await pg.fetchval("SELECT pg_sleep(0.01)")


async def until_free(pg: asyncpg.Connection, within_s: float = 10) -> None:
    """Wait until nobody has the writer's lock: PostgreSQL notices a moment later."""
    taken = "SELECT pg_try_advisory_lock($1)"
    await until(pg, taken, WRITER, within_s=within_s)
    await pg.execute("SELECT pg_advisory_unlock($1)", WRITER)


@asynccontextmanager
async def connected(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection for the length of a block."""
    connection = await asyncpg.connect(dsn)
    try:
        yield connection
    finally:
        await connection.close()


def spread(chance: random.Random, whole: int, count: int) -> Sequence[int]:
    """So many of the steps from 1 to `whole`, at random but everywhere; all, if there are fewer."""
    if count >= whole:
        return range(1, whole + 1)
    size = whole / count
    return [1 + int(size * (number + chance.random())) for number in range(count)]
