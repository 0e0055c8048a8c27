"""An application whose every balance tells whose it is and when it was written.

A balance is version * 1000 + key. So whatever row is looked at, it shows whether it's one of its
own key's, and whether it has gone back. Nobody else writes, hence the ledger is complete.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from decimal import Decimal

import asyncpg
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from faults.figures import Figures

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

    def forget_but(self, keys: Iterable[int]) -> None:
        """Rows of other keys than these were rightly deleted."""
        self._seen = {key: self._seen[key] for key in keys if key in self._seen}

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

    async def check_equal(self, pg: asyncpg.Connection, redis: Redis) -> None:
        """Look at every row: what its key has in Redis now."""
        await self.check(pg)
        held = await redis.mget([f"balance:{key}" for key in self.keys])
        found = {
            row["user_id"]: row["balance"]
            for row in await pg.fetch("SELECT user_id, balance FROM balances")
        }
        assert found == {
            key: Decimal(value.decode() if isinstance(value, bytes) else value)
            for key, value in zip(self.keys, held, strict=True)
            if value is not None
        }


class Application:
    """Writes balances without a pause, except within `async with application.paused`.

    While Redis is away it tries again, as applications do.
    """

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
            # A cancellation that meets a lost connection may end as that in redis-py.
            while not task.done():
                task.cancel()
                await asyncio.wait([task], timeout=1)

    async def _serve(self) -> None:
        async with Redis.from_url(self._url) as client:
            while True:
                async with self.paused:
                    keys = self._chance.sample(self._ledger.keys, _AT_ONCE)
                    with suppress(RedisConnectionError):
                        await client.mset(self._ledger.write(keys))
                await asyncio.sleep(_PAUSE_S)
