"""Writing a diff to its table in slices, each a short transaction of its own, in key order."""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Final

import asyncpg

from balancesync.errors import RunFailed
from balancesync.history import History
from balancesync.model import Reject, Stamp
from balancesync.target import Diff, Op, Span, Writer
from balancesync.values import show

_MAX_REFUSED_ROWS: Final = 1000
_LOCK_ATTEMPTS: Final = 8
_LOCK_PAUSE_S: Final = 0.1
_DETAIL: Final = 200
# Errors that no row is to blame for: connection, transaction, authorization, catalog, rollback,
# resources, state, operator, system, bug. A trigger may raise whatever else it likes.
# https://www.postgresql.org/docs/current/errcodes-appendix.html
_NOT_OF_A_ROW: Final = frozenset(("08", "25", "28", "3D", "40", "53", "55", "57", "58", "XX"))


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


@dataclass(slots=True)
class _Slice:
    op: Op
    after: int
    last: int
    attempts: int = 0

    @property
    def rows(self) -> int:
        return self.last - self.after

    def halves(self) -> tuple["_Slice", "_Slice"]:
        middle = (self.after + self.last) // 2
        return _Slice(self.op, self.after, middle), _Slice(self.op, middle, self.last)


class Applier:
    """Applies one mapping's diff. `done` tells what is committed, also when `run` raises.

    With `history` enabled each slice's changes are committed with it. `undeletable` are keys whose
    rows the table didn't let go, and why, one line each.
    """

    def __init__(
        self, writer: Writer, history: History, stamp: Stamp, between: Callable[[int], None]
    ) -> None:
        self.done = Applied()
        self._writer = writer
        self._history = history
        self._stamp = stamp
        self._between = between
        self._queue: deque[_Slice] = deque()
        self.undeletable: list[str] = []
        self._refused_updates = 0

    async def run(self, diff: Diff) -> None:
        """Apply inserts, updates and deletes; `between` is called before each slice, and may raise.

        Raises Locked when rows stay locked by others, RunFailed when the table refuses too many.
        """
        config = self._writer.mapping.config
        if config.mode == "upsert":
            self._cut("i", diff.inserted)
        self._cut("u", diff.updated)
        self._cut("d", diff.deleted)
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
        self.done.not_found = diff.updated.rows - self.done.updated - self._refused_updates

    def _cut(self, op: Op, span: Span) -> None:
        if span.rows:
            size = self._writer.batch_rows
            self._queue.extend(
                _Slice(op, after, min(after + size, span.last))
                for after in range(span.after, span.last, size)
            )

    async def _apply(self, piece: _Slice) -> None:
        write = self._write_kept if self._history.enabled else self._write
        try:
            await write(piece)
        except asyncpg.DeadlockDetectedError as error:
            # The fewer rows it locks at a time, the sooner it gets past an application that locks
            # the same ones in another order all the time. One row alone can't be in a deadlock
            # with those who lock rows only.
            if piece.rows == 1:
                self._put_off(piece, error)
            else:
                self._queue.extend(replace(half, attempts=1) for half in piece.halves())
        except asyncpg.LockNotAvailableError as error:
            self._put_off(piece, error)
        except asyncpg.PostgresError as error:
            if not _is_of_a_row(error):
                raise
            await self._writer.refuse_altered()
            await self._narrow(piece, error)

    def _put_off(self, piece: _Slice, error: asyncpg.PostgresError) -> None:
        piece.attempts += 1
        if piece.attempts == _LOCK_ATTEMPTS:
            raise self._writer.locked(error) from error
        self._queue.append(piece)

    def _count(self, op: Op, rows: int) -> None:
        match op:
            case "i":
                self.done.inserted += rows
            case "u":
                self.done.updated += rows
            case "d":
                self.done.deleted += rows

    async def _write(self, piece: _Slice) -> None:
        name = {"i": "insert", "u": "update", "d": "delete"}[piece.op]
        try:
            rows = await self._writer.write(name, piece.after, piece.last, self._stamp)
        except asyncpg.UniqueViolationError:
            if piece.op != "i":
                raise
            # Somebody else inserted such a row since the diff was made. It may come to fewer rows:
            # those that were the very same.
            name = "insert_on_conflict"
            rows = await self._writer.write(name, piece.after, piece.last, self._stamp)
        self._count(piece.op, rows)

    async def _write_kept(self, piece: _Slice) -> None:
        if piece.op == "d":
            await self._keep(piece, "delete")
            return
        try:
            asked, done = await self._keep(piece, "insert" if piece.op == "i" else "update")
        except asyncpg.UniqueViolationError:
            if piece.op != "i":
                raise
            asked, done = await self._keep(piece, "insert_missing")
        if done < asked:
            # Others have been at these rows since the diff was made.
            await self._keep(piece, "settle", piece.op.encode())

    async def _keep(self, piece: _Slice, name: str, *more: object) -> tuple[int, int]:
        asked, done = await self._writer.write_kept(
            name, piece.after, piece.last, self._stamp, *more
        )
        self._count(piece.op, done)
        return asked, done

    async def _narrow(self, piece: _Slice, error: asyncpg.PostgresError) -> None:
        """Halve a slice that the table refuses, down to the row that it is about."""
        if piece.rows > 1:
            self._queue.extendleft(reversed(piece.halves()))
            return
        texts, values = await self._writer.row(piece.op, piece.after)
        key = self._writer.mapping.print_key(texts)
        table = self._writer.mapping.config.table
        # What stands on the next lines is the row itself.
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        detail = f"{table} refuses it: {said}"[:_DETAIL]
        if piece.op == "d":
            # Not a reject, which is a key that is there.
            self.undeletable.append(f"{show(key)}: {detail}")
        else:
            self.done.rejected += 1
            self._refused_updates += piece.op == "u"
            value = "\t".join(text if text is not None else "" for text in values).encode()
            await self._writer.keep_rejects([Reject(key, value, "refused_by_table", detail)])
        if self.done.rejected + len(self.undeletable) > _MAX_REFUSED_ROWS:
            raise RunFailed(
                f"the table {table} refuses more than {_MAX_REFUSED_ROWS:,} rows, the last one"
                f" with: {said}"
            ) from error


def _is_of_a_row(error: asyncpg.PostgresError) -> bool:
    if isinstance(error, asyncpg.InsufficientPrivilegeError):
        return False
    return (error.sqlstate or "XX")[:2] not in _NOT_OF_A_ROW
