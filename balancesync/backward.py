"""One attempt at a run that goes the other way: PostgreSQL's rows, and Redis' records for them."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from balancesync import table as tables
from balancesync.attempt import Attempt
from balancesync.config import MappingConfig
from balancesync.database import quote
from balancesync.errors import RightMissing, RunFailed, TargetMismatch
from balancesync.mapping import Mapping
from balancesync.nodes import Identity
from balancesync.rows import Rows, Selection
from balancesync.session import Session
from balancesync.table import Table
from balancesync.wanted import Part


class Backward(Attempt):
    """One attempt at a restore or prune."""

    # What there is nothing of without a table.
    purpose: ClassVar[str]

    # Who Redis was before the first record was seen to.
    identity: Identity

    async def _proceed(self, session: Session, close: Callable[[], None]) -> None:
        self.has_read = True
        parts = await self._parts(session)
        self.identity = await self._meet(session)
        for part in parts:
            try:
                await self._work(session, part)
            finally:
                self._tally(part)
        await self._conclude(session, parts, close)

    async def _parts(self, session: Session) -> list[Part]:
        parts = []
        for number, config in enumerate(self._chosen()):
            table = await tables.inspect(session.connection, config, self._config.postgres.schema)
            if not table.exists:
                raise TargetMismatch(
                    f'mapping "{config.name}": the table {config.table} does not exist: there is'
                    f" nothing to {self.purpose}"
                )
            selection = await self._select(session, config, table)
            mapping = self._read_by(Mapping(config, nullable=table.nullable(config)))
            parts.append(Part(mapping, Rows(session, config, selection, number)))
        return parts

    def _read_by(self, mapping: Mapping) -> Mapping:
        """What reads the records."""
        return mapping

    @abstractmethod
    async def _select(self, session: Session, config: MappingConfig, table: Table) -> Selection:
        """Which of a mapping's rows it is about; raises if it isn't possible."""

    @abstractmethod
    async def _work(self, session: Session, part: Part) -> None:
        """See to one mapping, and count in `part.counts`."""

    @abstractmethod
    def _tally(self, part: Part) -> None:
        """Put a mapping's counts into the run, with those of earlier attempts."""

    async def _judge(self, session: Session, parts: Sequence[Part]) -> str:
        """What makes the run no success although all is done, if anything; may warn, or raise."""
        return ""

    @abstractmethod
    async def _remember(self, session: Session, parts: Sequence[Part]) -> None:
        """Record what follows from success, in its transaction."""

    async def _conclude(
        self, session: Session, parts: Sequence[Part], close: Callable[[], None]
    ) -> None:
        problem = await self._judge(session, parts)
        for part in parts:
            if part.counts.rejected:
                self._warn(
                    f'mapping "{part.mapping.name}": {part.counts.rejected:,} rows can\'t be keys'
                    f" of Redis that a sync would take; the first is {part.first_reject}"
                )
        if problem:
            raise RunFailed(problem)
        self.reports = [] if self._writes else [part.report for part in parts]
        self._run.status = "succeeded"
        close()
        if self.recorded:
            async with session.transaction():
                if self._writes:
                    await self._remember(session, parts)
                await self._records.save(session.connection, self._run)


def require_synced_at(config: MappingConfig, table: Table) -> None:
    """Raise RightMissing unless it may be read when balancesync has written a row."""
    if not table.columns[config.synced_at].may_select:
        raise RightMissing(
            f'mapping "{config.name}": this role lacks SELECT ({config.synced_at}) on'
            f" {config.table}, which tells the rows that balancesync has written;"
            f" {table.grant(f'SELECT ({quote(config.synced_at)})')}"
        )
