"""The API holds what its OpenAPI document says, whatever it's asked."""

import asyncio
import json
from itertools import product
from typing import Any

import jsonschema_rs
import pytest
import schemathesis
from daemon_site import PREFIX, Site
from engine import make_config
from hypothesis import HealthCheck, Phase, given, settings, strategies
from redis.asyncio import Redis
from schemathesis import checks as known_checks
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode

from balancesync import openapi

MAPPINGS: tuple[dict[str, Any], ...] = (
    {"name": "balances"},
    {
        "name": "by-currency",
        "key": "wallet:{user_id}:{currency}",
        "type": "hash",
        "table": "wallets",
        "columns": {
            "user_id": "bigint",
            "currency": "text",
            "amount": "numeric",
            "active": "boolean",
        },
    },
)
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
# Endless by nature; test_web reads it.
ENDLESS = f"{PREFIX}/events"
CHECKS = (
    known_checks.status_code_conformance,
    known_checks.content_type_conformance,
    known_checks.response_schema_conformance,
    known_checks.response_headers_conformance,
    known_checks.unsupported_method,
)


def document() -> dict[str, Any]:
    return openapi.document(make_config("postgresql://h/d", "redis://h", *MAPPINGS))


def test_the_document_is_one_of_openapi_3_1() -> None:
    made = document()
    assert made["openapi"] == "3.1.0"
    schemathesis.openapi.from_dict(made).validate()
    for schema in made["components"]["schemas"].values():
        jsonschema_rs.Draft202012Validator({**schema, "components": made["components"]})
    names = [op["operationId"] for path in made["paths"].values() for op in path.values()]
    assert len(names) == len(set(names))


async def test_every_route_is_described_and_the_other_way_round(
    postgres_dsn: str, redis_url: str
) -> None:
    described = document()["paths"]
    run = "01a203ed-0c0b-7da3-a768-43fe5ff5ee87"
    async with Site.on(postgres_dsn, redis_url, *MAPPINGS) as site:
        for path, method in product(described, METHODS):
            if (path, method) == (ENDLESS, "GET"):
                continue
            real = path.format(id=run, user_id="1", currency="EUR", name="app.js")
            async with site.client.request(method, real) as answer:
                known = method.lower() in described[path]
                assert (answer.status != 405) == known, (method, path)
                if known:
                    assert str(answer.status) in described[path][method.lower()]["responses"]
                else:
                    allowed = {name.lower() for name in answer.headers["Allow"].split(", ")}
                    assert allowed == set(described[path])
        served = json.loads(await (await site.client.get("/openapi.json")).text())
        assert served == document()
        trees = (f"{PREFIX}/balances/", f"{PREFIX}/runs/", "/static/")
        prefixes = {
            next((tree for tree in trees if path.startswith(tree)), path) for path in described
        }
        assert site.web.paths == prefixes


def test_whatever_is_asked_may_come_too_slowly() -> None:
    """A body is waited for also where none is wanted."""
    for path, operations in document()["paths"].items():
        for method, operation in operations.items():
            assert "408" in operation["responses"], (method, path)


def ask_everything(address: str, token: str) -> dict[str, set[int]]:
    """Ask what the document allows and what it doesn't; give the statuses by operation."""
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    found = [each.ok() for each in schema.get_all_operations() if isinstance(each, Ok)]
    return {
        f"{operation.method.upper()} {operation.path}": ask(operation, token)
        for operation in found
        if operation.path != ENDLESS
    }


def ask(operation: Any, token: str) -> set[int]:
    """Ask one operation in many ways, and give the statuses it answered with."""
    statuses = set[int]()

    def one(case: Any) -> None:
        answer = case.call(headers={"Authorization": f"Bearer {token}"}, timeout=20)
        statuses.add(answer.status_code)
        case.validate_response(answer, checks=CHECKS)

    modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    cases = strategies.one_of([operation.as_strategy(generation_mode=mode) for mode in modes])
    repeat = settings(
        max_examples=8,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    repeat(given(case=cases)(one))()
    return statuses


@pytest.mark.parametrize("well", [True, False], ids=["all is well", "both servers are down"])
async def test_schemathesis(
    well: bool,
    postgres_dsn: str,
    redis_url: str,
    redis: Redis,
) -> None:
    await redis.set("balance:1", "1.5")
    await redis.set("balance:2", "no number")
    dsn, url = (
        (postgres_dsn, redis_url) if well else ("postgresql://127.0.0.1:1/x", "redis://127.0.0.1:1")
    )
    async with Site.on(dsn, url, *MAPPINGS, http={"token": "s3cret"}) as site:
        if well:
            await site.sync()
        seen = await asyncio.to_thread(ask_everything, site.web.address, "s3cret")
    assert len(seen) == 18
    assert all(seen.values())
    errors = {status for statuses in seen.values() for status in statuses if status >= 500}
    assert errors == (set() if well else {503})
    if well:
        assert 202 in seen[f"POST {PREFIX}/force-sync"]
        assert 200 in seen[f"DELETE {PREFIX}/clear-cache"]
