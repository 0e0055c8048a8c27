"""What `check` finds: one thing looked at, how grave it is, and what to do."""

from dataclasses import dataclass
from typing import Final, Literal, get_args

from balancesync.errors import (
    BalanceSyncError,
    PostgresUnavailable,
    RedisUnavailable,
    Unavailable,
)

Level = Literal["ok", "warning", "error", "unreachable"]

LEVELS: Final = get_args(Level)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `topic` is configuration, redis, guard, live, postgres or a mapping's
    name."""

    level: Level
    topic: str
    text: str


def failure(topic: str, error: BalanceSyncError) -> Finding:
    """What couldn't be looked at, and why."""
    unreachable = isinstance(error, RedisUnavailable | PostgresUnavailable | Unavailable)
    return Finding("unreachable" if unreachable else "error", topic, str(error))
