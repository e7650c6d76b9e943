"""The stress command in short: one kill, and what its table counts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.stress.faults import KINDS, read_report
from tests.stress.kills import SETTINGS, Killer, Trial, compare
from tests.stress.run import kill_rows, table
from tests.support.paths import ROOT
from tests.support.warm import Kill


@pytest.mark.slow
def test_a_killed_run_ends_like_an_undisturbed_one(small_digits: Path, tmp_path: Path) -> None:
    killer = Killer(tmp_path, small_digits, seed=1, latest=0.6)
    (trial,) = killer.trials(1, SETTINGS[:1])
    assert trial.fault == "" and trial.hits == trial.starts - 1 > 0
    # A difference would be seen: of a weight, of an update, of a result.
    whole, _ = killer.undisturbed[SETTINGS[0].name]
    for change, message in (
        (_change_weight, "weights differ at"),
        (_drop_update, "updates or epochs are in one run alone"),
        (_change_result, "results.json has other figures"),
    ):
        run = tmp_path / "changed"
        shutil.copytree(whole, run)
        assert compare(whole, run, exact=True) == ""
        change(run)
        assert message in compare(whole, run, exact=True)
        shutil.rmtree(run)


def _change_weight(run: Path) -> None:
    state = load_file(run / "model.safetensors")
    name = next(n for n, t in state.items() if t.is_floating_point())
    state[name] = torch.nextafter(state[name], torch.tensor(torch.inf))
    save_file(state, run / "model.safetensors")


def _drop_update(run: Path) -> None:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if json.loads(line).get("update") != 2))


def _change_result(run: Path) -> None:
    path = run / "results.json"
    results = json.loads(path.read_text())
    results["alpha"]["5"]["map"] += 1
    path.write_text(json.dumps(results))


def test_the_tables() -> None:
    # The second signal of the first run came too late.
    late = Trial(SETTINGS[0], [Kill(1, 9), Kill(2, 15)], hits=1, starts=2)
    trials = [late, Trial(SETTINGS[0], [Kill(1, 9)], hits=1, starts=2, fault="weights differ")]
    assert kill_rows(trials) == [(SETTINGS[0].name, 2, 2, 1)]
    assert table(("a", "b"), [("x", 1)]) == "| a | b |\n|---|--:|\n| x | 1 |"


def test_every_kind_of_fault_has_its_tests(tmp_path: Path) -> None:
    for tests in KINDS.values():
        assert all((ROOT / test).is_file() for test in tests)
    (tmp_path / "r.xml").write_text(
        "<testsuite><testcase classname='t' name='a'/><testcase classname='t' name='b'><failure/></testcase>"
        "<testcase classname='t' name='c'><skipped/></testcase></testsuite>"
    )
    found = read_report("kind", tmp_path / "r.xml")
    assert (found.tried, found.failed) == (2, ("t.b",)) and read_report("kind", tmp_path / "none").failed
