"""What a query may say. A name that isn't known is refused: `dryrun=true` must not apply anything.

Everything here raises HttpProblem 422, with the name of the parameter.
"""

import re
from collections.abc import Collection
from datetime import datetime
from typing import Final
from urllib.parse import parse_qsl
from uuid import UUID

from balancesync.listener import HttpProblem
from balancesync.times import parse_time

_SWITCH: Final = {"true": True, "1": True, "false": False, "0": False}
_UUID: Final = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_MOST_PARAMETERS: Final = 20


def _refuse(message: str) -> HttpProblem:
    return HttpProblem(422, "invalid_parameter", message)


class Parameters:
    """The parameters of one request, each at most once."""

    def __init__(self, raw_query: str, known: Collection[str] = ()) -> None:
        self._given: dict[str, str] = {}
        takes = f"; it takes {', '.join(known)}" if known else ""
        try:
            pairs = parse_qsl(
                raw_query,
                keep_blank_values=True,
                errors="strict",
                max_num_fields=_MOST_PARAMETERS,
            )
        except ValueError:  # also a UnicodeDecodeError
            raise _refuse(f"the query can't be read{takes}") from None
        for name, value in pairs:
            if name not in known:
                raise _refuse(f"{name[:40]!a} is no parameter here{takes}")
            if name in self._given:
                raise _refuse(f"{name} is given twice")
            self._given[name] = value

    def text(self, name: str) -> str | None:
        """A text; None if it isn't given."""
        return self._given.get(name)

    def switch(self, name: str) -> bool:
        """True or false; false if it isn't given."""
        text = self._given.get(name, "false")
        if text not in _SWITCH:
            raise _refuse(f"{name} must be true or false")
        return _SWITCH[text]

    def number(self, name: str, otherwise: int, most: int) -> int:
        """A whole number from 1 to `most`."""
        text = self._given.get(name, str(otherwise))
        if not re.fullmatch(r"[0-9]{1,9}", text) or not 1 <= int(text) <= most:
            raise _refuse(f"{name} must be a whole number from 1 to {most}")
        return int(text)

    def uuid(self, name: str) -> UUID | None:
        """The id of a run; None if it isn't given."""
        text = self._given.get(name)
        if text is None:
            return None
        run = parse_uuid(text)
        if run is None:
            raise _refuse(f"{name} must be the id of a run")
        return run

    def time(self, name: str) -> datetime | None:
        """A time with its zone; None if it isn't given."""
        text = self._given.get(name)
        if text is None:
            return None
        try:
            return parse_time(text)
        except ValueError as error:
            raise _refuse(f"{name} {error}; a + is written %2B in a query") from None

    def choice(self, name: str, among: Collection[str]) -> str | None:
        """One of these; None if it isn't given."""
        text = self._given.get(name)
        if text is not None and text not in among:
            raise _refuse(f"{name} must be one of {', '.join(among)}")
        return text


def parse_uuid(text: str) -> UUID | None:
    """Read a UUID in its usual form, which alone is taken; None for anything else."""
    return UUID(text) if _UUID.fullmatch(text) else None
