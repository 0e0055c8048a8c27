"""The least that following changes takes: to be told of them, and to read each changed key once."""

import select
import sys
from time import perf_counter
from typing import Any, Final

import hiredis

from benchmarks.changes import connect
from benchmarks.data import pack

_CHANNEL: Final = b"__redis__:invalidate"
# As in live mode: rests between two looks, and the keys of one MGET.
_REST_S: Final = 0.01
_PIECE: Final = 500
_CHUNK: Final = 1 << 18


class _Client:
    """A plain socket to Redis, and a parser."""

    def __init__(self, url: str) -> None:
        self._socket = connect(url)
        self._reader = hiredis.Reader(notEnoughData=Ellipsis)

    def ask(self, *words: bytes) -> Any:
        """One command and its reply."""
        self._socket.sendall(pack(words))
        while (reply := self._reader.gets()) is Ellipsis:
            self._reader.feed(self._socket.recv(_CHUNK))
        if isinstance(reply, hiredis.ReplyError):
            raise reply
        return reply

    def told(self) -> list[bytes]:
        """The keys told since the last look."""
        self._socket.setblocking(False)
        found: list[bytes] = []
        try:
            while True:
                self._reader.feed(self._socket.recv(_CHUNK))
        except BlockingIOError:
            while (message := self._reader.gets()) is not Ellipsis:
                found += message[2]
        self._socket.setblocking(True)
        return found


async def hear(url: str, interval: float) -> dict[str, int]:
    """Read each key that changed once in `interval` seconds, until stdin ends; nothing else.

    Tells how many keys were told, and how many read.
    """
    hearing, asking = _Client(url), _Client(url)
    number = hearing.ask(b"CLIENT", b"ID")
    hearing.ask(b"SUBSCRIBE", _CHANNEL)
    words = b"CLIENT TRACKING ON REDIRECT %d BCAST PREFIX balance:" % number
    asking.ask(*words.split())
    changed: set[bytes] = set()
    told = read = 0
    due = perf_counter() + interval
    while not select.select([sys.stdin], [], [], _REST_S)[0]:
        keys = hearing.told()
        told += len(keys)
        changed.update(keys)
        if perf_counter() < due:
            continue
        due += interval
        wanted = list(changed)
        changed.clear()
        for at in range(0, len(wanted), _PIECE):
            read += len(asking.ask(b"MGET", *wanted[at : at + _PIECE]))
    return {"told": told, "read": read}
