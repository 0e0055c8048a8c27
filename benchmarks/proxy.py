"""A TCP proxy that delivers everything later, in both directions: distance on one machine.

python -m benchmarks.proxy JSON, with `delay` in seconds each way and `targets` as [[host, port]];
prints the ports that it listens on, as JSON, and ends with its standard input.
"""

import asyncio
import json
import selectors
import sys
from collections import deque
from functools import partial
from typing import cast

from balancesync.server import HOST


class Pipe(asyncio.Protocol):
    """One side of a connection: what arrives here leaves at the other side, `delay` later."""

    def __init__(self, delay: float) -> None:
        self.other: Pipe | None = None
        self.transport: asyncio.Transport | None = None
        self._delay = delay
        self._late: deque[bytes] = deque()
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._late.append(data)
        self._loop.call_later(self._delay, self._deliver)

    def _deliver(self) -> None:
        data = self._late.popleft()
        if self.other is not None and self.other.transport is not None:
            self.other.transport.write(data)

    def connection_lost(self, error: Exception | None) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()


class Inlet(Pipe):
    """The client's side, which connects the other one; what comes before that waits."""

    def __init__(self, delay: float, host: str, port: int) -> None:
        super().__init__(delay)
        self._target = (host, port)
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        cast(asyncio.Transport, transport).pause_reading()
        self._task = self._loop.create_task(self._connect())

    async def _connect(self) -> None:
        assert self.transport is not None
        try:
            _, outlet = await self._loop.create_connection(lambda: Pipe(self._delay), *self._target)
        except OSError:
            self.transport.abort()
            return
        self.other, outlet.other = outlet, self
        self.transport.resume_reading()


async def _serve(delay: float, targets: list[tuple[str, int]]) -> None:
    loop = asyncio.get_running_loop()
    ports = []
    for host, port in targets:
        server = await loop.create_server(partial(Inlet, delay, host, port), HOST, 0)
        ports.append(server.sockets[0].getsockname()[1])
    print(json.dumps(ports), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


def main() -> None:
    """Serve until standard input ends."""
    given = json.loads(sys.argv[1])
    # epoll waits for whole milliseconds, select for microseconds.
    with asyncio.Runner(
        loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())
    ) as runner:
        runner.run(_serve(given["delay"], [(host, port) for host, port in given["targets"]]))


if __name__ == "__main__":
    main()
