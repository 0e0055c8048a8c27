r"""What a row looks like in Redis: the way back from what `mapping` reads.

The texts of a row's columns come from PostgreSQL as bytes, each in the shortest exact form and
without an exponent (`100`, `1.5`), so that INCRBY works on them again.

    >>> config = MappingConfig(type="json", columns={"user_id": "bigint", "balance": "numeric"})
    >>> Rendering(config).values([[b"1.5", b"20"]])
    [b'{"balance":1.5}', b'{"balance":20}']
"""

import json
from collections.abc import Sequence
from typing import Final, cast

from balancesync.columns import ColumnType
from balancesync.config import MappingConfig
from balancesync.values import INTEGERS

Column = Sequence[bytes | None]
Value = bytes | list[bytes | None]

# Numbers and booleans stand in a document as they are printed.
_BARE: Final = (*INTEGERS, "numeric", "boolean")


class _Verbatim(str):
    """A number of a document, with the digits that it has there."""

    __slots__ = ()


class Rendering:
    """Makes the values of one mapping's records in Redis."""

    def __init__(self, config: MappingConfig) -> None:
        self._type = config.type if not config.member else "string"
        self._types = [config.types[column] for column in config.value_columns]
        self._fields = [config.field_of[column] for column in config.value_columns]
        self._names = [f"{_text(field)}:".encode() for field in self._fields]

    def values(self, columns: Sequence[Column]) -> list[Value]:
        """The values of many rows, given their value columns; None for NULL.

        A string's one column must not be NULL. What is NULL is left out of a hash or an object.
        """
        if self._type == "string":
            return cast("list[Value]", list(columns[0]))
        if self._type == "hash":
            return [list(row) for row in zip(*columns, strict=True)]
        members = [
            [None if text is None else name + _member(text, kind) for text in column]
            for name, kind, column in zip(self._names, self._types, columns, strict=True)
        ]
        return [
            b"{%b}" % b",".join([member for member in row if member is not None])
            for row in zip(*members, strict=True)
        ]

    def merged(self, document: bytes, wanted: bytes) -> bytes | None:
        """Put the members of an object that `values` made into the one that is there.

        All others stay as they are, each number with its digits; a mapped one that is a string
        there stays a string. None if `document` isn't an object, has a mapped member twice, so that
        nobody knows which one is meant, or holds what no UTF-8 can (a lone surrogate's escape).
        """
        try:
            there = _decode(document)
            if not isinstance(there, tuple):
                return None
            return self._merge(there, wanted).encode()
        except (ValueError, RecursionError):
            return None

    def _merge(self, there: tuple[tuple[str, object], ...], wanted: bytes) -> str:
        given = dict(cast("tuple[tuple[str, object], ...]", _decode(wanted)))
        names = [name for name, _ in there]
        if any(names.count(field) > 1 for field in self._fields):
            raise ValueError("a mapped member stands there twice")
        mapped = {field: given.get(field) for field in self._fields}
        made = []
        for name, old in there:
            new = mapped.pop(name) if name in mapped else old
            is_text = type(old) is str and isinstance(new, _Verbatim)
            made.append((name, str(new) if is_text else new))
        made += [(name, new) for name, new in mapped.items() if new is not None]
        return _encode(tuple(made))

    def is_whole(self, document: bytes) -> bool:
        """Whether an object, which the mapping has read already, has mapped members only."""
        there = cast("tuple[tuple[str, object], ...]", _decode(document))
        return {name for name, _ in there} <= {*self._fields}


def _member(text: bytes, kind: ColumnType) -> bytes:
    return text if kind.name in _BARE else _text(text.decode()).encode()


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _decode(document: bytes) -> object:
    """The document with objects as tuples of (name, value), arrays as lists."""
    return json.loads(
        document.decode(),
        object_pairs_hook=tuple,
        parse_int=_Verbatim,
        parse_float=_Verbatim,
        parse_constant=_Verbatim,
    )


def _encode(value: object) -> str:
    match value:
        case _Verbatim():
            return str(value)
        case tuple():
            return f"{{{','.join(f'{_text(name)}:{_encode(each)}' for name, each in value)}}}"
        case list():
            return f"[{','.join(map(_encode, value))}]"
    return json.dumps(value, ensure_ascii=False)
