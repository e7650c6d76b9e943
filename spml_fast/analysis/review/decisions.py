"""The table of decisions beside a page that is served: read when the server starts, written whole at every change."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from spml_fast.analysis.review.files import KNOWN, Json
from spml_fast.core.errors import UserError
from spml_fast.core.io import open_regular, write_csv
from spml_fast.core.outputs import ACCEPT, DECISION_COLUMNS, REJECT, SKIP, SUGGESTION_COLUMNS, OutputFile
from spml_fast.core.text import formula_safe, has_surrogates, printable

# Characters of the columns who and when.
_LONGEST = 200

# What was decided, when, and by whom.
Entry = tuple[str, str, str]
Cells = tuple[str, ...]


def suggestion_cells(data: Json) -> list[Cells]:
    """The cells of `SUGGESTION_COLUMNS` for every row of a page, as `suggest --csv` writes them.

    Args:
        data: of the page, as `page_data` gives it.
    """
    rows = data["rows"]
    columns = zip(rows["image"], rows["class"], rows["known"], rows["probability"], rows["run"], strict=True)
    return [
        (
            data["images"][image]["path"],
            data["classes"][class_place],
            KNOWN[known],
            probability,
            "negative" if KNOWN[known] == "positive" else "positive",
            data["split"],
            data["runs"][run],
        )
        for image, class_place, known, probability, run in columns
    ]


def _label(cells: Sequence[str]) -> Cells:
    """Which label a row is about: path, class, split."""
    return cells[0], formula_safe(cells[1]), cells[5]


def _suggestion(cells: Sequence[str]) -> Cells:
    """Which suggestion a row is: the label, what it is now, and what is suggested."""
    return (*_label(cells), cells[2], cells[4])


class DecisionTable:
    """The decisions about a page's rows, in a file that is always whole.

    Rows of the file that are of another page stay in it, behind the others, until the same label is decided again.

    Args:
        output: the file.
        data: of the page.

    Attributes:
        entries: what was decided, by the row's number.

    Raises:
        UserError: the file is there and is no table of decisions.
    """

    def __init__(self, output: OutputFile, data: Json) -> None:
        output.check()
        self.output, self.path = output, output.path
        self.cells = suggestion_cells(data)
        self.entries: dict[int, Entry] = {}
        self.others: list[Cells] = []
        # Before it is read: who changes it meanwhile is noticed.
        self._state = self._on_disk()
        self._read()

    def _on_disk(self) -> tuple[int, int] | None:
        """Time and size of the file; None where there is none."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return None
        return status.st_mtime_ns, status.st_size

    def _mine(self) -> bool:
        """Whether the file is a table of decisions, whatever may be replaced."""
        if self.output.overwrite:
            try:
                replace(self.output, overwrite=False).check()
            except UserError:
                return False
        return True

    def _read(self) -> None:
        if (self._on_disk() or (0, 0))[1] == 0 or not self._mine():
            return
        place = {_suggestion(cells): row for row, cells in enumerate(self.cells)}
        for cells in read_table(self.path):
            row = place.get(_suggestion(cells))
            decision, who, when = cells[len(SUGGESTION_COLUMNS) :]
            if row is None or decision not in (ACCEPT, REJECT, SKIP):
                self.others.append(cells)
            else:
                self.entries[row] = decision, when, who

    def apply(self, changes: Mapping[int, Entry | None]) -> None:
        """Take decisions, or take them back (None), and write the file; nothing is taken if it cannot be written.

        Raises:
            UserError: the file was changed by somebody else, or cannot be written.
        """
        if self._on_disk() != self._state:
            raise UserError(
                f"{printable(str(self.path))} was changed by another program; start `spml-fast review` again to go on "
                "from what it holds now"
            )
        entries = self.entries | {row: entry for row, entry in changes.items() if entry is not None}
        for row, entry in changes.items():
            if entry is None:
                entries.pop(row, None)
        decided = {_label(self.cells[row]) for row in entries}
        others = [cells for cells in self.others if _label(cells) not in decided]
        rows = [(*self.cells[row], entries[row][0], entries[row][2], entries[row][1]) for row in sorted(entries)]
        try:
            write_csv(self.path, DECISION_COLUMNS, [*rows, *others])
        except OSError as error:
            raise UserError(f"{printable(str(self.path))} cannot be written: {error.strerror or error}") from error
        self.entries, self._state = entries, self._on_disk()


def read_table(path: Path) -> list[Cells]:
    """The rows of a table of decisions that this program wrote; file names byte for byte. Raises `UserError`."""
    csv.field_size_limit(sys.maxsize)
    try:
        with open_regular(path) as file:
            text = file.read().decode("utf-8", "surrogateescape")
        header, *rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row] or [[]]
    except OSError as error:
        raise UserError(f"{printable(str(path))} cannot be read: {error.strerror or error}") from error
    except csv.Error as error:
        raise UserError(f"{printable(str(path))} is not CSV ({error}); give another --out") from error
    if tuple(header) != DECISION_COLUMNS:
        raise UserError(f"{printable(str(path))} has not the columns {','.join(DECISION_COLUMNS)}; give another --out")
    for number, row in enumerate(rows, 2):
        if len(row) != len(DECISION_COLUMNS):
            raise UserError(
                f"{printable(str(path))}, row {number}: {len(row)} fields, but the header has {len(DECISION_COLUMNS)}"
            )
    return [tuple(row) for row in rows]


def read_changes(values: Any, size: int) -> dict[int, Entry | None]:
    """The changes that a browser sends: {"changes": {row: [decision, when, who] or null}}.

    Args:
        values: as they came, of any shape.
        size: rows of the page.

    Raises:
        ValueError: with what is wrong.
    """
    changes = values.get("changes") if isinstance(values, dict) else None
    if not isinstance(changes, dict):
        raise ValueError("no changes")
    found: dict[int, Entry | None] = {}
    for name, entry in changes.items():
        if not re.fullmatch("[0-9]{1,12}", name) or int(name) >= size:
            raise ValueError("no such row")
        found[int(name)] = None if entry is None else _entry(entry)
    return found


def _entry(entry: Any) -> Entry:
    if not isinstance(entry, list) or len(entry) != 3 or not all(isinstance(text, str) for text in entry):
        raise ValueError("an entry is three texts")
    decision, when, who = entry
    if decision not in (ACCEPT, REJECT, SKIP):
        raise ValueError("a decision is accept, reject or skip")
    for name, text in (("when", when), ("who", who)):
        if len(text) > _LONGEST or has_surrogates(text) or any(ord(c) < 32 for c in text):
            raise ValueError(f"{name} is no line of text")
    return decision, when, who
