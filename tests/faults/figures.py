"""What the fault suite counts for the summary at its end."""


class Figures:
    """The counts of one test: faults, runs, keys checked, losses."""

    def __init__(self) -> None:
        self.counts = {"faults": 0, "runs": 0, "keys": 0, "losses": 0}

    def fault(self, count: int = 1) -> None:
        """Something was done to a server, a connection, a process or the data."""
        self.counts["faults"] += count

    def ran(self, keys: int = 0) -> None:
        """A run ended, which has compared so many keys on both sides."""
        self.counts["runs"] += 1
        self.counts["keys"] += keys

    def checked(self, keys: int, losses: int) -> None:
        """So many balances were looked at, of which so many were lost, wrong or too old."""
        self.counts["keys"] += keys
        self.counts["losses"] += losses
