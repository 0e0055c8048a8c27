"""What programs get: runs, reports and rejects as JSON documents.

Times are ISO 8601 in UTC, durations seconds, counts integers, amounts exact texts.
"""

from collections.abc import Sequence
from typing import Any, Final

from balancesync.history import Change
from balancesync.model import Run
from balancesync.records import KeptReject
from balancesync.report import Report
from balancesync.target import Op, Row
from balancesync.times import exact_time_text, time_text

Document = dict[str, Any]

OPS: Final[dict[Op, str]] = {"i": "insert", "u": "update", "d": "delete", "k": "keep"}


def run_document(run: Run, reports: Sequence[Report] | None = None) -> Document:
    """A run with its counts, in all and by mapping; `report` is what a dry run or verify found.

    Of a verify: `drift`, the rows that differ, and `moving`, the keys that changed at every look.
    """
    document: Document = {
        "id": str(run.id),
        "job": run.job,
        "trigger": run.trigger,
        "mode": run.mode,
        "status": run.status,
        "mapping": run.mapping,
        "started_at": time_text(run.started_at),
        "finished_at": time_text(run.finished_at),
        "duration_s": run.duration_s,
        "attempts": run.attempts,
        **run.counts.as_dict(),
        "warnings": list(run.warnings),
        "error": run.error,
        "mappings": {name: counts.as_dict() for name, counts in run.mappings.items()},
    }
    if run.job == "verify":
        moving = None if run.moving is None else sum(run.moving.values())
        document |= {"drift": run.drift, "moving": moving}
    if reports is not None:
        document["report"] = [report_document(report) for report in reports]
    return document


def report_document(report: Report) -> Document:
    """The first rows that differ, and how far each total would move, as exact texts."""
    return {
        "mapping": report.mapping,
        "rows": [_row_document(report, row) for rows in report.rows.values() for row in rows],
        "totals": dict(report.totals),
        "moving": report.moving,
    }


def _row_document(report: Report, row: Row) -> Document:
    values = report.value_columns
    return {
        "op": OPS[row.op],
        "key": dict(zip(report.key_columns, row.key, strict=True)),
        "old": None if row.op == "i" else dict(zip(values, row.old, strict=True)),
        "new": None if row.op == "d" else dict(zip(values, row.new, strict=True)),
    }


def reject_document(reject: KeptReject) -> Document:
    """A kept reject. Bytes that are no UTF-8 show as \\xNN; `key_hex` is the key as it is."""
    return {
        "mapping": reject.mapping,
        "key": _text(reject.key),
        "key_hex": reject.key.hex(),
        "value": None if reject.value is None else _text(reject.value),
        "reason": reject.reason,
        "detail": reject.detail,
        "first_seen": time_text(reject.first_seen),
        "changed_at": time_text(reject.changed_at),
        "healed_at": time_text(reject.healed_at),
        "run_id": str(reject.run_id),
    }


def change_document(change: Change) -> Document:
    """A kept change; `old` is null of an insert, `new` of a delete."""
    return {
        "at": exact_time_text(change.at),
        "run_id": str(change.run_id),
        "op": OPS[change.op],
        "old": change.old,
        "new": change.new,
    }


def _text(raw: bytes) -> str:
    return raw.decode(errors="backslashreplace")
