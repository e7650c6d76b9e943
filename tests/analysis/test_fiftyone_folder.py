"""`predict --fiftyone`: what is written, and that our own importer of FiftyOne's exports reads it back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from spml_fast.analysis.fiftyone_folder import FiftyOneFolder, classifications, grey
from spml_fast.cli import predict as predict_command
from spml_fast.core.errors import UserError
from spml_fast.data.manifest import Manifest
from spml_fast.prepare.datasets.digits import prepare_digits
from tests.support.exports import make_run
from tests.support.prepare import prepare


def call(*arguments: object) -> int:
    return int(predict_command.main([str(a) for a in arguments]))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """A dozen digit scenes."""
    return prepare_digits(tmp_path_factory.mktemp("data") / "digits", sizes={"train": 12, "val": 4, "test": 4})


@pytest.fixture(scope="module")
def run(data: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = ("--model.backbone", "test_resnet", "--eval.batch_size", "5")
    return make_run(tmp_path_factory.mktemp("runs") / "run", *options, data=data.folder)


@pytest.fixture(scope="module")
def folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training split with labels, all classes and the maps of two."""
    out = tmp_path_factory.mktemp("out") / "look"
    assert call("--run", run, "--split", "train", "--fiftyone", out, "--maps", 2, "--threshold", 0) == 0
    return out


def samples_of(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads((folder / "samples.json").read_text(encoding="utf-8"))["samples"])


def named(field: dict[str, Any]) -> list[str]:
    assert field["_cls"] == "Classifications"
    assert all(entry["_cls"] == "Classification" for entry in field["classifications"])
    return [entry["label"] for entry in field["classifications"]]


def test_images_predictions_and_labels(folder: Path, data: Manifest) -> None:
    samples, split = samples_of(folder), data.split("train")
    assert len(samples) == len(split) == 12
    for index, sample in enumerate(samples):
        assert (folder / sample["filepath"]).read_bytes() == split.read(index)
        assert sample["tags"] == ["train"] and sample["_media_type"] == "image"
        confidence = [entry["confidence"] for entry in sample["predictions"]["classifications"]]
        assert confidence == sorted(confidence, reverse=True) and 0 <= min(confidence) <= max(confidence) <= 1
        assert sorted(named(sample["predictions"])) == data.classes
        known, observed = split.known.rows([index])[0], split.observed.rows([index])[0]
        assert named(sample["ground_truth"]) == [data.classes[c] for c in np.flatnonzero(known == 1)]
        assert named(sample["observed"]) == [data.classes[c] for c in np.flatnonzero(observed == 1)]
        assert named(sample["observed_negatives"]) == [data.classes[c] for c in np.flatnonzero(observed == 0)]
    about = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    assert about["media_type"] == "image" and about["info"]["classes"] == data.classes


def test_maps_lie_where_the_importer_looks(folder: Path) -> None:
    highest = []
    for number, sample in enumerate(samples_of(folder)):
        assert [field for field in sample if field.startswith("map_")] == ["map_1", "map_2"]
        for field in ("map_1", "map_2"):
            entry = sample[field]
            assert entry["_cls"] == "Heatmap" and entry["map_path"] == f"fields/{field}/{number:06d}.png"
            with Image.open(folder / entry["map_path"]) as image:
                assert image.mode == "L" and image.size == (64, 64)
                highest.append(np.asarray(image).max())
        assert sample["map_1"]["label"] == named(sample["predictions"])[0]
    assert max(highest) > 200


def test_our_importer_reads_it_back(folder: Path, data: Manifest, tmp_path: Path) -> None:
    split = data.split("train")
    for field, labels in (("ground_truth", split.known), ("observed", split.observed)):
        again = prepare("fiftyone", "--data", folder, "--field", field, "--out", tmp_path / field)
        # A data set of one split gives a fifth of it to validation.
        parts = [again.split(name) for name in ("train", "val")]
        place = [int(part.relative_path(i).split("/")[-1][:6]) for part in parts for i in range(len(part))]
        assert sorted(place) == list(range(len(split)))
        read = np.concatenate([part.known.rows(range(len(part))) for part in parts]) == 1
        columns = [data.classes.index(name) for name in again.classes]
        wanted = labels.rows(place) == 1
        assert np.array_equal(read, wanted[:, columns]) and wanted.sum() == read.sum()


def test_new_images_have_no_labels(run: Path, data: Manifest, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    images = [data.split("test").path(0), tmp_path / "broken.jpg", data.split("test").path(1)]
    assert call("--run", run, *images, "--fiftyone", tmp_path / "out", "--top", 3) == 1
    samples = samples_of(tmp_path / "out")
    assert [set(s) - {"metadata", "_media_type"} for s in samples] == [{"filepath", "tags", "predictions"}] * 2
    assert len(named(samples[0]["predictions"])) == 3 and samples[0]["tags"] == []
    captured = capsys.readouterr()
    assert "2 samples, for fiftyone.types.LegacyFiftyOneDataset; 1 of 3 images left out" in captured.out
    assert not (tmp_path / "out" / "fields").exists()


def test_a_folder_is_whole_or_not_there(data: Manifest, tmp_path: Path) -> None:
    """A long name is cut at its beginning; an image that is gone leaves nothing behind, and is named."""
    image = Path(data.split("test").path(0))
    long = tmp_path / ("\u00e9" * 120 + ".jpg")
    long.write_bytes(image.read_bytes())
    nothing = {"predictions": classifications([], [])}

    def folder(paths: list[str]) -> FiftyOneFolder:
        made = FiftyOneFolder(tmp_path / "out", data.classes)
        made._samples = dict.fromkeys(paths, nothing)
        return made

    gone = str(tmp_path / "gone.jpg")
    with pytest.raises(UserError, match=r"out cannot be written: .*gone\.jpg: No such file"):
        folder([str(long), gone]).write([str(long), gone])
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    folder([str(long)]).write([str(long)])
    (sample,) = samples_of(tmp_path / "out")
    assert sample["filepath"].endswith(".jpg") and (tmp_path / "out" / sample["filepath"]).is_file()
    (tmp_path / "new.partial").mkdir()
    with pytest.raises(UserError, match=r"new\.partial cannot be made: File exists; delete it"):
        FiftyOneFolder(tmp_path / "new", data.classes).write([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--maps", 2], "--maps and --split are for --fiftyone DIR"),
        (["--split", "test"], "--maps and --split are for --fiftyone DIR"),
        (["--fiftyone", "new", "--csv", "x.csv"], "--csv and --fiftyone are two ways to write"),
        (["--fiftyone", "new", "--split", "test", "a.jpg"], "--split takes the images of the data set"),
        (["--fiftyone", "new", "--split", "tset"], "tset"),
        (["--fiftyone", "new", "--maps", 0], "--maps is 0; it must be at least 1"),
        (["--fiftyone", "no/where", "--split", "test"], "there is no directory no"),
        (["--fiftyone", "full", "--split", "test"], "exists and is no empty folder"),
    ],
)
def test_mistakes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[object], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(UserError, match=message):
        call("--run", run, *options)
    assert not (tmp_path / "new").exists() and [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_evidence_against_a_class_is_not_shown() -> None:
    cells = np.array([[-2.0, 0.0], [1.0, 4.0]], np.float32)
    assert np.asarray(grey(cells, (2, 2))).tolist() == [[0, 0], [64, 255]]
    assert np.asarray(grey(-cells - 1, (2, 2))).tolist() == [[255, 0], [0, 0]]
    assert not np.asarray(grey(np.full((3, 3), -1, np.float32), (3, 3))).any()


def test_names_of_files_are_kept_apart(tmp_path: Path) -> None:
    from spml_fast.analysis.predict import Prediction

    paths = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        paths.append(str(tmp_path / name / "same.jpg"))
        Path(paths[-1]).write_bytes(name.encode())
    folder = FiftyOneFolder(tmp_path / "out", ["cat"])
    for path in paths:
        folder.add(Prediction(path, np.array([0]), np.array([0.5])))
    folder.write(paths)
    assert [s["filepath"] for s in samples_of(tmp_path / "out")] == ["data/000000-same.jpg", "data/000001-same.jpg"]
    assert [(tmp_path / "out" / s["filepath"]).read_bytes() for s in samples_of(tmp_path / "out")] == [b"a", b"b"]
