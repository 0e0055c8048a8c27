"""One balance by its key: from Redis, else from PostgreSQL.

Reads that come together are read together. Redis is asked for a second at most, and once it hasn't
answered, no more until a probe has found it well again: then only the first readers have waited.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal

import structlog

from balancesync import table as tables
from balancesync.batches import Batches
from balancesync.config import Config, MappingConfig
from balancesync.database import Connection, Database, load_sql, quote
from balancesync.errors import (
    BalanceSyncError,
    PostgresUnavailable,
    RunFailed,
    SourceChanged,
    Transient,
    Unavailable,
)
from balancesync.history import History
from balancesync.mapping import InvalidKey, Mapping
from balancesync.model import RawBatch, RawValue
from balancesync.overview import Server
from balancesync.part import reading_of
from balancesync.printing import Print, printer, value_text
from balancesync.source import Source
from balancesync.state import State
from balancesync.statements import key_lookup
from balancesync.table import Table
from balancesync.times import exact_time_text

_REDIS_S: Final = 1.0
_POSTGRES_S: Final = 5.0
_AT_ONCE: Final = 500

log = structlog.get_logger("balancesync")

Key = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Balance:
    """A balance: its value columns as the column prints them, None for NULL.

    `as_of` is when Redis was read, or when the row last changed; None if the row doesn't say.
    """

    values: dict[str, str | None]
    source: Literal["redis", "postgres"]
    as_of: datetime | None


@dataclass(frozen=True, slots=True)
class Missing:
    """Neither has the balance; `detail` says what each has instead, in words."""

    detail: str


class Balances:
    """Reads the balances of all mappings. `state` tells, by the probes, how the servers are."""

    def __init__(self, config: Config, database: Database, source: Source, state: State) -> None:
        breaker = Breaker(config.redis.timeout, state)
        self._history = History(database, config.history)
        self._own_schema = config.postgres.schema
        self._configs = {each.name: each for each in config.mapping}
        self._shelves = {
            each.name: Shelf(each, database, source, state, breaker) for each in config.mapping
        }

    async def read(self, mapping: str, texts: Sequence[str]) -> Balance | Missing:
        """Give the balance that these texts of the key columns name.

        Raises KeyError (no such mapping), InvalidKey, PostgresUnavailable and what else `database`
        says when Redis doesn't know and PostgreSQL can't be asked.
        """
        return await self._shelves[mapping].read(tuple(texts))

    async def read_as_of(
        self, connection: Connection, mapping: str, texts: Sequence[str], moment: datetime
    ) -> Balance | Missing:
        """Give the balance as its row was at a moment.

        Raises KeyError, InvalidKey, HistoryGap and what else `database` says.
        """
        config = self._configs[mapping]
        Mapping(config).key_of(texts)
        await self._history.require(connection, config, moment)
        table = await tables.inspect(connection, config, self._own_schema)
        values = (
            await self._history.one_as_of(connection, config, table, texts, moment)
            if table.exists
            else None
        )
        if values is None:
            return Missing(f"PostgreSQL had no row at {exact_time_text(moment)}")
        return Balance(values, "postgres", moment)

    def forget(self) -> None:
        """Forget what is known of the tables."""
        for shelf in self._shelves.values():
            shelf.forget()

    async def close(self) -> None:
        """End what is under way."""
        for shelf in self._shelves.values():
            await shelf.close()


class Breaker:
    """Whether Redis is worth asking: not between a failure and the next probe that finds it well"""

    def __init__(self, timeout_s: float, state: State) -> None:
        self.timeout_s = min(timeout_s, _REDIS_S)
        self._state = state
        self._failed: Server | None = None

    @property
    def is_closed(self) -> bool:
        """Whether Redis may be asked."""
        found = self._state.redis
        return found.connected and found is not self._failed

    def open(self, why: str) -> None:
        """Ask no more until the next probe."""
        if self.is_closed:
            log.warning("balances are read from PostgreSQL: Redis doesn't answer", error=why)
        self._failed = self._state.redis


@dataclass(frozen=True, slots=True)
class _Read:
    """What a key held at a moment; `line` is its row, None where the key has to be parsed alone."""

    key: bytes
    value: RawValue
    line: bytes | None
    at: datetime

    @property
    def alone(self) -> RawBatch:
        """A batch of this key."""
        return RawBatch([self.key], [self.value], 1)


class Shelf:
    """The balances of one mapping."""

    def __init__(
        self,
        config: MappingConfig,
        database: Database,
        source: Source,
        state: State,
        breaker: Breaker,
    ) -> None:
        self._config = config
        self._database = database
        self._source = source
        self._state = state
        self._breaker = breaker
        self._columns = config.value_columns
        self._print: list[Print] = [printer(config.types[name]) for name in self._columns]
        self._in_redis = Batches(self._ask_redis, _AT_ONCE)
        self._in_postgres = Batches(self._ask_postgres, _AT_ONCE)
        self.forget()

    def forget(self) -> None:
        """Forget what is known of the table."""
        self._table: Table | None = None
        # Until the table is known, a value that is left out is no NULL.
        self._mapping = Mapping(self._config, frozenset())
        self._reading = reading_of(self._mapping)

    async def close(self) -> None:
        """End what is under way."""
        await self._in_redis.close()
        await self._in_postgres.close()

    async def read(self, texts: Key) -> Balance | Missing:
        """As `Balances.read`."""
        key = self._key(texts)
        in_redis = await self._from_redis(key)
        if isinstance(in_redis, Balance):
            return in_redis
        if not self._state.postgres.connected:
            raise PostgresUnavailable(self._state.postgres.error)
        try:
            row = await self._in_postgres.ask(texts, _POSTGRES_S)
        except TimeoutError:
            where = f"PostgreSQL at {self._database.address}"
            raise PostgresUnavailable(f"{where} didn't answer in {_POSTGRES_S:g} s") from None
        if row is None:
            return Missing(f"{in_redis}, and PostgreSQL has no row")
        return row

    def _key(self, texts: Key) -> bytes:
        key = self._mapping.key_of(texts)
        if not self._mapping.select([key], matched=False):
            raise InvalidKey("the mapping ignores this key")
        return key

    async def _from_redis(self, key: bytes) -> Balance | str:
        """The balance, or in words what there is instead."""
        breaker = self._breaker
        if not breaker.is_closed:
            return "Redis doesn't answer"
        try:
            read = await self._in_redis.ask(key, breaker.timeout_s)
        except TimeoutError:
            breaker.open(f"no answer in {breaker.timeout_s:g} s")
            return "Redis doesn't answer"
        except (SourceChanged, RunFailed) as error:
            # Another server answers by now, or the big hash is none: no reason to wait for a probe.
            log.warning("balances could not be read from Redis", error=str(error))
            return "Redis could not be read"
        except BalanceSyncError as error:
            breaker.open(str(error))
            return "Redis doesn't answer"
        line = read.line
        if line is None:
            batch = self._mapping.parse(read.alone)
            if batch.rejects and batch.rejects[0].reason == "missing_field" and self._table is None:
                await self._learn()
                batch = self._mapping.parse(read.alone)
            if batch.rejects:
                return f"Redis holds what was rejected as {batch.rejects[0].reason}"
            if not batch.count:
                return "Redis has no such key"
            line = batch.rows[:-1]
        fields = line.split(b"\t")[len(self._config.key_columns) :]
        printed = [show(field) for show, field in zip(self._print, fields, strict=True)]
        return Balance(dict(zip(self._columns, printed, strict=True)), "redis", read.at)

    async def _ask_redis(self, keys: list[bytes]) -> list[_Read]:
        found = await self._source.fetch(self._reading, keys)
        at = datetime.now(UTC)
        batch = self._mapping.parse(found)
        # Parsed together they cost a fraction; where one is no good, each tells for itself.
        whole = batch.count == len(keys)
        lines = batch.rows[:-1].split(b"\n") if whole else [None] * len(keys)
        records = zip(found.keys, found.values, lines, strict=True)
        return [_Read(key, value, line, at) for key, value, line in records]

    async def _learn(self) -> None:
        """Look the table up, if PostgreSQL can tell."""
        try:
            await self._known_table()
        except BalanceSyncError as error:
            log.debug("the table is not known yet", mapping=self._config.name, error=str(error))

    async def _known_table(self) -> Table:
        if self._table is not None:
            return self._table
        async with self._database.acquire() as connection:
            own = self._database.config.schema
            table = await tables.inspect(connection, self._config, own)
        if table.exists:
            self._table = table
            self._mapping = self._mapping.with_nullable(table.nullable(self._config))
        return table

    async def _ask_postgres(self, keys: list[Key]) -> list[Balance | None]:
        if self._table is not None:
            try:
                return await self._rows(keys)
            except Unavailable:
                raise
            except Transient as error:
                # Dropped or altered since it was looked up: the second time that's found out.
                log.info("a table is looked up anew", mapping=self._config.name, why=str(error))
        return await self._rows(keys)

    async def _rows(self, keys: list[Key]) -> list[Balance | None]:
        table = await self._known_table()
        if not table.exists:
            return [None] * len(keys)
        # Should it fail, because the table is another by now, it's looked up anew the next time.
        self._table = None
        arrays = [list(texts) for texts in zip(*keys, strict=True)]
        with self._database.translated(last=True):
            async with self._database.acquire() as connection:
                rows = await connection.fetch(self._sql(table), *arrays)
        self._table = table
        found: list[Balance | None] = [None] * len(keys)
        for row in rows:
            found[row["n"] - 1] = Balance(
                values=dict(zip(self._columns, list(row.values())[2:], strict=True)),
                source="postgres",
                as_of=_utc(row["synced_at"]),
            )
        return found

    def _sql(self, table: Table) -> str:
        config = self._config
        return load_sql("balances")["read"].format(
            synced_at=f"t.{quote(config.synced_at)}" if config.synced_at else "NULL::timestamptz",
            values=", ".join(
                f"{value_text(f't.{quote(name)}', config.types[name])} AS v{number}"
                for number, name in enumerate(self._columns, 1)
            ),
            table=table.sql_name,
            **key_lookup(config),
        )


def _utc(at: datetime | None) -> datetime | None:
    """A `synced_at`, which may be a timestamp without a zone, in UTC."""
    return at.replace(tzinfo=UTC) if at is not None and at.tzinfo is None else at
