"""The target table as it really is: what the catalogs say, held against the mapping."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from balancesync.config import MappingConfig
from balancesync.database import Connection, load_sql, quote
from balancesync.errors import RightMissing, TargetMismatch

_SQL: Final = load_sql("table")
_KINDS: Final = {
    "v": "a view",
    "m": "a materialized view",
    "f": "a foreign table",
    "S": "a sequence",
    "i": "an index",
    "c": "a composite type",
}
_SYNCED_AT_TYPES: Final = ("timestamp with time zone", "timestamp without time zone")


@dataclass(frozen=True, slots=True)
class Column:
    """One column: `type` as format_type() prints it, `collation` quoted, None if it has none."""

    name: str
    type: str
    not_null: bool
    filled: bool
    generated: bool
    deterministic: bool
    collation: str | None
    may_select: bool
    may_insert: bool
    may_update: bool


@dataclass(frozen=True, slots=True)
class Hook:
    """A rule or trigger that acts on what is written; `digest` is one of all that it consists of.

    One `before_row` may drop a row or change it.
    """

    kind: Literal["rule", "trigger"]
    name: str
    before_row: bool
    digest: str


@dataclass(frozen=True, slots=True)
class Table:
    """A table that fits its mapping, or, with `oid` None, one that is still to be created."""

    sql_name: str
    oid: int | None = None
    columns: dict[str, Column] = field(default_factory=dict)
    role: str = ""
    hooks: tuple[Hook, ...] = ()

    @property
    def exists(self) -> bool:
        """Whether the table is there already."""
        return self.oid is not None

    @property
    def hooks_digest(self) -> str:
        """What all its rules and triggers consist of, in short; empty if there are none."""
        digests = "".join(hook.digest for hook in self.hooks)
        return hashlib.sha256(digests.encode()).hexdigest() if digests else ""

    def nullable(self, mapping: MappingConfig) -> frozenset[str]:
        """The value columns that may be NULL; none of a table that balancesync creates."""
        return frozenset(
            name
            for name in mapping.value_columns
            if self.exists and not self.columns[name].not_null
        )

    def grant(self, *rights: str) -> str:
        """The statement that gives this role such rights on the table."""
        return f"GRANT {', '.join(rights)} ON {self.sql_name} TO {quote(self.role)}"


async def inspect(connection: Connection, mapping: MappingConfig) -> Table:
    """Look the mapping's table up and check that it fits.

    Raises TargetMismatch with everything that differs in one line, or RightMissing.
    """
    name = quote(*mapping.table_name)
    relation = await connection.fetchrow(_SQL["relation"], name)
    if relation is None:
        await _refuse_hidden(connection, mapping)
        if mapping.mode == "update":
            lacks = "" if await _has_schema(connection, mapping) else ", nor does its schema"
            raise TargetMismatch(
                f'mapping "{mapping.name}": the table {mapping.table} does not exist{lacks}, and'
                ' mode = "update" never creates one; create it or correct mapping.table'
            )
        return Table(name)
    # By its full name from here on: a search path may change, and then another table be meant.
    name = quote(relation["schema"], relation["name"])
    if relation["kind"] not in ("r", "p"):
        kind = _KINDS.get(relation["kind"], "no table")
        raise TargetMismatch(
            f'mapping "{mapping.name}": {mapping.table} is {kind}; only a table can'
            " be written safely"
        )
    rows = await connection.fetch(_SQL["columns"], relation["oid"])
    columns = {row["name"]: Column(**row) for row in rows}
    hooks = tuple(Hook(**row) for row in await connection.fetch(_SQL["hooks"], relation["oid"]))
    table = Table(name, relation["oid"], columns, relation["role"], hooks)
    misfits = _column_misfits(table, mapping)
    if table.columns.keys() >= {*mapping.key_columns}:
        misfits += await _index_misfits(connection, table, mapping)
    if relation["has_children"]:
        misfits.append(
            "other tables inherit from it, and its unique index doesn't cover their rows; use"
            " partitions, or map a table of its own"
        )
    if relation["hidden_rows"]:
        misfits.append("row-level security hides rows from this role; use a role with BYPASSRLS")
    missing = _missing_rights(table, mapping, may_delete=relation["may_delete"])
    _refuse(table, mapping, misfits, missing)
    return table


def _refuse(
    table: Table, mapping: MappingConfig, misfits: Sequence[str], missing: Sequence[str]
) -> None:
    """Raise if anything doesn't fit, or a right is missing, with all of it in one line."""
    lacks = f"this role lacks rights on {mapping.table}: {table.grant(*missing)}"
    if misfits:
        raise TargetMismatch(
            f'mapping "{mapping.name}" doesn\'t fit the table {mapping.table}: '
            + "; ".join([*misfits, lacks] if missing else misfits)
        )
    if missing:
        raise RightMissing(f'mapping "{mapping.name}": {lacks}')


async def _has_schema(connection: Connection, mapping: MappingConfig) -> bool:
    """Whether the schema that the table's name has is there; true if it has none."""
    schema, _ = mapping.table_name
    if schema is None:
        return True
    return await connection.fetchval("SELECT to_regnamespace($1)", quote(schema)) is not None


async def _refuse_hidden(connection: Connection, mapping: MappingConfig) -> None:
    """Raise RightMissing if the search path passes over a schema with this table, unseen.

    Another one, made where this role may, would then take its place in silence.
    """
    schema, name = mapping.table_name
    hidden = None if schema else await connection.fetchrow(_SQL["hidden"], name)
    if hidden is not None:
        raise RightMissing(
            f'mapping "{mapping.name}": this role may not use the schema {hidden["schema"]}, which'
            f" the table {mapping.table} is in; GRANT USAGE ON SCHEMA {quote(hidden['schema'])} TO"
            f" {quote(hidden['role'])}"
        )


def _column_misfits(table: Table, mapping: MappingConfig) -> list[str]:
    misfits = []
    for name, declared in mapping.types.items():
        column = table.columns.get(name)
        if column is None:
            misfits.append(f'there is no column "{name}"')
        elif column.type != declared.sql:
            misfits.append(f'column "{name}" is {column.type}, not {declared.sql} as configured')
        elif column.generated and (mapping.mode == "upsert" or name in mapping.value_columns):
            misfits.append(f'column "{name}" is generated always and can\'t be written')
        elif name in mapping.key_columns and not column.deterministic:
            misfits.append(
                f'key column "{name}" has a collation under which different keys are equal;'
                " give it a deterministic one"
            )
    if mapping.synced_at:
        column = table.columns.get(mapping.synced_at)
        if column is None:
            misfits.append(
                f'there is no column "{mapping.synced_at}": ALTER TABLE {table.sql_name} ADD COLUMN'
                f' {quote(mapping.synced_at)} timestamptz, or set mapping.synced_at = ""'
            )
        elif column.type not in _SYNCED_AT_TYPES:
            misfits.append(f'column "{mapping.synced_at}" is {column.type}, not timestamptz')
        elif column.generated:
            misfits.append(
                f'column "{mapping.synced_at}" is generated always and can\'t be written'
            )
    if mapping.mode == "upsert":
        ours = {*mapping.columns, mapping.synced_at}
        misfits.extend(
            f'column "{column.name}" must be given a value, but isn\'t mapped: give it a default'
            ' or use mode = "update"'
            for column in table.columns.values()
            if column.not_null and not column.filled and column.name not in ours
        )
    return misfits


async def _index_misfits(connection: Connection, table: Table, mapping: MappingConfig) -> list[str]:
    indexes = await connection.fetch(_SQL["unique_indexes"], table.oid)
    if any(set(row["columns"]) == set(mapping.key_columns) for row in indexes):
        return []
    columns = ", ".join(quote(name) for name in mapping.key_columns)
    return [
        "it has no unique index on exactly the key columns, so a key could mean two rows;"
        f" CREATE UNIQUE INDEX CONCURRENTLY ON {table.sql_name} ({columns})"
    ]


def _missing_rights(table: Table, mapping: MappingConfig, *, may_delete: bool) -> list[str]:
    """What this role lacks of the columns that are there, as GRANT has it."""
    deletes = mapping.on_absent == "delete"
    written = [*mapping.value_columns, *([mapping.synced_at] if mapping.synced_at else [])]
    read = [*mapping.columns, *([mapping.synced_at] if deletes else [])]
    inserted = [*mapping.key_columns, *written] if mapping.mode == "upsert" else []
    lacks = []
    for right, names in (("SELECT", read), ("UPDATE", written), ("INSERT", inserted)):
        there = [table.columns[name] for name in names if name in table.columns]
        if denied := [quote(c.name) for c in there if not getattr(c, f"may_{right.lower()}")]:
            lacks.append(f"{right} ({', '.join(denied)})")
    return [*lacks, "DELETE"] if deletes and not may_delete else lacks


async def create(connection: Connection, mapping: MappingConfig) -> Table:
    """Create the mapping's own table, key columns as primary key; safe when two start at once."""
    schema, _ = mapping.table_name
    if schema and not await _has_schema(connection, mapping):
        await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {quote(schema)}")
    lines = [f"{quote(name)} {kind.sql} NOT NULL" for name, kind in mapping.types.items()]
    if mapping.synced_at:
        lines.append(f"{quote(mapping.synced_at)} timestamptz")
    keys = ", ".join(quote(name) for name in mapping.key_columns)
    lines.append(f"PRIMARY KEY ({keys})")
    name = quote(*mapping.table_name)
    if not schema and await connection.fetchval("SELECT current_schema()") is None:
        raise TargetMismatch(
            f'mapping "{mapping.name}": {mapping.table} can\'t be created, for the search path of'
            " this role names no schema that is there; write schema.table"
        )
    await connection.execute(
        f"CREATE TABLE IF NOT EXISTS {name} ({', '.join(lines)})"
        # Room on each page for the next versions of its rows, so that they need no index entries:
        # https://www.postgresql.org/docs/current/storage-hot.html
        " WITH (fillfactor = 90)"
    )
    return await inspect(connection, mapping)


def refuse_shared(found: Sequence[tuple[MappingConfig, Table]]) -> None:
    """Refuse two mappings on one table under two names; the configuration judged the names only.

    Raises TargetMismatch. What is allowed to share a table, written alike, has passed before.
    """
    by_oid: dict[int, MappingConfig] = {}
    for config, table in found:
        if table.oid is None:
            continue
        other = by_oid.setdefault(table.oid, config)
        if other.table_name != config.table_name:
            raise TargetMismatch(
                f'mappings "{other.name}" and "{config.name}" name the same table as {other.table}'
                f" and {config.table}; write it alike in both"
            )
