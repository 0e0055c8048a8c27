"""One mapping's part of an attempt: what was read of it, what differs, what that comes to."""

from dataclasses import dataclass, field, replace

from balancesync.apply import Applied
from balancesync.config import GuardConfig
from balancesync.mapping import Mapping
from balancesync.model import Baseline, Counts, Observed, Refusal, guard
from balancesync.reading import Reading
from balancesync.records import Remembered
from balancesync.target import Diff, Writer


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

    def tally(self, applied: Applied, earlier: Applied, *, complete: bool) -> Counts:
        """The counts, given what is committed, by this attempt and by `earlier` ones.

        Those of an incomplete run need not add up.
        """
        counts = replace(self.read)
        inserts = self.mapping.config.mode == "upsert"
        total = applied + earlier
        counts.rejected = self.diff.rejected + total.rejected
        counts.inserted, counts.updated, counts.deleted = (
            total.inserted,
            total.updated,
            total.deleted,
        )
        counts.absent = self.diff.absent + earlier.deleted
        counts.not_found = total.not_found + (0 if inserts else self.diff.inserted.rows)
        accounted = counts.inserted + counts.updated + counts.not_found + total.rejected
        if complete:
            # What an earlier attempt committed is unchanged to this one: it counts once.
            counts.updated = max(counts.updated - max(accounted - self.diff.stored, 0), 0)
            counts.unchanged = max(self.diff.stored - accounted, 0)
            counts.scanned = counts.seen
        return counts

    def refusal(self, remembered: Remembered, limits: GuardConfig) -> Refusal | None:
        """What the guard says to this diff."""
        baseline = remembered.baseline
        if baseline is None and self.mapping.config.mode == "upsert":
            # Before a first success all rows of a table of our own count as known.
            baseline = Baseline(present=self.diff.target_rows, absent=0)
        seen = Observed(
            present=self.present,
            absent=self.diff.absent,
            changed=self.diff.updated.rows,
            deletable=self.diff.deleted.rows,
            target_rows=self.diff.target_rows,
        )
        return guard(
            self.mapping.name,
            seen,
            baseline,
            standing=remembered.refusal is not None,
            max_loss=limits.max_loss,
            max_change=limits.max_change,
        )

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
