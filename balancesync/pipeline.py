"""One attempt at a run: scan -> parse -> stage -> diff -> guard -> apply, or report.

Dry run and verify are the same attempt stopped after diff.
"""

import itertools
from collections.abc import Callable, Sequence
from collections.abc import Mapping as Dictionary
from dataclasses import replace
from datetime import datetime
from typing import Final

import structlog

from balancesync import table as tables
from balancesync.apply import Applier, Earlier
from balancesync.attempt import Attempt, Work
from balancesync.continuity import Sighting
from balancesync.drift import Comparison, Found
from balancesync.errors import MappingFailed, Refused, RunFailed, Shrunk, TargetMismatch
from balancesync.history import History
from balancesync.mapping import Mapping
from balancesync.model import WOULD_BE_REFUSED, Counts, Refusal, Stamp, exceeds
from balancesync.nodes import Identity
from balancesync.part import Part, Progress, RejectLog, reading_of, scan
from balancesync.records import Remembered, elsewhere
from balancesync.report import describe, spare_present
from balancesync.session import Session
from balancesync.sizes import Sizes, seen_lost
from balancesync.target import Span, Writer

_CLOCK_SLACK_S: Final = 1.0
# The share of the known keys whose loss is told, though it's followed: several such ones add up.
_NOTABLE_LOSS: Final = 0.1

log = structlog.get_logger("balancesync")


class Pipeline(Attempt):
    """One attempt at a sync or verify."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self._history = History(work.database, work.config.history)
        self._rejects = RejectLog()
        self._failures: list[str] = []
        self._sizes = Sizes({})
        self._at = work.run.started_at

    async def _proceed(self, session: Session, close: Callable[[], None]) -> None:
        if await self._is_recent(session):
            self._run.status = "skipped"
            close()
            await self._records.save(session.connection, self._run)
            return
        parts = await self._parts(session)
        identity = await self._meet(session)
        await self._read(session, parts, identity)
        if self._writes:
            await self._write(session, parts)
            await self._forget_changes(session)
        else:
            await self._report(session, parts)
        await self._conclude(session, parts, close)

    async def _read(self, session: Session, parts: list[Part], identity: Identity) -> None:
        """Scan, stage and diff; a mapping that can't be read as a whole leaves `parts`."""
        self._sizes = await Sizes.ask(self._source, [part.mapping for part in parts])
        self.has_read = True
        for part in list(parts):
            try:
                await scan(part, self._source, identity, self._rejects, self._on_progress)
            except MappingFailed as error:
                self._failures.append(f'mapping "{part.mapping.name}": {error}')
                parts.remove(part)
        self._at = await self._moment(session)
        for part in parts:
            self._on_progress(Progress("diff", part.mapping.name))
            part.diff = await part.writer.diff()

    async def _moment(self, session: Session) -> datetime:
        """The time that all this run writes has in common."""
        if not self._writes:
            return await session.clock()
        moment = await self._history.moment(session.connection)
        if moment.behind_s > _CLOCK_SLACK_S:
            self._warn(
                f"PostgreSQL's clock is {moment.behind_s:.0f} s behind the time of the last change"
                " in the history: it has gone back; changes get later times than it until then"
            )
        return moment.at

    async def _write(self, session: Session, parts: Sequence[Part]) -> None:
        await self._judge(session, parts)
        try:
            for part in parts:
                await self._apply(session, part)
            await session.use_any_plan()
            counts = {part.mapping.name: await self._counts(part) for part in parts}
        except BaseException:
            self._tally_partly(parts)
            raise
        finally:
            for part in parts:
                name = part.mapping.name
                self._committed[name] = self._earlier(name).plus(part.applied, self._at)
        self._run.mappings.update(counts)

    async def _counts(self, part: Part) -> Counts:
        earlier = self._earlier(part.mapping.name)
        standing = await part.writer.count_standing(earlier.moments) if earlier.stored else 0
        return part.tally_again(part.applied, earlier, standing)

    async def _is_recent(self, session: Session) -> bool:
        interval = self._config.schedule.min_interval
        if self._request.job != "sync" or self._request.force or not interval or not self.recorded:
            return False
        last = await self._records.last_success(session.connection)
        age = (await session.clock() - last.started_at).total_seconds() if last else interval
        # A success of the future is what a clock that was set back leaves: wait for that, and
        # nothing would run for as long.
        if abs(age) >= interval:
            return False
        self._run.warnings.append(
            f"the last success is {age:.0f} s old, younger than schedule.min_interval ="
            f" {interval:g}; --force runs all the same"
        )
        return True

    async def _parts(self, session: Session) -> list[Part]:
        """The mappings asked for, each with its table checked and its staging table made."""
        found, own = [], self._config.postgres.schema
        for config in self._chosen():
            table = await tables.inspect(session.connection, config, own)
            if not table.exists and self._writes:
                table = await tables.create(session.connection, config, own)
                log.info("table created", mapping=config.name, table=table.sql_name)
            elif not table.exists and self._request.mode == "verify":
                raise TargetMismatch(
                    f'mapping "{config.name}": the table {config.table} does not exist yet;'
                    " `balancesync sync` creates it"
                )
            found.append((config, table))
        tables.refuse_shared(found)
        await session.prepare()
        parts = []
        for number, (config, table) in enumerate(found):
            mapping = Mapping(config, nullable=table.nullable(config))
            writer = Writer(session, mapping, table, number)
            await writer.prepare()
            parts.append(Part(mapping, reading_of(mapping), writer))
        return parts

    async def _judge(self, session: Session, parts: Sequence[Part]) -> None:
        """Ask the guard about every mapping; raises Refused unless losses are accepted."""
        known = await self._records.remembered(session.connection) if self.recorded else {}
        # It may have been emptied during the run.
        now = await self._look_again(session)
        self._seen = self._seen.ended(now)
        refusals, limits = [], self._config.guard
        for part in parts:
            remembered = known.get(part.mapping.name, Remembered())
            here = now.of_keys(part.mapping.config.full_key)
            # A big hash is one key among others: the one that is lacking may be just that.
            lacking = 0 if part.mapping.config.member else limits.max_loss
            doubt = remembered.continuity(here, lacking).doubt
            stands = remembered.refuses(here)
            if remembered.refusal is not None and not stands:
                self._warn(elsewhere(part.mapping.name, remembered.refusal))
            judged = await part.judge(remembered, limits, doubt, standing=stands)
            if judged.refusal:
                refusals.append(judged.refusal)
            elif not part.present:
                self._warn(f'mapping "{part.mapping.name}": Redis has no key of it')
            elif exceeds(judged.lost, _NOTABLE_LOSS, judged.known):
                self._warn(
                    f'mapping "{part.mapping.name}": {judged.lost:,} of {judged.known:,} known keys'
                    f" are gone; guard.max_loss = {limits.max_loss:g} allows it"
                )
        await self._check_size(session, parts)
        sentences = [f'mapping "{each.mapping}": {each.reason}' for each in refusals]
        if self._request.accept_loss or not self._writes:
            said = "accepted" if self._request.accept_loss else WOULD_BE_REFUSED
            for sentence in sentences:
                self._warn(f"{said}: {sentence}")
        elif refusals:
            self._tally_partly(parts)
            for refusal in refusals:
                if refusal.kind == "loss":
                    await self._save_refusal(session, refusal, known, now)
            raise Refused(
                "; ".join(sentences) + ". Nothing was written: bring the keys back, as by"
                " `balancesync restore` (--overwrite for those that came back changed), or run"
                " `balancesync sync --accept-loss` if this is as it should be"
            )

    async def _save_refusal(
        self,
        session: Session,
        refusal: Refusal,
        known: Dictionary[str, Remembered],
        now: Sighting,
    ) -> None:
        name = refusal.mapping
        key = next(each.full_key for each in self._config.mapping if each.name == name)
        before = known.get(name, Remembered())
        await self._records.save_refusal(
            session.connection, name, refusal.reason, before, now.of_keys(key)
        )

    async def _check_size(self, session: Session, parts: Sequence[Part]) -> None:
        """Raise Shrunk if Redis has lost much since the reading began: that is none to judge.

        Where the mapping's own keys were among what went, whoever makes them again before the next
        attempt reads must not hide it.
        """
        before, limit = self._sizes, self._config.guard.max_loss
        now = await Sizes.ask(self._source, [part.mapping for part in parts])
        fall = before.fall_to(now, limit)
        if fall is None:
            return
        for part in parts if self._writes and not self._request.accept_loss else ():
            if doubt := await seen_lost(part, self._source, before, now, limit):
                await self._records.save_doubt(session.connection, part.mapping.name, doubt)
        raise Shrunk(
            f"{fall} while it was read, and guard.max_loss = {limit:g}: nothing was written, and"
            " the run has to read again while nobody removes keys"
        )

    async def _apply(self, session: Session, part: Part) -> None:
        if part.diff.deleted.rows:
            await self._spare(session, part)
        total = part.would_apply.rows
        progress = Progress("apply", part.mapping.name, 0, total)

        def between(done: int) -> None:
            progress.done = done
            self._on_progress(progress)

        applier = Applier(part.writer, self._history, Stamp(self._run.id, self._at), between)
        part.applied = applier.done
        await applier.run(part.diff)
        for warning in applier.warnings:
            self._warn(f'mapping "{part.mapping.name}": {warning}')
        await part.writer.forget_altered()

    async def _forget_changes(self, session: Session) -> None:
        """Delete what is beyond `history.keep_days`, also once no more is kept."""
        forgotten = 0
        while self._history.is_full_slice(
            gone := await session.watch(self._history.forget(session.connection))
        ):
            forgotten += gone
            self._on_progress(Progress("forget", done=forgotten))

    async def _spare(self, session: Session, part: Part) -> None:
        name = part.mapping.name
        if await self._records.unfinished_restore(session.connection, name):
            self._warn(f'mapping "{name}": nothing is deleted until its restore has succeeded')
            part.diff.deleted = Span()
            return
        spared = await spare_present(self._source, part.reading, part.mapping, part.writer)
        part.diff.absent -= spared
        part.diff.deleted = await part.writer.deleted()

    async def _conclude(
        self, session: Session, parts: Sequence[Part], close: Callable[[], None]
    ) -> None:
        """Record the outcome; of an apply run with its rejects and what the guard must remember,
        all in one transaction. Raises RunFailed if what was applied is no success."""
        run, connection = self._run, session.connection
        problem = self._problem(parts)
        if not problem:
            run.status = "succeeded"
            close()
        if self.recorded:
            async with session.transaction():
                if self._writes:
                    await self._remember(session, parts, success=not problem)
                await self._records.save(connection, run)
        if problem:
            raise RunFailed(problem)

    async def _remember(self, session: Session, parts: Sequence[Part], *, success: bool) -> None:
        run, connection = self._run, session.connection
        names = [part.mapping.name for part in parts]
        at = await session.clock()
        # Of mappings that are configured no more, nobody would ever say that a reject is healed.
        configured = [config.name for config in self._config.mapping] if run.full else None
        await session.watch(self._records.merge_rejects(connection, run, at, names, configured))
        await self._records.forget_old(connection, run.id)
        if success and (run.full or self._request.accept_loss):
            baselines = {part.mapping.name: part.baseline for part in parts}
            seen = {
                part.mapping.name: self._seen.of_keys(part.mapping.config.full_key)
                for part in parts
            }
            # Where the clock was set back, times of rows may lie ahead of it.
            await self._records.save_baselines(connection, baselines, seen, max(at, self._at))
        elif success:
            for part in parts:
                await self._records.save_seen(connection, part.mapping.name, part.baseline)
        if success and configured is not None:
            await self._records.lift_refusals_but(connection, configured)

    def _problem(self, parts: Sequence[Part]) -> str:
        problems = list(self._failures)
        rejected, present = self._run.counts.rejected, sum(part.present for part in parts)
        limit = self._config.guard.max_rejects
        if self._writes and exceeds(rejected, limit, present):
            problems.append(
                f"{rejected:,} of {present:,} keys are rejects, more than guard.max_rejects ="
                f" {limit:g}; the others are applied, see `balancesync rejects`"
            )
        return "; ".join(problems)

    async def _report(self, session: Session, parts: Sequence[Part]) -> None:
        await self._judge(session, parts)
        numbers = itertools.count(len(parts))
        for part in parts:
            name, writer, moving = part.mapping.name, part.writer, 0
            if self._request.mode == "verify":
                self._on_progress(Progress("compare", name))
                found = await self._compare(session, part, lambda: next(numbers))
                writer, moving = found.writer, found.moving
                if part.diff.altered:
                    self._warn(
                        f'mapping "{name}": {part.diff.altered:,} rows hold what rules and triggers'
                        f" of {part.mapping.config.table} made of the values in Redis; they count"
                        " as unchanged, see docs/guarantees.md"
                    )
            else:
                self._run.mappings[name] = part.tally(part.would_apply)
            report = await describe(writer)
            self.reports.append(replace(report, moving=moving))

    async def _compare(self, session: Session, part: Part, numbers: Callable[[], int]) -> Found:
        """Find out what of that which differs is drift, and count it."""
        settle = self._have_settled if self._config.live.enabled else None
        comparison = Comparison(
            session, self._source, self._records, part, settle=settle, numbers=numbers
        )
        found = await comparison.run()
        part.diff.stored += found.back
        part.diff.absent -= found.back
        counts = part.tally(found.drift)
        # To the first look all of these were keys that are there.
        counts.unchanged -= found.vanished + found.moving
        counts.vanished += found.vanished
        counts.scanned = counts.seen
        name = part.mapping.name
        self._run.mappings[name] = counts
        self._run.moving = {**(self._run.moving or {}), name: found.moving}
        return found

    async def _have_settled(self) -> None:
        if why := await self._settle():
            self._warn(f"{why}: what it has yet to bring over counts as drift")

    def _tally_partly(self, parts: Sequence[Part]) -> None:
        for part in parts:
            name = part.mapping.name
            self._run.mappings[name] = part.tally_partly(part.applied, self._earlier(name))

    def _earlier(self, mapping: str) -> Earlier:
        """What earlier attempts of this run have committed."""
        return self._committed.get(mapping, Earlier())
