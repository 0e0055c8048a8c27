"""The HTTP server under the API: its bounds, its headers, its errors as JSON. Knows no route.

A client that opens and says nothing, that never ends its request or doesn't read its answer is
dropped; a bug in a handler is one client's 500.
"""

import asyncio
import errno
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import structlog
from aiohttp import web

from balancesync.errors import BalanceSyncError, ConfigError

# A client that has not ended its first request by then never meant to; nor one that doesn't read.
_PATIENCE_S: Final = 10.0
_SWEEP_S: Final = 2.0
# Longer than the minute for which proxies keep connections: they must be the ones to close them.
_KEEP_ALIVE_S: Final = 75.0
_LINGER_S: Final = 5.0
_STOP_S: Final = 2.0
# Between two steps of the loop, while a long answer is made.
_TURN_S: Final = 0.005
# Half of the file descriptors that a process usually has.
_MOST_CONNECTIONS: Final = 500
_BACKLOG: Final = 512
# After these the rest of the body may still come, and nobody wants it.
_UNREAD: Final = (408, 413)

HEADERS: Final = {
    "Server": "balancesync",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

_encode: Final = json.JSONEncoder(separators=(",", ":")).encode

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

log = structlog.get_logger("balancesync")


class HttpProblem(Exception):
    """A request that gets an error for an answer."""

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers or {}

    def response(self) -> web.Response:
        """The answer, in the one form that errors have."""
        document = {"error": {"code": self.code, "message": str(self)}}
        response = reply(document, self.status, self.headers)
        if self.status in _UNREAD:
            response.force_close()
        return response


def reply(
    document: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    """Answer with a JSON document."""
    return reply_bytes(_encode(document).encode(), "application/json", status, headers)


async def reply_rows(name: str, rows: Iterable[Any]) -> web.Response:
    """Answer with many documents under one name, in whose making others get their turn."""
    loop = asyncio.get_running_loop()
    begun, made = loop.time(), list[bytes]()
    for row in rows:
        made.append(_encode(row).encode())
        if loop.time() - begun > _TURN_S:
            await asyncio.sleep(0)
            begun = loop.time()
    return reply_bytes(b'{"%s":[%s]}' % (name.encode(), b",".join(made)), "application/json")


def reply_bytes(
    body: bytes, content_type: str, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    """Answer with a body that is made already."""
    every = {**HEADERS, "Content-Type": content_type, **(headers or {})}
    return web.Response(body=body, status=status, headers=every)


@dataclass(slots=True)
class _Client:
    transport: asyncio.Transport
    opened_at: float
    closing_at: float | None = None


class _Protocol(web.RequestHandler):
    """One connection. `spoke` once it has sent a whole request, `busy` while that is answered."""

    __slots__ = ("busy", "spoke")

    def __init__(self, server: "_Server", loop: asyncio.AbstractEventLoop) -> None:
        self.spoke = False
        self.busy = False
        super().__init__(
            server,
            loop=loop,
            keepalive_timeout=_KEEP_ALIVE_S,
            lingering_time=_LINGER_S,
            access_log=None,  # type: ignore[arg-type]  # as the library itself passes it
            auto_decompress=False,
        )

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what is no HTTP, or what a handler hasn't foreseen."""
        if isinstance(exc, ConnectionError):
            raise exc  # the client has gone, or was dropped
        if status >= 500:
            log.error("a request ended with a bug", path=request.path, exc_info=exc)
            problem = HttpProblem(500, "internal_error", "a bug; the log of balancesync says more")
        else:
            log.debug("no HTTP", client=request.remote, error=message)
            problem = HttpProblem(
                400, "bad_request", "this is no HTTP that is understood, or a header is too long"
            )
        if request.writer.output_size:
            raise ConnectionError(str(problem))
        response = problem.response()
        response.force_close()
        return response


class _Server(web.Server):
    def __init__(self, handler: Handler, loop: asyncio.AbstractEventLoop) -> None:
        # A client that hangs up ends its handler: nobody is left to answer to.
        super().__init__(handler, handler_cancellation=True, loop=loop)
        self._event_loop = loop
        self._clients: dict[web.RequestHandler, _Client] = {}

    def __call__(self) -> web.RequestHandler:
        return _Protocol(self, self._event_loop)

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        self._clients[handler] = _Client(transport, self._event_loop.time())
        if len(self._clients) > _MOST_CONNECTIONS:
            self._make_room()

    def connection_lost(
        self, handler: web.RequestHandler, exc: BaseException | None = None
    ) -> None:
        super().connection_lost(handler, exc)
        self._clients.pop(handler, None)

    def _make_room(self) -> None:
        """Drop whoever has been silent longest, or else the newcomer."""
        silent = (c for h, c in self._clients.items() if not (isinstance(h, _Protocol) and h.busy))
        client = next(silent, None) or list(self._clients.values())[-1]
        client.transport.abort()

    async def sweep(self) -> None:
        """Drop the clients that have never spoken, or don't take what closes their connection."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            now = self._event_loop.time()
            for handler, client in list(self._clients.items()):
                if client.transport.is_closing():
                    client.closing_at = client.closing_at or now
                silent_since = None
                if isinstance(handler, _Protocol) and not handler.spoke:
                    silent_since = client.opened_at
                since = client.closing_at or silent_since
                if since is not None and now - since > _PATIENCE_S:
                    client.transport.abort()


class Listener:
    """Serves `handler` on a host and port."""

    def __init__(self, host: str, port: int, handler: Handler) -> None:
        self._host = host
        self._port = port
        self._handler = handler
        self._runner: web.ServerRunner | None = None
        self._sweeping: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """The URL it answers at, without a path."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}"

    async def start(self) -> None:
        """Bind and serve; raises ConfigError if the address can't be had."""
        server = _Server(self._respond, asyncio.get_running_loop())
        self._runner = web.ServerRunner(server, shutdown_timeout=_STOP_S)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self._port, backlog=_BACKLOG).start()
        except OSError as error:
            await self._runner.cleanup()
            self._runner = None
            raise self._explain(error) from None
        self._sweeping = asyncio.create_task(server.sweep())

    async def stop(self) -> None:
        """Serve no more; requests under way get two seconds to end."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        if self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None

    def _explain(self, error: OSError) -> ConfigError:
        where = f"http.port {self._port} on {self._host}"
        match error.errno:
            case errno.EADDRINUSE:
                return ConfigError(
                    f"{where} is taken: stop what listens there, or set another http.port"
                )
            case errno.EACCES:
                return ConfigError(f"{where} needs a right: use a port above 1023")
        return ConfigError(f"{where} can't be listened on: is http.host this machine's?")

    async def _respond(self, request: web.BaseRequest) -> web.StreamResponse:
        protocol = request.protocol
        if isinstance(protocol, _Protocol):
            protocol.spoke = protocol.busy = True
        try:
            response = await self._answer(request)
            await self._send(request, response)
        finally:
            if isinstance(protocol, _Protocol):
                protocol.busy = False
        return response

    @staticmethod
    async def _send(request: web.BaseRequest, response: web.StreamResponse) -> None:
        # A timer of our own: asyncio.timeout costs as much as the answer's headers.
        timer = asyncio.get_running_loop().call_later(_PATIENCE_S, _drop, request)
        try:
            await response.prepare(request)
            await response.write_eof()
        finally:
            timer.cancel()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await self._handler(request)
        except HttpProblem as problem:
            return problem.response()
        except BalanceSyncError as error:
            return HttpProblem(503, "unavailable", str(error), {"Retry-After": "5"}).response()


def _drop(request: web.BaseRequest) -> None:
    """Cut off a client; whoever is writing to it gets a ConnectionError."""
    log.info("dropped a client that doesn't read", client=request.remote)
    if request.transport is not None:
        request.transport.abort()
