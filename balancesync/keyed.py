"""What live mode does to one table: the writer's work for keys that are known by name.

Nothing is counted, scanned or analysed, so that the cost follows the keys and not the table.
"""

from balancesync.history import History
from balancesync.model import Batch, Stamp
from balancesync.target import VACUUM_ROWS, Diff, Writer


class KeyedWriter(Writer):
    """One mapping's part of live mode's session, whose plans go by index throughout."""

    _gone_rows = 0
    _dead_gone = 0
    _marked = False

    async def prepare(self) -> None:
        """Create the session's temporary tables for this mapping, and what live mode adds."""
        await super().prepare()
        await self._execute(self._sql["create_gone"])
        self._indexed = True

    async def stage_keys(self, batch: Batch, gone: list[bytes]) -> None:
        """Take in what was read: rows and rejects of distinct keys, and keys that are gone."""
        await self.stage(batch)
        lines, self._gone_rows = self.mapping.key_rows(gone)
        if lines:
            await self._copy(lines, self._keys, table=f"{self._staging}_gone")

    async def _differ(self) -> Diff:
        # `absent` and `target_rows` aren't counted.
        found = Diff(stored=self._staged, rejected=self._rejected)
        await self._execute(self._sql["diff_join_in_order"])
        found.altered = await self._skip_altered()
        await self._summarize(found)
        if self._gone_rows and self.mapping.config.on_absent == "delete":
            last = max(found.inserted.last, found.updated.last)
            await self._execute(self._sql["diff_gone_keys"], last)
            await self._summarize(found)
        return found

    async def mark_history(self, history: History, stamp: Stamp) -> None:
        """Once a session is enough to go on: another's run without history ends it, until the next
        run of all. A gap is marked each time: another's run may have begun a history in between.
        """
        if not self._marked or not history.enabled:
            await super().mark_history(history, stamp)
            self._marked = True

    async def absent_keys(self) -> list[bytes]:
        """Those of the keys that are gone which have a row."""
        if not self._gone_rows:
            return []
        rows = await self._fetch(self._sql["rows_of_gone"])
        return [self.mapping.print_key(tuple(row)) for row in rows]

    async def plan_by_index(self, *, many: bool) -> None:
        """The session is set up for that already, and the diff has its index."""

    async def clear(self) -> None:
        """Forget what was staged, so that the next keys can come."""
        await super().clear()
        if self._gone_rows:
            await self._execute(self._sql["empty_gone"])
            self._dead_gone += self._gone_rows
            self._gone_rows = 0
        if self._dead_gone > VACUUM_ROWS:
            self._dead_gone = 0
            await self._execute(self._sql["vacuum_gone"])
