"""Tables of docs/performance.md that programs write, each between its marks."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"


class Marks(NamedTuple):
    """What stands before and behind a table, as comments of Markdown."""

    begin: str
    end: str

    def with_table(self, page: str, text: str) -> str:
        """A page with the table between the marks. Raises `ValueError` where it has none."""
        before, begin, rest = page.partition(self.begin)
        _, end, after = rest.partition(self.end)
        if not begin or not end:
            raise ValueError(f"{PAGE} has no {self.begin} ... {self.end}")
        return f"{before}{self.begin}\n\n{text}\n\n{self.end}{after}"

    def show(self, text: str, write: bool) -> None:
        """Print a table, or write it to the page."""
        if write:
            PAGE.write_text(self.with_table(PAGE.read_text(encoding="utf-8"), text), encoding="utf-8")
        else:
            print(text)
