"""The writing session: the one connection that holds the writer's lock, stages, diffs and applies.

Lose the connection, and lock and staging are lost together: nothing has to be fenced off.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, Final, TypeVar
from uuid import uuid4

import asyncpg
import structlog

from balancesync.database import NO_LIMIT, Connection, Database, load_sql, lock_key
from balancesync.errors import BalanceSyncError, PostgresUnavailable, RunFailed
from balancesync.locks import take_lock, yield_lock

T = TypeVar("T")

log = structlog.get_logger("balancesync")

# Enough for the hash join of a million narrow rows in one pass; more rows spill to disk.
_SETTINGS: Final = {"work_mem": "64MB", "temp_buffers": "32MB", "jit": "off"}
# The lock is what others know the session by; see `sql/session.sql`.
_BEGIN: Final = ", ".join(
    (
        "SELECT pg_postmaster_start_time() AS since",
        "pg_try_advisory_lock($1)",
        *(f"set_config('{name}', '{value}', false)" for name, value in _SETTINGS.items()),
    )
)
_CLOSE_S: Final = 2.0
_END_POLL_S: Final = 0.02
# A statement may end, and its reply be under way, just when a probe looks.
_REPLY_S: Final = 1.0
# How long a statement that is to be whole may be silent once its run is told to end.
_ENDING_S: Final = 5.0


class Session:
    """A PostgreSQL connection of one's own, for one run or for live mode's flushes."""

    def __init__(
        self,
        database: Database,
        connection: Connection,
        on_alive: Callable[[], None],
        ending: asyncio.Future[RunFailed],
    ) -> None:
        self.database = database
        self.connection = connection
        self._on_alive = on_alive
        self._ending = ending
        self._key = lock_key("session", uuid4().hex)
        self._sql = load_sql("session")

    @classmethod
    async def open(
        cls,
        database: Database,
        on_alive: Callable[[], None] = lambda: None,
        ending: asyncio.Future[RunFailed] | None = None,
    ) -> "Session":
        """Connect; raises PostgresUnavailable or ConfigError.

        `on_alive` is called during a long statement, whenever PostgreSQL proves to be at work.
        `ending` is what the run is told to end by, once it is: `watch` raises it.
        """
        if ending is None:
            ending = asyncio.get_running_loop().create_future()
        session = cls(database, await cls._connect(database, ending), on_alive, ending)
        try:
            with database.translated():
                since = await session.connection.fetchval(_BEGIN, session._key)
        except BaseException:
            session.drop()
            raise
        database.server_since = since
        return session

    @staticmethod
    async def _connect(database: Database, ending: asyncio.Future[RunFailed]) -> Connection:
        connecting = asyncio.ensure_future(database.connect())
        try:
            either: set[asyncio.Future[Any]] = {connecting, ending}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            connecting.cancel()
            connecting.add_done_callback(_see)
        if not connecting.done():
            raise ending.result()
        return connecting.result()

    async def prepare(self) -> None:
        """Create the temporary table that all mappings' rejects are put aside in."""
        await self.watch(self.connection.execute(load_sql("target")["create_rejects"]))

    async def close(self) -> None:
        """Free the locks and drop the connection with its temporary tables.

        PostgreSQL would notice the end of the connection a moment later than the next run starts.
        And one that is lost already may be at work there still, and commit what this run has given
        up: then PostgreSQL is asked to end it, and that is waited for.
        """
        try:
            async with asyncio.timeout(_CLOSE_S):
                if not self.connection.is_closed() and self.connection.is_in_transaction():
                    await self.connection.execute("ROLLBACK")
                await self.connection.execute("SELECT pg_advisory_unlock_all()")
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError):
            self.drop()
            await self._end()
        else:
            self.drop()

    async def _end(self) -> None:
        try:
            async with asyncio.timeout(_CLOSE_S):
                while True:
                    if await self._ask_of_it("end", _CLOSE_S) is None:
                        return
                    await asyncio.sleep(_END_POLL_S)
        except (BalanceSyncError, TimeoutError) as error:
            said = str(error) or f"it goes on after {_CLOSE_S:g} s"
            # The next writer waits for its lock, whatever becomes of it.
            log.warning("a lost session of PostgreSQL may commit what it was at", error=said)

    def drop(self) -> None:
        """Drop the connection, whatever it's at; its locks fall when PostgreSQL notices."""
        self.connection.terminate()

    async def lock_writer(self, wait_s: float, while_waiting: Callable[[], None]) -> None:
        """Take the writer's lock, waiting up to `wait_s` seconds; raises LockHeld.

        `while_waiting` is called many times a second; what it raises ends the wait.
        """
        with self.database.translated():
            key, wanted = self._writer_locks
            await take_lock(self.connection, key, wait_s, while_waiting, wanted)

    async def yield_writer(self) -> bool:
        """Take the writer's lock if it's free and nobody waits for it.

        For live mode, which asks four times a second: it would leave nobody else a chance.
        """
        with self.database.translated():
            return await yield_lock(self.connection, *self._writer_locks)

    async def unlock_writer(self) -> None:
        """Give the writer's lock back and keep the session."""
        with self.database.translated():
            await self.connection.execute("SELECT pg_advisory_unlock($1)", self._writer_locks[0])

    @property
    def _writer_locks(self) -> tuple[int, int]:
        schema = self.database.config.schema
        return lock_key("writer", schema), lock_key("writer wanted", schema)

    async def clock(self) -> datetime:
        """PostgreSQL's time."""
        now: datetime = await self.connection.fetchval("SELECT clock_timestamp()")
        return now

    async def plan_by_index(self) -> None:
        """Make the session ready for work on rows that are reached one by one, in key order.

        A nested loop keeps the order of its outer side; a hash or merge join wouldn't, and one pass
        over the table is never cheaper to a planner that knows nothing of a temporary one.
        """
        for setting in ("enable_seqscan", "enable_hashjoin", "enable_mergejoin"):
            await self.connection.execute(f"SET {setting} = off")

    async def use_any_plan(self) -> None:
        """End what `plan_by_index` began, or `Writer.plan_by_index`."""
        for setting in ("enable_seqscan", "enable_hashjoin", "enable_mergejoin"):
            await self.connection.execute(f"RESET {setting}")

    @asynccontextmanager
    async def transaction(self, isolation: str = "READ COMMITTED") -> AsyncIterator[None]:
        """A transaction for the length of a block; if it raises, the session can only be closed.

        The driver's own would roll back on a connection that `watch` has dropped, and so put an
        error of its own in the place of what ended the block, be it a cancellation.
        """
        begin = f"BEGIN ISOLATION LEVEL {isolation}"
        await self.watch(self.connection.execute(begin, timeout=NO_LIMIT))
        yield
        await self.watch(self.connection.execute("COMMIT", timeout=NO_LIMIT), whole=True)

    async def pause(self, seconds: float) -> None:
        """Wait, though no longer than the run goes on."""
        await asyncio.wait({self._ending}, timeout=seconds)

    async def watch(self, operation: Awaitable[T], *, whole: bool = False) -> T:
        """Await a statement of this session, however long it takes, while PostgreSQL lives.

        Raises PostgresUnavailable when no probe on another connection is answered within
        `postgres.timeout`, or the probe finds that this session's backend isn't at work: a stopped
        server still acknowledges what it is sent, and a reply may have been lost on the way.

        Raises what ends the run as soon as it's told, with the statement called off. One that is to
        be `whole` goes on to its end, if PostgreSQL proves to be at work on it every few seconds.
        """
        task = asyncio.ensure_future(operation)
        proving = asyncio.ensure_future(self._prove(task, self.database.config.timeout))
        try:
            with self.database.translated():
                either: set[asyncio.Future[Any]] = {task, proving, self._ending}
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if task.done():
                    return task.result()
                if not self._ending.done():
                    await proving
                elif whole:
                    await self._prove(task, min(self.database.config.timeout, _ENDING_S))
                else:
                    await self._call_off(task)
                    raise self._ending.result()
                return task.result()
        finally:
            proving.cancel()
            proving.add_done_callback(_see)
            if not task.done():
                # The driver would wait for PostgreSQL to confirm: drop the connection first.
                self.drop()
                task.cancel()
                task.add_done_callback(_see)

    @staticmethod
    async def _call_off(task: asyncio.Future[Any]) -> None:
        """Have PostgreSQL cancel the statement: a lost connection it would notice later, and hold
        our locks until then.
        """
        task.cancel()
        await asyncio.wait({task}, timeout=_REPLY_S)

    async def _prove(self, task: asyncio.Future[Any], patience_s: float) -> None:
        """Wait for a statement's end; raises PostgresUnavailable once nobody is at work on it."""
        while not (await asyncio.wait({task}, timeout=patience_s))[0]:
            await self._prove_alive(task, patience_s)
            self._on_alive()

    async def _prove_alive(self, task: asyncio.Future[Any], within_s: float) -> None:
        state = await self._ask_of_it("state", within_s)
        # What is hidden has a transaction at least: one that stays idle, PostgreSQL ends itself.
        if state in ("active", "hidden"):
            return
        await asyncio.wait({task}, timeout=_REPLY_S)
        if not task.done():
            raise PostgresUnavailable(
                f"PostgreSQL at {self.database.address} isn't working on the statement that this"
                f" run waits for (its session is {state or 'gone'})"
            )

    async def _ask_of_it(self, name: str, within_s: float) -> Any:
        """Ask of this session on another connection; None if PostgreSQL has it no more."""

        async def question(probe: Connection) -> Any:
            async with probe.transaction():
                # Its state shows to the role that logged in, and not to one that was set then.
                await probe.execute("SET LOCAL ROLE NONE")
                return await probe.fetchval(self._sql[name], self._key)

        return await self.database.ask(question, within_s, reserved=True)


def _see(task: asyncio.Future[Any]) -> None:
    """Nobody waits for it any more: what it raises is none of the loop's business."""
    if not task.cancelled():
        task.exception()
