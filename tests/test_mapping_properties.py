"""What holds for every batch, whatever is in it."""

import re
from collections.abc import Sequence
from decimal import Context, Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balancesync.columns import ColumnType
from balancesync.config import MappingConfig
from balancesync.keys import KeyForm, glob_filter
from balancesync.mapping import Mapping
from balancesync.model import RawBatch, RawValue, WrongType
from balancesync.values import Fit, NumberRule, Unfit, ValueColumn

# A busy machine fails no test, and what runs for each mapping runs often enough.
CALM = settings(deadline=None)
EACH = settings(deadline=None, max_examples=50)
EXACT = Context(prec=100_000)
UUIDS = st.uuids().map(lambda uuid: str(uuid).encode())
SIGNED = st.integers(-(2**64), 2**64).map(lambda number: b"%d" % number)
DECIMALS = st.from_regex(rb"-?[0-9]{1,20}(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,3})?", fullmatch=True)
TAILS = st.from_regex(rb"-?[0-9]{1,19}\.[0-9]{1,3}(0{2,14}|9{2,14})[0-9]{0,3}", fullmatch=True)
TIMES = st.datetimes(timezones=st.timezones()).map(
    lambda time: re.sub(r"(\+..:..):.*", r"\1", time.isoformat()).encode()
)
# What could forge a field, a line, a NULL or the end of the data, among what is usual.
NASTY = st.text(alphabet="\\N\t\n\r\0.:-+_{}é0159e xZT\U0001f600", max_size=12).map(str.encode)
WORDS = st.sampled_from([b"true", b"f", b"1", b"0", b"", b"007", rb"\N", rb"\.", b"USD", b"NaN"])
TEXTS = st.one_of(SIGNED, DECIMALS, TAILS, UUIDS, TIMES, NASTY, WORDS, st.binary(max_size=12))

MAPPINGS: dict[str, dict[str, Any]] = {
    "string": {},
    "tolerance": {"tolerance": "0.000001"},
    "wide tolerance": {
        "tolerance": "0.3",
        "columns": {"user_id": "bigint", "balance": "smallint"},
    },
    "text": {"columns": {"user_id": "text", "balance": "text"}},
    "bare": {"key": "{user_id}", "columns": {"user_id": "text", "balance": "numeric"}},
    "two": {
        "key": "b:{user}:{currency}",
        "columns": {"user": "bigint", "currency": "text", "balance": "numeric(9,4)"},
    },
    "texts": {
        "key": "{a}:{b}::{c}.",
        "columns": {"a": "text", "b": "varchar(3)", "c": "text", "balance": "integer"},
    },
    "mixed": {
        "key": "{a}-{b}:{c}",
        "columns": {"a": "text", "b": "text", "c": "text", "balance": "bigint"},
    },
    "typed": {
        "key": "x{at}/{yes}/{who}-{n}",
        "columns": {
            "at": "timestamptz",
            "yes": "boolean",
            "who": "uuid",
            "n": "numeric",
            "balance": "timestamptz",
        },
    },
    "member": {"key": "all", "type": "hash", "member": "{user_id}"},
    "hash": {
        "type": "hash",
        "tolerance": "0.0001",
        "columns": {
            "user_id": "integer",
            "a": "numeric(12,2)",
            "b": "bigint",
            "note": "varchar(5)",
            "c": "numeric(6,1)",
        },
    },
    "json": {
        "type": "json",
        "columns": {"user_id": "bigint", "balance": "numeric(20,2)", "note": "text"},
    },
}
COMPILED = {
    name: Mapping(MappingConfig(**settings), frozenset({"b", "note"}))
    for name, settings in MAPPINGS.items()
}


def keys_of(one: Mapping) -> st.SearchStrategy[bytes]:
    """Keys of a mapping's own form with all kinds of texts in it, and anything else."""
    template = one.config.member_template or one.config.template
    first, *rest = (literal.encode() for literal in template.literals)
    parts = st.tuples(*[TEXTS for _ in template.names])

    def join(texts: Sequence[bytes]) -> bytes:
        pairs = zip(texts, rest, strict=True)
        return first + b"".join(text + literal for text, literal in pairs)

    return st.one_of(parts.map(join), parts.map(join), TEXTS)


def values_of(one: Mapping) -> st.SearchStrategy[RawValue]:
    """Values of the mapping's type, good and bad."""
    columns = one.config.value_columns
    plain: st.SearchStrategy[Any] = TEXTS
    if one.config.type == "json":
        number = st.one_of(DECIMALS, TAILS).map(bytes.decode)
        text = st.one_of(number, st.just("null"), st.just('"a\\tb"'), st.just('"5"'), st.just("[]"))
        pairs = st.tuples(*[text for _ in columns]).map(
            lambda texts: ", ".join(
                f'"{column}": {text}' for column, text in zip(columns, texts, strict=True)
            )
        )
        plain = st.one_of(pairs.map(lambda text: f"{{{text}}}".encode()), TEXTS)
    elif one.redis_fields:
        plain = st.tuples(*[st.one_of(TEXTS, st.none()) for _ in columns]).map(list)
    return st.one_of(plain, plain, plain, st.sampled_from([None, WrongType("list")]))


def unescape(field: bytes) -> bytes | None:
    """Read a field as COPY does; None is NULL."""
    if field == rb"\N":
        return None
    meant = {b"t": b"\t", b"n": b"\n", b"r": b"\r", b"\\": b"\\"}
    return re.sub(rb"\\(.)", lambda match: meant[match[1]], field, flags=re.DOTALL)


@pytest.mark.parametrize("name", MAPPINGS)
@EACH
@given(data=st.data())
def test_the_pattern_takes_nothing_that_the_exact_way_does_not(
    name: str, data: st.DataObject
) -> None:
    one = COMPILED[name]
    records = data.draw(st.lists(st.tuples(keys_of(one), values_of(one)), max_size=12))
    keys, values = [key for key, _ in records], [value for _, value in records]
    batch = RawBatch(keys, values, len(keys))
    result = one.parse(batch)
    assert result == one.parse_exactly(batch)
    assert result.count + len(result.rejects) + result.vanished == len(keys)
    lines = result.rows.split(b"\n")
    assert lines.pop() == b""
    assert len(lines) == result.count
    # Each line holds the texts of its key and as many values as there are columns.
    rejected = [reject.key for reject in result.rejects]
    accepted = list(keys)
    for key, value in records:
        if value is None or key in rejected:
            accepted.remove(key)
    for key in accepted:
        texts = one.split_key(key)
        assert not isinstance(texts, Unfit)
        assert one.print_key(texts) == key
    for line in lines:
        fields = [unescape(field) for field in line.split(b"\t")]
        assert len(fields) == len(one.config.columns)
        assert None not in fields[: len(one.config.key_columns)]
        printed = [(field or b"").decode() for field in fields[: len(one.config.key_columns)]]
        assert one.print_key(printed) in keys
    for reject in result.rejects:
        assert reject.detail.isprintable()
        assert len(reject.detail) <= 200


@pytest.mark.parametrize("name", MAPPINGS)
@EACH
@given(data=st.data())
def test_no_two_keys_mean_one_row(name: str, data: st.DataObject) -> None:
    one = COMPILED[name]
    keys = data.draw(st.lists(keys_of(one), unique=True, max_size=12))
    split = [texts for texts in map(one.split_key, keys) if not isinstance(texts, Unfit)]
    assert len(set(split)) == len(split)
    own = {one.print_key(texts) for texts in split}
    assert own <= set(keys)
    if one.match is None:
        assert set(one.select(keys)) == own
    else:
        assert own <= set(one.select(keys, matched=False))


@pytest.mark.parametrize("name", MAPPINGS)
@EACH
@given(data=st.data())
def test_a_key_read_by_the_pattern_splits_like_one_read_exactly(
    name: str, data: st.DataObject
) -> None:
    config = COMPILED[name].config
    form = KeyForm(config.member or config.key, config.types)
    key = data.draw(keys_of(COMPILED[name]))
    texts, fields = form.split(key), form.read(key)
    if isinstance(fields, list):
        assert not isinstance(texts, Unfit)
        exact = [column.parse(text) for column, text in zip(form.columns, texts, strict=True)]
        assert fields == exact


def all_splits(key: str, literals: tuple[str, ...]) -> set[tuple[str, ...]]:
    """Every way to cut a key of texts, found by trying all."""
    first, *rest = literals
    if not key.startswith(first):
        return set()
    key = key[len(first) :]
    if not rest:
        return set() if key else {()}
    return {
        (key[:end], *others)
        for end in range(len(key) + 1)
        for others in all_splits(key[end:], tuple(rest))
    }


@CALM
@given(
    literals=st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=3),
    ends=st.tuples(st.text("ab", max_size=2), st.text("ab", max_size=2)),
    texts=st.lists(st.text("abc", max_size=3), min_size=4, max_size=4),
)
def test_a_key_is_read_exactly_if_there_is_one_way(
    literals: list[str], ends: tuple[str, str], texts: list[str]
) -> None:
    literals = [ends[0], *literals, ends[1]]
    names = [f"c{at}" for at in range(len(literals) - 1)]
    template = ends[0] + "".join(
        f"{{{name}}}{literal}" for name, literal in zip(names, literals[1:], strict=True)
    )
    form = KeyForm(template, dict.fromkeys(names, ColumnType("text")))
    key = ends[0] + "".join(
        text + literal for text, literal in zip(texts, literals[1:], strict=False)
    )
    ways = all_splits(key, tuple(literals))
    found = form.read(key.encode())
    if len(ways) == 1:
        assert found == [text.encode() for text in next(iter(ways))]
    else:
        assert isinstance(found, Unfit)
        assert found.reason == "key_ambiguous"


COLUMNS = [
    "smallint",
    "integer",
    "bigint",
    "numeric",
    "numeric(20,2)",
    "numeric(3,3)",
    "numeric(6)",
]


@CALM
@given(text=st.one_of(SIGNED, DECIMALS, TAILS, NASTY), sql=st.sampled_from(COLUMNS))
def test_an_accepted_number_is_the_number_that_came(text: bytes, sql: str) -> None:
    column = ColumnType.parse(sql)
    fit = ValueColumn("balance", column, Decimal(0)).parse(text)
    assert isinstance(fit, Fit) == isinstance(NumberRule(column).fit(text), Fit)
    if isinstance(fit, Fit):
        value = Decimal(text.decode())
        assert Decimal(fit.copy.decode()) == value
        assert not fit.snapped
        if column.precision is not None:
            assert abs(value) < 10 ** (column.precision - (column.scale or 0))
    elif fit.reason == "out_of_range":
        assert abs(Decimal(text.decode())) > 0
    elif fit.reason in ("too_many_decimals", "residue"):
        assert column.step is not None
        assert EXACT.remainder(Decimal(text.decode()), column.step)


@CALM
@given(
    text=st.one_of(DECIMALS, TAILS),
    sql=st.sampled_from(["bigint", "smallint", "numeric(20,2)", "numeric(3,3)", "numeric(6,1)"]),
    tolerance=st.sampled_from(["0.0004", "0.000001", "0.0000025", "0.00000000001"]),
)
def test_a_tolerance_moves_a_number_no_further(text: bytes, sql: str, tolerance: str) -> None:
    column, limit, value = ColumnType.parse(sql), Decimal(tolerance), Decimal(text.decode())
    assert column.step is not None
    fit = ValueColumn("balance", column, limit).parse(text)
    exact = NumberRule(column, limit).fit(text)
    nearest = EXACT.multiply(
        EXACT.divide(value, column.step).to_integral_value(context=EXACT), column.step
    )
    near = EXACT.subtract(value, nearest).copy_abs() <= limit
    if isinstance(fit, Fit):
        assert isinstance(exact, Fit)
        assert near
        assert Decimal(fit.copy.decode()) == Decimal(exact.copy.decode()) == nearest
        assert fit.snapped == exact.snapped == (value != nearest)
    else:
        assert fit == exact
        assert fit.reason == "out_of_range" or not near


@CALM
@given(text=st.text())
def test_a_text_comes_back_as_it_was(text: str) -> None:
    fit = ValueColumn("note", ColumnType("text"), Decimal(0)).parse(text.encode())
    if isinstance(fit, Fit):
        assert (unescape(fit.copy) or b"").decode() == text
        assert not set(b"\t\n\r") & set(fit.copy)
    else:
        assert "\0" in text


@CALM
@given(key=st.text("ab*?[]\\^-é", max_size=8))
def test_the_match_of_literals_is_those_literals(key: str) -> None:
    template = key.replace("{", "{{") + "{user_id}"
    one = Mapping(MappingConfig(key=template))
    assert one.match is None if not key else glob_filter([one.match or b""])(key.encode() + b"5")
    assert one.select([key.encode() + b"5"], matched=False) == [key.encode() + b"5"]
    assert one.select([b"x" + key.encode() + b"5"], matched=False) == []
