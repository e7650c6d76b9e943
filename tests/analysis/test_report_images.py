"""Mistakes and rejected labels with their images, from a data set; and why nothing is shown where it is not there."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from spml_fast.analysis.report import groups as groups_module
from spml_fast.analysis.report import mistakes
from spml_fast.analysis.report.coverage import coverage, unknown_positive_fraction
from spml_fast.analysis.report.groups import group_runs, training_counts
from spml_fast.analysis.report.mistakes import hardest_labels, selected_labels, sheets, shown_mistakes
from spml_fast.analysis.report.page import make_page
from spml_fast.analysis.review.pictures import Pictures, make_thumbnail
from spml_fast.core.errors import UserError
from spml_fast.data.manifest import Manifest
from spml_fast.evaluation.evaluate import Scores
from spml_fast.models.classifier import Classifier
from spml_fast.models.weights import save_weights
from spml_fast.runs.open import load_run_config
from spml_fast.runs.read import Run, read_run
from tests.support.report import add_record, make_run

CPU = torch.device("cpu")
DIGITS = [str(digit) for digit in range(10)]


@pytest.fixture
def digits(small_digits: Path, tmp_path: Path) -> Path:
    """A data set of its own, with its images."""
    return Path(shutil.copytree(small_digits, tmp_path / "digits"))


@pytest.fixture
def run(digits: Path, tmp_path: Path) -> Path:
    """A run on it with made-up scores, whose log notes what was rejected."""
    split = Manifest(digits).split("test")
    train = Manifest(digits).split("train")
    noted = [[3, train.relative_path(3), 1, True], [5, train.relative_path(5), 2, False]]
    options = ["--data.dir", str(digits), "--model.backbone", "test_resnet", "--model.pretrained", "false"]
    options += ["--data.image_size", "64", "--train.precision", "fp32"]
    epoch = {"selected_examples": noted}
    folder = make_run(tmp_path / "run", *options, names=DIGITS, aps=[50.0] * 10, epoch=epoch)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(len(split), 10)).astype(np.float32)
    paths = [split.relative_path(i) for i in range(len(split))]
    add_record(folder, DIGITS, Scores(logits, logits, np.arange(len(split))), split.known, paths=paths)
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Pictures of coloured noise in place of a network's; gives the pairs that were asked for."""
    asked: list[tuple[int, int]] = []

    def collect(lists, split, num_classes, device, side):
        pictures = Pictures(signed=True)
        for index, class_id in zip(lists[0].index.tolist(), lists[0].class_id.tolist(), strict=True):
            asked.append((index, class_id))
            pictures.thumbnails[index] = make_thumbnail(np.full((64, 64, 3), index % 255, np.uint8), 1.0, side)
            pictures.maps[index, class_id] = np.full((8, 8), 1.0, np.float16)
        return pictures

    monkeypatch.setattr(mistakes, "collect", collect)
    return asked


def test_the_hardest_labels_are_those_of_the_record(run: Path, digits: Path, drawn: list[tuple[int, int]]) -> None:
    record = json.loads((run / "evaluation.json").read_text())
    ((title, wrong), (_, missed)) = hardest_labels(record, 4)
    assert title == "Hardest false positives" and len(wrong) == len(missed) == 4
    found = sheets(read_run(run), "test", [("wrong", wrong), ("missed", missed)], CPU)
    assert sorted(set(drawn)) == sorted({(one.sample, one.class_id) for one in (*wrong, *missed)})
    known = Manifest(digits).split("test").known
    for card, one in zip(found[0].cards, wrong, strict=True):
        assert card.class_name == str(one.class_id) and card.path == one.path
        there = np.flatnonzero(known.rows([one.sample])[0] == 1)
        assert card.there.removesuffix(" ...") == ", ".join(map(str, there[:5])) and one.class_id not in there
        assert np.frombuffer(base64.b64decode(card.cells), np.int8).tolist() == [127] * 64
    page = make_page([run], images=4)
    assert page.count('class="picture"') == 8 and page.count("data-cells=") == 8 + 8
    # Of each of four epochs one was right and one was wrong.
    assert page.count("picture right") == page.count("picture wrong") == 4


def test_rejected_labels_of_some_epochs(run: Path) -> None:
    shown = selected_labels(read_run(run), 12)
    assert [title for title, _ in shown] == ["Epoch 1", "Epoch 2", "Epoch 3", "Epoch 4"]
    assert [(one.sample, one.class_id, one.right) for one in shown[0][1]] == [(3, 1, True), (5, 2, False)]
    run_of_many = Run(Path("x"), {}, classes=DIGITS)
    run_of_many.epochs = [{"epoch": i, "selected_examples": [[0, "a", 1, None]]} for i in range(1, 31)]
    assert [title for title, _ in selected_labels(run_of_many, 12)] == ["Epoch 1", "Epoch 11", "Epoch 20", "Epoch 30"]
    # Damaged lines, and classes that there are not, show nothing.
    for damaged in (
        [[0, "a", 1]],
        [[0, "a", 99, True]],
        [["x", "a", 1, True]],
        [[0, "a", 1, "yes"]],
        5,
        [[-1, "a", 1, True]],
    ):
        run_of_many.epochs = [{"epoch": 1, "selected_examples": damaged}]
        assert selected_labels(run_of_many, 12) == []


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda digits: shutil.rmtree(digits), "digits"),
        (lambda digits: shutil.rmtree(digits / "images"), "its images are not in"),
        (lambda digits: (digits / "classes.txt").write_text("".join(f"x{i}\n" for i in range(10))), "other classes"),
    ],
)
def test_one_sentence_says_why_there_are_no_images(run, digits, drawn, break_it, reason):
    break_it(digits)
    page = make_page([run], images=4)
    (sentence,) = [line for line in page.splitlines() if "No images of " in line]
    assert reason in sentence and "<canvas" not in page and not drawn and '<section id="classes"' in page


def test_another_data_set_under_the_same_name(run: Path, drawn: list[tuple[int, int]]) -> None:
    record = json.loads((run / "evaluation.json").read_text())
    for name in ("false_positives", "misses"):
        record[name] = [[sample, f"elsewhere/{path}", *rest] for sample, path, *rest in record[name]]
    (run / "evaluation.json").write_text(json.dumps(record))
    groups = group_runs([read_run(run)])
    found, _, missing = shown_mistakes(groups, [[record]], 4, CPU)
    assert not found and "other images than when the run was made" in missing[0]


def test_a_data_set_is_kept_where_the_run_says(run: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels are counted and images read from the same copy of a data set on object storage."""
    opened = []

    def manifest(*where: object) -> Manifest:
        opened.append(where)
        return Manifest(digits)

    monkeypatch.setattr(groups_module, "Manifest", manifest)
    one = read_run(run)
    one.options |= {"data.cache_dir": "kept", "data.image_root": "images"}
    mistakes.open_split(one, "test")
    training_counts(group_runs([one]))
    assert opened == [(str(digits), "images", "kept")] * 2


def test_no_images_are_asked_for(run: Path, drawn: list[tuple[int, int]]) -> None:
    assert "No images of" not in make_page([run]) and not drawn


@pytest.mark.slow
def test_a_network_draws_the_maps(run: Path, digits: Path) -> None:
    """The real thing: weights, images, maps whose mean is the logit's."""
    config = load_run_config(run)
    save_weights(run / "model.safetensors", Classifier(config.model, 10, config.data.image_size), {})
    wanted = selected_labels(read_run(run), 2)[:1]
    ((one, two),) = [sheet.cards for sheet in sheets(read_run(run), "train", wanted, CPU)]
    assert (
        one.src.startswith("data:image/jpeg;base64,") and one.width == one.height == 64 and one.right and not two.right
    )
    assert one.cells and one.cells != two.cells
    (run / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError):
        sheets(read_run(run), "train", wanted, CPU)


def test_what_is_known_of_the_images(run: Path, digits: Path) -> None:
    groups = group_runs([read_run(run)])
    ((folder, (head, rows)),) = coverage(groups)
    assert folder == str(digits) and [row[0] for row in rows] == ["train", "val", "test"]
    split = Manifest(digits).split("train")
    positives = int(split.known.class_counts(1).sum())
    row = dict(zip(head, rows[0], strict=True))
    assert row["images"] == str(len(split)) and row["known positive"].startswith(f"{positives:,} (")
    assert row["training sees positive"].startswith(f"{len(split):,} (") and row["left out"] == "0"
    hidden = (positives - len(split)) / (9 * len(split))
    assert unknown_positive_fraction(groups[0].runs[0]) == pytest.approx(hidden)
    whole = json.loads((digits / "report.json").read_text())
    for damage in (
        lambda report: report.clear(),
        lambda report: report["splits"]["train"].pop("samples"),
        lambda report: report["splits"]["val"]["known"].update(positive="many"),
        lambda report: report["splits"]["val"]["known"].update(positive="5"),
    ):
        damaged = json.loads(json.dumps(whole))
        damage(damaged)
        (digits / "report.json").write_text(json.dumps(damaged))
        assert coverage(groups) == [] and unknown_positive_fraction(groups[0].runs[0]) is None
