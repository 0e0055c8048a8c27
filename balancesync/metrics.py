"""All Prometheus metrics, in one place. Labels are bounded: jobs, triggers, mappings, outcomes.

https://prometheus.io/docs/practices/naming/
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from balancesync.model import Known

# A series for when each other one began: nobody asked for them, and they double the lot.
disable_created_metrics()  # type: ignore[no-untyped-call]  # the library left this one out

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_DURATIONS_S: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_LAGS_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
OUTCOMES: Final = (
    "ignored",
    "vanished",
    "rejected",
    "snapped",
    "inserted",
    "updated",
    "unchanged",
    "not_found",
    "deleted",
)


class Metrics:
    """One registry of its own, so that two daemons in one test don't meet in a global one."""

    def __init__(self, version: str, mappings: Iterable[str], jobs: Iterable[str]) -> None:
        self.registry = CollectorRegistry()
        self._mappings = tuple(mappings)
        self._next_run: Callable[[], float | None] = lambda: None

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"balancesync_{name}", text, labels, registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"balancesync_{name}", text, labels, registry=self.registry)

        self.runs = counter("runs_total", "Runs by how they ended.", "job", "trigger", "status")
        self.run_duration = Histogram(
            "balancesync_run_duration_seconds",
            "How long runs took.",
            ["job"],
            buckets=_DURATIONS_S,
            registry=self.registry,
        )
        self.records = counter(
            "records_total", "Records of apply runs by outcome.", "mapping", "outcome"
        )
        self.errors = counter("errors_total", "Errors that ended a run, by kind.", "kind")
        self.redis_up = gauge("redis_up", "Whether Redis answered the last probe.")
        self.postgres_up = gauge("postgres_up", "Whether PostgreSQL answered the last probe.")
        self.leader = gauge("leader", "Whether this daemon leads.")
        self.last_success = gauge(
            "last_success_timestamp_seconds", "When a full run of the job last succeeded.", "job"
        )
        self.next_run = gauge("next_run_timestamp_seconds", "When the schedule fires next.")
        self.in_progress = gauge("run_in_progress", "Whether a run is under way.")
        self.progress = gauge("run_progress_ratio", "How far the run is, 0 to 1, in its phase.")
        self.rejects = gauge("rejects", "Open rejects.", "mapping")
        self.drift = gauge("drift_records", "Records the last verify found to differ.", "mapping")
        self.refused = gauge("guard_refused", "Whether a refusal of the guard stands.")
        self.live_up = gauge("live_up", "Whether changes are followed without a gap.")
        self.live_pending = gauge("live_pending_keys", "Changed keys that wait to be flushed.")
        self.live_lag = Histogram(
            "balancesync_live_lag_seconds",
            "From a change's arrival to its commit.",
            buckets=_LAGS_S,
            registry=self.registry,
        )
        self.expiring = gauge(
            "expiring_keys", "Keys with a TTL, estimated from a sample at each full run.", "mapping"
        )
        self.evicted: float | None = None
        self.registry.register(_Evicted(self))
        gauge("build_info", "The version that runs.", "version").labels(version).set(1)
        # A series that appears only with its first event can't be alerted on before.
        for mapping in self._mappings:
            self.rejects.labels(mapping)
            self.drift.labels(mapping)
            for outcome in OUTCOMES:
                self.records.labels(mapping, outcome)
        for job in jobs:
            self.run_duration.labels(job)

    def set_next_run(self, next_run: Callable[[], float | None]) -> None:
        """Where to ask for the next fire time, in seconds since 1970, at each scrape."""
        self._next_run = next_run

    def take(self, kind: str, document: Mapping[str, Any]) -> None:
        """Count an event of the daemon: what it publishes to listeners, it counts here."""
        match kind:
            case "run_started":
                self.in_progress.set(1)
                self.progress.set(0)
            case "run_progress":
                self.progress.set(document["ratio"] or 0)
            case "run_finished":
                self.in_progress.set(0)
                self.progress.set(0)
                self._count_run(document)
            case "redis":
                self.redis_up.set(document["connected"])
            case "postgres":
                self.postgres_up.set(document["connected"])
            case "leader":
                self.leader.set(document["leads"])

    def _count_run(self, run: Mapping[str, Any]) -> None:
        self.runs.labels(run["job"], run["trigger"], run["status"]).inc()
        if run["duration_s"] is not None:
            self.run_duration.labels(run["job"]).observe(run["duration_s"])
        if run.get("error_kind"):
            self.errors.labels(run["error_kind"]).inc()
        if run["mode"] == "apply":
            for mapping, counts in run["mappings"].items():
                for outcome in OUTCOMES:
                    self.records.labels(mapping, outcome).inc(counts[outcome])

    def remember(self, known: Known) -> None:
        """Take over what PostgreSQL knows, so that it's right after a restart and on a standby."""
        for job, at in known.last_success.items():
            self.last_success.labels(job).set(at)
        for mapping in self._mappings:
            self.rejects.labels(mapping).set(known.rejects.get(mapping, 0))
            self.drift.labels(mapping).set(known.drift.get(mapping, 0))
        self.refused.set(known.refused)

    def render(self) -> bytes:
        """The exposition, in Prometheus' text format."""
        next_run = self._next_run()
        if next_run is not None:
            self.next_run.set(next_run)
        return generate_latest(self.registry)


class _Evicted(Collector):
    """A counter that Redis keeps: it can be set, and goes back when Redis is started again."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[CounterMetricFamily]:
        if self._metrics.evicted is not None:
            yield CounterMetricFamily(
                "balancesync_redis_evicted_keys",
                "Keys that Redis itself says it evicted.",
                value=self._metrics.evicted,
            )
