"""The status page in a real Chromium, on a real daemon and real servers, in each of its states."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import asyncpg
import pytest
import structlog
from browser import chromium, tab
from engine import USERS, waiting
from playwright.async_api import Browser, Route
from redis.asyncio import Redis
from running import Inside, daemon_config
from test_verdict import STATES

from balancesync import cli
from balancesync.config import Config
from balancesync.embedded import PostgresServer, RedisServer
from balancesync.model import new_run_id
from balancesync.verdict import judge

pytestmark = pytest.mark.slow

MOST_BYTES = 60_000
MARKUP = "<img src=x onerror=alert(1)>"
TEXT_KEYS: dict[str, Any] = {"columns": {"user_id": "text", "balance": "numeric(30,2)"}}


@pytest.fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as found:
        yield found


def address(config: Config) -> str:
    return f"http://127.0.0.1:{config.http.port}/"


async def typed(config: Config, *argv: str) -> int:
    """The exit code of a command."""
    return await asyncio.to_thread(cli.execute, argv, config)


async def test_before_the_first_run_and_after_it(
    browser: Browser, postgres_dsn: str, redis_url: str, redis: Redis
) -> None:
    config = daemon_config(postgres_dsn, redis_url)
    async with Inside(config) as daemon, tab(browser, address(config)) as page:
        await daemon.leads()
        await page.until("#verdict-title", "No sync has succeeded yet")
        await page.until("#connection", "Connected")
        # What nobody has looked at isn't known to be good.
        await page.until("#open", "unknown")
        await page.until("#rejects-none", "Not known yet")
        await page.look("empty")
        await redis.mset({f"balance:{n}": f"{n}.25" for n in range(1, 501)})
        await page.page.click("#sync")
        await page.until("#said", "Sync succeeded in")
        await page.until("#verdict-title", "Safe: everything up to")
        await page.until("#runs tbody", "succeeded")
        await page.look("first-run")


async def history(redis: Redis, daemon: Inside) -> None:
    """Two dozen runs in which this and that happens."""
    await redis.mset({f"balance:{n}": f"{n}.25" for n in range(1, 4_001)})
    for turn in range(24):
        moved = {f"balance:{n}": f"{n}.{turn:02}" for n in range(1, 40 + turn * 37 % 170)}
        added = {f"balance:{5_000 + turn * 100 + n}": "7" for n in range(turn * 13 % 50)}
        await redis.mset(moved | added)
        if turn == 20:
            await redis.mset({"balance:9001": "1.505", "balance:9002": "12,50", "balance:007": "1"})
        await daemon.api.sync()


async def test_a_day_like_any_other(
    browser: Browser, postgres_dsn: str, redis_url: str, redis: Redis
) -> None:
    jobs = {"hourly": {"cron": "0 * * * *", "job": "sync"}}
    config = daemon_config(postgres_dsn, redis_url, schedule={"jobs": jobs})
    async with Inside(config) as daemon:
        await daemon.leads()
        await history(redis, daemon)
        async with tab(browser, address(config)) as page:
            await page.until("#verdict-title", "is in PostgreSQL, but for 3 rejects")
            await page.until("#next", "in ")
            await page.until("#connection", "Connected")
            sent = await page.sent()
            assert sum(sent.values()) < MOST_BYTES, sent
            assert not [url for url in sent if not url.startswith(address(config))]
            print(f"{sum(sent.values()):,} bytes, painted at {await page.first_paint_ms():.0f} ms")
            await page.look("healthy")


async def test_a_server_that_is_down(
    browser: Browser,
    private_redis: Callable[..., RedisServer],
    private_postgres: Callable[..., PostgresServer],
) -> None:
    redis_server, postgres_server = (
        private_redis({"appendonly": "yes"}),
        private_postgres(durable=True),
    )
    config = daemon_config(postgres_server.dsn, redis_server.url)
    async with Inside(config) as daemon:
        await daemon.leads()
        async with Redis.from_url(redis_server.url) as redis:
            await redis.mset({f"balance:{n}": "1" for n in range(100)})
        await daemon.api.sync()
        async with tab(browser, address(config)) as page:
            await page.until("#verdict-title", "Safe: everything up to")
            await page.page.click("#sync")
            await page.until("#said", "Sync succeeded in")
            redis_server.kill()
            await page.until("#verdict-title", "Redis doesn't answer")
            # What went well a moment ago is no comfort.
            assert await page.text("#said") == ""
            await page.until("#verdict-detail", "balances are read from there")
            assert await page.page.get_attribute("#verdict", "data-level") == "bad"
            await page.look("redis-down")
            redis_server.start()
            await page.until("#redis", "up")
            postgres_server.kill()
            await page.until("#verdict-title", "PostgreSQL doesn't answer")
            # It was none, but who knows what the application has written since?
            await page.until("#open", "PostgreSQL can't tell now")
            await page.until("#rejects-none", "Not known: PostgreSQL can't tell now.")
            await page.look("postgres-down")
            # It's postponed before the answer to the request for it has come.
            await page.page.click("#sync")
            await page.until("#said", "Sync postponed, it starts by itself when it can: PostgreSQL")
            await page.page.wait_for_function(
                "document.getElementById('sync').getAttribute('aria-disabled') == 'false'"
            )
            assert "has started" not in await page.text("#said")
            redis_server.kill()
            await page.until("#verdict-title", "Neither PostgreSQL nor Redis answers")
            await page.until("#verdict-detail", "A sync starts when both are back")
        async with tab(browser, address(config)) as page:
            await page.until("#verdict-title", "Neither PostgreSQL nor Redis answers")
            await page.look("both-down-from-the-start")


async def test_tables_of_its_own_that_are_not_there(
    browser: Browser, postgres_dsn: str, redis_url: str, pg: asyncpg.Connection
) -> None:
    config = daemon_config(postgres_dsn, redis_url)
    async with Inside(config) as daemon:
        await daemon.leads()
        await pg.execute("DROP SCHEMA balancesync CASCADE")
        await daemon.api.until(
            "/status", lambda found: found["health"]["checks"]["schema"]["status"] == "failed"
        )
        async with tab(browser, address(config)) as page:
            await page.until("#verdict-title", "balancesync's own tables can't be read")
            await page.until("#verdict-detail", "balancesync init")
            await page.until("#connection", "Connected")
            await page.until("#open", "PostgreSQL hasn't told yet")
            await page.until("#rejects-none", "Not known yet")
            await page.look("no-tables")


async def test_live_mode(browser: Browser, postgres_dsn: str, redis_url: str, redis: Redis) -> None:
    config = daemon_config(postgres_dsn, redis_url, live={"enabled": True})
    await redis.mset({f"balance:{n}": "1" for n in range(100)})
    async with Inside(config) as daemon, tab(browser, address(config)) as page:
        await daemon.log.next("live", state="up")
        await page.until("#live", "up")
        await page.until("#verdict-title", "what changes follows live")
        await redis.set("balance:7", "8.5")
        await page.until("#live", "The last changes took")
        # Its runs, one a minute, would hide the others.
        assert await page.page.locator("#runs tbody tr").count() == 1
        await page.look("live")


async def test_what_the_guard_refused(
    browser: Browser, postgres_dsn: str, redis_url: str, redis: Redis
) -> None:
    config = daemon_config(postgres_dsn, redis_url)
    async with Inside(config) as daemon, tab(browser, address(config)) as page:
        await daemon.leads()
        await redis.mset({f"balance:{n}": "1" for n in range(1000)})
        await daemon.api.sync()
        await redis.flushdb()
        await page.page.click("#sync")
        await page.until("#verdict-title", "the guard refuses to follow Redis")
        await page.until("#refused", "balances: Redis has no key at all, but 1,000 were known.")
        assert "balancesync sync --accept-loss" in await page.text("#refusal")
        assert "Stop the application" in await page.text("#refusal")
        assert await page.page.is_hidden("#changed")
        await page.until("#runs tbody", "refused")
        await page.look("refused")
        # The application has begun them again.
        await redis.mset({f"balance:{n}": "2" for n in range(900)})
        await daemon.api.sync()
        await page.until("#refused", "came back changed")
        await page.until("#changed", "--overwrite")
        await page.look("refused-came-back")


async def test_what_the_guard_refused_on_another_redis(
    browser: Browser,
    postgres_dsn: str,
    redis_url: str,
    redis: Redis,
    private_redis: Callable[..., RedisServer],
) -> None:
    config = daemon_config(postgres_dsn, redis_url)
    async with Inside(config) as daemon, tab(browser, address(config)) as page:
        await daemon.leads()
        await redis.mset({f"balance:{n}": "1" for n in range(1000)})
        await daemon.api.sync()
        await page.until("#verdict-title", "Safe: everything up to")
        wrong = daemon_config(postgres_dsn, private_redis().url)
        assert await typed(wrong, "sync") == 3
        await page.until("#verdict-title", "a sync was refused on another Redis")
        said = "no key at all, but 1,000 were known"
        await page.until("#verdict-detail", said)
        assert "are redis.url and the key template right" in await page.text("#verdict-detail")
        assert await page.page.get_attribute("#verdict", "data-level") == "warn"
        # Nothing is refused here, and so nothing is to be brought back or accepted.
        assert await page.page.is_hidden("#refusal")
        await page.look("refused-elsewhere")
        # It stands there alone: here a sync goes on, and its success forgets the other's refusal.
        await redis.set("balance:1", "2")
        assert (await daemon.api.sync())["updated"] == 1
        await page.until("#verdict-title", "Safe: everything up to")


async def test_a_redis_without_any_balance_is_not_called_safe(
    browser: Browser, postgres_dsn: str, redis_url: str, redis: Redis
) -> None:
    config = daemon_config(postgres_dsn, redis_url)
    async with Inside(config) as daemon, tab(browser, address(config)) as page:
        await daemon.leads()
        assert (await daemon.api.sync())["status"] == "succeeded"
        await page.until("#verdict-title", "Redis had no key of balances at ")
        assert await page.page.get_attribute("#verdict", "data-level") == "warn"
        await page.look("without-keys")
        await redis.set("balance:1", "1")
        await daemon.api.sync()
        await page.until("#verdict-title", "Safe: everything up to")


async def test_drift_shows_until_somebody_has_looked_again(
    browser: Browser, postgres_dsn: str, redis_url: str, redis: Redis
) -> None:
    config = daemon_config(postgres_dsn, redis_url)
    await redis.mset({f"balance:{n}": "1" for n in range(100)})
    async with Inside(config) as daemon, tab(browser, address(config)) as page:
        await daemon.leads()
        await daemon.api.sync()
        await page.until("#verdict-title", "Safe: everything up to")
        await redis.mset({"balance:1": "2", "balance:2": "2"})
        assert await typed(config, "verify") == 1
        # A slip is no reason to look.
        assert await typed(config, "restore", "--as-of", "2020-01-01T00:00:00Z") == 1
        await page.until("#verdict-title", "the last verify found that 2 rows differ from Redis")
        assert "restore" not in await page.text("#verdict-detail")
        assert await page.page.get_attribute("#verdict", "data-level") == "warn"
        await page.until("#runs tbody", "drift found")
        await page.until("#runs tbody", "Drift: 2 rows differ between Redis and PostgreSQL")
        await page.look("drift")
        await daemon.api.sync()
        await page.until("#verdict[data-level=ok]", "Safe: everything up to")


# What an element says, with each time as it was sent.
AS_SENT = """id => {
    const copy = document.getElementById(id).cloneNode(true);
    copy.querySelectorAll("time").forEach(each => each.replaceWith(each.dateTime));
    return copy.textContent;
}"""
LEVELS = {"safe": "ok", "wait": "wait", "look": "warn", "act": "bad"}


async def test_each_verdict_is_shown_as_it_is(
    browser: Browser, postgres_dsn: str, redis_url: str, redis: Redis
) -> None:
    config = daemon_config(postgres_dsn, redis_url)
    await redis.set("balance:1", "1")
    async with Inside(config) as daemon, tab(browser, address(config)) as page:
        await daemon.leads()
        await daemon.api.sync()
        document = await daemon.api.document("/status")

        async def answer(route: Route) -> None:
            await route.fulfill(json=document)

        await page.page.route("**/sync-management/status", answer)
        for now, level, line in STATES.values():
            found = judge(now)
            document["verdict"] = found.document()
            await page.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
            detail = " ".join(found.advice).replace("`", "")
            await page.page.wait_for_function(
                f"([title, detail]) => ({AS_SENT})('verdict-title') === title"
                f" && ({AS_SENT})('verdict-detail') === detail",
                arg=[f"{line[0].upper()}{line[1:]}", detail],
            )
            assert await page.page.get_attribute("#verdict", "data-level") == LEVELS[level]


async def test_the_counts_of_a_restore_are_keys_and_in_no_chart(
    browser: Browser, postgres_dsn: str, redis_url: str, redis: Redis
) -> None:
    config = daemon_config(postgres_dsn, redis_url)
    await redis.mset({f"balance:{n}": "1" for n in range(100)})
    async with Inside(config) as daemon, tab(browser, address(config)) as page:
        await daemon.leads()
        await daemon.api.sync()
        await redis.delete("balance:1", "balance:2")
        assert await typed(config, "restore") == 0
        await page.until("#verdict-title", "Safe: everything up to")
        await page.until("#runs tbody", "The counts are keys in Redis, not rows")
        await page.page.wait_for_selector("#durations[aria-label^='Durations of the last 1 ']")
        await page.look("restored")


async def test_the_focus_stays_where_rejects_are_drawn_anew(
    browser: Browser, postgres_dsn: str, redis_url: str, redis: Redis
) -> None:
    config = daemon_config(postgres_dsn, redis_url)
    await redis.mset({f"balance:{n}": "1" for n in range(100)})
    await redis.mset({"balance:1": "x", "balance:2": "1.505"})
    async with Inside(config) as daemon, tab(browser, address(config)) as page:
        await daemon.leads()
        await daemon.api.sync()
        samples = "[aria-label='Samples of too_many_decimals in balances']"
        await page.page.click(samples)
        await page.until("#samples-title", "too_many_decimals in balances: all 1, as of ")
        await page.page.focus(samples)
        await redis.set("balance:1", "1")
        await daemon.api.sync()
        await page.until("#open", "too_many_decimals")
        held = "chosen => document.activeElement.matches(chosen)"
        assert await page.page.evaluate(held, samples)
        await page.page.wait_for_selector("#samples", state="visible")
        await redis.set("balance:2", "1")
        await daemon.api.sync()
        await page.page.wait_for_selector("#samples", state="hidden")
        assert await page.focused() == "rejects-title"


async def test_a_standby(browser: Browser, postgres_dsn: str, redis_url: str) -> None:
    first, second = (daemon_config(postgres_dsn, redis_url) for _ in range(2))
    async with Inside(first) as leader:
        await leader.leads()
        other = Inside(second)
        other.daemon.state.name = "host-b:7"
        async with other, tab(browser, address(second)) as page:
            await other.log.next("leader", leads=False)
            await page.until("#state", "standby")
            await page.until("#host", f"host-b:7; {leader.daemon.state.name} leads and runs")
            await page.until("#next", "none planned")
            assert await page.page.is_disabled("#sync")
            await page.until("#off", f"{leader.daemon.state.name} leads, ask there.")
            await page.look("standby")


async def test_a_hundred_thousand_rejects(
    browser: Browser, postgres_dsn: str, redis_url: str, redis: Redis
) -> None:
    # At debug each of them is logged.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    config = daemon_config(postgres_dsn, redis_url, guard={"max_rejects": 0.1})
    async with Inside(config) as daemon:
        await daemon.leads()
        await redis.mset({f"balance:{n}": "1" for n in range(1000)})
        await daemon.api.sync()
        bad = ("1.505", "12,50", "99999999999999999999999")
        await redis.mset({f"balance:{n}": bad[n % 7 % 3] for n in range(1000, 101_000)})
        await daemon.api.sync()
        async with tab(browser, address(config)) as page:
            await page.until("#open", "100,000")
            await page.until("#verdict-title", "Not safe: 100,000 records can't be stored")
            assert await page.page.get_attribute("#verdict", "data-level") == "bad"
            await page.until("#verdict-detail", "more than guard.max_rejects")
            await page.page.click("#rejects button >> nth=0")
            await page.until("#samples-title", "the newest 20 of")
            await page.until("#samples", "balancesync rejects --mapping balances --reason")
            await page.look("many-rejects")


async def test_keys_without_a_row_are_no_part_of_what_is_safe(
    browser: Browser, postgres_dsn: str, redis_url: str, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute(
        "CREATE TABLE users (telegram_id bigint PRIMARY KEY, balance bigint, sync_at timestamptz)"
    )
    await pg.execute("INSERT INTO users VALUES (1, 0)")
    await redis.mset({"1": "10", "2": "20", "3": "30"})
    config = daemon_config(postgres_dsn, redis_url, USERS)
    async with Inside(config) as daemon, tab(browser, address(config)) as page:
        await daemon.leads()
        await daemon.api.sync()
        assert (await daemon.api.document("/status"))["not_found"] == 2
        await page.until("#verdict-title", "is in PostgreSQL, but for 2 keys without a row")


async def test_a_run_under_way_and_its_cancel(
    browser: Browser, postgres_dsn: str, redis_url: str, redis: Redis
) -> None:
    limit = {"max_keys_per_second": 4000, "scan_count": 500}
    config = daemon_config(postgres_dsn, redis_url, redis=limit)
    await redis.mset({f"balance:{n}": "1" for n in range(40_000)})
    async with Inside(config) as daemon, tab(browser, address(config)) as page:
        await daemon.leads()
        await page.until("#connection", "Connected")
        await page.page.click("#sync")
        await page.until("#far", "left")
        assert await page.page.get_attribute("#bar", "value") is not None
        await page.look("running")
        await page.page.focus("#cancel")
        await page.page.keyboard.press("Enter")
        await page.until("#said", "Sync cancelled in")
        await page.until("#runs tbody", "cancelled on demand")
        # What it had read isn't known any more, and isn't nothing.
        assert await page.text("#runs tbody tr >> nth=0 >> td >> nth=3") == "\N{EN DASH}"
        await page.page.wait_for_selector("#current", state="hidden")
        assert await page.focused() == "sync"


async def test_a_daemon_that_is_told_to_stop_while_a_run_is_under_way(
    browser: Browser, postgres_dsn: str, redis_url: str, redis: Redis, pg: asyncpg.Connection
) -> None:
    jobs = {"hourly": {"cron": "0 * * * *", "job": "sync"}}
    config = daemon_config(
        postgres_dsn, redis_url, postgres={"lock_timeout": 60.0}, schedule={"jobs": jobs}
    )
    await redis.mset({f"balance:{n}": "1" for n in range(100)})
    async with Inside(config) as daemon, tab(browser, address(config)) as page:
        await daemon.leads()
        await daemon.api.sync()
        await redis.mset({f"balance:{n}": "2" for n in range(100)})
        async with pg.transaction():
            # The batch under way waits for it.
            await pg.execute("SELECT FROM balances WHERE user_id = 7 FOR UPDATE")
            await page.page.click("#sync")
            await page.until("#current", "Under way: sync, over HTTP")
            await page.until("#next", "in ")
            await waiting(pg, 1)
            daemon.daemon.stop()
            # As when somebody comes back to the tab: it asks at once, else every five seconds.
            await page.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
            await page.until("#state", "draining")
            await page.until("#verdict-detail", "its run ends with the batch under way, and")
            await page.until("#next", "none: it is stopping")
            for button in ("#sync", "#dry", "#cancel"):
                assert await page.page.is_disabled(button)
            await page.look("draining")
        await page.until("#verdict-title", "Connection lost: the daemon was stopping")
        assert await pg.fetchval("SELECT sum(balance) FROM balances") == 200


async def test_a_dry_run_shows_exact_texts_and_no_markup(
    browser: Browser, postgres_dsn: str, redis_url: str, redis: Redis
) -> None:
    config = daemon_config(postgres_dsn, redis_url, TEXT_KEYS)
    amount = "9007199254740993.07"  # no JavaScript number
    async with Inside(config) as daemon, tab(browser, address(config)) as page:
        await daemon.leads()
        await redis.mset({f"balance:{n}": "1" for n in range(20)})
        await daemon.api.sync()
        await redis.mset(
            {f"balance:{MARKUP}": amount, "balance:1": "2.5", "balance:bad": f"\u202e{MARKUP}"}
        )
        await page.page.click("#dry")
        await page.until("#found-title", "What a sync would do")
        await page.until("#found-body", amount)
        cells = await page.page.locator("#found-body td").all_inner_texts()
        assert MARKUP in cells
        assert "1.00 → 2.50" in cells
        total = "9007199254740994.57"
        assert f"would change by +{total}." in await page.text("#found-body")
        assert await page.focused() == "found-title"
        await page.look("dry-run")
        await daemon.api.sync()
        # What has been written is no difference any more.
        await page.page.wait_for_selector("#found", state="hidden")
        assert await page.page.evaluate("document.activeElement.id") == "dry"
        await page.page.click("#rejects button")
        await page.until("#samples tbody", f"\\u202e{MARKUP}")
        await page.until("#samples-title", "all 1")
        assert await page.page.is_hidden("#samples-all")
        assert await page.page.locator("main img").count() == 0
        assert page.said == []


async def test_the_token_is_asked_for_once_and_kept_for_the_tab(
    browser: Browser, postgres_dsn: str, redis_url: str, redis: Redis
) -> None:
    config = daemon_config(postgres_dsn, redis_url, http={"token": "s3cret"})
    await redis.set("balance:1", "1")
    async with Inside(config) as daemon, tab(browser, address(config)) as page:
        await daemon.leads()
        await page.until("#connection", "Connected")
        await page.page.focus("#sync")
        await page.page.keyboard.press("Enter")
        await page.page.wait_for_selector("dialog[open]")
        await page.look("token")
        await page.page.keyboard.press("Escape")
        await page.page.wait_for_selector("dialog", state="hidden")
        assert await page.focused() == "sync"
        assert daemon.runner.current is None
        assert await page.page.evaluate("sessionStorage.length") == 0
        await page.page.click("#sync")
        await page.page.fill("#token-field", "wrong")
        await page.page.keyboard.press("Enter")
        await page.until("#token-wrong", "That isn't the token.")
        assert len(page.said) == 1  # the browser's own line on a 401
        await page.page.fill("#token-field", "s3cret")
        await page.page.keyboard.press("Enter")
        await page.until("#said", "Sync succeeded")
        await page.page.click("#dry")
        await page.until("#found-title", "What a sync would do")
        assert await page.page.evaluate("localStorage.length") == 0
        assert "s3cret" not in await page.page.content()
        # The daemon has another one since: nobody has typed anything wrong.
        await page.page.evaluate("sessionStorage.setItem('balancesync.token', 'older')")
        await page.page.click("#sync")
        await page.page.wait_for_selector("dialog[open]")
        assert await page.text("#token-wrong") == ""


async def test_a_lost_connection_shows_and_heals(
    browser: Browser, postgres_dsn: str, redis_url: str, redis: Redis
) -> None:
    config = daemon_config(postgres_dsn, redis_url)
    await redis.set("balance:1", "1")
    async with Inside(config) as daemon, tab(browser, address(config)) as page:
        await daemon.leads()
        await daemon.api.sync()
        await page.until("#verdict-title", "Safe")
        await page.until("#connection", "Connected")
        # Before the daemon has answered, nothing is told.
        markup = await (await page.page.request.get(address(config))).text()
        assert "Nothing has run yet" not in markup
        assert "None: every record" not in markup
        await daemon.stop()
        await page.until("#verdict-title", "Connection lost")
        assert await page.page.is_disabled("#sync")
        # What was last heard is told as that, and as nothing more.
        for tile in ("#redis", "#postgres", "#live", "#open"):
            assert " as of " in await page.text(tile)
            assert await page.text(f"{tile} span") == "unknown"
        assert await page.text("#state") == await page.text("#next") == "unknown"
        assert "Safe" not in await page.text("#verdict")
        assert await page.page.is_hidden("#current")
        # The browser's own lines.
        await page.look("connection-lost", despite="net::ERR_")
        async with Inside(config) as again:
            await again.leads()
            await again.api.sync()
            await page.until("#verdict-title", "Safe")
            await page.until("#connection", "Connected")
            await page.until("#runs tbody tr >> nth=1", "sync")


def a_run(daemon: Inside, model: dict[str, Any]) -> None:
    """Tell of a run from its request to its end, by ten events, though there is none."""
    run = model | {"id": str(new_run_id())}
    publish = daemon.daemon.events.publish
    publish("run_queued", run | {"status": "queued"})
    publish("run_started", run | {"status": "running"})
    for done in range(7):
        progress = {"phase": "scan", "mapping": "balances", "done": done, "total": 7, "ratio": 0.5}
        publish("run_progress", progress | {"run_id": run["id"]})
    publish("run_finished", run | {"scanned": 1_000_000, "updated": 17})


async def test_a_day_of_events_leaves_its_memory_flat(
    browser: Browser, postgres_dsn: str, redis_url: str, redis: Redis
) -> None:
    config = daemon_config(postgres_dsn, redis_url)
    await redis.set("balance:1", "1")
    async with Inside(config) as daemon, tab(browser, address(config)) as page:
        await daemon.leads()
        await daemon.api.sync()
        [model] = daemon.log.all("run_finished")
        await page.until("#connection", "Connected")

        async def runs(number: int) -> None:
            for turn in range(number):
                a_run(daemon, model)
                # A reader that lags by 1,000 events is dropped.
                if turn % 10 == 9:
                    await daemon.api.document("/status")
            last = model | {"id": str(new_run_id()), "status": "failed", "error": f"after {number}"}
            daemon.daemon.events.publish("run_finished", last)
            await page.until("#runs tbody", f"after {number}")

        await runs(50)
        before = await page.footprint()
        # With the others some 12,000 events: if each left 25 bytes, that would show.
        await runs(1_000)
        await runs(151)
        after = await page.footprint()
        print(before, after)
        assert after.nodes <= before.nodes + 50
        assert after.listeners <= before.listeners + 5
        assert after.heap < before.heap + 300_000
        assert page.said == []
