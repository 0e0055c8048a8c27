"""All Prometheus metrics, in one place. Labels are bounded: jobs, triggers, mappings, outcomes.

https://prometheus.io/docs/practices/naming/
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TypeAlias

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from balancesync.model import Counts, Known

# A series for when each other one began: nobody asked for them, and they double the lot.
disable_created_metrics()  # type: ignore[no-untyped-call]  # the library left this one out

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_DURATIONS_S: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_LAGS_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_Kind: TypeAlias = type[GaugeMetricFamily] | type[CounterMetricFamily]
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

    def __init__(
        self, version: str, mappings: Iterable[str], jobs: Iterable[str], *, live: bool = False
    ) -> None:
        """Nothing is known yet.

        Args:
            version: of the program.
            mappings: their names.
            jobs: those that runs are made for.
            live: whether changes are to be followed; otherwise there is no live metric, because
                what isn't wanted isn't down.
        """
        self.registry = CollectorRegistry()
        self._mappings = tuple(mappings)
        self._next_run: Callable[[], float | None] = lambda: None
        self._interval: Callable[[], float] = lambda: math.inf
        self._refused: bool | None = None
        self._current: str | None = None
        self.evicted: float | None = None
        self.may_evict: bool | None = None

        self._about_runs()
        self._about_records()
        self._about_servers()
        self._live(self.registry if live else None)
        self._gauge("build_info", "The version that runs.", "version").labels(version).set(1)
        # A series that appears only with its first event can't be alerted on before.
        for mapping in self._mappings:
            for outcome in OUTCOMES:
                self.records.labels(mapping, outcome)
        for job in jobs:
            self.run_duration.labels(job)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"balancesync_{name}", text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"balancesync_{name}", text, labels, registry=self.registry)

    def _ask(
        self, name: str, text: str, ask: Callable[[], float | None], kind: _Kind = GaugeMetricFamily
    ) -> None:
        self.registry.register(_Asked(kind, f"balancesync_{name}", text, ask))

    def _about_runs(self) -> None:
        labels = ("job", "trigger", "status")
        self.runs = self._counter("runs_total", "Runs by how they ended.", *labels)
        self.run_duration = Histogram(
            "balancesync_run_duration_seconds",
            "How long runs took.",
            ["job"],
            buckets=_DURATIONS_S,
            registry=self.registry,
        )
        self.errors = self._counter("errors_total", "Errors that ended a run, by kind.", "kind")
        self.last_success = self._gauge(
            "last_success_timestamp_seconds", "When a full run of the job last succeeded.", "job"
        )
        self._ask("next_run_timestamp_seconds", "When the schedule fires next.", self._next)
        longest = "The longest time between two planned syncs."
        self._ask("planned_interval_seconds", longest, self._planned)
        self.in_progress = self._gauge("run_in_progress", "Whether a run is under way.")
        text = "How far the run is, 0 to 1, in its phase."
        self.progress = self._gauge("run_progress_ratio", text)

    def _about_records(self) -> None:
        text = "Records of apply runs by outcome."
        self.records = self._counter("records_total", text, "mapping", "outcome")
        self.rejects = self._gauge("rejects", "Open rejects.", "mapping")
        text = "Records the last verify found to differ."
        self.drift = self._gauge("drift_records", text, "mapping")
        text = "Whether a refusal of the guard stands."
        self._ask("guard_refused", text, lambda: self._refused)
        text = "Keys with a TTL, estimated from a sample at each full run."
        self.expiring = self._gauge("expiring_keys", text, "mapping")

    def _about_servers(self) -> None:
        self.redis_up = self._gauge("redis_up", "Whether Redis answered the last probe.")
        text = "Whether PostgreSQL answered the last probe."
        self.postgres_up = self._gauge("postgres_up", text)
        self.leader = self._gauge("leader", "Whether this daemon leads.")
        self._ask(
            "redis_evicted_keys",
            "Keys that Redis itself says it evicted.",
            lambda: self.evicted,
            CounterMetricFamily,
        )
        text = "Whether Redis would evict keys without a TTL when its memory is full."
        self._ask("redis_may_evict", text, lambda: self.may_evict)

    def _live(self, registry: CollectorRegistry | None) -> None:
        self.live_up = Gauge(
            "balancesync_live_up", "Whether changes are followed without a gap.", registry=registry
        )
        self.live_pending = Gauge(
            "balancesync_live_pending_keys",
            "Changed keys that wait to be flushed.",
            registry=registry,
        )
        self.live_lag = Histogram(
            "balancesync_live_lag_seconds",
            "From a change's arrival to its commit.",
            buckets=_LAGS_S,
            registry=registry,
        )

    def set_schedule(
        self, next_run: Callable[[], float | None], interval: Callable[[], float]
    ) -> None:
        """Where to ask at each scrape.

        Args:
            next_run: for the next fire time, in seconds since 1970; None if nothing is planned.
            interval: for the longest planned time between two syncs, in seconds; may be infinite.
        """
        self._next_run, self._interval = next_run, interval

    def _next(self) -> float | None:
        return self._next_run()

    def _planned(self) -> float | None:
        interval = self._interval()
        return interval if math.isfinite(interval) else None

    def take(self, kind: str, document: Mapping[str, Any]) -> None:
        """Count an event of the daemon: what it publishes to listeners, it counts here."""
        match kind:
            case "run_started":
                self._current = document["id"]
                self.in_progress.set(1)
                self.progress.set(0)
            case "run_progress":
                self.progress.set(document["ratio"] or 0)
            case "run_finished" if document["job"] == "live":
                # Its records were counted with each flush, and a minute is no duration.
                self.runs.labels("live", "live", document["status"]).inc()
            case "run_finished":
                # One that was cancelled in the queue ends while another is under way.
                if document["id"] == self._current:
                    self.in_progress.set(0)
                    self.progress.set(0)
                self._count_run(document)
            case "redis":
                self.redis_up.set(document["connected"])
            case "postgres":
                self.postgres_up.set(document["connected"])
            case "leader":
                self.leader.set(document["leads"])
                if not document["leads"]:
                    # Only who runs takes samples: this one would stay as it is for ever.
                    self.expiring.clear()

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

    def count_flush(self, counts: Mapping[str, Counts], lags: Iterable[float]) -> None:
        """Count a flush of live mode by mapping; `lags` in seconds, from arrival to commit."""
        for lag in lags:
            self.live_lag.observe(lag)
        for mapping, found in counts.items():
            for outcome, count in found.as_dict().items():
                if count and outcome in OUTCOMES:
                    self.records.labels(mapping, outcome).inc(count)

    def remember(self, known: Known) -> None:
        """Take over what PostgreSQL knows, so that it's right after a restart and on a standby."""
        for job, at in known.last_success.items():
            self.last_success.labels(job).set(at)
        self.drift.clear()
        for mapping in self._mappings:
            self.rejects.labels(mapping).set(known.rejects.get(mapping, 0))
            # Of what no verify has looked at, nobody knows whether it differs.
            if mapping in known.drift:
                self.drift.labels(mapping).set(known.drift[mapping])
        self._refused = known.refused

    def render(self) -> bytes:
        """The exposition, in Prometheus' text format."""
        return generate_latest(self.registry)


class _Asked(Collector):
    """What somebody else keeps, asked for at each scrape; not there while it isn't known.

    A 0 in its place would be a lie, and fire alerts after each restart. So a counter of Redis' own
    can go back, too.
    """

    def __init__(self, kind: _Kind, name: str, text: str, ask: Callable[[], float | None]) -> None:
        self._kind = kind
        self._name = name
        self._text = text
        self._ask = ask

    def collect(self) -> Iterable[Metric]:
        value = self._ask()
        if value is not None:
            yield self._kind(self._name, self._text, value=value)
