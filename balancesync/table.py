"""The target table as it really is: what the catalogs say, held against the mapping."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import asyncpg

from balancesync.config import MappingConfig, PostgresConfig
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
_OWN_SCHEMA: Final = PostgresConfig().schema
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


async def inspect(
    connection: Connection, mapping: MappingConfig, own_schema: str = _OWN_SCHEMA
) -> Table:
    """Look the mapping's table up and check that it fits; `own_schema` is `postgres.schema`.

    Raises TargetMismatch with everything that differs in one line, or RightMissing.
    """
    name, (schema, _) = quote(*mapping.table_name), mapping.table_name
    relation = None
    if schema is None or await connection.fetchval(_SQL["may_look_into"], quote(schema)):
        relation = await connection.fetchrow(_SQL["relation"], name)
    if relation is None or relation["schema"] == own_schema:
        await _refuse_own(connection, mapping, own_schema, lies_there=relation is not None)
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
    await refuse_published(connection, mapping, table)
    return table


async def _refuse_own(
    connection: Connection, mapping: MappingConfig, own_schema: str, *, lies_there: bool
) -> None:
    """Raise TargetMismatch if the table lies in balancesync's own schema, which goes as a whole.

    So does a search path make it that begins with a schema called like the role. Where another one
    is meant that isn't there yet, it would be a second table beside the one with the balances.
    """
    schema, name = mapping.table_name
    columns = [*mapping.key_columns, *mapping.value_columns]
    is_target = await connection.fetchval(_SQL["in_own_schema"], own_schema, name, columns)
    if not is_target and not lies_there:
        return
    where = schema if schema not in (None, own_schema) else "public"
    line = f'table = "{where}.{name}"'
    said = (
        f'mapping "{mapping.name}": the table {own_schema}.{name} lies in postgres.schema, which'
        " belongs to balancesync alone and is dropped with it"
    )
    if not is_target:
        raise TargetMismatch(f"{said}; name a table of another schema, as in {line}")
    if await connection.fetchval(_SQL["is_there"], where, name):
        raise TargetMismatch(
            f"{said}, and there is a table {where}.{name}, too; rename the one without balances,"
            f" ALTER TABLE {quote(own_schema, name)} SET SCHEMA {quote(where)} if it has them, and"
            f" write {line} in the configuration"
        )
    raise TargetMismatch(
        f"{said}; ALTER TABLE {quote(own_schema, name)} SET SCHEMA {quote(where)}, and write {line}"
        " in the configuration"
    )


async def refuse_published(connection: Connection, mapping: MappingConfig, table: Table) -> None:
    """Raise TargetMismatch if a publication keeps PostgreSQL from changing or deleting rows.

    It wants a replica identity, also for no row at all, and one that has all columns of the row
    filter: https://www.postgresql.org/docs/current/logical-replication-publication.html
    """
    if not await connection.fetchval(_SQL["is_published"]):
        return
    column = quote(mapping.value_columns[0])
    statements = [f"UPDATE {table.sql_name} SET {column} = {column} WHERE (SELECT false)"]  # noqa: S608
    if mapping.on_absent == "delete":
        statements.append(f"DELETE FROM {table.sql_name} WHERE (SELECT false)")  # noqa: S608
    for statement in statements:
        try:
            # Makes the statement ready, which is where PostgreSQL judges, and doesn't execute it.
            await connection.execute(f"EXPLAIN {statement}")
        except asyncpg.ObjectNotInPrerequisiteStateError as error:
            raise _unpublishable(
                mapping, error, f"ALTER TABLE {table.sql_name} REPLICA IDENTITY FULL"
            ) from error
        except asyncpg.InvalidColumnReferenceError as error:
            way = (
                "change the publication or the table's replica identity: that must have all columns"
                " of the row filter, and the column list must have all of its columns"
            )
            raise _unpublishable(mapping, error, way) from error


def _unpublishable(
    mapping: MappingConfig, error: asyncpg.PostgresError, way: str
) -> TargetMismatch:
    said = str(error).splitlines()[0] + (f": {error.detail}" if error.detail else "")
    return TargetMismatch(
        f'mapping "{mapping.name}": the table {mapping.table} is published: PostgreSQL refuses to'
        f" change its rows: {said.rstrip('.')}; {way}"
    )


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
    """Raise RightMissing if the table is in a schema that this role may not use.

    A search path passes over it, and another one, made where this role may, would take its place.
    """
    schema, name = mapping.table_name
    hidden = await connection.fetchrow(_SQL["hidden"], name, schema)
    if hidden is not None:
        raise RightMissing(
            f'mapping "{mapping.name}": this role lacks USAGE for schema {hidden["schema"]}, which'
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


async def schema_for_new(
    connection: Connection, mapping: MappingConfig, own_schema: str = _OWN_SCHEMA
) -> str | None:
    """The schema that a new table is made in: never our own; None: the search path has no other."""
    schema, _ = mapping.table_name
    found: str | None = await connection.fetchval(_SQL["schema_for_new"], own_schema)
    return schema or found


async def create(
    connection: Connection, mapping: MappingConfig, own_schema: str = _OWN_SCHEMA
) -> Table:
    """Create the mapping's own table, key columns as primary key; safe when two start at once."""
    schema, table = mapping.table_name
    if schema and not await _has_schema(connection, mapping):
        await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {quote(schema)}")
    lines = [f"{quote(name)} {kind.sql} NOT NULL" for name, kind in mapping.types.items()]
    if mapping.synced_at:
        lines.append(f"{quote(mapping.synced_at)} timestamptz")
    keys = ", ".join(quote(name) for name in mapping.key_columns)
    lines.append(f"PRIMARY KEY ({keys})")
    schema = await schema_for_new(connection, mapping, own_schema)
    name = quote(schema, table)
    if schema is None:
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
    return await inspect(connection, mapping, own_schema)


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
