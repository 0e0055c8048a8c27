"""The writer's lock: taken by whoever waits for it, or left to those who do."""

import asyncio
from collections.abc import Callable
from typing import Final

from balancesync.database import Connection
from balancesync.errors import LockHeld

_LOCK_POLL_S: Final = 0.1


async def take_lock(
    connection: Connection, key: int, wait_s: float, while_waiting: Callable[[], None], wanted: int
) -> None:
    """Take a session advisory lock, polled for up to `wait_s` seconds; raises LockHeld.

    `while_waiting` is called between two polls; what it raises ends the wait. Who waits holds a
    share of the lock `wanted`, for `yield_lock` to see.

    Polled and never waited in: a blocked session holds back vacuum in the whole database.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + wait_s
    shares = False
    while not await connection.fetchval("SELECT pg_try_advisory_lock($1)", key):
        if loop.time() >= deadline:
            raise LockHeld
        while_waiting()
        if not shares:
            shares = await connection.fetchval("SELECT pg_try_advisory_lock_shared($1)", wanted)
        await asyncio.sleep(_LOCK_POLL_S)
    if shares:
        await connection.execute("SELECT pg_advisory_unlock_shared($1)", wanted)


async def yield_lock(connection: Connection, key: int, wanted: int) -> bool:
    """Take a session advisory lock if it's free and nobody waits for it in `take_lock`."""
    sql = "SELECT CASE WHEN pg_try_advisory_xact_lock($2) THEN pg_try_advisory_lock($1) END"
    return bool(await connection.fetchval(sql, key, wanted))
