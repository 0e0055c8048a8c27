"""A batch as the lines of one text, and the pattern that tells how far they surely fit."""

import re
from collections.abc import Sequence
from typing import Final

from balancesync.keys import KeyForm
from balancesync.values import NULL, ValueColumn, raised

# The pattern is asked again after so many lines: the marks that it keeps of each take memory.
_AT_ONCE: Final = 2_000


class Lines:
    """The pattern of a mapping's lines: key, tab, value, tab, value, newline.

    It is conservative: it may miss a line that fits, and then that line is judged by itself, but
    never takes one that doesn't. It has no possessive parts: Python before 3.11.5 gets those wrong.
    """

    def __init__(
        self, form: KeyForm, columns: Sequence[ValueColumn], nullable: frozenset[str]
    ) -> None:
        self._has_nulls = bool(nullable)
        self._has_text = any(column.is_text for column in form.columns) or any(
            column.is_text for column in columns
        )
        # Which groups of a line's pattern are fields, and which are the tails of which field.
        self._fields = [*range(len(form.columns))]
        self._tails = dict[int, int]()
        for column in columns:
            group = self._fields[-1] + 1 + 2 * (self._fields[-1] in self._tails)
            self._fields.append(group)
            if column.tails is not None:
                self._tails[group] = len(self._fields) - 1

        def line(group: bytes) -> bytes:
            text = form.pattern(group)
            for column in columns:
                null = b"|" + re.escape(NULL) if column.name in nullable else b""
                text += b"\t%b%b%b)" % (group, column.head, null)
                if column.tails:
                    low, high = column.tails
                    text += b"(?:%b%b)|%b%b))?" % (group, low, group, high)
            return text + b"\n"

        # Groups cost time, and to tell how far the lines fit needs none.
        self._run = re.compile(b"(?:%b){0,%d}" % (line(b"(?:"), _AT_ONCE))
        self._line = re.compile(line(b"("))
        is_prefix = not (self._tails or form.separators or form.suffix)
        self._prefix = form.prefix if is_prefix else None

    def is_clean(self, text: bytes, lines: Sequence[bytes], nulls: int) -> bool:
        """Tell whether no key and no value brought a newline or `\\N` of its own.

        `text` is these lines, each ended by a newline; `nulls` of their fields are NULL. (Tabs
        forge nothing: the pattern wants just as many as there are in an honest line.)
        """
        return (
            text.count(b"\n") == len(lines)
            and (not self._has_nulls or text.count(b"\\") == nulls)
            and (not self._has_text or text.isascii() or _is_utf8(text))
        )

    def end(self, text: bytes, at: int) -> int:
        """Go on from `at`, the start of a line, over lines that surely fit."""
        match = self._run.match(text, at)
        return match.end() if match else at

    def strip(self, lines: bytes) -> tuple[bytes, int]:
        """Make rows of lines that fit, and say how many of them had a tail taken off."""
        if self._prefix is not None:
            if not self._prefix:
                return lines, 0
            return lines[len(self._prefix) :].replace(b"\n" + self._prefix, b"\n"), 0
        found: list[tuple[bytes, ...]] = self._line.findall(lines)
        if not self._tails:
            return b"\n".join([*map(b"\t".join, found), b""]), 0
        groups = list(zip(*found, strict=True))
        fields: list[Sequence[bytes]] = [groups[group] for group in self._fields]
        tails = list[tuple[bytes, ...]]()
        for group, field in self._tails.items():
            low, high = groups[group + 1 : group + 3]
            tails += (low, high)
            if any(high):
                pairs = zip(fields[field], high, strict=True)
                fields[field] = [raised(head) if nines else head for head, nines in pairs]
        snapped = sum(map(any, zip(*tails, strict=True)))
        return b"\n".join([*map(b"\t".join, zip(*fields, strict=True)), b""]), snapped


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
