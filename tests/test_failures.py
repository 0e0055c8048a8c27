"""What each error of a real PostgreSQL means; the table is the one that `failures` begins with."""

import asyncio
import socket

import asyncpg
import pytest
from pydantic import SecretStr

from balancesync.config import PostgresConfig
from balancesync.database import Database
from balancesync.errors import (
    BalanceSyncError,
    ConfigError,
    Locked,
    PostgresUnavailable,
    RightMissing,
    Transient,
)
from balancesync.failures import is_of_a_row

# Whoever meets these, they mean the same.
ALWAYS: list[tuple[str, type[BalanceSyncError], str]] = [
    ("28000", ConfigError, "rejects the user or password: said; see postgres.dsn"),
    ("28P01", ConfigError, "rejects the user or password: said; see postgres.dsn"),
    ("3D000", ConfigError, "has no such database: said; see postgres.dsn"),
    ("42501", RightMissing, "denies a right: said; grant it, see docs/security.md"),
    ("42P05", ConfigError, "is behind a pooler that gives us no session of our own: "),
    ("26000", ConfigError, "is behind a pooler that gives us no session of our own: "),
    ("53100", Transient, "is short of space: said; free some"),
    ("53200", Transient, "is short of space: said; free some"),
    ("53300", PostgresUnavailable, "has no free connection: said"),
    ("53400", Transient, "is at a limit: said; raise it there"),
    ("25006", PostgresUnavailable, "is read-only or a standby: said"),
    ("57014", PostgresUnavailable, "cancelled a statement: said"),
    ("25P03", PostgresUnavailable, "cancelled a statement: said"),
    ("25P04", PostgresUnavailable, "cancelled a statement: said"),
    ("08006", PostgresUnavailable, "isn't there: said"),
    ("57P01", PostgresUnavailable, "isn't there: said"),
    ("57P02", PostgresUnavailable, "isn't there: said"),
    ("57P03", PostgresUnavailable, "isn't there: said"),
    ("55000", Transient, "can't do that for now: said; its log may say why"),
    ("58030", Transient, "is in trouble: said; see its log"),
    ("XX000", Transient, "is in trouble: said; see its log"),
    ("XX001", Transient, "is in trouble: said; see its log"),
]
# These only if nobody else has dealt with them.
AT_LAST: list[tuple[str, type[BalanceSyncError], str]] = [
    ("55P03", Locked, ": a table or rows stay locked by another session: said; see postgres.lock_"),
    ("40001", Transient, "ended a statement: said"),
    ("40P01", Transient, "ended a statement: said"),
    ("42P01", Transient, "ended a statement: said"),
    ("42703", Transient, "ended a statement: said"),
    ("42804", Transient, "ended a statement: said"),
    ("22012", BalanceSyncError, "refused a statement: said (SQLSTATE 22012)"),
    ("23505", BalanceSyncError, "refused a statement: said (SQLSTATE 23505)"),
    ("P0001", BalanceSyncError, "refused a statement: said (SQLSTATE P0001)"),
]
# A table may refuse a row with these, or with whatever a trigger likes.
OF_A_ROW = ("22012", "23505", "23514", "23503", "22003", "P0001", "44000", "21000")
RAISE = "DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '{}', MESSAGE = E'said\\nthe row'; END $$"


async def refuse(connection: asyncpg.Connection, state: str) -> None:
    await connection.execute(RAISE.format(state))


@pytest.mark.parametrize("last", [False, True])
async def test_what_an_error_means(
    postgres_dsn: str, pg: asyncpg.Connection, *, last: bool
) -> None:
    database = Database(PostgresConfig(dsn=SecretStr(postgres_dsn)))
    for state, kind, words in ALWAYS + AT_LAST * last:
        with pytest.raises(BalanceSyncError) as caught, database.translated(last=last):
            await refuse(pg, state)
        assert type(caught.value) is kind, state
        where, what = f"PostgreSQL at {database.address}", str(caught.value)
        assert what.removeprefix(where).lstrip(" ").startswith(words), what
        # The other lines may be the row itself.
        assert "\n" not in what
        assert "the row" not in what
    await database.close()


@pytest.mark.parametrize("state", [state for state, _, _ in AT_LAST])
async def test_what_others_may_deal_with_is_left_to_them(
    postgres_dsn: str, pg: asyncpg.Connection, state: str
) -> None:
    database = Database(PostgresConfig(dsn=SecretStr(postgres_dsn)))
    with pytest.raises(asyncpg.PostgresError) as caught, database.translated():
        await refuse(pg, state)
    assert caught.value.sqlstate == state
    await database.close()


async def test_no_row_is_to_blame_for_the_session(pg: asyncpg.Connection) -> None:
    to_blame = []
    for state in (*OF_A_ROW, *(state for state, _, _ in ALWAYS)):
        with pytest.raises(asyncpg.PostgresError) as caught:
            await refuse(pg, state)
        if is_of_a_row(caught.value):
            to_blame.append(state)
    assert tuple(to_blame) == OF_A_ROW


async def test_a_server_that_is_not_there(postgres_dsn: str) -> None:
    database = Database(PostgresConfig(dsn=SecretStr(postgres_dsn)))
    for error, words in (
        (
            ConnectionRefusedError(111, "Connect call failed"),
            "can't be reached: connection refused",
        ),
        (socket.gaierror(-2, "Name or service not known"), "can't be reached: no such host"),
        (TimeoutError(), "didn't answer in time"),
        (asyncpg.InterfaceError("connection is closed"), "isn't there: connection is closed"),
    ):
        with pytest.raises(PostgresUnavailable) as caught, database.translated():
            raise error
        assert str(caught.value) == f"PostgreSQL at {database.address} {words}"
    with pytest.raises(asyncio.CancelledError), database.translated(last=True):
        raise asyncio.CancelledError
    await database.close()
