"""One run from its request to its record: attempts with backoff, outcome, canonical log line."""

import asyncio
import random
from collections.abc import Callable
from datetime import UTC, datetime

import structlog

from balancesync.apply import Applied
from balancesync.config import Config
from balancesync.database import Database
from balancesync.errors import (
    BalanceSyncError,
    Cancelled,
    Refused,
    Transient,
)
from balancesync.model import Request, Run, Status, new_run_id
from balancesync.pipeline import Pipeline, Progress
from balancesync.records import Records
from balancesync.report import Report
from balancesync.source import Source

log = structlog.get_logger("balancesync")


class Sync:
    """Executes one request of the job sync or verify.

    `failure` is the error behind a status that isn't success, `reports` what a dry run or verify
    found. `on_progress` is called often and must be quick.
    """

    def __init__(
        self,
        config: Config,
        database: Database,
        source: Source,
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self.failure: BalanceSyncError | None = None
        self.reports: list[Report] = []
        self._config = config
        self._database = database
        self._source = source
        self._on_progress = on_progress
        self._stopping: str | None = None
        self._recorded = False

    def stop(self, reason: str) -> None:
        """End the run at its next batch, as cancelled; what is committed stays."""
        self._stopping = reason

    async def run(self, request: Request, *, wait_s: float = 0.0) -> Run:
        """Execute the request to its end; what was to be expected is a status, never raised.

        `wait_s` is how long to wait for the writer's lock, in seconds.
        """
        run = Run(
            id=new_run_id(),
            job=request.job,
            trigger=request.trigger,
            mode=request.mode,
            status="running",
            started_at=datetime.now(UTC),
            mapping=request.mapping,
        )
        loop = asyncio.get_running_loop()
        begun = loop.time()

        def close() -> None:
            run.finished_at = datetime.now(UTC)
            run.duration_s = round(loop.time() - begun, 3)

        try:
            await self._attempts(run, request, wait_s, close)
        except BalanceSyncError as error:
            self.failure = error
            run.error = str(error)
            run.status = _status_of(error)
            close()
            await self._record(run)
        _log_run(run)
        return run

    async def _attempts(
        self, run: Run, request: Request, wait_s: float, close: Callable[[], None]
    ) -> None:
        retry = self._config.retry
        committed: dict[str, Applied] = {}
        while True:
            run.attempts += 1
            pipeline = Pipeline(
                self._config,
                self._database,
                self._source,
                run=run,
                request=request,
                committed=committed,
                on_progress=self._progress,
            )
            try:
                await pipeline.execute(wait_s, close)
            except Transient as error:
                if run.attempts >= retry.attempts:
                    raise
                ceiling = min(retry.maximum, retry.initial * 2 ** (run.attempts - 1))
                pause = random.uniform(0, ceiling)  # noqa: S311  # full jitter, no secret
                log.warning(
                    "attempt failed, trying again",
                    run=str(run.id),
                    attempt=run.attempts,
                    pause_s=round(pause, 3),
                    error=str(error),
                )
                await asyncio.sleep(pause)
            else:
                self.reports = pipeline.reports
                return
            finally:
                self._recorded |= pipeline.recorded

    def _progress(self, progress: Progress) -> None:
        if self._stopping is not None:
            raise Cancelled(self._stopping)
        self._on_progress(progress)

    async def _record(self, run: Run) -> None:
        """Record a run that didn't succeed, if it had begun and PostgreSQL is there."""
        if not self._recorded:
            return
        try:
            async with self._database.acquire() as connection:
                await Records(self._database).save(connection, run)
        except BalanceSyncError as error:
            log.error("the run could not be recorded", run=str(run.id), error=str(error))


def _status_of(error: BalanceSyncError) -> Status:
    match error:
        case Refused():
            return "refused"
        case Cancelled():
            return "cancelled"
    return "failed"


def _log_run(run: Run) -> None:
    write = log.info if run.status in ("succeeded", "skipped") else log.error
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
        warnings=run.warnings,
        error=run.error,
    )
