"""What each path of the API answers. `web` has let the request in by then."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, get_args
from urllib.parse import unquote_to_bytes
from uuid import UUID

import structlog
from aiohttp import web

from balancesync import __version__, openapi, overview
from balancesync.balances import Balance, Balances, Missing
from balancesync.config import Config
from balancesync.database import Connection, Database, load_sql
from balancesync.documents import Document, reject_document, run_document
from balancesync.errors import BalanceSyncError, HistoryGap
from balancesync.facts import Facts, without_report
from balancesync.listener import HttpProblem, reply, reply_bytes, reply_rows
from balancesync.mapping import InvalidKey
from balancesync.metrics import CONTENT_TYPE, Metrics
from balancesync.model import Reason, Request, Run
from balancesync.page import INDEX, Page
from balancesync.parameters import Parameters, parse_uuid
from balancesync.reads import Reads
from balancesync.records import KeptReject, Records
from balancesync.runner import Runner
from balancesync.state import State
from balancesync.times import exact_time_text, time_text

_MOST_ROWS: Final = 1000
_ROWS: Final = 100
_AT_ONCE: Final = 100
_FORGET_AT_ONCE: Final = 10_000

log = structlog.get_logger("balancesync")


@dataclass(frozen=True, slots=True)
class Call:
    """A request that was let in: `segments` are the rest of its path, still percent-encoded."""

    request: web.BaseRequest
    segments: tuple[str, ...]
    authorised: bool

    def parameters(self, *known: str) -> Parameters:
        """The query, which may name nothing but these."""
        return Parameters(self.request.rel_url.raw_query_string, known)


class Api:
    """The answers, except for the stream of events."""

    def __init__(
        self,
        config: Config,
        database: Database,
        *,
        state: State,
        runner: Runner,
        facts: Facts,
        balances: Balances,
        metrics: Metrics,
        restart_live: Callable[[], bool],
    ) -> None:
        self._config = config
        self._database = database
        self._state = state
        self._runner = runner
        self._facts = facts
        self._balances = balances
        self._metrics = metrics
        self._restart_live = restart_live
        self._reads = Reads(database, state)
        self._mappings = {mapping.name: mapping for mapping in config.mapping}
        needed = "needed" if config.http.token.get_secret_value() else ""
        self._page = Page({"version": __version__, "token": needed})
        self._openapi = openapi.document(config)
        self.stopping = asyncio.Event()

    async def page(self, call: Call) -> web.Response:
        """The status page, or a file of it."""
        name = "/".join(call.segments) or INDEX
        headers = call.request.headers
        answer = self._page.answer(
            name, headers.get("If-None-Match"), headers.get("Accept-Encoding", "")
        )
        if answer is None:
            raise HttpProblem(404, "not_found", "the page has no such file")
        return answer

    async def openapi(self, call: Call) -> web.Response:
        """This API, described."""
        return reply(self._openapi)

    async def livez(self, call: Call) -> web.Response:
        """Whether the process does what it should; a server that is down is no reason to end it."""
        if self._runner.is_stuck and not self._state.draining:
            return reply({"status": "stuck"}, 503)
        return reply({"status": "alive"})

    async def readyz(self, call: Call) -> web.Response:
        """Whether HTTP, configuration and schedule are up, on a standby too."""
        if not self._state.ready or self._state.draining:
            return reply({"status": "draining" if self._state.draining else "starting"}, 503)
        return reply({"status": "ready"})

    async def metrics(self, call: Call) -> web.Response:
        """The metrics, for Prometheus."""
        return reply_bytes(self._metrics.render(), CONTENT_TYPE)

    async def health(self, call: Call) -> web.Response:
        """Whether all is well, check by check."""
        status, document = await self._facts.health()
        return reply(document, status)

    async def status(self, call: Call) -> web.Response:
        """What runs, what ran, what comes."""
        call.parameters()
        return reply(await self._facts.status())

    async def schedule(self, call: Call) -> web.Response:
        """The cron jobs."""
        call.parameters()
        return reply({"jobs": self._facts.schedule()})

    async def stats(self, call: Call) -> web.Response:
        """Totals and durations."""
        call.parameters()
        found = await self._reads.ask(overview.stats_document)
        return reply(found | {"since_start": self._facts.since_start()})

    async def force_sync(self, call: Call) -> web.Response:
        """Ask for a sync, and wait for its end if told so; hanging up cancels nothing."""
        asked = call.parameters("wait", "dry_run", "accept_loss", "mapping")
        wait = asked.switch("wait")
        request = Request(
            "sync",
            "http",
            mode="dry_run" if asked.switch("dry_run") else "apply",
            mapping=asked.choice("mapping", self._mappings),
            accept_loss=asked.switch("accept_loss"),
        )
        ticket, state = self._runner.submit(request)
        log.info(
            "a sync was asked for by HTTP",
            client=call.request.remote,
            run=str(ticket.run.id),
            mode=request.mode,
            mapping=request.mapping,
            accept_loss=request.accept_loss,
        )
        if not wait:
            return reply({"run_id": str(ticket.run.id), "state": state}, 202)
        await self._either(ticket.done, asyncio.ensure_future(self.stopping.wait()))
        if not ticket.done.done():
            raise HttpProblem(503, "stopping", f"balancesync is stopping; run {ticket.run.id}")
        return reply(run_document(ticket.run, ticket.reports or None))

    @staticmethod
    async def _either(done: asyncio.Future[Run], stopping: asyncio.Future[bool]) -> None:
        """Wait for one of them, which cancels the second alone: the run is others' too."""
        either: list[asyncio.Future[Any]] = [done, stopping]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()

    async def runs(self, call: Call) -> web.Response:
        """What ran, newest first."""
        asked = call.parameters("limit", "before", "brief")
        brief = asked.switch("brief")
        limit, before = asked.number("limit", _ROWS, _MOST_ROWS), asked.uuid("before")

        async def question(records: Records, connection: Connection) -> dict[str, Document]:
            found: dict[str, Document] = {}
            last = before
            # In pieces, between which others get their turn: a page has ten thousands of counts.
            while wanted := min(limit - len(found), _AT_ONCE):
                runs = await records.runs(connection, limit=wanted, before=last, live=not brief)
                found |= {str(run.id): run_document(run) for run in runs}
                if len(runs) < wanted:
                    break
                last = runs[-1].id
            return found

        found = await self._reads.ask(question)
        for name, run in self._facts.runs().items():
            wanted = not brief or run["job"] != "live"
            if wanted and (before is None or name < str(before)):
                found[name] = without_report(run)
        newest = sorted(found, reverse=True)[:limit]
        less: Document = {"mappings": {}} if brief else {}
        return await reply_rows("runs", (found[name] | less for name in newest))

    async def run(self, call: Call) -> web.Response:
        """One run."""
        call.parameters()
        run = await self._find_run(_run_id(call))
        return reply(run if call.authorised else without_report(run))

    async def cancel(self, call: Call) -> web.Response:
        """Cancel a run that waits, or the running one at its next batch."""
        call.parameters()
        run_id = _run_id(call)
        is_running = self._runner.current is not None and self._runner.current.run.id == run_id
        if self._runner.cancel(run_id) is None:
            run = await self._find_run(run_id)
            if run["job"] == "live" and run["status"] == "running":
                raise HttpProblem(
                    409,
                    "live",
                    "this run is live mode's, which goes on until live.enabled is false and the"
                    " daemon is started again",
                )
            if run["status"] == "running":
                raise HttpProblem(409, "not_ours", "this run is another process's: end it there")
            raise HttpProblem(409, "not_running", f"this run has ended: {run['status']}")
        log.info("a run was cancelled by HTTP", client=call.request.remote, run=str(run_id))
        state = "cancelling" if is_running else "cancelled"
        return reply({"run_id": str(run_id), "state": state}, 202)

    async def _find_run(self, run_id: UUID) -> Document:
        async def question(records: Records, connection: Connection) -> list[Run]:
            return await records.runs(connection, one=run_id, limit=1)

        known = self._facts.run(run_id)
        if known is not None:
            return known
        for run in await self._reads.ask(question):
            return run_document(run)
        raise HttpProblem(404, "not_found", f"there is no run {run_id}")

    async def rejects(self, call: Call) -> web.Response:
        """What couldn't be stored, and why."""
        asked = call.parameters("limit", "mapping", "reason")
        limit = asked.number("limit", _ROWS, _MOST_ROWS)
        mapping = asked.choice("mapping", self._mappings)
        reason = asked.choice("reason", get_args(Reason))

        async def question(records: Records, connection: Connection) -> list[KeptReject]:
            return await records.rejects(connection, limit=limit, mapping=mapping, reason=reason)

        found = await self._reads.ask(question)
        return await reply_rows("rejects", map(reject_document, found))

    async def clear_cache(self, call: Call) -> web.Response:
        """Forget what the daemon has kept for itself, never a balance."""
        call.parameters()
        runs = self._facts.forget()
        self._balances.forget()
        try:
            healed = await self._reads.ask(self._forget_healed)
        except BalanceSyncError as error:
            log.warning("healed rejects could not be cleared", error=str(error))
            healed = None
        live = self._restart_live()
        log.info("the cache was cleared by HTTP", client=call.request.remote, healed=healed)
        cleared = {"totals": runs, "status": True, "healed_rejects": healed, "live": live}
        return reply({"cleared": cleared})

    async def _forget_healed(self, _records: Records, connection: Connection) -> int:
        sql = load_sql("facts")["forget_healed"].format(schema=self._database.schema)
        now = await connection.fetchval("SELECT clock_timestamp()")
        gone = forgotten = await connection.fetchval(sql, now)
        while gone == _FORGET_AT_ONCE:
            gone = await connection.fetchval(sql, now)
            forgotten += gone
        return int(forgotten)

    async def balance(self, call: Call) -> web.Response:
        """One balance."""
        asked = call.parameters("as_of")
        name, *texts = _decode(call.segments)
        if name not in self._mappings:
            raise HttpProblem(404, "not_found", "there is no such mapping")
        moment = asked.time("as_of")
        try:
            if moment is None:
                found = await self._balances.read(name, texts)
            else:
                found = await self._balance_as_of(name, texts, moment)
        except InvalidKey as error:
            raise HttpProblem(422, "invalid_key", f"no key of {name}: {error}") from None
        if isinstance(found, Missing):
            raise HttpProblem(404, "not_found", found.detail)
        as_of = found.as_of
        if as_of is None:
            as_of = await self._facts.last_success_at()
        return reply(
            {
                "mapping": name,
                "key": dict(zip(self._mappings[name].key_columns, texts, strict=True)),
                "values": found.values,
                "source": found.source,
                "as_of": time_text(as_of) if moment is None else exact_time_text(moment),
            }
        )

    async def _balance_as_of(
        self, name: str, texts: Sequence[str], moment: datetime
    ) -> Balance | Missing:
        async def question(_records: Records, connection: Connection) -> Balance | Missing:
            return await self._balances.read_as_of(connection, name, texts, moment)

        try:
            return await self._reads.ask(question)
        except HistoryGap as error:
            raise HttpProblem(409, "no_history", str(error)) from None


def _decode(segments: Sequence[str]) -> list[str]:
    # Here and not before: a slash within a key is percent-encoded, and ends no segment.
    try:
        return [unquote_to_bytes(segment).decode() for segment in segments]
    except UnicodeDecodeError:
        raise HttpProblem(422, "invalid_key", "the path isn't UTF-8") from None


def _run_id(call: Call) -> UUID:
    text = "/".join(_decode(call.segments))
    run_id = parse_uuid(text)
    if run_id is None:
        raise HttpProblem(404, "not_found", "a run's id is a UUID")
    return run_id
