"""The statements of `sql/target.sql`, filled in for one mapping and its table, and SQL of keys."""

from collections.abc import Sequence
from typing import Final

from balancesync.columns import ColumnType
from balancesync.config import MappingConfig
from balancesync.database import load_sql, quote, quote_literal
from balancesync.failures import NOT_OF_A_ROW
from balancesync.printing import value_text
from balancesync.table import Table

_BLOCKS: Final = load_sql("target") | load_sql("keyed")
_SINGLY: Final = load_sql("singly")
# COPY into numeric(20,2) rounds 1.505 in silence: numbers are staged as they came.
_STAGED: Final = {"numeric": "numeric", "varchar": "text"}


def statements(
    config: MappingConfig,
    table: Table,
    *,
    staging: str,
    diff: str,
    first: str,
    schema: str,
    write_singly: str,
) -> dict[str, str]:
    """Every block of `sql/target.sql` for this mapping; identifiers are quoted here.

    `first` is the diff that this one is a second look at, or itself; `schema` is that of our own
    tables, `write_singly` the name of the function that `create_singly` makes and `singly` calls.
    `diff_join_in_order` is `diff_join` with the staged rows in the order of the target's key index.
    """
    parts = {
        "staging": staging,
        "staged": staging,
        "diff": diff,
        "first": first,
        "changes": f"{schema}.changes",
        "pruned": f"{schema}.pruned",
        "altered": f"{schema}.altered",
        "write_singly": write_singly,
        "not_of_a_row": f"ARRAY[{', '.join(map(quote_literal, sorted(NOT_OF_A_ROW)))}]",
        "target": table.sql_name,
        **_slice_parts(config, table),
        **_key_parts(config, table),
        **_value_parts(config),
        **_comparisons(config),
        **_writes(config, _synced_at(config, table)),
        "t_synced_at": f"t.{quote(config.synced_at)}{_in_utc(config, table)}",
        **_texts(config),
    }
    filled = {name: block.format_map(parts) for name, block in _BLOCKS.items()}
    parts["staged"] = f"(TABLE {staging} ORDER BY {parts['keys']})"
    parts["body"] = quote_literal(_SINGLY["body"].format_map(parts))
    return {
        **filled,
        "diff_join_in_order": _BLOCKS["diff_join"].format_map(parts),
        "create_singly": _SINGLY["create"].format_map(parts),
        "singly": _SINGLY["call"].format_map(parts),
    }


def _slice_parts(config: MappingConfig, table: Table) -> dict[str, str]:
    """Which rows of the diff a statement is about: none if the table is another by now.

    A statement casts what it writes to the columns' types as they are then, and would round to a
    narrower one in silence. It looks at them when it has its lock on the table, so that they stay.
    """
    names = {*config.types, config.synced_at}
    types = [
        f"({quote_literal(column.name)}, {quote_literal(column.type)})"
        for column in table.columns.values()
        if column.name in names
    ]
    parts = {
        "oid": str(table.oid),
        "target_name": quote_literal(table.sql_name),
        "types": ", ".join(types),
        "count_types": str(len(types)),
    }
    is_same = _BLOCKS["is_same"].rstrip(";").format_map(parts)
    return {**parts, "in_slice": f"n > $1 AND n <= $2 AND ({is_same})"}


def _key_parts(config: MappingConfig, table: Table) -> dict[str, str]:
    """The key columns: in the staging table, in the target, and as conditions."""
    keys = config.key_columns
    k = _numbered("k", keys)
    return {
        "keys": ", ".join(k),
        # One plain column is sorted three times as fast as it is hashed or sorted as a row.
        "count_keys": f"count(DISTINCT {k[0]})"
        if len(k) == 1
        else f"count(DISTINCT ({', '.join(k)}))",
        "key_columns": ", ".join(map(quote, keys)),
        "first_key": quote_literal(keys[0]),
        "key_types": ", ".join(_key_types(config, table)),
        "s_keys": ", ".join(f"s.{name}" for name in k),
        "t_keys": ", ".join(f"t.{quote(name)}" for name in keys),
        "same_key": " AND ".join(
            f"t.{quote(name)} = s.{short}" for name, short in zip(keys, k, strict=True)
        ),
        "earlier_is_last": " AND ".join(f"earlier.{name} = last.{name}" for name in k),
        "last_keys": ", ".join(f"last.{name}" for name in k),
        "same_in_first": " AND ".join(f"f.{name} = s.{name}" for name in k),
        "no_row": f"t.{quote(keys[0])} IS NULL",
        "same_key_as_text": " AND ".join(
            # The texts are canonical, so the cast can't fail.
            f"t.{quote(name)} = a.key[{number}]::{config.types[name].sql}"
            for number, name in enumerate(keys, 1)
        ),
        "keys_not_null": " AND ".join(f"t.{quote(name)} IS NOT NULL" for name in keys),
    }


def _value_parts(config: MappingConfig) -> dict[str, str]:
    """The value columns: as they are read, as they were, and in the target."""
    values = config.value_columns
    v, o = _numbered("v", values), _numbered("o", values)
    return {
        "values": ", ".join(v),
        "olds": ", ".join(o),
        "value_types": ", ".join(_value_types(config, "v")),
        "old_types": ", ".join(_value_types(config, "o")),
        "s_values": ", ".join(f"s.{name}" for name in v),
        "t_values": ", ".join(f"t.{quote(name)}" for name in values),
        "t_values_as_olds": ", ".join(
            f"t.{quote(name)} AS {old}" for name, old in zip(values, o, strict=True)
        ),
        # Without a number it's one row all the same.
        "totals": ", ".join(_totals(config)) or "max(NULL::text)",
    }


def _comparisons(config: MappingConfig) -> dict[str, str]:
    """Whether the target's values differ from those read, from what the diff saw, from others'."""
    values = config.value_columns

    def differs(prefix: str, others: Sequence[str]) -> str:
        return " OR ".join(
            f"{_exact(f't.{quote(name)}', config.types[name])} IS DISTINCT FROM"
            f" {_exact(f'{prefix}.{other}', config.types[name])}"
            for name, other in zip(values, others, strict=True)
        )

    def moved(letter: str) -> str:
        return " OR ".join(
            f"{_exact(f's.{short}', config.types[name])} IS DISTINCT FROM"
            f" {_exact(f'f.{short}', config.types[name])}"
            for name, short in zip(values, _numbered(letter, values), strict=True)
        )

    return {
        # Both the value and the row; a row may also have come, or gone.
        "has_moved": f"({moved('v')}) AND ((s.op = 'i') <> (f.op = 'i') OR {moved('o')})",
        "differs": differs("s", _numbered("v", values)),
        "excluded_differs": differs("EXCLUDED", [quote(name) for name in values]),
        "t_differs_from_old": differs("s", _numbered("o", values)),
    }


def _writes(config: MappingConfig, synced_at: str) -> dict[str, str]:
    """What is set in the target; `synced_at` is the SQL of its time, empty for none."""
    values = config.value_columns
    column = quote(config.synced_at)
    staged = zip(values, _numbered("v", values), strict=True)
    sets = [f"{quote(name)} = s.{short}" for name, short in staged]
    return {
        "columns": ", ".join(map(quote, (*config.key_columns, *values))),
        "set_values": ", ".join(sets + ([f"{column} = {synced_at}"] if synced_at else [])),
        "set_excluded": ", ".join(
            f"{quote(name)} = EXCLUDED.{quote(name)}"
            for name in (*values, *([config.synced_at] if synced_at else []))
        ),
        "synced_at": column,
        "comma_synced_at": f", {column}" if synced_at else "",
        "comma_now": f", {synced_at}" if synced_at else "",
        # Rows that nobody but balancesync has ever written: only those are deleted.
        "is_ours": f"t.{column} IS NOT NULL" if synced_at else "true",
    }


def _texts(config: MappingConfig) -> dict[str, str]:
    """Keys and values as texts: for reports, and as the history has them."""
    keys, values = config.key_columns, config.value_columns
    k, v, o = _numbered("k", keys), _numbered("v", values), _numbered("o", values)
    return {
        "key_texts": ", ".join(
            f"{key_text(short, config.types[name])} AS {short}"
            for name, short in zip(keys, k, strict=True)
        ),
        # As the column will print it: what is staged may read 2.5 where the column says 2.50.
        "value_texts": ", ".join(
            f"{short}::{config.types[name].sql}::text AS {short}"
            for name, short in zip(values, v, strict=True)
        ),
        "s_texts": ", ".join(
            key_text(f"s.{short}", config.types[name]) for name, short in zip(keys, k, strict=True)
        ),
        "raw_texts": ", ".join(f"{name}::text AS {name}" for name in v),
        "s_value_texts": ", ".join(f"s.{name}::text" for name in v),
        "old_texts": ", ".join(f"{name}::text AS {name}" for name in o),
        "s_key_texts": key_array(config, [f"s.{name}" for name in k]),
        "t_key_texts": key_array(config, [f"t.{quote(name)}" for name in keys]),
        "t_json": _json(config, [f"t.{quote(name)}" for name in values]),
        "old_json": _json(config, [f"s.{name}" for name in o]),
        "asked_json": _json(
            config,
            [f"s.{short}::{config.types[name].sql}" for name, short in zip(values, v, strict=True)],
        ),
    }


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


def key_lookup(config: MappingConfig) -> dict[str, str]:
    """How `sql/balances.sql` finds the rows of keys that are given as arrays of their texts."""
    short = _numbered("k", config.key_columns)
    columns = list(zip(short, config.key_columns, strict=True))
    return {
        # The texts are canonical, so the cast can't fail.
        "arrays": ", ".join(
            f"${number}::text[]::{config.types[name].sql}[]"
            for number, name in enumerate(config.key_columns, 1)
        ),
        "keys": ", ".join(short),
        "same_key": " AND ".join(f"t.{quote(name)} = w.{each}" for each, name in columns),
    }


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
    return f"$3::timestamptz{_in_utc(config, table)}"


def _in_utc(config: MappingConfig, table: Table) -> str:
    """What turns a time into the other kind, with or without a zone, if `synced_at` has none."""
    column = table.columns.get(config.synced_at)
    without_zone = column is not None and column.type == "timestamp without time zone"
    return " AT TIME ZONE 'UTC'" if without_zone else ""


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
