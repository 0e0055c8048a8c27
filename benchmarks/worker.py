"""One measured action in a process of its own; the clock starts after interpreter and imports.

python -m benchmarks.worker ACTION JSON; prints what it found as JSON.
"""

import asyncio
import inspect
import json
import sys
from importlib import import_module
from time import process_time
from typing import Final

import uvloop

from balancesync import telemetry
from balancesync.config import LogConfig
from balancesync.errors import BalanceSyncError
from benchmarks.servers import tell

# By the module that has them; only that one is imported.
ACTIONS: Final = {
    "runs": ("sync", "sync_for", "restore"),
    "reads": ("bare_read", "source_read", "hmget", "raw_hmget", "hscan"),
    "writes": ("copy", "insert", "update", "script", "sets", "raw_sets", "orm"),
    "client": ("gets",),
    "hearing": ("hear",),
    "browser": ("paints",),
    "changes": ("spend", "watch"),
    "visitors": ("pace", "balances", "anything", "redis_reads", "postgres_reads"),
}


def main() -> None:
    """Do the action that the command line names."""
    telemetry.configure(LogConfig(level="error"), stream_is_tty=False)
    name, parameters = sys.argv[1], json.loads(sys.argv[2])
    module = next(module for module, names in ACTIONS.items() if name in names)
    action = getattr(import_module(f"benchmarks.{module}"), name)
    taken = inspect.signature(action).parameters
    given = {name: value for name, value in parameters.items() if name in taken}
    begun = process_time()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            found = runner.run(action(**given))
    except BalanceSyncError as error:
        sys.exit(f"{name}: {error}")
    tell(found | {"client": process_time() - begun})


if __name__ == "__main__":
    main()
