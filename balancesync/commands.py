"""What each command does: ask the rooms below, show the answer, give the exit code."""

import asyncio
import os
import signal
import sys
import threading
from argparse import Namespace
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, replace
from typing import Any, Final, Literal, get_args

from balancesync import check as checks
from balancesync import overview, service, show, standing, telemetry
from balancesync.changes import show_changes
from balancesync.config import Config, MappingConfig
from balancesync.database import Connection, Database, Steps
from balancesync.documents import (
    Document,
    change_document,
    reject_document,
    run_document,
)
from balancesync.errors import (
    BalanceSyncError,
    ConfigError,
    PostgresUnavailable,
    TargetMismatch,
    Unavailable,
)
from balancesync.findings import LEVELS
from balancesync.history import History
from balancesync.mapping import InvalidKey, Mapping
from balancesync.model import TRIGGERS, WOULD_BE_REFUSED, Job, Mode, Reason, Request
from balancesync.progress import follow
from balancesync.records import Records
from balancesync.source import Source
from balancesync.sync import Sync
from balancesync.times import exact_time_text, parse_time
from balancesync.watch import watch

Command = Callable[[Config, Namespace], Coroutine[Any, Any, int]]

_DRIFT: Final = 1
_STOPPED: Final = 1


def configure_logs(config: Config, secrets: tuple[str, ...], *, verbose: bool) -> None:
    """Set up the logs of a command: on a terminal, the bar and the result say what info would."""
    terminal = sys.stderr.isatty()
    log = config.log
    if verbose:
        log = replace(log, level="debug")
    people = terminal and not verbose and log.level == "info" and log.format != "json"
    if people:
        log = replace(log, level="warning")
    # The result has a run's counts, and the last line its error; a line for programs is whole.
    untold = {"run"} if people else {"run.error"} if log.format == "console" else ()
    telemetry.configure(log, secrets, stream_is_tty=terminal, untold=frozenset(untold))


@asynccontextmanager
async def servers(config: Config) -> AsyncIterator[tuple[Database, Source]]:
    """Both servers, connected to when they're first asked."""
    database = Database(config.postgres)
    try:
        async with Source(config.redis) as source:
            yield database, source
    finally:
        await database.close()


@asynccontextmanager
async def _records(config: Config) -> AsyncIterator[tuple[Records, Connection]]:
    """balancesync's own tables, to be read; raises SchemaMissing or SchemaTooNew."""
    database = Database(config.postgres)
    try:
        async with database.acquire() as connection:
            await Steps(database).check(connection)
            yield Records(database), connection
    finally:
        await database.close()


async def sync(config: Config, args: Namespace) -> int:
    """Copy what has changed, or show it."""
    mode: Mode = "dry_run" if args.dry_run else "apply"
    request = Request(
        job="sync",
        trigger="cli",
        mode=mode,
        mapping=args.mapping,
        accept_loss=args.accept_loss,
        force=args.force,
    )
    return await _run(config, args, request, wait_s=args.wait)


async def verify(config: Config, args: Namespace) -> int:
    """Compare Redis with PostgreSQL."""
    request = Request(job="verify", trigger="cli", mode="verify", mapping=args.mapping)
    return await _run(config, args, request)


async def restore(config: Config, args: Namespace) -> int:
    """Put PostgreSQL's rows back into Redis, or show what would come back."""
    try:
        as_of = None if args.as_of is None else parse_time(args.as_of)
    except ValueError as error:
        raise ConfigError(f"--as-of {error}") from None
    request = Request(
        job="restore",
        trigger="cli",
        mode="dry_run" if args.dry_run else "apply",
        mapping=args.mapping,
        overwrite=args.overwrite,
        as_of=as_of,
    )
    return await _run(config, args, request, wait_s=args.wait)


async def prune(config: Config, args: Namespace) -> int:
    """Take records out of Redis whose rows haven't changed for long, or show which."""
    request = Request(
        job="prune",
        trigger="cli",
        mode="dry_run" if args.dry_run else "apply",
        mapping=args.mapping,
        idle_s=args.idle_for,
    )
    return await _run(config, args, request, wait_s=args.wait)


async def _run(config: Config, args: Namespace, request: Request, *, wait_s: float = 0.0) -> int:
    async with servers(config) as (database, source):
        with follow(terminal=sys.stderr.isatty()) as on_progress:
            work = Sync(config, database, source, on_progress)
            with _stopping(work):
                run = await work.run(request, wait_s=wait_s)
    document = run_document(run, None if request.mode == "apply" else work.reports)
    _answer(args, document, show.show_run)
    if work.failure is not None:
        raise work.failure
    if request.mode == "verify":
        return _say_drift(document, quiet=args.json)
    return 0


def _say_drift(document: Document, *, quiet: bool) -> int:
    drift = document["drift"] or 0
    lost = any(warning.startswith(WOULD_BE_REFUSED) for warning in document["warnings"])
    if not quiet and document.get("error") is None:
        show.write(_verdict(document, drift, lost=lost))
    return _DRIFT if drift or lost else 0


def _verdict(document: Document, drift: int, *, lost: bool) -> str:
    if drift:
        differ = f"{drift:,} {'row differs' if drift == 1 else 'rows differ'}"
        # What a sync would write then is no cure.
        return f"{differ}, and Redis has lost balances" if lost else f"{differ} from Redis"
    if lost:
        return "Redis has lost balances: what is left of them agrees with PostgreSQL"
    if not document["scanned"] and not document["moving"]:
        return "Redis has no key of it: there was nothing to compare"
    besides = {
        "rejected": ("reject", "rejects"),
        "not_found": ("key without a row", "keys without a row"),
        "moving": ("key that changed at every look", "keys that changed at every look"),
    }
    but = [
        f"{document[name]:,} {one if document[name] == 1 else many}"
        for name, (one, many) in besides.items()
        if document[name]
    ]
    return "Redis and PostgreSQL agree" + (", but for " + " and ".join(but) if but else "")


@contextmanager
def _stopping(work: Sync) -> Iterator[None]:
    """SIGINT and SIGTERM end the run at its next batch; a second one ends the process at once.

    Only the main thread can have handlers: elsewhere there are none.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    asked: list[str] = []

    def stop(name: str) -> None:
        if asked:
            # The servers see the connections close, and undo what isn't committed.
            os._exit(_STOPPED)
        asked.append(name)
        print("balancesync: stopping at the next batch; again to stop at once", file=sys.stderr)
        work.stop(f"stopped by {name}")

    signals = (signal.SIGINT, signal.SIGTERM)
    for each in signals:
        loop.add_signal_handler(each, stop, each.name)
    try:
        yield
    finally:
        for each in signals:
            loop.remove_signal_handler(each)


async def rejects(config: Config, args: Namespace) -> int:
    """What couldn't be stored."""
    if args.mapping is not None:
        _the_mapping(config, args.mapping)
    reasons = get_args(Reason)
    if args.reason is not None and args.reason not in reasons:
        raise ConfigError(f"--reason must be one of {', '.join(reasons)}")
    async with _records(config) as (records, connection):
        found = await records.rejects(
            connection,
            limit=args.limit,
            mapping=args.mapping,
            reason=args.reason,
            healed=args.all,
        )
    documents = [reject_document(reject) for reject in found]
    if args.json:
        show.as_json(documents)
    else:
        show.show_rejects(documents, args.limit)
    return 0


async def history(config: Config, args: Namespace) -> int:
    """Every kept change of one balance."""
    mapping = _the_mapping(config, args.mapping)
    try:
        Mapping(mapping).key_of(args.key)
    except InvalidKey as error:
        raise ConfigError(f"no key of {mapping.name}: {error}") from None
    database = Database(config.postgres)
    kept = History(database, config.history)
    try:
        async with database.acquire() as connection:
            await Steps(database).check(connection)
            since = await kept.since(connection, mapping)
            found = await kept.changes(connection, mapping.name, args.key, args.limit)
    finally:
        await database.close()
    document = {
        "mapping": mapping.name,
        "key": dict(zip(mapping.key_columns, args.key, strict=True)),
        "known_since": None if since is None else exact_time_text(since),
        "changes": [change_document(change) for change in found],
    }
    if args.json:
        show.as_json(document)
    else:
        show_changes(document, args.limit, enabled=kept.enabled)
    return 0


def _the_mapping(config: Config, name: str | None) -> MappingConfig:
    if name is None and len(config.mapping) == 1:
        return config.mapping[0]
    names = ", ".join(mapping.name for mapping in config.mapping)
    if name is None:
        raise ConfigError(f"which mapping? --mapping is one of {names}")
    for mapping in config.mapping:
        if mapping.name == name:
            return mapping
    raise ConfigError(f'there is no mapping "{name}" in the configuration; it has {names}')


async def runs(config: Config, args: Namespace) -> int:
    """What ran. Live mode has a run for each minute, which would hide the others from people."""
    if args.job is not None and args.job not in get_args(Job):
        raise ConfigError(f"--job must be one of {', '.join(get_args(Job))}")
    kind = (args.trigger or "cli").partition(":")[0]
    if kind not in TRIGGERS:
        raise ConfigError(f"--trigger must be one of {', '.join(TRIGGERS)}, or cron:NAME")
    async with _records(config) as (records, connection):
        found = await records.runs(
            connection,
            limit=args.limit,
            one=args.id,
            live=args.all or args.json or args.id is not None or "live" in (args.job, args.trigger),
            job=args.job,
            trigger=args.trigger,
        )
    documents = [run_document(run) for run in found]
    if args.id is not None and not documents:
        raise BalanceSyncError(f"there is no run {args.id}; `balancesync runs` lists them")
    if args.json:
        show.as_json(documents if args.id is None else documents[0])
    elif args.id is None:
        show.show_runs(documents, args.limit, chosen=bool(args.job or args.trigger))
    else:
        show.show_one_run(documents[0])
    return 0


async def init(config: Config, args: Namespace) -> int:
    """Create or upgrade the schema."""
    database = Database(config.postgres)
    steps = Steps(database)
    connection = await database.connect()
    try:
        with database.translated():
            taken = await steps.upgrade(connection)
    finally:
        connection.terminate()
    schema = config.postgres.schema
    done: Literal["created", "upgraded", "unchanged"] = "unchanged"
    if taken:
        done = "created" if taken == steps.newest else "upgraded"
    if args.json:
        show.as_json({"schema": schema, "result": done, "steps": taken, "step": steps.newest})
    elif taken:
        show.write(f"schema {schema} {done}: {taken} of {steps.newest} steps taken")
    else:
        show.write(f"schema {schema} is up to date, at step {steps.newest}")
    return 0


async def status(config: Config, args: Namespace) -> int:
    """What runs, what ran, what the guard refuses, both servers."""
    # It tells that Redis is down, but can tell nothing without PostgreSQL.
    without = PostgresUnavailable.exit_code

    async def found(why: str) -> Document:
        nonlocal without
        async with servers(config) as (database, source):
            document = await overview.status(config, database, source)
            if not document["postgres"]["connected"]:
                without = await overview.why_away(database)
        return document | {"no_daemon": why}

    async def ask() -> Document:
        return await service.ask(config, "/status", found)

    if args.watch is not None:
        return await watch(ask, args.watch, as_json=args.json)
    document = await ask()
    _answer(args, document, standing.show_status)
    return 0 if document["postgres"]["connected"] else without


async def stats(config: Config, args: Namespace) -> int:
    """Totals, durations, rejects."""

    async def found(_why: str) -> Document:
        async with servers(config) as (database, _):
            return await overview.stats(database)

    _answer(args, await service.ask(config, "/stats", found), standing.show_stats)
    return 0


async def health(config: Config, args: Namespace) -> int:
    """Whether all is well: 1 if not, 0 also if degraded."""

    async def found(_why: str) -> Document:
        async with servers(config) as (database, source):
            return await overview.health(config, database, source)

    document = await service.ask(config, "/health", found)
    _answer(args, document, standing.show_health)
    return 1 if document["status"] == "unhealthy" else 0


def _answer(args: Namespace, document: Document, people: Callable[[Document], None]) -> None:
    if args.json:
        show.as_json(document)
    else:
        people(document)


async def check(config: Config, args: Namespace) -> int:
    """Look for trouble."""
    found = []
    async with servers(config) as (database, source):
        async for finding in checks.check(config, database, source):
            found.append(finding)
            if not args.json:
                standing.show_finding(finding.level, finding.topic, finding.text)
    levels = Counter(finding.level for finding in found)
    if args.json:
        show.as_json([asdict(finding) for finding in found])
    else:
        counts = (f"{levels[level]} {level}" for level in LEVELS if levels[level])
        show.write(", ".join(counts))
    if levels["error"]:
        return TargetMismatch.exit_code
    return Unavailable.exit_code if levels["unreachable"] else 0


COMMANDS: Final[dict[str, Command]] = {
    "sync": sync,
    "verify": verify,
    "restore": restore,
    "prune": prune,
    "rejects": rejects,
    "history": history,
    "runs": runs,
    "status": status,
    "stats": stats,
    "health": health,
    "check": check,
    "init": init,
    "schedule": service.schedule,
    "cancel": service.cancel,
    "events": service.events,
}
