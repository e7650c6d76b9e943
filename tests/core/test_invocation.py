"""Commands to type, as the program was started."""

from __future__ import annotations

import sys

import pytest

from spml_fast.core.invocation import command_line, next_lines, program


@pytest.mark.parametrize(
    ("started", "evaluate", "train"),
    [
        ("/venv/bin/spml-fast", "spml-fast evaluate", "spml-fast train"),
        ("/venv/lib/spml_fast/__main__.py", "python -m spml_fast evaluate", "python -m spml_fast train"),
        ("launch/train.py", "python launch/evaluate.py", "deepspeed --quiet launch/train.py"),
        (
            "/my work/launch/prepare.py",
            "python '/my work/launch/evaluate.py'",
            "deepspeed --quiet '/my work/launch/train.py'",
        ),
        # A program of somebody else, which has no scripts beside it.
        ("/home/me/train_mine.py", "spml-fast evaluate", "spml-fast train"),
        ("", "spml-fast evaluate", "spml-fast train"),
    ],
)
def test_commands_are_called_as_this_one_was(monkeypatch: pytest.MonkeyPatch, started: str, evaluate: str, train: str):
    monkeypatch.setattr(sys, "argv", [started])
    assert command_line("evaluate", "--run", "runs/a") == f"{evaluate} --run runs/a"
    assert command_line("train") == train


def test_a_script_in_its_own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path):
    (tmp_path / "launch").mkdir()
    monkeypatch.chdir(tmp_path / "launch")
    monkeypatch.setattr(sys, "argv", ["prepare.py"])
    assert command_line("train", "--data.dir", "d") == "deepspeed --quiet train.py --data.dir d"
    assert program("prepare") == "prepare.py" and program("evaluate") == "spml-fast evaluate"


def test_words_are_quoted_and_obeyed_by_nobody(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["spml-fast"])
    assert command_line("report", "my runs/a;b") == "spml-fast report 'my runs/a;b'"
    assert "\x1b" not in command_line("report", "a\x1b[31m")


def test_commands_stand_below_each_other():
    assert next_lines(["a", "b"]) == "next: a\n      b"
