"""balancesync's own runs. Nothing of the floors is imported here: it would count as our memory."""

import resource
from pathlib import Path
from time import perf_counter
from typing import Any

from pydantic import SecretStr

from balancesync.config import (
    Config,
    HistoryConfig,
    LogConfig,
    MappingConfig,
    PostgresConfig,
    RedisConfig,
)
from balancesync.database import Database
from balancesync.model import Job, Request
from balancesync.part import Progress
from balancesync.source import Source
from balancesync.sync import Sync


def peak_memory() -> int:
    """The most bytes that this process had resident.

    Of Linux's two counts the one that starts at exec: ru_maxrss begins with the parent's.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _config(url: str, dsn: str, mapping: dict[str, Any], *, history: bool = False) -> Config:
    return Config(
        history=HistoryConfig(enabled=history),
        redis=RedisConfig(url=SecretStr(url)),
        postgres=PostgresConfig(dsn=SecretStr(dsn)),
        mapping=(MappingConfig(**mapping),),
        log=LogConfig(level="error"),
    )


async def _run(config: Config, job: Job = "sync", *, accept_loss: bool = False) -> dict[str, Any]:
    """One run as `balancesync` does it; the moments are those of perf_counter."""
    entered: dict[str, float] = {}

    def on_progress(progress: Progress) -> None:
        if progress.phase not in entered:
            entered[progress.phase] = perf_counter()

    database = Database(config.postgres)
    async with Source(config.redis) as source:
        work = Sync(config, database, source, on_progress)
        begun = perf_counter()
        request = Request(job=job, trigger="cli", mode="apply", accept_loss=accept_loss)
        run = await work.run(request, wait_s=30)
        ended = perf_counter()
    await database.close()
    if work.failure is not None:
        raise work.failure
    diffed, applied = entered.get("diff", ended), entered.get("apply", ended)
    return {
        "seconds": ended - begun,
        "scan": diffed - begun,
        "diff": applied - diffed,
        "apply": ended - applied,
        "read_from": begun,
        "read_to": diffed,
        "counts": run.counts.as_dict(),
    }


async def sync(
    url: str, dsn: str, mapping: dict[str, Any], history: bool = False, accept_loss: bool = False
) -> dict[str, Any]:
    """One run."""
    config = _config(url, dsn, mapping, history=history)
    found = await _run(config, accept_loss=accept_loss)
    return found | {"memory": peak_memory()}


async def restore(url: str, dsn: str, mapping: dict[str, Any]) -> dict[str, Any]:
    """One restore."""
    found = await _run(_config(url, dsn, mapping), "restore")
    return {name: found[name] for name in ("seconds", "counts")} | {"memory": peak_memory()}


async def sync_for(url: str, dsn: str, mapping: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Runs one after the other for so many seconds: when each was reading."""
    config = _config(url, dsn, mapping)
    until = perf_counter() + seconds
    reading = []
    while perf_counter() < until:
        found = await _run(config)
        reading.append((found["read_from"], found["read_to"]))
    return {"reading": reading}
