"""What people get, on terminals and pipes of all kinds."""

import io
import re
import sys

import pytest
from rich.console import Console
from rich.text import Text

from balancesync import show

RUN = {
    **dict.fromkeys(("ignored", "vanished", "snapped", "not_found", "absent", "deleted"), 0),
    "job": "sync",
    "mode": "dry_run",
    "status": "succeeded",
    "duration_s": 0.1,
    "attempts": 2,
    "scanned": 4,
    "rejected": 0,
    "inserted": 1,
    "updated": 1,
    "unchanged": 2,
    "kept": 0,
    "warnings": ["mind\nthe gap"],
}


def grid() -> show.Grid:
    """Two rows, 22 characters wide as a table and 18 as blocks."""
    made = show.Grid("name", "amount", right=["amount"])
    made.add_row("first name", "1,000,000")
    made.add_row(Text("other"), "2")
    return made


def lines(width: int, shown: show.Grid | None = None) -> list[str]:
    """The grid on a console of this width, without the blanks at the ends of its lines."""
    console = Console(width=width, file=io.StringIO())
    with console.capture() as captured:
        for piece in (shown or grid()).fitted(console):
            console.print(piece, soft_wrap=True)
    return [line.rstrip() for line in captured.get().splitlines()]


def test_a_grid_that_fits_is_a_table() -> None:
    assert lines(30) == [
        "name           amount",
        "first name  1,000,000",
        "other               2",
    ]


def test_a_grid_that_does_not_fit_is_a_block_for_each_row() -> None:
    assert lines(20) == [
        "name    first name",
        "amount  1,000,000",
        "",
        "name    other",
        "amount  2",
    ]


def test_the_columns_that_are_least_needed_go_first() -> None:
    made = show.Grid("what", "much", "id", right=["much"], spare=["id", "much"])
    made.add_row("a thing", "1,000", "0" * 20)
    assert lines(40, made)[0].split() == ["what", "much", "id"]
    assert lines(20, made) == [
        "what      much",
        "a thing  1,000",
        "left out here, but in a pipe and in --json: id",
    ]
    assert lines(10, made)[1:] == [
        "a thing",
        "left out here, but in a pipe and in --json: id, much",
    ]
    assert len(lines(5, made)) > 3


def test_a_pipe_gets_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    made = show.Grid("text")
    made.add_row("x" * 500)
    show.write(made)
    assert capsys.readouterr().out == f"text\n{'x' * 500}\n"


def test_what_an_encoding_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    show.write("ü → €")
    assert raw.getvalue() == b"\xfc \\u2192 \\u20ac\n"


def test_a_report_tells_every_kind_of_change(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"op": "insert", "key": {"id": "a\x1b[2Jb"}, "old": None, "new": {"x": "1", "y": None}},
        {
            "op": "update",
            "key": {"id": "b"},
            "old": {"x": "1", "y": "2"},
            "new": {"x": "1", "y": "3"},
        },
        {"op": "delete", "key": {"id": "c"}, "old": {"x": "5", "y": "6"}, "new": None},
        {
            "op": "keep",
            "key": {"id": "d"},
            "old": {"x": "0.00", "y": "1"},
            "new": {"x": "1.01", "y": "1"},
        },
    ]
    report = {"mapping": "m", "rows": rows, "totals": {"x": "-4", "y": "0.00"}}
    counts = {name: RUN.get(name, 0) for name in show._COUNTS} | {"deleted": 3}
    run = RUN | {"deleted": 3, "mappings": {"m": counts}, "report": [report]}
    show.show_run(run)
    out = capsys.readouterr().out
    assert "dry run succeeded in 100 ms, at attempt 2" in out
    cells = [re.split(r"  +", line) for line in out.splitlines()]
    assert ["insert", '"a\\x1b[2Jb"', "1", "NULL"] in cells
    assert ["update", "b", "1", "2 → 3"] in cells
    assert ["delete", "c", "5 → gone", "6 → gone"] in cells
    assert ["would be left", "id", "x", "y"] in cells
    assert ["keep", "d", "0.00, not 1.01", "1"] in cells
    assert "... and 2 more to delete" in out
    assert "the total of x would change by -4\n" in out
    assert "the total of y would stay the same\n" in out
    assert out.endswith("warning: mind\\nthe gap\n")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0004, "0 ms"),
        (0.9994, "999 ms"),
        (59.96, "60.0 s"),
        (60, "1 min 0 s"),
        (3_600, "1 h 0 min"),
        (90_000, "1 d 1 h"),
    ],
)
def test_durations(seconds: float, said: str) -> None:
    assert show.ago(seconds) == said
