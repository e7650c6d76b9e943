"""Decisions about suggested labels: the table that `suggest` writes, with a column `decision`."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from spml_fast.core.errors import UserError
from spml_fast.core.outputs import ACCEPT, REJECT, SKIP
from spml_fast.core.text import formula_safe, has_surrogates, printable
from spml_fast.data.sparse_labels import NEGATIVE, POSITIVE, UNKNOWN
from spml_fast.prepare.table_files import Value, read_rows, row_word

CODES = {"positive": POSITIVE, "negative": NEGATIVE, "unknown": UNKNOWN}


@dataclass(frozen=True)
class Decision:
    """What was decided about one suggestion.

    Attributes:
        where: file and line, for messages.
        split: of the image.
        path: of the image as the table has it.
        class_id: of the label.
        known: the observed label at the time of the suggestion; None where the table does not say.
        label: what the label is to be: POSITIVE or NEGATIVE.
    """

    where: str
    split: str
    path: str
    class_id: int
    known: int | None
    label: int


@dataclass
class Decisions:
    """A table of decisions.

    Attributes:
        made: the decisions by (split, path, class), in the table's order.
        rows: number of rows.
        counts: rows by decision: accept, reject, skip, and those that were accepted by their probability.
        runs: rows by the run that made the suggestion.
        people: decided rows by the column `who`.
        days: the first and the last text of the column `when`; None where there is none.
    """

    made: dict[tuple[str, str, int], Decision] = field(default_factory=dict)
    rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    runs: Counter[str] = field(default_factory=Counter)
    people: Counter[str] = field(default_factory=Counter)
    days: tuple[str, str] | None = None


def read_decisions(path: Path, classes: Sequence[str], split: str, accept_above: float | None) -> Decisions:
    """Read a table of decisions.

    A rejected suggestion is a decision too: somebody has looked, and the label is the opposite of what was suggested.
    An empty decision is `skip`.

    Args:
        path: CSV (or JSON lines, Parquet) with `path`, `class`, `suggestion` and, unless `accept_above` is given,
            `decision`: accept, reject or skip. `known`, `probability`, `split`, `run`, `who` and `when` are read where
            they are there.
        classes: class names of the data set.
        split: of the rows that name none.
        accept_above: accept undecided rows that the model is at least so sure of; None for none.

    Raises:
        UserError: naming the file and line: an unreadable table, an unknown class, label or decision, or two decisions
            that contradict each other.
    """
    # Names of images are bytes, which `suggest` writes as they are.
    columns, rows = read_rows(path, errors="surrogateescape")
    # Columns of JSON lines are known at the end alone.
    content = list(rows)
    needed = ["path", "class", "suggestion", *(["decision"] if accept_above is None else ["probability"])]
    lacking = [name for name in needed if name not in columns]
    if lacking:
        hint = " (accept, reject or skip), or give --accept-above P" if lacking == ["decision"] else ""
        names = ", ".join(map(repr, lacking))
        raise UserError(f"{path} has no column {names}{hint}; `suggest --csv` writes the others")
    found = Decisions()
    ids = {name: i for i, name in enumerate(classes)}
    for where, row in _texts(path, content):
        found.rows += 1
        decision, label = _decided(where, row, accept_above)
        found.counts[decision] += 1
        found.runs[row.get("run", "")] += 1
        if label is None:
            continue
        class_id = _class_id(where, row["class"], ids)
        known = _label(where, row, "known") if row.get("known") else None
        one = Decision(where, row.get("split") or split, row["path"], class_id, known, label)
        key = (one.split, one.path, class_id)
        check_agree(found.made.setdefault(key, one), one, row["class"])
        found.people[row.get("who", "")] += 1
        if day := row.get("when"):
            first, last = found.days or (day, day)
            found.days = min(first, day), max(last, day)
    return found


def check_agree(first: Decision, second: Decision, name: str) -> None:
    """Raise `UserError` where two decisions about the same label of class `name` differ."""
    if first.label != second.label:
        raise UserError(
            f"{second.where}: {printable(second.path)}, {printable(name)} is decided otherwise in "
            f"{first.where.rpartition(', ')[2]}; keep one of the two"
        )


def _texts(path: Path, rows: Sequence[tuple[int, Mapping[str, Value]]]) -> Iterator[tuple[str, dict[str, str]]]:
    """Place and fields of every row. Raises `UserError` for a field that is a list, or no text and no file name."""
    for number, values in rows:
        where = f"{path}, {row_word(path)} {number}"
        row: dict[str, str] = {}
        for name, value in values.items():
            if not isinstance(value, str):
                raise UserError(f"{where}: {name} is a list; a decision is about one image and one class")
            if name != "path" and has_surrogates(value):
                raise UserError(f"{where}: {printable(name)} is not UTF-8 text; save the table as UTF-8")
            row[name] = value
        yield where, row


def _decided(where: str, row: Mapping[str, str], accept_above: float | None) -> tuple[str, int | None]:
    """What a row says, and the label that comes of it; None where the label stays as it is."""
    suggestion = _label(where, row, "suggestion")
    if suggestion == UNKNOWN:
        raise UserError(f"{where}: suggestion is unknown; it must be positive or negative")
    decision = row.get("decision", "").strip().lower()
    if decision not in ("", ACCEPT, REJECT, SKIP):
        raise UserError(f"{where}: decision is {printable(decision)!r}; it must be accept, reject or skip, or empty")
    if decision == ACCEPT:
        return ACCEPT, suggestion
    if decision == REJECT:
        return REJECT, NEGATIVE if suggestion == POSITIVE else POSITIVE
    if decision == "" and accept_above is not None:
        try:
            probability = float(row.get("probability", ""))
        except ValueError:
            probability = -1.0
        if not 0 <= probability <= 1:
            raise UserError(f"{where}: probability is {printable(row.get('probability', ''))!r}; it must be 0 to 1")
        if (probability if suggestion == POSITIVE else 1 - probability) >= accept_above:
            return "accept by probability", suggestion
    return SKIP, None


def _label(where: str, row: Mapping[str, str], column: str) -> int:
    word = row[column].strip().lower()
    if word not in CODES:
        raise UserError(f"{where}: {column} is {printable(word)!r}; it must be positive, negative or unknown")
    return CODES[word]


def _class_id(where: str, name: str, ids: Mapping[str, int]) -> int:
    """The class that a cell names, which may have the apostrophe of `formula_safe`."""
    if name not in ids and name.startswith("'") and formula_safe(name[1:]) == name:
        name = name[1:]
    if name not in ids:
        close = difflib.get_close_matches(name, ids, n=1)
        hint = f"; did you mean {printable(close[0])}?" if close else ""
        raise UserError(f"{where}: the data set has no class {printable(name)!r}{hint}")
    return ids[name]
