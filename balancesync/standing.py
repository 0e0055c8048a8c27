"""How things stand, for people: what `status`, `stats`, `health` and `check` print."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Final

from rich.text import Text

from balancesync.documents import Document
from balancesync.progress import WORDS
from balancesync.records import elsewhere
from balancesync.show import STYLES, Grid, Line, ago, moment, outcome_text, status_text, write
from balancesync.telemetry import printable

_LEVELS: Final = {
    "safe": "bold green",
    "wait": "bold cyan",
    "look": "bold yellow",
    "act": "bold red",
}
# What the guard says where keys are there again, but with other values.
_CHANGED: Final = "came back changed"


def show_status(status: Document) -> None:
    """Whether the balances are safe, what runs, what ran, what comes, both servers."""
    write(*status_lines(status))


def status_lines(status: Document) -> list[Line]:
    """What `show_status` prints, one line or grid after the other."""
    grid = Grid("", "", titled=False)
    for name, cell in _facts(status).items():
        grid.add_row(Text(name, "dim"), cell)
    lines: list[Line] = [*_verdict(status), ""]
    # Right below: what there is to do must not be cut off where a window is too low for it all.
    for refusal in status["refusal"] or ():
        since = moment(refusal["refused_at"])
        text = f'the guard refuses mapping "{refusal["mapping"]}" since {since}: '
        lines += [Text(printable(f"{text}{refusal['reason']}"), STYLES["refused"]), ""]
    if status["refusal"]:
        lines += [*_ways(status["refusal"]), ""]
    for refusal in status.get("refused_elsewhere") or ():
        lines += [Text(printable(elsewhere(refusal["mapping"], refusal["reason"])), "yellow"), ""]
    return [*lines, grid]


def _ways(refusals: Sequence[Document]) -> Iterator[str]:
    yield "look first:"
    yield "    balancesync restore --dry-run"
    yield "was it a mistake: stop the application, bring the keys back, then start it again:"
    yield "    balancesync restore"
    if any(_CHANGED in each["reason"] for each in refusals):
        yield "keys that came back changed are left by that; if PostgreSQL is right about them:"
        yield "    balancesync restore --overwrite"
    yield "is it as it should be, accept it this once:"
    yield "    balancesync sync --accept-loss"


def _verdict(status: Document) -> Iterator[Text]:
    """What is judged of it, as it is, and what to do about it."""
    found = status["verdict"]
    yield Text(printable(found["line"]), _LEVELS[found["level"]])
    for sentence in found["advice"]:
        yield Text(printable(sentence))


def _facts(status: Document) -> dict[str, str | Text]:
    facts: dict[str, str | Text] = {
        name: _server_text(status[name]) for name in ("redis", "postgres")
    }
    if "name" in status:
        facts |= _daemon_facts(status)
    else:
        facts["daemon"] = Text(printable(_without_daemon(status)), "yellow")
    if status["state"] is None:
        return facts
    facts["last success"] = Text("none yet", "yellow")
    if status["last_success_at"]:
        age = ago(status["last_success_age_s"])
        facts["last success"] = f"{age} ago, at {moment(status['last_success_at'])}"
    facts["last run"] = _run_text(status["last_run"])
    last = status["last_run"]
    if last and last["error"] and not status["refusal"]:
        facts["its error"] = Text(printable(last["error"]), STYLES.get(last["status"], ""))
    if status["current_run"]:
        facts["running now"] = _run_text(status["current_run"])
        facts |= _progress_facts(status["current_run"].get("progress"))
    for mapping, reasons in (status["rejects"] or {}).items():
        each = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))
        facts[f"rejects of {mapping}"] = Text(each, "yellow")
    return facts


def _without_daemon(status: Document) -> str:
    why: str = status["no_daemon"].replace("no daemon answers", "none answers")
    if status["leader"] is not None:
        return f"{why}; {status['leader'] or 'another one'} leads"
    # Only PostgreSQL knows of one elsewhere.
    return f"{why}; nothing runs by itself" if status["postgres"]["connected"] else why


def _daemon_facts(status: Document) -> dict[str, str | Text]:
    """What only a daemon tells."""
    state = status["state"]
    who = f"{state}, {status['name']}"
    if state == "draining":
        who += "; it is stopping: the batch under way ends, nothing new is started"
    if state == "standby":
        who += f"; {status['leader']} leads"
    facts: dict[str, str | Text] = {"daemon": who, "live mode": _live_text(status)}
    if status["next_run_at"]:
        left = (datetime.fromisoformat(status["next_run_at"]) - datetime.now(UTC)).total_seconds()
        facts["next run"] = f"in {ago(max(left, 0))}, at {moment(status['next_run_at'])}"
    if status["queued_runs"]:
        facts["waiting"] = f"{len(status['queued_runs']):,}"
    return facts


def _live_text(status: Document) -> Text:
    text = Text(status["live"], {"off": "", "up": "green"}.get(status["live"], "yellow"))
    if status["live_reason"]:
        text.append(f": {printable(status['live_reason'])}")
    if status["live"] == "up" and status["live_copied_at"] is not None:
        took = ago(status["live_lag_s"])
        text.append(f", the last changes took {took} at {moment(status['live_copied_at'])}")
    if status["live_pending"]:
        text.append(f", {status['live_pending']:,} keys wait")
    return text


def _progress_facts(progress: Document | None) -> dict[str, str | Text]:
    if progress is None:
        return {}
    doing = f"{WORDS.get(progress['phase'], progress['phase'])} {progress['mapping'] or ''}"
    far = f"{doing.strip()}: {progress['done']:,}"
    if progress["total"]:
        far += f" of {max(progress['total'], progress['done']):,} ({progress['ratio']:.0%})"
    return {"progress": Text(far, "cyan")}


def _server_text(server: Document) -> Text:
    if server["connected"]:
        who = printable(f"{server['version']} at {server['address']}")
        return Text(f"{who}, answers in {server['latency_ms']:.1f} ms")
    return Text(printable(server["error"] or "doesn't answer"), "red")


def _run_text(run: Document | None) -> Text:
    if run is None:
        return Text("none yet", "yellow")
    took = "" if run["duration_s"] is None else f" in {ago(run['duration_s'])}"
    name = {"dry_run": "dry run", "verify": "verify"}.get(run["mode"], run["job"])
    begun = f"{name} ({run['trigger']}) at {moment(run['started_at'])}, "
    return Text.assemble(begun, outcome_text(run), f"{took}, {run['id']}")


def show_stats(stats: Document) -> None:
    """Totals, durations and rejects."""
    made = Grid("job", "mode", "status", "runs", "in all", right=("runs", "in all"))
    for row in stats["totals"]:
        state = status_text(row["status"])
        made.add_row(row["job"], row["mode"], state, f"{row['runs']:,}", ago(row["seconds"]))
    write(made if stats["totals"] else "nothing has run yet")
    last = ", ".join(f"{count} {status}" for status, count in stats["last_runs"].items())
    if last:
        made_last = sum(stats["last_runs"].values())
        write(f"the last {'run' if made_last == 1 else f'{made_last} runs'}: {last}")
    if stats["durations"]["p50_s"] is not None:
        write(_durations_text(stats))
    if stats["last_success_age_s"] is not None:
        write(f"the last success was {ago(stats['last_success_age_s'])} ago")
    for mapping, reasons in stats["rejects"].items():
        each = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
        write(f"open rejects of {mapping}: {each}")


def _durations_text(stats: Document) -> str:
    """How long the last hundred syncs that succeeded took, or as many as there are."""
    kind = ("sync", "apply", "succeeded")
    totals = stats["totals"]
    count = sum(row["runs"] for row in totals if (row["job"], row["mode"], row["status"]) == kind)
    half, most = (ago(stats["durations"][name]) for name in ("p50_s", "p95_s"))
    if count == 1:
        return f"the one successful sync took {half}"
    return f"the last {min(count, 100)} successful syncs took {half} at the median, {most} at 95 %"


def show_health(health: Document) -> None:
    """All is well, or what isn't."""
    write(status_text(health["status"]))
    made = Grid("", "", "", titled=False)
    for name, check in health["checks"].items():
        made.add_row(name, status_text(check["status"]), printable(check["detail"]))
    write(made)


def show_finding(level: str, topic: str, text: str) -> None:
    """One finding of `check`, at once: the next may take a while."""
    write(Text.assemble((f"{level:<11} ", STYLES.get(level, "red")), printable(f"{topic}: {text}")))
