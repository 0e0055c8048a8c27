"""`status --watch`: how things stand, over and over.

On a terminal it's one picture that is drawn anew in place. A pipe gets a block every time, headed
by the time, or with `--json` one document a line.
"""

import asyncio
import json
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import SegmentLines
from rich.text import Text

from balancesync.documents import Document
from balancesync.errors import BalanceSyncError, PostgresUnavailable
from balancesync.show import STYLES, Grid, Line, write
from balancesync.standing import status_lines
from balancesync.telemetry import printable
from balancesync.times import short_time_text

Ask = Callable[[], Awaitable[Document]]
# Draws one picture; false: nobody looks any more.
Draw = Callable[[Document | None, list[Line]], bool]


async def watch(ask: Ask, every_s: float, *, as_json: bool) -> int:
    """Ask and show until SIGINT, SIGTERM or the end of the pipe; the exit code is of the last.

    What goes wrong at the first time is raised, for it's no passing trouble; later it's shown.
    """
    with _stopping() as stop, _drawing(as_json=as_json) as draw:
        document: Document | None = await ask()
        lines = status_lines(document) if document else []
        while draw(document, lines) and not await _rung(stop, every_s):
            try:
                document = await ask()
                lines = status_lines(document)
            except BalanceSyncError as error:
                document, lines = None, [Text(printable(str(error)), STYLES["error"])]
    well = document is not None and document["postgres"]["connected"]
    return 0 if well else PostgresUnavailable.exit_code


async def _rung(bell: asyncio.Event, within_s: float) -> bool:
    try:
        async with asyncio.timeout(within_s):
            await bell.wait()
    except TimeoutError:
        return False
    return True


@contextmanager
def _stopping() -> Iterator[asyncio.Event]:
    """An event that the signals set by which people end it; for them it's no interruption."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)
    for each in signals:
        loop.add_signal_handler(each, stop.set)
    try:
        yield stop
    finally:
        for each in signals:
            loop.remove_signal_handler(each)


@contextmanager
def _drawing(*, as_json: bool) -> Iterator[Draw]:
    if as_json:
        yield _draw_json
    elif not sys.stdout.isatty():
        yield _draw_block
    else:
        console = Console(markup=False, highlight=False, emoji=False)
        with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:

            def draw(document: Document | None, lines: list[Line]) -> bool:
                live.update(_picture(console, document, lines), refresh=True)
                return True

            yield draw


def _draw_json(document: Document | None, lines: list[Line]) -> bool:
    error = None if document else "; ".join(str(line) for line in lines)
    return write(json.dumps({"at": _now(), **(document or {"error": error})}), whole=True)


def _draw_block(document: Document | None, lines: list[Line]) -> bool:
    return write(f"{_now()}:", *lines, "")


def _now() -> str:
    return short_time_text(datetime.now(UTC))


def _picture(console: Console, document: Document | None, lines: list[Line]) -> RenderableType:
    parts: list[RenderableType] = []
    for line in lines:
        parts += line.fitted(console) if isinstance(line, Grid) else [line]
    run = document["current_run"] if document else None
    if run and run.get("progress") and run["progress"]["ratio"] is not None:
        parts.append(ProgressBar(total=1, completed=run["progress"]["ratio"]))
    parts += ["", Text(f"{_now()}, Ctrl-C ends this", "dim")]
    drawn = console.render_lines(Group(*parts), pad=False)
    if len(drawn) <= console.height:
        return Group(*parts)
    room = console.height - 1
    note = f"... {len(drawn) - room} lines more: make the window taller"
    return Group(SegmentLines(drawn[:room], new_lines=True), Text(note, "dim", no_wrap=True))
