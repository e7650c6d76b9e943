"""`--model.weights RUN`: a run that starts from another run's weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from spml_fast.cli.parse import parse_config
from spml_fast.core.config import Config, ModelConfig
from spml_fast.core.errors import UserError
from spml_fast.core.io import file_record
from spml_fast.data.labels import SparseLabels
from spml_fast.data.manifest import Manifest
from spml_fast.models.classifier import Classifier
from spml_fast.models.weights import save_weights
from spml_fast.prepare.manifest_writer import ManifestWriter
from spml_fast.runs.layout import RunLayout
from spml_fast.runs.recipe import to_yaml
from spml_fast.runs.warm_start import source_run, warm_start, without_source

SMALL = ["--train.epochs", "1", "--data.threads", "1", "--deepspeed.tensorboard", "false", "--eval.alphas", "[5]"]


def config_of(*words: str) -> Config:
    return parse_config(["--config", "digits", *words])


@pytest.fixture
def run(tmp_path: Path) -> RunLayout:
    """A run with random weights and three classes."""
    layout = RunLayout(tmp_path / "first")
    layout.folder.mkdir()
    layout.config.write_text(to_yaml(config_of()), encoding="utf-8")
    layout.classes.write_text("ant\nbee\ncat\n", encoding="utf-8")
    metadata = {"phase": "finetune", "epoch": "3", "val_map": "12.5"}
    save_weights(layout.weights, Classifier(config_of().model, 3, 64), metadata)
    return layout


def start(classes: list[str], *words: str) -> tuple[str, dict]:
    config = config_of(*words)
    classifier = Classifier(without_source(config.model), len(classes), config.data.image_size)
    started = warm_start(config, classifier, classes)
    assert started is not None
    return started


def test_what_is_said(run: RunLayout) -> None:
    given = ["--model.weights", str(run.folder)]
    text, record = start(["cat", "dog", "ant"], *given)
    crc32 = file_record(run.weights).crc32
    assert text == (
        f"starting from {run.folder} (epoch 3, checksum {crc32}): backbone and head, 2 of 3 classes matched by name; "
        "1 class (dog) new and fresh; 1 class (bee) of the run left out"
    )
    assert record == {
        **{"run": str(run.folder), "weights_crc32": crc32, "epoch": 3},
        **{"classes_matched": 2, "classes_new": 1, "classes_left_out": 1},
    }
    text, _ = start(["ant", "bee", "cat"], "--model.weights", str(run.weights), "--model.alpha_train", "1")
    assert text.endswith("3 of 3 classes matched by name; model.alpha_train 5 there, 1 here")
    text, _ = start([*"abcdefg"], *given, "--data.image_size", "96")
    assert "0 of 7 classes matched by name; 7 classes (a, b, c, d, e, ...) new and fresh; 3 classes (ant" in text
    assert text.endswith("data.image_size 64 there, 96 here")
    text, _ = start(["ant"], *given, "--model.head", "query2label", "--model.head_options.preset", "tiny")
    assert "backbone alone; the head query2label starts fresh, since the run has cam; model.alpha" in text


def test_what_users_get_wrong(run: RunLayout, tmp_path: Path) -> None:
    folder = str(run.folder)
    with pytest.raises(UserError, match=r"has the backbone test_resnet, not test_vit; give --model\.backbone test_res"):
        start(["ant"], "--model.weights", folder, "--model.backbone", "test_vit", "--model.output_stride", "null")
    with pytest.raises(UserError, match=r"checksum \w{8}, not 00000000 \(model\.weights_crc32\)"):
        start(["ant"], "--model.weights", folder, "--model.weights_crc32", "00000000")
    with pytest.raises(UserError, match="weights_crc32 is 'x'; it must be the 8 hexadecimal digits"):
        ModelConfig(weights_crc32="x")
    with pytest.raises(UserError, match=r"is a folder and no run directory \(no config\.yaml in it\)"):
        source_run(str(tmp_path))
    shutil.copy(run.weights, tmp_path / "taken.safetensors")
    with pytest.raises(UserError, match="has been taken out of its run directory"):
        source_run(str(tmp_path / "taken.safetensors"))
    # A file of a backbone is timm's business, but for its checksum.
    plain = tmp_path / "plain.safetensors"
    save_weights(plain, torch.nn.Linear(2, 2), {})
    assert source_run(str(plain)) is None and source_run(str(tmp_path / "nowhere")) is None
    with pytest.raises(UserError, match=r"plain\.safetensors has the checksum"):
        without_source(ModelConfig(weights=str(plain), weights_crc32="00000000"))
    run.weights.unlink()
    with pytest.raises(UserError, match=r"cannot be read .* has the run finished an epoch"):
        start(["ant"], "--model.weights", folder)
    run.classes.unlink()
    with pytest.raises(UserError, match=r"has no classes\.txt"):
        start(["ant"], "--model.weights", folder)


def other_classes(source: Manifest, folder: Path) -> Manifest:
    """The digit scenes with their classes backwards, `0` left out and a class `none` that no image has."""
    writer = ManifestWriter(folder, "others", ["9", "8", "7", "none", "6", "5", "4", "3", "2", "1"], source.image_root)
    place = {9: 0, 8: 1, 7: 2, 6: 4, 5: 5, 4: 6, 3: 7, 2: 8, 1: 9}
    for name, split in source.splits.items():
        n = min(len(split), 64)
        positives = [[place[c] for c in range(1, 10) if row[c] == 1] for row in split.known.rows(range(n))]
        labels = SparseLabels.from_positives(positives, 10, 0)
        paths = [split.relative_path(i) for i in range(n)]
        writer.add_split(name, known=labels, width=split.width[:n], height=split.height[:n], paths=paths)
    return writer.finish({})


def test_a_run_starts_from_another(run_script, run: RunLayout, small_digits: Path, tmp_path: Path) -> None:
    """Classes in another order; a learning rate of nothing, so that the weights stay as they began; then resumed
    by the same command when the run that it started from is gone."""
    first, second = run, RunLayout(tmp_path / "second")
    first.classes.write_text("".join(f"{c}\n" for c in range(10)), encoding="utf-8")
    save_weights(first.weights, Classifier(config_of().model, 10, 64), {"epoch": "1"})
    data = other_classes(Manifest(small_digits), tmp_path / "others")
    words = ["--config", "digits", *SMALL, "--data.dir", data.folder, "--run.dir", second.folder]
    words += ["--train.lr", "1e-12", "--model.freeze_bn", "true", "--train.weight_decay", "0"]
    done = run_script("train.py", *words, "--model.weights", first.weights)
    assert done.returncode == 0, done.stderr
    crc32 = file_record(first.weights).crc32
    told = f"starting from {first.folder} (epoch 1, checksum {crc32}): backbone and head, 9 of 10 classes matched"
    assert told in " ".join(done.stdout.split())
    before, after = load_file(first.weights), load_file(second.weights)
    for name, value in before.items():
        if name in ("head.weight", "head.bias"):
            assert torch.allclose(
                after[name][[0, 1, 2, 4, 5, 6, 7, 8, 9]], value[[9, 8, 7, 6, 5, 4, 3, 2, 1]], atol=1e-6
            )
        else:
            assert torch.allclose(after[name], value, atol=1e-6), name
    shutil.rmtree(first.folder)
    words[words.index("--train.epochs") + 1] = "2"
    done = run_script("train.py", *words, "--model.weights", first.weights)
    assert done.returncode == 0, done.stderr
    started = json.loads(second.results.read_text(encoding="utf-8"))["started_from"]
    assert (started["run"], started["weights_crc32"], started["classes_matched"]) == (str(first.folder), crc32, 9)
    model = yaml.safe_load(second.config.read_text(encoding="utf-8"))["model"]
    assert (model["weights"], model["weights_crc32"]) == (str(first.folder), crc32)
