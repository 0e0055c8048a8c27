"""The statements of `sql/target.sql`, filled in for one mapping and its table."""

from collections.abc import Sequence
from typing import Final

from balancesync.columns import ColumnType
from balancesync.config import MappingConfig
from balancesync.database import load_sql, quote, quote_literal
from balancesync.printing import value_text
from balancesync.table import Table

_BLOCKS: Final = load_sql("target") | load_sql("keyed")
# COPY into numeric(20,2) rounds 1.505 in silence: numbers are staged as they came.
_STAGED: Final = {"numeric": "numeric", "varchar": "text"}


def statements(
    config: MappingConfig,
    table: Table,
    *,
    staging: str,
    diff: str,
    first: str,
    changes: str,
    pruned: str,
    ordered: bool,
) -> dict[str, str]:
    """Every block of `sql/target.sql` for this mapping; identifiers are quoted here.

    `first` is the diff that this one is a second look at, or itself; `changes` the history;
    `pruned` keeps the keys that were pruned.
    `ordered` joins the staging table in key order, for looks into the target's key index.
    """
    keys, values = config.key_columns, config.value_columns
    k = _numbered("k", keys)
    v = _numbered("v", values)
    o = _numbered("o", values)
    synced_at = _synced_at(config, table)
    differs = [
        (_exact(f"t.{quote(name)}", config.types[name]), _exact("{}{}", config.types[name]))
        for name in values
    ]
    parts = {
        "staging": staging,
        "staged": f"(TABLE {staging} ORDER BY {', '.join(k)})" if ordered else staging,
        "diff": diff,
        "first": first,
        "changes": changes,
        "pruned": pruned,
        "target": table.sql_name,
        "keys": ", ".join(k),
        # One plain column is sorted three times as fast as it is hashed or sorted as a row.
        "count_keys": f"count(DISTINCT {k[0]})"
        if len(k) == 1
        else f"count(DISTINCT ({', '.join(k)}))",
        "values": ", ".join(v),
        "olds": ", ".join(o),
        "columns": ", ".join(map(quote, (*keys, *values))),
        "key_columns": ", ".join(map(quote, keys)),
        "key_types": ", ".join(_key_types(config, table)),
        "value_types": ", ".join(_value_types(config, "v")),
        "old_types": ", ".join(_value_types(config, "o")),
        "s_keys": ", ".join(f"s.{name}" for name in k),
        "s_values": ", ".join(f"s.{name}" for name in v),
        "t_keys": ", ".join(f"t.{quote(name)}" for name in keys),
        "t_values": ", ".join(f"t.{quote(name)}" for name in values),
        "t_values_as_olds": ", ".join(
            f"t.{quote(name)} AS {old}" for name, old in zip(values, o, strict=True)
        ),
        "same_key": " AND ".join(
            f"t.{quote(name)} = s.{short}" for name, short in zip(keys, k, strict=True)
        ),
        "earlier_is_last": " AND ".join(f"earlier.{name} = last.{name}" for name in k),
        "last_keys": ", ".join(f"last.{name}" for name in k),
        "no_row": f"t.{quote(keys[0])} IS NULL",
        "keys_not_null": " AND ".join(f"t.{quote(name)} IS NOT NULL" for name in keys),
        "differs": " OR ".join(
            f"{target} IS DISTINCT FROM {staged_as.format('s.', short)}"
            for (target, staged_as), short in zip(differs, v, strict=True)
        ),
        "excluded_differs": " OR ".join(
            f"{target} IS DISTINCT FROM {staged_as.format('EXCLUDED.', quote(name))}"
            for (target, staged_as), name in zip(differs, values, strict=True)
        ),
        "set_values": ", ".join(
            [f"{quote(name)} = s.{short}" for name, short in zip(values, v, strict=True)]
            + ([f"{quote(config.synced_at)} = {synced_at}"] if synced_at else [])
        ),
        "set_excluded": ", ".join(
            f"{quote(name)} = EXCLUDED.{quote(name)}"
            for name in (*values, *([config.synced_at] if synced_at else []))
        ),
        "synced_at": quote(config.synced_at),
        "comma_synced_at": f", {quote(config.synced_at)}" if synced_at else "",
        "comma_now": f", {synced_at}" if synced_at else "",
        "key_texts": ", ".join(_texts(config, keys, k)),
        # As the column will print it: what is staged may read 2.5 where the column says 2.50.
        "value_texts": ", ".join(
            f"{short}::{config.types[name].sql}::text AS {short}"
            for name, short in zip(values, v, strict=True)
        ),
        "raw_texts": ", ".join(f"{name}::text AS {name}" for name in v),
        "old_texts": ", ".join(f"{name}::text AS {name}" for name in o),
        # Without a number it's one row all the same.
        "totals": ", ".join(_totals(config)) or "max(NULL::text)",
        "s_key_texts": key_array(config, [f"s.{name}" for name in k]),
        "t_key_texts": key_array(config, [f"t.{quote(name)}" for name in keys]),
        "t_json": _json(config, [f"t.{quote(name)}" for name in values]),
        "old_json": _json(config, [f"s.{name}" for name in o]),
        "t_differs_from_old": " OR ".join(
            f"{target} IS DISTINCT FROM {staged_as.format('s.', short)}"
            for (target, staged_as), short in zip(differs, o, strict=True)
        ),
    }
    return {name: block.format_map(parts) for name, block in _BLOCKS.items()}


def key_text(expression: str, kind: ColumnType) -> str:
    """The SQL that prints a key column as balancesync does in keys: shortest exact form, UTC."""
    match kind.name:
        case "numeric":
            return f"trim_scale({expression})::text"
        case "timestamptz":
            iso = f"to_char({expression} AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US')"
            return f"rtrim(rtrim({iso}, '0'), '.') || 'Z'"
    return f"{expression}::text"


def staged_type(kind: ColumnType) -> str:
    """The type that takes a column's values without rounding or cutting any."""
    return _STAGED.get(kind.name, kind.sql)


def key_array(config: MappingConfig, expressions: Sequence[str]) -> str:
    """The SQL of a key as the history has it: an array of the canonical texts of its columns."""
    texts = [
        # Under the collation of the history's own column, or a text column's would contradict it.
        f'({key_text(expression, config.types[name])}) COLLATE "C"'
        for name, expression in zip(config.key_columns, expressions, strict=True)
    ]
    return f"ARRAY[{', '.join(texts)}]"


def staged_columns(config: MappingConfig) -> tuple[list[str], list[str]]:
    """The names of the staging table's key columns and value columns."""
    return _numbered("k", config.key_columns), _numbered("v", config.value_columns)


def _numbered(letter: str, names: Sequence[str]) -> list[str]:
    return [f"{letter}{number}" for number, _ in enumerate(names, 1)]


def _key_types(config: MappingConfig, table: Table) -> list[str]:
    types = []
    for short, name in zip(_numbered("k", config.key_columns), config.key_columns, strict=True):
        kind = config.types[name]
        staged = staged_type(kind)
        # Under the column's own collation, or the join could not use its index.
        collation = table.columns[name].collation if table.exists else None
        types.append(f"{short} {staged}" + (f" COLLATE {collation}" if collation else ""))
    return types


def _value_types(config: MappingConfig, letter: str) -> list[str]:
    return [
        f"{short} {staged_type(kind)}"
        for short, kind in zip(
            _numbered(letter, config.value_columns),
            (config.types[name] for name in config.value_columns),
            strict=True,
        )
    ]


def _exact(expression: str, kind: ColumnType) -> str:
    # A column's own collation may hold different texts for equal.
    return f'{expression} COLLATE "C"' if kind.name in ("text", "varchar") else expression


def _synced_at(config: MappingConfig, table: Table) -> str:
    if not config.synced_at:
        return ""
    column = table.columns.get(config.synced_at)
    without_zone = column is not None and column.type == "timestamp without time zone"
    return "$3::timestamptz AT TIME ZONE 'UTC'" if without_zone else "$3::timestamptz"


def _texts(config: MappingConfig, names: Sequence[str], short: Sequence[str]) -> list[str]:
    return [
        f"{key_text(column, config.types[name])} AS {column}"
        for name, column in zip(names, short, strict=True)
    ]


def _json(config: MappingConfig, expressions: Sequence[str]) -> str:
    names = ", ".join(quote_literal(name) for name in config.value_columns)
    texts = ", ".join(
        value_text(expression, config.types[name])
        for name, expression in zip(config.value_columns, expressions, strict=True)
    )
    return f"jsonb_object(ARRAY[{names}], ARRAY[{texts}])"


def _totals(config: MappingConfig) -> list[str]:
    return [
        f"(sum(coalesce(v{number}, 0)) - sum(coalesce(o{number}, 0)))::text AS {quote(name)}"
        for number, name in enumerate(config.value_columns, 1)
        if config.types[name].name in ("smallint", "integer", "bigint", "numeric")
    ]
