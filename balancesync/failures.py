"""What an error of PostgreSQL or its driver means to an operator.

SQLSTATE classes: PostgreSQL manual, appendix A.

    can't connect, 08*, 57P01-57P03, 53300,      PostgresUnavailable   postpone, try again
    25006 read-only, 25P03, 25P04, time-outs
    28*, 3D000 user, password, database          ConfigError           someone must act
    42P05, 26000 prepared statements of others   ConfigError           someone must act
    a setting of the DSN that the server refuses ConfigError           someone must act
    42501 a right is missing                     RightMissing          someone must act
    other 53* disk, memory, limits; 55* state;   Transient             try again
    58* I/O; XX* its own trouble
    55P03 a lock that others hold                Locked, where no      try again
                                                 slice of its own can
    40* deadlocks; 42P01, 42703, 42804, 0A000 a  Transient, likewise   try again
    table was changed in the middle of a run
    anything else                                BalanceSyncError,     it's a bug, or a trigger's
                                                 likewise              doing
"""

from typing import Final

import asyncpg

from balancesync.errors import (
    BalanceSyncError,
    ConfigError,
    Locked,
    PostgresUnavailable,
    RightMissing,
    Transient,
    why_unreachable,
)

# A connection that breaks at the wrong moment confuses the driver: an InternalClientError.
DRIVER_ERRORS: Final = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)
# Classes of errors that no row is to blame for: connection, transaction, authorization, catalog,
# rollback, resources, state, operator, system, bug. A trigger may raise whatever else it likes.
# https://www.postgresql.org/docs/current/errcodes-appendix.html
NOT_OF_A_ROW: Final = frozenset(("08", "25", "26", "28", "3D", "40", "53", "55", "57", "58", "XX"))
# Pooling of transactions or statements. PgBouncer's word for what is needed is told with it.
POOLED: Final = (
    "is behind a pooler that gives us no session of our own: let postgres.dsn name PostgreSQL's own"
    " port, or a port of the pooler that gives sessions (PgBouncer: pool_mode = session)"
)
# What a server says of a setting in the DSN that it doesn't know or take.
BAD_SETTING: Final = (
    asyncpg.UndefinedObjectError,
    asyncpg.InvalidParameterValueError,
    asyncpg.CantChangeRuntimeParamError,
    asyncpg.ClientConfigurationError,
)
# The first that fits says it; a subclass so comes before its own.
_MEANINGS: Final[tuple[tuple[tuple[type[Exception], ...], type[BalanceSyncError], str], ...]] = (
    (
        (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidPasswordError),
        ConfigError,
        "rejects the user or password: {}; see postgres.dsn",
    ),
    (
        (asyncpg.InvalidCatalogNameError,),
        ConfigError,
        "has no such database: {}; see postgres.dsn",
    ),
    (
        (asyncpg.InsufficientPrivilegeError,),
        RightMissing,
        "denies a right: {}; grant it, see docs/security.md",
    ),
    (
        (asyncpg.DiskFullError, asyncpg.OutOfMemoryError),
        Transient,
        "is short of space: {}; free some, the run is repeated",
    ),
    # Another session than the one in which the driver prepared its statements.
    (
        (asyncpg.DuplicatePreparedStatementError, asyncpg.InvalidSQLStatementNameError),
        ConfigError,
        POOLED,
    ),
    ((asyncpg.TooManyConnectionsError,), PostgresUnavailable, "has no free connection: {}"),
    ((asyncpg.InsufficientResourcesError,), Transient, "is at a limit: {}; raise it there"),
    (
        (asyncpg.ReadOnlySQLTransactionError,),
        PostgresUnavailable,
        "is read-only or a standby: {}; of a primary see default_transaction_read_only of the"
        " server, the database and the role",
    ),
    (
        (
            asyncpg.QueryCanceledError,
            asyncpg.IdleInTransactionSessionTimeoutError,
            asyncpg.TransactionTimeoutError,
        ),
        PostgresUnavailable,
        "cancelled a statement: {}",
    ),
    (
        (
            asyncpg.PostgresConnectionError,
            asyncpg.OperatorInterventionError,
            asyncpg.InterfaceError,
            asyncpg.InternalClientError,
        ),
        PostgresUnavailable,
        "isn't there: {}",
    ),
    (
        (asyncpg.ObjectNotInPrerequisiteStateError,),
        Transient,
        "can't do that for now: {}; its log may say why",
    ),
    (
        (asyncpg.PostgresSystemError, asyncpg.InternalServerError),
        Transient,
        "is in trouble: {}; see its log",
    ),
)
# Another session was in the way, or changed a table in the middle of the run.
_PASSING: Final = (
    asyncpg.TransactionRollbackError,
    asyncpg.UndefinedTableError,
    asyncpg.UndefinedColumnError,
    asyncpg.DatatypeMismatchError,
    asyncpg.InvalidCachedStatementError,
)


def translate(error: BaseException, address: str, *, last: bool) -> BalanceSyncError | None:
    """What an error of the driver means; None if others than the `last` may deal with it."""
    where, said = f"PostgreSQL at {address}", _said(error)
    if isinstance(error, asyncpg.LockNotAvailableError):
        locked = f"{where}: a table or rows stay locked by another session: {said}"
        return Locked(f"{locked}; see postgres.lock_timeout") if last else None
    for kinds, ours, meaning in _MEANINGS:
        if isinstance(error, kinds):
            return ours(f"{where} {meaning.format(said)}")
    if isinstance(error, TimeoutError):
        return PostgresUnavailable(f"{where} didn't answer in time")
    if isinstance(error, OSError):
        return PostgresUnavailable(f"{where} can't be reached: {why_unreachable(error)}")
    if not last:
        return None
    if isinstance(error, _PASSING):
        return Transient(f"{where} ended a statement: {said}")
    state = getattr(error, "sqlstate", None)
    return BalanceSyncError(f"{where} refused a statement: {said} (SQLSTATE {state})")


def _said(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def is_of_a_row(error: asyncpg.PostgresError) -> bool:
    """Whether it may be the fault of one row that is written, and not of what all rows meet."""
    of_session = asyncpg.InsufficientPrivilegeError | asyncpg.DuplicatePreparedStatementError
    if isinstance(error, of_session):
        return False
    return (error.sqlstate or "XX")[:2] not in NOT_OF_A_ROW
