"""A mapping's keys: their form read from the template, split in the one way they can be, printed.

Also globs, with the meaning that Redis gives them.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Final

from balancesync.columns import ColumnType, Template
from balancesync.values import (
    DIGITS,
    INTEGERS,
    PLAIN_TIME,
    TEXTS,
    UUID,
    Fit,
    NumberRule,
    Unfit,
    fit_text,
    fit_time,
    show,
)

KEY_BYTES: Final = 1_000

# An entry of a B-tree ends at 2,704 bytes, the overhead of its columns included; a longer one would
# fail the whole statement that meets it.
_ENTRY_BYTES: Final = 2_400
_NEVER: Final = b"(?!)"

# Where a column may begin, in how many ways (2: or more) it is reached, where the others before
# it ended.
_Start = tuple[int, int, tuple[tuple[int, int], ...]]


_KEY_INTEGER: Final = re.compile(rb"0|-?[1-9][0-9]*")
_KEY_NUMERIC: Final = re.compile(rb"0|-?[1-9][0-9]*|-?(?:0|[1-9][0-9]*)\.[0-9]*[1-9]")


class KeyColumn:
    """A key column: its exact parser, and `shape`, which matches the start of any text it takes.

    A piece of a text of that shape has the shape too; that makes splitting a key cheap.
    """

    def __init__(self, name: str, column: ColumnType) -> None:
        self.name = name
        self.is_text = column.name in TEXTS
        self.type = column
        shapes = {
            "numeric": rb"-?[0-9]*\.?[0-9]*",
            "uuid": rb"[0-9a-f-]*",
            "boolean": rb"[aeflrstu]*",
            "timestamptz": rb"[0-9TZ:.-]*",
        }
        shape = shapes.get(column.name, rb"-?[0-9]*")
        self.shape = None if self.is_text else re.compile(shape)
        is_number = column.name in INTEGERS or column.name == "numeric"
        self._number = NumberRule(column) if is_number else None

    def parse(self, raw: bytes) -> bytes | Unfit:
        """Give COPY's field for a text that is what balancesync itself would print."""
        if len(raw) > KEY_BYTES:
            return Unfit("key_too_long", f"{self.name}: {len(raw):,} bytes, over {KEY_BYTES:,}")
        fit = self._fit(raw)
        if isinstance(fit, Unfit):
            return Unfit(fit.reason, f"{self.name}: {fit.detail}")
        return fit.copy

    def _fit(self, raw: bytes) -> Fit | Unfit:
        if self.is_text:
            return fit_text(raw, self.type.length)
        if self._number is not None:
            form = _KEY_NUMERIC if self.type.name == "numeric" else _KEY_INTEGER
            canonical = bool(form.fullmatch(raw))
            fit = self._number.fit(raw) if canonical else Fit(raw)
        elif self.type.name == "timestamptz":
            fit = fit_time(raw)
            canonical = isinstance(fit, Fit) and fit.copy == raw
        elif self.type.name == "uuid":
            fit, canonical = Fit(raw), bool(UUID.fullmatch(raw))
        else:
            fit, canonical = Fit(raw), raw in (b"true", b"false")
        if canonical:
            return fit
        return Unfit("key_syntax", f"{show(raw)} isn't how {self.type.sql} is printed in a key")

    def pattern(self, avoid: bytes, limit: int) -> bytes | None:
        """Match texts of up to `limit` bytes that surely fit and hold no byte of `avoid`.

        None if this type can't do without those bytes.
        """
        name = self.type.name
        if self.is_text:
            held = (b for b in range(0x20, 0x100) if b not in b"\\\x7f" and b not in avoid)
            longest = min(self.type.length or limit, limit)
            return b"[%b]{0,%d}" % (b"".join(b"\\x%02x" % b for b in held), longest)
        if name in INTEGERS:
            sign = b"" if b"-" in avoid else b"-?"
            taken, form = b"0123456789", b"(?:0|%b[1-9][0-9]{0,%d})" % (sign, DIGITS[name] - 1)
        elif name == "numeric":
            taken, form = b"0123456789.-", _numeric_key(self.type, limit // 3)
        else:
            taken, form = {
                "uuid": (b"0123456789abcdef-", UUID.pattern),
                "boolean": (b"aeflrstu", b"(?:true|false)"),
                "timestamptz": (b"0123456789TZ:.-", PLAIN_TIME),
            }[name]
        return None if set(taken) & set(avoid) else form


def _numeric_key(column: ColumnType, longest: int) -> bytes:
    scale = longest if column.scale is None else column.scale
    whole = longest if column.precision is None else column.precision - scale
    form = b"(?:0|-?[1-9][0-9]{0,%d})" % (min(whole, longest) - 1) if whole else b"0"
    return form + b"(?:\\.[0-9]{0,%d}[1-9])?" % (min(scale, longest) - 1) if scale else form


class KeyForm:
    """The form of a mapping's keys, or of a `member` hash's fields; `text` is the template."""

    def __init__(self, text: str, types: Mapping[str, ColumnType]) -> None:
        template = Template.parse(text)
        self.text = text
        self.columns = [KeyColumn(name, types[name]) for name in template.names]
        first, *between, last = (literal.encode() for literal in template.literals)
        self.prefix: bytes = first
        self.separators: tuple[bytes, ...] = tuple(between)
        self.suffix: bytes = last
        self.is_bare = not (first or between or last)
        self._plain = re.compile(self.pattern(b"(")).fullmatch
        self._has_text = any(column.is_text for column in self.columns)

    @cached_property
    def glob(self) -> bytes | None:
        """The MATCH pattern of these keys; None if the template has no literal text."""
        if self.is_bare:
            return None
        parts = (self.prefix, *self.separators, self.suffix)
        return b"*".join(re.sub(rb"[\\*?\[\]]", rb"\\\g<0>", part) for part in parts)

    def split(self, key: bytes) -> tuple[bytes, ...] | Unfit:
        """Cut out the texts of the columns, if the key has the form in exactly one way."""
        start, end = len(self.prefix), len(key) - len(self.suffix)
        if start > end or not (key.startswith(self.prefix) and key.endswith(self.suffix)):
            return Unfit("key_syntax", f"{show(key)} isn't of the form {self.text}")
        body = key[start:end]
        if not self.separators:
            return (body,)
        longest = KEY_BYTES * len(self.columns) + sum(map(len, self.separators))
        if len(body) > longest:
            return Unfit("key_too_long", f"{show(key)}: a column's text is over {KEY_BYTES:,}")
        return self._cut(key, body)

    def _cut(self, key: bytes, body: bytes) -> tuple[bytes, ...] | Unfit:
        starts: list[_Start] = [(0, 1, ())]
        ends: list[Iterable[int]] = [_occurrences(body, separator) for separator in self.separators]
        lengths = [*map(len, self.separators), 0]
        for column, found, length in zip(self.columns, [*ends, [len(body)]], lengths, strict=True):
            starts = _advance(column, body, starts, found, length)
        if not starts:
            return Unfit("key_syntax", f"{show(key)} isn't of the form {self.text}")
        [(_, ways, cuts)] = starts
        if ways > 1:
            return Unfit("key_ambiguous", f"{show(key)} splits into {self.text} in two ways")
        return tuple(body[start:end] for start, end in cuts)

    def read(self, key: bytes) -> list[bytes] | Unfit:
        """Give COPY's fields of the key columns, or why there are none."""
        if (match := self._plain(key)) and (not self._has_text or key.isascii()):
            return list(match.groups())
        texts = self.split(key)
        if isinstance(texts, Unfit):
            return texts
        fields = list[bytes]()
        for column, text in zip(self.columns, texts, strict=True):
            field = column.parse(text)
            if isinstance(field, Unfit):
                return field
            fields.append(field)
        if sum(map(len, texts)) > _ENTRY_BYTES:
            return Unfit("key_too_long", f"{show(key)}: its columns are over {_ENTRY_BYTES:,}")
        return fields

    def own(self, keys: list[bytes]) -> list[bytes]:
        """Leave out keys of others: of a form without literal text, only a valid key is its own.

        A text is valid whatever its length; one that is too long will be a reject.
        """
        if not self.is_bare:
            return keys
        plain, is_own = self._plain, self._is_own
        if self._has_text:
            return [key for key in keys if is_own(key)]
        return [key for key in keys if plain(key) or is_own(key)]

    def _is_own(self, key: bytes) -> bool:
        [column] = self.columns
        if column.shape is not None and not column.shape.fullmatch(key):
            return False
        fields = self.read(key)
        if isinstance(fields, Unfit) and fields.reason == "key_too_long" and column.is_text:
            return isinstance(fit_text(key, column.type.length), Fit)
        return not isinstance(fields, Unfit)

    def print(self, texts: Sequence[str]) -> bytes:
        """Make the key of these texts of the columns."""
        key = self.prefix
        for text, literal in zip(texts, (*self.separators, self.suffix), strict=True):
            key += text.encode() + literal
        return key

    def print_all(self, columns: Sequence[Sequence[bytes]]) -> list[bytes]:
        """Make the keys of many texts of each column."""
        form = b"%b".join(
            literal.replace(b"%", b"%%") for literal in (self.prefix, *self.separators, self.suffix)
        )
        return [form % texts for texts in zip(*columns, strict=True)]

    def pattern(self, group: bytes) -> bytes:
        """Match keys that surely fit, and split them in the one way; `group` is `(` or `(?:`."""
        text = re.escape(self.prefix)
        literals = (*self.separators, self.suffix)
        for part, literal in zip(self._patterns(), literals, strict=True):
            text += b"%b%b)%b" % (group, part, re.escape(literal))
        return text

    def _patterns(self) -> list[bytes]:
        # No text that these match holds a byte of the separators, so where one begins is certain.
        # (Where there is only one separator, its first byte is enough.)
        avoid = b"".join(self.separators)
        if len(self.separators) == 1:
            avoid = avoid[:1]
        limit = min(KEY_BYTES, _ENTRY_BYTES // len(self.columns))
        found = [column.pattern(avoid, limit) for column in self.columns]
        return [_NEVER if pattern is None else pattern for pattern in found]


def _occurrences(body: bytes, separator: bytes) -> Iterator[int]:
    at = body.find(separator)
    while at >= 0:
        yield at
        at = body.find(separator, at + 1)


def _advance(
    column: KeyColumn, body: bytes, starts: list[_Start], ends: Iterable[int], length: int
) -> list[_Start]:
    """Reach every end from the starts before it, and so every start of the next column.

    A text that has the column's shape keeps it when it begins later, so whatever an earlier start
    reaches, the two latest do, too: more needn't be looked at to tell no way, one and several. A
    key costs time in proportion to its length, whatever its owner called himself.
    """
    reached = list[_Start]()
    latest = list[tuple[int, _Start]]()
    waiting = iter([*starts, None])
    coming = next(waiting)
    for end in ends:
        while coming and coming[0] <= end:
            shape = column.shape
            run = len(body) if shape is None else _end(shape.match(body, coming[0]), coming[0])
            latest = [*latest[-1:], (run, coming)]
            coming = next(waiting)
        by = [start for run, start in latest if run >= end]
        if by:
            begin, _, cuts = by[-1]
            ways = sum(start[1] for start in by)
            reached.append((end + length, min(ways, 2), (*cuts, (begin, end))))
    return reached


def _end(match: re.Match[bytes] | None, start: int) -> int:
    return match.end() if match else start


def glob_filter(globs: Iterable[bytes]) -> Callable[[bytes], re.Match[bytes] | None]:
    """Compile globs into one test that any of them matches, as Redis' stringmatchlen() would.

    >>> test = glob_filter([b"cache:*", rb"a\\*[^0-9]"])
    >>> bool(test(b"cache:1")), bool(test(b"a*b")), bool(test(b"a*5"))
    (True, True, False)
    """
    translated = (_translate(glob, f"s{at}_") for at, glob in enumerate(globs))
    return re.compile(b"|".join(b"(?:%b)" % one for one in translated), re.DOTALL).fullmatch


def _translate(glob: bytes, group: str) -> bytes:
    segments, at = [b""], 0
    while at < len(glob):
        char = glob[at : at + 1]
        at += 1
        if char == b"*":
            segments.append(b"")
        elif char == b"?":
            segments[-1] += b"."
        elif char == b"[":
            one, at = _translate_set(glob, at)
            segments[-1] += one
        else:
            if char == b"\\" and at < len(glob):
                char = glob[at : at + 1]
                at += 1
            segments[-1] += re.escape(char)
    first, *between, last = segments if len(segments) > 1 else [segments[0], b""]
    if len(segments) == 1:
        return first
    # The first place where a piece fits is as good as any later one. A lookahead doesn't try the
    # others, so many stars cost no more than one; atomic groups are broken before Python 3.11.5.
    for number, segment in enumerate(piece for piece in between if piece):
        name = f"{group}{number}".encode()
        first += b"(?=(?P<%b>.*?%b))(?P=%b)" % (name, segment, name)
    return first + b".*" + last


def _translate_set(glob: bytes, at: int) -> tuple[bytes, int]:
    negated = glob[at : at + 1] == b"^"
    at += negated
    held = set[int]()
    while at < len(glob) and glob[at : at + 1] != b"]":
        if glob[at : at + 1] == b"\\" and at + 1 < len(glob):
            at += 1
            held.add(glob[at])
        elif glob[at + 1 : at + 2] == b"-" and at + 2 < len(glob):
            low, high = sorted((glob[at], glob[at + 2]))
            held.update(range(low, high + 1))
            at += 2
        else:
            held.add(glob[at])
        at += 1
    matched = set(range(256)) - held if negated else held
    chars = b"".join(b"\\x%02x" % byte for byte in sorted(matched))
    return (b"[%b]" % chars if chars else b"(?!)"), at + 1
