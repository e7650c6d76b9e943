"""Thresholds and calibration of a run, from training to predictions, exports, evaluation and the report."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import spml_fast
from spml_fast.analysis.report.page import make_page
from spml_fast.cli import calibrate as calibrate_command
from spml_fast.cli import export as export_command
from spml_fast.cli import predict as predict_command
from spml_fast.core.errors import UserError
from spml_fast.data.manifest import Manifest
from spml_fast.evaluation.evaluate import score_split
from spml_fast.runs.decisions import load_decisions
from spml_fast.runs.layout import RunLayout
from spml_fast.runs.open import load_run, make_eval_loader
from spml_fast.training.decide import decide
from tests.support import warm
from tests.support.paths import ROOT

CPU = torch.device("cpu")


def digits(run: Path, data: Path, *more: object) -> Any:
    """Train one epoch on small digit scenes."""
    arguments = ["--config", ROOT / "launch" / "configs" / "digits.yaml", "--data.dir", data, "--run.dir", run]
    arguments += ["--train.epochs", 1, "--eval.batch_size", 32, "--train.precision", "fp32"]
    done = warm.run_script("train.py", *arguments, "--deepspeed.tensorboard", "false", *more)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def calibrate(run: Path, *more: object) -> str:
    done = warm.run_script("calibrate.py", run, *more)
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


def record(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "decisions.json").read_text(encoding="utf-8"))
    return found


def copy(run: Path, to: Path) -> Path:
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("checkpoints"))
    return to


@pytest.fixture(scope="module")
def trained(small_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch."""
    run = tmp_path_factory.mktemp("decided") / "run"
    done = digits(run, small_digits)
    assert "thresholds of classes (f1 on split val): decisions.json" in done.stdout
    return run


@pytest.fixture(scope="module")
def calibrated(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with another choice of the user."""
    run = copy(trained, tmp_path_factory.mktemp("calibrated") / "run")
    shown = calibrate(run, "--calibration", "per-class", "--min-labels", 14)
    assert "threshold of all classes" in shown and "before" in shown and "after" in shown
    return run


@pytest.fixture(scope="module")
def val(trained: Path) -> tuple[np.ndarray, np.ndarray]:
    """Logits at the run's alpha and known labels of the validation split."""
    config, manifest, classifier, _ = load_run(trained, CPU)
    split = manifest.split("val")
    scores = score_split(classifier, make_eval_loader(config, split, classifier, CPU), split.known, [5.0], None)
    assert scores is not None and config.model.alpha_eval == 5
    return scores.at_alpha(5.0), split.known.rows(np.arange(len(split)))


def test_training_chooses_what_the_command_would(trained: Path, val: Any, tmp_path: Path) -> None:
    """With the weights in evaluation mode, on the logits that everything else gets."""
    found = record(trained)
    assert found["options"] == {"thresholds": "f1", "precision": None, "calibration": "none", "min_labels": 10}
    assert found["split"] == "val" and found["images"] == 60 and found["alpha"] == 5
    run = copy(trained, tmp_path / "run")
    (run / "decisions.json").unlink()
    calibrate(run, "--calibration", "none")
    assert record(run) == found
    logits, codes = val
    for c, row in enumerate(found["classes"]):
        predicted = 1 / (1 + np.exp(-logits[:, c].astype(np.float64))) >= row["threshold_probability"]
        hits = (predicted & (codes[:, c] == 1)).sum()
        assert row["f1"] == pytest.approx(200 * hits / (predicted.sum() + (codes[:, c] == 1).sum()))
        assert row["positives"] == (codes[:, c] == 1).sum() and row["negatives"] == (codes[:, c] == 0).sum()


def test_results_have_both_thresholds(trained: Path) -> None:
    results = json.loads((trained / "results.json").read_text(encoding="utf-8"))
    plain, boosted = results["alpha"]["1"], results["alpha"]["5"]
    assert "decisions" not in plain, "thresholds are for the run's own alpha"
    predictor = spml_fast.load(trained, "cpu")
    metrics = predictor.evaluate(predictor.config.data.dir)
    assert boosted["decisions"] == pytest.approx(metrics["decisions"])
    assert boosted["OF1"] == pytest.approx(metrics["OF1"]) and boosted["threshold_probability"] == 0.5
    decided = boosted["decisions"]
    assert decided["OF1"] > boosted["OF1"] and decided["CF1"] > boosted["CF1"], "0.5 is too high after one epoch"
    assert decided["expected_calibration_error"] == decided["expected_calibration_error_uncalibrated"]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_predictions_are_those_above_the_thresholds(calibrated: Path, tmp_path: Path, capsys: Any) -> None:
    """A table of a calibrated run says so in a column of its own; options win over the run's thresholds."""
    images = Path(Manifest(spml_fast.open_run(calibrated).config.data.dir).split("test").path(0)).parent
    out = tmp_path / "out.csv"

    def rows(*options: object) -> list[dict[str, str]]:
        words = ["--run", calibrated, images, "--csv", out, *options]
        assert predict_command.main([str(w) for w in words]) == 0
        return read(out)

    limits = {row["class"]: row["threshold_probability"] for row in record(calibrated)["classes"]}
    every = rows("--threshold", 0)
    assert list(every[0]) == ["path", "class", "probability", "rank", "calibrated_probability"]
    kept = [row for row in every if float(row["calibrated_probability"]) >= limits[row["class"]]]
    assert 0 < len(kept) < len(every)
    key = [(row["path"], row["class"], row["probability"], row["calibrated_probability"]) for row in kept]
    assert [(r["path"], r["class"], r["probability"], r["calibrated_probability"]) for r in rows()] == key
    assert len(rows("--top", 2)) == 2 * len({row["path"] for row in every})
    assert {float(r["calibrated_probability"]) >= 0.3 for r in rows("--threshold", 0.3)} <= {True}
    by_image: dict[str, list[float]] = {}
    for row in every:
        by_image.setdefault(row["path"], []).append(float(row["calibrated_probability"]))
    assert all(values == sorted(values, reverse=True) for values in by_image.values())
    plain = rows("--no-decisions", "--top", 10)
    assert list(plain[0]) == ["path", "class", "probability", "rank"]
    raw = {(row["path"], row["class"]): row["probability"] for row in every}
    assert all(raw[row["path"], row["class"]] == row["probability"] for row in plain)
    capsys.readouterr()
    assert len(rows("--alpha", 1)) == 5 * len(by_image), "the most probable ones, as without thresholds"
    assert "are for alpha 5, and not used at 1" in capsys.readouterr().err


def test_the_python_api(calibrated: Path) -> None:
    predictor = spml_fast.load(calibrated, "cpu")
    limits = predictor.thresholds
    assert limits is not None and limits == {
        row["class"]: row["threshold_probability"] for row in record(calibrated)["classes"]
    }
    split = Manifest(predictor.config.data.dir).split("test")
    paths = [split.path(i) for i in range(20)]
    table = predictor.predict(paths).to_pylist()
    assert table and all(row["calibrated_probability"] >= limits[row["class"]] for row in table)
    top = predictor.predict(paths, top=3)
    assert top.num_rows == 60 and "calibrated_probability" in top.column_names
    assert predictor.predict(paths, alpha=1.0).num_rows == 100
    plain = spml_fast.load(calibrated, "cpu", decisions=False)
    assert plain.thresholds is None and plain.predict(paths).num_rows == 100


@pytest.mark.parametrize("kind", ["onnx", "safetensors"])
def test_an_export_decides_as_the_run_does(calibrated: Path, tmp_path: Path, kind: str, capsys: Any) -> None:
    if kind == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    out = tmp_path / f"model.{kind}"
    assert export_command.main(["--run", str(calibrated), "--format", kind, "--out", str(out)]) == 0
    assert "with the thresholds and the calibration of the run" in capsys.readouterr().out
    ours, theirs = spml_fast.load(calibrated, "cpu"), spml_fast.load(out, "cpu")
    assert theirs.thresholds == ours.thresholds
    split = Manifest(ours.config.data.dir).split("test")
    paths = [split.path(i) for i in range(30)]
    expected, found = (p.predict(paths).to_pylist() for p in (ours, theirs))
    assert [(r["path"], r["class"]) for r in found] == [(r["path"], r["class"]) for r in expected]
    for name in ("probability", "calibrated_probability"):
        assert [r[name] for r in found] == pytest.approx([r[name] for r in expected], abs=1e-5)
    metrics = theirs.evaluate(ours.config.data.dir)
    assert metrics["decisions"] == pytest.approx(ours.evaluate(ours.config.data.dir)["decisions"], abs=0.02)
    if kind == "onnx":
        session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
        noise = np.random.default_rng(0).uniform(0, 255, (2, 3, 64, 64)).astype(np.float32)
        logits, probabilities = session.run(["logits", "probabilities"], {"images": noise})
        assert ours.decisions is not None
        fitted = 1 / (1 + np.exp(-ours.decisions.calibration.logits(logits)))
        assert probabilities == pytest.approx(fitted, abs=1e-5), "the thresholds are for this output"
        about = session.get_modelmeta().custom_metadata_map
        assert json.loads(about["threshold_probability"]) == [
            row["threshold_probability"] for row in record(calibrated)["classes"]
        ]


def test_the_report_shows_them(trained: Path, calibrated: Path, tmp_path: Path) -> None:
    page = make_page([calibrated])
    heading = "<h2>Calibration and thresholds</h2>"
    assert heading in page and "highest F1" in page and "per-class" in page
    (text,) = re.findall(r'id="class-data">(.+?)</script>', page, re.S)
    (shown,) = json.loads(text)["groups"]
    rows = record(calibrated)["classes"]
    assert shown["thresholds"] == [pytest.approx(row["threshold_probability"], rel=1e-3) for row in rows]
    assert shown["pooled"] == [place for place, row in enumerate(rows) if row["from"] == "pooled"]
    assert shown["pooled"], "classes with few labels are marked"
    both = make_page([trained, calibrated])
    assert heading in both and str(trained) in both
    stale = copy(calibrated, tmp_path / "run")
    (stale / "model.safetensors").write_bytes(b"other")
    page = make_page([stale])
    assert heading not in page and "thresholds of classes are not shown" in page


class TestOtherWeights:
    """Decisions are for the weights that they were made with."""

    @pytest.fixture
    def stale(self, calibrated: Path, tmp_path: Path) -> Path:
        run = copy(calibrated, tmp_path / "run")
        weights = bytearray((run / "model.safetensors").read_bytes())
        weights[-5] ^= 1
        (run / "model.safetensors").write_bytes(weights)
        return run

    def test_they_are_refused(self, stale: Path) -> None:
        message = r"decisions.json was made for other weights than model.safetensors holds now; make them again with"
        image = Manifest(spml_fast.open_run(stale).config.data.dir).split("test").path(0)
        for kind in ("onnx", "safetensors"):
            with pytest.raises(UserError, match=message):
                export_command.main(["--run", str(stale), "--format", kind, "--out", str(stale / f"x.{kind}")])
        with pytest.raises(UserError, match=message):
            predict_command.main(["--run", str(stale), image])
        with pytest.raises(UserError, match=message):
            spml_fast.load(stale, "cpu")
        assert predict_command.main(["--run", str(stale), image, "--no-decisions"]) == 0
        assert spml_fast.load(stale, "cpu", decisions=False).thresholds is None
        done = warm.run_script("evaluate.py", "--run", stale)
        assert done.returncode == 0 and "note: without the run's thresholds: " in done.stderr
        assert "with the run's thresholds" not in done.stdout and "OF1" in done.stdout

    def test_a_longer_run_makes_them_again_the_same_way(
        self, trained: Path, small_digits: Path, tmp_path: Path
    ) -> None:
        run = tmp_path / "run"
        shutil.copytree(trained, run)
        calibrate(run, "--thresholds", "precision", "--precision", 0.4, "--calibration", "temperature")
        before = record(run)
        digits(run, small_digits)
        assert record(run) == before, "the weights are the same, so what the user chose stays"
        weights = (run / "model.safetensors").read_bytes()
        digits(run, small_digits, "--train.epochs", 2)
        assert (run / "model.safetensors").read_bytes() != weights
        after = record(run)
        assert after["options"] == before["options"] and after["weights"] != before["weights"]
        assert load_decisions(run, [row["class"] for row in after["classes"]]) is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "decisions.json is damaged"),
        (lambda text: text.replace('"format": 1', '"format": 9'), "has format 9, which this version does not know"),
        (lambda text: text.replace('"class": "3"', '"class": "three"'), "is for other classes than the run's"),
        (lambda text: text.replace('"alpha": 5.0', '"alpha": -5.0'), "is damaged"),
        (lambda text: "[]", "is damaged"),
        (lambda text: text.replace('"scale": ', '"scale": 0e'), "is damaged"),
    ],
)
def test_damaged_files_are_named(calibrated: Path, tmp_path: Path, change: Any, message: str) -> None:
    run = copy(calibrated, tmp_path / "run")
    path = run / "decisions.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(change(text), encoding="utf-8")
    assert path.read_text(encoding="utf-8") != text
    with pytest.raises(UserError, match=f"{message}.*spml-fast calibrate"):
        load_decisions(run, [str(i) for i in range(10)])


def test_single_positive_validation_labels_decide_nothing(small_digits: Path, tmp_path: Path) -> None:
    """A table with one positive an image in every split: training ends well, and both say what is missing."""
    manifest = Manifest(small_digits)
    rows = []
    for name in ("train", "val", "test"):
        split = manifest.split(name)
        for i in range(0, len(split), 4):
            first = int(np.flatnonzero(split.known.rows([i])[0] == 1)[0])
            rows.append((split.path(i), str(first), "", name))
    table = tmp_path / "labels.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "positives", "negatives", "split"), *rows])
    words = ["csv", "--table", table, "--images", "/", "--out", tmp_path / "data", "--name", "one"]
    done = warm.run_script("prepare.py", *words)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    done = digits(run, tmp_path / "data")
    assert "no thresholds of classes were chosen on split val: no known negatives" in done.stdout
    assert not (run / "decisions.json").exists() and (run / "results.json").exists()
    done = warm.run_script("calibrate.py", run)
    assert done.returncode == 1 and "no known negatives among" in done.stderr


def test_what_users_get_wrong(trained: Path, tmp_path: Path) -> None:
    for words, message in (
        (["--thresholds", "precision"], "give --precision"),
        (["--precision", "0.9"], "belongs to --thresholds precision"),
        (["--alpha", "0"], "--alpha is 0"),
        (["--min-labels", "0"], "--min-labels is 0"),
    ):
        with pytest.raises(UserError, match=message):
            calibrate_command.main([str(trained), *words])
    run = copy(trained, tmp_path / "run")
    text = (run / "config.yaml").read_text(encoding="utf-8")
    (run / "config.yaml").write_text(text.replace("val_split: val", "val_split: null"), encoding="utf-8")
    done = warm.run_script("calibrate.py", run)
    assert done.returncode == 1 and "has no validation split; name a split with --split" in done.stderr
    assert record(run) == record(trained)


def test_what_one_rank_cannot_read_is_no_reason_to_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One of several ranks may meet a missing image alone; swallowed, that would send it ahead of the others."""

    def missing(*_: object) -> None:
        raise UserError("photos/1.jpg is missing")

    monkeypatch.setattr("spml_fast.training.decide.score_known", missing)
    anything: Any = object()
    with pytest.raises(UserError, match="is missing"):
        decide(anything, anything, anything, RunLayout(tmp_path), anything, ["a"], print)


def test_a_file_of_another_format_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = RunLayout(tmp_path)
    layout.decisions.write_text('{"format": 99}', encoding="utf-8")
    layout.weights.write_bytes(b"")
    anything: Any = object()
    assert decide(anything, anything, anything, layout, anything, ["a"], print) is None
    assert layout.decisions.read_text(encoding="utf-8") == '{"format": 99}'
    assert "is of another version of this program; it is left as it is" in capsys.readouterr().out
