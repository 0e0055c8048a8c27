"""Cron expressions: what they mean, and what is refused."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancesync.cron import parse_cron


@pytest.mark.parametrize(
    ("expression", "field", "values"),
    [
        ("0 * * * *", "minute", {0}),
        ("*/20 * * * *", "minute", {0, 20, 40}),
        ("5-59/15 * * * *", "minute", {5, 20, 35, 50}),
        ("1,2,30-32 * * * *", "minute", {1, 2, 30, 31, 32}),
        ("* 0 * * *", "minute", set(range(60))),
        ("0 9-17 * * *", "hour", set(range(9, 18))),
        ("0 0 1,15 * *", "day", {1, 15}),
        ("0 0 * jan,JUL-sep *", "month", {1, 7, 8, 9}),
        ("0 0 * * 0", "weekday", {0}),
        ("0 0 * * 7", "weekday", {0}),
        ("0 0 * * 5-7", "weekday", {5, 6, 0}),
        ("0 0 * * *", "weekday", set(range(7))),
        ("0 0 * * Mon-Fri", "weekday", {1, 2, 3, 4, 5}),
        ("0 0 * * fri-sun", "weekday", {5, 6, 0}),
        ("0 0 * * sun-sat", "weekday", set(range(7))),
        ("  0   0 29 2 *  ", "day", {29}),
    ],
)
def test_cron_fields(expression: str, field: str, values: set[int]) -> None:
    assert getattr(parse_cron(expression), field) == values


def test_cron_stars_are_remembered() -> None:
    assert parse_cron("0 0 1 * 1").starred == {"month"}
    assert parse_cron("*/5 0 */2 1 mon").starred == {"minute", "day"}


@pytest.mark.parametrize(
    ("macro", "expression"),
    [
        ("@hourly", "0 * * * *"),
        ("@daily", "0 0 * * *"),
        ("@midnight", "0 0 * * *"),
        ("@Weekly", "0 0 * * 0"),
        ("@monthly", "0 0 1 * *"),
        ("@yearly", "0 0 1 1 *"),
        ("@annually", "0 0 1 1 *"),
    ],
)
def test_cron_macros(macro: str, expression: str) -> None:
    assert parse_cron(macro) == parse_cron(expression)


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("", "5 fields"),
        ("* * * *", "has 4"),
        ("0 0 * * * *", "has 6"),
        ("@reboot", "unknown"),
        ("60 * * * *", "minute"),
        ("-1 * * * *", "minute"),
        ("1.5 * * * *", "minute"),
        ("\uff11 * * * *", "minute"),
        ("1,,2 * * * *", "minute"),
        ("30-10 * * * *", "backwards"),
        ("*/0 * * * *", "step"),
        ("*/90 * * * *", "step"),
        ("5/15 * * * *", "5-59/15"),
        ("** * * * *", "minute"),
        ("0 24 * * *", "hour"),
        ("0 0 0 * *", "day"),
        ("0 0 32 * *", "day"),
        ("0 0 L * *", "day"),
        ("0 0 * 13 *", "month"),
        ("0 0 * foo *", "month"),
        ("0 0 * * 8", "weekday"),
        ("0 0 * * ?", "weekday"),
        ("0 0 * * 1#2", "weekday"),
        ("0 0 31 2 *", "never comes"),
        ("0 0 30 feb *", "never comes"),
        ("0 0 31 4,6,9,11 *", "never comes"),
    ],
)
def test_cron_refused(expression: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_cron(expression)


def test_a_date_that_never_comes_beside_a_weekday_that_does() -> None:
    assert parse_cron("0 0 31 2 mon").weekday == {1}


@given(st.text(alphabet="0123456789*/,-abcdjnfeu @", max_size=20))
def test_cron_never_fails_otherwise(expression: str) -> None:
    with suppress(ValueError):
        parsed = parse_cron(expression)
        for field in ("minute", "hour", "day", "month", "weekday"):
            assert getattr(parsed, field)
