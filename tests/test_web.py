"""What each path of the API answers, on real servers and over real HTTP."""

import asyncio
import json
import re
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from time import perf_counter
from typing import Any
from uuid import uuid4

import aiohttp
import asyncpg
import pytest
from daemon_site import PREFIX, Site
from engine import make_config
from redis.asyncio import Redis
from yarl import URL

from balancesync import __version__, api, listener, overview, stream
from balancesync.embedded import PostgresServer, RedisServer
from balancesync.errors import ConfigError
from balancesync.model import Request

# So slow that a run of some hundred keys is there until somebody ends it.
SLOW = {"scan_count": 10, "max_keys_per_second": 20}


@pytest.fixture
async def keys(redis: Redis) -> None:
    """Five hundred balances of 1.50, and one that is no number."""
    await redis.mset({f"balance:{number}": "1.5" for number in range(500)})
    await redis.set("balance:1000", "plenty")


@pytest.fixture
async def site(postgres_dsn: str, redis_url: str) -> AsyncIterator[Site]:
    """A site on the test's servers."""
    async with Site.on(postgres_dsn, redis_url) as made:
        yield made


@pytest.fixture
async def slow(postgres_dsn: str, redis_url: str, keys: None) -> AsyncIterator[Site]:
    """A site whose runs take half a minute."""
    async with Site.on(postgres_dsn, redis_url, redis=SLOW) as made:
        yield made


async def count_rows(pg: asyncpg.Connection) -> int:
    """How many rows the target has; 0 before there is one."""
    if await pg.fetchval("SELECT to_regclass('balances')") is None:
        return 0
    return int(await pg.fetchval("SELECT count(*) FROM balances"))


# --- status and probes ----------------------------------------------------------------------------


@pytest.mark.usefixtures("keys")
async def test_status_before_and_after_a_run(site: Site) -> None:
    status, before = await site.ask("/status")
    assert status == 200
    assert (before["state"], before["current_run"], before["last_run"]) == ("idle", None, None)
    assert (before["last_success_at"], before["refusal"], before["live"]) == (None, None, "off")
    assert before["redis"]["connected"]
    assert before["postgres"]["connected"]
    assert datetime.fromisoformat(before["next_run_at"]) > datetime.now(UTC)
    run = await site.sync()
    _, after = await site.ask("/status")
    assert after["last_run"]["id"] == str(run.id)
    assert (after["last_run"]["inserted"], after["last_run"]["rejected"]) == (500, 1)
    assert after["last_success_at"] is not None
    assert 0 <= after["last_success_age_s"] < 10


async def test_status_tells_drift_until_somebody_has_looked_since(
    redis: Redis, redis_url: str, postgres_dsn: str
) -> None:
    more = {"name": "more", "key": "more:{user_id}", "table": "more"}
    await redis.mset({"balance:1": "1", "balance:2": "1"})
    async with Site.on(postgres_dsn, redis_url, {"name": "balances"}, more) as site:
        await site.sync()
        _, status = await site.ask("/status")
        assert (status["without_keys"], status["drift"]) == (["more"], {})
        await redis.mset({"balance:1": "2", "more:1": "1"})
        await site.sync(job="verify", mode="verify")
        # What only looks at another mapping, or doesn't write, leaves it as it is.
        await site.sync(mapping="more")
        await site.sync(mode="dry_run")
        _, status = await site.ask("/status")
        assert (status["without_keys"], status["drift"]) == (["more"], {"balances": 1})
        await site.sync()
        _, status = await site.ask("/status")
        assert (status["without_keys"], status["drift"]) == ([], {})


async def test_status_while_a_run_is_under_way_and_another_waits(slow: Site) -> None:
    _, first = await slow.ask("/force-sync", "POST")
    await slow.event("run_progress")
    _, second = await slow.ask("/force-sync?dry_run=true", "POST")
    assert (first["state"], second["state"]) == ("started", "queued")
    _, status = await slow.ask("/status")
    assert (status["state"], status["queued_runs"]) == ("running", [second["run_id"]])
    current = status["current_run"]
    assert (current["id"], current["status"]) == (first["run_id"], "running")
    progress = current["progress"]
    assert (progress["mapping"], progress["total"]) == ("balances", 501)
    assert 0 < progress["done"] < 501
    # They aren't recorded yet, and listed all the same.
    _, listed = await slow.ask("/runs")
    assert [run["id"] for run in listed["runs"]] == [second["run_id"], first["run_id"]]
    assert [run["status"] for run in listed["runs"]] == ["queued", "running"]


async def test_status_tells_of_a_run_of_another_process(
    site: Site, postgres_dsn: str, redis_url: str, keys: None
) -> None:
    async with Site.on(postgres_dsn, redis_url, redis=SLOW) as other:
        ticket, _ = other.runner.submit(Request("sync", "cli"))
        await other.event("run_progress")
        _, status = await site.ask("/status")
        assert (status["state"], status["current_run"]["id"]) == ("running", str(ticket.run.id))
        code, refused = await site.ask(f"/runs/{ticket.run.id}", "DELETE")
        assert (code, refused["error"]["code"]) == (409, "not_ours")


async def test_probes(site: Site) -> None:
    async with site.client.get("/livez") as live, site.client.get("/readyz") as ready:
        assert (live.status, await live.json()) == (200, {"status": "alive"})
        assert (ready.status, await ready.json()) == (200, {"status": "ready"})
    site.state.ready = False
    async with site.client.get("/readyz") as ready:
        assert (ready.status, await ready.json()) == (503, {"status": "starting"})
    async with site.client.head(f"{PREFIX}/health") as head:
        assert (head.status, await head.read()) == (200, b"")
    async with site.client.get("/metrics") as metrics:
        assert metrics.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert b"\nbalancesync_run_in_progress 0.0\n" in await metrics.read()


async def test_livez_fails_when_the_runner_is_stuck(site: Site) -> None:
    site.runner.beat = 0.001
    async with site.client.get("/livez") as live:
        # Its next turn, within a second, would heal it.
        assert (live.status, await live.json()) == (503, {"status": "stuck"})


async def test_the_page_and_its_files(site: Site) -> None:
    async with site.client.get("/") as page:
        text = await page.text()
        assert page.content_type == "text/html"
        assert page.headers["Content-Security-Policy"].startswith("default-src 'none'; ")
        policy = page.headers["Content-Security-Policy"]
        assert "unsafe" not in policy
    assert f'data-version="{__version__}"' in text
    # No other style sheet is waited for, and none but this one is followed.
    [styles] = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert f"style-src 'sha256-{b64encode(sha256(styles.encode()).digest()).decode()}';" in policy
    assert 'rel="stylesheet"' not in text
    named = re.findall(r'(?:src|href)="static/([^"]+)"', text)
    assert "app.js" in named
    assert not re.search(r"<script>| style=| on[a-z]+=|https?:", text)
    for name in named:
        async with site.client.get(f"/static/{name}") as file:
            assert (file.status, len(await file.read()) > 0) == (200, True)
            tag = file.headers["ETag"]
            assert (file.headers["Content-Encoding"], tag[-6:]) == ("gzip", '-gzip"')
        plain = {"Accept-Encoding": "gzip;q=0", "If-None-Match": tag}
        async with site.client.get(f"/static/{name}", headers=plain) as file:
            assert (file.status, "Content-Encoding" in file.headers) == (200, False)
            assert file.headers["ETag"] == tag.replace("-gzip", "")
        known = {"If-None-Match": tag}
        async with site.client.get(f"/static/{name}", headers=known) as file:
            assert (file.status, await file.read(), file.headers["ETag"]) == (304, b"", tag)
    for name in ("uplot.LICENSE", "../page.py", "%2e%2e/page.py", "index.html/x"):
        async with site.client.get(URL(f"/static/{name}", encoded=True)) as none:
            assert none.status == 404


async def test_schedule(site: Site) -> None:
    _, document = await site.ask("/schedule")
    hourly, daily = document["jobs"]
    assert (hourly["name"], hourly["cron"], hourly["job"]) == ("hourly", "0 * * * *", "sync")
    assert (daily["timezone"], daily["last_at"]) == ("UTC", None)
    assert datetime.fromisoformat(daily["next_at"]).hour == 2


# --- health ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("keys")
async def test_health_when_all_is_well(site: Site) -> None:
    code, document = await site.ask("/health")
    # Nothing has run yet, and it's too early to blame anyone.
    assert (code, document["status"]) == (200, "degraded")
    await site.sync()
    code, document = await site.ask("/health")
    assert (code, document["status"]) == (200, "healthy")
    names = ["redis", "postgres", "guard", "schema", "lock", "last_success", "refusal", "rejects"]
    names.append("postponed")
    assert list(document["checks"]) == names
    assert {check["status"] for check in document["checks"].values()} == {"ok"}
    async with site.client.get("/health") as answer:
        assert (await answer.json())["status"] == "healthy"


async def health_of(site: Site, check: str) -> tuple[int, str, str, str]:
    """Status code, verdict, and what one check says."""
    code, document = await site.ask("/health")
    found = document["checks"][check]
    return code, document["status"], found["status"], found["detail"]


@pytest.mark.usefixtures("keys")
async def test_health_without_redis(
    postgres_dsn: str, private_redis: Callable[..., RedisServer]
) -> None:
    server = private_redis()
    async with Site.on(postgres_dsn, server.url) as site:
        await site.sync()
        server.kill()
        await site.probing.probe()
        code, verdict, check, detail = await health_of(site, "redis")
        assert (code, verdict, check) == (200, "degraded", "degraded")
        assert "Redis at 127.0.0.1" in detail


async def test_health_without_postgres(
    redis_url: str, private_postgres: Callable[..., PostgresServer]
) -> None:
    server = private_postgres()
    async with Site.on(server.dsn, redis_url) as site:
        await site.sync()
        await site.ask("/status")
        server.kill()
        await site.probing.probe()
        code, verdict, check, detail = await health_of(site, "postgres")
        assert (code, verdict, check) == (503, "unhealthy", "failed")
        assert "PostgreSQL at 127.0.0.1" in detail
        assert (await health_of(site, "schema"))[2:] == ("failed", overview.UNASKED)
        assert (await health_of(site, "lock"))[2:] == ("degraded", "not known")
        # By its age, which is known.
        assert (await health_of(site, "last_success"))[2] == "ok"
        # What was read before is still told, with its age; the rest can't be.
        _, status = await site.ask("/status")
        assert status["last_run"]["status"] == "succeeded"
        assert status["recorded_age_s"] > 0
        for path in ("/runs", "/stats", f"/runs/{uuid4()}"):
            code, refused = await site.ask(path)
            assert (code, refused["error"]["code"]) == (503, "unavailable")


async def test_health_of_a_daemon_that_never_heard_of_postgres(redis_url: str) -> None:
    async with Site.on("postgresql://postgres@127.0.0.1:1/postgres", redis_url) as site:
        code, document = await site.ask("/health")
        assert (code, document["status"]) == (503, "unhealthy")
        said = {name: check["status"] for name, check in document["checks"].items()}
        assert said == {
            **dict.fromkeys(("redis", "guard", "postponed"), "ok"),
            **dict.fromkeys(("postgres", "schema"), "failed"),
            **dict.fromkeys(("lock", "last_success", "refusal", "rejects"), "degraded"),
        }


async def test_health_while_a_refusal_stands(site: Site, redis: Redis, keys: None) -> None:
    await site.sync()
    await redis.flushall()
    assert (await site.sync()).status == "refused"
    code, verdict, check, detail = await health_of(site, "refusal")
    assert (code, verdict, check) == (200, "degraded", "degraded")
    assert 'mapping "balances": Redis has no key at all, but 501 were known' in detail
    _, status = await site.ask("/status")
    assert status["refusal"][0]["mapping"] == "balances"
    assert status["last_run"]["status"] == "refused"
    # The way out of it.
    code, run = await site.ask("/force-sync?wait=true&accept_loss=true", "POST")
    assert (code, run["status"], run["absent"]) == (200, "succeeded", 500)
    assert (await site.ask("/status"))[1]["refusal"] is None


async def test_health_with_too_many_rejects(
    postgres_dsn: str, redis_url: str, redis: Redis
) -> None:
    await redis.mset({"balance:1": "1", "balance:2": "x"})
    async with Site.on(postgres_dsn, redis_url, guard={"max_rejects": 0.4}) as site:
        await site.sync()
        code, verdict, check, detail = await health_of(site, "rejects")
    assert (code, verdict, check) == (200, "degraded", "degraded")
    assert "guard.max_rejects = 0.4" in detail


async def test_health_with_live_that_is_not_up(
    postgres_dsn: str, redis_url: str, redis: Redis
) -> None:
    async with Site.on(postgres_dsn, redis_url, live={"enabled": True}) as site:
        assert (await health_of(site, "live"))[1:] == ("degraded", "degraded", "off")
        site.state.live = "up"
        assert (await health_of(site, "live"))[2:] == ("ok", "up")


async def test_health_when_the_last_success_is_overdue(site: Site, pg: asyncpg.Connection) -> None:
    await site.sync()
    old = timedelta(hours=2, minutes=1)
    await pg.execute("UPDATE balancesync.runs SET finished_at = finished_at - $1::interval", old)
    await site.ask("/clear-cache", "DELETE")
    # However young the daemon is.
    code, verdict, check, detail = await health_of(site, "last_success")
    assert (code, verdict, check) == (503, "unhealthy", "failed")
    assert "more than two intervals" in detail
    # A standby and one that drains are none to be replaced for that.
    site.state.leader, site.state.leader_name = False, "there:2"
    assert (await health_of(site, "last_success"))[:3] == (200, "degraded", "failed")
    site.state.leader = True
    site.state.draining = True
    assert (await health_of(site, "last_success"))[0] == 200


async def test_health_before_a_first_success_is_not_waited_for_forever(site: Site) -> None:
    site.state.started_at -= timedelta(hours=3)
    assert (await health_of(site, "last_success"))[:3] == (503, "unhealthy", "failed")


async def test_nobody_waits_for_a_postgres_that_hangs(
    redis_url: str, private_postgres: Callable[..., PostgresServer]
) -> None:
    server = private_postgres()
    async with Site.on(server.dsn, redis_url) as site:
        await site.sync()
        assert (await site.ask("/status"))[1]["last_run"] is not None
        site.events.publish("run_finished", json.loads(json.dumps(site.heard[-1].document)))
        server.suspend()
        try:
            began = perf_counter()
            await site.ask("/status")
            assert perf_counter() - began < 1.5
            began = perf_counter()
            for _ in range(20):
                code, status = await site.ask("/status")
                assert (code, status["last_run"]["status"]) == (200, "succeeded")
            _, health = await site.ask("/health")
            assert perf_counter() - began < 1
            assert health["checks"]["schema"]["detail"] == "PostgreSQL didn't answer in 1 s"
        finally:
            server.resume()


@pytest.mark.usefixtures("keys")
async def test_health_while_somebody_locks_what_it_reads(
    site: Site, pg: asyncpg.Connection
) -> None:
    await site.sync()
    async with pg.transaction():
        await pg.execute("LOCK TABLE balancesync.runs IN ACCESS EXCLUSIVE MODE")
        await site.ask("/clear-cache", "DELETE")
        code, verdict, check, detail = await health_of(site, "schema")
    assert (code, verdict, check) == (200, "degraded", "degraded")
    assert detail == "PostgreSQL didn't answer in 1 s"


async def test_health_while_others_have_the_whole_pool(postgres_dsn: str, redis_url: str) -> None:
    one = {"pool_size": 1}
    async with Site.on(postgres_dsn, redis_url, postgres=one) as site, site.database.acquire():
        assert (await health_of(site, "schema"))[::2] == (200, "ok")


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("keys")
async def test_force_sync(site: Site, pg: asyncpg.Connection) -> None:
    code, accepted = await site.ask("/force-sync", "POST")
    assert (code, accepted["state"]) == (202, "started")
    # The second joins the first, which hasn't read a key yet.
    code, run = await site.ask("/force-sync?wait=true", "POST")
    assert (code, run["id"], run["status"]) == (200, accepted["run_id"], "succeeded")
    assert (run["trigger"], run["inserted"], await count_rows(pg)) == ("http", 500, 500)
    code, same = await site.ask(f"/runs/{run['id']}")
    assert (code, {**same, "progress": None}) == (200, {**run, "progress": None})


@pytest.mark.usefixtures("keys")
async def test_dry_run_changes_nothing_and_says_what_would(
    site: Site, pg: asyncpg.Connection
) -> None:
    code, run = await site.ask("/force-sync?wait=true&dry_run=true", "POST")
    assert (code, run["mode"], run["inserted"], await count_rows(pg)) == (200, "dry_run", 500, 0)
    [report] = run["report"]
    assert report["totals"] == {"balance": "750.0"}
    assert report["rows"][0]["new"] == {"balance": "1.50"}
    assert (await site.ask(f"/runs/{run['id']}"))[1]["report"] == run["report"]
    assert "report" not in (await site.ask("/runs"))[1]["runs"][0]


async def test_one_mapping_alone(
    postgres_dsn: str, redis_url: str, redis: Redis, keys: None
) -> None:
    await redis.set("other:1", "1")
    other = {"name": "other", "key": "other:{user_id}", "table": "others"}
    async with Site.on(postgres_dsn, redis_url, {"name": "balances"}, other) as site:
        _, run = await site.ask("/force-sync?wait=true&mapping=other", "POST")
        assert (run["mapping"], run["inserted"]) == ("other", 1)
        code, document = await site.ask("/force-sync?mapping=none", "POST")
        assert (code, document["error"]["code"]) == (422, "invalid_parameter")
        assert "balances, other" in document["error"]["message"]


BAD_QUERIES = (
    *("/force-sync?dryrun=true", "/force-sync?wait=yes", "/force-sync?wait=true&wait=true"),
    *("/force-sync?mapping=", "/force-sync?wait", "/force-sync?%ff", "/clear-cache?x=1"),
    *("/runs?limit=0", "/runs?limit=1001", "/runs?limit=-1", "/runs?limit=1e2"),
    *("/runs?before=7", "/rejects?reason=none", "/rejects?mapping=none", "/status?x=1"),
    *("/schedule?x", "/stats?x=1", "/events?last=1", "/runs?limit=%D9%A1"),
)


async def test_a_parameter_that_is_not_valid_starts_nothing(site: Site) -> None:
    methods = {"/force-sync": "POST", "/clear-cache": "DELETE"}
    for path in BAD_QUERIES:
        method = methods.get(path.partition("?")[0], "GET")
        code, document = await site.ask(path, method)
        assert (code, document["error"]["code"]) == (422, "invalid_parameter"), path
    assert site.runner.current is None
    assert not site.runner.queued


async def test_hanging_up_on_a_run_cancels_nothing(slow: Site) -> None:
    waiting = asyncio.create_task(slow.ask("/force-sync?wait=true", "POST"))
    await slow.event("run_progress")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await slow.ask("/status")
    current = slow.runner.current
    assert current is not None
    assert not current.done.done()
    # It still ends in its own way, and only when it's told to.
    assert (await slow.ask(f"/runs/{current.run.id}", "DELETE"))[0] == 202
    assert (await asyncio.shield(current.done)).status == "cancelled"


async def test_cancelling(slow: Site) -> None:
    _, first = await slow.ask("/force-sync", "POST")
    await slow.event("run_progress")
    _, second = await slow.ask("/force-sync?dry_run=true", "POST")
    code, document = await slow.ask(f"/runs/{second['run_id']}", "DELETE")
    assert (code, document["state"]) == (202, "cancelled")
    code, document = await slow.ask(f"/runs/{first['run_id']}", "DELETE")
    assert (code, document["state"]) == (202, "cancelling")
    for run in (first, second):
        while (found := (await slow.ask(f"/runs/{run['run_id']}"))[1])["status"] == "running":
            slow.changed.clear()
            await slow.changed.wait()
        assert found["status"] == "cancelled"
        code, document = await slow.ask(f"/runs/{run['run_id']}", "DELETE")
        assert (code, document["error"]["code"]) == (409, "not_running")
    for unknown in (str(uuid4()), "7", "", "a/b"):
        for method in ("GET", "DELETE"):
            assert (await slow.ask(f"/runs/{unknown}", method))[0] == 404


async def test_runs_page_by_page(site: Site) -> None:
    made = [str((await site.sync(mode=mode)).id) for mode in ("apply", "dry_run") * 2]
    found: list[str] = []
    before = ""
    while True:
        _, page = await site.ask(f"/runs?limit=3{before}")
        if not page["runs"]:
            break
        assert len(page["runs"]) <= 3
        found += [run["id"] for run in page["runs"]]
        before = f"&before={found[-1]}"
    assert found == made[::-1]


@pytest.mark.parametrize("at_once", [1, 2, 3, 4, 5])
async def test_runs_are_read_in_pieces(
    site: Site, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    made = [str((await site.sync()).id) for _ in range(4)][::-1]
    site.web._facts.finished.clear()
    monkeypatch.setattr(api, "_AT_ONCE", at_once)
    for limit in (1, 3, 4, 100):
        _, page = await site.ask(f"/runs?limit={limit}")
        assert [run["id"] for run in page["runs"]] == made[:limit]


async def test_others_get_their_turn_while_a_long_answer_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listener, "_TURN_S", -1)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    answer = await listener.reply_rows("rows", ({"turns": turns} for _ in range(50)))
    task.cancel()
    assert isinstance(answer.body, bytes)
    rows = json.loads(answer.body)["rows"]
    assert [row["turns"] for row in rows] == list(range(50))
    assert (await listener.reply_rows("rows", [])).body == b'{"rows":[]}'


async def test_rejects(site: Site, redis: Redis) -> None:
    await redis.mset({"balance:1": "x", "balance:2": "1.505", "balance:3": "1", "balance:y": "1"})
    await site.sync()
    _, every = await site.ask("/rejects")
    assert {reject["key"] for reject in every["rejects"]} == {"balance:1", "balance:2", "balance:y"}
    _, some = await site.ask("/rejects?reason=too_many_decimals&mapping=balances&limit=10")
    [reject] = some["rejects"]
    assert (reject["key"], reject["value"], reject["healed_at"]) == ("balance:2", "1.505", None)
    assert len((await site.ask("/rejects?limit=1"))[1]["rejects"]) == 1


@pytest.mark.usefixtures("keys")
async def test_stats_and_clearing_them(site: Site, redis: Redis, pg: asyncpg.Connection) -> None:
    await site.sync()
    await redis.set("balance:1000", "7")
    await redis.set("balance:1001", "x")
    await site.sync()
    _, stats = await site.ask("/stats")
    total = {"job": "sync", "mode": "apply", "status": "succeeded", "runs": 2}
    assert [{**each, "seconds": 0} for each in stats["totals"]] == [{**total, "seconds": 0}]
    assert stats["since_start"]["totals"][0].items() >= total.items()
    assert stats["since_start"]["records"]["inserted"] == 501
    assert (len(stats["recent_runs"]), stats["last_runs"]) == (2, {"succeeded": 2})
    assert stats["rejects"] == {"balances": {"not_a_number": 1}}
    assert 0 < stats["durations"]["p50_s"] <= stats["durations"]["p95_s"]
    code, cleared = await site.ask("/clear-cache", "DELETE")
    assert (code, cleared) == (
        200,
        {"cleared": {"totals": 2, "status": True, "healed_rejects": 1, "live": False}},
    )
    _, stats = await site.ask("/stats")
    # For ever is for ever, and nothing was forgotten that is still so.
    assert stats["since_start"]["totals"] == []
    assert stats["since_start"]["records"]["inserted"] == 0
    assert stats["totals"][0]["runs"] == 2
    assert stats["rejects"] == {"balances": {"not_a_number": 1}}
    assert await pg.fetchval("SELECT count(*) FROM balancesync.rejects") == 1
    assert await count_rows(pg) == 501


async def test_clearing_without_postgres(redis_url: str) -> None:
    async with Site.on("postgresql://127.0.0.1:1/x", redis_url) as site:
        code, cleared = await site.ask("/clear-cache", "DELETE")
    assert (code, cleared["cleared"]["healed_rejects"]) == (200, None)


async def test_a_run_that_postgres_never_heard_of(redis_url: str) -> None:
    async with Site.on("postgresql://127.0.0.1:1/x", redis_url) as site:
        code, run = await site.ask("/force-sync?wait=true", "POST")
        assert (code, run["status"]) == (200, "postponed")
        assert (await site.ask(f"/runs/{run['id']}"))[1]["status"] == "postponed"
        _, status = await site.ask("/status")
        assert (status["last_run"]["id"], status["recorded_age_s"]) == (run["id"], None)


async def test_a_standby_changes_nothing_and_names_the_leader(site: Site) -> None:
    site.state.leader, site.state.leader_name = False, "there:2"
    asked = [("/force-sync", "POST"), ("/clear-cache", "DELETE"), (f"/runs/{uuid4()}", "DELETE")]
    for path, method in asked:
        code, document = await site.ask(path, method)
        assert (code, document["error"]["code"]) == (409, "standby")
        assert "there:2 leads" in document["error"]["message"]
    _, status = await site.ask("/status")
    assert (status["state"], status["leader"]) == ("standby", "there:2")


async def test_a_daemon_that_drains_starts_nothing(site: Site) -> None:
    site.state.draining = True
    code, document = await site.ask("/force-sync", "POST")
    assert (code, document["error"]["code"]) == (503, "stopping")
    assert (await site.ask("/status"))[1]["state"] == "draining"


# --- events ---------------------------------------------------------------------------------------


async def read_events(answer: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, Any]]:
    """The events of a stream, as (kind, document); a comment is ("", its text)."""
    kind = ""
    async for raw in answer.content:
        name, _, value = raw.decode().rstrip("\n").partition(": ")
        if name == "event":
            kind = value
        elif name == "data":
            yield kind, json.loads(value)
        elif raw.startswith(b":"):
            yield "", value


@pytest.mark.usefixtures("keys")
async def test_events_of_a_run(site: Site) -> None:
    kinds: list[str] = []
    async with site.client.get(f"{PREFIX}/events") as answer:
        assert answer.content_type == "text/event-stream"
        _, accepted = await site.ask("/force-sync?dry_run=true", "POST")
        async for kind, document in read_events(answer):
            if kind:
                kinds.append(kind)
            if kind == "run_finished":
                assert (document["id"], document["inserted"]) == (accepted["run_id"], 500)
                break
    assert kinds[:2] == ["run_queued", "run_started"]
    assert set(kinds[2:-1]) <= {"run_progress"}


async def test_a_silent_stream_has_heartbeats(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_HEARTBEAT_S", 0.02)
    async with site.client.get(f"{PREFIX}/events") as answer:
        found = [text async for _, text in _take(read_events(answer), 2)]
    assert found == ["still here"] * 2


async def _take(
    events: AsyncIterator[tuple[str, Any]], count: int
) -> AsyncIterator[tuple[str, Any]]:
    for _ in range(count):
        yield await anext(events)


async def test_a_reader_that_lags_is_dropped_and_harms_nobody(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_STALLED_S", 0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", site.config.http.port, limit=1024)
    writer.write(f"GET {PREFIX}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    await reader.readuntil(b"retry: 2000\n\n")
    async with site.client.get(f"{PREFIX}/events") as answer:
        good = read_events(answer)
        number = 0
        # The buffers of the kernel hold some megabytes; then the lagging one's time runs out.
        listening = len(site.events._readers)
        async with asyncio.timeout(15):
            while len(site.events._readers) == listening:
                number += 1
                site.events.publish("redis", {"text": "x" * 100_000, "number": number})
                kind, document = await anext(good)
                assert (kind, document["number"]) == ("redis", number)
    assert number > 1
    writer.close()


# --- start and stop -------------------------------------------------------------------------------


async def test_stopping_ends_streams_and_waiting_requests_at_once(
    postgres_dsn: str, redis_url: str, keys: None
) -> None:
    async with Site.on(postgres_dsn, redis_url, redis=SLOW) as site:
        async with site.client.get(f"{PREFIX}/events") as answer:
            waiting = asyncio.create_task(site.ask("/force-sync?wait=true", "POST"))
            await site.event("run_progress")
            began = perf_counter()
            await site.web.stop()
            code, document = await waiting
            assert (code, document["error"]["code"]) == (503, "stopping")
            await answer.content.read()
            assert perf_counter() - began < 1.5
        with pytest.raises(aiohttp.ClientConnectorError):
            await site.client.get("/livez")


async def test_a_port_that_is_taken(site: Site) -> None:
    other = Site(make_config("postgresql://h/d", "redis://h", http={"port": site.config.http.port}))
    with pytest.raises(ConfigError) as raised:
        await other.web.start()
    await other.web.stop()
    port = site.config.http.port
    assert str(raised.value).startswith(f"http.port {port} on 127.0.0.1 is taken: stop what")


async def test_a_host_that_is_not_ours() -> None:
    http = {"host": "192.0.2.1", "token": "t"}
    other = Site(make_config("postgresql://h/d", "redis://h", http=http))
    with pytest.raises(ConfigError, match=r"http\.port 8000 on 192\.0\.2\.1 can't be listened on"):
        await other.web.start()
    await other.web.stop()
