"""How things stand, for people: what `status`, `stats`, `health` and `check` print."""

from datetime import UTC, datetime
from typing import Final

from rich.text import Text

from balancesync.documents import Document
from balancesync.progress import WORDS
from balancesync.show import STYLES, Grid, Line, ago, moment, status_text, write
from balancesync.telemetry import printable

_LEVELS: Final = {"safe": "bold green", "look": "bold yellow", "act": "bold red"}
_WELL: Final = ("succeeded", "skipped")
_WAYS: Final = (
    "was it a mistake, bring the keys back:",
    "    balancesync restore --dry-run",
    "    balancesync restore",
    "is it as it should be, accept it this once:",
    "    balancesync sync --accept-loss",
)


def show_status(status: Document) -> None:
    """Whether the balances are safe, what runs, what ran, what comes, both servers."""
    write(*status_lines(status))


def status_lines(status: Document) -> list[Line]:
    """What `show_status` prints, one line or grid after the other."""
    grid = Grid("", "", titled=False)
    for name, cell in _facts(status).items():
        grid.add_row(Text(name, "dim"), cell)
    lines: list[Line] = [_verdict(status), "", grid]
    for refusal in status["refusal"] or ():
        since = moment(refusal["refused_at"])
        text = f'the guard refuses mapping "{refusal["mapping"]}" since {since}: '
        lines += ["", Text(printable(f"{text}{refusal['reason']}"), STYLES["refused"])]
    if status["refusal"]:
        lines += _WAYS
    return lines


def _verdict(status: Document) -> Text:
    until = status["safe_until"] and moment(status["safe_until"])
    kept = f"everything up to {until} is in PostgreSQL"
    if not status["postgres"]["connected"]:
        what = f"; {kept}, the rest is in Redis alone" if until else ""
        alone = status["redis"]["connected"]
        who = "PostgreSQL doesn't answer" if alone else "neither PostgreSQL nor Redis answers"
        return Text(f"{who}{what}", _LEVELS["act"])
    if status["refusal"]:
        what = f"{kept}, and stays as it is" if until else "nothing is written"
        return Text(f"stopped by the guard: {what}", _LEVELS["act"])
    if until is None:
        return Text("nothing is in PostgreSQL yet: no sync has succeeded", _LEVELS["look"])
    if not status["redis"]["connected"]:
        return Text(f"Redis doesn't answer; {kept}", _LEVELS["look"])
    if status["health"]["checks"]["last_success"]["status"] == "failed":
        return Text(f"not safe: nothing newer than {until} is in PostgreSQL", _LEVELS["act"])
    last = status["last_run"]
    well = last is None or last["mode"] != "apply" or last["status"] in _WELL
    return Text(f"safe: {kept}{_exceptions(status)}", _LEVELS["safe" if well else "look"])


def _exceptions(status: Document) -> str:
    """What Redis holds and PostgreSQL doesn't."""
    counts = {
        "reject": sum(sum(reasons.values()) for reasons in status["rejects"].values()),
        "key": status["not_found"],
    }
    told = [
        f"{count:,} {name}{'' if count == 1 else 's'}" for name, count in counts.items() if count
    ]
    if counts["key"]:
        told[-1] += " without a row"
    return f", but for {' and '.join(told)}" if told else ""


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
    return Text.assemble(begun, status_text(run["status"]), f"{took}, {run['id']}")


def show_stats(stats: Document) -> None:
    """Totals, durations and rejects."""
    made = Grid("job", "mode", "status", "runs", "in all", right=("runs", "in all"))
    for row in stats["totals"]:
        state = status_text(row["status"])
        made.add_row(row["job"], row["mode"], state, f"{row['runs']:,}", ago(row["seconds"]))
    write(made if stats["totals"] else "nothing has run yet")
    last = ", ".join(f"{count} {status}" for status, count in stats["last_runs"].items())
    if last:
        write(f"the last {sum(stats['last_runs'].values())} runs: {last}")
    durations = stats["durations"]
    if durations["p50_s"] is not None:
        halves = f"{ago(durations['p50_s'])} at the median, {ago(durations['p95_s'])} at 95 %"
        write(f"the last 100 successful syncs took {halves}")
    if stats["last_success_age_s"] is not None:
        write(f"the last success was {ago(stats['last_success_age_s'])} ago")
    for mapping, reasons in stats["rejects"].items():
        each = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
        write(f"open rejects of {mapping}: {each}")


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
