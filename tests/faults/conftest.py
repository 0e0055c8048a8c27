"""How hard the fault suite tries, and what it counts."""

import os
from typing import Any

import pytest
from engine import Engine
from proxy import Proxy

from balancesync.model import Run
from balancesync.server import Server
from faults.figures import Figures

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
