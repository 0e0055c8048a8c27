"""One attempt at a run: what all kinds of them share. `sync` makes them, one after the other."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from balancesync.apply import Earlier
from balancesync.config import Config, MappingConfig
from balancesync.continuity import Sighting
from balancesync.database import Database, Steps
from balancesync.errors import ConfigError, LockHeld, RunFailed
from balancesync.model import Request, Run
from balancesync.nodes import Identity
from balancesync.part import Progress
from balancesync.records import Records
from balancesync.report import Report
from balancesync.session import Session
from balancesync.source import Source


@dataclass(frozen=True, slots=True)
class Work:
    """What the attempts of one run have in common.

    `committed` is what they applied, by mapping. `on_progress` is called at least once a batch;
    what it raises ends the attempt there. `ending` is that, once it's known, for whoever waits.
    `on_alive` is called during a long statement, whenever PostgreSQL proves to be at work on it.
    `settle` waits for live mode to have brought over what changed before; it returns why that may
    not be so, None if it is.
    """

    config: Config
    database: Database
    source: Source
    run: Run
    request: Request
    on_progress: Callable[[Progress], None]
    on_alive: Callable[[], None]
    ending: asyncio.Future[RunFailed]
    settle: Callable[[], Awaitable[str | None]]
    committed: dict[str, Earlier] = field(default_factory=dict)


class Attempt(ABC):
    """One attempt. `recorded` tells whether PostgreSQL knows of the run, `has_read` whether a key
    may have been read: what changes from then on may be missed. `reports` is what a dry run or
    verify found.
    """

    def __init__(self, work: Work) -> None:
        self.recorded = False
        self.has_read = False
        self.reports: list[Report] = []
        self._config = work.config
        self._database = work.database
        self._source = work.source
        self._run = work.run
        self._request = work.request
        self._committed = work.committed
        self._on_progress = work.on_progress
        self._on_alive = work.on_alive
        self._ending = work.ending
        self._settle = work.settle
        self._records = Records(work.database)
        self._writes = work.request.mode == "apply"
        # What Redis said of itself before anything was read from it.
        self._seen = Sighting(())

    async def execute(self, wait_s: float, close: Callable[[], None]) -> None:
        """Do it all; `close` stamps the run's end just before its success is recorded.

        Raises BalanceSyncError: Transient ones may be tried again.
        """
        with self._database.translated(last=True):
            session = await Session.open(self._database, self._on_alive, self._ending)
            try:
                await self._begin(session, wait_s)
                await self._proceed(session, close)
            finally:
                await session.close()

    @abstractmethod
    async def _proceed(self, session: Session, close: Callable[[], None]) -> None:
        """Do what the run is for, from its first look at the tables to its record."""

    async def _begin(self, session: Session, wait_s: float) -> None:
        """Bring the schema up to date and take the writer's lock, if it's to write; record it."""
        connection, steps = session.connection, Steps(self._database)
        if self._writes:
            await steps.upgrade(connection)
            await self._lock_writer(session, wait_s)
            await self._records.mark_interrupted(connection)
        elif self._run.mode == "verify" or await steps.current(connection):
            await steps.check(connection)
        # A dry run may come before there is a schema to record it in.
        self.recorded = bool(await steps.current(connection))
        if self.recorded:
            await self._records.begin(connection, self._run)

    async def _lock_writer(self, session: Session, wait_s: float) -> None:
        try:
            await session.lock_writer(wait_s, lambda: self._on_progress(Progress("lock")))
        except LockHeld:
            writer = await self._records.writer(session.connection)
            who = f": {writer}" if writer else ""
            by_command = self._request.trigger == "cli"
            then = "try again later or raise `--wait`" if by_command else "this run is postponed"
            what = f"Another balancesync is writing to this database{who}"
            raise LockHeld(f"{what}; {then}") from None

    async def _meet(self, session: Session) -> Identity:
        """Look who Redis is; another one than the last run's is worth a warning."""
        await self._source.listen()
        if self._writes:
            moment, at = await self._records.moment(session.connection)
        else:
            moment, at = None, (await session.clock()).timestamp()
        identity = await self._source.identity()
        self._seen = replace(identity.sighting, moment=moment, at=at)
        known = session.connection if self.recorded else None
        await self._records.meet(known, self._run, identity.run_id)
        return identity

    async def _look_again(self, session: Session) -> Sighting:
        """What Redis says of itself now."""
        at = (await session.clock()).timestamp()
        return replace((await self._source.identity()).sighting, at=at)

    def _chosen(self) -> list[MappingConfig]:
        """The mapping that is asked for, or all; raises ConfigError."""
        name = self._request.mapping
        chosen = [each for each in self._config.mapping if name in (None, each.name)]
        if not chosen:
            raise ConfigError(f'there is no mapping "{name}" in the configuration')
        return chosen

    def _warn(self, warning: str) -> None:
        # A run may be attempted several times, and then meet the same thing again.
        if warning not in self._run.warnings:
            self._run.warnings.append(warning)
