"""A TCP proxy that makes a network's faults happen, at an exact moment if need be.

    async with Proxy(server.port) as proxy:
        passing = proxy.hold(rb"^UPDATE")
        ...
        await passing.wait()  # the statement is here, and the server hasn't got it yet
        proxy.resume()

Patterns are looked for in what clients send, a chunk at a time. A statement with arguments is sent
to PostgreSQL as text first, without effect, and executed by a second chunk: `later=1` means that.
"""

import asyncio
import contextlib
import re
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

HOST = "127.0.0.1"
_CHUNK = 65_536
_RESET = struct.pack("ii", 1, 0)


@dataclass(eq=False)
class _Link:
    """One client and the connection to the server that was made for it."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter | None = None
    loses_reply: asyncio.Event | None = None
    muted: asyncio.Event | None = None
    is_stranded: bool = False

    def close(self, *, reset: bool = False) -> None:
        for writer in (self.client, self.server):
            if writer is None:
                continue
            if reset:
                # Linger for no time: what is unsent is dropped, and the other side gets a RST.
                # One that has closed its end meanwhile needs none.
                connected: socket.socket = writer.get_extra_info("socket")
                with contextlib.suppress(OSError):
                    connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()


@dataclass(eq=False)
class _Watch:
    pattern: re.Pattern[bytes]
    later: int
    act: Callable[[_Link, asyncio.Event], None]
    event: asyncio.Event = field(default_factory=asyncio.Event)
    link: _Link | None = None  # where the pattern was seen


class Proxy:
    """Listens on `port`, a free one, and passes on to a server of this machine."""

    def __init__(self, server_port: int) -> None:
        self.port = 0
        self.latency = 0.0  # seconds that each chunk is late
        self.rate = 0.0  # bytes a second of each connection and direction; 0: no limit
        self.chunks = 0  # that clients have sent
        self._server_port = server_port
        self._listener: asyncio.Server | None = None
        self._links: set[_Link] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        self._watches: list[_Watch] = []
        self._left: int | None = None
        self._steps: dict[int, Callable[[], None]] = {}
        self._stepping: _Link | None = None

    async def __aenter__(self) -> Self:
        await self.accept()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.refuse()

    async def accept(self) -> None:
        """Listen, after `refuse` on the same port again."""
        self._listener = await asyncio.start_server(self._serve, HOST, self.port)
        self.port = self._listener.sockets[0].getsockname()[1]

    async def refuse(self) -> None:
        """Reset every connection and refuse new ones."""
        if self._listener is not None:
            self._listener.close()
            self.reset()
            await self._listener.wait_closed()
            self._listener = None

    def reset(self) -> None:
        """Reset every connection, on both sides."""
        for link in [*self._links]:
            link.close(reset=True)

    def stall(self) -> None:
        """Make a black hole: everything is taken, nothing is passed on, until `resume`."""
        self._flows.clear()

    def resume(self) -> None:
        """End `stall` and `hold`."""
        self._flows.set()

    def strand(self) -> None:
        """Have what is sent on the connections there are disappear, while new ones work."""
        for link in self._links:
            link.is_stranded = True

    def cut_after(self, count: int) -> None:
        """Reset every connection when servers have sent so many bytes from now on; once."""
        self._left = count

    def at_step(self, number: int, act: Callable[[], None]) -> asyncio.Event:
        """Do it when clients have sent so many chunks from now on, before the server gets the last.

        What `act` does to the connections is done before, too.
        """
        event = asyncio.Event()

        def strike() -> None:
            act()
            event.set()

        self._steps[self.chunks + number] = strike
        return event

    def forget_steps(self) -> None:
        """End `at_step`, if there weren't so many."""
        self._steps.clear()

    def lose_next_reply(self) -> None:
        """Reset a connection in place of the server's reply: the one whose step it is."""
        if self._stepping is not None:
            self._stepping.loses_reply = asyncio.Event()

    def seen(self, pattern: bytes, *, later: int = 0) -> asyncio.Event:
        """Tell when a client sends this."""
        return self._watch(pattern, later, lambda link, event: event.set())

    def hold(self, pattern: bytes, *, later: int = 0) -> asyncio.Event:
        """Stall, and tell it, before the server gets what a client sends."""

        def act(link: _Link, event: asyncio.Event) -> None:
            self.stall()
            event.set()

        return self._watch(pattern, later, act)

    def lose_reply(self, pattern: bytes, *, later: int = 0) -> asyncio.Event:
        """Pass this on to the server, then reset the connection in place of the reply."""

        def act(link: _Link, event: asyncio.Event) -> None:
            link.loses_reply = event

        return self._watch(pattern, later, act)

    def mute(self, pattern: bytes, *, later: int = 0) -> asyncio.Event:
        """Pass this on, then have all replies of the connection disappear, which stays open."""

        def act(link: _Link, event: asyncio.Event) -> None:
            link.muted = event

        return self._watch(pattern, later, act)

    def _watch(
        self, pattern: bytes, later: int, act: Callable[[_Link, asyncio.Event], None]
    ) -> asyncio.Event:
        watch = _Watch(re.compile(pattern, re.DOTALL), later, act)
        self._watches.append(watch)
        return watch.event

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = _Link(writer)
        self._links.add(link)
        # Either side may end at any time: that is what this is for.
        with contextlib.suppress(OSError):
            answers, link.server = await asyncio.open_connection(HOST, self._server_port)
            pumps = [
                asyncio.create_task(self._pump(link, reader, link.server, up=True)),
                asyncio.create_task(self._pump(link, answers, writer, up=False)),
            ]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
        link.close()
        self._links.discard(link)

    async def _pump(
        self, link: _Link, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, up: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while chunk := await source.read(_CHUNK):
                if link.is_stranded:
                    continue
                if up:
                    self.chunks += 1
                    if step := self._steps.pop(self.chunks, None):
                        self._stepping = link
                        step()
                        self._stepping = None
                    self._look(link, chunk)
                elif link.loses_reply is not None:
                    link.loses_reply.set()
                    link.close(reset=True)
                    return
                elif link.muted is not None:
                    link.muted.set()
                    continue
                await asyncio.sleep(self.latency + (len(chunk) / self.rate if self.rate else 0))
                await self._flows.wait()
                if not up and self._left is not None:
                    if len(chunk) >= self._left:
                        sink.write(chunk[: self._left])
                        self._left = None
                        self.reset()
                        return
                    self._left -= len(chunk)
                sink.write(chunk)
                await sink.drain()

    def _look(self, link: _Link, chunk: bytes) -> None:
        for watch in [*self._watches]:
            if watch.link is None:
                if not watch.pattern.search(chunk):
                    continue
                watch.link = link
            elif watch.link is link:
                watch.later -= 1
            else:
                continue
            if not watch.later:
                self._watches.remove(watch)
                watch.act(link, watch.event)
