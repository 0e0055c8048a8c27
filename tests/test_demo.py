"""The demo, as a newcomer runs it, and the real balances that it carries."""

import asyncio
import os
import re
import sys
import tempfile
from pathlib import Path

import pytest

from balancesync.demo import TOTAL_WEI, read_balances


def test_the_balances_are_those_of_the_genesis_block() -> None:
    balances = read_balances()
    assert len(balances) == 8_893
    assert sum(balances.values()) == TOTAL_WEI == 72_009_990_499_480_000_000_000_000
    # The account of the Ethereum Foundation, known from any block explorer.
    assert balances["0x5abfec25f74cd88437631a7731906932776356f9"] == 11_901_484_239_480 * 10**12


async def test_the_demo_tells_its_story_and_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = tempfile.mkdtemp(prefix="demo-")
    os.chmod(folder, 0o755)  # noqa: S103  # run by root, PostgreSQL is another user's process
    # Neither the environment nor a file may lead it to real servers.
    (tmp_path / "config.toml").write_text("[redis]\nurl = 'redis://127.0.0.1:1/0'\n")
    environment = os.environ | {
        "TMPDIR": folder,
        "BALANCESYNC_POSTGRES__DSN": "postgresql://127.0.0.1:1/postgres",
        "BALANCESYNC_REDIS__URL": "redis://127.0.0.1:1/0",
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "balancesync", "demo"),
        cwd=tmp_path,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = (piece.decode() for piece in await process.communicate())
    assert process.returncode == 0, err
    commands = re.findall(r"^\$ balancesync (.+)$", out, re.MULTILINE)
    assert commands == ["sync", "sync --dry-run", "sync", "sync", "rejects", "verify", "sync"]
    assert out.count(f"8,893 rows, {TOTAL_WEI} wei") == 4
    assert "balances    8,893         0         0      400      8,493" in out
    assert "Redis and PostgreSQL agree" in out
    assert "sync refused" in out
    assert len(err.splitlines()) == 1
    assert err.startswith('balancesync: mapping "balances": Redis has no key at all')
    assert os.listdir(folder) == []
    os.rmdir(folder)
    ports = re.findall(r"listens on (\d+), Redis on (\d+)", out)[0]
    for port in map(int, ports):
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)


@pytest.mark.parametrize("place", ["balancesync/data/ethereum-genesis.csv.gz"])
def test_the_data_is_packed_without_a_time(place: str) -> None:
    # A gzip file with a time or name in its header would differ at each making.
    header = (Path(__file__).parent.parent / place).read_bytes()[:10]
    assert header[3:8] == b"\0\0\0\0\0"
