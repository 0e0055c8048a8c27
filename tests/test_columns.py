"""Column types, key templates and table names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancesync import columns
from balancesync.columns import ColumnType, Template, parse_table


@pytest.mark.parametrize(
    ("text", "name", "sql"),
    [
        ("smallint", "smallint", "smallint"),
        ("INT2", "smallint", "smallint"),
        ("int", "integer", "integer"),
        ("int4", "integer", "integer"),
        (" Integer ", "integer", "integer"),
        ("int8", "bigint", "bigint"),
        ("numeric", "numeric", "numeric"),
        ("decimal", "numeric", "numeric"),
        ("numeric(20,2)", "numeric", "numeric(20,2)"),
        ("DECIMAL ( 20 , 2 )", "numeric", "numeric(20,2)"),
        ("numeric(5)", "numeric", "numeric(5,0)"),
        ("numeric(1000,1000)", "numeric", "numeric(1000,1000)"),
        ("text", "text", "text"),
        ("varchar", "varchar", "character varying"),
        ("varchar(10)", "varchar", "character varying(10)"),
        ("character  varying (10)", "varchar", "character varying(10)"),
        ("uuid", "uuid", "uuid"),
        ("bool", "boolean", "boolean"),
        ("timestamptz", "timestamptz", "timestamp with time zone"),
        ("timestamp with\ttime zone", "timestamptz", "timestamp with time zone"),
    ],
)
def test_column_types(text: str, name: str, sql: str) -> None:
    parsed = ColumnType.parse(text)
    assert (parsed.name, parsed.sql) == (name, sql)
    assert ColumnType.parse(parsed.sql) == parsed


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("float", "binary fraction"),
        ("float(24)", "binary fraction"),
        ("real", "binary fraction"),
        ("double precision", "binary fraction"),
        ("FLOAT8", "binary fraction"),
        ("money", "money is rounded"),
        ("timestamp", "timestamp has no time zone"),
        ("bigserial", "use bigint"),
        ("numeric(0)", "precision"),
        ("numeric(1001,2)", "precision"),
        ("numeric(5,-2)", "scale"),
        ("numeric(2,5)", "scale"),
        ("numeric(9999999999)", "no supported"),
        ("varchar(0)", "length"),
        ("varchar(10485761)", "length"),
        ("varchar(1,2)", "length"),
        ("bigint(20)", "without parentheses"),
        ("timestamptz(3)", "without parentheses"),
        ("char(3)", "no supported"),
        ("bigint[]", "no supported"),
        ("numeric(a)", "no supported"),
        ("numeric(\uff12)", "no supported"),
        ("", "no supported"),
        ("bigint; drop table x", "no supported"),
    ],
)
def test_column_types_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ColumnType.parse(text)


@given(st.lists(st.text(min_size=1).filter(lambda text: not {"{", "}"} & {*text}), unique=True))
def test_templates_come_apart_as_they_were_put_together(names: list[str]) -> None:
    text = "{{" + "".join(f"{{{name}}}}}}}/" for name in names)
    parsed = Template.parse(text)
    assert parsed.names == tuple(names)
    assert parsed.literals == (("{", *["}/"] * len(names)) if names else ("{",))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("users", (None, "users")),
        ("Users", (None, "Users")),
        ("app.users", ("app", "users")),
        ('"a.b"."c d"', ("a.b", "c d")),
        ('app."weird""name"', ("app", 'weird"name')),
        ('"; drop', None),
        ('"\\"; drop"', None),
        ('"""; drop"', (None, '"; drop')),
        ('""', None),
        (".users", None),
        ("app.", None),
        ('"a\0b"', None),
    ],
)
def test_tables(text: str, expected: tuple[str | None, str] | None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match="must be"):
            parse_table(text)
    else:
        assert parse_table(text) == expected


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=15))
def test_a_table_of_any_name_can_be_quoted(name: str) -> None:
    quoted = '"' + name.replace('"', '""') + '"'
    assert parse_table(f"{quoted}.{quoted}") == (name, name)


def test_lone_surrogates_are_refused() -> None:
    for check in (columns.check_utf8, columns.check_filled, columns.check_identifier):
        with pytest.raises(ValueError, match="UTF-8"):
            check("\ud800")
