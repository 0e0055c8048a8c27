"""The demo, as a newcomer runs it, and the real balances that it carries."""

import asyncio
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest
from pydantic import SecretStr

from balancesync.config import Config, MappingConfig, PostgresConfig, RedisConfig
from balancesync.demo import read_balances
from balancesync.errors import RunFailed
from balancesync.proof import TOTAL_WEI, Proof
from balancesync.traffic import put


def test_the_balances_are_those_of_the_genesis_block() -> None:
    balances = read_balances()
    assert len(balances) == 8_893
    assert sum(balances.values()) == TOTAL_WEI == 72_009_990_499_480_000_000_000_000
    # The account of the Ethereum Foundation, known from any block explorer.
    assert balances["0x5abfec25f74cd88437631a7731906932776356f9"] == 11_901_484_239_480 * 10**12


class Demo:
    """A demo in a process of its own, with a folder for whatever it puts anywhere."""

    def __init__(self, process: asyncio.subprocess.Process, folder: Path) -> None:
        self.process = process
        self.folder = folder
        self.out = ""

    async def wait_for(self, pattern: str) -> None:
        """Read what it says until a line matches."""
        assert self.process.stdout
        while line := (await self.process.stdout.readline()).decode():
            self.out += line
            if re.search(pattern, line):
                return
        raise AssertionError(f"{pattern!r} never came:\n{self.out}")

    async def end(self) -> str:
        """Wait for its end, and give what it wrote to stderr."""
        out, err = (piece.decode() for piece in await self.process.communicate())
        self.out += out
        return err

    async def check_gone(self) -> None:
        """Nothing may be left: no folder, and nothing that listens."""
        assert os.listdir(self.folder) == []
        ports = re.search(r"listens on (\d+), Redis on (\d+)", self.out)
        assert ports
        http = re.findall(r"It listens at http://127\.0\.0\.1:(\d+) ", self.out)
        for port in map(int, (*ports.groups(), *http)):
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", port)


@pytest.fixture
async def start_demo(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[Demo]]]:
    folder = Path(tempfile.mkdtemp(prefix="demo-"))
    os.chmod(folder, 0o755)  # noqa: S103  # run by root, PostgreSQL is another user's process
    # Neither the environment nor a file may lead it to real servers.
    (tmp_path / "config.toml").write_text("[redis]\nurl = 'redis://127.0.0.1:1/0'\n")
    environment = os.environ | {
        "TMPDIR": str(folder),
        "BALANCESYNC_POSTGRES__DSN": "postgresql://127.0.0.1:1/postgres",
        "BALANCESYNC_REDIS__URL": "redis://127.0.0.1:1/0",
    }
    started = []

    async def start(*options: str) -> Demo:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "balancesync", "demo", *options),
            cwd=tmp_path,
            env=environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        started.append(process)
        return Demo(process, folder)

    yield start
    for process in started:
        if process.returncode is None:
            process.kill()
            await process.communicate()
    shutil.rmtree(folder)


Start = Callable[..., Awaitable[Demo]]
SIGNALS = [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
GUARD = 'balancesync: mapping "balances": Redis has no key at all'


async def test_the_demo_tells_its_story_proves_it_and_leaves_nothing_behind(
    start_demo: Start,
) -> None:
    demo = await start_demo("--once")
    err = await demo.end()
    assert demo.process.returncode == 0, err
    story, _, daemon = demo.out.partition("$ balancesync run\n")
    commands = re.findall(r"^\$ balancesync (.+)$", story, re.MULTILINE)
    assert commands == [
        "sync",
        "sync --dry-run",
        "sync",
        "sync",
        "rejects",
        "verify",
        *["sync"] * 2,
    ]
    assert story.count(f"8,893 rows, {TOTAL_WEI} wei") == 5
    assert "balances    8,893         0         0      400      8,493" in story
    assert "Redis and PostgreSQL agree" in story
    assert "sync refused" in story
    assert len(err.splitlines()) == 1
    assert err.startswith(GUARD)
    assert re.search(r"sync \(startup\) succeeded, 8,893 keys read", daemon)
    assert "follows every change by itself, in live mode" in daemon
    # No sync but the first: what PostgreSQL has, live mode has brought.
    assert daemon.count("sync (") == 1
    written = re.search(r"live \(live\) succeeded, [\d,]+ keys read, ([\d,]+) rows written", daemon)
    assert written
    assert int(written[1].replace(",", "")) > 0
    assert "verify (cli) succeeded, 8,893 keys read, 0 rows differ" in daemon
    proofs = re.findall(r"^proven after ([\d,]+) transfers: .*", daemon, re.MULTILINE)
    assert len(proofs) == 1
    assert int(proofs[0].replace(",", "")) > 0
    assert f"all 8,893 balances agree on both sides, their sum is exactly {TOTAL_WEI} wei" in daemon
    await demo.check_gone()


@pytest.mark.parametrize("number", [*SIGNALS, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
async def test_a_signal_ends_the_running_daemon_and_leaves_nothing_behind(
    start_demo: Start, number: signal.Signals
) -> None:
    demo = await start_demo()
    await demo.wait_for(r"live: [\d,]+ transfers so far, [1-9][\d,]* rows written")
    url = re.search(r"It listens at (http://\S+) ", demo.out)
    assert url
    async with aiohttp.ClientSession() as client, client.get(f"{url[1]}/health") as answer:
        assert answer.status == 200
    demo.process.send_signal(number)
    err = await demo.end()
    assert demo.process.returncode == 0, err
    assert [line[: len(GUARD)] for line in err.splitlines()] == [GUARD]
    assert "Servers and data are gone again." in demo.out
    await demo.check_gone()


@pytest.mark.parametrize("number", SIGNALS)
async def test_a_signal_in_the_middle_of_the_story_is_no_failure(
    start_demo: Start, number: signal.Signals
) -> None:
    demo = await start_demo()
    await demo.wait_for(r"\$ balancesync sync --dry-run")
    demo.process.send_signal(number)
    assert await demo.end() == ""
    assert demo.process.returncode == 0
    assert "$ balancesync run" not in demo.out
    assert "Stopped." in demo.out
    await demo.check_gone()


async def test_a_proof_that_fails_is_a_failure(redis_url: str, postgres_dsn: str) -> None:
    # The application's money isn't what Ethereum began with, however well it was copied.
    config = Config(
        redis=RedisConfig(url=SecretStr(redis_url)),
        postgres=PostgresConfig(dsn=SecretStr(postgres_dsn)),
        mapping=(
            MappingConfig(
                key="balance:{address}", columns={"address": "text", "wei": "numeric(30,0)"}
            ),
        ),
    )
    balances = {"0xaa": 1, "0xbb": TOTAL_WEI}
    await put(balances, config.redis)
    with pytest.raises(ExceptionGroup) as caught:
        await Proof(config, balances, once=True).serve()
    wrong = f"PostgreSQL has 2 rows and {TOTAL_WEI + 1} wei, not {TOTAL_WEI}"
    assert caught.group_contains(RunFailed, match=wrong)
    assert sum(balances.values()) == TOTAL_WEI + 1


@pytest.mark.slow
async def test_the_running_demo_ends_when_nobody_reads_it_any_more(start_demo: Start) -> None:
    demo = await start_demo()
    await demo.wait_for("Ctrl-C ends it all")
    # The reader's end of the pipe, as `| head` would close it.
    transport = demo.process._transport.get_pipe_transport(1)  # type: ignore[attr-defined]
    transport.close()
    assert await demo.process.wait() == 0
    await demo.check_gone()


@pytest.mark.parametrize("place", ["balancesync/data/ethereum-genesis.csv.gz"])
def test_the_data_is_packed_without_a_time(place: str) -> None:
    # A gzip file with a time or name in its header would differ at each making.
    header = (Path(__file__).parent.parent / place).read_bytes()[:10]
    assert header[3:8] == b"\0\0\0\0\0"
