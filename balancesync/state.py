"""What the daemon knows of itself and of both servers, and the events it tells of them."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from balancesync.continuity import Sighting
from balancesync.documents import Document
from balancesync.overview import Server
from balancesync.verdict import LiveState

Live = LiveState

_NOT_ASKED: Final = "not asked yet"
# A reader that lags behind by so many events is dropped: it holds up memory, and nobody else.
_BACKLOG: Final = 1000


@dataclass(slots=True)
class State:
    """The daemon at a moment. `leader_name` is whoever leads; None if nobody is known to.

    `seen` is what Redis last said of itself.

    Of live mode: why it is as it is, how many keys wait, when the last flush was, and how long its
    slowest change took, in seconds. Up to `followed_until`, by PostgreSQL's clock, it has brought
    over every change.
    """

    name: str
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    leader: bool = False
    leader_name: str | None = None
    ready: bool = False
    draining: bool = False
    redis: Server = field(default_factory=lambda: Server(connected=False, error=_NOT_ASKED))
    postgres: Server = field(default_factory=lambda: Server(connected=False, error=_NOT_ASKED))
    seen: Sighting | None = None
    live: Live = "off"
    live_reason: str | None = None
    live_pending: int = 0
    live_lag_s: float | None = None
    live_copied_at: datetime | None = None
    followed_until: datetime | None = None

    def remember_lags(self, lags: Sequence[float]) -> None:
        """Live mode has copied changes; `lags` are how long they took, in seconds."""
        if lags:
            self.live_lag_s, self.live_copied_at = max(lags), datetime.now(UTC)

    def forget_lags(self) -> None:
        """Live mode copies nothing for now."""
        self.live_lag_s = self.live_copied_at = None


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened: its kind, such as run_started, and what there is to say of it."""

    kind: str
    document: Document


class Events:
    """Hands each event to all who listen, and waits for nobody."""

    def __init__(self) -> None:
        self._readers: set[asyncio.Queue[Event | None]] = set()

    def publish(self, kind: str, document: Document) -> None:
        """Tell all listeners; one that lags too far behind hears the end of its stream instead."""
        event = Event(kind, document)
        for reader in list(self._readers):
            try:
                reader.put_nowait(event)
            except asyncio.QueueFull:
                self._drop(reader)

    def close(self) -> None:
        """End every listener's stream."""
        for reader in list(self._readers):
            self._drop(reader)

    def _drop(self, reader: asyncio.Queue[Event | None]) -> None:
        self._readers.discard(reader)
        while not reader.empty():
            reader.get_nowait()
        reader.put_nowait(None)

    @contextmanager
    def listen(self) -> Iterator[AsyncIterator[Event]]:
        """All events from now on; the stream ends when the daemon does or the listener lags."""
        reader: asyncio.Queue[Event | None] = asyncio.Queue(_BACKLOG)
        self._readers.add(reader)
        try:
            yield self._read(reader)
        finally:
            self._readers.discard(reader)

    @staticmethod
    async def _read(reader: asyncio.Queue[Event | None]) -> AsyncIterator[Event]:
        while (event := await reader.get()) is not None:
            yield event
