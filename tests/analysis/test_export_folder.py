"""`export --format timm`: a folder that timm opens by itself, and that this program opens too."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import spml_fast
from spml_fast.cli import export as export_command
from spml_fast.core.errors import UserError
from spml_fast.data.manifest import Manifest
from tests.support.docs import block_with
from tests.support.exports import CLASSES, logits_of, make_run
from tests.support.paths import ROOT

QUERIES = ["--model.backbone", "test_resnet", "--model.head", "query2label", "--model.head_options", "{preset: tiny}"]
GROUPS = ["--model.backbone", "test_resnet", "--model.head", "ml_decoder", "--model.head_options", "{groups: 4}"]


def call(*arguments: object) -> None:
    export_command.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def run(small_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A residual network with a CAM head, boosted in evaluation, whose data set exists."""
    options = ["--model.backbone", "test_resnet.r160_in1k", "--model.alpha_eval", "5", "--model.output_stride", "8"]
    return make_run(tmp_path_factory.mktemp("folder") / "run", *options, data=small_digits)


@pytest.fixture(scope="module")
def paths(small_digits: Path) -> list[str]:
    split = Manifest(small_digits).split("test")
    return [split.path(i) for i in range(5)]


def timm_logits(folder: Path, paths: list[str]) -> np.ndarray:
    """What a user of timm gets, who knows nothing of this program."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with torch.no_grad():
        return model(torch.stack([transform(Image.open(p).convert("RGB")) for p in paths])).numpy()


def test_timm_opens_the_folder(run, paths, capsys):
    call("--run", run, "--format", "timm")
    folder, out = run / "export-timm", capsys.readouterr().out
    assert f"timm.create_model('local-dir:{folder}', pretrained=True)" in out
    assert "BoostLU's alpha 5, which the run evaluates with, cannot be part of a timm model" in out
    expected, probabilities = logits_of(run, 1.0, paths)
    logits = timm_logits(folder, paths)
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(1 / (1 + np.exp(-logits)) - probabilities).max() < 1e-4
    about = timm.create_model(f"local-dir:{folder}").pretrained_cfg
    assert about["label_names"] == CLASSES and about["num_classes"] == 10
    assert tuple(about["input_size"]) == (3, 64, 64) and about["crop_mode"] == "squash" and about["crop_pct"] == 1
    assert about["mean"] == [0.4, 0.5, 0.6] and about["std"] == [0.2, 0.3, 0.25]
    names = {p.name for p in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "spml_fast.json"}
    # The weights are no longer those that the tag names.
    assert "r160" not in (folder / "config.json").read_text(encoding="utf-8")


def test_the_documented_lines(run, paths):
    call("--run", run, "--format", "timm")
    snippet = block_with(ROOT / "docs" / "operations.md", "import timm, torch").text
    names: dict[str, object] = {}
    exec(snippet.replace("RUN/", f"{run}/").replace("001.jpg", paths[0]), names)
    logits = names["logits"]
    assert isinstance(logits, torch.Tensor) and names["classes"] == CLASSES
    expected, _ = logits_of(run, 1.0, paths)
    assert np.abs(logits.numpy()[0] - expected[0]).max() < 1e-4 * np.abs(expected).max()


def test_this_program_opens_the_folder_with_boostlu(run, paths):
    call("--run", run, "--format", "timm")
    wanted = spml_fast.load(run, "cpu").predict(paths, top=10)
    predictor = spml_fast.load(run / "export-timm", "cpu")
    found = predictor.predict(paths, top=10)
    assert predictor.alpha == 5 and predictor.classes == CLASSES
    assert found["class"].to_pylist() == wanted["class"].to_pylist()
    assert np.allclose(found["probability"].to_pylist(), wanted["probability"].to_pylist(), atol=1e-6)


def test_transformers_that_pool_their_tokens(paths, tmp_path, capsys):
    run = make_run(tmp_path / "run", "--model.backbone", "test_vit", "--model.alpha_eval", "1")
    call("--run", run, "--format", "timm", "--out", tmp_path / "vit")
    assert "BoostLU" not in capsys.readouterr().out
    model = timm.create_model(f"local-dir:{tmp_path / 'vit'}", pretrained=True).eval()
    expected, _ = logits_of(run, 1.0, paths)
    assert np.abs(timm_logits(tmp_path / "vit", paths) - expected).max() < 1e-4 * np.abs(expected).max()
    assert set(load_file(tmp_path / "vit" / "model.safetensors")) == set(model.state_dict())
    assert spml_fast.load(tmp_path / "vit", "cpu").config.model.backbone == "test_vit"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "auto"])
def test_an_export_computes_as_its_run(precision, tmp_path):
    """On every machine: `auto` would take bf16 where a processor has AMX, and on a GPU, for a run in fp32 too."""
    run = make_run(tmp_path / "run", "--model.backbone", "test_resnet", "--train.precision", precision)
    path = tmp_path / "model.safetensors"
    call("--run", run, "--format", "safetensors", "--out", path)
    assert spml_fast.load(path, "cpu").config.train.precision == precision
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    # Of a version that did not say.
    del metadata["precision"]
    save_file(load_file(path), tmp_path / "older.safetensors", metadata=metadata)
    assert spml_fast.load(tmp_path / "older.safetensors", "cpu").config.train.precision == "fp32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (QUERIES, "head query2label is not part of any timm model"),
        (GROUPS, "head ml_decoder is not part of any timm model"),
        (["--model.backbone", "test_convnext"], "timm's test_convnext has no form whose logits are the run's"),
    ],
    ids=["query2label", "ml_decoder", "convnext"],
)
def test_what_timm_cannot_express(options, message, tmp_path):
    run = make_run(tmp_path / "run", *options)
    with pytest.raises(UserError, match=message):
        call("--run", run, "--format", "timm")
    assert not (run / "export-timm").exists()


def test_no_file_of_others_is_replaced(run, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("config.json", "model.safetensors", "spml_fast.json"):
        (mine / name).write_text("mine")
        with pytest.raises(UserError, match=rf"{name} exists and was not written by this command"):
            call("--run", run, "--format", "timm", "--out", mine)
        assert (mine / name).read_text() == "mine"
        (mine / name).unlink()
    (mine / "README.md").write_text("mine")
    call("--run", run, "--format", "timm", "--out", mine)
    call("--run", run, "--format", "timm", "--out", mine)
    (mine / "config.json").write_text("mine")
    call("--run", run, "--format", "timm", "--out", mine, "--overwrite")
    assert (mine / "README.md").read_text() == "mine" and json.loads((mine / "config.json").read_text())
    # A run keeps its own weights under the same name.
    before = (run / "model.safetensors").read_bytes()
    for words in ([], ["--overwrite"]):
        with pytest.raises(UserError, match="is a run or a data set"):
            call("--run", run, "--format", "timm", "--out", run, *words)
    assert (run / "model.safetensors").read_bytes() == before
    with pytest.raises(UserError, match="is a file"):
        call("--run", run, "--format", "timm", "--out", mine / "README.md")
    with pytest.raises(UserError, match="there is no directory"):
        call("--run", run, "--format", "timm", "--out", tmp_path / "none" / "model")


def test_damaged_folders(run, tmp_path):
    folder = tmp_path / "model"
    call("--run", run, "--format", "timm", "--out", folder)
    weights, record = folder / "model.safetensors", folder / "spml_fast.json"
    whole, text = weights.read_bytes(), record.read_text()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"model\.safetensors is damaged \(its checksum is not the recorded one\)"):
        spml_fast.load(folder, "cpu")
    weights.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        spml_fast.load(folder, "cpu")
    weights.write_bytes(whole)
    for damaged in ("{", "[]", json.dumps({"format": 1, "files": {}}), text.replace('"size"', '"width"')):
        record.write_text(damaged)
        with pytest.raises(UserError, match=r"spml_fast\.json is damaged"):
            spml_fast.load(folder, "cpu")
    record.write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match="has format 2, which this version does not know"):
        spml_fast.load(folder, "cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": "{"}, "has damaged metadata"),
        ({"classes": "[" * 100_000}, "has damaged metadata"),
        ({"classes": "[]"}, "its classes are no list of names"),
        ({"classes": "[1]"}, "its classes are no list of names"),
        ({"classes": '["a", "b"]'}, "does not fit its metadata"),
        ({"image_size": "wide"}, "has damaged metadata"),
        ({"image_size": "-3"}, r"data\.image_size"),
        ({"mean": "[1]"}, r"data\.mean"),
        ({"mean": '"x"'}, r"damaged metadata|data\.mean"),
        ({"alpha": "much"}, "has damaged metadata"),
        ({"precision": "half"}, "has damaged metadata .precision 'half'."),
        ({"backbone": "hf-hub:somebody/model"}, "timm has no model"),
        ({"head": "os.system"}, "which is not known here"),
        ({"head_options": "3"}, "head_options are no options by name"),
        ({"head_options": '{"a": 1}'}, "has no option 'a'"),
        ({"timm_options": '{"output_stride": "x"}'}, "cannot be made with"),
        ({"layout": "parts"}, "does not fit its metadata"),
        ({"threshold_probability": "[0.5]"}, "damaged thresholds|does not fit|are damaged"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_metadata_from_elsewhere(run, tmp_path, changes, message):
    """Files come from the Hub: whatever they say, a sentence is the answer."""
    folder = run / "export-timm"
    if not folder.is_dir():
        call("--run", run, "--format", "timm")
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    path = tmp_path / "model.safetensors"
    save_file(load_file(folder / "model.safetensors"), path, metadata={**metadata, **changes})
    with pytest.raises(UserError, match=message):
        spml_fast.load(path, "cpu")
