"""The times that cron expressions name, on ordinary days and on those of the clock's changes.

The rules of the changes are Vixie cron's (cron(8)): a job with a star in its minute or hour field
goes by real time, any other runs once for each time that it names, also on the day when the clock
shows that time twice or never.
"""

import math
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, time, timedelta
from itertools import pairwise
from typing import Final
from zoneinfo import ZoneInfo

from balancesync.cron import CronFields

_SECOND: Final = timedelta(seconds=1)
_DAY: Final = timedelta(days=1)
_DAY_MINUTES: Final = 24 * 60
_YEAR_DAYS: Final = 366


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


def longest_gap(jobs: Sequence[CronFields], today: date) -> float:
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
