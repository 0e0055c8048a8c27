"""What is shipped for systemd, without systemd; `make systemd-test` boots a real one."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from balancesync.config import Config

SYSTEMD = Path(__file__).parents[1] / "systemd"


def test_the_watchdog_is_slower_than_any_silence_of_a_run_that_goes_well() -> None:
    [seconds] = re.findall(
        r"^WatchdogSec=(\d+)$", (SYSTEMD / "balancesync.service").read_text(), re.M
    )
    config = Config()
    assert int(seconds) > 2 * config.postgres.timeout + config.retry.maximum


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    """The folder of the service, with secrets in it that lead nowhere."""
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials/postgres.dsn").write_text(
        "postgresql://127.0.0.1:1/from-the-credential"
    )
    (tmp_path / "credentials/redis.url").write_text("redis://127.0.0.1:1/0")
    (tmp_path / "config.toml").write_text("[http]\nport = 1\n")
    (tmp_path / "environment").write_text(
        "# $(exit 9)\nOTHER=1\nBALANCESYNC_LOG__LEVEL=$(exit 9)\nBALANCESYNC_HTTP__PORT='2'"
    )
    return tmp_path


def beside(etc: Path, *command: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """A command beside the service whose folder this is."""
    script = (SYSTEMD / "balancesync").read_text()
    script = script.replace("program=/opt/balancesync/bin/balancesync", f"program={etc}/program")
    script = script.replace("folder=/etc/balancesync", f"folder={etc}")
    (etc / "program").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m balancesync "$@"\n')
    (etc / "program").chmod(0o755)
    clean = {name: text for name, text in os.environ.items() if not name.startswith("BALANCESYNC_")}
    return subprocess.run(
        ["/bin/sh", "-c", script, "balancesync", *command],
        env=clean | environ,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_command_beside_the_service_has_its_configuration_and_secrets(etc: Path) -> None:
    done = beside(etc, "cancel", BALANCESYNC_LOG__LEVEL="info")
    assert (done.returncode, done.stdout) == (75, "")
    # Of the environment file, which is above config.toml.
    assert "no daemon answers at 127.0.0.1:2" in done.stderr
    done = beside(etc, "status", BALANCESYNC_LOG__LEVEL="info", BALANCESYNC_HTTP__PORT="3")
    assert done.returncode == 75
    assert "neither PostgreSQL nor Redis answers" in done.stdout
    assert "127.0.0.1:1/from-the-credential" in done.stdout
    done = beside(etc, "cancel", BALANCESYNC_LOG__LEVEL="info", BALANCESYNC_HTTP__PORT="3")
    assert "no daemon answers at 127.0.0.1:3" in done.stderr


def test_nothing_of_the_environment_file_is_executed(etc: Path) -> None:
    done = beside(etc, "status")
    assert (done.returncode, done.stdout) == (2, "")
    assert "BALANCESYNC_LOG__LEVEL" in done.stderr
    assert "$(exit 9)" in done.stderr


def test_who_may_not_read_the_secrets_is_told_who_may(etc: Path) -> None:
    (etc / "none").mkdir()
    done = beside(etc / "none", "status", "--watch")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"balancesync: {etc}/none/credentials can't be read, only by root:"
        " sudo balancesync status --watch\n"
    )


def test_it_can_be_run() -> None:
    assert (SYSTEMD / "balancesync").stat().st_mode & stat.S_IXOTH
