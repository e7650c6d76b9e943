"""A trained run on new images: the figures of evaluation, odd files, what is written, and what users get wrong."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from spml_fast.analysis import predict
from spml_fast.analysis.predict import Prediction, PredictionTable, prediction_line
from spml_fast.cli import predict as predict_command
from spml_fast.cli.parse import parse_config
from spml_fast.core.errors import UserError
from spml_fast.core.outputs import OutputFile
from spml_fast.core.text import formula_safe, formula_safe_path
from spml_fast.data import image_check, image_files
from spml_fast.data.image_files import find_images
from spml_fast.data.manifest import Manifest
from spml_fast.evaluation.evaluate import score_split
from spml_fast.models.classifier import Classifier
from spml_fast.models.weights import save_weights
from spml_fast.runs.open import load_run, make_eval_loader, run_classes
from spml_fast.runs.recipe import to_yaml
from tests.support import warm
from tests.support.paths import ROOT

CPU = torch.device("cpu")
Row = tuple[str, str, float, int]


def call(*arguments: object) -> int:
    """Run the command in this process; a user error stays an exception."""
    return int(predict_command.main([str(a) for a in arguments]))


def read(path: Path) -> list[Row]:
    """The rows of a table of predictions."""
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["path", "class", "probability", "rank"]
    return [(p, c, float(probability), int(rank)) for p, c, probability, rank in rows[1:]]


def csv_file(path: Path) -> OutputFile:
    """A table as `--csv` names it."""
    return OutputFile(path, "csv", "path,class,probability,rank", "--csv")


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same device as the figures that predictions are held against."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def trained(small_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch, with its data set."""
    run = tmp_path_factory.mktemp("trained") / "run"
    arguments = ["--config", ROOT / "launch" / "configs" / "digits.yaml", "--data.dir", small_digits, "--run.dir", run]
    arguments += ["--train.epochs", 1, "--eval.batch_size", 32, "--train.precision", "fp32"]
    done = warm.run_script("train.py", *arguments, "--deepspeed.tensorboard", "false")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return run


@pytest.fixture(scope="module")
def run(trained: Path, small_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run alone, as somebody gets it who does not have the data set."""
    alone = tmp_path_factory.mktemp("alone") / "run"
    alone.mkdir()
    for name in ("classes.txt", "model.safetensors"):
        shutil.copy(trained / name, alone)
    text = (trained / "config.yaml").read_text(encoding="utf-8")
    assert str(small_digits) in text
    (alone / "config.yaml").write_text(text.replace(str(small_digits), str(alone / "gone")), encoding="utf-8")
    return alone


@pytest.fixture(scope="module")
def image_path(small_digits: Path) -> Path:
    """A digit scene."""
    return Path(Manifest(small_digits).split("test").path(0))


@pytest.fixture
def folder(tmp_path: Path, image_path: Path) -> Path:
    """Good images, broken ones, and what is no image."""
    top = tmp_path / "photos"
    (top / "sub").mkdir(parents=True)
    data = image_path.read_bytes()
    for name in ("b.jpg", "a.JPEG", "sub/c.jpg"):
        (top / name).write_bytes(data)
    (top / "cut.jpg").write_bytes(data[: len(data) // 2])
    (top / "empty.png").touch()
    (top / "words.txt").write_text("no image")
    return top


class TestSameAsEvaluation:
    """One loader, one classifier, one alpha: one figure."""

    @pytest.mark.parametrize("alpha", [None, 1])
    def test_every_probability(self, trained: Path, run: Path, tmp_path: Path, alpha: float | None) -> None:
        config, manifest, classifier, _ = load_run(trained, CPU)
        split = manifest.split("test")
        scores = score_split(classifier, make_eval_loader(config, split, classifier, CPU), split.known, [1, 5], None)
        assert scores is not None and config.model.alpha_eval == 5
        truth = 1 / (1 + np.exp(-scores.at_alpha(alpha or 5).astype(np.float64)))
        paths = [split.path(i) for i in range(len(split))]
        options = [] if alpha is None else ["--alpha", alpha]
        out = tmp_path / "out.csv"
        assert call("--run", run, "--top", 10, "--csv", out, *options, *paths) == 0
        rows = read(out)
        assert [r[0] for r in rows] == [p for p in paths for _ in range(10)]
        for i in range(len(split)):
            of_image = rows[10 * i : 10 * i + 10]
            probabilities = [p for _, _, p, _ in of_image]
            assert [r[3] for r in of_image] == list(range(1, 11)) and probabilities == sorted(
                probabilities, reverse=True
            )
            ids = [manifest.classes.index(c) for _, c, _, _ in of_image]
            np.testing.assert_allclose(probabilities, truth[i, ids], rtol=0, atol=1e-6)
        assert np.ptp(truth, axis=0).min() > 1e-3, "a constant would pass"

    def test_batch_size_changes_nothing(self, run: Path, small_digits: Path, tmp_path: Path) -> None:
        split = Manifest(small_digits).split("test")
        paths = [split.path(i) for i in range(7)]
        for size in (1, 3):
            assert call("--run", run, "--csv", tmp_path / f"{size}.csv", "--batch-size", size, *paths) == 0
        one, three = read(tmp_path / "1.csv"), read(tmp_path / "3.csv")
        assert len(one) == 35 and [r[:2] for r in one] == [r[:2] for r in three]
        np.testing.assert_allclose([r[2] for r in one], [r[2] for r in three], atol=1e-6)

    def test_turned_grey_and_transparent_images(self, run: Path, image_path: Path, tmp_path: Path) -> None:
        """Stored without loss, so the figures must be the same as of the upright RGB image."""
        exif = Image.Exif()
        exif[0x0112] = 6
        with Image.open(image_path) as image:
            image.save(tmp_path / "upright.png")
            image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
            image.convert("RGBA").save(tmp_path / "alpha.png")
            image.convert("L").save(tmp_path / "grey.png")
            image.convert("L").convert("RGB").save(tmp_path / "grey_rgb.png")
        assert call("--run", run, "--top", 10, "--csv", tmp_path / "out.csv", tmp_path) == 0
        by_image: dict[str, dict[str, float]] = {}
        for path, name, probability, _ in read(tmp_path / "out.csv"):
            by_image.setdefault(Path(path).stem, {})[name] = probability
        assert list(by_image) == ["alpha", "grey", "grey_rgb", "turned", "upright"]
        for other, same in (("turned", "upright"), ("alpha", "upright"), ("grey", "grey_rgb")):
            assert by_image[other] == pytest.approx(by_image[same], abs=1e-6)
        assert by_image["grey"] != pytest.approx(by_image["upright"], abs=1e-3)
        assert (
            call("--run", run, "--orientation", "ignore", "--csv", tmp_path / "out.csv", tmp_path / "turned.png") == 0
        )
        stored = {name: probability for _, name, probability, _ in read(tmp_path / "out.csv")}
        assert any(abs(p - by_image["turned"][name]) > 1e-3 for name, p in stored.items())


class TestImages:
    """Which files are looked at, and what becomes of those that cannot be used."""

    def test_a_line_a_image_and_the_broken_are_named(
        self, run: Path, folder: Path, capsys: pytest.CaptureFixture
    ) -> None:
        assert call("--run", run, folder, "--top", 3, folder / "b.jpg") == 1
        output = capsys.readouterr()
        lines = output.out.splitlines()
        assert [line.split()[0] for line in lines] == [str(folder / n) for n in ("a.JPEG", "b.jpg", "sub/c.jpg")]
        assert all(line.count(",") == 2 for line in lines)
        assert len({line.split("  ")[-1] for line in lines}) == 1, "the same image three times"
        for name, why in (("cut.jpg", "damaged or truncated"), ("empty.png", "empty file")):
            assert f"left out: {folder / name}: {why}" in output.err
        assert "2 of 5 images left out" in output.err and "words.txt" not in output.err

    def test_what_the_loader_alone_refuses_is_left_out(
        self, run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        # Headers alone are looked at, so the image that is cut off gets as far as the decoder.
        monkeypatch.setattr(image_check, "DECODE_LIMIT", 0)
        (folder / "empty.png").unlink()
        for size in (1, 2, 64):
            out = tmp_path / f"{size}.csv"
            assert call("--run", run, "--csv", out, "--batch-size", size, "--top", 1, folder) == 1
            output = capsys.readouterr()
            assert output.err.count("left out: ") == 1 and f"left out: {folder / 'cut.jpg'}: damaged" in output.err
            assert "1 of 4 images left out" in output.out
            assert [Path(r[0]).name for r in read(out)] == ["a.JPEG", "b.jpg", "c.jpg"]

    def test_directories_are_searched_once_and_links_followed(self, folder: Path, image_path: Path) -> None:
        os.symlink(".", folder / "loop")
        os.symlink("sub", folder / "again")
        os.symlink("b.jpg", folder / "name.jpg")
        os.symlink("nowhere", folder / "dangling.jpg")
        os.mkfifo(folder / "pipe.jpg")
        names = ["a.JPEG", "b.jpg", "cut.jpg", "dangling.jpg", "empty.png", "name.jpg", "sub/c.jpg"]
        paths = [str(folder / n) for n in names]
        notes: list[str] = []
        assert find_images([str(folder)], notes.append) == paths
        assert find_images([str(folder), str(folder / "again"), str(folder / "again" / "c.jpg")], print) == paths
        # In the order in which they were given; a file is taken whatever it is called.
        first = [str(folder / "words.txt"), str(folder / "sub" / "c.jpg")]
        assert find_images([*first, str(folder)], notes.append) == [*first, *paths[:-1]]
        assert notes == []
        (folder / "none").mkdir()
        assert find_images([str(image_path), str(folder / "none")], notes.append) == [str(image_path)]
        assert notes == [f"no image in {folder / 'none'}"]

    def test_strange_names(self, run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        strange = os.fsdecode(os.fsencode(folder / "sub") + b"/\xff\x1b,\n.jpg")
        shutil.copy(folder / "b.jpg", strange)
        assert call("--run", run, "--csv", tmp_path / "out.csv", "--top", 1, folder / "sub") == 0
        assert {r[0] for r in read(tmp_path / "out.csv")} == {strange, str(folder / "sub" / "c.jpg")}
        assert call("--run", run, folder / "sub") == 0
        assert "\\udcff\\x1b,\\n.jpg" in capsys.readouterr().out

    def test_unreadable_directory(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(path: str) -> None:
            raise PermissionError(13, "Permission denied", path)

        monkeypatch.setattr(image_files.os, "scandir", refuse)
        with pytest.raises(UserError, match=r"directory .*photos cannot be read: Permission denied"):
            find_images([str(folder)], print)


class TestOutput:
    """Lines and tables."""

    def test_threshold_shows_all_classes_above_it(self, run: Path, image_path: Path, tmp_path: Path) -> None:
        call("--run", run, "--top", 10, "--csv", tmp_path / "all.csv", image_path)
        every = read(tmp_path / "all.csv")
        for place in (2, 7):
            # Between two classes.
            edge = (every[place][2] + every[place + 1][2]) / 2
            call("--run", run, "--threshold", edge, "--csv", tmp_path / "some.csv", image_path)
            assert read(tmp_path / "some.csv") == every[: place + 1]
        call("--run", run, "--threshold", edge, "--top", 4, "--csv", tmp_path / "some.csv", image_path)
        assert read(tmp_path / "some.csv") == every[:4]

    def test_a_image_without_a_class_says_so(
        self, run: Path, image_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        assert call("--run", run, "--threshold", 1, image_path) == 0
        assert capsys.readouterr().out.split() == f"{image_path} no class of probability 1 or more".split()
        assert call("--run", run, "--threshold", 1, "--csv", tmp_path / "out.csv", image_path) == 0
        assert read(tmp_path / "out.csv") == []
        assert capsys.readouterr().out == f"{tmp_path / 'out.csv'}: 0 rows for 1 images\n"

    def test_line(self) -> None:
        prediction = Prediction("a.jpg", np.array([2, 0]), np.array([0.98765, 0.25]))
        classes = ["cat", "dog", "traffic light"]
        assert prediction_line(prediction, classes, 0, 7) == "a.jpg    traffic light 0.988, cat 0.250"

    def test_probabilities_near_one_stay_apart(self) -> None:
        """In fp32 the sigmoid is 1 from 17 on."""

        class Fixed(torch.nn.Module):
            def forward(self, images: torch.Tensor, boost: bool) -> object:
                logits = torch.tensor([[18.0, 20.0, 18.0]])
                return type("Output", (), {"at_alpha": lambda _, alpha: logits})()

        views = iter([(0, torch.zeros(1, 3, 2, 2))])
        config = parse_config(["--data.dir", "x", "--train.precision", "fp32"])
        files = image_files.ImageFiles(["a.jpg"], np.ones(1, np.uint8))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(predict, "load_images", lambda *_: views)
            (prediction,) = predict.predict(Fixed(), config, files, CPU, alpha=1, classes=["a", "b", "c"])  # type: ignore[arg-type]
        assert prediction.classes.tolist() == [1, 0, 2], "ties by class id"
        assert prediction.probability.tolist() == pytest.approx(
            [1 / (1 + math.exp(-x)) for x in (20, 18, 18)], abs=1e-16
        )
        assert prediction.probability[0] > prediction.probability[1]

    # Whatever bytes a file name has, and whatever characters a class name has.
    @settings(max_examples=40, deadline=None)
    @given(st.binary(min_size=1).filter(lambda b: b"\0" not in b), st.text(st.characters(exclude_categories=["Cs"])))
    def test_csv_gives_back_what_was_written(
        self, tmp_path_factory: pytest.TempPathFactory, name: bytes, label: str
    ) -> None:
        out = tmp_path_factory.mktemp("csv") / "out.csv"
        path = name.decode("utf-8", "surrogateescape")
        probability = np.array([0.1 + 0.2, 1e-17])
        with PredictionTable(csv_file(out), ["x", label]) as table:
            table.add(Prediction(path, np.array([1, 0]), probability))
        # What a spreadsheet would take for a formula is written as text.
        shown, named = formula_safe_path(path), formula_safe(label)
        assert read(out) == [(shown, named, probability[0], 1), (shown, "x", probability[1], 2)]

    def test_a_table_is_whole_or_not_there(self, tmp_path: Path) -> None:
        out = tmp_path / "out.csv"
        out.write_text("path,class,probability,rank\n")
        row = Prediction("a.jpg", np.array([0]), np.array([0.5]))
        with pytest.raises(KeyboardInterrupt), PredictionTable(csv_file(out), ["cat"]) as table:
            table.add(row)
            assert read(out) == []
            raise KeyboardInterrupt
        assert read(out) == [] and len(read(tmp_path / "out.csv.partial")) == 1
        with pytest.raises(UserError), PredictionTable(csv_file(out), ["cat"]):
            raise UserError("nothing to write")
        assert [p.name for p in tmp_path.iterdir()] == ["out.csv"], "a table without rows leaves nothing behind"
        with PredictionTable(csv_file(out), ["cat"]) as table:
            table.add(row)
        assert read(out) == [("a.jpg", "cat", 0.5, 1)] and not (tmp_path / "out.csv.partial").exists()
        # Somebody else's file that appeared while images were predicted stays, and the rows are kept beside it.
        with (
            pytest.raises(UserError, match="exists and was not written"),
            PredictionTable(csv_file(out), ["cat"]) as table,
        ):
            table.add(row)
            out.write_text("path,positives\n")
        assert out.read_text() == "path,positives\n" and len(read(tmp_path / "out.csv.partial")) == 1


class TestRuns:
    """Runs of every kind."""

    @pytest.fixture(scope="class")
    def query2label(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A run with a Query2Label head and random weights."""
        made = tmp_path_factory.mktemp("q2l")
        recipe = ROOT / "launch" / "configs" / "digits_q2l.yaml"
        config = parse_config(["--config", str(recipe), "--data.dir", str(made / "gone"), "--train.precision", "fp32"])
        (made / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        (made / "classes.txt").write_text("cat\ndog\ntraffic light\n", encoding="utf-8")
        save_weights(made / "model.safetensors", Classifier(config.model, 3, config.data.image_size), {})
        return made

    def test_query2label_has_alpha_one(self, query2label: Path, image_path: Path, tmp_path: Path) -> None:
        for name, options in {"default": [], "one": ["--alpha", 1]}.items():
            assert call("--run", query2label, "--csv", tmp_path / f"{name}.csv", *options, image_path) == 0
        rows = read(tmp_path / "default.csv")
        # Fewer classes than --top asks for.
        assert {r[1] for r in rows} == {"cat", "dog", "traffic light"} and rows == read(tmp_path / "one.csv")
        with pytest.raises(UserError, match="alpha 5 has no meaning for head query2label"):
            call("--run", query2label, "--alpha", 5, image_path)

    def test_classes_of_a_run_without_a_list_come_from_its_data(
        self, trained: Path, run: Path, small_digits: Path, tmp_path: Path
    ) -> None:
        config, manifest, _, _ = load_run(trained, CPU)
        assert run_classes(tmp_path, config) == manifest.classes
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, dir=str(tmp_path / "gone")))
        assert run_classes(run, config) == manifest.classes
        with pytest.raises(UserError, match=r"has no classes\.txt, and its data set .*gone is not there either; copy"):
            run_classes(tmp_path, config)
        (tmp_path / "classes.txt").touch()
        with pytest.raises(UserError, match=r"classes\.txt is empty"):
            run_classes(tmp_path, config)

    def test_diverged_weights_are_no_predictions(self, run: Path, image_path: Path, tmp_path: Path) -> None:
        broken = tmp_path / "run"
        shutil.copytree(run, broken)
        state = load_file(run / "model.safetensors")
        name = next(k for k in state if k.startswith("head") and k.endswith("bias"))
        state[name][3] = math.nan
        save_file(state, broken / "model.safetensors")
        with pytest.raises(UserError, match=r"score of class 3 is not a number for .*jpg"):
            call("--run", broken, "--csv", tmp_path / "out.csv", image_path)
        assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--run RUN", "no image given; name image files"),
        ("--run RUN --top 0 IMAGE", "--top is 0; it must be at least 1"),
        ("--run RUN --threshold 1.5 IMAGE", "--threshold is 1.5; it is a probability"),
        ("--run RUN --threshold nan IMAGE", "--threshold is nan"),
        ("--run RUN --alpha 0 IMAGE", "--alpha is 0; it must be greater than 0"),
        ("--run RUN --alpha inf IMAGE", "--alpha is inf; .* finite"),
        ("--run RUN --batch-size 0 IMAGE", "--batch-size is 0"),
        ("--run RUN --csv - IMAGE", "--csv - is no file name"),
        ("--run RUN --csv TMP IMAGE", "is a directory; give the name of a file"),
        ("--run RUN --csv TMP/no/out.csv IMAGE", "out.csv cannot be written: there is no directory"),
        ("--run RUN TMP/gone.jpg", "gone.jpg cannot be read: No such file"),
        ("--run RUN /dev/null", "/dev/null is neither a file nor a directory"),
        ("--run RUN TMP/empty", r"there is no image; files are taken that end in .*\.jpg"),
        ("--run RUN TMP/words.txt", "none of the 1 images can be used"),
        ("--run TMP/gone IMAGE", "gone is not a run directory"),
        ("--run TMP/young IMAGE", r"model\.safetensors cannot be read .* has the run finished an epoch"),
    ],
)
def test_what_users_get_wrong(arguments: str, message: str, run: Path, image_path: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.txt").write_text("no image")
    if "young" in arguments:
        (tmp_path / "young").mkdir()
        for name in ("config.yaml", "classes.txt"):
            shutil.copy(run / name, tmp_path / "young")
    arguments = arguments.replace("RUN", str(run)).replace("IMAGE", str(image_path)).replace("TMP", str(tmp_path))
    with pytest.raises(UserError, match=message):
        call(*arguments.split())
    assert not list(tmp_path.rglob("*.csv*"))


def test_several_ranks_are_refused(run: Path, image_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="works in one process"):
        call("--run", run, image_path)
