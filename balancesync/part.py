"""One mapping's part of an attempt: what was read of it, what differs, what that comes to."""

from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Final

import structlog

from balancesync.apply import Applied, Earlier
from balancesync.config import GuardConfig
from balancesync.continuity import Doubt
from balancesync.mapping import Mapping
from balancesync.model import Baseline, Counts, Judgement, Observed, Reject, exceeds, guard
from balancesync.nodes import Identity
from balancesync.reading import Reading
from balancesync.records import Remembered
from balancesync.source import Source
from balancesync.target import Diff, Writer
from balancesync.values import show

_LOGGED_REJECTS: Final = 100
# Where Redis can't tell a loss from plain changes.
WAYS_OUT: Final = (
    "if that many change between two syncs, sync more often, follow live, or raise guard.max_loss"
)

log = structlog.get_logger("balancesync")


@dataclass(slots=True)
class Progress:
    """How far a run is, in keys or rows. `total` is an estimate, None while there's none."""

    phase: str
    mapping: str = ""
    done: int = 0
    total: int | None = None


@dataclass(slots=True)
class Part:
    """One mapping's part of the attempt."""

    mapping: Mapping
    reading: Reading
    writer: Writer
    read: Counts = field(default_factory=Counts)
    diff: Diff = field(default_factory=Diff)
    applied: Applied = field(default_factory=Applied)

    @property
    def present(self) -> int:
        """Distinct keys that are there, rejected ones included."""
        return self.diff.stored + self.diff.rejected

    @property
    def would_apply(self) -> Applied:
        """What applying the diff would do."""
        inserts = self.mapping.config.mode == "upsert"
        return Applied(
            inserted=self.diff.inserted.rows if inserts else 0,
            updated=self.diff.updated.rows,
            deleted=self.diff.deleted.rows,
        )

    def tally(self, applied: Applied) -> Counts:
        """The counts of an attempt that did all it had to, given what it committed."""
        return self.tally_again(applied, Earlier(), 0)

    def tally_again(self, applied: Applied, earlier: Earlier, standing: int | None) -> Counts:
        """The same where `earlier` attempts of the run have committed something, too.

        What they wrote is unchanged to this attempt, unless it writes it once more; either way the
        row counts once, and as inserted if they inserted it. `standing` are those of the rows they
        wrote that this attempt found as they should be; None where the table can't tell: then as
        many as there can be.
        """
        counts = self.tally_partly(applied, earlier)
        written = applied.inserted + applied.updated
        rest = self.diff.stored - written - applied.rejected - counts.not_found
        # Others may have moved rows since the diff.
        before = max(min(earlier.stored, rest, rest if standing is None else standing), 0)
        counts.inserted = min(counts.inserted, written + before)
        counts.updated = written + before - counts.inserted
        counts.unchanged = max(rest - before, 0)
        counts.scanned = counts.seen
        return counts

    def tally_partly(self, applied: Applied, earlier: Earlier) -> Counts:
        """The counts of an attempt that didn't get to its end: what it saw and what is committed.

        They need not add up.
        """
        counts, total = replace(self.read), applied + earlier.applied
        counts.rejected = self.diff.rejected + applied.rejected
        counts.inserted, counts.updated = total.inserted, total.updated
        counts.deleted = total.deleted
        counts.absent = self.diff.absent + earlier.applied.deleted
        inserts = self.mapping.config.mode == "upsert"
        counts.not_found = applied.not_found + (0 if inserts else self.diff.inserted.rows)
        return counts

    async def judge(
        self,
        remembered: Remembered,
        limits: GuardConfig,
        doubt: Doubt | None,
        *,
        standing: bool | None = None,
    ) -> Judgement:
        """What the guard says to this diff.

        Args:
            remembered: what it knows of the mapping.
            limits: as configured.
            doubt: why Redis may have been empty.
            standing: whether a refusal stands; by default if there is one.
        """
        baseline = remembered.baseline
        if baseline is not None and baseline.pruned:
            away = baseline.pruned - await self.writer.count_pruned_back()
            baseline = replace(baseline, pruned=away)
        baseline = await self._known(baseline, remembered, limits.max_loss)
        seen = Observed(
            present=self.present,
            absent=self.diff.absent,
            changed=self.diff.updated.rows,
            deletable=self.diff.deleted.rows,
            target_rows=self.diff.target_rows,
        )
        judged = guard(
            self.mapping.name,
            seen,
            baseline,
            standing=remembered.refusal is not None if standing is None else standing,
            suspicion=remembered.doubt or (None if doubt is None else doubt.sentence),
            suspected=None if remembered.doubt else self._suspected(doubt),
            max_loss=limits.max_loss,
            max_change=limits.max_change,
        )
        refusal = judged.refusal
        if refusal is None or refusal.kind != "loss" or doubt is None or not doubt.is_blind:
            return judged
        reason = f"{refusal.reason}; {WAYS_OUT}"
        return replace(judged, refusal=replace(refusal, reason=reason))

    def _suspected(self, doubt: Doubt | None) -> int | None:
        """The keys of those primaries of a cluster that may have been emptied."""
        # All fields of a big hash are one key.
        if doubt is None or not doubt.is_partial or self.mapping.config.member:
            return None
        return doubt.keys

    async def _known(
        self, baseline: Baseline | None, remembered: Remembered, max_loss: float
    ) -> Baseline | None:
        """What the guard judges by: the keys of the last success, and those that live mode has
        brought since. Of a table of our own nothing is in Redis by chance: where no success knows
        of a key, all rows that were written since are known.
        """
        # More may have been pruned than a success knew of: rows that were written since.
        nothing = baseline is None or baseline.present <= baseline.pruned
        baseline = baseline or Baseline(present=0, absent=0)
        followed = remembered.gone is not None
        if self.mapping.config.mode == "upsert" and (nothing or followed):
            rows = self.diff.target_rows - baseline.absent + remembered.deleted
            baseline = replace(baseline, present=max(baseline.present, rows))
        gone = max(remembered.gone or 0, self.diff.absent - baseline.absent - baseline.pruned)
        if followed and exceeds(gone, max_loss, baseline.present - baseline.pruned):
            # Rows of the application's may have got their keys since, and were written then.
            rows = await self.writer.count_known(baseline.absent, remembered.known_at)
            known = max(baseline.present, rows + remembered.deleted)
            lost = await self.writer.count_written_lost(remembered.known_at)
            absent = min(baseline.absent, self.diff.absent - baseline.pruned - lost)
            baseline = replace(baseline, present=known, absent=absent)
        return baseline

    @property
    def baseline(self) -> Baseline:
        """What the guard is to remember after a success."""
        return Baseline(present=self.present, absent=self.diff.absent - self.applied.deleted)


def reading_of(mapping: Mapping) -> Reading:
    """What to read of Redis for a mapping."""
    return Reading(
        type=mapping.config.type,
        match=mapping.match,
        fields=tuple(mapping.redis_fields),
        member_key=mapping.member_key,
        select=mapping.select,
    )


class RejectLog:
    """Logs the first rejects of a run; of the others only that they are kept."""

    def __init__(self) -> None:
        self._logged = 0

    def take(self, mapping: str, rejects: Sequence[Reject]) -> None:
        """Log these, by key and reason."""
        for reject in rejects:
            self._logged += 1
            write = log.warning if self._logged <= _LOGGED_REJECTS else log.debug
            write("reject", mapping=mapping, key=show(reject.key), reason=reject.reason)
            if self._logged == _LOGGED_REJECTS:
                log.warning("more rejects are kept, not logged; see `balancesync rejects`")


async def scan(
    part: Part,
    source: Source,
    identity: Identity,
    rejects: RejectLog,
    on_progress: Callable[[Progress], None],
) -> None:
    """Read all of a mapping's keys from `identity`, and stage them."""
    mapping, read = part.mapping, part.read
    total = None if mapping.config.member else identity.dbsize
    progress = Progress("scan", mapping.name, 0, total)
    async with aclosing(source.scan(part.reading, identity=identity)) as batches:
        async for raw in batches:
            batch = mapping.parse(raw)
            if batch.rejects and len(set(raw.keys)) < len(raw.keys):
                # A batch's rejects are staged behind its rows, though read before them.
                batch = mapping.parse(raw.latest())
            read.scanned += raw.scanned
            read.ignored += raw.scanned - len(raw.keys)
            read.vanished += batch.vanished
            read.snapped += batch.snapped
            await part.writer.stage(batch)
            rejects.take(mapping.name, batch.rejects)
            progress.done = read.scanned
            on_progress(progress)
