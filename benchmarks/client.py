"""Another client of the same Redis: one GET at a time, at a steady pace."""

import random
import socket
import time
from urllib.parse import urlsplit

import hiredis

from benchmarks.data import pack


async def gets(url: str, keys: int, rate: float, seconds: float) -> dict[str, list[float]]:
    """GET random balances `rate` times a second: when each was sent, and how long it took.

    What is late is sent at once, and each time is taken from the sending.
    """
    return _gets(url, keys, rate, seconds)


def _gets(url: str, keys: int, rate: float, seconds: float) -> dict[str, list[float]]:
    parts = urlsplit(url)
    reader = hiredis.Reader(notEnoughData=Ellipsis)
    sent, took = [], []
    with socket.create_connection((str(parts.hostname), int(parts.port or 0))) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        due = time.perf_counter()
        until = due + seconds
        while due < until:
            time.sleep(max(0.0, due - time.perf_counter()))
            due += 1 / rate
            key = b"balance:%d" % random.randint(1, keys)  # noqa: S311  # no secret
            packed = pack((b"GET", key))
            begun = time.perf_counter()
            connection.sendall(packed)
            while (reply := reader.gets()) is Ellipsis:
                reader.feed(connection.recv(1 << 16))
            took.append(time.perf_counter() - begun)
            sent.append(begun)
            assert isinstance(reply, bytes)
    return {"sent": sent, "took": took}
