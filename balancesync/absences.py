"""Which keys went since the last success, as live mode sees them go and come back."""

from collections.abc import Set
from dataclasses import dataclass, field
from datetime import datetime

from balancesync.records import Remembered


@dataclass(slots=True)
class Absences:
    """Those of one mapping since its success at `since`, but for the pruned ones.

    `gone` are known keys that aren't there, `deleted` those of them whose rows live mode has
    deleted. `known` is how many keys were known when they were last counted.
    """

    since: datetime | None = None
    known: int = 0
    gone: set[bytes] = field(default_factory=set)
    deleted: set[bytes] = field(default_factory=set)

    def begin(self, remembered: Remembered) -> None:
        """Begin again if another success than before is remembered: what was gone then isn't known.

        Whichever process had that success.
        """
        if self.since != remembered.known_at:
            self.forget()
            self.since = remembered.known_at
        self.known = max(self.known, remembered.known)

    def forget(self) -> None:
        """Forget all of it."""
        self.since, self.known = None, 0
        self.gone.clear()
        self.deleted.clear()

    def come_back(self, keys: Set[bytes]) -> None:
        """These keys are there."""
        if self.gone:
            self.gone.difference_update(keys)
            self.deleted.difference_update(keys)

    def are_saved(self, remembered: Remembered) -> bool:
        """Whether PostgreSQL knows of them."""
        return (remembered.gone or 0, remembered.deleted) == (len(self.gone), len(self.deleted))
