"""python -m benchmarks: one table of what balancesync takes, beside its floors.

Missed targets are shown, not an error: the exit code is 1 only if something broke.
"""

import argparse
import asyncio
import json
import os
import platform
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Final

from balancesync import __version__
from balancesync.errors import BalanceSyncError
from benchmarks import around, back, cases, daemon, live, page, past, shapes
from benchmarks.servers import Bench, Broken, bench
from benchmarks.table import Row, grid, render

CASES: Final[dict[str, Callable[[Bench], Awaitable[list[Row]]]]] = {
    "nothing": cases.nothing,
    "first": cases.first,
    "one": cases.one,
    "all": cases.every,
    "orm": cases.orm,
    "written": cases.written,
    "client": around.client,
    "latency": around.latency,
    "hash": shapes.hashes,
    "big": shapes.big,
    "users": shapes.users,
    "restore": back.restore,
    "history": past.history,
    "memory": around.memory,
    "http": daemon.http,
    "reads": daemon.reads,
    "page": daemon.page,
    "idle": daemon.idle,
    "live": live.lag,
    "live-throughput": live.throughput,
    "live-redis": live.redis_cost,
    "live-cost": live.cost,
    "live-idle": live.idle,
}

_DETAILS: Final = {
    "case": "where the time goes, s",
    "seconds": "all",
    "scan": "scan and stage",
    "diff": "diff",
    "apply": "apply and record",
    "client": "CPU: client",
    "redis": "CPU: Redis",
    "postgres": "CPU: PostgreSQL",
    "others": "CPUs taken by others",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--keys", type=int, default=1_000_000, help="default 1000000")
    parser.add_argument("--runs", type=int, default=5, help="of each case (default 5)")
    parser.add_argument(
        "--only", action="append", choices=CASES, metavar="CASE", help=f"of {', '.join(CASES)}"
    )
    parser.add_argument("--quick", action="store_true", help="no memory of five times the keys")
    parser.add_argument(
        "--write", action="store_true", help="put all tables into docs/performance.md"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to FILE")
    return parser


async def _measure(args: argparse.Namespace) -> None:
    rows: list[Row] = []
    async with bench(args.keys, args.runs, quick=args.quick) as stage:
        versions = await stage.versions()
        try:
            for name in args.only or CASES:
                print(f"{datetime.now(UTC):%H:%M:%S} {name}", file=sys.stderr, flush=True)
                rows += await CASES[name](stage)
        finally:
            # Also when a case broke: the others have taken their time.
            machine = _machine(versions, stage.noise, args)
            tables = {"measured": f"{machine}\n\n{render(rows)}", "times": _times(stage)}
            print(*tables.values(), sep="\n\n")
            if args.json:
                lines = [vars(row) for row in rows]
                found = {"machine": machine, "rows": lines, "details": stage.details}
                args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.write:
        page.put(tables)


def _machine(versions: str, noise: list[float], args: argparse.Namespace) -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    taken = f"{median(noise):.0%}" if noise else "an unknown part"
    return (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC; {args.keys:,} keys, {args.runs} runs;"
        f" {os.cpu_count()} CPUs, {memory:.0f} GiB, {platform.system()} {platform.machine()};"
        f" Python {platform.python_version()}, balancesync {__version__}, {versions};"
        f" meanwhile other programs took {taken} of the CPUs"
    )


def _times(stage: Bench) -> str:
    """Where the time goes, as medians: phases of a run, CPU seconds of each process."""
    lines = [tuple(_DETAILS.values())]
    for case, found in stage.details.items():
        cells = [case]
        for name in [*_DETAILS][1:]:
            values = [each[name] for each in found if name in each]
            shown = f"{median(values):.0%}" if name == "others" and values else ""
            cells.append(shown or (f"{median(values):.3f}" if values else ""))
        lines.append(tuple(cells))
    return grid(lines)


def main() -> int:
    """Measure what the command line asks for."""
    parser = _parser()
    args = parser.parse_args()
    if args.write and (args.only or args.quick):
        parser.error("--write takes all cases: the page's tables are replaced as a whole")
    try:
        asyncio.run(_measure(args))
    except (Broken, BalanceSyncError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
