"""The program on a host that can vanish: at SIGUSR1 it's gone for whoever it's connected to.

Nothing that its connections are sent arrives any more, so nothing is acknowledged, not even by the
kernel, and the process stands still, so nothing is sent. That is what a cable that is pulled looks
like from the other end. A kill would not do: the kernel says good-bye. Linux only, and no rights
are needed: https://www.kernel.org/doc/html/latest/networking/filter.html
"""

import ctypes
import fcntl
import os
import signal
import socket
import struct
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from balancesync.cli import main

_SO_ATTACH_FILTER: Final = 26
# One instruction: return, keeping 0 bytes of the packet.
_DROP_ALL: Final = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
_PROGRAM: Final = struct.pack("HP", 1, ctypes.addressof(_DROP_ALL))


def vanish(*_: object) -> None:
    """Drop what comes in on every connection, and stand still."""
    sockets = []
    for name in [entry.name for entry in Path("/proc/self/fd").iterdir()]:
        # The folder's own descriptor is gone, and what is no socket can't be made one.
        with suppress(OSError):
            sockets.append(socket.socket(fileno=os.dup(int(name))))
    connected = [each for each in sockets if each.family == socket.AF_INET]
    # What isn't acknowledged yet would be sent again by the kernel, and be a sign of life.
    while any(_unacknowledged(each) for each in connected):
        time.sleep(0.01)
    for each in connected:
        each.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, _PROGRAM)
    os.kill(os.getpid(), signal.SIGSTOP)


def _unacknowledged(connected: socket.socket) -> int:
    try:
        answer = fcntl.ioctl(connected, termios.TIOCOUTQ, bytes(4))
    except OSError:  # it listens
        return 0
    return int.from_bytes(answer, sys.byteorder)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, vanish)
    sys.exit(main())
