"""The API as an OpenAPI 3.1 document, made from the configuration: its mappings are paths in it.

https://spec.openapis.org/oas/v3.1.1.html
"""

from typing import Any, Final, get_args
from urllib.parse import quote

from balancesync import __version__
from balancesync.config import Config, MappingConfig
from balancesync.model import Reason
from balancesync.schemas import COMPONENTS, FLAG, RUN_ID, TEXT, WHOLE, Schema, array, record, ref

PREFIX: Final = "/sync-management"

_ERRORS: Final = {
    400: "This is no HTTP that is understood, or a header is too long.",
    401: "The token is missing or wrong.",
    403: "Asked under a foreign Host, or by a page of another site.",
    404: "There is no such thing.",
    405: "The path doesn't know this method; Allow names those that it knows.",
    408: "The body didn't come in time.",
    409: "Not in this state: a standby names the leader, a run has ended, no history is kept.",
    413: "The body is over 64 kB.",
    422: "A parameter, key or body isn't valid; the message says which.",
    500: "A bug.",
    503: "A server can't be asked, or balancesync is stopping.",
}
# What any request may get, whatever it asks.
_ANY: Final = (400, 405, 408, 413, 500)


def _parameter(name: str, schema: Schema, text: str, *, place: str = "query") -> Schema:
    return {
        "name": name,
        "in": place,
        "required": place == "path",
        "description": text,
        "schema": schema,
    }


_LIMIT: Final = _parameter(
    "limit", {**WHOLE, "minimum": 1, "maximum": 1000, "default": 100}, "The most to give."
)


def _answer(text: str, schema: Schema, kind: str = "application/json") -> Schema:
    return {"description": text, "content": {kind: {"schema": schema}}}


def _operation(
    name: str,
    summary: str,
    answers: dict[int, Schema],
    *,
    errors: tuple[int, ...] = (),
    secret: bool = False,
    judged: bool = True,
    parameters: tuple[Schema, ...] = (),
) -> Schema:
    codes = {*_ANY, *errors, *((401,) if secret else ()), *((403,) if judged else ())} - {*answers}
    responses = {str(code): answer for code, answer in answers.items()}
    responses |= {str(code): _answer(_ERRORS[code], ref("Error")) for code in sorted(codes)}
    operation: Schema = {"operationId": name, "summary": summary, "responses": responses}
    if parameters:
        operation["parameters"] = list(parameters)
    if secret:
        operation["security"] = [{"token": []}]
    return operation


def document(config: Config) -> dict[str, Any]:
    """The whole document; plain data, to be sent as JSON."""
    names: Schema = {**TEXT, "enum": [mapping.name for mapping in config.mapping]}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "balancesync",
            "version": __version__,
            "description": "Copies users' balances from Redis to PostgreSQL, and proves it."
            " Times are ISO 8601 in UTC, counts integers, amounts exact strings.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "paths": {
            **_runs(names),
            **_state(),
            **{_balance_path(each): {"get": _balance(each)} for each in config.mapping},
            **_probes(),
        },
        "components": {
            "schemas": COMPONENTS,
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "`http.token`; not asked for while it's empty.",
                }
            },
        },
    }


def _runs(mappings: Schema) -> Schema:
    by_id = _parameter("id", RUN_ID, "The id of the run.", place="path")
    return {
        f"{PREFIX}/force-sync": {"post": _force_sync(mappings)},
        f"{PREFIX}/runs": {"get": _list_of_runs()},
        f"{PREFIX}/runs/{{id}}": {"get": _one_run(by_id), "delete": _cancel(by_id)},
    }


def _force_sync(mappings: Schema) -> Schema:
    return _operation(
        "forceSync",
        "starts a sync, or queues it",
        {
            200: _answer("With `wait`: the run, which has ended.", ref("Run")),
            202: _answer("The run has started or waits its turn.", ref("Accepted")),
        },
        errors=(409, 422, 503),
        secret=True,
        parameters=(
            _parameter("wait", {**FLAG, "default": False}, "Answer when the run has ended."),
            _parameter("dry_run", {**FLAG, "default": False}, "Change nothing, tell what would."),
            _parameter(
                "accept_loss", {**FLAG, "default": False}, "Apply although Redis has lost keys."
            ),
            _parameter("mapping", mappings, "This mapping alone."),
        ),
    )


def _list_of_runs() -> Schema:
    return _operation(
        "runs",
        "the runs, newest first",
        {200: _answer("The runs.", record(runs=array(ref("Run"))))},
        errors=(422, 503),
        parameters=(
            _LIMIT,
            _parameter("before", RUN_ID, "Only runs older than this one."),
            _parameter(
                "brief",
                {**FLAG, "default": False},
                "Without the counts by mapping and the runs of live mode.",
            ),
        ),
    )


def _one_run(by_id: Schema) -> Schema:
    return _operation(
        "run",
        "one run",
        {200: _answer("The run; with the token also what a dry run found.", ref("Run"))},
        errors=(404, 422, 503),
        parameters=(by_id,),
    )


def _cancel(by_id: Schema) -> Schema:
    return _operation(
        "cancelRun",
        "cancels a run that waits, or the running one at its next batch",
        {202: _answer("It is cancelled, or will be at its next batch.", ref("Cancelled"))},
        errors=(404, 409, 422, 503),
        secret=True,
        parameters=(by_id,),
    )


def _state() -> Schema:
    plain = {
        "status": ("what runs, what ran, what comes", ref("Status"), (422,)),
        "schedule": (
            "the cron jobs with their next times",
            record(jobs=array(ref("Fire"))),
            (422,),
        ),
        "stats": ("totals and durations", ref("Stats"), (422, 503)),
    }
    return {
        **{
            f"{PREFIX}/{name}": {
                "get": _operation(name, summary, {200: _answer(summary, schema)}, errors=errors)
            }
            for name, (summary, schema, errors) in plain.items()
        },
        f"{PREFIX}/rejects": {"get": _rejects()},
        f"{PREFIX}/clear-cache": {"delete": _clear_cache()},
        f"{PREFIX}/events": {"get": _events()},
    }


def _rejects() -> Schema:
    reasons: Schema = {**TEXT, "enum": list(get_args(Reason))}
    return _operation(
        "rejects",
        "what couldn't be stored, and why",
        {200: _answer("The open rejects, the newest first.", record(rejects=array(ref("Reject"))))},
        errors=(422, 503),
        secret=True,
        parameters=(
            _LIMIT,
            _parameter("mapping", TEXT, "Of this mapping alone."),
            _parameter("reason", reasons, "For this reason alone."),
        ),
    )


def _clear_cache() -> Schema:
    return _operation(
        "clearCache",
        "forgets what the daemon keeps for itself, never a balance",
        {200: _answer("What was forgotten; null: PostgreSQL couldn't be asked.", ref("Cleared"))},
        errors=(409, 422, 503),
        secret=True,
    )


def _events() -> Schema:
    return _operation(
        "events",
        "what happens, as it happens: server-sent events",
        {
            200: _answer(
                "run_queued run_started run_progress run_finished redis postgres leader live",
                TEXT,
                "text/event-stream",
            )
        },
        errors=(422, 503),
    )


def _balance_path(mapping: MappingConfig) -> str:
    segments = [f"{{{quote(column, safe='')}}}" for column in mapping.key_columns]
    return "/".join([f"{PREFIX}/balances/{mapping.name}", *segments])


def _balance(mapping: MappingConfig) -> Schema:
    return _operation(
        f"balance_{mapping.name}",
        f"one balance of {mapping.name}",
        {200: _answer("From Redis, or else from PostgreSQL.", ref("Balance"))},
        errors=(404, 409, 422, 503),
        secret=True,
        parameters=(
            *(
                _parameter(quote(column, safe=""), TEXT, mapping.types[column].sql, place="path")
                for column in mapping.key_columns
            ),
            _parameter("as_of", {**TEXT, "format": "date-time"}, "As it was then, by the history."),
        ),
    )


def _probes() -> Schema:
    def probe(name: str, summary: str, schema: Schema, *codes: int) -> Schema:
        answers = {code: _answer(summary, schema) for code in codes}
        return {"get": _operation(name, summary, answers, judged=False)}

    well = "whether all is well, check by check"
    return {
        f"{PREFIX}/health": probe("health", well, ref("Health"), 200, 503),
        "/health": probe("healthToo", well, ref("Health"), 200, 503),
        "/livez": probe("livez", "whether the process does its work", ref("Probe"), 200, 503),
        "/readyz": probe("readyz", "whether it serves", ref("Probe"), 200, 503),
        "/metrics": {
            "get": _operation(
                "metrics",
                "the metrics, for Prometheus",
                {200: _answer("Text format 0.0.4.", TEXT, "text/plain")},
                judged=False,
            )
        },
        "/openapi.json": {
            "get": _operation(
                "openapi", "this document", {200: _answer("OpenAPI 3.1.", {"type": "object"})}
            )
        },
        **_page(),
    }


def _page() -> Schema:
    name = _parameter("name", {**TEXT, "examples": ["app.js"]}, "Its name.", place="path")
    file: Schema = {
        "description": "A file of the status page.",
        "content": {"text/javascript": {"schema": TEXT}},
    }
    known: Schema = {"description": "The file that If-None-Match names."}
    return {
        "/": {
            "get": _operation(
                "page",
                "the status page, for people",
                {200: _answer("The page.", TEXT, "text/html"), 304: known},
            )
        },
        "/static/{name}": {
            "get": _operation(
                "file",
                "what the status page needs",
                {200: file, 304: known},
                errors=(404,),
                parameters=(name,),
            )
        },
    }
