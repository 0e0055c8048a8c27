"""What may be typed: commands, options, their help, and one line for what is none of them."""

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Final, NoReturn
from uuid import UUID

from balancesync import __version__

USAGE: Final = 2
_DAY_S: Final = 86_400
_CENTURY_S: Final = 100 * 365 * _DAY_S
_ALIASES: Final = {"health": ("health-check", "health_check")}
_EXAMPLES: Final = {
    "sync": "balancesync sync --dry-run --mapping balances",
    "verify": "balancesync verify --json",
    "restore": "balancesync restore --dry-run",
    "prune": "balancesync prune --idle-for 2592000 --dry-run",
    "rejects": "balancesync rejects --reason too_many_decimals --limit 20",
    "history": "balancesync history --mapping balances 123456",
    "runs": "balancesync runs --job sync --trigger cron --limit 5",
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


class _Parser(argparse.ArgumentParser):
    """Says what is wrong on one line, without the usage of many."""

    def error(self, message: str) -> NoReturn:
        text = message.removeprefix("argument ")
        if not text.isprintable():
            text = text.encode("unicode_escape").decode()
        end = "" if text.endswith("?") else ";"
        self.exit(USAGE, f"balancesync: {text}{end} `{self.prog} --help` says more\n")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read a command line; `command` is None if there's none on it.

    Prints one line on stderr and raises SystemExit(2) if it can't be understood.
    """
    parser, commands = _parsers()
    first = argv[0] if argv else ""
    if first and not first.startswith("-") and first not in commands:
        parser.error(f"there is no command {first}{_nearest(first, commands)}")
    chosen = commands.get(first, parser)
    # Before the value of an option that there isn't is taken for something else.
    for word in takewhile(lambda word: word != "--", argv):
        if word.startswith("--") and word.partition("=")[0] not in _options(chosen):
            _refuse(chosen, word)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        _refuse(chosen, unknown[0])
    return args


def print_help() -> None:
    """Print the commands."""
    _parsers()[0].print_help()


def _refuse(parser: _Parser, word: str) -> NoReturn:
    if not word.startswith("-"):
        parser.error(f"{parser.prog.partition(' ')[2]} takes no {word}")
    near = _nearest(word.partition("=")[0], _options(parser))
    parser.error(f"there is no option {word}{near}")


def _options(parser: _Parser) -> list[str]:
    return re.findall(r"--?[a-z][a-z-]*", parser.format_help())


def _nearest(word: str, words: Iterable[str]) -> str:
    found = get_close_matches(word.lower(), words, 1)
    return f", did you mean {found[0]}?" if found else ""


@cache
def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """The parser of all, and that of each command by its names."""
    parser = _Parser(
        prog="balancesync",
        allow_abbrev=False,
        description="Copies users' balances from Redis to PostgreSQL, exactly, and proves it.",
        epilog="Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 refused by the guard,"
        " 75 the lock is held or a server can't be reached.",
    )
    parser.add_argument("--version", action="version", version=f"balancesync {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    made: dict[str, _Parser] = {}
    for name, add_options in OPTIONS.items():
        aliases = _ALIASES.get(name, ())
        command = commands.add_parser(
            name,
            help=_HELP[name],
            description=f"{_HELP[name][0].upper()}{_HELP[name][1:]}.",
            epilog=f"example:\n  {_EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            aliases=aliases,
            allow_abbrev=False,
        )
        command.set_defaults(command=name)
        add_options(command)
        made |= dict.fromkeys((name, *aliases), command)
    return parser, made


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
    command.add_argument(
        "id", nargs="?", type=_run_id, metavar="ID", help="this run, with all of it"
    )
    command.add_argument("--job", metavar="JOB", help="only these, such as sync or live")
    command.add_argument("--trigger", metavar="TRIGGER", help="only these, such as cron or http")
    command.add_argument("--all", action="store_true", help="those of live mode, too")
    _add_limit(command, 20)


def _add_cancel(command: argparse.ArgumentParser) -> None:
    _add_common(command)
    command.add_argument(
        "id", nargs="?", type=_run_id, metavar="ID", help="this run, also if queued"
    )


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


OPTIONS: Final[dict[str, Callable[[argparse.ArgumentParser], None]]] = {
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


def _number(text: str, least: float, most: float, what: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not least <= number <= most:
        raise argparse.ArgumentTypeError(f"must be {what}, not {text}")
    return number


def _limit(text: str) -> int:
    number = int(text) if text.isascii() and text.isdecimal() else 0
    if not 1 <= number <= 1_000_000:
        raise argparse.ArgumentTypeError(f"must be a number from 1 to 1000000, not {text}")
    return number


def _idle_seconds(text: str) -> float:
    return _number(text, 0, _CENTURY_S, "seconds, from 0 to a century of them")


def _pause(text: str) -> float:
    return _number(text, 0.1, _DAY_S, "seconds, from 0.1 to 86400")


def _seconds(text: str) -> float:
    return _number(text, 0, _DAY_S, "seconds, from 0 to 86400")


def _run_id(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a run's id, as `balancesync runs` lists them, not {text}"
        ) from None
