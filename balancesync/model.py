"""What moves through the program: requests, batches, rejects and runs; and the pure guard."""

import os
import time
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from decimal import Decimal
from typing import Final, Literal
from uuid import UUID

# How a warning begins that tells what the guard thinks of a dry run or verify.
WOULD_BE_REFUSED: Final = "a sync would be refused"

Job = Literal["sync", "verify", "restore", "prune", "live"]
Mode = Literal["apply", "dry_run", "verify"]
# What begins a run's trigger; that of a schedule's job is `cron:NAME`.
TRIGGERS: Final = ("startup", "cron", "http", "sighup", "cli", "live", "recovery")
Status = Literal[
    "queued",
    "running",
    "succeeded",
    "failed",
    "refused",
    "skipped",
    "postponed",
    "cancelled",
    "interrupted",
]
Reason = Literal[
    "key_syntax",
    "key_ambiguous",
    "key_too_long",
    "wrong_type",
    "value_too_large",
    "not_utf8",
    "nul_byte",
    "not_a_number",
    "out_of_range",
    "too_many_decimals",
    "residue",
    "not_a_boolean",
    "not_a_uuid",
    "not_a_time",
    "text_too_long",
    "not_json",
    "missing_field",
    "refused_by_table",
]


@dataclass(frozen=True, slots=True)
class Request:
    """What somebody asked for; `trigger` is startup cron:NAME http sighup cli live or recovery.

    A restore's: `overwrite`, give records that have another value the row's; `as_of`, a time with
    its zone, the rows as they were then. A prune's: `idle_s`, how many seconds a row must not have
    changed.
    """

    job: Job
    trigger: str
    mode: Mode = "apply"
    mapping: str | None = None
    accept_loss: bool = False
    force: bool = True
    overwrite: bool = False
    as_of: datetime | None = None
    idle_s: float = 0.0


@dataclass(frozen=True, slots=True)
class WrongType:
    """Stands in a batch for the value of a key that holds another Redis type, such as `list`."""

    found: str


# A string's bytes; a hash's mapped fields in the order of the value columns; None: vanished.
RawValue = bytes | list[bytes | None] | WrongType | None


@dataclass(slots=True)
class RawBatch:
    """Keys (or, of a `member` hash, fields) and values of one read, in the same order.

    `scanned` counts what the scan returned, so `scanned - len(keys)` were ignored.
    """

    keys: list[bytes]
    values: list[RawValue]
    scanned: int

    def latest(self) -> "RawBatch":
        """Each key once, with what was read last."""
        values = dict(zip(self.keys, self.values, strict=True))
        return RawBatch(list(values), list(values.values()), self.scanned)


@dataclass(frozen=True, slots=True)
class Reject:
    """A record that can't be stored, and why.

    `row` is the COPY line of its key columns if the key names a row, which then stays as it was.
    """

    key: bytes
    value: bytes | None
    reason: Reason
    detail: str
    row: bytes | None = None


@dataclass(slots=True)
class Batch:
    """A parsed batch: rows + rejects + vanished = the keys that came in.

    `rows` are lines of COPY's text format, key columns in the template's order, then value columns
    in declared order. https://www.postgresql.org/docs/current/sql-copy.html, "Text Format".
    """

    rows: bytes
    count: int
    rejects: list[Reject]
    vanished: int
    snapped: int


@dataclass(slots=True)
class Counts:
    """The counts of a run or of one of its mappings, over distinct keys.

    scanned = ignored + vanished + rejected + inserted + updated + unchanged + not_found.
    """

    scanned: int = 0
    ignored: int = 0
    vanished: int = 0
    rejected: int = 0
    snapped: int = 0
    inserted: int = 0
    updated: int = 0
    unchanged: int = 0
    not_found: int = 0
    absent: int = 0
    deleted: int = 0
    kept: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Counts)))

    @property
    def seen(self) -> int:
        """The keys that are accounted for: `scanned` of a run that came to its end."""
        return (
            self.ignored
            + self.vanished
            + self.rejected
            + self.inserted
            + self.updated
            + self.unchanged
            + self.not_found
        )

    @property
    def written(self) -> int:
        """The rows written; of a dry run or verify, those that differ."""
        return self.inserted + self.updated + self.deleted

    def as_dict(self) -> dict[str, int]:
        """Every count by name, in order."""
        return {f.name: getattr(self, f.name) for f in fields(Counts)}


@dataclass(slots=True)
class Run:
    """One run, as it is recorded, logged and shown. Times are UTC, durations seconds.

    `moving`, of a verify, are the keys that changed between all looks, by mapping: no other count
    has them.
    """

    id: UUID
    job: Job
    trigger: str
    mode: Mode
    status: Status
    started_at: datetime
    mapping: str | None = None
    finished_at: datetime | None = None
    duration_s: float | None = None
    attempts: int = 0
    mappings: dict[str, Counts] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    error: str | None = None
    redis_run_id: str | None = None
    moving: dict[str, int] | None = None

    @property
    def counts(self) -> Counts:
        """The sum over all mappings."""
        return sum(self.mappings.values(), Counts())

    @property
    def drift(self) -> int | None:
        """The rows that a verify found to differ; None of another run, or of one without an end."""
        done = self.job == "verify" and self.status == "succeeded"
        return self.counts.written if done else None

    @property
    def full(self) -> bool:
        """Whether success would make this the last success: an apply sync of all mappings."""
        return self.job == "sync" and self.mode == "apply" and self.mapping is None


@dataclass(slots=True)
class Known:
    """What PostgreSQL knows of the runs before: times in seconds since 1970, counts by mapping.

    `drift` is what the last verify found to differ, 0 once a sync has succeeded since.
    `full_success` is the last succeeded full apply run, whichever process made it; `refused`
    whether a refusal stands on the Redis that is read.
    """

    last_success: dict[str, float] = field(default_factory=dict)
    rejects: dict[str, int] = field(default_factory=dict)
    drift: dict[str, int] = field(default_factory=dict)
    refused: bool = False
    full_success: UUID | None = None


@dataclass(frozen=True, slots=True)
class Baseline:
    """What a mapping looked like at the last success, for the guard to judge a loss by.

    `pruned` are those of the keys that were pruned since and haven't come back.
    """

    present: int
    absent: int
    pruned: int = 0


@dataclass(frozen=True, slots=True)
class Stamp:
    """What everything that one run or flush writes has in common.

    `at` is when its reading ended, by PostgreSQL's clock: see `History.moment`.
    """

    run_id: UUID
    at: datetime


@dataclass(frozen=True, slots=True)
class Observed:
    """What a run sees of a mapping before it applies anything."""

    present: int
    absent: int
    changed: int
    deletable: int
    target_rows: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the guard refuses a mapping. A `loss` stands until it is healed or accepted."""

    mapping: str
    kind: Literal["loss", "change"]
    reason: str


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the guard says to a mapping: `lost` of the `known` keys are gone; None lets it pass."""

    known: int
    lost: int
    refusal: Refusal | None = None


def guard(
    mapping: str,
    seen: Observed,
    baseline: Baseline | None,
    *,
    standing: bool,
    suspicion: str | None,
    max_loss: float,
    max_change: float,
    suspected: int | None = None,
) -> Judgement:
    """Judge one mapping. Shares are 0 to 1.

    `baseline` is None when nothing was known before (then no key can have been lost). An
    application that starts again from zero re-creates keys, and must not hide or heal its own loss
    by that. So under `suspicion`, which says why Redis may have been empty since the last success,
    a key whose value differs from its row counts as lost, too, and where only some primaries are
    under suspicion, it counts against the `suspected` keys that they held; and while a refusal is
    `standing`, none may be lost or differ.
    """
    known = lost = 0

    def refuse(kind: Literal["loss", "change"], reason: str) -> Judgement:
        return Judgement(known, lost, Refusal(mapping, kind, reason))

    if baseline is not None and baseline.present > baseline.pruned:
        known = baseline.present - baseline.pruned
        # A row that others have added since has no key either: no more than is known can be lost.
        rows = min(max(seen.absent - baseline.absent - baseline.pruned, 0), known)
        # Rows may have gone with their keys, and some keys never had one.
        lost = max(rows, known - seen.present)
        if not seen.present:
            return refuse("loss", f"Redis has no key at all, but {known:,} were known")
        made_anew = seen.changed if standing or suspicion else 0
        if standing and max_loss < 1 and rows + made_anew:
            found = _of_the_known(known, rows, made_anew)
            return refuse("loss", f"{found}, and the refusal stands until none is")
        whole = known if suspected is None else min(known, suspected)
        if made_anew and whole < known and exceeds(lost + made_anew, max_loss, whole):
            found = _of_the_known(known, lost, made_anew)
            limit = f"more than guard.max_loss = {max_loss:g} of the {whole:,} keys that were there"
            return refuse("loss", f"{suspicion}: {found}, {limit}")
        if exceeds(lost + made_anew, max_loss, known):
            found = _of_the_known(known, lost, made_anew)
            since = f"{suspicion}: " if suspicion else ""
            return refuse("loss", f"{since}{found}, more than guard.max_loss = {max_loss:g}")
    writes = seen.changed + seen.deletable
    if max_change < 1 and seen.target_rows and exceeds(writes, max_change, seen.target_rows):
        return refuse(
            "change",
            f"{writes:,} of {seen.target_rows:,} rows would be updated or deleted, "
            f"more than guard.max_change = {max_change:g}",
        )
    return Judgement(known, lost)


def _of_the_known(known: int, lost: int, made_anew: int) -> str:
    """What has become of the known keys, in words.

    >>> _of_the_known(100, 60, 40)
    '60 of 100 known keys are gone and 40 came back changed'
    >>> _of_the_known(100, 0, 1)
    '1 of 100 known keys came back changed'
    """
    of_all = f"of {known:,} known keys"
    gone = f"{lost:,} {of_all} are gone"
    if not made_anew:
        return gone
    return (
        f"{gone} and {made_anew:,} came back changed"
        if lost
        else (f"{made_anew:,} {of_all} came back changed")
    )


def exceeds(part: int, share: float, whole: int) -> bool:
    """Whether `part` is more than this share of `whole`, the share as it is written.

    >>> exceeds(29, 0.29, 100)
    False
    """
    # In binary, 0.29 * 100 is less than 29.
    return part > Decimal(repr(share)) * whole


def new_run(request: Request) -> Run:
    """Make the run that a request waits for: queued now, with an id of its own."""
    return Run(
        id=new_run_id(),
        job=request.job,
        trigger=request.trigger,
        mode=request.mode,
        status="queued",
        started_at=datetime.now(UTC),
        mapping=request.mapping,
    )


_UNIX_MS_BITS: Final = 48


class _LastId:
    ms = 0  # since 1970


def new_run_id() -> UUID:
    """Make a UUIDv7 (RFC 9562, 5.7): it sorts by the time it was made, in milliseconds.

    One made later in this process sorts later, also after the clock was set back (RFC 9562, 6.2).
    """
    _LastId.ms = max(time.time_ns() // 1_000_000, _LastId.ms + 1)
    random = int.from_bytes(os.urandom(10), "big")
    value = (_LastId.ms & ((1 << _UNIX_MS_BITS) - 1)) << 80 | random
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return UUID(int=value)
