"""The pure guard: each figure that it judges by, at the limit and one beyond it."""

from typing import Any

import pytest

from balancesync.model import Baseline, Observed, guard

FLUSHED = "Redis was emptied"


def judge(seen: Observed, baseline: Baseline | None, **fields: Any) -> tuple[int, int, str | None]:
    """How many were known, how many are lost, and why it's refused."""
    limits: dict[str, Any] = {
        "standing": False,
        "suspicion": None,
        "max_loss": 0.5,
        "max_change": 1.0,
    }
    found = guard("m", seen, baseline, **limits | fields)
    if found.refusal is None:
        return found.known, found.lost, None
    return found.known, found.lost, f"{found.refusal.kind}: {found.refusal.reason}"


def seen(present: int, absent: int = 0, changed: int = 0, deletable: int = 0) -> Observed:
    return Observed(present, absent, changed, deletable, target_rows=present + absent)


@pytest.mark.parametrize(
    ("observed", "baseline", "known", "lost", "reason"),
    [
        (seen(100), Baseline(100, 0), 100, 0, None),
        (seen(100), None, 0, 0, None),
        # Rows without a key, or fewer keys: whichever are more.
        (seen(60, 40), Baseline(100, 0), 100, 40, None),
        (seen(60, 0), Baseline(100, 0), 100, 40, None),
        (seen(90, 40), Baseline(100, 0), 100, 40, None),
        (seen(60, 10), Baseline(100, 0), 100, 40, None),
        (seen(50, 50), Baseline(100, 0), 100, 50, None),
        (seen(49, 51), Baseline(100, 0), 100, 51,
         "loss: 51 of 100 known keys are gone, more than guard.max_loss = 0.5"),
        (seen(100, 51), Baseline(100, 0), 100, 51,
         "loss: 51 of 100 known keys are gone, more than guard.max_loss = 0.5"),
        # What was absent then isn't lost now, nor is what others have added.
        (seen(100, 70), Baseline(100, 70), 100, 0, None),
        (seen(200, 20), Baseline(100, 30), 100, 0, None),
        (seen(100, 900), Baseline(100, 0), 100, 100,
         "loss: 100 of 100 known keys are gone, more than guard.max_loss = 0.5"),
        # What was pruned is neither known nor lost.
        (seen(40, 60), Baseline(100, 0, pruned=60), 40, 0, None),
        (seen(20, 80), Baseline(100, 0, pruned=60), 40, 20, None),
        (seen(19, 81), Baseline(100, 0, pruned=60), 40, 21,
         "loss: 21 of 40 known keys are gone, more than guard.max_loss = 0.5"),
        (seen(0, 100), Baseline(100, 0, pruned=100), 0, 0, None),
        (seen(0, 100), Baseline(100, 0), 100, 100,
         "loss: Redis has no key at all, but 100 were known"),
    ],
)  # fmt: skip
def test_what_is_known_and_what_is_lost(
    observed: Observed, baseline: Baseline | None, known: int, lost: int, reason: str | None
) -> None:
    assert judge(observed, baseline) == (known, lost, reason)


@pytest.mark.parametrize(
    ("observed", "suspected", "reason"),
    [
        (seen(100, changed=50), None, None),
        (seen(100, changed=51), None, "51 of 100 known keys came back changed"),
        (seen(70, 30, changed=20), None, None),
        (seen(70, 30, changed=21), None,
         "30 of 100 known keys are gone and 21 came back changed"),
        # Where only some primaries are under suspicion, it counts against what they held.
        (seen(100, changed=20), 40, None),
        (seen(100, changed=21), 40, "21 of 100 known keys came back changed"),
        (seen(90, 10, changed=10), 40, None),
        (seen(90, 10, changed=11), 40, "10 of 100 known keys are gone and 11 came back changed"),
        # Nothing came back changed: then it's a loss like others.
        (seen(70, 30), 40, None),
        (seen(100, changed=50), 100, None),
        (seen(100, changed=50), 900, None),
        (seen(100, changed=51), 900, "51 of 100 known keys came back changed"),
    ],
)  # fmt: skip
def test_in_doubt_what_came_back_changed_counts_as_lost(
    observed: Observed, suspected: int | None, reason: str | None
) -> None:
    found = judge(observed, Baseline(100, 0), suspicion=FLUSHED, suspected=suspected)[2]
    if suspected is not None and suspected < 100:
        end = f", more than guard.max_loss = 0.5 of the {suspected} keys that were there"
    else:
        end = ", more than guard.max_loss = 0.5"
    assert found == (None if reason is None else f"loss: {FLUSHED}: {reason}{end}")
    # Without a doubt it's what balances do.
    assert judge(observed, Baseline(100, 0))[2] is None


@pytest.mark.parametrize("suspicion", [None, FLUSHED])
def test_while_a_refusal_stands_not_one_may_be_lost_or_differ(suspicion: str | None) -> None:
    known = Baseline(100, 0)
    until = "and the refusal stands until none is"
    for observed, said in (
        (seen(100), None),
        (seen(100, changed=1), f"loss: 1 of 100 known keys came back changed, {until}"),
        (seen(99, 1), f"loss: 1 of 100 known keys are gone, {until}"),
        (
            seen(99, 1, changed=1),
            f"loss: 1 of 100 known keys are gone and 1 came back changed, {until}",
        ),
        # Fewer keys of which none has a row: no row says what was lost.
        (seen(99), None),
    ):
        assert judge(observed, known, standing=True, suspicion=suspicion)[2] == said
    # A limit of 1 allows every loss but that of all keys.
    allowed = {"standing": True, "suspicion": suspicion, "max_loss": 1.0}
    assert judge(seen(1, 99, changed=1), known, **allowed)[2] is None
    assert judge(seen(0, 100), known, **allowed)[2] is not None


def test_changes_and_deletions_are_judged_together_and_only_where_there_are_rows() -> None:
    assert judge(seen(80, 20, changed=10, deletable=10), None, max_change=0.2)[2] is None
    assert judge(seen(80, 20, changed=11, deletable=10), None, max_change=0.2)[2] == (
        "change: 21 of 100 rows would be updated or deleted, more than guard.max_change = 0.2"
    )
    assert judge(Observed(5, 0, 1, 0, target_rows=0), None, max_change=0.0)[2] is None
    # A limit of 1 is none, however many rows have changed meanwhile.
    assert judge(Observed(5, 0, 9, 0, target_rows=5), None, max_change=1.0)[2] is None
