"""The daemon's HTTP API: which path is answered by what, and who is let in.

A handler is reached only by a request that has passed all of this: Host and Origin are no
strangers', the path is known, the method fits, the token is right, the body is small, and this
daemon leads if something is to change. How long it takes is bounded by the handler itself.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from balancesync.api import Api, Call
from balancesync.balances import Balances
from balancesync.config import Config
from balancesync.database import Database
from balancesync.facts import Facts
from balancesync.gate import Gate
from balancesync.listener import HttpProblem, Listener
from balancesync.metrics import Metrics
from balancesync.openapi import PREFIX
from balancesync.runner import Runner
from balancesync.schedule import Schedule
from balancesync.source import Source
from balancesync.state import Events, State
from balancesync.stream import Stream

_MOST_BODY: Final = 65_536
_BODY_S: Final = 10.0
_EMPTY: Final = (b"", b"{}", b"null")
# Asked by machines, under whatever name they know this one by; they say nothing that is secret.
_PROBES: Final = ("/livez", "/readyz", "/health", "/metrics", f"{PREFIX}/health")
_CHANGING: Final = ("POST", "DELETE")


@dataclass(frozen=True, slots=True)
class _Route:
    """What answers; `secret`: needs the token."""

    handler: Callable[[Call], Awaitable[web.StreamResponse]]
    secret: bool = False


_Methods = dict[str, _Route]


class Web:
    """Serves the API on `http.host` and `http.port`, from `start` to `stop`."""

    def __init__(
        self,
        config: Config,
        database: Database,
        source: Source,
        *,
        state: State,
        events: Events,
        runner: Runner,
        schedule: Schedule,
        metrics: Metrics,
        restart_live: Callable[[], bool] = lambda: False,
    ) -> None:
        self._state = state
        self._gate = Gate(config.http)
        self._facts = Facts(
            config, database, state=state, events=events, runner=runner, schedule=schedule
        )
        self._balances = Balances(config, database, source, state)
        self._api = Api(
            config,
            database,
            state=state,
            runner=runner,
            facts=self._facts,
            balances=self._balances,
            metrics=metrics,
            restart_live=restart_live,
        )
        self._stream = Stream(events, self._api.stopping)
        self._listener = Listener(config.http.host, config.http.port, self._handle)
        self._paths = self._static_routes()
        self._trees = self._routes_of_trees()

    @property
    def address(self) -> str:
        """The URL it answers at, without a path."""
        return self._listener.address

    @property
    def paths(self) -> frozenset[str]:
        """Every path that is served; one that ends in a slash has more behind it."""
        return frozenset((*self._paths, *self._trees))

    async def start(self) -> None:
        """Bind and serve; raises ConfigError if the port can't be had."""
        await self._listener.start()

    async def follow(self) -> None:
        """Keep count of the runs that end, until cancelled."""
        await self._facts.follow()

    async def stop(self) -> None:
        """End every stream and request, within two seconds."""
        self._api.stopping.set()
        await self._listener.stop()
        await self._facts.close()
        await self._balances.close()

    def _static_routes(self) -> dict[str, _Methods]:
        api = self._api
        health = {"GET": _Route(api.health)}
        return {
            "/": {"GET": _Route(api.page)},
            "/livez": {"GET": _Route(api.livez)},
            "/readyz": {"GET": _Route(api.readyz)},
            "/health": health,
            "/metrics": {"GET": _Route(api.metrics)},
            "/openapi.json": {"GET": _Route(api.openapi)},
            f"{PREFIX}/health": health,
            f"{PREFIX}/status": {"GET": _Route(api.status)},
            f"{PREFIX}/schedule": {"GET": _Route(api.schedule)},
            f"{PREFIX}/stats": {"GET": _Route(api.stats)},
            f"{PREFIX}/runs": {"GET": _Route(api.runs)},
            f"{PREFIX}/rejects": {"GET": _Route(api.rejects, secret=True)},
            f"{PREFIX}/events": {"GET": _Route(self._events)},
            f"{PREFIX}/force-sync": {"POST": _Route(api.force_sync, secret=True)},
            f"{PREFIX}/clear-cache": {"DELETE": _Route(api.clear_cache, secret=True)},
        }

    def _routes_of_trees(self) -> dict[str, _Methods]:
        api = self._api
        return {
            "/static/": {"GET": _Route(api.page)},
            f"{PREFIX}/balances/": {"GET": _Route(api.balance, secret=True)},
            f"{PREFIX}/runs/": {
                "GET": _Route(api.run),
                "DELETE": _Route(api.cancel, secret=True),
            },
        }

    async def _events(self, call: Call) -> web.StreamResponse:
        call.parameters()
        return await self._stream.serve(call.request, authorised=call.authorised)

    def _find(self, path: str) -> tuple[_Methods | None, tuple[str, ...]]:
        methods = self._paths.get(path)
        if methods is not None:
            return methods, ()
        for prefix, branch in self._trees.items():
            if path.startswith(prefix):
                return branch, tuple(path[len(prefix) :].split("/"))
        return None, ()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        methods, segments = self._find(request.rel_url.raw_path)
        if request.rel_url.raw_path not in _PROBES:
            self._gate.check_origin(request)
        if methods is None:
            raise HttpProblem(404, "not_found", "there is no such path; /openapi.json lists all")
        # HEAD is GET whose body is left out, by the server itself.
        route = methods.get("GET" if request.method == "HEAD" else request.method)
        if route is None or (request.method == "HEAD" and route.handler == self._events):
            allow = {"Allow": ", ".join(methods)}
            raise HttpProblem(405, "method_not_allowed", f"only {allow['Allow']} here", allow)
        if route.secret:
            self._gate.check_token(request)
        if request.body_exists:
            await _check_body(request)
        if request.method in _CHANGING:
            self._check_leads()
        call = Call(request, segments, self._gate.is_authorised(request))
        return await route.handler(call)

    def _check_leads(self) -> None:
        if self._facts.is_standby:
            leader = self._state.leader_name
            raise HttpProblem(409, "standby", f"this daemon is a standby: {leader} leads")
        if self._state.draining:
            raise HttpProblem(503, "stopping", "balancesync is stopping")


async def _check_body(request: web.BaseRequest) -> None:
    """Refuse a body that is large or slow, or that says something: the query says it all."""
    if (request.content_length or 0) > _MOST_BODY:
        raise HttpProblem(413, "too_large", f"a body may have {_MOST_BODY:,} bytes")
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0
    body = b""
    try:
        async with asyncio.timeout(_BODY_S):
            while chunk := await request.content.readany():
                body += chunk
                if len(body) > _MOST_BODY:
                    raise HttpProblem(413, "too_large", f"a body may have {_MOST_BODY:,} bytes")
    except TimeoutError:
        raise HttpProblem(408, "slow_body", f"the body didn't come in {_BODY_S:g} s") from None
    except web.RequestPayloadError:
        raise HttpProblem(400, "bad_request", "the body isn't what its headers say") from None
    if request.method in _CHANGING and body.strip() not in _EMPTY:
        raise HttpProblem(422, "no_body", "this takes no body: parameters go into the query")
