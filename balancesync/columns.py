"""The small texts of a mapping, read once: column types, key templates, table names.

Each `parse` raises ValueError with one line that says what is wrong and what to write instead.
"""

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Final

# PostgreSQL cuts longer identifiers in silence (NAMEDATALEN - 1), so two names could become one.
IDENTIFIER_BYTES: Final = 63

_SUPPORTED: Final = (
    "smallint, integer, bigint, numeric, numeric(p,s), text, varchar(n), uuid, boolean, timestamptz"
)
_NAMES: Final = {
    "smallint": "smallint",
    "int2": "smallint",
    "integer": "integer",
    "int": "integer",
    "int4": "integer",
    "bigint": "bigint",
    "int8": "bigint",
    "numeric": "numeric",
    "decimal": "numeric",
    "dec": "numeric",
    "text": "text",
    "varchar": "varchar",
    "character varying": "varchar",
    "uuid": "uuid",
    "boolean": "boolean",
    "bool": "boolean",
    "timestamptz": "timestamptz",
    "timestamp with time zone": "timestamptz",
}
_BINARY_FLOAT: Final = "is a binary fraction and can't hold a balance exactly; use numeric(p,s)"
_REFUSED: Final = {
    "float": _BINARY_FLOAT,
    "float4": _BINARY_FLOAT,
    "float8": _BINARY_FLOAT,
    "real": _BINARY_FLOAT,
    "double": _BINARY_FLOAT,
    "double precision": _BINARY_FLOAT,
    "money": "is rounded and printed by the server's locale; use numeric(p,s)",
    "timestamp": "has no time zone; use timestamptz",
    "timestamp without time zone": "has no time zone; use timestamptz",
    "serial": "fills itself in; use integer",
    "bigserial": "fills itself in; use bigint",
}
# What format_type() prints, where it isn't the normalised name itself.
_FORMATTED: Final = {"varchar": "character varying", "timestamptz": "timestamp with time zone"}
_TYPE: Final = re.compile(r"([a-z][a-z0-9 ]*?) ?(?:\( ?([0-9]{1,9}) ?(?:, ?(-?[0-9]{1,9}) ?)?\))?")

# A placeholder's name is whatever stands between two braces: a column may be called anything else.
_TOKEN: Final = re.compile(r"(?P<brace>[{}])(?P=brace)|\{(?P<name>[^{}]+)\}|[{}]|[^{}]+")


@dataclass(frozen=True, slots=True)
class ColumnType:
    """A column's type. `precision` and `scale` are numeric(p,s)'s, `length` is varchar(n)'s."""

    name: str
    precision: int | None = None
    scale: int | None = None
    length: int | None = None

    @classmethod
    def parse(cls, text: str) -> "ColumnType":
        """Read a declaration in any of PostgreSQL's spellings.

        >>> ColumnType.parse("DECIMAL (20, 2)").sql
        'numeric(20,2)'
        >>> ColumnType.parse("varchar(10)").sql
        'character varying(10)'
        """
        match = _TYPE.fullmatch(" ".join(text.lower().split()))
        word = match[1] if match else ""
        if word in _REFUSED:
            raise ValueError(f"{word} {_REFUSED[word]}")
        if match is None or word not in _NAMES:
            raise ValueError(f'"{text[:40]}" is no supported column type; use one of {_SUPPORTED}')
        name = _NAMES[word]
        first, second = (int(part) if part else None for part in match.groups()[1:])
        if name == "numeric":
            return cls._numeric(first, second)
        if name == "varchar":
            if second is not None or not 1 <= (1 if first is None else first) <= 10_485_760:
                raise ValueError("the length of a varchar is 1 to 10485760")
            return cls(name, length=first)
        if first is not None:
            raise ValueError(f"{name} is written without parentheses")
        return cls(name)

    @classmethod
    def _numeric(cls, precision: int | None, scale: int | None) -> "ColumnType":
        if precision is None:
            return cls("numeric")
        scale = scale or 0
        if not 1 <= precision <= 1000:
            raise ValueError("the precision of a numeric is 1 to 1000")
        # PostgreSQL 15 allows more; such a column rounds whole digits away or holds none at all.
        if not 0 <= scale <= precision:
            raise ValueError("the scale of a numeric is 0 to its precision")
        return cls("numeric", precision=precision, scale=scale)

    @property
    def sql(self) -> str:
        """The declaration as PostgreSQL's format_type() prints it."""
        name = _FORMATTED.get(self.name, self.name)
        if self.precision is not None:
            return f"{name}({self.precision},{self.scale})"
        return name if self.length is None else f"{name}({self.length})"

    @property
    def step(self) -> Decimal | None:
        """The distance between two neighbouring values; None where there is no such thing."""
        if self.name in ("smallint", "integer", "bigint"):
            return Decimal(1)
        return None if self.scale is None else Decimal(1).scaleb(-self.scale)


@dataclass(frozen=True, slots=True)
class Template:
    """A key's form: literals[0], names[0], literals[1], ... names[-1], literals[-1]."""

    literals: tuple[str, ...]
    names: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Template":
        """Read `balance:{user_id}`; `{{` and `}}` stand for the braces themselves.

        >>> Template.parse("balance:{user_id}:{currency}")
        Template(literals=('balance:', ':', ''), names=('user_id', 'currency'))
        >>> Template.parse("{{app}}:{id}").literals
        ('{app}:', '')
        """
        check_utf8(text)
        literals, names = [""], list[str]()
        for token in _TOKEN.finditer(text):
            if token["name"]:
                names.append(token["name"])
                literals.append("")
            elif token[0] in ("{", "}"):
                raise ValueError('has a single "{" or "}"; a brace of the key itself is doubled')
            else:
                literals[-1] += token["brace"] or token[0]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"names {{{name}}} twice")
        if "" in literals[1:-1]:
            raise ValueError("has two placeholders side by side; put a separator between them")
        return cls(tuple(literals), tuple(names))


_TABLE_PART: Final = r'("(?:[^"]|"")+"|[^".\s]+)'
_TABLE: Final = re.compile(rf"(?:{_TABLE_PART}\.)?{_TABLE_PART}")


def parse_table(text: str) -> tuple[str | None, str]:
    """Split `[schema.]table`. Names are taken as written, without folding to lower case.

    >>> parse_table("app.users")
    ('app', 'users')
    >>> parse_table('"odd.""name"')
    (None, 'odd."name')
    """
    match = _TABLE.fullmatch(text)
    if match is None:
        raise ValueError(
            "must be [schema.]table; a name with a blank, a dot or a quote goes in double quotes"
        )
    schema, table = (
        part[1:-1].replace('""', '"') if part and part.startswith('"') else part
        for part in match.groups()
    )
    for name in (schema, table):
        if name is not None:
            check_identifier(name)
    return schema, table


def check_identifier(name: str) -> None:
    """Raise ValueError unless PostgreSQL can hold this name of a schema, table or column whole."""
    check_utf8(name)
    if not name or "\0" in name:
        raise ValueError("must be a name, not empty and without a NUL")
    if len(name.encode()) > IDENTIFIER_BYTES:
        raise ValueError(f"is longer than the {IDENTIFIER_BYTES} bytes that PostgreSQL keeps")


def check_name(text: str) -> None:
    """Raise ValueError unless this may be the name of a mapping or a job."""
    # Names become labels of metrics, fields of logs and segments of URLs.
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,63}", text):
        raise ValueError("must be 1 to 63 letters, digits, or any of . _ -")


def check_filled(text: str) -> None:
    """Raise ValueError for an empty text, or one that isn't UTF-8."""
    check_utf8(text)
    if not text:
        raise ValueError("must not be empty")


def check_utf8(text: str) -> None:
    """Raise ValueError for lone surrogates, which JSON and the environment can bring in."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("isn't valid UTF-8") from None
