"""Money that moves between the demo's accounts in Redis, so that their total never changes."""

import asyncio
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Final

from balancesync.access import parse
from balancesync.config import RedisConfig
from balancesync.connection import Connection, connected

Balances = dict[str, int]

_TIMEOUT_S: Final = 10.0
_AT_ONCE: Final = 10
_PAUSE_S: Final = 0.1


class Traffic:
    """Transfers between accounts, some hundred a second, while `serve` runs.

    The amounts are beyond Redis' own arithmetic, INCRBY's 64 bits. So the sums are made here, with
    Python's integers, which is right because nobody else writes; and both accounts of a transfer
    are set by one MSET, so nobody ever sees money that is nowhere or in two places.

    `moved` counts the transfers. Within `async with traffic.paused` there are none.
    """

    def __init__(self, balances: Balances, config: RedisConfig) -> None:
        self.moved = 0
        self.paused = asyncio.Lock()
        self._balances = balances
        self._addresses = list(balances)
        self._config = config

    async def serve(self) -> None:
        """Move money until cancelled; raises as `connect` and Connection's `call` do."""
        async with _in_redis(self._config) as connection:
            while True:
                async with self.paused:
                    for _ in range(_AT_ONCE):
                        await _set(connection, self._transfer())
                        self.moved += 1
                await asyncio.sleep(_PAUSE_S)

    def _transfer(self) -> Balances:
        """Change two balances so that their total stays; give both."""
        payer, payee = random.sample(self._addresses, 2)
        amount = random.randint(0, self._balances[payer])  # noqa: S311  # nobody to be fooled
        self._balances[payer] -= amount
        self._balances[payee] += amount
        return {address: self._balances[address] for address in (payer, payee)}


async def put(values: Mapping[str, int | str], config: RedisConfig) -> None:
    """Set balances by address, all at once; raises as `connect` and Connection's `call` do."""
    async with _in_redis(config) as connection:
        await _set(connection, values)


async def lose_all(config: RedisConfig) -> None:
    """Empty Redis; raises as `connect` and Connection's `call` do."""
    async with _in_redis(config) as connection:
        await connection.call(b"FLUSHALL")


@asynccontextmanager
async def _in_redis(config: RedisConfig) -> AsyncIterator[Connection]:
    address, access = parse(config.url.get_secret_value(), timeout=_TIMEOUT_S, clustered=False)
    async with connected(address, access) as connection:
        yield connection


async def _set(connection: Connection, values: Mapping[str, int | str]) -> None:
    words = (word for key, value in values.items() for word in (f"balance:{key}", str(value)))
    await connection.call(b"MSET", *(word.encode() for word in words))
