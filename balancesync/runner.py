"""One run at a time: requests come in from everywhere, join where they can, and wait their turn."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final, Literal
from uuid import UUID

import structlog

from balancesync.config import Config
from balancesync.database import Database
from balancesync.documents import Document, run_document
from balancesync.model import Request, Run, new_run
from balancesync.part import Progress
from balancesync.report import Report
from balancesync.source import Source
from balancesync.sync import Sync

# Cron jobs of the same minute fire one after the other: the first waits so long for the others.
_COMPANY_S: Final = 1.0
# A progress event is for people: more often than this only costs.
_PROGRESS_S: Final = 0.5
_GRACE_S: Final = 30.0
# How long a verify waits for live mode, and how often it's looked whether that is up.
_LIVE_S: Final = 60.0
_POLL_S: Final = 0.1
_FLUSH_S: Final = 10.0
# A day of hourly runs, with some to spare.
_MOST_UNRECORDED: Final = 100

Publish = Callable[[str, Document], None]

log = structlog.get_logger("balancesync")


@dataclass(eq=False, slots=True)
class Ticket:
    """A request under way, from its arrival to its end; several requests may share one."""

    request: Request
    run: Run
    due: float
    done: asyncio.Future[Run] = field(default_factory=asyncio.Future)
    progress: Progress | None = None
    reports: list[Report] = field(default_factory=list)

    @property
    def kind(self) -> tuple[Any, ...]:
        """Requests of one kind can share a run."""
        return kind_of(self.request)


def kind_of(request: Request) -> tuple[Any, ...]:
    """What requests that can share a run have in common."""
    return (request.job, request.mode, request.mapping, request.accept_loss)


@dataclass(frozen=True, slots=True)
class Owed:
    """A request that was postponed, and the error that it waits to pass."""

    request: Request
    error: str


class Runner:
    """Executes requests one at a time. `publish` gets the events run_queued to run_finished.

    `beat` is the loop's time of the last progress that the runner really made, for the watchdog.
    `owed` are postponed requests by their kind, `unrecorded` the last runs that ended while
    PostgreSQL couldn't be told; both are for others to see to. `settle` is how a verify lets live
    mode bring over what is pending, and `keeps_up` tells whether that follows changes: a verify
    waits for it, a minute at most, and lets other runs go first.
    """

    def __init__(
        self, config: Config, database: Database, source: Source, publish: Publish
    ) -> None:
        self.current: Ticket | None = None
        self.draining = False
        self.owed: dict[tuple[Any, ...], Owed] = {}
        self.unrecorded: deque[Run] = deque(maxlen=_MOST_UNRECORDED)
        self.beat = 0.0
        self.settle: Callable[[], Awaitable[str | None]] | None = None
        self.keeps_up: Callable[[], bool] = lambda: True
        self._config = config
        self._database = database
        self._source = source
        self._publish = publish
        self._queue: deque[Ticket] = deque()
        self._sync: Sync | None = None
        self._wake = asyncio.Event()
        self._told = 0.0
        # Our own flushes give way to those who wait for the lock.
        self._flush_s = _FLUSH_S if config.live.enabled else 0.0

    @property
    def queued(self) -> tuple[Ticket, ...]:
        """What waits, in the order it will run."""
        return tuple(self._queue)

    @property
    def is_stuck(self) -> bool:
        """Whether nothing has moved for longer than any time-out or pause can explain."""
        longest_s = 2 * self._config.postgres.timeout + self._config.retry.maximum + _GRACE_S
        # Before its first turn it can't have done anything.
        return self.beat > 0 and asyncio.get_running_loop().time() - self.beat > longest_s

    def submit(self, request: Request) -> tuple[Ticket, Literal["started", "queued"]]:
        """Take a request in: it joins a run that hasn't read its first key, or waits its turn."""
        loop = asyncio.get_running_loop()
        due = loop.time() + (_COMPANY_S if request.trigger.startswith("cron:") else 0.0)
        ticket = Ticket(request, new_run(request), due, loop.create_future())
        current = self.current
        # A forced request must not share the fate of one that min_interval may skip.
        as_forced = current and (current.request.force or not request.force)
        unread = self._sync and not self._sync.has_read
        if current and as_forced and unread and current.kind == ticket.kind:
            return current, "started"
        for waiting in self._queue:
            if waiting.kind == ticket.kind:
                waiting.request = replace(
                    waiting.request, force=waiting.request.force or request.force
                )
                waiting.due = min(waiting.due, ticket.due)
                self._wake.set()
                return waiting, "queued"
        self._queue.append(ticket)
        self._wake.set()
        self._publish("run_queued", run_document(ticket.run))
        return ticket, "queued" if current or len(self._queue) > 1 else "started"

    async def serve(self) -> None:
        """Execute what comes, until `drain` is called."""
        loop = asyncio.get_running_loop()
        while not self.draining:
            self._stir()
            self._wake.clear()
            ticket = self._next()
            pause = ticket.due - loop.time() if ticket else _POLL_S if self._queue else _COMPANY_S
            if ticket is None or pause > 0:
                try:
                    async with asyncio.timeout(min(pause, _COMPANY_S)):
                        await self._wake.wait()
                except TimeoutError:
                    continue
            else:
                self._queue.remove(ticket)
                await self._execute(ticket)
        while self._queue:
            self._end_unstarted(self._queue.popleft(), "interrupted", "balancesync is stopping")

    def _next(self) -> Ticket | None:
        """The first that may run: a verify would take for drift what live mode has yet to copy."""
        held_until = asyncio.get_running_loop().time() - _LIVE_S
        for ticket in self._queue:
            if ticket.request.job != "verify" or self.keeps_up() or ticket.due < held_until:
                return ticket
        return None

    async def _execute(self, ticket: Ticket) -> None:
        self.current = ticket
        sync = self._sync = Sync(
            self._config,
            self._database,
            self._source,
            on_progress=lambda progress: self._follow(ticket, progress),
            on_alive=self._stir,
            settle=self.settle,
        )
        self._publish("run_started", run_document(ticket.run))
        try:
            await sync.run(ticket.request, queued=ticket.run, postpone=True, wait_s=self._flush_s)
        finally:
            self.current = self._sync = None
        ticket.reports = sync.reports
        # Whoever accepted a loss knew of that one, and not of what Redis may come back with.
        lasting = replace(ticket.request, accept_loss=False)
        if ticket.run.status == "postponed":
            self.owed[kind_of(lasting)] = Owed(lasting, ticket.run.error or "")
        else:
            self.owed.pop(kind_of(lasting), None)
        if not sync.is_recorded:
            self.unrecorded.append(ticket.run)
        document = run_document(ticket.run, ticket.reports or None)
        if sync.failure:
            document["error_kind"] = type(sync.failure).__name__
        self._publish("run_finished", document)
        ticket.done.set_result(ticket.run)

    def _follow(self, ticket: Ticket, progress: Progress) -> None:
        self._stir()
        ticket.progress = progress
        if self.beat - self._told >= _PROGRESS_S:
            self._told = self.beat
            self._publish("run_progress", progress_document(ticket.run, progress))

    def _stir(self) -> None:
        self.beat = asyncio.get_running_loop().time()

    def cancel(self, run: UUID | None = None) -> Ticket | None:
        """Cancel the run of this id, or whichever runs or waits; None if there's none such.

        A queued one ends at once, the running one at its next batch.
        """
        current = self.current
        if current and self._sync and run in (None, current.run.id):
            self._sync.stop("cancelled on demand")
            return current
        for ticket in self._queue:
            if run in (None, ticket.run.id):
                self._queue.remove(ticket)
                self._end_unstarted(ticket, "cancelled", "cancelled while it was waiting")
                return ticket
        return None

    def _end_unstarted(
        self, ticket: Ticket, status: Literal["cancelled", "interrupted"], why: str
    ) -> None:
        run = ticket.run
        run.status, run.error, run.finished_at = status, why, datetime.now(UTC)
        run.duration_s = 0.0
        self.unrecorded.append(run)
        self._publish("run_finished", run_document(run))
        ticket.done.set_result(run)

    def drain(self) -> None:
        """Start nothing more, and end the current run, as interrupted, at its next batch."""
        self.draining = True
        if self._sync:
            self._sync.interrupt()
        self._wake.set()


def progress_document(run: Run, progress: Progress) -> Document:
    """How far a run is, as the API and the events say it."""
    ratio = progress.done / progress.total if progress.total else None
    return {
        "run_id": str(run.id),
        "phase": progress.phase,
        "mapping": progress.mapping or None,
        "done": progress.done,
        "total": progress.total,
        "ratio": None if ratio is None else round(min(ratio, 1.0), 4),
    }
