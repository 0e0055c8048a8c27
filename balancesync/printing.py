r"""How a column prints what a mapping has parsed: the same text as PostgreSQL's `::text`, in UTC.

    >>> printer(ColumnType.parse("numeric(20,2)"))(b"1234.5")
    '1234.50'

What comes in is a field of COPY's text format, as `Mapping.parse` makes it: it fits its column, so
nothing is judged here, and nothing is rounded. The same in SQL is `value_text`.
"""

import re
from collections.abc import Callable
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from functools import partial
from typing import Final

from balancesync.columns import ColumnType
from balancesync.values import INTEGERS, NULL, TEXTS

Print = Callable[[bytes], str | None]

# Only to write out exponents: numbers of the mapping have at most as many digits as a numeric.
_WIDE: Final = Context(prec=200_000, Emax=MAX_EMAX, Emin=MIN_EMIN)
_ESCAPED: Final = re.compile(r"\\(.)", re.DOTALL)
_MEANT: Final = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}
_TRUE: Final = (b"true", b"t", b"1")


def printer(column: ColumnType) -> Print:
    """Make what prints the fields of a column; NULL is None."""
    show: Callable[[bytes], str]
    if column.name in INTEGERS:
        show = _integer
    elif column.name == "numeric":
        show = partial(_numeric, column.scale)
    elif column.name in TEXTS:
        show = _text
    else:
        show = {"boolean": _boolean, "timestamptz": _time, "uuid": _plain}[column.name]
    return lambda field: None if field == NULL else show(field)


def value_text(expression: str, column: ColumnType) -> str:
    """The SQL that prints a column alike, whatever the session's time zone and date style."""
    if column.name != "timestamptz":
        return f"{expression}::text"
    utc = f"to_char({expression} AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US')"
    finite = f"rtrim(rtrim({utc}, '0'), '.') || '+00'"
    return f"CASE WHEN isfinite({expression}) THEN {finite} ELSE {expression}::text END"


def _integer(field: bytes) -> str:
    return str(int(field))


def _numeric(scale: int | None, field: bytes) -> str:
    text = field.decode()
    if "e" in text:
        text = f"{_WIDE.create_decimal(Decimal(text)):f}"
    sign = "-" if text[0] == "-" else ""
    whole, _, part = text[len(sign) :].partition(".")
    if scale is not None:
        part = part.ljust(scale, "0")
    whole = whole.lstrip("0") or "0"
    printed = f"{whole}.{part}" if part else whole
    # PostgreSQL's numeric knows no negative zero.
    return sign + printed if printed.strip("0.") else printed


def _plain(field: bytes) -> str:
    return field.decode()


def _boolean(field: bytes) -> str:
    return "true" if field in _TRUE else "false"


def _time(field: bytes) -> str:
    return field.decode().replace("T", " ").replace("Z", "+00")


def _text(field: bytes) -> str:
    text = field.decode()
    if "\\" not in text:
        return text
    return _ESCAPED.sub(lambda match: _MEANT.get(match[1], match[1]), text)
