"""What the benchmark measures finds its place on the page; measuring itself is no test."""

import shutil
from pathlib import Path

import pytest

from benchmarks import page
from benchmarks.servers import Broken


def test_the_tables_are_replaced_and_nothing_else(tmp_path: Path) -> None:
    copy = tmp_path / page.PAGE.name
    shutil.copy(page.PAGE, copy)
    page.put({"measured": "old and | older |", "times": "| longer |"}, copy)
    text = copy.read_text()
    assert "## What the rows mean" in text
    page.put({"measured": "| new |"}, copy)
    assert copy.read_text() == text.replace("old and | older |", "| new |")


def test_a_table_without_a_place_is_told(tmp_path: Path) -> None:
    copy = tmp_path / "page.md"
    copy.write_text("<!-- measured -->\nno end\n")
    with pytest.raises(Broken, match=r"page\.md has no place for measured"):
        page.put({"measured": ""}, copy)
