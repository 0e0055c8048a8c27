"""The loop turns while a run is under way: HTTP, signals and probes wait for nothing long."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import thread_time
from typing import Any

from engine import Engine
from redis.asyncio import Redis

DOCUMENTS = 80


@asynccontextmanager
async def turns() -> AsyncIterator[list[float]]:
    """The CPU seconds that went into each turn of the loop; not what it waited for a CPU."""
    spent: list[float] = []

    async def watch() -> None:
        while True:
            before = thread_time()
            await asyncio.sleep(0)
            spent.append(thread_time() - before)

    watching = asyncio.create_task(watch())
    try:
        yield spent
    finally:
        watching.cancel()


async def test_large_documents_do_not_hold_up_the_loop(
    engine: Callable[..., Engine], redis: Redis
) -> None:
    # The dearest kind: each number becomes an object. 60 kB take some ten milliseconds.
    filler = ",".join("1" * 30_000)
    documents: dict[str, Any] = {
        f"balance:{number}": f'{{"balance": {number}.25, "other": [{filler}]}}'
        for number in range(DOCUMENTS)
    }
    await redis.mset(documents)
    one = engine({"type": "json"})
    async with turns() as spent:
        run = await one.good()
    assert run.counts.inserted == DOCUMENTS
    # All of them in one go would be nearly all that the run takes.
    assert max(spent) < sum(spent) / 2
