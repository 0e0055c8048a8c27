"""Who schedules and follows changes: one daemon of those on a database, by an advisory lock.

The lock lives on a connection of its own for as long as the daemon leads. PostgreSQL frees it when
the connection ends, and that within seconds also when a host just vanishes (see `database`).
"""

import asyncio
import random
from collections.abc import Callable
from typing import Any, Final

import structlog

from balancesync.database import Connection, Database, Steps, load_sql, lock_key
from balancesync.errors import BalanceSyncError, SchemaTooNew

_POLL_S: Final = 1.0
_PROVE_S: Final = 2.0
_ANSWER_S: Final = 5.0
_LONGEST_PAUSE_S: Final = 5.0
# PostgreSQL cuts an application_name at 63 bytes.
_NAME: Final = "balancesync {}"
_NAME_BYTES: Final = 63

log = structlog.get_logger("balancesync")


class Leadership:
    """Tries to lead, and goes on trying. `on_change` gets whether we lead, and who leads."""

    def __init__(
        self, database: Database, name: str, on_change: Callable[[bool, str | None], None]
    ) -> None:
        self._database = database
        self._name = name
        self._on_change = on_change
        self._key = lock_key("leader", database.config.schema)
        self._sql = load_sql("leadership")
        self._connection: Connection | None = None

    async def serve(self) -> None:
        """Lead whenever the lock can be had; ends by being cancelled, or by SchemaTooNew."""
        pause = _POLL_S
        away = False
        while True:
            try:
                with self._database.translated(last=True):
                    self._connection = await self._connect()
                    away = False
                    await self._lead(self._connection)
            except SchemaTooNew:
                raise
            except BalanceSyncError as error:
                # Told first: giving the lock back may take a hanging server's time-out.
                self._on_change(False, None)
                # Once an outage, however long; its end is told by who leads then.
                write = log.debug if away else log.warning
                write("not leading: PostgreSQL can't be asked", error=str(error))
                away = True
                pause = _POLL_S if self._connection else min(pause * 2, _LONGEST_PAUSE_S)
            finally:
                await self.release()
            await asyncio.sleep(random.uniform(pause / 2, pause))  # noqa: S311  # jitter

    async def release(self) -> None:
        """Give the lock back, so that another daemon leads at once."""
        connection, self._connection = self._connection, None
        if connection is None or connection.is_closed():
            return
        try:
            with self._database.translated(last=True):
                async with asyncio.timeout(_PROVE_S):
                    await connection.execute("SELECT pg_advisory_unlock_all()")
        except BalanceSyncError as error:
            log.debug("the leader's lock ends with its connection", error=str(error))
        finally:
            connection.terminate()

    async def _connect(self) -> Connection:
        connection = await self._database.connect()
        try:
            await Steps(self._database).upgrade(connection)
            name = _NAME.format(self._name).encode()[:_NAME_BYTES].decode(errors="ignore")
            await connection.execute(self._sql["set_name"], name)
        except BaseException:
            connection.terminate()
            raise
        return connection

    async def _lead(self, connection: Connection) -> None:
        while not await self._ask(connection, "SELECT pg_try_advisory_lock($1)", self._key):
            holder = await self._ask(connection, self._sql["holder"], self._key)
            self._on_change(False, holder)
            await asyncio.sleep(_POLL_S)
        self._on_change(True, self._name)
        while True:
            await asyncio.sleep(_PROVE_S)
            await self._ask(connection, "SELECT 1")

    @staticmethod
    async def _ask(connection: Connection, sql: str, *arguments: object) -> Any:
        async with asyncio.timeout(_ANSWER_S):
            return await connection.fetchval(sql, *arguments)
