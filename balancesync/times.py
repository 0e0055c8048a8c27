"""Times as this program writes and reads them: ISO 8601 in UTC, with a Z, everywhere."""

import re
from datetime import UTC, datetime
from typing import Final

# datetime.fromisoformat() takes more: days and weeks without a time, and times without a zone.
_TIME: Final = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?"
    r"(Z|[+-][0-9]{2}:[0-9]{2})"
)


def time_text(at: datetime | None) -> str | None:
    """A time as documents have it, to the millisecond; it must know its zone.

    >>> time_text(datetime(2026, 1, 31, 2, tzinfo=UTC))
    '2026-01-31T02:00:00.000Z'
    """
    return None if at is None else _text(at, "milliseconds")


def exact_time_text(at: datetime) -> str:
    """The same with all that PostgreSQL knows of it: a history's moments are to be asked for.

    >>> exact_time_text(datetime(2026, 1, 31, 2, tzinfo=UTC))
    '2026-01-31T02:00:00.000000Z'
    """
    return _text(at, "microseconds")


def short_time_text(at: datetime) -> str:
    """The same to the second, for people; what is less is cut off.

    >>> short_time_text(datetime(2026, 1, 31, 2, tzinfo=UTC))
    '2026-01-31T02:00:00Z'
    """
    return _text(at, "seconds")


def _text(at: datetime, precision: str) -> str:
    return at.astimezone(UTC).isoformat(timespec=precision).removesuffix("+00:00") + "Z"


def parse_time(text: str) -> datetime:
    """Read an ISO 8601 time with its offset from UTC, to the second or finer.

    Raises ValueError with one line that says what to write.

    >>> parse_time("2026-01-31T02:00:00+02:00").astimezone(UTC).hour
    0
    """
    try:
        at = datetime.fromisoformat(text).astimezone(UTC) if _TIME.fullmatch(text) else None
    except (ValueError, OverflowError):
        at = None
    if at is None:
        raise ValueError("must be a time with its offset from UTC, such as 2026-01-31T02:00:00Z")
    return at
