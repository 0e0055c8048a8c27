"""Whether the balances are safe, and what to do: judged here, once, and shown everywhere as it is.

    safe    every record was written, kept as a reject or counted; nothing wants a look
    wait    nothing is known yet, and what will tell is under way or planned
    look    somebody should look, today
    act     somebody should act, now

`safe` is said of what is proven alone: up to a moment, before which every change in Redis is known
to be in PostgreSQL.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Literal

from balancesync.model import Run
from balancesync.times import short_time_text

Level = Literal["safe", "wait", "look", "act"]
LiveState = Literal["off", "up", "catching up", "down"]

_ENDED_WELL: Final = ("succeeded", "skipped")
_ALONE: Final = "what has changed since is in Redis alone"


@dataclass(frozen=True, slots=True)
class Verdict:
    """How it is, in one line, and what to do, a sentence each; times are in UTC."""

    level: Level
    line: str
    advice: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """The same for programs."""
        return {"level": self.level, "line": self.line, "advice": list(self.advice)}


@dataclass(frozen=True, slots=True)
class Success:
    """The last success: when it began, and what it told of what isn't in PostgreSQL."""

    started_at: datetime
    not_found: int = 0
    without_keys: Sequence[str] = ()
    # Mappings that are configured by now, and that it knew nothing of.
    unread: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """A run that ended, and how."""

    job: str
    status: str
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Situation:
    """What the verdict is made of.

    Of both servers whether they answer. `until` is the moment up to which all is known to be in
    PostgreSQL. `trouble` is why balancesync's own tables can't be read. `refused` are the mappings
    that the guard refuses; `elsewhere` says what it has refused on another Redis. Of rejects how
    many are open, and the limit that they are over. `overdue` says that no success is as young as
    the schedule wants. `drift` is what the last verify found to differ, by mapping. `synced` and
    `verified` are the last sync that was to write and the last verify that ended. `waits` is what a
    postponed run waits for; `unfollowed`, why live mode may not be up; `stale`, why all this is as
    of some time ago. `attended` says that a daemon runs things; `stops`, that it is stopping.
    """

    redis: bool = True
    postgres: bool = True
    until: datetime | None = None
    success: Success | None = None
    trouble: str | None = None
    refused: Sequence[str] = ()
    elsewhere: Sequence[str] = ()
    rejects: int = 0
    rejects_over: str | None = None
    overdue: bool = False
    drift: Mapping[str, int] = field(default_factory=dict)
    synced: Ended | None = None
    verified: Ended | None = None
    current: Run | None = None
    live: LiveState | None = None
    live_reason: str | None = None
    unfollowed: str | None = None
    waits: str | None = None
    stale: str | None = None
    attended: bool = True
    stops: bool = False


def judge(now: Situation) -> Verdict:
    """The verdict."""
    found = _judge(now)
    if not now.stops:
        return found
    level: Level = "look" if found.level in ("safe", "wait") else found.level
    run = now.current is not None and now.current.trigger != "cli"
    ends = "its run ends with the batch under way, and nothing new is started"
    said = ends if run else "nothing new is started"
    return Verdict(level, found.line, (f"This daemon is stopping: {said}.", *found.advice))


def _judge(now: Situation) -> Verdict:
    for rule in (_servers, _trouble, _never, _not_safe, _doubtful):
        found = rule(now)
        if found is not None:
            return found
    return _proven(now)


def _kept(now: Situation) -> str:
    return f"everything up to {_until(now)} is in PostgreSQL"


def _until(now: Situation) -> str:
    return short_time_text(now.until) if now.until else "-"


def _servers(now: Situation) -> Verdict | None:
    """A server that doesn't answer, and what is known to be in PostgreSQL all the same."""
    if now.postgres and now.redis:
        return None
    names = "Redis" if now.postgres else "PostgreSQL"
    silent = f"{names} doesn't answer"
    if not now.postgres and not now.redis:
        silent = "neither PostgreSQL nor Redis answers"
    if now.postgres and now.trouble:
        # Without its own tables nobody knows what is in PostgreSQL.
        return Verdict("act", silent, (f"{_sentence(now.trouble)}",))
    if now.postgres and now.refused:
        return Verdict("act", f"{silent}; {_stopped(now)}", (_DECIDE, *_back(now)))
    line = f"{silent}; {_kept(now)}, {_ALONE}" if now.until else silent
    return Verdict("act", line, tuple(_back(now)))


def _back(now: Situation) -> Iterator[str]:
    """What happens when the server is back, and what to do if it has lost its balances."""
    if now.postgres and now.until:
        yield "Meanwhile balances are read from there."
    if now.attended and not now.stops:
        both = not now.postgres and not now.redis
        yield f"A sync starts when {'both are' if both else 'it is'} back."
    else:
        yield "When it is back, run `balancesync sync`, or start the daemon."
    if not now.redis and now.until:
        yield "If Redis comes back without balances, `balancesync restore` brings these back."


_DECIDE: Final = "Nothing is written until you decide."


def _stopped(now: Situation) -> str:
    kept = f"{_kept(now)}, and stays as it is" if now.until else "nothing is written"
    return f"stopped: the guard refuses to follow Redis; {kept}"


def _trouble(now: Situation) -> Verdict | None:
    if now.trouble:
        return Verdict(
            "act", "balancesync's own tables can't be read", (f"{_sentence(now.trouble)}",)
        )
    if now.refused:
        return Verdict("act", _stopped(now), (_DECIDE,))
    return None


def _never(now: Situation) -> Verdict | None:
    """No success yet: nothing is known to be safe."""
    if now.success is not None and now.until is not None:
        return None
    run, last = now.current, now.synced
    if run is not None and run.full:
        return Verdict(
            "wait", "the first sync is running: nothing is known to be safe before it has succeeded"
        )
    if now.waits:
        return Verdict("act", f"not safe: no sync has succeeded, a run waits: {now.waits}")
    if last is not None and last.status not in _ENDED_WELL:
        failed = f"not safe: no sync has succeeded, the last was {last.status}"
        return Verdict("act", failed, (_sentence(last.error),) if last.error else ())
    if now.overdue:
        return Verdict("act", "not safe: no sync has succeeded for two intervals of the schedule")
    level: Level = "wait" if now.attended else "look"
    advice = () if now.attended else ("`balancesync sync` makes the first one.",)
    return Verdict(level, "no sync has succeeded yet: nothing is known to be safe", advice)


def _not_safe(now: Situation) -> Verdict | None:
    """What is known not to be in PostgreSQL, or not known to be."""
    until = _until(now)
    if now.rejects and now.rejects_over:
        count = _plural(now.rejects, "record", "records")
        return Verdict(
            "act",
            f"not safe: {count} can't be stored; all others, up to {until}, are in PostgreSQL",
            (f"{_sentence(now.rejects_over)}", "`balancesync rejects` shows them."),
        )
    if now.overdue:
        advice = (
            "The last success is older than two intervals of the schedule.",
            *_worries(now).values(),
        )
        if now.live == "up":
            line = f"no full sync has succeeded for two intervals; live mode: {_kept(now)}"
            return Verdict("act", line, advice)
        line = f"not safe: nothing newer than {until} is known to be in PostgreSQL"
        return Verdict("act", line, advice)
    if now.success is not None and now.success.unread:
        names = " and ".join(now.success.unread)
        return Verdict(
            "look",
            f"not safe: {names} was never copied as a whole; the rest, up to {until}, is in"
            " PostgreSQL",
            ("The next sync of all mappings copies it.",),
        )
    return None


def _doubtful(now: Situation) -> Verdict | None:
    """What may be as it should be, and may not."""
    success = now.success
    if success is not None and success.without_keys:
        names, at = " and ".join(success.without_keys), short_time_text(success.started_at)
        return Verdict(
            "look",
            f"Redis had no key of {names} at {at}: is redis.url right?",
            (
                "If it is: either the application has made none yet, or they are written in another"
                " way than `key` says.",
            ),
        )
    differ = sum(now.drift.values())
    if differ:
        rows = _plural(differ, "row differs", "rows differ")
        worries = _worries(now)
        return Verdict(
            "look",
            f"drift: the last verify found that {rows} from Redis; all others, up to {_until(now)},"
            " are in PostgreSQL",
            (
                "`balancesync verify` shows the first as they are now, and the next sync writes"
                " them.",
                *worries.values(),
            ),
        )
    return None


def _proven(now: Situation) -> Verdict:
    worries = _worries(now)
    more = "; what changes follows live" if now.live == "up" else ""
    line = f"{_kept(now)}{_exceptions(now)}"
    if worries:
        return Verdict("look", f"{line}; {' and '.join(worries)}", tuple(worries.values()))
    if now.rejects:
        advice = ("`balancesync rejects` shows what can't be stored, and why.",)
        return Verdict("look", f"safe: {line}{more}", advice)
    return Verdict("safe", f"safe: {line}{more}")


def _exceptions(now: Situation) -> str:
    """What Redis holds and PostgreSQL doesn't, by what was counted."""
    not_found = now.success.not_found if now.success else 0
    counted = [
        _plural(now.rejects, "reject", "rejects") if now.rejects else "",
        f"{_plural(not_found, 'key', 'keys')} without a row" if not_found else "",
    ]
    named = " and ".join(filter(None, counted))
    return f", but for {named}" if named else ""


def _worries(now: Situation) -> dict[str, str]:
    """What keeps PostgreSQL from following: in a few words, and in a sentence."""
    found = {}
    if now.live in ("down", "catching up"):
        why = f": {now.live_reason}" if now.live_reason else ""
        found[f"live mode is {now.live}"] = _sentence(f"live mode is {now.live}{why}")
    elif now.unfollowed:
        found["changes aren't known to be followed"] = _sentence(f"live mode is {now.unfollowed}")
    if now.elsewhere:
        found["a sync was refused on another Redis"] = " ".join(map(_sentence, now.elsewhere))
    if now.stale:
        found["what is recorded can't be read now"] = _sentence(now.stale)
    if now.waits:
        found["a run waits"] = _sentence(f"a run waits: {now.waits}")
    elif now.synced is not None and now.synced.status not in _ENDED_WELL:
        found[f"the last sync {_how(now.synced.status)}"] = _sentence(_unwell(now.synced))
    # Nothing is written by a verify; one that was stopped was stopped by somebody.
    if now.verified is not None and now.verified.status == "failed":
        found["the last verify failed"] = _sentence(_unwell(now.verified))
    return found


def _how(status: str) -> str:
    return "failed" if status == "failed" else f"was {status}"


def _unwell(run: Ended) -> str:
    error = run.error or ""
    if error.startswith(run.status):
        return f"the last {run.job} was {error}"
    return f"the last {run.job} {_how(run.status)}{f': {error}' if error else ''}"


def _sentence(text: str) -> str:
    """Text that stands alone, from its first letter to its full stop.

    >>> _sentence("live mode is down: Redis is away")
    'Live mode is down: Redis is away.'
    """
    return f"{text[:1].upper()}{text[1:]}" + ("" if text.endswith((".", "?", "!")) else ".")


def _plural(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"
