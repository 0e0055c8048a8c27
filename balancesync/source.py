"""Redis, where the balances live: standalone, found through Sentinels, or a cluster.

    async with Source(config.redis) as source:
        async with aclosing(source.scan(reading)) as batches:
            async for batch in batches: ...

A scan that ends in good order has been answered by one server, or by one set of a cluster's
primaries, from the first page to the last; anything else raises. Its connections are its own. All
else shares one connection a primary, made when it's needed. After anything that may pass, the next
to ask gets new ones, and whoever is still using the old ones ends in peace; so a Source can be made
before Redis is up and outlives its restarts. Nothing is ever asked twice.

The rights it takes: SCAN, MGET (in a cluster GET), TYPE, EXISTS, PTTL, PING, and those that `nodes`
names; for hashes HMGET, with `member` HSCAN and HEXISTS too, and HLEN if it may. `answers` tells
what each error leads to.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Final, Protocol, Self

import hiredis

from balancesync.access import Address, parse
from balancesync.config import RedisConfig
from balancesync.connection import Connection, connect
from balancesync.continuity import Primary
from balancesync.errors import ConfigError, RedisUnavailable, SourceChanged, Transient
from balancesync.model import RawBatch, RawValue
from balancesync.nodes import (
    Facts,
    Identity,
    Layout,
    Node,
    ask_cluster,
    ask_sentinels,
    check_primary,
    check_settled,
    describe,
    facts_of,
)
from balancesync.reading import (
    Hashes,
    Members,
    Pace,
    Reading,
    Ready,
    Sample,
    ScatteredStrings,
    Strings,
    Values,
)
from balancesync.writing import Writing

# As JSON documents these take up to 30 ms to parse, and nothing else happens meanwhile.
_BATCH_BYTES: Final = 100_000
_EXISTS_PIECE: Final = 500


@dataclass(frozen=True, slots=True)
class _Primary:
    """`fetching` has learnt from what it was asked before how large a piece may be."""

    connection: Connection
    node: Node
    fetching: dict[tuple[object, ...], Values] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class _Shared:
    """Connections that all share; the last of their `users` closes them once they are `retired`."""

    layout: Layout
    primaries: dict[Address, _Primary]
    users: int = 0
    retired: bool = False

    @property
    def usable(self) -> bool:
        """Whether each primary can still be asked."""
        return all(primary.connection.usable for primary in self.primaries.values())

    async def close(self) -> None:
        """Close every connection, whoever uses it."""
        for primary in self.primaries.values():
            await primary.connection.close()


class Listener(Protocol):
    """Who hears whether Redis is emptied: see `ear`."""

    async def tend(self) -> None:
        """Listen to every primary there is now."""

    async def heard_since(self, address: Address, primary: Primary) -> int | None:
        """Since when it has listened to this primary without a break."""


class Source:
    """Redis as `config` names it. Every method that speaks to it raises what `answers` lists."""

    def __init__(self, config: RedisConfig) -> None:
        """Connects to nothing yet. Raises ConfigError: the URL's ssl_ files can't be used."""
        self._config = config
        self._address, self._access = parse(
            config.url.get_secret_value(), timeout=config.timeout, clustered=config.cluster
        )
        self.ear: Listener | None = None
        self._shared: _Shared | None = None
        self._known: tuple[Address, ...] = ()
        self._opening = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the shared connections; a later call makes new ones."""
        shared, self._shared = self._shared, None
        if shared is not None:
            await shared.close()

    async def identity(self) -> Identity:
        """Who Redis is now."""
        async with self._open() as shared:
            nodes = [await self._describe(p.connection) for p in shared.primaries.values()]
        if self.ear is not None:
            nodes = [await self._heard(self.ear, node) for node in nodes]
        return Identity(tuple(nodes))

    async def listen(self) -> None:
        """Listen to all primaries from now on, where somebody has given this an ear."""
        if self.ear is not None:
            await self.ear.tend()

    @staticmethod
    async def _heard(ear: Listener, node: Node) -> Node:
        since = await ear.heard_since(node.address, node.primary)
        return replace(node, primary=replace(node.primary, heard_since=since))

    async def primaries(self) -> tuple[Address, ...]:
        """Where the primaries are."""
        async with self._open() as shared:
            return shared.layout.addresses

    async def dbsize(self) -> dict[str, int]:
        """The number of keys of each primary by its address, of every kind."""
        async with self._open() as shared:
            return {
                str(address): await primary.connection.call(b"DBSIZE")
                for address, primary in shared.primaries.items()
            }

    async def fields_of(self, key: bytes) -> int | None:
        """How many fields a big hash has, 0 if the key isn't there.

        None if that can't be known: it holds another type, or HLEN may not be asked and the key is
        there.
        """
        async with self._open() as shared:
            connection = shared.primaries[shared.layout.owner(key)].connection
            count, kind = await connection.pipeline([(b"HLEN", key), (b"TYPE", key)])
            if not isinstance(count, hiredis.ReplyError):
                return int(count)
            # Neither is a right that a run needs.
            if not str(count).startswith(("NOPERM", "WRONGTYPE", "ERR unknown")):
                raise connection.explain(str(count), b"HLEN")
            return 0 if kind == b"none" else None

    async def ping(self) -> float:
        """Seconds that the slowest primary takes to answer."""
        slowest = 0.0
        async with self._open() as shared:
            for primary in shared.primaries.values():
                start = perf_counter()
                await primary.connection.call(b"PING")
                slowest = max(slowest, perf_counter() - start)
        return slowest

    async def facts(self) -> tuple[Facts, ...]:
        """What `check` and the metrics want to know of each primary."""
        async with self._open() as shared:
            connections = [primary.connection for primary in shared.primaries.values()]
            return tuple([await facts_of(c, await self._describe(c)) for c in connections])

    async def fetch(
        self, reading: Reading, keys: list[bytes], *, identity: Identity | None = None
    ) -> RawBatch:
        """Read `keys` (with `member_key`, fields) again, all in one batch; `select` isn't asked.

        Raises RunFailed if `member_key` holds another type, SourceChanged if slots moved, or if
        anyone but `identity` has answered.
        """
        values: list[RawValue] = [None] * len(keys)
        big = reading.member_key
        async with self._open() as shared:
            for address, places in shared.layout.divide(keys, big).items():
                primary = shared.primaries[address]
                found = await self._fetching(primary, reading).read([keys[at] for at in places])
                for at, value in zip(places, found, strict=True):
                    values[at] = value
                if identity:
                    identity.check(await self._describe(primary.connection))
                else:
                    await check_primary(primary.connection)
            await self._check_layout(shared.layout)
        return RawBatch(keys, values, len(keys))

    async def exists(self, reading: Reading, keys: list[bytes]) -> list[bool]:
        """Whether each of `keys` (with `member_key`, fields) is there, of whatever type."""
        found = [False] * len(keys)
        big = reading.member_key
        command = (b"EXISTS",) if big is None else (b"HEXISTS", big)
        async with self._open() as shared:
            for address, places in shared.layout.divide(keys, big).items():
                connection = shared.primaries[address].connection
                values = self._values(connection, reading)
                for start in range(0, len(places), _EXISTS_PIECE):
                    piece = places[start : start + _EXISTS_PIECE]
                    replies = await connection.call_each(command, [keys[at] for at in piece])
                    for at, reply in zip(piece, replies, strict=True):
                        found[at] = await values.checked(reply, command[0]) > 0
                await check_primary(connection)
            await self._check_layout(shared.layout)
        return found

    async def sample(self, reading: Reading, limit: int) -> Sample:
        """Up to `limit` keys that `select` lets through, from the beginning of a scan.

        With `member_key` every field lives as long as that key. Goes through so many pages only:
        where hardly a key matches, the sample may be smaller than it could be.
        """
        sample = Sample(RawBatch([], [], 0), [])
        async with self._open() as shared:
            for address in shared.layout.holders(reading.member_key):
                values = self._values(shared.primaries[address].connection, reading)
                await values.sample(reading, min(self._config.scan_count, limit), limit, sample)
        del sample.batch.keys[limit:], sample.batch.values[limit:], sample.ttls[limit:]
        return sample

    async def open_at(self, address: Address) -> tuple[Connection, Node]:
        """A connection of the caller's own to one of the primaries, and who that is."""
        connection = await connect(address, self._access)
        try:
            return connection, await self._describe(connection)
        except BaseException:
            await connection.close()
            raise

    async def open_own(self) -> tuple[Connection, Identity]:
        """A connection of the caller's own to the one primary, and who that is.

        Raises ConfigError: a cluster has several.
        """
        if self._config.cluster:
            raise ConfigError("live mode isn't available for a cluster yet (redis.cluster = true)")
        layout = await self._locate()
        connection, node = await self.open_at(layout.addresses[0])
        return connection, Identity((node,))

    async def check_own(self, connection: Connection, identity: Identity) -> None:
        """Raise SourceChanged unless that connection still leads to the same, untouched primary."""
        identity.check(await self._describe(connection))
        await self._check_layout(Layout((connection.address,)))

    async def scan(
        self, reading: Reading, *, identity: Identity | None = None
    ) -> AsyncGenerator[RawBatch, None]:
        """Read every key (with `member_key`, field) that was there throughout, some of them twice.

        Close it if you leave it early (`contextlib.aclosing`). It reads on while a batch is being
        used, a bounded number of bytes ahead.

        Args:
            reading: what to read.
            identity: who has to answer; anyone else is a SourceChanged.

        Raises:
            SourceChanged: another server, role, connection, database or share of slots than at the
                beginning, or the connection was lost. Also after the last batch.
            MappingFailed: `member_key` holds another type.
        """
        async with self._holders(reading, identity) as (_, primaries):
            connections = [primary.connection for primary in primaries.values()]
            async with aclosing(self._read(connections, reading)) as batches:
                async for batch in batches:
                    yield batch

    @asynccontextmanager
    async def writing(
        self, reading: Reading, *, identity: Identity | None = None
    ) -> AsyncIterator[Writing]:
        """Connections of one's own to write a mapping's records by, for the length of a block.

        Raises SourceChanged as `scan` does, at the end of the block, too: what was written may then
        be on a server that is none any more.
        """
        async with self._holders(reading, identity) as (layout, primaries):
            values = {a: self._values(p.connection, reading) for a, p in primaries.items()}
            pace = Pace(self._config.max_keys_per_second, self._config.scan_count)
            yield Writing(layout, values, reading, pace)

    @asynccontextmanager
    async def _holders(
        self, reading: Reading, identity: Identity | None
    ) -> AsyncIterator[tuple[Layout, dict[Address, _Primary]]]:
        """Connections to those who hold the keys, who have to be the same ones at the end."""
        async with AsyncExitStack() as stack:
            primaries: dict[Address, _Primary] = {}
            try:
                layout = await self._locate()
                for address in layout.holders(reading.member_key):
                    primaries[address] = await self._connect(address, stack)
                before = [primary.node for primary in primaries.values()]
                check_settled(before, whole=reading.member_key is None)
                if identity:
                    for node in before:
                        identity.check(node)
                for primary in primaries.values():
                    await primary.connection.measure()
                yield layout, primaries
                after = [await self._describe(p.connection) for p in primaries.values()]
                for earlier, later in zip(before, after, strict=True):
                    earlier.check_same(later)
                check_settled(after, whole=reading.member_key is None)
                await self._check_layout(layout)
            except RedisUnavailable as error:
                if any(primary.connection.lost for primary in primaries.values()):
                    raise SourceChanged(f"{error} in mid-run") from error
                raise

    async def _read(
        self, connections: list[Connection], reading: Reading
    ) -> AsyncGenerator[RawBatch, None]:
        pace = Pace(self._config.max_keys_per_second, self._config.scan_count)
        ready: asyncio.Queue[Ready] = asyncio.Queue()
        walks = [
            asyncio.create_task(self._values(connection, reading).walk(reading, pace, ready))
            for connection in connections
        ]
        for walk in walks:
            walk.add_done_callback(lambda _: ready.put_nowait(None))
        batch, weight, running = RawBatch([], [], 0), 0, len(walks)
        try:
            while running:
                item = await ready.get()
                if item is None:
                    running -= 1
                    for walk in walks:
                        if walk.done():
                            walk.result()
                    continue
                values, piece = item
                found, size = await values.receive(piece)
                values.room.release()
                batch.keys += piece.keys
                batch.values += found
                batch.scanned += len(piece.keys) + piece.ignored
                weight += size
                if len(batch.keys) >= pace.count or weight >= _BATCH_BYTES:
                    yield batch
                    batch, weight = RawBatch([], [], 0), 0
            if batch.scanned:
                yield batch
        finally:
            for walk in walks:
                walk.cancel()
            await asyncio.gather(*walks, return_exceptions=True)

    def _fetching(self, primary: _Primary, reading: Reading) -> Values:
        kind = (reading.type, reading.match, reading.fields, reading.member_key)
        if kind not in primary.fetching:
            primary.fetching[kind] = self._values(primary.connection, reading)
        return primary.fetching[kind]

    def _values(self, connection: Connection, reading: Reading) -> Values:
        count = self._config.scan_count
        if reading.member_key is not None:
            return Members(connection, count, reading.member_key)
        limit = max(1, count // 2)
        if reading.type == "hash":
            return Hashes(connection, limit, reading.fields)
        return (ScatteredStrings if self._config.cluster else Strings)(connection, limit)

    async def _describe(self, connection: Connection) -> Node:
        return await describe(connection, clustered=self._config.cluster)

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[_Shared]:
        """The shared connections, made now if need be; nobody's next after what may pass."""
        async with self._opening:
            if self._shared and not self._shared.usable:
                await self._retire(self._shared)
            if self._shared is None:
                self._shared = await self._connect_shared()
            shared = self._shared
        shared.users += 1
        try:
            yield shared
        except Transient:
            # The primary may be another by now. Others may be in the middle of a question that
            # this server still answers: what is broken for them, too, tells them by itself.
            shared.retired = True
            raise
        finally:
            shared.users -= 1
            if shared.retired:
                await self._retire(shared)

    async def _retire(self, shared: _Shared) -> None:
        shared.retired = True
        if self._shared is shared:
            self._shared = None
        if not shared.users:
            await shared.close()

    async def _connect_shared(self) -> _Shared:
        async with AsyncExitStack() as stack:
            layout = await self._locate()
            primaries = {a: await self._connect(a, stack) for a in layout.addresses}
            stack.pop_all()
            return _Shared(layout, primaries)

    async def _connect(self, address: Address, stack: AsyncExitStack) -> _Primary:
        connection = await connect(address, self._access)
        stack.push_async_callback(connection.close)
        return _Primary(connection, await self._describe(connection))

    async def _check_layout(self, layout: Layout) -> None:
        """Raise SourceChanged if the Sentinels name another primary than before.

        They make a primary that they have replaced a replica only ten seconds later.
        """
        if self._config.sentinel and await self._locate() != layout:
            raise SourceChanged(f"the Sentinels have replaced Redis at {layout.addresses[0]}")

    async def _locate(self) -> Layout:
        config = self._config
        if config.sentinel:
            sentinels = [Address(host, port) for host, port in config.sentinel_addresses]
            found = await ask_sentinels(sentinels, self._access, config.sentinel_service)
            return Layout((found,))
        if not config.cluster:
            return Layout((self._address,))
        # The node that the URL names may be away: then one that was met before can tell.
        layout = await ask_cluster([self._address, *self._known], self._access)
        self._known = layout.addresses
        return layout
