"""The one table that a benchmark prints, as Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Final

_HEAD: Final = ("case", "median", "min-max", "keys/s", "floor", "ratio", "target", "ok")


@dataclass(frozen=True)
class Row:
    """A line of the table, and the numbers behind it."""

    case: str
    median: str
    spread: str = ""
    rate: str = ""
    floor: str = ""
    ratio: str = ""
    target: str = ""
    ok: bool | None = None
    numbers: dict[str, list[float]] = field(default_factory=dict)

    @property
    def cells(self) -> tuple[str, ...]:
        """The line as it's printed."""
        verdict = {True: "yes", False: "NO", None: ""}[self.ok]
        return (
            self.case, self.median, self.spread, self.rate,
            self.floor, self.ratio, self.target, verdict,
        )  # fmt: skip


def timed(
    case: str,
    seconds: Sequence[float],
    keys: int,
    floor: str = "",
    floors: Sequence[float] = (),
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    faster: bool = False,
) -> Row:
    """A line of seconds beside those of its floor, measured in turn with it.

    Args:
        case: what was measured.
        seconds: of each run.
        keys: how many each run went through.
        floor: what the floor is.
        floors: its seconds, one for each run.
        at_most: the most that a run may take, in times its floor.
        at_least: the least that a run must be faster than its floor, in times.
        faster: the ratio is how many times faster than the floor, also without a target.
    """
    faster |= at_least is not None
    pairs = zip(seconds, floors, strict=True) if floors else ()
    ratios = [other / one if faster else one / other for one, other in pairs]
    target, ok = "", None
    if ratios and at_most is not None:
        target, ok = f"≤ {at_most:g}", median(ratios) <= at_most
    if ratios and at_least is not None:
        target, ok = f"≥ {at_least:g}", median(ratios) >= at_least
    return Row(
        case,
        f"{median(seconds):.3f} s",
        f"{min(seconds):.3f}-{max(seconds):.3f}",
        f"{keys / median(seconds):,.0f}",
        f"{floor} {median(floors):.3f} s" if floors else "",
        _ratio(ratios, faster=faster),
        target,
        ok,
        {"seconds": list(seconds), "floors": list(floors), "ratios": ratios},
    )


def measured(
    case: str,
    values: Sequence[float],
    unit: str,
    *,
    floor: str = "",
    at_most: float | None = None,
    at_least: float | None = None,
) -> Row:
    """A line of something that isn't a time of a run."""
    middle = median(values)
    target, ok = "", None
    if at_most is not None:
        target, ok = f"≤ {at_most:g} {unit}", middle <= at_most
    if at_least is not None:
        target, ok = f"≥ {at_least:g} {unit}", middle >= at_least
    return Row(
        case,
        f"{middle:,.2f} {unit}" if middle % 1 else f"{middle:,.0f} {unit}",
        f"{min(values):,.2f}-{max(values):,.2f}" if len(values) > 1 else "",
        floor=floor,
        target=target,
        ok=ok,
        numbers={"values": list(values)},
    )


def render(rows: Sequence[Row]) -> str:
    """The table."""
    return grid([_HEAD, *(row.cells for row in rows)])


def grid(lines: Sequence[tuple[str, ...]]) -> str:
    """Lines of cells, the first of them the head, as Markdown with its columns aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = tuple("-" * width for width in widths)
    padded = (
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        for line in (lines[0], rule, *lines[1:])
    )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def _ratio(ratios: Sequence[float], *, faster: bool) -> str:
    if not ratios:
        return ""
    digits = 0 if median(ratios) >= 20 else 2
    times = " x faster" if faster else ""
    spread = f" ({min(ratios):.{digits}f}-{max(ratios):.{digits}f})" if len(ratios) > 1 else ""
    return f"{median(ratios):.{digits}f}{times}{spread}"
