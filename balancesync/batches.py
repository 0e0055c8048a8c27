"""Many look-ups at once as few: those that come while one is under way share the next."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from itertools import islice
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Batches(Generic[K, V]):
    """Calls `look_up` with the keys that wait, at most `limit` of them, one call at a time.

    It gives a value for each key, in the same order; what it raises, all who asked get.
    """

    def __init__(self, look_up: Callable[[list[K]], Awaitable[Sequence[V]]], limit: int) -> None:
        self._look_up = look_up
        self._limit = limit
        self._waiting: dict[K, asyncio.Future[V]] = {}
        self._serving: asyncio.Task[None] | None = None

    async def ask(self, key: K, timeout_s: float) -> V:
        """The value of a key as it is now or later; raises TimeoutError, and what `look_up` does.

        Whoever gives up waiting cancels nothing for the others.
        """
        future = self._waiting.get(key)
        if future is None:
            loop = asyncio.get_running_loop()
            future = self._waiting[key] = loop.create_future()
            if self._serving is None:
                self._serving = loop.create_task(self._serve())
        done, _ = await asyncio.wait({future}, timeout=timeout_s)
        if not done:
            raise TimeoutError
        return future.result()

    async def close(self) -> None:
        """End the look-up under way; who waits for it is cancelled."""
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.wait({self._serving})

    async def _serve(self) -> None:
        try:
            while self._waiting:
                keys = list(islice(self._waiting, self._limit))
                futures = [self._waiting.pop(key) for key in keys]
                try:
                    await self._answer(keys, futures)
                finally:
                    for future in futures:
                        future.cancel()
        finally:
            self._serving = None
            for future in self._waiting.values():
                future.cancel()
            self._waiting.clear()

    async def _answer(self, keys: list[K], futures: list[asyncio.Future[V]]) -> None:
        # As a task of its own: whatever it raises then reaches those who asked, bugs included.
        looking = asyncio.ensure_future(self._look_up(keys))
        try:
            await asyncio.wait({looking})
        finally:
            looking.cancel()
        if error := looking.exception():
            for future in futures:
                future.set_exception(error)
                future.exception()  # marks it as seen: all who asked may have given up
            return
        for future, value in zip(futures, looking.result(), strict=True):
            future.set_result(value)
