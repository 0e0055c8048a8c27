"""What a text must be to fit its column, type by type, and what COPY gets.

Numbers are judged on their digits: nothing here passes through a float or a rounding context, and
`1e999999999` costs no more than any other ten bytes.
"""

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, InvalidOperation
from functools import partial
from typing import Final, NamedTuple

from balancesync.columns import ColumnType
from balancesync.model import Reason

VALUE_BYTES: Final = 65_536
NULL: Final = rb"\N"

INTEGERS: Final = {"smallint": 2**15, "integer": 2**31, "bigint": 2**63}
TEXTS: Final = ("text", "varchar")
# https://www.postgresql.org/docs/current/datatype-numeric.html
_NUMERIC_WHOLE: Final = 131_072
_NUMERIC_DECIMALS: Final = 16_383


class Fit(NamedTuple):
    """A text that fits its column: the field COPY gets, and whether `tolerance` was used."""

    copy: bytes
    snapped: bool = False


class Unfit(NamedTuple):
    """Why a text doesn't fit; `detail` is one printable line for people."""

    reason: Reason
    detail: str


Parse = Callable[[bytes], Fit | Unfit]


def show(raw: bytes, limit: int = 40) -> str:
    """Quote what came, printable and cut, so that it can forge no line of a log.

    >>> show(b"5\\n6")
    '"5\\\\n6"'
    """
    text = raw[: 4 * limit].decode(errors="backslashreplace")
    if not text.isprintable():
        text = "".join(
            char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
        )
    return f'"{text}"' if len(text) <= limit else f'"{text[:limit]}..." ({len(raw):,} bytes)'


# --- numbers --------------------------------------------------------------------------------------

_NUMBER: Final = re.compile(rb"(-?)([0-9]+)(?:\.([0-9]+))?(?:[eE]([+-]?)0*([0-9]+))?")
# Beyond every limit of a column, of VALUE_BYTES digits and of a tolerance together.
_FAR: Final = 10_000_000
# Holds every digit of a value and of the column at once, so a difference is never rounded.
_WIDE: Final = Context(prec=70_000, Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[InvalidOperation])
# What adding in binary leaves behind: a long double's 17 printed decimals, or a double's 15 digits.
# A tail is short beside 1, or beside the value, and always short beside the column's step.
_TAIL: Final = Decimal("1e-9")
_TAIL_SHARE: Final = Decimal("1e-15")
_TAIL_OF_STEP: Final = Decimal("1e-3")
# Longer runs of zeros than this are left to PostgreSQL to write out.
_ZEROS: Final = 1_000


class Number(NamedTuple):
    """`digits` times ten to the `exponent`; digits have no zero at either end, 0 is ("0", 0)."""

    sign: bytes
    digits: bytes
    exponent: int

    @property
    def shortest(self) -> bytes:
        """The shortest exact form, without an exponent unless it would be mostly zeros."""
        sign, digits, exponent = self
        whole = len(digits) + exponent
        if max(exponent, -whole) > _ZEROS:
            return b"%b%be%d" % self
        if exponent >= 0:
            return sign + digits + b"0" * exponent
        if whole > 0:
            return b"%b%b.%b" % (sign, digits[:whole], digits[whole:])
        return b"%b0.%b%b" % (sign, b"0" * -whole, digits)


def read_number(raw: bytes) -> Number | None:
    """Read `-?digits[.digits][e[+-]digits]`; None for anything else."""
    match = _NUMBER.fullmatch(raw)
    if match is None:
        return None
    sign, whole, part, power_sign, power = match.groups(b"")
    mantissa = whole + part
    digits = mantissa.rstrip(b"0")
    exponent = len(whole) - len(digits)
    if power:
        far = int(power) if len(power) < 8 else _FAR
        exponent += -far if power_sign == b"-" else far
    digits = digits.lstrip(b"0")
    return Number(sign, digits, exponent) if digits else Number(b"", b"0", 0)


class NumberRule:
    """What numbers a column takes: exact ones, and those within `tolerance` of one that is."""

    def __init__(self, column: ColumnType, tolerance: Decimal = Decimal(0)) -> None:
        self._sql = column.sql
        self._bound = INTEGERS.get(column.name)
        self._step = column.step
        self._tolerance = tolerance
        if self._bound is not None:
            self._whole, self._scale = 19, 0
        elif column.precision is None:
            self._whole, self._scale = _NUMERIC_WHOLE, _NUMERIC_DECIMALS
        else:
            self._scale = column.scale or 0
            self._whole = column.precision - self._scale
        self._decimals = f"at most {self._scale} decimals" if self._scale else "whole numbers"
        self._tail = _WIDE.multiply(self._step or Decimal(0), _TAIL_OF_STEP)

    def fit(self, raw: bytes) -> Fit | Unfit:
        """Judge a number by its value."""
        number = read_number(raw)
        if number is None:
            return Unfit("not_a_number", f"{show(raw)} is no number")
        sign, digits, exponent = number
        whole = len(digits) + exponent
        if (whole > self._whole and digits != b"0") or (
            self._bound is not None and self._overflows(number)
        ):
            return Unfit("out_of_range", f"{show(raw)} is too large for {self._sql}")
        if -exponent <= self._scale:
            return Fit(number.shortest)
        if self._step is not None:
            value = Decimal(f"{digits.decode()}e{exponent}")
            nearest = value.quantize(self._step, context=_WIDE)
            gap = _WIDE.subtract(value, nearest).copy_abs()
            if gap <= self._tolerance:
                held = self.fit(sign + f"{nearest:f}".encode())
                return Fit(held.copy, snapped=True) if isinstance(held, Fit) else held
            if gap <= self._tail and (gap <= _TAIL or gap <= _WIDE.multiply(value, _TAIL_SHARE)):
                tip = "by the tail of a float; the option tolerance can accept it"
                return Unfit("residue", f"{show(raw)} misses {self._sql} {tip}")
        return Unfit("too_many_decimals", f"{show(raw)} doesn't fit {self._sql}: {self._decimals}")

    def _overflows(self, number: Number) -> bool:
        # What stands behind the point can't lead out of the range of whole numbers.
        sign, digits, exponent = number
        held = digits[: max(len(digits) + exponent, 0)] + b"0" * exponent
        value = int(held or b"0")
        return value > (self._bound or 0) - (not sign)


# --- the other types ------------------------------------------------------------------------------

_BOOLEAN: Final = re.compile(rb"true|false|[tf10]")
UUID: Final = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_TIME: Final = re.compile(
    rb"([0-9]{4})-([0-9]{2})-([0-9]{2})[T ]([0-9]{2}):([0-9]{2}):([0-9]{2})(?:\.([0-9]{1,6}))?"
    rb"(?:Z|([+-])([0-9]{2})(?::?([0-5][0-9]))?)"
)
_ESCAPES: Final = {"\\": r"\\", "\n": r"\n", "\r": r"\r", "\t": r"\t"}
_ESCAPE: Final = str.maketrans(_ESCAPES)


def fit_boolean(raw: bytes) -> Fit | Unfit:
    """Take true false t f 1 0."""
    if _BOOLEAN.fullmatch(raw):
        return Fit(raw)
    return Unfit("not_a_boolean", f"{show(raw)} is none of true false t f 1 0")


def fit_uuid(raw: bytes) -> Fit | Unfit:
    """Take the hyphenated form in any case; it is printed in lower case."""
    if UUID.fullmatch(raw.lower()):
        return Fit(raw.lower())
    return Unfit("not_a_uuid", f"{show(raw)} is no UUID of the form 8-4-4-4-12")


def fit_time(raw: bytes) -> Fit | Unfit:
    """Take ISO 8601 with seconds and an offset; printed in UTC as `2026-01-02T03:04:05.6Z`."""
    match = _TIME.fullmatch(raw)
    if match is None:
        wanted = "a time like 2026-01-02T03:04:05Z, with an offset and at most 6 decimals"
        return Unfit("not_a_time", f"{show(raw)} isn't {wanted}")
    *numbers, fraction, sign, hours, minutes = match.groups(b"")
    try:
        offset = timedelta(hours=int(hours or 0), minutes=int(minutes or 0))
        year, month, day, hour, minute, second = map(int, numbers)
        micro = int(fraction.ljust(6, b"0"))
        zone = timezone(-offset if sign == b"-" else offset)
        time = datetime(year, month, day, hour, minute, second, micro, zone).astimezone(UTC)
    except (ValueError, OverflowError):
        return Unfit("not_a_time", f"{show(raw)} is no time of the years 1 to 9999 in UTC")
    text = time.replace(tzinfo=None).isoformat()
    return Fit((text.rstrip("0") if time.microsecond else text).encode() + b"Z")


def fit_text(raw: bytes, length: int | None = None) -> Fit | Unfit:
    """Take UTF-8 without NUL, of at most `length` characters, and escape it for COPY."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        return Unfit("not_utf8", f"{show(raw)} isn't UTF-8 at byte {error.start:,}")
    if "\0" in text:
        return Unfit("nul_byte", f"{show(raw)} has a NUL, which PostgreSQL's texts can't hold")
    if length is not None and len(text) > length:
        return Unfit("text_too_long", f"{len(text):,} characters, varchar({length}) ends at less")
    return Fit(text.translate(_ESCAPE).encode())


# --- values ---------------------------------------------------------------------------------------

# Bytes that go through COPY as they are. Those from 0x80 on only in a batch that is UTF-8.
TEXT_CLASS: Final = rb"\x20-\x5b\x5d-\x7e\x80-\xff"
_LONG: Final = 1_000
# Fewer texts than fit: the days that every month has, and no year near the ends.
PLAIN_TIME: Final = (
    rb"[1-8][0-9]{3}-(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])"
    rb"T(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{0,5}[1-9])?Z"
)
_REFUSALS: Final[dict[str, Reason]] = {
    "text": "not_json",
    "varchar": "not_json",
    "boolean": "not_a_boolean",
    "uuid": "not_a_uuid",
    "timestamptz": "not_a_time",
}
_NEXT: Final = {b"%d" % digit: b"%d" % (digit + 1) for digit in range(9)}
DIGITS: Final = {"smallint": 4, "integer": 9, "bigint": 18}


class ValueColumn:
    """A value column: its pattern for whole batches and its exact parser for one value.

    `head` matches texts that surely fit and that COPY gets as they are; a text that fits may miss
    it. `tails`, if any, match what may follow the head within the mapping's tolerance: what little
    the value is above it, or below the next one that `raised` makes of it.
    """

    def __init__(self, name: str, column: ColumnType, tolerance: Decimal) -> None:
        self.name = name
        self.type = column
        self.is_text = column.name in TEXTS
        self.is_boolean = column.name == "boolean"
        self.refusal: Reason = _REFUSALS.get(column.name, "not_a_number")
        self.tails: tuple[bytes, bytes] | None = None
        self._plain: re.Pattern[bytes] | None = None
        if column.name in INTEGERS or column.name == "numeric":
            self.head = _number_head(column)
            self.tails = _number_tails(column, tolerance) if tolerance and column.step else None
            tails = b"(?:(%b)|(%b))?" % self.tails if self.tails else b""
            self._plain = re.compile(b"(%b)%b" % (self.head, tails))
            self._exact: Parse = NumberRule(column, tolerance).fit
        elif self.is_text:
            self.head = b"[%b]{0,%d}" % (TEXT_CLASS, min(column.length or _LONG, _LONG))
            self._exact = partial(fit_text, length=column.length)
        else:
            self.head, self._exact = {
                "boolean": (b"(?:%b)" % _BOOLEAN.pattern, fit_boolean),
                "uuid": (UUID.pattern, fit_uuid),
                "timestamptz": (PLAIN_TIME, fit_time),
            }[column.name]

    def parse(self, raw: bytes) -> Fit | Unfit:
        """Judge one value exactly."""
        if len(raw) > VALUE_BYTES:
            return Unfit("value_too_large", f"{len(raw):,} bytes, the limit is {VALUE_BYTES:,}")
        if self._plain and (match := self._plain.fullmatch(raw)):
            tail = match.lastindex
            return Fit(raised(match[1]) if tail == 3 else match[1], snapped=tail != 1)
        return self._exact(raw)


def raised(head: bytes) -> bytes:
    """Give the next number of as many decimals, away from zero; not all of its digits are 9.

    >>> raised(b"-1.08"), raised(b"12.99")
    (b'-1.09', b'13.00')
    """
    if last := _NEXT.get(head[-1:]):
        return head[:-1] + last
    kept = head.rstrip(b"9")
    if kept[-1:] == b".":
        kept = kept[:-1].rstrip(b"9")
    return kept[:-1] + _NEXT[kept[-1:]] + head[len(kept) :].replace(b"9", b"0")


def _number_head(column: ColumnType) -> bytes:
    if column.name in INTEGERS:
        return b"-?[0-9]{1,%d}" % DIGITS[column.name]
    if column.precision is None:
        return b"-?[0-9]{1,%d}(?:\\.[0-9]{1,%d})?" % (_LONG, _LONG)
    scale = column.scale or 0
    whole = column.precision - scale
    head = b"-?[0-9]{1,%d}" % whole if whole else b"-?0"
    return head + b"(?:\\.[0-9]{1,%d})?" % scale if scale else head


def _number_tails(column: ColumnType, tolerance: Decimal) -> tuple[bytes, bytes]:
    # After so many zeros or nines behind the last decimal, the rest is less than the tolerance.
    scale = column.scale or 0
    count = -tolerance.adjusted() - scale
    low = b"(?<=\\.[0-9]{%d})" % scale if scale else b"\\."
    # Only heads that don't get longer when they are raised.
    high = b"%b(?<!9\\.9{%d})" % (low, scale) if scale else b"(?<!9)\\."
    rest = b"{%d}[0-9]{0,40}" % count
    return b"%b0%b[1-9]" % (low, rest), b"%b9%b" % (high, rest)
