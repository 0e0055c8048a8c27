"""Cron expressions as operators write them, parsed to the sets of times that they name.

The rules are Vixie cron's (crontab(5)): 0 and 7 are Sunday, names of months and weekdays, lists,
ranges and steps, and `@daily` and its kind. Where Vixie takes in silence what can't be meant (a
step larger than its field, the 31st of February), this parser refuses.
"""

import re
from dataclasses import dataclass
from typing import Final
from zoneinfo import ZoneInfo

_MACROS: Final = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
# fmt: off
_MONTHS: Final = (
    "jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec",
)
# fmt: on
_WEEKDAYS: Final = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_LONGEST_MONTH: Final = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_PART: Final = re.compile(
    r"(?:(?P<star>\*)|(?P<low>[0-9]{1,4}|[a-z]{3})(?:-(?P<high>[0-9]{1,4}|[a-z]{3}))?)"
    r"(?:/(?P<step>[0-9]{1,4}))?"
)


@dataclass(frozen=True, slots=True)
class CronFields:
    """When a job fires. Weekdays count from Sunday = 0 to Saturday = 6.

    `starred` holds the names of the fields written with a leading `*` (also `*/2`). Day and weekday
    must both fit if one of them is starred, else either is enough: Vixie cron's rule.
    """

    minute: frozenset[int]
    hour: frozenset[int]
    day: frozenset[int]
    month: frozenset[int]
    weekday: frozenset[int]
    starred: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    low: int
    high: int
    names: tuple[str, ...] = ()

    def number(self, text: str) -> int:
        if text in self.names:
            return self.names.index(text) + self.low
        if not text.isdigit() or not self.low <= int(text) <= self.high:
            raise ValueError(f'{self.name} "{text}" is not {self.low} to {self.high}')
        return int(text)

    def part(self, text: str) -> range:
        match = _PART.fullmatch(text)
        if match is None:
            raise ValueError(f'{self.name} "{text}" is no number, range, step or *')
        if match["star"]:
            low, high = self.low, self.high
        else:
            low = self.number(match["low"])
            # A range may end in Sunday (fri-sun), which is 7 there.
            ends_week = self.name == "weekday" and match["high"] == "sun"
            high = 7 if ends_week else self.number(match["high"] or match["low"])
        if low > high:
            raise ValueError(f'{self.name} "{text}" runs backwards')
        step = int(match["step"] or 1)
        if match["step"] and low == high:
            raise ValueError(f'{self.name} "{text}" needs a range: {low}-{self.high}/{step}')
        if not 1 <= step <= self.high:
            raise ValueError(f'the step of {self.name} "{text}" is not 1 to {self.high}')
        return range(low, high + 1, step)

    def parse(self, text: str) -> frozenset[int]:
        return frozenset(number for part in text.split(",") for number in self.part(part))


_FIELDS: Final = (
    _Field("minute", 0, 59),
    _Field("hour", 0, 23),
    _Field("day", 1, 31),
    _Field("month", 1, 12, _MONTHS),
    _Field("weekday", 0, 7, _WEEKDAYS),
)


def parse_cron(expression: str) -> CronFields:
    """Parse `minute hour day month weekday`, or `@hourly` and its kind.

    Raises ValueError with one line that names the field, also for dates that never come.

    >>> sorted(parse_cron("*/20 9-17 * * mon-fri").minute)
    [0, 20, 40]
    """
    text = expression.strip().lower()
    if text.startswith("@"):
        if text not in _MACROS:
            raise ValueError(f'"{text}" is unknown; use one of {", ".join(sorted(_MACROS))}')
        text = _MACROS[text]
    words = text.split()
    if len(words) != len(_FIELDS):
        raise ValueError(f"must have 5 fields, minute hour day month weekday, and has {len(words)}")
    minute, hour, day, month, weekday = (
        field.parse(word) for field, word in zip(_FIELDS, words, strict=True)
    )
    starred = frozenset(
        field.name for field, word in zip(_FIELDS, words, strict=True) if word.startswith("*")
    )
    day_decides = "day" in starred or "weekday" in starred
    if day_decides and min(day) > max(_LONGEST_MONTH[number - 1] for number in month):
        raise ValueError("names a date that never comes")
    sunday_once = frozenset(number % 7 for number in weekday)
    return CronFields(minute, hour, day, month, sunday_once, starred)


def check_timezone(text: str) -> None:
    """Raise ValueError unless the time zone database knows this name."""
    try:
        ZoneInfo(text)
    # ZoneInfo opens a file of that name, and "Europe" is a folder.
    except (KeyError, ValueError, OSError):
        raise ValueError("must name a time zone, such as UTC or Europe/Berlin") from None
