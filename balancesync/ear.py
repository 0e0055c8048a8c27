"""Hears whether Redis is emptied: an open ear proves that it wasn't.

CLIENT TRACKING on a prefix that nobody's keys have tells of FLUSHALL and FLUSHDB, whatever the
database, and of a replica that is loaded from its primary as a whole; it costs the server nothing
for each write. So does a daemon know even where INFO says little. Nobody hears of SWAPDB.

https://redis.io/docs/latest/develop/reference/client-side-caching/
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Final

import structlog

from balancesync.access import Address
from balancesync.connection import Connection
from balancesync.continuity import Primary
from balancesync.errors import BalanceSyncError, ConfigError, RightMissing
from balancesync.nodes import Node
from balancesync.source import Source
from balancesync.tracking import begin_pushes, begin_tracking

NOBODYS: Final = b"balancesync:nobody:"
_REST_S: Final = 0.01
# How soon what a server refuses is asked for again.
_PAUSE_S: Final = 60.0

log = structlog.get_logger("balancesync")


class _Listening:
    """Connections to one primary that hear whether it's emptied.

    `since` is PostgreSQL's count of transactions after they were open.
    """

    def __init__(self, node: Node, connections: list[Connection]) -> None:
        self.node = node
        self.since: int | None = None
        self.is_broken = False
        self._connections = connections

    async def prove(self) -> int | None:
        """`since`, once all has been heard that happened before now."""
        try:
            for connection in self._connections:
                await connection.call(b"PING")
        except BalanceSyncError:
            self.is_broken = True
        return None if self.is_broken else self.since

    async def close(self) -> None:
        """Listen no more."""
        self.is_broken = True
        for connection in self._connections:
            await connection.close()


class Ear:
    """Listens to each primary from `tend` on.

    `moment` gives PostgreSQL's count of transactions; `on_break` is called when something was
    heard, or may have gone unheard.
    """

    def __init__(
        self,
        source: Source,
        moment: Callable[[], Awaitable[int]],
        on_break: Callable[[], None] = lambda: None,
    ) -> None:
        self._source = source
        self._moment = moment
        self._on_break = on_break
        self._listening: dict[Address, _Listening] = {}
        self._tending = asyncio.Lock()
        self._retry_at = 0.0
        self.refusal: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether it listens to somebody."""
        return any(not each.is_broken for each in self._listening.values())

    async def tend(self) -> None:
        """Listen to every primary there is now; what doesn't work is tried again later."""
        now = asyncio.get_running_loop().time()
        if now < self._retry_at:
            return
        async with self._tending:
            try:
                await self._tend()
            except (ConfigError, RightMissing) as error:
                self._retry_at = now + _PAUSE_S
                if self.refusal is None:
                    log.warning("Redis can't be listened to for FLUSHALL", reason=str(error))
                self.refusal = str(error)
            except BalanceSyncError as error:
                log.debug("Redis can't be listened to now", reason=str(error))
            else:
                self.refusal = None

    async def _tend(self) -> None:
        addresses = await self._source.primaries()
        for address, each in list(self._listening.items()):
            if each.is_broken or address not in addresses:
                del self._listening[address]
                await each.close()
        for address in addresses:
            if address not in self._listening:
                self._listening[address] = await self._open(address)

    async def _open(self, address: Address) -> _Listening:
        async with AsyncExitStack() as stack:
            try:
                made = await self._begin(address, stack, pushed=True)
            except (ConfigError, RightMissing):
                await stack.aclose()
                # Some know no RESP3, as others know no REDIRECT.
                made = await self._begin(address, stack, pushed=False)
            # Only what is counted from now on is sure to come after it.
            made.since = await self._moment()
            stack.pop_all()
        return made

    async def _begin(self, address: Address, stack: AsyncExitStack, *, pushed: bool) -> _Listening:
        connection, node = await self._source.open_at(address)
        stack.push_async_callback(connection.close)
        connections = [connection]
        made = _Listening(node, connections)

        def on_message(keys: list[bytes] | None) -> None:
            if keys is None:
                self._hear(made, "Redis was emptied by FLUSHALL or FLUSHDB, in whichever database")

        if pushed:
            await begin_pushes(connection, NOBODYS, on_message)
        else:
            hearing, _ = await self._source.open_at(address)
            stack.push_async_callback(hearing.close)
            connections.append(hearing)
            await begin_tracking(hearing, connection, [NOBODYS], on_message, _REST_S)
        for each in connections:
            each.ended.add_done_callback(lambda _: self._hear(made, "the connection was lost"))
        return made

    def _hear(self, listening: _Listening, why: str) -> None:
        if not listening.is_broken:
            listening.is_broken = True
            log.info("Redis is listened to again", address=str(listening.node.address), reason=why)
            self._on_break()

    async def heard_since(self, address: Address, primary: Primary) -> int | None:
        """Since when it has listened to this primary without a break; None: it hasn't."""
        listening = self._listening.get(address)
        if listening is None or listening.is_broken:
            return None
        then = listening.node.primary
        # A proxy may lead each connection to another server.
        if (then.run_id, then.history) != (primary.run_id, primary.history):
            return None
        return await listening.prove()

    async def close(self) -> None:
        """Listen no more."""
        for each in self._listening.values():
            await each.close()
        self._listening.clear()
