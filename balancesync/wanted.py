"""Records as PostgreSQL's rows want them in Redis, held against those that are there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from balancesync.columns import ColumnType
from balancesync.mapping import Mapping
from balancesync.model import Counts, RawBatch, RawValue
from balancesync.part import reading_of
from balancesync.printing import printer
from balancesync.rendering import Rendering, Value
from balancesync.report import SAMPLE_ROWS, Report
from balancesync.rows import Page, Rows
from balancesync.target import Op, Row
from balancesync.values import INTEGERS, NULL, Unfit, read_number, show


@dataclass(frozen=True, slots=True)
class Wanted:
    """Records as they are to be in Redis; `lines` are what the mapping reads in them."""

    keys: list[bytes]
    values: list[Value]
    lines: list[bytes]

    def pick(self, places: Sequence[int]) -> "Wanted":
        """These of them."""
        return Wanted(
            [self.keys[at] for at in places],
            [self.values[at] for at in places],
            [self.lines[at] for at in places],
        )


class Part:
    """One mapping's part of an attempt: what is wanted of it, and how it compares."""

    def __init__(self, mapping: Mapping, rows: Rows) -> None:
        config = mapping.config
        self.mapping = mapping
        self.reading = reading_of(mapping)
        self.rows = rows
        self.counts = Counts()
        self.report = Report(mapping.name, config.key_columns, config.value_columns)
        self.first_kept = b""
        self.first_reject = ""
        self._rendering = Rendering(config)
        self._keys = len(config.key_columns)
        self._mean = [_meaning(config.types[name]) for name in config.value_columns]
        self._print = [printer(config.types[name]) for name in config.value_columns]

    def want(self, page: Page) -> Wanted:
        """Make the records of a page's rows, without those that can't be any."""
        mapping, counts = self.mapping, self.counts
        keys = mapping.print_keys(page.keys)
        values = self._rendering.values(page.values)
        counts.scanned += len(keys)
        own = mapping.select(keys)
        if len(own) < len(keys):
            value_of = dict(zip(keys, values, strict=True))
            counts.ignored += len(keys) - len(own)
            keys, values = own, [value_of[key] for key in own]
        batch = mapping.parse(RawBatch(keys, list(values), len(keys)))
        if batch.rejects:
            first = batch.rejects[0]
            self.first_reject = self.first_reject or f"{show(first.key)}: {first.detail}"
            rejected = {reject.key for reject in batch.rejects}
            counts.rejected += len(rejected)
            places = [at for at, key in enumerate(keys) if key not in rejected]
            keys, values = [keys[at] for at in places], [values[at] for at in places]
        return Wanted(keys, values, batch.rows[:-1].split(b"\n") if keys else [])

    def lines(self, keys: list[bytes], values: list[RawValue]) -> list[bytes | None]:
        """What the mapping reads in records that are there; None for what it would reject."""
        if not keys:
            return []
        batch = self.mapping.parse(RawBatch(keys, values, len(keys)))
        if batch.count == len(keys):
            return [*batch.rows[:-1].split(b"\n")]
        if len(keys) == 1:
            return [None]
        half = len(keys) // 2
        return [*self.lines(keys[:half], values[:half]), *self.lines(keys[half:], values[half:])]

    def is_same(self, found: bytes | None, wanted: bytes) -> bool:
        """Whether two lines of one key hold the same values, however they are written."""
        if found is None or found == wanted:
            return found is not None
        return self._meant(found) == self._meant(wanted)

    def is_whole(self, seen: RawValue) -> bool:
        """Whether what was read is all that a string or an object holds; a hash can't tell."""
        if self.mapping.config.type != "json":
            return True
        return isinstance(seen, bytes) and self._rendering.is_whole(seen)

    def replacement(self, seen: RawValue, wanted: Value) -> Value | None:
        """What `seen` is to become so that its mapped fields are those wanted; None if it can't."""
        if isinstance(seen, list) and isinstance(wanted, list):
            # No field is ever deleted, and that is how a hash would say NULL.
            gone = any(w is None and s is not None for s, w in zip(seen, wanted, strict=True))
            return None if gone else wanted
        if isinstance(seen, bytes) and isinstance(wanted, bytes):
            is_json = self.mapping.config.type == "json"
            return self._rendering.merged(seen, wanted) if is_json else wanted
        return None

    def show(self, op: Op, key: bytes, found: bytes | None, raw: RawValue, wanted: bytes) -> None:
        """Keep this record for the report, if it is one of the first with this op."""
        rows = self.report.rows.setdefault(op, [])
        texts = self.mapping.split_key(key)
        if len(rows) == SAMPLE_ROWS or isinstance(texts, Unfit):
            return
        if found is not None:
            old = self._printed(found)
        else:
            held = show(raw) if isinstance(raw, bytes) else None
            old = [held if at == 0 else None for at, _ in enumerate(self._print)]
        rows.append(Row(op, texts, tuple(self._printed(wanted)), tuple(old)))

    def _meant(self, line: bytes) -> list[object]:
        fields = line.split(b"\t")[self._keys :]
        return [mean(text) for mean, text in zip(self._mean, fields, strict=True)]

    def _printed(self, line: bytes) -> list[str | None]:
        fields = line.split(b"\t")[self._keys :]
        return [print_(text) for print_, text in zip(self._print, fields, strict=True)]


def _meaning(kind: ColumnType) -> Callable[[bytes], object]:
    """What makes fields of COPY that mean the same value the same object."""
    if kind.name in INTEGERS or kind.name == "numeric":
        return lambda field: field if field == NULL else read_number(field)
    # A boolean is written in several ways; a text, a UUID and a time are parsed into one.
    return printer(kind) if kind.name == "boolean" else lambda field: field
