"""Freeing Redis' memory: one attempt at taking out records whose rows haven't changed for long.

    rows -> render -> read what is there -> equal? -> write the key down -> compare and delete

A key is written down in PostgreSQL before it goes, so that the guard doesn't take it for a loss,
whenever the process dies. What has changed since it was read stays, and is struck out again; a
process killed between the two leaves at most one such piece, a hundredth of the keys.
"""

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from functools import cached_property
from typing import Final, cast

from balancesync.apply import Applied, Earlier
from balancesync.backward import Backward, require_synced_at
from balancesync.config import MappingConfig
from balancesync.database import quote
from balancesync.errors import ConfigError, Refused, RunFailed
from balancesync.mapping import Mapping
from balancesync.part import Progress
from balancesync.rendering import Value
from balancesync.rows import Page, Selection, restorable
from balancesync.session import Session
from balancesync.table import Table
from balancesync.values import Unfit, show
from balancesync.wanted import Part, Wanted
from balancesync.writing import Writing

_PIECE: Final = 1000
_SHARE_OF_ALL: Final = 100


class Prune(Backward):
    """One attempt at a prune. Its counts: `deleted`, `absent` already, `kept` since they differ."""

    purpose = "prune"
    _piece = _PIECE

    async def _select(self, session: Session, config: MappingConfig, table: Table) -> Selection:
        self._check_config(config)
        require_synced_at(config, table)
        if self._writes:
            await self._check_state(session, config)
        edge = await session.clock() - timedelta(seconds=self._request.idle_s)
        column = f"t.{quote(config.synced_at)}"
        if table.columns[config.synced_at].type == "timestamp without time zone":
            column = f"{column} AT TIME ZONE 'UTC'"
        idle = f"{column} <= $1::timestamptz"
        return Selection(table.sql_name, f"({idle}) AND {restorable(config)}", (edge,))

    def _check_config(self, config: MappingConfig) -> None:
        name = f'mapping "{config.name}"'
        if not self._config.prune.enabled:
            raise ConfigError(
                "prune.enabled is false; set it to true only if the application reads a missing"
                " balance back before it changes it, see docs/restore.md"
            )
        if config.on_absent == "delete":
            raise ConfigError(
                f'{name} has on_absent = "delete": the next sync would delete the rows of pruned'
                " keys; prune others with --mapping"
            )
        if not config.synced_at:
            raise ConfigError(
                f"{name} has no synced_at, so nobody knows how long a row hasn't changed; prune"
                " others with --mapping"
            )

    async def _check_state(self, session: Session, config: MappingConfig) -> None:
        mapping = config.name
        known = (await self._records.remembered(session.connection)).get(mapping)
        if known is None or known.baseline is None:
            raise RunFailed(
                f'mapping "{mapping}": no sync of all mappings has succeeded yet, so a loss could'
                " not be told from what is pruned; run `balancesync sync`"
            )
        now = (await self._look_again(session)).of_keys(config.full_key)
        if known.refuses(now):
            raise Refused(
                f'mapping "{mapping}": the guard refuses it: {known.refusal}. See `balancesync'
                " status`"
            )
        if await self._records.unfinished_restore(session.connection, mapping):
            raise RunFailed(
                f'mapping "{mapping}": its last restore hasn\'t succeeded; run `balancesync'
                " restore` again"
            )
        self._piece = max(1, min(_PIECE, known.baseline.present // _SHARE_OF_ALL))

    @cached_property
    def _mappings(self) -> list[Mapping]:
        return [Mapping(config) for config in self._config.mapping]

    def _refuse_shared(self, mapping: Mapping, keys: list[bytes]) -> None:
        """Another mapping would take what goes for a loss, or delete its rows."""
        for other in self._mappings:
            name = other.config.name
            if name != mapping.config.name and (shared := _shared(mapping, other, keys)):
                raise ConfigError(
                    f'mapping "{mapping.config.name}": {show(shared[0])} is read by mapping'
                    f' "{name}", too, which would take it for lost; only what one mapping'
                    " reads can be pruned"
                )

    def _read_by(self, mapping: Mapping) -> Mapping:
        # What is equal by tolerance only isn't equal.
        exact = replace(mapping.config, tolerance=Decimal(0))
        return Mapping(exact, mapping.nullable)

    async def _work(self, session: Session, part: Part) -> None:
        progress = Progress("prune", part.mapping.name)
        self._on_progress(progress)
        progress.total = await part.rows.put_aside()
        async with (
            self._source.writing(part.reading, identity=self.identity) as writing,
            aclosing(part.rows.pages()) as pages,
        ):
            async for page in pages:
                await self._prune(session, part, writing, page)
                progress.done = part.counts.scanned
                self._on_progress(progress)

    async def _prune(self, session: Session, part: Part, writing: Writing, page: Page) -> None:
        wanted = part.want(page)
        self._refuse_shared(part.mapping, wanted.keys)
        seen = await writing.read(wanted.keys)
        lines = part.lines(wanted.keys, seen)
        equal = []
        for at, (raw, line) in enumerate(zip(seen, lines, strict=True)):
            if raw is None:
                part.counts.absent += 1
            elif part.is_same(line, wanted.lines[at]) and part.is_whole(raw):
                equal.append(at)
            else:
                part.counts.kept += 1
        if not self._writes:
            part.counts.deleted += len(equal)
            for at in equal:
                part.show("d", wanted.keys[at], lines[at], seen[at], wanted.lines[at])
            return
        for start in range(0, len(equal), self._piece):
            places = equal[start : start + self._piece]
            values = cast("list[Value]", [seen[at] for at in places])
            await self._remove(session, part, writing, wanted.pick(places), values)

    async def _remove(
        self,
        session: Session,
        part: Part,
        writing: Writing,
        wanted: Wanted,
        seen: Sequence[Value],
    ) -> None:
        connection, name = session.connection, part.mapping.name
        split = map(part.mapping.split_key, wanted.keys)
        texts = [text for text in split if not isinstance(text, Unfit)]  # they all are keys
        await self._records.record_pruned(connection, name, self._run.id, texts)
        done = await (await writing.remove(wanted.keys, seen)).done()
        part.counts.deleted += sum(done)
        there = [text for text, removed in zip(texts, done, strict=True) if not removed]
        if there:
            part.counts.kept += len(there)
            await self._records.withdraw_pruned(connection, name, there)

    def _tally(self, part: Part) -> None:
        """What an earlier attempt has taken out is absent to this one: it counts once."""
        name, counts = part.mapping.name, replace(part.counts)
        earlier = self._committed.get(name, Earlier())
        now = Applied(deleted=counts.deleted)
        self._committed[name] = earlier.plus(now)
        again = min(earlier.applied.deleted, counts.absent)
        counts.deleted += again
        counts.absent -= again
        self._run.mappings[name] = counts

    async def _remember(self, session: Session, parts: Sequence[Part]) -> None:
        """Each piece was recorded before it went."""


def _shared(mapping: Mapping, other: Mapping, keys: list[bytes]) -> list[bytes]:
    """Those of a mapping's keys (with `member`, fields) that another one reads, too."""
    if mapping.member_key is not None:
        return keys if other.member_key == mapping.member_key else []
    if other.member_key is not None:
        return [key for key in keys if key == other.member_key]
    return other.select(keys, matched=False)
