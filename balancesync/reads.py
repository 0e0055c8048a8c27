"""Reading balancesync's own tables for HTTP: a few at a time, and nobody waits for long.

The pool is the engine's too, so clients may never have all of it.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from balancesync.database import Connection, Database, Steps
from balancesync.errors import PostgresUnavailable
from balancesync.records import Records
from balancesync.state import State

_WAIT_S: Final = 5.0

T = TypeVar("T")


class Reads:
    """Calls of what asks the records, on a pooled connection."""

    def __init__(self, database: Database, state: State) -> None:
        self._database = database
        self._state = state
        self._records = Records(database)
        self._room = asyncio.Semaphore(max(1, database.config.pool_size // 2))

    async def ask(self, question: Callable[[Records, Connection], Awaitable[T]]) -> T:
        """What `question` gives; raises what `database` lists, within five seconds at most."""
        if not self._state.postgres.connected:
            raise PostgresUnavailable(self._state.postgres.error)
        return await self._database.within(_WAIT_S, self._ask(question))

    async def _ask(self, question: Callable[[Records, Connection], Awaitable[T]]) -> T:
        with self._database.translated(last=True):
            async with self._room, self._database.acquire() as connection:
                await Steps(self._database).check(connection)
                return await question(self._records, connection)
