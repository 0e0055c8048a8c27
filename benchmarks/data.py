"""The balances of the benchmark, made from their numbers, and how Redis is filled with them."""

import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast
from urllib.parse import urlsplit

import hiredis

STRIDE: Final = 10
BIG_KEY: Final = b"balances"
_CHUNK: Final = 1000
_CENTS: Final = 10**9

pack: Final = cast("Callable[[tuple[bytes, ...]], bytes]", hiredis.pack_command)


def cents(number: int, seed: int) -> int:
    """A balance in cents: looks random, and is another for every seed."""
    return (number * 2_654_435_761 + seed * 104_729) % _CENTS


def sql_cents(number: str, seed: int) -> str:
    """The SQL of `cents`, for a bigint expression."""
    return f"(({number}) * 2654435761 + {seed * 104_729}) % {_CENTS}"


def amount(number: int, seed: int) -> bytes:
    """`cents` as Redis holds it: 1234567.89."""
    found = cents(number, seed)
    return b"%d.%02d" % (found // 100, found % 100)


@dataclass(frozen=True)
class Dataset:
    """One kind of data: what fills Redis, and the mapping that balancesync reads it by."""

    name: str
    fill: Callable[[Sequence[int], int], bytes]
    mapping: dict[str, Any]
    match: str | None
    kind: str = "string"
    fields: tuple[str, ...] = ()
    member: str | None = None


def _strings(numbers: Sequence[int], seed: int) -> bytes:
    words = [b"MSET"]
    for number in numbers:
        words += (b"balance:%d" % number, amount(number, seed))
    return pack(tuple(words))


def _bare(numbers: Sequence[int], seed: int) -> bytes:
    words = [b"MSET"]
    for number in numbers:
        words += (b"%d" % (number * STRIDE), b"%d" % (cents(number, seed) * 10_000))
    return pack(tuple(words))


def _hashes(numbers: Sequence[int], seed: int) -> bytes:
    return b"".join(
        pack(
            (
                b"HSET",
                b"account:%d" % number,
                b"available",
                amount(number, seed),
                b"reserved",
                amount(number + 7, seed),
                b"points",
                b"%d" % cents(number, seed),
            )
        )
        for number in numbers
    )


def _big(numbers: Sequence[int], seed: int) -> bytes:
    words = [b"HSET", BIG_KEY]
    for number in numbers:
        words += (b"%d" % number, amount(number, seed))
    return pack(tuple(words))


STRINGS: Final = Dataset(
    "strings",
    _strings,
    {"name": "balances", "key": "balance:{user_id}", "table": "balances"},
    "balance:*",
)
HASHES: Final = Dataset(
    "hashes",
    _hashes,
    {
        "name": "accounts",
        "key": "account:{user_id}",
        "type": "hash",
        "table": "accounts",
        "columns": {
            "user_id": "bigint",
            "available": "numeric(20,2)",
            "reserved": "numeric(20,2)",
            "points": "bigint",
        },
    },
    "account:*",
    kind="hash",
    fields=("available", "reserved", "points"),
)
BIG: Final = Dataset(
    "big",
    _big,
    {
        "name": "members",
        "key": BIG_KEY.decode(),
        "type": "hash",
        "member": "{user_id}",
        "table": "members",
    },
    None,
    kind="hash",
    member=BIG_KEY.decode(),
)
BARE: Final = Dataset(
    "bare",
    _bare,
    {
        "name": "users",
        "key": "{telegram_id}",
        "table": "users",
        "mode": "update",
        "synced_at": "sync_at",
        "columns": {"telegram_id": "bigint", "balance": "bigint"},
    },
    None,
)


def fill(url: str, dataset: Dataset, numbers: range, seed: int) -> None:
    """Write the records of these numbers to Redis, whatever they were before."""

    def packed() -> Iterator[bytes]:
        for start in range(0, len(numbers), _CHUNK):
            yield dataset.fill(numbers[start : start + _CHUNK], seed)

    with _connected(url) as client:
        for piece in packed():
            # One reply a command: MSET and the big HSET have one for all, HSET one each.
            count = len(numbers) if dataset.kind == "hash" and dataset.member is None else 1
            _send(client, piece, min(count, _CHUNK))


def flush(url: str) -> None:
    """Empty Redis."""
    with _connected(url) as client:
        _send(client, pack((b"FLUSHALL",)), 1)


def _connected(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((str(parts.hostname), int(parts.port or 0)))


def _send(client: socket.socket, packed: bytes, replies: int) -> None:
    client.sendall(packed)
    reader = hiredis.Reader(notEnoughData=Ellipsis)
    while replies:
        reader.feed(client.recv(1 << 16))
        while (reply := reader.gets()) is not Ellipsis:
            if isinstance(reply, hiredis.ReplyError):
                raise reply
            replies -= 1
