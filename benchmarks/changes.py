"""An application that changes balances at a pace, and a watch that times how they follow."""

import asyncio
import random
import socket
from time import perf_counter
from typing import Any, Final
from urllib.parse import urlsplit

import asyncpg

from benchmarks.data import amount

# Coprime to every number of keys that is round: goes through all of them before any comes again.
_STRIDE: Final = 7_368_787
_BEAT_S: Final = 0.02
_LOOK_S: Final = 0.004
_LAST_S: Final = 60.0
_CHUNK: Final = 1 << 16
_CENT: Final = 100


def _set(number: int, value: bytes) -> bytes:
    key = b"balance:%d" % number
    return b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(key), key, len(value), value)


def connect(url: str) -> socket.socket:
    """A plain socket to Redis that sends at once."""
    parts = urlsplit(url)
    made = socket.create_connection((str(parts.hostname), int(parts.port or 0)))
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


async def spend(
    *,
    url: str,
    keys: int,
    rate: int,
    seconds: float,
    connections: int,
    depth: int,
    seed: int,
    distinct: bool,
) -> dict[str, Any]:
    """Set balances at `rate` a second: over so many connections, `depth` at a time on each.

    `distinct`: no key twice before all had their turn; else at random. Tells how many were set, in
    how many seconds, and by how much it fell behind its pace at the most.
    """
    sockets = [connect(url) for _ in range(connections)]
    chance = random.Random(seed)  # noqa: S311  # any will do
    at_once = connections * depth
    rounds = int(rate * seconds / at_once)
    written, behind = 0, 0.0
    begun = perf_counter()
    for turn in range(rounds):
        due = begun + turn * at_once / rate
        left = due - perf_counter()
        if left > 0:
            await asyncio.sleep(left)
        behind = max(behind, -left)
        for each in sockets:
            packed = []
            for _ in range(depth):
                number = written * _STRIDE if distinct else chance.randrange(keys)
                packed.append(_set(1 + number % keys, amount(written, seed)))
                written += 1
            each.sendall(b"".join(packed))
        for each in sockets:
            owed = depth * len(b"+OK\r\n")
            while owed > 0:
                owed -= len(each.recv(_CHUNK))
    return {"written": written, "seconds": perf_counter() - begun, "behind": behind}


async def watch(url: str, dsn: str, key: int, seconds: float) -> dict[str, Any]:
    """Set one balance fifty times a second; how long each took to be seen in PostgreSQL.

    A balance that was followed by the next before it was seen counts, too: when that one is seen.
    """
    redis = connect(url)
    connection = await asyncpg.connect(dsn)
    look = await connection.prepare("SELECT balance FROM balances WHERE user_id = $1")
    sent: list[float] = []
    took: list[float] = []
    begun = perf_counter()
    base = int(begun) * _CENT * _CENT
    while len(took) < len(sent) or perf_counter() < begun + seconds:
        now = perf_counter()
        if now < begun + seconds and now >= begun + len(sent) * _BEAT_S:
            sent.append(now)
            cents = base + len(sent)
            redis.sendall(_set(key, b"%d.%02d" % divmod(cents, _CENT)))
            redis.recv(_CHUNK)
        seen = await look.fetchval(key)
        now = perf_counter()
        count = max(0, int((seen or 0) * _CENT) - base)
        took += [now - at for at in sent[len(took) : count]]
        if now > begun + seconds + _LAST_S:
            raise RuntimeError(f"{len(sent) - len(took)} changes never came")
        await asyncio.sleep(_LOOK_S)
    await connection.close()
    return {"took": took}
