"""Private PostgreSQL and Redis servers on free ports of 127.0.0.1, for the demo and for the tests.

    with PostgresServer() as postgres, RedisServer() as redis:
        print(postgres.dsn, redis.url)

Each server lives in a temporary folder of its own, which `close` (or leaving the `with`) removes,
and which is removed with the server when this process dies in any other way. The methods block,
the first `start` of a PostgreSQL for about a second: in a coroutine use `asyncio.to_thread`.
"""

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from balancesync.errors import EmbeddedError
from balancesync.programs import (
    copy_postgres,
    find_postgres,
    find_redis,
    open_to_all,
    postgres_user,
)
from balancesync.server import HOST, Server, cause

__all__ = ["PostgresServer", "RedisServer"]

_EMPTY = '""'


class PostgresServer(Server):
    """A private PostgreSQL, whose superuser is `postgres`.

    As root it runs as the user `postgres`, else `nobody`: PostgreSQL refuses to run as root.
    """

    title = "PostgreSQL"
    _orderly_end = signal.SIGINT
    _quick_end = signal.SIGQUIT

    def __init__(
        self,
        settings: Mapping[str, str] | None = None,
        *,
        password: str = "",
        timeout: float = 30.0,
        durable: bool = True,
    ) -> None:
        """Nothing is started or written yet.

        Args:
            settings: as in postgresql.conf.
            password: of `postgres`, asked of every client; without one, every user of this
                machine may connect, as any role.
            timeout: seconds to wait for a start or a stop.
            durable: False is faster, and loses nothing unless the machine itself goes down.
        """
        super().__init__(settings, password=password, timeout=timeout)
        self.durable = durable
        self._programs = Path()

    @property
    def dsn(self) -> str:
        """Of the database `postgres`, as its superuser; the password is in it."""
        secret = f":{quote(self.password, safe='')}" if self.password else ""
        return f"postgresql://postgres{secret}@{HOST}:{self.port}/postgres"

    def _user(self) -> pwd.struct_passwd | None:
        return postgres_user()

    def _prepare(self) -> None:
        self._programs = find_postgres()
        user = self._user()
        if user is not None and not open_to_all(self._programs / "initdb"):
            self._programs = copy_postgres(self._programs, self.folder / "programs", user)
        password = self.folder / "password"
        password.touch(mode=0o600)
        password.write_text(f"{self.password or secrets.token_urlsafe()}\n")
        if user is not None:
            os.chown(password, user.pw_uid, user.pw_gid)
        method = "scram-sha-256" if self.password else "trust"
        options = f"-D data -U postgres -E UTF8 --no-locale --no-sync -A {method} --pwfile password"
        self._spawn([str(self._programs / "initdb"), *options.split()])
        initdb = self._running()
        self._reap(initdb)
        password.unlink()
        if initdb.returncode:
            raise EmbeddedError(f"no private PostgreSQL could be made: {cause(self.log)}")

    def _command(self) -> list[str]:
        settings = {
            "port": str(self.port),
            "listen_addresses": HOST,
            "unix_socket_directories": "",  # the folder's path may be too long for a socket
            "dynamic_shared_memory_type": "mmap",  # in the folder, where nothing is left over
        }
        if not self.durable:
            # Not synchronous_commit: what was committed must survive a SIGKILL.
            settings |= {"fsync": "off", "full_page_writes": "off"}
        options = [f"--{name}={value}" for name, value in (settings | self.settings).items()]
        return [str(self._programs / "postgres"), "-D", "data", *options]

    def _ready(self) -> bool:
        # The eighth line of postmaster.pid is the server's state: pg_ctl waits for it, too.
        lines = _lines(self.folder / "data" / "postmaster.pid")
        return len(lines) > 7 and lines[0] == str(self.pid) and lines[7].strip() == "ready"

    def _forget(self, folder: Path) -> None:
        # A killed server leaves its shared memory segment: the seventh line holds key and id.
        lines = _lines(folder / "data" / "postmaster.pid")
        words = lines[6].split() if len(lines) > 6 else []
        if words and (ipcrm := shutil.which("ipcrm")):
            command = [ipcrm, "-m", words[-1]]
            subprocess.run(command, check=False, stderr=subprocess.DEVNULL)


class RedisServer(Server):
    """A private Valkey or Redis, which keeps nothing on disk unless `settings` say so.

    A setting's name may be the beginning of its line: `{"user alice": "on >secret ~* +@all"}`.
    One that begins with `sentinel ` makes the server a Sentinel.
    """

    title = "Redis"
    _orderly_end = signal.SIGTERM
    _quick_end = signal.SIGKILL

    @property
    def url(self) -> str:
        """Of database 0; the password is in it."""
        secret = f":{quote(self.password, safe='')}@" if self.password else ""
        return f"redis://{secret}{HOST}:{self.port}/0"

    def _prepare(self) -> None:
        (self.folder / "server.log").touch()

    def _command(self) -> list[str]:
        sentinel = any(name.startswith("sentinel ") for name in self.settings)
        settings = {"bind": HOST, "port": str(self.port), "dir": "."}
        if not sentinel:
            settings |= {"save": "", "appendonly": "no"}
        if self.password:
            escaped = self.password.replace("\\", "\\\\").replace('"', '\\"')
            settings["requirepass"] = f'"{escaped}"'
        configuration = self.folder / "server.conf"
        configuration.touch(mode=0o600)
        lines = [
            f"{name} {value or _EMPTY}\n" for name, value in (settings | self.settings).items()
        ]
        configuration.write_text("".join(lines))
        return [str(find_redis()), configuration.name, *(["--sentinel"] if sentinel else [])]

    def _ready(self) -> bool:
        try:
            with socket.create_connection((HOST, self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                reply = connection.recv(64)
        except OSError:
            return False
        # Any reply means ready, also one that asks for a password, but "still loading".
        return bool(reply) and not reply.startswith(b"-LOADING")


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except FileNotFoundError:
        return []
