"""Mistakes and rejected labels with their images, from a data set; and why nothing is shown where it is not there."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from spml_fast.analysis.report import data_sets, mistakes
from spml_fast.analysis.report.coverage import coverage, unknown_positive_fraction
from spml_fast.analysis.report.data_sets import COUNTS, DataSets, training_counts
from spml_fast.analysis.report.groups import group_runs
from spml_fast.analysis.report.mistakes import hardest_labels, selected_labels, sheets, shown_mistakes
from spml_fast.analysis.report.page import make_page
from spml_fast.analysis.review.pictures import Pictures, make_thumbnail
from spml_fast.core.errors import UserError
from spml_fast.data.manifest import Manifest
from spml_fast.evaluation.evaluate import Scores
from spml_fast.models.classifier import Classifier
from spml_fast.models.weights import save_weights
from spml_fast.prepare.pack.options import PackOptions
from spml_fast.prepare.pack.run import pack
from spml_fast.runs.open import load_run_config
from spml_fast.runs.read import Run, read_run
from tests.support.remote import need_http, serve
from tests.support.remote import no_pauses as no_pauses
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
    found = sheets(read_run(run), "test", [("wrong", wrong), ("missed", missed)], CPU, DataSets())
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


IMAGES = ("mistakes", "selected")
EVERYTHING = (*IMAGES, "classes", "data")


def notes_of(page: str) -> dict[str, str]:
    """Sentences about what is not shown, by the section in which they stand."""
    sections = re.findall(r'<section id="(\w+)".*?</section>', page, re.S)
    texts = re.findall(r'<section id="\w+"(.*?)</section>', page, re.S)
    found = {
        name: re.findall(r">([^<]* are not shown: [^<]*)<", text) for name, text in zip(sections, texts, strict=True)
    }
    assert all(len(sentences) <= 1 for sentences in found.values())
    assert sum(map(len, found.values())) == page.count("are not shown: ")
    return {name: sentences[0] for name, sentences in found.items() if sentences}


@pytest.mark.parametrize(
    ("break_it", "reason", "lacking"),
    [
        (lambda digits: shutil.rmtree(digits), "digits does not exist", EVERYTHING),
        (lambda digits: (digits / "manifest.json").write_text("{}"), "manifest.json has format None", EVERYTHING),
        (lambda digits: shutil.rmtree(digits / "images"), "images are not in", IMAGES),
        (lambda digits: shutil.rmtree(digits / "val"), "digits/val/", ("data",)),
        (
            lambda digits: (digits / "classes.txt").write_text("".join(f"x{i}\n" for i in range(10))),
            "other classes",
            IMAGES,
        ),
    ],
)
def test_the_page_and_the_terminal_say_what_is_left_out(run, digits, drawn, break_it, reason, lacking):
    """In the place of each part, and in one sentence on the terminal."""
    break_it(digits)
    said: list[str] = []
    page = make_page([run], 4, say=said.append)
    notes = notes_of(page)
    assert set(notes) == set(lacking) and all(reason in note for note in notes.values())
    (told,) = [line for line in said if line.startswith("note: the page is without ")]
    assert reason in told
    for part in notes.values():
        assert part.partition(" of ll_r are")[0].lower() in told
    assert ("<canvas" in page) == ("mistakes" not in lacking)
    assert '<section id="classes"' in page


def test_nothing_is_said_of_a_data_set_that_is_there(run, digits, drawn):
    said: list[str] = []
    assert notes_of(make_page([run], 4, say=said.append)) == {}
    assert [line.partition(" of ")[0] for line in said] == ["drawing images"] * 2
    # Nobody asked for images, and labels are still counted.
    shutil.rmtree(digits)
    said.clear()
    assert set(notes_of(make_page([run], say=said.append))) == {"classes", "data"} and len(said) == 1


def test_settings_with_one_data_set_share_a_sentence(run, digits, drawn, tmp_path):
    text = (run / "config.yaml").read_text()
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "config.yaml").write_text(text.replace("lr: 1.0e-05", "lr: 2.0e-05"))
    assert text != (other / "config.yaml").read_text()
    shutil.rmtree(digits)
    said: list[str] = []
    page = make_page([run, other], 4, say=said.append)
    assert len(said) == 1 and said[0].count("does not exist") == 1
    assert set(notes_of(page)) == set(EVERYTHING)


def test_another_data_set_under_the_same_name(run: Path, drawn: list[tuple[int, int]]) -> None:
    record = json.loads((run / "evaluation.json").read_text())
    for name in ("false_positives", "misses"):
        record[name] = [[sample, f"elsewhere/{path}", *rest] for sample, path, *rest in record[name]]
    (run / "evaluation.json").write_text(json.dumps(record))
    groups = group_runs([read_run(run)])
    found, _, absences = shown_mistakes(groups, [[record]], 4, CPU, DataSets())
    assert not found and "other images than when the run was made" in absences[0].reason


def test_a_data_set_is_opened_once_where_the_run_says(run: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels are counted and images read from the same copy; one that does not answer is not asked again and again."""
    opened = []

    def manifest(*where: object) -> Manifest:
        opened.append(where)
        if len(opened) > 1:
            raise UserError("nobody answers")
        return Manifest(digits)

    monkeypatch.setattr(data_sets, "Manifest", manifest)
    one, other = read_run(run), read_run(run)
    one.options |= {"data.cache_dir": "kept", "data.image_root": "images"}
    data = DataSets()
    for _ in range(2):
        assert len(mistakes.open_split(one, "test", data)) and data.counts(one)
        assert training_counts(group_runs([one]), data)[1] == []
        for ask in (data.of, data.counts):
            with pytest.raises(UserError, match="nobody answers"):
                ask(other)
    assert opened == [(str(digits), "images", "kept"), (str(digits), None, None)]


@pytest.mark.slow
def test_a_network_draws_the_maps(run: Path, digits: Path) -> None:
    """The real thing: weights, images, maps whose mean is the logit's."""
    config = load_run_config(run)
    save_weights(run / "model.safetensors", Classifier(config.model, 10, config.data.image_size), {})
    wanted = selected_labels(read_run(run), 2)[:1]
    ((one, two),) = [sheet.cards for sheet in sheets(read_run(run), "train", wanted, CPU, DataSets())]
    assert (
        one.src.startswith("data:image/jpeg;base64,") and one.width == one.height == 64 and one.right and not two.right
    )
    assert one.cells and one.cells != two.cells
    (run / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError):
        sheets(read_run(run), "train", wanted, CPU, DataSets())


def test_what_is_known_of_the_images(run: Path, digits: Path) -> None:
    groups = group_runs([read_run(run)])
    ((folder, (head, rows)),), absences = coverage(groups, DataSets())
    assert folder == str(digits) and [row[0] for row in rows] == ["train", "val", "test"] and absences == []
    split = Manifest(digits).split("train")
    positives = int(split.known.class_counts(1).sum())
    row = dict(zip(head, rows[0], strict=True))
    assert row["images"] == str(len(split)) and row["known positive"].startswith(f"{positives:,} (")
    assert row["training sees positive"].startswith(f"{len(split):,} (") and row["left out"] == "0"
    hidden = (positives - len(split)) / (9 * len(split))
    assert unknown_positive_fraction(groups[0].runs[0], DataSets()) == pytest.approx(hidden)
    # Labels are counted where they are; what preparation left out stands in its report alone.
    whole = json.loads((digits / "report.json").read_text())
    assert [row[3:] for row in rows] == [
        [
            f"{entry[which][code]:,} ({entry[which][code] / (10 * entry['samples']):.1%})"
            for which in ("known", "observed")
            for code in ("positive", "negative", "unknown")
        ]
        for entry in whole["splits"].values()
    ]
    for damage in (
        lambda report: report.clear(),
        lambda report: report["splits"]["train"].pop("left_out"),
        lambda report: report["splits"]["train"].update(left_out="many"),
        lambda report: report.update(splits=[]),
        lambda report: report["splits"].update(train=5),
    ):
        damaged = json.loads(json.dumps(whole))
        damage(damaged)
        (digits / "report.json").write_text(json.dumps(damaged))
        ((_, (_, damaged_rows)),), _ = coverage(groups, DataSets())
        assert damaged_rows[0] == [*rows[0][:2], "-", *rows[0][3:]]
    (digits / "report.json").unlink()
    assert coverage(groups, DataSets())[0][0][1][1][0][2] == "-"
    (digits / "train" / "known" / "codes.npy").write_bytes(b"")
    found, (absence,) = coverage(groups, DataSets())
    assert found == [] and absence.part == COUNTS and "codes.npy" in absence.reason
    assert unknown_positive_fraction(groups[0].runs[0], DataSets()) is None


@pytest.mark.parametrize("remote", [False, True])
def test_what_is_known_of_images_in_shards(run, digits, drawn, tmp_path, monkeypatch, no_pauses, remote) -> None:
    """The same table for shards, on the disk and on object storage; and why it is absent where nothing answers."""
    if remote:
        need_http()
    pack(PackOptions(digits, tmp_path / "served" / "m", shard_size=10**6, workers=1, progress=False))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    said: list[str] = []
    config = run / "config.yaml"
    with serve(tmp_path / "served") if remote else contextlib.nullcontext() as server:
        place = f"{server.url}/m" if server is not None else str(tmp_path / "served" / "m")
        config.write_text(config.read_text().replace(str(digits), place))
        page = make_page([run], 4, say=said.append)
        ((named, (_, rows)),), _ = coverage(group_runs([read_run(run)]), DataSets())
        if server is not None:
            # Shards are asked for nothing: images are counted in the Manifest.
            assert not [path for path, *_ in server.requests if path.endswith(".tar")]
    assert notes_of(page) == {} and not [line for line in said if line.startswith("note:")]
    ((_, (_, loose)),), _ = coverage(group_runs([_with_data(run, digits)]), DataSets())
    assert named == place and rows == loose and '<section id="data"' in page
    if remote:
        page = make_page([run], 4, say=said.append)
        assert set(notes_of(page)) == set(EVERYTHING) and "cannot be reached" in notes_of(page)["data"]
        assert [line for line in said if line.startswith("note:") and "cannot be reached" in line]


def _with_data(folder: Path, data: Path) -> Run:
    run = read_run(folder)
    run.options["data.dir"] = str(data)
    return run
