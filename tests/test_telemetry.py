"""Logs: their form, that no value can forge one, that no secret gets into one."""

import json
import logging
from datetime import datetime

import pytest
import structlog
from pydantic import SecretStr

from balancesync import telemetry
from balancesync.config import Config, HttpConfig, LogConfig, PostgresConfig, RedisConfig

log = structlog.get_logger("tests")
FORGED = (
    'x\n2026-01-01T00:00:00Z [info     ] run status=succeeded\x1b[2J\u2028\r\x85\u202e\u2066\u200f"'
)


def logged(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines on stderr; nothing may be on stdout."""
    out, err = capsys.readouterr()
    assert out == ""
    return err.split("\n")[:-1]


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure(LogConfig(), stream_is_tty=False)
    log.info("run", job="sync", count=3, warnings=["a"], error=None)
    [line] = logged(capsys)
    document = json.loads(line)
    assert document.pop("timestamp").endswith("Z")
    assert document == {
        "event": "run",
        "level": "info",
        "job": "sync",
        "count": 3,
        "warnings": ["a"],
        "error": None,
    }


def test_times_are_utc(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure(LogConfig(), stream_is_tty=False)
    log.info("now")
    at = datetime.fromisoformat(json.loads(logged(capsys)[0])["timestamp"])
    assert abs((datetime.now(at.tzinfo) - at).total_seconds()) < 60


@pytest.mark.parametrize(
    ("form", "tty", "is_json"),
    [
        ("auto", True, False),
        ("auto", False, True),
        ("json", True, True),
        ("console", False, False),
    ],
)
def test_auto_is_for_people_on_a_terminal(
    capsys: pytest.CaptureFixture[str], form: str, tty: bool, is_json: bool
) -> None:
    telemetry.configure(LogConfig(format=form), stream_is_tty=tty)  # type: ignore[arg-type]  # parametrized
    log.info("run", job="sync")
    [line] = logged(capsys)
    assert line.startswith("{") == is_json
    assert ("\x1b[" in line) == tty * (not is_json)


@pytest.mark.parametrize("form", ["console", "json"])
def test_no_value_forges_a_line(capsys: pytest.CaptureFixture[str], form: str) -> None:
    telemetry.configure(LogConfig(format=form), stream_is_tty=False)  # type: ignore[arg-type]  # parametrized
    log.warning(FORGED, key=FORGED, keys=[FORGED], inner={FORGED: FORGED}, raw=FORGED.encode())
    [line] = logged(capsys)
    assert line.isprintable()
    if form == "json":
        assert json.loads(line)["key"] == FORGED


@pytest.mark.parametrize("form", ["console", "json"])
def test_secrets_are_hidden_wherever_they_are(
    capsys: pytest.CaptureFixture[str], form: str
) -> None:
    config = Config(
        redis=RedisConfig(url=SecretStr("rediss://bob:p%40ss-word@h/0")),
        postgres=PostgresConfig(dsn=SecretStr("postgresql://u:pg-pass@h1:1,h2:2/db")),
        http=HttpConfig(token=SecretStr("tok-en")),
    )
    secrets = telemetry.secrets_of(config)
    assert set(secrets) == {"p%40ss-word", "p@ss-word", "pg-pass", "tok-en"}
    telemetry.configure(LogConfig(format=form), secrets, stream_is_tty=False)  # type: ignore[arg-type]  # parametrized
    for secret in secrets:
        log.error(f"e {secret}", value=secret, many=[{"x": (secret,)}], error=OSError(secret))
        logging.getLogger("other").error("said %s", secret)
        try:
            raise ValueError(secret)
        except ValueError:
            log.exception("failed")
    text = "\n".join(logged(capsys))
    assert text.count("***") >= 6 * len(secrets)
    assert not [secret for secret in secrets if secret in text]


def test_short_and_empty_passwords_hide_nothing() -> None:
    config = Config(postgres=PostgresConfig(dsn=SecretStr("postgresql://u:a@h/db")))
    assert telemetry.secrets_of(config) == ()


def test_levels(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure(LogConfig(level="warning"), stream_is_tty=False)
    log.info("quiet")
    log.warning("loud")
    telemetry.configure(LogConfig(level="debug"), stream_is_tty=False)
    log.debug("now")
    assert [json.loads(line)["event"] for line in logged(capsys)] == ["loud", "now"]


def test_what_libraries_log_comes_along(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure(LogConfig(), stream_is_tty=False)
    logging.getLogger("asyncio").error("Task %s was destroyed", "x\ny")
    logging.getLogger("asyncio").info("not this")
    [line] = logged(capsys)
    document = json.loads(line)
    assert (document["logger"], document["event"]) == ("asyncio", "Task x\ny was destroyed")
