"""One flush of live mode: a run over the keys that changed, in a session that is kept.

    lock -> fetch -> parse -> stage -> diff -> guard -> apply -> unlock

A full run holds the same lock from its first read to its last commit, and here keys are fetched
after it's taken: nothing read earlier is ever written over something read later. Just before
anything is applied, Redis is asked whether all of it still stands (`Tracking.settle`): what a
FLUSHALL took is told by then, and never looks like keys that were deleted one by one.
"""

import asyncio
from collections.abc import Iterable
from collections.abc import Mapping as Dictionary
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import Final

import structlog

from balancesync import table as tables
from balancesync.absences import Absences
from balancesync.apply import Applier
from balancesync.config import Config
from balancesync.database import Database, Steps
from balancesync.errors import Gap, MappingFailed
from balancesync.hashes import HashWatch
from balancesync.history import History
from balancesync.keyed import KeyedWriter
from balancesync.mapping import Mapping
from balancesync.model import Counts, Run, Stamp, exceeds
from balancesync.part import Part, RejectLog, reading_of, scan
from balancesync.records import Records, Remembered
from balancesync.report import spare_present
from balancesync.session import Session
from balancesync.source import Source
from balancesync.target import Span, Writer
from balancesync.tracking import Tracking
from balancesync.values import Unfit

_UNKNOWN: Final = Remembered()
_WARNINGS: Final = 10
_SAVE_S: Final = 5.0

log = structlog.get_logger("balancesync")


@dataclass(slots=True)
class OpenRun:
    """The run that flushes add to: one a minute or so, not one each."""

    run: Run
    rejects: RejectLog = field(default_factory=RejectLog)
    recorded: bool = False


@dataclass(slots=True)
class _Keyed:
    """A mapping's part of one flush: its keys, and those whose rows are left without one."""

    part: Part
    writer: KeyedWriter
    keys: list[bytes]
    unread: set[bytes]
    absent: list[bytes] = field(default_factory=list)


class Flusher:
    """Brings changed keys to PostgreSQL, in a session that is made anew after any failure."""

    def __init__(self, config: Config, database: Database, source: Source) -> None:
        self._hashes = HashWatch(config, database, source)
        self._absences = {each.name: Absences() for each in config.mapping}
        self._config = config
        self._database = database
        self._source = source
        self._records = Records(database)
        self._history = History(database, config.history)
        self._session: Session | None = None
        self._writers: dict[str, Writer] = {}
        self._server_since: datetime | None = None
        # PostgreSQL's time when it last told it, and the loop's when its answer was here.
        self._clock: tuple[datetime, float] | None = None

    def forget(self) -> None:
        """A full run has succeeded, or has to: absences are counted from now on.

        What a restart of PostgreSQL before that run has lost, it has brought back.
        """
        self._server_since = self._database.server_since
        for absences in self._absences.values():
            absences.forget()

    async def look(self, names: Iterable[str]) -> None:
        """Look at big hashes that have changed; raises Gap if one of them is gone, or much of it.

        It may be back, begun again from zero, when it is next read as a whole.
        """
        if found := await self._hashes.look(names):
            raise Gap(f"{found}, more than guard.max_loss allows")

    async def close(self) -> None:
        """Close the session; the next flush makes a new one."""
        session, self._session, self._clock = self._session, None, None
        if session is not None:
            await session.close()

    async def flush(
        self, changed: Dictionary[str, list[bytes]], tracking: Tracking, opened: OpenRun
    ) -> dict[str, Counts] | None:
        """Bring changed keys over, by mapping; those of one big hash are that hash as a whole.

        Gives the counts by mapping, None if another writer is at work or waits to be. Raises Gap:
        a full run has to follow; else what runs raise, when some of it may be applied.
        """
        try:
            with self._database.translated(last=True):
                session = self._session or await self._open()
                if not await session.yield_writer():
                    return None
                if not opened.recorded:
                    opened.run.redis_run_id = tracking.identity.run_id
                    await self._records.begin(session.connection, opened.run)
                    opened.recorded = True
                counts = await self._write(session, changed, tracking, opened)
                await session.unlock_writer()
        except BaseException:
            await self.close()
            raise
        return counts

    async def remember(self, done_until: float) -> datetime:
        """Write down that all which changed before this time of the loop is in PostgreSQL.

        Returns that time by PostgreSQL's clock. Raises Gap as `flush` does, BalanceSyncError.
        """
        loop = asyncio.get_running_loop()
        try:
            with self._database.translated(last=True):
                session = self._session or await self._open()
                if self._clock is None:
                    self._clock = await session.clock(), loop.time()
                told, at = self._clock
                # The answer took its time: so it's a little earlier than it need be, never later.
                until = told + timedelta(seconds=done_until - at)
                now = await self._records.save_followed(session.connection, until)
                self._clock = now, loop.time()
        except BaseException:
            await self.close()
            raise
        return until

    async def save(self, run: Run) -> None:
        """Record the run as it is now; once it has ended, nothing holds it open any more."""
        if self._session is None:
            await self._database.ask(partial(self._records.save, run=run), _SAVE_S)
            return
        with self._database.translated(last=True):
            await self._records.save(self._session.connection, run)
            if run.status != "running":
                await self._records.end(self._session.connection, run)

    async def _open(self) -> Session:
        session = self._session = await Session.open(self._database)
        connection = session.connection
        await Steps(self._database).check(connection)
        before, self._server_since = self._server_since, self._database.server_since
        if before not in (None, self._server_since):
            raise Gap("PostgreSQL was restarted or replaced: its last commits may be lost")
        found = []
        for number, config in enumerate(self._config.mapping):
            table = await tables.inspect(connection, config, self._config.postgres.schema)
            if not table.exists:
                raise Gap(f'mapping "{config.name}": the table {config.table} is gone')
            found.append((config, table))
            mapping = Mapping(config, nullable=table.nullable(config))
            make = Writer if config.member else KeyedWriter
            self._writers[config.name] = make(session, mapping, table, number)
        tables.refuse_shared(found)
        await session.prepare()
        for writer in self._writers.values():
            await writer.prepare()
        await session.plan_by_index()
        return session

    async def _write(
        self,
        session: Session,
        changed: Dictionary[str, list[bytes]],
        tracking: Tracking,
        opened: OpenRun,
    ) -> dict[str, Counts]:
        begun_at = asyncio.get_running_loop().time()
        known = await self._records.remembered(session.connection)
        await self._check_refusals(known)
        keyed = []
        counts: dict[str, Counts] = {}
        for name, keys in changed.items():
            writer = self._writers[name]
            remembered = known.get(name, _UNKNOWN)
            if isinstance(writer, KeyedWriter):
                keyed.append(await self._read(writer, keys, tracking, opened.rejects))
                await self._count_absent(session, keyed[-1], remembered)
                await self._judge(session, keyed[-1], remembered)
                continue
            try:
                counts[name] = await self._rescan(session, writer, tracking, opened, remembered)
            except MappingFailed as error:
                await self._pass_over(session, writer, opened.run, error)
        await tracking.settle()
        # Reading has looked at the server itself.
        tracking.prove(begun_at)
        stamp = await self._stamp(session, opened.run)
        for read in keyed:
            name = read.part.mapping.name
            counts[name] = await self._apply(session, read.part, stamp, opened.run)
            await self._note(session, read, known.get(name, _UNKNOWN))
            await read.part.writer.clear()
        await self._records.merge_keyed_rejects(
            session.connection,
            opened.run,
            stamp.at,
            {read.part.mapping.name: read.keys for read in keyed},
            staged=len(counts) < len(changed) or any(each.rejected for each in counts.values()),
        )
        return counts

    async def _check_refusals(self, known: Dictionary[str, Remembered]) -> None:
        """Raise Gap if a refusal stands on this Redis."""
        if all(each.refusal is None for each in known.values()):
            return
        now = (await self._source.identity()).sighting
        keys = {config.name: config.full_key for config in self._config.mapping}
        for name, each in known.items():
            if each.refuses(now.of_keys(keys[name]) if name in keys else None):
                raise Gap(f'the guard\'s refusal of mapping "{name}" stands: {each.refusal}')

    async def _read(
        self, writer: KeyedWriter, keys: list[bytes], tracking: Tracking, rejects: RejectLog
    ) -> _Keyed:
        mapping = writer.mapping
        part = Part(mapping, reading_of(mapping), writer)
        raw = await self._source.fetch(part.reading, keys, identity=tracking.identity)
        batch = mapping.parse(raw)
        part.read.vanished, part.read.snapped = batch.vanished, batch.snapped
        gone = [key for key, value in zip(keys, raw.values, strict=True) if value is None]
        await writer.stage_keys(batch, gone)
        rejects.take(mapping.name, batch.rejects)
        part.diff = await writer.diff()
        return _Keyed(part, writer, keys, set(gone), await writer.absent_keys())

    async def _count_absent(self, session: Session, read: _Keyed, remembered: Remembered) -> None:
        """Take in which keys rows have lost, and which have come back."""
        mapping, absences = read.part.mapping, self._absences[read.part.mapping.name]
        absences.begin(remembered)
        lost, back = set(read.absent), set(read.keys) - read.unread
        absences.come_back(back)
        # A key may be told to be gone more than once.
        read.part.diff.absent = len(lost - absences.gone)
        if remembered.baseline is not None and remembered.baseline.pruned:
            connection = session.connection
            # One that is there is pruned no more: when it goes again, it is lost.
            await self._records.withdraw_pruned(connection, mapping.name, _texts(mapping, back))
            pruned = await self._records.pruned(connection, mapping.name, _texts(mapping, lost))
            lost -= {mapping.print_key(texts) for texts in pruned}
        absences.gone.update(lost)

    async def _judge(self, session: Session, read: _Keyed, remembered: Remembered) -> None:
        """Raise Gap if rows have lost so many keys by now that only the guard may judge it."""
        part, limits, baseline = read.part, self._config.guard, remembered.baseline
        name = part.mapping.name
        if baseline is None:
            raise Gap(f'mapping "{name}": no full run has succeeded yet')
        absences = self._absences[name]
        lost = len(absences.gone)
        if exceeds(lost, limits.max_loss, absences.known):
            # What live mode has brought since is known, too; it takes a count of the table.
            rows = await part.writer.count_known(baseline.absent, remembered.known_at)
            counted = rows + len(absences.deleted) - baseline.pruned
            absences.known = max(absences.known, counted)
        known = absences.known
        if known <= 0 < lost and limits.max_loss < 1:
            raise Gap(
                f'mapping "{name}": keys that the last full run didn\'t know are gone: {lost:,}'
            )
        lost = min(lost, known)
        if exceeds(lost, limits.max_loss, known):
            await self._save_absences(session, name)
            doubt = f"{lost:,} of {known:,} known keys were seen to be gone"
            await self._records.save_doubt(session.connection, name, doubt)
            raise Gap(
                f'mapping "{name}": {lost:,} of {known:,} known keys are gone since the'
                f" last full run, more than guard.max_loss = {limits.max_loss:g}"
            )
        writes = part.diff.updated.rows + part.diff.deleted.rows
        if limits.max_change < 1 and exceeds(writes, limits.max_change, baseline.present):
            raise Gap(
                f'mapping "{name}": {writes:,} rows would be changed at once, more than'
                f" guard.max_change = {limits.max_change:g}"
            )

    async def _note(self, session: Session, read: _Keyed, remembered: Remembered) -> None:
        """Have the guard of a full run know, in whatever process, what this flush has done."""
        part = read.part
        absences = self._absences[part.mapping.name]
        if part.applied.deleted:
            absences.deleted |= set(read.absent) - set(await read.writer.absent_keys())
        is_first = remembered.gone is None and part.applied.rows
        if is_first or not absences.are_saved(remembered):
            await self._save_absences(session, part.mapping.name)

    async def _save_absences(self, session: Session, mapping: str) -> None:
        absences = self._absences[mapping]
        gone, deleted = len(absences.gone), len(absences.deleted)
        await self._records.save_gone(session.connection, mapping, gone, deleted)

    async def _stamp(self, session: Session, run: Run) -> Stamp:
        """To be asked when all has been read."""
        return Stamp(run.id, (await self._history.moment(session.connection)).at)

    async def _apply(self, session: Session, part: Part, stamp: Stamp, run: Run) -> Counts:
        if part.diff.deleted.rows:
            if await self._records.unfinished_restore(session.connection, part.mapping.name):
                part.diff.deleted = Span()
            else:
                spared = await spare_present(self._source, part.reading, part.mapping, part.writer)
                part.diff.deleted = await part.writer.deleted()
                part.diff.absent -= spared
        applier = Applier(part.writer, self._history, stamp, lambda done: None)
        await applier.run(part.diff)
        part.applied = applier.done
        for warning in applier.warnings:
            said = f'mapping "{part.mapping.name}": {warning}'
            if said not in run.warnings and len(run.warnings) < _WARNINGS:
                run.warnings.append(said)
        return part.tally(part.applied)

    async def _rescan(
        self,
        session: Session,
        writer: Writer,
        tracking: Tracking,
        opened: OpenRun,
        remembered: Remembered,
    ) -> Counts:
        """Read one big hash as a whole: nothing tells which of its fields changed."""
        mapping, connection = writer.mapping, session.connection
        await session.use_any_plan()
        part = Part(mapping, reading_of(mapping), writer)
        await scan(part, self._source, tracking.identity, opened.rejects, lambda progress: None)
        stamp = await self._stamp(session, opened.run)
        part.diff = await writer.diff()
        refusal = (await part.judge(remembered, self._config.guard, None)).refusal
        if refusal:
            if refusal.kind == "loss":
                doubt = f"the big hash was seen with {part.present:,} of its fields"
                await self._records.save_doubt(connection, mapping.name, doubt)
            raise Gap(f'mapping "{mapping.name}": {refusal.reason}')
        await tracking.settle()
        counts = await self._apply(session, part, stamp, opened.run)
        # Those of the whole table would be counted anew each time.
        counts.absent = counts.deleted
        names = [mapping.name]
        async with session.transaction():
            if part.present > remembered.known:
                await self._records.save_seen(connection, mapping.name, part.baseline)
            await self._records.merge_rejects(connection, opened.run, stamp.at, names, None)
        await writer.clear()
        await session.plan_by_index()
        return counts

    async def _pass_over(
        self, session: Session, writer: Writer, run: Run, error: MappingFailed
    ) -> None:
        """Go on without one big hash that can't be read, and say so once in each recorded run.

        Whoever makes it a hash again changes it, and so has it read again.
        """
        await writer.clear()
        await session.plan_by_index()
        warning = f'mapping "{writer.mapping.name}": {error}'
        if warning not in run.warnings:
            run.warnings.append(warning)
            log.warning("a mapping can't be read", mapping=writer.mapping.name, error=str(error))


def _texts(mapping: Mapping, keys: set[bytes]) -> list[tuple[str, ...]]:
    """The texts of keys' columns; a key that can't be one of the mapping's has none."""
    split = map(mapping.split_key, keys)
    return [texts for texts in split if not isinstance(texts, Unfit)]
