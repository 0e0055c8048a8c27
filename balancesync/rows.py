"""A mapping's rows on their way back to Redis, as the texts that Redis is to hold.

They're read by one pass over the table, as one snapshot sees it, and put aside by the server. A
long restore so holds no snapshot, which would keep vacuum from every table of the database, and it
neither sorts nor jumps about in the table as pages in key order would. It costs the server a
temporary file of the size of the rows.
"""

import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from balancesync.columns import ColumnType
from balancesync.config import MappingConfig
from balancesync.database import NO_LIMIT, Connection, load_sql, quote
from balancesync.session import Session
from balancesync.statements import key_text
from balancesync.values import INTEGERS, TEXTS

_PAGE_ROWS: Final = 5_000
_FIRST_PAGE: Final = 50
_GROWTH: Final = 10
_PAGE_BYTES: Final = 2_000_000
# What a time may be in ISO 8601 with four digits of the year; what lies outside is left as it is
# printed, for the mapping to reject.
_YEARS: Final = "'0001-01-01 00:00:00Z' AND '9999-12-31 23:59:59.999999Z'"


@dataclass(frozen=True, slots=True)
class Selection:
    """Which rows: a relation with the table's columns, as SQL, and a condition on it as `t`.

    `arguments` are those of both. `check` is asked in the same snapshot before, and may raise.
    """

    relation: str
    wanted: str
    arguments: tuple[Any, ...] = ()
    check: Callable[[Connection], Awaitable[None]] | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """Some rows, by column: the canonical texts of the key columns, those of the value columns."""

    keys: list[tuple[bytes, ...]]
    values: list[tuple[bytes | None, ...]]

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(self.keys[0])


class Rows:
    """The rows of one mapping that a selection names; `number` is the mapping's in this session."""

    def __init__(
        self, session: Session, config: MappingConfig, selection: Selection, number: int
    ) -> None:
        self._session = session
        self._key_count = len(config.key_columns)
        self._arguments = selection.arguments
        self._check = selection.check
        parts = {
            # One name for each: the driver keeps what it knows of the columns of a FETCH.
            "cursor": f"rows_{number}",
            "relation": selection.relation,
            "wanted": selection.wanted,
            "keys_not_null": " AND ".join(f"t.{quote(k)} IS NOT NULL" for k in config.key_columns),
            "key_bytes": ", ".join(_as_bytes(config, config.key_columns)),
            "value_bytes": ", ".join(_as_bytes(config, config.value_columns)),
            "rows": "{rows}",
        }
        self._sql = {name: sql.format_map(parts) for name, sql in load_sql("rows").items()}

    async def put_aside(self) -> int:
        """Read the rows, all at one moment; return how many there are."""
        async with self._session.transaction("REPEATABLE READ"):
            if self._check is not None:
                await self._check(self._session.connection)
            await self._execute(self._sql["put_aside"], *self._arguments)
        moved = await self._execute(self._sql["count"])
        await self._execute(self._sql["rewind"])
        return int(re.sub(r"\D", "", moved))

    async def pages(self) -> AsyncGenerator[Page, None]:
        """Give the rows that were put aside, and drop them in the end.

        A page is so small that its rows take about two megabytes.
        """
        count, fetched = _FIRST_PAGE, 1
        while fetched:
            sql = self._sql["fetch"].format(rows=count)
            connection = self._session.connection
            rows = await self._session.watch(connection.fetch(sql, timeout=NO_LIMIT))
            fetched = len(rows)
            if fetched:
                columns = list(zip(*rows, strict=True))
                page = Page(columns[: self._key_count], columns[self._key_count :])
                size = sum(sum(map(len, filter(None, column))) for column in columns)
                fitting = max(1, _PAGE_BYTES * fetched // (size + 1))
                count = min(_PAGE_ROWS, count * _GROWTH, fitting)
                yield page
        await self._execute(self._sql["close"])

    async def _execute(self, sql: str, *arguments: Any) -> str:
        connection = self._session.connection
        return await self._session.watch(connection.execute(sql, *arguments, timeout=NO_LIMIT))


def restorable(config: MappingConfig) -> str:
    """The condition on rows that hold something for Redis.

    What is NULL throughout can't be written as a string or a hash. In a table of the application a
    row that balancesync has never written, with nothing in it but zeros and NULLs, is a user
    who never had a balance, or has none: millions of such keys may never have been in Redis.
    """
    values = [f"t.{quote(name)}" for name in config.value_columns]
    conditions = []
    if config.type != "json" or config.mode == "update":
        conditions.append(" OR ".join(f"{value} IS NOT NULL" for value in values))
    if config.mode == "update" and config.synced_at:
        nothing = " AND ".join(
            f"coalesce({value}, 0) = 0" if _is_number(config.types[name]) else f"{value} IS NULL"
            for value, name in zip(values, config.value_columns, strict=True)
        )
        conditions.append(f"t.{quote(config.synced_at)} IS NOT NULL OR NOT ({nothing})")
    return " AND ".join(f"({condition})" for condition in conditions) or "true"


def _is_number(kind: ColumnType) -> bool:
    return kind.name in INTEGERS or kind.name == "numeric"


def _as_bytes(config: MappingConfig, names: Sequence[str]) -> list[str]:
    """The columns as the bytes of their canonical texts."""
    return [_bytes(f"t.{quote(name)}", config.types[name]) for name in names]


def _bytes(expression: str, kind: ColumnType) -> str:
    if kind.name in TEXTS:
        return f"convert_to({expression}, 'UTF8')"
    text = key_text(expression, kind)
    if kind.name == "timestamptz":
        text = f"CASE WHEN {expression} BETWEEN {_YEARS} THEN {text} ELSE {expression}::text END"
    # Twice as fast as convert_to, and the same for texts without a backslash.
    return f"({text})::bytea"
