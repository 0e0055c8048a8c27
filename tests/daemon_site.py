"""The daemon's API on a test's own servers: everything but signals and leadership is real."""

import asyncio
import socket
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import aiohttp
from engine import make_config

from balancesync.config import Config
from balancesync.database import Database, Steps
from balancesync.errors import BalanceSyncError
from balancesync.metrics import Metrics
from balancesync.model import Request, Run
from balancesync.probing import Probing
from balancesync.runner import Runner
from balancesync.schedule import Schedule
from balancesync.source import Source
from balancesync.state import Event, Events, State
from balancesync.web import Web

PREFIX = "/sync-management"


def free_port() -> int:
    """A port that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Site:
    """A leading daemon's API and a client of it; `heard` are the events, `changed` tells of one."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.database = Database(config.postgres)
        self.source = Source(config.redis)
        self.state = State(name="here:1", leader=True, leader_name="here:1", ready=True)
        self.events = Events()
        self.runner = Runner(config, self.database, self.source, self.events.publish)
        metrics = Metrics("0", [mapping.name for mapping in config.mapping], ["sync", "verify"])
        self.schedule = Schedule(config.schedule, lambda name, job: None)
        self.probing = Probing(
            config,
            self.database,
            self.source,
            state=self.state,
            publish=self.events.publish,
            runner=self.runner,
            metrics=metrics,
        )
        self.web = Web(
            config,
            self.database,
            self.source,
            state=self.state,
            events=self.events,
            runner=self.runner,
            schedule=self.schedule,
            metrics=metrics,
        )
        self.heard: list[Event] = []
        self.changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    def on(cls, dsn: str, url: str, *mappings: dict[str, Any], **sections: Any) -> "Site":
        """Make one on these servers."""
        http = {"port": free_port(), **sections.pop("http", {})}
        return cls(make_config(dsn, url, *mappings, http=http, **sections))

    async def __aenter__(self) -> Self:
        await self.upgrade()
        await self.probing.probe()
        self.schedule.start()
        await self.web.start()
        self.client = aiohttp.ClientSession(self.web.address)
        serving = (self.runner.serve(), self.web.follow(), self._hear())
        self._tasks = [asyncio.create_task(each) for each in serving]
        # They have subscribed, or begun to serve, when they have run once.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.schedule.stop()
        self.runner.drain()
        await self.client.close()
        await self.web.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.source.close()
        await self.database.close()

    async def upgrade(self) -> None:
        """Make the schema, as the leader does; nothing if PostgreSQL is down."""
        with suppress(BalanceSyncError):
            async with self.database.acquire() as connection:
                await Steps(self.database).upgrade(connection)

    async def _hear(self) -> None:
        with self.events.listen() as events:
            async for event in events:
                self.heard.append(event)
                self.changed.set()

    async def event(self, kind: str) -> Event:
        """Wait for the first event of a kind, from the beginning."""
        async with asyncio.timeout(20):
            while True:
                for event in self.heard:
                    if event.kind == kind:
                        return event
                self.changed.clear()
                await self.changed.wait()

    async def sync(self, **request: Any) -> Run:
        """Run a sync to its end."""
        ticket, _ = self.runner.submit(Request(**{"job": "sync", "trigger": "startup", **request}))
        return await asyncio.shield(ticket.done)

    async def ask(self, path: str, method: str = "GET", **options: Any) -> tuple[int, Any]:
        """Status and JSON document of a path below the prefix."""
        async with self.client.request(method, f"{PREFIX}{path}", **options) as response:
            return response.status, await response.json()
