"""One connection to one Redis server: made once, never made again, bytes in and bytes out.

redis-py's own connection reconnects and retries by itself, which turns a scan over two servers into
one that looks whole, and packs commands in Python. So redis-py reads the URL and makes the TLS
context (`access`), hiredis packs and parses, and a dead connection stays dead. `answers` tells what
each error leads to. https://redis.io/docs/latest/develop/reference/protocol-spec/ (RESP2)
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any, Final, cast

import hiredis

from balancesync.access import Access, Address
from balancesync.answers import explain, unreachable
from balancesync.errors import BalanceSyncError, ConfigError, RedisUnavailable

CLIENT_NAME: Final = b"balancesync"

# One command, a tuple of its words, in RESP; hiredis' own stub takes a single word only.
pack: Final = cast("Callable[[tuple[bytes, ...]], bytes]", hiredis.pack_command)

_MORE: Final = object()
# What one read brings when there's more to come: then it isn't the moment to rest.
_FLOOD_BYTES: Final = 1 << 15
_TICKS: Final = 4
_PINGS: Final = 3
_NEAR_S: Final = 0.000_5
_WIDEST: Final = 8


def pack_each(before: tuple[bytes, ...], keys: list[bytes], after: tuple[bytes, ...] = ()) -> bytes:
    """The same command for each of `keys`, in a quarter of the time that `pack` takes.

    >>> pack_each((b"GET",), [b"a"])
    b'*2\\r\\n$3\\r\\nGET\\r\\n$1\\r\\na\\r\\n'
    """
    start = b"*%d\r\n" % (len(before) + 1 + len(after))
    head = start + b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in before])
    tail = b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in after])
    return b"".join([b"%b$%d\r\n%b\r\n%b" % (head, len(key), key, tail) for key in keys])


async def connect(address: Address, access: Access) -> "Connection":
    """Connect, authenticate and select the database, in `access.timeout` seconds at most.

    Raises RedisUnavailable or ConfigError.
    """
    loop = asyncio.get_running_loop()
    connection = Connection(address, access, loop)
    try:
        async with asyncio.timeout(access.timeout):
            if address.path:
                await loop.create_unix_connection(lambda: connection, address.path)
            else:
                await loop.create_connection(
                    lambda: connection, address.host, address.port, ssl=access.tls
                )
            await connection.introduce()
    except TimeoutError:
        await connection.close()
        hint = "; does it speak TLS?" if access.tls else ""
        raise RedisUnavailable(
            f"Redis at {address} doesn't answer within redis.timeout = {access.timeout:g} s{hint}"
        ) from None
    except OSError as error:
        raise unreachable(address, error) from None
    except BaseException:
        await connection.close()
        raise
    return connection


@asynccontextmanager
async def connected(address: Address, access: Access) -> AsyncIterator["Connection"]:
    """A connection for the length of a block; raises as `connect` does."""
    connection = await connect(address, access)
    try:
        yield connection
    finally:
        await connection.close()


class Connection(asyncio.Protocol):
    """Commands out, replies back in the same order. Made by `connect`.

    An error reply is an object of hiredis.ReplyError until `check` raises it as one of ours.
    """

    def __init__(self, address: Address, access: Access, loop: asyncio.AbstractEventLoop) -> None:
        self.address = address
        self.lost = False
        self._on_message: Callable[[Any], None] | None = None
        self._rest_s = 0.0
        self._access = access
        self._loop = loop
        self._reader = hiredis.Reader(notEnoughData=_MORE)
        self._waiting: deque[tuple[asyncio.Future[Any], int, list[Any]]] = deque()
        self._transport: asyncio.Transport | None = None
        self._ended: asyncio.Future[None] = loop.create_future()
        self._failure: BalanceSyncError | None = None
        self._unsent: deque[bytes] = deque()
        self._window = 1
        self._quiet = 0
        self._heard = False
        self._watch: asyncio.TimerHandle | None = None
        self._resting: asyncio.TimerHandle | None = None

    @property
    def database(self) -> int:
        """The number of the database that it has selected."""
        return self._access.database

    @property
    def usable(self) -> bool:
        """Whether a command can still be sent."""
        return self._failure is None and self._transport is not None

    @property
    def ended(self) -> asyncio.Future[None]:
        """Done when the connection has ended, for whatever reason."""
        return self._ended

    def send(self, packed: bytes, replies: int | None = None) -> asyncio.Future[Any]:
        """Send commands without waiting; the future gives the one reply, or a list of `replies`.

        Raises (here or in the future) RedisUnavailable if the connection is dead or the server
        has been silent for `redis.timeout` seconds, ConfigError if it isn't Redis.
        """
        if self._failure is not None or self._transport is None:
            raise self._failure or self._unavailable("isn't connected any more")
        future = self._loop.create_future()
        if replies == 0:
            future.set_result([])
            return future
        self._waiting.append((future, replies or 0, []))
        self._read_on()
        if len(self._waiting) > self._window:
            self._unsent.append(packed)
        else:
            self._transport.write(packed)
        if self._watch is None:
            self._quiet = 0
            self._arm()
        return future

    def listen(self, on_message: Callable[[Any], None], rest_s: float) -> None:
        """Give `on_message` what the channels bring that this connection is subscribed to.

        Between two reads it rests for `rest_s` seconds, unless much is waiting or a command was
        sent. A reader who is always ready has the server wake him for every single message, which
        costs it five times as much.
        """
        self._on_message = on_message
        self._rest_s = rest_s

    async def call(self, *words: bytes) -> Any:
        """One command and its reply; raises what an error reply stands for."""
        return self.check(await self.send(pack(words)), words[0])

    async def call_each(self, before: tuple[bytes, ...], keys: list[bytes]) -> list[Any]:
        """The same command for each of `keys`; error replies stand among the replies as objects."""
        replies: list[Any] = await self.send(pack_each(before, keys), len(keys))
        return replies

    async def pipeline(self, commands: list[tuple[bytes, ...]]) -> list[Any]:
        """Several commands in one go; error replies stand among the replies as objects."""
        replies: list[Any] = await self.send(b"".join(pack(c) for c in commands), len(commands))
        return replies

    def check(self, reply: Any, command: bytes) -> Any:
        """The reply itself; raises what it stands for if it is an error."""
        if isinstance(reply, hiredis.ReplyError):
            raise self.explain(str(reply), command)
        return reply

    def explain(self, text: str, command: bytes) -> BalanceSyncError:
        """What an error reply to `command` means to us."""
        return explain(text, command, self.address, self._access)

    async def introduce(self) -> None:
        """Authenticate, select the database, say who we are."""
        access = self._access
        commands: list[tuple[bytes, ...]] = []
        if access.password is not None or access.username is not None:
            user = (access.username.encode(),) if access.username else ()
            commands.append((b"AUTH", *user, (access.password or "").encode()))
        if access.database:
            commands.append((b"SELECT", str(access.database).encode()))
        commands.append((b"CLIENT", b"SETNAME", CLIENT_NAME))
        replies = await self.pipeline(commands)
        for command, reply in zip(commands, replies, strict=True):
            # The name is for those who look at CLIENT LIST; not every user may set it.
            if command[0] != b"CLIENT" or not str(reply).startswith(("NOPERM", "ERR unknown")):
                self.check(reply, command[0])

    async def measure(self) -> None:
        """Let as many commands be under way as the distance to the server is worth.

        Nearby it's one, sent on the moment that the last one's reply is in: the server then serves
        its other clients between any two of ours. Two at a time tripled their waiting and won
        nothing. Over a network, commands on their way keep the server from waiting for us.
        """
        shortest = self._access.timeout
        for _ in range(_PINGS):
            start = perf_counter()
            await self.send(pack((b"PING",)))
            shortest = min(shortest, perf_counter() - start)
        self._window = min(_WIDEST, 1 + int(shortest / _NEAR_S))

    async def close(self) -> None:
        """Drop the connection and whatever it still owes. May be called twice."""
        self._fail(self._failure or self._unavailable("isn't connected any more"))
        if self._transport is not None:
            self._transport.abort()
            await asyncio.wait([self._ended])

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._quiet = 0
        self._heard = True
        waiting = self._waiting
        try:
            self._reader.feed(data)
            while (reply := self._reader.gets()) is not _MORE:
                if self._on_message and (message := _message(reply)):
                    self._on_message(message[-1])
                    continue
                if not waiting:
                    self._abort(self.explain(str(reply), b"the connection"))
                    return
                future, count, replies = waiting[0]
                if count:
                    replies.append(reply)
                    if len(replies) < count:
                        continue
                    reply = replies
                waiting.popleft()
                if self._unsent and self._transport:
                    self._transport.write(self._unsent.popleft())
                if not future.done():
                    future.set_result(reply)
        except hiredis.ProtocolError:
            odd = "speaks another protocol: is it a Redis, and without TLS?"
            self._abort(ConfigError(f"Redis at {self.address} {odd}"))
        if self._rest_s and not waiting and len(data) < _FLOOD_BYTES:
            self._rest()

    def _rest(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()
            self._resting = self._loop.call_later(self._rest_s, self._read_on)

    def _read_on(self) -> None:
        if self._resting is None:
            return
        self._resting.cancel()
        self._resting = None
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        if self._failure is None:
            self.lost = True
            hint = "" if self._heard or self._access.tls else "; does it want TLS, rediss://?"
            self._fail(self._unavailable(f"closed the connection{hint}"))
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if self._resting is not None:
            self._resting.cancel()
            self._resting = None
        if not self._ended.done():
            self._ended.set_result(None)

    def _arm(self) -> None:
        self._watch = self._loop.call_later(self._access.timeout / _TICKS, self._tick)

    def _tick(self) -> None:
        # Ticks are counted, not time: after a long stop of this process itself, what has arrived
        # meanwhile is read before the next one.
        self._watch = None
        if not self._waiting:
            return
        self._quiet += 1
        if self._quiet > _TICKS:
            timeout = f"redis.timeout = {self._access.timeout:g} s"
            self._abort(self._unavailable(f"doesn't answer within {timeout}"))
        else:
            self._arm()

    def _abort(self, failure: BalanceSyncError) -> None:
        self._fail(failure)
        if self._transport is not None:
            self._transport.abort()

    def _fail(self, failure: BalanceSyncError) -> None:
        self._failure = failure
        for future, _, _ in self._waiting:
            if not future.done():
                future.set_exception(failure)
                future.exception()  # marks it as seen: a future that nobody awaits must not log
        self._waiting.clear()

    def _unavailable(self, what: str) -> RedisUnavailable:
        return RedisUnavailable(f"Redis at {self.address} {what}")


def _message(reply: Any) -> list[Any] | None:
    """What a channel brings, or over RESP3 a push; None if it's a reply."""
    if type(reply) is list:
        return reply if reply and reply[0] == b"message" else None
    return reply if isinstance(reply, hiredis.PushNotification) else None
