"""Everything that balancesync raises on purpose, and the exit code that each ends a command with.

    BalanceSyncError                 1
    ├── ConfigError                  2
    ├── TargetMismatch               2
    ├── RightMissing                 2
    ├── SchemaMissing                2
    ├── SchemaTooNew                 2
    ├── Refused                      3
    ├── LockHeld                    75
    ├── Transient                    1   a later attempt may succeed
    │   ├── SourceChanged            1
    │   │   └── Shrunk               1
    │   ├── Gap                      1
    │   ├── Locked                   1
    │   └── Unavailable             75
    │       ├── RedisUnavailable    75
    │       ├── PostgresUnavailable 75
    │       └── DaemonUnavailable   75
    ├── RunFailed                    1
    │   ├── MappingFailed            1
    │   ├── Cancelled                1
    │   └── Interrupted              1
    ├── HistoryGap                   1
    └── EmbeddedError                1

An exception raised without a message says the first paragraph of its class's docstring. A message
is one line, names the thing, the cause and the way out, and holds no DSN, password or token.
"""

import inspect
import os
import socket
import ssl
from collections.abc import Sequence
from typing import ClassVar


class BalanceSyncError(Exception):
    """balancesync can't go on."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or _summary(type(self)))


class ConfigError(BalanceSyncError):
    """The configuration isn't valid."""

    exit_code = 2

    def __init__(self, message: str | None = None, lines: Sequence[str] = ()) -> None:
        """`lines` are all that is wrong, where more than the message tells was found at once."""
        super().__init__(message)
        self.lines = tuple(lines) or (str(self),)


class TargetMismatch(BalanceSyncError):
    """A table in PostgreSQL doesn't fit its mapping; `balancesync check` names what differs."""

    exit_code = 2


class RightMissing(BalanceSyncError):
    """A server denies balancesync a right it needs; docs/security.md lists them."""

    exit_code = 2


class SchemaMissing(BalanceSyncError):
    """PostgreSQL has no balancesync schema, or an older one; run `balancesync init`."""

    exit_code = 2


class SchemaTooNew(BalanceSyncError):
    """The schema in PostgreSQL was made by a newer balancesync; upgrade this program."""

    exit_code = 2


class Refused(BalanceSyncError):
    """The guard refused to apply: Redis seems to have lost balances; see `balancesync status`."""

    exit_code = 3


class LockHeld(BalanceSyncError):
    """Another balancesync is writing to this database; try again later or raise `--wait`."""

    exit_code = 75


class Transient(BalanceSyncError):
    """Something passing got in the way; the same run may succeed if started again."""


class SourceChanged(Transient):
    """Redis restarted or changed its role or database in mid-run, so what was read is no whole."""


class Shrunk(SourceChanged):
    """Redis lost so many keys while it was read that what was read is none to judge by."""


class Gap(Transient):
    """A change in Redis may have been missed by live mode; a full run makes up for it."""


class Locked(Transient):
    """Another session locks a table or rows for longer than `postgres.lock_timeout`."""


class Unavailable(Transient):
    """A server can't be reached, is starting, or is read-only for now."""

    exit_code = 75


class RedisUnavailable(Unavailable):
    """Redis can't be reached, is loading its data, or isn't a primary."""


class PostgresUnavailable(Unavailable):
    """PostgreSQL can't be reached, is in recovery, or is read-only."""


class DaemonUnavailable(Unavailable):
    """No daemon answers; is `balancesync run` up, and http.host and http.port the same?"""

    def __init__(self, what: str | None = None, way_out: str | None = None) -> None:
        """`what` is the message without the way out."""
        super().__init__(f"{what}; {way_out}" if way_out else what)
        self.what = what or str(self)


class RunFailed(BalanceSyncError):
    """The run failed; `balancesync runs` says why."""


class MappingFailed(RunFailed):
    """One mapping can't be read as a whole; the others go on."""


class Cancelled(RunFailed):
    """The run was cancelled."""


class Interrupted(RunFailed):
    """The run was interrupted: balancesync is stopping."""


class HistoryGap(BalanceSyncError):
    """The history doesn't reach back to that time; see docs/history.md."""


class EmbeddedError(BalanceSyncError):
    """No private Redis or PostgreSQL server could be started."""


def why_unreachable(error: OSError) -> str:
    """Why a server can't be reached, in words: what the system's error says without its number.

    >>> why_unreachable(ConnectionRefusedError(111, "Connect call failed ('127.0.0.1', 1)"))
    'connection refused'
    """
    if isinstance(error, socket.gaierror):
        return "no such host"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate isn't accepted: {error.verify_message or 'it does not verify'}"
    if isinstance(error, ssl.SSLError):
        return "it speaks no TLS that we accept"
    if error.errno:
        return os.strerror(error.errno).lower()
    said = str(error)
    # A host of several addresses raises one error without a number for all of them.
    if said.startswith("Multiple exceptions"):
        return "none of its addresses answers"
    return said or "the connection was lost"


def _summary(cls: type[BalanceSyncError]) -> str:
    # `python -OO` strips docstrings: the class's name is then all there is to say.
    doc = inspect.cleandoc(cls.__doc__) if cls.__doc__ else cls.__name__
    return " ".join(doc.split("\n\n", 1)[0].split())
