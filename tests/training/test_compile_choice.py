"""A compiled backbone: where it is used, when a run takes it, and that the run goes on as it began."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from spml_fast.cli.parse import parse_config
from spml_fast.core import distributed
from spml_fast.core.errors import UserError
from spml_fast.models.classifier import Classifier
from spml_fast.runs.layout import RunLayout
from spml_fast.training import compile_choice
from spml_fast.training.compile_choice import CompileTimes, compiled_sizes, settle_compile
from spml_fast.training.earlier_choices import EarlierChoices, earlier_choices
from spml_fast.training.resume import Resume
from spml_fast.training.trials import Trial
from tests.support import warm
from tests.support.paths import ROOT
from tests.support.runs import environment

CPU = torch.device("cpu")
WORDS = ["--data.image_size", "64", "--model.backbone", "test_resnet", "--model.pretrained", "false"]
WORDS += ["--train.precision", "fp32"]
# Of a second each: an hour.
HOUR = 3600


def config_of(*words):
    return parse_config([*WORDS, "--model.compile", "auto", *words])


@pytest.fixture(scope="module")
def classifier():
    return Classifier(config_of().model, 4, 64)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """An empty cache, a compiler, and steps of one second; what was compiled."""
    calls = []

    def compiled(*arguments):
        calls.append(arguments)
        return machine.times

    machine = SimpleNamespace(cache=tmp_path / "spml_fast" / "step_times.json", calls=calls, times=times_of(1.5))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compile_choice, "has_compiler", lambda: True)
    monkeypatch.setattr(compile_choice, "plain_seconds", lambda *arguments: 1.0)
    monkeypatch.setattr(compile_choice, "compile_times", compiled)
    return machine


def times_of(gain, compiling=60.0):
    return CompileTimes(8, 16, 0.5, 0.5 / gain, compiling, [gain] * 3)


def test_compiling_pays_where_it_saves_more_than_it_takes():
    """A third of an hour is twenty times a minute; a hundredth of it is less than two."""
    assert times_of(1.5).pays(HOUR) and not times_of(1.5, 601).pays(HOUR)
    assert times_of(1.06, 60).pays(HOUR) and not times_of(1.04, 60).pays(10 * HOUR)
    assert not times_of(0.9).pays(1000 * HOUR)


def test_a_long_training_tries_it(machine, classifier):
    config, (note,) = settle_compile(config_of(), classifier, None, CPU, HOUR)
    assert config.model.compile is True and machine.calls == [(Trial(classifier, 16, 64, CPU), None)]
    assert note.startswith("model.compile auto: true; a step of 8 images takes 500 ms, and compiled 333 ms (1.50 times")
    config, (note,) = settle_compile(config_of(), classifier, None, CPU, HOUR)
    assert config.model.compile is True and len(machine.calls) == 1 and f"an earlier run ({machine.cache})" in note
    # What was measured once decides for short trainings, too: 40 s are less than twice a minute.
    config, _ = settle_compile(config_of(), classifier, None, CPU, 120)
    assert config.model.compile is False and len(machine.calls) == 1


def test_accumulation_and_precision_count(machine, classifier):
    updates = int(compile_choice.USUAL_SECONDS / compile_choice.PART / 4) + 1
    settle_compile(config_of("--train.accumulation", "4"), classifier, None, CPU, updates)
    assert len(machine.calls) == 1
    settle_compile(config_of("--train.precision", "bf16"), classifier, None, CPU, HOUR)
    assert machine.calls[1][1] == torch.bfloat16


@pytest.mark.parametrize("gain", [0.9, 1.02])
def test_what_gains_nothing_is_dropped(gain, machine, classifier):
    machine.times = times_of(gain)
    config, (note,) = settle_compile(config_of(), classifier, None, CPU, HOUR)
    assert config.model.compile is False and "model.compile auto: false; a step of 8" in note


def test_a_short_training_does_not(machine, classifier):
    config, (note,) = settle_compile(config_of(), classifier, None, CPU, 600)
    assert config.model.compile is False and not machine.calls and not machine.cache.exists()
    assert note == "model.compile auto: false; compiling takes about 70 s, training 10 min"


def test_a_compiler_that_fails_ends_no_run(machine, classifier, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("\nCppCompileError: C++ compile error")

    monkeypatch.setattr(compile_choice, "compile_times", fails)
    config, (note,) = settle_compile(config_of(), classifier, None, CPU, HOUR)
    assert config.model.compile is False and "could not be tried (RuntimeError: CppCompileError: C++" in note


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--deepspeed.zero_stage", "3"], "deepspeed.zero_stage 3 gathers"),
        (["--model.grad_checkpointing", "true"], "model.grad_checkpointing computes"),
        ([], "no C++ compiler"),
    ],
)
def test_obstacles(words, why, machine, classifier, monkeypatch):
    if not words:
        monkeypatch.setattr(compile_choice, "has_compiler", lambda: False)
    config, (note,) = settle_compile(config_of(*words), classifier, None, CPU, HOUR)
    assert config.model.compile is False and why in note and not machine.calls
    with pytest.raises(UserError, match=f"model.compile true cannot be used here: .*{re.escape(why)}"):
        settle_compile(config_of(*words, "--model.compile", "true"), classifier, None, CPU, HOUR)


def test_a_missing_compiler_is_noticed(monkeypatch):
    from torch._inductor import cpp_builder, exc

    def missing():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    assert not compile_choice.has_compiler()
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "g++")
    assert compile_choice.has_compiler()


@pytest.mark.parametrize("given", [True, False])
def test_what_is_given_is_not_measured(given, machine, classifier):
    config = config_of("--model.compile", str(given).lower())
    assert settle_compile(config, classifier, None, CPU, HOUR) == (config, [])
    assert config.model.compile is given and not machine.calls


@pytest.mark.parametrize("before", [True, False, "auto", None])
def test_a_resumed_run_keeps_what_it_has(before, machine, classifier, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    if before is not None:
        (run / "config.yaml").write_text(yaml.safe_dump({"model": {"compile": before}}))
    resume = Resume(SimpleNamespace(defines={}, folder=run / "checkpoints"))
    earlier = earlier_choices(resume, RunLayout(run), config_of())
    config, notes = settle_compile(config_of(), classifier, earlier, CPU, HOUR)
    assert config.model.compile is (before is True) and not notes and not machine.calls


@pytest.mark.parametrize("compiled", [True, False])
def test_a_compiled_run_goes_on_where_there_is_no_compiler(compiled, machine, classifier, monkeypatch):
    """Another machine than it began on; what it was until then is said, and nothing ends with a traceback."""
    monkeypatch.setattr(compile_choice, "has_compiler", lambda: False)
    config, notes = settle_compile(config_of(), classifier, EarlierChoices("fp32", compiled), CPU, HOUR)
    assert config.model.compile is False and not machine.calls
    assert [note.partition(";")[2] for note in notes] == (
        [" the run was compiled until now, but there is no C++ compiler (g++ or clang++)"] if compiled else []
    )


def test_ranks_that_wait_for_each_other_are_not_timed(machine, classifier, monkeypatch):
    """Rank 0 alone would wait for ever in a BatchNorm of all ranks."""
    monkeypatch.setattr(distributed, "gather_objects", lambda own: [own, own])
    monkeypatch.setattr(distributed, "from_main", lambda choose: choose())
    words = ["--model.sync_bn", "true"]
    assert settle_compile(config_of(*words), classifier, None, CPU, HOUR)[0].model.compile is True
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    machine.calls.clear()
    config, (note,) = settle_compile(config_of(*words), classifier, None, CPU, HOUR)
    assert config.model.compile is False and not machine.calls and "model.sync_bn has ranks wait" in note
    config, _ = settle_compile(config_of(*words, "--model.compile", "true"), classifier, None, CPU, HOUR)
    assert config.model.compile is True
    assert settle_compile(config_of(), classifier, None, CPU, HOUR)[0].model.compile is True


def test_only_full_training_batches_are_compiled(monkeypatch, classifier):
    """Copies of the model pass their own backbone."""
    seen = []

    def counted(function, dynamic):
        assert dynamic is False
        return lambda backbone, images: seen.append((backbone, len(images))) or function(backbone, images)

    monkeypatch.setattr(torch, "compile", counted)
    network = copy.deepcopy(classifier).train()
    images = torch.randn(5, 3, 64, 64)
    expected = network(images[:4]).logits
    network.compile_backbone()
    network.compiled_sizes = (4,)
    assert torch.equal(network(images[:4]).logits, expected) and seen == [(network.backbone, 4)]
    network(images)
    network.eval()(images[:4])
    network.train().freeze_backbone(True)
    network(images[:4])
    network.freeze_backbone(False)
    assert len(seen) == 1
    other = copy.deepcopy(network)
    with torch.no_grad():
        other(images[:4])
    assert seen[1:] == [(other.backbone, 4)]


def test_sizes():
    assert compiled_sizes(config_of("--train.batch_size", "16")) == (16,)
    assert compiled_sizes(config_of("--train.batch_size", "10", "--train.accumulation", "4")) == (2, 3)


@pytest.mark.slow
def test_compiled_runs_resume_bit_for_bit(small_digits: Path, tmp_path: Path):
    """Real compiling: a run that is cut between its epochs ends where the whole one does, near the one without."""
    words = ["--config", "digits", "--data.dir", small_digits, "--train.schedule", "constant", "--train.batch_size", 40]
    words += ["--data.val_split", "null", "--data.test_split", "null", "--deepspeed.tensorboard", "false"]
    words += ["--plugins", ROOT / "tests" / "support" / "tiny_network.py", "--model.backbone", "tiny_network"]
    words += ["--data.image_size", 32]
    # A thread compiles: its helpers would be processes that import everything again.
    places = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "TORCHINDUCTOR_COMPILE_THREADS": "1"}

    def train(name, epochs, compiled):
        run = tmp_path / name
        more = ["--train.epochs", epochs, "--model.compile", compiled, "--run.dir", run]
        given = [str(ROOT / "launch" / "train.py"), *map(str, (*words, *more))]
        done = warm.WARM.run(given, [places], 600, environment())
        assert done.returncode == 0, done.stdout + done.stderr
        return load_file(run / "model.safetensors")

    plain = train("plain", 1, "false")
    assert not list((tmp_path / "inductor").rglob("*.cpp"))
    first = train("cut", 1, "true")
    assert list((tmp_path / "inductor").rglob("*.cpp"))
    name = "head.bias"
    torch.testing.assert_close(first[name], plain[name], rtol=0.05, atol=0.02)
    whole = train("whole", 2, "true")
    cut = train("cut", 2, "auto")
    assert yaml.safe_load((tmp_path / "cut" / "config.yaml").read_text())["model"]["compile"] is True
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())


@pytest.mark.slow
def test_compiling_is_measured():
    """Real compiling; the network is as it was."""
    importlib.import_module("tests.support.tiny_network")
    network = Classifier(config_of("--model.backbone", "tiny_network").model, 4, 32)
    before = copy.deepcopy(network.state_dict())
    times = compile_choice.compile_times(Trial(network, 4, 32, CPU), None)
    assert times.batch == 4 and len(times.rounds) >= 3 and times.compiling > times.compiled
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert json.loads(json.dumps(dataclasses.asdict(times)))["images"] == times.images
