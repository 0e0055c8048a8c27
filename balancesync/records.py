"""balancesync's own tables: what ran, what was rejected, what the guard must remember."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from balancesync.continuity import (
    Continuity,
    Place,
    Sighting,
    judge_by_count,
    judge_continuity,
)
from balancesync.database import NO_LIMIT, Connection, Database, load_sql, lock_key
from balancesync.model import Baseline, Counts, Job, Known, Run
from balancesync.times import short_time_text

# An advisory lock of 64 bits shows in pg_locks as two halves:
# https://www.postgresql.org/docs/current/view-pg-locks.html
_ABANDONED: Final = """r.status = 'running' AND NOT EXISTS (
    SELECT FROM pg_locks AS l
    WHERE l.locktype = 'advisory' AND l.objsubid = 1
        AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND (l.classid::bigint << 32) | l.objid::bigint = r.lock_key)"""

_OTHER_REDIS: Final = (
    "Redis was restarted or replaced since the last run that applied (its run_id is another): its"
    " values may have gone back in time"
)


@dataclass(frozen=True, slots=True)
class Remembered:
    """What the guard remembers of a mapping; `baseline` is None before a first success.

    `seen` is the Redis whose keys it knows, None if an older program made the last success; then
    `run_id` and `flushes` are what that one kept, if anything. `places` are where the refusal was
    met, None if nobody knows. `known_at` is when that success was, `gone` how many keys live
    mode has seen go since that haven't come back, None if it has written nothing, `deleted` of how
    many of them it deleted the rows. `doubt` is what was seen of Redis since then by which its keys
    may have been made again from zero.
    """

    baseline: Baseline | None = None
    refusal: str | None = None
    refused_at: datetime | None = None
    seen: Sighting | None = None
    run_id: str | None = None
    flushes: int | None = None
    places: tuple[Place, ...] | None = None
    known_at: datetime | None = None
    gone: int | None = None
    deleted: int = 0
    doubt: str | None = None

    @property
    def known(self) -> int:
        """The keys that can be lost."""
        return self.baseline.present - self.baseline.pruned if self.baseline else 0

    def continuity(self, now: Sighting, max_loss: float) -> Continuity:
        """Whether Redis was certainly not empty since the last success; see `continuity`."""
        if self.baseline is None:
            return Continuity()
        if self.seen is None:
            return judge_by_count(self.run_id, self.flushes, now)
        return judge_continuity(self.seen, now, max_loss)

    def refuses(self, now: Sighting | None) -> bool:
        """Whether a refusal stands on the Redis that is seen `now`, None: it doesn't answer.

        It doesn't on the one of the last success, never restarted, if it was met on another.
        """
        if self.refusal is None:
            return False
        if now is None or self.seen is None or self.places is None:
            return True
        found = judge_continuity(self.seen, now, 0)
        if found.doubt is not None or not found.is_unbroken:
            return True
        return any(place.has(now) for place in self.places)


@dataclass(frozen=True, slots=True)
class KeptReject:
    """A reject as it is kept; open while `healed_at` is None."""

    mapping: str
    key: bytes
    value: bytes | None
    reason: str
    detail: str
    first_seen: datetime
    changed_at: datetime
    healed_at: datetime | None
    run_id: UUID


class Records:
    """Reads and writes balancesync's own tables, on whatever connection it's handed."""

    def __init__(self, database: Database) -> None:
        self._database = database
        blocks = load_sql("records")
        self._sql = {
            name: sql.format(schema=database.schema, abandoned=_ABANDONED)
            for name, sql in blocks.items()
        }

    def lock_key_of(self, run: UUID) -> int:
        """The advisory lock that shows that a run is under way."""
        return lock_key("run", self._database.config.schema, str(run))

    async def begin(self, connection: Connection, run: Run) -> None:
        """Record the run, and show it as running for as long as this session lives."""
        await self.show(connection, run)
        await self.save(connection, run)

    async def show(self, connection: Connection, run: Run) -> None:
        """Show the run as running for as long as this session lives, beside others that do."""
        await connection.execute("SELECT pg_advisory_lock_shared($1)", self.lock_key_of(run.id))

    async def end(self, connection: Connection, run: Run) -> None:
        """Let go of what `begin` holds, in a session that goes on; the run is saved already."""
        await connection.execute("SELECT pg_advisory_unlock_shared($1)", self.lock_key_of(run.id))

    async def save(self, connection: Connection, run: Run) -> None:
        """Record the run as it is now."""
        await connection.execute(
            self._sql["save_run"],
            run.id,
            run.job,
            run.trigger,
            run.mode,
            run.status,
            run.mapping,
            run.started_at,
            run.finished_at,
            run.duration_s,
            run.attempts,
            json.dumps({name: counts.as_dict() for name, counts in run.mappings.items()}),
            run.warnings,
            run.error,
            run.redis_run_id,
            self.lock_key_of(run.id),
            len(load_sql("steps")),
            None if run.moving is None else json.dumps(run.moving),
        )

    async def mark_interrupted(self, connection: Connection) -> None:
        """Close the runs whose process is gone."""
        await connection.execute(self._sql["mark_interrupted"])

    async def writer(self, connection: Connection) -> str | None:
        """Which run holds the writer's lock, in words, if it is recorded yet."""
        key = lock_key("writer", self._database.config.schema)
        row = await connection.fetchrow(self._sql["writer"], key)
        if row is None:
            return None
        return f"{row['job']} ({row['trigger']}) since {short_time_text(row['started_at'])}"

    async def runs(
        self,
        connection: Connection,
        *,
        limit: int = 100,
        before: UUID | None = None,
        one: UUID | None = None,
        live: bool = True,
        job: Job | None = None,
        trigger: str | None = None,
    ) -> list[Run]:
        """Recorded runs, newest first; with `live` those of live mode, too.

        `job` and `trigger` leave out all others; `cron` is the trigger of all jobs of the schedule.
        """
        rows = await connection.fetch(self._sql["runs"], before, one, limit, live, job, trigger)
        return [_run(dict(row)) for row in rows]

    async def last_success(self, connection: Connection) -> Run | None:
        """The last succeeded full apply run of all mappings."""
        row = await connection.fetchrow(self._sql["last_success"])
        if row is None:
            return None
        return (await self.runs(connection, one=row["id"], limit=1))[0]

    async def known(self, connection: Connection) -> Known:
        """What the metrics must know of the runs before."""
        known = Known()
        for row in await connection.fetch(self._sql["success_times"]):
            known.last_success[row["job"]] = row["at"]
        for mapping, reasons in (await self.count_rejects(connection)).items():
            known.rejects[mapping] = sum(reasons.values())
        known.drift = await self.drift(connection)
        success = await connection.fetchrow(self._sql["last_success"])
        known.full_success = None if success is None else success["id"]
        return known

    async def drift(self, connection: Connection) -> dict[str, int]:
        """What the last verify of each mapping found to differ; 0 once a sync has succeeded since.

        A mapping that no verify has looked at is left out.
        """
        return {row["mapping"]: row["rows"] for row in await connection.fetch(self._sql["drift"])}

    async def save_followed(self, connection: Connection, until: datetime) -> datetime:
        """Remember up to when live mode has brought over all; returns PostgreSQL's time."""
        now: datetime = await connection.fetchval(self._sql["save_followed"], until)
        return now

    async def followed(self, connection: Connection) -> datetime | None:
        """Up to when live mode has brought over every change; None if it never has."""
        until: datetime | None = await connection.fetchval(self._sql["followed"])
        return until

    async def leader(self, connection: Connection) -> tuple[datetime, str | None]:
        """PostgreSQL's time, and the name of the daemon that leads; None if none does."""
        key = lock_key("leader", self._database.config.schema)
        now: datetime = await connection.fetchval("SELECT clock_timestamp()")
        return now, await connection.fetchval(load_sql("leadership")["holder"], key)

    async def open_rejects(
        self, connection: Connection, mapping: str, keys: Sequence[bytes]
    ) -> dict[bytes, tuple[str, bytes | None]]:
        """Reason and value of those of the keys whose reject is open."""
        rows = await connection.fetch(self._sql["open_rejects"], mapping, list(keys))
        return {row["key"]: (row["reason"], row["value"]) for row in rows}

    async def meet(self, connection: Connection | None, run: Run, run_id: str | None) -> None:
        """Keep in `run` which Redis it has met; it warns if the last one that applied met another.

        Args:
            connection: to ask for the run before; None if nothing is recorded yet.
            run: the one under way, maybe of several attempts.
            run_id: of Redis, new with each start of the server; None if it doesn't say.
        """
        before = run.redis_run_id
        if before is None and connection is not None:
            before = await connection.fetchval(self._sql["last_redis"], run.id)
        run.redis_run_id = run_id
        if None not in (before, run_id) and before != run_id and _OTHER_REDIS not in run.warnings:
            run.warnings.append(_OTHER_REDIS)

    async def unfinished_restore(self, connection: Connection, mapping: str) -> bool:
        """Whether the mapping's last restore hasn't succeeded, so that Redis may be half empty."""
        status = await connection.fetchval(self._sql["last_restore"], mapping)
        return status is not None and status != "succeeded"

    async def stats(self, connection: Connection) -> dict[str, Any]:
        """Totals by job, mode and status; p50 and p95 of the last 100 successes, in seconds."""
        totals = await connection.fetch(self._sql["totals"])
        p50, p95 = await connection.fetchval(self._sql["durations"]) or (None, None)
        return {"totals": [dict(row) for row in totals], "p50_s": p50, "p95_s": p95}

    async def count_rejects(self, connection: Connection) -> dict[str, dict[str, int]]:
        """Open rejects by mapping and reason."""
        counts: dict[str, dict[str, int]] = {}
        for row in await connection.fetch(self._sql["count_rejects"]):
            counts.setdefault(row["mapping"], {})[row["reason"]] = row["rejects"]
        return counts

    async def rejects(
        self,
        connection: Connection,
        *,
        limit: int = 100,
        mapping: str | None = None,
        reason: str | None = None,
        healed: bool = False,
    ) -> list[KeptReject]:
        """Kept rejects, open ones first, the newest first; healed ones only if asked for."""
        rows = await connection.fetch(self._sql["rejects"], mapping, reason, healed, limit)
        return [KeptReject(**row) for row in rows]

    async def merge_rejects(
        self,
        connection: Connection,
        run: Run,
        at: datetime,
        scanned: Sequence[str],
        configured: Sequence[str] | None,
    ) -> None:
        """Keep what this session staged as rejects; those that are no more are healed.

        Healed are those of the mappings `scanned`, and those of none of the `configured` ones, None
        for all. What is kept already is left alone. To be called in a transaction.
        """
        # Believing a table to be empty, the planner would hold each reject against each.
        for setting in ("enable_seqscan", "enable_mergejoin", "enable_material"):
            await connection.execute(f"SET LOCAL {setting} = off")
        # However many they are: whoever calls this watches over it.
        await connection.execute(self._sql["merge_rejects"], at, run.id, timeout=NO_LIMIT)
        await connection.execute(
            self._sql["heal_rejects"], at, list(scanned), configured, timeout=NO_LIMIT
        )

    async def merge_keyed_rejects(
        self,
        connection: Connection,
        run: Run,
        at: datetime,
        read: Mapping[str, Sequence[bytes]],
        *,
        staged: bool,
    ) -> None:
        """Keep what this session staged as rejects; of the keys that were `read`, by mapping, those
        that are no more are healed. Ends with nothing staged; `staged` tells whether anything is.
        """
        if staged:
            await connection.execute(self._sql["merge_rejects"], at, run.id)
        for row in await connection.fetch(self._sql["mappings_with_rejects"], list(read)):
            name = row["mapping"]
            await connection.execute(self._sql["heal_keys"], at, name, list(read[name]))
        if staged:
            await connection.execute(self._sql["empty_rejects"])
            await connection.execute(self._sql["vacuum_rejects"])

    async def remembered(self, connection: Connection) -> dict[str, Remembered]:
        """What the guard knows, by mapping."""
        found = {}
        for row in await connection.fetch(self._sql["baselines"]):
            known = row["present"] is not None
            places = row["places"] and [Place.load(each) for each in json.loads(row["places"])]
            found[row["mapping"]] = Remembered(
                Baseline(row["present"], row["absent"], row["pruned"]) if known else None,
                row["refusal"],
                row["refused_at"],
                row["seen"] and Sighting.load(json.loads(row["seen"])),
                row["redis_run_id"],
                row["redis_flushes"],
                None if places is None else tuple(places),
                row["known_at"],
                row["gone"],
                row["deleted"],
                row["doubt"],
            )
        return found

    async def moment(self, connection: Connection) -> tuple[int, float]:
        """PostgreSQL's count of transactions, which only grows, and its clock in seconds."""
        (row,) = await connection.fetch(self._sql["moment"])
        return row["moment"], row["at"]

    async def save_baselines(
        self,
        connection: Connection,
        baselines: Mapping[str, Baseline],
        seen: Mapping[str, Sighting],
        at: datetime,
    ) -> None:
        """Remember a success, by mapping, all of whose rows were written by `at`; a refusal of
        these mappings is lifted.
        """
        sql = self._sql["save_baseline"]
        for mapping, found in baselines.items():
            redis = _columns(seen[mapping])
            await connection.execute(sql, mapping, found.present, found.absent, *redis, at)
            await connection.execute(self._sql["forget_pruned"], mapping, timeout=NO_LIMIT)

    async def renew(
        self, connection: Connection, mapping: str, before: Remembered, now: Sighting
    ) -> None:
        """Remember that until `now` Redis wasn't empty, unless a success came in between.

        A refusal that was met on the Redis that it has followed moves with it.
        """
        if before.seen is None:
            return
        old = json.dumps(before.seen.dump())
        changed = await connection.execute(self._sql["renew"], mapping, *_columns(now), old)
        places = before.places or ()
        if changed == "UPDATE 1" and any(place.has(before.seen) for place in places):
            await self._save_places(connection, mapping, places, now)

    async def save_refusal(
        self, connection: Connection, mapping: str, reason: str, before: Remembered, now: Sighting
    ) -> None:
        """Remember that the guard refused `now`; it stands until a success or a restore.

        One that was met on another Redis than that of the last success replaces none.
        """
        places = before.places or ()
        is_ours = before.seen is not None and Place.of(before.seen).has(now)
        replaces = before.refusal is None or is_ours or any(place.has(now) for place in places)
        await connection.execute(self._sql["save_refusal"], mapping, reason if replaces else None)
        # Of one that an older program met nobody knows where, and so it stands everywhere.
        if before.refusal is None or before.places is not None:
            await self._save_places(connection, mapping, places, now)

    async def _save_places(
        self, connection: Connection, mapping: str, places: Sequence[Place], now: Sighting
    ) -> None:
        known = (*places, Place.of(now))
        found = json.dumps([asdict(place) for place in dict.fromkeys(known)])
        await connection.execute(self._sql["save_places"], mapping, found)

    async def save_seen(self, connection: Connection, mapping: str, seen: Baseline) -> None:
        """Remember the keys that were seen since the success: more are known, never fewer."""
        await connection.execute(self._sql["save_seen"], mapping, seen.present, seen.absent)

    async def save_gone(
        self, connection: Connection, mapping: str, gone: int, deleted: int
    ) -> None:
        """Remember how many keys live mode has seen go since, and deleted the rows of."""
        await connection.execute(self._sql["save_gone"], mapping, gone, deleted)

    async def save_doubt(self, connection: Connection, mapping: str, doubt: str) -> None:
        """Remember, until a success or a restore, why keys may be made again from zero."""
        await connection.execute(self._sql["save_doubt"], mapping, doubt)

    async def record_pruned(
        self, connection: Connection, mapping: str, run: UUID, keys: Sequence[tuple[str, ...]]
    ) -> None:
        """Write down keys, by the texts of their columns, that are about to be pruned."""
        texts = [text for key in keys for text in key]
        await connection.execute(self._sql["record_pruned"], mapping, run, texts, len(keys[0]))

    async def pruned(
        self, connection: Connection, mapping: str, keys: Sequence[tuple[str, ...]]
    ) -> list[tuple[str, ...]]:
        """Those of the keys that are written down as pruned."""
        if not keys:
            return []
        texts = [text for key in keys for text in key]
        rows = await connection.fetch(self._sql["pruned"], mapping, texts, len(keys[0]))
        return [tuple(row["key"]) for row in rows]

    async def withdraw_pruned(
        self, connection: Connection, mapping: str, keys: Sequence[tuple[str, ...]]
    ) -> None:
        """Strike out keys that are there."""
        if not keys:
            return
        texts = [text for key in keys for text in key]
        await connection.execute(self._sql["withdraw_pruned"], mapping, texts, len(keys[0]))

    async def lift_refusals(self, connection: Connection, mappings: Sequence[str]) -> None:
        """Remember that what these mappings had lost is back."""
        await connection.execute(self._sql["lift_refusals"], list(mappings))

    async def lift_refusals_but(self, connection: Connection, mappings: Sequence[str]) -> None:
        """Lift those of all others, which are configured no more: nobody else ever would."""
        await connection.execute(self._sql["lift_refusals_but"], list(mappings))

    async def remember_restored(
        self, connection: Connection, mapping: str, keys: int, seen: Sighting
    ) -> None:
        """Remember that so many `keys` are in Redis again: the guard is to miss them."""
        sql = self._sql["remember_restored"]
        await connection.execute(sql, mapping, keys, *_columns(seen))
        await connection.execute(self._sql["forget_pruned"], mapping, timeout=NO_LIMIT)

    async def forget_old(self, connection: Connection, keep: UUID | None) -> None:
        """Drop what is older than `postgres.keep_runs_days`, at most 10,000 rows a call."""
        days = self._database.config.keep_runs_days
        await connection.execute(self._sql["forget_runs"], days, keep or UUID(int=0))
        await connection.execute(self._sql["forget_rejects"], days)


def elsewhere(mapping: str, refusal: str) -> str:
    """What is said of a refusal that was met on another Redis than the one that is read now."""
    return (
        f'mapping "{mapping}": a sync was refused on another Redis, database or key template than'
        f" this one, which the last success read: {refusal}. It doesn't hold here; are redis.url"
        " and the key template right wherever balancesync is configured?"
    )


def _columns(seen: Sighting) -> tuple[str | None, int | None, str]:
    # The first two are what 0.1.0 reads and writes.
    return seen.run_id, seen.flushes, json.dumps(seen.dump())


def _run(fields: dict[str, Any]) -> Run:
    mappings = json.loads(fields.pop("mappings"))
    fields["mappings"] = {name: Counts(**counts) for name, counts in mappings.items()}
    moving = fields.pop("moving")
    fields["moving"] = None if moving is None else json.loads(moving)
    return Run(**fields)
