"""`balancesync check`: everything that could go wrong later, looked for now, with the way out.

Nothing is written: rights are asked of the catalogs, values are sampled, and what live mode needs
is tried for a moment, with keys that nobody has.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from itertools import combinations
from typing import Any, Final

from balancesync import table as tables
from balancesync.config import Config, MappingConfig
from balancesync.continuity import Sighting
from balancesync.database import Connection, Database, Steps, load_sql, quote
from balancesync.ear import Ear
from balancesync.errors import BalanceSyncError, SchemaTooNew, TargetMismatch, Unavailable
from balancesync.findings import Finding, failure
from balancesync.nodes import Facts
from balancesync.overview import look_at_redis, split_refusals
from balancesync.records import Records, elsewhere
from balancesync.sampling import look_at_sample
from balancesync.source import Source
from balancesync.table import Table
from balancesync.tracking import Tracking

# Keys that begin like this are told to us for the moment that it takes to see that they would be.
_NOBODYS: Final = b"balancesync:check:"


async def check(config: Config, database: Database, source: Source) -> AsyncIterator[Finding]:
    """Look at everything, one finding after the other; expected failures are findings, too."""
    names = ", ".join(mapping.name for mapping in config.mapping)
    yield Finding("ok", "configuration", f"valid, with the mappings {names}")
    redis = True
    async for finding in _check_redis(source):
        redis = redis and finding.level not in ("error", "unreachable")
        yield finding
    if redis:
        yield await _check_guard(config, source)
        yield await _check_live(config, source)
    seen = (await look_at_redis(config.redis, source))[1] if redis else None
    found: dict[str, Table] = {}
    try:
        connection = await database.connect()
    except BalanceSyncError as error:
        yield failure("postgres", error)
    else:
        try:
            async for finding in _check_postgres(config, database, connection, seen):
                yield finding
            async for finding in _check_tables(config, database, connection, found):
                yield finding
        except BalanceSyncError as error:
            yield failure("postgres", error)
        finally:
            connection.terminate()
    if redis:
        for mapping in config.mapping:
            table = found.get(mapping.name)
            async for finding in look_at_sample(mapping, table, source, database):
                yield finding


# --- Redis ----------------------------------------------------------------------------------------


async def _check_redis(source: Source) -> AsyncIterator[Finding]:
    try:
        identity = await source.identity()
        facts = await source.facts()
    except BalanceSyncError as error:
        yield failure("redis", error)
        return
    keys = f"{identity.dbsize:,} keys"
    servers = f"{len(facts)} primaries" if len(facts) > 1 else "one primary"
    yield Finding("ok", "redis", f"{identity.server} {identity.version}, {servers}, {keys}")
    for fact in facts:
        for finding in (*_judge_memory(fact), *_judge_persistence(fact)):
            yield finding


def _judge_memory(fact: Facts) -> list[Finding]:
    where = f"Redis at {fact.address}"
    policy = f"maxmemory-policy is {fact.maxmemory_policy}"
    found = []
    if fact.evicted_keys:
        found.append(
            Finding(
                "warning",
                "redis",
                f"{where} has evicted {fact.evicted_keys:,} keys since its start: balances may have"
                " been among them; give it more memory and CONFIG SET maxmemory-policy noeviction",
            )
        )
    if fact.maxmemory_policy == "noeviction" or not fact.maxmemory_policy:
        return [*found, Finding("ok", "redis", f"{where} never evicts: {policy}")]
    if not fact.maxmemory:
        text = f"{where} would evict keys, were maxmemory set: {policy}; noeviction is safer"
        return [*found, Finding("ok", "redis", text)]
    used = f"{fact.used_memory / fact.maxmemory:.0%} of maxmemory is used"
    what = "balances" if fact.maxmemory_policy.startswith("allkeys") else "balances with a TTL"
    text = (
        f"{where} will evict {what} when its memory is full: {policy}, {used};"
        " CONFIG SET maxmemory-policy noeviction"
    )
    return [*found, Finding("warning", "redis", text)]


def _judge_persistence(fact: Facts) -> list[Finding]:
    where = f"Redis at {fact.address}"
    if fact.appendonly and not fact.last_append_ok:
        text = f"{where} can't write its append-only file: look at its disk and log"
        return [Finding("warning", "redis", text)]
    if not fact.last_save_ok:
        text = f"{where} couldn't save its last snapshot: look at its disk and log"
        return [Finding("warning", "redis", text)]
    if fact.appendonly:
        return [Finding("ok", "redis", f"{where} keeps an append-only file")]
    if fact.save is None:
        text = (
            f"{where} has no append-only file, and may keep nothing on disk at all: this user may"
            " not ask for its save points; CONFIG SET appendonly yes; or allow +config|get"
        )
        return [Finding("warning", "redis", text)]
    lost = "what changed since the last sync is lost with it"
    if fact.save:
        text = (
            f"{where} saves snapshots only (save {fact.save}): if it dies, the changes since the"
            " last one are lost there; CONFIG SET appendonly yes keeps them"
        )
        return [Finding("ok", "redis", text)]
    text = f"{where} keeps nothing on disk: {lost}; CONFIG SET appendonly yes"
    return [Finding("warning", "redis", text)]


async def _check_guard(config: Config, source: Source) -> Finding:
    """Whether it would be known that Redis was emptied, and filled again from zero."""
    try:
        seen = (await source.identity()).sighting
    except BalanceSyncError as error:
        return failure("guard", error)
    blind = [each for each in seen.primaries if each.untold]
    if not blind:
        return Finding("ok", "guard", "Redis tells whether it was emptied since the last success")
    ear = Ear(source, _no_moment)
    await ear.tend()
    hears, refusal = ear.is_open, ear.refusal
    await ear.close()
    what = f"Redis at {blind[0].address} doesn't tell whether it was emptied since the last success"
    text = f"{what}: its INFO lacks {' and '.join(blind[0].untold)}"
    limit = f"guard.max_loss = {config.guard.max_loss:g}"
    if hears:
        rest = "a daemon hears it as long as it's up; a command that finds none"
        return Finding("ok", "guard", f"{text}; {rest} refuses more changes than {limit}")
    if config.guard.max_loss >= 1:
        rest = f"and {limit} lets whatever came back pass: set it below 1"
        return Finding("warning", "guard", f"{text}, nobody can hear it ({refusal}), {rest}")
    rest = (
        f"a sync that finds more balances changed than {limit} is refused; sync more often, or"
        " raise it"
    )
    return Finding("warning", "guard", f"{text}, and nobody can hear it ({refusal}): {rest}")


async def _no_moment() -> int:
    """It listens for a moment only, to see that it could."""
    return 0


async def _check_live(config: Config, source: Source) -> Finding:
    """Whether live mode could follow what changes, wanted or not."""
    wanted = config.live.enabled
    stirred, hurry = asyncio.Event(), asyncio.Event()
    try:
        tracking = await Tracking.open(
            source, [_NOBODYS], limit=config.live.max_pending, stirred=stirred, hurry=hurry
        )
    except BalanceSyncError as error:
        if wanted or isinstance(error, Unavailable):
            return failure("live", error)
        return Finding("ok", "live", f"live mode isn't enabled, and couldn't be: {error}")
    await tracking.close()
    if wanted:
        return Finding("ok", "live", "Redis tells what changes, and this user may hear it")
    text = "live mode isn't enabled, but could be: Redis tells what changes, and this user may hear"
    return Finding("ok", "live", f"{text} it")


# --- PostgreSQL -----------------------------------------------------------------------------------


async def _check_postgres(
    config: Config, database: Database, connection: Connection, seen: Sighting | None
) -> AsyncIterator[Finding]:
    with database.translated():
        version = str(await connection.fetchval("SHOW server_version")).split()[0]
        role = await _ask_role(connection, database.schema)
        standby = await connection.fetchval("SELECT pg_is_in_recovery()")
        read_only = await connection.fetchval("SHOW transaction_read_only") == "on"
    name = role["role"]
    yield Finding("ok", "postgres", f"version {version} at {database.address}, as role {name}")
    if standby or read_only:
        text = "is a standby" if standby else "is read-only (default_transaction_read_only)"
        yield Finding(
            "unreachable",
            "postgres",
            f"{text}: no sync can write; name the primary in postgres.dsn",
        )
        return
    if not role["may_stage"]:
        text = (
            f"role {name} may make no temporary tables: GRANT TEMPORARY ON DATABASE ... TO {name}"
        )
        yield Finding("error", "postgres", text)
    async for finding in _check_schema(config, database, connection, seen):
        yield finding
    if not role["fsync"] or role["synchronous_commit"] == "off":
        setting = "synchronous_commit" if role["fsync"] else "fsync"
        text = f"{setting} is off: a crash of PostgreSQL can lose what a sync called written"
        yield Finding("warning", "postgres", f"{text}; turn it on")


async def _ask_role(connection: Connection, schema: str) -> dict[str, Any]:
    """What the role may do, also in this schema (quoted)."""
    rows = await connection.fetch(load_sql("overview")["role"], schema)
    return dict(rows[0])


async def _check_schema(
    config: Config, database: Database, connection: Connection, seen: Sighting | None
) -> AsyncIterator[Finding]:
    sql, schema = load_sql("overview"), config.postgres.schema
    with database.translated():
        role = await _ask_role(connection, database.schema)
        name = role["role"]
        if not role["has_schema"]:
            if role["may_create_schema"]:
                text = f"schema {schema} isn't there yet: `balancesync init` or a sync creates it"
                yield Finding("ok", "postgres", text)
            else:
                text = f"there is no schema {schema}, and role {name} may not create it"
                way = f"as an administrator CREATE SCHEMA {database.schema} AUTHORIZATION {name}"
                yield Finding("error", "postgres", f"{text}; {way}")
            return
        if not role["may_use_schema"]:
            text = f"role {name} may not use schema {schema}"
            way = f"GRANT USAGE ON SCHEMA {database.schema} TO {name}"
            yield Finding("error", "postgres", f"{text}; {way}")
            return
        steps = Steps(database)
        taken = await steps.current(connection)
        if taken < steps.newest and not role["may_create_in_schema"]:
            text = f"schema {schema} must be upgraded, and role {name} may not create tables in it"
            yield Finding("error", "postgres", f"{text}; run `balancesync init` as its owner")
            return
        lacking = await connection.fetch(sql["own_tables"], database.schema)
    if taken < steps.newest:
        yield _judge_older(schema, taken)
        return
    try:
        await steps.check(connection)
    except SchemaTooNew as error:
        yield failure("postgres", error)
        return
    if lacking:
        names = ", ".join(row["name"] for row in lacking)
        way = f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {database.schema}"
        text = f"role {name} may not read and write {names} in schema {schema}; {way} TO {name}"
        yield Finding("error", "postgres", text)
        return
    yield Finding("ok", "postgres", f"schema {schema} is up to date")
    async for finding in _check_refusals(config, database, connection, seen):
        yield finding


async def _check_refusals(
    config: Config, database: Database, connection: Connection, seen: Sighting | None
) -> AsyncIterator[Finding]:
    with database.translated():
        known = await Records(database).remembered(connection)
    here, others = split_refusals(config, known, seen)
    for each in here:
        text = f"the guard refuses to follow Redis: {each['reason']}"
        yield Finding("warning", each["mapping"], f"{text}; `balancesync status` has the ways out")
    for each in others:
        yield Finding("warning", each["mapping"], elsewhere(each["mapping"], each["reason"]))


def _judge_older(schema: str, taken: int) -> Finding:
    has = "an older balancesync's tables" if taken else "no tables of balancesync's own yet"
    does = "upgrades" if taken else "creates"
    text = f"schema {schema} has {has}: `balancesync init` or a sync {does} them"
    return Finding("ok", "postgres", text)


_LACKS_PLPGSQL: Final = (
    "this role can't use the language plpgsql, by which a slice is written row by row where a rule,"
    " a trigger or a constraint gets in its way: such a run fails; as an administrator CREATE"
    " EXTENSION plpgsql, or GRANT USAGE ON LANGUAGE plpgsql, for the rules and triggers of"
)


async def _check_tables(
    config: Config, database: Database, connection: Connection, found: dict[str, Table]
) -> AsyncIterator[Finding]:
    for mapping in config.mapping:
        try:
            with database.translated(last=True):
                table = await tables.inspect(connection, mapping, config.postgres.schema)
            if table.exists:
                found[mapping.name] = table
                text = f"the table {mapping.table} fits, and this role may write it"
                yield Finding("ok", mapping.name, text)
                if mapping.synced_at and not table.columns[mapping.synced_at].may_select:
                    text = f"this role lacks SELECT ({mapping.synced_at}) on {mapping.table}, which"
                    text += " restore, prune and /balances need; "
                    way = table.grant(f"SELECT ({quote(mapping.synced_at)})")
                    yield Finding("warning", mapping.name, text + way)
                for finding in _judge_hooks(mapping, table):
                    yield finding
                if table.hooks and not await connection.fetchval(load_sql("overview")["plpgsql"]):
                    yield Finding("warning", mapping.name, f"{_LACKS_PLPGSQL} {mapping.table}")
            else:
                yield await _judge_missing(connection, mapping, config.postgres.schema)
        except BalanceSyncError as error:
            if isinstance(error, Unavailable):
                raise
            yield failure(mapping.name, error)
    try:
        there = [(each, found[each.name]) for each in config.mapping if each.name in found]
        tables.refuse_shared(there)
    except TargetMismatch as error:
        yield failure("configuration", error)
    for finding in _judge_shared(config):
        yield finding


def _judge_shared(config: Config) -> Iterator[Finding]:
    """Whether each of several mappings on one table tells its own rows from the others'."""
    for first, second in combinations(config.mapping, 2):
        both = f'mappings "{first.name}" and "{second.name}"'
        if first.table_name == second.table_name and first.synced_at == second.synced_at != "":
            yield Finding(
                "warning",
                "configuration",
                f"{both} share the column {first.synced_at} of {first.table}: a restore of one"
                " makes keys for rows that only the other has ever written; give each a synced_at"
                " of its own",
            )


def _judge_hooks(mapping: MappingConfig, table: Table) -> Iterator[Finding]:
    """What rules and triggers may make of what is written."""
    names = {
        kind: ", ".join(dict.fromkeys(hook.name for hook in table.hooks if hook.kind == kind))
        for kind in ("rule", "trigger")
    }
    may = "it may drop a row or change its values: a row that it drops becomes a reject"
    if names["rule"]:
        yield Finding(
            "warning",
            mapping.name,
            f"the table {mapping.table} has rules ({names['rule']}), which rewrite what is written:"
            f" {may}",
        )
    if names["trigger"]:
        before = ", ".join(dict.fromkeys(hook.name for hook in table.hooks if hook.before_row))
        text = (
            f"the table {mapping.table} has triggers ({names['trigger']}): they fire for every row"
            " that changes, and an error in one makes that row a reject"
        )
        if before:
            text += f"; {before} runs BEFORE each row: {may}"
        yield Finding("warning", mapping.name, text)


async def _judge_missing(
    connection: Connection, mapping: MappingConfig, own_schema: str
) -> Finding:
    schema = await tables.schema_for_new(connection, mapping, own_schema)
    full = ".".join((schema or "public", mapping.table_name[1]))
    role = await _ask_role(connection, quote(schema or "public"))
    name = quote(role["role"])
    if schema and not role["has_schema"]:
        there = f"the table {full} isn't there, nor is its schema {schema}"
        if role["may_create_schema"]:
            return Finding("ok", mapping.name, f"{there}: the first sync creates both")
        way = f"as an administrator CREATE SCHEMA {quote(schema)} AUTHORIZATION {name}"
        text = f"{there}, and role {role['role']} may not create it; {way}"
        return Finding("error", mapping.name, text)
    if schema and role["may_create_in_schema"]:
        return Finding("ok", mapping.name, f"the first sync creates the table {full}")
    # A schema that may not be used is none of the search path's.
    rights = "CREATE" if schema and role["may_use_schema"] else "USAGE, CREATE"
    return Finding(
        "error",
        mapping.name,
        f"the table {full} isn't there, and role {role['role']} may not create it; GRANT"
        f" {rights} ON SCHEMA {quote(schema or 'public')} TO {name}, or create the table",
    )
