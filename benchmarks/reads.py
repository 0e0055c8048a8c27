"""Floors of reading: what Redis and a plain client need for the same keys, parsing nothing."""

import socket
from contextlib import aclosing
from time import perf_counter
from urllib.parse import urlsplit

import hiredis
from pydantic import SecretStr
from redis.asyncio import Redis

from balancesync.config import RedisConfig
from balancesync.reading import Reading
from balancesync.source import Source
from benchmarks.data import pack

COUNT = 1000


async def bare_read(url: str, match: str | None) -> dict[str, float]:
    """SCAN and MGET by redis-py: the next page and the values of this one in one pipeline."""
    async with Redis.from_url(url, protocol=2, decode_responses=False) as client:
        await client.ping()
        begun = perf_counter()
        found = 0
        cursor, keys = await client.scan(0, match=match, count=COUNT)
        while cursor or keys:
            pipeline = client.pipeline(transaction=False)
            if cursor:
                pipeline.scan(cursor, match=match, count=COUNT)
            if keys:
                pipeline.mget(keys)
            replies = await pipeline.execute()
            page = replies[0] if cursor else (0, [])
            if keys:
                found += len(replies[-1])
            cursor, keys = page
        return {"seconds": perf_counter() - begun, "found": found}


async def source_read(
    url: str,
    match: str | None,
    kind: str = "string",
    fields: tuple[str, ...] = (),
    member: str | None = None,
) -> dict[str, float]:
    """The same by balancesync's own reading, which also proves that one server answered it all."""
    reading = Reading(
        "hash" if kind == "hash" else "string",
        match.encode() if match else None,
        tuple(name.encode() for name in fields),
        member.encode() if member else None,
    )
    async with Source(RedisConfig(url=SecretStr(url))) as source:
        await source.ping()
        begun = perf_counter()
        found = 0
        async with aclosing(source.scan(reading)) as batches:
            async for batch in batches:
                found += len(batch.keys)
        return {"seconds": perf_counter() - begun, "found": found}


async def hmget(url: str, match: str, fields: tuple[str, ...]) -> dict[str, float]:
    """SCAN, and for each page a pipeline of HMGETs, by redis-py."""
    async with Redis.from_url(url, protocol=2, decode_responses=False) as client:
        await client.ping()
        begun = perf_counter()
        found = 0
        cursor: int | None = None
        while cursor != 0:
            cursor, keys = await client.scan(cursor or 0, match=match, count=COUNT)
            pipeline = client.pipeline(transaction=False)
            for key in keys:
                pipeline.hmget(key, list(fields))
            found += len(await pipeline.execute()) if keys else 0
        return {"seconds": perf_counter() - begun, "found": found}


async def raw_hmget(url: str, match: str, fields: tuple[str, ...]) -> dict[str, float]:
    """The same commands joined by hand on a plain socket, one page ahead: the limit of reading."""
    parts = urlsplit(url)
    names = b"".join(b"$%d\r\n%b\r\n" % (len(name), name.encode()) for name in fields)
    head = b"*%d\r\n$5\r\nHMGET\r\n" % (2 + len(fields))
    reader = hiredis.Reader(notEnoughData=Ellipsis)
    with socket.create_connection((str(parts.hostname), int(parts.port or 0))) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def ask_page(cursor: bytes) -> bytes:
            return pack((b"SCAN", cursor, b"MATCH", match.encode(), b"COUNT", b"%d" % COUNT))

        def receive() -> object:
            while (reply := reader.gets()) is Ellipsis:
                reader.feed(client.recv(1 << 18))
            return reply

        begun = perf_counter()
        found = 0
        client.sendall(ask_page(b"0"))
        cursor, waiting = b"", 0
        while cursor != b"0":
            page = receive()
            assert isinstance(page, list)
            cursor, keys = page
            for _ in range(waiting):
                receive()
            commands = [b"%b$%d\r\n%b\r\n%b" % (head, len(key), key, names) for key in keys]
            # The page's values behind the next page: its keys are there when they are read.
            asked = ask_page(cursor) if cursor != b"0" else b""
            client.sendall(asked + b"".join(commands))
            waiting = len(keys)
            found += waiting
        for _ in range(waiting):
            receive()
        return {"seconds": perf_counter() - begun, "found": found}


async def hscan(url: str, key: str) -> dict[str, float]:
    """HSCAN by redis-py."""
    async with Redis.from_url(url, protocol=2, decode_responses=False) as client:
        await client.ping()
        begun = perf_counter()
        found = 0
        cursor: int | None = None
        while cursor != 0:
            cursor, fields = await client.hscan(key, cursor or 0, count=COUNT)
            found += len(fields)
        return {"seconds": perf_counter() - begun, "found": found}
