"""How things stand: the documents of `status`, `stats` and `health`, from both servers."""

import asyncio
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from time import perf_counter
from typing import Final, Literal
from zoneinfo import ZoneInfo

from balancesync.config import Config, RedisConfig, ScheduleConfig
from balancesync.continuity import Sighting
from balancesync.database import Connection, Database, Steps, load_sql, lock_key
from balancesync.documents import Document, run_document
from balancesync.dsn import postgres_place
from balancesync.errors import BalanceSyncError, PostgresUnavailable
from balancesync.fires import longest_gap
from balancesync.model import Run, exceeds
from balancesync.records import Records, Remembered, elsewhere
from balancesync.source import Source
from balancesync.times import time_text
from balancesync.verdict import Ended, Situation, Success, judge

Level = Literal["ok", "degraded", "failed"]

# Whoever asks how things stand wants to know it now, and not after a statement's time-out.
_PROBE_S: Final = 5.0
_SEARCHED_RUNS: Final = 100
# Live mode that is up writes down every two seconds how far it is.
_FOLLOWED_S: Final = 15.0
_OVERDUE_INTERVALS: Final = 2
UNASKED: Final = "PostgreSQL doesn't answer, and only it knows"
# What `stats` says of each of the last runs.
SHORT: Final = ("id", "job", "trigger", "mode", "status", "mapping", "started_at", "duration_s")


@dataclass(frozen=True, slots=True)
class Server:
    """Whether a server answers, and which; `error` says why not, and names it."""

    connected: bool
    address: str | None = None
    version: str | None = None
    latency_ms: float | None = None
    error: str | None = None


async def probe_redis(config: RedisConfig, source: Source) -> Server:
    """Ask Redis whether it answers, and how fast."""
    return (await look_at_redis(config, source))[0]


async def look_at_redis(config: RedisConfig, source: Source) -> tuple[Server, Sighting | None]:
    """The same, and what it says of itself; None if it doesn't answer."""
    try:
        async with asyncio.timeout(_PROBE_S):
            identity = await source.identity()
            latency_s = await source.ping()
    except BalanceSyncError as error:
        return Server(connected=False, error=str(error)), None
    except TimeoutError:
        tls = config.url.get_secret_value().startswith("rediss:")
        doubt = "; does it speak TLS?" if tls else ""
        late = f"Redis didn't answer in {_PROBE_S:g} s{doubt}"
        return Server(connected=False, error=late), None
    server = Server(
        connected=True,
        address=identity.address,
        version=identity.version,
        latency_ms=round(latency_s * 1000, 3),
    )
    return server, identity.sighting


async def probe_postgres(database: Database) -> Server:
    """Ask PostgreSQL who it is."""

    async def question(connection: Connection) -> Server:
        begun = perf_counter()
        version = await connection.fetchval("SHOW server_version")
        latency_ms = round((perf_counter() - begun) * 1000, 3)
        return Server(
            connected=True,
            address=database.address,
            version=version.split()[0],
            latency_ms=latency_ms,
        )

    try:
        return await database.ask(question, _PROBE_S, reserved=True)
    except BalanceSyncError as error:
        return Server(connected=False, error=str(error))


async def why_away(database: Database) -> int:
    """The exit code of what keeps PostgreSQL from answering; 75 if it may pass."""
    try:
        await database.ask(_nothing, _PROBE_S, reserved=True)
    except BalanceSyncError as error:
        return error.exit_code
    return PostgresUnavailable.exit_code


async def _nothing(connection: Connection) -> None:
    await connection.execute("SELECT 1")


@dataclass(frozen=True, slots=True)
class Recorded:
    """What PostgreSQL holds of the runs, read at one moment: `at`, by its clock.

    `synced` and `verified` are the last sync that was to write and the last verify that ended.

    `rejects` are the open ones by mapping and reason, `present` the keys of the last successes,
    `writing` whether anybody holds the writer's lock. `drift` is what the last verify found to
    differ, by mapping, where no sync has succeeded since. `followed` is up to when live mode is
    known to have brought over every change.
    """

    at: datetime
    current: Run | None
    last: Run | None
    synced: Run | None
    verified: Run | None
    success: Run | None
    refusals: list[Document]
    elsewhere: list[Document]
    rejects: dict[str, dict[str, int]]
    present: int
    writing: bool
    drift: dict[str, int]
    followed: datetime | None

    @property
    def until(self) -> datetime | None:
        """Up to when everything is in PostgreSQL; None while no sync has succeeded.

        A success has read each key after it began; live mode may have come further since.
        """
        if self.success is None:
            return None
        return max(self.success.started_at, self.followed or self.success.started_at)

    def success_age_s(self, later_s: float = 0.0) -> float | None:
        """Seconds since the last success, so many seconds after this was read."""
        if self.success is None or self.success.finished_at is None:
            return None
        return round(max((self.at - self.success.finished_at).total_seconds() + later_s, 0.0), 3)


async def read(
    database: Database, config: Config | None = None, now: Sighting | None = None
) -> Recorded:
    """Ask PostgreSQL for all that `status` and `health` say of the runs.

    What is refused on the Redis that is seen `now` are its `refusals`; what was refused on another
    is `elsewhere`.

    Raises SchemaMissing, SchemaTooNew.
    """
    records = Records(database)
    writer = lock_key("writer", database.config.schema)
    async with database.acquire(reserved=True) as connection:
        await Steps(database).check(connection)
        # A flush of live mode isn't a run to those who ask what runs.
        runs = await records.runs(connection, limit=_SEARCHED_RUNS, live=False)
        known = await records.remembered(connection)
        refusals, others = split_refusals(config, known, now)
        drift = await records.drift(connection)
        ended = [run for run in runs if run.status != "running"]
        return Recorded(
            at=await connection.fetchval("SELECT clock_timestamp()"),
            current=next((run for run in runs if run.status == "running"), None),
            last=next(iter(ended), None),
            synced=next((run for run in ended if run.job == "sync" and run.mode == "apply"), None),
            verified=next((run for run in ended if run.job == "verify"), None),
            success=await records.last_success(connection),
            refusals=refusals,
            elsewhere=others,
            rejects=await records.count_rejects(connection),
            present=sum(each.baseline.present for each in known.values() if each.baseline),
            writing=await connection.fetchval(load_sql("overview")["writer"], writer),
            drift={name: rows for name, rows in drift.items() if rows},
            followed=await records.followed(connection),
        )


def split_refusals(
    config: Config | None, known: Mapping[str, Remembered], now: Sighting | None
) -> tuple[list[Document], list[Document]]:
    """The refusals that stand on this Redis, and those that were met on another."""
    keys = {each.name: each.full_key for each in config.mapping} if config else {}
    here: list[Document] = []
    others: list[Document] = []
    for name, each in sorted(known.items()):
        seen = now.of_keys(keys[name]) if now is not None and name in keys else None
        if each.refusal is not None:
            at = time_text(each.refused_at)
            found = here if each.refuses(seen) else others
            found.append({"mapping": name, "reason": each.refusal, "refused_at": at})
    return here, others


async def status(config: Config, database: Database, source: Source) -> Document:
    """What runs, what ran, what the guard refuses, both servers, and how well all that is.

    Without PostgreSQL all but the servers is null. Raises SchemaMissing, SchemaTooNew.
    """
    (redis, seen), postgres = await asyncio.gather(
        look_at_redis(config.redis, source), probe_postgres(database)
    )
    recorded = await read(database, config, seen) if postgres.connected else None
    leader = await _ask_leader(database) if postgres.connected else None
    guard = {"guard": guard_check(config, seen)}
    checks = server_checks(redis, postgres) | guard | _checks(config, recorded)
    now = situation(config, redis, postgres, recorded, checks)
    if config.live.enabled:
        checks["live"] = _live_check(recorded, leader)
        is_well = checks["live"]["status"] == "ok"
        now = replace(now, unfollowed=None if is_well else checks["live"]["detail"])
    now = replace(now, attended=leader is not None)
    return status_document(redis, postgres, recorded) | {
        "verdict": judge(now).document(),
        "database": postgres_place(config.postgres.dsn.get_secret_value()),
        "schema": config.postgres.schema,
        "leader": leader,
        "health": health_document(checks),
    }


async def _ask_leader(database: Database) -> str | None:
    """The name of the daemon that leads, wherever it listens."""
    async with database.acquire() as connection:
        return (await Records(database).leader(connection))[1]


def status_document(
    redis: Server, postgres: Server, recorded: Recorded | None, later_s: float = 0.0
) -> Document:
    """The content of `status`; `recorded` was read `later_s` seconds ago."""
    document: Document = {
        "state": None,
        "current_run": None,
        "last_run": None,
        "last_success_at": None,
        "last_success_age_s": None,
        "safe_until": None,
        "refusal": None,
        "refused_elsewhere": None,
        "rejects": None,
        "not_found": None,
        "without_keys": None,
        "drift": None,
    }
    if recorded is not None:
        current, last, success = recorded.current, recorded.last, recorded.success
        document |= {
            "state": "running" if current else "idle",
            "current_run": run_document(current) if current else None,
            "last_run": run_document(last) if last else None,
            "last_success_at": time_text(success.finished_at) if success else None,
            "last_success_age_s": recorded.success_age_s(later_s),
            "safe_until": time_text(recorded.until),
            "refusal": recorded.refusals or None,
            "refused_elsewhere": recorded.elsewhere or None,
            "rejects": recorded.rejects,
            "not_found": success.counts.not_found if success else None,
            "without_keys": _without_keys(success),
            "drift": recorded.drift,
        }
    return document | {"redis": asdict(redis), "postgres": asdict(postgres)}


def situation(
    config: Config,
    redis: Server,
    postgres: Server,
    recorded: Recorded | None,
    checks: dict[str, Document],
) -> Situation:
    """What the verdict is made of, as far as both servers tell."""
    schema = checks["schema"]
    away = schema["detail"] if postgres.connected else None
    found = Situation(
        redis=redis.connected,
        postgres=postgres.connected,
        trouble=away if schema["status"] == "failed" else None,
        stale=away if schema["status"] == "degraded" else None,
    )
    if recorded is None:
        return found
    checked = {name: each["status"] for name, each in checks.items()}
    return replace(
        found,
        until=recorded.until,
        success=_success(config, recorded.success),
        refused=[each["mapping"] for each in recorded.refusals],
        elsewhere=[elsewhere(each["mapping"], each["reason"]) for each in recorded.elsewhere],
        rejects=sum(sum(reasons.values()) for reasons in recorded.rejects.values()),
        rejects_over=checks["rejects"]["detail"] if checked["rejects"] != "ok" else None,
        overdue=checked["last_success"] == "failed",
        drift=recorded.drift,
        synced=_ended(recorded.synced),
        verified=_ended(recorded.verified),
        current=recorded.current,
    )


def _success(config: Config, run: Run | None) -> Success | None:
    if run is None:
        return None
    unread = [mapping.name for mapping in config.mapping if mapping.name not in run.mappings]
    return Success(run.started_at, run.counts.not_found, _without_keys(run), unread)


def _ended(run: Run | None) -> Ended | None:
    return Ended(run.job, run.status, run.error) if run else None


def _without_keys(success: Run | None) -> list[str]:
    """The mappings of which a run found no key at all."""
    counts = success.mappings.items() if success else ()
    return [name for name, found in counts if found.scanned == found.ignored + found.vanished]


async def stats(database: Database) -> Document:
    """Totals, the last 100 runs, durations, rejects. Raises SchemaMissing, SchemaTooNew."""
    async with database.acquire() as connection:
        await Steps(database).check(connection)
        return await stats_document(Records(database), connection)


async def stats_document(records: Records, connection: Connection) -> Document:
    """The content of `stats`."""
    found = await records.stats(connection)
    # Flushes would fill them all: there's one of their runs a minute.
    runs = await records.runs(connection, limit=_SEARCHED_RUNS, live=False)
    success = await records.last_success(connection)
    last: dict[str, int] = {}
    for run in runs:
        last[run.status] = last.get(run.status, 0) + 1
    return {
        "totals": found["totals"],
        "last_runs": last,
        "recent_runs": [{name: each[name] for name in SHORT} for each in map(run_document, runs)],
        "durations": {"p50_s": found["p50_s"], "p95_s": found["p95_s"]},
        "rejects": await records.count_rejects(connection),
        "last_success_at": time_text(success.finished_at) if success else None,
        "last_success_age_s": await _age_s(connection, success),
    }


async def _age_s(connection: Connection, success: Run | None) -> float | None:
    if success is None or success.finished_at is None:
        return None
    now: datetime = await connection.fetchval("SELECT clock_timestamp()")
    return round(max((now - success.finished_at).total_seconds(), 0.0), 3)


def planned_interval(schedule: ScheduleConfig, now: datetime) -> float:
    """Seconds: the longest gap between two planned syncs, by the jobs alone.

    Looked for a year back and ahead of `now` (aware). Infinite without a sync job, or if there are
    no two syncs in that time.
    """
    syncs = [job.fields for job in schedule.jobs.values() if job.job == "sync"]
    return longest_gap(syncs, now.astimezone(ZoneInfo(schedule.timezone)).date())


async def health(config: Config, database: Database, source: Source) -> Document:
    """Whether all is well, check by check: `healthy`, `degraded` or `unhealthy`."""
    (redis, seen), postgres = await asyncio.gather(
        look_at_redis(config.redis, source), probe_postgres(database)
    )
    checks = server_checks(redis, postgres) | {"guard": guard_check(config, seen)}
    recorded = None
    if postgres.connected:
        try:
            recorded = await database.within(_PROBE_S, read(database, config, seen))
        except BalanceSyncError as error:
            return health_document(checks | unknown_checks(str(error)))
    checks |= _checks(config, recorded)
    if config.live.enabled and recorded is not None:
        checks["live"] = _live_check(recorded, await _ask_leader(database))
    return health_document(checks)


def _live_check(recorded: Recorded | None, leader: str | None) -> Document:
    """What PostgreSQL knows of the daemon that follows changes, where that one can't be asked."""
    if recorded is None:
        return check("degraded", "not known")
    if leader is None:
        return check("degraded", "enabled, but no daemon leads: start one with `balancesync run`")
    until = recorded.followed
    age_s = None if until is None else max((recorded.at - until).total_seconds(), 0.0)
    if age_s is None or age_s > _FOLLOWED_S:
        how = "never" if age_s is None else f"{age_s:,.0f} s ago"
        return check("degraded", f"not up, as far as is known: all was brought over {how}")
    return check("ok", f"up, all was brought over {age_s:,.0f} s ago")


def _checks(config: Config, recorded: Recorded | None) -> dict[str, Document]:
    if recorded is None:
        return unknown_checks(UNASKED)
    interval_s = planned_interval(config.schedule, recorded.at)
    return recorded_checks(config, recorded, interval_s=interval_s)


def health_document(checks: dict[str, Document]) -> Document:
    """The content of `health`: as bad as the worst of its checks."""
    levels = {each["status"] for each in checks.values()}
    overall = "healthy"
    if "failed" in levels:
        overall = "unhealthy"
    elif "degraded" in levels:
        overall = "degraded"
    return {"status": overall, "checks": checks}


def check(level: Level, detail: str) -> Document:
    """One check: how it is, and what there is to say of it."""
    return {"status": level, "detail": detail}


def server_checks(redis: Server, postgres: Server) -> dict[str, Document]:
    """Whether both servers answer: without PostgreSQL nothing goes, without Redis reading does."""
    return {
        "redis": _server_check(redis, "degraded"),
        "postgres": _server_check(postgres, "failed"),
    }


def guard_check(config: Config, seen: Sighting | None) -> Document:
    """Whether a Redis that was emptied, and filled again, would be noticed; `seen` is the last."""
    blind = [each for each in seen.primaries if each.is_blind] if seen else []
    if not blind:
        return check("ok", "not known" if seen is None else "a loss would be noticed")
    what = f"Redis at {blind[0].address} doesn't tell whether it was emptied: its INFO lacks"
    text = f"{what} {' and '.join(blind[0].untold)}"
    limit = f"guard.max_loss = {config.guard.max_loss:g}"
    if config.guard.max_loss < 1:
        return check("ok", f"{text}; more changes than {limit} between two syncs are refused")
    return check("degraded", f"{text}, and {limit} lets whatever came back pass: set it below 1")


def _server_check(server: Server, otherwise: Level) -> Document:
    if server.connected:
        return check("ok", f"version {server.version}, {server.latency_ms} ms")
    return check(otherwise, server.error or "it doesn't answer")


def recorded_checks(
    config: Config,
    recorded: Recorded,
    later_s: float = 0.0,
    *,
    interval_s: float,
    waited_s: float = 0.0,
) -> dict[str, Document]:
    """What the records say, `later_s` seconds after they were read.

    A last success older than two planned intervals, of `interval_s` seconds each, is a failure, and
    so is none at all where one has been waited for that long, `waited_s`.
    """
    refused = "; ".join(
        f'mapping "{each["mapping"]}": {each["reason"]}' for each in recorded.refusals
    )
    overdue_s = _OVERDUE_INTERVALS * interval_s
    return {
        "schema": check("ok", "up to date"),
        "lock": check("ok", "a writer is at work" if recorded.writing else "free"),
        "last_success": _success_check(recorded.success_age_s(later_s), overdue_s, waited_s),
        "refusal": check("degraded", refused) if refused else check("ok", _elsewhere(recorded)),
        "rejects": _reject_check(config, recorded),
    }


def _elsewhere(recorded: Recorded) -> str:
    found = [elsewhere(each["mapping"], each["reason"]) for each in recorded.elsewhere]
    return "; ".join(found) or "none stands"


def unknown_checks(why: str) -> dict[str, Document]:
    """The same while nobody knows: what isn't there to be seen isn't well."""
    unknown = check("degraded", "not known")
    return {
        "schema": check("failed", why),
        **dict.fromkeys(("lock", "last_success", "refusal", "rejects"), unknown),
    }


def _success_check(age_s: float | None, overdue_s: float, waited_s: float) -> Document:
    if age_s is None:
        level: Level = "failed" if waited_s > overdue_s else "degraded"
        return check(level, "no sync of all mappings has succeeded yet")
    if age_s > overdue_s:
        return check("failed", f"{age_s:,.0f} s ago, more than two intervals of the schedule")
    return check("ok", f"{age_s:,.0f} s ago")


def _reject_check(config: Config, recorded: Recorded) -> Document:
    count = sum(sum(reasons.values()) for reasons in recorded.rejects.values())
    if exceeds(count, config.guard.max_rejects, recorded.present):
        limit = f"guard.max_rejects = {config.guard.max_rejects:g}"
        return check("degraded", f"{count:,} are open, more than {limit} allows")
    return check("ok", f"{count:,} open")
