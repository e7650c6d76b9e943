"""`run.profile`: which updates are measured, what is written and said of them, and that nothing else changes."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from spml_fast.cli.parse import parse_config
from spml_fast.core import spans
from spml_fast.core.errors import UserError
from spml_fast.runs.layout import RunLayout
from spml_fast.training import step_profile
from spml_fast.training.collectives import COLLECTIVES, all_within, wrapped
from spml_fast.training.setup import Phase
from spml_fast.training.step_profile import NoProfile, Plan, plan, profiled_epoch
from tests.support.paths import ROOT
from tests.support.runs import read_metrics

CPU = torch.device("cpu")


@pytest.mark.parametrize("words", [["--profile", "4"], ["--profile=4"], ["--run.profile", "4"]])
def test_the_option_has_a_short_name(words):
    assert parse_config(words).run.profile == 4 and parse_config([]).run.profile is None


@pytest.mark.parametrize("number", ["0", "-3"])
def test_a_number_that_is_none_is_refused(number):
    with pytest.raises(UserError, match=f"^run.profile is {number}; it must be greater than 0$"):
        parse_config([f"--profile={number}"])


@pytest.mark.parametrize(
    ("asked", "left", "whole", "last", "expected"),
    [
        (5, 100, True, False, Plan(3, 5)),
        (5, 8, True, False, Plan(3, 5)),
        # A resumed epoch is too short, and another comes.
        (5, 7, False, False, None),
        (5, 7, False, True, Plan(3, 4)),
        # No epoch has so many.
        (50, 7, True, False, Plan(3, 4)),
        (50, 4, True, False, Plan(3, 1)),
        (5, 3, True, True, Plan(2, 1)),
        (5, 1, True, True, Plan(0, 1)),
        (5, 0, False, True, None),
    ],
)
def test_which_updates_are_measured(asked, left, whole, last, expected):
    assert plan(asked, left, whole, last) == expected


class Run:
    """What a profile asks of a trainer, and an epoch of it."""

    def __init__(self, folder, profile, updates):
        self.config = SimpleNamespace(run=SimpleNamespace(profile=profile))
        self.loader = SimpleNamespace(updates_per_epoch=updates)
        self.engine = SimpleNamespace(collectives_within=lambda span: contextlib.nullcontext())
        self.classifier = nn.Linear(4, 4)
        self.layout, self.device, self.world, self.profiled = RunLayout(folder), CPU, 1, set()
        self.hooks = []

    def epoch(self, phase=None, epoch=1, update=0, breaks_at=None):
        weak = torch.ones(2, 4)
        batches = [SimpleNamespace(views={"weak": weak})]
        with profiled_epoch(self, phase or Phase("finetune", 2), epoch, update) as profile:
            for number in range(update, self.loader.updates_per_epoch + 1):
                assert profile.before_update() >= 0
                if number == self.loader.updates_per_epoch:
                    break
                profile.see(batches)
                self.hooks.append(len(self.classifier._forward_hooks))
                if number == breaks_at:
                    raise RuntimeError("the run ends")
                with spans.span(spans.METHOD):
                    self.classifier(weak)
                    self.classifier(torch.zeros(2, 4))
                with spans.span(spans.BACKWARD):
                    pass
        return profile

    def found(self, name="steps.json"):
        return json.loads((self.layout.folder / "profile" / name).read_text())


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(step_profile, "say", lambda text, whole=False: lines.append(text))
    return lines


def test_the_rows_add_up(tmp_path, said):
    run = Run(tmp_path, 4, 9)
    run.epoch()
    found = run.found()
    assert (found["first_update"], found["updates"], found["asked"], found["epoch"]) == (4, 4, 4, 1)
    names = [row["name"] for row in found["rows"]]
    assert names == [
        "forward: weak view",
        "forward: derived view",
        "method and loss",
        "backward",
        "logging and other",
    ]
    assert sum(row["ms"] for row in found["rows"]) == pytest.approx(found["update_ms"])
    assert sum(row["percent"] for row in found["rows"]) == pytest.approx(100)
    assert said[0] == "where the time of an update goes: epoch 1/2, updates 4 to 7, rank 0"
    assert [line.split()[-3:-1] for line in said[1:7]] == [
        [f"{row['ms']:.2f}", "ms"] for row in [*found["rows"], {"ms": found["update_ms"]}]
    ]
    assert said[6].split()[0] == "sum" and said[6].endswith("100.0%")
    assert run.profiled == {"finetune"}


def test_the_trace_has_the_named_ranges(tmp_path, said):
    run = Run(tmp_path, 4, 9)
    run.epoch()
    assert run.found()["trace"] == "trace.json"
    events = run.found("trace.json")["traceEvents"]
    counts = {
        name: sum(e.get("name") == name and e.get("ph") == "X" for e in events) for name in ("backward", "nothing")
    }
    assert counts == {"backward": 4, "nothing": 0}
    assert {"forward: weak view", "forward: derived view", "method and loss"} <= {e.get("name") for e in events}
    assert any(e.get("name") == "aten::linear" for e in events)


def test_listening_begins_before_and_ends_with_the_updates(tmp_path, said):
    """The last of those that warm up is heard; after the measured ones nothing is left."""
    run = Run(tmp_path, 2, 7)
    run.epoch()
    assert run.hooks == [0, 0, 1, 1, 1, 0, 0]
    run.epoch(epoch=2)
    assert run.hooks[7:] == [0] * 7 and not (tmp_path / "profile" / "steps-2.json").exists()


def test_another_phase_and_another_start_write_beside(tmp_path, said):
    run = Run(tmp_path, 2, 7)
    run.epoch(Phase("linear", 1))
    first = run.found("trace.json")
    run.epoch()
    again = Run(tmp_path, 1, 7)
    again.epoch(update=2)
    assert run.found("trace.json") == first and run.found()["phase"] == "linear"
    assert run.found("steps-2.json")["phase"] == "finetune" and run.found("steps-2.json")["trace"] == "trace-2.json"
    assert run.found("steps-3.json")["first_update"] == 6 and run.found("trace-3.json")["traceEvents"]


def test_fewer_updates_than_were_asked_for(tmp_path, said):
    run = Run(tmp_path, 50, 5)
    run.epoch()
    assert (run.found()["updates"], run.found()["asked"]) == (2, 50)
    assert any("profile: 2 of the 50 updates asked for" in line for line in said)


@pytest.mark.filterwarnings("error")
def test_an_epoch_of_one_update(tmp_path, said):
    run = Run(tmp_path, 5, 1)
    run.epoch()
    assert run.found()["updates"] == 1 and run.found()["first_update"] == 1


def test_a_run_that_ends_early_leaves_nothing_attached(tmp_path, said):
    run = Run(tmp_path, 4, 9)
    with pytest.raises(RuntimeError, match="the run ends"):
        run.epoch(breaks_at=5)
    assert not run.classifier._forward_hooks and not run.classifier._forward_pre_hooks
    assert isinstance(spans.span("a"), contextlib.nullcontext)
    assert not (tmp_path / "profile").exists() and not run.profiled and not said


def test_without_the_option_nothing_is_attached(tmp_path):
    run = Run(tmp_path, None, 9)
    assert isinstance(run.epoch(), NoProfile) and not any(run.hooks) and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_ends_no_run(tmp_path, said):
    (tmp_path / "profile").write_text("a file")
    Run(tmp_path, 2, 7).epoch()
    assert said[0].startswith("where the time") and "trace.json cannot be written: " in said[-1]


def test_collectives_are_spans_while_they_are_wrapped():
    heard, owner = [], SimpleNamespace(all_reduce=lambda value, more=0: value + more)
    before, reduce = owner.all_reduce, dist.all_reduce

    @contextlib.contextmanager
    def span():
        heard.append(1)
        yield

    with pytest.raises(RuntimeError), wrapped(owner, ["all_reduce", "missing"], span):
        assert owner.all_reduce(1, more=2) == 3 and not hasattr(owner, "missing")
        raise RuntimeError
    assert owner.all_reduce is before and heard == [1]
    with all_within([dist], span):
        assert dist.all_reduce is not reduce
    assert dist.all_reduce is reduce and "all_reduce" in COLLECTIVES


def test_a_method_of_an_instance_is_the_class_s_again():
    class Owner:
        def work(self):
            return self

    owner = Owner()
    with wrapped(owner, ["work"], contextlib.nullcontext):
        assert owner.work() is owner and "work" in vars(owner)
    assert not vars(owner)


WORDS = ["--config", "digits_ignore", "--train.schedule", "constant", "--train.batch_size", 48, "--method.warm_up", 0]
WORDS += ["--data.val_split", "null", "--data.test_split", "null", "--deepspeed.tensorboard", "false"]
WORDS += ["--plugins", ROOT / "tests" / "support" / "tiny_network.py", "--model.backbone", "tiny_network"]
WORDS += ["--data.image_size", 32]


def train(run_script, data, run, *words, **more):
    done = run_script("train.py", *WORDS, "--data.dir", data, "--run.dir", run, *words, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check(run: Path, number: str, updates: int) -> set[str]:
    """What a profile of a run holds; the names of its rows."""
    found = json.loads((run / "profile" / f"steps{number}.json").read_text())
    assert found["updates"] == updates
    assert sum(row["ms"] for row in found["rows"]) == pytest.approx(found["update_ms"])
    named = {e.get("name") for e in json.loads((run / "profile" / found["trace"]).read_text())["traceEvents"]}
    names = {row["name"] for row in found["rows"]}
    assert names - {spans.OTHER} <= named
    return names


VIEWS = {f"forward: {view} view" for view in ("weak", "strong", "derived")}
ALWAYS = {*VIEWS, "data wait", "data wait: decoding", "labels", "method and loss", "backward", "optimizer"}


@pytest.mark.slow
def test_a_profiled_run_trains_the_same(run_script, small_digits: Path, tmp_path: Path):
    """To the bit, and cut between its epochs; a profile of the resumed run leaves the first one as it is."""
    train(run_script, small_digits, tmp_path / "plain", "--train.epochs", 2)
    run = tmp_path / "run"
    said = train(run_script, small_digits, run, "--train.epochs", 1, "--profile", 50)
    assert "where the time of an update goes: epoch 1/1, updates 4 to 4" in said and "1 of the 50 updates" in said
    assert check(run, "", 1) >= ALWAYS
    first = (run / "profile" / "trace.json").read_bytes()
    said = train(run_script, small_digits, run, "--train.epochs", 2, "--run.profile", 1)
    assert check(run, "-2", 1) >= ALWAYS and (run / "profile" / "trace.json").read_bytes() == first
    assert "run.profile" not in said and "profile: null" in (run / "config.yaml").read_text()
    whole, cut = (load_file(folder / "model.safetensors") for folder in (tmp_path / "plain", run))
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())
    losses = [[line["loss"] for line in read_metrics(folder, "epoch")] for folder in (tmp_path / "plain", run)]
    assert losses[0] == losses[1]
    assert not (tmp_path / "plain" / "profile").exists()


@pytest.mark.slow
@pytest.mark.multirank
@pytest.mark.parametrize("stage", [0, 3])
def test_of_two_ranks_the_first_tells_what_it_sends(stage: int, run_script, small_digits: Path, tmp_path: Path):
    words = ["--train.epochs", 1, "--profile", 1, "--deepspeed.zero_stage", stage]
    said = train(run_script, small_digits, tmp_path / "run", *words, ranks=2)
    assert said.count("where the time of an update goes") == 1
    assert check(tmp_path / "run", "", 1) >= {*ALWAYS, "communication"}
    assert len(list((tmp_path / "run" / "profile").iterdir())) == 2
