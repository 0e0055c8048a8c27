"""Logs: structlog on stderr, one event a line, as JSON for machines or coloured for people.

Every log line of the process comes through here, also those of libraries that use `logging`. A
value can't forge a line or move a terminal's cursor, and the secrets of the configuration are
replaced by `***` wherever they turn up.
"""

import logging
import sys
from collections.abc import Iterator
from typing import Any, Final, cast
from urllib.parse import parse_qsl, unquote, urlsplit

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from balancesync.config import Config, LogConfig
from balancesync.dsn import read_postgres_dsn

HIDDEN: Final = "***"
# A shorter secret would tear holes into words that have nothing to do with it.
_SHORTEST_SECRET: Final = 4
_EXCEPTION: Final = "exception"


def configure(
    log: LogConfig,
    secrets: tuple[str, ...] = (),
    *,
    stream_is_tty: bool,
    untold: frozenset[str] = frozenset(),
) -> None:
    """Set up all logging of this process; may be called again.

    Args:
        log: level and format; `auto` is for people if `stream_is_tty`.
        secrets: what must never be written, see `secrets_of`.
        stream_is_tty: whether stderr, where the logs go, is a terminal.
        untold: events (`event`) and fields of events (`event.field`) that are left out, for whoever
            reads the log is told of them otherwise.
    """
    console = log.format == "console" or (log.format == "auto" and stream_is_tty)
    level = logging.getLevelNamesMapping()[log.level.upper()]
    render: list[Processor] = [structlog.processors.JSONRenderer(default=str)]
    if console:
        render = [_escape, structlog.dev.ConsoleRenderer(colors=stream_is_tty, pad_event_to=0)]
    structlog.configure(
        processors=[
            _dropper(untold),
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _hider(secrets),
            *render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=_Stderr,
        cache_logger_on_first_use=False,  # a logger made at import must follow a later configure
    )
    logging.basicConfig(handlers=[_Forward()], level=max(level, logging.WARNING), force=True)


def secrets_of(config: Config) -> tuple[str, ...]:
    """What of a configuration must never be shown: passwords, as written and decoded, and token."""
    found = {config.http.token.get_secret_value()}
    for url in (config.redis.url, config.postgres.dsn):
        text = url.get_secret_value()
        # By hand: a DSN of several hosts has no port that urlsplit could read.
        netloc, query = urlsplit(text).netloc, urlsplit(text).query
        user_info, at, _ = netloc.rpartition("@")
        if at:
            found.add(user_info.partition(":")[2])
        found.update(value for name, value in parse_qsl(query) if "password" in name)
    # One may stand in a service file.
    found.add(read_postgres_dsn(config.postgres.dsn.get_secret_value()).password or "")
    decoded = {unquote(secret) for secret in found}
    return tuple(
        sorted((s for s in found | decoded if len(s) >= _SHORTEST_SECRET), key=len, reverse=True)
    )


def hide(text: str, secrets: tuple[str, ...]) -> str:
    """Replace every secret in a text.

    >>> hide("can't log in with p4ssword", ("p4ssword",))
    "can't log in with ***"
    """
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return text


def printable(text: str) -> str:
    r"""Escape what would not stand on one line: control characters, line separators, surrogates.

    >>> print(printable("a\nb\x1b[2J"))
    a\nb\x1b[2J
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def _dropper(untold: frozenset[str]) -> Processor:
    def process(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        name = event["event"]
        if name in untold:
            raise structlog.DropEvent
        return {field: event[field] for field in event if f"{name}.{field}" not in untold}

    return process


def _hider(secrets: tuple[str, ...]) -> Processor:
    def plain(value: Any) -> Any:
        match value:
            case str():
                return hide(value, secrets)
            case list() | tuple():
                return [plain(each) for each in value]
            case dict():
                return {str(name): plain(each) for name, each in value.items()}
            case int() | float() | None:
                return value
        return hide(str(value), secrets)

    def process(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        return {name: plain(value) for name, value in event.items()}

    return process


def _escape(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    # JSON escapes by itself, and so does the repr() of what is no text. A traceback is lines by
    # nature.
    return {
        name: printable(value) if isinstance(value, str) and name != _EXCEPTION else value
        for name, value in event.items()
    }


class _Stderr:
    """Writes to whatever stderr is at the moment: a progress bar puts itself in its place."""

    def __init__(self, *_name: object) -> None:
        """Is handed the name of a logger."""

    def msg(self, line: str) -> None:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    log = debug = info = warning = error = critical = exception = fatal = warn = msg


class _Forward(logging.Handler):
    """Hands what libraries log over to structlog."""

    def emit(self, record: logging.LogRecord) -> None:
        logger = cast("structlog.typing.FilteringBoundLogger", structlog.get_logger())
        known = dict(_known(record))
        logger.log(record.levelno, record.getMessage(), **known)


def _known(record: logging.LogRecord) -> Iterator[tuple[str, Any]]:
    yield "logger", record.name
    if record.exc_info:
        yield "exc_info", record.exc_info
