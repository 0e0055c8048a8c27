"""The configuration: sources, precedence, every rule, and what the one line of an error says."""

import json
import re
import tomllib
from dataclasses import fields, is_dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from balancesync import settings
from balancesync.columns import ColumnType, Template
from balancesync.config import Config, HttpConfig, JobConfig, MappingConfig, RedisConfig, load
from balancesync.dsn import postgres_place
from balancesync.errors import ConfigError

ROOT = Path(__file__).parent.parent
SECRET = "hunter2"


def fails(path: Path | None, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, environ or {})
    message = str(caught.value)
    assert "\n" not in message
    assert SECRET not in message
    # A traceback prints causes too, unless they are suppressed.
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert caught.value.exit_code == 2
    return message


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("config.toml")


def mapping(**keys: Any) -> dict[str, str]:
    return {"BALANCESYNC_MAPPING": json.dumps([keys])}


# The reference and the documentation


def test_the_annotated_file_is_the_defaults() -> None:
    assert load(ROOT / "config.toml", {}) == Config()


def test_the_annotated_file_names_every_key_in_order() -> None:
    written = tomllib.loads((ROOT / "config.toml").read_text())
    assert list(written) == [section.name for section in fields(Config)]
    for section in fields(Config):
        model = getattr(Config(), section.name)
        table, model = (
            (written["mapping"][0], model[0])
            if section.name == "mapping"
            else (written[section.name], model)
        )
        assert list(table) == [key.name for key in fields(model)]
    assert list(written["schedule"]["jobs"]["hourly"]) == [key.name for key in fields(JobConfig)]


def documented() -> dict[str, list[str]]:
    rows = {}
    for line in (ROOT / "docs" / "configuration.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if match := re.fullmatch(r"`([a-z_.*]+)`", cells[0]):
            rows[match[1]] = cells[1:]
    return rows


def in_words(value: object) -> object:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, Decimal):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {key.name: in_words(getattr(value, key.name)) for key in fields(value)}
    if isinstance(value, dict):
        return {key: in_words(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


def test_the_documentation_has_every_key_with_its_default_limits_and_variable() -> None:
    rows = documented()
    expected: dict[str, object] = {}
    for key, hint in settings.leaves(Config).items():
        if key == ("mapping",):
            continue
        name = ".".join(key)
        expected[name] = getattr(getattr(Config(), key[0]), key[1])
        assert rows[name][2] == f"`{settings.variable(key)}`"
        if limits := re.search(r"from (\S+) to (\S+)", settings.requirement(hint)):
            share = rows[name][0] == "share"
            assert f"{limits[1]} to {limits[2]}" in ("0 to 1" if share else rows[name][0])
        if words := re.match("one of (.*)", settings.requirement(hint)):
            assert re.findall(r"`(\w+)`", rows[name][0]) == words[1].split(", ")
    for one in fields(MappingConfig):
        expected[f"mapping.{one.name}"] = getattr(MappingConfig(), one.name)
    for name, default in expected.items():
        written = tomllib.loads(f"value = {rows[name][1].strip('`')}")["value"]
        assert written == in_words(default), name
    assert set(rows) == expected.keys() | {"schedule.jobs.*.cron", "schedule.jobs.*.job"}


@pytest.mark.parametrize("example", re.findall(
    r"^(\S+): (.*)$",
    (ROOT / "docs" / "configuration.md").read_text().split("```")[1].removeprefix("text\n"),
    re.MULTILINE,
))  # fmt: skip
def test_the_documentation_quotes_real_messages(example: tuple[str, str], file: Path) -> None:
    origin, message = example
    file.write_text('[redis]\ntimeout = "soon"' if origin == "config.toml" else "")
    assert fails(None, {} if origin == "config.toml" else {origin: "x"}) == f"{origin}: {message}"


# Sources and precedence


def test_no_file_is_the_defaults_and_the_environment(file: Path) -> None:
    assert not file.exists()
    assert load(environ={}) == Config()
    assert load(environ={"BALANCESYNC_REDIS__TIMEOUT": "2"}).redis.timeout == 2.0


def test_the_file_comes_from_argument_then_variable_then_folder(file: Path) -> None:
    for name, count in (("config.toml", 1), ("variable.toml", 2), ("argument.toml", 3)):
        Path(name).write_text(f"[redis]\nscan_count = {count}")
    environ = {"BALANCESYNC_CONFIG": "variable.toml"}
    assert load(environ={}).redis.scan_count == 1
    assert load(environ={"BALANCESYNC_CONFIG": ""}).redis.scan_count == 1
    assert load(environ=environ).redis.scan_count == 2
    assert load(Path("argument.toml"), environ).redis.scan_count == 3


def test_a_file_asked_for_must_be_there(file: Path) -> None:
    missing = "no.toml: can't be read: No such file or directory"
    assert fails(Path("no.toml")) == missing
    assert fails(None, {"BALANCESYNC_CONFIG": "no.toml"}) == missing
    file.mkdir()
    assert fails(None) == "config.toml: can't be read: Is a directory"


@pytest.mark.parametrize(
    ("name", "text", "key", "value"),
    [
        ("REDIS__SCAN_COUNT", "7", "scan_count", 7),
        ("REDIS__TIMEOUT", "0.5", "timeout", 0.5),
        ("REDIS__CLUSTER", "true", "cluster", True),
        ("SCHEDULE__ON_START", "OFF", "on_start", False),
        ("SCHEDULE__TIMEZONE", "Europe/Berlin", "timezone", "Europe/Berlin"),
        ("LOG__LEVEL", "DEBUG", "level", "debug"),
        ("POSTGRES__SCHEMA", "123", "schema", "123"),
    ],
)
def test_the_environment_wins_over_the_file(
    name: str, text: str, key: str, value: object, file: Path
) -> None:
    file.write_text(
        '[redis]\nscan_count = 1\ntimeout = 9.0\n[schedule]\ntimezone = "UTC"\n'
        '[log]\nlevel = "info"\n[postgres]\nschema = "other"'
    )
    section = name.lower().split("__")[0]
    assert getattr(getattr(load(environ={f"BALANCESYNC_{name}": text}), section), key) == value


OTHER_TEXTS = {
    "url": "redis://h",
    "dsn": "postgresql://h",
    "token": "t",
    "host": "localhost",
    "schema": "s",
    "timezone": "Europe/Berlin",
    "level": "error",
    "format": "json",
}


# These are no scalars, or can't stand alone; the next test has them.
NO_SCALARS: set[tuple[str, ...]] = {
    ("mapping",),
    ("redis", "sentinel"),
    ("redis", "sentinel_service"),
    ("schedule", "jobs"),
}


@pytest.mark.parametrize("key", [key for key in settings.leaves(Config) if key not in NO_SCALARS])
def test_every_scalar_can_be_set_by_its_variable(key: tuple[str, str], file: Path) -> None:
    default = in_words(getattr(getattr(Config(), key[0]), key[1]))
    if isinstance(default, str):
        other: object = OTHER_TEXTS[key[1]]
    elif isinstance(default, bool):
        other = not default
    else:
        other = 1 if default != 1 else 0.5
    config = load(environ={settings.variable(key): str(other)})
    assert in_words(getattr(getattr(config, key[0]), key[1])) == other
    assert (
        sum(getattr(config, one.name) != getattr(Config(), one.name) for one in fields(Config)) == 1
    )


def test_lists_and_tables_come_as_json_and_replace_the_whole() -> None:
    config = load(
        ROOT / "config.toml",
        {
            "BALANCESYNC_REDIS__SENTINEL": '["a:26379", "[::1]:26380"]',
            "BALANCESYNC_REDIS__SENTINEL_SERVICE": "main",
            "BALANCESYNC_SCHEDULE__JOBS": '{"nightly": {"cron": "@daily", "job": "verify"}}',
            "BALANCESYNC_MAPPING": '[{"name": "one"}, {"name": "two", "table": "b"}]',
        },
    )
    assert config.redis.sentinel_addresses == (("a", 26379), ("::1", 26380))
    assert config.schedule.jobs == {"nightly": JobConfig(cron="@daily", job="verify")}
    assert [one.name for one in config.mapping] == ["one", "two"]


def test_a_files_mappings_and_jobs_replace_the_defaults(file: Path) -> None:
    file.write_text('[[mapping]]\nname = "a"\ntable = "a"\n[schedule.jobs]')
    config = load(environ={})
    assert [one.name for one in config.mapping] == ["a"]
    assert config.schedule.jobs == {}


def test_names_that_are_not_judged(file: Path) -> None:
    environ = {
        "BALANCESYNC_FOO": "1",
        "BALANCESYNC_TEST_REDIS": "redis://x",
        "BALANCESYNC_TEST_REDIS__URL": "x",
        "BALANCESYNCREDIS__URL": "x",
        "OTHER__URL": "x",
    }
    assert load(environ=environ) == Config()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("BALANCESYNC_REDIS__URLL", "; did you mean BALANCESYNC_REDIS__URL?"),
        ("BALANCESYNC_REDIS__url", "; did you mean BALANCESYNC_REDIS__URL?"),
        ("BALANCESYNC_HTTP__TOKEN__FILE", "; did you mean BALANCESYNC_HTTP__TOKEN_FILE?"),
        ("BALANCESYNC_MAPPING__0__KEY", None),
        ("BALANCESYNC_REDIS__TIMEOUT_FILE", None),
        ("BALANCESYNC_X__Y", None),
    ],
)
def test_unknown_variables_are_named(name: str, hint: str | None, file: Path) -> None:
    message = fails(None, {name: SECRET})
    assert message.startswith(f"{name}: is no setting")
    assert hint is None or message.endswith(hint)


# Secrets


def test_secrets_from_files_in_their_order(file: Path, tmp_path: Path) -> None:
    file.write_text('[http]\ntoken = "toml"')
    (tmp_path / "http.token").write_text("credential\n")
    Path("token").write_text("file\r\n")
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert load(environ={}).http.token.get_secret_value() == "toml"
    assert load(environ=environ).http.token.get_secret_value() == "credential"
    environ["BALANCESYNC_HTTP__TOKEN_FILE"] = "token"
    assert load(environ=environ).http.token.get_secret_value() == "file"
    del environ["BALANCESYNC_HTTP__TOKEN_FILE"]
    environ["BALANCESYNC_HTTP__TOKEN"] = "environment"
    assert load(environ=environ).http.token.get_secret_value() == "environment"


@pytest.mark.parametrize("name", ["POSTGRES__DSN", "REDIS__URL", "HTTP__TOKEN"])
def test_each_secret_has_its_file(name: str, file: Path, tmp_path: Path) -> None:
    section, key = name.lower().split("__")
    values = {"dsn": "postgresql://u:pw@h/d", "url": "redis://:pw@h/1", "token": "pw"}
    Path("secret").write_text(values[key] + "\n")
    credential = tmp_path / f"{section}.{key}"
    credential.write_text(values[key] + "\n")
    for environ in (
        {f"BALANCESYNC_{name}_FILE": "secret"},
        {"CREDENTIALS_DIRECTORY": str(tmp_path)},
    ):
        secret = getattr(getattr(load(environ=environ), section), key)
        assert secret.get_secret_value() == values[key]
    both = {f"BALANCESYNC_{name}": values[key], f"BALANCESYNC_{name}_FILE": "secret"}
    assert fails(None, both) == (
        f"BALANCESYNC_{name}: is set, and so is BALANCESYNC_{name}_FILE; keep one of them"
    )
    assert fails(None, {f"BALANCESYNC_{name}_FILE": "gone"}) == (
        f"BALANCESYNC_{name}_FILE: gone can't be read: No such file or directory"
    )
    Path("secret").write_bytes(b"\xff")
    assert "isn't UTF-8" in fails(None, {f"BALANCESYNC_{name}_FILE": "secret"})
    Path("secret").write_text(f"{SECRET} two words")
    message = fails(None, {f"BALANCESYNC_{name}_FILE": "secret"})
    assert message.startswith(f"BALANCESYNC_{name}_FILE: must be")
    credential.write_text(f"{SECRET} two words")
    message = fails(None, {"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert message.startswith(f"credential {section}.{key}: must be")


def test_no_representation_shows_a_secret(file: Path) -> None:
    config = load(
        environ={
            "BALANCESYNC_REDIS__URL": f"redis://:{SECRET}@h",
            "BALANCESYNC_POSTGRES__DSN": f"postgresql://u:{SECRET}@h",
            "BALANCESYNC_HTTP__TOKEN": SECRET,
        }
    )
    assert SECRET not in f"{config!r} {config!s} {config.redis} {config.http!r}"


def test_a_model_made_in_code_hides_its_input() -> None:
    with pytest.raises(ValidationError) as caught:
        RedisConfig(url=SecretStr(f"redis://:{SECRET}@x@h"))
    assert SECRET not in str(caught.value)


# One line for every mistake in the file


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[redis\n", "config.toml: isn't valid TOML: Expected ']' at the end of a table declaration"
         " (at line 1, column 7)"),
        ("a = 1\na = 2\n", "config.toml: isn't valid TOML: Cannot overwrite a value (at line 2"),
        ("a = " + "[" * 5000, "config.toml: isn't valid TOML: "),
        ("redi = 1", "config.toml: redi: is no setting; did you mean redis?"),
        ("[redis]\nurll = 'hunter2'", "config.toml: redis.urll: is no setting; did you mean url?"),
        ('[redis]\n"hunter"="hunter2"', "config.toml: redis.hunter: is no setting"),
        ('[redis]\n"a\\nb" = 1', 'config.toml: redis."a\\nb": is no setting'),
        ("redis = 'redis://:hunter2@h'", "config.toml: redis: must be a table"),
        ("[redis]\nurl = 5", "config.toml: redis.url: must be text"),
        ("[redis]\nurl = ['redis://:hunter2@h']", "config.toml: redis.url: must be text"),
        ("[redis]\ntimeout = 'x'",
         'config.toml: redis.timeout: must be a number from 0.1 to 86400 (got "x")'),
        ("[redis]\ntimeout = 'redis://:hunter2@h'",
         "config.toml: redis.timeout: must be a number from 0.1 to 86400"),
        ("[redis]\ntimeout = 0",
         "config.toml: redis.timeout: must be a number from 0.1 to 86400 (got 0)"),
        ("[redis]\ntimeout = inf", "config.toml: redis.timeout: must be a number from 0.1 to"),
        ("[redis]\ntimeout = true", "config.toml: redis.timeout: must be a number from 0.1 to"),
        ("[redis]\nscan_count = 0",
         "config.toml: redis.scan_count: must be a whole number from 1 to 1000000 (got 0)"),
        ("[redis]\nscan_count = 1000001", "config.toml: redis.scan_count: must be a whole number"),
        ("[redis]\nscan_count = '1000'", "config.toml: redis.scan_count: must be a whole number"),
        ("[redis]\nscan_count = 1.0", "config.toml: redis.scan_count: must be a whole number"),
        ("[redis]\nscan_count = true", "config.toml: redis.scan_count: must be a whole number"),
        ("[redis]\nmax_keys_per_second = -1", "config.toml: redis.max_keys_per_second: must be"),
        ("[redis]\ncluster = 1", "config.toml: redis.cluster: must be true or false (got 1)"),
        ("[redis]\ncluster = 'true'", "config.toml: redis.cluster: must be true or false"),
        ("[redis]\nsentinel = 'a:1'", 'config.toml: redis.sentinel: must be a list (got "a:1")'),
        ("[redis]\nsentinel = [1]", "config.toml: redis.sentinel #1: must be text (got 1)"),
        ("[redis]\nsentinel = ['a:1', 'a']\nsentinel_service = 's'",
         "config.toml: redis.sentinel #2: must give a server as host:port"),
        ("[redis]\nsentinel = ['redis://:hunter2@h:1']\nsentinel_service = 's'",
         "config.toml: redis.sentinel #1: must give a server as host:port"),
        ("[redis]\nsentinel = ['a:65536']\nsentinel_service = 's'",
         "config.toml: redis.sentinel #1: must give a server as host:port"),
        ("[redis]\nsentinel = [':1']\nsentinel_service = 's'", "config.toml: redis.sentinel #1"),
        ("[redis]\nsentinel = ['a:1']",
         "config.toml: redis.sentinel_service: is needed with sentinel"),
        ("[redis]\nsentinel_service = 's'",
         "config.toml: redis.sentinel: is needed with sentinel_service"),
        ("[redis]\ncluster = true\nsentinel = ['a:1']\nsentinel_service = 's'",
         "config.toml: redis.sentinel: can't go together with cluster = true"),
        ("[redis]\ncluster = true\nurl = 'redis://h/1'",
         "config.toml: redis.url: must name database 0: a cluster has no other"),
        ("[redis]\ncluster = true\nurl = 'unix:///s'", "config.toml: redis.url: can't be unix://"),
        ("[postgres]\nschema = ''", "config.toml: postgres.schema: must be a name, not empty"),
        ("[postgres]\nschema = 'pg_x'", "config.toml: postgres.schema: can't begin with pg_"),
        (f"[postgres]\nschema = '{'é' * 32}'", "config.toml: postgres.schema: is longer than the"),
        ("[postgres]\npool_size = 0", "config.toml: postgres.pool_size: must be a whole number"),
        ("[postgres]\napply_batch = 0", "config.toml: postgres.apply_batch: must be a whole"),
        ("[postgres]\nlock_timeout = 0.0", "config.toml: postgres.lock_timeout: must be a number"),
        ("[postgres]\nkeep_runs_days = 0", "config.toml: postgres.keep_runs_days: must be"),
        ("mapping = []", "config.toml: mapping: must have at least one [[mapping]]"),
        ("[mapping]\nname = 'a'", "config.toml: mapping: must be a list"),
        ("[schedule]\ntimezone = 'Mars/Olympus'", "config.toml: schedule.timezone: must name a"),
        ("[schedule]\ntimezone = 'Europe'", "config.toml: schedule.timezone: must name a time"),
        ("[schedule]\ntimezone = '../etc'", "config.toml: schedule.timezone: must name a time"),
        ("[schedule]\ntimezone = ''", "config.toml: schedule.timezone: must name a time zone"),
        ("[schedule]\nmin_interval = -1", "config.toml: schedule.min_interval: must be a whole"),
        ("[schedule.jobs]\na = '@daily'", "config.toml: schedule.jobs.a: must be a table"),
        ("[schedule.jobs]\na = { corn = '@daily' }",
         "config.toml: schedule.jobs.a.corn: is no setting; did you mean cron?"
         " (and 1 more, which `balancesync check` lists)"),
        ("[schedule.jobs]\na = { job = 'sync' }", "config.toml: schedule.jobs.a.cron: is missing"),
        ("[schedule.jobs]\na = { cron = '@daily', job = 'prune' }",
         'config.toml: schedule.jobs.a.job: must be one of sync, verify (got "prune")'),
        ("[schedule.jobs]\na = { cron = '99 * * * *' }",
         'config.toml: schedule.jobs.a.cron: minute "99" is not 0 to 59'),
        ("[schedule.jobs]\n'a b' = { cron = '@daily' }",
         'config.toml: schedule.jobs."a b": must be 1 to 63 letters'),
        ("[retry]\nattempts = 0", "config.toml: retry.attempts: must be a whole number from 1"),
        ("[retry]\ninitial = 5\nmaximum = 4", "config.toml: retry.maximum: must not be less than"),
        ("[guard]\nmax_loss = 1.1",
         "config.toml: guard.max_loss: must be a number from 0 to 1 (got 1.1)"),
        ("[guard]\nmax_change = -0.1", "config.toml: guard.max_change: must be a number from 0"),
        ("[guard]\nmax_rejects = nan", "config.toml: guard.max_rejects: must be a number from 0"),
        ("[live]\nflush_interval = 0", "config.toml: live.flush_interval: must be a number from"),
        ("[live]\nmax_pending = 0", "config.toml: live.max_pending: must be a whole number"),
        ("[live]\nrescan_interval = -1", "config.toml: live.rescan_interval: must be a whole"),
        ("[history]\nkeep_days = 0", "config.toml: history.keep_days: must be a whole number"),
        ("[http]\nport = 0", "config.toml: http.port: must be a whole number from 1 to 65535"),
        ("[http]\nport = 65536", "config.toml: http.port: must be a whole number from 1 to 65535"),
        ("[http]\nhost = ''", "config.toml: http.host: must not be empty"),
        ("[http]\nhost = '0.0.0.0'",
         "config.toml: http.token: is needed when http.host is not loopback"),
        ("[http]\nhost = '::'", "config.toml: http.token: is needed when"),
        ("[http]\nhost = 'example.org'", "config.toml: http.token: is needed when"),
        ("[http]\ntoken = 'hunter2 hunter2'", "config.toml: http.token: must be ASCII"),
        ("[http]\ntoken = 'hunter2é'", "config.toml: http.token: must be ASCII"),
        ("[log]\nlevel = 'loud'",
         "config.toml: log.level: must be one of debug, info, warning, error, critical"),
        ("[log]\nformat = 'xml'", "config.toml: log.format: must be one of auto, console, json"),
        ("[mapping]\nname = 'a'",
         "config.toml: mapping: must be a list of tables: write [[mapping]], not [mapping]"),
        ("[redis]\nsentinel = { a = 1 }", "config.toml: redis.sentinel: must be a list"),
        ("[log]\nlevel = 'loud'\nformat = 'xml'\n[http]\nport = 0",
         "config.toml: http.port: must be a whole number from 1 to 65535 (got 0)"
         " (and 2 more, which `balancesync check` lists)"),
    ],
)  # fmt: skip
def test_each_mistake_is_one_line_with_file_and_key(text: str, expected: str, file: Path) -> None:
    file.write_text(text)
    assert fails(None).startswith(expected)


def test_a_file_that_is_not_utf8(file: Path) -> None:
    file.write_bytes(b"[log]\nlevel = '\xff'")
    assert fails(None) == "config.toml: isn't UTF-8 text"


def test_a_byte_order_mark_and_windows_line_ends_are_fine(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbf[redis]\r\nscan_count = 5\r\n")
    assert load(environ={}).redis.scan_count == 5


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("REDIS__TIMEOUT", "x", 'must be a number from 0.1 to 86400 (got "x")'),
        ("REDIS__TIMEOUT", "", 'must be a number from 0.1 to 86400 (got "")'),
        ("REDIS__TIMEOUT", "nan", "must be a number from 0.1 to 86400"),
        ("REDIS__SCAN_COUNT", "1.5", "must be a whole number from 1 to 1000000"),
        ("REDIS__CLUSTER", "maybe", 'must be true or false (got "maybe")'),
        ("REDIS__SENTINEL", "a:1", "must be a list, written as JSON"),
        ("REDIS__URL", SECRET, "must be a URL that begins with redis://"),
        ("LOG__LEVEL", "loud", "must be one of debug"),
        ("SCHEDULE__JOBS", "[]", "must be a table"),
        ("SCHEDULE__JOBS", "{" + SECRET, "must be a table, written as JSON"),
        ("SCHEDULE__JOBS", '{"a": {"cron": "x"}}', "schedule.jobs.a.cron: must have 5 fields"),
        ("MAPPING", "[" * 100_000, "must be a list, written as JSON"),
        ("MAPPING", "{}", "must be a list"),
        ("MAPPING", "[]", "must have at least one [[mapping]]"),
        ("MAPPING", '[{"nam": "a"}]', "mapping #1.nam: is no setting; did you mean name?"),
        ("MAPPING", '[{"name": "a", "mode": "x"}]', "mapping.a.mode: must be one of upsert, up"),
        ("MAPPING", '[{"table": "a"}, {"table": 5}]', "mapping #2.table: must be text (got 5)"),
        ("MAPPING", '[{"key": "\\ud800{user_id}"}]', "mapping #1.key: isn't valid UTF-8"),
        ("POSTGRES__SCHEMA", "\udcff", "isn't valid UTF-8"),
    ],
)
def test_each_mistake_in_the_environment_names_the_variable(
    name: str, text: str, expected: str, file: Path
) -> None:
    assert fails(None, {f"BALANCESYNC_{name}": text}).startswith(f"BALANCESYNC_{name}: {expected}")


# Addresses


@pytest.mark.parametrize(
    "url",
    [
        "redis://h",
        "redis://h/",
        "redis://u:p%40%25ss@h:6379/15",
        "redis://[::1]:6379/0",
        "redis://h?db=3",
        "rediss://:p@h:6379/1?ssl_ca_certs=/etc/ca.pem&ssl_check_hostname=false",
        "unix:///run/redis@1.sock?db=2",
        "unix://u:p@/run/redis.sock",
    ],
)
def test_redis_urls_taken(url: str, file: Path) -> None:
    assert load(environ={"BALANCESYNC_REDIS__URL": url}).redis.url.get_secret_value() == url


@pytest.mark.parametrize(
    ("url", "database"),
    [("redis://h", 0), ("redis://h/4", 4), ("redis://h/4?db=5", 5), ("unix:///s?db=6", 6)],
)
def test_the_database_of_a_url(url: str, database: int) -> None:
    assert RedisConfig(url=SecretStr(url)).database == database


@pytest.mark.parametrize("scheme", ["redis", "postgresql"])
@pytest.mark.parametrize(
    "password",
    [
        f"{SECRET}{tail}"
        for tail in (
            "@",
            "%",
            "%zz",
            "%ff",
            "/",
            "?x",
            "#",
            "]",
            "[",
            "@x@y",
            "/1",
            "@x/y",
            "\u2100",
        )
    ],
)
def test_raw_passwords_are_told_to_be_encoded_and_not_shown(
    scheme: str, password: str, file: Path
) -> None:
    name = "BALANCESYNC_REDIS__URL" if scheme == "redis" else "BALANCESYNC_POSTGRES__DSN"
    message = fails(None, {name: f"{scheme}://user:{password}@host:1234/0"})
    assert message.startswith(f"{name}: a user name or password with @ / ? # [ ] or % in it must")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (f"http://{SECRET}", "must be a URL that begins with redis:// or rediss:// or unix://"),
        ("", "must be a URL"),
        ("redis:h", "must be a URL"),
        (f"redis://:{SECRET} @h", "holds a blank"),
        (f"redis://:{SECRET}\n@h", "holds a blank"),
        (f"redis://h:{SECRET}", "must give a server as host:port"),
        ("redis://h:0", "must give a server as host:port"),
        ("redis://h:65536", "must give a server as host:port"),
        ("redis://h/one", "must end in the number of a database"),
        ("redis://h/-1", "must end in the number of a database"),
        ("redis://h/0/1", "must end in the number of a database"),
        ("redis://h?db=", "must end in the number of a database"),
        ("redis://h?protocol=3", "takes no option but db"),
        ("redis://h?decode_responses=true", "takes no option but db"),
        ("redis://h?ssl_ca_certs=x", "takes no option but db"),
        ("unix://", "names no socket"),
    ],
)
def test_redis_urls_refused(url: str, expected: str, file: Path) -> None:
    message = fails(None, {"BALANCESYNC_REDIS__URL": url})
    assert message.startswith(f"BALANCESYNC_REDIS__URL: {expected}")


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://h",
        "postgres://u:p%40ss%25@h:5432/d?sslmode=require",
        "postgresql:///d?host=/run/postgresql",
        "postgresql://u@a:1,b,[::1]:3/d",
        "postgresql://h/d?sslmode=verify-full&target_session_attrs=read-write",
        # Settings of the server.
        "postgresql://h/d?search_path=a,b&statement_timeout=5s&application_name=x&my.own=1",
        "postgresql://h/d?ssl_min_protocol_version=TLSv1.3&tcp_user_timeout=5&options=-c%20a%3Db",
        "postgresql://h/d?client_encoding=utf-8&options=-cclient_encoding%3DUTF8",
        "postgresql://h/d?ssl=true",
    ],
)
def test_postgres_dsns_taken(dsn: str, file: Path) -> None:
    assert load(environ={"BALANCESYNC_POSTGRES__DSN": dsn}).postgres.dsn.get_secret_value() == dsn


@pytest.mark.parametrize(
    ("dsn", "expected"),
    [
        (
            f"host=h password={SECRET}",
            "must be a URL that begins with postgresql:// or postgres://",
        ),
        ("mysql://h", "must be a URL"),
        (f"postgresql://h:{SECRET}/d", "must give a server as host:port"),
        (f"postgresql://a:1,b:{SECRET}/d", "must give a server as host:port"),
        (
            "postgresql://h/d?connect_timeout=10",
            "can't have the option connect_timeout, which must go: postgres.timeout is for that",
        ),
        (
            "postgresql://h/d?sslmode=require&channel_binding=require",
            "can't have the option channel_binding, which must go: the driver has none",
        ),
        ("postgresql://h/d?keepalives=1", "can't have the option keepalives, which must go: "),
        ("postgresql://h/d?gssencmode=disable", "can't have the option gssencmode, which must go"),
        ("postgresql://h/d?sslmod=require", "has an option that is none; did you mean sslmode?"),
        (f"postgresql://h/d?{SECRET}", "has an option without a value"),
        (
            f"postgresql://h/d?sslmode={SECRET}",
            "must have one of disable, allow, prefer, require, verify-ca, verify-full as its"
            " option sslmode",
        ),
        (
            f"postgresql://h/d?ssl_min_protocol_version={SECRET}",
            "must have one of TLSv1, TLSv1.1, TLSv1.2, TLSv1.3 as its option",
        ),
        (f"postgresql://h/d?port={SECRET}", "must have a port as its option port"),
        ("postgresql://h/d?port=0", "must have a port as its option port"),
        ("postgresql://a,b,c/d?port=1,2", "must give one port for all hosts, or one for each"),
        ("postgresql:///d?host=h:5433", "must give the port as its option port, not behind"),
        ("postgresql://h/d?ssl=verify", "can't have the option ssl, which must go: sslmode is for"),
        ("postgresql://h/d?client_encoding=LATIN1", "must have UTF8 as client_encoding, if any"),
        ("postgresql://h/d?Client_Encoding=auto", "must have UTF8 as client_encoding, if any"),
        (
            "postgresql://h/d?options=-c%20client_encoding%3Dlatin1",
            "must have UTF8 as client_encoding, if any",
        ),
        ("postgresql://h/d?options=--client-encoding%3Dwin1252", "must have UTF8 as client_enc"),
        ("postgresql://h/d?options=-d%205", "can have nothing but settings as its option options"),
        (
            "postgresql://h/d?session_replication_role=replica",
            "can't have session_replication_role",
        ),
        ("postgresql://h/d?service=nowhere", "names a service that none of "),
        (
            "postgresql://h/d?sslmode=require&sslrootcert=/nowhere/root.crt",
            "names a file that can't be used as sslrootcert: No such file or directory",
        ),
        (
            f"postgresql://h/d?sslrootcert={__file__}",
            "names a file that can't be used as sslrootcert: it isn't in PEM",
        ),
        (
            "postgresql://h/d?sslcert=/nowhere/a.crt&sslkey=/nowhere/a.key",
            "names a file that can't be used as sslcert or sslkey: No such file or directory",
        ),
    ],
)
def test_postgres_dsns_refused(dsn: str, expected: str, file: Path) -> None:
    message = fails(None, {"BALANCESYNC_POSTGRES__DSN": dsn})
    assert message.startswith(f"BALANCESYNC_POSTGRES__DSN: {expected}")


@pytest.mark.parametrize(
    ("dsn", "place"),
    [
        ("postgresql://u:p@127.0.0.1/d", "localhost:5432/d"),
        ("postgresql://[::1]:5433/d?user=u", "localhost:5433/d"),
        ("postgresql:///d?host=/run/postgresql&port=5433", "localhost:5433/d"),
        ("postgresql://%2Frun%2Fpostgresql/d", "localhost:5432/d"),
        ("postgresql://u@B:1,a/?dbname=d%2Fe", "a:5432,b:1/d/e"),
        ("postgresql://u:p@h", "h:5432/u"),
        ("postgresql://h?user=u", "h:5432/u"),
        ("postgresql://h:1/d?port=2", "h:2/d"),
        ("postgresql://a:1,b/d", "a:1,b:5432/d"),
        ("postgresql://a/d?host=b&dbname=e+f", "b:5432/e+f"),
    ],
)
def test_one_place_has_one_name(dsn: str, place: str) -> None:
    assert postgres_place(dsn) == place


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_needs_no_token(host: str) -> None:
    assert HttpConfig(host=host).is_loopback


def test_another_host_with_a_token() -> None:
    assert not HttpConfig(host="192.0.2.1", token=SecretStr("t")).is_loopback


# Mappings


def test_the_default_mapping_for_the_engine() -> None:
    one = MappingConfig()
    assert one.template == Template(("balance:", ""), ("user_id",))
    assert one.member_template is None
    assert one.key_columns == ("user_id",)
    assert one.value_columns == ("balance",)
    assert one.types == {"user_id": ColumnType("bigint"), "balance": ColumnType("numeric", 20, 2)}
    assert one.field_of == {"balance": "balance"}
    assert one.table_name == ("public", "balances")
    assert one.tolerance == Decimal(0)


def test_orders_and_fields() -> None:
    one = MappingConfig(
        key="{b}:{a}",
        type="json",
        columns={"y": "text", "a": "int", "x": "boolean", "b": "uuid"},
        fields={"x": "is x"},
    )
    assert one.key_columns == ("b", "a")
    assert one.value_columns == ("y", "x")
    assert one.field_of == {"y": "y", "x": "is x"}
    assert list(one.types) == ["y", "a", "x", "b"]


def test_one_big_hash() -> None:
    one = MappingConfig(key="balances{{1}}", type="hash", member="u{user_id}")
    assert one.template == Template(("balances{1}",), ())
    assert one.member_template == Template(("u", ""), ("user_id",))
    assert one.key_columns == ("user_id",)


USERS = {
    "key": "{telegram_id}",
    "table": "users",
    "mode": "update",
    "columns": {"telegram_id": "bigint", "balance": "bigint"},
    "synced_at": "sync_at",
}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"name": ""}, "name: must be 1 to 63 letters"),
        ({"name": "a b"}, "name: must be 1 to 63 letters"),
        ({"name": "é"}, "name: must be 1 to 63 letters"),
        ({"name": "x" * 64}, "name: must be 1 to 63 letters"),
        ({"key": ""}, "key: must not be empty"),
        ({"key": "balances"}, 'key: needs a placeholder, such as "balance:{user_id}"'),
        ({"key": "b:{uid}"}, "key: names {uid}, which is none of the columns"),
        ({"key": "b:{user_id"}, 'key: has a single "{" or "}"'),
        ({"key": "b:user_id}"}, 'key: has a single "{" or "}"'),
        ({"key": "b:{}"}, 'key: has a single "{" or "}"'),
        ({"key": "{user_id}:{user_id}"}, "key: names {user_id} twice"),
        ({"key": "{user_id}{balance}"}, "key: has two placeholders side by side"),
        ({"key": "{user_id}:{balance}"}, "columns: needs a value column beside the key columns"),
        ({"ignore": [""]}, "ignore #1: must not be empty"),
        ({"ignore": "a*"}, 'ignore: must be a list (got "a*")'),
        ({"type": "set"}, "type: must be one of string, hash, json"),
        ({"member": "{user_id}"}, 'member: goes with type = "hash" only'),
        ({"type": "json", "member": "{user_id}"}, 'member: goes with type = "hash" only'),
        ({"type": "hash", "member": "{user_id}"}, "key: must be one key without placeholders"),
        ({"type": "hash", "member": "x", "key": "b"}, "member: needs a placeholder"),
        ({"type": "hash", "member": "{x}", "key": "b"}, "member: names {x}, which is none of"),
        ({"type": "hash", "member": "{", "key": "b"}, 'member: has a single "{" or "}"'),
        ({"type": "hash", "member": "{user_id}", "key": "b", "fields": {"balance": "x"}},
         'fields: goes with type = "json" or a "hash" without member'),
        ({"fields": {"balance": "x"}}, 'fields: goes with type = "json" or a "hash" without'),
        ({"type": "json", "fields": {"user_id": "x"}}, "fields.user_id: is none of the value"),
        ({"type": "json", "fields": {"balance": ""}}, "fields.balance: must not be empty"),
        ({"columns": {}}, "key: names {user_id}, which is none of the columns"),
        ({"columns": {"user_id": "bigint"}}, "columns: needs a value column"),
        ({"columns": {"user_id": "bigint", "a": "int", "b": "int"}},
         "columns: a string holds one value, but there are a, b"),
        ({"type": "hash", "member": "{user_id}", "key": "b",
          "columns": {"user_id": "bigint", "a": "int", "b": "int"}},
         "columns: a field holds one value, but there are a, b"),
        ({"type": "hash", "columns": {"user_id": "int", "a": "int", "b": "int"},
          "fields": {"a": "b"}}, "fields.a: is the field of another column too"),
        ({"columns": {"user_id": "bigint", "": "int"}}, 'columns."": must be a name, not empty'),
        ({"columns": {"user_id": "bigint", "x" * 64: "int"}}, f"columns.{'x' * 64}: is longer"),
        ({"columns": {"user_id": "bigint", "balance": 5}}, "columns.balance: must be text (got 5)"),
        ({"columns": {"user_id": "bigint", "balance": "float"}},
         "columns.balance: float is a binary fraction and can't hold a balance exactly"),
        ({"table": ""}, "table: must be [schema.]table"),
        ({"table": "a.b.c"}, "table: must be [schema.]table"),
        ({"table": "a b"}, "table: must be [schema.]table"),
        ({"table": 'a"b'}, "table: must be [schema.]table"),
        ({"table": "x" * 64}, "table: is longer than the 63 bytes"),
        ({"mode": "insert"}, "mode: must be one of upsert, update"),
        ({"on_absent": "zero"}, "on_absent: must be one of keep, delete"),
        ({"on_absent": "delete", "mode": "update"}, 'on_absent: delete needs mode = "upsert"'),
        ({"on_absent": "delete", "synced_at": ""}, "on_absent: delete needs synced_at"),
        ({"synced_at": "balance"}, "synced_at: can't be one of the columns"),
        ({"synced_at": "user_id"}, "synced_at: can't be one of the columns"),
        ({"synced_at": "x" * 64}, "synced_at: is longer than the 63 bytes"),
        ({"tolerance": 0.000001}, "tolerance: must be an exact number in quotes"),
        ({"tolerance": "-1"}, "tolerance: must be an exact number in quotes"),
        ({"tolerance": "NaN"}, "tolerance: must be an exact number in quotes"),
        ({"tolerance": "1_0"}, "tolerance: must be an exact number in quotes"),
        ({"tolerance": "0.005"}, "tolerance: must be less than half a step of balance: 0.005"),
        ({**USERS, "tolerance": "0.5"}, "tolerance: must be less than half a step of balance: 0.5"),
        ({"tolerance": "0.1", "columns": {"user_id": "int", "balance": "numeric"}},
         "tolerance: does nothing: no value column has a fixed scale"),
    ],
)  # fmt: skip
def test_each_mistake_in_a_mapping(keys: dict[str, Any], expected: str, file: Path) -> None:
    label = keys.get("name", "m")
    where = f"mapping.{label}" if re.fullmatch(r"[\wé]{1,63}", label) else "mapping #1"
    message = fails(None, mapping(**{"name": "m"} | keys))
    assert message.startswith(f"BALANCESYNC_MAPPING: {where}.{expected}")


def test_the_file_is_named_for_a_mapping_in_the_file(file: Path) -> None:
    file.write_text('[[mapping]]\nname = "a"\n[[mapping]]\nname = "b"\nkey = "x"')
    assert fails(None).startswith("config.toml: mapping.b.key: needs a placeholder")


@pytest.mark.parametrize("tolerance", ["0", "0.000001", "1e-6", "0.0049", "0.0000"])
def test_tolerances_taken(tolerance: str, file: Path) -> None:
    assert load(environ=mapping(tolerance=tolerance)).mapping[0].tolerance == Decimal(tolerance)


def test_a_tolerance_beside_columns_without_a_step() -> None:
    columns = {"user_id": "int", "a": "numeric(9,3)", "b": "numeric", "c": "text"}
    one = MappingConfig(type="json", columns=columns, tolerance=Decimal("0.0004"))
    assert one.tolerance == Decimal("0.0004")


def two(first: dict[str, Any], second: dict[str, Any]) -> dict[str, str]:
    return {"BALANCESYNC_MAPPING": json.dumps([{"name": "a"} | first, {"name": "b"} | second])}


BONUS = USERS | {"key": "b:{telegram_id}", "columns": {"telegram_id": "bigint", "bonus": "int"}}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (USERS, BONUS),
        (USERS, BONUS | {"key": "{telegram_id}"}),
        ({}, {"table": "other"}),
        ({"table": "a.users"}, {"table": "b.users"}),
    ],
)
def test_mappings_that_live_together(
    first: dict[str, Any], second: dict[str, Any], file: Path
) -> None:
    assert len(load(environ=two(first, second)).mapping) == 2


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({}, {"name": "a", "table": "b"}, 'has two mappings called "a"'),
        ({}, {}, 'has "a" and "b" on one table, which needs mode = "update" in both'),
        ({}, {"table": 'public."balances"'}, 'has "a" and "b" on one table'),
        (USERS, BONUS | {"mode": "upsert"}, 'has "a" and "b" on one table, which needs mode'),
        (USERS, USERS, 'has "a" and "b" on one table, which would both write balance'),
        (USERS, BONUS | {"key": "{id}", "columns": {"id": "bigint", "bonus": "int"}},
         'has "a" and "b" on one table, which needs the same key columns in both'),
        (USERS, BONUS | {"columns": {"telegram_id": "text", "bonus": "int"}},
         'has "a" and "b" on one table, which needs the same key columns in both'),
        (USERS, BONUS | {"synced_at": "balance"}, 'has "a" and "b" on one table, which would both'),
    ],
)  # fmt: skip
def test_mappings_that_do_not(
    first: dict[str, Any], second: dict[str, Any], expected: str, file: Path
) -> None:
    assert fails(None, two(first, second)).startswith(f"BALANCESYNC_MAPPING: {expected}")
