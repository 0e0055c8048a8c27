"""What a verify calls drift: it looks again, on both sides, at what differed.

Data that moves while it is compared differs for a moment. So a key is drift only if it differs at
every look and its row stays as it was. Where the value and the row are both others than at the look
before, somebody brings them over: such a key is moving, neither drift nor equal. And a row that the
table refuses is a reject, for as long as that reject is open and Redis holds the same value.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from balancesync.apply import Applied
from balancesync.mapping import Mapping
from balancesync.part import Part
from balancesync.reading import Reading
from balancesync.records import Records
from balancesync.report import PAGE_ROWS, find_present
from balancesync.session import Session
from balancesync.source import Source
from balancesync.target import Op, Writer

# A key that changes all the time may differ at each look, for a moment.
_LOOKS: Final = 5
# What is kept of a reject's value, in bytes: see `Writer.keep_rejects`.
_KEPT_BYTES: Final = 65_536

Settle = Callable[[], Awaitable[None]]


@dataclass(slots=True)
class Found:
    """What looking again came to. `drift` has the rejects, too; `writer` the rows that are drift.

    `vanished` are keys that are gone by now, `back` those that a scan had missed.
    """

    writer: Writer
    drift: Applied = field(default_factory=Applied)
    moving: int = 0
    vanished: int = 0
    back: int = 0


class Comparison:
    """One mapping's part of a verify.

    `settle` has live mode bring over what is pending; None: there is none. The writers of further
    looks have the numbers that `numbers` gives.
    """

    def __init__(
        self,
        session: Session,
        source: Source,
        records: Records,
        part: Part,
        *,
        settle: Settle | None,
        numbers: Callable[[], int],
    ) -> None:
        self._session = session
        self._source = source
        self._records = records
        self._part = part
        self._settle = settle
        self._numbers = numbers
        self._rejected = 0

    async def run(self) -> Found:
        """Look until it is clear of each key what it is, a few times at the most."""
        part, found = self._part, Found(self._part.writer)
        if not part.would_apply.rows:
            return found
        for _ in range(_LOOKS):
            if self._settle is not None:
                await self._settle()
            first, found.writer = found.writer, self._another(found.writer)
            await self._reread(first, found)
            diff = await found.writer.diff()
            found.drift = replace(part, diff=diff).would_apply
            if not found.drift.rows:
                break
            # Without live mode a row is written by a run that happens to be at work, if at all.
            if self._settle is None and not await found.writer.count_moving():
                break
        await self._judge(found)
        found.drift.rejected = self._rejected
        return found

    def _another(self, first: Writer) -> Writer:
        return Writer(self._session, first.mapping, first.table, self._numbers(), first=first)

    async def _judge(self, found: Found) -> None:
        """Tell apart what still differs: what moves, and what the table is known to refuse."""
        gone = await found.writer.drop_moving()
        found.moving = sum(gone.values())
        for op, rows in gone.items():
            _take(found.drift, op, rows)
        for op in _ops(self._part.mapping):
            # A row that the table doesn't let go has no key, and so is no reject.
            if op != "d":
                rows = await self._drop_refused(found.writer, op)
                _take(found.drift, op, rows)
                self._rejected += rows

    async def _reread(self, first: Writer, found: Found) -> None:
        """Read what differed once more, into the next look."""
        reading, mapping, again = self._part.reading, self._part.mapping, found.writer
        await again.prepare()
        for op in _ops(mapping):
            after = 0
            while page := await first.page(op, after, PAGE_ROWS):
                after = page[-1][0]
                if op == "d":
                    # A scan can miss a key: one that is there after all is compared as any other.
                    page = await find_present(self._source, reading, mapping, page)
                    await first.forget([number for number, _ in page])
                    found.back += len(page)
                keys = [mapping.print_key(texts) for _, texts in page]
                found.vanished += await self._stage(again, reading, keys)

    async def _stage(self, writer: Writer, reading: Reading, keys: list[bytes]) -> int:
        """Read keys into a look; returns how many of them are gone."""
        if not keys:
            return 0
        raw = await self._source.fetch(reading, keys)
        batch = writer.mapping.parse(raw)
        self._rejected += len(batch.rejects)
        await writer.stage(batch)
        return batch.vanished

    async def _drop_refused(self, writer: Writer, op: Op) -> int:
        """Take out of what differs the rows that the table has refused with this very value."""
        mapping, connection = writer.mapping, self._session.connection
        after = dropped = 0
        while page := await writer.page_with_values(op, after, PAGE_ROWS):
            keys = {mapping.print_key(texts): (number, values) for number, texts, values in page}
            rejects = await self._records.open_rejects(connection, mapping.name, [*keys])
            numbers = [
                number
                for key, (number, values) in keys.items()
                if key in rejects and rejects[key] == _refused(values)
            ]
            if numbers:
                await writer.forget(numbers)
                dropped += len(numbers)
            after = page[-1][0]
        return dropped


def _refused(values: Sequence[str | None]) -> tuple[str, bytes | None]:
    """Reason and value as a reject of such a row is kept."""
    text = "\t".join(value if value is not None else "" for value in values)
    return "refused_by_table", text.encode()[:_KEPT_BYTES]


def _ops(mapping: Mapping) -> tuple[Op, ...]:
    """What can be drift: a key that has no row in an `update` table isn't."""
    return ("i", "u", "d") if mapping.config.mode == "upsert" else ("u",)


def _take(drift: Applied, op: Op, rows: int) -> None:
    match op:
        case "i":
            drift.inserted -= rows
        case "u":
            drift.updated -= rows
        case "d":
            drift.deleted -= rows
