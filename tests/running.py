"""Daemons for tests: in this process, where a test can see inside, or as a process of its own."""

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import aiohttp
from engine import make_config

from balancesync.config import Config
from balancesync.daemon import Daemon
from balancesync.notify import Notifier
from balancesync.state import Event

PREFIX = "/sync-management"
# Nothing fires by itself while a test runs.
NO_JOBS = {"on_start": False, "jobs": {}}
# The program as python is told to start it.
PROGRAM = ("-m", "balancesync")
# The same, but SIGUSR1 makes its host vanish.
VANISHING = (str(Path(__file__).with_name("vanishing.py")),)
_SOON_S = 30.0


def free_port() -> int:
    """A port that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def daemon_config(dsn: str, url: str, *mappings: dict[str, Any], **sections: Any) -> Config:
    """Make a configuration of a daemon on a port of its own, whose schedule is empty."""
    sections["http"] = {"port": free_port(), **sections.get("http", {})}
    sections["schedule"] = {**NO_JOBS, **sections.get("schedule", {})}
    return make_config(dsn, url, *mappings, **sections)


class Log:
    """What happened, in order. Each thing is found once, by its kind and some of its fields."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, dict[str, Any]]] = []
        self._taken: set[int] = set()
        self._changed = asyncio.Event()

    def add(self, kind: str, document: dict[str, Any]) -> None:
        """Something happened."""
        self.entries.append((kind, document))
        self._changed.set()

    def all(self, kind: str, **fields: Any) -> list[dict[str, Any]]:
        """All there is so far, found before or not."""
        return [found for name, found in self.entries if name == kind and _fits(found, fields)]

    async def next(self, kind: str, *, within_s: float = _SOON_S, **fields: Any) -> dict[str, Any]:
        """The first one that wasn't found before; waits for it."""
        try:
            async with asyncio.timeout(within_s):
                while True:
                    for number, (name, found) in enumerate(self.entries):
                        if number not in self._taken and name == kind and _fits(found, fields):
                            self._taken.add(number)
                            return found
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            heard = "\n".join(f"{name} {found}" for name, found in self.entries)
            raise AssertionError(f"no {kind} {fields} came; what did:\n{heard}") from None


def _fits(found: dict[str, Any], fields: dict[str, Any]) -> bool:
    return all(
        check(found.get(name)) if callable(check) else found.get(name) == check
        for name, check in fields.items()
    )


class Api:
    """A client of a daemon."""

    def __init__(self, address: str, token: str = "") -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = aiohttp.ClientSession(address, headers=headers)

    async def ask(self, path: str, method: str = "GET", **options: Any) -> tuple[int, Any]:
        """Status and JSON document of a path below the prefix."""
        async with self._client.request(method, f"{PREFIX}{path}", **options) as response:
            return response.status, await response.json()

    async def document(self, path: str) -> Any:
        """The document of a path, whatever its status."""
        return (await self.ask(path))[1]

    async def sync(self, **parameters: str) -> dict[str, Any]:
        """Force a sync and wait for its end."""
        query = {"wait": "true", **parameters}
        status, run = await self.ask("/force-sync", "POST", params=query)
        assert status == 200, run
        return dict(run)

    async def text(self, path: str) -> str:
        """The text of a path without the prefix."""
        async with self._client.get(path) as response:
            return await response.text()

    async def sample(self, name: str) -> float | None:
        """A metric's value, by its name and labels as they are written."""
        for line in (await self.text("/metrics")).splitlines():
            if line.startswith(f"balancesync_{name} "):
                return float(line.rpartition(" ")[2])
        return None

    async def until_sample(
        self, name: str, fits: Callable[[float | None], bool], within_s: float = 20
    ) -> None:
        """Ask until a metric's value fits."""
        async with asyncio.timeout(within_s):
            while True:
                if fits(await self.sample(name)):
                    return
                await asyncio.sleep(0.02)

    async def until(self, path: str, fits: Callable[[Any], bool], within_s: float = 20) -> Any:
        """Ask until the document fits; return it."""
        document = None
        try:
            async with asyncio.timeout(within_s):
                while True:
                    document = await self.document(path)
                    if fits(document):
                        return document
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"{path} still says {document}") from None

    async def close(self) -> None:
        """Close its connections."""
        await self._client.close()


class Inside:
    """A daemon in this process; `log` has its events."""

    def __init__(self, config: Config, notifier: Notifier | None = None) -> None:
        self.daemon = Daemon(config, notifier)
        self.runner = self.daemon.runner
        self.log = Log()
        self.api: Api
        self._config = config
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self.api = Api(f"http://127.0.0.1:{self._config.http.port}")
        self._tasks = [asyncio.create_task(each) for each in (self._hear(), self.daemon.run())]
        await self.log.next("ready")
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()
        await self.api.close()

    async def stop(self) -> None:
        """End as SIGTERM does; raises what ended the daemon."""
        if self._tasks:
            hearing, running = self._tasks
            self._tasks = []
            # A second one would end this process.
            if not running.done() and not self.daemon._stop.is_set():
                self.daemon.stop()
            try:
                await running
            finally:
                hearing.cancel()

    async def _hear(self) -> None:
        with self.daemon.events.listen() as events:
            waiting = asyncio.create_task(self._until_ready())
            event: Event
            async for event in events:
                self.log.add(event.kind, dict(event.document))
            await waiting

    async def _until_ready(self) -> None:
        while True:
            if self.daemon.state.ready:
                return self.log.add("ready", {})
            await asyncio.sleep(0.01)

    async def finished(self, **fields: Any) -> dict[str, Any]:
        """The next run that ended."""
        return await self.log.next("run_finished", **fields)

    async def leads(self) -> None:
        """Wait until it leads."""
        await self.log.next("leader", leads=True)


class Outside:
    """A daemon as a process of its own; `log` has what it logs."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.log = Log()
        self.lines: list[str] = []
        self.api = Api(f"http://127.0.0.1:{port}")
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            text = line.decode().rstrip()
            self.lines.append(text)
            if text.startswith("{"):
                document = json.loads(text)
                self.log.add(document.pop("event"), document)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    async def ended(self) -> int:
        """Wait for its end; return its exit code."""
        async with asyncio.timeout(_SOON_S):
            code = await self.process.wait()
        await self._reading
        return code

    async def close(self) -> None:
        """End it, whatever it's at."""
        if self.process.returncode is None:
            self.process.kill()
        await self.ended()
        await self.api.close()


class Processes:
    """Starts the program on a configuration file."""

    def __init__(self, folder: Path, dsn: str, url: str) -> None:
        self.port = free_port()
        self._folder = folder
        self._dsn = dsn
        self._url = url
        self._made: list[Outside] = []

    def file(
        self, *, port: int | None = None, dsn: str = "", url: str = "", more: str = ""
    ) -> Path:
        """A configuration file for these servers, with `more` lines of it."""
        path = self._folder / f"config{len(list(self._folder.iterdir()))}.toml"
        schedule = "" if "[schedule]" in more else "[schedule]\non_start = false\njobs = {}\n"
        path.write_text(
            f'[redis]\nurl = "{url or self._url}"\n[postgres]\ndsn = "{dsn or self._dsn}"\n'
            f"[http]\nport = {port or self.port}\n{schedule}{more}"
        )
        return path

    async def command(
        self, *arguments: str, file: Path | None = None
    ) -> tuple[int, str, list[str]]:
        """Run a command: its exit code, what it printed, and the lines on stderr."""
        process = await _start(*arguments, "--config", str(file or self.file()))
        async with asyncio.timeout(_SOON_S):
            out, err = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode().splitlines()

    async def start(self, *arguments: str, file: Path | None = None) -> asyncio.subprocess.Process:
        """Start a command."""
        return await _start(*arguments, "--config", str(file or self.file()))

    async def daemon(
        self,
        *,
        file: Path | None = None,
        port: int | None = None,
        program: Sequence[str] = PROGRAM,
        **environ: str,
    ) -> Outside:
        """Start a daemon and wait until it's up."""
        made = await self.begin(file=file, port=port, program=program, **environ)
        await made.log.next("balancesync is up")
        return made

    async def begin(
        self,
        *,
        file: Path | None = None,
        port: int | None = None,
        program: Sequence[str] = PROGRAM,
        **environ: str,
    ) -> Outside:
        """Start a daemon."""
        file = file or self.file(port=port)
        process = await _start("run", "--config", str(file), program=program, **environ)
        made = Outside(process, port or self.port)
        self._made.append(made)
        return made

    async def close(self) -> None:
        """End all daemons."""
        for each in self._made:
            await each.close()


async def _start(
    *arguments: str, program: Sequence[str] = PROGRAM, **environ: str
) -> asyncio.subprocess.Process:
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("BALANCESYNC_", "NOTIFY_", "WATCHDOG_"))
    }
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *program,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=clean | environ,
        limit=1 << 22,
    )


@asynccontextmanager
async def processes(folder: Path, dsn: str, url: str) -> AsyncIterator[Processes]:
    """Processes that are gone after the block."""
    made = Processes(folder, dsn, url)
    try:
        yield made
    finally:
        await made.close()
