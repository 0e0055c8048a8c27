"""The road back: one attempt at putting PostgreSQL's rows into Redis.

    rows -> render -> parse -> create what is missing -> compare the rest -> keep, or replace

What goes to Redis is read by the mapping itself first: nothing is written that a sync would reject
or take for another row. While Redis works on one page, the next is made.
"""

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Final, cast

from balancesync.apply import Applied, Earlier
from balancesync.backward import Backward, require_synced_at
from balancesync.config import MappingConfig
from balancesync.continuity import Sighting, judge_continuity
from balancesync.errors import SourceChanged
from balancesync.history import History
from balancesync.model import RawValue, exceeds
from balancesync.part import Progress
from balancesync.records import Remembered
from balancesync.rendering import Value
from balancesync.rows import Selection, restorable
from balancesync.session import Session
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


class Restore(Backward):
    """One attempt at a restore."""

    purpose = "restore from"

    async def _select(self, session: Session, config: MappingConfig, table: Table) -> Selection:
        moment = self._request.as_of
        if config.synced_at and (moment is not None or config.mode == "update"):
            require_synced_at(config, table)
        if moment is None:
            return Selection(table.sql_name, restorable(config))
        history = History(self._database, self._config.history)
        await history.require(session.connection, config, moment)
        return Selection(
            f"({history.all_as_of(config, table).rstrip(';')})",
            restorable(config),
            (config.name, moment),
            lambda connection: history.require(connection, config, moment),
        )

    async def _work(self, session: Session, part: Part) -> None:
        progress = Progress("restore", part.mapping.name)
        self._on_progress(progress)
        progress.total = await part.rows.put_aside()
        if not progress.total:
            self._warn(f'mapping "{part.mapping.name}": the table has no row to restore')
        under_way: tuple[Wanted, Sent] | None = None
        async with (
            self._source.writing(part.reading, identity=self.identity) as writing,
            aclosing(part.rows.pages()) as pages,
        ):
            async for page in pages:
                wanted = part.want(page)
                if not self._writes:
                    await self._see_to(part, writing, wanted)
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
            await self._see_to(part, writing, wanted.pick(there))

    async def _see_to(self, part: Part, writing: Writing, wanted: Wanted) -> None:
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
        earlier = self._committed.get(name, Earlier())
        now = Applied(inserted=counts.inserted, updated=counts.updated)
        self._committed[name] = earlier.plus(now)
        inserted = min(earlier.applied.inserted, counts.unchanged)
        updated = min(earlier.applied.updated, counts.unchanged - inserted)
        counts.inserted += inserted
        counts.updated += updated
        counts.unchanged -= inserted + updated
        self._run.mappings[name] = counts

    async def _judge(self, session: Session, parts: Sequence[Part]) -> str:
        known = await self._records.remembered(session.connection) if self.recorded else {}
        now = await self._look_again(session)
        refused = [
            known[config.name].refuses(now.of_keys(config.full_key))
            for config in self._config.mapping
            if config.name in known
        ]
        kept = self._kept(parts, refused=any(refused))
        if not self._writes:
            if kept:
                self._warn(kept)
            return ""
        await self._check_whole(parts, now)
        return kept

    async def _check_whole(self, parts: Sequence[Part], now: Sighting) -> None:
        """Raise SourceChanged if what was put into Redis has gone meanwhile, as by FLUSHALL."""
        found = judge_continuity(self._seen, now, 0)
        if found.doubt is not None and found.doubt.is_blind:
            await self._prove_whole(parts)
        elif found.doubt is not None or not found.is_unbroken:
            raise SourceChanged("Redis was emptied by FLUSHALL or FLUSHDB, or restarted, meanwhile")
        counts = [part.counts for part in parts if not part.reading.member_key]
        put = sum(each.inserted + each.updated + each.unchanged + each.kept for each in counts)
        there = sum((await self._source.dbsize()).values()) if put else 0
        if exceeds(put - there, self._config.guard.max_loss, put):
            raise SourceChanged(
                f"Redis fell to {there:,} keys while {put:,} were restored: it is emptied by others"
            )

    async def _prove_whole(self, parts: Sequence[Part]) -> None:
        """Read all again, where Redis doesn't tell whether it was emptied; raises SourceChanged."""
        lost = put = kept = 0
        firsts: list[tuple[Part, Wanted, int]] = []
        for part in parts:
            counts, again = part.counts, Part(part.mapping, part.rows)
            put += counts.inserted + counts.updated + counts.unchanged
            kept += counts.kept
            progress = Progress("compare", part.mapping.name, 0, await part.rows.put_aside())
            async with aclosing(part.rows.pages()) as pages:
                async for page in pages:
                    wanted = again.want(page)
                    differing = await self._count_differing(again, wanted)
                    if not firsts or firsts[-1][0] is not again:
                        firsts.append((again, wanted, differing))
                    lost += differing
                    progress.done = again.counts.scanned
                    self._on_progress(progress)
        # Those that were left as they are differ still.
        lost -= min(lost, kept)
        self._refuse_loss(lost, put)
        # Had it been emptied while all was read again, what was read first would be lost by now.
        for again, wanted, before in firsts:
            differing = await self._count_differing(again, wanted)
            self._refuse_loss(differing - before, len(wanted.keys))

    async def _count_differing(self, part: Part, wanted: Wanted) -> int:
        """How many of these records Redis lacks, or has with another value."""
        batch = await self._source.fetch(part.reading, wanted.keys)
        found = self._compare(part, wanted, batch.values)
        return len(found.missing) + len(found.kept) + len(found.differing)

    def _refuse_loss(self, lost: int, put: int) -> None:
        if exceeds(lost, self._config.guard.max_loss, put):
            raise SourceChanged(
                f"{lost:,} of {put:,} restored records are gone or changed: Redis, which doesn't"
                " tell whether it was emptied, may have been"
            )

    async def _remember(self, session: Session, parts: Sequence[Part]) -> None:
        connection, whole = session.connection, []
        self._seen = self._seen.ended(await self._look_again(session))
        known = await self._records.remembered(connection)
        for part in parts:
            name, counts = part.mapping.name, part.counts
            put = counts.inserted + counts.updated + counts.unchanged
            before = known.get(name, Remembered())
            # As they were at some moment, they may be but some of those that are known.
            if self._request.as_of is None or before.baseline is None or put >= before.known:
                whole.append(name)
                seen = self._seen.of_keys(part.mapping.config.full_key)
                await self._records.remember_restored(connection, name, put, seen)
            elif before.refusal is not None:
                self._warn(
                    f'mapping "{name}": {put:,} of {before.known:,} known keys are back, so the'
                    " refusal stands; restore the others without --as-of, or run `balancesync sync"
                    " --accept-loss`"
                )
        await self._records.lift_refusals(connection, whole)

    def _kept(self, parts: Sequence[Part], *, refused: bool) -> str:
        """What is to be said of records that were left as they are, if any."""
        kept = [part for part in parts if part.counts.kept]
        if not kept:
            return ""
        told = "; ".join(
            f'mapping "{part.mapping.name}": {_keys_hold(part.counts.kept)} another value and'
            f" {self._left(part.counts.kept)}, the first is"
            f" {show(part.first_kept)}"
            for part in kept
        )
        if self._request.overwrite:
            return (
                f"{told}. They hold another type, a field where the row has NULL, or an object that"
                " can't be changed in one member alone, see docs/restore.md"
            )
        look = "See them with `balancesync restore --dry-run`; if" if self._writes else "If"
        # While a refusal stands, that alone takes Redis as it is.
        accept = " --accept-loss" if refused else ""
        return (
            f"{told}. {look} PostgreSQL is right, restore with --overwrite, if Redis is,"
            f" `balancesync sync{accept}`"
        )

    def _left(self, number: int) -> str:
        if not self._writes:
            return "would be left"
        return "was left" if number == 1 else "were left"


def _keys_hold(number: int) -> str:
    return "1 key holds" if number == 1 else f"{number:,} keys hold"
