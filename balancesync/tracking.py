"""Redis tells us which keys change: CLIENT TRACKING in broadcast mode, over two connections.

One asks for tracking and names the other as the place to tell it. That one is subscribed to
`__redis__:invalidate` and so counts as a subscriber, whom Redis cuts off when he reads too slowly
(client-output-buffer-limit pubsub); told over RESP3, a stopped daemon would fill Redis instead.

What is told is a hint to read the key: keys of other databases are told, too, and a key that
changes a thousand times between two looks is told once. FLUSHALL and FLUSHDB tell nothing but that
they happened, SWAPDB not even that. What is never told twice is lost with the connection: whatever
happens to either, and whatever else could have hidden a change, is a gap.

The rights it takes beside those of `source`: CLIENT ID, CLIENT TRACKING, SUBSCRIBE and the channel.
https://redis.io/docs/latest/develop/reference/client-side-caching/ ("Two connections mode")
"""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from typing import Any, Final

import hiredis

from balancesync.connection import Connection, pack
from balancesync.errors import BalanceSyncError, ConfigError, Gap, RightMissing
from balancesync.nodes import Identity
from balancesync.source import Source

_CHANNEL: Final = b"__redis__:invalidate"
_PROVE_S: Final = 1.0
# A SWAPDB, or a primary that the Sentinels have replaced, is noticed by asking alone.
_DESCRIBE_EVERY: Final = 2
# What is told is read this often: changes that come within it are one message to take in.
_REST_S: Final = 0.01
# Lags are measured from marks: one arrival in so many seconds tells as much as all of them.
_MARK_S: Final = 0.01
# Keys of others may come in between, and only who takes them can tell.
_LEAST_LIMIT: Final = 100_000


def disjoint(prefixes: Iterable[bytes]) -> list[bytes]:
    """The prefixes that cover all others: Redis refuses those that overlap.

    >>> disjoint([b"balance:", b"b", b"user:", b"balance:eur:"])
    [b'b', b'user:']
    """
    found: list[bytes] = []
    for prefix in sorted(set(prefixes)):
        if not found or not prefix.startswith(found[-1]):
            found.append(prefix)
    return found


class Tracking:
    """The keys that change from `open` on, until there is a `gap`.

    `gap` says why changes may have been missed; None: none was. `identity` is who tells.
    `proven_at` is a time of the loop: all that changed before it has been told, by a Redis that was
    still the same one then. None: that isn't proven yet.
    """

    def __init__(
        self,
        source: Source,
        hearing: Connection,
        asking: Connection,
        *,
        limit: int,
        stirred: asyncio.Event,
        hurry: asyncio.Event,
    ) -> None:
        """Made by `open`."""
        self.gap: str | None = None
        self.proven_at: float | None = None
        self.identity: Identity
        self._source = source
        self._hearing = hearing
        self._asking = asking
        self._limit = max(limit, _LEAST_LIMIT)
        self._stirred = stirred
        self._hurry = hurry
        self._changed: set[bytes] = set()
        self._arrivals: list[float] = []
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def open(
        cls,
        source: Source,
        prefixes: Iterable[bytes],
        *,
        limit: int,
        stirred: asyncio.Event,
        hurry: asyncio.Event,
    ) -> "Tracking":
        """Have the keys with these prefixes told from now on.

        Args:
            source: the Redis.
            prefixes: what the keys begin with; an empty one means all keys.
            limit: the most keys between two calls of `take`; more are a gap.
            stirred: is set when a key is told.
            hurry: is set with it when there's a gap.

        Raises RedisUnavailable, SourceChanged, RightMissing, or ConfigError: it can't be done.
        """
        async with AsyncExitStack() as stack:
            hearing, identity = await source.open_own()
            stack.push_async_callback(hearing.close)
            asking, again = await source.open_own()
            stack.push_async_callback(asking.close)
            identity.check(again.nodes[0])
            tracking = cls(source, hearing, asking, limit=limit, stirred=stirred, hurry=hurry)
            # Before it tells anything, and by the connection that goes on being asked.
            tracking.identity = again
            await tracking._begin(disjoint(prefixes))
            stack.pop_all()
        return tracking

    async def _begin(self, prefixes: list[bytes]) -> None:
        await begin_tracking(self._hearing, self._asking, prefixes, self._hear, _REST_S)
        lost = f"the connection to Redis at {self._asking.address} was lost"
        for connection in (self._hearing, self._asking):
            connection.ended.add_done_callback(lambda _: self.miss(lost))

    def take(self) -> tuple[set[bytes], list[float]]:
        """The keys told since the last time, and times of the loop at which some of them came."""
        taken = self._changed, self._arrivals
        self._changed, self._arrivals = set(), []
        return taken

    async def settle(self) -> None:
        """Wait until all is told that was changed before now; raises Gap.

        What a change's own client has its answer to, was told before: both go out at the end of
        the same turn of Redis' event loop.
        """
        await self._ask(self._hearing)
        if self.gap is not None:
            raise Gap(self.gap)

    def prove(self, at: float) -> None:
        """Whoever looked at the server itself after the time `at`, and settled then, says so."""
        if self.gap is None:
            self.proven_at = max(self.proven_at or at, at)

    async def watch(self) -> None:
        """Ask both connections how they are until there's a gap."""
        turn = 0
        while self.gap is None:
            await asyncio.wait([self._hearing.ended, self._asking.ended], timeout=_PROVE_S)
            turn += 1
            asked_at = self._loop.time()
            for connection in (self._hearing, self._asking):
                await self._ask(connection)
            if turn % _DESCRIBE_EVERY == 0:
                await self._check()
                self.prove(asked_at)

    async def _ask(self, connection: Connection) -> None:
        try:
            await connection.call(b"PING")
        except BalanceSyncError as error:
            self.miss(str(error))

    async def _check(self) -> None:
        try:
            await self._source.check_own(self._asking, self.identity)
        except BalanceSyncError as error:
            self.miss(str(error))

    async def close(self) -> None:
        """Have no more told."""
        self.miss("was closed")
        for connection in (self._hearing, self._asking):
            await connection.close()

    def miss(self, why: str) -> None:
        """Changes may have been missed."""
        self.gap = self.gap or why
        self._changed.clear()
        self._stirred.set()
        self._hurry.set()

    def _hear(self, keys: list[bytes] | None) -> None:
        if self.gap is not None:
            return
        if keys is None:
            self.miss("Redis was emptied by FLUSHALL or FLUSHDB")
            return
        self._changed.update(keys)
        now = self._loop.time()
        if not self._arrivals or now - self._arrivals[-1] >= _MARK_S:
            self._arrivals.append(now)
        if len(self._changed) > self._limit:
            self.miss("more keys changed at once than live.max_pending allows")
        self._stirred.set()


async def begin_tracking(
    hearing: Connection,
    asking: Connection,
    prefixes: list[bytes],
    hear: Callable[[list[bytes] | None], None],
    rest_s: float,
) -> None:
    """Have `hear` called on `hearing` with the keys with these prefixes that change, and with None
    when Redis is emptied, while both connections are open.

    Raises RightMissing, or ConfigError: this Redis doesn't do so.
    """
    number = _checked(hearing, await hearing.send(pack((b"CLIENT", b"ID"))), b"CLIENT|ID")
    hearing.listen(hear, rest_s)
    said = await hearing.send(pack((b"SUBSCRIBE", _CHANNEL)))
    if isinstance(said, hiredis.ReplyError) and "channel" in str(said):
        raise RightMissing(
            f"Redis at {hearing.address} doesn't let this user hear of changes;"
            f" ACL SETUSER ... &{_CHANNEL.decode()}, see docs/security.md"
        )
    _checked(hearing, said, b"SUBSCRIBE")
    words = [b"CLIENT", b"TRACKING", b"ON", b"REDIRECT", str(number).encode(), b"BCAST"]
    # Without a prefix, or with the empty one, it's all keys.
    for prefix in prefixes:
        words += [b"PREFIX", prefix] if prefix else []
    _checked(asking, await asking.send(pack(tuple(words))), b"CLIENT|TRACKING")


async def begin_pushes(
    connection: Connection, prefix: bytes, hear: Callable[[list[bytes] | None], None]
) -> None:
    """The same over RESP3, on one connection; for a prefix that hardly anything has: who reads too
    slowly isn't cut off here, and would fill Redis' memory.

    Raises RightMissing, or ConfigError: this Redis doesn't do so.
    """
    connection.listen(hear, 0)
    _checked(connection, await connection.send(pack((b"HELLO", b"3"))), b"HELLO")
    words = (b"CLIENT", b"TRACKING", b"ON", b"BCAST", b"PREFIX", prefix)
    _checked(connection, await connection.send(pack(words)), b"CLIENT|TRACKING")


def _checked(connection: Connection, reply: Any, command: bytes) -> Any:
    if not isinstance(reply, hiredis.ReplyError):
        return reply
    text = str(reply)
    if text.startswith(("ERR", "NOPROTO")):
        raise ConfigError(
            f"Redis at {connection.address} doesn't tell of changes: it answers"
            f" {command.decode().replace('|', ' ')} with: {text}"
        )
    raise connection.explain(text, command)
