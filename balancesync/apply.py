"""Writing a diff to its table in slices, each a short transaction of its own, in key order."""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from typing import Final

import asyncpg

from balancesync.failures import is_of_a_row
from balancesync.history import History
from balancesync.model import Reject, Stamp
from balancesync.target import Diff, Op, Outcome, Slice, Span, Writer
from balancesync.values import show

_LOCK_ATTEMPTS: Final = 8
_LOCK_PAUSE_S: Final = 0.1
_DETAIL: Final = 200
# Rows that are written one by one: so many locks and subtransactions are held at a time.
_SINGLY_ROWS: Final = 500


@dataclass(slots=True)
class Applied:
    """What this program saw committed, in rows."""

    inserted: int = 0
    updated: int = 0
    deleted: int = 0
    # Rows that were gone when their turn came.
    not_found: int = 0
    rejected: int = 0

    @property
    def rows(self) -> int:
        """The rows written."""
        return self.inserted + self.updated + self.deleted

    @property
    def written(self) -> "Applied":
        """What stays so when the run is attempted again."""
        return replace(self, not_found=0, rejected=0)

    def __add__(self, other: "Applied") -> "Applied":
        return Applied(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Applied)))


@dataclass(frozen=True, slots=True)
class Earlier:
    """What earlier attempts of a run committed for a mapping, and the `moments` that they gave
    the table's rows as their `synced_at`.
    """

    applied: Applied = field(default_factory=Applied)
    moments: tuple[datetime, ...] = ()

    @property
    def stored(self) -> int:
        """The rows that were inserted or updated."""
        return self.applied.inserted + self.applied.updated

    def plus(self, applied: Applied, *moments: datetime) -> "Earlier":
        """The same and what one more attempt committed."""
        return Earlier(self.applied + applied.written, self.moments + moments)


@dataclass(slots=True)
class _Piece:
    """A slice to be written, by one statement or, if that won't do, row by row (`singly`)."""

    op: Op
    part: Slice
    attempts: int = 0
    singly: bool = False

    @property
    def width(self) -> int:
        return self.part.last - self.part.after


class Applier:
    """Applies one mapping's diff. `done` tells what is committed, also when `run` raises.

    With `history` enabled each slice's changes are committed with it. `warnings` are what there is
    to say of rows that could not be deleted, and of those that the table altered.

    What was asked for is held against what was written. A slice that comes to fewer rows, or that
    the table refuses or alters, is written row by row: so it's known what became of each.
    """

    def __init__(
        self, writer: Writer, history: History, stamp: Stamp, between: Callable[[int], None]
    ) -> None:
        self.done = Applied()
        self._writer = writer
        self._history = history
        self._stamp = stamp
        self._between = between
        self._queue: deque[_Piece] = deque()
        self._undeletable = 0
        self._first_undeletable = ""
        self._altered = 0
        self._first_altered = ""

    @property
    def warnings(self) -> list[str]:
        """What there is to say, one sentence each."""
        found = []
        if self._undeletable:
            found.append(
                f"{self._undeletable:,} rows whose keys are gone can't be deleted; the first is"
                f" {self._first_undeletable}"
            )
        if self._altered:
            found.append(
                f"{self._altered:,} rows hold other values than Redis: {self._hooks} of the table"
                f" {self._table} changed what was written; the first is {self._first_altered}."
                " They are not written again until Redis, the row or the table changes"
            )
        return found

    @property
    def _table(self) -> str:
        return self._writer.mapping.config.table

    @property
    def _hooks(self) -> str:
        """The table's rules and triggers by name."""
        hooks = self._writer.table.hooks
        names = ", ".join(dict.fromkeys(f"{hook.kind} {hook.name}" for hook in hooks))
        return names or "a rule or trigger"

    async def run(self, diff: Diff) -> None:
        """Apply inserts, updates and deletes; `between` is called before each slice, and may raise.

        Raises Locked when rows stay locked by others.
        """
        config = self._writer.mapping.config
        if config.mode == "upsert":
            self._add("i", diff.inserted)
        self._add("u", diff.updated)
        self._add("d", diff.deleted)
        if self._queue or self._history.enabled:
            await self._writer.mark_history(self._history, self._stamp)
        await self._writer.plan_by_index(many=len(self._queue) > 1)
        while self._queue:
            piece = self._queue.popleft()
            if piece.attempts:
                pause = random.uniform(0, _LOCK_PAUSE_S * 2**piece.attempts)  # noqa: S311  # jitter
                await self._writer.pause(pause)
            self._between(self.done.rows)
            await self._apply(piece)

    def _add(self, op: Op, span: Span) -> None:
        self._queue.extend(_Piece(op, part) for part in span.slices)

    async def _apply(self, piece: _Piece) -> None:
        try:
            if piece.singly:
                await self._write_singly(piece)
            else:
                await self._write(piece)
        except asyncpg.DeadlockDetectedError as error:
            # The fewer rows it locks at a time, the sooner it gets past an application that locks
            # the same ones in another order all the time. One row alone can't be in a deadlock
            # with those who lock rows only.
            if piece.width == 1:
                self._put_off(piece, error)
            else:
                halves = await self._writer.cut(piece.op, piece.part, piece.width // 2)
                self._queue.extend(replace(piece, part=half, attempts=1) for half in halves)
        except asyncpg.LockNotAvailableError as error:
            self._put_off(piece, error)

    def _put_off(self, piece: _Piece, error: asyncpg.PostgresError) -> None:
        piece.attempts += 1
        if piece.attempts == _LOCK_ATTEMPTS:
            raise self._writer.locked(error) from error
        self._queue.append(piece)

    async def _write(self, piece: _Piece) -> None:
        """Write a slice by one statement; what that doesn't do is left to look at more closely."""
        try:
            rows = await self._writer.write(
                piece.op, piece.part, self._stamp, keep=self._history.enabled
            )
        except (asyncpg.DeadlockDetectedError, asyncpg.LockNotAvailableError):
            raise
        except asyncpg.PostgresError as error:
            if not is_of_a_row(error):
                raise
            await self._writer.refuse_altered()
            rows = None
        self._count(piece.op, rows or 0)
        if rows != piece.part.rows:
            # What is committed would be written once more by the same statement.
            await self._look_closer(piece, singly=rows is not None)

    async def _look_closer(self, piece: _Piece, *, singly: bool) -> None:
        parts = [piece.part]
        if piece.width > _SINGLY_ROWS:
            parts = await self._writer.cut(piece.op, piece.part, _SINGLY_ROWS)
        else:
            singly = True
        self._queue.extendleft(_Piece(piece.op, part, 0, singly) for part in reversed(parts))

    async def _write_singly(self, piece: _Piece) -> None:
        outcomes = await self._writer.write_singly(
            piece.op, piece.part, self._stamp, keep=self._history.enabled
        )
        refused = []
        for each in outcomes:
            match each.end:
                case "i" | "u" | "d":
                    self._count(piece.op, 1)
                case "a":
                    self._count(piece.op, 1)
                    self._altered += 1
                    self._first_altered = self._first_altered or show(self._key(each))
                case "g" if piece.op == "u":
                    self.done.not_found += 1
                case "r":
                    refused.append(self._refused(piece.op, each))
        if piece.op == "d":
            # Not rejects, which are keys that are there.
            if refused and not self._undeletable:
                self._first_undeletable = f"{show(refused[0].key)}: {refused[0].detail}"
            self._undeletable += len(refused)
        elif refused:
            self.done.rejected += len(refused)
            await self._writer.keep_rejects(refused)

    def _key(self, outcome: Outcome) -> bytes:
        return self._writer.mapping.print_key(outcome.key)

    def _refused(self, op: Op, outcome: Outcome) -> Reject:
        # What stands on the next lines is the row itself.
        said = (outcome.said or "").partition("\n")[0]
        if outcome.said is None:
            said = f"it was not {'deleted' if op == 'd' else 'written'}, as by {self._hooks}"
        detail = f"{self._table} refuses it: {said}"[:_DETAIL]
        value = "\t".join(text if text is not None else "" for text in outcome.values).encode()
        return Reject(self._key(outcome), value, "refused_by_table", detail)

    def _count(self, op: Op, rows: int) -> None:
        match op:
            case "i":
                self.done.inserted += rows
            case "u":
                self.done.updated += rows
            case "d":
                self.done.deleted += rows
