"""The page that shows what was measured: its tables stand between marks, and are put there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from benchmarks.servers import Broken

PAGE: Final = Path(__file__).parent.parent / "docs" / "performance.md"


def put(tables: Mapping[str, str], page: Path = PAGE) -> None:
    """Replace what stands between `<!-- NAME -->` and `<!-- end of NAME -->` on the page.

    Raises Broken if such a mark isn't there.
    """
    text = page.read_text()
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        head, _, rest = text.partition(begin)
        _, found, tail = rest.partition(end)
        if not found:
            raise Broken(f"{page.name} has no place for {name}")
        text = f"{head}{begin}\n{table}\n\n{end}{tail}"
    page.write_text(text)
