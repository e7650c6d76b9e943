"""The table of decisions beside a served page: kept whole, gone on from, read by `relabel`."""

from __future__ import annotations

from pathlib import Path

import pytest

from spml_fast.analysis.review.decisions import DecisionTable, read_changes, read_table
from spml_fast.cli import relabel
from spml_fast.core.errors import UserError
from spml_fast.core.io import write_csv
from spml_fast.core.outputs import DECISION_COLUMNS, OutputFile
from spml_fast.core.text import formula_safe_path
from spml_fast.data.manifest import Manifest
from spml_fast.prepare.decisions import read_decisions
from tests.support.review import MadePage, make_review_page

DAY = "2026-01-02T03:04:05Z"
HEADER = ",".join(DECISION_COLUMNS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadePage:
    return make_review_page(tmp_path_factory.mktemp("decisions") / "folder")


def output(path: Path, overwrite: bool = False) -> OutputFile:
    return OutputFile(path, "csv", HEADER, "--out", overwrite)


def test_round_trip_through_relabel(made: MadePage, tmp_path: Path) -> None:
    """Every suggestion of hostile names, accepted or rejected: the new Manifest has exactly that."""
    table = DecisionTable(output(tmp_path / "decisions.csv"), made.data)
    rows = range(60)
    table.apply({row: ("reject" if row % 3 == 0 else "accept", DAY, "eva, the =1st") for row in rows})
    decisions = read_decisions(table.path, made.manifest.classes, "val", None)
    assert decisions.counts == {"accept": sum(r % 3 > 0 for r in rows), "reject": sum(r % 3 == 0 for r in rows)}
    assert decisions.people == {"eva, the =1st": len(rows)} and decisions.days == (DAY, DAY)
    words = ["--manifest", made.manifest.folder, "--decisions", table.path, "--out", tmp_path / "new"]
    relabel.main([str(word) for word in words])
    old, new = made.manifest.split("train"), Manifest(tmp_path / "new").split("train")
    row_of = {formula_safe_path(old.relative_path(i)): i for i in range(len(old))}
    expected = old.observed.rows(range(len(old)))
    for row in rows:
        path, name, _, _, suggestion, _, _ = table.cells[row]
        accepted = row % 3 > 0
        expected[row_of[path], made.manifest.classes.index(name)] = int((suggestion == "positive") == accepted)
    assert (new.observed.rows(range(len(new))) == expected).all()


def test_names_that_are_not_utf8_are_kept_byte_for_byte(made: MadePage, tmp_path: Path) -> None:
    table = DecisionTable(output(tmp_path / "decisions.csv"), made.data)
    row = next(row for row, cells in enumerate(table.cells) if "\udcff" in cells[0])
    table.apply({row: ("accept", DAY, "")})
    assert b"\xff not utf-8 \x80.jpg" in table.path.read_bytes()
    assert DecisionTable(output(table.path), made.data).entries == table.entries


def test_goes_on_from_what_is_there(made: MadePage, tmp_path: Path) -> None:
    """Decisions of the page come back; rows of other pages stay until their label is decided again."""
    path = tmp_path / "decisions.csv"
    first = DecisionTable(output(path), made.data)
    first.apply({4: ("accept", DAY, "eva"), 2: ("skip", DAY, ""), 9: ("reject", DAY, "")})
    first.apply({9: None, 5: ("reject", DAY, "bob")})
    foreign = "elsewhere.jpg,cat,unknown,0.9,positive,train,r,accept,,"
    cells = first.cells[7]
    # The same label, suggested the other way about by an earlier page.
    assert cells[4] == "positive" and cells[2] == "unknown"
    earlier = (cells[0], cells[1], "positive", "0.1", "negative", cells[5], "r", "accept", "eve", DAY)
    write_csv(path, DECISION_COLUMNS, [*read_table(path), foreign.split(","), earlier])
    second = DecisionTable(output(path), made.data)
    assert second.entries == {2: ("skip", DAY, ""), 4: ("accept", DAY, "eva"), 5: ("reject", DAY, "bob")}
    second.apply({0: ("accept", DAY, "")})
    assert [row[7] for row in read_table(path)] == ["accept", "skip", "accept", "reject", "accept", "accept"]
    assert foreign in path.read_text(encoding="utf-8")
    second.apply({7: ("reject", DAY, "")})
    rows = read_table(path)
    assert len(rows) == 6 and rows[4][7] == "reject" and rows[5][0] == "elsewhere.jpg"


def test_nothing_of_others_is_lost(made: MadePage, tmp_path: Path) -> None:
    path = tmp_path / "decisions.csv"
    path.write_text("path,class\na,b\n")
    with pytest.raises(UserError, match=r"--out .*decisions\.csv exists and was not written by this command"):
        DecisionTable(output(path), made.data)
    table = DecisionTable(output(path, overwrite=True), made.data)
    assert path.read_text() == "path,class\na,b\n" and table.entries == {}
    table.apply({1: ("accept", DAY, "")})
    # Even so, a table of decisions is gone on from.
    assert len(DecisionTable(output(path, overwrite=True), made.data).entries) == 1
    # Somebody has edited it meanwhile.
    with path.open("a") as file:
        file.write("x.jpg,cat,unknown,0.9,positive,train,r,accept,,\n")
    before = path.read_bytes()
    with pytest.raises(
        UserError, match=r"decisions\.csv was changed by another program; start `spml-fast review` again"
    ):
        table.apply({2: ("accept", DAY, "")})
    assert path.read_bytes() == before and 2 not in table.entries


def test_a_disk_that_fails_takes_nothing(made: MadePage, tmp_path: Path) -> None:
    """What could not be written is not taken for saved, and the file is as it was."""
    path = tmp_path / "decisions.csv"
    table = DecisionTable(output(path), made.data)
    table.apply({1: ("accept", DAY, "")})
    before = path.read_bytes()
    path.with_name("decisions.csv.partial").mkdir()
    with pytest.raises(UserError, match=r"decisions\.csv cannot be written: Is a directory"):
        table.apply({2: ("accept", DAY, "")})
    assert path.read_bytes() == before and list(table.entries) == [1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER + "\na,b\n", r"row 2: 2 fields, but the header has 10"),
        (HEADER + '\n"a\n', r"is not CSV \("),
    ],
)
def test_damaged_tables(made: MadePage, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "decisions.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        DecisionTable(output(path), made.data)
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "no changes"),
        ({"changes": [1]}, "no changes"),
        ({"changes": {"5": None}}, "no such row"),
        ({"changes": {"-1": None}}, "no such row"),
        ({"changes": {"٣": None}}, "no such row"),
        ({"changes": {"1e0": None}}, "no such row"),
        ({"changes": {"1": ["accept", DAY]}}, "an entry is three texts"),
        ({"changes": {"1": ["accept", DAY, 1]}}, "an entry is three texts"),
        ({"changes": {"1": ["maybe", DAY, ""]}}, "a decision is accept, reject or skip"),
        ({"changes": {"1": ["accept", "x\ty", ""]}}, "when is no line of text"),
        ({"changes": {"1": ["accept", DAY, "x" * 201]}}, "who is no line of text"),
        ({"changes": {"1": ["accept", DAY, "a\nb"]}}, "who is no line of text"),
        ({"changes": {"1": ["accept", DAY, "\ud800"]}}, "who is no line of text"),
    ],
)
def test_changes_that_are_refused(values: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_changes(values, 5)


def test_changes() -> None:
    assert read_changes({"changes": {"4": ["skip", DAY, "é"], "0": None}}, 5) == {4: ("skip", DAY, "é"), 0: None}
