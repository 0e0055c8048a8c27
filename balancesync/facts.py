"""What the daemon tells of itself and of the runs, fast and also when a server hangs.

What PostgreSQL holds is read at most twice a second, however many ask, and nobody waits longer for
it than a second: then the answer is the last that was read, with its age.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final, Literal
from uuid import UUID

from balancesync import overview
from balancesync.config import Config
from balancesync.database import Database
from balancesync.documents import Document, run_document
from balancesync.dsn import postgres_place
from balancesync.errors import BalanceSyncError, Locked, PostgresUnavailable, Unavailable
from balancesync.model import Counts, Run
from balancesync.runner import Runner, Ticket, progress_document
from balancesync.schedule import Schedule
from balancesync.state import Events, State
from balancesync.times import time_text
from balancesync.verdict import Ended, Situation, judge

DaemonState = Literal["idle", "running", "standby", "draining"]

_FRESH_S: Final = 0.5
_USABLE_S: Final = 3.0
_WAIT_S: Final = 1.0
_KEPT_RUNS: Final = 100


class Facts:
    """Documents for the API. `follow` has to run beside it, for totals and for recent runs."""

    def __init__(
        self,
        config: Config,
        database: Database,
        *,
        state: State,
        events: Events,
        runner: Runner,
        schedule: Schedule,
    ) -> None:
        self._config = config
        self._state = state
        self._events = events
        self._runner = runner
        self._schedule = schedule
        self._records = Cache(lambda: overview.read(database, config, state.seen))
        self.finished: OrderedDict[str, Document] = OrderedDict()
        self._begin()

    def _begin(self) -> None:
        self._since = datetime.now(UTC)
        self._totals: dict[tuple[str, str, str], list[float]] = {}
        self._counts = Counts()

    async def follow(self) -> None:
        """Count the runs that end, until cancelled."""
        while True:
            with self._events.listen() as events:
                async for event in events:
                    if event.kind == "live":
                        # How far it came is the question now.
                        self._records.expire()
                    if event.kind == "run_finished":
                        self._take(event.document)
                        # So that it's known, should PostgreSQL go before anybody asks.
                        await self._recorded()
            # It ends when the daemon does, or after a backlog that was dropped.
            await asyncio.sleep(_FRESH_S)

    def _take(self, run: Document) -> None:
        self._records.expire()
        # The kind of its error is for the metrics.
        self.finished[run["id"]] = _without(run, "error_kind")
        while len(self.finished) > _KEPT_RUNS:
            self.finished.popitem(last=False)
        total = self._totals.setdefault((run["job"], run["mode"], run["status"]), [0, 0.0])
        total[0] += 1
        total[1] += run["duration_s"] or 0.0
        if run["mode"] == "apply":
            self._counts += Counts(**{name: run[name] for name in Counts().as_dict()})

    def forget(self) -> int:
        """Forget totals and what was read; returns how many runs the totals counted."""
        runs = sum(int(total[0]) for total in self._totals.values())
        self._begin()
        self.finished.clear()
        self._records.forget()
        return runs

    @property
    def is_standby(self) -> bool:
        """Whether another daemon is known to lead."""
        return not self._state.leader and self._state.leader_name is not None

    @property
    def state(self) -> DaemonState:
        """What the daemon does."""
        if self._state.draining:
            return "draining"
        if self.is_standby:
            return "standby"
        return "running" if self._runner.current else "idle"

    async def status(self) -> Document:
        """What runs, what ran, what comes, what the guard refuses, both servers."""
        recorded = await self._recorded()
        document = overview.status_document(
            self._state.redis, self._state.postgres, recorded, self._records.age_s
        )
        recorded_state = document["state"]
        known_until = self._known_until(recorded)
        document["safe_until"] = time_text(known_until)
        document["state"] = self.state
        if self._runner.current:
            document["current_run"] = ticket_document(self._runner.current)
        elif recorded_state == "running":
            # Another process's run: a command's, or the leader's.
            document["current_run"] |= {"progress": None}
            if document["state"] == "idle":
                document["state"] = "running"
        last = self._newer(document["last_run"], lambda run: run["job"] != "live")
        document["last_run"] = last and without_report(last)
        health = self._health(recorded)[1]
        now = self._situation(recorded, health["checks"], known_until)
        # What a draining daemon had planned it won't start.
        jobs = () if self._state.draining else self._schedule.jobs()
        fires = [fire.next_at for fire in jobs if fire.next_at is not None]
        return document | {
            "verdict": judge(now).document(),
            "name": self._state.name,
            "leader": self._state.leader_name,
            "database": postgres_place(self._config.postgres.dsn.get_secret_value()),
            "schema": self._config.postgres.schema,
            "queued_runs": [str(ticket.run.id) for ticket in self._runner.queued],
            "next_run_at": time_text(min(fires, default=None)),
            "live": self._state.live,
            "live_reason": self._state.live_reason,
            "live_pending": self._state.live_pending,
            "live_lag_s": _rounded(self._state.live_lag_s),
            "live_copied_at": time_text(self._state.live_copied_at),
            "health": health,
            "recorded_age_s": None if recorded is None else round(self._records.age_s, 3),
        }

    def _newer(self, known: Document | None, fits: Callable[[Document], bool]) -> Document | None:
        """The last run of a kind; PostgreSQL doesn't know of one that it was away for."""
        last = next((run for run in reversed(self.finished.values()) if fits(run)), None)
        return last if last and (known is None or _end(last) > _end(known)) else known

    def _known_until(self, recorded: overview.Recorded | None) -> datetime | None:
        """Up to when everything is in PostgreSQL; while that is away, what it last confirmed."""
        until = recorded.until if recorded else None
        followed = self._state.followed_until
        if until is None or followed is None or self._state.postgres.connected:
            return until
        return max(until, followed)

    def _situation(
        self,
        recorded: overview.Recorded | None,
        checks: dict[str, Document],
        until: datetime | None,
    ) -> Situation:
        state, ticket = self._state, self._runner.current
        now = overview.situation(self._config, state.redis, state.postgres, recorded, checks)
        waits = checks["postponed"]
        return replace(
            now,
            until=until,
            synced=_ended(self._newer(_document(recorded.synced if recorded else None), _writes)),
            verified=_ended(
                self._newer(_document(recorded.verified if recorded else None), _compares)
            ),
            current=ticket.run if ticket else now.current,
            live=state.live,
            live_reason=state.live_reason,
            waits=waits["detail"] if waits["status"] != "ok" else None,
            stops=state.draining,
        )

    async def health(self) -> tuple[int, Document]:
        """Status code and whether all is well, check by check.

        A standby or draining daemon is none to be replaced: it's never unhealthy.
        """
        return self._health(await self._recorded())

    def _health(self, recorded: overview.Recorded | None) -> tuple[int, Document]:
        state = self._state
        checks = overview.server_checks(state.redis, state.postgres)
        checks["guard"] = overview.guard_check(self._config, state.seen)
        why = self._records.error if state.postgres.connected else overview.UNASKED
        if recorded is None:
            checks |= overview.unknown_checks(str(why or "not asked yet"))
        else:
            checks |= self._recorded_checks(recorded)
            if why is not None:
                checks["schema"] = overview.check("failed", str(why))
                checks["lock"] = overview.check("degraded", "not known")
        if isinstance(why, Unavailable | Locked):
            # PostgreSQL answers, but somebody locks our tables, or keeps it busy.
            checks["schema"] = overview.check("degraded", str(why))
        checks["postponed"] = self._postponed_check()
        if self._config.live.enabled:
            is_well = state.live == "up" or self.is_standby
            why = f": {state.live_reason}" if state.live_reason else ""
            checks["live"] = overview.check("ok" if is_well else "degraded", f"{state.live}{why}")
        document = overview.health_document(checks)
        if document["status"] == "unhealthy":
            if self.state not in ("standby", "draining"):
                return 503, document
            document["status"] = "degraded"
        return 200, document

    def _postponed_check(self) -> Document:
        waiting = [
            f"{each.request.job} of {each.request.mapping or 'all mappings'}: {each.error}"
            for each in self._runner.owed.values()
        ]
        if not waiting:
            return overview.check("ok", "no run waits for a server")
        return overview.check("degraded", f"runs by itself when it can: {'; '.join(waiting)}")

    def _recorded_checks(self, recorded: overview.Recorded) -> dict[str, Document]:
        now = datetime.now(UTC)
        return overview.recorded_checks(
            self._config,
            recorded,
            self._records.age_s,
            interval_s=self._schedule.planned_interval(now),
            waited_s=(now - self._state.started_at).total_seconds(),
        )

    def since_start(self) -> Document:
        """The totals since the daemon's start, or since they were cleared."""
        return {
            "at": time_text(self._since),
            "totals": [
                {"job": job, "mode": mode, "status": status, "runs": int(runs), "seconds": seconds}
                for (job, mode, status), (runs, seconds) in self._totals.items()
            ],
            "records": self._counts.as_dict(),
        }

    def schedule(self) -> list[Document]:
        """Every job with its next and last fire time."""
        return [
            {
                "name": fire.name,
                "cron": fire.cron,
                "job": fire.job,
                "timezone": fire.timezone,
                "next_at": time_text(fire.next_at),
                "last_at": time_text(fire.last_at),
            }
            for fire in self._schedule.jobs()
        ]

    async def last_success_at(self) -> datetime | None:
        """When the last success ended, as far as is known."""
        recorded = await self._recorded()
        return recorded.success.finished_at if recorded and recorded.success else None

    def run(self, run: UUID) -> Document | None:
        """A run that is queued, runs, or ended a short while ago; with its report, if any."""
        return self.runs().get(str(run))

    def runs(self) -> dict[str, Document]:
        """All runs of this process that it still knows, by id."""
        tickets: Sequence[Ticket] = self._runner.queued
        if self._runner.current:
            tickets = [self._runner.current, *tickets]
        return {**self.finished, **{str(each.run.id): ticket_document(each) for each in tickets}}

    async def close(self) -> None:
        """End what is under way."""
        self._records.forget()

    async def _recorded(self) -> overview.Recorded | None:
        return await self._records.read(is_up=self._state.postgres.connected)


class Cache:
    """The last `overview.read`; `error` says why there's none newer."""

    def __init__(self, read: Callable[[], Coroutine[Any, Any, overview.Recorded]]) -> None:
        self._ask = read
        self._reading: asyncio.Task[None] | None = None
        self.forget()

    def forget(self) -> None:
        """Forget what was read, and end the reading."""
        if self._reading is not None:
            self._reading.cancel()
        self._reading = None
        self._found: overview.Recorded | None = None
        self._found_at = 0.0
        self._due = 0.0
        # How many things have happened so far, and how many of them the last reading has seen.
        self._happened = 1
        self._seen = 0
        self._is_late = False
        self.error: BalanceSyncError | None = None

    def expire(self) -> None:
        """Something has happened: what was read is no longer the last word."""
        self._happened += 1
        self._due = 0.0

    @property
    def age_s(self) -> float:
        """How long ago it was read, in seconds."""
        return asyncio.get_running_loop().time() - self._found_at

    async def read(self, *, is_up: bool) -> overview.Recorded | None:
        """What PostgreSQL holds, or held when it last answered; None if it never did.

        While it isn't up it isn't asked.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _WAIT_S
        while is_up:
            if self._reading is None and loop.time() >= self._due:
                self._reading = loop.create_task(self._read())
            reading, is_fresh = self._reading, self._seen == self._happened
            if reading is None or self._is_late or (is_fresh and self.age_s < _USABLE_S):
                break
            done, _ = await asyncio.wait({reading}, timeout=deadline - loop.time())
            if not done:
                # Who asks next gets the old answer at once, until this one has come.
                self._is_late = True
                self.error = PostgresUnavailable(f"PostgreSQL didn't answer in {_WAIT_S:g} s")
            elif not reading.cancelled():
                reading.result()
        return self._found

    async def _read(self) -> None:
        happened = self._happened
        loop = asyncio.get_running_loop()
        try:
            found = await self._ask()
        except BalanceSyncError as error:
            self.error = error
        else:
            self._found, self._found_at, self.error = found, loop.time(), None
        finally:
            if self._reading is asyncio.current_task():
                self._reading, self._is_late, self._seen = None, False, happened
                self._due = loop.time() + _FRESH_S if happened == self._happened else 0.0


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def ticket_document(ticket: Ticket) -> Document:
    """A run of this process, with how far it is."""
    progress = progress_document(ticket.run, ticket.progress) if ticket.progress else None
    return run_document(ticket.run, ticket.reports or None) | {"progress": progress}


def without_report(run: Document) -> Document:
    """A run without the rows that a dry run or verify found: they're for those with the token."""
    return _without(run, "report")


def _without(document: Document, member: str) -> Document:
    return {name: value for name, value in document.items() if name != member}


def _end(run: Document) -> str:
    return run["finished_at"] or ""


def _writes(run: Document) -> bool:
    return (run["job"], run["mode"]) == ("sync", "apply")


def _compares(run: Document) -> bool:
    return bool(run["job"] == "verify")


def _document(run: Run | None) -> Document | None:
    return run_document(run) if run else None


def _ended(run: Document | None) -> Ended | None:
    return Ended(run["job"], run["status"], run["error"]) if run else None
