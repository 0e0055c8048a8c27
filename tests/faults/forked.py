"""The program as a process that starts at once: forked from one that has imported everything."""

import asyncio
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from balancesync import cli

_CONTEXT: Final = multiprocessing.get_context("forkserver")


def _be(arguments: Sequence[str], log: Path) -> None:
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(cli.main(arguments))


class Forked:
    """A process of the program; its `log` has stdout and stderr."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log
        # Its own name is enough: the server of forks imports it, and so all that the program needs.
        _CONTEXT.set_forkserver_preload([__name__, "balancesync.daemon", "balancesync.commands"])
        self._process = _CONTEXT.Process(target=_be, args=(arguments, log), daemon=True)
        self._process.start()

    def kill(self) -> None:
        """SIGKILL."""
        if self._process.pid is not None and self._process.is_alive():
            # The server of forks reaps it, and may just have done so.
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)

    async def ended(self, within_s: float = 30) -> int:
        """Wait for its end; its exit code, negative for a signal."""
        await asyncio.to_thread(self._process.join, within_s)
        assert self._process.exitcode is not None, self.log.read_text()
        return self._process.exitcode
