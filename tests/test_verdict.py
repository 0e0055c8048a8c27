"""Whether the balances are safe, state by state: judged once, and shown as it is everywhere."""

import re
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.text import Text

from balancesync import standing
from balancesync.model import Request, new_run
from balancesync.verdict import Ended, Situation, Success, judge

AT = datetime(2026, 1, 31, 2, tzinfo=UTC)
NOW = datetime(2026, 1, 31, 2, 4, 0, 900_000, tzinfo=UTC)
T = "2026-01-31T02:00:00Z"
UNTIL = f"everything up to {T} is in PostgreSQL"
ALONE = "what has changed since is in Redis alone"
GOOD = Situation(until=AT, success=Success(AT), synced=Ended("sync", "succeeded"))
NEVER = Situation()
FAILED = Ended("sync", "failed", "the table balances is locked")
FIRST = replace(new_run(Request("sync", "startup")), status="running")
VERIFY_FAILED = Ended("verify", "failed", "no table")
OVER = "60,004 are open, more than guard.max_rejects = 0.1 allows"

# Each state that there is: what it is made of, the level and the line.
STATES: dict[str, tuple[Situation, str, str]] = {
    "well": (GOOD, "safe", f"safe: {UNTIL}"),
    "live is up": (
        replace(GOOD, live="up", until=NOW),
        "safe",
        "safe: everything up to 2026-01-31T02:04:00Z is in PostgreSQL; what changes follows live",
    ),
    "standby": (replace(GOOD, live="off"), "safe", f"safe: {UNTIL}"),
    "keys without a row": (
        replace(GOOD, success=Success(AT, not_found=2)),
        "safe",
        f"safe: {UNTIL}, but for 2 keys without a row",
    ),
    "a running sync": (replace(GOOD, current=FIRST), "safe", f"safe: {UNTIL}"),
    "never synced": (NEVER, "wait", "no sync has succeeded yet: nothing is known to be safe"),
    "never synced, no daemon": (
        replace(NEVER, attended=False),
        "look",
        "no sync has succeeded yet: nothing is known to be safe",
    ),
    "the first sync": (
        replace(NEVER, current=FIRST),
        "wait",
        "the first sync is running: nothing is known to be safe before it has succeeded",
    ),
    "the first sync failed": (
        replace(NEVER, synced=FAILED),
        "act",
        "not safe: no sync has succeeded, the last was failed",
    ),
    "never synced for long": (
        replace(NEVER, overdue=True),
        "act",
        "not safe: no sync has succeeded for two intervals of the schedule",
    ),
    "refused": (
        replace(GOOD, refused=["m"]),
        "act",
        f"stopped: the guard refuses to follow Redis; {UNTIL}, and stays as it is",
    ),
    "refused at once": (
        replace(NEVER, refused=["m"]),
        "act",
        "stopped: the guard refuses to follow Redis; nothing is written",
    ),
    "refused elsewhere": (
        replace(GOOD, elsewhere=["a sync was refused on another Redis: is redis.url right?"]),
        "look",
        f"{UNTIL}; a sync was refused on another Redis",
    ),
    "Redis down": (
        replace(GOOD, redis=False),
        "act",
        f"Redis doesn't answer; {UNTIL}, {ALONE}",
    ),
    "Redis down with live": (
        replace(GOOD, redis=False, until=NOW, live="down"),
        "act",
        f"Redis doesn't answer; everything up to 2026-01-31T02:04:00Z is in PostgreSQL, {ALONE}",
    ),
    "Redis down and refused": (
        replace(GOOD, redis=False, refused=["m"]),
        "act",
        "Redis doesn't answer; stopped: the guard refuses to follow Redis;"
        f" {UNTIL}, and stays as it is",
    ),
    "Redis down before a sync": (replace(NEVER, redis=False), "act", "Redis doesn't answer"),
    "PostgreSQL down": (
        replace(GOOD, postgres=False),
        "act",
        f"PostgreSQL doesn't answer; {UNTIL}, {ALONE}",
    ),
    "PostgreSQL never asked": (
        replace(NEVER, postgres=False),
        "act",
        "PostgreSQL doesn't answer",
    ),
    "both down": (
        replace(GOOD, postgres=False, redis=False),
        "act",
        f"neither PostgreSQL nor Redis answers; {UNTIL}, {ALONE}",
    ),
    "no tables": (
        replace(NEVER, trouble="run `balancesync init`"),
        "act",
        "balancesync's own tables can't be read",
    ),
    "locked tables": (
        replace(GOOD, stale="the table runs is locked"),
        "look",
        f"{UNTIL}; what is recorded can't be read now",
    ),
    "a run postponed": (
        replace(GOOD, waits="runs when it can: sync of all mappings: Redis is away"),
        "look",
        f"{UNTIL}; a run waits",
    ),
    "live is down": (
        replace(GOOD, live="down", live_reason="a right is missing"),
        "look",
        f"{UNTIL}; live mode is down",
    ),
    "live catches up": (
        replace(GOOD, live="catching up"),
        "look",
        f"{UNTIL}; live mode is catching up",
    ),
    "live, but no daemon": (
        replace(GOOD, unfollowed="enabled, but no daemon leads", attended=False),
        "look",
        f"{UNTIL}; changes aren't known to be followed",
    ),
    "a reject": (replace(GOOD, rejects=1), "look", f"safe: {UNTIL}, but for 1 reject"),
    "rejects and keys without a row": (
        replace(GOOD, rejects=10_000, success=Success(AT, not_found=2)),
        "look",
        f"safe: {UNTIL}, but for 10,000 rejects and 2 keys without a row",
    ),
    "rejects over the limit": (
        replace(GOOD, rejects=60_004, rejects_over=OVER, synced=FAILED),
        "act",
        f"not safe: 60,004 records can't be stored; all others, up to {T}, are in PostgreSQL",
    ),
    "drift": (
        replace(GOOD, drift={"m": 40}),
        "look",
        "drift: the last verify found that 40 rows differ from Redis; all others, up to"
        f" {T}, are in PostgreSQL",
    ),
    "drift in live mode": (
        replace(GOOD, drift={"m": 1}, live="up"),
        "look",
        "drift: the last verify found that 1 row differs from Redis; all others, up to"
        f" {T}, are in PostgreSQL",
    ),
    "no key at all": (
        replace(GOOD, success=Success(AT, without_keys=["m"])),
        "look",
        f"Redis had no key of m at {T}: is redis.url right?",
    ),
    "a new mapping": (
        replace(GOOD, success=Success(AT, unread=["m"])),
        "look",
        f"not safe: m was never copied as a whole; the rest, up to {T}, is in PostgreSQL",
    ),
    "a stale success": (
        replace(GOOD, overdue=True),
        "act",
        f"not safe: nothing newer than {T} is known to be in PostgreSQL",
    ),
    "a stale success with live": (
        replace(GOOD, overdue=True, live="up", until=NOW),
        "act",
        "no full sync has succeeded for two intervals; live mode: everything up to"
        " 2026-01-31T02:04:00Z is in PostgreSQL",
    ),
    "the last sync failed": (
        replace(GOOD, synced=FAILED),
        "look",
        f"{UNTIL}; the last sync failed",
    ),
    "the last verify failed": (
        replace(GOOD, verified=VERIFY_FAILED),
        "look",
        f"{UNTIL}; the last verify failed",
    ),
    "a verify was stopped": (
        replace(GOOD, verified=Ended("verify", "cancelled", "cancelled on demand")),
        "safe",
        f"safe: {UNTIL}",
    ),
    "draining": (replace(GOOD, stops=True), "look", f"safe: {UNTIL}"),
    "draining and refused": (
        replace(GOOD, stops=True, refused=["m"]),
        "act",
        f"stopped: the guard refuses to follow Redis; {UNTIL}, and stays as it is",
    ),
}


@pytest.mark.parametrize("state", STATES)
def test_each_state_has_a_level_and_a_line(state: str) -> None:
    now, level, line = STATES[state]
    found = judge(now)
    assert (found.level, found.line) == (level, line)
    for text in (found.line, *found.advice):
        assert "\n" not in text
        assert not re.search(r"\.\.|  |None", text)
    assert all(sentence.endswith((".", "?", "!")) for sentence in found.advice)


def test_green_is_only_what_is_proven() -> None:
    for name, (now, _, _) in STATES.items():
        found = judge(now)
        if found.level == "safe":
            assert all((now.redis, now.postgres, now.until)), name
            doubts = (now.refused, now.drift, now.rejects, now.waits, now.trouble, now.stale)
            assert not any(doubts), name
            assert now.live in (None, "up", "off"), name
        if found.line.startswith("safe:"):
            assert now.live in (None, "up", "off"), name
            assert not any((now.drift, now.overdue, now.rejects_over, now.waits)), name


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (replace(GOOD, redis=False), "A sync starts when it is back."),
        (replace(GOOD, redis=False), "`balancesync restore` brings these back"),
        (replace(GOOD, redis=False, postgres=False), "A sync starts when both are back."),
        (replace(GOOD, redis=False, attended=False), "run `balancesync sync`"),
        (replace(GOOD, waits="x: sync of all mappings"), "A run waits: x: sync of all mappings."),
        (replace(GOOD, synced=FAILED), "The last sync failed: the table balances is locked."),
        (replace(GOOD, drift={"m": 1}, live="down"), "Live mode is down."),
        (replace(GOOD, stops=True), "This daemon is stopping: nothing new is started."),
        (
            replace(GOOD, stops=True, current=FIRST),
            "This daemon is stopping: its run ends with the batch under way, and nothing new",
        ),
    ],
)
def test_what_to_do_is_said(now: Situation, said: str) -> None:
    assert said in " ".join(judge(now).advice)


SERVER = {"connected": True, "address": "a:1", "version": "9", "latency_ms": 0.1, "error": None}
STATUS: dict[str, Any] = {
    "state": "idle",
    "redis": SERVER,
    "postgres": SERVER,
    "last_success_at": None,
    "last_run": None,
    "current_run": None,
    "refusal": None,
    "rejects": {},
    "no_daemon": "no daemon answers",
    "leader": None,
}
COLOURS = {"safe": "green", "wait": "cyan", "look": "yellow", "act": "red"}


@pytest.mark.parametrize("state", STATES)
def test_status_shows_it_as_it_is(state: str) -> None:
    found = judge(STATES[state][0])
    lines = standing.status_lines(STATUS | {"verdict": found.document()})
    texts = [str(line) for line in lines[: 1 + len(found.advice)]]
    assert texts == [found.line, *found.advice]
    assert isinstance(lines[0], Text)
    assert lines[0].style == f"bold {COLOURS[found.level]}"
