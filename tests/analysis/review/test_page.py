"""What a page holds, how it is written, and that nothing of it is more than text."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spml_fast.analysis.pages.inline import part
from spml_fast.analysis.review import page as review_page
from spml_fast.analysis.review.decisions import suggestion_cells
from spml_fast.analysis.review.files import KNOWN, MARK, PAGE
from spml_fast.analysis.review.page import About, page_data, write_page
from spml_fast.analysis.review.pictures import collect, make_thumbnail, pairs_by_run
from spml_fast.analysis.suggest import KINDS, NAMES, Suggestions, suggestion_rows
from spml_fast.cli import suggest as suggest_command
from spml_fast.cli.parse import parse_config
from spml_fast.core.errors import UserError
from spml_fast.core.outputs import DECISION_COLUMNS
from spml_fast.data.labels import UNKNOWN
from spml_fast.data.manifest import Manifest
from spml_fast.models.classifier import Classifier
from spml_fast.models.weights import save_weights
from spml_fast.runs.open import load_run
from spml_fast.runs.recipe import to_yaml
from tests.support.paths import ROOT
from tests.support.review import GRID, HOSTILE_CLASSES, MadePage, make_pictures, make_review_page


class Elements(html.parser.HTMLParser):
    """Start tags of a page with their attributes, and the text within each kind of element."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text[self.open[-1]] = self.text.get(self.open[-1], "") + data


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadePage:
    return make_review_page(tmp_path_factory.mktemp("page") / "review.html")


def read_data(text: str) -> dict:
    """The JSON block of a page."""
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


def test_data(made: MadePage) -> None:
    """Rows stand in the order of the table, with the same values, and the truth that the lists are compared with."""
    data, split = made.data, made.manifest.split("train")
    rows = data["rows"]
    table = [row for found in made.lists for row in suggestion_rows(found, split, made.manifest.classes)]
    assert len(table) == 60 == len(data["truth"]) and all(len(column) == 60 for column in rows.values())
    for number, (path, name, known, probability, _, where, run) in enumerate(table):
        assert data["images"][rows["image"][number]]["path"] == path and data["classes"][rows["class"][number]] == name
        assert ("unknown", "positive", "negative")[rows["known"][number]] == known and data["split"] == where
        assert float(rows["probability"][number]) == probability and data["runs"][rows["run"][number]] == run
    number = 0
    for found in made.lists:
        for truth in split.known.codes_at(found.index, found.class_id).tolist():
            assert data["truth"][number] == {True: "1", False: "0"}[truth == found.suggestion]
            number += 1
    assert data["grid"] == list(GRID)
    cells = np.frombuffer(base64.b64decode(rows["map"][0]), np.int8).reshape(GRID)
    index, class_id = int(made.lists[0].index[0]), int(made.lists[0].class_id[0])
    assert np.unravel_index(cells.argmax(), GRID) == (index % GRID[0], class_id % GRID[1]) and cells.min() < 0
    assert data["truth"].count("1") > 5 < data["truth"].count("0")


def test_data_without_hidden_labels_or_maps(tmp_path: Path) -> None:
    made = make_review_page(tmp_path / "review.html", hides=False)
    assert made.data["truth"] is None
    split = made.manifest.split("train")
    pictures = make_pictures(made.lists, 32)
    pictures.maps.clear()
    data = page_data(About("r", made.manifest, split), made.lists, pictures)
    assert data["grid"] is None and set(data["rows"]["map"]) == {""}
    # The checksum is of what is suggested.
    assert data["id"] == made.data["id"]
    fewer = [
        *made.lists[:2],
        Suggestions(
            0, *(v[:-1] for v in (made.lists[2].index, made.lists[2].class_id)), made.lists[2].probability[:-1], 0
        ),
    ]
    assert page_data(About("r", made.manifest, split), fewer, pictures)["id"] != data["id"]


def test_page_is_inert(made: MadePage) -> None:
    """No element comes from data, nothing is loaded from elsewhere, and the policy allows what is there alone."""
    text = made.path.read_text(encoding="utf-8")
    parsed = Elements(text)
    assert read_data(text) == review_page.with_sources(made.data, [i["src"] for i in read_data(text)["images"]])
    names = [tag for tag, _ in parsed.tags]
    # Two pictures wait in the larger view, without an address.
    assert names.count("script") == 2 and names.count("img") == 2 and "b" not in names
    for tag, attributes in parsed.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "style", "srcset")], tag
        assert tag != "link" or attributes == {"rel": "icon", "href": "data:,"}
    assert "://" not in text.replace("http://127.0.0.1", "")
    policy = next(a["content"] for t, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    parts = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert parts["default-src"] == parts["connect-src"] == parts["base-uri"] == parts["form-action"] == "'none'"
    assert parts["img-src"] == "data:"
    for kind, source in (("style", "style-src"), ("script", "script-src")):
        inside = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        assert len(inside) == 1
        digest = base64.b64encode(hashlib.sha256(inside[0].encode()).digest()).decode()
        assert parts[source] == f"'sha256-{digest}'"
    # The head names the data set, and its place when it is pointed at.
    (where,) = [a["title"] for t, a in parsed.tags if t == "p" and a.get("class") == "about"]
    assert where == str(made.manifest.folder) and f"of {made.manifest.folder.name}, suggested by" in text
    assert parsed.text["title"] == "Review: <b>first" and text.startswith("<!DOCTYPE html>")
    assert {HOSTILE_CLASSES[c] for c in range(10)} >= set(read_data(text)["classes"]) and MARK in text[:1000]


def test_folder(tmp_path: Path) -> None:
    """Pictures are files beside the page, named by number; a page that replaces another takes its pictures away."""
    made = make_review_page(tmp_path / "folder")
    text = (made.path / PAGE).read_text(encoding="utf-8")
    (folder,) = [p for p in made.path.iterdir() if p.is_dir()]
    images = read_data(text)["images"]
    assert sum(image["src"] == "" for image in images) == sum(i % 20 == 19 for i in _samples(made)) > 0
    for image in images:
        if image["src"]:
            with Image.open(made.path / image["src"]) as opened:
                assert opened.size == (image["width"], image["height"]) and image["width"] > image["height"]
    (made.path / "decisions.csv").write_text("mine")
    pictures = make_pictures(made.lists, 16)
    # Its own page is replaced without a word.
    write_page(made.path, made.data, pictures, overwrite=False)
    (other,) = [p for p in made.path.iterdir() if p.is_dir()]
    assert other != folder and (made.path / "decisions.csv").read_text() == "mine"
    assert all(
        (made.path / i["src"]).is_file() for i in read_data((made.path / PAGE).read_text())["images"] if i["src"]
    )


def _samples(made: MadePage) -> list[int]:
    return np.unique(np.concatenate([found.index for found in made.lists])).tolist()


def test_thumbnails() -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    sizes = {
        (aspect, side): make_thumbnail(pixels, aspect, side) for aspect in (1.0, 2.0, 0.5, 500.0) for side in (32, 200)
    }
    assert [(t.width, t.height) for t in sizes.values()] == [
        (32, 32), (64, 64), (32, 16), (64, 32), (16, 32), (32, 64), (32, 1), (64, 1)
    ]  # fmt: skip
    assert all(t.jpeg.startswith(b"\xff\xd8") for t in sizes.values())


def test_runs_of_folds_are_kept_apart() -> None:
    """Each pair is looked at by the run that judged it."""
    index, class_id = np.array([4, 4, 7]), np.array([1, 2, 1])
    found = Suggestions(UNKNOWN, index, class_id, np.ones(3), 3, ("a", "b"), np.array([1, 1, 0]))
    assert pairs_by_run([found]) == {"b": {4: [1, 2]}, "a": {7: [1]}}


@pytest.fixture(scope="module")
def run(small_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with random weights, whose name is hostile."""
    made = tmp_path_factory.mktemp("review") / "<img src=x onerror=run>"
    made.mkdir()
    arguments = ["--config", str(ROOT / "launch" / "configs" / "digits.yaml"), "--data.dir", str(small_digits)]
    config = parse_config([*arguments, "--train.precision", "fp32", "--eval.batch_size", "50"])
    (made / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    torch.manual_seed(3)
    classifier = Classifier(config.model, 10, config.data.image_size)
    with torch.no_grad():
        classifier.head.weight *= 30
    save_weights(made / "model.safetensors", classifier, {})
    return made


def test_command(run: Path, small_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table and the page of one pass say the same; pictures are the images, and maps have the logit's mean."""
    out = tmp_path / "review.html"
    words = ["--run", str(run), "--csv", str(tmp_path / "s.csv"), "--top", "6", "--page", str(out)]
    suggest_command.main(words)
    assert f"{out}: 12 suggestions, " in capsys.readouterr().out
    text = out.read_text(encoding="utf-8")
    data = read_data(text)
    assert "onerror" in data["run"] and not any(a.get("onerror") for _, a in Elements(text).tags)
    assert Elements(text).text["title"] == "Review: <img src=x onerror=run>"
    lines = (tmp_path / "s.csv").read_text(encoding="utf-8").splitlines()[1:]
    rows = data["rows"]
    assert [",".join(cells) for cells in suggestion_cells(data)] == lines
    manifest = Manifest(small_digits)
    split = manifest.split("train")
    place = {split.relative_path(i): i for i in range(len(split))}
    image = data["images"][rows["image"][0]]
    with Image.open(split.path(place[image["path"]])) as original:
        seen = np.asarray(Image.open(_decoded(image["src"])), np.int16)
        assert np.abs(seen - np.asarray(original.convert("RGB"), np.int16)).mean() < 6
    # The map's cells, in units of the page's scale.
    config, _, classifier, _ = load_run(run, torch.device("cpu"))
    cells = [np.frombuffer(base64.b64decode(text), np.int8) for text in rows["map"]]
    assert all(len(c) == np.prod(data["grid"]) for c in cells) and config.model.head == "cam"
    suspected = [float(p) for p in rows["probability"]]
    # A CAM's mean is the logit at alpha 1, so surer positives have larger means.
    means = [c.mean() for c in cells]
    assert min(m for m, p in zip(means, suspected, strict=True) if p > 0.5) > max(
        m for m, p in zip(means, suspected, strict=True) if p < 0.5
    )
    assert data["signed"] and classifier.head.supports_boostlu


def _decoded(source: str):
    kind, _, content = source.partition("base64,")
    assert kind == "data:image/jpeg;"
    return io.BytesIO(base64.b64decode(content))


def test_what_users_get_wrong(run: Path, tmp_path: Path) -> None:
    """Everything that can be known is told before anything is computed; nothing of others is replaced."""
    missing = tmp_path / "no run"
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.jpg").write_text("mine")
    (tmp_path / "plain").write_text("mine")
    for out, message in [
        ("mine.html", r"--page .*mine\.html exists and was not written by this command; .*--overwrite"),
        ("full", r"--page .*full is a folder with other files; choose an empty or a new one"),
        ("plain", r"--page .*plain must be a file named \.html, or a folder"),
        ("no/such/review.html", "there is no directory"),
    ]:
        with pytest.raises(UserError, match=message):
            suggest_command.main(["--run", str(missing), "--page", str(tmp_path / out)])
    with pytest.raises(UserError, match=r"is one file, which holds 5,000 suggestions a list; for 5,001 give a folder"):
        suggest_command.main(["--run", str(missing), "--page", str(tmp_path / "r.html"), "--top", "5001"])
    with pytest.raises(UserError, match=r"for 5,010 give a folder, or a smaller --top or --per-class"):
        suggest_command.main(["--run", str(run), "--page", str(tmp_path / "r.html"), "--per-class", "501"])
    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>" and not (tmp_path / "r.html").exists()
    # Nothing to show: no page, and no error.
    suggest_command.main(["--run", str(run), "--page", str(tmp_path / "r.html"), "--min-probability", "0.9999999999"])
    assert not (tmp_path / "r.html").exists()


def test_kinds_are_those_of_the_page() -> None:
    """Places in `known` are those of the words that page and server use."""
    assert tuple(NAMES[code] for code in KINDS) == KNOWN
    assert f"const KNOWN = {json.dumps(KNOWN)}" in part("spml_fast.analysis.review", "state.js")
    assert f"const HEADER = {json.dumps(DECISION_COLUMNS)}" in part("spml_fast.analysis.review", "state.js")


def test_maps_are_of_the_run_that_judged(run: Path, small_digits: Path, tmp_path: Path) -> None:
    """Two runs whose maps are each other's negatives."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text((run / "config.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    _, manifest, classifier, _ = load_run(run, torch.device("cpu"))
    with torch.no_grad():
        classifier.head.weight *= -1
        classifier.head.bias *= -1
    save_weights(other / "model.safetensors", classifier, {})
    split = manifest.split("train")
    index, class_id = np.array([3, 3, 5]), np.array([1, 4, 2])
    runs = (str(run), str(other))
    found = []
    for run_of in (np.zeros(3, np.int64), np.ones(3, np.int64), np.array([0, 0, 1])):
        lists = [Suggestions(UNKNOWN, index, class_id, np.ones(3), 3, runs, run_of)]
        found.append(collect(lists, split, 10, torch.device("cpu"), 192))
    first, second, mixed = found
    assert set(first.thumbnails) == {3, 5} and set(first.maps) == {(3, 1), (3, 4), (5, 2)}
    for pair, cells in first.maps.items():
        assert np.abs(cells).max() > 0.01
        np.testing.assert_allclose(cells.astype(float), -second.maps[pair].astype(float), atol=1e-3)
        np.testing.assert_array_equal(mixed.maps[pair], (first if pair[0] == 3 else second).maps[pair])
    assert first.thumbnails[3] == second.thumbnails[3] != first.thumbnails[5]
