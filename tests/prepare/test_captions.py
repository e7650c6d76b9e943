"""examples/captions_to_labels.py: captions become a table that `prepare csv` reads as it was meant."""

from __future__ import annotations

import csv
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from spml_fast.prepare.datasets.csv_table import read_table, unlisted_code
from tests.support.paths import ROOT

PROGRAM = str(ROOT / "examples" / "captions_to_labels.py")
WORDS = "dog: dog, dogs\n\nsnow: snow, snowy field\nT-shirt: t-shirt\n"
CAPTIONS = [
    ("a.jpg", "A dog runs in a snowy field."),
    ("a.jpg", "Two DOGS, one in a t-shirt"),
    ("a.jpg", "An animal, outdoors"),
    ("b.jpg", "hotdogs and snowboards"),
    ("b.jpg", "nothing, at all"),
    ("only one.jpg", "the dog"),
]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "words.txt").write_text(WORDS, encoding="utf-8")
    with (tmp_path / "captions.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([("path", "caption"), *CAPTIONS])
    return tmp_path


def run(files: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> dict[str, dict[str, Any]]:
    names = [str(files / name) for name in ("captions.csv", "words.txt", "labels.csv")]
    monkeypatch.setattr(sys, "argv", [PROGRAM, *names, *more])
    runpy.run_path(PROGRAM, run_name="__main__")
    with (files / "labels.csv").open(encoding="utf-8", newline="") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def test_mentioned_is_positive_and_mentioned_once_is_unknown(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run(files, monkeypatch)
    labels = {path: (row["positives"], row["unknowns"]) for path, row in rows.items()}
    assert labels == {"a.jpg": ("dog", "snow;T-shirt"), "b.jpg": ("", ""), "only one.jpg": ("dog", "")}
    wider = run(files, monkeypatch, "--any")
    assert (wider["a.jpg"]["positives"], wider["a.jpg"]["unknowns"]) == ("dog;snow;T-shirt", "")


def test_the_table_is_read_as_it_was_meant(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(files, monkeypatch)
    table = read_table(files / "labels.csv", "error")
    assert table.rows["a.jpg"].codes == {"dog": 1, "snow": -1, "T-shirt": -1} and table.rows["b.jpg"].codes == {}
    assert unlisted_code(table.columns, None) == 0, "what no caption mentions is absent"


def test_splits_follow_the_names_alone(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (files / "captions.csv").open("a", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([(f"{i}.jpg", "a dog") for i in range(1000)])
    before = {path: row["split"] for path, row in run(files, monkeypatch).items()}
    counts = [sum(split == name for split in before.values()) for name in ("train", "val", "test")]
    assert abs(counts[0] - 600) < 60 and abs(counts[1] - 100) < 40 and abs(counts[2] - 300) < 60
    with (files / "captions.csv").open("a", encoding="utf-8", newline="") as file:
        csv.writer(file).writerow(["new.jpg", "snow"])
    after = {path: row["split"] for path, row in run(files, monkeypatch).items()}
    assert {path: after[path] for path in before} == before


def test_a_line_without_words_is_named(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (files / "words.txt").write_text("dog: dog\ncat\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"words\.txt, line 2: write `class: word"):
        run(files, monkeypatch)
