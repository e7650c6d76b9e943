"""The quick start of two versions: what is refused, and the row that the table of goals reads."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import pytest

from benchmarks import bench_quick_start, versions
from benchmarks.child_usage import Usage
from benchmarks.kernel_report import read_csv
from benchmarks.summary import table
from spml_fast.core.errors import UserError


def start(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench_quick_start.py", *words])
    return bench_quick_start.main()


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(versions, "git", lambda *words: "abc")
    for words, says in (
        (("--against", "HEAD"), "are the same commit"),
        (("--rounds", "0"), "--rounds is 0"),
        (("--epochs", "1", "--results", str(tmp_path)), "--epochs is for a look"),
    ):
        with pytest.raises(UserError, match=says):
            start(monkeypatch, *words)


def test_a_row_of_two_versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands are not run here: each says how long it took."""
    seconds = {"old fp32": [100.0, 90.0, 110.0], "new fp32": [100.0, 100.0, 100.0], "new bf16": [80.0, 75.0, 50.0]}
    order = []

    @contextlib.contextmanager
    def checkout(version: str, folder: Path):
        folder.mkdir()
        yield folder
        (folder / "run" / "results.json").unlink()
        (folder / "run").rmdir()
        folder.rmdir()

    def usage_of(command: list[str]) -> Usage:
        assert command[4:6] == ["deepspeed", "launch/train.py"] and command[-2] == "--train.precision"
        tree = Path(command[2])
        order.append(f"{tree.name} {command[-1]}")
        (tree / "run").mkdir()
        score = 98.5 if tree.name == "new" else 98.4
        (tree / "run" / "results.json").write_text(json.dumps({"alpha": {"1": {"map": score}, "5": {"map": 1.0}}}))
        return Usage(seconds[order[-1]].pop(0), 0.0, 0, "")

    monkeypatch.setattr(versions, "git", lambda *words: {"HEAD": "new", "61ba7a5": "old"}[words[-1]])
    monkeypatch.setattr(bench_quick_start, "checkout", checkout)
    monkeypatch.setattr(bench_quick_start, "usage_of", usage_of)
    assert start(monkeypatch, "--precision", "fp32", "bf16", "--results", str(tmp_path)) == 0
    assert order == list(seconds) * 3
    rows = read_csv(tmp_path / "quick_start.csv")
    names = ("seconds", "seconds_against", "ratio", "lowest", "highest")
    assert {row["precision"]: [float(row[name]) for name in names] for row in rows} == {
        "fp32": [100, 100, 1, 0.9, 1.1],
        "bf16": [75, 100, 1.3333, 1.2, 2.2],
    }
    (line,) = (line for line in table(tmp_path).splitlines() if line.startswith("| quick start, bf16 |"))
    assert "75.0 s against 100.0 s, test mAP 98.50 and 98.40 | 1.33 | **no** |" in line
