"""One mapping's rules: which keys are its own, and what a batch of them means in rows and rejects.

A batch becomes lines of COPY's text format at once: all lines are joined, and one pattern tells how
far they surely fit. A line that it doesn't know is judged exactly, by itself, and the pattern goes
on behind it. The pattern is conservative: it may miss lines that fit, never take one that doesn't.
"""

import json
from collections.abc import Sequence
from typing import Final, cast

from balancesync.config import MappingConfig
from balancesync.keys import KeyForm, glob_filter
from balancesync.lines import Lines
from balancesync.model import Batch, RawBatch, RawValue, Reject, WrongType
from balancesync.values import NULL, VALUE_BYTES, Fit, Unfit, ValueColumn, show

_DETAIL: Final = 200

# A value in the form that the patterns work on: the texts of the value columns, None for NULL.
_Opened = RawValue | Unfit


class _Token(str):
    """A number of a JSON document, with the digits that it has there."""

    __slots__ = ()


class InvalidKey(ValueError):
    """These texts are no key of this mapping; the message says why."""


class Mapping:
    """The rules of one mapping, compiled. Pure: it opens nothing and raises nothing on data."""

    def __init__(self, config: MappingConfig, nullable: frozenset[str] | None = None) -> None:
        """`nullable`: the value columns that may be NULL, which only the table can tell; or all."""
        self.name = config.name
        self.config = config
        self.nullable = frozenset(config.value_columns) if nullable is None else nullable
        self._form = KeyForm(config.member or config.key, config.types)
        self._columns = [
            ValueColumn(column, config.types[column], config.tolerance)
            for column in config.value_columns
        ]
        self._fields = [config.field_of[column] for column in config.value_columns]
        self._single = config.type == "string" or bool(config.member)
        self._ignored = glob_filter(glob.encode() for glob in config.ignore)
        self._matched = glob_filter([self._form.glob or b"*"])
        nulls = frozenset[str]() if self._single else self.nullable
        self._lines = Lines(self._form, self._columns, nulls)
        self._json = json.JSONDecoder(
            object_pairs_hook=tuple,
            parse_int=_Token,
            parse_float=_Token,
            parse_constant=_refuse_constant,
        )

    def with_nullable(self, nullable: frozenset[str]) -> "Mapping":
        """Make the same mapping for a table where just these value columns may be NULL."""
        return Mapping(self.config, nullable)

    @property
    def match(self) -> bytes | None:
        """The MATCH pattern for SCAN (HSCAN with `member`); None: every key may be of this form."""
        return self._form.glob

    @property
    def member_key(self) -> bytes | None:
        """The one big hash whose fields are the records; None without `member`."""
        return self.config.template.literals[0].encode() if self.config.member else None

    @property
    def prefix(self) -> bytes:
        """What every key begins with; with `member` it's that one key."""
        return self.config.template.literals[0].encode()

    @property
    def redis_fields(self) -> list[bytes]:
        """The fields that HMGET asks for, in the order of the value columns; [] if not a hash."""
        if self.config.type != "hash" or self.config.member:
            return []
        return [field.encode() for field in self._fields]

    def select(self, keys: list[bytes], *, matched: bool = True) -> list[bytes]:
        """Leave out the keys that are none of this mapping's: they count as ignored.

        `matched` says that the server's MATCH has filtered them already; without it (live mode) a
        key without the template's literal text is left out here. Where there is nothing to leave
        out, the very list that came goes back.
        """
        if not matched and self.match is not None:
            keys = [key for key in keys if self._matched(key)]
        if self.config.ignore:
            keys = [key for key in keys if not self._ignored(key)]
        return self._form.own(keys)

    def split_key(self, key: bytes) -> tuple[str, ...] | Unfit:
        """Give the canonical texts of a key's columns, or why it is no key of this mapping."""
        fields = self._form.read(key)
        if isinstance(fields, Unfit):
            return fields
        texts = self._form.split(key)
        return texts if isinstance(texts, Unfit) else tuple(text.decode() for text in texts)

    def key_rows(self, keys: list[bytes]) -> tuple[bytes, int]:
        """COPY lines of the key columns of `keys`, without those that name no row; how many."""
        found = [self._form.read(key) for key in keys]
        lines = [b"\t".join(fields) + b"\n" for fields in found if not isinstance(fields, Unfit)]
        return b"".join(lines), len(lines)

    def print_key(self, texts: Sequence[str]) -> bytes:
        """Make the key (the field, with `member`) of these canonical texts of the key columns.

        `split_key(print_key(texts)) == texts` tells whether texts from outside are canonical.
        """
        return self._form.print(texts)

    def print_keys(self, columns: Sequence[Sequence[bytes]]) -> list[bytes]:
        """Make many keys, given the texts of each key column in UTF-8."""
        return self._form.print_all(columns)

    def key_of(self, texts: Sequence[str]) -> bytes:
        """Make the key that these texts from outside name; raises InvalidKey if there is none."""
        wanted = self.config.key_columns
        if len(texts) != len(wanted):
            raise InvalidKey(f"{len(texts)} key texts, but the key columns are {', '.join(wanted)}")
        key = self.print_key(texts)
        split = self.split_key(key)
        if isinstance(split, Unfit):
            raise InvalidKey(split.detail)
        if split != tuple(texts):
            raise InvalidKey("a key may split in one way only")
        return key

    def parse(self, batch: RawBatch) -> Batch:
        """Turn what was read into rows and rejects: with those vanished, as many as came in."""
        result = _Result()
        values = self._open(batch.values)
        text = self._join(batch.keys, values)
        at = row = 0
        while at < len(text):
            end = self._lines.end(text, at)
            if end > at:
                count = text.count(b"\n", at, end)
                result.add(*self._lines.strip(text[at:end]), count)
                at, row = end, row + count
            else:
                self._parse_row(batch.keys[row], batch.values[row], values[row], result)
                at, row = text.index(b"\n", at) + 1, row + 1
        return result.batch()

    def parse_exactly(self, batch: RawBatch) -> Batch:
        """Do the same row by row without the pattern, slowly: what `parse` is held to."""
        result = _Result()
        opened = self._open(batch.values)
        for key, value, texts in zip(batch.keys, batch.values, opened, strict=True):
            self._parse_row(key, value, texts, result)
        return result.batch()

    # --- from values to lines ---------------------------------------------------------------------

    def _open(self, values: list[RawValue]) -> Sequence[_Opened]:
        if self.config.type != "json":
            return values
        return [self._read_json(raw) if isinstance(raw, bytes) else raw for raw in values]

    def _read_json(self, raw: bytes) -> list[bytes | None] | Unfit:
        if len(raw) > VALUE_BYTES:
            return Unfit("value_too_large", f"{len(raw):,} bytes, the limit is {VALUE_BYTES:,}")
        try:
            pairs = self._decode(raw.decode())
        except UnicodeDecodeError as error:
            return Unfit("not_utf8", f"{show(raw)} isn't UTF-8 at byte {error.start:,}")
        except RecursionError:
            return Unfit("not_json", f"{show(raw)} is nested too deeply")
        except ValueError as error:
            return Unfit("not_json", f"{show(raw)} is no JSON: {error}")
        if not isinstance(pairs, tuple):
            return Unfit("not_json", f"{show(raw)} is no JSON object")
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            for field in self._fields:
                if names.count(field) > 1:
                    return Unfit("not_json", f"{field} is there twice")
        texts = list[bytes | None]()
        for column, field in zip(self._columns, self._fields, strict=True):
            text = found.get(field)
            if text is not None:
                text = _json_text(column, text)
                if isinstance(text, Unfit):
                    return text
            texts.append(text)
        return texts

    def _decode(self, text: str) -> object:
        if text[:1] != "{" or text[-1:] != "}":
            return self._json.decode(text)
        # The same without looking for blanks around it, a third faster.
        document, end = self._json.raw_decode(text)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
        return document

    def _join(self, keys: list[bytes], values: Sequence[_Opened]) -> bytes:
        """Make a line of each record; an empty one if it must be judged by itself."""
        try:
            if self._single:
                single = cast("list[bytes]", values)
                lines = list(map(b"\t".join, zip(keys, single, strict=True)))
            else:
                several = cast("list[list[bytes]]", values)
                lines = [b"\t".join([key, *one]) for key, one in zip(keys, several, strict=True)]
            nulls = 0
        except TypeError:
            # Something vanished, is NULL, of a wrong type or no document.
            lines = list(map(_line, keys, values))
            nulls = sum(value.count(None) for value in values if isinstance(value, list))
        text = b"\n".join([*lines, b""])
        if self._lines.is_clean(text, lines, nulls):
            return text
        for row, (line, value) in enumerate(zip(lines, values, strict=True)):
            nulls = value.count(None) if isinstance(value, list) else 0
            if line and not self._lines.is_clean(line + b"\n", [line], nulls):
                lines[row] = b""
        return b"\n".join([*lines, b""])

    # --- one record by itself ---------------------------------------------------------------------

    def _parse_row(self, key: bytes, raw: RawValue, value: _Opened, result: "_Result") -> None:
        if value is None:
            result.vanished += 1
            return
        fields = self._form.read(key)
        if isinstance(fields, Unfit):
            result.reject(key, _kept(raw), fields)
            return
        row = b"\t".join(fields)
        if isinstance(value, WrongType):
            held = Unfit("wrong_type", f"holds a {value.found}, not a {self._holder}")
            result.reject(key, None, held, row)
            return
        if isinstance(value, Unfit):
            result.reject(key, _kept(raw), value, row)
            return
        snapped = False
        texts = value if isinstance(value, list) else [value]
        for column, text in zip(self._columns, texts, strict=True):
            fit = self._fit(column, text)
            if isinstance(fit, Unfit):
                result.reject(key, raw if isinstance(raw, bytes) else text, fit, row)
                return
            fields.append(fit.copy)
            snapped = snapped or fit.snapped
        result.add(b"\t".join(fields) + b"\n", snapped, 1)

    def _fit(self, column: ValueColumn, text: bytes | None) -> Fit | Unfit:
        if text is not None:
            fit = column.parse(text)
            return Unfit(fit[0], f"{column.name}: {fit[1]}") if isinstance(fit, Unfit) else fit
        if column.name in self.nullable:
            return Fit(NULL)
        field = self.config.field_of[column.name]
        return Unfit("missing_field", f"{column.name}: no field {field}, and it can't be NULL")

    @property
    def _holder(self) -> str:
        return "hash" if self.config.type == "hash" else "string"


class _Result:
    """A batch under way."""

    def __init__(self) -> None:
        self.vanished = 0
        self._chunks = list[bytes]()
        self._count = 0
        self._snapped = 0
        self._rejects = list[Reject]()

    def add(self, rows: bytes, snapped: int, count: int) -> None:
        self._chunks.append(rows)
        self._snapped += snapped
        self._count += count

    def reject(self, key: bytes, value: bytes | None, why: Unfit, row: bytes | None = None) -> None:
        detail = why.detail
        if not detail.isprintable():
            detail = "".join(char if char.isprintable() else "?" for char in detail)
        if len(detail) > _DETAIL:
            detail = f"{detail[: _DETAIL - 3]}..."
        self._rejects.append(Reject(key, value, why.reason, detail, row))

    def batch(self) -> Batch:
        rows = b"".join(self._chunks)
        return Batch(rows, self._count, self._rejects, self.vanished, self._snapped)


def _line(key: bytes, value: _Opened) -> bytes:
    if isinstance(value, bytes):
        return key + b"\t" + value
    if isinstance(value, list):
        return b"\t".join([key, *(NULL if text is None else text for text in value)])
    return b""


def _kept(raw: RawValue) -> bytes | None:
    return raw if isinstance(raw, bytes) else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _json_text(column: ValueColumn, value: object) -> bytes | Unfit:
    """Give the text of a document's member as it would stand in a hash."""
    if isinstance(value, str) and not (column.is_text and isinstance(value, _Token)):
        try:
            return value.encode()
        except UnicodeEncodeError:
            return Unfit("not_utf8", f"{column.name}: a lone surrogate is no text")
    if column.is_boolean and isinstance(value, bool):
        return b"true" if value else b"false"
    return Unfit(column.refusal, f"{column.name}: {_json_kind(value)} is no {column.type.sql}")


def _json_kind(value: object) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, _Token):
        return "a number"
    return "an object" if isinstance(value, tuple) else "an array"
