"""One run from its request to its record: attempts with backoff, outcome, canonical log line."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from functools import partial
from typing import Final

import structlog

from balancesync.attempt import Attempt, Work
from balancesync.config import Config
from balancesync.database import Connection, Database
from balancesync.errors import (
    BalanceSyncError,
    Cancelled,
    Interrupted,
    LockHeld,
    Refused,
    RunFailed,
    Shrunk,
    Transient,
    Unavailable,
)
from balancesync.model import Job, Request, Run, Status, new_run
from balancesync.part import Progress
from balancesync.pipeline import Pipeline
from balancesync.prune import Prune
from balancesync.records import Records
from balancesync.report import Report
from balancesync.restore import Restore
from balancesync.source import Source

# A backend finds its client gone within this: see `tcp_user_timeout` and the like in `database`.
_LINGER_S: Final = 15.0
_SHOW_S: Final = 2.0
_RECORD_S: Final = 5.0
# How long live mode is waited for: until it's up, and once it wasn't.
_LIVE_S: Final = 60.0
_FLUSH_S: Final = 0.5
_POLL_S: Final = 0.05
# How often a Redis that loses many keys meanwhile is read at the least.
_READINGS: Final = 2

# What makes one attempt at a job; of all others, the pipeline does.
_ATTEMPTS: Final[dict[Job, type[Attempt]]] = {"restore": Restore, "prune": Prune}

log = structlog.get_logger("balancesync")


class Sync:
    """Executes one request of the jobs sync, verify, restore and prune.

    `failure` is the error behind a status that isn't success, `reports` what a dry run or verify
    found, `is_recorded` whether PostgreSQL holds the run as it ended. `on_progress` is called
    often and must be quick; `on_alive` during a long statement, whenever PostgreSQL proves to be
    at work on it. `settle` waits until live mode, where it's in this process, has nothing pending,
    and returns why it may have; None: it hasn't.
    """

    def __init__(
        self,
        config: Config,
        database: Database,
        source: Source,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        on_alive: Callable[[], None] = lambda: None,
        *,
        settle: Callable[[], Awaitable[str | None]] | None = None,
    ) -> None:
        self.failure: BalanceSyncError | None = None
        self.reports: list[Report] = []
        self._config = config
        self._database = database
        self._source = source
        self._on_progress = on_progress
        self._on_alive = on_alive
        self._settle = settle or self._wait_for_live
        self.is_recorded = False
        self._ending: asyncio.Future[RunFailed] = asyncio.get_running_loop().create_future()
        self._attempt: Attempt | None = None
        self._begun = False
        self._between: Connection | None = None
        self._follows = True

    @property
    def has_read(self) -> bool:
        """Whether the attempt under way may have read a key."""
        return self._attempt is not None and self._attempt.has_read

    def stop(self, reason: str) -> None:
        """End the run, after the batch under way, as cancelled; what is committed stays."""
        self._end(Cancelled(reason))

    def interrupt(self) -> None:
        """End the run, after the batch under way, as interrupted: the process is to end."""
        self._end(Interrupted())

    def _end(self, ending: RunFailed) -> None:
        if not self._ending.done():
            self._ending.set_result(ending)

    async def run(
        self,
        request: Request,
        *,
        wait_s: float = 0.0,
        queued: Run | None = None,
        postpone: bool = False,
    ) -> Run:
        """Execute the request to its end; what was to be expected is a status, never raised.

        Args:
            request: what to do.
            wait_s: how long to wait for the writer's lock, in seconds.
            queued: the run that was made for the request when it came, to be started now.
            postpone: end as postponed, at the first failure, while a server can't be reached or
                the lock is held; without it a server is tried again as `[retry]` says.
        """
        run = queued or new_run(request)
        run.status, run.started_at = "running", datetime.now(UTC)
        loop = asyncio.get_running_loop()
        begun = loop.time()

        def close() -> None:
            run.finished_at = datetime.now(UTC)
            run.duration_s = round(loop.time() - begun, 3)

        try:
            await self._attempts(run, request, wait_s, close, postpone=postpone)
        except BalanceSyncError as error:
            self.failure = error
            run.error = str(error)
            run.status = _status_of(error, postpone=postpone)
            close()
            await self._record(run)
        finally:
            if self._between is not None:
                self._between.terminate()
        log_run(run)
        return run

    async def _attempts(
        self,
        run: Run,
        request: Request,
        wait_s: float,
        close: Callable[[], None],
        *,
        postpone: bool,
    ) -> None:
        work = Work(
            self._config,
            self._database,
            self._source,
            run,
            request,
            on_progress=self._progress,
            on_alive=self._on_alive,
            ending=self._ending,
            settle=self._settle,
        )
        while True:
            run.attempts += 1
            # An attempt whose last COMMIT's reply was lost has left its success here.
            run.status, run.finished_at, run.duration_s = "running", None, None
            # The lock of an attempt that lost its session falls when PostgreSQL notices.
            patience_s = wait_s if run.attempts == 1 else max(wait_s, _LINGER_S)
            attempt = self._attempt = _ATTEMPTS.get(request.job, Pipeline)(work)
            try:
                await attempt.execute(patience_s, close)
            except (Transient, LockHeld) as error:
                # It may be the ending's own doing, and nobody wants another attempt.
                if self._ending.done():
                    raise self._ending.result() from error
                if run.attempts >= self._most_attempts(error, postpone=postpone):
                    raise
                self._begun |= attempt.recorded
                await self._pause(run, error)
            else:
                self.reports = attempt.reports
                self.is_recorded = attempt.recorded
                return
            finally:
                self._begun |= attempt.recorded

    def _most_attempts(self, error: BalanceSyncError, *, postpone: bool) -> int:
        # Who gives way to another writer has waited for it already.
        if isinstance(error, LockHeld) or (postpone and isinstance(error, Unavailable)):
            return 0
        # A reading that is none to judge has to be made again, which is no retry of an error.
        least = _READINGS if isinstance(error, Shrunk) else 0
        return max(self._config.retry.attempts, least)

    async def _pause(self, run: Run, error: BalanceSyncError) -> None:
        """Wait before the next attempt, as `[retry]` says; raises what ends the run meanwhile."""
        retry = self._config.retry
        await self._stay_shown(run)
        ceiling = min(retry.maximum, retry.initial * 2 ** (run.attempts - 1))
        pause = random.uniform(0, ceiling)  # noqa: S311  # full jitter, no secret
        log.warning(
            "attempt failed, trying again",
            run=str(run.id),
            attempt=run.attempts,
            pause_s=round(pause, 3),
            error=str(error),
        )
        await asyncio.wait({self._ending}, timeout=pause)
        if self._ending.done():
            raise self._ending.result() from error

    async def _stay_shown(self, run: Run) -> None:
        """Show the run as running between its attempts, too, whose sessions are theirs alone."""
        if not self._begun or (self._between is not None and not self._between.is_closed()):
            return
        try:
            with self._database.translated(last=True):
                async with asyncio.timeout(_SHOW_S):
                    self._between = await self._database.connect()
                    await Records(self._database).show(self._between, run)
        except BalanceSyncError as error:
            log.debug("the run can't be shown as running", run=str(run.id), error=str(error))

    async def _wait_for_live(self) -> str | None:
        """Live mode is the daemon's, another process: PostgreSQL knows how far that one is."""
        loop, records = asyncio.get_running_loop(), Records(self._database)
        deadline = loop.time() + (_LIVE_S if self._follows else _FLUSH_S)
        asked_at, leader = await self._database.ask(records.leader, _RECORD_S)
        while leader is not None:
            until = await self._database.ask(records.followed, _RECORD_S)
            self._follows = until is not None and until >= asked_at
            if self._follows:
                return None
            if loop.time() > deadline:
                return "live mode isn't up, or couldn't bring over in time what was pending"
            await asyncio.sleep(_POLL_S)
        return "live mode isn't up: no daemon leads"

    def _progress(self, progress: Progress) -> None:
        if self._ending.done():
            raise self._ending.result()
        self._on_progress(progress)

    async def _record(self, run: Run) -> None:
        """Record a run that didn't succeed, if it had begun and PostgreSQL is there."""
        if not self._begun:
            return
        try:
            save = partial(Records(self._database).save, run=run)
            await self._database.ask(save, _RECORD_S)
            self.is_recorded = True
        except BalanceSyncError as error:
            log.error("the run could not be recorded", run=str(run.id), error=str(error))


def _status_of(error: BalanceSyncError, *, postpone: bool) -> Status:
    match error:
        case Unavailable() | LockHeld() if postpone:
            return "postponed"
        case Refused():
            return "refused"
        case Cancelled():
            return "cancelled"
        case Interrupted():
            return "interrupted"
    return "failed"


def log_run(run: Run) -> None:
    """The one line that says how a run ended."""
    well = run.status in ("succeeded", "skipped")
    write = (log.warning if run.drift else log.info) if well else log.error
    write(
        "run",
        run=str(run.id),
        job=run.job,
        trigger=run.trigger,
        mode=run.mode,
        status=run.status,
        attempts=run.attempts,
        duration_s=run.duration_s,
        **run.counts.as_dict(),
        drift=run.drift,
        moving=None if run.moving is None else sum(run.moving.values()),
        warnings=run.warnings,
        error=run.error,
    )
