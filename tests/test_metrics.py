"""The metrics: their names and labels, and what events and PostgreSQL's memory do to them."""

import asyncio
import math
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from redis.asyncio import Redis
from running import Inside, daemon_config, free_port

from balancesync import probing
from balancesync.documents import run_document
from balancesync.embedded import RedisServer
from balancesync.metrics import Metrics
from balancesync.model import Counts, Known, Run, new_run_id

NAMES = {
    *("runs_total", "run_duration_seconds", "records_total", "errors_total", "redis_up"),
    *("postgres_up", "leader", "last_success_timestamp_seconds", "next_run_timestamp_seconds"),
    *("run_in_progress", "run_progress_ratio", "rejects", "drift_records", "guard_refused"),
    *("live_up", "live_pending_keys", "live_lag_seconds", "expiring_keys"),
    *("redis_evicted_keys_total", "build_info"),
    # beside those that were promised
    *("planned_interval_seconds", "redis_may_evict"),
}
AT = datetime(2026, 1, 31, 2, tzinfo=UTC)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("1.2.3", ["balances", "bonus"], ["sync", "verify"], live=True)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    """A sample's value, None if there's no such sample."""
    return metrics.registry.get_sample_value(f"balancesync_{name}", labels)


def finished(**changes: Any) -> dict[str, Any]:
    """The event of a run that ended."""
    run = Run(
        id=new_run_id(),
        job="sync",
        trigger="cron:hourly",
        mode="apply",
        status="succeeded",
        started_at=AT,
        finished_at=AT,
        duration_s=3.5,
        mappings={"balances": Counts(scanned=10, inserted=4, unchanged=5, rejected=1)},
    )
    return run_document(run) | changes


def test_the_names_are_those_that_are_promised(metrics: Metrics) -> None:
    metrics.evicted, metrics.may_evict = 0, False
    metrics.set_schedule(lambda: 10, lambda: 3600)
    metrics.remember(Known())
    page = metrics.render().decode()
    assert set(re.findall(r"^# HELP balancesync_(\w+) ", page, re.MULTILINE)) == NAMES
    assert 'balancesync_build_info{version="1.2.3"} 1.0' in page
    assert "_created" not in page


def test_runs_and_records_are_counted(metrics: Metrics) -> None:
    for _ in range(2):
        metrics.take("run_finished", finished())
    labels = {"job": "sync", "trigger": "cron:hourly", "status": "succeeded"}
    assert value(metrics, "runs_total", **labels) == 2
    assert value(metrics, "run_duration_seconds_sum", job="sync") == 7
    assert value(metrics, "run_duration_seconds_bucket", job="sync", le="2.5") == 0
    assert value(metrics, "records_total", mapping="balances", outcome="inserted") == 8
    assert value(metrics, "records_total", mapping="balances", outcome="rejected") == 2


def test_series_are_there_before_their_first_event(metrics: Metrics) -> None:
    assert value(metrics, "records_total", mapping="bonus", outcome="updated") == 0
    assert value(metrics, "run_duration_seconds_count", job="verify") == 0


def test_a_dry_run_writes_no_records(metrics: Metrics) -> None:
    metrics.take("run_finished", finished(mode="dry_run"))
    assert value(metrics, "records_total", mapping="balances", outcome="inserted") == 0


def test_an_error_is_counted_by_its_kind(metrics: Metrics) -> None:
    metrics.take("run_finished", finished(status="refused", error_kind="Refused"))
    assert value(metrics, "errors_total", kind="Refused") == 1


def test_a_run_under_way_shows(metrics: Metrics) -> None:
    run = finished()
    metrics.take("run_started", run)
    metrics.take("run_progress", {"ratio": 0.25})
    # Another is cancelled while it waits.
    metrics.take("run_finished", finished(status="cancelled"))
    assert value(metrics, "run_in_progress") == 1
    assert value(metrics, "run_progress_ratio") == 0.25
    metrics.take("run_finished", run)
    assert value(metrics, "run_in_progress") == 0


def test_servers_and_leader_follow_their_events(metrics: Metrics) -> None:
    for kind, document in (
        ("redis", {"connected": True}),
        ("postgres", {"connected": False}),
        ("leader", {"leads": True}),
    ):
        metrics.take(kind, document)
    assert value(metrics, "redis_up") == 1
    assert value(metrics, "postgres_up") == 0
    assert value(metrics, "leader") == 1


def test_what_postgres_remembers_shows_after_a_restart(metrics: Metrics) -> None:
    known = Known(
        last_success={"sync": 1_700_000_000.5},
        rejects={"balances": 7},
        drift={"balances": 2},
        refused=True,
    )
    metrics.remember(known)
    assert value(metrics, "last_success_timestamp_seconds", job="sync") == 1_700_000_000.5
    assert value(metrics, "rejects", mapping="balances") == 7
    assert value(metrics, "rejects", mapping="bonus") == 0
    assert value(metrics, "drift_records", mapping="balances") == 2
    assert value(metrics, "drift_records", mapping="bonus") is None
    assert value(metrics, "guard_refused") == 1
    metrics.remember(Known())
    assert value(metrics, "rejects", mapping="balances") == 0
    assert value(metrics, "guard_refused") == 0


def test_what_is_not_known_is_not_told() -> None:
    metrics = Metrics("1.2.3", ["balances"], ["sync"])
    page = metrics.render().decode()
    for name in (
        *("rejects", "drift_records", "guard_refused", "last_success_timestamp_seconds"),
        *("expiring_keys", "redis_evicted_keys_total", "redis_may_evict"),
        *("next_run_timestamp_seconds", "planned_interval_seconds"),
        # Nobody asked for live mode, so it isn't down.
        *("live_up", "live_pending_keys", "live_lag_seconds_count"),
    ):
        assert f"\nbalancesync_{name}" not in page


def test_the_schedule_is_asked_at_each_scrape(metrics: Metrics) -> None:
    times = iter([10.0, 20.0])
    metrics.set_schedule(lambda: next(times), lambda: 3600)
    assert value(metrics, "planned_interval_seconds") == 3600
    assert b"balancesync_next_run_timestamp_seconds 20.0" in metrics.render()


def test_a_schedule_without_syncs_has_no_interval(metrics: Metrics) -> None:
    metrics.set_schedule(lambda: None, lambda: math.inf)
    assert value(metrics, "planned_interval_seconds") is None
    assert value(metrics, "next_run_timestamp_seconds") is None


def test_who_leads_no_more_takes_no_samples_and_shows_none(metrics: Metrics) -> None:
    metrics.expiring.labels("balances").set(9)
    assert value(metrics, "expiring_keys", mapping="balances") == 9
    metrics.take("leader", {"leads": False})
    assert value(metrics, "expiring_keys", mapping="balances") is None


def test_evicted_keys_are_as_redis_counts_them(metrics: Metrics) -> None:
    metrics.evicted = 7
    assert value(metrics, "redis_evicted_keys_total") == 7
    metrics.evicted = 2
    assert value(metrics, "redis_evicted_keys_total") == 2


@pytest.fixture
def _probed_often(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_REFRESH_S", "_CALM_S"):
        monkeypatch.setattr(probing, name, 0.05)


@pytest.mark.usefixtures("_probed_often")
async def test_how_many_keys_expire_is_a_share_of_the_mapping_s_own(
    redis: Redis, redis_url: str, postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "_SAMPLE_KEYS", 20)
    # Of other keys there are many more than of those with a bare id.
    await redis.mset({f"cache:{number}": "x" for number in range(500)})
    for number in range(50):
        await redis.set(str(number), "1", ex=1000)
    await redis.hset("big", mapping={str(number): "1" for number in range(70)})
    await redis.expire("big", 1000)
    big = {"name": "big", "key": "big", "type": "hash", "member": "{user_id}", "table": "bigs"}
    config = daemon_config(postgres_dsn, redis_url, {"key": "{user_id}"}, big)
    async with Inside(config) as daemon:
        await daemon.leads()
        await daemon.api.sync()
        for name, count in (("balances", 50), ("big", 70)):
            sample = f'expiring_keys{{mapping="{name}"}}'
            await daemon.api.until_sample(sample, lambda keys: keys is not None)
            assert await daemon.api.sample(sample) == count


@pytest.mark.usefixtures("_probed_often")
async def test_a_sample_that_fails_is_taken_again(
    redis: Redis, redis_url: str, postgres_dsn: str
) -> None:
    command: Any = redis.execute_command
    await command("ACL", "SETUSER", "sampler", "on", "nopass", "~*", "+@all", "-pttl")
    try:
        await redis.set("balance:1", "1", ex=1000)
        url = redis_url.replace("redis://", "redis://sampler:x@")
        async with Inside(daemon_config(postgres_dsn, url)) as daemon:
            await daemon.leads()
            await daemon.api.sync()
            # That the sample was refused is told by Redis alone.
            async with asyncio.timeout(20):
                while "cmdstat_pttl" not in await redis.info("commandstats"):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            await command("ACL", "SETUSER", "sampler", "+pttl")
            sample = 'expiring_keys{mapping="balances"}'
            await daemon.api.until_sample(sample, lambda keys: keys == 1)
    finally:
        await redis.acl_deluser("sampler")


async def test_a_redis_that_may_evict_is_told_of(
    private_redis: Callable[..., RedisServer], postgres_dsn: str
) -> None:
    server = private_redis({"maxmemory": "100mb", "maxmemory-policy": "allkeys-lru"})
    async with Inside(daemon_config(postgres_dsn, server.url)) as daemon:
        await daemon.api.until_sample("redis_may_evict", lambda may: may == 1)


async def test_a_daemon_that_never_reached_its_servers_claims_nothing() -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    config = daemon_config(f"postgresql://{nowhere}/postgres", f"redis://{nowhere}/0")
    async with Inside(config) as daemon:
        await daemon.api.until("/status", lambda status: status["postgres"]["error"])
        page = await daemon.api.text("/metrics")
    for name in ("rejects", "drift_records", "guard_refused", "redis_may_evict"):
        assert f"\nbalancesync_{name}" not in page
    assert "\nbalancesync_postgres_up 0.0\n" in page
