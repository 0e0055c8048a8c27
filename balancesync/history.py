"""The history: every change of a row, and what a row was at a past moment.

A row as of T is what the first change after T says it held before, or else the row as it is. That
is the truth only while nothing has written rows without keeping its changes. So each mapping's
history has a beginning, and begins anew when it was off for a run, when another table, key or set
of value columns is mapped, when a mapping of another name has written the same, or when a program
that knows of no history has written; what was forgotten by its age moves it on. Before it, the
answer is an error, never a guess. What others change in the table is in no history.

All changes of one run or flush carry one time, when its reading ended, later than any before.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Literal
from uuid import UUID

from balancesync.config import HistoryConfig, MappingConfig
from balancesync.database import NO_LIMIT, Connection, Database, load_sql, quote, quote_literal
from balancesync.errors import HistoryGap
from balancesync.printing import value_text
from balancesync.statements import key_array, staged_type
from balancesync.table import Table
from balancesync.times import exact_time_text

# A program of before step 2 doesn't say which step it knows.
_UNBROKEN: Final = """NOT EXISTS (
    SELECT FROM {schema}.runs AS r
    WHERE r.step IS NULL AND r.mode = 'apply' AND r.recorded_at >= h.since
        AND (r.mapping IS NULL OR r.mapping = h.mapping))"""
# The histories h of other mappings whose rows or values this one writes: it had another name once,
# or will have. $1 is the mapping, $2 its shape, $3 its table, $4 whether it makes and deletes rows.
_OF_OTHERS: Final = """h.mapping <> $1 AND EXISTS (
    SELECT FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE c.oid = $3::bigint AND c.relname = h.shape::jsonb -> 'table' ->> 1
        AND coalesce(n.nspname = h.shape::jsonb -> 'table' ->> 0, pg_table_is_visible(c.oid))
) AND ($4::boolean OR EXISTS (
    SELECT FROM jsonb_array_elements(h.shape::jsonb -> 'values') AS theirs
    JOIN jsonb_array_elements($2::text::jsonb -> 'values') AS ours ON ours -> 0 = theirs -> 0))"""
# A table left to the search path then, and named in full now, is the same if both mean it.
_SAME_SHAPE: Final = """(h.shape = $2 OR (
    h.shape::jsonb - 'table' = $2::text::jsonb - 'table' AND h.shape::jsonb -> 'table' ->> 0 IS NULL
    AND to_regclass(quote_ident(h.shape::jsonb -> 'table' ->> 1)) = to_regclass(
        quote_ident($2::text::jsonb -> 'table' ->> 0) || '.'
        || quote_ident($2::text::jsonb -> 'table' ->> 1))))"""
_BLOCKS: Final = load_sql("changes")
_OF_A_TABLE: Final = ("one_as_of", "all_as_of")
_FORGET_AT_ONCE: Final = 10_000

Values = dict[str, str | None]


@dataclass(frozen=True, slots=True)
class Moment:
    """A time by PostgreSQL's clock, and how far that clock was behind the last change's time."""

    at: datetime
    behind_s: float


@dataclass(frozen=True, slots=True)
class Change:
    """One kept change; `op` is i, u or d, `old` and `new` are value columns as the column prints"""

    at: datetime
    run_id: UUID
    op: Literal["i", "u", "d"]
    old: Values | None
    new: Values | None


class History:
    """Keeps, reads and forgets changes, on whatever connection it's handed."""

    def __init__(self, database: Database, config: HistoryConfig) -> None:
        self.enabled = config.enabled
        self._keep = timedelta(days=config.keep_days)
        self._schema = database.schema
        unbroken = _UNBROKEN.format(schema=database.schema)
        self._sql = {
            name: sql.format(
                schema=database.schema,
                unbroken=unbroken,
                of_others=_OF_OTHERS,
                same_shape=_SAME_SHAPE,
            )
            for name, sql in _BLOCKS.items()
            if name not in _OF_A_TABLE
        }

    async def moment(self, connection: Connection) -> Moment:
        """Now by PostgreSQL's clock, but later than the last change, should the clock go back.

        To be asked under the writer's lock, when the reading of a run or flush has ended.
        """
        [row] = await connection.fetch(self._sql["moment"])
        return Moment(row["at"], (row["at"] - row["now"]).total_seconds())

    async def begin(
        self, connection: Connection, mapping: MappingConfig, table: Table, at: datetime
    ) -> None:
        """Before a mapping's changes of the moment `at` are kept: see that its history goes on.

        If it doesn't, because of what may have been missed or never was kept, it begins at `at`.
        Under another name these changes are missed: the histories of such mappings end.
        """
        await connection.execute(self._sql["begin"], *_written(mapping, table), at)

    async def end(self, connection: Connection, mapping: MappingConfig, table: Table) -> None:
        """Before rows are written whose changes are not kept: the mapping's history has a gap, and
        so has any that another one has of them.
        """
        await connection.execute(self._sql["end"], *_written(mapping, table))

    async def since(self, connection: Connection, mapping: MappingConfig) -> datetime | None:
        """Since when every change of the mapping is kept; None if that isn't so."""
        now = await connection.fetchval("SELECT now()")
        found: datetime | None = await connection.fetchval(
            self._sql["since"], mapping.name, _shape(mapping)
        )
        return max(found, now - self._keep) if found and self.enabled else None

    async def require(
        self, connection: Connection, mapping: MappingConfig, moment: datetime
    ) -> None:
        """Raise HistoryGap unless it's known what the mapping's rows were at this moment."""
        name = f'mapping "{mapping.name}"'
        if not self.enabled:
            raise HistoryGap(f"{name}: no past is known, for [history] is not enabled")
        since = await self.since(connection, mapping)
        if since is None:
            raise HistoryGap(
                f"{name}: no past is known yet; changes are kept from the next sync on"
            )
        if moment < since:
            begin = exact_time_text(since)
            raise HistoryGap(f"{name}: the past is known since {begin} only; see docs/history.md")
        if moment > await connection.fetchval("SELECT clock_timestamp()"):
            raise HistoryGap(f"{name}: {exact_time_text(moment)} is yet to come")

    async def changes(
        self, connection: Connection, mapping: str, key: Sequence[str], limit: int
    ) -> list[Change]:
        """The kept changes of one key (canonical texts of its columns), the newest first."""
        rows = await connection.fetch(self._sql["changes"], mapping, list(key), limit)
        return [
            Change(row["at"], row["run_id"], row["op"], _values(row["old"]), _values(row["new"]))
            for row in rows
        ]

    async def one_as_of(
        self,
        connection: Connection,
        mapping: MappingConfig,
        table: Table,
        key: Sequence[str],
        moment: datetime,
    ) -> Values | None:
        """The value columns of one row at a moment, as the columns print them; None: no row.

        Raises HistoryGap if that isn't known. `key` are canonical texts, the table must exist.
        """
        await self.require(connection, mapping, moment)
        columns = mapping.value_columns
        sql = _BLOCKS["one_as_of"].format(
            schema=self._schema,
            target=table.sql_name,
            key=quote(mapping.key_columns[0]),
            values=", ".join(
                f"{value_text(f't.{quote(name)}', mapping.types[name])} AS v{number}"
                for number, name in enumerate(columns, 1)
            ),
            same_key=" AND ".join(
                # The texts are canonical, so the cast can't fail.
                f"t.{quote(name)} = ($2::text[])[{number}]::{mapping.types[name].sql}"
                for number, name in enumerate(mapping.key_columns, 1)
            ),
        )
        [row] = await connection.fetch(sql, mapping.name, list(key), moment)
        # Between the two questions, a run may have forgotten what this one needed.
        await self.require(connection, mapping, moment)
        if row["changed"]:
            return _values(row["old"])
        if not row["there"]:
            return None
        return {name: row[f"v{number}"] for number, name in enumerate(columns, 1)}

    def all_as_of(self, mapping: MappingConfig, table: Table) -> str:
        """The SELECT of all rows of a mapping as of a moment; it may stand as a relation in FROM.

        $1 is the mapping's name, $2 the moment. Its columns are the table's: key columns, value
        columns, `synced_at` if there is one (of a row that has changed since, the moment itself).
        A row that was deleted since comes back, one that was inserted since doesn't come. Rows come
        in no order; to read them in parts, declare a cursor or put them aside in a temporary table:
        the server spills to disk what doesn't fit its work_mem. Ask `require` before and after, for
        a run may forget meanwhile what the answer needs.
        """
        keys, values, types = mapping.key_columns, mapping.value_columns, mapping.types
        columns = [quote(name) for name in (*keys, *values)]
        later = [f"key[{number}]::{types[name].sql}" for number, name in enumerate(keys, 1)]
        # Not as the column's own type: narrower than it was, it would round or cut.
        later += [f"(old ->> {quote_literal(each)})::{staged_type(types[each])}" for each in values]
        if mapping.synced_at:
            columns.append(quote(mapping.synced_at))
            later.append("$2")
        return _BLOCKS["all_as_of"].format(
            schema=self._schema,
            target=table.sql_name,
            t_columns=", ".join(f"t.{column}" for column in columns),
            later_columns=", ".join(later),
            keys_not_null=" AND ".join(f"t.{quote(name)} IS NOT NULL" for name in keys),
            t_key_texts=key_array(mapping, [f"t.{quote(name)}" for name in keys]),
        )

    async def forget(self, connection: Connection) -> int:
        """Delete the oldest changes beyond `history.keep_days`, one slice; return how many rows.

        There may be more while it returns as many as `is_full_slice` says.
        """
        edge = await connection.fetchval("SELECT now()") - self._keep
        gone: int = await connection.fetchval(
            self._sql["forget"], edge, _FORGET_AT_ONCE, timeout=NO_LIMIT
        )
        return gone

    @staticmethod
    def is_full_slice(rows: int) -> bool:
        """Whether `forget` may find more."""
        return rows == _FORGET_AT_ONCE


def _shape(mapping: MappingConfig) -> str:
    """What a mapping's changes are about. With another one, older changes answer no question."""
    types = mapping.types
    return json.dumps(
        {
            "table": mapping.table_name,
            "key": [[name, types[name].name] for name in mapping.key_columns],
            "values": sorted([name, types[name].name] for name in mapping.value_columns),
        }
    )


def _written(mapping: MappingConfig, table: Table) -> tuple[str, str, int | None, bool]:
    """$1 to $4 of `_OF_OTHERS`."""
    return mapping.name, _shape(mapping), table.oid, mapping.mode == "upsert"


def _values(text: str | None) -> Values | None:
    return None if text is None else json.loads(text)
