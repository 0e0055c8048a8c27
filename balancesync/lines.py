"""A batch as the lines of one text, and the pattern that tells how far they surely fit."""

import re
from collections.abc import Sequence
from typing import Final

from balancesync.keys import KeyForm
from balancesync.values import NULL, ValueColumn

# The pattern is asked again after so many lines: the marks that it keeps of each take memory.
_AT_ONCE: Final = 2_000
_NEVER: Final = b"(?!)"


class Lines:
    """The pattern of a mapping's lines: key, tab, value, tab, value, newline.

    It is conservative: it may miss a line that fits, and then that line is judged by itself, but
    never takes one that doesn't. It has no possessive parts: Python before 3.11.5 gets those wrong.
    """

    def __init__(
        self, form: KeyForm, columns: Sequence[ValueColumn], nullable: frozenset[str]
    ) -> None:
        self.tabs = len(columns)
        self._has_nulls = bool(nullable)
        self._has_text = any(column.is_text for column in form.columns) or any(
            column.is_text for column in columns
        )
        parts = form.patterns()
        literals = (form.prefix, *form.separators, form.suffix)
        if parts is None or any(set(b"\t\n\\") & set(literal) for literal in literals):
            parts = [_NEVER] * len(form.columns)
        self._kept = [*range(len(parts) + len(columns))]
        self._tails = list[int]()
        for at, column in enumerate(columns, start=len(parts)):
            if column.tail is not None:
                self._tails.append(at + len(self._tails) + 1)
                self._kept[at + 1 :] = [group + 1 for group in self._kept[at + 1 :]]

        def line(group: bytes) -> bytes:
            text = re.escape(form.prefix)
            for part, literal in zip(parts, literals[1:], strict=True):
                text += b"%b%b)%b" % (group, part, re.escape(literal))
            for column in columns:
                null = b"|" + re.escape(NULL) if column.name in nullable else b""
                tail = b"%b%b)?" % (group, column.tail) if column.tail else b""
                text += b"\t%b%b%b)%b" % (group, column.head, null, tail)
            return text + b"\n"

        # Groups cost time, and to tell how far the lines fit needs none.
        self._run = re.compile(b"(?:%b){0,%d}" % (line(b"(?:"), _AT_ONCE))
        self._line = re.compile(line(b"("))
        self._prefix = None if self._tails or any(literals[1:]) else form.prefix

    def is_clean(self, text: bytes, lines: Sequence[bytes], nulls: int) -> bool:
        """Tell whether no key and no value brought a tab, newline or `\\N` of its own.

        `text` is these lines, each ended by a newline; `nulls` of their fields are NULL.
        """
        return (
            text.count(b"\n") == len(lines)
            and text.count(b"\t") == self.tabs * (len(lines) - lines.count(b""))
            and (not self._has_nulls or text.count(b"\\") == nulls)
            and (not self._has_text or text.isascii() or _is_utf8(text))
        )

    def end(self, text: bytes, at: int) -> int:
        """Go on from `at`, the start of a line, over lines that surely fit."""
        match = self._run.match(text, at)
        return match.end() if match else at

    def strip(self, lines: bytes, count: int) -> tuple[bytes, int]:
        """Make rows of `count` lines that fit, and say how many of them had a tail cut off."""
        if self._prefix is not None:
            if not self._prefix:
                return lines, 0
            return lines[len(self._prefix) :].replace(b"\n" + self._prefix, b"\n"), 0
        found: list[tuple[bytes, ...]] = self._line.findall(lines)
        if not self._tails:
            return b"\n".join([*map(b"\t".join, found), b""]), 0
        columns = list(zip(*found, strict=True))
        rows = zip(*[columns[group] for group in self._kept], strict=True)
        tails = [columns[group] for group in self._tails]
        exact = count - sum(map(any, zip(*tails, strict=True)))
        return b"\n".join([*map(b"\t".join, rows), b""]), count - exact


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
