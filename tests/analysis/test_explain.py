"""Maps over images: the figures of the head, what is chosen, what is drawn and written, and what users get wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import font_manager
from PIL import Image
from torch.nn import functional as F

from spml_fast.analysis import compare_page, explain, explain_page
from spml_fast.analysis.compare import mask_of, run_titles
from spml_fast.analysis.explain import Choice, choose_classes, choose_samples, with_labels
from spml_fast.analysis.explain_page import MapFolder, displayable_names, tint
from spml_fast.analysis.suggest import Suggestions
from spml_fast.cli import explain as explain_command
from spml_fast.cli.parse import parse_config
from spml_fast.core.errors import UserError
from spml_fast.core.io import printable
from spml_fast.data import image_check
from spml_fast.data.image_files import ImageFiles
from spml_fast.data.labels import NEGATIVE, POSITIVE
from spml_fast.data.manifest import Manifest
from spml_fast.evaluation.evaluate import score_split
from spml_fast.models.classifier import Classifier
from spml_fast.models.weights import save_weights
from spml_fast.prepare.pack import PackOptions, pack
from spml_fast.runs.open import input_normalisation, load_run, make_eval_loader
from spml_fast.runs.recipe import to_yaml
from tests.support.paths import ROOT

CPU = torch.device("cpu")
NAMES = ["a $x_1^2$ b", "traffic light", "\u732b\U0001f408\u200b\ue000", "\u0441\u043e\u0431\u0430\u043a\u0430"]
NAMES += ["W" * 60, r"\frac{1}", "$", "{}<b>", "x", "y"]


def call(*arguments: object) -> int:
    """Run the command in this process; a user error stays an exception."""
    return int(explain_command.main([str(a) for a in arguments]))


@pytest.fixture(autouse=True)
def _same_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, and no fonts but those that come with matplotlib."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    own = [f for f in font_manager.fontManager.ttflist if "mpl-data" in f.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)


def make_run(folder: Path, data: Path, recipe: str, scale: float, *more: str, seed: int = 3) -> Path:
    """A run with random weights."""
    folder.mkdir()
    arguments = ["--config", str(ROOT / "launch" / "configs" / recipe), "--data.dir", str(data)]
    config = parse_config([*arguments, "--train.precision", "fp32", "--eval.batch_size", "32", *more])
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in NAMES), encoding="utf-8")
    torch.manual_seed(seed)
    classifier = Classifier(config.model, 10, config.data.image_size)
    if recipe == "digits.yaml":
        with torch.no_grad():
            classifier.head.weight *= scale
    save_weights(folder / "model.safetensors", classifier, {})
    return folder


@pytest.fixture(scope="module")
def run(small_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CAM run with random weights and large logits."""
    return make_run(tmp_path_factory.mktemp("explain") / "run", small_digits, "digits.yaml", 30)


@pytest.fixture(scope="module")
def ignore(small_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of IGNORE with other random weights."""
    folder = tmp_path_factory.mktemp("ignore") / "ignore"
    return make_run(folder, small_digits, "digits.yaml", 30, "--method", "ignore", seed=4)


@pytest.fixture(scope="module")
def image_path(small_digits: Path) -> Path:
    """A digit scene."""
    return Path(Manifest(small_digits).split("test").path(0))


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


class TestDrawing:
    """Colours, text and pages."""

    def test_tint(self) -> None:
        grey = np.full((1, 5, 3), 0.5)
        red, _, blue = np.moveaxis(tint(grey, np.array([[-1, -0.2, 0, 0.2, 1]])), -1, 0)
        balance = (red - blue)[0]
        assert balance[2] == 0 and (np.diff(balance) > 0).all() and balance[0] < 0 < balance[4]

    def test_the_image_stays_visible_under_a_map(self) -> None:
        """Black and white stay apart where evidence is strongest, and no evidence leaves the image as it is."""
        image = np.zeros((40, 40, 3), np.uint8)
        image[:, ::2] = 255
        for value in (-4, 4):
            out = explain_page.overlay(image, np.full((2, 2), value, np.float32), 4)
            assert np.abs(out[0, 0] - out[0, 1]).min() > 0.15
        empty = explain_page.overlay(image, np.zeros((2, 2), np.float32), 4)
        negative = np.full((2, 2), -3, np.float32)
        np.testing.assert_array_equal(explain_page.overlay(image, negative, 4, positive_only=True), empty)
        assert not np.array_equal(explain_page.overlay(image, negative, 4), empty)
        np.testing.assert_array_equal(
            explain_page.overlay(image, -negative, 4, True), explain_page.overlay(image, -negative, 4)
        )

    def test_overlay_follows_the_map(self) -> None:
        cells = np.array([[4, 0], [0, -4]], np.float32)
        out = explain_page.overlay(np.full((40, 40, 3), 128, np.uint8), cells, 4)
        assert out.shape == (40, 40, 3) and out.min() >= 0 and out.max() <= 1
        assert out[0, 0, 0] > out[0, 0, 2] and out[-1, -1, 0] < out[-1, -1, 2]
        np.testing.assert_allclose(out, np.transpose(out, (1, 0, 2)), atol=1e-6)

    @settings(max_examples=25, deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=90), st.sampled_from([0.0, 0.7, 1.0]))
    @pytest.mark.filterwarnings("ignore:Glyph")
    def test_text_keeps_within_its_room(self, text: str, keep: float) -> None:
        page = explain_page.Page(5, 2, ["DejaVu Sans"])
        page.text(0.1, 0.1, printable(text) + "W" * 30, 1.5, keep=keep)
        (artist,) = page.figure.texts
        assert artist.get_window_extent(page._renderer).width / explain_page._DPI <= 1.5
        assert not artist.get_parse_math()
        assert "\u2026" in artist.get_text()

    def test_names_that_no_font_has_stand_as_ids(self) -> None:
        names, families, undrawable = displayable_names(NAMES, {0, 2, 3})
        assert names == {0: NAMES[0], 2: "class 2", 3: NAMES[3]} and undrawable == 1 and families[0] == "DejaVu Sans"
        # A character that DejaVu Sans lacks and another of matplotlib's fonts has.
        names, families, undrawable = displayable_names(["\u2a5c"], {0})
        assert names == {0: "\u2a5c"} and undrawable == 0 and len(families) == 2

    @pytest.mark.parametrize(("count", "width"), [(1, 3.0), (9, 8.4), (40, 8.4), (100, 30.0)])
    def test_pages_are_no_ribbons(self, count: int, width: float) -> None:
        across = explain_page._across(count, width, 2.6)
        assert 1 <= across <= count and (across == 1 or across * width <= 26)
        assert width > 26 or 0.4 < across * width / (-(-count // across) * 2.6) < 4


class TestCommand:
    """From the command line to files."""

    def test_sheet_of_the_run(self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        drawn: list[explain.Explained] = []
        plain = explain_page.draw

        def watch(out: Path, images: list[explain.Explained], *rest: object) -> int:
            drawn.extend(images)
            return plain(out, images, *rest)  # type: ignore[arg-type]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(explain_page, "draw", watch)
            assert call("--run", run, "--count", 7, "--out", tmp_path / "a.png", "--split", "train") == 0
        assert capsys.readouterr().out == f"{tmp_path / 'a.png'}: 7 images\n"
        assert [d.reason.split(":")[0] for d in drawn].count("at random") == 3
        _, manifest, _, _ = load_run(run, CPU)
        for image in drawn:
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

    def test_query2label(self, small_digits: Path, image_path: Path, tmp_path: Path) -> None:
        q2l = make_run(tmp_path / "run", small_digits, "digits_q2l.yaml", 1)
        assert call("--run", q2l, image_path, "--maps", tmp_path / "maps", "--top", 2) == 0
        with Image.open(q2l / "explain.png") as page:
            assert page.width > 400
        maps = json.loads((tmp_path / "maps" / "maps.json").read_text())["maps"]
        assert len(maps) == 2 and maps[0]["logit"] == maps[0]["logit_alpha_1"] >= maps[1]["logit"]
        with pytest.raises(UserError, match="alpha 5 has no meaning for head query2label"):
            call("--run", q2l, "--alpha", 5, image_path)

    def test_maps_are_whole_or_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt), MapFolder(tmp_path / "maps", {}):
            raise KeyboardInterrupt
        assert not list(tmp_path.iterdir())
        with MapFolder(tmp_path / "maps", {"alpha": 1}):
            pass
        assert json.loads((tmp_path / "maps" / "maps.json").read_text()) == {"alpha": 1, "maps": []}
        with pytest.raises(UserError, match="maps exists and is not an empty folder; choose another --maps"):
            MapFolder(tmp_path / "maps", {})


class TestComparison:
    """Maps of several runs beside each other."""

    def test_columns(self, run: Path, ignore: Path, small_digits: Path, tmp_path: Path) -> None:
        """Every column looks at the same classes with its own network; masks are those of training."""
        drawn: list[compare_page.Column] = []
        plain = compare_page.draw_comparison

        def watch(out: Path, columns: list[compare_page.Column], images: list[explain.Explained], *rest: object) -> int:
            drawn.extend(columns)
            assert images is columns[1].images and images[0].labels is not None
            return plain(out, columns, images, *rest)  # type: ignore[arg-type]

        out = tmp_path / "page.png"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compare_page, "draw_comparison", watch)
            words = ["--run", run, "--against", ignore, "--against", run, "--count", 3, "--top", 2, "--out", out]
            assert call(*words, "--boosted", "--positive-only") == 0
        assert [(c.title, c.boosted) for c in drawn] == [(str(ignore), False), (str(run), True), (str(run), False)]
        config, _, classifier, _ = load_run(ignore, CPU)
        mask = mask_of(config)
        assert mask is not None and mask.threshold == 0.8 and mask_of(load_run(run, CPU)[0]) is None
        mean, std = (torch.tensor(v)[:, None, None] * 255 for v in input_normalisation(config, classifier))
        for place, image in enumerate(drawn[0].images):
            assert all(np.array_equal(image.classes, column.images[place].classes) for column in drawn)
            np.testing.assert_array_equal(drawn[1].images[place].maps, drawn[2].images[place].maps)
            assert drawn[1].images[place].kept is None and image.kept is not None and image.masked_logit is not None
            for k in range(2):
                low, high = image.maps[k].min(), image.maps[k].max()
                large = F.interpolate(
                    torch.from_numpy((image.maps[k] - low) / (high - low))[None, None],
                    size=image.image.shape[:2],
                    mode="bilinear",
                    align_corners=False,
                )[0, 0].numpy()
                sure = np.abs(large - 0.8) > 1e-4
                assert np.array_equal(image.kept[k][sure], (large > 0.8)[sure]) and 0 < image.kept[k].mean() < 0.6
                view = (torch.from_numpy(image.image).permute(2, 0, 1) - mean) / std
                view = torch.where(torch.from_numpy(image.kept[k]), view, 0)[None]
                with torch.no_grad():
                    logit = classifier(view, alpha=5.0).logits[0, int(image.classes[k])]
                assert image.masked_logit[k] == pytest.approx(float(logit), abs=0.05)
        with Image.open(out) as page:
            # The image, two maps of IGNORE's more than the others have, and the boosted map.
            across = 1 + 3 + 2 + 1
            assert page.width > across * 1.9 * 110 and page.height > 6 * 2.5 * 110

    def test_panels(self) -> None:
        cells = np.array([[1.0, -2.0], [3.0, 0.0]], np.float32)
        np.testing.assert_array_equal(compare_page.boosted_map(cells, 5), [[5, -2], [15, 0]])
        assert compare_page.correlation_text(cells, 2 * cells + 1, "full") == "rank correlation 1.00 with full"
        assert compare_page.correlation_text(cells, -cells, "full") == "rank correlation -1.00 with full"
        assert compare_page.correlation_text(cells, cells[:1], "full") == "a map of another size than full's"
        assert compare_page.correlation_text(0 * cells, cells, "full") == "a flat map"
        assert run_titles([Path("a/x"), Path("b/y")]) == ["x", "y"]
        assert run_titles([Path("a/x"), Path("b/x")]) == ["a/x", "b/x"]

    def test_other_classes(self, run: Path, ignore: Path, image_path: Path, tmp_path: Path) -> None:
        other = tmp_path / "other"
        shutil.copytree(ignore, other)
        (other / "classes.txt").write_text("".join(f"{i}\n" for i in range(10)), encoding="utf-8")
        with pytest.raises(UserError, match="was trained on other classes; compare runs of the same ones"):
            call("--run", run, "--against", other, image_path, "--out", tmp_path / "a.png")


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
        ("--run RUN --against RUN --out TMP/folder IMAGE", "folder must be named .png: a comparison is one page"),
        ("--run RUN --against TMP IMAGE", "is not a run directory"),
        ("--run RUN --against RUN --count 90 --top 3", "a comparison of 90 images has 270 rows, one for each class"),
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
