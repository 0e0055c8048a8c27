"""When the cron jobs fire. APScheduler keeps the time; this room says when the next time is.

The rules of the clock's changes are Vixie cron's (cron(8)): a job with a star in its minute or hour
field goes by real time, any other runs once for each time that it names, also on the day when the
clock shows that time twice or never.
"""

import asyncio
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from itertools import pairwise
from typing import Final, Literal
from zoneinfo import ZoneInfo

import structlog
from apscheduler.executors.debug import DebugExecutor
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.base import BaseTrigger

from balancesync.config import JobConfig, ScheduleConfig
from balancesync.cron import CronFields

# Seconds. The sleep of a machine stops the loop's clock, so this is also how late a job can be.
_BEAT: Final = 20.0
# A clock that NTP corrects goes back by less; one that went back further was set.
_SET_BACK: Final = timedelta(minutes=1)
_SECOND: Final = timedelta(seconds=1)
_DAY: Final = timedelta(days=1)
_DAY_MINUTES: Final = 24 * 60
_YEAR_DAYS: Final = 366

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


def next_fire(fields: CronFields, after: datetime, zone: ZoneInfo) -> datetime:
    """The first time in UTC that is later than `after`, which must be aware.

    A job without a star in its minute and hour fields runs at the first of two equal local times,
    and right after a jump of the clock over its time; one with a star goes by real time.
    """
    fixed = not fields.starred & {"minute", "hour"}
    start = after.astimezone(UTC).replace(microsecond=0)
    while True:
        # Years of other days are passed without a look at the zone, which is less than a day away.
        if any(_is_on(fields, start.date() + number * _DAY) for number in range(-1, 3)):
            for fire in _day_of_fires(fields, start, zone, fixed=fixed):
                if not fixed or fire.astimezone(zone).fold == 0:
                    return fire
        start += _DAY


def _day_of_fires(
    fields: CronFields, start: datetime, zone: ZoneInfo, *, fixed: bool
) -> Iterator[datetime]:
    # (start, end]: a change of the clock at the very end belongs to this day, not to the next.
    end = start + _DAY
    before, later = _offset(start, zone), _offset(end, zone)
    first = start + _SECOND
    if before != later:
        change = _change(start, end, zone)
        for wall in _walls(fields, first + before, change + before):
            yield wall - before
        first = change
        if fixed and any(_walls(fields, change + before, change + later)):
            yield change
    for wall in _walls(fields, first + later, end + _SECOND + later):
        yield wall - later


def _offset(at: datetime, zone: ZoneInfo) -> timedelta:
    return at.astimezone(zone).utcoffset() or timedelta()


def _change(low: datetime, high: datetime, zone: ZoneInfo) -> datetime:
    """The first second of the new offset; no zone changes twice within a day."""
    before = _offset(low, zone)
    while high - low > _SECOND:
        middle = low + (high - low) // 2
        middle = middle.replace(microsecond=0)
        if _offset(middle, zone) == before:
            low = middle
        else:
            high = middle
    return high


def _walls(fields: CronFields, low: datetime, high: datetime) -> Iterator[datetime]:
    """The matching minutes of a wall clock from `low` until before `high`, in order.

    A wall clock's time is written here as if it were UTC.
    """
    day = low.date()
    while day <= high.date():
        if _is_on(fields, day):
            for minute in _minutes(fields):
                wall = datetime.combine(day, time(*divmod(minute, 60)), UTC)
                if low <= wall < high:
                    yield wall
        day += _DAY


def _is_on(fields: CronFields, day: date) -> bool:
    if day.month not in fields.month:
        return False
    fits = (day.day in fields.day, day.isoweekday() % 7 in fields.weekday)
    return all(fits) if fields.starred & {"day", "weekday"} else any(fits)


def _minutes(fields: CronFields) -> Iterator[int]:
    return (60 * hour + minute for hour in sorted(fields.hour) for minute in sorted(fields.minute))


def _longest_gap(jobs: Sequence[CronFields], today: date) -> float:
    """The longest time in seconds between two fires of any of `jobs` in the years around `today`.

    By the wall clock of ordinary days: the hour of a clock's change isn't counted.
    """
    longest, last = 0, None
    shapes: dict[tuple[CronFields, ...], tuple[int, int, int]] = {}
    for number in range(-_YEAR_DAYS, _YEAR_DAYS + 1):
        day = today + number * _DAY
        due = tuple(fields for fields in jobs if _is_on(fields, day))
        if not due:
            continue
        if due not in shapes:
            minutes = sorted({minute for fields in due for minute in _minutes(fields)})
            inner = max((later - sooner for sooner, later in pairwise(minutes)), default=0)
            shapes[due] = minutes[0], inner, minutes[-1]
        first, inner, final = shapes[due]
        midnight = number * _DAY_MINUTES
        outer = 0 if last is None else midnight + first - last
        longest, last = max(longest, inner, outer), midnight + final
    return longest * 60.0 or math.inf


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
        """Seconds: the longest gap between two planned syncs, by the jobs alone.

        Looked for a year back and ahead of `now` (aware). Infinite without a sync job, or if there
        are no two syncs in that time.
        """
        today = now.astimezone(self._zone).date()
        # /health asks often, and the answer takes milliseconds.
        if self._interval is None or self._interval[0] != today:
            syncs = [job.fields for job in self._config.jobs.values() if job.job == "sync"]
            self._interval = today, _longest_gap(syncs, today)
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
