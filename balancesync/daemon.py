"""`balancesync run`: starts everything in order, lets it run, and ends it in order."""

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Final

import structlog

from balancesync import __version__
from balancesync.config import Config, JobConfig
from balancesync.database import Database
from balancesync.documents import Document
from balancesync.ear import Ear
from balancesync.errors import BalanceSyncError
from balancesync.leadership import Leadership
from balancesync.live import Live
from balancesync.metrics import Metrics
from balancesync.model import Mode, Request
from balancesync.notify import Notifier
from balancesync.probing import Probing
from balancesync.records import Records
from balancesync.runner import Runner
from balancesync.schedule import Schedule
from balancesync.source import Source
from balancesync.state import Events, State
from balancesync.web import Web

_STATUS_S: Final = 1.0
_MOMENT_S: Final = 5.0
# Live mode waits some seconds for a flush, and may wait long for a server that hangs.
_FINISH_S: Final = 15.0
_SECOND_SIGNAL: Final = 1
# A standby may not know yet that its leader is gone: how long before it leads, with some to spare.
_TAKEOVER_S: Final = 15.0

log = structlog.get_logger("balancesync")


class Daemon:
    """One process: schedule, runner, HTTP, signals. Made and run once."""

    def __init__(self, config: Config, notifier: Notifier | None = None) -> None:
        self.state = State(name=f"{socket.gethostname()}:{os.getpid()}")
        self.events = Events()
        self._config = config
        self._notifier = notifier or Notifier()
        self._database = Database(config.postgres)
        self._source = Source(config.redis)
        self._ear = Ear(self._source, self._moment, self._look)
        self._source.ear = self._ear
        self.metrics = Metrics(
            __version__,
            [mapping.name for mapping in config.mapping],
            ["sync", "verify"],
            live=config.live.enabled,
        )
        self.runner = Runner(config, self._database, self._source, self._publish)
        self._schedule = Schedule(config.schedule, self.fire)
        self._leadership = Leadership(self._database, self.state.name, self._lead)
        self._probing = Probing(
            config,
            self._database,
            self._source,
            state=self.state,
            publish=self._publish,
            runner=self.runner,
            metrics=self.metrics,
        )
        self._live = Live(
            config,
            self._database,
            self._source,
            state=self.state,
            publish=self._publish,
            runner=self.runner,
            metrics=self.metrics,
        )
        self.runner.settle = self._live.settle if self._live.enabled else None
        self.runner.keeps_up = self._live.keeps_up
        self._probing.on_cleared = self._live.ask_again
        self._web = self._make_web()
        self._last_leader: str | None = None
        self._passed_over: dict[str, tuple[float, Request]] = {}
        self._stop = asyncio.Event()

    def _make_web(self) -> Web:
        return Web(
            self._config,
            self._database,
            self._source,
            state=self.state,
            events=self.events,
            runner=self.runner,
            schedule=self._schedule,
            metrics=self.metrics,
            restart_live=self._live.restart,
        )

    async def run(self) -> None:
        """Run until SIGTERM or SIGINT; raises ConfigError if the port can't be had."""
        loop = asyncio.get_running_loop()
        handlers: dict[signal.Signals, Callable[[], None]] = {
            signal.SIGTERM: self.stop,
            signal.SIGINT: self.stop,
            signal.SIGHUP: self._hang_up,
        }
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        try:
            await self._web.start()
            self._schedule.start()
            self.metrics.set_schedule(self._next_run, self._interval)
            self.state.ready = True
            log.info("balancesync is up", name=self.state.name, http=self._web.address)
            self._notifier.send("READY=1", "STATUS=starting")
            await self._serve()
        finally:
            self._notifier.send("STOPPING=1")
            self._schedule.stop()
            await self._web.stop()
            await self._ear.close()
            await self._source.close()
            await self._database.close()
            for number in handlers:
                loop.remove_signal_handler(number)
            log.info("balancesync has stopped", name=self.state.name)

    def _look(self) -> None:
        self._probing.stir()

    async def _moment(self) -> int:
        """PostgreSQL's count of transactions."""
        return (await self._database.ask(Records(self._database).moment, _MOMENT_S))[0]

    async def _serve(self) -> None:
        async with asyncio.TaskGroup() as group:
            helpers = [
                group.create_task(self._web.follow()),
                group.create_task(self._leadership.serve()),
                group.create_task(self._probing.serve()),
                group.create_task(self._report()),
                group.create_task(self._live.serve()),
            ]
            running = group.create_task(self.runner.serve())
            await self._stop.wait()
            self.state.draining = True
            self.runner.drain()
            await running
            with suppress(TimeoutError):
                async with asyncio.timeout(_FINISH_S):
                    await self._live.finish()
            await self._probing.record_late()
            self.events.close()
            for helper in helpers:
                helper.cancel()

    def _next_run(self) -> float | None:
        times = [job.next_at.timestamp() for job in self._schedule.jobs() if job.next_at]
        return min(times, default=None)

    def _interval(self) -> float:
        return self._schedule.planned_interval(datetime.now(UTC))

    def _publish(self, kind: str, document: Document) -> None:
        self.metrics.take(kind, document)
        self._probing.take(kind, document)
        self._live.take(kind, document)
        self.events.publish(kind, document)

    def stop(self) -> None:
        """Drain and end: no new run, the current batch ends. Asked a second time: exit 1 now."""
        if self._stop.is_set():
            log.error("a second signal: exiting at once, the run is left as interrupted")
            os._exit(_SECOND_SIGNAL)
        log.info("stopping: the current batch ends, nothing new is started")
        self._stop.set()

    def _hang_up(self) -> None:
        log.info("SIGHUP: a forced sync; the configuration is not read again, restart for that")
        self._request(Request("sync", "sighup"))

    def fire(self, name: str, job: JobConfig) -> None:
        """Ask for what a job of the schedule wants; the schedule calls it.

        What each job wanted last of a standby is kept with its time, for `_make_up`.
        """
        mode: Mode = "verify" if job.job == "verify" else "apply"
        request = Request(job.job, f"cron:{name}", mode=mode, force=False)
        if not self._request(request):
            self._passed_over[request.trigger] = asyncio.get_running_loop().time(), request

    def _request(self, request: Request) -> bool:
        """Have it run; False on a standby."""
        if not self.state.leader and self.state.leader_name is not None:
            log.info(
                "a standby runs nothing", trigger=request.trigger, leader=self.state.leader_name
            )
            return False
        if not self.state.draining:
            self.runner.submit(request)
        return True

    def _make_up(self) -> None:
        """Ask for what cron wanted just before this daemon led: there may have been no leader."""
        now = asyncio.get_running_loop().time()
        for at, request in self._passed_over.values():
            if now - at <= _TAKEOVER_S:
                self._request(request)
        self._passed_over.clear()

    def _lead(self, leads: bool, leader: str | None) -> None:
        before = (self.state.leader, self.state.leader_name)
        if (leads, leader) == before:
            return
        self.state.leader, self.state.leader_name = leads, leader
        self._publish("leader", {"leads": leads, "leader": leader})
        if not leads and leader:
            self.runner.owed.clear()
        log.info("leading" if leads else "standing by", leader=leader)
        starting: Request | None = None
        if leads and self._config.schedule.on_start:
            # Leading again with nobody in between: PostgreSQL was away, and this makes up for it.
            trigger = "recovery" if self._last_leader == leader else "startup"
            starting = Request("sync", trigger, force=False)
        if self._live.enabled:
            self._live.lead(leads, leader, starting)
        elif starting:
            self.runner.submit(starting)
        if leads:
            self._make_up()
        self._last_leader = leader or self._last_leader

    async def _report(self) -> None:
        """Tell systemd how things are; WATCHDOG only while loop and runner make progress."""
        watchdog_s = self._notifier.watchdog_s
        period = min(_STATUS_S, watchdog_s / 3) if watchdog_s else _STATUS_S
        told = ""
        while True:
            status = self._status()
            if status != told:
                self._notifier.send(f"STATUS={status}")
                told = status
            if watchdog_s and not self.runner.is_stuck:
                self._notifier.send("WATCHDOG=1")
            await asyncio.sleep(period)

    def _status(self) -> str:
        state = self.state
        down = [
            f"{name} down: {server.error}"
            for name, server in (("Redis", state.redis), ("PostgreSQL", state.postgres))
            if not server.connected
        ]
        current = self.runner.current
        if state.draining:
            return "stopping: the batch under way ends" if current else "stopping"
        if down:
            return "; ".join(down)
        if current:
            progress = current.progress
            return f"running {current.run.job}: {progress.phase if progress else 'starting'}"
        if not state.leader:
            return f"standby, {state.leader_name or 'nobody'} leads"
        worries = [f"live mode is {state.live}"] if not self._live.keeps_up() else []
        worries += ["a run waits for a server"] if self.runner.owed else []
        return "; ".join(["idle", *worries])


async def run(config: Config) -> int:
    """Be the daemon until SIGTERM or SIGINT; return the exit code. Raises ConfigError."""
    try:
        await Daemon(config).run()
    except ExceptionGroup as group:
        reason = reason_of(group)
        if not isinstance(reason, BalanceSyncError):
            log.critical("a bug ends balancesync", exc_info=reason)
        raise reason from group
    return 0


def reason_of(error: Exception) -> Exception:
    """The first of what ended task groups together; one is enough for one line."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error
