"""The slowest tests of two versions, in a small repository that has both."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import bench_tests, versions
from benchmarks.bench_tests import same_tests, seconds_of
from benchmarks.kernel_report import read_csv
from benchmarks.summary import table
from spml_fast.core.errors import UserError
from tests.support.repository import repository

OLD = """
import time
import pytest

@pytest.mark.parametrize("what", ["a.b", "c"])
def test_slow(what):
    time.sleep({"a.b": 0.8, "c": 0.6}[what])

class TestParts:
    def test_part(self):
        time.sleep(0.5)

def test_gone():
    time.sleep(0.4)

def test_quick():
    pass

def test_not_here():
    time.sleep(1)
    pytest.skip("no data")

def test_broken():
    time.sleep(1)
    raise ValueError("the packages are newer")
"""
NEW = """
import time
import pytest

@pytest.fixture(scope="module")
def made():
    time.sleep(0.2)

@pytest.mark.parametrize("what", ["a.b", "c", "d"])
def test_slow(made, what):
    pass

def test_part():
    time.sleep(0.1)

def test_quick():
    pass
"""
SETTINGS = "[pytest]\n"


def start(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench_tests.py", *words])
    return bench_tests.main()


def small(monkeypatch: pytest.MonkeyPatch, folder: Path, new: str = NEW) -> None:
    """A repository whose newer version has moved its tests."""
    old = {"pytest.ini": SETTINGS, "tests/test_all.py": OLD}
    root = repository(folder / "repository", old, {"pytest.ini": SETTINGS, "tests/parts/test_part.py": new})
    monkeypatch.setattr(versions, "ROOT", root)


def test_the_slowest_tests_are_found_where_they_are_now(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small(monkeypatch, tmp_path)
    words = ("--against", "HEAD~1", "--count", "4", "--rounds", "1", "--results", str(tmp_path))
    assert start(monkeypatch, *words) == 0
    rows = {row["test"]: row for row in read_csv(tmp_path / "tests.csv")}
    names = ("test_slow[a.b]", "test_slow[c]", "TestParts::test_part")
    assert list(rows) == [*(f"tests/test_all.py::{name}" for name in names), "all"]
    for row, seconds, newer in zip(rows.values(), (0.8, 0.6, 0.5, 1.9), (0.2, 0, 0.1, 0.3), strict=True):
        # A test is never done sooner than it sleeps.
        assert float(row["seconds_against"]) >= seconds and float(row["seconds"]) >= newer
    # Of the first one, with the fixture that it waits for.
    assert float(rows["all"]["seconds"]) == pytest.approx(sum(float(row["seconds"]) for row in list(rows.values())[:3]))
    assert rows["all"]["found"] == "3" and rows["all"]["slowest"] == "4"
    assert "tests/test_all.py::test_gone (no such test now)" in capsys.readouterr().out
    (line,) = (line for line in table(tmp_path).splitlines() if line.startswith("| the ten slowest tests |"))
    assert "3 of 4 still there" in line


def test_a_report_takes_the_place_of_the_suite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small(monkeypatch, tmp_path)
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.test_all" name="test_quick" time="5.5"/>'
        '<testcase classname="tests.test_all" name="test_slow[c]" time="9"><failure/></testcase>'
        "</testsuite></testsuites>"
    )
    assert seconds_of(report, versions.ROOT) == {"tests/test_all.py::test_quick": 5.5}
    words = ("--against", "HEAD~1", "--report", str(report), "--rounds", "1", "--results", str(tmp_path))
    assert start(monkeypatch, *words) == 0
    assert [row["test"] for row in read_csv(tmp_path / "tests.csv")] == ["tests/test_all.py::test_quick", "all"]


def test_a_test_that_fails_is_no_measurement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small(monkeypatch, tmp_path, NEW.replace("pass", "raise ValueError('wrong')"))
    with pytest.raises(RuntimeError, match="ValueError: wrong"):
        start(monkeypatch, "--against", "HEAD~1", "--rounds", "1", "--results", str(tmp_path))
    (other := tmp_path / "other").mkdir()
    small(monkeypatch, other, NEW.replace("pass", "pytest.skip('no data')"))
    with pytest.raises(RuntimeError, match=r"^did not pass: tests/parts/test_part.py::test_slow\[a.b\]"):
        start(monkeypatch, "--against", "HEAD~1", "--rounds", "1", "--results", str(tmp_path))
    assert not (tmp_path / "tests.csv").exists()


def test_which_tests_are_the_same() -> None:
    others = ["b.py::test_x[1]", "c.py::test_x[1]", "b.py::test_y", "b.py::test_y[2]", "b.py::Test::test_z[a::b]"]
    others += ["b.py::test_w", "new/a.py::test_w"]
    wanted = ["a.py::test_x[1]", "a.py::Test::test_y", "a.py::test_z", "a.py::test_z[a::b]", "old/a.py::Test::test_w"]
    assert same_tests(wanted, others) == {wanted[1]: others[2], wanted[3]: others[4], wanted[4]: others[6]}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--count", "0"], "^--count is 0; it must be 1 or more$"),
        (["--rounds", "0"], "^--rounds is 0; it must be 1 or more$"),
        (["--report", "none.xml"], "^--report none.xml is no file; `pytest --junitxml` writes it$"),
    ],
)
def test_what_is_refused(monkeypatch: pytest.MonkeyPatch, words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        start(monkeypatch, *words)
