"""Floors of writing, and how others write: what PostgreSQL and Redis need for the same rows."""

import socket
from datetime import UTC, datetime
from decimal import Decimal
from io import BytesIO
from time import perf_counter
from typing import Any, Final
from urllib.parse import urlsplit

import asyncpg
from redis.asyncio import Redis

from benchmarks.data import amount, sql_cents
from benchmarks.reads import COUNT

_PIECE: Final = 1 << 20
# As in balancesync's own session: the same memory, no JIT.
_SESSION: Final = {"work_mem": "64MB", "temp_buffers": "32MB", "jit": "off"}


async def copy(dsn: str, keys: int, seed: int) -> dict[str, float]:
    """COPY of ready-made lines into a temporary table, a megabyte at a time."""
    lines = [b"%d\t%b\n" % (number, amount(number, seed)) for number in range(1, keys + 1)]
    size = max(1, _PIECE // len(lines[-1]))
    pieces = [b"".join(lines[at : at + size]) for at in range(0, keys, size)]
    connection = await asyncpg.connect(dsn, server_settings=_SESSION)
    await connection.execute("CREATE TEMP TABLE staged (k bigint, v numeric)")
    begun = perf_counter()
    for piece in pieces:
        await connection.copy_to_table("staged", source=BytesIO(piece), format="text")
    seconds = perf_counter() - begun
    await connection.close()
    return {"seconds": seconds}


async def _stage(dsn: str, keys: int, seed: int) -> asyncpg.Connection:
    """A session with all rows staged, in no order, as a scan brings them."""
    connection = await asyncpg.connect(dsn, server_settings=_SESSION)
    await connection.execute(
        f"""CREATE TEMP TABLE staged AS
            SELECT n AS k, ({sql_cents("n", seed)})::numeric / 100 AS v
            FROM generate_series(1, {keys}::bigint) AS n ORDER BY hashint8(n)"""
    )
    await connection.execute("ANALYZE staged")
    return connection


async def insert(dsn: str, table: str, keys: int, seed: int) -> dict[str, float]:
    """One INSERT of all staged rows in key order into an empty table with a primary key."""
    connection = await _stage(dsn, keys, seed)
    begun = perf_counter()
    await connection.execute(f"INSERT INTO {table} SELECT k, v, now() FROM staged ORDER BY k")
    seconds = perf_counter() - begun
    await connection.close()
    return {"seconds": seconds}


async def update(dsn: str, table: str, keys: int, seed: int) -> dict[str, float]:
    """One UPDATE of all rows from the staged ones."""
    connection = await _stage(dsn, keys, seed)
    begun = perf_counter()
    await connection.execute(
        f"UPDATE {table} AS t SET balance = s.v, synced_at = now()"
        " FROM staged AS s WHERE t.user_id = s.k"
    )
    seconds = perf_counter() - begun
    await connection.close()
    return {"seconds": seconds}


async def script(url: str, dsn: str, table: str) -> dict[str, float]:
    """The good short script: SCAN, MGET and one INSERT ... ON CONFLICT for each thousand keys."""
    sql = f"""
        INSERT INTO {table} AS t (user_id, balance, synced_at)
        SELECT k, v, now() FROM unnest($1::bigint[], $2::numeric[]) AS s (k, v)
        ON CONFLICT (user_id) DO UPDATE
        SET balance = EXCLUDED.balance, synced_at = EXCLUDED.synced_at
        WHERE t.balance IS DISTINCT FROM EXCLUDED.balance"""
    connection = await asyncpg.connect(dsn)
    found = 0
    async with Redis.from_url(url, protocol=2, decode_responses=False) as client:
        await client.ping()
        begun = perf_counter()
        cursor: int | None = None
        while cursor != 0:
            cursor, keys = await client.scan(cursor or 0, match="balance:*", count=COUNT)
            # A page may hold a key twice, and ON CONFLICT takes a row once.
            keys = list(dict.fromkeys(keys))
            values: list[Any] = await client.mget(keys) if keys else []
            pairs = [
                (int(key[8:]), Decimal(value.decode()))
                for key, value in zip(keys, values, strict=True)
                if value is not None
            ]
            await connection.execute(sql, [key for key, _ in pairs], [value for _, value in pairs])
            found += len(pairs)
        seconds = perf_counter() - begun
    await connection.close()
    return {"seconds": seconds, "found": found}


async def sets(url: str, keys: int, seed: int) -> dict[str, float]:
    """SETs by redis-py, a thousand in a pipeline; the values are made beforehand."""
    values = {f"balance:{number}": amount(number, seed) for number in range(1, keys + 1)}
    items = list(values.items())
    async with Redis.from_url(url, protocol=2, decode_responses=False) as client:
        await client.ping()
        begun = perf_counter()
        for start in range(0, keys, COUNT):
            pipeline = client.pipeline(transaction=False)
            for key, value in items[start : start + COUNT]:
                pipeline.set(key, value)
            await pipeline.execute()
        return {"seconds": perf_counter() - begun}


async def raw_sets(url: str, keys: int, seed: int) -> dict[str, float]:
    """The same joined by hand on a plain socket, one pipeline ahead: the limit of writing."""
    parts = urlsplit(url)
    values = [(b"balance:%d" % number, amount(number, seed)) for number in range(1, keys + 1)]
    form = b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n"
    with socket.create_connection((str(parts.hostname), int(parts.port or 0))) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def receive(count: int) -> None:
            left = len(b"+OK\r\n") * count
            while left:
                left -= len(client.recv(min(left, 1 << 18)))

        begun, waiting = perf_counter(), 0
        for start in range(0, keys, COUNT):
            piece = values[start : start + COUNT]
            client.sendall(b"".join([form % (len(k), k, len(v), v) for k, v in piece]))
            receive(waiting)
            waiting = len(piece)
        receive(waiting)
        return {"seconds": perf_counter() - begun}


async def orm(dsn: str, table: str, keys: int, sample: int, seed: int) -> dict[str, float]:
    """A SELECT, an UPDATE and a COMMIT for each user, by SQLAlchemy's ORM, values at hand."""
    from sqlalchemy import BigInteger, DateTime, Numeric, select  # noqa: PLC0415
    from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine  # noqa: PLC0415
    from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column  # noqa: PLC0415

    class Base(DeclarativeBase):
        pass

    class Balance(Base):
        __tablename__ = table
        user_id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
        balance: Mapped[Decimal] = mapped_column(Numeric(20, 2))
        synced_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))

    engine = create_async_engine(dsn.replace("postgresql:", "postgresql+asyncpg:"))
    step = max(1, keys // sample)
    values = {number: Decimal(amount(number, seed).decode()) for number in range(1, keys + 1, step)}
    async with AsyncSession(engine) as session:
        await session.execute(select(Balance).limit(1))
        await session.commit()
        begun = perf_counter()
        for number, value in values.items():
            found = await session.execute(select(Balance).where(Balance.user_id == number))
            row = found.scalar_one()
            row.balance = value
            row.synced_at = datetime.now(UTC)
            await session.commit()
        seconds = perf_counter() - begun
    await engine.dispose()
    return {"seconds": seconds * keys / len(values), "sample": len(values)}
