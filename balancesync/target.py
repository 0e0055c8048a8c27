"""What a run does to one table: stage, diff and apply, in the session that holds the lock."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import BinaryIO, Final, Literal, TypeAlias, cast

import asyncpg

from balancesync.database import NO_LIMIT
from balancesync.errors import Locked, Transient
from balancesync.history import History
from balancesync.mapping import Mapping
from balancesync.model import Batch, Reject, Stamp
from balancesync.session import Session
from balancesync.statements import staged_columns, statements
from balancesync.table import Table, refuse_published

# The last one is a restore's: a key that is left as it is.
Op = Literal["i", "u", "d", "k"]
# Rows of a diff: the number of each, and the texts of its key columns.
Page: TypeAlias = list[tuple[int, tuple[str, ...]]]

# Above this many rows of the table for each staged one, its key index is cheaper than one pass.
_INDEX_RATIO: Final = 4
# A few hundred sampled rows tell the planner what it must know; 30,000 cost a tenth of a second.
_STATISTICS_TARGET: Final = 1
_STAGE_BYTES: Final = 1 << 20
# Dead rows of the temporary tables: from here on, reading over them costs more than a VACUUM.
VACUUM_ROWS: Final = 20_000
_ALL: Final = (1 << 63) - 1
# A reject is kept to be looked at: more of its value would only fill the table.
_KEPT_VALUE_BYTES: Final = 65_536


@dataclass(slots=True)
class Slice:
    """So many rows of a diff with one op: they lie within after < n <= last, others among them."""

    rows: int
    after: int
    last: int


@dataclass(slots=True)
class Span:
    """The rows of a diff with one op, in the slices that they are written in."""

    slices: list[Slice] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """How many they are."""
        return sum(each.rows for each in self.slices)

    @property
    def last(self) -> int:
        """The highest number of a row."""
        return max((each.last for each in self.slices), default=0)


@dataclass(slots=True)
class Diff:
    """What staging and target differ in. `inserted` are keys without a row, also of `update`.

    `altered` are rows that hold what the table has made of the values that are to be stored: they
    aren't written again.
    """

    stored: int = 0
    rejected: int = 0
    target_rows: int = 0
    absent: int = 0
    altered: int = 0
    inserted: Span = field(default_factory=Span)
    updated: Span = field(default_factory=Span)
    deleted: Span = field(default_factory=Span)


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the diff as text: canonical key columns, new values, old values."""

    op: Op
    key: tuple[str, ...]
    new: tuple[str | None, ...]
    old: tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one row that was written on its own: see `row_end` in `sql/singly.sql`.

    `key` and `values` are texts, of rows that the table refused or altered; `said` is its error, if
    it raised one.
    """

    end: Literal["i", "u", "d", "a", "s", "g", "r"]
    said: str | None
    key: tuple[str, ...]
    values: tuple[str | None, ...]


class Writer:
    """One mapping's part of a session: its staging table, its diff, its slices.

    With `first` it's a second look: what that one's diff would delete is all that this one's may.
    """

    def __init__(
        self,
        session: Session,
        mapping: Mapping,
        table: Table,
        number: int,
        *,
        first: "Writer | None" = None,
    ) -> None:
        self.mapping = mapping
        self.table = table
        self._session = session
        self._staging = f"staging_{number}"
        self._diff = f"pg_temp.diff_{number}"
        self._gone = "diff_gone_again" if first else "diff_gone"
        self._keys, self._values = staged_columns(mapping.config)
        self._sql = statements(
            mapping.config,
            table,
            staging=f"pg_temp.{self._staging}",
            diff=self._diff,
            first=(first or self)._diff,
            schema=session.database.schema,
            write_singly=f"pg_temp.write_singly_{number}",
        )
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._staged = 0
        self._rejected = 0
        self._rejected_rows = 0
        self._indexed = False
        self._writes_singly = False
        self._dead = 0

    async def _execute(self, sql: str, *arguments: object, whole: bool = False) -> int:
        status: str = await self._session.watch(
            self._session.connection.execute(sql, *arguments, timeout=NO_LIMIT), whole=whole
        )
        return int(status.rpartition(" ")[2] or 0) if status[-1:].isdigit() else 0

    async def _fetch(
        self, sql: str, *arguments: object, whole: bool = False
    ) -> list[asyncpg.Record]:
        rows: list[asyncpg.Record] = await self._session.watch(
            self._session.connection.fetch(sql, *arguments, timeout=NO_LIMIT), whole=whole
        )
        return rows

    async def prepare(self) -> None:
        """Create the session's temporary tables for this mapping."""
        await self._execute(self._sql["create"])

    async def stage(self, batch: Batch) -> None:
        """Take in one parsed batch; sends COPYs of about a megabyte, with nothing open between."""
        self._staged += batch.count
        if batch.count:
            self._pending.append(batch.rows)
            self._pending_bytes += len(batch.rows)
        if batch.rejects:
            # In the order of reading: the later read of a key wins.
            await self.flush()
            await self._stage_rejects(batch.rejects)
        if self._pending_bytes >= _STAGE_BYTES:
            await self.flush()

    async def flush(self) -> None:
        """Send what `stage` holds back."""
        if self._pending:
            lines, self._pending, self._pending_bytes = b"".join(self._pending), [], 0
            await self._copy(lines, [*self._keys, *self._values])

    async def _copy(self, lines: bytes, columns: Sequence[str], *, table: str = "") -> None:
        # The driver takes bytes for the path of a file, and reads a file in a thread.
        data = cast(BinaryIO, memoryview(lines))
        await self._session.watch(
            self._session.connection.copy_to_table(
                table or self._staging,
                schema_name="pg_temp",
                source=data,
                columns=columns,
                format="text",
                timeout=NO_LIMIT,
            )
        )

    async def _stage_rejects(self, rejects: Sequence[Reject]) -> None:
        rows = [reject.row + b"\tt\n" for reject in rejects if reject.row is not None]
        self._rejected += len(rejects)
        self._rejected_rows += len(rows)
        if rows:
            await self._copy(b"".join(rows), [*self._keys, "rejected"])
        await self.keep_rejects(rejects)

    async def keep_rejects(self, rejects: Sequence[Reject]) -> None:
        """Put rejects aside in the session, to be recorded when the run ends."""
        name = self.mapping.name
        await self._session.watch(
            self._session.connection.copy_records_to_table(
                "staged_rejects",
                schema_name="pg_temp",
                records=[
                    (name, r.key, r.value and r.value[:_KEPT_VALUE_BYTES], r.reason, r.detail)
                    for r in rejects
                ],
                columns=["mapping", "key", "value", "reason", "detail"],
                timeout=NO_LIMIT,
            )
        )

    async def diff(self) -> Diff:
        """Compare what is staged with the table, as one snapshot sees it; raises Locked."""
        await self.flush()
        try:
            return await self._differ()
        except asyncpg.LockNotAvailableError as error:
            raise self.locked(error) from error

    def locked(self, error: asyncpg.PostgresError) -> Locked:
        """What there is to say of an application that holds up the run."""
        return Locked(
            f"{self.mapping.config.table} or rows of it stay locked by another session: {error};"
            " see postgres.lock_timeout"
        )

    async def _differ(self) -> Diff:
        found = Diff()
        async with self._session.transaction("REPEATABLE READ"):
            await self._analyze()
            found.stored = await self._drop_duplicates()
            found.rejected = await self._count_rejects()
            if self.table.exists:
                found.target_rows = await self._count(self._sql["count_target"])
            await self._compare(found)
        return found

    async def _analyze(self) -> None:
        # Autovacuum never sees a temporary table.
        await self._execute(f"SET LOCAL default_statistics_target = {_STATISTICS_TARGET}")
        await self._execute(f"ANALYZE pg_temp.{self._staging}")

    async def _count(self, sql: str, *arguments: object) -> int:
        return int((await self._fetch(sql, *arguments))[0][0])

    async def _count_rejects(self) -> int:
        if not self._rejected:
            return 0
        return await self._count(self._sql["count_rejects"], self.mapping.name)

    async def count_pruned_back(self) -> int:
        """How many of the keys that were pruned since the last success are there again."""
        return await self._count(self._sql["count_pruned_back"], self.mapping.name)

    async def staged_keys(self, limit: int) -> list[bytes]:
        """Up to `limit` of the keys that were read, as they stand in Redis."""
        rows = await self._fetch(self._sql["staged_keys"], limit)
        return [self.mapping.print_key(tuple(row)) for row in rows]

    async def count_known(self, absent: int, since: datetime | None) -> int:
        """How many rows have or had keys since the last success.

        These are all rows but those `absent` then, if no others insert rows; and those written
        since that moment, if there is one and `synced_at` can be read.
        """
        config = self.mapping.config
        counts = [0]
        if config.mode == "upsert":
            counts.append(await self._count(self._sql["count_target"]) - absent)
        if since and self._tells_times:
            counts.append(await self._count(self._sql["count_written"], since))
        return max(counts)

    async def count_written_lost(self, since: datetime | None) -> int:
        """How many rows written since a moment have no key among those that were read."""
        if since is None or not self._tells_times:
            return 0
        return await self._count(self._sql["count_written_lost"], since)

    async def count_standing(self, moments: Sequence[datetime]) -> int | None:
        """How many rows written at these moments this attempt found as they should be; None where
        `synced_at` can't be read.
        """
        if not self._tells_times:
            return None
        return await self._count(self._sql["count_standing"], list(moments))

    @property
    def _tells_times(self) -> bool:
        column = self.table.columns.get(self.mapping.config.synced_at)
        return column is not None and column.may_select

    async def _drop_duplicates(self) -> int:
        """Keep the latest read of each key; return how many keys have a value to store."""
        if await self._count(self._sql["count_keys"]) == self._staged + self._rejected_rows:
            return self._staged
        superseded = await self._fetch(self._sql["drop_earlier"])
        keys = [self.mapping.print_key(tuple(row)) for row in superseded]
        await self._execute(self._sql["withdraw_rejects"], self.mapping.name, keys)
        return await self._count(self._sql["count_staged"])

    async def _compare(self, found: Diff) -> None:
        if not found.target_rows:
            await self._execute(self._sql["diff_new"])
            await self._summarize(found)
            return
        await self._join(found.target_rows)
        found.altered = await self._skip_altered()
        await self._summarize(found)
        sql = self._sql
        rejected = await self._count(sql["count_rejected_rows"]) if self._rejected_rows else 0
        found.absent = found.target_rows - (found.stored - found.inserted.rows) - rejected
        if found.absent and self.mapping.config.on_absent == "delete":
            await self._execute(sql[self._gone], max(found.inserted.last, found.updated.last))
            await self._summarize(found)

    async def _join(self, target_rows: int) -> None:
        """Put what differs into the diff, by whichever way is fast for such a table."""
        by_index = target_rows > _INDEX_RATIO * self._staged
        if by_index:
            # One look into the key index for each staged row, in key order, whatever the
            # planner believes of a table that was never analyzed.
            for setting in ("enable_seqscan", "enable_hashjoin", "enable_mergejoin"):
                await self._execute(f"SET LOCAL {setting} = off")
        in_order = by_index or await self._sorts_first()
        await self._execute(self._sql["diff_join_in_order" if in_order else "diff_join"])

    async def _skip_altered(self) -> int:
        """Take out of the diff what the table would make the same of again; return how many."""
        if not self.table.hooks:
            return 0
        if not await self._has_altered():
            return 0
        name, digest = self.mapping.name, self.table.hooks_digest
        return await self._execute(self._sql["skip_altered"], name, digest)

    async def _has_altered(self) -> bool:
        # A dry run may come before the table of those is there.
        known = f"{self._session.database.schema}.altered"
        [[is_there]] = await self._fetch("SELECT to_regclass($1) IS NOT NULL", known)
        return is_there and bool(
            (await self._fetch(self._sql["has_altered"], self.mapping.name))[0][0]
        )

    async def forget_altered(self) -> None:
        """Forget what rows no longer hold, or what other rules and triggers made of values."""
        if await self._has_altered():
            digest = self.table.hooks_digest
            await self._execute(self._sql["forget_altered"], self.mapping.name, digest)

    async def _sorts_first(self) -> bool:
        """Whether staged rows are best sorted before they are joined.

        A table that lies in key order is met by its key index, and the rows come out in the order
        of the diff; a hash join jumps about in memory, and sorts after it. Texts sort slowly.
        """
        columns = self.table.columns
        if any(columns[name].collation for name in self.mapping.config.key_columns):
            return False
        rows = await self._fetch(self._sql["is_in_key_order"])
        return bool(rows and rows[0][0])

    async def _summarize(self, found: Diff) -> None:
        spans = await self._spans(0, _ALL, self.batch_rows)
        found.inserted, found.updated, found.deleted = (spans[op] for op in ("i", "u", "d"))

    async def _spans(self, after: int, last: int, size: int) -> dict[str, Span]:
        """The rows with after < n <= last, by op, in slices of up to `size` rows."""
        spans: dict[str, Span] = {"i": Span(), "u": Span(), "d": Span()}
        for row in await self._fetch(self._sql["slices"], after, last, size):
            spans[row["op"]].slices.append(Slice(row["rows"], row["after"], row["last"]))
        return spans

    async def cut(self, op: Op, whole: Slice, size: int) -> list[Slice]:
        """A slice in smaller ones of up to `size` rows."""
        return (await self._spans(whole.after, whole.last, size))[op].slices

    async def deleted(self) -> Span:
        """What the diff still deletes, when some of it was forgotten."""
        return (await self._spans(0, _ALL, self.batch_rows))["d"]

    async def page(self, op: Op, after: int, limit: int) -> Page:
        """Up to `limit` rows of the diff behind number `after`: number and key column texts."""
        if after:
            # One page can be had by one pass; many of them would be as many passes.
            await self._index()
        rows = await self._fetch(self._sql["page"], after, limit, op.encode())
        return [(row["n"], tuple(row[name] for name in self._keys)) for row in rows]

    async def page_with_values(
        self, op: Op, after: int, limit: int
    ) -> list[tuple[int, tuple[str, ...], tuple[str | None, ...]]]:
        """The same, and the new values as they are staged."""
        if after:
            await self._index()
        rows = await self._fetch(self._sql["page_with_values"], after, limit, op.encode())
        return [
            (
                row["n"],
                tuple(row[name] for name in self._keys),
                tuple(row[name] for name in self._values),
            )
            for row in rows
        ]

    async def count_moving(self) -> int:
        """How many of the keys that differ had another value and another row at the look before."""
        return await self._count(self._sql["count_moving"])

    async def drop_moving(self) -> dict[Op, int]:
        """Take these out of the diff; returns how many there were, by op."""
        return {row["op"]: row["rows"] for row in await self._fetch(self._sql["drop_moving"])}

    async def forget(self, numbers: Sequence[int]) -> None:
        """Take rows out of the diff, by their numbers."""
        await self._execute(self._sql["forget"], list(numbers))

    async def sample(self, op: Op, limit: int) -> list[Row]:
        """The first `limit` rows of the diff with this op, in key order."""
        rows = await self._fetch(self._sql["sample"], op.encode(), limit)
        olds = [f"o{number}" for number, _ in enumerate(self._values, 1)]
        return [
            Row(
                op,
                tuple(row[name] for name in self._keys),
                tuple(row[name] for name in self._values),
                tuple(row[name] for name in olds),
            )
            for row in rows
        ]

    async def totals(self, ops: Sequence[Op]) -> dict[str, str]:
        """How far the diff's `ops` would move the total of each numeric value column, exactly."""
        rows = await self._fetch(self._sql["totals"], [op.encode() for op in ops])
        return {name: text for name, text in rows[0].items() if text is not None}

    @property
    def batch_rows(self) -> int:
        """How many rows one transaction may change."""
        return self._session.database.config.apply_batch

    async def plan_by_index(self, *, many: bool) -> None:
        """Make the session ready to apply: rows are reached, and so locked, in key order.

        A nested loop keeps the order of its outer side, the diff; a hash or merge join wouldn't.
        """
        if many:
            await self._index()
        for setting in ("enable_hashjoin", "enable_mergejoin"):
            await self._execute(f"SET {setting} = off")

    async def _index(self) -> None:
        if not self._indexed:
            self._indexed = True
            await self._execute(self._sql["index_diff"])

    async def write(self, op: Op, part: Slice, stamp: Stamp, *, keep: bool) -> int | None:
        """Apply a slice by one statement and transaction; return how many rows were written.

        Where the table has rules or triggers, it's looked at first whether all rows are as asked:
        None if not, and nothing is written. With `keep` the changes are written to the history.
        Raises Transient if the table was altered: nothing is written to another one.
        """
        write = self._write_and_look if self.table.hooks else self._write
        rows = await write(op, part, stamp, keep=keep)
        if rows != part.rows:
            await self.refuse_altered()
        return rows

    async def _write(self, op: Op, part: Slice, stamp: Stamp, *, keep: bool) -> int | None:
        name = {"i": "insert", "u": "update", "d": "delete"}[op]
        if keep:
            arguments = (part.after, part.last, stamp.at, stamp.run_id, self.mapping.name)
            return int((await self._fetch(self._sql[f"{name}_kept"], *arguments, whole=True))[0][0])
        times = [stamp.at] if self.mapping.config.synced_at and op != "d" else []
        return await self._execute(self._sql[name], part.after, part.last, *times, whole=True)

    async def _write_and_look(self, op: Op, part: Slice, stamp: Stamp, *, keep: bool) -> int | None:
        await self._execute("BEGIN ISOLATION LEVEL READ COMMITTED", whole=True)
        try:
            await self._write(op, part, stamp, keep=keep)
            # Triggers that wait for the end of the transaction may alter rows, too.
            await self._execute("SET CONSTRAINTS ALL IMMEDIATE", whole=True)
            look = self._sql["has_undeleted" if op == "d" else "has_unwritten"]
            [[differs]] = await self._fetch(look, part.after, part.last, whole=True)
        except asyncpg.PostgresError:
            if not self._session.connection.is_closed():
                await self._execute("ROLLBACK", whole=True)
            raise
        await self._execute("ROLLBACK" if differs else "COMMIT", whole=True)
        return None if differs else part.rows

    async def write_singly(self, op: Op, part: Slice, stamp: Stamp, *, keep: bool) -> list[Outcome]:
        """Apply a slice row by row, in one transaction: what the table refuses is undone alone."""
        if not self._writes_singly:
            await self._index()
            await self._execute(self._sql["create_singly"])
            self._writes_singly = True
        rows = await self._fetch(
            self._sql["singly"],
            part.after,
            part.last,
            stamp.at,
            stamp.run_id,
            self.mapping.name,
            op.encode(),
            keep,
            self.table.hooks_digest,
            whole=True,
        )
        if not rows:
            await self.refuse_altered()
        return [
            Outcome(
                row["row_end"],
                row["row_said"],
                tuple(row["row_key"] or ()),
                tuple(row["row_values"] or ()),
            )
            for row in rows
        ]

    async def refuse_altered(self) -> None:
        """Raise Transient if the table isn't the one any more that was looked at, or TargetMismatch
        if a publication made since keeps its rows from being written.
        """
        [[is_same]] = await self._fetch(self._sql["is_same"])
        if not is_same:
            config = self.mapping.config
            raise Transient(
                f'mapping "{config.name}": the table {config.table} was altered or replaced during'
                " the run; the next attempt looks at it anew"
            )
        await self._session.watch(
            refuse_published(self._session.connection, self.mapping.config, self.table)
        )

    async def pause(self, seconds: float) -> None:
        """Wait between two slices, though no longer than the run goes on."""
        await self._session.pause(seconds)

    async def mark_history(self, history: History, stamp: Stamp) -> None:
        """Say, before the first slice, whether this mapping's history goes on or has a gap."""
        connection, config = self._session.connection, self.mapping.config
        if history.enabled:
            await self._session.watch(history.begin(connection, config, self.table, stamp.at))
        else:
            await self._session.watch(history.end(connection, config, self.table))

    async def clear(self) -> None:
        """Forget what was staged and what differed, for a session that goes on.

        By DELETE: to create or truncate tables several times a second would bloat the catalogs.
        What it leaves behind autovacuum never sees in a temporary table, so it's vacuumed here.
        """
        self._dead += await self._execute(self._sql["empty_staging"])
        self._dead += await self._execute(self._sql["empty_diff"])
        # Where reading broke off, some of it waits to be sent.
        self._pending, self._pending_bytes = [], 0
        self._staged = self._rejected = self._rejected_rows = 0
        if self._dead > VACUUM_ROWS:
            self._dead = 0
            await self._execute(self._sql["vacuum"])
