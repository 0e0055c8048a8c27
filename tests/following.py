"""Live mode for tests: daemons on the test's servers that are quick, and what tests ask of them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from decimal import Decimal
from typing import Any

import asyncpg
import pytest
from redis.asyncio import Redis
from running import Inside, daemon_config

from balancesync import leadership, live, probing, tracking

KEYS = 20
OWN = {"on_absent": "delete"}

Start = Callable[..., Awaitable[Inside]]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked over and over is asked often, so that no test has to wait for it."""
    for name in ("_CALM_S", "_TROUBLED_S"):
        monkeypatch.setattr(probing, name, 0.05)
    for name in ("_POLL_S", "_PROVE_S"):
        monkeypatch.setattr(leadership, name, 0.1)
    monkeypatch.setattr(tracking, "_PROVE_S", 0.1)
    monkeypatch.setattr(live, "_LONGEST_PAUSE_S", 0.1)


@pytest.fixture
async def start(postgres_dsn: str, redis_url: str) -> AsyncIterator[Start]:
    """Starts a daemon with live mode on the test's servers; by default it may rescan at once."""
    async with AsyncExitStack() as stack:

        async def begin(*mappings: dict[str, Any], up: bool = True, **sections: Any) -> Inside:
            own = {"enabled": True, "flush_interval": 0.02, "rescan_interval": 0}
            sections["live"] = {**own, **sections.get("live", {})}
            config = daemon_config(postgres_dsn, redis_url, *mappings, **sections)
            daemon = await stack.enter_async_context(Inside(config))
            if up:
                await daemon.log.next("live", state="catching up")
                await daemon.log.next("live", state="up")
            return daemon

        yield begin


@pytest.fixture
async def filled(redis: Redis) -> None:
    await redis.mset({f"balance:{number}": "1.50" for number in range(KEYS)})


async def rows(pg: asyncpg.Connection) -> dict[int, Decimal]:
    return {row[0]: row[1] for row in await pg.fetch("SELECT user_id, balance FROM balances")}


async def until(ask: Callable[[], Awaitable[Any]], wanted: Any) -> None:
    """Ask until the answer is the one wanted."""
    found = None
    try:
        async with asyncio.timeout(20):
            # PostgreSQL tells nobody.
            while (found := await ask()) != wanted:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"it stays {found}, and isn't {wanted}") from None


async def until_balance(pg: asyncpg.Connection, user: int, wanted: str | None) -> None:
    sql = "SELECT balance::text FROM balances WHERE user_id = $1"
    await until(lambda: pg.fetchval(sql, user), wanted)


def is_of_a_connection(reason: str) -> bool:
    """Its end is seen by whoever waits for it, or by whoever asks just then."""
    return "was lost" in reason or "closed the connection" in reason


async def kill_tracking(redis: Redis) -> None:
    """Cut the connection that is told of changes, as Redis does to a reader that is too slow."""
    assert await redis.client_kill_filter(_type="pubsub") == 1


async def acl(redis: Redis, rules: str) -> None:
    """Give the user called plain these rights."""
    command: Any = redis.execute_command
    await command("ACL", "SETUSER", "plain", *rules.split())
