"""Each connection cut, cut in place of a reply, or stalled, at any step of a run, under traffic."""

import asyncio
from collections.abc import Callable

import pytest
from proxy import Proxy

from faults.ground import Frail

# Longer than any time-out of the runs here.
STALLED_S = 2.0


def cut(proxy: Proxy) -> None:
    proxy.reset()


def lose_the_reply(proxy: Proxy) -> None:
    proxy.lose_next_reply()


def stall(proxy: Proxy) -> None:
    def end() -> None:
        proxy.reset()
        proxy.resume()

    proxy.stall()
    asyncio.get_running_loop().call_later(STALLED_S, end)


@pytest.mark.parametrize("source_steps", [False, True], ids=["postgres", "redis"])
@pytest.mark.parametrize(
    ("fault", "count", "many"), [(cut, 5, 60), (lose_the_reply, 5, 60), (stall, 1, 25)]
)
async def test_a_connection_fails_at_any_step(
    frail: Frail,
    fault: Callable[[Proxy], None],
    *,
    source_steps: bool,
    count: int,
    many: int,
    torture: bool,
) -> None:
    await frail.survive(fault, source_steps=source_steps, count=many if torture else count)
