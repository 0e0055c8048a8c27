"""The commands that ask a running daemon."""

import asyncio
import json
import signal
import threading
from argparse import Namespace
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

from balancesync import show
from balancesync.config import Config
from balancesync.documents import Document
from balancesync.errors import DaemonUnavailable, RunFailed, Unavailable
from balancesync.fires import next_fire
from balancesync.times import short_time_text, time_text

if TYPE_CHECKING:
    from balancesync.client import Client


async def ask(
    config: Config, path: str, otherwise: Callable[[str], Awaitable[Document]]
) -> Document:
    """What the daemon says at `path`; else what `otherwise` finds out, told why it doesn't."""
    try:
        return await _daemon(config).get(path)
    except DaemonUnavailable as error:
        return await otherwise(error.what)
    except Unavailable as error:
        return await otherwise(str(error))


async def schedule(config: Config, args: Namespace) -> int:
    """When the jobs run next; without a daemon, when they would."""

    async def planned(why: str) -> Document:
        zone, now = ZoneInfo(config.schedule.timezone), datetime.now(UTC)
        return {
            "by_daemon": False,
            "no_daemon": why,
            "jobs": [
                {
                    "name": name,
                    "cron": job.cron,
                    "job": job.job,
                    "timezone": config.schedule.timezone,
                    "next_at": time_text(next_fire(job.fields, now, zone)),
                    "last_at": None,
                }
                for name, job in config.schedule.jobs.items()
            ],
        }

    document = await ask(config, "/schedule", planned)
    if args.json:
        show.as_json(document)
        return 0
    grid = show.Grid("name", "cron", "job", "next", "last")
    for job in document["jobs"]:
        times = (show.moment(job[name]) for name in ("next_at", "last_at"))
        grid.add_row(job["name"], job["cron"], job["job"], *times)
    show.write(grid)
    if not document.get("by_daemon", True):
        show.write(f"{document['no_daemon']}: these are the times at which one would run")
    return 0


async def cancel(config: Config, args: Namespace) -> int:
    """Cancel the run of this id, else the one that runs, else the first that waits."""
    client = _daemon(config)
    chosen = str(args.id) if args.id else None
    if chosen is None:
        status = await client.get("/status")
        current, waiting = status["current_run"], status["queued_runs"]
        if current is None and not waiting:
            raise RunFailed("nothing runs, and nothing waits")
        chosen = waiting[0] if current is None else current["id"]
    document = await client.delete(f"/runs/{chosen}")
    if args.json:
        show.as_json(document)
    elif document["state"] == "cancelled":
        show.write(f"run {chosen} is cancelled: it was waiting, and has done nothing")
    else:
        show.write(f"run {chosen} is being cancelled: it ends at its next batch")
    return 0


async def events(config: Config, args: Namespace) -> int:
    """Follow what the daemon does, a line an event, until it stops, or SIGINT or SIGTERM."""
    following = asyncio.ensure_future(_follow(config, as_json=args.json))
    # Only the main thread can have handlers.
    signals: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        signals = ()
    loop = asyncio.get_running_loop()
    for each in signals:
        loop.add_signal_handler(each, following.cancel)
    try:
        await asyncio.wait({following})
    finally:
        following.cancel()
        for each in signals:
            loop.remove_signal_handler(each)
    if not following.cancelled():
        following.result()
    return 0


def _daemon(config: Config) -> "Client":
    # aiohttp is a third of all that a command imports, and most commands ask no daemon.
    from balancesync.client import Client  # noqa: PLC0415

    return Client(config)


async def _follow(config: Config, *, as_json: bool) -> None:
    async with aclosing(_daemon(config).events()) as found:
        async for kind, document in found:
            if as_json:
                show.write(json.dumps({"event": kind} | document))
            else:
                show.write(f"{short_time_text(datetime.now(UTC))} {kind} {_in_short(document)}")


def _in_short(document: Document) -> str:
    """The fields that say something, on one line."""
    told = {
        name: value
        for name, value in document.items()
        if value not in (None, [], {}, 0) and name not in ("mappings", "report")
    }
    return " ".join(f"{name}={json.dumps(value, default=str)}" for name, value in told.items())
