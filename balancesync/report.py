"""What a dry run or a verify found: the first rows, and the moves of the totals."""

from dataclasses import dataclass, field
from typing import Final

from balancesync.mapping import Mapping
from balancesync.reading import Reading
from balancesync.source import Source
from balancesync.target import Op, Page, Row, Writer

PAGE_ROWS: Final = 5_000
SAMPLE_ROWS: Final = 10


@dataclass(slots=True)
class Report:
    """One mapping's part: rows by op (i, u, d), exact texts of how far each total would move.

    `moving` are the keys that changed between all looks of a verify.
    """

    mapping: str
    key_columns: tuple[str, ...]
    value_columns: tuple[str, ...]
    rows: dict[Op, list[Row]] = field(default_factory=dict)
    totals: dict[str, str] = field(default_factory=dict)
    moving: int = 0


async def spare_present(source: Source, reading: Reading, mapping: Mapping, writer: Writer) -> int:
    """Take out of a diff's deletions what Redis has after all, for a scan can miss a key.

    Returns how many those were.
    """
    after = spared = 0
    while page := await writer.page("d", after, PAGE_ROWS):
        after = page[-1][0]
        there = await find_present(source, reading, mapping, page)
        if there:
            await writer.forget([number for number, _ in there])
            spared += len(there)
    return spared


async def find_present(source: Source, reading: Reading, mapping: Mapping, page: Page) -> Page:
    """Those of the diff's rows whose keys Redis has."""
    there = await source.exists(reading, [mapping.print_key(texts) for _, texts in page])
    return [row for row, found in zip(page, there, strict=True) if found]


async def describe(writer: Writer) -> Report:
    """The first rows of each op and how far the totals would move."""
    mapping = writer.mapping
    report = Report(mapping.name, mapping.config.key_columns, mapping.config.value_columns)
    ops: tuple[Op, ...] = ("i", "u", "d") if mapping.config.mode == "upsert" else ("u",)
    for op in ops:
        if rows := await writer.sample(op, SAMPLE_ROWS):
            report.rows[op] = rows
    report.totals = await writer.totals(ops)
    return report
