"""The DSN of PostgreSQL, read as libpq reads it, for a driver that reads it otherwise.

asyncpg takes the first of two values for one thing where libpq takes the last, a `?port=` too late,
a `+` for a blank, and a service that isn't there for none. So all is read here, and the driver gets
each value by its name.
https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING-URIS

Each function raises ValueError with one line that never repeats a part of the DSN, as in `urls`.
"""

import configparser
import difflib
import os
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, unquote, urlencode

from balancesync.urls import split_address, split_url

_PORT: Final = 5432
_TLS: Final = "TLSv1|TLSv1\\.1|TLSv1\\.2|TLSv1\\.3"
# What the driver takes for itself, with the values that it knows.
# asyncpg/connect_utils.py, `_parse_connect_dsn_and_args`
_OF_DRIVER: Final = {
    **dict.fromkeys(("passfile", "sslcert", "sslkey", "sslrootcert", "sslcrl"), ".*"),
    **dict.fromkeys(("sslpassword", "krbsrvname"), ".*"),
    "sslmode": "disable|allow|prefer|require|verify-ca|verify-full",
    "sslnegotiation": "postgres|direct",
    "ssl_min_protocol_version": _TLS,
    "ssl_max_protocol_version": _TLS,
    "target_session_attrs": "any|primary|standby|read-write|read-only|prefer-standby",
    "gsslib": "gssapi|sspi",
}
# What is read here. `database` is the driver's own name for dbname.
_READ: Final = {
    **dict.fromkeys(("host", "dbname", "database", "user", "password", "service", "options"), ".*"),
    "port": "([0-9]{1,5})?(,([0-9]{1,5})?)*",
}
_KNOWN: Final = _OF_DRIVER | _READ
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
        "balancesync sets what it needs",
    ),
    "connect_timeout": "postgres.timeout is for that",
    "fallback_application_name": "application_name is for that",
    "hostaddr": "put the address where the host stands",
}
_UTF8: Final = ("utf8", "unicode")


@dataclass(frozen=True, slots=True)
class PostgresDsn:
    """What a DSN says. What is empty or None in it, the environment (PGHOST, ...) may say.

    `ports` are one for all hosts or one for each. `driver` are the options that asyncpg takes,
    `settings` those of the server, which every session is given.
    """

    hosts: tuple[str, ...]
    ports: tuple[int, ...]
    user: str | None
    password: str | None
    database: str | None
    driver: Mapping[str, str]
    settings: Mapping[str, str]

    @property
    def arguments(self) -> dict[str, Any]:
        """Where and how asyncpg is to connect, by the names of its arguments."""
        each = self.ports if len(self.ports) > 1 else self.ports * len(self.hosts)
        return {
            "dsn": f"postgresql://?{urlencode(self.driver, quote_via=quote)}",
            "host": list(self.hosts) or None,
            "port": list(each) or (self.ports[0] if self.ports else None),
            "user": self.user,
            "password": self.password,
            "database": self.database,
        }

    @property
    def address(self) -> str:
        """`host:port/database`, without user or password, for messages."""
        ports = self.ports if len(self.ports) > 1 else self.ports * max(len(self.hosts), 1)
        hosts = [f"[{host}]" if ":" in host else host for host in self.hosts or ("",)]
        if ports:
            hosts = [f"{host}:{port}" for host, port in zip(hosts, ports, strict=True)]
        return ",".join(hosts) + (f"/{self.database}" if self.database else "")


def read_postgres_dsn(dsn: str) -> PostgresDsn:
    """Read postgresql:// and postgres://, also with several hosts.

    An option says more than what stands before the question mark, and both more than a service.

    >>> read_postgres_dsn("postgresql://app@pg1,pg2:5433/shop?dbname=test").address
    'pg1:5432,pg2:5433/test'
    """
    parts = split_url(dsn, ("postgresql://", "postgres://"))
    credentials, _, hosts = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    split = [split_address(text) for text in hosts.split(",")]
    before = {
        "user": unquote(user),
        "password": unquote(password),
        "host": ",".join(unquote(host) for host, _ in split),
        "port": ",".join(str(port or "") for _, port in split),
        "dbname": unquote(parts.path[1:]),
    }
    options = _options(parts.query)
    said = {name: value for name, value in (before | options).items() if value.strip(",")}
    if "service" in said:
        said = _service(said.pop("service")) | said
    _check_files(said)
    hosts_read, ports = _places(said.pop("host", ""), said.pop("port", ""))
    return PostgresDsn(
        hosts=hosts_read,
        ports=ports,
        user=said.pop("user", None),
        password=said.pop("password", None),
        database=said.pop("dbname", None),
        driver={name: said.pop(name) for name in _OF_DRIVER if name in said},
        settings=_settings(said),
    )


def postgres_place(dsn: str) -> str:
    """`host:port/database` that a DSN leads to, written in one way however it is named there.

    >>> postgres_place("postgresql://app:secret@127.0.0.1/shop")
    'localhost:5432/shop'
    """
    read = read_postgres_dsn(dsn)
    ports = read.ports or (_PORT,)
    hosts = read.hosts or ("",)
    ports = ports if len(ports) > 1 else ports * len(hosts)
    places = set()
    for host, port in zip(map(str.lower, hosts), ports, strict=True):
        # A socket is a folder of this machine's.
        local = host in ("", "localhost", "::1") or host.startswith(("127.", "/"))
        places.add(f"{'localhost' if local else host}:{port}")
    return f"{','.join(sorted(places))}/{read.database or read.user or ''}"


def _options(query: str) -> dict[str, str]:
    pairs = [field.partition("=") for field in query.split("&") if query]
    if any(not equals for _, equals, _ in pairs):
        raise ValueError("has an option without a value; write it as ?name=value&name=value")
    return _checked({unquote(name): unquote(value) for name, _, value in pairs})


def _checked(options: dict[str, str]) -> dict[str, str]:
    for name, value in options.items():
        _check_option(name, value)
    if "database" in options:
        options["dbname"] = options.pop("database")
    # As libpq takes it, for the sake of URLs that were made for JDBC.
    if "ssl" in options:
        if options.pop("ssl") != "true":
            raise ValueError("can't have the option ssl, which must go: sslmode is for that")
        options.setdefault("sslmode", "require")
    return options


def _check_option(name: str, value: str) -> None:
    # An unknown name may be a part of a password: only those that are known here are repeated.
    if name in _OF_LIBPQ:
        raise ValueError(f"can't have the option {name}, which must go: {_OF_LIBPQ[name]}")
    known = _KNOWN.get(name)
    if known is None:
        close = difflib.get_close_matches(name, _KNOWN, n=1, cutoff=0.85)
        if close:
            raise ValueError(f"has an option that is none; did you mean {close[0]}?")
    elif value and not re.fullmatch(known, value):
        choice = known.replace("\\", "").replace("|", ", ")
        what = "a port" if name == "port" else f"one of {choice}"
        raise ValueError(f"must have {what} as its option {name}")


def _places(hosts: str, ports: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    names = tuple(hosts.split(",")) if hosts else ()
    numbers = tuple(int(port or _PORT) for port in ports.split(",")) if ports else ()
    if not all(1 <= number <= 65_535 for number in numbers):
        raise ValueError("must have a port as its option port")
    if len(numbers) > 1 and len(numbers) != len(names):
        raise ValueError("must give one port for all hosts, or one for each")
    if any(re.fullmatch(r"[^:/]+:[0-9]*", name) for name in names):
        raise ValueError("must give the port as its option port, not behind the option host")
    return tuple(name.strip("[]") for name in names), numbers


def _settings(said: Mapping[str, str]) -> dict[str, str]:
    settings = {name: value for name, value in said.items() if name != "options"}
    settings |= _switches(said.get("options", ""))
    settings = {name.lower(): value for name, value in settings.items()}
    encoding = re.sub("[^a-z0-9]", "", settings.pop("client_encoding", "utf8").lower())
    if encoding not in _UTF8:
        raise ValueError("must have UTF8 as client_encoding, if any: all text is sent in it")
    if "session_replication_role" in settings:
        raise ValueError("can't have session_replication_role: tables would check nothing")
    return settings


def _switches(text: str) -> dict[str, str]:
    """The settings in `options`, the command line of a server's process: -c name=value ...

    A backslash takes away what the blank or backslash behind it means.
    """
    words = re.findall(r"(?:\\.|[^\s\\])+", text, re.DOTALL)
    words = [re.sub(r"\\(.)", r"\1", word, flags=re.DOTALL) for word in words]
    settings = {}
    while words:
        word = words.pop(0)
        if word == "-c" and words:
            word = words.pop(0)
        elif word.startswith(("-c", "--")):
            word = word[2:]
        else:
            word = ""
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError("can have nothing but settings as its option options: -c name=value")
        settings[name.replace("-", "_")] = value
    return settings


def _service(name: str) -> dict[str, str]:
    """What a service file says: https://www.postgresql.org/docs/current/libpq-pgservice.html"""
    own = os.environ.get("PGSERVICEFILE") or "~/.pg_service.conf"
    files = [Path(own), Path(os.environ.get("PGSYSCONFDIR") or "/etc", "pg_service.conf")]
    for file in files:
        read = configparser.ConfigParser(
            interpolation=None, strict=False, delimiters=("=",), comment_prefixes=("#",)
        )
        try:
            read.read_string(file.expanduser().read_text())
        except FileNotFoundError:
            continue
        except (OSError, RuntimeError, UnicodeDecodeError, configparser.Error) as error:
            why = error.strerror if isinstance(error, OSError) else "it isn't a service file"
            raise ValueError(f"names a service, but {file} can't be read: {why}") from None
        if name in read:
            if "service" in read[name]:
                raise ValueError(f"names a service that names another one in {file}")
            return {option: value for option, value in _checked(dict(read[name])).items() if value}
    raise ValueError(f"names a service that none of {', '.join(map(str, files))} has")


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
