"""Addresses of servers, judged before a driver takes them in silence for something else.

Each function raises ValueError with one line that never repeats a part of the URL, since in a
malformed one any part may be the password.
"""

import difflib
import re
import ssl
from collections.abc import Mapping
from typing import Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

_ENCODED: Final = (
    "a user name or password with @ / ? # [ ] or % in it must be percent-encoded"
    " (%40 %2F %3F %23 %5B %5D %25)"
)
# What the driver takes for itself, with the values that it knows; whatever else stands in a DSN it
# sends to the server as a setting. asyncpg/connect_utils.py, `_parse_connect_dsn_and_args`
_TLS: Final = "TLSv1|TLSv1\\.1|TLSv1\\.2|TLSv1\\.3"
_POSTGRES_OPTIONS: Final = {
    **dict.fromkeys(("host", "dbname", "database", "user", "password", "passfile"), ".*"),
    **dict.fromkeys(("service", "sslcert", "sslkey", "sslrootcert", "sslcrl", "sslpassword"), ".*"),
    "krbsrvname": ".*",
    "port": "[0-9]{1,5}(,[0-9]{1,5})*",
    "sslmode": "disable|allow|prefer|require|verify-ca|verify-full",
    "sslnegotiation": "postgres|direct",
    "ssl_min_protocol_version": _TLS,
    "ssl_max_protocol_version": _TLS,
    "target_session_attrs": "any|primary|standby|read-write|read-only|prefer-standby",
    "gsslib": "gssapi|sspi",
}
# What libpq takes for itself and the driver doesn't know.
# https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS
_OF_LIBPQ: Final = {
    **dict.fromkeys(
        (
            *("authtype", "channel_binding", "gssdelegation", "gssencmode", "load_balance_hosts"),
            *("max_protocol_version", "min_protocol_version", "replication", "require_auth"),
            *("requirepeer", "requiressl", "scram_client_key", "scram_server_key", "servicefile"),
            *("sslcertmode", "sslcompression", "sslcrldir", "sslkeylogfile", "sslsni", "tty"),
        ),
        "the driver has none",
    ),
    **dict.fromkeys(
        ("keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count"),
        "balancesync sets what it needs by itself",
    ),
    "connect_timeout": "postgres.timeout is for that",
    "fallback_application_name": "application_name is for that",
    "hostaddr": "put the address where the host stands",
}
_ADDRESS: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:@/]*)(?::([0-9]{1,5}))?")


def check_redis_url(url: str) -> None:
    """Accept redis://, rediss:// and unix:// with a database's number and, for TLS, ssl_ options.

    >>> check_redis_url("rediss://:secret@redis.example:6380/1?ssl_ca_certs=/etc/ca.pem")
    """
    parts = _split(url, ("redis://", "rediss://", "unix://"))
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


def check_postgres_dsn(dsn: str) -> None:
    """Accept postgresql:// and postgres://, also with several hosts.

    >>> check_postgres_dsn("postgresql://app:p%40ss@pg1,pg2:5433/shop?sslmode=verify-full")
    """
    parts = _split(dsn, ("postgresql://", "postgres://"))
    for address in parts.netloc.rpartition("@")[2].split(","):
        split_address(address)
    if any("=" not in field for field in parts.query.split("&") if parts.query):
        raise ValueError("has an option without a value; write it as ?name=value&name=value")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    for name, value in options.items():
        _check_option(name, value)
    _check_files(options)
    postgres_place(dsn)


def postgres_place(dsn: str) -> str:
    """`host:port/database` that a DSN leads to, written in one way however it is named there.

    >>> postgres_place("postgresql://app:secret@127.0.0.1/shop")
    'localhost:5432/shop'
    """
    parts = urlsplit(dsn)
    options = dict(parse_qsl(parts.query))
    user, _, hosts = parts.netloc.rpartition("@")
    places = set()
    for text in unquote(hosts or options.get("host", "")).lower().split(","):
        # A socket is a folder of this machine's.
        host, port = ("", None) if text.startswith("/") else split_address(text)
        local = host in ("", "localhost", "::1") or host.startswith("127.")
        places.add(f"{'localhost' if local else host}:{port or options.get('port', 5432)}")
    named = parts.path[1:] or options.get("dbname") or options.get("database")
    database = named or user.partition(":")[0] or options.get("user", "")
    return f"{','.join(sorted(places))}/{unquote(database)}"


def _check_option(name: str, value: str) -> None:
    # An unknown name may be a part of a password: only those that are known here are repeated.
    if name in _OF_LIBPQ:
        raise ValueError(f"can't have the option {name}, which must go: {_OF_LIBPQ[name]}")
    known = _POSTGRES_OPTIONS.get(name)
    if known is None:
        close = difflib.get_close_matches(name, _POSTGRES_OPTIONS, n=1, cutoff=0.85)
        if close:
            raise ValueError(f"has an option that is none; did you mean {close[0]}?")
    elif not re.fullmatch(known, value):
        choice = known.replace("\\", "").replace("|", ", ")
        what = "a port" if name == "port" else f"one of {choice}"
        raise ValueError(f"must have {what} as its option {name}")


def _check_files(options: Mapping[str, str]) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    names = ""
    try:
        for names in ("sslrootcert", "sslcrl"):
            if options.get(names):
                context.load_verify_locations(cafile=options[names])
        names = "sslcert"
        if options.get(names):
            names += " or sslkey" if options.get("sslkey") else ""
            password = options.get("sslpassword", "")
            context.load_cert_chain(options["sslcert"], options.get("sslkey"), lambda: password)
    except OSError as error:
        why = "it isn't in PEM" if isinstance(error, ssl.SSLError) else error.strerror
        raise ValueError(f"names a file that can't be used as {names}: {why}") from None


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


def _split(url: str, schemes: tuple[str, ...]) -> SplitResult:
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
