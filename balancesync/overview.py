"""How things stand: the documents of `status`, `stats` and `health`, from both servers."""

import asyncio
from dataclasses import asdict, dataclass
from datetime import datetime
from time import perf_counter
from typing import Final, Literal

from balancesync.config import Config
from balancesync.database import Connection, Database, Steps, load_sql, lock_key
from balancesync.documents import Document, run_document, time_text
from balancesync.errors import BalanceSyncError
from balancesync.model import Run
from balancesync.records import Records
from balancesync.source import Source

Level = Literal["ok", "degraded", "failed"]

# Whoever asks how things stand wants to know it now, and not after a statement's time-out.
_PROBE_S: Final = 5.0
_SEARCHED_RUNS: Final = 100


@dataclass(frozen=True, slots=True)
class Server:
    """Whether a server answers; `error` says why not."""

    connected: bool
    version: str | None = None
    latency_ms: float | None = None
    error: str | None = None


async def probe_redis(source: Source) -> Server:
    """Ask Redis who it is."""
    try:
        async with asyncio.timeout(_PROBE_S):
            version = (await source.identity()).version
            latency_s = await source.ping()
    except BalanceSyncError as error:
        return Server(connected=False, error=str(error))
    except TimeoutError:
        return Server(connected=False, error=f"Redis didn't answer in {_PROBE_S:g} s")
    return Server(connected=True, version=version, latency_ms=round(latency_s * 1000, 3))


async def probe_postgres(database: Database) -> Server:
    """Ask PostgreSQL who it is."""
    try:
        async with asyncio.timeout(_PROBE_S), database.acquire() as connection:
            begun = perf_counter()
            version = await connection.fetchval("SHOW server_version")
            latency_s = perf_counter() - begun
    except BalanceSyncError as error:
        return Server(connected=False, error=str(error))
    except TimeoutError:
        where = f"PostgreSQL at {database.address}"
        return Server(connected=False, error=f"{where} didn't answer in {_PROBE_S:g} s")
    number = version.split()[0]
    return Server(connected=True, version=number, latency_ms=round(latency_s * 1000, 3))


async def status(database: Database, source: Source) -> Document:
    """What runs, what ran, what the guard refuses, both servers.

    Without PostgreSQL all but the servers is null. Raises SchemaMissing, SchemaTooNew.
    """
    redis, postgres = await asyncio.gather(probe_redis(source), probe_postgres(database))
    document: Document = {
        "state": None,
        "current_run": None,
        "last_run": None,
        "last_success_at": None,
        "last_success_age_s": None,
        "refusal": None,
    }
    if postgres.connected:
        async with database.acquire() as connection:
            await Steps(database).check(connection)
            document |= await _recorded(Records(database), connection)
    return document | {"redis": asdict(redis), "postgres": asdict(postgres)}


async def _recorded(records: Records, connection: Connection) -> Document:
    runs = await records.runs(connection, limit=_SEARCHED_RUNS)
    current = next((run for run in runs if run.status == "running"), None)
    last = next((run for run in runs if run.status != "running"), None)
    success = await records.last_success(connection)
    refusals = await _refusals(records, connection)
    return {
        "state": "running" if current else "idle",
        "current_run": run_document(current) if current else None,
        "last_run": run_document(last) if last else None,
        "last_success_at": time_text(success.finished_at) if success else None,
        "last_success_age_s": await _age_s(connection, success),
        "refusal": refusals or None,
    }


async def _refusals(records: Records, connection: Connection) -> list[Document]:
    known = await records.remembered(connection)
    return [
        {"mapping": name, "reason": each.refusal, "refused_at": time_text(each.refused_at)}
        for name, each in sorted(known.items())
        if each.refusal is not None
    ]


async def _age_s(connection: Connection, success: Run | None) -> float | None:
    if success is None or success.finished_at is None:
        return None
    now: datetime = await connection.fetchval("SELECT clock_timestamp()")
    return round(max((now - success.finished_at).total_seconds(), 0.0), 3)


async def stats(database: Database) -> Document:
    """Totals, the last 100 runs, durations, rejects. Raises SchemaMissing, SchemaTooNew."""
    async with database.acquire() as connection:
        await Steps(database).check(connection)
        records = Records(database)
        found = await records.stats(connection)
        runs = await records.runs(connection, limit=100)
        success = await records.last_success(connection)
        last: dict[str, int] = {}
        for run in runs:
            last[run.status] = last.get(run.status, 0) + 1
        return {
            "totals": found["totals"],
            "last_runs": last,
            "durations": {"p50_s": found["p50_s"], "p95_s": found["p95_s"]},
            "rejects": await records.count_rejects(connection),
            "last_success_at": time_text(success.finished_at) if success else None,
            "last_success_age_s": await _age_s(connection, success),
        }


async def health(config: Config, database: Database, source: Source) -> Document:
    """Whether all is well, check by check: `healthy`, `degraded` or `unhealthy`."""
    redis, postgres = await asyncio.gather(probe_redis(source), probe_postgres(database))
    checks: dict[str, Document] = {
        "redis": _server_check(redis, "degraded"),
        "postgres": _server_check(postgres, "failed"),
    }
    if postgres.connected:
        try:
            async with asyncio.timeout(_PROBE_S), database.acquire() as connection:
                await Steps(database).check(connection)
                checks |= await _recorded_checks(config, database, connection)
        except BalanceSyncError as error:
            checks["schema"] = _check("failed", str(error))
        except TimeoutError:
            checks["schema"] = _check("failed", f"no answer in {_PROBE_S:g} s")
    levels = {check["status"] for check in checks.values()}
    overall = "healthy"
    if "failed" in levels:
        overall = "unhealthy"
    elif "degraded" in levels:
        overall = "degraded"
    return {"status": overall, "checks": checks}


def _check(level: Level, detail: str) -> Document:
    return {"status": level, "detail": detail}


def _server_check(server: Server, otherwise: Level) -> Document:
    if server.connected:
        return _check("ok", f"version {server.version}, {server.latency_ms} ms")
    return _check(otherwise, server.error or "it doesn't answer")


async def _recorded_checks(
    config: Config, database: Database, connection: Connection
) -> dict[str, Document]:
    records = Records(database)
    writer = lock_key("writer", config.postgres.schema)
    held = await connection.fetchval(load_sql("overview")["writer"], writer)
    refusals = await _refusals(records, connection)
    refused = "; ".join(f'mapping "{each["mapping"]}": {each["reason"]}' for each in refusals)
    return {
        "schema": _check("ok", "up to date"),
        "lock": _check("ok", "a writer is at work" if held else "free"),
        "last_success": await _success_check(records, connection),
        "refusal": _check("degraded", refused) if refused else _check("ok", "none stands"),
        "rejects": await _reject_check(config, records, connection),
    }


async def _success_check(records: Records, connection: Connection) -> Document:
    success = await records.last_success(connection)
    if success is None:
        return _check("degraded", "no sync of all mappings has succeeded yet")
    return _check("ok", f"{await _age_s(connection, success):,.0f} s ago")


async def _reject_check(config: Config, records: Records, connection: Connection) -> Document:
    known = await records.remembered(connection)
    present = sum(each.baseline.present for each in known.values() if each.baseline)
    counts = await records.count_rejects(connection)
    count = sum(sum(reasons.values()) for reasons in counts.values())
    if count > config.guard.max_rejects * present:
        limit = f"guard.max_rejects = {config.guard.max_rejects:g}"
        return _check("degraded", f"{count:,} are open, more than {limit} allows")
    return _check("ok", f"{count:,} open")
