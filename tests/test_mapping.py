"""Each kind of key and value by name: the row it becomes, or the reason why it doesn't."""

import io
from datetime import UTC, datetime
from decimal import Decimal
from itertools import product
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from redis.asyncio import Redis

from balancesync.config import MappingConfig
from balancesync.keys import glob_filter
from balancesync.mapping import Mapping
from balancesync.model import Batch, RawBatch, RawValue, WrongType
from balancesync.values import Unfit


def mapping(**settings: Any) -> Mapping:
    nullable = settings.pop("nullable", None)
    return Mapping(MappingConfig(**settings), nullable)


def of_value(sql: str, **settings: Any) -> Mapping:
    return mapping(columns={"user_id": "bigint", "balance": sql}, **settings)


def of_key(sql: str, **settings: Any) -> Mapping:
    return mapping(columns={"user_id": sql, "balance": "numeric(20,2)"}, **settings)


def parse(one: Mapping, records: list[tuple[bytes, RawValue]]) -> Batch:
    """Parse, and hold the result to the slow way and to the sum that always holds."""
    keys, values = [key for key, _ in records], [value for _, value in records]
    batch = RawBatch(keys, values, len(keys))
    result = one.parse(batch)
    assert result == one.parse_exactly(batch)
    assert result.count == result.rows.count(b"\n")
    assert result.count + len(result.rejects) + result.vanished == len(keys)
    return result


def outcome(one: Mapping, key: bytes, value: RawValue) -> bytes | str:
    """The row of one record without its newline, or the reason; the same among good neighbours."""
    result = parse(one, [(key, value)])
    among = parse(one, [(key, value)] * 3)
    assert (among.rows, len(among.rejects)) == (3 * result.rows, 3 * len(result.rejects))
    if result.rejects:
        [reject] = result.rejects
        assert reject.key == key
        assert reject.detail.isprintable()
        assert 0 < len(reject.detail) <= 200
        return reject.reason
    return result.rows[:-1]


def value_of(one: Mapping, value: RawValue) -> str:
    """What one value becomes under a good key: the column's text, or the reason."""
    found = outcome(one, b"balance:1", value)
    return found if isinstance(found, str) else found.removeprefix(b"1\t").decode()


NUMBERS = [
    ("1234.56", "1234.56"),
    ("0", "0"),
    ("-5", "-5"),
    ("5.0", "5.0"),
    ("1.500", "1.5"),
    ("1e2", "100"),
    ("1E2", "100"),
    ("150e-2", "1.5"),
    ("-1.5e+01", "-15"),
    ("1.5e0000000000000001", "15"),
    ("0e999999999999", "0"),
    ("-0e5", "0"),
    ("0.000", "0"),
    ("007", "007"),
    ("999999999999999999.99", "999999999999999999.99"),
    ("1000000000000000000", "out_of_range"),
    ("1e400", "out_of_range"),
    ("1e999999999", "out_of_range"),
    ("1e99999999999999999999", "out_of_range"),
    ("-1e18", "out_of_range"),
    ("1" * 40, "out_of_range"),
    ("1" * 65_536, "out_of_range"),
    ("1.505", "too_many_decimals"),
    ("0.001", "too_many_decimals"),
    ("1.49999", "too_many_decimals"),
    ("1234.57000000000000006", "residue"),
    ("1234.56999999999999994", "residue"),
    ("0.30000000000000004", "residue"),
    ("-0.10000000000000001", "residue"),
    ("", "not_a_number"),
    ("abc", "not_a_number"),
    ("NaN", "not_a_number"),
    ("Infinity", "not_a_number"),
    ("-inf", "not_a_number"),
    ("0x10", "not_a_number"),
    (" 1", "not_a_number"),
    ("1 ", "not_a_number"),
    ("1\n", "not_a_number"),
    ("+5", "not_a_number"),
    ("--5", "not_a_number"),
    (".5", "not_a_number"),
    ("1.", "not_a_number"),
    ("1e", "not_a_number"),
    ("e5", "not_a_number"),
    ("1_000", "not_a_number"),
    ("1,5", "not_a_number"),
    ("\uff11\uff12", "not_a_number"),
    ("1\0", "not_a_number"),
    ("5\tx", "not_a_number"),
    (r"\N", "not_a_number"),
    ("1" * 65_537, "value_too_large"),
    ("x" * 1_000_000, "value_too_large"),
]


@pytest.mark.parametrize(("text", "expected"), NUMBERS, ids=lambda text: repr(text[:30]))
@pytest.mark.parametrize("kind", ["string", "hash", "member"])
def test_number(text: str, expected: str, kind: str) -> None:
    settings: dict[str, Any] = {
        "string": {},
        "hash": {"type": "hash"},
        "member": {"type": "hash", "key": "all", "member": "balance:{user_id}"},
    }[kind]
    value: RawValue = [text.encode()] if kind == "hash" else text.encode()
    assert value_of(mapping(**settings), value) == expected


def test_a_number_of_bytes_that_are_not_utf8_is_a_reject() -> None:
    assert value_of(mapping(), b"\xff1") == "not_a_number"


@pytest.mark.parametrize(
    ("sql", "text", "expected"),
    [
        ("bigint", "9223372036854775807", "9223372036854775807"),
        ("bigint", "-9223372036854775808", "-9223372036854775808"),
        ("bigint", "9223372036854775808", "out_of_range"),
        ("bigint", "-9223372036854775809", "out_of_range"),
        ("bigint", "5.0", "5"),
        ("bigint", "1e2", "100"),
        ("bigint", "0.5", "too_many_decimals"),
        ("bigint", "9223372036854775807.5", "too_many_decimals"),
        ("bigint", "1000000.00000000000000001", "residue"),
        ("bigint", "99999999999999999999e-1", "out_of_range"),
        ("integer", "2147483647", "2147483647"),
        ("integer", "2147483648", "out_of_range"),
        ("smallint", "-32768", "-32768"),
        ("smallint", "-32769", "out_of_range"),
        ("smallint", "32768", "out_of_range"),
        ("numeric(3,3)", "0.999", "0.999"),
        ("numeric(3,3)", "1", "out_of_range"),
        ("numeric(3,3)", "0.0001", "too_many_decimals"),
        ("numeric(3)", "999", "999"),
        ("numeric(3)", "1000", "out_of_range"),
        ("numeric", "1.500", "1.500"),
        ("numeric", "0.30000000000000004", "0.30000000000000004"),
        ("numeric", "1e131071", "1e131071"),
        ("numeric", "1e131072", "out_of_range"),
        ("numeric", "1e-16383", "1e-16383"),
        ("numeric", "1e-16384", "too_many_decimals"),
        ("numeric", "10" * 700, "10" * 700),
        ("boolean", "true", "true"),
        ("boolean", "f", "f"),
        ("boolean", "1", "1"),
        ("boolean", "TRUE", "not_a_boolean"),
        ("boolean", "yes", "not_a_boolean"),
        ("boolean", "", "not_a_boolean"),
        ("uuid", "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"),
        ("uuid", "a0eebc999c0b4ef8bb6d6bb9bd380a11", "not_a_uuid"),
        ("uuid", "{a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11}", "not_a_uuid"),
        ("timestamptz", "2026-01-02T03:04:05Z", "2026-01-02T03:04:05Z"),
        ("timestamptz", "2026-01-02 03:04:05.600+03", "2026-01-02T00:04:05.6Z"),
        ("timestamptz", "2026-01-02T03:04:05+0330", "2026-01-01T23:34:05Z"),
        ("timestamptz", "2026-01-31T23:59:59.999999-00:01", "2026-02-01T00:00:59.999999Z"),
        ("timestamptz", "2024-02-29T00:00:00Z", "2024-02-29T00:00:00Z"),
        ("timestamptz", "2026-02-29T00:00:00Z", "not_a_time"),
        ("timestamptz", "2026-01-02T03:04:05", "not_a_time"),
        ("timestamptz", "2026-01-02T03:04:05.1234567Z", "not_a_time"),
        ("timestamptz", "2026-01-02T24:00:00Z", "not_a_time"),
        ("timestamptz", "2026-01-02T03:04:60Z", "not_a_time"),
        ("timestamptz", "2026-01-02T03:04:05+03:", "not_a_time"),
        ("timestamptz", "2026-01-02T03:04:05+99:00", "not_a_time"),
        ("timestamptz", "0000-01-02T03:04:05Z", "not_a_time"),
        ("timestamptz", "0001-01-01T00:00:00Z", "0001-01-01T00:00:00Z"),
        ("timestamptz", "0001-01-01T00:00:00+01", "not_a_time"),
        ("timestamptz", "9999-12-31T23:59:59-01", "not_a_time"),
        ("timestamptz", "now", "not_a_time"),
        ("timestamptz", "infinity", "not_a_time"),
        ("text", "", ""),
        ("text", "plain", "plain"),
        ("text", "a\tb\nc\rd\\e", r"a\tb\nc\rd\\e"),
        ("text", r"\N", r"\\N"),
        ("text", r"\.", r"\\."),
        ("text", "Ünïcode €", "Ünïcode €"),
        ("text", "a\0b", "nul_byte"),
        ("text", "x" * 65_536, "x" * 65_536),
        ("text", "x" * 65_537, "value_too_large"),
        ("varchar(3)", "äöü", "äöü"),
        ("varchar(3)", "abcd", "text_too_long"),
        ("varchar(3)", "abc ", "text_too_long"),
    ],
    ids=lambda text: repr(text[:40]),
)
def test_value_of_each_type(sql: str, text: str, expected: str) -> None:
    assert value_of(of_value(sql), text.encode()) == expected


def test_text_that_is_not_utf8_is_a_reject_and_spoils_no_neighbour() -> None:
    one = of_value("text")
    result = parse(one, [(b"balance:1", b"\xc3\xa4"), (b"balance:2", b"\xc3"), (b"balance:3", b"")])
    assert result.rows == b"1\t\xc3\xa4\n3\t\n"
    assert [(reject.key, reject.reason) for reject in result.rejects] == [
        (b"balance:2", "not_utf8")
    ]


@pytest.mark.parametrize(
    ("sql", "tolerance", "text", "expected", "snapped"),
    [
        ("numeric(20,2)", "0.000001", "1234.57000000000000006", "1234.57", 1),
        ("numeric(20,2)", "0.000001", "1234.56999999999999994", "1234.57", 1),
        ("numeric(20,2)", "0.000001", "1234.58999999999999994", "1234.59", 1),
        ("numeric(20,2)", "0.000001", "1234.59999999999999994", "1234.60", 1),
        ("numeric(20,2)", "0.000001", "-9.99999999999999999", "-10", 1),
        ("numeric(20,2)", "0.000001", "-0.00000000000000003", "-0.00", 1),
        ("numeric(20,2)", "0.000001", "1.500001", "1.5", 1),
        ("numeric(20,2)", "0.000001", "1.5000010", "1.5", 1),
        ("numeric(20,2)", "0.000001", "1.4999990", "1.50", 1),
        ("numeric(20,2)", "0.000001", "1.50000100000000001", "too_many_decimals", 0),
        ("numeric(20,2)", "0.000001", "1.49999899999999999", "too_many_decimals", 0),
        ("numeric(20,2)", "0.000001", "1.5", "1.5", 0),
        ("numeric(20,2)", "0.000001", "1.50000000", "1.5", 0),
        ("numeric(20,2)", "0.000001", "1e-999999999", "0", 1),
        ("numeric(20,2)", "0.000001", "999999999999999999.99999999999", "out_of_range", 0),
        ("numeric(20,2)", "0.000001", "999999999999999999.98999999999", "999999999999999999.99", 1),
        ("numeric(20,2)", "0.004", "1.004", "1", 1),
        ("numeric(20,2)", "0.004", "1.0041", "too_many_decimals", 0),
        ("numeric(20,2)", "1e-20", "1234.57000000000000006", "residue", 0),
        ("numeric(6,1)", "0.001", "1.39999999", "1.4", 1),
        ("numeric(6,1)", "0.001", "1.99999999", "2.0", 1),
        ("numeric(6,1)", "0.001", "-19.99999999", "-20", 1),
        ("numeric(20,2)", "0.000001", "1992.99999999999999994", "1993.00", 1),
        ("numeric(6)", "0.001", "8.99999999", "9", 1),
        ("numeric(6)", "0.001", "9.99999999", "10", 1),
        ("bigint", "0.25", "5.25", "5", 1),
        ("bigint", "0.25", "5.26", "too_many_decimals", 0),
        ("bigint", "0.001", "1000000.00000000000000001", "1000000", 1),
        ("smallint", "0.1", "32767.99999", "out_of_range", 0),
        ("smallint", "0.1", "-32768.00001", "-32768", 1),
    ],
)
def test_tolerance(sql: str, tolerance: str, text: str, expected: str, snapped: int) -> None:
    one = of_value(sql, tolerance=tolerance)
    assert value_of(one, text.encode()) == expected
    assert parse(one, [(b"balance:1", text.encode())]).snapped == snapped


def test_a_record_with_two_tails_is_snapped_once_and_a_plain_numeric_stays_as_it_is() -> None:
    one = mapping(
        type="hash",
        tolerance="0.000001",
        columns={"user_id": "bigint", "a": "numeric(9,2)", "b": "numeric", "c": "bigint"},
    )
    tails: list[bytes | None] = [b"1.00999999999", b"1.00999999999", b"6.99999999999"]
    exact: list[bytes | None] = [b"1", b"1.00999999999", b"7"]
    result = parse(one, [(b"balance:1", tails), (b"balance:2", exact)])
    assert result.rows == b"1\t1.01\t1.00999999999\t7\n2\t1\t1.00999999999\t7\n"
    assert result.snapped == 1


def test_a_reject_that_a_tolerance_would_cure_names_the_option() -> None:
    [reject] = parse(mapping(), [(b"balance:1", b"1234.57000000000000006")]).rejects
    assert "option tolerance" in reject.detail


# --- JSON -----------------------------------------------------------------------------------------

ACCOUNT: dict[str, Any] = {
    "type": "json",
    "columns": {"user_id": "bigint", "balance": "numeric(20,2)", "note": "text", "ok": "boolean"},
}


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ('{"balance": 12.50, "note": "a\\tb", "ok": true}', r"12.50 a\tb true"),
        ('{"balance": "12.50", "note": "\\\\N", "ok": "f"}', r"12.50 \\N f"),
        ('{"balance": 1E2, "note": "", "ok": 1}', "100  1"),
        ('{"balance": -0, "note": "\\ud83d\\ude00", "ok": 0}', "-0 😀 0"),
        ('{"other": 1, "other": 2, "balance": 3, "deep": {"balance": 4}}', r"3 \N \N"),
        ('{"balance": null}', r"\N \N \N"),
        ("{}", r"\N \N \N"),
        (' {"balance":1}\n', r"1 \N \N"),
        ('{"balance": 900719925474099.93}', r"900719925474099.93 \N \N"),
        ('{"balance": 1e999}', "out_of_range"),
        ('{"balance": 0.1000000000000000055}', "residue"),
        ('{"balance": 1.505}', "too_many_decimals"),
        ('{"balance": ""}', "not_a_number"),
        ('{"balance": " 1"}', "not_a_number"),
        ('{"balance": true}', "not_a_number"),
        ('{"balance": [1]}', "not_a_number"),
        ('{"balance": {"balance": 1}}', "not_a_number"),
        ('{"balance": NaN}', "not_json"),
        ('{"balance": -Infinity}', "not_json"),
        ('{"balance": 1, "balance": 1}', "not_json"),
        ('{"balance": +1}', "not_json"),
        ('{"balance": 01}', "not_json"),
        ('{"balance": 1', "not_json"),
        ('{"balance": 1} {}', "not_json"),
        ('{"note": "a\tb"}', "not_json"),
        ('{"note": 5}', "not_json"),
        ('{"note": {}}', "not_json"),
        ('{"note": "a\\u0000"}', "nul_byte"),
        ('{"note": "\\ud800"}', "not_utf8"),
        ('{"ok": 2}', "not_a_boolean"),
        ('{"ok": []}', "not_a_boolean"),
        ('[["balance", 1]]', "not_json"),
        ("12", "not_json"),
        ("null", "not_json"),
        ("", "not_json"),
        ("broken", "not_json"),
        ("\ufeff{}", "not_json"),
        ("[" * 60_000, "not_json"),
        ('{"balance":' * 5_000, "not_json"),
        (f'{{"x": "{"x" * 65_536}"}}', "value_too_large"),
    ],
    ids=lambda text: repr(text[:40]),
)
def test_json(document: str, expected: str) -> None:
    found = value_of(mapping(**ACCOUNT), document.encode())
    assert found.replace("\t", " ") == expected


def test_json_that_is_not_utf8() -> None:
    assert value_of(mapping(**ACCOUNT), b'{"balance": 1, "x": "\xff"}') == "not_utf8"
    assert value_of(mapping(**ACCOUNT), '{"balance": 1}'.encode("utf-16")) == "not_utf8"


def test_a_reject_of_json_keeps_the_document_and_names_the_column() -> None:
    document = b'{"balance": 1e999}'
    [reject] = parse(mapping(**ACCOUNT), [(b"balance:1", document)]).rejects
    assert (reject.value, reject.row) == (document, b"1")
    assert reject.detail.startswith("balance: ")


# --- fields that are missing, keys that vanished, other Redis types -------------------------------


@pytest.mark.parametrize("kind", ["hash", "json"])
def test_a_missing_field_is_null_only_where_the_table_allows_it(kind: str) -> None:
    columns = {"user_id": "bigint", "balance": "numeric(20,2)", "note": "text"}
    one = mapping(type=kind, columns=columns, fields={"note": "n"})
    value: RawValue = [b"1", None] if kind == "hash" else b'{"balance": 1}'
    nothing: RawValue = [None, None] if kind == "hash" else b"{}"
    assert value_of(one, value) == "1\t\\N"
    assert value_of(one, nothing) == "\\N\t\\N"
    strict = one.with_nullable(frozenset({"note"}))
    assert value_of(strict, value) == "1\t\\N"
    assert value_of(strict, nothing) == "missing_field"
    [reject] = parse(one.with_nullable(frozenset()), [(b"balance:1", value)]).rejects
    assert (reject.reason, reject.row) == ("missing_field", b"1")
    assert "field n" in reject.detail


def test_a_text_that_looks_like_copys_null_is_a_text_beside_a_real_null() -> None:
    one = mapping(type="hash", columns={"user_id": "bigint", "a": "text", "b": "bigint"})
    values: list[RawValue] = [[rb"\N", None], [None, b"1"], [b"x", rb"\N"], [b"x", b"2"]]
    result = parse(one, [(b"balance:1", value) for value in values])
    assert result.rows == b"1\t\\\\N\t\\N\n1\t\\N\t1\n1\tx\t2\n"
    assert [reject.reason for reject in result.rejects] == ["not_a_number"]


def test_vanished_and_other_types_leave_the_rest_alone() -> None:
    good = [(b"balance:%d" % user, b"%d" % user) for user in range(5)]
    records: list[tuple[bytes, RawValue]] = [
        *good[:2],
        (b"balance:7", None),
        (b"balance:8", WrongType("list")),
        *good[2:],
        (b"balance:x", None),
        (b"balance:x", WrongType("list")),
    ]
    result = parse(mapping(), records)
    assert result.rows == b"".join(b"%d\t%d\n" % (user, user) for user in range(5))
    assert result.vanished == 2
    wrong, bad_key = result.rejects
    assert (wrong.reason, wrong.value, wrong.row) == ("wrong_type", None, b"8")
    assert "list" in wrong.detail
    assert (bad_key.reason, bad_key.row) == ("key_syntax", None)


def test_a_long_batch() -> None:
    records: list[tuple[bytes, RawValue]] = [(b"balance:%d" % user, b"5") for user in range(9000)]
    rows = parse(mapping(), records).rows
    assert rows == b"".join(b"%d\t5\n" % user for user in range(9000))


def test_a_key_read_twice_keeps_its_order() -> None:
    result = parse(mapping(), [(b"balance:1", b"1"), (b"balance:1", b"x"), (b"balance:1", b"2e0")])
    assert result.rows == b"1\t1\n1\t2\n"


def test_an_empty_batch() -> None:
    assert parse(mapping(), []) == Batch(b"", 0, [], 0, 0)


@pytest.mark.parametrize("spoiler", [b"balance:1\n2", b"balance:1\t2", rb"balance:1\N", b"1\n2\t3"])
def test_no_key_forges_a_line(spoiler: bytes) -> None:
    result = parse(mapping(), [(b"balance:1", b"1"), (spoiler, b"5\n6\t7"), (b"balance:2", b"2")])
    assert result.rows == b"1\t1\n2\t2\n"
    assert [reject.key for reject in result.rejects] == [spoiler]


def test_a_thousand_rejects_and_none_is_lost() -> None:
    records = [(b"balance:%d" % user, b"%d" % user if user % 3 else b"x") for user in range(3000)]
    result = parse(mapping(), list(records))
    assert len(result.rejects) == 1000
    assert result.count == 2000


# --- keys -----------------------------------------------------------------------------------------

NAME = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"
KEYS = [
    ("bigint", "0", True),
    ("bigint", "-5", True),
    ("bigint", "9223372036854775807", True),
    ("bigint", "-9223372036854775808", True),
    ("bigint", "9223372036854775808", "out_of_range"),
    ("bigint", "1" * 3000, "key_too_long"),
    ("bigint", "007", "key_syntax"),
    ("bigint", "+7", "key_syntax"),
    ("bigint", "-0", "key_syntax"),
    ("bigint", "1.0", "key_syntax"),
    ("bigint", "1e2", "key_syntax"),
    ("bigint", " 1", "key_syntax"),
    ("bigint", "1\n", "key_syntax"),
    ("bigint", "\uff11", "key_syntax"),
    ("bigint", "", "key_syntax"),
    ("smallint", "32768", "out_of_range"),
    ("integer", "2147483648", "out_of_range"),
    ("numeric", "1.5", True),
    ("numeric", "100", True),
    ("numeric", "-0.5", True),
    ("numeric", "1.50", "key_syntax"),
    ("numeric", "0.0", "key_syntax"),
    ("numeric", "-0", "key_syntax"),
    ("numeric", "1e2", "key_syntax"),
    ("numeric", "1." + "1" * 998, True),
    ("numeric", "1." + "1" * 999, "key_too_long"),
    ("numeric(5,2)", "999.99", True),
    ("numeric(5,2)", "1000", "out_of_range"),
    ("numeric(5,2)", "1.505", "too_many_decimals"),
    ("uuid", NAME, True),
    ("uuid", NAME.upper(), "key_syntax"),
    ("uuid", NAME.replace("-", ""), "key_syntax"),
    ("boolean", "true", True),
    ("boolean", "t", "key_syntax"),
    ("timestamptz", "2026-01-02T03:04:05Z", True),
    ("timestamptz", "2026-01-31T03:04:05.12Z", True),
    ("timestamptz", "2026-01-02T03:04:05.120Z", "key_syntax"),
    ("timestamptz", "2026-01-02T03:04:05+00:00", "key_syntax"),
    ("timestamptz", "2026-01-02 03:04:05Z", "key_syntax"),
    ("timestamptz", "2026-02-30T03:04:05Z", "key_syntax"),
    ("text", "", True),
    ("text", "alice", True),
    ("text", "Alice", True),
    ("text", "a:b:", True),
    ("text", "tab\tnewline\nbackslash\\", True),
    ("text", "Ünïcode", True),
    ("text", "x" * 1000, True),
    ("text", "x" * 1001, "key_too_long"),
    ("text", "x" * 3000, "key_too_long"),
    ("text", "a\0", "nul_byte"),
    ("varchar(3)", "äöü", True),
    ("varchar(3)", "abcd", "text_too_long"),
]


@pytest.mark.parametrize("template", ["balance:{user_id}", "{user_id}:balance", "a{user_id}{{b"])
@pytest.mark.parametrize(("sql", "text", "expected"), KEYS, ids=lambda text: repr(text)[:40])
def test_key(template: str, sql: str, text: str, expected: str | bool) -> None:
    one = of_key(sql, key=template)
    key = template.replace("{user_id}", text).replace("{{", "{").encode()
    found = outcome(one, key, b"5")
    split = one.split_key(key)
    if isinstance(found, str):
        assert found == expected
        assert isinstance(split, Unfit)
        assert split.reason == expected
        assert parse(one, [(key, b"5")]).rejects[0].row is None
    else:
        assert expected is True
        assert split == (text,)
        assert one.print_key(split) == key
        [reject] = parse(one, [(key, b"x")]).rejects
        assert reject.row is not None
        assert reject.row + b"\t5" == found


def test_a_text_key_that_is_not_utf8_is_a_reject() -> None:
    assert outcome(of_key("text"), b"balance:\xff", b"1") == "not_utf8"


@pytest.mark.parametrize("key", [b"", b"balance", b"Balance:1", b"xbalance:1"])
def test_a_key_of_another_form_is_a_reject_if_it_comes_this_far(key: bytes) -> None:
    assert outcome(mapping(), key, b"1") == "key_syntax"


@pytest.mark.parametrize(
    ("template", "sql", "key", "expected"),
    [
        ("b:{a}:{b}", ("text", "text"), "b:x:y", ("x", "y")),
        ("b:{a}:{b}", ("text", "text"), "b::", ("", "")),
        ("b:{a}:{b}", ("text", "text"), "b:x:y:z", "key_ambiguous"),
        ("b:{a}:{b}", ("text", "text"), "b:::", "key_ambiguous"),
        ("b:{a}:{b}", ("text", "text"), "b:x", "key_syntax"),
        ("b:{a}:{b}", ("bigint", "text"), "b:5:y:z", ("5", "y:z")),
        ("b:{a}:{b}", ("text", "bigint"), "b:x:y:5", ("x:y", "5")),
        ("b:{a}:{b}", ("timestamptz", "text"), "b:2026-01-02T03:04:05Z:x", "key_ambiguous"),
        ("b:{a}-{b}", ("bigint", "bigint"), "b:5--6", ("5", "-6")),
        ("b:{a}-{b}", ("bigint", "bigint"), "b:-5-6", ("-5", "6")),
        ("b:{a}-{b}", ("uuid", "bigint"), f"b:{NAME}-6", (NAME, "6")),
        ("b:{a}1{b}", ("bigint", "bigint"), "b:515", ("5", "5")),
        ("b:{a}1{b}", ("bigint", "bigint"), "b:5115", "key_ambiguous"),
        ("b:{a}::{b}", ("text", "text"), "b:x:::y", "key_ambiguous"),
        ("b:{a}::{b}", ("text", "text"), "b:x:::y"[:-2], ("x", "")),
        ("::{a}::{b}::", ("text", "text"), "::::z::", ("", "z")),
        ("::{a}::{b}::", ("text", "text"), ":::::z::", "key_ambiguous"),
        ("{a}/{b}", ("text", "text"), "tab\t/new\n", ("tab\t", "new\n")),
        ("{a}é{b}", ("text", "text"), "öéü", ("ö", "ü")),
        ("b:\t{a}", ("text",), "b:\tx", ("x",)),
        ("b\n{a}", ("text",), "b\nx", ("x",)),
        ("{a}-{b}:{c}", ("text",) * 3, "x-y:z", ("x", "y", "z")),
        ("{a}-{b}:{c}", ("text",) * 3, "x-y:z:w", "key_ambiguous"),
        ("{a}-{b}:{c}", ("text",) * 3, "x:w-y:z", ("x:w", "y", "z")),
        ("b:\\{a}:x", ("text",), "b:\\1:x", ("1",)),
    ],
)
def test_a_key_splits_in_one_way_only(
    template: str, sql: tuple[str, ...], key: str, expected: str | tuple[str, ...]
) -> None:
    columns = dict(zip("abc", sql, strict=False)) | {"balance": "bigint"}
    one = mapping(key=template, columns=columns)
    found, split = outcome(one, key.encode(), b"1"), one.split_key(key.encode())
    if isinstance(expected, str):
        assert found == expected
        assert isinstance(split, Unfit)
    else:
        assert not isinstance(found, str)
        assert split == expected
        assert one.print_key(expected) == key.encode()


def test_three_texts_of_a_thousand_bytes_would_not_fit_into_an_index() -> None:
    columns = {"a": "text", "b": "text", "c": "text", "balance": "bigint"}
    one = mapping(key="{a}:{b}:{c}", columns=columns)
    assert outcome(one, b":".join([b"x" * 800] * 3), b"1") == b"\t".join([b"x" * 800] * 3 + [b"1"])
    assert outcome(one, b":".join([b"x" * 801] * 3), b"1") == "key_too_long"
    assert outcome(one, b":".join([b"x" * 1001, b"", b""]), b"1") == "key_too_long"


def test_a_key_of_separators_alone_costs_no_more_than_its_length() -> None:
    columns = dict.fromkeys("abcd", "text") | {"e": "bigint", "balance": "bigint"}
    one = mapping(key="{a}:{b}:{c}:{d}:{e}", columns=columns)
    # Backtracking over these took minutes.
    assert outcome(one, b":" * 4000 + b"x", b"1") == "key_syntax"
    assert outcome(one, b":" * 4000 + b"1", b"1") == "key_ambiguous"


def test_ids_that_differ_only_by_case_are_two_rows() -> None:
    rows = parse(of_key("text"), [(b"balance:Bob", b"1"), (b"balance:bob", b"2")]).rows
    assert rows == b"Bob\t1\nbob\t2\n"


# --- which keys -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("balance:{user_id}", b"balance:*"),
        ("{user_id}", None),
        ("{user_id}:b", b"*:b"),
        (r"[a*b?]\{{x}}:{user_id}", rb"\[a\*b\?\]\\{x}:*"),
    ],
)
def test_match(template: str, match: bytes | None) -> None:
    assert mapping(key=template).match == match


def test_member_maps_the_fields_of_one_key() -> None:
    one = mapping(key="all{{1}}", type="hash", member="user:{user_id}")
    assert (one.member_key, one.match, one.redis_fields) == (b"all{1}", b"user:*", [])
    assert mapping().member_key is None
    assert one.split_key(b"user:5") == ("5",)
    assert one.select([b"user:5", b"x"], matched=False) == [b"user:5"]


def test_the_fields_to_ask_for_are_in_the_order_of_the_columns() -> None:
    columns = {"b": "bigint", "user_id": "bigint", "a": "bigint"}
    assert mapping(type="hash", columns=columns, fields={"b": "ß"}).redis_fields == [
        "ß".encode(),
        b"a",
    ]
    assert mapping().redis_fields == []


def test_nothing_to_leave_out_costs_nothing() -> None:
    keys = [b"balance:1", b"other"]
    assert mapping().select(keys) is keys
    assert mapping().select(keys, matched=False) == [b"balance:1"]


def test_globs_of_ignore_leave_keys_out() -> None:
    one = mapping(ignore=["balance:9*", r"balance:[x-z]\*"])
    keys = [b"balance:1", b"balance:91", b"balance:x*", b"balance:x5"]
    assert one.select(keys) == [b"balance:1", b"balance:x5"]


def test_among_other_keys_those_that_are_no_id_are_left_out() -> None:
    one = of_key("bigint", key="{user_id}", ignore=["5*"])
    keys = [b"1", b"007", b"9223372036854775808", b"cache:1", b"-3", b"55", b"", b"1\n"]
    assert one.select(keys) == [b"1", b"-3"]
    assert one.select(keys, matched=False) == [b"1", b"-3"]
    texts = [b"any", "ä".encode(), b"\xff", b"a\0", b"x" * 1001]
    assert of_key("text", key="{user_id}").select(texts) == [b"any", "ä".encode(), b"x" * 1001]
    assert of_key("varchar(2)", key="{user_id}").select(texts) == ["ä".encode()]


async def test_globs_mean_what_redis_makes_of_them(redis: Redis) -> None:
    keys = [
        "".join(chars).encode()
        for count in (1, 2, 3)
        for chars in product("ab]^-\\*", repeat=count)
    ]
    await redis.mset(dict.fromkeys(keys, b""))
    globs = [
        "".join(chars).encode()
        for count in (1, 2, 3, 4)
        for chars in product("*?[]^-\\b", repeat=count)
    ] + [b"[a-b]*", b"[^a-b]?", b"[b-a]", rb"[\]]*", b"*a*b*", rb"*\**", b"[^]*", b"a[", b"*a*a"]
    pipeline = redis.pipeline(transaction=False)
    for glob in globs:
        pipeline.keys(glob)
    for glob, found in zip(globs, await pipeline.execute(), strict=True):
        matches = glob_filter([glob])
        assert {key for key in keys if matches(key)} == set(found), glob


def test_many_stars_cost_no_more_than_one() -> None:
    assert not glob_filter([b"*a" * 20 + b"b"])(b"a" * 2000)


# --- and into PostgreSQL --------------------------------------------------------------------------


async def test_copy_reads_the_rows_as_they_were_meant(pg: asyncpg.Connection) -> None:
    columns = {
        "id": "text",
        "n": "numeric(20,2)",
        "plain": "numeric",
        "big": "bigint",
        "yes": "boolean",
        "who": "uuid",
        "at": "timestamptz",
        "note": "varchar(40)",
    }
    one = mapping(key="u:{id}", type="hash", tolerance="0.000001", columns=columns)
    rough: list[bytes | None] = [
        b"-1234.56999999999999994",
        b"1e-16383",
        b"1e3",
        b"t",
        NAME.upper().encode(),
        b"2026-01-02 03:04:05.5+03",
        b"tab\tline\nreturn\r\\N \x01\x7f",
    ]
    smooth: list[bytes | None] = [b"007.5", b"1e131071", b"-0", b"0", None, None, b""]
    records: list[tuple[bytes, RawValue]] = [
        (b"u:\\.", rough),
        ("u:\\N\t\n\r ü".encode(), smooth),
        (b"u:", [None] * 7),
        (b"u:plain", [b"1.10", b"2", b"3", b"f", NAME.encode(), b"2026-01-02T03:04:05Z", b"x"]),
    ]
    result = parse(one, records)
    assert (result.count, result.snapped) == (4, 1)
    await pg.execute(f"CREATE TABLE t ({', '.join(f'{k} {v}' for k, v in columns.items())})")
    copied = await pg.copy_to_table("t", source=io.BytesIO(result.rows), format="text")
    assert copied == "COPY 4"
    rows = {row["id"]: tuple(row)[1:] for row in await pg.fetch("SELECT * FROM t")}
    at = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert rows == {
        "\\.": (
            Decimal("-1234.57"),
            Decimal("1e-16383"),
            1000,
            True,
            UUID(NAME),
            at.replace(hour=0, microsecond=500_000),
            "tab\tline\nreturn\r\\N \x01\x7f",
        ),
        "\\N\t\n\r ü": (Decimal("7.50"), Decimal("1e131071"), 0, False, None, None, ""),
        "": (None,) * 7,
        "plain": (Decimal("1.10"), Decimal(2), 3, False, UUID(NAME), at, "x"),
    }


async def test_the_longest_keys_fit_into_an_index(pg: asyncpg.Connection) -> None:
    columns = {"a": "text", "b": "text", "c": "text", "balance": "bigint"}
    one = mapping(key="{a}:{b}:{c}", columns=columns)
    # Of digests, so that PostgreSQL can't compress them.
    digests = "SELECT encode(sha256(i::text::bytea), 'hex') FROM generate_series(1, 38) i"
    text = "".join([record[0] for record in await pg.fetch(digests)])
    key = ":".join([text[:800], text[800:1600], text[1600:2400]]).encode()
    result = parse(one, [(key, b"1")])
    await pg.execute("CREATE TABLE t (a text, b text, c text, n bigint, PRIMARY KEY (a, b, c))")
    await pg.copy_to_table("t", source=io.BytesIO(result.rows), format="text")
    assert await pg.fetchval("SELECT n FROM t") == 1
