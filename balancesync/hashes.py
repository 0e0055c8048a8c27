"""Looking whether a big hash went: DBSIZE counts a million balances in it as one key."""

from collections.abc import Iterable
from functools import partial
from typing import Final

import structlog

from balancesync.config import Config
from balancesync.database import Database
from balancesync.mapping import Mapping
from balancesync.records import Records, Remembered
from balancesync.sizes import shrank
from balancesync.source import Source

_ANSWER_S: Final = 5.0

log = structlog.get_logger("balancesync")


class HashWatch:
    """Remembers how many fields each big hash had when it was last looked at, by mapping."""

    def __init__(self, config: Config, database: Database, source: Source) -> None:
        self._keys = {
            each.name: key
            for each in config.mapping
            if (key := Mapping(each).member_key) is not None
        }
        self._max_loss = config.guard.max_loss
        self._database = database
        self._records = Records(database)
        self._source = source
        self._fields: dict[str, int] = {}

    async def look(self, names: Iterable[str] | None = None) -> str | None:
        """Look at the big hashes of these mappings, or all; say which one has lost too many fields.

        That one is doubted from then on: its application may have made it again from zero before a
        run reads it. Fields that `balancesync prune` took out are not lost. Raises what `source`
        and `database` do.
        """
        for name in self._keys if names is None else names:
            now = await self._source.fields_of(self._keys[name])
            # What PostgreSQL knows may have been seen in another Redis, and tells nothing of this.
            before = self._fields.get(name)
            if now is None or not shrank(before, now, self._max_loss):
                self._fields[name] = now or 0
                continue
            found = await self._database.ask(self._records.remembered, _ANSWER_S)
            # What was there when it was last looked at may have been pruned since.
            before = min(before or 0, found.get(name, Remembered()).known)
            self._fields[name] = now
            if shrank(before, now, self._max_loss):
                doubt = f"the big hash was seen to fall from {before:,} fields to {now:,}"
                save = partial(self._records.save_doubt, mapping=name, doubt=doubt)
                await self._database.ask(save, _ANSWER_S)
                return f'mapping "{name}": {doubt}'
        return None
