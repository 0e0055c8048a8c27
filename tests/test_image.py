"""The image and compose.yaml as they are written; `make image-test` builds and runs them."""

import asyncio
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from running import processes

ROOT = Path(__file__).parents[1]
SERVICES = ("redis", "postgres", "balancesync")


@pytest.fixture
def services() -> dict[str, Any]:
    """The services of compose.yaml."""
    found: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    assert set(found) == set(SERVICES)
    return found


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_has_a_health_check(services: dict[str, Any], name: str) -> None:
    check = services[name]["healthcheck"]
    assert check["test"][0] == "CMD"
    assert check["retries"] > 1


def test_the_daemon_starts_when_both_servers_are_well(services: dict[str, Any]) -> None:
    assert services["balancesync"]["depends_on"] == {
        "redis": {"condition": "service_healthy"},
        "postgres": {"condition": "service_healthy"},
    }


def test_a_database_that_is_away_restarts_no_container(services: dict[str, Any]) -> None:
    assert "/livez" in services["balancesync"]["healthcheck"]["test"][-1]
    check = re.search(r"^HEALTHCHECK .*\\\n +CMD .*", (ROOT / "Dockerfile").read_text(), re.M)
    assert check is not None
    assert "/livez" in check[0]


def test_redis_keeps_what_it_holds(services: dict[str, Any]) -> None:
    command = services["redis"]["command"]
    assert command[command.index("--appendonly") + 1] == "yes"
    assert command[command.index("--maxmemory-policy") + 1] == "noeviction"
    assert services["redis"]["volumes"]


def test_the_daemon_may_do_nothing_it_need_not(services: dict[str, Any]) -> None:
    daemon = services["balancesync"]
    assert daemon["read_only"] is True
    assert daemon["cap_drop"] == ["ALL"]
    # Whoever may reach the host must not reach the daemon.
    assert all(port.startswith("127.0.0.1:") for port in daemon["ports"])


def test_the_image_runs_as_a_user_known_by_number() -> None:
    last = (ROOT / "Dockerfile").read_text().rpartition("\nFROM ")[2]
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", last, re.M)


def test_compose_shows_where_a_mapping_goes(services: dict[str, Any]) -> None:
    daemon = services["balancesync"]
    [mount] = daemon["volumes"]
    ours, theirs, right = mount.split(":")
    assert "\n[[mapping]]\n" in (ROOT / ours).read_text()
    assert (theirs, right) == (daemon["environment"]["BALANCESYNC_CONFIG"], "ro")


async def test_the_health_check_asks_where_the_daemon_listens(
    services: dict[str, Any], tmp_path: Path, postgres_dsn: str, redis_url: str
) -> None:
    found = re.search(r"^HEALTHCHECK .*\\\n +CMD (.*)", (ROOT / "Dockerfile").read_text(), re.M)
    assert found is not None
    python, *arguments = json.loads(found[1])
    assert [python, *arguments] == services["balancesync"]["healthcheck"]["test"][1:]

    async def check(file: Path) -> int:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, *arguments),
            cwd=tmp_path,
            env=os.environ | {"BALANCESYNC_CONFIG": str(file)},
            stderr=asyncio.subprocess.DEVNULL,
        )
        return await process.wait()

    async with processes(tmp_path, postgres_dsn, redis_url) as made:
        file = made.file()
        assert await check(file) != 0
        await made.daemon(file=file)
        assert await check(file) == 0
