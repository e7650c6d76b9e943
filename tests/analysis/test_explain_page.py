"""Pages of maps: colours, text, layout, and that each kind of map is drawn as what it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from spml_fast.analysis import explain, explain_colours, explain_layout
from spml_fast.analysis.explain_colours import colour_scales, tint
from spml_fast.analysis.explain_layout import PANEL, Block, Line, Page, Panel, block_size, displayable_names
from spml_fast.analysis.explain_page import colour_bars, image_block, map_panel, page_notes
from spml_fast.core.errors import UserError
from spml_fast.core.io import printable
from spml_fast.data.image_files import ImageFiles
from spml_fast.data.labels import POSITIVE
from spml_fast.runs.open import load_run
from tests.support.explain import NAMES, call, example, make_run

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("plain_page")


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
            out = explain_colours.overlay(image, np.full((2, 2), value, np.float32), 4)
            assert np.abs(out[0, 0] - out[0, 1]).min() > 0.15
        empty = explain_colours.overlay(image, np.zeros((2, 2), np.float32), 4)
        negative = np.full((2, 2), -3, np.float32)
        np.testing.assert_array_equal(explain_colours.overlay(image, negative, 4, positive_only=True), empty)
        assert not np.array_equal(explain_colours.overlay(image, negative, 4), empty)
        np.testing.assert_array_equal(
            explain_colours.overlay(image, -negative, 4, True), explain_colours.overlay(image, -negative, 4)
        )

    def test_overlay_follows_the_map(self) -> None:
        cells = np.array([[4, 0], [0, -4]], np.float32)
        out = explain_colours.overlay(np.full((40, 40, 3), 128, np.uint8), cells, 4)
        assert out.shape == (40, 40, 3) and out.min() >= 0 and out.max() <= 1
        assert out[0, 0, 0] > out[0, 0, 2] and out[-1, -1, 0] < out[-1, -1, 2]
        np.testing.assert_allclose(out, np.transpose(out, (1, 0, 2)), atol=1e-6)

    @settings(max_examples=25, deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=90), st.sampled_from([0.0, 0.7, 1.0]))
    @pytest.mark.filterwarnings("ignore:Glyph")
    def test_text_keeps_within_its_room(self, text: str, keep: float) -> None:
        page = Page(5, 2, ["DejaVu Sans"])
        page.text(0.1, 0.1, printable(text) + "W" * 30, 1.5, keep=keep)
        (artist,) = page.figure.texts
        assert artist.get_window_extent(page._renderer).width / explain_layout.DPI <= 1.5
        assert not artist.get_parse_math()
        assert "\u2026" in artist.get_text()

    def test_names_that_no_font_has_stand_as_ids(self) -> None:
        names, families, undrawable = displayable_names(NAMES, {0, 2, 3})
        assert names == {0: NAMES[0], 2: "class 2", 3: NAMES[3]} and undrawable == 1 and families[0] == "DejaVu Sans"
        # A character that DejaVu Sans lacks and another of matplotlib's fonts has.
        names, families, undrawable = displayable_names(["\u2a5c"], {0})
        assert names == {0: "\u2a5c"} and undrawable == 0 and len(families) == 2

    @pytest.mark.parametrize(("count", "width"), [(1, 3.0), (9, 7.96), (40, 7.96), (100, 30.0)])
    def test_pages_are_no_ribbons(self, count: int, width: float) -> None:
        across = explain_layout.across(width, [2.6] * count)
        assert 1 <= across <= count and (across == 1 or across * width <= 26)
        assert width > 26 or 0.4 < across * width / (-(-count // across) * 2.6) < 4

    def test_landscapes_and_portraits_fill_their_panels(self) -> None:
        for aspect in (0.6, 0.75, 1, 1.5, 4):
            width, height = explain_layout.panel_size(aspect)
            assert width == pytest.approx(PANEL) and width / height == pytest.approx(aspect)
        # Nothing is higher than two panels, in its own shape.
        width, height = explain_layout.panel_size(0.1)
        assert height == 2 * PANEL and width / height == pytest.approx(0.1)

    def test_blocks_go_where_there_is_room(self) -> None:
        places, height = explain_layout.columns_of([1.0, 3.0, 1.0, 1.0], 2)
        gap = 0.16
        assert [column for column, _ in places] == [0, 1, 0, 0]
        assert [top for _, top in places] == pytest.approx([0, 0, 1 + gap, 2 + 2 * gap])
        assert height == pytest.approx(3 + 2 * gap)
        assert explain_layout.columns_of([], 3)[1] == 0

    def test_captions_have_the_room_that_they_need(self) -> None:
        panel = Panel(np.zeros((4, 4, 3)), [Line("a")] * 5)
        flat = block_size(Block(1.0, [panel, Panel(np.zeros((4, 4, 3)), [])]))
        assert flat[1] - block_size(Block(1.0, [Panel(panel.pixels, panel.lines[:2])]))[1] == pytest.approx(3 * 0.135)


class TestKinds:
    """Evidence and attention are never drawn alike."""

    def test_each_kind_has_its_own_scale(self) -> None:
        images = [example(), example("attention", 50), example(scale=2)]
        scales = colour_scales(images)
        cells = np.abs(np.concatenate([images[0].maps.ravel(), images[2].maps.ravel()]))
        assert scales == {
            "evidence": pytest.approx(np.percentile(cells, 99)),
            "attention": pytest.approx(np.percentile(images[1].shown, 99)),
        }
        assert scales["evidence"] < 9 and scales["attention"] > 15
        evidence, attention = colour_bars(scales, False)
        assert [text for _, text in evidence.ticks][1] == "0" and evidence.meaning.startswith("evidence: red is for")
        assert [place for place, _ in attention.ticks] == [0, 1]
        assert attention.meaning.startswith("attention: ") and "not evidence" in attention.meaning
        (positive,) = colour_bars({"evidence": 3.0}, True)
        assert positive.ticks == [(0.0, "0"), (1.0, "3")] and "for the class alone" in positive.meaning

    def test_colours(self) -> None:
        grey, high = np.full((1, 1, 3), 0.5), np.ones((1, 1))
        red, green, blue = tint(grey, high, "attention")[0, 0]
        assert green > red and green > blue
        red, green, blue = tint(grey, high)[0, 0]
        assert red > green and red > blue

    def test_panels_say_what_they_are(self) -> None:
        texts: dict[explain.Kind, str] = {
            "evidence": "25% positive cells",
            "attention": "attention, peak 0.4",
            "map": "peak 4",
        }
        for kind, text in texts.items():
            panel = map_panel(example(kind), 0, [], 1.0, False)
            assert [line.text for line in panel.lines] == [text] and panel.boxes is None and panel.peak is None

    def test_boxes_and_peaks(self) -> None:
        inside, outside = np.array([[0, 0, 0.5, 0.5]], np.float32), np.array([[0, 0, 0.4, 0.9]], np.float32)
        image = example(boxes=(inside, outside), known=np.array([POSITIVE, POSITIVE], np.int8))
        assert [image.hit(k) for k in range(2)] == [True, False] and example().hit(0) is None
        first, second = (map_panel(image, k, [], 1.0, False) for k in range(2))
        assert first.lines[-1].text == "25% positive cells, peak inside"
        assert second.lines[-1].text == "75% positive cells, peak outside"
        assert first.boxes is inside and first.peak is not None and first.peak.tolist() == [0.25, 0.25]
        assert first.frame is None and second.frame is not None
        # A class without a box has neither a box nor a peak to mark.
        without = map_panel(example(boxes=(np.empty((0, 4), np.float32), inside)), 0, [], 1.0, False)
        assert without.peak is None and without.lines[-1].text == "25% positive cells"

    def test_block_of_an_image(self) -> None:
        block = image_block(example(), {0: "W" * 60, 3: "<b>"}, 5, {"evidence": 1.0}, False)
        assert block.aspect == 1.5 and [p.lines[0].text for p in block.panels] == ["a.jpg", "W" * 60, "<b>"]
        assert [line.text for line in block.panels[1].lines[1:3]] == [
            "probability 0.900",
            "logit 1.00, at alpha 5: 2.20",
        ]

    def test_query2label_shows_its_attention(self, small_digits: Path, image_path: Path, tmp_path: Path) -> None:
        q2l = make_run(tmp_path / "run", small_digits, "digits_q2l.yaml", 1, "--method", "an")
        config, manifest, classifier, _ = load_run(q2l, CPU)
        files = ImageFiles([str(image_path)], np.ones(1, np.uint8))
        (image,) = explain.explain(classifier, config, files, CPU, alpha=1, classes=manifest.classes, top=10)
        assert image.kind == "attention" and image.attention is not None and image.shown is image.attention
        assert image.attention.min() >= 0 and np.allclose(image.attention.sum((1, 2)), 1, atol=1e-5)
        # IGNORE's map is that times one map of features for all classes.
        ratio = image.maps / image.attention
        np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:1], ratio.shape), rtol=1e-3)
        assert call("--run", q2l, image_path, "--maps", tmp_path / "maps", "--top", 2) == 0
        maps = json.loads((tmp_path / "maps" / "maps.json").read_text())["maps"]
        assert [m["kind"] for m in maps] == ["attention"] * 2
        assert maps[0]["logit"] == maps[0]["logit_alpha_1"] >= maps[1]["logit"]
        assert np.load(tmp_path / "maps" / maps[0]["file"]).sum() == pytest.approx(1, abs=1e-5)
        with Image.open(q2l / "explain.png") as page:
            assert page.width > 400
        with pytest.raises(UserError, match="alpha 5 has no meaning for head query2label"):
            call("--run", q2l, "--alpha", 5, image_path)

    def test_classes_that_share_a_query_are_said_to(
        self, small_digits: Path, image_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        head = ["--model.head", "ml_decoder", "--model.head_options", "{groups: 4, hidden: 64}"]
        run = make_run(tmp_path / "run", small_digits, "digits_q2l.yaml", 1, "--method", "an", *head)
        config, manifest, classifier, _ = load_run(run, CPU)
        files = ImageFiles([str(image_path)], np.ones(1, np.uint8))
        (image,) = explain.explain(
            classifier, config, files, CPU, alpha=1, classes=manifest.classes, top=4, first=[[0, 2, 3, 9]]
        )
        assert image.kind == "attention" and image.classes_per_query == 3 and image.attention is not None
        first, second, other, _ = image.attention
        assert np.array_equal(first, second) and not np.allclose(first, other)
        notes = [line.text for line in page_notes([image])]
        assert notes == ["3 classes share a query and so one map of attention; their logits tell them apart"]
        assert page_notes([example("attention")]) == []
