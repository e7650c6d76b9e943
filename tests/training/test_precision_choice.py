"""fp32 or bf16 by measuring: what is measured, what it leaves alone, what is kept, and what a run says of it."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from spml_fast.cli.parse import parse_config
from spml_fast.core import distributed
from spml_fast.models.classifier import Classifier
from spml_fast.runs.layout import RunLayout
from spml_fast.runs.recipe import to_yaml
from spml_fast.training import precision_choice, trials
from spml_fast.training.earlier_choices import EarlierChoices, earlier_choices
from spml_fast.training.precision_choice import PrecisionTimes, precision_times, settle_precision
from spml_fast.training.resume import Resume
from spml_fast.training.trials import Trial, trial_of

CPU = torch.device("cpu")
WORDS = ["--data.image_size", "64", "--model.backbone", "test_resnet", "--model.pretrained", "false"]


def config_of(*words):
    return parse_config([*WORDS, *words])


@pytest.fixture(scope="module")
def classifier():
    return Classifier(config_of().model, 4, 64)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache of a machine with bf16."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(precision_choice, "has_bf16", lambda device: True)
    return tmp_path / "spml_fast" / "step_times.json"


def times_of(gain, batch=8, images=8, casts=0.0):
    return PrecisionTimes(images, batch, 0.4, 0.4 / gain, casts, [gain] * 3)


def measured(monkeypatch, outcome):
    """Have the measurement give `outcome`, or raise it; the calls that are made."""
    calls = []

    def measure(*arguments):
        calls.append(arguments)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(precision_choice, "precision_times", measure)
    return calls


@pytest.mark.parametrize(("gain", "taken"), [(0.8, "fp32"), (1.14, "fp32"), (1.16, "bf16"), (2.0, "bf16")])
def test_bf16_is_taken_where_it_gains_enough(gain, taken, cache, classifier, monkeypatch):
    calls = measured(monkeypatch, times_of(gain))
    config, (note,) = settle_precision(config_of("--train.batch_size", "32"), classifier, None, CPU)
    assert config.train.precision == taken and calls == [(Trial(classifier, 32, 64, CPU),)]
    assert note.startswith(f"train.precision auto: {taken}; a step of 8 images takes 400 ms in fp32 and ")
    assert f"{gain:.2f} times as fast in steps of 8" in note and "--train.precision decides" in note


def test_casts_count_once_a_step():
    """Of a step of 2 images in bf16 0.1 s are casts; of 8 images it takes 4 x 0.3 + 0.1, and in fp32 4 x 0.4."""
    times = PrecisionTimes(2, 8, 0.4, 0.4, 0.1, [1.0, 1.0, 1.0])
    assert times.gain == pytest.approx(4 * 0.4 / (4 * 0.3 + 0.1))
    assert dataclasses.replace(times, batch=2).gain == 1


def test_given_precisions_are_not_measured(cache, classifier, monkeypatch):
    calls = measured(monkeypatch, times_of(2))
    for given in ("fp32", "bf16"):
        config = config_of("--train.precision", given)
        assert settle_precision(config, classifier, None, CPU) == (config, [])
    assert not calls and not cache.exists()


def test_nor_are_processors_without_bf16(cache, classifier, monkeypatch):
    calls = measured(monkeypatch, times_of(2))
    monkeypatch.setattr(precision_choice, "has_bf16", lambda device: False)
    config, (note,) = settle_precision(config_of(), classifier, None, CPU)
    assert config.train.precision == "fp32" and "no instructions for bf16" in note and not calls


@pytest.mark.parametrize("able", [True, False])
def test_nor_are_gpus(able, cache, classifier, monkeypatch):
    calls = measured(monkeypatch, times_of(2))
    monkeypatch.setattr(precision_choice, "prefers_bf16", lambda device: able)
    config, notes = settle_precision(config_of(), classifier, None, torch.device("cuda", 0))
    assert config.train.precision == ("bf16" if able else "fp32") and not notes and not calls


def test_a_measurement_that_fails_means_fp32(cache, classifier, monkeypatch):
    measured(monkeypatch, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried\nmore"))
    config, (note,) = settle_precision(config_of(), classifier, None, CPU)
    assert config.train.precision == "fp32" and not cache.exists()
    assert "bf16 could not be measured (RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried)" in note


def test_times_are_kept_for_runs_of_the_same_kind(cache, classifier, monkeypatch):
    calls = measured(monkeypatch, times_of(2))
    settle_precision(config_of(), classifier, None, CPU)
    config, (note,) = settle_precision(config_of("--train.lr", "1", "--run.seed", "3"), classifier, None, CPU)
    assert config.train.precision == "bf16" and len(calls) == 1
    assert f"measured by an earlier run ({cache})" in note
    others = [["--train.batch_size", "64"], ["--train.accumulation", "2"], ["--model.freeze_bn", "true"]]
    for words in (*others, ["--data.image_size", "96"], ["--model.output_stride", "8"]):
        calls.clear()
        settle_precision(config_of(*words), classifier, None, CPU)
        assert len(calls) == 1, words
    assert len(json.loads(cache.read_text())["precision"]) == 6
    torch.set_num_threads(threads := torch.get_num_threads() + 1)
    try:
        settle_precision(config_of(), classifier, None, CPU)
    finally:
        torch.set_num_threads(threads - 1)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"precision": 3}', '{"precision": {KEY: {"images": 1}}}', "\udcff", "NEGATIVE"],
)
def test_damaged_caches_are_told_of_and_replaced(text, cache, classifier, monkeypatch):
    calls = measured(monkeypatch, times_of(2))
    key = json.dumps(trials.trial_key(config_of(), trial_of(config_of(), classifier, CPU)))
    negative = json.dumps({"precision": {json.loads(key): dataclasses.asdict(times_of(2)) | {"bf16": -1}}})
    cache.parent.mkdir()
    cache.write_bytes(text.replace("KEY", key).replace("NEGATIVE", negative).encode(errors="surrogateescape"))
    config, (note,) = settle_precision(config_of(), classifier, None, CPU)
    assert config.train.precision == "bf16" and len(calls) == 1 and f"{cache} is damaged and was not used" in note
    _, (note,) = settle_precision(config_of(), classifier, None, CPU)
    assert len(calls) == 1 and "is damaged" not in note


def test_a_cache_that_cannot_be_written_is_told_of(cache, classifier, monkeypatch):
    measured(monkeypatch, times_of(2))
    cache.parent.write_text("a file")
    config, (note,) = settle_precision(config_of(), classifier, None, CPU)
    assert config.train.precision == "bf16" and "could not be kept for other runs" in note


@pytest.mark.parametrize(
    ("defines", "kept"), [({"train.precision": "bf16"}, "bf16"), ({"train.precision": "fp32"}, "fp32"), ({}, "fp32")]
)
def test_a_resumed_run_keeps_what_it_has(defines, kept, cache, classifier, monkeypatch, tmp_path):
    """Without a word of it in the checkpoint, as in versions before 0.2.0, auto means what it meant then."""
    calls = measured(monkeypatch, times_of(0.1 if kept == "bf16" else 2))
    monkeypatch.setattr(precision_choice, "prefers_bf16", lambda device: False)
    resume = Resume(SimpleNamespace(defines=defines, folder=tmp_path / "checkpoints"))
    earlier = earlier_choices(resume, RunLayout(tmp_path), config_of())
    config, notes = settle_precision(config_of(), classifier, earlier, CPU)
    assert config.train.precision == kept and not notes and not calls


@pytest.mark.parametrize(
    ("words", "text", "kept"),
    [
        ((), None, "bf16"),
        (("--train.batch_size", "4", "--train.lr", "1"), None, "bf16"),
        (("--run.resume", "never"), None, None),
        (("--data.image_size", "96"), None, None),
        (("--model.backbone", "test_vit"), None, None),
        ((), "train: {precision: auto}", None),
        ((), "{", None),
    ],
)
def test_a_start_without_a_checkpoint_keeps_what_the_one_before_chose(words, text, kept, tmp_path):
    """It was killed before it could save; another machine may measure something else."""
    layout = RunLayout(tmp_path)
    assert earlier_choices(None, layout, config_of()) is None
    before = config_of("--train.precision", "bf16", "--model.compile", "true")
    layout.config.write_text(to_yaml(before) if text is None else text)
    earlier = earlier_choices(None, layout, config_of(*words))
    assert earlier == (kept and EarlierChoices(kept, True, layout.config))


def test_what_an_earlier_start_chose_is_said(cache, classifier, monkeypatch, tmp_path):
    calls = measured(monkeypatch, times_of(0.1))
    config, (note,) = settle_precision(config_of(), classifier, EarlierChoices("bf16", False, tmp_path), CPU)
    assert config.train.precision == "bf16" and not calls
    assert note == f"train.precision auto: bf16, as an earlier start of this run chose ({tmp_path})"


@pytest.mark.parametrize("device", [CPU, torch.device("cuda", 0)])
@pytest.mark.parametrize("able", [True, False])
def test_bf16_is_for_ranks_that_all_have_it(device, able, cache, classifier, monkeypatch):
    """Rank 0 has bf16; of another machine's rank it depends."""
    calls = measured(monkeypatch, times_of(2))
    monkeypatch.setattr(precision_choice, "prefers_bf16", lambda device: True)
    monkeypatch.setattr(distributed, "gather_objects", lambda own: [own, able])
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "from_main", lambda choose: choose())
    config, notes = settle_precision(config_of(), classifier, None, device)
    assert config.train.precision == ("bf16" if able else "fp32") and len(calls) == (able and device == CPU)
    assert device != CPU or able or "a rank's processor has no instructions for bf16" in notes[0]


def test_measuring_leaves_everything_as_it_was(classifier, monkeypatch):
    """Real steps, in both precisions; weights, statistics, gradients, modes and random numbers are untouched."""
    monkeypatch.setattr(trials, "SECONDS", 0.0)
    network = copy.deepcopy(classifier).eval()
    before = copy.deepcopy(network.state_dict())
    seen = []
    network.backbone.conv1.register_forward_hook(lambda m, i, out: seen.append((len(out), out.dtype, m.training)))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    times = precision_times(Trial(network, 3, 64, CPU))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters()) and not network.training
    assert len(times.rounds) == trials.FEWEST_ROUNDS and times.batch == 3
    assert min(times.fp32, times.bf16, *times.rounds) > 0
    assert {dtype for _, dtype, _ in seen} == {torch.float32, torch.bfloat16}
    assert all(training for *_, training in seen) and max(images for images, *_ in seen) == times.images


@pytest.mark.slow
def test_a_run_says_and_keeps_it(run_script, small_digits: Path, tmp_path: Path, monkeypatch):
    """Its config.yaml has what it took; times of another outcome change new runs and no resumed one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["--config", "digits", "--data.dir", small_digits, "--train.precision", "auto", "--train.batch_size", 32]
    words += ["--data.test_split", "null"]

    def train(name, epochs):
        run = tmp_path / name
        done = run_script("train.py", *words, "--train.epochs", epochs, "--run.dir", run)
        assert done.returncode == 0, done.stdout + done.stderr
        said = yaml.safe_load((run / "config.yaml").read_text())["train"]["precision"]
        return said, " ".join(done.stdout.split())

    first, output = train("first", 1)
    assert first in ("fp32", "bf16") and f"train.precision auto: {first}; " in output
    file = tmp_path / "cache" / "spml_fast" / "step_times.json"
    if not file.exists():
        pytest.skip("this processor has no bf16, so nothing was measured")
    entries = json.loads(file.read_text())
    other = {"fp32": "bf16", "bf16": "fp32"}[first]
    for entry in entries["precision"].values():
        entry["rounds"] = [2.0 if other == "bf16" else 0.5] * 3
    file.write_text(json.dumps(entries))
    again, output = train("first", 2)
    assert again == first and "train.precision auto" not in output and "changed options: train.epochs 1 -> 2" in output
    (tmp_path / "third").mkdir()
    (tmp_path / "third" / "config.yaml").write_text((tmp_path / "first" / "config.yaml").read_text())
    begun, output = train("third", 1)
    assert begun == first and f"train.precision auto: {first}, as an earlier start of this run chose" in output
    new, output = train("second", 1)
    assert new == other and "measured by an earlier run" in output
