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
        asking = asyncio.create_task(self._ask(question))
        # Not awaited when it's late: a hanging server doesn't even take back a question.
        asking.add_done_callback(_settle)
        try:
            done, _ = await asyncio.wait({asking}, timeout=_WAIT_S)
        finally:
            asking.cancel()
        if not done:
            where = f"PostgreSQL at {self._database.address}"
            raise PostgresUnavailable(f"{where} didn't answer in {_WAIT_S:g} s")
        return asking.result()

    async def _ask(self, question: Callable[[Records, Connection], Awaitable[T]]) -> T:
        async with self._room, self._database.acquire() as connection:
            await Steps(self._database).check(connection)
            return await question(self._records, connection)


def _settle(asked: asyncio.Future[T]) -> None:
    if not asked.cancelled():
        asked.exception()  # marks it as seen
