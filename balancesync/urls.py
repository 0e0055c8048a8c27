"""Addresses of servers, judged before a driver takes them in silence for something else.

Each function raises ValueError with one line that never repeats a part of the URL, since in a
malformed one any part may be the password.
"""

import re
from typing import Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

_ENCODED: Final = (
    "a user name or password with @ / ? # [ ] or % in it must be percent-encoded"
    " (%40 %2F %3F %23 %5B %5D %25)"
)
_ADDRESS: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:@/]*)(?::([0-9]{1,5}))?")


def check_redis_url(url: str) -> None:
    """Accept redis://, rediss:// and unix:// with a database's number and, for TLS, ssl_ options.

    >>> check_redis_url("rediss://:secret@redis.example:6380/1?ssl_ca_certs=/etc/ca.pem")
    """
    parts = split_url(url, ("redis://", "rediss://", "unix://"))
    # redis-py passes any option on to itself, also those that change what its replies look like.
    for option, _ in parse_qsl(parts.query, keep_blank_values=True):
        if option != "db" and not (parts.scheme == "rediss" and option.startswith("ssl_")):
            raise ValueError(
                "takes no option but db, and with rediss:// those that begin with ssl_"
            )
    if parts.scheme != "unix":
        split_address(parts.netloc.rpartition("@")[2])
    elif not parts.path:
        raise ValueError("names no socket; write it as unix:///run/redis.sock?db=0")
    redis_database(url)


def redis_database(url: str) -> int:
    """The number of the database that a Redis URL names: its path, or `?db=`; 0 without either.

    >>> redis_database("unix:///run/redis.sock?db=3")
    3
    """
    parts = urlsplit(url)
    path = "" if parts.scheme == "unix" else parts.path.strip("/")
    number = dict(parse_qsl(parts.query, keep_blank_values=True)).get("db", path or "0")
    # redis-py takes what is no number for 0.
    if not re.fullmatch("[0-9]{1,9}", number):
        raise ValueError("must end in the number of a database, such as /0")
    return int(number)


def split_address(text: str) -> tuple[str, int | None]:
    """Split `host[:port]`, the host perhaps an IPv6 address in brackets.

    >>> split_address("[::1]:26379")
    ('::1', 26379)
    """
    match = _ADDRESS.fullmatch(text)
    if match is None or not 1 <= int(match[2] or 1) <= 65_535:
        raise ValueError("must give a server as host:port, with a port from 1 to 65535")
    return match[1].strip("[]"), int(match[2]) if match[2] else None


def check_server(text: str) -> None:
    """Accept `host:port`, nothing left out."""
    host, port = split_address(text)
    if not host or port is None:
        raise ValueError("must give a server as host:port, with a port from 1 to 65535")


def split_url(url: str, schemes: tuple[str, ...]) -> SplitResult:
    """Split a URL into its parts; what must be percent-encoded in it has to be."""
    if not url.startswith(schemes):
        raise ValueError(f"must be a URL that begins with {' or '.join(schemes)}")
    if re.search(r"[\s\0-\x1f\x7f]", url):
        raise ValueError("holds a blank or a control character; write it percent-encoded")
    try:
        parts = urlsplit(url)
        # A lone % that happens to stand before two hex digits shows as bytes that aren't UTF-8.
        unquote(url, errors="strict")
    except ValueError:
        raise ValueError(_ENCODED) from None
    # A raw / ? or # ends the host's part early, and leaves its @ behind.
    ends_early = parts.scheme != "unix" and (
        "@" in parts.path or ("@" in parts.query and "@" not in parts.netloc)
    )
    if (
        ends_early
        or parts.netloc.count("@") > 1
        or "#" in url
        or re.search("%(?![0-9A-Fa-f]{2})", url)
    ):
        raise ValueError(_ENCODED)
    return parts
