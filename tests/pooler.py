"""A private PgBouncer before a PostgreSQL, in whatever pool mode a test asks for."""

import os
import pwd
import shutil
import signal
import socket
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from balancesync.programs import postgres_user
from balancesync.server import HOST, Server

MODES = ("session", "transaction", "statement")


def find_pgbouncer() -> Path | None:
    """PgBouncer's program on this machine; Debian keeps it where only root's PATH leads."""
    found = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    return Path(found) if found else None


class PgBouncer(Server):
    """One that lets everybody in, and leads each database to the same one of `dsn`'s server."""

    title = "PgBouncer"
    _orderly_end = signal.SIGINT
    # What its others mean has changed from version to version, and it has nothing to lose.
    _quick_end = signal.SIGKILL

    def __init__(
        self, dsn: str, mode: str, settings: Mapping[str, str] | None = None, *, entry: str = ""
    ) -> None:
        """`settings` are of its section [pgbouncer], `entry` ends its line of the databases."""
        super().__init__(settings)
        self._to = urlsplit(dsn)
        self._mode = mode
        self._entry = entry

    @property
    def dsn(self) -> str:
        """The DSN that leads through it."""
        address = f"{self._to.username}@{HOST}:{self.port}"
        return self._to._replace(netloc=address).geturl()

    def _user(self) -> pwd.struct_passwd | None:
        # It refuses to run as root, as PostgreSQL does.
        return postgres_user()

    def _prepare(self) -> None:
        (self.folder / "server.log").touch()

    def _command(self) -> list[str]:
        settings = {
            "listen_addr": HOST,
            "listen_port": str(self.port),
            "unix_socket_dir": "",
            "auth_type": "any",
            "pool_mode": self._mode,
            "default_pool_size": "20",
        }
        lines = [f"{name} = {value}\n" for name, value in (settings | self.settings).items()]
        entry = f"* = host={HOST} port={self._to.port} user={self._to.username} {self._entry}\n"
        # It reads its file when it's told to reload, too.
        file = self.folder / "pgbouncer.ini"
        file.write_text("".join(("[databases]\n", entry, "[pgbouncer]\n", *lines)))
        program = find_pgbouncer()
        assert program is not None
        return [str(program), file.name]

    def _ready(self) -> bool:
        try:
            socket.create_connection((HOST, self.port), timeout=1).close()
        except OSError:
            return False
        return True
