"""Maps over images: the figures of the head, what is chosen, what is written, and what users get wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from spml_fast.analysis import explain, explain_drawing
from spml_fast.analysis.explain import Choice, choose_classes, choose_samples, with_labels
from spml_fast.analysis.explain_files import MapFolder
from spml_fast.analysis.suggest import Suggestions
from spml_fast.cli import explain as explain_command
from spml_fast.core.errors import UserError
from spml_fast.data import image_check
from spml_fast.data.image_files import ImageFiles
from spml_fast.data.labels import NEGATIVE, POSITIVE
from spml_fast.evaluation.evaluate import score_split
from spml_fast.prepare.pack import PackOptions, pack
from spml_fast.runs.open import load_run, make_eval_loader
from tests.support.explain import NAMES, call, make_run

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("plain_page")


class TestMaps:
    """Figures of the head."""

    def test_figures_of_evaluation(self, run: Path) -> None:
        config, manifest, classifier, _ = load_run(run, CPU)
        split = manifest.split("val")
        scores = score_split(classifier, make_eval_loader(config, split, classifier, CPU), split.known, [1, 5], None)
        assert scores is not None
        files = ImageFiles([split.path(i) for i in range(len(split))], np.ones(len(split), np.uint8))
        first = [[i % 10] for i in range(len(split))]
        explained = list(
            explain.explain(classifier, config, files, CPU, alpha=5, classes=manifest.classes, top=3, first=first)
        )
        assert len(explained) == len(split) and explained[0].maps.shape[0] == 3
        for i, one in enumerate(explained):
            boosted, plain = scores.at_alpha(5)[i], scores.at_alpha(1)[i]
            order = np.argsort(-boosted, kind="stable").tolist()
            assert one.classes.tolist() == [i % 10, *(c for c in order if c != i % 10)][:3]
            assert one.predicted == tuple(c for c in order if boosted[c] >= 0)
            cells = one.maps.astype(np.float64)
            np.testing.assert_allclose(one.plain, plain[one.classes], atol=1e-4)
            np.testing.assert_allclose(one.logit, boosted[one.classes], atol=1e-4)
            np.testing.assert_allclose(cells.mean((1, 2)), one.plain, atol=1e-4)
            np.testing.assert_allclose(np.where(cells > 0, 5 * cells, cells).mean((1, 2)), one.logit, atol=1e-4)
            np.testing.assert_allclose(one.probability, 1 / (1 + np.exp(-one.logit.astype(np.float64))), atol=1e-12)
            np.testing.assert_array_equal(one.positive_fraction, (cells > 0).mean((1, 2)))
        with Image.open(split.path(7)) as image:
            # JPEG decoders differ by a few levels.
            assert np.abs(explained[7].image.astype(int) - np.asarray(image.convert("RGB"), int)).mean() < 3

    def test_choose_classes(self) -> None:
        logits = torch.tensor([[0.0, 3, 3, 1], [4, 0, 1, 2]])
        assert choose_classes(logits, 3).tolist() == [[1, 2, 3], [0, 3, 2]]
        assert choose_classes(logits, 9).shape == (2, 4)
        assert choose_classes(logits, 3, [[0, 3], []]).tolist() == [[0, 3, 1], [0, 3, 2]]
        assert choose_classes(logits, 1, [[2], [1]]).tolist() == [[2], [1]]

    def test_diverged_run_is_named(self, run: Path, image_path: Path) -> None:
        config, manifest, classifier, _ = load_run(run, CPU)
        with torch.no_grad():
            classifier.head.bias[3] = float("nan")
        files = ImageFiles([str(image_path)], np.ones(1, np.uint8))
        with pytest.raises(UserError, match=r"score of class 3 is not a number for .*jpg"):
            list(explain.explain(classifier, config, files, CPU, alpha=1, classes=manifest.classes, top=2))


class TestChoice:
    """Images of a split."""

    def test_a_third_each_and_every_image_once(self) -> None:
        def ranked(code: int, index: list[int]) -> Suggestions:
            ids = np.arange(len(index))
            return Suggestions(code, np.array(index), ids, np.full(len(index), 0.5), len(index))

        mistakes = [ranked(NEGATIVE, [4, 4, 7, 1, 2]), ranked(POSITIVE, [7, 9])]
        chosen = choose_samples(mistakes, 12, 6, seed=1)
        assert chosen[:2] == [Choice(4, "false positive", 0), Choice(7, "false positive", 2)]
        assert chosen[2] == Choice(9, "missed positive", 1)
        assert {c.reason for c in chosen[3:]} == {"at random"} and len({c.index for c in chosen}) == 6
        assert chosen == choose_samples(mistakes, 12, 6, seed=1) != choose_samples(mistakes, 12, 6, seed=2)
        assert sorted(c.index for c in choose_samples(mistakes, 12, 99, seed=0)) == list(range(12))
        assert [c.index for c in choose_samples(mistakes, 12, 1, seed=0)] == [4]

    def test_labels(self, small_digits: Path, run: Path) -> None:
        config, manifest, classifier, _ = load_run(run, CPU)
        split = manifest.split("train")
        known, seen = split.known.rows(range(20)), split.observed.rows(range(20))
        index = int(np.flatnonzero((known == POSITIVE).sum(1) > 1)[0])
        files = ImageFiles([split.path(index)], np.ones(1, np.uint8))
        (explained,) = explain.explain(classifier, config, files, CPU, alpha=5, classes=manifest.classes, top=10)
        labelled = with_labels(explained, split, Choice(index, "missed positive", 3), manifest.classes)
        assert labelled.reason == "missed positive: 3" and labelled.path == split.relative_path(index)
        assert labelled.labels is not None and labelled.known is not None
        assert labelled.labels[0] == np.flatnonzero(seen[index] == POSITIVE).tolist()
        assert sorted(labelled.labels[0] + labelled.labels[1]) == np.flatnonzero(known[index] == POSITIVE).tolist()
        for place, class_id in enumerate(labelled.classes):
            right = (labelled.probability[place] >= 0.5) == (known[index, class_id] == POSITIVE)
            assert labelled.wrong(place) != right and not explained.wrong(place)


class TestCommand:
    """From the command line to files."""

    def test_sheet_of_the_run(self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        drawn: list[explain.Explained] = []
        plain = explain_drawing.draw

        def watch(out: Path, images: list[explain.Explained], *rest: Any) -> int:
            drawn.extend(images)
            return plain(out, images, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(explain_drawing, "draw", watch)
            assert call("--run", run, "--count", 7, "--out", tmp_path / "a.png", "--split", "train") == 0
        assert capsys.readouterr().out == f"{tmp_path / 'a.png'}: 7 images\n"
        assert [d.reason.split(":")[0] for d in drawn].count("at random") == 3
        _, manifest, _, _ = load_run(run, CPU)
        for image in drawn:
            assert image.boxes is not None and image.known is not None
            assert [len(b) > 0 for b in image.boxes] == (image.known == POSITIVE).tolist()
            if image.reason != "at random":
                assert image.reason.split(": ")[1] == manifest.classes[image.classes[0]] and image.wrong(0)
        with Image.open(tmp_path / "a.png") as page:
            assert (
                page.format == "PNG" and 400 < page.width < 3000 and page.convert("RGB").getextrema()[0] != (255, 255)
            )
        assert [p.name for p in tmp_path.iterdir()] == ["a.png"]

    def test_images_maps_and_broken_files(
        self, run: Path, image_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        photos = tmp_path / "photos"
        photos.mkdir()
        shutil.copy(image_path, photos / "a $1$.jpg")
        with Image.open(image_path) as image:
            exif = Image.Exif()
            exif[0x0112] = 6
            image.resize((90, 30)).save(photos / "b.png", exif=exif)
        (photos / "cut.jpg").write_bytes(image_path.read_bytes()[:900])
        options = ("--classes", "y", "--classes", NAMES[2], "--maps", tmp_path / "maps", "--out", tmp_path / "pages")
        assert call("--run", run, photos, *options) == 1
        output = capsys.readouterr()
        assert f"left out: {photos / 'cut.jpg'}: damaged" in output.err and "1 left out" in output.out
        assert "no font of this machine has the characters of 1 class names" in output.err
        assert sorted(p.name for p in (tmp_path / "pages").iterdir()) == ["0000-a--1-.png", "0001-b.png"]
        metadata = json.loads((tmp_path / "maps" / "maps.json").read_text(encoding="utf-8"))
        assert metadata["alpha"] == 5 and [m["class"] for m in metadata["maps"]] == ["y", NAMES[2]] * 2
        assert [m["path"] for m in metadata["maps"]] == [str(photos / n) for n in ("a $1$.jpg",) * 2 + ("b.png",) * 2]
        for entry in metadata["maps"]:
            cells = np.load(tmp_path / "maps" / entry["file"])
            assert cells.dtype == np.float32 and cells.mean() == pytest.approx(entry["logit_alpha_1"], abs=1e-4)
        assert len(list((tmp_path / "maps").iterdir())) == 5

    def test_what_the_loader_alone_refuses_is_left_out(
        self,
        run: Path,
        image_path: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture,
    ) -> None:
        # Headers alone are looked at, so the image that is cut off gets as far as the decoder.
        monkeypatch.setattr(image_check, "DECODE_LIMIT", 0)
        for name, size in (("a.jpg", None), ("b.jpg", 900), ("c.jpg", None)):
            (tmp_path / name).write_bytes(image_path.read_bytes()[:size])
        page = tmp_path / "page.png"
        assert call("--run", run, tmp_path, "--out", page, "--maps", tmp_path / "maps", "--top", 1) == 1
        output = capsys.readouterr()
        assert output.err.count("left out: ") == 1 and f"left out: {tmp_path / 'b.jpg'}: damaged" in output.err
        assert "2 images; 1 left out" in output.out and page.is_file()
        metadata = json.loads((tmp_path / "maps" / "maps.json").read_text(encoding="utf-8"))
        assert [Path(m["path"]).name for m in metadata["maps"]] == ["a.jpg", "c.jpg"]
        with pytest.raises(UserError, match="none of the images can be used"):
            call("--run", run, tmp_path / "b.jpg", "--out", tmp_path / "other.png")
        assert not (tmp_path / "other.png").exists()

    def test_aspect_follows_the_orientation(self, tmp_path: Path, image_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (90, 30)).save(tmp_path / "b.png", exif=exif)
        for orientation, aspect in (("exif", 1 / 3), ("ignore", 3)):
            arguments = ["--run", "x", "--orientation", orientation, str(tmp_path / "b.png")]
            parsed = explain_command.parse(arguments)
            files, aspects, missing = explain_command.given_images(parsed, max_pixels=10_000)
            assert aspects == [pytest.approx(aspect)] and missing == 0 and len(files) == 1

    def test_sharded_split(self, run: Path, small_digits: Path, tmp_path: Path) -> None:
        pack(PackOptions(small_digits, tmp_path / "shards", shard_size=10**7, workers=1, progress=False))
        sharded = make_run(tmp_path / "run", tmp_path / "shards", "digits.yaml", 30)
        for name, where in (("files", run), ("tars", sharded)):
            assert call("--run", where, "--count", 2, "--maps", tmp_path / name, "--out", tmp_path / "a.png") == 0
        one, two = (json.loads((tmp_path / n / "maps.json").read_text())["maps"] for n in ("files", "tars"))
        assert [(m["path"], m["class"]) for m in one] == [(m["path"], m["class"]) for m in two]
        assert [m["logit"] for m in one] == pytest.approx([m["logit"] for m in two], abs=1e-4)

    def test_maps_are_whole_or_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt), MapFolder(tmp_path / "maps", {}):
            raise KeyboardInterrupt
        assert not list(tmp_path.iterdir())
        with MapFolder(tmp_path / "maps", {"alpha": 1}):
            pass
        assert json.loads((tmp_path / "maps" / "maps.json").read_text()) == {"alpha": 1, "maps": []}
        with pytest.raises(UserError, match="maps exists and is not an empty folder; choose another --maps"):
            MapFolder(tmp_path / "maps", {})


def test_other_peoples_pictures_are_not_replaced(run: Path, image_path: Path, tmp_path: Path) -> None:
    (tmp_path / "maps.png").write_bytes(image_path.read_bytes())
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "0007-holiday.png").write_bytes(b"mine")
    for out in ("maps.png", "pages"):
        with pytest.raises(UserError, match=r"png exists and was not written by this command"):
            call("--run", run, "--out", tmp_path / out, image_path)
    assert (tmp_path / "maps.png").read_bytes() == image_path.read_bytes()
    call("--run", run, "--out", tmp_path / "maps.png", "--overwrite", image_path)
    call("--run", run, "--out", tmp_path / "maps.png", image_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--run RUN --top 0", "--top is 0; it must be at least 1"),
        ("--run RUN --count 0", "--count is 0"),
        ("--run RUN --count 101", "--count is 101; a page holds 100 at most"),
        ("--run RUN --seed -1", "--seed is -1; it must not be negative"),
        ("--run RUN --alpha inf IMAGE", "--alpha is inf"),
        ("--run RUN --classes trafic_light IMAGE", "no class 'trafic_light'; did you mean traffic light"),
        ("--run RUN --classes x --top 2 IMAGE", "give --top or --classes, not both"),
        ("--run RUN --boosted IMAGE", "--boosted is a column of a comparison"),
        ("--run RUN --against RUN --maps TMP/m IMAGE", "--maps writes the maps of one run"),
        ("--run RUN --against TMP", "is not a run directory"),
        ("--run RUN --against RUN IMAGE", "jpg is not a run directory; it takes run directories alone, so give images"),
        ("--run RUN --against RUN --count 90 --top 3", "90 images have 270 rows, one for each class; a page holds 120"),
        ("--run RUN --split test IMAGE", "--split chooses among the run's own images"),
        ("--run RUN --out TMP/a.jpg IMAGE", "a.jpg must be a file named .png, or a folder"),
        ("--run RUN --out TMP/file/a.png IMAGE", "a.png cannot be written: "),
        ("--run RUN TMP/gone.jpg", "gone.jpg cannot be read: No such file"),
        ("--run RUN TMP/file", "none of the 1 images can be used"),
        ("--run RUN --split nowhere", "has no split 'nowhere'"),
        ("--run TMP IMAGE", "is not a run directory"),
    ],
)
def test_what_users_get_wrong(arguments: str, message: str, run: Path, image_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no image")
    arguments = arguments.replace("RUN", str(run)).replace("IMAGE", str(image_path)).replace("TMP", str(tmp_path))
    with pytest.raises(UserError, match=message):
        call(*arguments.split())
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_several_ranks_are_refused(run: Path, image_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="works in one process"):
        call("--run", run, image_path)
