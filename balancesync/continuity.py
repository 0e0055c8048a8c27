"""Whether Redis was certainly not empty between two moments, from what its servers say of
themselves.

What a server doesn't say is None, and proves nothing. Each primary is judged alone, against its own
keys. One of these proves that it wasn't empty:

- the same start and the same history of replication, with no FLUSHALL, FLUSHDB or SWAPDB counted
  since, in statistics that nobody has reset;
- a replica that took over: its past is the history that was seen, beyond the offset that was seen,
  it has been up since before, and has run no FLUSHALL itself;
- a new start that came with enough keys;
- an `Ear` that has been open since before the first moment, and heard nothing.

https://redis.io/docs/latest/commands/info/
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final, Literal

from balancesync.model import exceeds

DoubtKind = Literal[
    "flushed", "swapped", "reset", "restarted", "went_back", "replaced", "gone", "moved", "untold"
]

_SINCE: Final = "since the last success"
_EMPTIED: Final = f"whether it was emptied {_SINCE}"
# Of a server that tells its uptime but not its time: two looks may be off by a second each.
_CLOCK_SLACK_S: Final = 1.5
_UPTIME_SLACK_S: Final = 2.0
# An append-only file that has just been made is said to have no base; later it's an empty one.
_EMPTY_BASE_BYTES: Final = 200


@dataclass(frozen=True, slots=True)
class Primary:
    """One primary at one moment. None: it doesn't say.

    `started` is seconds since 1970 by its own clock, by ours if not `clocked`; `history` the id of
    its data's history, `past` the one before, which ended at `past_offset`. `flushes` counts
    FLUSHALL and FLUSHDB of whatever database, `swaps` SWAPDB, `reset` is how its statistics were
    last reset ("": never), `counters` only ever grow until then. `keys` are those of our database,
    `all_keys` of all. `loaded` is how many keys its file held at its start, `created` how many may
    have come since, `writes` how many commands have surely changed something since. `changes` is
    how many changes its append-only file and it have seen together, `is_unsaved` whether that
    counts all since its start. `heard_since` is since when our ear is open on it, by PostgreSQL's
    count of transactions.
    """

    address: str
    database: int
    keys: int
    node: str | None = None
    run_id: str | None = None
    started: float | None = None
    clocked: bool = False
    uptime_s: int | None = None
    history: str | None = None
    offset: int | None = None
    past: str | None = None
    past_offset: int | None = None
    flushes: int | None = None
    swaps: int | None = None
    reset: str | None = None
    counters: tuple[int, ...] = ()
    all_keys: int | None = None
    loaded: int | None = None
    created: int | None = None
    writes: int | None = None
    changes: int | None = None
    base_bytes: int | None = None
    is_unsaved: bool = False
    heard_since: int | None = None

    @property
    def untold(self) -> list[str]:
        """What INFO lacks of the fields that prove that nothing was emptied."""
        lacking = {
            "uptime_in_seconds": self.started,
            "master_replid": self.history,
            "commandstats": self.flushes,
        }
        return [name for name, value in lacking.items() if value is None]

    @property
    def is_blind(self) -> bool:
        """Whether nobody can know that it was emptied: it doesn't tell, and nobody listens."""
        return bool(self.untold) and self.heard_since is None

    def is_past_of(self, later: "Primary") -> bool:
        """Whether `later` says that it goes on with this one's history."""
        return self.history is not None and self.history in (later.history, later.past)


@dataclass(frozen=True, slots=True)
class Sighting:
    """All primaries at one moment, and when that was.

    `moment` is PostgreSQL's count of transactions before they were asked: unlike a clock it never
    goes back. `at` is its clock, seconds since 1970. `key` is the template of the mapping's keys.
    """

    primaries: tuple[Primary, ...]
    moment: int | None = None
    at: float | None = None
    key: str | None = None

    @property
    def database(self) -> int | None:
        """The database that redis.url names."""
        return self.primaries[0].database if self.primaries else None

    @property
    def keys(self) -> int:
        """The keys of all primaries."""
        return sum(primary.keys for primary in self.primaries)

    @property
    def run_id(self) -> str | None:
        """The run_ids, joined by commas; None if one isn't known."""
        found = [primary.run_id for primary in self.primaries]
        known = [each for each in found if each is not None]
        return ",".join(sorted(known)) if len(known) == len(found) else None

    @property
    def flushes(self) -> int | None:
        """Of all primaries; None if one doesn't tell."""
        found = [primary.flushes for primary in self.primaries]
        known = [each for each in found if each is not None]
        return sum(known) if len(known) == len(found) else None

    def ended(self, after: "Sighting") -> "Sighting":
        """The same moment for a run that has read until `after`.

        What counts losses is kept from before the first read; what only grows, and what later
        histories must have reached, is as it was after the last one.
        """
        later = {primary.run_id or primary.address: primary for primary in after.primaries}
        merged = []
        for primary in self.primaries:
            last = later.get(primary.run_id or primary.address, primary)
            # Else something happened in mid-run, and the next look must see that.
            same = last.history == primary.history and last.reset == primary.reset
            merged.append(_with_end(primary, last) if same else primary)
        return Sighting(tuple(merged), self.moment, self.at, self.key)

    def of_keys(self, key: str) -> "Sighting":
        """The same for a mapping with this template of keys."""
        return replace(self, key=key)

    def dump(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def load(cls, document: dict[str, Any]) -> "Sighting":
        """What `dump` gave."""
        known = {each.name for each in fields(Primary)}
        primaries = tuple(
            Primary(
                **{name: value for name, value in each.items() if name in known}
                | {"counters": tuple(each["counters"])}
            )
            for each in document["primaries"]
        )
        return cls(primaries, document["moment"], document["at"], document["key"])


def _with_end(first: Primary, last: Primary) -> Primary:
    return replace(
        first,
        offset=last.offset,
        counters=last.counters,
        changes=last.changes,
        base_bytes=last.base_bytes,
    )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a refusal was met: which Redis, which of its databases, which keys."""

    run_ids: tuple[str, ...]
    histories: tuple[str, ...]
    database: int | None
    key: str | None

    @classmethod
    def of(cls, seen: Sighting) -> "Place":
        """The place of what was seen."""
        return cls(
            tuple(each.run_id for each in seen.primaries if each.run_id is not None),
            tuple(each.history for each in seen.primaries if each.history is not None),
            seen.database,
            seen.key,
        )

    def has(self, now: Sighting) -> bool:
        """Whether `now` was seen here, a failover later at the most; True if nothing tells."""
        if (self.database, self.key) != (now.database, now.key):
            return False
        ids = {each.run_id for each in now.primaries} - {None}
        histories = {name for each in now.primaries for name in (each.history, each.past)} - {None}
        is_told = bool((self.run_ids and ids) or (self.histories and histories))
        return not is_told or not (
            ids.isdisjoint(self.run_ids) and histories.isdisjoint(self.histories)
        )

    @classmethod
    def load(cls, document: dict[str, Any]) -> "Place":
        """From JSON."""
        run_ids, histories = tuple(document["run_ids"]), tuple(document["histories"])
        return cls(run_ids, histories, document["database"], document["key"])


@dataclass(frozen=True, slots=True)
class Doubt:
    """Why Redis may have been empty. `keys` are those that may have gone; `is_blind`: it's only
    that nobody can know; `is_partial`: other primaries are proven."""

    kind: DoubtKind
    sentence: str
    keys: int = 0
    is_blind: bool = False
    is_partial: bool = False


@dataclass(frozen=True, slots=True)
class Continuity:
    """What two sightings prove. Without `doubt` Redis wasn't empty in between; `is_unbroken`: it
    was also never restarted."""

    doubt: Doubt | None = None
    is_unbroken: bool = False


def judge_by_count(run_id: str | None, flushes: int | None, now: Sighting) -> Continuity:
    """The same where 0.1.0 made the last success, which kept no more than these two."""
    if None not in (run_id, flushes) and run_id == now.run_id:
        if flushes != now.flushes and now.flushes is not None:
            sentence = f"Redis was emptied by FLUSHALL or FLUSHDB {_SINCE}"
            return Continuity(Doubt("flushed", sentence, now.keys))
        if flushes == now.flushes and all(each.reset == "" for each in now.primaries):
            return Continuity()
    sentence = f"an older balancesync made the last success: nobody knows of Redis {_EMPTIED}"
    return Continuity(Doubt("untold", sentence, is_blind=True))


def judge_continuity(before: Sighting, now: Sighting, max_loss: float) -> Continuity:
    """What proves that Redis wasn't empty between two sightings, or why nothing does.

    `max_loss` is the share of its keys that a primary may lack after a new start. Primaries that
    join are trusted while all others are proven.
    """
    if before.database != now.database:
        sentence = f"redis.url names database {now.database}, and named {before.database} then"
        return Continuity(Doubt("moved", f"{sentence}, at the last success", before.keys))
    if None not in (before.key, now.key) and before.key != now.key:
        sentence = f'the template of the keys is "{now.key}", and was "{before.key}"'
        return Continuity(Doubt("moved", f"{sentence} at the last success", before.keys))
    elapsed_s = None
    if before.at is not None and now.at is not None:
        elapsed_s = now.at - before.at
    found = [
        _judge(then, later, before.moment, elapsed_s, max_loss)
        for then, later in _pair(before.primaries, now.primaries)
    ]
    doubts = [each.doubt for each in found if each.doubt is not None]
    if doubts:
        # What is known to have happened is worth more to the reader than what nobody knows.
        first = min(doubts, key=lambda doubt: doubt.is_blind)
        lost, is_partial = sum(doubt.keys for doubt in doubts), len(doubts) < len(found)
        sentence = first.sentence
        if is_partial and first.kind != "gone":
            sentence = f"{sentence} (this is about {len(doubts)} of {len(found)} primaries)"
        return Continuity(Doubt(first.kind, sentence, lost, first.is_blind, is_partial))
    return Continuity(is_unbroken=all(each.is_unbroken for each in found))


def _pair(
    before: Sequence[Primary], now: Sequence[Primary]
) -> list[tuple[Primary, Primary | None]]:
    """Each primary with the one that it is now, by what tells most."""
    if len(before) == len(now) == 1:
        return [(before[0], now[0])]
    left, pairs = list(now), dict[int, Primary]()
    for is_same in (_has_run_id, Primary.is_past_of, _has_node, _has_address):
        for number, then in enumerate(before):
            found = next((each for each in left if is_same(then, each)), None)
            if number not in pairs and found is not None:
                pairs[number] = found
                left.remove(found)
    return [(then, pairs.get(number)) for number, then in enumerate(before)]


def _has_run_id(then: Primary, now: Primary) -> bool:
    return then.run_id is not None and then.run_id == now.run_id


def _has_node(then: Primary, now: Primary) -> bool:
    return then.node is not None and then.node == now.node


def _has_address(then: Primary, now: Primary) -> bool:
    return then.address == now.address


def _judge(
    then: Primary,
    now: Primary | None,
    moment: int | None,
    elapsed_s: float | None,
    max_loss: float,
) -> Continuity:
    if now is None:
        if not then.keys:
            return Continuity(is_unbroken=True)
        sentence = f"the primary at {then.address}, which had {then.keys:,} keys, is gone {_SINCE}"
        return Continuity(Doubt("gone", sentence, then.keys))
    is_same_start = starts_alike(then, now)
    if is_same_start and then.swaps is not None and now.swaps not in (None, then.swaps):
        return _doubt(then, "swapped", f"databases of Redis were swapped by SWAPDB {_SINCE}")
    if _was_heard(then, now, moment) and is_same_start is not False:
        return Continuity(is_unbroken=True)
    if is_same_start and then.history is not None and then.history == now.history:
        return _judge_statistics(then, now)
    if then.history is not None and then.history == now.past and then.history != now.history:
        promoted = _judge_promoted(then, now, elapsed_s)
        if promoted is not None:
            return promoted
    if is_same_start is False:
        return _judge_restarted(then, now, max_loss)
    # What is counted happened, also where nothing proves the rest.
    if is_same_start and then.flushes is not None and (now.flushes or 0) > then.flushes:
        return _flushed(then)
    if is_same_start and None not in (then.history, now.history):
        return _doubt(then, "replaced", f"Redis was a replica of another server {_SINCE}")
    return _blind(then, now)


def _doubt(then: Primary, kind: DoubtKind, sentence: str, *, is_blind: bool = False) -> Continuity:
    return Continuity(Doubt(kind, sentence, then.keys, is_blind))


def _flushed(then: Primary) -> Continuity:
    return _doubt(then, "flushed", f"Redis was emptied by FLUSHALL or FLUSHDB {_SINCE}")


def _blind(then: Primary, now: Primary) -> Continuity:
    lacking = " and ".join(dict.fromkeys([*now.untold, *then.untold])) or "run_id"
    sentence = f"Redis doesn't tell whether it was emptied {_SINCE}: its INFO lacks {lacking}"
    return _doubt(then, "untold", sentence, is_blind=True)


def _was_heard(then: Primary, now: Primary, moment: int | None) -> bool:
    """Whether our ear on `now` has been open since before `moment`, and it's what was seen then."""
    if now.heard_since is None or moment is None or now.heard_since > moment:
        return False
    ids = ((then.run_id, now.run_id), (then.history, now.history))
    known = [pair for pair in ids if None not in pair]
    if any(old != new for old, new in known):
        return False
    return len(known) == len(ids) or then.address == now.address


def starts_alike(then: Primary, now: Primary) -> bool | None:
    """Whether it's the same start of the same server; None: nobody can know.

    A run_id may be missing, and that of some services never changes: only the time tells.
    """
    if None not in (then.run_id, now.run_id) and then.run_id != now.run_id:
        return False
    if then.started is None or now.started is None:
        return None
    slack_s = 0.0 if then.clocked and now.clocked else _CLOCK_SLACK_S
    if abs(then.started - now.started) > slack_s:
        return False
    # A server that has one would tell it.
    return True if then.run_id == now.run_id else None


def _judge_statistics(then: Primary, now: Primary) -> Continuity:
    if then.flushes is None or now.flushes is None:
        return _blind(then, now)
    if then.reset is None or now.reset is None:
        sentence = f"Redis before 7 doesn't tell whether it was emptied {_SINCE}: its statistics"
        return _doubt(then, "untold", f"{sentence} may have been reset", is_blind=True)
    if now.flushes > then.flushes:
        return _flushed(then)
    fell = len(then.counters) != len(now.counters) or any(
        new < old for old, new in zip(then.counters, now.counters, strict=False)
    )
    if then.reset != now.reset or now.flushes < then.flushes or fell:
        sentence = (
            f"the statistics of Redis were reset (CONFIG RESETSTAT) {_SINCE}, so it doesn't tell"
            " whether it was emptied"
        )
        return _doubt(then, "reset", sentence, is_blind=True)
    return Continuity(is_unbroken=True)


def _judge_promoted(then: Primary, now: Primary, elapsed_s: float | None) -> Continuity | None:
    """A replica that took over; None: it's rather to be judged as a new start."""
    if now.uptime_s is None or elapsed_s is None or now.uptime_s + _UPTIME_SLACK_S < elapsed_s:
        return None
    if now.flushes is None or now.swaps is None or now.reset != "":
        return None
    if now.flushes or now.swaps:
        sentence = f"a replica took over {_SINCE}, and has run FLUSHALL, FLUSHDB or SWAPDB"
        return _doubt(then, "flushed", sentence)
    if then.offset is None or now.past_offset is None:
        return None
    if now.past_offset <= then.offset:
        sentence = f"Redis went back {_SINCE}: the replica that took over lacks what was read then"
        return _doubt(then, "went_back", sentence)
    return Continuity(is_unbroken=True)


def _judge_restarted(then: Primary, now: Primary, max_loss: float) -> Continuity:
    what = f"Redis was restarted or replaced {_SINCE}"
    if now.flushes is None or now.swaps is None:
        sentence = f"{what}, and doesn't tell whether it was emptied: its INFO lacks commandstats"
        return _doubt(then, "restarted", sentence, is_blind=True)
    if now.flushes or now.swaps:
        by = "emptied by FLUSHALL or FLUSHDB" if now.flushes else "changed by SWAPDB"
        return _doubt(then, "flushed", f"{what}, and {by} since its start")
    if now.reset != "":
        sentence = (
            f"{what}, and its statistics were reset since: it doesn't tell whether it was emptied"
        )
        return _doubt(then, "reset", sentence, is_blind=True)
    lacking = _most_lacking(then, now)
    if lacking is None:
        sentence = f"{what}, and doesn't tell with how many keys"
        return _doubt(then, "restarted", sentence, is_blind=True)
    if exceeds(lacking, max_loss, then.keys):
        came = max(then.keys - lacking, 0)
        if now.loaded is not None:
            return _doubt(then, "restarted", f"{what}, with {came:,} keys")
        sentence = (
            f"{what}, and proves no more than that it came with {came:,} of {then.keys:,} keys"
        )
        return _doubt(then, "restarted", sentence, is_blind=True)
    return Continuity()


def _most_lacking(then: Primary, now: Primary) -> int | None:
    """How many of the keys that were seen may be missing after a new start, at the most; None: it
    tells nothing to count by."""
    found = []
    if now.loaded is not None and then.all_keys is not None:
        # Nobody knows of which database the missing ones are.
        found.append(then.all_keys - now.loaded)
    if now.created is not None:
        found.append(then.keys - (now.keys - now.created))
    if (replayed := _least_replayed(then, now)) is not None and then.all_keys is not None:
        found.append(then.all_keys - replayed)
    return max(min(found), 0) if found else None


def _least_replayed(then: Primary, now: Primary) -> int | None:
    """How many keys an append-only file has brought back, at the least; None: nobody can know.

    It has every change since it was begun, and so Redis counts them all again when it's loaded.
    Each key that is gone takes a change, and so does each that came since the start: of n keys
    then, m now and c changes in between, at least (n + m - c) / 2 were there at the start.
    """
    changes = (then.changes, now.changes, then.all_keys, now.all_keys)
    if not now.is_unsaved or None in changes or then.base_bytes is None or now.base_bytes is None:
        return None
    is_new = then.base_bytes == 0 and now.base_bytes <= _EMPTY_BASE_BYTES
    if then.base_bytes != now.base_bytes and not is_new:
        return None  # it was rewritten
    old_changes, new_changes, old_keys, new_keys = (each or 0 for each in changes)
    # Else what it holds now was all made since: it was rewritten, and empty.
    if new_changes - old_changes < (now.writes or 0):
        return None
    return max((old_keys + new_keys - (new_changes - old_changes)) // 2, 0)
