"""Keeping the proof that Redis wasn't empty fresh: each probe that finds it stores it as it is now.

So two failovers between two runs are one after the other for who looks, and a command finds what
only the daemon could see.
"""

from dataclasses import replace
from functools import partial
from typing import Final

from balancesync.config import Config, MappingConfig
from balancesync.continuity import Primary, Sighting
from balancesync.database import Connection, Database
from balancesync.records import Records, Remembered
from balancesync.source import Source

_ANSWER_S: Final = 5.0
# What changes all the time needn't be written each time.
_FRESH_S: Final = 60.0


class Renewal:
    """Renews what is remembered of Redis; for the leader alone."""

    def __init__(self, config: Config, database: Database, source: Source) -> None:
        self._config = config
        self._database = database
        self._source = source
        self._records = Records(database)

    async def renew(self) -> None:
        """Store for each mapping what Redis says now, if it's proven not to have been empty."""
        known, moment, at = await self._database.ask(self._ask, _ANSWER_S)
        if not any(each.seen is not None for each in known.values()):
            return
        now = replace((await self._source.identity()).sighting, moment=moment, at=at)
        for mapping in self._config.mapping:
            before = known.get(mapping.name)
            if before is None or before.seen is None:
                continue
            here = self._proven(mapping, before, now.of_keys(mapping.full_key))
            if here is not None:
                save = partial(self._records.renew, mapping=mapping.name, before=before, now=here)
                await self._database.ask(save, _ANSWER_S)

    async def _ask(self, connection: Connection) -> tuple[dict[str, Remembered], int, float]:
        known = await self._records.remembered(connection)
        return known, *await self._records.moment(connection)

    def _proven(self, mapping: MappingConfig, before: Remembered, now: Sighting) -> Sighting | None:
        """What is to be stored; None if there's no proof, or nothing new."""
        seen = before.seen
        if seen is None or not _is_new(seen, now):
            return None
        found = before.continuity(now, 0 if mapping.member else self._config.guard.max_loss)
        if found.doubt is not None:
            return None
        return now if found.is_unbroken else _with_losses(seen, now)


def _is_new(seen: Sighting, now: Sighting) -> bool:
    if [_essence(each) for each in seen.primaries] != [_essence(each) for each in now.primaries]:
        return True
    return seen.at is None or now.at is None or not 0 <= now.at - seen.at < _FRESH_S


def _essence(primary: Primary) -> tuple[object, ...]:
    """What changes only when something happens."""
    return (
        primary.address,
        primary.run_id,
        primary.history,
        primary.flushes,
        primary.swaps,
        primary.reset,
    )


def _with_losses(seen: Sighting, now: Sighting) -> Sighting:
    """What a start has cost isn't forgotten by the next one."""
    if len(seen.primaries) != len(now.primaries):
        return now
    primaries = tuple(
        replace(new, keys=max(old.keys, new.keys), all_keys=_most(old.all_keys, new.all_keys))
        for old, new in zip(seen.primaries, now.primaries, strict=True)
    )
    return replace(now, primaries=primaries)


def _most(old: int | None, new: int | None) -> int | None:
    return None if old is None or new is None else max(old, new)
