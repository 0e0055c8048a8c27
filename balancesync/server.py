"""What every private server does: start, stop, die, hang, come back, and leave nothing behind."""

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Self

from balancesync.errors import EmbeddedError
from balancesync.processes import children, living, send, stopped, wait_for
from balancesync.programs import temporary_folder

HOST = "127.0.0.1"

# Below every system's range of outgoing ports, also with the 10000 that Redis Cluster adds for its
# bus: while a killed server is down, no outgoing connection can be given its port.
_FIRST_PORT, _LAST_PORT, _BUS = 11_000, 22_000, 10_000
_PORT_ATTEMPTS = 20
_TELLING = ("FATAL", "PANIC", "rror", "ailed", "could not", "Bad directive")

# Ends what its owner left behind. A parent-death signal would need code between fork and exec, and
# fires when the thread that started the server ends; an exit handler doesn't run on SIGKILL. The
# end of a pipe is seen however the owner dies. Each line of it is the process to end, if any.
_WATCH = """
pid=
while read -r word; do
    if [ "$word" = done ]; then exit 0; fi
    pid=$word
done
if [ -n "$pid" ]; then
    kill -CONT "$pid"; kill -"$2" "$pid"
    n=0
    while [ $n -lt 100 ] && kill -0 "$pid"; do sleep 0.1; n=$((n + 1)); done
    kill -KILL "$pid"
fi
rm -rf "$1"
"""


class Server(ABC):
    """What both servers can do.

    `settings` may be changed while it's down. Every method raises EmbeddedError when the server
    isn't in a state for it or doesn't do as told in `timeout` seconds.
    """

    title: ClassVar[str]
    _orderly_end: ClassVar[signal.Signals]
    _quick_end: ClassVar[signal.Signals]

    def __init__(
        self,
        settings: Mapping[str, str] | None = None,
        *,
        password: str = "",
        timeout: float = 30.0,
    ) -> None:
        """Nothing is started or written yet.

        Args:
            settings: the server's own settings by name, over those that this class makes.
            password: asked of every client; without one, every user of this machine may connect.
            timeout: seconds to wait for a start or a stop.
        """
        self.settings = dict(settings or {})
        self.password = password
        self.timeout = timeout
        self.port = 0
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._watch: subprocess.Popen[bytes] | None = None

    @property
    def folder(self) -> Path:
        """The server's own folder, from the first `start` to `close`."""
        if self._folder is None:
            raise EmbeddedError(f"the private {self.title} has no folder: it isn't started")
        return self._folder

    @property
    def log(self) -> str:
        """All that the server has written to its log."""
        return (self.folder / "server.log").read_text(errors="replace")

    @property
    def pid(self) -> int:
        """The server's process."""
        return self._running().pid

    def start(self, *, wait: bool = True) -> Self:
        """Starts the server, the first time on a new port and folder, later on the same.

        Args:
            wait: return when it answers; else at once.

        Raises:
            EmbeddedError: its programs are missing, it ended at once, or didn't answer in time.
        """
        if self._process is not None:
            if self._process.poll() is None:
                return self
            self._reap(self._process)
        try:
            if self._folder is None:
                self._make_folder()
                self._prepare()
            self._launch(wait=wait)
        except BaseException:
            self.close()
            raise
        return self

    def stop(self) -> None:
        """An orderly end; what the settings keep is kept."""
        self._end(self._orderly_end)

    def kill(self) -> None:
        """SIGKILL to the server and its children at once, as if the power had gone."""
        process = self._running()
        send([process.pid], signal.SIGSTOP)  # no new child while they are listed
        offspring = children(process.pid)
        send([process.pid, *offspring], signal.SIGKILL)
        self._reap(process)
        if not wait_for(lambda: not offspring & living().keys(), self.timeout):
            raise EmbeddedError(f"children of the private {self.title} survived SIGKILL")

    def suspend(self) -> None:
        """Makes the server hang: connections stay open and nothing answers until `resume`."""
        send([self.pid], signal.SIGSTOP)
        pids = {self.pid, *children(self.pid)}
        send(pids, signal.SIGSTOP)
        if not wait_for(lambda: pids <= stopped(), self.timeout):
            raise EmbeddedError(f"the private {self.title} doesn't stop")

    def resume(self) -> None:
        """Ends `suspend`."""
        send([*children(self.pid), self.pid], signal.SIGCONT)

    def close(self) -> None:
        """Ends the server and removes its folder. May be called twice."""
        self._end(self._quick_end)
        if self._folder is not None:
            self._forget(self._folder)
            shutil.rmtree(self._folder)
            self._folder = None
        if self._watch is not None and self._watch.stdin is not None:
            self._tell_watch("done")
            self._watch.stdin.close()
            self._watch.wait(self.timeout)
            self._watch = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()

    @abstractmethod
    def _prepare(self) -> None:
        """Fills the new folder."""

    @abstractmethod
    def _command(self) -> list[str]:
        """The server's command line."""

    @abstractmethod
    def _ready(self) -> bool:
        """Whether the server answers."""

    def _user(self) -> pwd.struct_passwd | None:
        """Whom to run as, when it isn't this process's own user."""
        return None

    def _forget(self, folder: Path) -> None:
        """Removes what a killed server leaves outside its folder."""
        return

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise EmbeddedError(f"the private {self.title} isn't running")
        return self._process

    def _make_folder(self) -> None:
        self._folder = temporary_folder(self._user())
        self._watch = subprocess.Popen(
            ["/bin/sh", "-c", _WATCH, "sh", str(self._folder), self._quick_end.name[3:]],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the owner alone
        )

    def _launch(self, *, wait: bool) -> None:
        fixed = bool(self.port)
        for _ in range(_PORT_ATTEMPTS):
            self.port = self.port if fixed else _free_port()
            began = len(self.log)
            self._spawn(self._command())
            if not wait or self._wait_until_ready():
                return
            log = self.log[began:]
            # Another process may have taken the port since it was looked at.
            if fixed or "ddress already in use" not in log:
                raise EmbeddedError(f"the private {self.title} ended at start: {cause(log)}")
        raise EmbeddedError(f"the private {self.title} found no free port")

    def _spawn(self, command: list[str]) -> None:
        user = self._user()
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PG")}
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=environment | {"LC_ALL": "C"},
                start_new_session=True,  # Ctrl-C is for the owner, who then ends the server
                user=user.pw_uid if user else None,
                group=user.pw_gid if user else None,
                extra_groups=[] if user else None,
            )
        self._tell_watch(str(self._process.pid))

    def _wait_until_ready(self) -> bool:
        """False: the server has ended instead."""
        process = self._running()
        if not wait_for(lambda: process.poll() is not None or self._ready(), self.timeout):
            raise EmbeddedError(
                f"the private {self.title} didn't answer in {self.timeout:g} s: {cause(self.log)}"
            )
        if process.poll() is None:
            return True
        self._reap(process)
        return False

    def _end(self, how: signal.Signals) -> None:
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            self.resume()
            process.send_signal(how)
        try:
            self._reap(process, within=self.timeout)
        except subprocess.TimeoutExpired:
            self.kill()

    def _reap(self, process: subprocess.Popen[bytes], *, within: float | None = None) -> None:
        process.wait(within)
        self._process = None
        self._tell_watch("")

    def _tell_watch(self, word: str) -> None:
        if self._watch is not None and self._watch.stdin is not None:
            # A signal to everything, as at a shutdown of the machine, may have ended the watch.
            with contextlib.suppress(BrokenPipeError):
                self._watch.stdin.write(f"{word}\n".encode())


def _free_port() -> int:
    for _ in range(_PORT_ATTEMPTS):
        port = _FIRST_PORT + secrets.randbelow(_LAST_PORT - _FIRST_PORT)
        with socket.socket() as client, socket.socket() as bus, contextlib.suppress(OSError):
            client.bind((HOST, port))
            bus.bind((HOST, port + _BUS))
            return port
    raise EmbeddedError(f"no free port on {HOST} from {_FIRST_PORT} to {_LAST_PORT}")


def cause(log: str) -> str:
    """The line of a server's log that most likely says why it failed."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    telling = [line for line in lines if any(word in line for word in _TELLING)]
    return (telling or lines or ["it wrote nothing to its log"])[-1]
