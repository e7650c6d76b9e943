"""What looking at suggestions wins: decisions by the truth, and figures of what is meant alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import label_cleaning
from benchmarks.label_cleaning import Images, check_decisions, decided, mean_features, one_draw
from spml_fast.core.config import DataConfig
from spml_fast.core.errors import UserError
from spml_fast.data.manifest import Manifest
from tests.support.classifiers import make

CONFIG = DataConfig(image_size=64, threads=1)
# One positive an image is observed; the last label of the first image nobody knows.
TRUTH = np.array([[1, 1, 0, -1], [0, 1, 1, 0]], np.int8)
CODES = np.array([[1, -1, -1, -1], [-1, -1, 1, -1]], np.int8)


@pytest.fixture(scope="module")
def images(small_digits: Path) -> Images:
    manifest = Manifest(small_digits)
    return Images(manifest, make(classes=manifest.num_classes).eval(), CONFIG)


def test_decisions() -> None:
    labels, accepted, skipped = decided(CODES, TRUTH, np.array([1, 2, 3]))
    assert labels.tolist() == [[1, 1, 0, -1], [-1, -1, 1, -1]] and (accepted, skipped) == (1, 1)
    assert decided(CODES, TRUTH, np.array([], np.int64))[0].tolist() == CODES.tolist()
    assert CODES[0, 1] == -1, "the labels that were given stay as they are"
    check_decisions(CODES, TRUTH)


def test_wrong_decisions_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    # A label that was observed against the truth stays wrong, whatever is decided.
    with pytest.raises(UserError, match="does not give the truth"):
        check_decisions(np.where(CODES == 1, 0, CODES).astype(np.int8), TRUTH)
    monkeypatch.setattr(label_cleaning, "decided", lambda codes, truth, places: (truth, len(places), 0))
    with pytest.raises(UserError, match="decisions are counted wrongly"):
        check_decisions(CODES, TRUTH)


def test_other_features_are_noticed(small_digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest(small_digits)
    classifier = make(classes=manifest.num_classes).eval()
    monkeypatch.setattr(classifier, "classify", lambda maps: type(classifier).classify(classifier, maps[:, 1:]))
    with pytest.raises(UserError, match="the head of the mean features is not the classifier's"):
        mean_features(classifier, manifest.split("val"), CONFIG)


def test_a_draw(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_cleaning, "PENALTIES", (1.0,))
    truth = images.truth["train"]
    unknown = truth.size - len(truth)
    found = one_draw(images, 0, [20, unknown])
    full, logits = images.train(truth)
    assert logits.shape == truth.shape and 10 < full <= 100 and found["before"] < full
    hidden = int((truth == 1).sum()) - len(truth)
    for kind in ("suggested", "random"):
        # Everything decided is everything known, in whatever order.
        assert found[kind][unknown] == {"map": full, "accepted": hidden, "skipped": 0}
    # The network knows something, even an untrained one with a head that was solved for.
    assert found["suggested"][20]["accepted"] > found["random"][20]["accepted"]
    with pytest.raises(UserError, match=rf"--decisions {unknown + 1}: only {unknown} labels are unknown"):
        one_draw(images, 0, [unknown + 1])
    monkeypatch.setattr(label_cleaning, "FLAT", 0.0)
    with pytest.raises(UserError, match="the head is no minimum: its gradient has an entry of"):
        images.train(truth)


def test_the_command(
    small_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, out = tmp_path / "weights.pt", tmp_path / "out.json"
    torch.save(make().backbone.state_dict(), weights)
    words = ["--data.dir", small_digits, "--backbone", "test_resnet", "--weights", weights, "--image-size", 64]
    command = ["label_cleaning.py", *map(str, words), "--draws", "1", "--decisions", "9", "--json", str(out)]
    monkeypatch.setattr(label_cleaning, "PENALTIES", (1.0,))
    monkeypatch.setattr("sys.argv", command)
    label_cleaning.main()
    assert "9    random decisions" in capsys.readouterr().out
    assert [set(draw["suggested"]) for draw in json.loads(out.read_text())["draws"]] == [{"9"}]
    monkeypatch.setattr("sys.argv", [*command, "--draws", "0"])
    with pytest.raises(SystemExit, match="2"):
        label_cleaning.main()
    assert "whole numbers from 1 on" in capsys.readouterr().err
