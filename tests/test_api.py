"""The Python API and the examples: what a notebook does."""

from __future__ import annotations

import functools
import json
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import spml_fast
from spml_fast.api.training import make_config
from spml_fast.cli import evaluate as evaluate_command
from spml_fast.cli import export as export_command
from spml_fast.cli import predict as predict_command
from spml_fast.cli.parse import parse_config
from spml_fast.core.errors import UserError
from spml_fast.data.manifest import Manifest
from spml_fast.prepare.datasets.digits import prepare_digits
from spml_fast.runs.open import DIGITS_DIR
from tests.support.data import encoded, exif
from tests.support.paths import ROOT

SIZES = {"train": 64, "val": 20, "test": 20}
# captions_to_labels.py is a program with arguments; tests/prepare/test_captions.py runs it.
EXAMPLES = [p for p in sorted((ROOT / "examples").glob("*.py")) if p.name != "captions_to_labels.py"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder where the embedded digit scenes are few, and the run that the first example makes of them."""
    folder = tmp_path_factory.mktemp("api")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spml_fast.runs.open.prepare_digits", functools.partial(prepare_digits, sizes=SIZES))
        patch.chdir(folder)
        runpy.run_path(str(ROOT / "examples" / "train_and_predict.py"))
        yield folder


@pytest.fixture(scope="module")
def predictor(workplace: Path) -> Any:
    return spml_fast.load(workplace / "runs" / "example", "cpu")


def image_paths(workplace: Path) -> list[str]:
    return [str(p) for p in sorted((workplace / DIGITS_DIR / "images" / "test").iterdir())[:5]]


def probabilities(table: Any) -> list[float]:
    return table["probability"].to_pylist()


def test_import_is_light():
    heavy = ("torch", "numpy", "pyarrow", "jsonargparse")
    words = f"import sys, spml_fast; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", [p for p in EXAMPLES if p.name != "train_and_predict.py"], ids=lambda p: p.stem)
def test_examples_run(workplace: Path, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(path))
    assert capsys.readouterr().out.strip()
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 16


class TestRuns:
    def test_a_finished_run(self, workplace: Path) -> None:
        run = spml_fast.open_run("runs/example")
        assert run.folder == Path("runs/example") and "finished" in repr(run)
        assert run.config.train.epochs == 1 and run.config.method.name == "ll_r"
        assert run.metrics.num_rows == 1 and run.metrics["epoch"].to_pylist() == [1]
        assert run.results is not None
        assert run.metrics["val_map"][0].as_py() == pytest.approx(run.results["best_val_map"], abs=1e-5)
        assert run.classes == Manifest(DIGITS_DIR).classes

    def test_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="is not a run directory"):
            spml_fast.open_run(tmp_path)
        with pytest.raises(UserError, match="neither a run directory nor an exported"):
            spml_fast.load(tmp_path / "no.onnx")


class TestTrain:
    def test_every_form_of_a_configuration_is_the_command_lines(self, tmp_path: Path) -> None:
        wanted = parse_config(["--config", "digits", "--train.lr", "0.5", "--run.dir", "1e3"])
        overrides: dict[str, Any] = {"train.lr": 0.5, "run": {"dir": "1e3"}}
        assert make_config("digits", overrides) == make_config(None, overrides) == wanted
        assert make_config("digits", ["train.lr=0.5", "--run.dir=1e3"]) == wanted
        assert make_config(wanted) == wanted
        assert make_config({"train": {"lr": 0.5}, "data.dir": "x"}) == parse_config(["--train.lr=.5", "--data.dir=x"])
        assert make_config(None, {"data": {"dir": "x"}}) == parse_config(["--data.dir=x"], "finetune")
        scratch = {"data.dir": "x", "model.pretrained": False}
        assert make_config(None, scratch) == parse_config(["--data.dir=x", "--model.pretrained=no"], "scratch")
        assert make_config(None, ["data.dir=x", "model.pretrained=false", "model.weights=w"]).model.freeze_bn
        path = tmp_path / "recipe.yaml"
        path.write_text("method: {name: ll_ct, delta_rel: 3}\n")
        assert make_config(path) == parse_config(["--config", str(path)])
        assert make_config(path, {"method": "an"}) == parse_config(["--config", str(path), "--method", "an"])
        assert make_config(path, {"method.delta_rel": 4}).method.delta_rel == 4

    def test_mistakes_are_exceptions(self) -> None:
        with pytest.raises(UserError, match=r"section train has no option 'batchsize'; did you mean batch_size\?"):
            make_config("digits", {"train.batchsize": 3})
        with pytest.raises(UserError, match=r'"train\.epochs"'):
            make_config("digits", {"train.epochs": "many"})
        with pytest.raises(UserError, match=r"did you mean --train\.batch_size\?"):
            make_config("digits", ["batch-size=3"])
        with pytest.raises(UserError, match="must be a dictionary or a list of words"):
            make_config("digits", "train.lr=3")
        with pytest.raises(UserError, match=r"did you mean digits\?"):
            make_config("digit")


class TestPredict:
    def test_gives_what_the_command_gives(self, workplace: Path, predictor: Any, tmp_path: Path) -> None:
        paths = image_paths(workplace)
        assert predict_command.main(["--run", "runs/example", "--csv", str(tmp_path / "out.csv"), *paths]) == 0
        lines = (tmp_path / "out.csv").read_text().splitlines()
        rows = [
            [r["path"], r["class"], repr(r["probability"]), str(r["rank"])]
            for r in predictor.predict(paths).to_pylist()
        ]
        assert lines == ["path,class,probability,rank", *(",".join(row) for row in rows)]

    def test_images_and_arrays_as_files(self, workplace: Path, predictor: Any) -> None:
        paths = image_paths(workplace)
        wanted = predictor.predict(paths, top=10)
        images = predictor.predict([Image.open(p) for p in paths], top=10)
        assert images.equals(wanted)
        arrays = predictor.predict(np.stack([np.asarray(Image.open(p)) for p in paths]), top=10)
        assert probabilities(arrays) == probabilities(wanted) and arrays["path"].to_pylist()[::10] == list("01234")
        mixed = predictor.predict([paths[1], np.asarray(Image.open(paths[0]))], top=10, batch_size=1)
        # Batches of another size are summed in another order.
        assert probabilities(mixed) == pytest.approx(
            probabilities(wanted)[10:20] + probabilities(wanted)[:10], abs=1e-6
        )
        one = predictor.predict(Image.open(paths[0]), threshold=0.0)
        assert probabilities(one) == pytest.approx(probabilities(wanted)[:10], abs=1e-6)

    def test_turned_images(self, predictor: Any, tmp_path: Path) -> None:
        path = tmp_path / "turned.png"
        path.write_bytes(encoded(fmt="PNG", exif=exif(6)))
        assert probabilities(predictor.predict(path)) == probabilities(predictor.predict(Image.open(path)))

    def test_images_that_cannot_be_read(self, workplace: Path, predictor: Any, tmp_path: Path) -> None:
        good, bad = image_paths(workplace)[0], tmp_path / "bad.jpg"
        bad.write_bytes(encoded()[:200])
        with pytest.raises(UserError, match=r"bad\.jpg cannot be used: damaged"):
            predictor.predict([bad, good])
        with pytest.warns(UserWarning, match=r"bad\.jpg cannot be used"):
            table = predictor.predict([bad, good], skip_invalid=True)
        assert set(table["path"].to_pylist()) == {good}

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            ([], "no image given"),
            ([np.zeros((4, 4, 3), np.float32)], r"image 0 is an array of float32 \[4, 4, 3\]"),
            ([np.zeros((4, 4), np.uint8)], r"must be uint8 RGB \[H, W, 3\]"),
            ([3], "image 0 is a int"),
            (["no such file.jpg"], "cannot be read"),
        ],
    )
    def test_no_images(self, predictor: Any, images: Any, message: str) -> None:
        with pytest.raises(UserError, match=message):
            predictor.predict(images)

    @pytest.mark.parametrize("options", [{"top": 0}, {"threshold": 2}, {"alpha": 0}, {"batch_size": 0}])
    def test_arguments_without_meaning(self, workplace: Path, predictor: Any, options: Any) -> None:
        with pytest.raises(UserError, match=next(iter(options))):
            predictor.predict(image_paths(workplace)[:1], **options)


class TestMaps:
    def test_their_mean_is_the_logit(self, workplace: Path, predictor: Any) -> None:
        paths = image_paths(workplace)[:3]
        maps = predictor.maps(paths, ["3", 7, "3"])
        assert maps.dtype == np.float32 and maps.shape[:2] == (3, 3) and np.array_equal(maps[:, 0], maps[:, 2])
        table = predictor.predict(paths, alpha=1, threshold=0)
        found = {(r["path"], r["class"]): r["probability"] for r in table.to_pylist()}
        for row, path in enumerate(paths):
            for column, name in ((0, "3"), (1, "7")):
                probability = 1 / (1 + np.exp(-maps[row, column].mean(dtype=np.float64)))
                assert probability == pytest.approx(found[path, name], abs=1e-6)

    def test_classes_that_do_not_exist(self, workplace: Path, predictor: Any) -> None:
        with pytest.raises(UserError, match="there is no class '33'; did you mean 3"):
            predictor.maps(image_paths(workplace)[:1], ["33"])
        with pytest.raises(UserError, match="ids go from 0 to 9"):
            predictor.maps(image_paths(workplace)[:1], [10])


class TestCamModel:
    def test_logits_are_those_of_predict(self, workplace: Path, predictor: Any) -> None:
        paths = image_paths(workplace)
        inputs = predictor.inputs(paths, batch_size=2)
        assert inputs.shape == (5, 3, 64, 64) and inputs.dtype == torch.float32
        for alpha in (None, 1):
            with torch.no_grad():
                found = torch.sigmoid(predictor.cam_model(alpha)(inputs).double()).numpy()
            table = predictor.predict(paths, alpha=alpha, threshold=0, top=10)
            wanted = {(r["path"], r["class"]): r["probability"] for r in table.to_pylist()}
            for row, path in enumerate(paths):
                assert found[row] == pytest.approx([wanted[path, name] for name in predictor.classes], abs=1e-5)

    def test_pixels_are_the_image(self, workplace: Path, predictor: Any) -> None:
        path = image_paths(workplace)[0]
        (pixels,) = predictor.pixels(predictor.inputs(path))
        assert pixels.dtype == np.uint8 and pixels.shape == (64, 64, 3)
        with Image.open(path) as image:
            # JPEG decoders differ by a few levels.
            assert np.abs(pixels.astype(int) - np.asarray(image.convert("RGB"), int)).mean() < 3

    def test_arguments_without_meaning(self, workplace: Path, predictor: Any, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="alpha is 0"):
            predictor.cam_model(0)
        (tmp_path / "a.jpg").write_bytes(Path(image_paths(workplace)[0]).read_bytes()[:900])
        with pytest.raises(UserError, match="jpg cannot be used"):
            predictor.inputs(tmp_path / "a.jpg")


class TestEvaluate:
    def test_gives_what_the_command_gives(self, workplace: Path, predictor: Any, tmp_path: Path) -> None:
        out = tmp_path / "out.json"
        words = ["--run", "runs/example", "--alpha", "5", "--split", "val", "--json", str(out)]
        assert evaluate_command.main(words) == 0
        wanted = json.loads(out.read_text())["alpha"]["5"]
        found = predictor.evaluate(DIGITS_DIR, split="val")
        assert json.loads(json.dumps(found)) == wanted
        assert found["map"] != predictor.evaluate(Manifest(DIGITS_DIR), split="val", alpha=1)["map"]

    def test_other_classes(self, predictor: Any, workplace: Path) -> None:
        manifest = Manifest(DIGITS_DIR)
        manifest.classes = manifest.classes[::-1]
        with pytest.raises(UserError, match="has other classes than"):
            predictor.evaluate(manifest)


@pytest.mark.parametrize("kind", [pytest.param("onnx", marks=pytest.mark.slow), "safetensors"])
def test_exports_are_the_run(workplace: Path, predictor: Any, tmp_path: Path, kind: str) -> None:
    out = tmp_path / f"model.{kind}"
    export_command.main(["--run", "runs/example", "--format", kind, "--out", str(out)])
    paths = image_paths(workplace)
    wanted = predictor.predict(paths, top=10)
    export = spml_fast.load(out, "cpu")
    assert export.classes == predictor.classes and export.alpha == predictor.alpha == 5
    found = export.predict(paths, top=10)
    assert found["class"].equals(wanted["class"])
    np.testing.assert_allclose(probabilities(found), probabilities(wanted), atol=1e-5)
    assert export.evaluate(DIGITS_DIR)["map"] == pytest.approx(predictor.evaluate(DIGITS_DIR)["map"], abs=1e-6)
    if kind == "onnx":
        with pytest.raises(UserError, match="has alpha 5 in its graph"):
            export.predict(paths, alpha=1)
        with pytest.raises(UserError, match="ONNX graph without maps"):
            export.maps(paths, ["3"])
        with pytest.raises(UserError, match="ONNX graph without layers"):
            export.cam_model()
    else:
        np.testing.assert_allclose(export.maps(paths, ["3"]), predictor.maps(paths, ["3"]), atol=1e-5)
        assert probabilities(export.predict(paths, alpha=1)) != probabilities(found)


def test_files_that_are_no_exports(workplace: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no export of spml_fast"):
        spml_fast.load("runs/example/model.safetensors")
    for name in ("junk.onnx", "junk.safetensors"):
        (tmp_path / name).write_bytes(b"junk")
        with pytest.raises(UserError, match=name):
            spml_fast.load(tmp_path / name)
