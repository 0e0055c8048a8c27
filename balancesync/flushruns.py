"""The runs that flushes are recorded as: one open run a minute or so, with growing counts."""

import asyncio
from datetime import UTC, datetime
from typing import Final

import structlog

from balancesync.documents import run_document
from balancesync.errors import BalanceSyncError, Unavailable
from balancesync.flush import Flusher, OpenRun
from balancesync.model import Counts, Request, new_run
from balancesync.runner import Publish, Runner
from balancesync.sync import log_run

_RUN_S: Final = 60.0
_SAVE_S: Final = 5.0

log = structlog.get_logger("balancesync")


class FlushRuns:
    """Opens a run with the first flush, saves it now and then, ends it after a minute."""

    def __init__(self, flusher: Flusher, runner: Runner, publish: Publish) -> None:
        self._flusher = flusher
        self._runner = runner
        self._publish = publish
        self._opened: OpenRun | None = None
        self._opened_at = 0.0
        self._saved_at = 0.0
        self._grown = False

    def current(self) -> OpenRun:
        """The run that a flush is to add to."""
        if self._opened is None:
            run = new_run(Request("live", "live"))
            run.status, run.attempts = "running", 1
            self._opened = OpenRun(run)
            self._opened_at = self._saved_at = asyncio.get_running_loop().time()
        return self._opened

    def add(self, counts: dict[str, Counts]) -> None:
        """A flush has been committed."""
        mappings = self.current().run.mappings
        for name, found in counts.items():
            mappings[name] = mappings.get(name, Counts()) + found
        self._grown = True

    def warn(self, warning: str) -> None:
        """Say something in the run that is open, if one is."""
        if self._opened is not None:
            self._opened.run.warnings.append(warning)

    async def tend(self) -> None:
        """Save or end the run if that is due."""
        opened, now = self._opened, asyncio.get_running_loop().time()
        if opened is None:
            return
        if now >= self._opened_at + _RUN_S:
            await self.end()
        elif self._grown and now >= self._saved_at + _SAVE_S:
            self._saved_at, self._grown = now, False
            try:
                await self._flusher.save(opened.run)
            except BalanceSyncError as error:
                # The next flush meets the same, and deals with it.
                log.debug("the live run could not be saved", error=str(error))

    async def end(self, error: BalanceSyncError | None = None) -> None:
        """End the run that is open, if it has begun; `error` is why."""
        opened, self._opened = self._opened, None
        if opened is None or not opened.recorded:
            return
        run = opened.run
        run.status = "succeeded"
        if error is not None:
            run.status = "postponed" if isinstance(error, Unavailable) else "failed"
            run.error = str(error)
        run.finished_at = datetime.now(UTC)
        run.duration_s = round(asyncio.get_running_loop().time() - self._opened_at, 3)
        try:
            await self._flusher.save(run)
        except BalanceSyncError:
            # Whoever records what PostgreSQL couldn't be told in time will do so.
            self._runner.unrecorded.append(run)
        self._publish("run_finished", run_document(run))
        log_run(run)
