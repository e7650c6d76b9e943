"""The page about runs: figures of groups, what is missing or unhealthy, odd names, and what users get wrong."""

from __future__ import annotations

import json
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from spml_fast.analysis.report.health import health
from spml_fast.analysis.report.page import make_page
from spml_fast.analysis.report.plots import _plotted
from spml_fast.analysis.report.tables import (
    differing,
    group_runs,
    mean_text,
    option_table,
    setup_rows,
    summary,
    training_counts,
)
from spml_fast.cli import report as report_command
from spml_fast.cli.parse import parse_config
from spml_fast.core.errors import UserError
from spml_fast.data.manifest import Manifest
from spml_fast.runs.read import Run, flatten, read_epochs, read_run
from spml_fast.runs.recipe import to_yaml
from spml_fast.training.logs import RunLog

NAMES = ["cat", "<script>alert(1)</script>", "never there", "$x^2$ & Straße"]


def make_run(
    folder: Path,
    *options: str,
    names: list[str] = NAMES,
    maps: list[float] | None = None,
    losses: list[float | None] | None = None,
    aps: list[float | None] | None = None,
    finished: bool = True,
    **results: Any,
) -> Path:
    """A run directory as train.py leaves it; `options` are those of the command line."""
    folder.mkdir(parents=True)
    maps = [50.0, 62.0, 62.4, 62.5] if maps is None else maps
    losses = [1.0 / (i + 1) for i in range(len(maps))] if losses is None else losses
    config = parse_config(["--run.dir", str(folder), "--train.epochs", "4", *options])
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (folder / "classes.txt").write_text("".join(f"{n}\n" for n in names), encoding="utf-8")
    lines = [
        {"kind": "epoch", "phase": "finetune", "epoch": i, "loss": loss, "val_map": value, "lr": 0.1, "seconds": 3.0}
        for i, (value, loss) in enumerate(zip(maps, losses, strict=True), 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if finished:
        aps = [90.0, 80.0, None, 10.0] if aps is None else aps
        known = [a for a in aps if a is not None]
        metrics = {"map": statistics.mean(known), "OF1": 50.0, "CF1": 40.0, "per_class_ap": aps}
        metrics |= dict.fromkeys(
            ("map_zero", "map_skip_unlabelled", "map_skipping", "map_skip_one_sided"), metrics["map"]
        )
        figures = {"best_epoch": 4, "best_val_map": max(maps), "images_per_second": 100.0, "data_wait": 0.02}
        figures |= {
            "train_seconds": 30.0,
            "alpha": {"1": metrics, "5": metrics | {"map": metrics["map"] + 1}},
        } | results
        (folder / "results.json").write_text(json.dumps(figures), encoding="utf-8")
    return folder


class Text(HTMLParser):
    """Text and addresses of a page; fails on tags that are not closed."""

    VOID = ("meta", "img", "br", "line")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.parts: list[str] = []
        self.links: list[str] = []
        self.feed(page)
        assert not self.open
        self.text = re.sub(r"\s+", " ", " ".join(self.parts))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.VOID

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.parts.append(data)


def test_a_page_of_one_run(tmp_path):
    page = Text(make_page([make_run(tmp_path / "one")]))
    for text in (
        "60.00",
        "61.00",
        "test mAP, plain",
        "test mAP, BoostLU x5",
        "None of this was found",
        "All options",
        "model.alpha_eval",
        *NAMES[:2],
        NAMES[3],
    ):
        assert text in page.text
    # AP of a class without a positive is not defined.
    assert NAMES[2] not in page.text
    # Nothing is fetched from anywhere.
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)


def test_seeds_are_one_row_with_mean_and_deviation(tmp_path):
    seeds = [make_run(tmp_path / f"s{i}", "--run.seed", str(i), aps=[90.0 + i, 80.0, None, 10.0]) for i in range(3)]
    other = make_run(tmp_path / "other", "--method", "an", aps=[50.0, 99.0, None, 11.0])
    groups = group_runs([read_run(f) for f in (*seeds[:2], other, seeds[2])])
    assert [[r.folder.name for r in g.runs] for g in groups] == [["s0", "s1", "s2"], ["other"]]
    assert [g.label for g in groups] == [groups[0].options["method.name"], "an"]
    page = Text(make_page([*seeds, other]))
    maps = [statistics.mean([90.0 + i, 80, 10]) for i in range(3)]
    assert f"{statistics.mean(maps):.2f} ± {statistics.stdev(maps):.2f}" in page.text
    gains = page.text.index("where it does best")
    # Class 1 gains most (80 to 99), class 0 loses most (91 to 50).
    assert page.text.index(NAMES[1], gains) < page.text.index("Where it does worst") < page.text.index("cat", gains)


def test_labels_tell_groups_apart(tmp_path):
    runs = [
        make_run(tmp_path / "a", "--model.alpha_train", "1"),
        make_run(tmp_path / "b", "--model.alpha_train", "5"),
        make_run(tmp_path / "c", "--method", "an"),
        make_run(tmp_path / "d", "--method", "asl"),
    ]
    groups = group_runs([read_run(f) for f in runs])
    first = groups[0].options["method.name"]
    assert [g.label for g in groups] == [f"{first}, alpha_train 1", f"{first}, alpha_train 5", "an", "asl"]
    table = dict(option_table(groups))
    assert table["method.name"][2:] == ["an", "asl"] and table["model.alpha_train"][:2] == ["1", "5"]
    # What only one of the methods has is no difference.
    assert not any(key.startswith("method.") for key in table if key != "method.name")


def test_an_unfinished_run_shows_what_is_there(tmp_path):
    folder = make_run(tmp_path / "killed", maps=[50.0, 60.0], finished=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "epoch", "ep')
    page = Text(make_page([folder]))
    assert "not finished: 2 of 4 epochs, no test figures yet" in page.text
    assert "line 3 of metrics.jsonl is damaged and left out" in page.text
    (folder / "metrics.jsonl").unlink()
    (folder / "classes.txt").unlink()
    bare = Text(make_page([folder]))
    assert "there is no metrics.jsonl" in bare.text and "Over epochs" not in bare.text
    # A finished run beside it keeps its figures.
    assert "61.00" in Text(make_page([folder, make_run(tmp_path / "whole")])).text


def test_half_a_line_is_dropped_when_a_run_goes_on(tmp_path):
    folder = make_run(tmp_path / "run", maps=[50.0, 60.0])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "epo')
    with pytest.raises(UserError, match=r"metrics\.jsonl line 3 is damaged; delete that line"):
        read_epochs(folder)
    RunLog(folder, 4).record("epoch", {"epoch": 3, "phase": "finetune", "loss": 1.0})
    assert [e["epoch"] for e in read_epochs(folder)] == [1, 2, 3]
    RunLog(tmp_path / "run", 4).record("epoch", {"epoch": 3, "phase": "finetune", "loss": 2.0})
    assert read_epochs(folder)[-1]["loss"] == 2.0 and read_run(folder).restarts == 1


def test_a_run_that_was_killed_within_an_epoch_and_went_on(tmp_path):
    folder = make_run(tmp_path / "run", maps=[50.0])
    whole = read_run(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        for update in (20, 30, 20, 30):
            entry = {"kind": "update", "phase": "finetune", "epoch": 2, "update": update, "loss": 0.4}
            file.write(json.dumps(entry) + "\n")
    assert (whole.restarts, read_run(folder).restarts) == (0, 1)
    assert any("interrupted and resumed: the log goes back once" in note for note in health(read_run(folder)))


def test_an_unfinished_run_has_the_figures_of_its_epochs(tmp_path):
    folder = make_run(tmp_path / "run", finished=False)
    lines = [
        {"kind": "epoch", "phase": phase, "epoch": 1, "loss": 1.0, "val_map": 60.0 - i, "seconds": 10.0 + 20 * i}
        | {"data_wait": 0.1 + 0.2 * i, "images_per_second": 100.0 - 40 * i, "memory_gib": 2.0}
        for i, phase in enumerate(("linear", "finetune"))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(folder)
    # Weighted by seconds; the best of the last phase alone.
    assert run.figures == {
        "train_seconds": 40.0,
        "images_per_second": pytest.approx((10 * 100 + 30 * 60) / 40),
        "data_wait": pytest.approx((10 * 0.1 + 30 * 0.3) / 40),
        "memory_gib": 2.0,
        "best_val_map": 59.0,
    }
    assert any("25% of the training time" in note for note in health(run))
    assert summary(group_runs([run]))[1][0][-5:] == ["2 of 4", "70", "25.0%", "40 s", "2.0 GiB"]


@pytest.mark.parametrize("text", ["null", "[1]", '{"alpha": [1]}', '{"alpha": {"x": {}}}', '{"alpha": {"1": 2}}', "{"])
def test_damaged_results_are_named(tmp_path, text):
    folder = make_run(tmp_path / "run")
    (folder / "results.json").write_text(text)
    run = read_run(folder)
    assert run.results is None and not run.alphas
    assert any(note.startswith("results.json") and "no test figures" in note for note in health(run))


def test_the_precision_of_nothing_is_not_drawn():
    assert _plotted({"selected_count": 0.0, "selection_precision": 0.0}, "selection_precision") is None
    assert _plotted({"selected_count": 8.0, "selection_precision": 0.0}, "selection_precision") == 0.0
    assert _plotted({"selected_count": 0.0, "selection_recall": 0.0}, "selection_recall") == 0.0
    assert _plotted({"t_gap": "high"}, "t_gap") is None


def test_the_set_up_stands_in_few_lines(tmp_path):
    options = ("--data.dir", "/data/x", "--model.pretrained", "false", "--train.precision", "auto")
    runs = [
        read_run(make_run(tmp_path / "a", "--method", "an", *options, ranks=2, device="cpu")),
        read_run(make_run(tmp_path / "b", "--method", "asl", *options, "--run.seed", "1", finished=False)),
    ]
    rows = dict(setup_rows(runs))
    assert rows["method"] == "an; asl" and rows["seed"] == "0; 1" and rows["precision"] == "auto"
    assert rows["data set"].startswith("x, 4 classes") and rows["batch"] == "16 over 2 rank(s); 16"
    (tmp_path / "a" / "deepspeed.json").write_text('{"torch_autocast": {"enabled": true, "dtype": "bfloat16"}}')
    assert dict(setup_rows([read_run(tmp_path / "a")]))["precision"] == "bf16 under autocast"


def test_an_option_that_an_older_file_lacks_is_at_its_default(tmp_path):
    new, old = make_run(tmp_path / "new"), make_run(tmp_path / "old", "--run.seed", "1")
    lines = (old / "config.yaml").read_text().splitlines(keepends=True)
    assert "  deterministic: false\n" in lines
    (old / "config.yaml").write_text("".join(line for line in lines if "deterministic" not in line))
    assert len(group_runs([read_run(new), read_run(old)])) == 1


def test_labels_are_counted_in_the_data_set_of_each_run(tmp_path, small_digits):
    runs = [
        read_run(make_run(tmp_path / "here", "--data.dir", str(small_digits))),
        read_run(make_run(tmp_path / "gone", "--data.dir", str(tmp_path / "nowhere" / ("long" * 9)))),
    ]
    groups = group_runs(runs)
    counted, missing = training_counts(groups)
    known = Manifest(small_digits).split("train").observed
    assert (
        missing is None
        and counted is not None
        and counted.tolist() == known.class_counts(1).tolist()
        and counted.min() > 0
    )
    # Long paths are cut in the names, and the names stay different.
    assert groups[1].label.endswith("longlong") and len({g.label for g in groups}) == 2
    assert all(len(g.label) < 40 for g in groups)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": [1.0, None, None, None]}, "not a finite number in 3 of 4 log lines: the run has diverged"),
        ({"losses": [1.0, None, 0.5, 0.4]}, "in 1 of 4 log lines: later values are finite"),
        ({"maps": [50.0, 60.0]}, "less than three times"),
        ({"maps": [50.0, 55.0, 60.0, 65.0]}, "still rising at the end (55.0 to 65.0"),
        ({"maps": [60.0, 70.0, 66.0, 64.0]}, "fell from 70.0 to 64.0 while the training loss kept falling"),
        ({"data_wait": 0.34}, "34% of the training time"),
        ({"alpha": {}}, "no test split"),
    ],
)
def test_what_is_unhealthy_is_said(tmp_path, changes, message):
    (note,) = health(read_run(make_run(tmp_path / "run", **changes)))
    assert message in note
    # A fall of mAP together with a rise of the loss has another cause, and a healthy run has no notes.
    assert not health(read_run(make_run(tmp_path / "fine", maps=[60.0, 70.0, 66.0, 64.0], losses=[1.0, 0.5, 0.6, 0.7])))


def test_a_fifth_of_the_vocabulary_fits_on_a_page(tmp_path):
    number = 9605
    names = [f"class {i}" for i in range(number)]
    runs = [
        make_run(tmp_path / f"r{i}", "--method", m, names=names, aps=[(i * 7 + j) % 101 for j in range(number)])
        for i, m in enumerate(("an", "asl"))
    ]
    page = make_page(runs)
    assert len(page) < 1_000_000 and len(re.findall("class [0-9]+<", page)) == 20


def test_runs_with_other_classes_are_compared_by_their_figures_alone(tmp_path):
    two = make_run(tmp_path / "two", "--method", "an", names=["a", "b"], aps=[1.0, 2.0])
    page = Text(make_page([make_run(tmp_path / "four"), two]))
    assert "different classes" in page.text and "1.50" in page.text and "where it does best" not in page.text


def test_small_helpers():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "d": [1]}
    assert differing([{"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 0}]) == ["b", "c"]
    assert mean_text([]) == mean_text([None]) == "-" and mean_text([2.0, None]) == "2.00"
    assert mean_text([1.0, 3.0], ".1f") == "2.0 ± 1.4"
    assert Run(Path("x"), {"train.epochs": 3, "train.linear_epochs": 2}).planned_epochs == 5


def test_the_command_writes_the_page_whole(tmp_path, capsys):
    run, out = make_run(tmp_path / "run"), tmp_path / "page.html"
    out.write_text("older")
    with pytest.raises(UserError, match=r"page\.html exists and was not written by this command"):
        report_command.main([str(run), "--out", str(out)])
    assert out.read_text() == "older"
    report_command.main([str(run), "--out", str(out), "--overwrite"])
    report_command.main([str(run), "--out", str(out)])
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>") and "1 run(s)" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "run"]


def test_what_users_get_wrong(tmp_path):
    run = make_run(tmp_path / "run")
    (tmp_path / "link").symlink_to(run)
    (tmp_path / "folder.html").mkdir()
    for arguments, message in (
        ([run, "--out", tmp_path / "page.pdf"], "must be named .html"),
        ([run, "--out", tmp_path / "folder.html"], "is a directory"),
        ([run, "--out", tmp_path / "none" / "page.html"], "cannot be written"),
        ([tmp_path / "no", "--out", tmp_path / "page.html"], "not a run directory"),
        ([run, tmp_path / "link", "--out", tmp_path / "page.html"], "given twice"),
    ):
        with pytest.raises(UserError, match=message):
            report_command.main([str(a) for a in arguments])
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"config\.yaml is not valid YAML in line 1"):
        make_page([run])
    assert not (tmp_path / "page.html").exists()
