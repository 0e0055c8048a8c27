"""How much Redis holds at a moment: whether it lost much of that while a run read it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from balancesync.mapping import Mapping
from balancesync.model import exceeds
from balancesync.part import Part, reading_of
from balancesync.source import Source

# So many of the keys that were read tell whether those are gone, or keys of others.
_SAMPLE_KEYS: Final = 1000


@dataclass(frozen=True, slots=True)
class Sizes:
    """The keys of each primary, by its address, and the fields of each big hash, by its key.

    DBSIZE counts a big hash of a million balances as one key. None: its fields can't be counted.
    """

    keys: dict[str, int]
    fields: dict[bytes, int | None] = field(default_factory=dict)

    @classmethod
    async def ask(cls, source: Source, mappings: Iterable[Mapping]) -> "Sizes":
        """Ask Redis now."""
        big = {each.member_key for each in mappings if each.member_key is not None}
        return cls(await source.dbsize(), {key: await source.fields_of(key) for key in big})

    def fall_to(self, now: "Sizes", max_loss: float) -> str | None:
        """How far Redis has fallen, in words, if by more than `max_loss`, or a primary is empty."""
        emptied = any(size and not now.keys.get(primary) for primary, size in self.keys.items())
        before, after = sum(self.keys.values()), sum(now.keys.values())
        if emptied or exceeds(before - after, max_loss, before):
            return f"Redis fell from {before:,} keys to {after:,}"
        for key, fields in self.fields.items():
            if shrank(fields, now.fields.get(key), max_loss):
                name = key.decode(errors="backslashreplace")
                return f"the big hash {name} fell from {fields:,} fields to {now.fields[key]:,}"
        return None


def shrank(before: int | None, now: int | None, max_loss: float) -> bool:
    """Whether a big hash has lost more than this share of its fields, or all of them.

    >>> shrank(10, 5, 0.5), shrank(10, 4, 0.5), shrank(10, 0, 1.0), shrank(10, None, 0.5)
    (False, True, True, False)
    """
    if not before or now is None:
        return False
    return not now or exceeds(before - now, max_loss, before)


async def seen_lost(part: Part, source: Source, before: Sizes, now: Sizes, max_loss: float) -> str:
    """What is to be said of a mapping whose own keys have gone since they were read; else empty.

    Caches that are purged from the same database are no balances: a sample of those read tells.
    """
    big = part.mapping.member_key
    if big is not None and shrank(before.fields.get(big), now.fields.get(big), max_loss):
        left = now.fields[big]
        return f"the big hash was seen to fall from {before.fields[big]:,} fields to {left:,}"
    keys = await part.writer.staged_keys(_SAMPLE_KEYS)
    # Every user may read values; EXISTS may be withheld.
    gone = (await source.fetch(reading_of(part.mapping), keys)).values.count(None)
    if exceeds(gone, max_loss, len(keys)) or (keys and gone == len(keys)):
        return f"{gone:,} of {len(keys):,} keys were seen to go while they were read"
    return ""
