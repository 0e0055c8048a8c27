"""A process that serves HTTP until SIGTERM, and how long its loop was kept from turning.

python -m benchmarks.serving daemon FILE: the daemon with that configuration.
python -m benchmarks.serving bare PORT: an aiohttp handler that has its one answer ready.
python -m benchmarks.serving line PORT: the same, and the answer is a page with one line on it.

Prints at its end, as JSON, every turn that came late: when it was due by perf_counter, by how much,
and how much CPU time this thread had used meanwhile, in seconds. What is late without that was
waiting for a CPU.
"""

import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any, Final

import uvloop
from aiohttp import web

from balancesync import telemetry
from balancesync.config import load
from balancesync.daemon import Daemon
from balancesync.server import HOST
from benchmarks.servers import tell

_TICK_S: Final = 0.001
_WORTH_TELLING_S: Final = 0.001
# As long as what the daemon says of a balance.
_ANSWER: Final = b'{"mapping":"balances","key":{"user_id":"123456"},%b}' % (b" " * 100)

Late = tuple[float, float, float]


async def _watch(late: list[Late]) -> None:
    while True:
        begun, used = perf_counter(), thread_time()
        await asyncio.sleep(_TICK_S)
        lag = perf_counter() - begun - _TICK_S
        if lag > _WORTH_TELLING_S:
            late.append((begun + _TICK_S, lag, thread_time() - used))


async def _daemon(file: str) -> None:
    config = load(Path(file))
    telemetry.configure(config.log, stream_is_tty=False)
    await Daemon(config).run()


async def _bare(port: str, body: bytes = _ANSWER, kind: str = "application/json") -> None:
    async def answer(_: web.BaseRequest) -> web.Response:
        return web.Response(body=body, content_type=kind)

    runner = web.ServerRunner(web.Server(answer, access_log=None))
    await runner.setup()
    await web.TCPSite(runner, HOST, int(port)).start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    await runner.cleanup()


async def _line(port: str) -> None:
    await _bare(port, b"<!doctype html><title>A line</title><p>One line", "text/html")


async def _watched(serving: Coroutine[Any, Any, None]) -> list[Late]:
    late: list[Late] = []
    watching = asyncio.create_task(_watch(late))
    await serving
    watching.cancel()
    return late


def main() -> None:
    """Serve what the command line names."""
    kinds: dict[str, Callable[[str], Coroutine[Any, Any, None]]]
    kinds = {"daemon": _daemon, "bare": _bare, "line": _line}
    serving = kinds[sys.argv[1]](sys.argv[2])
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        tell({"late": runner.run(_watched(serving))})


if __name__ == "__main__":
    main()
