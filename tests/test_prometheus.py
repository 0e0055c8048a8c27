"""Alerts and dashboard, against what a real Prometheus makes of real daemons.

Skipped where promtool and prometheus aren't installed (`apt-get install prometheus`).
"""

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from redis.asyncio import Redis
from running import Inside, daemon_config, free_port

from balancesync import probing
from balancesync.model import Request

ROOT = Path(__file__).parents[1]
ALERTS = ROOT / "docs/prometheus/alerts.yml"
RUNBOOK = ROOT / "docs/runbook.md"
DASHBOARD = ROOT / "docs/grafana/balancesync.json"
RULES: list[dict[str, Any]] = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("promtool") and shutil.which("prometheus")),
    reason="promtool or prometheus is missing: apt-get install prometheus",
)


def promtool(*arguments: str, given: str = "") -> str:
    """What it says; it has to be content."""
    program = shutil.which("promtool")
    assert program is not None
    done = subprocess.run(
        [program, *arguments], input=given, capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


def expressions() -> list[str]:
    """Every expression of the dashboard, with its variables filled in."""
    dashboard = json.loads(DASHBOARD.read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(found) > 25
    return [filled(each) for each in found]


def filled(expression: str, env: str = "") -> str:
    """An expression with its variables filled in; Grafana has "" for a label that there isn't."""
    filled = {"$job": "balancesync", "$env": env, "$__rate_interval": "1m"}
    for name, value in filled.items():
        expression = expression.replace(name, value)
    return expression


class Prometheus:
    """A client of a Prometheus."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def get(self, path: str, **parameters: str) -> Any:
        """The data of an answer."""
        async with self._session.get(f"/api/v1/{path}", params=parameters) as response:
            document = await response.json()
        assert document["status"] == "success", document
        return document["data"]

    async def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples of an expression."""
        found: list[dict[str, Any]] = (await self.get("query", query=expression))["result"]
        return found

    async def until(self, expression: str) -> list[dict[str, Any]]:
        """Ask until there are samples."""
        loop = asyncio.get_running_loop()
        end = loop.time() + 20
        while not (found := await self.query(expression)):
            assert loop.time() < end, f"{expression} gives nothing"
            await asyncio.sleep(0.05)
        return found


@asynccontextmanager
async def prometheus(folder: Path, *targets: int) -> AsyncIterator[Prometheus]:
    """A Prometheus that scrapes these ports as docs/monitoring.md says, only more often."""
    port = free_port()
    [block] = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/monitoring.md").read_text(), re.S)
    config = yaml.safe_load(block)
    config["global"] = {"evaluation_interval": "200ms"}
    config["rule_files"] = [str(ALERTS)]
    [scrape] = config["scrape_configs"]
    scrape["scrape_interval"] = "200ms"
    scrape["static_configs"] = [{"targets": [f"127.0.0.1:{target}" for target in targets]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    process = await asyncio.create_subprocess_exec(
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        stderr=asyncio.subprocess.PIPE,
        limit=1 << 20,
    )
    assert process.stderr is not None
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            async with asyncio.timeout(20):
                while b"ready to receive" not in (line := await process.stderr.readline()):
                    assert line, "prometheus didn't start"
            drain = asyncio.create_task(process.stderr.read())
            yield Prometheus(session)
    finally:
        process.kill()
        await process.wait()
    await drain


@pytest.mark.slow
@needs_prometheus
async def test_everything_on_a_real_scrape(
    tmp_path: Path,
    redis: Redis,
    redis_url: str,
    postgres_dsn: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A leader that has succeeded, verified and refused, and a standby."""
    monkeypatch.setattr(probing, "_CALM_S", 0.05)
    monkeypatch.setattr(probing, "_REFRESH_S", 0.1)
    await redis.mset({f"balance:{user}": user for user in range(20)} | {"balance:x": 1})
    await redis.expire("balance:7", 3600)
    plan = {"jobs": {"hourly": {"cron": "0 * * * *", "job": "sync"}}}
    leads, stands_by = (
        daemon_config(postgres_dsn, redis_url, live={"enabled": True}, schedule=plan)
        for _ in range(2)
    )
    async with Inside(leads) as leader:
        await leader.api.until_sample("leader", lambda leads: leads == 1)
        async with Inside(stands_by) as standby:
            await leader.api.sync()
            await leader.api.until_sample(
                'expiring_keys{mapping="balances"}', lambda keys: keys == 1
            )
            ticket, _ = leader.runner.submit(Request(job="verify", trigger="http", mode="verify"))
            assert (await asyncio.shield(ticket.done)).status == "succeeded"
            await leader.api.until_sample(
                'drift_records{mapping="balances"}', lambda rows: rows == 0
            )
            await redis.flushdb()
            assert (await leader.api.sync())["status"] == "refused"
            await leader.api.until_sample("guard_refused", lambda refused: refused == 1)
            for each in (leader, standby):
                promtool("check", "metrics", given=await each.api.text("/metrics"))
            async with prometheus(tmp_path, leads.http.port, stands_by.http.port) as server:
                # Two scrapes at least, for a rate.
                await server.until(
                    'count(rate(balancesync_records_total{outcome="updated"}[1m])) == 2'
                )
                for expression in expressions():
                    assert await server.until(expression), expression
                await rules_are_fit(server)


async def rules_are_fit(server: Prometheus) -> None:
    """Each was evaluated without an error, names what there is, and two of them fire."""
    names = set(await server.get("label/__name__/values"))
    for rule in RULES:
        missing = set(re.findall(r"balancesync_\w+", rule["expr"])) - names
        assert not missing, rule["alert"]
    firing = 'ALERTS{alertname=~"BalanceSync(GuardRefused|ExpiringKeys)",alertstate="firing"}'
    await server.until(f"count({firing}) == 2")
    [group] = (await server.get("rules"))["groups"]
    assert {rule["name"]: rule["health"] for rule in group["rules"]} == {
        rule["alert"]: "ok" for rule in RULES
    }
    [leaders] = await server.until("sum(balancesync_leader)")
    assert leaders["value"][1] == "1"


@needs_prometheus
def test_the_alerts_fire_when_they_should() -> None:
    assert "SUCCESS" in promtool("check", "rules", str(ALERTS))
    assert "SUCCESS" in promtool("test", "rules", str(ALERTS.with_name("alerts_test.yml")))


def test_every_alert_is_tested() -> None:
    tests = ALERTS.with_name("alerts_test.yml").read_text()
    named = set(re.findall(r"\balertname(?:: |=\")(\w+)", tests))
    assert named == {rule["alert"] for rule in RULES}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_every_alert_tells_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["runbook_url"].endswith(f"/runbook.md#{rule['alert'].lower()}")
    assert f"### {rule['alert']}\n" in RUNBOOK.read_text()


def test_the_dashboard_is_one() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    assert [panel["title"] for panel in panels if panel["type"] == "row"] == [
        *("Is it safe?", "Runs", "Records", "Rejects and drift", "Live", "Servers and daemons")
    ]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert {variable["name"] for variable in dashboard["templating"]["list"]} == {
        *("datasource", "job", "env")
    }


def test_every_expression_is_of_one_installation() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            selectors = re.findall(r"balancesync_\w+(\{[^}]*\}|)|up(\{[^}]*\})", target["expr"])
            assert all('job="$job",env="$env"' in "".join(each) for each in selectors), panel


@needs_prometheus
def test_the_dashboard_keeps_two_installations_apart(tmp_path: Path) -> None:
    panels = {each["title"]: each for each in json.loads(DASHBOARD.read_text())["panels"]}
    known = (
        *("leader", "1x300", "1x300"),
        *('last_success_timestamp_seconds{exported_job="sync"}', "0x300", "0+60x300"),
        *("planned_interval_seconds", "3600x300", "3600x300"),
        *("expiring_keys", "7x300", "_x300"),
    )
    series = []
    for name, *values in zip(known[::3], known[1::3], known[2::3], strict=True):
        metric, _, more = name.partition("{")
        more = more.removesuffix("}") and f",{more.removesuffix('}')}"
        for env, each in zip(("prod", "test"), values, strict=True):
            labels = f'job="balancesync",instance="{env}:1",env="{env}"{more}'
            series.append({"series": f"balancesync_{metric}{{{labels}}}", "values": each})
    expected: list[dict[str, Any]] = []
    # Keys with a TTL are told also by who doesn't know yet whether they may be evicted.
    for title, env, value in (
        *(("Leaders", "prod", 1), ("Leaders", "test", 1)),
        *(("Last success", "prod", 5), ("Last success", "test", 0)),
        ("Expire or may be evicted", "prod", 7),
    ):
        expression = filled(panels[title]["targets"][0]["expr"], env)
        samples = [{"value": value}]
        expected.append({"expr": expression, "eval_time": "5h", "exp_samples": samples})
    test = {"interval": "1m", "input_series": series, "promql_expr_test": expected}
    file = tmp_path / "dashboard_test.yml"
    file.write_text(yaml.safe_dump({"evaluation_interval": "1m", "tests": [test]}))
    assert "SUCCESS" in promtool("test", "rules", str(file))
