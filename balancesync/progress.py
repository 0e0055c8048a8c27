"""How far a run is: a bar on a terminal, a log line every few seconds elsewhere. On stderr."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import structlog
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

from balancesync.part import Progress

Follow = Callable[[Progress], None]

_EVERY_S: Final = 5.0
# Where names, numbers and rate would leave no room for the bar.
_NARROW: Final = 70
_PERCENT: Final = "{task.percentage:>3.0f} %"
WORDS: Final = {
    "scan": "reading",
    "compare": "comparing",
    "apply": "writing",
    "restore": "restoring",
    "prune": "pruning",
}

log = structlog.get_logger("balancesync")


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s", style="progress.data.speed")


@contextmanager
def follow(*, terminal: bool) -> Iterator[Follow]:
    """Give what a run is to call with its progress; the bar is gone after the `with`."""
    if not terminal:
        yield _follow_in_log()
        return
    console = Console(stderr=True, markup=False, highlight=False, emoji=False)
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
    ]
    if console.width < _NARROW:
        columns += [TaskProgressColumn(_PERCENT, markup=False), TimeRemainingColumn(compact=True)]
    else:
        columns += [MofNCompleteColumn(), _Rate(), TimeRemainingColumn(compact=True)]
    bars = Bars(*columns, console=console, transient=True)
    tasks: dict[str, TaskID] = {}

    def show(progress: Progress) -> None:
        name = _name(progress)
        if name not in tasks:
            for finished in tasks.values():
                bars.remove_task(finished)
            tasks.clear()
            tasks[name] = bars.add_task(name, total=None)
        # The total is an estimate, which what is done may outgrow.
        total = None if progress.total is None else max(progress.total, progress.done)
        bars.update(tasks[name], completed=progress.done, total=total)

    with bars:
        yield show


def _follow_in_log() -> Follow:
    began = said = time.monotonic()
    name = ""

    def write(progress: Progress) -> None:
        nonlocal began, said, name
        now = time.monotonic()
        if name != _name(progress):
            name, began = _name(progress), now
        if now - said < _EVERY_S:
            return
        said = now
        rate = round(progress.done / (now - began)) if now > began else None
        left = None
        if rate and progress.total is not None:
            left = round(max(progress.total - progress.done, 0) / rate)
        log.info(
            "progress",
            phase=progress.phase,
            mapping=progress.mapping,
            done=progress.done,
            total=progress.total,
            per_s=rate,
            left_s=left,
        )

    return write


def _name(progress: Progress) -> str:
    return f"{WORDS.get(progress.phase, progress.phase)} {progress.mapping}".strip()
