"""Reading the values of keys that are known by name, a piece at a time.

The size of a piece follows the values: it starts small, grows while replies stay small, and falls
to what fits a reply of `_REPLY_BYTES`. SCAN's order is a hash's, so what the last pieces held
tells what the next will. A piece is `redis.scan_count` / 2 keys at most, because Redis serves its
other clients only between two commands. What is longer than any value may be is cut at once: the
rest would only be carried to its rejection.

Hashes are read by HMGETs in a pipeline. Packed by hiredis these take 3 us a key, where the same in
a Lua script takes 5 (Redis 7.0 and Valkey 9.1) and holds up other clients for all of its keys.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar, Final, Literal, TypeAlias

import hiredis

from balancesync.connection import Connection, pack, pack_each
from balancesync.errors import MappingFailed
from balancesync.model import RawBatch, RawValue, WrongType

LONGEST_VALUE: Final = 65_536

_REPLY_BYTES: Final = 100_000
_FIRST_PIECE: Final = 4
_GROWTH: Final = 4
_AHEAD: Final = 4
_PAGES_A_SECOND: Final = 10
_SAMPLE_PAGES: Final = 100


Ready: TypeAlias = "tuple[Values, Piece] | None"  # None: a walk has ended


@dataclass(frozen=True, slots=True)
class Reading:
    """What to read of Redis for one mapping.

    `match` is SCAN's glob (HSCAN's with `member_key`), None for all. `select` takes the keys of a
    page and gives those to read; it's called once for each page, in the order of reading. `fields`
    are a hash's. With `member_key` the fields of that one hash are the keys.
    """

    type: Literal["string", "hash", "json"]
    match: bytes | None = None
    fields: tuple[bytes, ...] = ()
    member_key: bytes | None = None
    select: Callable[[list[bytes]], list[bytes]] | None = None

    def selected(self, keys: list[bytes]) -> list[bytes]:
        """Those of `keys` that are to be read."""
        return self.select(keys) if self.select else keys


@dataclass(frozen=True, slots=True)
class Piece:
    """Keys whose values were asked for; `ignored` are those of their page that weren't selected."""

    keys: list[bytes]
    ignored: int
    reply: asyncio.Future[Any]


@dataclass(frozen=True, slots=True)
class Sample:
    """Some keys with their values and milliseconds to live, None for a key that stays."""

    batch: RawBatch
    ttls: list[int | None]


class Pace:
    """Lets `rate` keys a second through, 0 for no limit, in pages of `count` at most."""

    def __init__(self, rate: int, count: int) -> None:
        # A second's worth in one go isn't what somebody who sets a limit wants.
        self.count = min(count, max(1, rate // _PAGES_A_SECOND)) if rate else count
        self._rate = rate
        self._due = 0.0

    async def wait(self, keys: int) -> None:
        """Wait until `keys` more are due."""
        if self._rate:
            now = asyncio.get_running_loop().time()
            cost = keys / self._rate
            self._due = max(self._due or now, now - cost) + cost
            await asyncio.sleep(self._due - now)


class Values(ABC):
    """Finds keys and asks for values on one connection, whose replies come in the same order."""

    kind: ClassVar[bytes]
    scan: tuple[bytes, ...] = (b"SCAN",)

    def __init__(self, connection: Connection, limit: int) -> None:
        self.connection = connection
        self.limit = limit
        self.size = min(limit, _FIRST_PIECE)
        self.room = asyncio.Semaphore(_AHEAD)

    def pieces(self, keys: list[bytes], ignored: int) -> Iterator[Piece]:
        """Ask for `keys`, a piece each time that the iterator is moved on."""
        start = 0
        while start < len(keys) or ignored:
            # Even pieces, for a small rest costs as much; a page has a few keys more than COUNT.
            left = len(keys) - start
            count = ceil(left / max(1, ceil(left / self.size - 0.1)))
            yield self.ask(keys[start : start + count], ignored)
            start += count
            ignored = 0

    async def walk(self, reading: Reading, pace: Pace, ready: asyncio.Queue[Ready]) -> None:
        """Go through all keys, putting pieces into `ready` while their receiver makes `room`.

        The next page is asked for before the values of this one, so that the server never waits.
        """
        count = self.page_size(pace)
        page, cursor = self.ask_page(b"0", reading, count), b""
        while cursor != b"0":
            cursor, keys = await self.receive_page(page)
            if cursor != b"0":
                # What MATCH leaves out has been gone through, too.
                await pace.wait(max(count, len(keys)))
                count = self.page_size(pace)
                page = self.ask_page(cursor, reading, count)
            for piece in self.asked(keys, reading):
                ready.put_nowait((self, piece))
                await self.room.acquire()

    def ask_page(self, cursor: bytes, reading: Reading, count: int) -> asyncio.Future[Any]:
        """Ask for the page of about `count` keys at `cursor`."""
        match = () if reading.match is None else (b"MATCH", reading.match)
        words = (*self.scan, cursor, *match, b"COUNT", str(count).encode())
        return self.connection.send(pack(words))

    async def receive_page(self, page: asyncio.Future[Any]) -> tuple[bytes, list[bytes]]:
        """The next page's cursor, 0 after the last, and what stands on this one."""
        cursor, keys = await self.checked(await page, self.scan[0])
        return cursor, keys

    def page_size(self, pace: Pace) -> int:
        """COUNT of the next page."""
        return pace.count

    def asked(self, page: list[bytes], reading: Reading) -> Iterator[Piece]:
        """The pieces of a page, each asked for when the iterator comes to it."""
        selected = reading.selected(page)
        return self.pieces(selected, len(page) - len(selected))

    async def checked(self, reply: Any, command: bytes) -> Any:
        """The reply; raises what it stands for if it is an error."""
        return self.connection.check(reply, command)

    async def receive(self, piece: Piece) -> tuple[list[RawValue], int]:
        """The values of a piece in its keys' order, and their size in bytes after the cut."""
        if not piece.keys:
            return [], 0
        values = await self.decode(piece.keys, await piece.reply)
        weight = self.weigh(values)
        self.size = min(
            self.limit, self.size * _GROWTH, max(1, _REPLY_BYTES * len(piece.keys) // (weight + 1))
        )
        if weight > LONGEST_VALUE:
            values = [_cut(value) for value in values]
            weight = min(weight, self.weigh(values))
        return values, weight

    async def read(self, keys: list[bytes]) -> list[RawValue]:
        """The values of `keys`, in order."""
        values: list[RawValue] = []
        for piece in self.pieces(keys, 0):
            values += (await self.receive(piece))[0]
        return values

    async def sample(self, reading: Reading, count: int, limit: int, sample: Sample) -> None:
        """Add to a sample until it has `limit` keys, from the first pages of about `count` keys."""
        pace = Pace(0, count)
        cursor, pages = b"", 0
        while cursor != b"0" and pages < _SAMPLE_PAGES and len(sample.ttls) < limit:
            asked = self.ask_page(cursor or b"0", reading, self.page_size(pace))
            cursor, page = await self.receive_page(asked)
            pages += 1
            for piece in self.asked(page, reading):
                found, _ = await self.receive(piece)
                big = reading.member_key
                named = piece.keys if big is None else [big] * len(piece.keys)
                ttls = await self.connection.call_each((b"PTTL",), named)
                sample.batch.keys.extend(piece.keys)
                sample.batch.values.extend(found)
                sample.batch.scanned += len(piece.keys) + piece.ignored
                for ttl in ttls:
                    left = self.connection.check(ttl, b"PTTL")
                    sample.ttls.append(left if left >= 0 else None)
                if len(sample.ttls) >= limit:
                    break

    @abstractmethod
    def ask(self, keys: list[bytes], ignored: int = 0) -> Piece:
        """Send what asks for the values of `keys`."""

    @abstractmethod
    async def decode(self, keys: list[bytes], reply: Any) -> list[RawValue]:
        """The values in the reply to what `ask` sent for `keys`."""

    def weigh(self, values: list[RawValue]) -> int:
        """How many bytes `values` are."""
        return sum([len(value) for value in values if type(value) is bytes])

    async def settle(self, keys: list[bytes], values: list[Any], odd: list[int]) -> None:
        """Tell apart, at the places `odd`, what is gone, what is of another type, what is new."""
        for at in odd:
            if isinstance(values[at], hiredis.ReplyError) and not _is_wrong_type(values[at]):
                self.connection.check(values[at], b"HMGET" if self.kind == b"hash" else b"GET")
        types = await self.connection.call_each((b"TYPE",), [keys[at] for at in odd])
        again = []
        for at, found in zip(odd, types, strict=True):
            self.connection.check(found, b"TYPE")
            if found == b"none":
                values[at] = None
            elif found != self.kind:
                values[at] = WrongType(found.decode("ascii", "replace"))
            elif type(values[at]) is not list:
                again.append(at)
        if again:
            # Made, or made anew as the right type, after it was read.
            asked = [keys[at] for at in again]
            found = await self.decode(asked, await self.ask(asked).reply)
            for at, value in zip(again, found, strict=True):
                values[at] = value


class Strings(Values):
    """Strings, by MGET, which answers nil for a key of another type as for one that is gone."""

    kind = b"string"

    def ask(self, keys: list[bytes], ignored: int = 0) -> Piece:
        if not keys:
            return Piece(keys, ignored, self.connection.send(b"", 0))
        return Piece(keys, ignored, self.connection.send(pack((b"MGET", *keys))))

    async def decode(self, keys: list[bytes], reply: Any) -> list[RawValue]:
        values: list[RawValue] = self.connection.check(reply, b"MGET")
        if None in values:
            await self.settle(keys, values, [at for at, v in enumerate(values) if v is None])
        return values


class ScatteredStrings(Values):
    """Strings of a cluster's node, by GETs: an MGET may not cross slots."""

    kind = b"string"

    def ask(self, keys: list[bytes], ignored: int = 0) -> Piece:
        packed = pack_each((b"GET",), keys)
        return Piece(keys, ignored, self.connection.send(packed, len(keys)))

    async def decode(self, keys: list[bytes], reply: Any) -> list[RawValue]:
        values: list[RawValue] = reply
        odd = [at for at, value in enumerate(values) if type(value) is not bytes]
        if odd:
            await self.settle(keys, values, odd)
        return values


class Hashes(Values):
    """The same fields of many hashes."""

    kind = b"hash"

    def __init__(self, connection: Connection, limit: int, fields: tuple[bytes, ...]) -> None:
        super().__init__(connection, limit)
        self.fields = fields
        self._nothing: list[None] = [None] * len(fields)

    def ask(self, keys: list[bytes], ignored: int = 0) -> Piece:
        packed = pack_each((b"HMGET",), keys, self.fields)
        return Piece(keys, ignored, self.connection.send(packed, len(keys)))

    async def decode(self, keys: list[bytes], reply: Any) -> list[RawValue]:
        rows: list[Any] = reply
        nothing = self._nothing
        odd = [at for at, row in enumerate(rows) if row == nothing or type(row) is not list]
        if odd:
            await self.settle(keys, rows, odd)
        return rows

    def weigh(self, values: list[RawValue]) -> int:
        return sum([len(v) for row in values if type(row) is list for v in row if v is not None])


class Members(Values):
    """The fields of one big hash. HSCAN brings their values along: its pages grow as pieces do."""

    kind = b"hash"

    def __init__(self, connection: Connection, limit: int, key: bytes) -> None:
        super().__init__(connection, limit)
        self.key = key
        self.scan = (b"HSCAN", key)

    def page_size(self, pace: Pace) -> int:
        return min(self.size, pace.count)

    def asked(self, page: list[bytes], reading: Reading) -> Iterator[Piece]:
        keys, values = page[::2], page[1::2]
        selected = reading.selected(keys)
        ignored = len(keys) - len(selected)
        if ignored:
            value_of = dict(zip(keys, values, strict=True))
            values = [value_of[key] for key in selected]
        if page:
            reply = asyncio.get_running_loop().create_future()
            reply.set_result(values)
            yield Piece(selected, ignored, reply)

    async def checked(self, reply: Any, command: bytes) -> Any:
        if _is_wrong_type(reply):
            found = (await self.connection.call(b"TYPE", self.key)).decode("ascii", "replace")
            name = self.key.decode(errors="backslashreplace")
            raise MappingFailed(
                f"the big hash {name} in Redis at {self.connection.address} holds a {found}"
            )
        return self.connection.check(reply, command)

    def ask(self, keys: list[bytes], ignored: int = 0) -> Piece:
        if not keys:
            return Piece(keys, ignored, self.connection.send(b"", 0))
        return Piece(keys, ignored, self.connection.send(pack((b"HMGET", self.key, *keys))))

    async def decode(self, keys: list[bytes], reply: Any) -> list[RawValue]:
        values: list[RawValue] = await self.checked(reply, b"HMGET")
        return values


def _is_wrong_type(reply: Any) -> bool:
    return isinstance(reply, hiredis.ReplyError) and str(reply).startswith("WRONGTYPE")


def _cut(value: RawValue) -> RawValue:
    if type(value) is bytes:
        return value[: LONGEST_VALUE + 1]
    if type(value) is list:
        return [v and v[: LONGEST_VALUE + 1] for v in value]
    return value
