"""Clients of an HTTP server over keep-alive connections: at a pace, or as fast as it answers.

They speak HTTP by hand, to take little of the CPUs that they share with what is measured.
"""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Any, Final, cast

import asyncpg
from redis.asyncio import Redis

from balancesync.server import HOST
from benchmarks.data import STRINGS

SYNC: Final = b"POST /sync-management/force-sync?wait=true"
_BALANCE: Final = b"GET /sync-management/balances/%b/" % STRINGS.mapping["name"].encode()
_OK: Final = 200
# As many as balancesync has at its defaults.
_POOL: Final = 4


class Visit(asyncio.Protocol):
    """One connection, on which one request is under way at a time."""

    def __init__(self, port: int) -> None:
        self._rest = b" HTTP/1.1\r\nHost: %b:%d\r\n\r\n" % (HOST.encode(), port)
        self._loop = asyncio.get_running_loop()
        self._answer: asyncio.Future[bytes] = self._loop.create_future()
        self._received = b""
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def to(cls, port: int) -> "Visit":
        """Connect."""
        loop = asyncio.get_running_loop()
        _, visit = await loop.create_connection(lambda: cls(port), HOST, port)
        return visit

    async def ask(self, asked: bytes) -> bytes:
        """Ask with this method and path; the body of an answer that is 200."""
        assert self._transport is not None
        self._answer = self._loop.create_future()
        self._transport.write(asked + self._rest)
        return await self._answer

    def close(self) -> None:
        """Hang up."""
        assert self._transport is not None
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, _, body = self._received.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        if not length or len(body) < int(length):
            return
        self._received = b""
        if int(head.split(maxsplit=2)[1]) == _OK:
            self._answer.set_result(body)
        else:
            self._answer.set_exception(ConnectionError(body.decode()))

    def connection_lost(self, error: Exception | None) -> None:
        if not self._answer.done():
            self._answer.set_exception(error or ConnectionError("the server hung up"))


async def pace(
    port: int, rate: float, seconds: float, paths: list[str], *, syncs: bool
) -> dict[str, Any]:
    """Ask for these paths in turn, `rate` times a second: how long each answer took.

    What is due is sent, on another connection, also while answers before it are out. `syncs`: the
    server is asked for one sync after the other meanwhile, and the last is waited for.
    """
    took: dict[str, list[float]] = {path: [] for path in paths}
    idle: list[Visit] = []
    runs: list[dict[str, Any]] = []

    async def ask(path: str) -> None:
        visit = idle.pop() if idle else await Visit.to(port)
        begun = perf_counter()
        await visit.ask(b"GET " + path.encode())
        took[path].append(perf_counter() - begun)
        idle.append(visit)

    async def sync() -> None:
        visit = await Visit.to(port)
        while syncs and perf_counter() < until:
            runs.append(json.loads(await visit.ask(SYNC)))

    begun = due = perf_counter()
    until = begun + seconds
    async with asyncio.TaskGroup() as group:
        syncing = group.create_task(sync())
        turn = 0
        while perf_counter() < until or not syncing.done():
            group.create_task(ask(paths[turn % len(paths)]))
            turn += 1
            due += 1 / rate
            await asyncio.sleep(max(0.0, due - perf_counter()))
    return {"took": took, "runs": runs, "from": begun, "to": perf_counter()}


async def balances(
    port: int, keys: int, at_once: int, seconds: float, source: str
) -> dict[str, Any]:
    """Read random balances on so many connections; each must come from `source`."""
    said = b'"source":"%b"' % source.encode()

    async def one() -> Callable[[], Awaitable[None]]:
        visit = await Visit.to(port)

        async def read() -> None:
            body = await visit.ask(_BALANCE + b"%d" % _number(keys))
            assert said in body, body

        return read

    return await _flood([await one() for _ in range(at_once)], seconds)


async def anything(port: int, at_once: int, seconds: float) -> dict[str, Any]:
    """Ask a bare server on so many connections."""

    async def one() -> Callable[[], Awaitable[bytes]]:
        visit = await Visit.to(port)
        return lambda: visit.ask(b"GET /")

    return await _flood([await one() for _ in range(at_once)], seconds)


async def redis_reads(url: str, keys: int, at_once: int, seconds: float) -> dict[str, Any]:
    """GET random balances by redis-py, so many at once."""
    async with Redis.from_url(url, protocol=2) as client:

        async def read() -> None:
            assert await client.get(f"balance:{_number(keys)}") is not None

        return await _flood([read] * at_once, seconds)


async def postgres_reads(dsn: str, keys: int, at_once: int, seconds: float) -> dict[str, Any]:
    """SELECT random balances by asyncpg with a pool, so many at once."""
    sql = "SELECT balance::text, synced_at FROM balances WHERE user_id = $1"
    async with asyncpg.create_pool(dsn, min_size=_POOL, max_size=_POOL) as pool:

        async def read() -> None:
            assert await pool.fetchrow(sql, _number(keys)) is not None

        return await _flood([read] * at_once, seconds)


def _number(keys: int) -> int:
    return random.randint(1, keys)  # noqa: S311  # no secret


async def _flood(reads: list[Callable[[], Awaitable[Any]]], seconds: float) -> dict[str, Any]:
    """Call each again as soon as it is done: how many a second, and how long each took."""
    took: list[float] = []
    begun = perf_counter()
    until = begun + seconds

    async def flood(read: Callable[[], Awaitable[Any]]) -> None:
        while (asked := perf_counter()) < until:
            await read()
            took.append(perf_counter() - asked)

    await asyncio.gather(*(flood(read) for read in reads))
    return {"rate": len(took) / (perf_counter() - begun), "took": took}
