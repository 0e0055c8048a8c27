"""How hard the fault suite tries, and what it counts."""

import os
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from engine import Engine
from proxy import Proxy

from balancesync.embedded import PostgresServer, RedisServer
from balancesync.model import Run
from balancesync.server import Server
from faults.figures import Figures
from faults.ground import Frail, Ground, connected

TORTURE = "BALANCESYNC_TORTURE"


@pytest.fixture(scope="session")
def torture() -> bool:
    """Whether it's the long form, `make torture`."""
    return bool(os.environ.get(TORTURE))


@pytest.fixture(autouse=True)
def figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Figures:
    """What this test does, for the summary: what the harness does is counted by itself."""
    made = Figures()
    request.node.user_properties.append(("figures", made.counts))

    def counted(kind: type, name: str) -> None:
        original = getattr(kind, name)

        def wrapper(self: object, *args: Any, **options: Any) -> Any:
            made.fault()
            return original(self, *args, **options)

        monkeypatch.setattr(kind, name, wrapper)

    for name in ("reset", "stall", "cut_after", "lose_reply", "lose_next_reply"):
        counted(Proxy, name)
    for name in ("kill", "suspend"):
        counted(Server, name)
    original = Engine.sync

    async def sync(self: Engine, **wanted: Any) -> Run:
        run = await original(self, **wanted)
        made.ran(run.counts.scanned if run.mode == "verify" else 0)
        return run

    monkeypatch.setattr(Engine, "sync", sync)
    return made


@pytest.fixture(scope="package")
def frail_postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL that these tests may do anything to."""
    with PostgresServer(durable=False) as made:
        yield made


@pytest.fixture
async def frail(
    frail_postgres: PostgresServer, private_redis: Callable[..., RedisServer], figures: Figures
) -> AsyncIterator[Frail]:
    """Both servers may be killed; Redis comes back with everything."""
    redis = private_redis({"appendonly": "yes", "appendfsync": "always"})
    async with connected(frail_postgres.dsn) as admin:
        await admin.execute("DROP SCHEMA IF EXISTS balancesync CASCADE")
        await admin.execute("DROP TABLE IF EXISTS balances")
    made = Frail(frail_postgres, redis, figures)
    await made.begin()
    yield made
    await made.close()


@pytest.fixture
async def ground(postgres_dsn: str, redis_url: str, figures: Figures) -> AsyncIterator[Ground]:
    made = Ground(postgres_dsn, redis_url, figures)
    await made.begin()
    yield made
    await made.close()
