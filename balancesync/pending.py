"""The keys that live mode has yet to bring over: by mapping, each once, and never too many."""

from collections import deque
from collections.abc import Iterable, Sequence
from math import inf
from typing import Final

from balancesync.config import MappingConfig
from balancesync.errors import Gap
from balancesync.mapping import Mapping

# Arrivals whose lag is measured: at one in 10 ms, a hundred seconds' worth.
_MARKS: Final = 10_000
# A big hash is read as a whole: no more than this share of the time is spent on it.
_SHARE: Final = 0.1
_LEAST_PAUSE_S: Final = 1.0


class Pending:
    """Changed keys. They're worked off in batches: what comes meanwhile belongs to the next one.

    Times are the event loop's, in seconds. `prefixes` are what keys that matter begin with.
    `told_until` is up to when every change is known to have come in here, None if it isn't known.
    """

    def __init__(self, mappings: Iterable[MappingConfig], limit: int) -> None:
        self._mappings = [Mapping(config) for config in mappings]
        self._limit = limit
        self.prefixes = [mapping.prefix for mapping in self._mappings]
        # When a big hash may be read next; infinite while it hasn't changed.
        self._whole_at = {each.name: inf for each in self._mappings if each.member_key is not None}
        self._rested_at = dict.fromkeys(self._whole_at, 0.0)
        self.forget()

    def forget(self) -> None:
        """Forget them all."""
        self._next: dict[str, set[bytes]] = {each.name: set() for each in self._mappings}
        self._batch: dict[str, list[bytes]] = {}
        self.told_until: float | None = None
        self._batch_until: float | None = None
        # Of the big hashes that are to be read again: up to when they had been read.
        self._unread_since: dict[str, float | None] = {}
        self._marks = deque[float](maxlen=_MARKS)
        self._batch_marks: Sequence[float] = ()
        for name in self._whole_at:
            self._whole_at[name] = inf

    def __len__(self) -> int:
        waiting = sum(map(len, self._next.values())) + sum(map(len, self._batch.values()))
        return waiting + sum(at < inf for at in self._whole_at.values())

    @property
    def hashes(self) -> list[str]:
        """The mappings whose big hashes have changed, whether they are due or not."""
        return [name for name, at in self._whole_at.items() if at < inf]

    @property
    def due_at(self) -> float:
        """When there's something to do; infinite if there's nothing."""
        if self._batch or any(self._next.values()):
            return 0.0
        return min(self._whole_at.values(), default=inf)

    @property
    def done_until(self) -> float | None:
        """Up to when all that changed is brought over, at the end of a batch; None: not known."""
        waiting = any(self._next.values())
        ends = [self._batch_until if waiting else self.told_until, *self._unread_since.values()]
        known = [end for end in ends if end is not None]
        return min(known) if len(known) == len(ends) else None

    def add(self, keys: set[bytes], marks: Sequence[float], proven_at: float | None = None) -> None:
        """Take in keys that changed; `marks` are times of their arrival. Raises Gap: too many.

        With them comes all that changed before `proven_at`.
        """
        before, self.told_until = self.told_until, proven_at
        if not keys:
            return
        listed = [*keys]
        for mapping in self._mappings:
            name, big = mapping.name, mapping.member_key
            if big is None:
                self._next[name].update(mapping.select(listed, matched=False))
            elif big in keys:
                self._whole_at[name] = min(self._whole_at[name], self._rested_at[name])
                self._unread_since.setdefault(name, before)
        if any(self._next.values()):
            self._marks.extend(marks)
        if len(self) > self._limit:
            raise Gap(f"more than live.max_pending = {self._limit:,} changed keys wait")

    def hurry(self) -> None:
        """Somebody waits for all of it: the big hashes that changed don't rest any longer."""
        for name, at in self._whole_at.items():
            self._whole_at[name] = min(at, 0.0) if at < inf else inf

    def begin(self) -> None:
        """Begin a batch of all that's here, unless one is under way."""
        if not self._batch:
            self._batch = {name: list(keys) for name, keys in self._next.items() if keys}
            self._next = {each.name: set() for each in self._mappings}
            self._batch_marks, self._marks = self._marks, deque(maxlen=_MARKS)
            self._batch_until = self.told_until

    def take(self, count: int, now: float) -> dict[str, list[bytes]]:
        """Up to `count` keys of the batch by mapping; of a big hash that is due, its name alone.

        Empty at the end of the batch.
        """
        taken: dict[str, list[bytes]] = {}
        for name, keys in [*self._batch.items()]:
            taken[name] = keys[-count:]
            del keys[-count:]
            count -= len(taken[name])
            if not keys:
                del self._batch[name]
            if not count:
                return taken
        for name, at in self._whole_at.items():
            if at <= now:
                taken[name] = []
                self._whole_at[name] = inf
        return taken

    def put_back(self, taken: dict[str, list[bytes]]) -> None:
        """What was taken isn't done: it will come again."""
        for name, keys in taken.items():
            if name in self._whole_at:
                self._whole_at[name] = self._rested_at[name]
            else:
                self._next[name].update(keys)
        self._marks.extendleft(reversed(self._batch_marks))
        self._batch_marks = ()
        self._batch_until = None

    def rest(
        self, taken: dict[str, list[bytes]], done: Iterable[str], begun: float, now: float
    ) -> None:
        """The big hashes among these were read: not again before that is affordable.

        Those that aren't `done` couldn't be brought over.
        """
        for name in done:
            self._unread_since.pop(name, None)
        for name in self._whole_at.keys() & taken.keys():
            self._rested_at[name] = now + max(_LEAST_PAUSE_S, (now - begun) / _SHARE)
            if self._whole_at[name] < inf:
                self._whole_at[name] = self._rested_at[name]

    def arrivals(self) -> Sequence[float]:
        """When keys of the batch had arrived, once all of them are done; empty before."""
        if self._batch:
            return ()
        marks, self._batch_marks = self._batch_marks, ()
        return marks
