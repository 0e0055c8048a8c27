"""docs/security.md, held to its word: every job works with just the rights that it gives.

And the other way round: without any one of them a job fails, by a message that names it.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from engine import USERS, Engine, make_config
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError
from running import Inside, daemon_config

from balancesync import overview
from balancesync.check import check
from balancesync.config import Config
from balancesync.embedded import RedisServer
from balancesync.errors import RightMissing
from balancesync.model import Run
from balancesync.source import Source
from balancesync.tracking import Tracking

PAGE = (Path(__file__).parent.parent / "docs" / "security.md").read_text()
SQL = re.findall(r"^```sql\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
ACL = [
    dict(re.findall(r"^user (\S+) (.*)$", block, re.MULTILINE))
    for block in re.findall(r"^```acl\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
]
READER, RESTORER = "balancesync", "balancesync-restore"
LIVE = ["+client|id", "+client|tracking", "+subscribe", "&__redis__:invalidate"]
# What only guards, names and explains; see "What can be left out".
SPARED = {"+client|info", "+client|setname"}


@dataclass(frozen=True)
class Deployment:
    """A mapping, which of the page's blocks are for it, and what its Redis holds."""

    mapping: dict[str, Any]
    acl: int
    sql: tuple[int, ...]
    commands: tuple[tuple[str, ...], ...]
    change: tuple[str, ...]
    table: str = ""
    rules: Callable[[str], str] = field(default=lambda rules: rules)
    spared: frozenset[str] = frozenset(SPARED)


STRINGS = (
    ("SET", "balance:1", "1.50"),
    ("SET", "balance:2", "2.50"),
    ("SET", "balance:3", "x"),
    ("RPUSH", "balance:4", "job"),
    ("SET", "cache:1", "1"),
)
OWN = {"table": "public.balances", "on_absent": "delete"}
DEPLOYMENTS = {
    "own": Deployment(OWN, 0, (0, 1), STRINGS, ("SET", "balance:1", "9")),
    "elsewhere": Deployment(
        {"table": "public.balances"}, 0, (0, 1), STRINGS, ("SET", "balance:1", "9")
    ),
    "users": Deployment(
        USERS,
        0,
        (0, 2),
        (
            ("SET", "123", "7"),
            ("SET", "124", "8"),
            ("SET", "125", "x"),
            ("RPUSH", "queue", "job"),
            ("RPUSH", "7", "job"),
        ),
        ("SET", "123", "9"),
        "CREATE TABLE users (telegram_id bigint PRIMARY KEY, phone text, balance bigint,"
        " sync_at timestamptz);"
        " INSERT INTO users VALUES (123, 'secret'), (124, 'secret'), (126, 'secret')",
        lambda rules: rules.replace("~balance:*", "~*"),
    ),
    "hash": Deployment(
        {**OWN, "type": "hash"},
        1,
        (0, 1),
        (
            ("HSET", "balance:1", "balance", "1.50"),
            ("HSET", "balance:2", "balance", "2.50"),
            ("HSET", "balance:3", "other", "2.50"),
            ("SET", "balance:4", "x"),
        ),
        ("HSET", "balance:1", "balance", "9"),
    ),
    "json": Deployment(
        {**OWN, "type": "json"},
        0,
        (0, 1),
        (
            ("SET", "balance:1", '{"balance": 1.50}'),
            ("SET", "balance:2", '{"balance": "2.50"}'),
            ("SET", "balance:3", "{}"),
            ("RPUSH", "balance:4", "job"),
        ),
        ("SET", "balance:1", '{"balance": 9}'),
    ),
    "member": Deployment(
        {**OWN, "key": "balance:all", "type": "hash", "member": "{user_id}"},
        2,
        (0, 1),
        (("HSET", "balance:all", "1", "1.50", "2", "2.50", "3", "x"),),
        ("HSET", "balance:all", "1", "9"),
        spared=frozenset({*SPARED, "+type"}),
    ),
}


class Site:
    """A deployment's servers, and the configurations of its two users."""

    def __init__(self, deployment: Deployment, dsn: str, url: str, admin: Redis) -> None:
        self.deployment = deployment
        self.dsn = dsn
        self.admin = admin
        self._url = url
        self.rules = {name: deployment.rules(rules) for name, rules in ACL[deployment.acl].items()}

    def config(self, user: str, **sections: Any) -> Config:
        """As this user; on a database other than 0."""
        password = self.rules[user].split()[1].removeprefix(">")
        parts = urlsplit(self._url)
        url = parts._replace(netloc=f"{user}:{password}@{parts.netloc}").geturl()
        mapping = self.deployment.mapping
        if user == RESTORER:
            # Where rows of absent keys are deleted, nothing may be pruned.
            mapping = {**mapping, "on_absent": "keep"}
            sections["prune"] = {"enabled": True}
        return make_config(self.dsn, url, mapping, **sections)

    def daemon(self) -> Inside:
        """As the reader."""
        url = self.config(READER).redis.url.get_secret_value()
        live = {"enabled": True, "flush_interval": 0.05}
        return Inside(daemon_config(self.dsn, url, self.deployment.mapping, live=live))

    async def execute(self, *words: str) -> None:
        """A command of Redis, as its administrator."""
        await self.admin.execute_command(*words)  # type: ignore[no-untyped-call]  # so it is in redis-py

    async def fill(self) -> None:
        """Give Redis what it holds, and nothing else."""
        await self.admin.flushdb()
        for words in self.deployment.commands:
            await self.execute(*words)

    async def allow(self, user: str, *without: str) -> None:
        """Give a user the page's rights, all but these."""
        rules = [each for each in self.rules[user].split() if each not in without]
        await self.execute("ACL", "SETUSER", user, "reset", *rules)
        await self.execute("CLIENT", "KILL", "USER", user)


@pytest.fixture
async def role_dsn(pg: asyncpg.Connection, postgres_dsn: str) -> AsyncIterator[str]:
    """DSN of the role that the page's first block makes, in a database closed to all others."""
    database = await pg.fetchval("SELECT current_database()")
    await pg.execute(f"REVOKE ALL ON DATABASE {database} FROM PUBLIC")
    await pg.execute("REVOKE ALL ON SCHEMA public FROM PUBLIC")
    await pg.execute("DROP ROLE IF EXISTS balancesync")
    await pg.execute(SQL[0].replace("DATABASE app", f"DATABASE {database}"))
    yield as_role(postgres_dsn, "balancesync:change-me")
    await pg.execute("DROP OWNED BY balancesync CASCADE")
    await pg.execute("DROP ROLE balancesync")


def as_role(dsn: str, user: str) -> str:
    """The same database, as this `user:password`."""
    parts = urlsplit(dsn)
    return parts._replace(netloc=f"{user}@{parts.netloc.rpartition('@')[2]}").geturl()


@pytest.fixture
async def sites(
    role_dsn: str, private_redis: Callable[..., RedisServer], pg: asyncpg.Connection
) -> AsyncIterator[Callable[[str], Any]]:
    """Makes the site of a deployment; one a test."""
    server = private_redis({"save": "3600 1"})
    url = urlsplit(server.url)._replace(path="/1").geturl()
    async with Redis.from_url(url, protocol=2) as admin:

        async def make(name: str) -> Site:
            deployment = DEPLOYMENTS[name]
            if deployment.table:
                await pg.execute(deployment.table)
            for number in deployment.sql[1:]:
                await pg.execute(SQL[number])
            site = Site(deployment, role_dsn, url, admin)
            for user in site.rules:
                await site.allow(user)
            await site.fill()
            return site

        yield make


async def looked_at(config: Config) -> list[str]:
    """What a check finds wrong, and a probe of the daemon's."""
    engine, said = Engine(config), []
    try:
        async for each in check(config, engine.database, engine.source):
            if each.level in ("error", "unreachable") or "role lacks" in each.text:
                said.append(each.text)
        await engine.source.ping()
    except RightMissing as error:
        said.append(str(error))
    finally:
        await engine.close()
    return said


async def wrong(config: Config, *requests: dict[str, Any]) -> list[str]:
    """What goes wrong in these requests; nothing but missing rights may."""
    engine, said = Engine(config), []
    try:
        for request in requests:
            await engine.sync(**request)
            if engine.failure is not None:
                assert isinstance(engine.failure, RightMissing), engine.failure
                said.append(str(engine.failure))
    finally:
        await engine.close()
    return said


async def good(config: Config, **request: Any) -> Run:
    """One request, which has to succeed."""
    engine = Engine(config)
    try:
        run = await engine.sync(**request)
        assert (run.status, run.error) == ("succeeded", None)
        return run
    finally:
        await engine.close()


async def until_balance(pg: asyncpg.Connection, site: Site, amount: int) -> None:
    """Wait until the first row has this balance."""
    table = site.deployment.mapping["table"]
    async with asyncio.timeout(20):
        while True:
            if await pg.fetchval(f"SELECT max(balance) FROM {table}") == amount:
                return
            await asyncio.sleep(0.02)


DRY, VERIFY = {"mode": "dry_run"}, {"job": "verify", "mode": "verify"}
PRUNE = {"job": "prune", "idle_s": 0}
RESTORE, OVERWRITE = {"job": "restore"}, {"job": "restore", "overwrite": True}


@pytest.mark.parametrize("name", DEPLOYMENTS)
async def test_every_job_works_with_just_the_rights_of_the_page(
    sites: Callable[[str], Any], name: str, pg: asyncpg.Connection
) -> None:
    site: Site = await sites(name)
    kept = {"history": {"enabled": True}}
    reader, restorer = site.config(READER, **kept), site.config(RESTORER, **kept)
    # Before there is any table of its own, and with it.
    assert await looked_at(reader) == []
    assert await wrong(reader, DRY, {}, DRY, VERIFY) == []
    assert await looked_at(reader) == []
    counts = (await good(reader)).counts
    assert (counts.unchanged, counts.written) == (2, 0)
    if name == "elsewhere":
        await pg.execute("REVOKE CREATE ON SCHEMA public FROM balancesync")

    # One row's key goes away, and one changes: read again before it's deleted, kept in the history.
    await site.execute(*site.deployment.change)
    counts = (await good(reader)).counts
    assert counts.updated == 1

    await site.admin.flushdb()
    counts = (await good(restorer, **RESTORE, mode="dry_run")).counts
    assert counts.inserted == 2
    assert (await good(restorer, **RESTORE)).counts.inserted == 2
    await site.fill()
    assert (await good(restorer, **OVERWRITE)).counts.updated == 1
    counts = (await good(reader, **VERIFY)).counts
    assert (counts.unchanged, counts.rejected) == (2, counts.scanned - counts.ignored - 2)

    # Whatever a sync has read to be right is pruned, and comes back.
    await good(reader)
    assert (await good(restorer, **PRUNE)).counts.deleted == 2
    assert (await good(restorer, **RESTORE)).counts.inserted == 2

    async with site.daemon() as daemon:
        await daemon.leads()
        await daemon.api.sync()
        mapping = site.deployment.mapping
        path = f"/balances/{mapping.get('name', 'balances')}/{'123' if name == 'users' else '1'}"
        await daemon.api.until("/health", lambda found: found["status"] == "healthy")
        await daemon.api.until("/status", lambda found: found["live"] == "up")
        await site.execute(*site.deployment.change)
        await until_balance(pg, site, 9)
        assert (await daemon.api.document(path))["source"] == "redis"
        await site.admin.flushdb()
        assert (await daemon.api.document(path))["source"] == "postgres"


def is_named(rule: str, said: list[str]) -> bool:
    """Whether the right that's missing is named; Redis 7.0 doesn't say which a script lacks."""
    right = "~PATTERN" if rule[0] in "%~" else rule
    told = (f"ACL SETUSER ... {right},", "a command that its script calls")
    return any(each in text for each in told for text in said)


@pytest.mark.parametrize("name", ["own", "hash", "member"])
async def test_a_right_less_in_redis_is_named(sites: Callable[[str], Any], name: str) -> None:
    site: Site = await sites(name)
    await good(site.config(READER))
    dry_run: dict[str, Any] = {**RESTORE, "mode": "dry_run"}
    gone = {"member": ("HDEL", "balance:all", "2")}.get(name, ("DEL", "balance:2"))
    for user, rules in site.rules.items():
        for rule in rules.split():
            if rule[0] not in "+%~" or rule in LIVE:
                continue
            await site.fill()
            await site.execute(*gone)
            await site.execute(*site.deployment.change)
            await site.allow(user, rule)
            config = site.config(user)
            said = await looked_at(config) if user == READER else []
            for request in [VERIFY] if user == READER else [dry_run, OVERWRITE, PRUNE]:
                if not is_named(rule, said):
                    said += await wrong(config, request)
            await site.allow(user)
            if rule in site.deployment.spared:
                assert said == [], rule
            else:
                assert is_named(rule, said), (user, rule, said)


async def test_a_right_less_for_live_mode_is_named(sites: Callable[[str], Any]) -> None:
    site: Site = await sites("own")
    for rule in LIVE:
        await site.allow(READER, rule)
        stirred, hurry = asyncio.Event(), asyncio.Event()
        async with Source(site.config(READER).redis) as source:
            opening = Tracking.open(source, [b"balance:"], limit=1, stirred=stirred, hurry=hurry)
            with pytest.raises(RightMissing, match=re.escape(f"ACL SETUSER ... {rule}")):
                await opening


# What is taken away, and what has to be said.
POSTGRES_RIGHTS = {
    "own": {
        "TEMPORARY ON DATABASE {database}": "temporary tables",
        "CONNECT ON DATABASE {database}": "permission denied for database",
        "USAGE ON SCHEMA balancesync": "for schema balancesync",
        "SELECT ON public.balances": r"SELECT \(",
        "INSERT ON public.balances": r"INSERT \(",
        "UPDATE ON public.balances": r"UPDATE \(",
        "DELETE ON public.balances": "DELETE",
        "INSERT ON balancesync.runs": "permission denied for table runs",
    },
    "elsewhere": {"USAGE ON SCHEMA public": "for schema public"},
    "users": {
        "USAGE ON SCHEMA public": "USAGE ON SCHEMA",
        "SELECT (telegram_id) ON users": r'SELECT \("telegram_id"\)',
        "SELECT (balance) ON users": r'SELECT \("balance"\)',
        "SELECT (sync_at) ON users": r'SELECT \("sync_at"\)',
        "UPDATE (balance) ON users": r'UPDATE \("balance"\)',
        "UPDATE (sync_at) ON users": r'UPDATE \("sync_at"\)',
    },
}


@pytest.mark.parametrize("name", POSTGRES_RIGHTS)
async def test_a_right_less_in_postgres_is_named(
    sites: Callable[[str], Any], name: str, pg: asyncpg.Connection
) -> None:
    site: Site = await sites(name)
    await good(site.config(READER))
    database = await pg.fetchval("SELECT current_database()")
    for right, expected in POSTGRES_RIGHTS[name].items():
        named = right.format(database=database)
        await pg.execute(f"REVOKE {named} FROM balancesync")
        said = await wrong(site.config(READER), {}, {**RESTORE, "mode": "dry_run"})
        assert await looked_at(site.config(READER)), right
        await pg.execute(f"GRANT {named} TO balancesync")
        assert [each for each in said if re.search(expected, each)], (right, said)
    assert await wrong(site.config(READER), {}, VERIFY) == []


async def test_who_only_looks_on(
    sites: Callable[[str], Any], pg: asyncpg.Connection, postgres_dsn: str
) -> None:
    site: Site = await sites("own")
    database = await pg.fetchval("SELECT current_database()")
    await pg.execute("DROP ROLE IF EXISTS balancesync_onlooker")
    await pg.execute(SQL[3].replace("DATABASE app", f"DATABASE {database}"))
    try:
        await good(site.config(READER))
        dsn = as_role(postgres_dsn, "balancesync_onlooker:change-me-too")
        onlooker = Engine(make_config(dsn, "redis://127.0.0.1:1", site.deployment.mapping))
        found = await overview.read(onlooker.database)
        assert found.success is not None
        assert set(await onlooker.rejects()) == {b"balance:3", b"balance:4"}
        async with onlooker.database.acquire() as connection:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute("DELETE FROM balancesync.runs")
        await onlooker.close()
    finally:
        await pg.execute("DROP OWNED BY balancesync_onlooker; DROP ROLE balancesync_onlooker")


async def test_no_other_column_is_readable(sites: Callable[[str], Any], role_dsn: str) -> None:
    await sites("users")
    connection = await asyncpg.connect(role_dsn)
    try:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.fetch("SELECT phone FROM users")
    finally:
        await connection.close()


async def test_the_users_of_redis_can_do_nothing_else(sites: Callable[[str], Any]) -> None:
    site: Site = await sites("own")
    urls = {user: site.config(user).redis.url.get_secret_value() for user in site.rules}
    async with (
        Redis.from_url(urls[READER], protocol=2) as reader,
        Redis.from_url(urls[RESTORER], protocol=2) as restorer,
    ):
        assert await reader.mget("balance:1") == [b"1.50"]
        for forbidden in (
            lambda: reader.set("balance:1", "9"),
            lambda: reader.delete("balance:1"),
            lambda: reader.eval("return 1", 0),
            lambda: reader.mget("cache:1"),
            lambda: reader.execute_command("SUBSCRIBE", "news"),  # type: ignore[no-untyped-call]  # so it is in redis-py
            reader.flushall,
            reader.keys,
            lambda: restorer.set("cache:1", "9"),
            lambda: restorer.eval("return redis.call('SET', KEYS[1], '9')", 1, "cache:1"),
            restorer.flushall,
            restorer.scan,
        ):
            with pytest.raises(NoPermissionError):
                await forbidden()
