"""Asking both servers over and over how they are, and what follows: recovery runs, early alarms."""

import asyncio
from collections.abc import Awaitable, Callable
from collections.abc import Mapping as Dictionary
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Final
from uuid import UUID

import structlog

from balancesync.config import Config, MappingConfig
from balancesync.database import Connection, Database
from balancesync.errors import BalanceSyncError
from balancesync.hashes import HashWatch
from balancesync.mapping import Mapping
from balancesync.metrics import Metrics
from balancesync.model import Known, Request
from balancesync.overview import Server, look_at_redis, probe_postgres, split_refusals
from balancesync.part import reading_of
from balancesync.records import Records
from balancesync.renewal import Renewal
from balancesync.runner import Publish, Runner
from balancesync.source import Source
from balancesync.state import State

_CALM_S: Final = 5.0
_TROUBLED_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 60.0
_REFRESH_S: Final = 15.0
_ANSWER_S: Final = 5.0
_SAMPLE_KEYS: Final = 1000

log = structlog.get_logger("balancesync")


class Probing:
    """Keeps `state.redis` and `state.postgres` true, and asks the runner for what is owed.

    `on_cleared` is called when another process has made a full success or lifted a refusal.
    """

    def __init__(
        self,
        config: Config,
        database: Database,
        source: Source,
        *,
        state: State,
        publish: Publish,
        runner: Runner,
        metrics: Metrics,
    ) -> None:
        self._config = config
        self._database = database
        self._source = source
        self._state = state
        self._publish = publish
        self._runner = runner
        self._metrics = metrics
        self.on_cleared: Callable[[], None] = lambda: None
        self._records = Records(database)
        self._hashes = HashWatch(config, database, source)
        self._known: Known | None = None
        self._refresh_at = 0.0
        # How many keys a run has just found, by mapping, until a sample tells how many expire.
        self._unsampled: dict[str, int] = {}
        self._size: int | None = None
        # Read before the size was: what is pruned meanwhile is then never taken for lost.
        self._pruned = 0
        self._pause = _TROUBLED_S
        self._retry_at = 0.0
        self._stirred = asyncio.Event()
        self._renewal = Renewal(config, database, source)

    async def serve(self) -> None:
        """Probe until cancelled."""
        while True:
            await self.probe()
            well = self._state.redis.connected and self._state.postgres.connected
            await self.record_late()
            await self._refresh()
            if well:
                await self._source.listen()
            if well and self._state.leader:
                await self._attempt(self._renewal.renew())
                await self._watch_size()
                self._recover()
            with suppress(TimeoutError):
                async with asyncio.timeout(
                    _CALM_S if well and not self._runner.owed else _TROUBLED_S
                ):
                    await self._stirred.wait()
            self._stirred.clear()

    async def probe(self) -> None:
        """Ask both servers once; tells of what changed."""
        (redis, seen), postgres = await asyncio.gather(
            look_at_redis(self._config.redis, self._source), probe_postgres(self._database)
        )
        self._tell("redis", self._state.redis, redis)
        self._tell("postgres", self._state.postgres, postgres)
        self._state.redis, self._state.postgres = redis, postgres
        self._state.seen = seen or self._state.seen

    def stir(self) -> None:
        """Look at both servers at once."""
        self._stirred.set()

    def take(self, kind: str, document: Dictionary[str, Any]) -> None:
        """Hear of an event: a run that ended changes what the metrics must know.

        A gap of live mode may be a Redis that was emptied: looked at now, the application has no
        time to start again from zero, and to hide that.
        """
        if kind == "live" and document["state"] == "catching up":
            self._stirred.set()
        if kind == "run_finished" and document["job"] != "live":
            self._refresh_at = 0.0
            self._remember_size(document)
            self._remember_success(document)
            if document["status"] == "succeeded" and document["mode"] == "apply":
                self._unsampled |= _present(document)

    async def record_late(self) -> None:
        """Record the runs that ended while PostgreSQL couldn't be told, or before they began."""
        unrecorded = self._runner.unrecorded
        try:
            while unrecorded and self._state.postgres.connected:
                run = unrecorded[0]
                await self._database.ask(partial(self._records.save, run=run), _ANSWER_S)
                # It may have made room for a newer one meanwhile, or been recorded by another call.
                if unrecorded and unrecorded[0] is run:
                    unrecorded.popleft()
        except BalanceSyncError as error:
            log.debug("a run could not be recorded yet", error=str(error))

    async def _refresh(self) -> None:
        """Keep the metrics in step with what PostgreSQL and Redis know."""
        now = asyncio.get_running_loop().time()
        if now < self._refresh_at:
            return
        self._refresh_at = now + _REFRESH_S
        # What one of them can't tell must not hide what the other one can.
        if self._state.postgres.connected:
            await self._attempt(self._ask_postgres())
        if self._state.redis.connected:
            await self._attempt(self._ask_redis())

    async def _attempt(self, asking: Awaitable[None]) -> None:
        try:
            await asking
        except BalanceSyncError as error:
            log.debug("the metrics could not be refreshed", error=str(error))

    async def _ask_postgres(self) -> None:
        # Before the first leader, and for whoever may not make it, there's no schema.
        known = await self._database.ask(self._ask_known, _ANSWER_S)
        self._metrics.remember(known)
        before, self._known = self._known, known
        if before is None:
            return
        current = self._runner.current
        # PostgreSQL knows of a success a moment before it's told here.
        is_own = current is not None and current.run.id == known.full_success
        lifted = before.refused and not known.refused
        if not is_own and (lifted or known.full_success != before.full_success):
            self.on_cleared()

    async def _ask_known(self, connection: Connection) -> Known:
        known = await self._records.known(connection)
        remembered = await self._records.remembered(connection)
        known.refused = bool(split_refusals(self._config, remembered, self._state.seen)[0])
        return known

    def _remember_success(self, run: Dictionary[str, Any]) -> None:
        """A full success of this daemon is no news when PostgreSQL tells of it."""
        is_full = run["job"] == "sync" and run["mode"] == "apply" and run["mapping"] is None
        if is_full and run["status"] == "succeeded" and self._known is not None:
            self._known = replace(self._known, refused=False, full_success=UUID(run["id"]))

    async def _ask_redis(self) -> None:
        facts = await self._source.facts()
        self._metrics.evicted = sum(fact.evicted_keys for fact in facts)
        self._metrics.may_evict = any(
            fact.maxmemory and fact.maxmemory_policy.startswith("allkeys") for fact in facts
        )
        for config in self._config.mapping:
            if config.name in self._unsampled:
                await self._attempt(self._sample(config))

    async def _sample(self, config: MappingConfig) -> None:
        """Estimate how many of a mapping's keys expire; what fails is tried again."""
        sample = await self._source.sample(reading_of(Mapping(config)), _SAMPLE_KEYS)
        expiring = sum(ttl is not None for ttl in sample.ttls)
        share = expiring / len(sample.ttls) if sample.ttls else 0
        present = self._unsampled.pop(config.name)
        self._metrics.expiring.labels(config.name).set(round(share * present))

    def _tell(self, kind: str, before: Server, now: Server) -> None:
        if (before.connected, before.error) == (now.connected, now.error):
            return
        self._publish(kind, asdict(now))
        if now.connected:
            log.info(f"{kind} answers", version=now.version, latency_ms=now.latency_ms)
        else:
            log.warning(f"{kind} doesn't answer", error=now.error)

    def _remember_size(self, run: Dictionary[str, Any]) -> None:
        """What a run has just counted is the least that Redis held, if no probe came in between.

        The fields of a big hash are no keys, and two mappings may read the same ones.
        """
        counted = [
            counts["scanned"] - counts["ignored"] - counts["vanished"]
            for config in self._config.mapping
            if not config.member and (counts := run["mappings"].get(config.name))
        ]
        if run["status"] == "succeeded" and counted:
            self._size = max(counted)
            # The guard counts them anew from each success on.
            self._pruned = 0

    async def _watch_size(self) -> None:
        """Ask for a run at once when Redis has lost keys, or a big hash: the guard then says so."""
        await self._watch_keys()
        try:
            found = await self._hashes.look()
        except BalanceSyncError as error:
            log.debug("big hashes could not be looked at", error=str(error))
            return
        if found:
            log.error("Redis has lost keys", found=found)
            self._runner.submit(Request("sync", "recovery"))

    async def _watch_keys(self) -> None:
        """Those that `balancesync prune` has taken out are not lost."""
        pruned = await self._count_pruned()
        try:
            size = sum((await self._source.dbsize()).values())
        except BalanceSyncError as error:
            log.debug("DBSIZE could not be asked", error=str(error))
            return
        before, self._size = self._size, size
        pruned_before, self._pruned = self._pruned, pruned
        if not before or size >= self._least(before):
            return
        now = await self._count_pruned()
        # Another process's success has it counted anew.
        gone = now - pruned_before if now >= pruned_before else now
        if size < self._least(before - gone):
            log.error("Redis has lost keys", before=before, now=size, pruned=gone)
            self._runner.submit(Request("sync", "recovery"))

    def _least(self, known: int) -> float:
        return known * (1 - self._config.guard.max_loss)

    async def _count_pruned(self) -> int:
        """How many keys were pruned since the last success; what was known if none can be asked."""
        try:
            found = await self._database.ask(self._records.remembered, _ANSWER_S)
        except BalanceSyncError as error:
            log.debug("pruned keys could not be counted", error=str(error))
            return self._pruned
        # The fields of a big hash are no keys.
        names = [config.name for config in self._config.mapping if not config.member]
        known = [found[name].baseline for name in names if name in found]
        return sum(baseline.pruned for baseline in known if baseline is not None)

    def _recover(self) -> None:
        """Start what was postponed, ever less often while it goes on failing."""
        now = asyncio.get_running_loop().time()
        owed = list(self._runner.owed.values())
        if not owed:
            self._pause, self._retry_at = _TROUBLED_S, 0.0
        elif now >= self._retry_at and self._runner.current is None:
            self._retry_at = now + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE_S)
            for each in owed:
                self._runner.submit(replace(each.request, trigger="recovery"))


def _present(run: Dictionary[str, Any]) -> dict[str, int]:
    """How many keys a run has found, by mapping."""
    return {
        name: counts["scanned"] - counts["ignored"] - counts["vanished"]
        for name, counts in run["mappings"].items()
    }
