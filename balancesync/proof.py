"""The end of the demo: the daemon under an application's load, and the proof that it is right.

The daemon is the one of `balancesync run`, in this process. It is asked over HTTP, as by anybody.
"""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final

import aiohttp
from rich.text import Text

from balancesync.config import Config, HttpConfig
from balancesync.daemon import Daemon
from balancesync.database import Database
from balancesync.documents import Document
from balancesync.errors import BalanceSyncError, RunFailed
from balancesync.model import Request
from balancesync.show import ago, write
from balancesync.state import Event
from balancesync.times import short_time_text
from balancesync.traffic import Balances, Traffic

TOTAL_WEI: Final = 72_009_990_499_480_000_000_000_000
SUM: Final = "SELECT count(*), sum(wei) FROM balances"

_HOST: Final = "127.0.0.1"
_EVERY_S: Final = 5.0
_PROOF_EVERY: Final = 4
# Far longer than a run takes: a demo on a busy machine is slow, and no failure.
_RUN_S: Final = 300.0
_EXPECTED: Final = ("succeeded", "cancelled")


class Proof:
    """A daemon on the demo's servers, an application that uses them, and who looks after both."""

    def __init__(self, config: Config, balances: Balances, *, once: bool) -> None:
        config = replace(config, http=HttpConfig(host=_HOST, port=_free_port()))
        self._config = config
        self._once = once
        self._live = config.live.enabled
        self._url = f"http://{_HOST}:{config.http.port}"
        self._daemon = Daemon(config)
        self._traffic = Traffic(balances, config.redis)
        self._keys = len(balances)
        # The daemon leads, and what live mode has to follow is followed.
        self._ready = asyncio.Event()

    async def serve(self) -> None:
        """Until SIGINT or SIGTERM, or the first proof; raises a group of what went wrong."""
        with self._daemon.events.listen() as events:
            async with asyncio.TaskGroup() as group:
                serving = group.create_task(self._daemon.run())
                others = [
                    group.create_task(self._follow(events)),
                    group.create_task(self._use()),
                ]
                await serving
                for other in others:
                    other.cancel()

    async def _follow(self, events: AsyncIterator[Event]) -> None:
        """A line for each finished run."""
        stdout = os.fstat(sys.stdout.fileno())
        async for event in events:
            leads = event.kind == "leader" and event.document["leads"]
            follows = event.kind == "live" and event.document["state"] == "up"
            if follows if self._live else leads:
                self._ready.set()
            elif event.kind == "run_finished":
                write(_in_short(event.document))
            # `write` is quiet once the reader has gone, as in `| head`: then nobody watches.
            if not os.path.samestat(stdout, os.fstat(sys.stdout.fileno())):
                self._end()
                return

    def _end(self) -> None:
        # Told a second time, the daemon wouldn't end in order any more.
        if not self._daemon.state.draining:
            self._daemon.stop()

    async def _use(self) -> None:
        """Be the application, and whoever asks for syncs and proofs."""
        await self._ready.wait()
        # A closed terminal says SIGHUP: to the daemon a wish for a sync, to a demo its end.
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._end)
        asked = f"is asked for a sync every {_EVERY_S:g} s"
        if self._live:
            asked = "follows every change by itself, in live mode"
        write(
            f"It listens at {self._url} and {asked}. Try",
            f"  curl {self._url}/sync-management/status",
            f"  curl -X POST '{self._url}/sync-management/force-sync?wait=true'",
            *([] if self._once else ["Ctrl-C ends it all."]),
            "",
        )
        moving = asyncio.create_task(self._traffic.serve())
        try:
            await self._ask(moving)
        except (BalanceSyncError, TimeoutError, aiohttp.ClientError) as error:
            # A daemon that is stopping answers nobody, and that is as it should be.
            if not self._daemon.state.draining:
                raise RunFailed(f"the daemon under load: {error}") from error
        finally:
            moving.cancel()
            await asyncio.wait([moving])

    async def _ask(self, moving: asyncio.Task[None]) -> None:
        timeout = aiohttp.ClientTimeout(total=_RUN_S)
        async with aiohttp.ClientSession(self._url, timeout=timeout, trust_env=False) as session:
            turn = 0
            while True:
                await asyncio.wait([moving], timeout=_EVERY_S)
                if moving.done():
                    moving.result()
                if turn % _PROOF_EVERY:
                    await self._tell_progress(session)
                elif await self._prove(session) and self._once:
                    self._end()
                    return
                turn += 1

    async def _tell_progress(self, session: aiohttp.ClientSession) -> None:
        """A line on how far live mode is; without it, a sync, which has a line of its own."""
        if not self._live:
            await self._sync(session)
            return
        write(
            f"{short_time_text(datetime.now(UTC))} live: {self._traffic.moved:,} transfers so far,"
            f" {self._metric('records_total', outcome='updated', mapping='balances'):,.0f} rows"
            f" written, on average {self._lag_s():.2f} s after Redis said so"
        )

    def _lag_s(self) -> float:
        count = self._metric("live_lag_seconds_count")
        return self._metric("live_lag_seconds_sum") / count if count else 0.0

    def _metric(self, name: str, **labels: str) -> float:
        sample = self._daemon.metrics.registry.get_sample_value(f"balancesync_{name}", labels)
        return sample or 0.0

    async def _sync(self, session: aiohttp.ClientSession) -> bool:
        """Ask for a sync as any program may, and wait for its end; False: it was cancelled."""
        path = "/sync-management/force-sync"
        async with session.post(path, params={"wait": "true"}) as answer:
            document: Document = await answer.json()
        status: str | None = document.get("status")
        if status not in _EXPECTED:
            raise RunFailed(f"a sync answered {answer.status}: {document.get('error')}")
        return status == "succeeded"

    async def _prove(self, session: aiohttp.ClientSession) -> bool:
        """While nothing moves, both sides must be equal, key by key, and nothing lost or made.

        False: whoever watches has cancelled a run, as the API lets them.
        """
        async with self._traffic.paused:
            moved = self._traffic.moved
            # Live mode has brought it all over, or is made to before what differs is told.
            if not self._live and not await self._sync(session):
                return False
            ticket, _ = self._daemon.runner.submit(Request("verify", "cli", mode="verify"))
            run = await ticket.done
            count, total = await ask_sum(self._config)
        if run.status == "cancelled":
            return False
        equal, differ = run.counts.unchanged, run.counts.written
        if (run.status, equal, differ) != ("succeeded", self._keys, 0):
            raise RunFailed(f"verify {run.status}: {equal:,} keys agree, {differ:,} differ")
        if (count, total) != (self._keys, TOTAL_WEI):
            raise RunFailed(f"PostgreSQL has {count:,} rows and {total} wei, not {TOTAL_WEI}")
        write(
            Text(
                f"proven after {moved:,} transfers: all {equal:,} balances agree on both sides,"
                f" their sum is exactly {total} wei",
                "bold green",
            )
        )
        return True


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((_HOST, 0))
        return int(listener.getsockname()[1])


def _in_short(run: Document) -> str:
    done = f"{run['scanned']:,} keys read, {run['inserted'] + run['updated']:,} rows"
    verb = "differ" if run["mode"] == "verify" else "written"
    error = f": {run['error']}" if run["error"] else ""
    took = ago(run["duration_s"] or 0.0)
    asked = f"{run['job']} ({run['trigger']})"
    at = short_time_text(datetime.now(UTC))
    return f"{at} {asked} {run['status']}, {done} {verb}, {took}{error}"


async def ask_sum(config: Config) -> tuple[int, int]:
    """How many rows PostgreSQL has, and their wei; raises PostgresUnavailable."""
    database = Database(config.postgres)
    try:
        async with database.acquire() as connection:
            count, total = (await connection.fetch(SUM))[0]
            return count, int(total)
    finally:
        await database.close()
