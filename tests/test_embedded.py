"""The private servers: they keep what they promised to keep, and leave nothing behind."""

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import asyncpg
import pytest
from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from balancesync import processes, programs
from balancesync.embedded import PostgresServer, RedisServer
from balancesync.errors import EmbeddedError

StartPostgres = Callable[..., PostgresServer]
StartRedis = Callable[..., RedisServer]

ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not ROOT, reason="only root can become another user")
KEEP_ALL = {"appendonly": "yes", "appendfsync": "always"}


def client_of(server: RedisServer) -> Redis:
    return Redis.from_url(server.url, retry=Retry(NoBackoff(), 0), socket_timeout=0.2)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach, which pytest's own tmp_path isn't."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


async def test_killed_postgres_comes_back_with_all_that_was_committed(
    private_postgres: StartPostgres,
) -> None:
    server = private_postgres()
    port, folder = server.port, server.folder
    connection = await asyncpg.connect(server.dsn)
    await connection.execute("CREATE TABLE t AS SELECT 7 AS n")
    server.kill()
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
        await connection.fetchval("SELECT n FROM t")
    connection.terminate()
    with pytest.raises(ConnectionRefusedError):
        await asyncpg.connect(server.dsn)

    server.start()
    assert (server.port, server.folder) == (port, folder)
    connection = await asyncpg.connect(server.dsn)
    assert await connection.fetchval("SELECT n FROM t") == 7
    await connection.close()


async def test_killed_redis_comes_back_with_its_append_only_file(private_redis: StartRedis) -> None:
    server = private_redis(KEEP_ALL)
    port = server.port
    async with client_of(server) as client:
        await client.set("balance:1", "1.50")
        before = (await client.info("server"))["run_id"]
        server.kill()
        with pytest.raises(exceptions.ConnectionError):
            await client.get("balance:1")
        server.start()
        assert server.port == port
        assert await client.get("balance:1") == b"1.50"
        assert (await client.info("server"))["run_id"] != before


async def test_killed_redis_without_persistence_comes_back_empty(private_redis: StartRedis) -> None:
    server = private_redis()
    async with client_of(server) as client:
        await client.set("balance:1", "1.50")
    server.kill()
    server.start()
    async with client_of(server) as client:
        assert await client.dbsize() == 0


async def test_settings_changed_while_down_count_at_the_next_start(
    private_redis: StartRedis,
) -> None:
    server = private_redis()
    server.stop()
    server.settings["maxmemory"] = "50mb"
    server.start()
    async with client_of(server) as client:
        assert await client.config_get("maxmemory") == {"maxmemory": "52428800"}


async def test_suspended_postgres_hangs_and_goes_on_after(private_postgres: StartPostgres) -> None:
    server = private_postgres()
    connection = await asyncpg.connect(server.dsn)
    server.suspend()
    with pytest.raises(TimeoutError):
        await connection.fetchval("SELECT 1", timeout=0.2)
    server.resume()
    connection.terminate()
    connection = await asyncpg.connect(server.dsn)
    assert await connection.fetchval("SELECT 1") == 1
    await connection.close()


async def test_suspended_redis_hangs_and_goes_on_after(private_redis: StartRedis) -> None:
    server = private_redis()
    async with client_of(server) as client:
        await client.ping()
        server.suspend()
        with pytest.raises(exceptions.TimeoutError):
            await client.ping()
        server.resume()
        assert await client.ping()


async def test_a_password_is_asked_for_and_carried_in_dsn_and_url(
    private_postgres: StartPostgres, private_redis: StartRedis
) -> None:
    password = "a@b%c/ \"d\\'"
    postgres, redis = private_postgres(password=password), private_redis(password=password)
    connection = await asyncpg.connect(postgres.dsn)
    await connection.close()
    async with client_of(redis) as client:
        assert await client.ping()

    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(host="127.0.0.1", port=postgres.port, user="postgres", password="x")
    async with Redis(port=redis.port, retry=Retry(NoBackoff(), 0)) as stranger:
        with pytest.raises(exceptions.AuthenticationError):
            await stranger.ping()
    assert not [path for path in postgres.folder.iterdir() if path.name == "password"]


async def test_cluster_and_sentinel_can_be_had(private_redis: StartRedis) -> None:
    node = private_redis({"cluster-enabled": "yes"})
    async with client_of(node) as client:
        assert (await client.info("cluster"))["cluster_enabled"] == 1
    primary = private_redis()
    sentinel = private_redis({"sentinel monitor main": f"127.0.0.1 {primary.port} 1"})
    async with client_of(sentinel) as client:
        assert (await client.info("sentinel"))["master0"]["name"] == "main"


def test_nothing_is_left_after_a_kill_and_a_close(
    private_postgres: StartPostgres, private_redis: StartRedis
) -> None:
    for server in (private_postgres(), private_redis()):
        folder, pid = server.folder, server.pid
        server.suspend()
        server.kill()
        server.close()
        server.close()
        assert not folder.exists()
        assert pid not in processes.living()
        with pytest.raises(EmbeddedError, match="isn't running"):
            server.suspend()


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_when_the_owner_dies(end: signal.Signals) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with owner:
        assert owner.stdout is not None
        pids = [int(word) for word in owner.stdout.readline().split()]
        folders = [Path(word) for word in owner.stdout.readline().split()]
        assert processes.living().keys() >= set(pids)
        assert all(folder.is_dir() for folder in folders)
        owner.send_signal(end)
        owner.wait(20)
    assert processes.wait_for(lambda: not processes.living().keys() & set(pids), 15)
    assert processes.wait_for(lambda: not any(folder.exists() for folder in folders), 15)


OWNER = """
import sys
from balancesync.embedded import PostgresServer, RedisServer
sys.excepthook = lambda *what: None
servers = [PostgresServer(durable=False).start(), RedisServer().start()]
print(*(server.pid for server in servers))
print(*(server.folder for server in servers), flush=True)
sys.stdin.read()
"""


def test_a_server_that_cannot_start_says_why_and_leaves_nothing() -> None:
    for server, reason in (
        (PostgresServer({"shared_buffers": "plenty"}), "shared_buffers"),
        (RedisServer({"no-such-setting": "1"}), "Bad directive"),
    ):
        with pytest.raises(EmbeddedError, match=reason) as caught:
            server.start()
        assert "\n" not in str(caught.value)
        with pytest.raises(EmbeddedError, match="isn't started"):
            _ = server.folder


def test_a_server_that_never_answers_is_given_up() -> None:
    deaf = RedisServer({"bind": "127.0.0.2"}, timeout=0.3)
    with pytest.raises(EmbeddedError, match=r"didn't answer in 0\.3 s"):
        deaf.start()
    with pytest.raises(EmbeddedError, match="isn't running"):
        _ = deaf.pid


def test_a_port_that_another_server_holds_is_told(private_redis: StartRedis) -> None:
    holder = private_redis()
    late = RedisServer({"port": str(holder.port)})
    with pytest.raises(EmbeddedError, match="found no free port"):
        late.start()


@needs_root
def test_as_root_postgres_runs_as_another_user(private_postgres: StartPostgres) -> None:
    server = private_postgres()
    assert Path(f"/proc/{server.pid}").stat().st_uid in {
        pwd.getpwnam("postgres").pw_uid if _exists("postgres") else -1,
        pwd.getpwnam("nobody").pw_uid,
    }


@needs_root
def test_an_installation_in_a_closed_folder_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private_postgres: StartPostgres
) -> None:
    tmp_path.chmod(0o700)
    real = programs.find_postgres()
    package = real.parents[1]
    closed = tmp_path / package.name / real.parent.name
    shutil.copytree(real.parent, closed, symlinks=True)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, tmp_path / libraries.name)
    monkeypatch.setenv(programs.POSTGRES_VARIABLE, str(closed / "bin"))

    server = private_postgres()
    assert Path(f"/proc/{server.pid}/exe").resolve().is_relative_to(server.folder)


@needs_root
def test_an_ordinary_user_can_start_both(open_folder: Path) -> None:
    user = pwd.getpwnam("nobody")
    modules = [str(Path(asyncpg.__file__).parents[1]), str(Path(programs.__file__).parents[1])]
    python = _python_for_all()
    if not python or not all(programs.open_to_all(Path(folder)) for folder in modules):
        pytest.skip("Python or its packages lie where other users can't reach them")
    os.chown(open_folder, user.pw_uid, user.pw_gid)
    done = subprocess.run(
        [python, "-c", BRIEFLY],
        check=False,
        capture_output=True,
        text=True,
        user=user.pw_uid,
        group=user.pw_gid,
        extra_groups=[],
        cwd=open_folder,
        env={
            "TMPDIR": str(open_folder),
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(modules),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "postgresql redis\n", "")
    assert not list(open_folder.iterdir())


BRIEFLY = """
from balancesync.embedded import PostgresServer, RedisServer
with PostgresServer() as postgres, RedisServer() as redis:
    print(postgres.dsn.partition(":")[0], redis.url.partition(":")[0])
"""


@pytest.mark.parametrize(
    ("find", "variable", "package"),
    [
        (programs.find_postgres, programs.POSTGRES_VARIABLE, "initdb and postgres"),
        (programs.find_redis, programs.REDIS_VARIABLE, "redis-server"),
    ],
)
def test_missing_programs_are_an_error_that_names_the_way_out(
    find: Callable[[], Path],
    variable: str,
    package: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, str(tmp_path))
    with pytest.raises(EmbeddedError, match=variable):
        find()

    monkeypatch.delenv(variable)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(programs, "DEBIAN_POSTGRES", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EmbeddedError) as caught:
        find()
    message = str(caught.value)
    assert package in message
    assert "pip install 'balancesync[embedded]'" in message
    assert variable in message
    assert "\n" not in message


def test_programs_on_the_path_and_in_a_variable_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(programs.POSTGRES_VARIABLE, raising=False)
    monkeypatch.delenv(programs.REDIS_VARIABLE, raising=False)
    for name in ("initdb", "postgres", "redis-server"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert programs.find_postgres() == tmp_path
    assert programs.find_redis() == tmp_path / "redis-server"

    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv(programs.POSTGRES_VARIABLE, str(tmp_path))
    monkeypatch.setenv(programs.REDIS_VARIABLE, str(tmp_path / "redis-server"))
    assert programs.find_postgres() == tmp_path
    assert programs.find_redis() == tmp_path / "redis-server"


def test_the_newest_of_several_installations_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("9.6", "15", "18"):
        (tmp_path / version / "bin").mkdir(parents=True)
        for name in ("initdb", "postgres"):
            (tmp_path / version / "bin" / name).touch(mode=0o755)
    monkeypatch.delenv(programs.POSTGRES_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(programs, "DEBIAN_POSTGRES", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert programs.find_postgres() == tmp_path / "18" / "bin"


def test_processes_are_known_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not shutil.which("ps"):
        pytest.skip("no ps on this machine")
    monkeypatch.setattr(processes, "_PROC", tmp_path)
    assert processes.living()[os.getpid()][0] == os.getppid()


async def test_each_test_has_an_empty_database_and_an_empty_redis(
    pg: asyncpg.Connection, redis: Redis
) -> None:
    assert await pg.fetchval("SELECT count(*) FROM pg_class WHERE relname = 'left_over'") == 0
    assert await redis.dbsize() == 0
    await pg.execute("CREATE TABLE left_over ()")
    await redis.set("left", "over")


# The same once more, to see what the first one left.
test_and_so_has_the_next = test_each_test_has_an_empty_database_and_an_empty_redis


def _python_for_all() -> str | None:
    """An interpreter that every user can run, and that is new enough."""
    enough = "import sys; sys.exit(sys.version_info < (3, 11))"
    for python in (sys.executable, "/usr/bin/python3"):
        usable = Path(python).exists() and programs.open_to_all(Path(python))
        if usable and not subprocess.run([python, "-c", enough], check=False).returncode:
            return python
    return None


def _exists(user: str) -> bool:
    return user in {entry.pw_name for entry in pwd.getpwall()}
