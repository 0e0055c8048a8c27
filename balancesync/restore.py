"""The road back: one attempt at putting PostgreSQL's rows into Redis.

    rows -> render -> parse -> create what is missing -> compare the rest -> keep, or replace

What goes to Redis is read by the mapping itself first: nothing is written that a sync would reject
or take for another row. While Redis works on one page, the next is made.
"""

from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Final, cast

from balancesync import table as tables
from balancesync.apply import Applied
from balancesync.config import Config, MappingConfig
from balancesync.database import Database
from balancesync.errors import RightMissing, RunFailed, SourceChanged, TargetMismatch
from balancesync.mapping import Mapping
from balancesync.model import RawValue, Request, Run, exceeds
from balancesync.part import Progress
from balancesync.pipeline import begin, chosen_mappings
from balancesync.records import Records
from balancesync.rendering import Value
from balancesync.report import Report
from balancesync.rows import Rows, Selection, restorable
from balancesync.session import Session
from balancesync.source import Source
from balancesync.table import Table
from balancesync.target import Op
from balancesync.values import show
from balancesync.wanted import Part, Wanted
from balancesync.writing import Sent, Writing

# A record may change between being read and being replaced, again and again.
_TRIES: Final = 5


@dataclass(slots=True)
class _Outcome:
    """What reading the records that are there has told, as places."""

    missing: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    # Those to be given another value: what they hold, and what they are to hold.
    differing: list[int] = field(default_factory=list)
    seen: list[Value] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    unchanged: int = 0


class Restore:
    """One attempt at a restore; made and driven as `pipeline.Pipeline` is."""

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
        self._run = run
        self._request = request
        self._committed = committed
        self._on_progress = on_progress
        self._on_alive = on_alive
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
                for part in parts:
                    try:
                        await self._restore(part)
                    finally:
                        self._tally(part)
                await self._check_size(parts)
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
                    " nothing to restore from"
                )
            mapping = Mapping(config, nullable=table.nullable(config))
            rows = Rows(session, config, self._selection(config, table), number)
            parts.append(Part(mapping, rows))
        return parts

    def _selection(self, config: MappingConfig, table: Table) -> Selection:
        """Where the rows of a mapping come from."""
        column = config.synced_at if config.mode == "update" else ""
        if column and not table.columns[column].may_select:
            raise RightMissing(
                f'mapping "{config.name}": this role lacks SELECT ({column}) on {config.table},'
                " which tells the rows that balancesync has written; GRANT it, see docs/security.md"
            )
        return Selection(table.sql_name, restorable(config))

    async def _restore(self, part: Part) -> None:
        progress = Progress("restore", part.mapping.name)
        self._on_progress(progress)
        progress.total = await part.rows.put_aside()
        if not progress.total:
            self._warn(f'mapping "{part.mapping.name}": the table has no row to restore')
        under_way: tuple[Wanted, Sent] | None = None
        async with (
            self._source.writing(part.reading) as writing,
            aclosing(part.rows.pages()) as pages,
        ):
            async for page in pages:
                wanted = part.want(page)
                if not self._writes:
                    await self._settle(part, writing, wanted)
                else:
                    sent = await writing.create(wanted.keys, wanted.values)
                    if under_way:
                        await self._created(part, writing, *under_way)
                    under_way = wanted, sent
                progress.done = part.counts.scanned
                self._on_progress(progress)
            if under_way:
                await self._created(part, writing, *under_way)

    async def _created(self, part: Part, writing: Writing, wanted: Wanted, sent: Sent) -> None:
        done = await sent.done()
        part.counts.inserted += sum(done)
        there = [at for at, created in enumerate(done) if not created]
        if there:
            await self._settle(part, writing, wanted.pick(there))

    async def _settle(self, part: Part, writing: Writing, wanted: Wanted) -> None:
        """See to records that are there; of a dry run, to all."""
        for _ in range(_TRIES):
            found = self._compare(part, wanted, await writing.read(wanted.keys))
            part.counts.unchanged += found.unchanged
            self._keep(part, wanted, found.kept)
            if not self._writes:
                part.counts.inserted += len(found.missing)
                part.counts.updated += len(found.differing)
                return
            again = await self._write(part, writing, wanted, found)
            if not again:
                return
            wanted = wanted.pick(again)
        self._keep(part, wanted, range(len(wanted.keys)))

    def _compare(self, part: Part, wanted: Wanted, seen: list[RawValue]) -> _Outcome:
        found, lines = _Outcome(), part.lines(wanted.keys, seen)
        for at, (raw, line) in enumerate(zip(seen, lines, strict=True)):
            op: Op = "k"
            if raw is None:
                found.missing.append(at)
                op = "i"
            elif part.is_same(line, wanted.lines[at]):
                found.unchanged += 1
                continue
            else:
                value = part.replacement(raw, wanted.values[at])
                if self._request.overwrite and value is not None:
                    found.differing.append(at)
                    found.seen.append(cast(Value, raw))
                    found.values.append(value)
                    op = "u"
                else:
                    found.kept.append(at)
            if not self._writes:
                part.show(op, wanted.keys[at], line, raw, wanted.lines[at])
        return found

    async def _write(
        self, part: Part, writing: Writing, wanted: Wanted, found: _Outcome
    ) -> list[int]:
        """Create and replace; return the places of what has changed since it was read."""
        missing, differing = wanted.pick(found.missing), wanted.pick(found.differing)
        creating = await writing.create(missing.keys, missing.values)
        replacing = await writing.replace(differing.keys, found.seen, found.values)
        created, replaced = await creating.done(), await replacing.done()
        part.counts.inserted += sum(created)
        part.counts.updated += sum(replaced)
        places = zip((*found.missing, *found.differing), (*created, *replaced), strict=True)
        return [at for at, done in places if not done]

    def _keep(self, part: Part, wanted: Wanted, places: Sequence[int]) -> None:
        if places:
            part.counts.kept += len(places)
            part.first_kept = part.first_kept or wanted.keys[places[0]]

    def _tally(self, part: Part) -> None:
        """What an earlier attempt has written is unchanged to this one: it counts once."""
        name, counts = part.mapping.name, replace(part.counts)
        earlier = self._committed.get(name, Applied())
        now = Applied(inserted=counts.inserted, updated=counts.updated)
        self._committed[name] = earlier + now
        inserted = min(earlier.inserted, counts.unchanged)
        updated = min(earlier.updated, counts.unchanged - inserted)
        counts.inserted += inserted
        counts.updated += updated
        counts.unchanged -= inserted + updated
        self._run.mappings[name] = counts

    async def _check_size(self, parts: Sequence[Part]) -> None:
        """Raise SourceChanged if what was put into Redis has gone meanwhile, as by FLUSHALL."""
        scattered = [part.counts for part in parts if not part.reading.member_key]
        put = sum(each.inserted + each.updated + each.unchanged + each.kept for each in scattered)
        if not self._writes or not put:
            return
        there = sum((await self._source.dbsize()).values())
        if exceeds(put - there, self._config.guard.max_loss, put):
            raise SourceChanged(
                f"Redis fell to {there:,} keys while {put:,} were restored: it is emptied by others"
            )

    async def _conclude(
        self, session: Session, parts: Sequence[Part], close: Callable[[], None]
    ) -> None:
        """Record the outcome, and with a success that no refusal of these mappings stands."""
        run, records = self._run, Records(self._database)
        for part in parts:
            if part.counts.rejected:
                self._warn(
                    f'mapping "{part.mapping.name}": {part.counts.rejected:,} rows can\'t be keys'
                    f" of Redis that a sync would take; the first is {part.first_reject}"
                )
        kept = self._kept(parts)
        if kept and self._writes:
            raise RunFailed(kept)
        if kept:
            self._warn(kept)
        self.reports = [] if self._writes else [part.report for part in parts]
        run.status = "succeeded"
        close()
        if not self.recorded:
            return
        async with session.transaction():
            if self._writes:
                names = [part.mapping.name for part in parts]
                await records.lift_refusals(session.connection, names)
            await records.save(session.connection, run)

    def _kept(self, parts: Sequence[Part]) -> str:
        """What is to be said of records that were left as they are, if any."""
        kept = [part for part in parts if part.counts.kept]
        if not kept:
            return ""
        told = "; ".join(
            f'mapping "{part.mapping.name}": {part.counts.kept:,} keys hold another value and'
            f" {'were left' if self._writes else 'would be left'}, the first is"
            f" {show(part.first_kept)}"
            for part in kept
        )
        if self._request.overwrite:
            return f"{told}. They hold another type, or a field where the row has NULL"
        return (
            f"{told}. See them with `balancesync restore --dry-run`; if PostgreSQL is right, run it"
            " with --overwrite, if Redis is, `balancesync sync`"
        )

    def _warn(self, warning: str) -> None:
        # A run may be attempted several times, and then meet the same thing again.
        if warning not in self._run.warnings:
            self._run.warnings.append(warning)
