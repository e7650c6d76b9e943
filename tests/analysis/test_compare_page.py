"""Maps of several runs beside each other, and the masks of IGNORE."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from spml_fast.analysis import compare_page, explain, explain_drawing, explain_layout
from spml_fast.analysis.compare import mask_of, run_about, run_titles
from spml_fast.analysis.explain import Explained
from spml_fast.analysis.explain_layout import PANEL, Block, ColourBar
from spml_fast.analysis.predict import load_images
from spml_fast.core.batch import Batch
from spml_fast.core.errors import UserError
from spml_fast.core.io import printable
from spml_fast.data.image_files import ImageFiles
from spml_fast.data.labels import LabelStore, SparseLabels
from spml_fast.methods.ignore import Ignore
from spml_fast.models.heads import MaskOptions
from spml_fast.runs.open import input_normalisation, load_run
from tests.support.explain import call, example, make_run

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("plain_page")


class TestComparison:
    """Maps of several runs beside each other."""

    def test_columns(self, run: Path, ignore: Path, small_digits: Path, tmp_path: Path) -> None:
        """Every column looks at the same classes with its own network; masks are those of training."""
        drawn: list[compare_page.Column] = []
        plain = explain_drawing.draw_comparison

        def watch(out: Path, columns: list[compare_page.Column], images: list[explain.Explained], *rest: Any) -> int:
            drawn.extend(columns)
            assert images is columns[1].images and images[0].labels is not None
            return plain(out, columns, images, *rest)

        out = tmp_path / "page.png"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(explain_drawing, "draw_comparison", watch)
            words = ["--run", run, "--against", ignore, run, "--count", 3, "--top", 2, "--out", out]
            assert call(*words, "--boosted", "--positive-only") == 0
        assert [(c.title, c.boosted) for c in drawn] == [(str(ignore), False), (str(run), True), (str(run), False)]
        assert [c.about for c in drawn] == [
            "ignore, alpha 5 in training, 5 here",
            *["ll_r, alpha 5 in training, 5 here"] * 2,
        ]
        config, _, classifier, _ = load_run(ignore, CPU)
        mask = mask_of(config)
        assert (
            mask is not None
            and mask.options.threshold == 0.8
            and mask.scale == 1
            and mask_of(load_run(run, CPU)[0]) is None
        )
        mean, std = (torch.tensor(v)[:, None, None] * 255 for v in input_normalisation(config, classifier))
        for place, image in enumerate(drawn[0].images):
            assert all(np.array_equal(image.classes, column.images[place].classes) for column in drawn)
            np.testing.assert_array_equal(drawn[1].images[place].maps, drawn[2].images[place].maps)
            assert image.boxes is drawn[1].images[place].boxes and image.known is drawn[1].images[place].known
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
            # Training and this page have the same alpha.
            np.testing.assert_allclose(image.full_logit, image.logit, atol=1e-5)
        with Image.open(out) as page:
            # The image, two maps of IGNORE's more than the others have, and the boosted map.
            across = 1 + 3 + 2 + 1
            assert page.width > across * 1.9 * 110 and page.height > 6 * 2.5 * 110

    def test_masks_are_those_of_training(self, ignore: Path, image_path: Path) -> None:
        """The masked image is what the method makes of an image whose observed label is the class."""
        config, manifest, classifier, _ = load_run(ignore, CPU)
        mask = mask_of(config)
        assert mask is not None
        files = ImageFiles([str(image_path)], np.ones(1, np.uint8))
        images = explain.explain(classifier, config, files, CPU, alpha=1.0, classes=manifest.classes, top=2, mask=mask)
        (image,) = images
        ((_, views),) = load_images(classifier, config, files, CPU)
        assert views is not None and image.kept is not None
        assert image.masked_logit is not None and image.full_logit is not None
        for k, class_id in enumerate(image.classes.tolist()):
            codes = torch.full((1, 10), -1, dtype=torch.int8)
            codes[0, class_id] = 1
            store = LabelStore(SparseLabels.from_dense(codes.numpy(), -1), CPU)
            method = Ignore(config.method, store)
            batch = Batch({"weak": views, "strong": views}, codes, torch.zeros(1, dtype=torch.int64), 1)
            with torch.no_grad():
                logits, masked = method._weak(classifier, batch, True)
                wanted = method._masked(classifier, masked)[0, class_id]
            assert np.array_equal(image.kept[k], (masked[0] != 0).any(0).numpy())
            assert image.masked_logit[k] == pytest.approx(float(wanted), abs=1e-4)
            # Training looks at the alpha of training, whatever the page's is.
            assert image.full_logit[k] == pytest.approx(float(logits[0, class_id]), abs=1e-4)
            assert image.full_logit[k] != pytest.approx(image.logit[k], abs=1e-3)

    def test_a_run_of_ignore_shows_its_masks(self, ignore: Path, image_path: Path, tmp_path: Path) -> None:
        out = tmp_path / "pages"
        assert call("--run", ignore, image_path, "--top", 2, "--out", out, "--maps", tmp_path / "maps") == 0
        (page,) = out.iterdir()
        with Image.open(page) as drawn:
            # Two rows of the image, its map, the mask, the masked image; one beneath the other, or beside it.
            blocks = round(drawn.width / (4 * (PANEL + 0.12) * explain_layout.DPI))
            assert blocks * drawn.height > 2 * 2.6 * explain_layout.DPI and drawn.width > 4 * 1.9 * explain_layout.DPI

    def test_a_page_for_each_image(self, run: Path, ignore: Path, image_path: Path, tmp_path: Path) -> None:
        shutil.copy(image_path, tmp_path / "a.jpg")
        shutil.copy(image_path, tmp_path / "b.jpg")
        words = [tmp_path / "a.jpg", tmp_path / "b.jpg", "--against", ignore, "--top", 1, "--out", tmp_path / "pages"]
        assert call("--run", run, *words) == 0
        first, second = sorted((tmp_path / "pages").iterdir())
        with Image.open(first) as a, Image.open(second) as b:
            assert a.size == b.size and a.width > 5 * 1.9 * explain_layout.DPI

    def test_evidence_beside_attention(self, run: Path, small_digits: Path, image_path: Path, tmp_path: Path) -> None:
        q2l = make_run(tmp_path / "q2l", small_digits, "digits_q2l.yaml", 1)
        drawn: list[tuple[str, list[ColourBar], list[Block]]] = []

        def watch(out: Path, title: str, bars: list[ColourBar], notes: Any, blocks: list[Block], *rest: Any) -> None:
            drawn.append((title, bars, blocks))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compare_page, "draw_page", watch)
            call("--run", run, image_path, "--against", q2l, "--top", 1, "--out", tmp_path / "a.png")
        ((title, bars, blocks),) = drawn
        assert len(bars) == 2 and title == "2 runs, 64 px"
        texts = [[line.text for line in panel.lines] for panel in blocks[0].panels]
        assert [t[0] for t in texts[1:]] == ["q2l", "q2l: mask", "q2l: masked image", "run"]
        assert texts[1][1] == "ignore, head query2label" and texts[1][-1].startswith("attention, peak 0.")
        assert texts[2][-1] == "this map: attention x mean feature"
        assert texts[4][-2] == "another kind of map than q2l's"

    def test_panels(self) -> None:
        cells = np.array([[1.0, -2.0], [3.0, 0.0]], np.float32)
        np.testing.assert_array_equal(compare_page.boxed_image(example(), [0], []).pixels, example().image)
        np.testing.assert_array_equal(compare_page.boosted_map(cells, 5), [[5, -2], [15, 0]])

        def said(one: Explained, other: Explained) -> str:
            return compare_page.correlation_text(one, other, 0, "full")

        assert said(example(), example(scale=3)) == "rank correlation 1.00 with full"
        assert said(example(), example(scale=-1)) == "rank correlation -1.00 with full"
        assert said(example(), example("attention")) == "another kind of map than full's"
        assert said(example(), example(maps=np.zeros((2, 1, 2), np.float32))) == "a map of another size than full's"
        assert said(example(scale=0), example()) == "a flat map"

    def test_mask_panels(self) -> None:
        kept = np.zeros((2, 8, 8), bool)
        kept[0, :, :2] = True
        numbers = {"full_logit": np.array([3.0, 0], np.float32), "masked_logit": np.array([-1.5, 0], np.float32)}
        image = example(kept=kept, **numbers)
        mask = explain.MaskedView(MaskOptions(0.8, "batch_rawmax", 16), 1)
        column = compare_page.Column("run", "ignore", 5, [image], mask=mask, mask_alpha=1)
        white, masked = compare_page.mask_panels(column, image, 0)
        assert [line.text for line in white.lines] == [
            "run: mask",
            "map above 0.8: 25% kept",
            "each map scaled to 0..1 by itself,",
            "in training together with its batch",
        ]
        assert [line.text for line in masked.lines][1:] == [
            "logit 3.00, masked -1.50",
            "gap 4.50, at alpha 1 of training",
        ]
        assert (white.pixels[:, :2] == 255).all() and not white.pixels[:, 2:].any()
        assert (masked.pixels[:, :2] == 90).all() and (masked.pixels[:, 2:] == 127).all()
        assert compare_page.mask_panels(column, example(), 0) == []

    def test_names_of_runs(self, tmp_path: Path) -> None:
        assert run_titles([Path("a/x"), Path("b/y")]) == ["x", "y"]
        assert run_titles([Path("s0/an"), Path("s1/an"), Path("s1/full")]) == ["s0/an", "s1/an", "s1/full"]
        assert run_titles([Path("a/x"), Path("a/x")]) == ["a/x", "a/x"]
        assert run_titles([Path("a\nb")]) == [printable("a\nb")] != ["a\nb"]

    def test_what_a_run_is_about(self, run: Path) -> None:
        config, _, classifier, _ = load_run(run, CPU)
        assert run_about(config, classifier) == "ll_r, alpha 5 in training, 5 here"
        classifier.alpha_train = classifier.alpha_eval = 1
        assert run_about(config, classifier) == "ll_r, without BoostLU"

    def test_other_classes(self, run: Path, ignore: Path, image_path: Path, tmp_path: Path) -> None:
        other = tmp_path / "other"
        shutil.copytree(ignore, other)
        (other / "classes.txt").write_text("".join(f"{i}\n" for i in range(10)), encoding="utf-8")
        with pytest.raises(UserError, match="was trained on other classes; compare runs of the same ones"):
            call("--run", run, image_path, "--against", other, "--out", tmp_path / "a.png")
