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
from typing import Any, Final

from balancesync import __version__
from balancesync.errors import BalanceSyncError
from benchmarks import around, cases, shapes
from benchmarks.servers import Bench, Broken, bench
from benchmarks.table import Row, render

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
    "memory": around.memory,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--keys", type=int, default=1_000_000, help="default 1000000")
    parser.add_argument("--runs", type=int, default=5, help="of each case (default 5)")
    parser.add_argument(
        "--only", action="append", choices=CASES, metavar="CASE", help=f"of {', '.join(CASES)}"
    )
    parser.add_argument("--quick", action="store_true", help="no memory of five times the keys")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to FILE")
    return parser


async def _measure(args: argparse.Namespace) -> dict[str, Any]:
    rows: list[Row] = []
    async with bench(args.keys, args.runs, quick=args.quick) as stage:
        versions = await stage.versions()
        for name in args.only or CASES:
            print(f"{datetime.now(UTC):%H:%M:%S} {name}", file=sys.stderr, flush=True)
            rows += await CASES[name](stage)
    print(_machine(versions, args), "", render(rows), "", _phases(stage), sep="\n")
    return {
        "machine": _machine(versions, args),
        "rows": [vars(row) for row in rows],
        "runs": stage.phases,
    }


def _machine(versions: str, args: argparse.Namespace) -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC; {args.keys:,} keys, {args.runs} runs;"
        f" {os.cpu_count()} CPUs, {memory:.0f} GiB, {platform.system()} {platform.machine()};"
        f" Python {platform.python_version()}, balancesync {__version__}, {versions}"
    )


def _phases(stage: Bench) -> str:
    """Where the time of the runs goes, as medians."""
    lines = ["| run | scan and stage | diff | apply and record |", "| --- | --- | --- | --- |"]
    for case, found in stage.phases.items():
        times = [median(run[phase] for run in found) for phase in ("scan", "diff", "apply")]
        lines.append(f"| {case} | " + " | ".join(f"{each:.3f} s" for each in times) + " |")
    return "\n".join(lines)


def main() -> int:
    """Measure what the command line asks for."""
    args = _parser().parse_args()
    try:
        found = asyncio.run(_measure(args))
    except (Broken, BalanceSyncError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
