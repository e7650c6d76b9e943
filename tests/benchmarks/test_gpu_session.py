"""A session on a GPU, planned and rehearsed without one: time by a fake clock, commands, what a cut-off run keeps."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_session, kernel_precompile, session_plan
from benchmarks.gpu_session import check_folder, result_files, run_step, session, show_plan
from benchmarks.kernel_precompile import items
from benchmarks.session_plan import LONGEST_COMMAND, MINUTES, SELECTIONS, STEPS, Place, Step, carry_out, steps_of
from spml_fast.core.errors import UserError
from tests.support.gpu_ops import PIECES
from tests.support.paths import ROOT


class Clock:
    """Seconds that pass only when a step takes them."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def rehearse(steps: list[Step], seconds: float, takes) -> list:
    """Outcomes of steps that take what `takes(step, budget)` says, at most their budget."""
    clock = Clock()

    def start(step: Step, budget: float) -> str:
        taken = takes(step, budget)
        clock.now += min(taken, budget)
        return "ok" if taken <= budget else f"stopped after {budget:.0f} s"

    found = list(carry_out(steps, seconds, start, clock))
    assert [step for step, _ in found] == steps and clock.now <= 1000.0 + seconds + 1e-6
    return [outcome for _, outcome in found]


@pytest.mark.parametrize("part", [None, 1, 2])
def test_a_session_keeps_its_time_whatever_its_steps_take(part):
    steps = steps_of(part, lambda module: True)
    seconds = 60 * MINUTES[part]
    everything = rehearse(steps, seconds, lambda step, budget: 1e9)
    assert all(o.status.startswith("stopped after") for o in everything)
    assert sum(o.seconds for o in everything) == pytest.approx(seconds)
    draw = random.Random(0)
    for _ in range(200):
        outcomes = rehearse(steps, seconds * draw.random(), lambda step, budget: 2 * budget * draw.random())
        for step, outcome in zip(steps, outcomes, strict=True):
            assert outcome.planned >= step.least or (outcome.planned, outcome.seconds) == (0, 0)
            assert (outcome.status == "no time left") == (outcome.planned == 0)


def test_time_that_a_step_does_not_need_goes_to_the_others():
    steps = steps_of(None, lambda module: True)
    slow = rehearse(steps, 840, lambda step, budget: budget)
    quick = rehearse(steps, 840, lambda step, budget: 1.0 if step.name.startswith("compile") else budget)
    assert [o.status for o in quick] == ["ok"] * len(steps)
    for step, one, other in zip(steps[2:], slow[2:], quick[2:], strict=True):
        assert other.planned > one.planned or step.name == "compile for part 1"
    # Where there is little time, what comes first has it.
    late = rehearse(steps, 70, lambda step, budget: budget)
    assert [o.status for o in late[:3]] == ["ok"] * 3 and {o.status for o in late[3:]} == {"no time left"}


def test_what_is_worth_most_comes_first_and_every_step_is_in_one_part():
    names = [step.name for step in STEPS]
    assert names.index("compile for part 1") < names.index("headline") < names.index("sweep") < names.index("losses")
    assert names[-1] == "sanitizer" and [step.part for step in STEPS] == sorted(step.part for step in STEPS)
    both = [step.name for part in (1, 2) for step in steps_of(part, lambda module: True)]
    whole = [step.name for step in steps_of(None, lambda module: True)]
    assert both == names and set(names) - set(whole) == {"ceilings again"}
    assert 60 * MINUTES[1] <= LONGEST_COMMAND and 60 * MINUTES[2] <= LONGEST_COMMAND
    assert MINUTES[1] + MINUTES[2] <= MINUTES[None] <= 15
    for part, minutes in MINUTES.items():
        steps = steps_of(part, lambda module: True)
        # Everything is begun where everything takes its time.
        assert all(o.status == "ok" for o in rehearse(steps, 60 * minutes, lambda step, budget: budget))


def test_steps_without_their_libraries_and_known_results_are_left_out():
    kernels_alone = steps_of(None, lambda module: False)
    assert {s.name for s in STEPS} - {s.name for s in kernels_alone} == {"ceilings again", "training steps, whole"}
    assert "ceilings" not in {s.name for s in steps_of(1, lambda module: True, {"ceilings"})}


@pytest.mark.parametrize("part", [1, 2])
def test_a_part_leaves_no_more_files_than_a_small_machine_gives_back(part):
    files = result_files(steps_of(part, lambda module: True))
    assert {"session.csv", "session.log", "ceilings.json", "compile.csv"} < files and len(files) <= 8


def test_commands_are_understood_by_what_they_call(monkeypatch, tmp_path):
    """Every step's words go through the real parser of its program, which would refuse what it does not know."""
    from benchmarks import bench_kernels, bench_step
    from tests import gpu_check

    place, seen = Place(tmp_path, "abc", 16), set()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for step in STEPS:
        _, script, *words = step.command(place, 100.0)
        assert Path(script).is_file() and Path(script).is_relative_to(ROOT)
        seen.add(Path(script).name)
        monkeypatch.setattr(sys, "argv", [script, *words])
        if script.endswith("bench_step.py"):
            args = bench_step.parse()
            assert args.image_size == 448 and args.results == tmp_path and args.count >= args.batch_size
        elif script.endswith("gpu_check.py"):
            assert gpu_check.main() == 2
        elif script.endswith("kernel_precompile.py"):
            assert kernel_precompile.main() == 2
        elif "--worker" in words:
            task = json.loads(words[1])
            assert task == {"ops": "ceilings", "events": str(tmp_path / "ceilings.json"), "commit": "abc"}
        else:
            told = {}
            monkeypatch.setattr("torch.cuda.is_available", lambda: True)
            monkeypatch.setattr(
                bench_kernels, "bench", lambda options, told=told: told.update(vars(options)) or ([], 0)
            )
            assert bench_kernels.main() == 0
            monkeypatch.setattr("torch.cuda.is_available", lambda: False)
            assert told["seconds"] == 88 and told["ceilings"] == tmp_path / "ceilings.json" and told["no_plot"]
            assert told["sweep"] == (step.name == "sweep") and told["results"] == tmp_path
            chosen = SELECTIONS[step.name]
            assert told["quick"] == chosen.small and told["shapes"] == (chosen.shapes and list(chosen.shapes))
            assert {f"sweep_{op}" if told["sweep"] else op for op in told["ops"]} == set(chosen.ops)
    assert seen == {"bench_kernels.py", "bench_step.py", "gpu_check.py", "kernel_precompile.py"}


def test_work_lists_are_counted_and_everything_that_is_timed_is_compiled(capsys, tmp_path):
    place = Place(tmp_path, "abc", 16)
    show_plan(steps_of(None, lambda module: True), place, 14, None)
    plan = capsys.readouterr().out
    assert "python benchmarks/gpu_session.py --part 1 --minutes 8 --out DIR1 --commit abc" in plan
    assert "python benchmarks/gpu_session.py --part 2 --minutes 4.5 --out DIR2 --commit abc" in plan
    assert plan.splitlines()[-3].startswith("where a command may run 10 minutes")
    headline = SELECTIONS["headline"].works()
    assert {w.shape.split()[-1] for w in headline} == {"dense", "sparse", "zipf"} and len(headline) == 5
    counted = sum(len(work.rows) for work in headline)
    assert any(line.split()[2:4] == [str(counted), "headline:"] for line in plan.splitlines() if "headline:" in line)
    # Works times ways to run them may not grow unnoticed: a row takes more than half a second.
    rows = {name: sum(len(w.rows) for w in chosen.works()) for name, chosen in SELECTIONS.items()}
    assert rows["headline"] <= 120 and rows["losses"] <= 150
    repeated = [work.variant for work in SELECTIONS["repeat"].works()]
    assert {"way tile", "way vendor", "backward sparse"} <= set(repeated)
    assert all(variant.split()[0] in ("way", "backward") for variant in repeated)
    assert {item.name.split(" | ")[1] for item in items(["repeat"])} == {"fused"}
    for name in ("headline", "sweep", "losses"):
        compiled = {item.name for item in items([name])}
        for work in SELECTIONS[name].works():
            wanted = {p for p in work.providers if p == "fused" or p.startswith("compile")}
            assert {f"{work.name} | {p}" for p in wanted} <= compiled
    assert {item.name for item in items(["checks"])} == set(PIECES)
    guesses = [item.seconds for item in items(["checks", "headline"])]
    assert guesses == sorted(guesses, reverse=True) and "compile_tuned" in items(["headline"])[0].name


def step_of(code: str, name: str = "some", least: float = 0.1) -> Step:
    """A step that runs Python code, which finds the results' folder in argv[1]."""
    return Step(name, 1, 10, least, "it does", lambda place, seconds: ["-c", code, str(place.out)])


def test_a_session_that_is_cut_off_keeps_what_it_has(tmp_path, capfd):
    place = Place(tmp_path, "abc", 1)
    hang = "import pathlib, sys, time\nprint('begun')\npathlib.Path(sys.argv[1], 'a.csv.part').touch()\ntime.sleep(60)"
    steps = [step_of("print('hello')", "first"), step_of(hang, "second"), step_of("raise SystemExit(3)", "third")]
    steps.append(step_of("print('never')", "last", least=1e6))
    seen = []

    def start(step: Step, seconds: float) -> str:
        seen.append((tmp_path / "session.csv").read_text().count("\n") - 1 if seen else 0)
        return run_step(step, 1.5 if step.name == "second" else 20, place)

    begun = time.monotonic()
    rows = session(steps, place, 60, start)
    assert time.monotonic() - begun < 40
    assert [r["status"] for r in rows] == ["ok", "stopped after 2 s", "exit status 3", "no time left"]
    # The row of every step is there before the next begins.
    assert seen == [0, 1, 2]
    with (tmp_path / "session.csv").open(newline="") as file:
        kept = list(csv.DictReader(file))
    assert [r["step"] for r in kept] == ["first", "second", "third", "last"]
    assert all(r["commit"] == "abc" and r["torch"] and r["triton"] for r in kept)
    assert {p.name for p in tmp_path.iterdir()} == {"session.csv", "session.log"}
    log = (tmp_path / "session.log").read_text()
    assert "hello" in log and "begun" in log and "never" not in log and "hello" in capfd.readouterr().out


def test_results_do_not_go_among_other_files(tmp_path):
    check_folder(tmp_path / "new")
    check_folder(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="holds other files than a session's; give an empty or a new directory"):
        check_folder(tmp_path)
    (tmp_path / "session.csv").touch()
    check_folder(tmp_path)
    with pytest.raises(UserError, match="is not a directory"):
        check_folder(tmp_path / "notes.txt")


# Nothing is installed but torch, triton, timm and what they bring; what a library merely looks for is not there either.
BLOCK = """
import sys
from importlib.machinery import PathFinder
NAMES = ("deepspeed", "jsonargparse", "docstring_parser", "nvidia.dali", "rich", "pyarrow", "matplotlib", "sklearn",
    "scipy", "pandas", "tensorboard", "psutil", "onnx", "onnxruntime", "transformers", "pytest", "hypothesis")
found = PathFinder.find_spec
def find_spec(cls, name, path=None, target=None):
    return None if any(name == n or name.startswith(n + ".") for n in NAMES) else found(name, path, target)
PathFinder.find_spec = classmethod(find_spec)
"""
BLOCKED = f"""{BLOCK}
import benchmarks.gpu_session, benchmarks.session_report, benchmarks.kernel_precompile, benchmarks.bench_kernels
import benchmarks.bench_step, tests.gpu_check
from benchmarks.session_plan import SELECTIONS, steps_of
from benchmarks.machine import installed
for selection in SELECTIONS.values():
    assert selection.works()
assert not installed("nvidia.dali") and not installed("deepspeed") and installed("torch")
print(*[step.name for step in steps_of(None, installed)], sep=",")
loaded = [n for n in sys.modules if any(n == name or n.startswith(name + ".") for name in NAMES)]
assert not loaded, loaded
"""
REHEARSED = f"""{BLOCK}
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_everything_about_kernels_works_with_torch_triton_and_timm_alone():
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    names = done.stdout.strip().splitlines()[-1].split(",")
    assert "training steps" in names and not any("whole" in name for name in names) and len(names) == len(STEPS) - 2


@pytest.mark.parametrize("part", [[], ["--part", "1"], ["--part", "2"]], ids=lambda part: part[-1] if part else "all")
def test_the_command_is_rehearsed_with_torch_triton_and_timm_alone(part, tmp_path):
    words = ["benchmarks/gpu_session.py", "--out", str(tmp_path / "new"), "--dry-run", "--commit", "abc", *part]
    done = subprocess.run([sys.executable, "-c", REHEARSED, *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    steps = steps_of(int(part[-1]) if part else None, lambda module: module not in ("nvidia.dali", "deepspeed"))
    assert all(f" {step.name}: {step.what}" in done.stdout for step in steps) and "whole" not in done.stdout
    assert not (tmp_path / "new").exists()


def test_a_training_step_runs_with_torch_triton_and_timm_alone(tmp_path):
    """The step of the plan that needs none of the other libraries, on the CPU and at the smallest size."""
    words = ["benchmarks/bench_step.py", "--input", "memory", "--loop", "torch", "--methods", "an", "--steps", "1"]
    words += ["--rounds", "1", "--count", "2", "--batch-size", "2", "--image-size", "32", "--backbone", "test_resnet"]
    words += ["--results", str(tmp_path), "--commit", "abc"]
    done = subprocess.run([sys.executable, "-c", REHEARSED, *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (table,) = tmp_path.glob("*_steps.csv")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert any(row["provider"] == "spml_fast" and float(row["images_per_second"]) > 0 for row in rows)


def test_without_a_gpu_a_session_says_so_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_session.py", "--out", str(tmp_path / "new"), "--commit", "abc"])
    assert gpu_session.main() == 2 and not (tmp_path / "new").exists()
    assert "--dry-run shows what would be done" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--minutes", "0"])
    with pytest.raises(UserError, match="--minutes 0 leaves no time"):
        gpu_session.main()
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-2], "--processes", "0"])
    with pytest.raises(UserError, match="--processes 0 compiles nothing"):
        gpu_session.main()
    assert session_plan.budget(list(STEPS), len(STEPS) - 1, 7.0) == 0.0
