"""The pure rule: what proves that a Redis wasn't emptied, one difference at a time."""

from dataclasses import replace
from typing import Any

import pytest

from balancesync.continuity import (
    Continuity,
    Doubt,
    Place,
    Primary,
    Sighting,
    judge_by_count,
    judge_continuity,
)


def primary(number: int, **fields: Any) -> Primary:
    said: dict[str, Any] = {
        "address": f"host:{number}",
        "database": 0,
        "keys": 100,
        "run_id": f"r{number}",
        "started": 1000.0,
        "clocked": True,
        "uptime_s": 500,
        "history": f"h{number}",
        "offset": 100,
        "flushes": 0,
        "swaps": 0,
        "reset": "",
        "counters": (5,),
        "all_keys": 100,
    }
    return Primary(**(said | fields))


def seen(*primaries: Primary, at: float | None = 0.0, **fields: Any) -> Sighting:
    return Sighting(primaries, **{"moment": 7, "at": at} | fields)


def judge(before: Sighting, now: Sighting, max_loss: float = 0.5) -> Continuity:
    return judge_continuity(before, now, max_loss)


def doubt(before: Sighting, now: Sighting) -> Doubt:
    found = judge(before, now).doubt
    assert found is not None
    return found


def words(found: Continuity) -> str:
    """Its kind, and whether it's only that nobody can know; else how it is proven."""
    if found.doubt is None:
        return "unbroken" if found.is_unbroken else "came back"
    return f"{found.doubt.kind}, unknown" if found.doubt.is_blind else found.doubt.kind


RESET = "calls=1,usec=9"
# Another start, of another history; a replica that took over; a start that replays a file.
NEW: dict[str, Any] = {"run_id": "x", "history": "x"}
TOOK = NEW | {"past": "h1", "past_offset": 101}
FILE: dict[str, Any] = {"changes": 100, "base_bytes": 0}
REPLAYED = NEW | {"changes": 110, "base_bytes": 88, "is_unsaved": True, "writes": 10}


@pytest.mark.parametrize(
    ("then", "now", "verdict"),
    [
        # The same start.
        ({}, {}, "unbroken"),
        ({}, {"flushes": 1}, "flushed"),
        ({"flushes": 3}, {"flushes": 3}, "unbroken"),
        ({"flushes": 3}, {"flushes": 2}, "reset, unknown"),
        ({}, {"reset": RESET}, "reset, unknown"),
        ({"reset": RESET}, {"reset": RESET}, "unbroken"),
        ({"reset": RESET}, {"reset": "calls=1,usec=8"}, "reset, unknown"),
        ({"reset": None}, {}, "untold, unknown"),
        ({}, {"reset": None}, "untold, unknown"),
        ({"reset": None}, {"reset": None}, "untold, unknown"),
        ({}, {"counters": (5,)}, "unbroken"),
        ({}, {"counters": (4,)}, "reset, unknown"),
        ({}, {"counters": (5, 1)}, "reset, unknown"),
        ({"counters": (5, 5)}, {"counters": (4, 6)}, "reset, unknown"),
        ({}, {"swaps": 1}, "swapped"),
        ({"flushes": None}, {"flushes": None}, "untold, unknown"),
        ({"flushes": None}, {}, "untold, unknown"),
        ({}, {"flushes": None}, "untold, unknown"),
        ({"history": None}, {"history": None}, "untold, unknown"),
        ({"started": None}, {}, "untold, unknown"),
        ({}, {"started": None}, "untold, unknown"),
        ({"run_id": None}, {"run_id": None}, "unbroken"),
        ({"run_id": None}, {}, "untold, unknown"),
        ({}, {"run_id": None}, "untold, unknown"),
        ({}, {"started": 1000.5}, "restarted, unknown"),
        ({"clocked": False}, {"started": 1001.5}, "unbroken"),
        ({}, {"clocked": False, "started": 1001.5}, "unbroken"),
        ({"clocked": False}, {"started": 1001.6}, "restarted, unknown"),
        ({}, {"history": "x"}, "replaced"),
        # A new start.
        ({"run_id": None}, {"run_id": None, "started": 1001.0, "history": "x"},
         "restarted, unknown"),
        ({}, {"started": 1001.0, "history": "x"}, "restarted, unknown"),
        ({}, NEW, "restarted, unknown"),
        ({}, NEW | {"address": "host:9"}, "restarted, unknown"),
        ({}, NEW | {"loaded": 49}, "restarted"),
        ({}, NEW | {"loaded": 50}, "came back"),
        ({"all_keys": None}, NEW | {"loaded": 100}, "restarted, unknown"),
        ({}, NEW | {"loaded": 100, "flushes": 1}, "flushed"),
        ({}, NEW | {"loaded": 100, "swaps": 1}, "flushed"),
        ({"swaps": 3}, NEW | {"loaded": 100}, "came back"),
        ({}, NEW | {"loaded": 100, "flushes": None}, "restarted, unknown"),
        ({}, NEW | {"loaded": 100, "swaps": None}, "restarted, unknown"),
        ({}, NEW | {"loaded": 100, "reset": RESET}, "reset, unknown"),
        ({}, NEW | {"loaded": 100, "reset": None}, "reset, unknown"),
        ({}, NEW | {"created": 50}, "came back"),
        ({}, NEW | {"created": 51}, "restarted, unknown"),
        ({}, NEW | {"created": 0, "loaded": 10}, "came back"),
        # A new start with an append-only file: each change may be a key that came or went.
        (FILE, REPLAYED, "came back"),
        (FILE, REPLAYED | {"changes": 200}, "came back"),
        (FILE, REPLAYED | {"changes": 201}, "restarted, unknown"),
        (FILE, REPLAYED | {"changes": 200, "keys": 98, "all_keys": 98}, "restarted, unknown"),
        (FILE, REPLAYED | {"is_unsaved": False}, "restarted, unknown"),
        (FILE, REPLAYED | {"changes": None}, "restarted, unknown"),
        (FILE, REPLAYED | {"all_keys": None, "changes": 100, "writes": 0}, "restarted, unknown"),
        (FILE | {"all_keys": None}, REPLAYED, "restarted, unknown"),
        (FILE | {"changes": None}, REPLAYED | {"changes": 20}, "restarted, unknown"),
        (FILE | {"base_bytes": None}, REPLAYED, "restarted, unknown"),
        (FILE, REPLAYED | {"base_bytes": None}, "restarted, unknown"),
        # Rewritten since, unless the base has only just been made.
        (FILE, REPLAYED | {"base_bytes": 200}, "came back"),
        (FILE, REPLAYED | {"base_bytes": 201}, "restarted, unknown"),
        (FILE | {"base_bytes": 1}, REPLAYED, "restarted, unknown"),
        (FILE | {"base_bytes": 5000}, REPLAYED | {"base_bytes": 5000}, "came back"),
        # More was written since its start than the file and it have seen together.
        (FILE, REPLAYED | {"writes": 11}, "restarted, unknown"),
        (FILE, REPLAYED | {"changes": 100, "writes": None}, "came back"),
        # A replica that took over.
        ({}, TOOK, "unbroken"),
        ({}, TOOK | {"past_offset": 100}, "went_back"),
        ({}, TOOK | {"flushes": 1}, "flushed"),
        ({}, TOOK | {"swaps": 1}, "flushed"),
        ({}, TOOK | {"uptime_s": 298}, "unbroken"),
        ({}, TOOK | {"uptime_s": 297}, "restarted, unknown"),
        ({}, TOOK | {"uptime_s": None}, "restarted, unknown"),
        ({}, TOOK | {"flushes": None}, "restarted, unknown"),
        ({}, TOOK | {"swaps": None}, "restarted, unknown"),
        ({}, TOOK | {"reset": RESET}, "reset, unknown"),
        ({}, TOOK | {"past": "y"}, "restarted, unknown"),
        ({}, TOOK | {"past": None}, "restarted, unknown"),
        ({}, TOOK | {"past_offset": None}, "restarted, unknown"),
        ({"offset": None}, TOOK, "restarted, unknown"),
        ({"history": None}, TOOK | {"past": None}, "restarted, unknown"),
        ({}, TOOK | {"history": "h1"}, "restarted, unknown"),
        # An open ear.
        ({"flushes": None}, {"flushes": None, "heard_since": 7}, "unbroken"),
        ({"flushes": None}, {"flushes": None, "heard_since": 8}, "untold, unknown"),
        ({"flushes": None, "swaps": None}, {"heard_since": 7}, "unbroken"),
        ({}, {"swaps": 1, "heard_since": 7}, "swapped"),
        ({}, {"run_id": "x", "heard_since": 7}, "restarted, unknown"),
        ({}, {"history": "x", "heard_since": 7}, "replaced"),
        ({"run_id": None}, {"heard_since": 7}, "unbroken"),
        ({"run_id": None}, {"address": "host:9", "heard_since": 7}, "untold, unknown"),
        ({"reset": None}, {"address": "host:9", "heard_since": 7}, "unbroken"),
        ({"run_id": None, "history": None},
         {"run_id": None, "history": None, "started": 2000.0, "heard_since": 7},
         "restarted, unknown"),
    ],
)  # fmt: skip
def test_what_proves_that_a_primary_was_not_emptied(
    then: dict[str, Any], now: dict[str, Any], verdict: str
) -> None:
    found = judge(seen(primary(1, **then)), seen(primary(1, **now), at=300.0))
    assert words(found) == verdict
    if found.doubt is not None:
        assert (found.doubt.keys, found.doubt.is_partial) == (100, False)


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        ({}, {"flushes": None, "history": None}, "its INFO lacks master_replid and commandstats"),
        ({"started": None}, {}, "its INFO lacks uptime_in_seconds"),
        ({"run_id": None}, {}, "its INFO lacks run_id"),
        ({}, NEW | {"flushes": None}, "its INFO lacks commandstats"),
        ({}, NEW | {"flushes": 1}, "and emptied by FLUSHALL or FLUSHDB since its start"),
        ({}, NEW | {"swaps": 1}, "and changed by SWAPDB since its start"),
        ({}, NEW, "and doesn't tell with how many keys"),
        ({}, NEW | {"loaded": 40}, "since the last success, with 40 keys"),
        ({"keys": 10}, NEW | {"loaded": 20}, "since the last success, with 0 keys"),
        ({}, NEW | {"created": 60}, "no more than that it came with 40 of 100 keys"),
        (FILE, REPLAYED | {"changes": 900}, "no more than that it came with 0 of 100 keys"),
    ],
)
def test_a_doubt_says_what_is_known_and_no_more(
    then: dict[str, Any], now: dict[str, Any], said: str
) -> None:
    found = doubt(seen(primary(1, **then)), seen(primary(1, **now), at=300.0))
    assert found.sentence.endswith(said)


def test_what_may_not_lack_a_key_may_lack_none() -> None:
    then = seen(primary(1))
    for loaded, verdict in ((100, "came back"), (99, "restarted")):
        assert words(judge(then, seen(primary(1, **NEW, loaded=loaded)), max_loss=0)) == verdict


def test_without_a_moment_an_ear_proves_nothing_and_without_a_time_a_replica_does_not() -> None:
    dumb, heard = primary(1, flushes=None), primary(1, flushes=None, heard_since=7)
    assert words(judge(seen(dumb, moment=None), seen(heard))) == "untold, unknown"
    one, took = primary(1), primary(1, **TOOK)
    for before_at, at in ((None, 300.0), (0.0, None)):
        found = judge(seen(one, at=before_at), seen(took, at=at))
        assert words(found) == "restarted, unknown"
    # 700 s later, of which it has been up for 500: it came as a new server in between.
    assert words(judge(seen(one), seen(took, at=700.0))) == "restarted, unknown"
    assert words(judge(seen(one, at=400.0), seen(took, at=700.0))) == "unbroken"


def test_other_keys_are_nothing_that_was_seen_before() -> None:
    one = primary(1)
    other = doubt(seen(one), seen(replace(one, database=1)))
    assert (other.kind, other.keys, other.is_blind) == ("moved", 100, False)
    renamed = doubt(seen(one, key="a:{id}"), seen(one, key="b:{id}"))
    assert (renamed.kind, renamed.keys, renamed.is_blind) == ("moved", 100, False)
    for keys in (("a:{id}", "a:{id}"), (None, "a:{id}"), ("a:{id}", None)):
        assert words(judge(seen(one, key=keys[0]), seen(one, key=keys[1]))) == "unbroken"


# --- several primaries ----------------------------------------------------------------------------


def test_primaries_that_join_are_trusted_and_those_that_leave_must_have_been_empty() -> None:
    one, two, three = map(primary, range(3))
    assert words(judge(seen(one, two), seen(three, two, one))) == "unbroken"
    assert words(judge(seen(one, replace(two, keys=0)), seen(one, three))) == "unbroken"
    left = doubt(seen(one, two), seen(one, three))
    assert (left.kind, left.keys, left.is_partial) == ("gone", 100, True)
    assert "of 2 primaries" not in left.sentence
    emptied = doubt(seen(one, two), seen(three, one, replace(two, flushes=1)))
    assert (emptied.kind, emptied.keys, emptied.is_partial) == ("flushed", 100, True)
    assert emptied.sentence.endswith(" (this is about 1 of 2 primaries)")


def test_each_primary_is_known_again_by_what_tells_most() -> None:
    one, two = primary(1, node="n1"), primary(2, node="n2", keys=40)
    # By its run_id, whoever says to go on with its history.
    heir = primary(3, history="x", past="h1")
    assert words(judge(seen(one, two), seen(one, two, heir))) == "unbroken"
    # By its history, where no run_id is told.
    nameless = [replace(each, run_id=None, node=None) for each in (one, two)]
    assert words(judge(seen(*nameless), seen(*reversed(nameless)))) == "unbroken"
    # By its address, where nothing else is told.
    alone = [replace(each, history=None, heard_since=7) for each in nameless]
    assert words(judge(seen(*alone), seen(*reversed(alone)))) == "unbroken"
    # By its node, wherever that is now.
    fields: dict[str, Any] = {"started": 2000.0}
    moved = [
        primary(3, node="n1", address="host:2", loaded=100, **fields),
        primary(4, node="n2", address="host:1", loaded=0, **fields),
    ]
    assert doubt(seen(one, two), seen(*reversed(moved))).keys == 40
    # One is nobody else at the same time.
    found = doubt(seen(one, two), seen(replace(one, address="host:2"), primary(5)))
    assert (found.kind, found.keys) == ("gone", 40)


def test_what_is_known_to_have_happened_is_said_before_what_nobody_knows() -> None:
    one, two = primary(1), primary(2, keys=40)
    for now in (
        (replace(one, flushes=None), replace(two, flushes=1)),
        (replace(one, flushes=1), replace(two, flushes=None)),
    ):
        found = doubt(seen(one, two), seen(*now))
        assert (found.kind, found.is_blind, found.is_partial) == ("flushed", False, False)
        assert found.keys == 140
        assert "of 2 primaries" not in found.sentence
    back = primary(1, **NEW, loaded=100)
    assert words(judge(seen(one, two), seen(back, two))) == "came back"


def test_a_sighting_knows_of_all_primaries_or_says_nothing() -> None:
    one, two = primary(1, flushes=2), primary(2, flushes=3)
    both = seen(two, one)
    assert (both.run_id, both.flushes, both.keys) == ("r1,r2", 5, 200)
    assert seen(one, replace(two, run_id=None)).run_id is None
    assert seen(one, replace(two, flushes=None)).flushes is None


@pytest.mark.parametrize("field", ["started", "history", "flushes"])
def test_a_primary_is_blind_only_if_it_does_not_tell_and_nobody_listens(field: str) -> None:
    assert not primary(1).is_blind
    assert not primary(1, heard_since=7).is_blind
    assert primary(1, **{field: None}).is_blind
    assert not primary(1, **{field: None}, heard_since=7).is_blind


# --- a run's beginning and end, and what is stored ------------------------------------------------


def test_a_run_keeps_what_counts_losses_from_before_it_read() -> None:
    before = primary(1, changes=1, base_bytes=0, keys=100, all_keys=100)
    later = {"offset": 200, "counters": (9,), "changes": 5, "base_bytes": 88}
    after = replace(before, keys=3, all_keys=4, flushes=1, swaps=2, heard_since=9, **later)  # type: ignore[arg-type]
    other = primary(2)
    assert seen(before, other).ended(seen(other, after)).primaries == (
        replace(before, **later),  # type: ignore[arg-type]
        other,
    )


@pytest.mark.parametrize("fields", [{"history": "x"}, {"reset": RESET}])
def test_what_happened_while_a_run_read_is_left_for_the_next_look(fields: dict[str, Any]) -> None:
    before = seen(primary(1))
    after = seen(primary(1, offset=200, counters=(9,), **fields))
    assert before.ended(after) == before


def test_primaries_without_a_run_id_end_as_the_one_at_their_address() -> None:
    one, two = (primary(each, run_id=None, history=None) for each in (1, 2))
    after = seen(replace(two, offset=300), replace(one, offset=200))
    assert [each.offset for each in seen(one, two).ended(after).primaries] == [200, 300]


def test_a_sighting_is_stored_whole_and_one_by_a_newer_program_is_read() -> None:
    one = seen(primary(1, counters=(1, 2), loaded=3), at=5.0, key="a:{id}")
    stored = one.dump()
    for each in stored["primaries"]:
        each["told_by_a_newer_program"] = 1
        each["counters"] = list(each["counters"])
    assert Sighting.load(stored) == one


@pytest.mark.parametrize(
    ("run_id", "flushes", "now", "verdict"),
    [
        ("r1", 2, {"flushes": 2}, "came back"),
        ("r1", 2, {"flushes": 3}, "flushed"),
        ("r1", 2, {"flushes": 1}, "flushed"),
        ("r1", 2, {"flushes": None}, "untold, unknown"),
        ("r1", 2, {"flushes": 2, "reset": RESET}, "untold, unknown"),
        ("r2", 2, {"flushes": 2}, "untold, unknown"),
        ("r2", 2, {"flushes": 3}, "untold, unknown"),
        ("r1", None, {"flushes": None}, "untold, unknown"),
        (None, 2, {"flushes": 2, "run_id": None}, "untold, unknown"),
    ],
)
def test_what_the_program_before_this_one_kept_proves_less(
    run_id: str | None, flushes: int | None, now: dict[str, Any], verdict: str
) -> None:
    assert words(judge_by_count(run_id, flushes, seen(primary(1, **now)))) == verdict


def test_each_primary_tells_whether_its_count_was_reset() -> None:
    both = seen(primary(1, flushes=1), primary(2, flushes=1, reset=RESET))
    assert words(judge_by_count("r1,r2", 2, both)) == "untold, unknown"


# --- where a refusal stands -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("then", "now", "is_here"),
    [
        ({}, {}, True),
        ({}, {"run_id": "x"}, True),
        ({}, {"history": "x"}, True),
        ({}, {"run_id": "x", "history": "x", "past": "h1"}, True),
        ({}, {"run_id": "x", "history": "x"}, False),
        ({}, {"run_id": "x", "history": "x", "past": "y"}, False),
        ({}, {"database": 1}, False),
        # Where one doesn't tell, the other decides; where nothing tells, it may be here.
        ({"history": None}, {"history": None}, True),
        ({"history": None}, {"run_id": "x", "history": None}, False),
        ({"run_id": None}, {"run_id": None, "history": "x"}, False),
        ({}, {"run_id": None, "history": None}, True),
        ({"run_id": None, "history": None}, {}, True),
        ({"history": None}, {"run_id": None, "history": None}, True),
        ({"run_id": None}, {"history": None}, True),
    ],
)
def test_a_refusal_stands_where_it_was_met(
    then: dict[str, Any], now: dict[str, Any], *, is_here: bool
) -> None:
    place = Place.of(seen(primary(1, **then), key="a:{id}"))
    assert place.has(seen(primary(1, **now), key="a:{id}")) is is_here
    assert not place.has(seen(primary(1, **now), key="b:{id}"))
