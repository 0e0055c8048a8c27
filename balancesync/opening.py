"""How each connection to PostgreSQL begins: who answers is asked first, and then it is set up.

A pooler may give each transaction, or each statement, another session: locks, temporary tables and
settings would then be left to others. So nothing is set, created or prepared by name before that is
known: COPY goes by the simple protocol, which leaves nothing behind.
"""

import asyncio
import io
from typing import Any, Final

import asyncpg

from balancesync.config import PostgresConfig
from balancesync.dsn import PostgresDsn
from balancesync.errors import ConfigError, PostgresUnavailable
from balancesync.failures import BAD_SETTING, POOLED

Connection = asyncpg.Connection


class _Asking(asyncpg.Connection):
    """A connection on which the driver asks for `target_session_attrs` and leaves nothing behind.

    It asks by a statement with a name, before anybody knows whose session that is.
    """

    is_ours = False

    async def fetchval(self, query: str, *args: object, **options: Any) -> Any:
        if self.is_ours:
            return await super().fetchval(query, *args, **options)
        return (await _ask(self, query))[0] == "t"


_WHO: Final = """SELECT pg_backend_pid(), current_setting('server_encoding'),
    current_setting('client_encoding'), current_setting('session_replication_role')"""
_PID: Final = "SELECT pg_backend_pid()"
# A pooler may pick the same session by chance, as when others take the one between.
_ROUNDS: Final = 3
_POOLER_S: Final = 5.0
_IDLE_S: Final = 60.0

# What a role, a database or the DSN may have set otherwise, and that must not change what we do.
# A dead client's or server's session must not keep its locks for the hours that TCP would take:
# https://www.postgresql.org/docs/current/runtime-config-connection.html
_SESSION: Final = {
    "timezone": "UTC",
    "datestyle": "ISO",
    "intervalstyle": "postgres",
    "extra_float_digits": "1",
    "bytea_output": "hex",
    "standard_conforming_strings": "on",
    "quote_all_identifiers": "off",
    "default_transaction_isolation": "read committed",
    "default_transaction_deferrable": "off",
    "statement_timeout": "0",
    "tcp_keepalives_idle": "3",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "2",
    "tcp_user_timeout": "7000",
}
_SESSION_14: Final = {"client_connection_check_interval": "2s", "idle_session_timeout": "0"}
_SESSION_17: Final = {"transaction_timeout": "0"}
_SET: Final = """SELECT set_config(name, value, false)
FROM unnest($1::text[], $2::text[]) s (name, value)"""


async def open_connection(dsn: PostgresDsn, config: PostgresConfig, **options: Any) -> Connection:
    """Connect to a session that nobody else has, and make its settings harmless.

    `dsn` is the one of `config`, and `options` are asyncpg's. Raises ConfigError,
    PostgresUnavailable and what the driver raises.
    """
    connection = await _connect(dsn, **options)
    try:
        await _judge(connection, dsn)
        connection.is_ours = True
        await _set_up(connection, dsn, config)
    except BaseException:
        connection.terminate()
        raise
    return connection


async def _connect(dsn: PostgresDsn, **options: Any) -> _Asking:
    arguments = options | dsn.arguments | {"connection_class": _Asking}
    connection: _Asking = await asyncpg.connect(**arguments)
    return connection


async def _judge(connection: Connection, dsn: PostgresDsn) -> None:
    pid, server_encoding, client_encoding, replication_role = await _ask(connection, _WHO)
    where = f"PostgreSQL at {dsn.address}"
    # The driver's is the key for cancelling, and that is the backend's own pid, or a pooler's key.
    if int(pid) != connection.get_server_pid():
        await _judge_pooler(connection, dsn, pid)
    if server_encoding != "UTF8":
        raise ConfigError(
            f"PostgreSQL's database {dsn.address} is encoded in {server_encoding}; balancesync"
            " needs UTF8: create the database with ENCODING 'UTF8'"
        )
    if client_encoding != "UTF8":
        raise ConfigError(
            f"{where} takes our text for {client_encoding}, but it is UTF8: let nothing set another"
            " client_encoding"
        )
    if replication_role != "origin":
        raise ConfigError(
            f"{where} checks no foreign key and fires no trigger for us, as its"
            f" session_replication_role is {replication_role}: take that setting from the role, the"
            " database or postgres.dsn"
        )


async def _judge_pooler(connection: Connection, dsn: PostgresDsn, pid: str) -> None:
    """Raise ConfigError unless a session of our own is behind a pooler's connection.

    Who holds a transaction holds a backend that nobody else can have: is it ours, or do we get
    another one meanwhile, then we have none to keep.
    """
    try:
        async with asyncio.timeout(_POOLER_S):
            for _ in range(_ROUNDS):
                if not await _keeps(connection, dsn, pid):
                    raise ConfigError(f"PostgreSQL at {dsn.address} {POOLED}")
    except TimeoutError:
        raise PostgresUnavailable(
            f"PostgreSQL at {dsn.address} is behind a pooler that has no second session for us in"
            f" {_POOLER_S:g} s; a larger pool there (PgBouncer: default_pool_size) may help"
        ) from None


async def _keeps(connection: Connection, dsn: PostgresDsn, pid: str) -> bool:
    if (await _ask(connection, _PID))[0] != pid:
        return False
    # With another pooler's process behind the same port, a new one each time may find the same.
    other = await _connect(dsn, timeout=_POOLER_S)
    try:
        # Before the transaction, which pooling by statements refuses.
        if (await _ask(other, _PID))[0] == pid:
            return False
        await other.execute("BEGIN")
        if (await _ask(other, _PID))[0] == pid:
            return False
        same = (await _ask(connection, _PID))[0] == pid
        await other.execute("ROLLBACK")
    finally:
        other.terminate()
    return same


async def _ask(connection: Connection, question: str) -> list[str]:
    """The columns of a question's one row, as texts."""
    answer = io.BytesIO()
    await connection.copy_from_query(question, output=answer)
    return answer.getvalue().decode("ascii").rstrip("\n").split("\t")


async def _set_up(connection: Connection, dsn: PostgresDsn, config: PostgresConfig) -> None:
    # Not in the start packet, in which a pooler refuses what it doesn't know.
    # A reply that is lost leaves a transaction open, and no reply is longer under way.
    idle_s = max(_IDLE_S, 2 * config.timeout)
    ours = _SESSION | {
        "lock_timeout": f"{config.lock_timeout * 1000:.0f}ms",
        "idle_in_transaction_session_timeout": f"{idle_s:.0f}s",
    }
    version = connection.get_server_version()
    if version >= (14,):
        ours |= _SESSION_14
    if version >= (17,):
        ours |= _SESSION_17
    settings = [("application_name", "balancesync"), *dsn.settings.items(), *ours.items()]
    try:
        await connection.fetch(_SET, *zip(*settings, strict=True))
    except BAD_SETTING as error:
        # Of a statement's own they would be a bug.
        said = str(error).splitlines()[0]
        where = f"PostgreSQL at {dsn.address}"
        raise ConfigError(f"{where} can't be asked as postgres.dsn says: {said}") from error
