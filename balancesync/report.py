"""What a dry run or a verify found: the first rows, the moves of the totals, the proven drift."""

from dataclasses import dataclass, field
from typing import Final

from balancesync.mapping import Mapping
from balancesync.reading import Reading
from balancesync.source import Source
from balancesync.target import Diff, Op, Row, Writer

PAGE_ROWS: Final = 5_000
SAMPLE_ROWS: Final = 10


@dataclass(slots=True)
class Report:
    """One mapping's part: rows by op (i, u, d), exact texts of how far each total would move."""

    mapping: str
    key_columns: tuple[str, ...]
    value_columns: tuple[str, ...]
    rows: dict[Op, list[Row]] = field(default_factory=dict)
    totals: dict[str, str] = field(default_factory=dict)


async def reread(
    source: Source, reading: Reading, mapping: Mapping, first: Writer, again: Writer
) -> Diff:
    """Read what differs once more on both sides; return the diff of `again`, a second look.

    Data that moves while it's compared differs for a moment: only what differs twice is drift.
    """
    await again.prepare()
    ops: tuple[Op, ...] = ("i", "u") if mapping.config.mode == "upsert" else ("u",)
    for op in ops:
        after = 0
        while page := await first.page(op, after, PAGE_ROWS):
            keys = [mapping.print_key(texts) for _, texts in page]
            await again.stage(mapping.parse(await source.fetch(reading, keys)))
            after = page[-1][0]
    await spare_present(source, reading, mapping, first)
    return await again.diff()


async def spare_present(source: Source, reading: Reading, mapping: Mapping, writer: Writer) -> int:
    """Take out of a diff's deletions what Redis has after all, for a scan can miss a key.

    Returns how many those were.
    """
    after = spared = 0
    while page := await writer.page("d", after, PAGE_ROWS):
        keys = [mapping.print_key(texts) for _, texts in page]
        there = await source.exists(reading, keys)
        numbers = [number for (number, _), found in zip(page, there, strict=True) if found]
        if numbers:
            await writer.forget(numbers)
            spared += len(numbers)
        after = page[-1][0]
    return spared


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
