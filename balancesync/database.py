"""PostgreSQL sessions: connecting, named SQL, the schema's steps."""

import asyncio
import hashlib
import importlib.resources
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime
from functools import cache
from typing import Any, Final, TypeVar

import asyncpg

from balancesync.config import PostgresConfig
from balancesync.dsn import read_postgres_dsn
from balancesync.errors import PostgresUnavailable, SchemaMissing, SchemaTooNew
from balancesync.failures import DRIVER_ERRORS, translate
from balancesync.opening import open_connection

Connection = asyncpg.Connection
Pool = asyncpg.Pool
T = TypeVar("T")

# One for the daemon's probes, one for a run whose statement takes long, one for its health.
_RESERVED: Final = 3
# Seconds, thirty years of them: to the driver, None would mean the connection's own limit.
NO_LIMIT: Final = 1e9


@cache
def load_sql(name: str) -> dict[str, str]:
    """Read `sql/NAME.sql` as blocks: each begins with a line `-- name: block`."""
    text = (importlib.resources.files("balancesync") / "sql" / f"{name}.sql").read_text()
    # Names in braces stand in comments, too, for what has several lines.
    text = re.sub(r"^ *--(?! name: ).*\n", "", text, flags=re.MULTILINE)
    parts = re.split(r"^-- name: (\w+)$", text, flags=re.MULTILINE)
    return {block: sql.strip() for block, sql in zip(parts[1::2], parts[2::2], strict=True)}


def quote(*names: str | None) -> str:
    """Quote identifiers and join them with dots; None is left out."""
    return ".".join('"' + name.replace('"', '""') + '"' for name in names if name is not None)


def quote_literal(text: str) -> str:
    """Quote a text as a literal, whatever `standard_conforming_strings` says."""
    quoted = "'" + text.replace("'", "''").replace("\\", "\\\\") + "'"
    return f"E{quoted}" if "\\" in text else quoted


def lock_key(*parts: str) -> int:
    """The advisory lock's number for a purpose: a signed 64-bit hash, the same on every host."""
    digest = hashlib.sha256("\0".join(("balancesync", *parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


class Database:
    """One PostgreSQL database: a pool for short statements, and sessions of one's own.

    A second, small pool is reserved for asking whether the server lives and how things stand:
    however busy the first is kept, be it by clients of HTTP that wait for somebody's lock, that is
    no server's death.
    """

    def __init__(self, config: PostgresConfig) -> None:
        self.config = config
        self.schema = quote(config.schema)
        self._dsn = read_postgres_dsn(config.dsn.get_secret_value())
        self._pool: Pool | None = None
        self._reserve: Pool | None = None
        self._opening = asyncio.Lock()
        self._asking: set[asyncio.Future[Any]] = set()
        # When the server was started that the last session was opened on.
        self.server_since: datetime | None = None

    @property
    def address(self) -> str:
        """`host:port/database`, without user or password, for messages."""
        return self._dsn.address

    async def close(self) -> None:
        """Close the pools; sessions are closed by those who opened them."""
        for pool in (self._pool, self._reserve):
            if pool is not None:
                pool.terminate()
        self._pool = self._reserve = None

    @asynccontextmanager
    async def acquire(self, *, reserved: bool = False) -> AsyncIterator[Connection]:
        """Borrow a pooled connection for short statements; raises what `failures` lists."""
        with self.translated(last=True):
            async with self._opening:
                if reserved:
                    pool = self._reserve = self._reserve or await self._make_pool(_RESERVED)
                else:
                    pool = self._pool = self._pool or await self._make_pool(self.config.pool_size)
            async with pool.acquire(timeout=self.config.timeout) as connection:
                try:
                    yield connection  # type: ignore[misc]  # a PoolConnectionProxy is one in all but name
                except (asyncio.CancelledError, TimeoutError):
                    # The pool would wait for the server to confirm, and it may hang or be gone.
                    connection.terminate()
                    raise

    async def _make_pool(self, size: int) -> Pool:
        pool: Pool = await asyncpg.create_pool(
            connect=self._open,
            min_size=0,
            max_size=size,
            timeout=self.config.timeout,
            command_timeout=self.config.timeout,
            reset=_end_transaction,
        )
        return pool

    async def _open(self, dsn: str | None = None, **options: Any) -> Connection:
        return await open_connection(self._dsn, self.config, **options)

    async def ask(
        self,
        question: Callable[[Connection], Awaitable[T]],
        within_s: float,
        *,
        reserved: bool = False,
    ) -> T:
        """What `question` gives on a pooled connection, in `within_s` seconds at most.

        Raises PostgresUnavailable when it's late, and what `failures` lists. If it's a
        `reserved` one, which nobody holds up but the server, the connections of both pools are
        taken for dead: behind a failover that nobody was told of, new ones work at once.
        """
        try:
            return await self.within(within_s, self._ask(question, reserved=reserved))
        except PostgresUnavailable:
            if reserved:
                await self.close()
            raise

    async def _ask(self, question: Callable[[Connection], Awaitable[T]], *, reserved: bool) -> T:
        async with self.acquire(reserved=reserved) as connection:
            return await question(connection)

    async def within(self, seconds: float, work: Coroutine[Any, Any, T]) -> T:
        """What `work` with this database gives; raises PostgresUnavailable when it's late.

        Then it's cancelled, but not awaited: connecting may take longer to give up.
        """
        asking = asyncio.ensure_future(work)
        self._asking.add(asking)
        asking.add_done_callback(self._forget)
        try:
            done, _ = await asyncio.wait({asking}, timeout=seconds)
        finally:
            asking.cancel()
        if not done:
            where = f"PostgreSQL at {self.address}"
            raise PostgresUnavailable(f"{where} didn't answer in {seconds:g} s")
        return asking.result()

    def _forget(self, asked: asyncio.Future[Any]) -> None:
        self._asking.discard(asked)
        if not asked.cancelled():
            asked.exception()  # marks it as seen

    async def connect(self) -> Connection:
        """Open a session of one's own, in which locks and temporary tables live.

        A statement may take `postgres.timeout` seconds, any other time only with `timeout=NO_LIMIT`
        and somebody who watches it.
        """
        with self.translated():
            limit = self.config.timeout
            return await self._open(timeout=limit, command_timeout=limit)

    @contextmanager
    def translated(self, *, last: bool = False) -> Iterator[None]:
        """Turn the driver's errors into ours, as `failures` lists them.

        Some of them only as the `last` who could deal with them.
        """
        try:
            yield
        except DRIVER_ERRORS as error:
            ours = translate(error, self.address, last=last)
            if ours is None:
                raise
            raise ours from error


async def _end_transaction(connection: Connection) -> None:
    # The driver's own way, RESET ALL, would also undo what `open_connection` has set. Nobody sets
    # anything else on a pooled connection.
    if connection.is_in_transaction():
        await connection.execute("ROLLBACK")


class Steps:
    """The steps that make and upgrade balancesync's own schema, in `sql/steps.sql`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._steps = list(load_sql("steps").values())

    @property
    def newest(self) -> int:
        """The number of steps this program knows."""
        return len(self._steps)

    async def current(self, connection: Connection) -> int:
        """How many steps the database has seen; 0 without a schema. Raises SchemaMissing."""
        name = f"{self._database.schema}.steps"
        if await connection.fetchval("SELECT to_regclass($1)", name) is None:
            return 0
        current = await connection.fetchval(f"SELECT max(step) FROM {name}")  # noqa: S608  # quoted
        if current is None:
            raise SchemaMissing(
                f"PostgreSQL at {self._database.address} has an empty table {name}, as a dump"
                " without data leaves it, so nobody knows how old the schema is: restore that"
                f" table's rows, or drop the schema {self._database.schema} with all it remembers,"
                " and run `balancesync init`"
            )
        return int(current)

    async def check(self, connection: Connection) -> None:
        """Raise SchemaMissing or SchemaTooNew unless this program can work with the schema."""
        current = await self.current(connection)
        if current < self.newest:
            schema = self._database.config.schema
            what = "an older balancesync's tables" if current else "no tables of balancesync's own"
            where = f"PostgreSQL at {self._database.address} has {what} in the schema {schema}"
            raise SchemaMissing(f"{where}; run `balancesync init`")
        self._refuse_newer(current)

    async def upgrade(self, connection: Connection) -> int:
        """Bring the schema up to date, under a lock of its own; return the steps taken."""
        current = await self.current(connection)
        self._refuse_newer(current)
        if current >= self.newest:
            return 0
        key = lock_key("steps", self._database.config.schema)
        # Before the transaction, whose beginning makes this session see what others have created:
        # inside, the names that were looked up above in vain would still be missing.
        await connection.execute("SELECT pg_advisory_lock($1)", key)
        try:
            async with connection.transaction():
                return await self._take_missing(connection)
        finally:
            await connection.execute("SELECT pg_advisory_unlock($1)", key)

    async def _take_missing(self, connection: Connection) -> int:
        schema = self._database.schema
        current = await self.current(connection)
        # IF NOT EXISTS would ask for a right on the database even where the schema is there.
        if await connection.fetchval("SELECT to_regnamespace($1)", schema) is None:
            await connection.execute(f"CREATE SCHEMA {schema}")
        for number in range(current, self.newest):
            await connection.execute(self._steps[number].format(schema=schema))
            await connection.execute(
                f"INSERT INTO {schema}.steps (step) VALUES ($1)",  # noqa: S608  # quoted
                number + 1,
            )
        return max(self.newest - current, 0)

    def _refuse_newer(self, current: int) -> None:
        # Steps only add, so one step ahead is a rolling upgrade under way and still fits.
        if current >= self.newest + 2:
            raise SchemaTooNew
