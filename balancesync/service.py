"""The commands that ask a running daemon."""

import json
from argparse import Namespace
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

from balancesync import show
from balancesync.client import Client
from balancesync.config import Config
from balancesync.documents import Document, time_text
from balancesync.errors import DaemonUnavailable
from balancesync.schedule import next_fire


async def ask(config: Config, path: str, otherwise: Callable[[], Awaitable[Document]]) -> Document:
    """What the daemon says at `path`; when none answers, what `otherwise` finds out."""
    try:
        return await Client(config.http).get(path)
    except DaemonUnavailable:
        return await otherwise()


async def schedule(config: Config, args: Namespace) -> int:
    """When the jobs run next; without a daemon, when they would."""

    async def planned() -> Document:
        zone, now = ZoneInfo(config.schedule.timezone), datetime.now(UTC)
        return {
            "by_daemon": False,
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
        show.write("no daemon answers: these are the times at which one would run")
    return 0


async def cancel(config: Config, args: Namespace) -> int:
    """Cancel the run of this id, else the one that runs."""
    client = Client(config.http)
    chosen = str(args.id) if args.id else None
    if chosen is None:
        current = (await client.get("/status"))["current_run"]
        if current is None:
            show.write("nothing runs")
            return 1
        chosen = current["id"]
    document = await client.delete(f"/runs/{chosen}")
    if args.json:
        show.as_json(document)
    else:
        show.write(f"run {chosen} is being cancelled: it ends at its next batch")
    return 0


async def events(config: Config, args: Namespace) -> int:
    """Follow what the daemon does, a line an event, until it ends or Ctrl-C."""
    async for kind, document in Client(config.http).events():
        if args.json:
            show.as_json({"event": kind} | document)
        else:
            show.write(f"{datetime.now(UTC):%H:%M:%S} {kind} {_in_short(document)}")
    return 0


def _in_short(document: Document) -> str:
    """The fields that say something, on one line."""
    told = {
        name: value
        for name, value in document.items()
        if value not in (None, [], {}, 0) and name not in ("mappings", "report")
    }
    return " ".join(f"{name}={json.dumps(value, default=str)}" for name, value in told.items())
