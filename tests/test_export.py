"""Exported runs, used with nothing of this program: ONNX Runtime, timm and Pillow alone give the run's figures."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from run_tools import ROOT
from safetensors import safe_open
from safetensors.torch import load_file

from spml_fast import export
from spml_fast.checkpoint import save_weights
from spml_fast.classifier import Classifier
from spml_fast.cli import parse_config, to_yaml
from spml_fast.errors import UserError
from spml_fast.evaluate import load_classifier, load_run_config, make_eval_loader
from spml_fast.manifest import Manifest
from spml_fast.predict import PictureFiles, predict

_spec = importlib.util.spec_from_file_location("export_script", ROOT / "launch" / "export.py")
assert _spec is not None and _spec.loader is not None
_script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_script)

CPU = torch.device("cpu")
CLASSES = [str(i) for i in range(10)]


def make_run(folder: Path, *words: str, data: Path | None = None) -> Path:
    """A run directory with random weights and BatchNorm statistics that are not the initial ones."""
    folder.mkdir(parents=True)
    given = ["--data.dir", str(data or folder / "gone"), "--data.image_size", "64", "--model.pretrained", "false"]
    config = parse_config(["--run.dir", str(folder), *given, *words])
    torch.manual_seed(0)
    classifier = Classifier(config.model, len(CLASSES), config.data.image_size)
    for name, buffer in classifier.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand(buffer.shape) + 0.5)
    config.data.mean, config.data.std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (folder / "classes.txt").write_text("".join(f"{c}\n" for c in CLASSES), encoding="utf-8")
    save_weights(folder / "model.safetensors", classifier, {"epoch": "1", "val_map": "50"})
    return folder


def call(*arguments: object) -> None:
    _script.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def run(small_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A residual network with a CAM head, boosted in evaluation, whose data set is there."""
    words = ["--model.backbone", "test_resnet", "--model.alpha_eval", "5", "--model.output_stride", "8"]
    return make_run(tmp_path_factory.mktemp("export") / "run", *words, data=small_digits)


def logits_of(run: Path, alpha: float, paths: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the run's own classifier for its own views, and predict.py's probabilities, [n, C] each."""
    config = load_run_config(run)
    classifier, _ = load_classifier(run, config, len(CLASSES), CPU)
    config.eval.batch_size = len(paths)
    files = PictureFiles(paths, np.ones(len(paths), np.uint8))
    (batch,) = make_eval_loader(config, files, classifier, CPU)
    with torch.no_grad():
        logits = classifier(batch.views["eval"], alpha=alpha).logits.numpy()
    found = list(predict(classifier, config, files, CPU, alpha=alpha, classes=CLASSES))
    return logits, np.stack([p.probability[np.argsort(p.classes)] for p in found])


def pillow_pictures(paths: list[str], side: int) -> np.ndarray:
    """What the documentation tells users to do: float32 [n, 3, S, S], 0..255."""
    pictures = [Image.open(p).convert("RGB").resize((side, side), Image.Resampling.BILINEAR) for p in paths]
    return np.stack([np.asarray(p, np.float32).transpose(2, 0, 1) for p in pictures])


def test_onnx_gives_the_figures_of_predict(run, small_digits, capsys):
    call("--run", run, "--format", "onnx")
    assert "alpha 5; logits of 4 pictures are within" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(run / "export.onnx"), providers=["CPUExecutionProvider"])
    split = Manifest(small_digits).split("test")
    paths = [split.path(i) for i in range(7)]
    expected, probabilities = logits_of(run, 5.0, paths)
    logits, chances = session.run(["logits", "probabilities"], {"pictures": pillow_pictures(paths, 64)})
    # Pillow's decoder and filter are not DALI's, by less than a grey level in the mean.
    assert np.abs(logits - expected).max() < 0.05 * np.abs(expected).max()
    assert np.abs(chances - probabilities).max() < 0.02
    # A batch of one, and nothing of ours in the graph.
    assert np.allclose(session.run(["logits"], {"pictures": pillow_pictures(paths[:1], 64)})[0], logits[:1], atol=1e-4)
    model = onnx.load(str(run / "export.onnx"))
    assert {node.domain for node in model.graph.node} == {""}
    about = {p.key: p.value for p in model.metadata_props}
    assert json.loads(about["classes"]) == CLASSES and about["alpha"] == "5" and about["image_size"] == "64"
    assert json.loads(about["mean"]) == [0.4, 0.5, 0.6]
    assert not list(run.glob("*.partial"))


def test_alpha_is_in_the_graph(run, tmp_path):
    picture = {"pictures": np.random.default_rng(0).uniform(0, 255, (2, 3, 64, 64)).astype(np.float32)}
    found = {}
    call("--run", run, "--format", "onnx", "--out", tmp_path / "plain.onnx", "--alpha", 1)
    for alpha, path in ((1, tmp_path / "plain.onnx"), (5, run / "export.onnx")):
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        found[alpha] = session.run(["logits"], picture)[0]
    assert (found[5] >= found[1]).all() and (found[5] > found[1] + 1e-3).any()


@pytest.mark.parametrize(
    "words",
    [
        ["--model.backbone", "test_vit", "--model.alpha_eval", "2"],
        ["--model.backbone", "test_resnet", "--model.head", "query2label", "--model.head_options", "{preset: tiny}"],
        ["--model.backbone", "test_convnext", "--model.grad_checkpointing", "true"],
    ],
    ids=["vit", "query2label", "convnext"],
)
def test_other_backbones_and_heads(words, tmp_path, capsys):
    run = make_run(tmp_path / "run", *words)
    call("--run", run, "--format", "onnx")
    assert (run / "export.onnx").is_file()
    call("--run", run, "--format", "safetensors")
    assert "backbone.* and head.*" in capsys.readouterr().out
    with safe_open(run / "export.safetensors", "pt") as file:
        assert file.metadata()["layout"] == "parts"
        backbone = {k.removeprefix("backbone."): file.get_tensor(k) for k in file.keys() if k.startswith("backbone.")}  # noqa: SIM118
    config = load_run_config(run)
    options: dict[str, Any] = {"img_size": 64} if config.model.backbone == "test_vit" else {}
    model = timm.create_model(config.model.backbone, num_classes=0, global_pool="", **options)
    assert model.load_state_dict(backbone) is not None


def test_timm_takes_the_weights_by_itself(run, small_digits, tmp_path, capsys):
    out = tmp_path / "weights.safetensors"
    call("--run", run, "--format", "safetensors", "--out", out)
    assert "timm.create_model('test_resnet', num_classes=10, output_stride=8)" in capsys.readouterr().out
    with safe_open(out, "pt") as file:
        about = file.metadata()
    # As the documentation shows it.
    model = timm.create_model(
        about["backbone"],
        num_classes=len(json.loads(about["classes"])),
        checkpoint_path=str(out),
        **json.loads(about["timm_options"]),
    ).eval()
    paths = [Manifest(small_digits).split("test").path(i) for i in range(5)]
    mean, std = (np.array(json.loads(about[k]), np.float32)[:, None, None] for k in ("mean", "std"))
    pictures = torch.from_numpy((pillow_pictures(paths, 64) / 255 - mean) / std)
    with torch.no_grad():
        logits = model(pictures).numpy()
        features = model.forward_features(pictures)
        head = model.get_classifier()
        maps = torch.einsum("bkhw,ck->bchw", features, head.weight) + head.bias[:, None, None]
        boosted = torch.where(maps > 0, 5 * maps, maps).mean((2, 3)).numpy()
    for alpha, found in ((1.0, logits), (5.0, boosted)):
        expected, _ = logits_of(run, alpha, paths)
        assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    assert set(load_file(out)) == set(model.state_dict())


def test_an_export_that_differs_is_not_kept(run, tmp_path, monkeypatch):
    out = tmp_path / "model.onnx"
    out.write_bytes(b"older")
    monkeypatch.setattr(export, "ALLOWED", -1.0)
    with pytest.raises(UserError, match="gives other logits than the run"):
        call("--run", run, "--format", "onnx", "--out", out)
    assert out.read_bytes() == b"older" and list(tmp_path.iterdir()) == [out]
    # timm's names are for what is the same; else the parts are written.
    call("--run", run, "--format", "safetensors", "--out", tmp_path / "parts.safetensors")
    with safe_open(tmp_path / "parts.safetensors", "pt") as file:
        assert file.metadata()["layout"] == "parts"


def test_what_users_get_wrong(run, tmp_path, monkeypatch):
    (tmp_path / "folder.onnx").mkdir()
    words = ["--model.backbone", "test_resnet", "--model.head", "query2label", "--model.head_options", "{preset: tiny}"]
    empty = make_run(tmp_path / "empty", *words)
    for given, message in (
        (["--run", tmp_path / "none", "--format", "onnx"], "not a run directory"),
        (["--run", run, "--format", "onnx", "--out", tmp_path / "x.pt"], r"must be named \.onnx"),
        (["--run", run, "--format", "onnx", "--out", tmp_path / "folder.onnx"], "is a directory"),
        (["--run", run, "--format", "onnx", "--out", tmp_path / "none" / "x.onnx"], "cannot be written"),
        (["--run", run, "--format", "safetensors", "--alpha", 2], "--alpha goes into an ONNX graph"),
        (["--run", run, "--format", "onnx", "--alpha", -1], "must be greater than 0"),
        (["--run", empty, "--format", "onnx", "--alpha", 2], "has no meaning for head query2label"),
    ):
        with pytest.raises(UserError, match=message):
            call(*given)
    (empty / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors"):
        call("--run", empty, "--format", "safetensors")
    monkeypatch.setattr(export, "ONNX_PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(UserError, match=r"no_such_package not installed; run pip install -e '\.\[onnx\]' first"):
        call("--run", run, "--format", "onnx")
