"""The command line: what may be typed, and the exit code that it ends with.

    0   done, also if there was nothing to do or the run was skipped
    1   failed, cancelled, unhealthy, drift found, too many rejects, or a bug
    2   usage, configuration, or tables that don't fit
    3   refused by the guard
    75  the writer's lock is held, or a server can't be reached

Heavy rooms are imported when a command needs them: `--help` must not wait for them.
"""

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final
from uuid import UUID

from balancesync import __version__
from balancesync.errors import BalanceSyncError

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from balancesync.config import Config

USAGE: Final = 2
_CENTURY_S: Final = 100 * 365 * 86_400
_ALIASES: Final = {"health": ("health-check", "health_check")}
_EXAMPLES: Final = {
    "sync": "balancesync sync --dry-run --mapping balances",
    "verify": "balancesync verify --json",
    "restore": "balancesync restore --dry-run",
    "prune": "balancesync prune --idle-for 2592000 --dry-run",
    "rejects": "balancesync rejects --reason too_many_decimals --limit 20",
    "history": "balancesync history --mapping balances 123456",
    "runs": "balancesync runs --limit 5",
    "status": "balancesync status --watch",
    "stats": "balancesync stats",
    "health": "balancesync health || echo 'look at balancesync status'",
    "check": "balancesync check --config config.toml",
    "init": "balancesync init",
    "run": "balancesync run --config /etc/balancesync/config.toml",
    "schedule": "balancesync schedule",
    "cancel": "balancesync cancel",
    "events": "balancesync events --json",
    "demo": "balancesync demo",
}
_HELP: Final = {
    "sync": "copy what has changed from Redis to PostgreSQL, now",
    "verify": "compare Redis with PostgreSQL; writes no balance",
    "restore": "put PostgreSQL's balances back into Redis, where they're missing",
    "prune": "free Redis' memory of balances that haven't changed for long",
    "rejects": "what couldn't be stored, and why",
    "history": "every kept change of one balance, the newest first",
    "runs": "what ran, the newest first",
    "status": "whether the balances are safe, what runs, ran and comes, both servers",
    "stats": "totals, durations and rejects",
    "health": "exit code 0 or 1, for a health check",
    "check": "look for trouble before it comes: configuration, rights, tables, Redis",
    "init": "create or upgrade the schema of balancesync's own tables",
    "run": "the daemon: syncs on schedule, on demand and by signal; serves HTTP",
    "schedule": "when each job runs next",
    "cancel": "cancel the run that a running daemon is at, or one by its id",
    "events": "follow what a running daemon does",
    "demo": "sync real balances between private servers, explain each step, end in the daemon",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code. Usage errors raise SystemExit(2), as argparse does."""
    if argv is None:
        sys.excepthook = partial(_report_bug, (), False)
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return USAGE
    try:
        if args.command == "demo":
            from balancesync import demo  # noqa: PLC0415

            return demo.run(execute, once=args.once)
        from balancesync.config import load  # noqa: PLC0415

        return _execute(args, load(args.config), report_bugs=argv is None)
    except BalanceSyncError as error:
        _say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _say("interrupted")
        return 1


def execute(argv: Sequence[str], config: "Config") -> int:
    """Run one command with a configuration that is in no file; what `main` does otherwise."""
    return _execute(_parser().parse_args(argv), config, report_bugs=False)


def _execute(args: argparse.Namespace, config: "Config", *, report_bugs: bool) -> int:
    import asyncio  # noqa: PLC0415

    from balancesync import telemetry  # noqa: PLC0415

    secrets = telemetry.secrets_of(config)
    if report_bugs:
        sys.excepthook = partial(_report_bug, secrets, args.verbose)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            if args.command == "run":
                # By itself: a daemon has no use for tables and bars, and runs for years.
                from balancesync import daemon  # noqa: PLC0415

                log = replace(config.log, level="debug") if args.verbose else config.log
                telemetry.configure(log, secrets, stream_is_tty=sys.stderr.isatty())
                return runner.run(daemon.run(config))
            from balancesync import commands  # noqa: PLC0415

            commands.configure_logs(config, secrets, verbose=args.verbose)
            return runner.run(commands.COMMANDS[args.command](config, args))
    except BalanceSyncError as error:
        _say(telemetry.printable(telemetry.hide(str(error), secrets)))
        return error.exit_code


def _loop_factory() -> "Callable[[], AbstractEventLoop] | None":
    try:
        import uvloop  # noqa: PLC0415
    except ImportError:
        return None
    return uvloop.new_event_loop


def _say(text: str) -> None:
    print(f"balancesync: {text}", file=sys.stderr)


def _report_bug(
    secrets: tuple[str, ...],
    verbose: bool,
    kind: type[BaseException],
    error: BaseException,
    trace: TracebackType | None,
) -> None:
    """One line for whoever typed the command; the traceback if they ask for it."""
    from balancesync import telemetry  # noqa: PLC0415

    if verbose:
        lines = "".join(traceback.format_exception(kind, error, trace))
        sys.stderr.write(telemetry.hide(lines, secrets))
    frames = traceback.extract_tb(trace)
    place = ""
    if frames:
        file = Path(frames[-1].filename)
        place = f" at {Path(file.parent.name, file.name)}:{frames[-1].lineno}"
    said = telemetry.printable(telemetry.hide(str(error), secrets))
    hint = "" if verbose else "; --verbose shows the traceback"
    _say(f"this is a bug: {kind.__name__}{place}: {said}{hint}")


# --- what may be typed ----------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="balancesync",
        allow_abbrev=False,
        description="Copies users' balances from Redis to PostgreSQL, exactly, and proves it.",
        epilog="Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 refused by the guard,"
        " 75 the lock is held or a server can't be reached.",
    )
    parser.add_argument("--version", action="version", version=f"balancesync {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, add_options in _OPTIONS.items():
        command = commands.add_parser(
            name,
            help=_HELP[name],
            description=f"{_HELP[name][0].upper()}{_HELP[name][1:]}.",
            epilog=f"example:\n  {_EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            aliases=_ALIASES.get(name, ()),
            allow_abbrev=False,
        )
        command.set_defaults(command=name)
        add_options(command)
    return parser


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="the configuration; else $BALANCESYNC_CONFIG, else ./config.toml",
    )
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.add_argument("--verbose", action="store_true", help="log at debug")


def _add_mapping(command: argparse.ArgumentParser) -> None:
    command.add_argument("--mapping", metavar="NAME", help="this mapping only")


def _add_limit(command: argparse.ArgumentParser, default: int) -> None:
    command.add_argument(
        "--limit", type=_limit, default=default, metavar="N", help=f"at most N (default {default})"
    )


def _add_sync(command: argparse.ArgumentParser) -> None:
    _add_common(command)
    _add_mapping(command)
    command.add_argument(
        "--force", action="store_true", help="run even if schedule.min_interval isn't over"
    )
    command.add_argument(
        "--dry-run", action="store_true", help="show what would change, and change nothing"
    )
    command.add_argument(
        "--accept-loss", action="store_true", help="let what the guard would refuse pass, once"
    )
    _add_wait(command)


def _add_wait(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--wait",
        type=_seconds,
        default=30.0,
        metavar="S",
        help="how long to wait for another writer to end (default 30)",
    )


def _add_restore(command: argparse.ArgumentParser) -> None:
    _add_common(command)
    _add_mapping(command)
    command.add_argument(
        "--overwrite", action="store_true", help="also where Redis has another value"
    )
    command.add_argument(
        "--as-of",
        metavar="TIME",
        help="as they were then, by the history; such as 2026-01-31T02:00:00Z",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="show what would come back, and change nothing"
    )
    _add_wait(command)


def _add_prune(command: argparse.ArgumentParser) -> None:
    _add_common(command)
    _add_mapping(command)
    command.add_argument(
        "--idle-for",
        type=_idle_seconds,
        required=True,
        metavar="SECONDS",
        help="how long a row must not have changed",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="show what would go, and change nothing"
    )
    _add_wait(command)


def _add_status(command: argparse.ArgumentParser) -> None:
    _add_common(command)
    command.add_argument(
        "--watch",
        type=_pause,
        nargs="?",
        const=2.0,
        metavar="S",
        help="show it anew every S seconds (2 if not given), until Ctrl-C",
    )


def _add_verify(command: argparse.ArgumentParser) -> None:
    _add_common(command)
    _add_mapping(command)


def _add_rejects(command: argparse.ArgumentParser) -> None:
    _add_common(command)
    _add_mapping(command)
    command.add_argument("--reason", metavar="REASON", help="only these, such as residue")
    command.add_argument("--all", action="store_true", help="those that have healed, too")
    _add_limit(command, 100)


def _add_history(command: argparse.ArgumentParser) -> None:
    _add_common(command)
    command.add_argument(
        "--mapping", metavar="NAME", help="the mapping; needed if there are several"
    )
    command.add_argument(
        "key",
        nargs="+",
        metavar="KEY",
        help="the text of each key column, in the order of the template; -- before a negative one",
    )
    _add_limit(command, 100)


def _add_runs(command: argparse.ArgumentParser) -> None:
    _add_common(command)
    command.add_argument("id", nargs="?", type=UUID, metavar="ID", help="this run, with all of it")
    _add_limit(command, 20)


def _add_cancel(command: argparse.ArgumentParser) -> None:
    _add_common(command)
    command.add_argument("id", nargs="?", type=UUID, metavar="ID", help="this run, also if queued")


def _add_demo(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Starts a private Redis and PostgreSQL, syncs the 8,893 real balances of Ethereum's genesis"
        "\nblock between them, and explains each step. Then the daemon"
        "\nruns beside an application that moves the money, until Ctrl-C. Leaves nothing behind."
    )
    command.add_argument(
        "--once",
        action="store_true",
        help="end when the daemon's work is proven for the first time",
    )


_OPTIONS: Final[dict[str, Callable[[argparse.ArgumentParser], None]]] = {
    "sync": _add_sync,
    "verify": _add_verify,
    "restore": _add_restore,
    "prune": _add_prune,
    "rejects": _add_rejects,
    "history": _add_history,
    "runs": _add_runs,
    "status": _add_status,
    "stats": _add_common,
    "health": _add_common,
    "check": _add_common,
    "init": _add_common,
    "run": _add_common,
    "schedule": _add_common,
    "cancel": _add_cancel,
    "events": _add_common,
    "demo": _add_demo,
}


def _limit(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 1_000_000:
        raise argparse.ArgumentTypeError("must be from 1 to 1000000")
    return number


def _idle_seconds(text: str) -> float:
    number = float(text)
    if not 0 <= number <= _CENTURY_S:
        raise argparse.ArgumentTypeError("must be from 0 to a century of seconds")
    return number


def _pause(text: str) -> float:
    number = _seconds(text)
    if number < 0.1:
        raise argparse.ArgumentTypeError("must be at least 0.1 seconds")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 86_400:
        raise argparse.ArgumentTypeError("must be from 0 to 86400 seconds")
    return number
