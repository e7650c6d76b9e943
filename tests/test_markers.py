"""Tests are marked by what they do."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.support.paths import ROOT

CONFTEST = """
from pathlib import Path
import pytest
from tests.support.markers import marks

def pytest_collection_modifyitems(items):
    for item in items:
        print("MARKS", item.nodeid.partition("::")[2], *sorted(marks(item, Path(__file__).parents[1])))

@pytest.fixture
def run_script():
    return None

@pytest.fixture
def trained(run_script):
    return None
"""
TESTS = """
import subprocess
import pytest

def start():
    subprocess.run(["true"])

def test_plain():
    assert 1

def test_fixture_of_a_fixture(trained):
    assert 1

def test_helper():
    start()

@pytest.fixture
def spawned():
    multiprocessing.spawn(print, nprocs=2)

def test_fixture_of_the_file(spawned):
    assert 1

@pytest.mark.parametrize("ranks", [1, 2])
def test_parameter(run_script, ranks):
    run_script("a.py", ranks=ranks)

def test_star(run_script):
    run_script("a.py", *[], ranks=2)

@pytest.mark.skipif(True, reason="no GPU")
def test_device():
    assert 1

class TestGroup:
    def test_method(self, run_script):
        run_script("a.py")
"""


def test_marks_follow_what_a_test_does(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/conftest.py").write_text(CONFTEST)
    (tmp_path / "tests/test_toy.py").write_text(TESTS)
    words = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "--rootdir", "."]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*words, "tests"], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300)
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("MARKS ")]
    found = {name: marks for name, *marks in lines}
    assert found == {
        "test_plain": [],
        "test_fixture_of_a_fixture": ["slow"],
        "test_helper": ["slow"],
        "test_fixture_of_the_file": ["multirank", "slow"],
        "test_parameter[1]": ["slow"],
        "test_parameter[2]": ["multirank", "slow"],
        "test_star": ["multirank", "slow"],
        "test_device": ["gpu"],
        "TestGroup::test_method": ["slow"],
    }, done.stdout + done.stderr
