"""One attempt at a run that goes the other way: PostgreSQL's rows, and Redis' records for them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from balancesync import table as tables
from balancesync.apply import Applied
from balancesync.config import Config, MappingConfig
from balancesync.database import Database
from balancesync.errors import RightMissing, RunFailed, TargetMismatch
from balancesync.mapping import Mapping
from balancesync.model import Request, Run
from balancesync.nodes import Identity
from balancesync.part import Progress
from balancesync.pipeline import begin, chosen_mappings
from balancesync.records import Records
from balancesync.report import Report
from balancesync.rows import Rows, Selection
from balancesync.session import Session
from balancesync.source import Source
from balancesync.table import Table
from balancesync.wanted import Part


class Attempt(ABC):
    """Made and driven as `pipeline.Pipeline` is."""

    # What there is nothing of without a table.
    purpose: ClassVar[str]

    def __init__(
        self,
        config: Config,
        database: Database,
        source: Source,
        *,
        run: Run,
        request: Request,
        committed: dict[str, Applied],
        on_progress: Callable[[Progress], None],
        on_alive: Callable[[], None],
    ) -> None:
        self.recorded = False
        self.has_read = False
        self.reports: list[Report] = []
        self._config = config
        self._database = database
        self._source = source
        self._records = Records(database)
        self._run = run
        self._request = request
        self._committed = committed
        self._on_progress = on_progress
        self._on_alive = on_alive
        self._identity: Identity | None = None
        self._writes = request.mode == "apply"

    async def execute(self, wait_s: float, close: Callable[[], None]) -> None:
        """Do it all; `close` stamps the run's end just before its success is recorded.

        Raises BalanceSyncError: Transient ones may be tried again.
        """
        session = await Session.open(self._database, self._on_alive)
        try:
            with self._database.translated(last=True):
                self.recorded = await begin(
                    self._database,
                    session,
                    self._run,
                    wait_s,
                    lambda: self._on_progress(Progress("lock")),
                )
                self.has_read = True
                parts = await self._parts(session)
                self._identity = await self._source.identity()
                known = session.connection if self.recorded else None
                await self._records.meet(known, self._run, self._identity.run_id)
                for part in parts:
                    try:
                        await self._work(session, part)
                    finally:
                        self._tally(part)
                await self._conclude(session, parts, close)
        finally:
            await session.close()

    async def _parts(self, session: Session) -> list[Part]:
        parts = []
        for number, config in enumerate(chosen_mappings(self._config, self._request.mapping)):
            table = await tables.inspect(session.connection, config)
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

    async def _judge(self, parts: Sequence[Part]) -> str:
        """What makes the run no success although all is done, if anything; may warn, or raise."""
        return ""

    @abstractmethod
    async def _remember(self, session: Session, parts: Sequence[Part]) -> None:
        """Record what follows from success, in its transaction."""

    async def _conclude(
        self, session: Session, parts: Sequence[Part], close: Callable[[], None]
    ) -> None:
        problem = await self._judge(parts)
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

    def _warn(self, warning: str) -> None:
        # A run may be attempted several times, and then meet the same thing again.
        if warning not in self._run.warnings:
            self._run.warnings.append(warning)


def require_synced_at(config: MappingConfig, table: Table) -> None:
    """Raise RightMissing unless it may be read when balancesync has written a row."""
    if not table.columns[config.synced_at].may_select:
        raise RightMissing(
            f'mapping "{config.name}": this role lacks SELECT ({config.synced_at}) on'
            f" {config.table}, which tells the rows that balancesync has written; GRANT it, see"
            " docs/security.md"
        )
