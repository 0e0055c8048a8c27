"""Many look-ups at once as few: those that come while one is under way share the next."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Iterable, Iterator, Sequence
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
        self._waiting: dict[K, list[asyncio.Future[V]]] = {}
        self._serving: asyncio.Task[None] | None = None

    async def ask(self, key: K, timeout_s: float) -> V:
        """The value of a key as it is now or later; raises TimeoutError, and what `look_up` does.

        Whoever gives up waiting cancels nothing for the others.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[V] = loop.create_future()
        self._waiting.setdefault(key, []).append(future)
        if self._serving is None:
            self._serving = loop.create_task(self._serve())
        # By hand, since asyncio's own ways to wait cost as much as all the rest of a look-up.
        timer = loop.call_later(timeout_s, _give_up, future)
        try:
            return await future
        finally:
            timer.cancel()

    async def close(self) -> None:
        """End the look-up under way; who waits for it is cancelled."""
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.wait({self._serving})

    async def _serve(self) -> None:
        try:
            while self._waiting:
                keys = list(islice(self._waiting, self._limit))
                asked = [self._waiting.pop(key) for key in keys]
                try:
                    await self._answer(keys, asked)
                finally:
                    _cancel(asked)
        finally:
            self._serving = None
            _cancel(self._waiting.values())
            self._waiting.clear()

    async def _answer(self, keys: list[K], asked: list[list[asyncio.Future[V]]]) -> None:
        # As a task of its own: whatever it raises then reaches those who asked, bugs included.
        looking = asyncio.ensure_future(self._look_up(keys))
        try:
            await asyncio.wait({looking})
        finally:
            looking.cancel()
        if error := looking.exception():
            for future in _still_waiting(asked):
                _fail(future, error)
            return
        for futures, value in zip(asked, looking.result(), strict=True):
            for future in _still_waiting([futures]):
                future.set_result(value)


def _still_waiting(asked: Iterable[list[asyncio.Future[V]]]) -> Iterator[asyncio.Future[V]]:
    return (future for futures in asked for future in futures if not future.done())


def _cancel(asked: Iterable[list[asyncio.Future[V]]]) -> None:
    for future in _still_waiting(asked):
        future.cancel()


def _give_up(future: asyncio.Future[V]) -> None:
    if not future.done():
        _fail(future, TimeoutError())


def _fail(future: asyncio.Future[V], error: BaseException) -> None:
    future.set_exception(error)
    future.exception()  # marks it as seen: who asked may be cancelled in this very turn
