"""Server-sent events: all that happens, as it happens, to whoever keeps up.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Final

import structlog
from aiohttp import web

from balancesync.documents import Document
from balancesync.facts import without_report
from balancesync.listener import HEADERS, HttpProblem
from balancesync.state import Event, Events

# Proxies close a silent connection after a minute; a comment is heard by nobody else.
_HEARTBEAT_S: Final = 15.0
# A reader for whom so long nothing can be written has stopped reading.
_STALLED_S: Final = 10.0
_RETRY: Final = b"retry: 2000\n\n"
_HEARTBEAT: Final = b": still here\n\n"
_MOST_READERS: Final = 100

log = structlog.get_logger("balancesync")


class Stream:
    """Hands the daemon's events to HTTP clients."""

    def __init__(self, events: Events, stopping: asyncio.Event) -> None:
        """`stopping` ends all streams."""
        self._events = events
        self._readers = 0
        self._stopping = stopping

    async def serve(self, request: web.BaseRequest, *, authorised: bool) -> web.StreamResponse:
        """Send events until the client leaves or lags, or the daemon ends."""
        if self._readers >= _MOST_READERS:
            raise HttpProblem(503, "too_many_readers", f"{_MOST_READERS} clients listen already")
        response = web.StreamResponse(
            headers={**HEADERS, "Content-Type": "text/event-stream", "X-Accel-Buffering": "no"}
        )
        # The end of the stream is the end of the connection.
        response.force_close()
        self._readers += 1
        try:
            with self._events.listen() as events:
                await response.prepare(request)
                await self._send(request, response, _RETRY)
                await self._pump(request, response, events, authorised=authorised)
        finally:
            self._readers -= 1
        return response

    async def _pump(
        self,
        request: web.BaseRequest,
        response: web.StreamResponse,
        events: AsyncIterator[Event],
        *,
        authorised: bool,
    ) -> None:
        stopping = asyncio.ensure_future(self._stopping.wait())
        coming = asyncio.ensure_future(_next(events))
        try:
            while not stopping.done():
                done, _ = await asyncio.wait(
                    {stopping, coming},
                    timeout=_HEARTBEAT_S,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if coming in done:
                    event = coming.result()
                    if event is None:
                        return
                    document = event.document if authorised else without_report(event.document)
                    await self._send(request, response, _event(event.kind, document))
                    coming = asyncio.ensure_future(_next(events))
                elif not done:
                    await self._send(request, response, _HEARTBEAT)
        finally:
            stopping.cancel()
            coming.cancel()

    @staticmethod
    async def _send(request: web.BaseRequest, response: web.StreamResponse, chunk: bytes) -> None:
        try:
            async with asyncio.timeout(_STALLED_S):
                await response.write(chunk)
        except TimeoutError:
            log.info("dropped a reader of events that doesn't read", client=request.remote)
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionError from None


async def _next(events: AsyncIterator[Event]) -> Event | None:
    return await anext(events, None)


def _event(kind: str, document: Document) -> bytes:
    return f"event: {kind}\ndata: {json.dumps(document, separators=(',', ':'))}\n\n".encode()
