"""What people get: the same documents that programs get, as tables and lines on stdout.

Whatever comes from Redis is escaped, so that it can't move the cursor or forge a line. A pipe gets
lines as wide as they are, a terminal's are folded, and colour follows NO_COLOR.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from decimal import Decimal
from itertools import compress
from typing import Any, Final, Literal

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from balancesync.documents import Document
from balancesync.telemetry import printable
from balancesync.times import short_time_text
from balancesync.values import show as quoted

_COUNTS: Final = {
    "scanned": True,
    "ignored": False,
    "vanished": False,
    "rejected": True,
    "snapped": False,
    "inserted": True,
    "updated": True,
    "unchanged": True,
    "not_found": False,
    "absent": False,
    "deleted": False,
    "kept": False,
}
STYLES: Final = {
    "succeeded": "green",
    "healthy": "green",
    "ok": "green",
    "running": "cyan",
    "skipped": "yellow",
    "degraded": "yellow",
    "warning": "yellow",
    "cancelled": "yellow",
    "postponed": "yellow",
    "interrupted": "yellow",
    "failed": "red",
    "refused": "bold red",
    "unhealthy": "bold red",
    "error": "red",
}
_PIPE_WIDTH: Final = 10_000


class Grid:
    """Rows under columns. Where they don't fit a terminal, the `spare` columns are left out, as few
    as will do and in this order; if that isn't enough, each row is a block of `column: cell`, or
    without titles its first cell over the others.
    """

    def __init__(
        self,
        *columns: str,
        right: Iterable[str] = (),
        titled: bool = True,
        spare: Sequence[str] = (),
    ) -> None:
        self._columns = columns
        self._right = set(right)
        self._spare = spare
        self._titled = titled
        self._rows: list[tuple[str | Text, ...]] = []

    def add_row(self, *cells: str | Text) -> None:
        """Add a row, one cell for each column."""
        self._rows.append(cells)

    def fitted(self, console: Console) -> list[RenderableType]:
        """What to print."""
        boundless = console.options.update_width(_PIPE_WIDTH)
        for number in range(len(self._spare) + 1):
            left_out = self._spare[:number]
            made = self._make_table(left_out)
            needs = console.measure(made, options=boundless)
            # Without titles it's for texts, which are folded where each of their words has room.
            if (needs.maximum if self._titled else needs.minimum) <= console.width:
                note = f"left out here, but in a pipe and in --json: {', '.join(left_out)}"
                return [made, note] if left_out else [made]
        return list(self._titled_blocks() if self._titled else self._indented())

    def _titled_blocks(self) -> Iterator[RenderableType]:
        for number, row in enumerate(self._rows):
            if number:
                yield ""
            block = Table(box=None, pad_edge=False, show_header=False)
            block.add_column(style="bold")
            block.add_column(overflow="fold")
            for column, cell in zip(self._columns, row, strict=True):
                block.add_row(column, cell)
            yield block

    def _indented(self) -> Iterator[RenderableType]:
        for head, *cells in self._rows:
            yield head
            for cell in cells:
                yield Padding(cell, (0, 0, 0, 2))

    def _make_table(self, left_out: Sequence[str]) -> Table:
        made = Table(
            box=None,
            pad_edge=False,
            padding=(0, 2, 0, 0),
            header_style="bold",
            show_header=self._titled,
        )
        kept = [column not in left_out for column in self._columns]
        for column in compress(self._columns, kept):
            justify: Literal["left", "right"] = "right" if column in self._right else "left"
            made.add_column(column, justify=justify, overflow="fold")
        for row in self._rows:
            made.add_row(*compress(row, kept))
        return made


Line = str | Text | Grid


def write(*lines: Line, whole: bool = False) -> bool:
    """Write to stdout, one line or grid after the other; tell whether anybody reads it.

    A terminal's lines are folded between words, unless they are to be left `whole`. Quiet once the
    reader has gone, as in `balancesync runs | head`: the exit code stays what the command has
    earned. https://docs.python.org/3/library/signal.html#note-on-sigpipe
    """
    person = sys.stdout.isatty()
    console = Console(
        markup=False,
        highlight=False,
        emoji=False,
        width=None if person else _PIPE_WIDTH,
        soft_wrap=whole or not person,
    )
    with console.capture() as captured:
        for line in lines:
            for piece in line.fitted(console) if isinstance(line, Grid) else [line]:
                console.print(piece)
    # Cells are filled up with blanks; what the reader's encoding lacks is escaped.
    texts = [f"{text.rstrip()}\n" for text in captured.get().split("\n")[:-1]]
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write("".join(texts).encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def as_json(document: Document | Sequence[Document]) -> None:
    """Write a document to stdout; a list is one document, too."""
    write(json.dumps(document, indent=2), whole=True)


def status_text(status: str) -> Text:
    """A status in its colour."""
    return Text(status, STYLES.get(status, ""))


def outcome_text(run: Document) -> Text:
    """How a run ended; a verify that found drift has ended well, and found no good."""
    drift = run.get("drift")
    if not drift:
        return status_text(run["status"])
    differ = "1 differs" if drift == 1 else f"{drift:,} differ"
    return Text(f"{run['status']}, {differ}", STYLES["error"])


def ago(seconds: float) -> str:
    """A duration, as people say it.

    >>> ago(0.0421), ago(75), ago(7_300), ago(200_000)
    ('42 ms', '1 min 15 s', '2 h 1 min', '2 d 7 h')
    """
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = int(seconds)
    for unit, name, part, part_name in ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "min")):
        if whole >= unit:
            return f"{whole // unit} {name} {whole % unit // part} {part_name}"
    return f"{whole // 60} min {whole % 60} s"


def moment(text: str | None) -> str:
    """A document's time, to the second and in UTC."""
    if text is None:
        return "-"
    return short_time_text(datetime.fromisoformat(text))


# --- runs -----------------------------------------------------------------------------------------


def show_run(run: Document) -> None:
    """One run: how it ended, its counts by mapping, what differs, its warnings."""
    name = {"dry_run": "dry run", "verify": "verify"}.get(run["mode"], run["job"])
    head = Text.assemble(f"{name} ", outcome_text(run))
    if run["duration_s"] is not None:
        head.append(f" in {ago(run['duration_s'])}")
    if run["attempts"] > 1:
        head.append(f", at attempt {run['attempts']}")
    write(head)
    if run["mappings"]:
        write(_counts_table(run))
    if moving := run.get("moving"):
        write(f"{moving:,} {'key' if moving == 1 else 'keys'} changed at every look")
    for report in run.get("report", ()):
        _show_report(report, run["mappings"][report["mapping"]], run["mode"])
    for warning in run["warnings"]:
        write(Text(printable(f"warning: {warning}"), "yellow"))


def _counts_table(run: Document) -> Grid:
    mappings = run["mappings"]
    names = [name for name, always in _COUNTS.items() if always or run[name]]
    made = Grid("mapping", *names, right=names)
    for mapping, counts in mappings.items():
        made.add_row(mapping, *(f"{counts[name]:,}" for name in names))
    if len(mappings) > 1:
        made.add_row("all", *(f"{run[name]:,}" for name in names))
    return made


def _show_report(report: Document, counts: Document, mode: str) -> None:
    rows = report["rows"]
    if not rows:
        return
    title = "would change" if mode == "dry_run" else "differs"
    columns = [*rows[0]["key"], *(rows[0]["new"] or rows[0]["old"])]
    values = columns[len(rows[0]["key"]) :]
    moved = [row for row in rows if row["op"] != "keep"]
    kept = [row for row in rows if row["op"] == "keep"]
    for head, chosen in ((title, moved), ("would be left", kept)):
        made = Grid(head, *columns)
        for row in chosen:
            cells = [_cell(text) for text in row["key"].values()]
            made.add_row(row["op"], *cells, *(move_text(row, name) for name in values))
        if chosen:
            write("", made)
    done = {"insert": "inserted", "update": "updated", "delete": "deleted", "keep": "kept"}
    for op, name in done.items():
        more = counts[name] - sum(row["op"] == op for row in rows)
        if more > 0:
            write(f"... and {more:,} more to {op}")
    for column, total in report["totals"].items():
        if not Decimal(total):
            write(f"the total of {column} would stay the same")
            continue
        sign = "" if total.startswith("-") else "+"
        write(f"the total of {column} would change by {sign}{total}")


def move_text(row: Document, column: str) -> Text:
    """What a row's or a change's column was and is."""
    old, new = (None if row[side] is None else row[side][column] for side in ("old", "new"))
    if row["op"] == "insert":
        return _cell(new)
    if row["op"] == "delete":
        return Text.assemble(_cell(old), " → gone")
    if old == new:
        return _cell(new)
    if row["op"] == "keep":
        return Text.assemble(_cell(old), ", not ", _cell(new))
    return Text.assemble(_cell(old), " → ", _cell(new))


def _cell(text: str | None) -> Text:
    if text is None:
        return Text("NULL", "dim")
    return Text(text if text.isprintable() else quoted(text.encode(errors="backslashreplace")))


def show_runs(runs: Sequence[Document], limit: int, *, chosen: bool) -> None:
    """A list of runs, one a line; `chosen`: only some were asked for."""
    if not runs:
        write("no such run is recorded" if chosen else "nothing has run yet")
        return
    names = ("scanned", "rejected", "inserted", "updated", "deleted")
    made = Grid(
        *("started", "job", "trigger", "mode", "status", "took", *names, "id"),
        right=("took", *names),
        spare=("id", "trigger", "deleted", "inserted", "updated", "scanned", "took", "rejected"),
    )
    for run in runs:
        took = run["duration_s"]
        made.add_row(
            *(moment(run["started_at"]), run["job"], run["trigger"], run["mode"]),
            outcome_text(run),
            "-" if took is None else ago(took),
            *(f"{run[name]:,}" for name in names),
            run["id"],
        )
    write(made)
    if len(runs) == limit:
        write(f"at most {limit:,} are shown; --limit shows more")


def show_one_run(run: Document) -> None:
    """A recorded run with all of it."""
    made = Grid("", "", titled=False)
    made.add_row("run", run["id"])
    facts: dict[str, Any] = {
        "job": run["job"] + (f" of {run['mapping']}" if run["mapping"] else ""),
        "trigger": run["trigger"],
        "started": moment(run["started_at"]),
        "finished": moment(run["finished_at"]),
    }
    for name, value in facts.items():
        made.add_row(name, value)
    write(made)
    show_run(run)
    if run["error"]:
        write(Text(printable(f"error: {run['error']}"), "red"))


def show_rejects(rejects: Sequence[Document], limit: int) -> None:
    """Kept rejects, one a line."""
    if not rejects:
        write("no rejects")
        return
    healed = any(reject["healed_at"] for reject in rejects)
    made = Grid(
        *("mapping", "key", "value", "reason", "detail", "since"),
        *(["healed"] if healed else []),
    )
    for reject in rejects:
        value = reject["value"]
        made.add_row(
            reject["mapping"],
            quoted(bytes.fromhex(reject["key_hex"]), 60),
            "-" if value is None else quoted(value.encode()),
            reject["reason"],
            printable(reject["detail"]),
            moment(reject["first_seen"]),
            *([moment(reject["healed_at"])] if healed else []),
        )
    write(made)
    if len(rejects) == limit:
        write(f"at most {limit:,} are shown; --limit shows more")
