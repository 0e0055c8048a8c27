"""The kept changes of one balance, as people get them."""

from rich.text import Text

from balancesync.documents import Document
from balancesync.show import Grid, move_text, write


def show_changes(history: Document, limit: int, *, enabled: bool) -> None:
    """The kept changes of one balance, one a line, and since when none is missing."""
    changes, since = history["changes"], history["known_since"]
    if not changes:
        write("no change is kept")
    else:
        sides = [change[side] for change in changes for side in ("new", "old") if change[side]]
        columns = list(dict.fromkeys(name for side in sides for name in side))
        made = Grid("at", "change", *columns, "run")
        for change in changes:
            cells = [_cell(change, name) for name in columns]
            made.add_row(change["at"], change["op"], *cells, change["run_id"])
        write(made)
    if len(changes) == limit:
        write(f"at most {limit:,} are shown; --limit shows more")
    if since is not None:
        write(f"nothing is missing since {since}")
    elif enabled:
        write("changes are kept from the next sync on; before it some may be missing")
    else:
        write("[history] is not enabled: no more changes are kept")


def _cell(change: Document, column: str) -> Text:
    """A column of a change, which another set of value columns may not have had."""
    if all(column not in (change[side] or ()) for side in ("old", "new")):
        return Text("-", "dim")
    return move_text(change, column)
