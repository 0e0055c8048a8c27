"""README and docs say what is true: their commands are run, their links lead somewhere."""

import asyncio
import os
import re
import shlex
import sys
from pathlib import Path

import asyncpg
import pytest
from redis.asyncio import Redis
from running import processes

from balancesync import arguments

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", TEXTS[page], re.MULTILINE | re.DOTALL)


def command_lines() -> list[tuple[str, str]]:
    """Every `balancesync ...` of the pages, without comments and placeholders."""
    found = []
    for page, text in TEXTS.items():
        if page == "docs/configuration.md":
            continue  # it has keys of all that the configuration is for
        shell = [line for block in blocks(page, "sh") for line in block.splitlines()]
        prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        for line in [*shell, *re.findall(r"`([^`\n]+)`", prose)]:
            command = line.partition("#")[0].strip()
            if command.startswith("balancesync ") and "COMMAND" not in command:
                found.append(
                    (page, command.replace(" ID", " 01950000-0000-7000-8000-000000000000"))
                )
    return sorted(set(found))


@pytest.mark.parametrize(("page", "command"), command_lines())
def test_every_command_line_can_be_typed(page: str, command: str) -> None:
    words = shlex.split(command)[1:]
    if words[-1] != "--help":
        assert arguments.parse(words).command in words


def test_there_are_command_lines_on_each_page_of_commands() -> None:
    pages = {page for page, _ in command_lines()}
    assert {"README.md", "docs/commands.md", "docs/guarantees.md"} <= pages


async def shell(script: str, folder: Path, **environment: str) -> tuple[int, str]:
    """Run a script as a reader would, with `balancesync` on the PATH."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = await asyncio.create_subprocess_exec(
        *("bash", "-euc", script),
        cwd=folder,
        env=os.environ | {"PATH": path} | environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode()


async def test_the_quick_start(
    tmp_path: Path, redis: Redis, redis_url: str, pg: asyncpg.Connection, postgres_dsn: str
) -> None:
    await redis.mset({"balance:123": "1234.56", "balance:124": "0.1"})
    script = "".join(block for block in blocks("README.md", "sh") if "make" not in block)
    assert script.count("\nbalancesync ") == 4
    environment = {"BALANCESYNC_REDIS__URL": redis_url, "BALANCESYNC_POSTGRES__DSN": postgres_dsn}
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    code, out = await shell(script, checkout, HOME=str(tmp_path), **environment)
    assert code == 0, out
    # The file of that name in a checkout is the reference.
    assert list(checkout.iterdir()) == []
    assert "Redis and PostgreSQL agree" in out
    assert await pg.fetchval("SELECT sum(balance)::text FROM balances") == "1234.66"


# Nothing runs that could be cancelled, and there is no such mapping here.
CODES = {"balancesync cancel": 1, "balancesync history --mapping wallets alice EUR": 2}
# These have tests of their own.
ENDLESS = tuple(f"balancesync {each} " for each in ("run", "events", "demo", "status --watch"))


async def test_every_command_of_the_pages(
    tmp_path: Path, redis: Redis, redis_url: str, postgres_dsn: str
) -> None:
    """Beside a running daemon, after a sync, in the order of the pages."""
    await redis.mset({"balance:123": "1234.56", "balance:124": "0.1"})
    typed = [
        line.partition("#")[0].strip()
        for page in TEXTS
        for block in blocks(page, "sh")
        for line in block.splitlines()
        if line.strip().startswith("balancesync ") and not f"{line.strip()} ".startswith(ENDLESS)
    ]
    assert len(set(typed)) > 15
    async with processes(tmp_path, postgres_dsn, redis_url) as made:
        file = made.file(more="[history]\nenabled = true\n[prune]\nenabled = true\n")
        await made.daemon(file=file)
        for command in dict.fromkeys(["balancesync sync", *typed]):
            code, out = await shell(command, tmp_path, BALANCESYNC_CONFIG=str(file))
            assert code == CODES.get(command, 0), f"{command}: {out}"


async def test_the_table_of_an_application(
    tmp_path: Path, redis: Redis, redis_url: str, pg: asyncpg.Connection, postgres_dsn: str
) -> None:
    await pg.execute(
        "CREATE TABLE users (id serial PRIMARY KEY, telegram_id bigint UNIQUE NOT NULL,"
        " name text NOT NULL, balance bigint, sync_at timestamptz)"
    )
    await pg.execute("INSERT INTO users (telegram_id, name) VALUES (123456789, 'a'), (5, 'b')")
    await redis.mset({"123456789": "2500000", "777": "1", "cache:1": "x"})
    await redis.rpush("queue", "job")
    [block] = blocks("README.md", "toml")
    (tmp_path / "config.toml").write_text(block)
    code, out = await shell(
        "balancesync check; balancesync sync",
        tmp_path,
        BALANCESYNC_REDIS__URL=redis_url,
        BALANCESYNC_POSTGRES__DSN=postgres_dsn,
    )
    assert code == 0, out
    rows = await pg.fetch("SELECT telegram_id, balance FROM users ORDER BY telegram_id")
    assert [tuple(row) for row in rows] == [(5, None), (123456789, 2500000)]


async def test_the_makefile_has_the_targets(tmp_path: Path) -> None:
    code, out = await shell(f"make --no-print-directory -C {shlex.quote(str(ROOT))} help", tmp_path)
    assert code == 0, out
    named = set(re.findall(r"(?:^|`)make (\w+)", TEXTS["README.md"], re.MULTILINE))
    assert named <= set(re.findall(r"^make (\w+)", out, re.MULTILINE))


@pytest.mark.parametrize("page", list(TEXTS))
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


def anchors(text: str) -> set[str]:
    """The names that headings are linked by."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_command_is_documented() -> None:
    text = TEXTS["docs/commands.md"]
    for command in arguments.OPTIONS:
        assert re.search(rf"^balancesync {command}\b", text, re.MULTILINE), command


def test_the_map_of_the_modules_is_whole() -> None:
    rooms = TEXTS["docs/architecture.md"].partition("| rooms |")[2].partition("\n\n")[0]
    named = re.findall(r"`(\w+)`", rooms)
    modules = {path.stem for path in (ROOT / "balancesync").glob("*.py")}
    assert sorted(named) == sorted(modules - {"__init__", "__main__"})
