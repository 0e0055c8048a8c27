"""The image and compose.yaml as they are written; `make image-test` builds and runs them."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

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
