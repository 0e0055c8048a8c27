"""Live mode: changes follow within a fraction of a second, and every gap is closed by a full run.

    off           not enabled, or another daemon leads
    down          changes don't get through: Redis or PostgreSQL is away, or doesn't allow it
    catching up   changes are followed, but some may have been missed before: nothing is applied
                  until a full run has succeeded that began to read since
    up            what changes is in PostgreSQL within `live.flush_interval` and the time of a flush

Keys that change while another writer is at work stay pending, and are fetched after it.
"""

import asyncio
from collections.abc import Mapping as Dictionary
from contextlib import suppress
from math import inf
from typing import Any, Final

import structlog

from balancesync.config import Config
from balancesync.database import Database
from balancesync.errors import BalanceSyncError, Gap, SourceChanged
from balancesync.flush import Flusher
from balancesync.flushruns import FlushRuns
from balancesync.metrics import Metrics
from balancesync.model import Request
from balancesync.pending import Pending
from balancesync.runner import Publish, Runner
from balancesync.source import Source
from balancesync.state import Live as LiveState
from balancesync.state import State
from balancesync.tracking import Tracking

# Keys of one flush: what one transaction changes, and what is in memory with its values.
_PIECE: Final = 10_000
_IDLE_S: Final = 1.0
# How soon it's looked again whether another writer has done.
_LOCK_S: Final = 0.1
_PAUSE_S: Final = 0.25
_LONGEST_PAUSE_S: Final = 10.0
_SETTLE_S: Final = 10.0

log = structlog.get_logger("balancesync")


class Live:
    """Follows changes while this daemon leads. `serve` has to run beside it."""

    def __init__(
        self,
        config: Config,
        database: Database,
        source: Source,
        *,
        state: State,
        publish: Publish,
        runner: Runner,
        metrics: Metrics,
    ) -> None:
        self._config = config
        self._source = source
        self._state = state
        self._publish = publish
        self._runner = runner
        self._metrics = metrics
        self._pending = Pending(config.mapping, config.live.max_pending)
        self._flusher = Flusher(config, database, source)
        self._runs = FlushRuns(self._flusher, runner, publish)
        self._leads = asyncio.Event()
        self._rests = asyncio.Event()
        self._rests.set()
        self._starting: Request | None = None
        # Set when there may be something to do; and when it can't wait for the interval to end.
        self._stirred = asyncio.Event()
        self._hurry = asyncio.Event()
        self._tracking: Tracking | None = None
        self._caught_up = False
        # Whether it's after a gap.
        self._mends = False
        # The tracking that was in place before a run read its first key, by the run's id.
        self._covered: dict[str, Tracking] = {}
        self._asked_at = -inf
        self._asked: asyncio.Future[Any] | None = None
        self._settling: list[asyncio.Future[bool]] = []
        self._remembered_at = -inf
        self._told = ""
        self._next_at = 0.0
        self._pause = _PAUSE_S

    @property
    def enabled(self) -> bool:
        """Whether the configuration wants it."""
        return self._config.live.enabled

    async def serve(self) -> None:
        """Follow changes whenever this daemon leads, until cancelled."""
        if not self.enabled:
            return
        try:
            while True:
                await self._leads.wait()
                self._rests.clear()
                await self._follow()
                self._rests.set()
        finally:
            await self._flusher.close()

    # --- what others tell it ----------------------------------------------------------------------

    def lead(self, leads: bool, leader: str | None, starting: Request | None) -> None:
        """This daemon leads from now on, or no more; then `leader` does, None if nobody.

        `starting` is the run that a new leader begins with: it's asked for when changes are
        followed, so that it serves live mode, too, or as soon as they turn out not to be.
        """
        self._starting = starting
        if leads:
            self._mends = False
            self._leads.set()
        else:
            self._leads.clear()
            if self._tracking is not None:
                # It may lead again before anybody looks, and who led meanwhile has written.
                self._tracking.miss("another daemon may have led")
            if leader is None:
                self._tell("down", "nobody leads: PostgreSQL can't be asked")
            else:
                self._tell("off", f"{leader} leads")
        self._nudge()

    def take(self, kind: str, run: Dictionary[str, Any]) -> None:
        """Hear of an event of the daemon: a full run closes the gaps from before it."""
        if kind in ("redis", "postgres") and run["connected"]:
            self._pause = _PAUSE_S
            self._nudge()
        if kind not in ("run_started", "run_finished") or not _is_full(run):
            return
        if kind == "run_started":
            if self._tracking is not None:
                self._covered[run["id"]] = self._tracking
            return
        covered = self._covered.pop(run["id"], None)
        if run["status"] == "refused" and self._tracking is not None:
            self._caught_up = False
            self._tell("catching up", "the guard's refusal stands, see `balancesync status`")
        if run["status"] == "succeeded":
            self._flusher.forget()
            if covered is not None and covered is self._tracking and covered.gap is None:
                self._caught_up = True
                if not self._mends:
                    # The run that following began with is no reason to wait with a first gap.
                    self._asked_at = -inf
                self._tell("up")
                self._nudge()

    def restart(self) -> bool:
        """Forget everything and begin with a full run, now; False: it isn't at work."""
        if self._tracking is None:
            return False
        self._asked_at = -inf
        self._tracking.miss("it was restarted on demand")
        return True

    def ask_again(self) -> None:
        """Ask for the full run that is missing, if any, at once: another process has cleared up.

        Its own run may have begun to read before the gap, and by another clock: it closes none.
        """
        if not self._caught_up:
            self._asked_at = -inf
            self._nudge()

    def keeps_up(self) -> bool:
        """Whether it's up, or isn't wanted here."""
        return self._state.live in ("up", "off")

    async def settle(self) -> str | None:
        """Wait until what changed before now is in PostgreSQL, some seconds at most.

        Returns why it may not be; None: it is.
        """
        if self._state.live != "up":
            return f"live mode is {self._state.live}"
        settled: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._settling.append(settled)
        self._nudge()
        try:
            async with asyncio.timeout(_SETTLE_S):
                done = await settled
        except TimeoutError:
            return f"live mode hasn't brought over in {_SETTLE_S:g} s what was pending"
        return None if done else "live mode was interrupted"

    async def finish(self) -> None:
        """Bring over what is pending, and follow no more."""
        await self.settle()
        self._leads.clear()
        self._nudge()
        await self._rests.wait()

    def _nudge(self) -> None:
        self._hurry.set()
        self._stirred.set()

    # --- following --------------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Follow changes until there's a gap, or another daemon leads."""
        try:
            tracking = await Tracking.open(
                self._source,
                self._pending.prefixes,
                limit=self._config.live.max_pending,
                stirred=self._stirred,
                hurry=self._hurry,
            )
        except BalanceSyncError as error:
            self._tell("down", str(error))
            self._start_up()
            await self._rest()
            return
        watching = asyncio.create_task(tracking.watch())
        self._tracking, self._caught_up, self._pause = tracking, False, _PAUSE_S
        self._tell("catching up", "waiting for a full run")
        self._start_up()
        try:
            while self._leads.is_set():
                await self._turn(tracking)
        except Gap as gap:
            self._mends = True
            # Else it has been told already that somebody else leads, or nobody.
            if self._leads.is_set():
                self._tell("catching up", str(gap))
            self._runs.warn(f"changes may have been missed, and a full run has to follow: {gap}")
        finally:
            self._tracking = None
            watching.cancel()
            await tracking.close()
            with suppress(asyncio.CancelledError):
                await watching
            await self._runs.end()
            self._pending.forget()
            self._flusher.forget()
            self._count(0)
            self._state.forget_lags()
            self._remembered_at = -inf
            self._free(self._settling, done=False)

    def _start_up(self) -> None:
        if self._starting:
            self._runner.submit(self._starting)
            self._starting = None

    async def _rest(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._pause):
                self._hurry.clear()
                await self._hurry.wait()
        self._pause = min(2 * self._pause, _LONGEST_PAUSE_S)

    async def _turn(self, tracking: Tracking) -> None:
        await self._wait()
        settling, self._settling = self._settling, []
        try:
            if settling:
                await tracking.settle()
            self._gather(tracking)
            await self._look()
            if settling:
                self._pending.hurry()
            if not self._caught_up:
                self._ask(tracking)
            elif await self._flush(tracking):
                self._free(settling, done=True)
                await self._remember(tracking)
        finally:
            # Those for whom it wasn't done: the next turn's, or told so at the end.
            self._settling += settling
        await self._runs.tend()

    async def _wait(self) -> None:
        """Until something is due, and the interval since the last flush is over."""
        loop = asyncio.get_running_loop()
        due_in = min(self._pending.due_at - loop.time(), _IDLE_S)
        if due_in > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(due_in):
                    await self._stirred.wait()
        pause = self._next_at - loop.time()
        if pause > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._hurry.wait()
        self._hurry.clear()
        self._next_at = loop.time() + self._config.live.flush_interval

    def _gather(self, tracking: Tracking) -> None:
        """Take in what was told; raises Gap."""
        self._stirred.clear()
        if tracking.gap is not None:
            raise Gap(tracking.gap)
        proven_at = tracking.proven_at
        self._pending.add(*tracking.take(), proven_at)
        self._count(len(self._pending))

    async def _look(self) -> None:
        try:
            await self._flusher.look(self._pending.hashes)
        except Gap:
            raise
        except BalanceSyncError as error:
            # Whatever is away, a flush or the tracking itself meets it, and deals with it.
            log.debug("a big hash can't be looked at", error=str(error))

    def _count(self, pending: int) -> None:
        self._metrics.live_pending.set(pending)
        self._state.live_pending = pending

    def _ask(self, tracking: Tracking) -> None:
        """Ask for a full run, unless that was done a short while ago."""
        now = asyncio.get_running_loop().time()
        if now < self._asked_at + self._config.live.rescan_interval:
            return
        if self._asked is None or self._asked.done():
            self._asked_at = now
            ticket, _ = self._runner.submit(Request("sync", "live"))
            self._asked = ticket.done
            # If it has started, it hasn't read anything: such a run can't be joined any more.
            self._covered[str(ticket.run.id)] = tracking

    async def _flush(self, tracking: Tracking) -> bool:
        """Bring over all that is pending now; False: something is in the way."""
        loop = asyncio.get_running_loop()
        self._pending.begin()
        while piece := self._pending.take(_PIECE, loop.time()):
            begun = loop.time()
            try:
                counts = await self._flusher.flush(piece, tracking, self._runs.current())
            except SourceChanged as error:
                raise Gap(str(error)) from error
            except Gap:
                raise
            except BalanceSyncError as error:
                self._pending.put_back(piece)
                await self._fail(error)
                return False
            if counts is None:
                self._pending.put_back(piece)
                self._next_at = loop.time() + min(_LOCK_S, self._config.live.flush_interval)
                return False
            self._runs.add(counts)
            self._pending.rest(piece, counts, begun, loop.time())
            lags = [loop.time() - at for at in self._pending.arrivals()]
            self._metrics.count_flush(counts, lags)
            self._state.remember_lags(lags)
            self._pause = _PAUSE_S
            self._tell_up(tracking)
            self._gather(tracking)
        return True

    async def _remember(self, tracking: Tracking) -> None:
        """Write down how far it is: what is known for sure when Redis, or this process, is gone."""
        until = self._pending.done_until
        if until is None or until <= self._remembered_at:
            return
        try:
            self._state.followed_until = await self._flusher.remember(until)
        except Gap:
            raise
        except BalanceSyncError as error:
            await self._fail(error)
        else:
            self._remembered_at = until
            self._tell_up(tracking)

    async def _fail(self, error: BalanceSyncError) -> None:
        """A flush has failed: its keys stay pending, to be tried again after a pause."""
        self._tell("down", str(error))
        await self._runs.end(error)
        self._next_at = asyncio.get_running_loop().time() + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE_S)

    @staticmethod
    def _free(settling: list[asyncio.Future[bool]], *, done: bool) -> None:
        for settled in settling:
            if not settled.done():
                settled.set_result(done)
        settling.clear()

    def _tell_up(self, tracking: Tracking) -> None:
        """PostgreSQL takes what changes; whether nothing is missed may be another matter by now."""
        if self._leads.is_set() and tracking.gap is None:
            self._tell("up")

    def _tell(self, state: LiveState, reason: str = "") -> None:
        """Say how it is, once."""
        if state == self._state.live and reason in (self._told, ""):
            return
        self._state.live, self._told = state, reason
        self._state.live_reason = reason or None
        self._metrics.live_up.set(state == "up")
        self._publish("live", {"state": state, "reason": reason or None})
        write = log.warning if state == "down" else log.info
        write(f"live mode is {state}", reason=reason or None)


def _is_full(run: Dictionary[str, Any]) -> bool:
    return run["job"] == "sync" and run["mode"] == "apply" and run["mapping"] is None
