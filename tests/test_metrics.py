"""The metrics: their names and labels, and what a run does to them."""

import re
from dataclasses import replace
from datetime import UTC, datetime

from balancesync.errors import Refused
from balancesync.metrics import Metrics
from balancesync.model import Counts, Run, new_run_id

NAMES = {
    *("runs_total", "run_duration_seconds", "records_total", "errors_total", "redis_up"),
    *("postgres_up", "leader", "last_success_timestamp_seconds", "next_run_timestamp_seconds"),
    *("run_in_progress", "run_progress_ratio", "rejects", "drift_records", "guard_refused"),
    *("live_up", "live_pending_keys", "live_lag_seconds", "expiring_keys"),
    *("redis_evicted_keys_total", "build_info"),
}
AT = datetime(2026, 1, 31, 2, tzinfo=UTC)
RUN = Run(
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


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    """A sample's value, None if there's no such sample."""
    return metrics.registry.get_sample_value(f"balancesync_{name}", labels)


def test_the_names_are_those_that_are_promised() -> None:
    page = Metrics().page().decode()
    helped = set(re.findall(r"^# HELP balancesync_(\w+) ", page, re.MULTILINE))
    assert {name for name in helped if not name.endswith("_created")} == NAMES
    assert 'balancesync_build_info{version="0.1.0"} 1.0' in page


def test_a_run_that_succeeded() -> None:
    metrics = Metrics()
    for _ in range(2):
        metrics.record(RUN)
    labels = {"job": "sync", "trigger": "cron:hourly", "status": "succeeded"}
    assert value(metrics, "runs_total", **labels) == 2
    assert value(metrics, "run_duration_seconds_sum", job="sync") == 7
    assert value(metrics, "run_duration_seconds_bucket", job="sync", le="2.5") == 0
    assert value(metrics, "records_total", mapping="balances", outcome="inserted") == 8
    assert value(metrics, "records_total", mapping="balances", outcome="rejected") == 2
    assert value(metrics, "last_success_timestamp_seconds", job="sync") == AT.timestamp()


def test_a_run_that_was_refused() -> None:
    metrics = Metrics()
    metrics.record(replace(RUN, status="refused"), Refused())
    assert value(metrics, "errors_total", kind="refused") == 1
    assert value(metrics, "last_success_timestamp_seconds", job="sync") is None


def test_a_dry_run_and_one_of_a_single_mapping_move_no_success() -> None:
    metrics = Metrics()
    metrics.record(replace(RUN, mode="dry_run"))
    assert value(metrics, "records_total", mapping="balances", outcome="inserted") is None
    metrics.record(replace(RUN, mapping="balances"))
    assert value(metrics, "records_total", mapping="balances", outcome="inserted") == 4
    assert value(metrics, "last_success_timestamp_seconds", job="sync") is None


def test_a_verify_sets_the_drift() -> None:
    metrics = Metrics()
    verified = replace(RUN, job="verify", mode="verify")
    metrics.record(verified)
    assert value(metrics, "drift_records", mapping="balances") == 4
    metrics.record(replace(verified, mappings={"balances": Counts(scanned=10, unchanged=10)}))
    assert value(metrics, "drift_records", mapping="balances") == 0


def test_evicted_keys_are_as_redis_counts_them() -> None:
    metrics = Metrics()
    metrics.set_evicted_keys({"a:1": 5, "b:1": 2})
    assert value(metrics, "redis_evicted_keys_total") == 7
    metrics.set_evicted_keys({"a:1": 0, "b:1": 2})
    assert value(metrics, "redis_evicted_keys_total") == 2
