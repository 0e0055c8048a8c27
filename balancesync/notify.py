"""Telling systemd how the service is: https://www.freedesktop.org/software/systemd/man/sd_notify.html"""

import os
import socket
from collections.abc import Mapping

import structlog

log = structlog.get_logger("balancesync")


class Notifier:
    """Sends states to `$NOTIFY_SOCKET`; without one it does nothing.

    `watchdog_s` is how often systemd wants to hear WATCHDOG=1, in seconds; None if it doesn't.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        path = environ.get("NOTIFY_SOCKET", "")
        # A leading @ stands for the NUL of Linux' abstract sockets.
        self._address = "\0" + path[1:] if path.startswith("@") else path
        for_us = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        microseconds = environ.get("WATCHDOG_USEC", "")
        wanted = bool(self._address) and for_us and microseconds.isdigit()
        self.watchdog_s = int(microseconds) / 1_000_000 if wanted else None

    def send(self, *states: str) -> None:
        """Send states such as READY=1, STATUS=..., WATCHDOG=1, STOPPING=1; never blocks."""
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
                sender.sendto("\n".join(states).encode(), self._address)
        except OSError as error:
            log.warning("systemd could not be told", states=states, error=str(error))
