"""Redis, where the balances live: standalone, found through Sentinels, or a cluster.

    async with Source(config.redis) as source:
        async with aclosing(source.scan(reading)) as batches:
            async for batch in batches: ...

A scan that ends in good order has been answered by one server, or by one set of a cluster's
primaries, from the first page to the last; anything else raises. Its connections are its own. All
else shares one connection a primary, made when it's needed and thrown away when anything fails, so
a Source can be made before Redis is up and outlives its restarts. Nothing is ever asked twice.

The rights it takes: SCAN, MGET (in a cluster GET), TYPE; for hashes HMGET, EVAL_RO (EVAL before
Redis 7; both may be forbidden), with `member` HSCAN and HEXISTS; EXISTS, PTTL, PING; and those
that `nodes` names. `connection` tells what each error leads to.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Final, Self

from redis.crc import key_slot

from balancesync.config import RedisConfig
from balancesync.connection import Address, Connection, connect, parse
from balancesync.errors import RedisUnavailable, SourceChanged, Transient
from balancesync.model import RawBatch, RawValue
from balancesync.nodes import (
    ALL_SLOTS,
    Facts,
    Node,
    ask_cluster,
    ask_sentinels,
    describe,
    facts_of,
)
from balancesync.reading import (
    Hashes,
    Members,
    Pace,
    Reading,
    Ready,
    ScatteredStrings,
    Strings,
    Values,
)

_BATCH_BYTES: Final = 4_000_000
_EXISTS_PIECE: Final = 500
_SAMPLE_PAGES: Final = 100


@dataclass(frozen=True, slots=True)
class Identity:
    """Who Redis is at a moment: its primaries, in the order of their addresses."""

    nodes: tuple[Node, ...]

    @property
    def run_id(self) -> str:
        """New whenever a server was started again; a cluster's are joined by commas."""
        return ",".join(sorted(self.run_ids))

    @property
    def run_ids(self) -> set[str]:
        """Each primary's."""
        return {node.run_id for node in self.nodes}

    @property
    def server(self) -> str:
        """Either redis or valkey."""
        return self.nodes[0].server

    @property
    def version(self) -> str:
        """The oldest of its primaries' versions."""
        return min(self.nodes, key=lambda node: node.release).version

    @property
    def dbsize(self) -> int:
        """The keys of all primaries, of every kind."""
        return sum(node.dbsize for node in self.nodes)


@dataclass(frozen=True, slots=True)
class Sample:
    """Some keys with their values and milliseconds to live, None for a key that stays."""

    batch: RawBatch
    ttls: list[int | None]


@dataclass(frozen=True, slots=True)
class _Primary:
    connection: Connection
    node: Node


class Source:
    """Redis as `config` names it. Every method that speaks to it raises what `connection` lists."""

    def __init__(self, config: RedisConfig) -> None:
        """Connects to nothing yet. Raises ConfigError: the URL's ssl_ files can't be used."""
        self._config = config
        self._address, self._access = parse(
            config.url.get_secret_value(), timeout=config.timeout, clustered=config.cluster
        )
        self._primaries: dict[Address, _Primary] = {}
        self._owners: list[Address] = []
        self._known: tuple[Address, ...] = ()
        self._opening = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the shared connections; a later call makes new ones."""
        primaries, self._primaries = self._primaries, {}
        for primary in primaries.values():
            await primary.connection.close()

    async def identity(self) -> Identity:
        """Who Redis is now."""
        async with self._open() as primaries:
            return Identity(tuple([await self._describe(p.connection) for p in primaries.values()]))

    async def dbsize(self) -> dict[str, int]:
        """The number of keys of each primary by its address, of every kind."""
        async with self._open() as primaries:
            return {str(a): await p.connection.call(b"DBSIZE") for a, p in primaries.items()}

    async def ping(self) -> float:
        """Seconds that the slowest primary takes to answer."""
        async with self._open() as primaries:
            loop = asyncio.get_running_loop()
            slowest = 0.0
            for primary in primaries.values():
                start = loop.time()
                await primary.connection.call(b"PING")
                slowest = max(slowest, loop.time() - start)
            return slowest

    async def facts(self) -> tuple[Facts, ...]:
        """What `check` and the metrics want to know of each primary."""
        async with self._open() as primaries:
            return tuple(
                [
                    await facts_of(p.connection, await self._describe(p.connection))
                    for p in primaries.values()
                ]
            )

    async def fetch(self, reading: Reading, keys: list[bytes]) -> RawBatch:
        """Read `keys` (with `member_key`, fields) again, all in one batch; `select` isn't asked.

        Raises RunFailed if `member_key` holds another type, SourceChanged if slots moved.
        """
        values: list[RawValue] = [None] * len(keys)
        async with self._open() as primaries:
            for primary, places in self._divide(primaries, reading, keys):
                reader = self._values(primary, reading)
                found = await reader.read([keys[at] for at in places])
                for at, value in zip(places, found, strict=True):
                    values[at] = value
                # A primary that has become a replica goes on answering, from the past.
                await self._describe(primary.connection)
        return RawBatch(keys, values, len(keys))

    async def exists(self, reading: Reading, keys: list[bytes]) -> list[bool]:
        """Whether each of `keys` (with `member_key`, fields) is there, of whatever type."""
        found = [False] * len(keys)
        big = reading.member_key
        command = (b"EXISTS",) if big is None else (b"HEXISTS", big)
        async with self._open() as primaries:
            for primary, places in self._divide(primaries, reading, keys):
                connection, values = primary.connection, self._values(primary, reading)
                for start in range(0, len(places), _EXISTS_PIECE):
                    piece = places[start : start + _EXISTS_PIECE]
                    replies = await connection.pipeline([(*command, keys[at]) for at in piece])
                    for at, reply in zip(piece, replies, strict=True):
                        found[at] = await values.checked(reply, command[0]) > 0
                await self._describe(connection)
        return found

    async def sample(self, reading: Reading, limit: int) -> Sample:
        """Up to `limit` keys that `select` lets through, from the beginning of a scan.

        With `member_key` every field lives as long as that key. Goes through so many pages only:
        where hardly a key matches, the sample may be smaller than it could be.
        """
        sample = Sample(RawBatch([], [], 0), [])
        async with self._open() as primaries:
            for primary in self._asked(primaries, reading.member_key):
                await self._sample(primary, reading, limit, sample)
        del sample.batch.keys[limit:], sample.batch.values[limit:], sample.ttls[limit:]
        return sample

    async def scan(
        self, reading: Reading, *, identity: Identity | None = None
    ) -> AsyncIterator[RawBatch]:
        """Read every key (with `member_key`, field) that was there throughout, some of them twice.

        Close it if you leave it early (`contextlib.aclosing`). It reads on while a batch is being
        used, a bounded number of bytes ahead.

        Args:
            reading: what to read.
            identity: who has to answer; anyone else is a SourceChanged.

        Raises:
            SourceChanged: another server, role, connection, database or share of slots than at the
                beginning, or the connection was lost. Also after the last batch.
            RunFailed: `member_key` holds another type.
        """
        async with AsyncExitStack() as stack:
            connections: list[Connection] = []
            try:
                for address in await self._resolve(reading.member_key):
                    connection = await connect(address, self._access)
                    stack.push_async_callback(connection.close)
                    connections.append(connection)
                primaries = [_Primary(c, await self._describe(c)) for c in connections]
                for primary in primaries:
                    primary.node.check_settled()
                    if identity and primary.node.run_id not in identity.run_ids:
                        raise SourceChanged(f"Redis at {primary.node.address} was restarted")
                async for batch in self._read(primaries, reading):
                    yield batch
                for primary in primaries:
                    after = await self._describe(primary.connection)
                    primary.node.check_same(after)
                    after.check_settled()
            except RedisUnavailable as error:
                if any(connection.lost for connection in connections):
                    raise SourceChanged(f"{error} during the scan") from error
                raise

    async def _read(self, primaries: list[_Primary], reading: Reading) -> AsyncIterator[RawBatch]:
        pace = Pace(self._config.max_keys_per_second, self._config.scan_count)
        ready: asyncio.Queue[Ready] = asyncio.Queue()
        walks = [
            asyncio.create_task(self._values(primary, reading).walk(reading, pace, ready))
            for primary in primaries
        ]
        for walk in walks:
            walk.add_done_callback(lambda _: ready.put_nowait(None))
        batch, weight, running = RawBatch([], [], 0), 0, len(walks)
        try:
            while running:
                item = await ready.get()
                if item is None:
                    running -= 1
                    _raise_failure(walks)
                    continue
                values, piece = item
                found, size = await values.receive(piece)
                values.room.release()
                batch.keys += piece.keys
                batch.values += found
                batch.scanned += piece.scanned
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

    async def _sample(
        self, primary: _Primary, reading: Reading, limit: int, sample: Sample
    ) -> None:
        values, pace = self._values(primary, reading), Pace(0, min(self._config.scan_count, limit))
        connection, cursor, pages = primary.connection, b"", 0
        while cursor != b"0" and pages < _SAMPLE_PAGES and len(sample.ttls) < limit:
            asked = values.ask_page(cursor or b"0", reading, values.page_size(pace))
            cursor, page = await values.receive_page(asked)
            pages += 1
            for piece in values.asked(page, reading):
                found, _ = await values.receive(piece)
                big = reading.member_key
                named = piece.keys if big is None else [big] * len(piece.keys)
                ttls = await connection.pipeline([(b"PTTL", key) for key in named])
                sample.batch.keys.extend(piece.keys)
                sample.batch.values.extend(found)
                sample.batch.scanned += piece.scanned
                for ttl in ttls:
                    left = connection.check(ttl, b"PTTL")
                    sample.ttls.append(left if left >= 0 else None)
                if len(sample.ttls) >= limit:
                    break

    def _values(self, primary: _Primary, reading: Reading) -> Values:
        connection, count = primary.connection, self._config.scan_count
        if reading.member_key is not None:
            return Members(connection, count, reading.member_key)
        limit = max(1, count // 2)
        if reading.type == "hash":
            scripts = [b"EVAL_RO"] if primary.node.release >= (7,) else [b"EVAL"]
            return Hashes(
                connection, limit, reading.fields, [] if self._config.cluster else scripts
            )
        return (ScatteredStrings if self._config.cluster else Strings)(connection, limit)

    async def _describe(self, connection: Connection) -> Node:
        return await describe(connection, clustered=self._config.cluster)

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[dict[Address, _Primary]]:
        """The shared connections, made now if need be; gone after anything that may pass."""
        async with self._opening:
            if not all(p.connection.usable for p in self._primaries.values()):
                await self.close()
            if not self._primaries:
                await self._connect_shared()
        try:
            yield self._primaries
        except Transient:
            await self.close()
            raise

    async def _connect_shared(self) -> None:
        async with AsyncExitStack() as stack:
            primaries = {}
            for address in await self._resolve():
                connection = await connect(address, self._access)
                stack.push_async_callback(connection.close)
                primaries[address] = _Primary(connection, await self._describe(connection))
            stack.pop_all()
            self._primaries = primaries

    async def _resolve(self, member_key: bytes | None = None) -> list[Address]:
        """Where the primaries are now; with `member_key` the one that holds this key."""
        config = self._config
        if config.sentinel:
            sentinels = [Address(host, port) for host, port in config.sentinel_addresses]
            return [await ask_sentinels(sentinels, self._access, config.sentinel_service)]
        if not config.cluster:
            return [self._address]
        # The node that the URL names may be away: then one that was met before can tell.
        slots = await ask_cluster([self._address, *self._known], self._access)
        self._known = tuple(slots)
        self._owners = [self._address] * ALL_SLOTS
        for address, ranges in slots.items():
            for first, last in ranges:
                self._owners[first : last + 1] = [address] * (last - first + 1)
        return list(slots) if member_key is None else [self._owners[key_slot(member_key)]]

    def _asked(self, primaries: dict[Address, _Primary], key: bytes | None) -> list[_Primary]:
        """The primaries that a key may be on; all for None."""
        if key is None or not self._config.cluster:
            return list(primaries.values())
        return [primaries[self._owners[key_slot(key)]]]

    def _divide(
        self, primaries: dict[Address, _Primary], reading: Reading, keys: list[bytes]
    ) -> list[tuple[_Primary, list[int]]]:
        """Which of `keys` each primary holds, by their places."""
        if not self._config.cluster or reading.member_key is not None:
            return [(self._asked(primaries, reading.member_key)[0], list(range(len(keys))))]
        places: dict[Address, list[int]] = {}
        for at, key in enumerate(keys):
            places.setdefault(self._owners[key_slot(key)], []).append(at)
        return [(primaries[address], found) for address, found in places.items()]


def _raise_failure(walks: list[asyncio.Task[None]]) -> None:
    for walk in walks:
        if walk.done():
            walk.result()
