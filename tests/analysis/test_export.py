"""Exported runs, used with nothing of this program: ONNX Runtime, timm and Pillow alone give the run's figures."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from spml_fast.analysis import export
from spml_fast.cli import export as export_command
from spml_fast.core.errors import UserError
from spml_fast.data.manifest import Manifest
from spml_fast.runs.open import load_classifier, load_run_config
from tests.support.docs import block_with
from tests.support.exports import CLASSES, logits_of, make_run, pillow_images
from tests.support.paths import ROOT

CPU = torch.device("cpu")


def call(*arguments: object) -> None:
    export_command.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def run(small_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A residual network with a CAM head, boosted in evaluation, whose data set exists."""
    options = ["--model.backbone", "test_resnet", "--model.alpha_eval", "5", "--model.output_stride", "8"]
    return make_run(tmp_path_factory.mktemp("export") / "run", *options, data=small_digits)


def normalised(images: np.ndarray, metadata: dict[str, str]) -> torch.Tensor:
    """What networks take of RGB images [n, 3, S, S], 0..255, by the metadata of an export."""
    mean, std = (torch.tensor(json.loads(metadata[k])).view(3, 1, 1) for k in ("mean", "std"))
    return (torch.from_numpy(images) / 255 - mean) / std


def documented(first: str, run: Path, image: str) -> dict[str, Any]:
    """What the documentation's snippet that starts with `first` leaves behind, run as it stands."""
    snippet = block_with(ROOT / "docs" / "operations.md", first).text
    names: dict[str, Any] = {}
    exec(snippet.replace("RUN/", f"{run}/").replace("001.jpg", image), names)
    return names


def test_onnx_gives_the_figures_of_predict(run, small_digits, capsys):
    call("--run", run, "--format", "onnx")
    assert "alpha 5; logits of images (4 of split test) are within" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(run / "export.onnx"), providers=["CPUExecutionProvider"])
    split = Manifest(small_digits).split("test")
    paths = [split.path(i) for i in range(7)]
    expected, probabilities = logits_of(run, 5.0, paths)
    logits, chances = session.run(["logits", "probabilities"], {"images": pillow_images(paths, 64)})
    # These need no resizing, where Pillow and DALI differ.
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(chances - probabilities).max() < 1e-4
    # A batch of one, and nothing of ours in the graph.
    names = documented("import json, numpy as np, onnxruntime", run, paths[0])
    assert names["classes"] == CLASSES and np.allclose(names["probabilities"], chances[:1], atol=1e-5)
    model = onnx.load(str(run / "export.onnx"))
    assert {node.domain for node in model.graph.node} == {""}
    metadata = {p.key: p.value for p in model.metadata_props}
    assert json.loads(metadata["classes"]) == CLASSES and metadata["alpha"] == "5" and metadata["image_size"] == "64"
    assert json.loads(metadata["mean"]) == [0.4, 0.5, 0.6]
    assert not list(run.glob("*.partial"))


VIT = ["--model.backbone", "test_vit", "--model.alpha_eval", "2", "--model.grad_checkpointing", "true"]
QUERIES = ["--model.backbone", "test_resnet", "--model.head", "query2label", "--model.head_options", "{preset: tiny}"]

# Ten classes that share four queries.
GROUPS = ["--model.backbone", "test_resnet", "--model.head", "ml_decoder", "--model.head_options", "{groups: 4}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "asked"),
    [(VIT, ["--alpha", "1"]), (QUERIES, []), (GROUPS, [])],
    ids=["vit", "query2label", "ml_decoder"],
)
def test_other_backbones_and_heads(options, asked, tmp_path):
    run = make_run(tmp_path / "run", *options)
    (run / "export.onnx").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"export\.onnx exists and was not written by this command"):
        call("--run", run, "--format", "onnx", *asked)
    assert (run / "export.onnx").read_bytes() == b"mine"
    call("--run", run, "--format", "onnx", "--overwrite", *asked)
    # Its own file it replaces unasked.
    export_command.output_file(argparse.Namespace(format="onnx", overwrite=False), run / "export.onnx").check()
    session = onnxruntime.InferenceSession(str(run / "export.onnx"), providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    images = np.random.default_rng(1).integers(0, 256, (3, 3, 64, 64)).astype(np.float32)
    logits, chances = session.run(["logits", "probabilities"], {"images": images})
    classifier, _ = load_classifier(run, load_run_config(run), len(CLASSES), CPU)
    views = normalised(images, metadata)
    with torch.no_grad():
        expected = classifier(views, alpha=1.0).logits.numpy()
        if classifier.head.supports_boostlu:
            other = classifier(views, alpha=2.0).logits.numpy()
            assert np.abs(other - expected).max() > 1e-2, "alpha makes no difference here"
    assert metadata["alpha"] == "1"
    assert np.abs(logits - expected).max() < 1e-5
    assert np.abs(chances - 1 / (1 + np.exp(-expected))).max() < 1e-6


@pytest.mark.parametrize("backbone", ["test_vit", "test_convnext"])
def test_parts_give_the_logits_by_the_documented_formula(backbone, tmp_path, capsys):
    run = make_run(tmp_path / "run", "--model.backbone", backbone, "--model.alpha_eval", "3")
    call("--run", run, "--format", "safetensors")
    assert "backbone.* and head.*" in capsys.readouterr().out
    with safe_open(run / "export.safetensors", "pt") as file:
        metadata = file.metadata()
    state = load_file(run / "export.safetensors")
    assert metadata["layout"] == "parts" and metadata["alpha"] == "3"
    options: dict[str, Any] = json.loads(metadata["timm_options"])
    model = timm.create_model(metadata["backbone"], num_classes=0, global_pool="", **options).eval()
    model.load_state_dict({k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")})
    images = np.random.default_rng(1).integers(0, 256, (3, 3, 64, 64)).astype(np.float32)
    views = normalised(images, metadata)
    classifier, _ = load_classifier(run, load_run_config(run), len(CLASSES), CPU)
    with torch.no_grad():
        features = model.forward_features(views)
        if features.ndim == 4:
            features = features.flatten(2).mT
        maps = features[:, int(metadata["prefix_tokens"]) :] @ state["head.weight"].T + state["head.bias"]
        logits = torch.where(maps > 0, 3 * maps, maps).mean(1)
        expected = classifier(views, alpha=3.0).logits
    assert (logits - expected).abs().max() < 1e-5


def test_timm_takes_the_weights_by_itself(run, small_digits, capsys):
    out = run / "export.safetensors"
    call("--run", run, "--format", "safetensors")
    assert "timm.create_model('test_resnet', num_classes=10, output_stride=8)" in capsys.readouterr().out
    names = documented("import json, timm", run, "")
    model, metadata = names["model"], names["about"]
    paths = [Manifest(small_digits).split("test").path(i) for i in range(5)]
    images = normalised(pillow_images(paths, 64), metadata)
    with torch.no_grad():
        logits = model(images).numpy()
        features = model.forward_features(images)
        head = model.get_classifier()
        maps = torch.einsum("bkhw,ck->bchw", features, head.weight) + head.bias[:, None, None]
        boosted = torch.where(maps > 0, 5 * maps, maps).mean((2, 3)).numpy()
    for alpha, actual in ((1.0, logits), (5.0, boosted)):
        expected, _ = logits_of(run, alpha, paths)
        assert np.abs(actual - expected).max() < 1e-4 * np.abs(expected).max()
    assert set(load_file(out)) == set(model.state_dict())


def test_an_export_that_differs_is_not_kept(run, tmp_path, monkeypatch):
    out = tmp_path / "model.onnx"
    out.write_bytes(b"older")
    monkeypatch.setattr(export, "ALLOWED", -1.0)
    with pytest.raises(UserError, match="gives other logits than the run"):
        call("--run", run, "--format", "onnx", "--out", out, "--overwrite")
    assert out.read_bytes() == b"older" and list(tmp_path.iterdir()) == [out]
    # timm's names are for what is the same; else the parts are written.
    call("--run", run, "--format", "safetensors", "--out", tmp_path / "parts.safetensors")
    with safe_open(tmp_path / "parts.safetensors", "pt") as file:
        assert file.metadata()["layout"] == "parts"
    call("--run", run, "--format", "safetensors", "--out", tmp_path / "parts.safetensors")
    # The weights of another run are not an export.
    shutil.copy(run / "model.safetensors", tmp_path / "parts.safetensors")
    with pytest.raises(UserError, match="exists and was not written by this command"):
        call("--run", run, "--format", "safetensors", "--out", tmp_path / "parts.safetensors")


def test_what_users_get_wrong(run, tmp_path, monkeypatch):
    (tmp_path / "folder.onnx").mkdir()
    empty = make_run(tmp_path / "empty", *QUERIES)
    for given, message in (
        (["--run", tmp_path / "none", "--format", "onnx"], "not a run directory"),
        (["--run", run, "--format", "onnx", "--out", tmp_path / "x.pt"], r"must be named \.onnx"),
        (["--run", run, "--format", "onnx", "--out", tmp_path / "folder.onnx"], "is a directory"),
        (["--run", run, "--format", "onnx", "--out", tmp_path / "none" / "x.onnx"], "cannot be written"),
        (["--run", run, "--format", "safetensors", "--alpha", 2], "--alpha goes into an ONNX graph"),
        (["--run", run, "--format", "onnx", "--alpha", -1], "must be greater than 0"),
        (["--run", run, "--format", "onnx", "--alpha", "inf"], "must be greater than 0 and finite"),
        (["--run", run, "--format", "safetensors", "--out", run / "model.safetensors"], "keeps its own weights"),
        (["--run", empty, "--format", "onnx", "--alpha", 2], "has no meaning for head query2label"),
    ):
        with pytest.raises(UserError, match=message):
            call(*given)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="use --format safetensors"):
        patch.setattr(export, "ONNX_LIMIT", 1000)
        call("--run", empty, "--format", "onnx")

    def no_space(*args: object, **more: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    # The library that writes weights has an error of its own.
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"x\.safetensors cannot be written: .*space"):
        patch.setattr(export, "save_file", no_space)
        call("--run", run, "--format", "safetensors", "--out", tmp_path / "x.safetensors")
    assert not list(tmp_path.glob("x.safetensors*"))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="works in one process"):
        patch.setenv("WORLD_SIZE", "2")
        call("--run", run, "--format", "onnx")
    broken = load_file(empty / "model.safetensors")
    next(v for v in broken.values() if v.is_floating_point()).fill_(float("nan"))
    save_file(broken, empty / "model.safetensors")
    for kind in ("onnx", "safetensors"):
        with pytest.raises(UserError, match="it has diverged, or its weights are damaged"):
            call("--run", empty, "--format", kind)
    (empty / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors"):
        call("--run", empty, "--format", "safetensors")
    monkeypatch.setattr(export, "ONNX_PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(UserError, match=r"no_such_package not installed; run pip install -e '\.\[onnx\]' first"):
        call("--run", run, "--format", "onnx")
