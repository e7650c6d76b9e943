"""A run opened once: its configuration, data, classes and classifier."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from spml_fast.cli.parse import parse_config
from spml_fast.core import lock
from spml_fast.core.errors import UserError
from spml_fast.data.manifest import Manifest
from spml_fast.models.classifier import Classifier
from spml_fast.models.weights import save_weights
from spml_fast.runs.layout import RunLayout
from spml_fast.runs.open import RunContext, load_run
from spml_fast.runs.recipe import to_yaml
from tests.support.paths import ROOT

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(small_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with random weights."""
    layout = RunLayout(tmp_path_factory.mktemp("open") / "run")
    layout.folder.mkdir()
    words = ["--config", str(ROOT / "launch" / "configs" / "digits.yaml"), "--data.dir", str(small_digits)]
    config = parse_config([*words, "--data.threads", "1", "--eval.batch_size", "64"])
    layout.config.write_text(to_yaml(config), encoding="utf-8")
    layout.classes.write_text("".join(f"{i}\n" for i in range(10)), encoding="utf-8")
    save_weights(layout.weights, Classifier(config.model, 10, config.data.image_size), {"epoch": "3"})
    return layout.folder


def test_everything_of_a_run(run: Path, small_digits: Path):
    context = RunContext(run)
    assert context.has_data and context.manifest.folder == small_digits and len(context.classes) == 10
    assert context.classifier is context.classifier and not context.classifier.training
    assert context.metadata == {"epoch": "3"} and context.normalisation() == context.classifier.input_normalisation()
    chosen = [context.split(None), context.split(None, "train"), context.split("val")]
    assert [split.name for split in chosen] == ["test", "train", "val"]
    with pytest.raises(UserError, match="has no split 'x'"):
        context.split("x")
    batch = next(iter(context.loader(context.split("val"))))
    assert context.classifier(batch.views["eval"]).logits.shape == (64, 10)
    config, manifest, classifier, metadata = load_run(run, CPU)
    assert (config, manifest.classes, metadata) == (context.config, context.classes, context.metadata)
    assert torch.equal(classifier.head.weight, context.classifier.head.weight)


def test_a_data_set_that_is_open_is_not_prepared_anew(run: Path, small_digits: Path):
    """As training, evaluation and the rest open it; a notebook that evaluates gives it free again."""
    before = lock.Owner.current()
    try:
        RunContext(run)
        notes = list((small_digits / ".readers").iterdir())
        assert before in [lock.Owner.read(note) for note in notes]
    finally:
        lock.release_all()
    manifest = Manifest(small_digits)
    with manifest.reading():
        assert before in [lock.Owner.read(note) for note in (small_digits / ".readers").iterdir()]
    assert before not in [lock.Owner.read(note) for note in (small_digits / ".readers").iterdir()]


def test_other_options_share_what_is_loaded(run: Path):
    context = RunContext(run)
    before = context.classifier
    other = context.with_options("eval", batch_size=7)
    assert (other.config.eval.batch_size, context.config.eval.batch_size) == (7, 64)
    assert other.classifier is before and other.config.data == context.config.data
    with pytest.raises(ValueError, match="loaded already"):
        other.with_options("model", compile=True)
    unloaded = RunContext(run).with_options("model", drop_path=0.0)
    assert unloaded.config.model.drop_path == 0.0
    moved = other.on(CPU)
    assert moved.classifier is before and moved.config is other.config


def test_a_run_whose_data_are_gone(run: Path, tmp_path: Path):
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    layout = RunLayout(copied)
    text = layout.config.read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("  dir:") and "digits" in line]
    layout.config.write_text(text.replace(line, f"  dir: {tmp_path / 'gone'}"))
    with pytest.raises(
        UserError, match=r"data set of .*run is not at .*gone any more: put it back .*run/config\.yaml$"
    ):
        RunContext(copied)
    context = RunContext(copied, with_data=False)
    assert len(context.classes) == 10 and context.classifier is not None and not context.has_data
    with pytest.raises(ValueError, match="without its data"):
        _ = context.manifest
    layout.classes.unlink()
    with pytest.raises(UserError, match=r"has no classes\.txt, and its data set"):
        RunContext(copied, with_data=False)
    layout.config.unlink()
    with pytest.raises(UserError, match="is not a run directory"):
        RunContext(copied)


def test_a_run_without_weights_opens_and_says_so_when_they_are_wanted(run: Path, tmp_path: Path):
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    RunLayout(copied).weights.unlink()
    context = RunContext(copied)
    with pytest.raises(UserError, match="has the run finished an epoch"):
        _ = context.classifier
