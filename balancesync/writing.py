"""Writing records back to Redis, and taking them out of it: one atomic step for each.

A string or an object is made by SET NX, a field of the big hash by HSETNX, and a hash, which must
never be half there, by one HSET in a script that looks first. What is there already changes only if
it still is what was read, again in one script for each record. A server runs a script as a whole,
and replicates and saves it as one: https://redis.io/docs/latest/develop/programmability/eval-intro/

The rights it takes: SET; for hashes EVAL, EXISTS and HSET; with `member` HSETNX. To replace, EVAL
and GET and SET, or HGET and HSET; to remove, EVAL and GET and DEL, for hashes HGET, HLEN and DEL,
with `member` HGET and HDEL. Scripts are sent by EVAL: a server that has just taken another's place
knows none by its name.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Final, TypeAlias, cast

import hiredis

from balancesync.access import Address
from balancesync.connection import Connection, pack
from balancesync.model import RawValue
from balancesync.nodes import Layout
from balancesync.reading import Pace, Reading, Values

# What a record holds: a string's or a field's bytes, or a hash's fields, None for one that isn't.
Value: TypeAlias = bytes | list[bytes | None]

_REPLACE: Final = b"""if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'KEEPTTL') return 1"""
_REMOVE: Final = b"""if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])"""
_REPLACE_MEMBER: Final = b"""if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3]) return 1"""
_REMOVE_MEMBER: Final = b"""if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
return redis.call('HDEL', KEYS[1], ARGV[1])"""
_CREATE_HASH: Final = b"""if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('HSET', KEYS[1], unpack(ARGV)) return 1"""
# ARGV: how many fields were read, each with its value behind a '=' or '' if it wasn't there, and
# then the words for HSET.
_AS_READ: Final = b"""local fields = tonumber(ARGV[1])
for at = 2, 2 * fields, 2 do
  local found = redis.call('HGET', KEYS[1], ARGV[at])
  if (found and '=' .. found or '') ~= ARGV[at + 1] then return 0 end
end
"""
_REPLACE_HASH: Final = (
    _AS_READ + b"redis.call('HSET', KEYS[1], unpack(ARGV, 2 * fields + 2)) return 1"
)
_REMOVE_HASH: Final = (
    _AS_READ
    + b"""if redis.call('HLEN', KEYS[1]) ~= tonumber(ARGV[2 * fields + 2]) then return 0 end
return redis.call('DEL', KEYS[1])"""
)


class Form(ABC):
    """The commands that write a mapping's records; each answers OK or 1 if it has done its work."""

    @abstractmethod
    def create(self, key: bytes, value: Value) -> bytes:
        """What makes a record unless it is there."""

    def create_all(self, keys: list[bytes], values: Sequence[Value]) -> list[bytes]:
        """The same for many."""
        return list(map(self.create, keys, values))

    @abstractmethod
    def replace(self, key: bytes, seen: Value, value: Value) -> bytes:
        """What gives a record another value if it still has the one that was `seen`."""

    @abstractmethod
    def remove(self, key: bytes, seen: Value) -> bytes:
        """What takes a record out if it is nothing but what was `seen`."""


class _Strings(Form):
    def create(self, key: bytes, value: Value) -> bytes:
        return self.create_all([key], [value])[0]

    def create_all(self, keys: list[bytes], values: Sequence[Value]) -> list[bytes]:
        # Packed here, in a third of the time that `pack` takes: this is most of a restore.
        form = b"*4\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n$2\r\nNX\r\n"
        texts = cast("Sequence[bytes]", values)
        sizes = zip(map(len, keys), keys, map(len, texts), texts, strict=True)
        return [form % each for each in sizes]

    def replace(self, key: bytes, seen: Value, value: Value) -> bytes:
        return _script(_REPLACE, key, seen, value)

    def remove(self, key: bytes, seen: Value) -> bytes:
        return _script(_REMOVE, key, seen)


class _Members(Form):
    def __init__(self, big: bytes) -> None:
        self._big = big

    def create(self, key: bytes, value: Value) -> bytes:
        return pack((b"HSETNX", self._big, key, cast(bytes, value)))

    def replace(self, key: bytes, seen: Value, value: Value) -> bytes:
        return _script(_REPLACE_MEMBER, self._big, key, seen, value)

    def remove(self, key: bytes, seen: Value) -> bytes:
        return _script(_REMOVE_MEMBER, self._big, key, seen)


class _Hashes(Form):
    def __init__(self, fields: tuple[bytes, ...]) -> None:
        self._fields = fields

    def create(self, key: bytes, value: Value) -> bytes:
        return _script(_CREATE_HASH, key, *self._words(value))

    def replace(self, key: bytes, seen: Value, value: Value) -> bytes:
        return _script(_REPLACE_HASH, key, *self._seen(seen), *self._words(value))

    def remove(self, key: bytes, seen: Value) -> bytes:
        count = sum(each is not None for each in seen)
        return _script(_REMOVE_HASH, key, *self._seen(seen), b"%d" % count)

    def _words(self, value: Value) -> list[bytes]:
        pairs = zip(self._fields, value, strict=True)
        return [word for name, each in pairs if isinstance(each, bytes) for word in (name, each)]

    def _seen(self, value: Value) -> list[bytes]:
        pairs = zip(self._fields, value, strict=True)
        words = ((name, b"=" + each if isinstance(each, bytes) else b"") for name, each in pairs)
        return [b"%d" % len(self._fields), *(word for pair in words for word in pair)]


def _script(body: bytes, key: bytes, *words: Value) -> bytes:
    return pack((b"EVAL", body, b"1", key, *cast("tuple[bytes, ...]", words)))


def form_of(reading: Reading) -> Form:
    """How the records that this reads are written."""
    if reading.member_key is not None:
        return _Members(reading.member_key)
    return _Hashes(reading.fields) if reading.type == "hash" else _Strings()


class Sent:
    """Commands under way."""

    def __init__(self, count: int, command: bytes) -> None:
        self._done = [False] * count
        self._command = command
        self._pieces: list[tuple[Connection, list[int], Any]] = []

    def add(self, connection: Connection, places: list[int], reply: Any) -> None:
        """These of them went over one connection, and this future has their replies."""
        self._pieces.append((connection, places, reply))

    async def done(self) -> list[bool]:
        """Whether each did what it's for; raises what an error reply stands for."""
        for connection, places, reply in self._pieces:
            replies = await reply
            if replies.count(b"OK") == len(replies):
                for at in places:
                    self._done[at] = True
                continue
            for at, each in zip(places, replies, strict=True):
                self._done[at] = bool(_checked(connection, each, self._command))
        return self._done


def _checked(connection: Connection, reply: Any, command: bytes) -> Any:
    # In a script's error the type's own may stand anywhere; such a key isn't what was read.
    if isinstance(reply, hiredis.ReplyError) and "WRONGTYPE" in str(reply):
        return False
    return connection.check(reply, command)


class Writing:
    """Writes and reads one mapping's records, on connections of its own; `Source.writing` makes it.

    Commands to one server are answered in the order in which they were sent.
    """

    def __init__(
        self,
        layout: Layout,
        values: dict[Address, Values],
        reading: Reading,
        pace: Pace,
    ) -> None:
        self._layout = layout
        self._values = values
        self._big = reading.member_key
        self._form = form_of(reading)
        self._pace = pace

    async def create(self, keys: list[bytes], values: Sequence[Value]) -> Sent:
        """Send what makes records that aren't there."""
        return await self._send(keys, self._form.create_all(keys, values))

    async def replace(
        self, keys: list[bytes], seen: Sequence[Value], values: Sequence[Value]
    ) -> Sent:
        """Send what gives records that still are as `seen` other values."""
        return await self._send(keys, list(map(self._form.replace, keys, seen, values)))

    async def remove(self, keys: list[bytes], seen: Sequence[Value]) -> Sent:
        """Send what takes out records that still are as `seen`, and nothing else."""
        return await self._send(keys, list(map(self._form.remove, keys, seen)))

    async def read(self, keys: list[bytes]) -> list[RawValue]:
        """What the records hold; raises MappingFailed if the big hash is none."""
        found: list[RawValue] = [None] * len(keys)
        for address, places in self._layout.divide(keys, self._big).items():
            values = await self._values[address].read([keys[at] for at in places])
            for at, value in zip(places, values, strict=True):
                found[at] = value
        return found

    async def _send(self, keys: list[bytes], commands: list[bytes]) -> Sent:
        # All are the same command, whose name is the first word of each.
        name = commands[0].split(b"\r\n", 3)[2] if commands else b""
        sent = Sent(len(keys), name)
        limit = self._pace.count
        for address, places in self._layout.divide(keys, self._big).items():
            connection = self._values[address].connection
            for start in range(0, len(places), limit):
                piece = places[start : start + limit]
                await self._pace.wait(len(piece))
                packed = b"".join([commands[at] for at in piece])
                sent.add(connection, piece, connection.send(packed, len(piece)))
        return sent
