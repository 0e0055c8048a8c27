"""The documents of the API as JSON Schema (2020-12, which OpenAPI 3.1 speaks)."""

from typing import Any, Final, get_args

from balancesync.documents import OPS
from balancesync.model import Counts, Job, Mode, Reason, Status
from balancesync.overview import SHORT, Level
from balancesync.state import Live
from balancesync.verdict import Level as VerdictLevel

Schema = dict[str, Any]

TEXT: Final[Schema] = {"type": "string"}
WHOLE: Final[Schema] = {"type": "integer", "minimum": 0}
FLAG: Final[Schema] = {"type": "boolean"}
RUN_ID: Final[Schema] = {"type": "string", "format": "uuid"}
_SECONDS: Final[Schema] = {"type": "number", "minimum": 0, "description": "seconds"}
_TIME: Final[Schema] = {"type": "string", "format": "date-time", "description": "ISO 8601 in UTC"}


def ref(name: str) -> Schema:
    """A schema by its name among the components."""
    return {"$ref": f"#/components/schemas/{name}"}


def one_of(values: Any) -> Schema:
    """One of the texts of a Literal."""
    return {"type": "string", "enum": list(get_args(values))}


def maybe(schema: Schema) -> Schema:
    """The same, or null."""
    if isinstance(schema.get("type"), str) and "enum" not in schema:
        return {**schema, "type": [schema["type"], "null"]}
    return {"anyOf": [schema, {"type": "null"}]}


def array(items: Schema) -> Schema:
    """A list."""
    return {"type": "array", "items": items}


def table(values: Schema) -> Schema:
    """An object whose names are data."""
    return {"type": "object", "additionalProperties": values}


def record(**properties: Schema) -> Schema:
    """An object with just these members."""
    return record_of(properties)


def record_of(properties: dict[str, Schema], optional: tuple[str, ...] = ()) -> Schema:
    """The same; those that are `optional` may be left out."""
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


_COUNTS: Final = dict.fromkeys(Counts().as_dict(), WHOLE)
_RUN: Final[Schema] = {
    "id": RUN_ID,
    "job": one_of(Job),
    "trigger": {**TEXT, "examples": ["cron:hourly", "http"]},
    "mode": one_of(Mode),
    "status": one_of(Status),
    "mapping": maybe(TEXT),
    "started_at": _TIME,
    "finished_at": maybe(_TIME),
    "duration_s": maybe(_SECONDS),
    "attempts": WHOLE,
    **_COUNTS,
    "drift": maybe({**WHOLE, "description": "of a verify: the rows that differ"}),
    "moving": maybe({**WHOLE, "description": "of a verify: the keys that changed at every look"}),
    "warnings": array(TEXT),
    "error": maybe(TEXT),
    "mappings": table(ref("Counts")),
    "progress": maybe(ref("Progress")),
    "report": array(ref("Report")),
}
_TOTALS: Final = array(
    record(job=one_of(Job), mode=one_of(Mode), status=one_of(Status), runs=WHOLE, seconds=_SECONDS)
)


COMPONENTS: Final[dict[str, Schema]] = {
    "Error": record(error=record(code=TEXT, message=TEXT)),
    "Counts": record_of(_COUNTS),
    "Progress": record(
        run_id=RUN_ID,
        phase=TEXT,
        mapping=maybe(TEXT),
        done=WHOLE,
        total=maybe(WHOLE),
        ratio=maybe({"type": "number", "minimum": 0, "maximum": 1}),
    ),
    "Report": record(
        mapping=TEXT,
        rows=array(
            record(
                op={"type": "string", "enum": list(OPS.values())},
                key=table(TEXT),
                old=maybe(table(maybe(TEXT))),
                new=maybe(table(maybe(TEXT))),
            )
        ),
        totals=table(TEXT),
        moving=WHOLE,
    ),
    "Run": record_of(_RUN, ("drift", "moving", "progress", "report")),
    "Server": record(
        connected=FLAG,
        address=maybe(TEXT),
        version=maybe(TEXT),
        latency_ms=maybe(_SECONDS),
        error=maybe(TEXT),
    ),
    "Status": record(
        name=TEXT,
        leader=maybe(TEXT),
        database=TEXT,
        schema=TEXT,
        state={"type": "string", "enum": ["idle", "running", "standby", "draining"]},
        current_run=maybe(ref("Run")),
        queued_runs=array(RUN_ID),
        last_run=maybe(ref("Run")),
        last_success_at=maybe(_TIME),
        last_success_age_s=maybe(_SECONDS),
        safe_until=maybe(_TIME),
        verdict=ref("Verdict"),
        next_run_at=maybe(_TIME),
        refusal=maybe(array(record(mapping=TEXT, reason=TEXT, refused_at=maybe(_TIME)))),
        refused_elsewhere=maybe(array(record(mapping=TEXT, reason=TEXT, refused_at=maybe(_TIME)))),
        redis=ref("Server"),
        postgres=ref("Server"),
        live=one_of(Live),
        live_reason=maybe(TEXT),
        live_pending=WHOLE,
        live_lag_s=maybe(_SECONDS),
        live_copied_at=maybe(_TIME),
        rejects=maybe(table(table(WHOLE))),
        not_found=maybe(WHOLE),
        without_keys=maybe(array(TEXT)),
        drift=maybe(table(WHOLE)),
        health=ref("Health"),
        recorded_age_s=maybe(_SECONDS),
    ),
    "Verdict": record(
        level=one_of(VerdictLevel),
        line={**TEXT, "description": "how it is; times are ISO 8601 in UTC"},
        advice={**array(TEXT), "description": "what to do, a sentence each"},
    ),
    "Accepted": record(run_id=RUN_ID, state={"type": "string", "enum": ["started", "queued"]}),
    "Cancelled": record(
        run_id=RUN_ID, state={"type": "string", "enum": ["cancelling", "cancelled"]}
    ),
    "Fire": record(
        name=TEXT,
        cron=TEXT,
        job={"type": "string", "enum": ["sync", "verify"]},
        timezone=TEXT,
        next_at=maybe(_TIME),
        last_at=maybe(_TIME),
    ),
    "Health": record(
        status={"type": "string", "enum": ["healthy", "degraded", "unhealthy"]},
        checks=table(record(status=one_of(Level), detail=TEXT)),
    ),
    "Probe": record(
        status={"type": "string", "enum": ["alive", "stuck", "ready", "starting", "draining"]}
    ),
    "Stats": record(
        totals=_TOTALS,
        last_runs=table(WHOLE),
        recent_runs=array(record_of({name: _RUN[name] for name in SHORT})),
        durations=record(p50_s=maybe(_SECONDS), p95_s=maybe(_SECONDS)),
        rejects=table(table(WHOLE)),
        last_success_at=maybe(_TIME),
        last_success_age_s=maybe(_SECONDS),
        since_start=record(at=_TIME, totals=_TOTALS, records=ref("Counts")),
    ),
    "Reject": record(
        mapping=TEXT,
        key=TEXT,
        key_hex=TEXT,
        value=maybe(TEXT),
        reason=one_of(Reason),
        detail=TEXT,
        first_seen=_TIME,
        changed_at=_TIME,
        healed_at=maybe(_TIME),
        run_id=RUN_ID,
    ),
    "Cleared": record(
        cleared=record(totals=WHOLE, status=FLAG, healed_rejects=maybe(WHOLE), live=FLAG),
    ),
    "Balance": record(
        mapping=TEXT,
        key=table(TEXT),
        values=table(maybe(TEXT)),
        source={"type": "string", "enum": ["redis", "postgres"]},
        as_of=maybe(_TIME),
    ),
}
