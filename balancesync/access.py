"""Where a Redis server listens and how to connect to it, as redis.url says."""

import ssl
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from balancesync.errors import ConfigError
from balancesync.urls import redis_database

DEFAULT_PORT: Final = 6379


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens: host and port, or the path of a socket."""

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return self.path
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Access:
    """How to connect, wherever the server is."""

    timeout: float
    clustered: bool
    database: int
    username: str | None
    password: str | None = field(repr=False)
    tls: ssl.SSLContext | None


def parse(url: str, *, timeout: float, clustered: bool) -> tuple[Address, Access]:
    """Take a URL that `urls.check_redis_url` accepts apart; `timeout` in seconds.

    Raises ConfigError: an ssl_ option that isn't one, or names a file that can't be used.
    """
    parts = urlsplit(url)
    if parts.scheme == "unix":
        address = Address(path=unquote(parts.path))
    else:
        address = Address(unquote(parts.hostname or "localhost"), parts.port or DEFAULT_PORT)
    access = Access(
        timeout=timeout,
        clustered=clustered,
        database=redis_database(url),
        username=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
        tls=_tls_context(url) if parts.scheme == "rediss" else None,
    )
    return address, access


def _tls_context(url: str) -> ssl.SSLContext:
    # Here alone, and not with the imports above: redis-py takes 27 MB that most never need.
    from redis.asyncio.connection import SSLConnection, parse_url  # noqa: PLC0415
    from redis.exceptions import RedisError  # noqa: PLC0415

    try:
        options: dict[str, Any] = {
            name: value for name, value in parse_url(url).items() if name[:4] == "ssl_"
        }
        return SSLConnection(**options).ssl_context.get()
    except OSError as error:  # also an SSLError: no certificate in the file
        raise ConfigError(
            f"redis.url: the files of its ssl_ options can't be used: {error.strerror}"
        ) from None
    except (TypeError, ValueError, RedisError):
        raise ConfigError("redis.url: one of its ssl_ options isn't known, or its value") from None
