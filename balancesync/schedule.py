"""The cron jobs of the daemon. APScheduler keeps the time; `fires` says when the next time is."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Final, Literal
from zoneinfo import ZoneInfo

import structlog
from apscheduler.executors.debug import DebugExecutor
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.base import BaseTrigger

from balancesync.config import JobConfig, ScheduleConfig
from balancesync.cron import CronFields
from balancesync.fires import next_fire
from balancesync.overview import planned_interval

# Seconds. The sleep of a machine stops the loop's clock, so this is also how late a job can be.
_BEAT: Final = 20.0
# A clock that NTP corrects goes back by less; one that went back further was set.
_SET_BACK: Final = timedelta(minutes=1)

log = structlog.get_logger("balancesync")


@dataclass(frozen=True, slots=True)
class Fire:
    """A job of the schedule, its next and its last time in UTC.

    `next_at` is None while the schedule is stopped, `last_at` until the job has fired.
    """

    name: str
    cron: str
    job: Literal["sync", "verify"]
    timezone: str
    next_at: datetime | None
    last_at: datetime | None


class _Trigger:
    """What APScheduler asks when a job is next due; counted from now, so what was missed is one."""

    def __init__(self, fields: CronFields, zone: ZoneInfo) -> None:
        self._fields = fields
        self._zone = zone

    def get_next_fire_time(self, _previous: datetime | None, now: datetime) -> datetime:
        return next_fire(self._fields, now, self._zone)


# Registered and not derived: the library has no types.
BaseTrigger.register(_Trigger)


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Schedule:
    """`[schedule.jobs]` as calls of `fire(name, job)`, on the loop, each at its time.

    `fire` must do no more than enqueue. Jobs due at one minute are one call each. All methods are
    to be called on the loop that `start()` was called on. `now` is the wall clock, aware.
    """

    def __init__(
        self,
        config: ScheduleConfig,
        fire: Callable[[str, JobConfig], None],
        *,
        now: Callable[[], datetime] = _utc_now,
    ) -> None:
        self._config = config
        self._zone = ZoneInfo(config.timezone)
        self._fire = fire
        self._now = now
        self._scheduler: AsyncIOScheduler | None = None
        self._beat: asyncio.TimerHandle | None = None
        self._latest = now()
        self._last_at: dict[str, datetime] = {}
        self._interval: tuple[date, float] | None = None

    def start(self) -> None:
        """Fire from now on; what was due before isn't caught up. Does nothing when started."""
        if self._scheduler is not None:
            return
        # At info it tells of each job what the run's own line tells better.
        logging.getLogger("apscheduler").setLevel(logging.WARNING)
        # Its usual executor calls plain functions in threads; this one calls them right here.
        self._scheduler = AsyncIOScheduler(timezone=UTC, executors={"default": DebugExecutor()})
        self._latest = self._now()
        for name, job in self._config.jobs.items():
            self._scheduler.add_job(
                self._call,
                _Trigger(job.fields, self._zone),
                args=[name],
                id=name,
                misfire_grace_time=None,
                coalesce=True,
                next_run_time=next_fire(job.fields, self._latest, self._zone),
            )
        self._scheduler.start()
        self._arm()

    def stop(self) -> None:
        """Fire no more, not even what is due now. Does nothing when stopped."""
        if self._scheduler is None:
            return
        # The shutdown comes with the loop's next turn, a job could come before it.
        self._scheduler.pause()
        self._scheduler.shutdown(wait=False)
        self._scheduler = None
        if self._beat is not None:
            self._beat.cancel()

    def wakeup(self) -> None:
        """Look at the clock again: it may have jumped, or the machine slept.

        Called by itself every 20 seconds, because APScheduler sleeps on the monotonic clock. A
        clock that went forward makes each job that was missed fire once. One that was set back by
        more than a minute has all jobs planned anew: those of the past hour come again in their
        turn, rather than none until the old time comes again.
        """
        if self._scheduler is None:
            return
        self._arm()
        now = self._now()
        if self._latest - now > _SET_BACK:
            log.warning("the clock was set back: the schedule is planned anew", now=str(now))
            self._latest = now
            for name, job in self._config.jobs.items():
                due = next_fire(job.fields, now, self._zone)
                self._scheduler.modify_job(name, next_run_time=due)
        self._latest = max(self._latest, now)
        self._scheduler.wakeup()

    def jobs(self) -> list[Fire]:
        """Every job, in the order of the configuration."""
        return [
            Fire(
                name=name,
                cron=job.cron,
                job=job.job,
                timezone=self._config.timezone,
                next_at=self._next_at(name),
                last_at=self._last_at.get(name),
            )
            for name, job in self._config.jobs.items()
        ]

    def planned_interval(self, now: datetime) -> float:
        """What `overview.planned_interval` says, found out once a day."""
        today = now.astimezone(self._zone).date()
        # /health asks often, and the answer takes milliseconds.
        if self._interval is None or self._interval[0] != today:
            self._interval = today, planned_interval(self._config, now)
        return self._interval[1]

    def _next_at(self, name: str) -> datetime | None:
        if self._scheduler is None:
            return None
        due: datetime = self._scheduler.get_job(name).next_run_time
        return due

    def _arm(self) -> None:
        if self._beat is not None:
            self._beat.cancel()
        self._beat = asyncio.get_running_loop().call_later(_BEAT, self.wakeup)

    def _call(self, name: str) -> None:
        self._last_at[name] = self._now()
        self._fire(name, self._config.jobs[name])
