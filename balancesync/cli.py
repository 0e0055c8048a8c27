"""The command line: one command, and the exit code that it ends with.

    0   done, also if there was nothing to do or the run was skipped
    1   failed, cancelled, unhealthy, drift found, too many rejects, or a bug
    2   usage, configuration, or tables that don't fit
    3   refused by the guard
    75  the writer's lock is held, or a server can't be reached

Heavy rooms are imported when a command needs them: `--help` must not wait for them.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from balancesync import arguments
from balancesync.arguments import USAGE
from balancesync.errors import BalanceSyncError, ConfigError, Unavailable

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from balancesync.config import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code. Usage errors raise SystemExit(2), as argparse does."""
    if argv is None:
        sys.excepthook = partial(_report_bug, (), False)
    args = arguments.parse(sys.argv[1:] if argv is None else argv)
    if args.command is None:
        arguments.print_help()
        return USAGE
    try:
        if args.command == "demo":
            from balancesync import demo  # noqa: PLC0415

            return demo.run(execute, once=args.once)
        from balancesync.config import load  # noqa: PLC0415

        config = load(args.config)
        return _execute(args, config, report_bugs=argv is None, hint=_hint(args, config))
    except BalanceSyncError as error:
        wants_all = args.command == "check"
        for line in error.lines if wants_all and isinstance(error, ConfigError) else [str(error)]:
            _say(line)
        return error.exit_code
    except KeyboardInterrupt:
        _say("interrupted")
        return 1


def execute(argv: Sequence[str], config: "Config") -> int:
    """Run one command with a configuration that is in no file; what `main` does otherwise."""
    return _execute(arguments.parse(argv), config, report_bugs=False)


def _execute(
    args: argparse.Namespace, config: "Config", *, report_bugs: bool, hint: str = ""
) -> int:
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
            code = runner.run(commands.COMMANDS[args.command](config, args))
    except BalanceSyncError as error:
        why = f"; {hint}" if hint and isinstance(error, Unavailable) else ""
        _say(telemetry.printable(telemetry.hide(f"{error}{why}", secrets)))
        return error.exit_code
    # These show what doesn't answer, and raise nothing.
    if hint and (code == Unavailable.exit_code or (args.command == "health" and code)):
        _say(hint)
    return code


def _hint(args: argparse.Namespace, config: "Config") -> str:
    """Why a server can't be reached, where nobody has said which one it is."""
    from balancesync.config import DEFAULT_FILE, FILE_VARIABLE, Config  # noqa: PLC0415

    if args.config or os.environ.get(FILE_VARIABLE) or DEFAULT_FILE.exists():
        return ""
    default = Config()
    if config.redis != default.redis and config.postgres != default.postgres:
        return ""
    return (
        f"there is no {DEFAULT_FILE} here, so these are the defaults;"
        f" --config or {FILE_VARIABLE} names one"
    )


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
