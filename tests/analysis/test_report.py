"""The page about runs: figures of groups, what is missing or unhealthy, odd names, and what users get wrong."""

from __future__ import annotations

import json
import re
import statistics
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from spml_fast.analysis.report.charts import drawn, epoch_charts, heat_map, strip_chart
from spml_fast.analysis.report.data_sets import DataSets, training_counts
from spml_fast.analysis.report.decisions import calibration_errors, calibrations
from spml_fast.analysis.report.groups import (
    differing,
    group_runs,
    mean_text,
    option_table,
    setup_rows,
    summary,
)
from spml_fast.analysis.report.health import health
from spml_fast.analysis.report.page import make_page
from spml_fast.analysis.report.svg import Chart, log_ticks, nice_ticks, tick_text
from spml_fast.analysis.report.timing import time_parts, time_section
from spml_fast.cli import report as report_command
from spml_fast.core.errors import UserError
from spml_fast.data.manifest import Manifest
from spml_fast.runs.read import Run, flatten, read_epochs, read_run
from spml_fast.training.logs import RunLog
from tests.support.report import NAMES, make_recorded_run, make_run


class Text(HTMLParser):
    """Text and addresses of a page; fails on tags that are not closed."""

    VOID = ("meta", "img", "br", "input")
    SHAPES = ("path", "rect", "circle", "line")

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
        assert tag in (*self.VOID, *self.SHAPES)

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.parts.append(data)


def class_table(page: str) -> dict:
    """What the page's program shows of classes."""
    return json.loads(re.search(r'<script type="application/json" id="class-data">(.+?)</script>', page, re.S)[1])


def test_a_page_of_one_run(tmp_path):
    made = make_page([make_run(tmp_path / "one")])
    page = Text(made)
    for text in ("60.00", "61.00", "test mAP, plain", "test mAP, BoostLU x5", "None of this was found", "All options"):
        assert text in page.text
    assert "model.alpha_eval" in page.text
    # AP of a class without a positive is not defined, and nothing stands in its place.
    table = class_table(made)
    assert table["names"] == NAMES and table["groups"][0]["ap"] == [90, 80, None, 10]
    # A run without a record of its evaluation has none of what would be shown of it.
    for section in ("mistakes", "confusions", "calibration", "selected"):
        assert f'<section id="{section}"' not in made
    assert "Counts of images and labels of ll_r are not shown: the run does not say where its data set is." in page.text
    # Nothing is fetched from anywhere, and nothing that is not in the page may run.
    assert all(link.startswith("data:image/jpeg;base64,") for link in page.links)
    assert "default-src 'none'" in made and "unsafe" not in made


def test_a_page_of_a_run_with_its_record(tmp_path):
    names = [f"class {i}" for i in range(12)]
    folder = make_recorded_run(tmp_path / "run", names=names)
    made = make_page([folder])
    record = json.loads((folder / "evaluation.json").read_text())
    one = class_table(made)["groups"][0]
    assert one["positives"] == record["positives"] and one["hits"] == record["decided"]["hits"]
    assert one["thresholds"][-1] is not None, "a class without positives has the threshold of all"
    assert one["curves"] == record["curves"] and one["run"] == one["label"] and one["split"] == "test"
    for section in ("confusions", "calibration", "selected", "time", "classes"):
        assert f'<section id="{section}"' in made
    error = record["calibration"]["before"]["expected_calibration_error"]
    assert f"{error:.2f}" in Text(made).text
    # Weights that are others since: figures of the old ones are not shown, and the page says so.
    (folder / "model.safetensors").write_bytes(b"other")
    later = make_page([folder])
    assert '<section id="confusions"' not in later and "curves" not in class_table(later)["groups"][0]
    assert "evaluation.json was made for other weights" in Text(later).text
    # A copy without its weights keeps them.
    (folder / "model.safetensors").unlink()
    assert '<section id="confusions"' in make_page([folder])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(format=2), "has format 2"),
        (lambda r: r["positives"].pop(), "is for other classes"),
        (lambda r: r["plain"]["hits"].__setitem__(0, "x"), "damaged"),
        (lambda r: r["plain"]["hits"].__setitem__(0, -1), "damaged"),
        (lambda r: r["curves"]["points"].__setitem__(0, 31), "damaged"),
        (lambda r: r["curves"].update(data="no base64 <"), "damaged"),
        (lambda r: r["confusions"]["pairs"][0].__setitem__(0, 99), "is for other classes"),
        (lambda r: r["confusions"]["pairs"][0].__setitem__(2, None), "damaged"),
        (lambda r: r["confusions"]["pairs"][0].pop(), "damaged"),
        (lambda r: r["misses"][0].__setitem__(0, -1), "damaged"),
        (lambda r: r.pop("split"), "damaged"),
        (lambda r: r["confusions"]["matrix"]["of"][0].pop(), "damaged"),
        (lambda r: r["misses"][0].pop(), "damaged"),
        (lambda r: r["misses"][0].__setitem__(3, "0.5"), "damaged"),
        (lambda r: r["calibration"].pop("before"), "damaged"),
        (lambda r: r.pop("weights"), "damaged"),
        (lambda r: r.clear(), "damaged"),
    ],
)
def test_a_damaged_record_is_told_of_and_left_out(tmp_path, change, message):
    folder = make_recorded_run(tmp_path / "run", names=["a", "b", "c", "d"])
    path = folder / "evaluation.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    page = make_page([folder])
    assert message in Text(page).text and '<section id="confusions"' not in page and '<section id="classes"' in page


def test_seeds_are_one_row_with_mean_and_deviation(tmp_path):
    seeds = [make_run(tmp_path / f"s{i}", "--run.seed", str(i), aps=[90.0 + i, 80.0, None, 10.0]) for i in range(3)]
    other = make_run(tmp_path / "other", "--method", "an", aps=[50.0, 99.0, None, 11.0])
    groups = group_runs([read_run(f) for f in (*seeds[:2], other, seeds[2])])
    assert [[r.folder.name for r in g.runs] for g in groups] == [["s0", "s1", "s2"], ["other"]]
    assert [g.label for g in groups] == [groups[0].options["method.name"], "an"]
    made = make_page([*seeds, other])
    page = Text(made)
    maps = [statistics.mean([90.0 + i, 80, 10]) for i in range(3)]
    assert f"{statistics.mean(maps):.2f} ± {statistics.stdev(maps):.2f}" in page.text
    # Every run is a dot, and is called the same everywhere.
    for name in ("s0", "s1", "s2"):
        assert f"{groups[0].label}, seed {name[1]}: {maps[int(name[1])]:.2f}" in made
    ap, deviation = (class_table(made)["groups"][0][name] for name in ("ap", "deviation"))
    assert ap == [91.0, 80.0, None, 10.0] and deviation == [1.0, 0.0, None, 0.0]
    assert class_table(made)["groups"][1]["deviation"] is None


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
    assert drawn({"selected_count": 0.0, "selection_precision": 0.0}, "selection_precision") is None
    assert drawn({"selected_count": 8.0, "selection_precision": 0.0}, "selection_precision") == 0.0
    assert drawn({"selected_count": 0.0, "selection_recall": 0.0}, "selection_recall") == 0.0
    assert drawn({"t_gap": "high"}, "t_gap") is None


def test_the_set_up_stands_in_few_lines(tmp_path):
    options = ("--data.dir", "/data/x", "--model.pretrained", "false", "--train.precision", "auto")
    runs = [
        read_run(make_run(tmp_path / "a", "--method", "an", *options, ranks=2, device="cpu")),
        read_run(make_run(tmp_path / "b", "--method", "asl", *options, "--run.seed", "1", finished=False)),
    ]
    rows = dict(setup_rows(runs))
    assert rows["method"] == "an; asl" and rows["seed"] == "0; 1" and rows["precision"] == "auto"
    assert rows["data set"].startswith("x, 4 classes") and rows["batch"] == "16 over 2 ranks; 16"
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
    (counted, missing), (absence,) = training_counts(groups, DataSets())
    assert absence.setting == groups[1].label and "does not exist" in absence.reason
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


def test_every_class_of_a_large_vocabulary_is_on_the_page(tmp_path):
    number = 9668
    names = [f"class {i}" for i in range(number)]
    runs = [
        make_run(tmp_path / f"r{i}", "--method", m, names=names, aps=[(i * 7 + j) % 101 for j in range(number)])
        for i, m in enumerate(("an", "asl"))
    ]
    page = make_page(runs)
    table = class_table(page)
    assert len(page) < 1_000_000 and table["names"] == names and len(table["groups"][1]["ap"]) == number


def test_runs_with_other_classes_are_compared_by_their_figures_alone(tmp_path):
    two = make_run(tmp_path / "two", "--method", "an", names=["a", "b"], aps=[1.0, 2.0])
    page = Text(make_page([make_run(tmp_path / "four"), two]))
    assert "different classes" in page.text and "1.50" in page.text and "Find a class" not in page.text


def test_small_helpers():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "d": [1]}
    assert differing([{"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 0}]) == ["b", "c"]
    assert mean_text([]) == mean_text([None]) == "-" and mean_text([2.0, None]) == "2.00"
    assert mean_text([1.0, 3.0], ".1f") == "2.0 ± 1.4"
    assert nice_ticks(61.3, 84.2) == [60, 65, 70, 75, 80, 85] and nice_ticks(0, 0.07, 4) == [0, 0.02, 0.04, 0.06, 0.08]
    assert nice_ticks(5, 5)[0] < 5 < nice_ticks(5, 5)[-1] and log_ticks(1, 100) == [1, 10, 100]
    assert log_ticks(3, 101) == [1, 10, 100, 1000] and tick_text(40_000) == "40k" and tick_text(0.25) == "0.25"
    assert Run(Path("x"), {"train.epochs": 3, "train.linear_epochs": 2}).planned_epochs == 5


def test_the_command_writes_the_page_whole(tmp_path, capsys):
    run, out = make_run(tmp_path / "run"), tmp_path / "page.html"
    out.write_text("older")
    with pytest.raises(UserError, match=r"page\.html exists and was not written by this command"):
        report_command.main([str(run), "--out", str(out)])
    assert out.read_text() == "older"
    report_command.main([str(run), "--out", str(out), "--overwrite"])
    report_command.main([str(run), "--out", str(out)])
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>") and "1 run," in capsys.readouterr().out
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
    with pytest.raises(UserError, match="--images is 33; it must lie between 0 and 32"):
        report_command.main([str(run), "--images", "33", "--out", str(tmp_path / "page.html")])


def marks(svg: str, tag: str) -> list[dict[str, str]]:
    """Attributes of the elements of a chart, which must be well-formed."""
    return [dict(e.attrib) for e in ET.fromstring(svg).iter() if e.tag == tag]


def test_lines_have_gaps_and_bars_begin_at_0(tmp_path):
    chart = Chart("x", [0, 1, 2, 3], [0, 10])
    chart.line([(0, 1.0), (1, None), (2, 3.0), (3, 4.0)], "g0")
    (path,) = [p for p in marks(chart.svg(), "path") if "line" in p["class"]]
    assert path["d"].count("M") == 2 and path["d"].count("L") == 1
    run = read_run(make_recorded_run(tmp_path / "run", names=["a", "b", "c"]))
    time = time_section(group_runs([run]))
    bars = marks(time.svg, "rect")
    assert bars[0]["x"] == "0.00%" and time.head[1:-1] == list(time_parts(run)) and len(time.rows) == 1
    # The colours of the bars are those of the legend.
    assert [bar["class"] for bar in bars] == [colour for colour, _ in time.legend]
    assert [name for _, name in time.legend] == list(time_parts(run))
    widths = [float(bar["width"].removesuffix("%")) for bar in bars]
    seconds = list(time_parts(run).values())
    assert widths == pytest.approx([w / seconds[0] * widths[0] for w in seconds], abs=0.02)


def test_where_the_time_went(tmp_path):
    run = read_run(make_recorded_run(tmp_path / "run", names=["a", "b", "c"]))
    # Four epochs of 3 s, 5% of them waiting; what was logged between and after.
    assert time_parts(run) == pytest.approx(
        {
            "training": 11.4,
            "waiting for data": 0.6,
            "validation": 2.0,
            "saving": 1.2,
            "thresholds": 0.3,
            "test": 1.1,
        }
    )
    run.epochs[0]["saving_within_seconds"] = 1.0
    assert time_parts(run)["training"] == pytest.approx(10.4) and time_parts(run)["saving"] == pytest.approx(2.2)
    # An older run has logged the first two alone, and nothing is made up.
    old = read_run(make_run(tmp_path / "old", data_wait=0.0))
    assert set(time_parts(old)) == {"training", "waiting for data"}
    assert time_section(group_runs([Run(Path("x"), {})])) is None


def test_a_dot_for_every_run_that_has_the_figure(tmp_path):
    runs = [read_run(make_run(tmp_path / str(i), "--run.seed", str(i), aps=[50.0 + i] * 4)) for i in range(3)]
    (group,) = group_runs(runs)
    values = {runs[0].name: 1.0, runs[1].name: float("nan"), runs[2].name: 3.0}
    figure = strip_chart("x", [group], lambda run: values[run.name])
    dots = marks(figure.svg, "circle")
    assert len(dots) == 2 and "2.00 ± 1.41" in figure.svg
    assert strip_chart("x", [group], lambda run: None) is None
    # Mean and deviation lie within the axis.
    spread = next(p for p in marks(figure.svg, "line") if "spread" in p["class"])
    places = [spread["x1"], dots[0]["cx"], dots[1]["cx"], spread["x2"]]
    low, first, second, high = (float(place.removesuffix("%")) for place in places)
    assert 0 <= low < first < second < high <= 100


def test_an_axis_of_per_cent_ends_at_100(tmp_path):
    (group,) = group_runs([read_run(make_run(tmp_path / str(i), "--run.seed", str(i))) for i in range(2)])
    values = dict(zip([run.name for run in group.runs], (97.2, 98.7), strict=True))
    for title, last in (("test mAP, %", 100), ("images/s", 101)):
        figure = strip_chart(title, [group], lambda run: values[run.name])
        ticks = [float(text) for text in re.findall(r">([0-9.]+)</text>", figure.svg)]
        assert max(ticks) >= last - 1 and (max(ticks) <= 100 or title == "images/s")
    same = dict.fromkeys(values, 99.9)
    figure = strip_chart("test mAP, %", [group], lambda run: same[run.name])
    dots = [float(dot["cx"].removesuffix("%")) for dot in marks(figure.svg, "circle")]
    assert max(dots) <= 100 and ">100</text>" in figure.svg and ">102.5</text>" not in figure.svg


def test_a_guess_is_drawn_for_who_rejects(tmp_path):
    """A setting without rejected labels has no line, and no guess either."""
    epoch = {"selection_precision": 0.5, "selected_count": 5}
    runs = [make_run(tmp_path / "ll_r", epoch=epoch), make_run(tmp_path / "full", "--method", "full")]
    groups = group_runs([read_run(run) for run in runs])
    both = epoch_charts(groups, ["selection_precision"], [0.18, 0.18])[0].svg
    assert (
        both
        == epoch_charts(groups, ["selection_precision"], [0.18, None])[0].svg
        != epoch_charts(groups, ["selection_precision"], [None, None])[0].svg
    )


def test_runs_with_one_and_the_same_figure(tmp_path):
    """The mean of three equal numbers may differ from them by a rounding error, which is no axis."""
    assert sum([91.1] * 3) / 3 != 91.1
    runs = [make_run(tmp_path / str(i), "--run.seed", str(i), aps=[91.1] * 4) for i in range(3)]
    assert "91.10 ± 0.00" in make_page(runs)
    for low, high in ((0.1, 0.1 + 2e-17), (91.1, 91.1 - 1.5e-14), (1e-13, 4e-13), (0.0, 0.0), (-2.0, -2.0)):
        ticks = nice_ticks(low, high, 4)
        assert ticks[0] <= min(low, high) and max(low, high) <= ticks[-1] and len(set(ticks)) == len(ticks) > 1
    assert nice_ticks(0, 0)[0] == 0, "what is never negative has no negative tick"


def test_names_have_the_room_that_they_need_beside_a_matrix():
    counts, of = [[0, 3], [1, 0]], [[0, 4], [5, 0]]

    def cell(names: list[str]) -> dict[str, str]:
        return next(r for r in marks(heat_map(names, counts, of), "rect") if r["class"] == "heat-cell")

    short, long = cell(["1", "2"]), cell(["traffic light", "a name that is cut off"])
    assert float(short["y"]) < 25 < 90 < float(long["y"]) and float(long["x"]) - float(short["x"]) > 80


def test_calibration_is_of_the_run_that_has_it(tmp_path):
    """Where a setting's first run has no record, the figures of its second one are not told of the first."""
    names = ["a", "b", "c"]
    first = make_run(tmp_path / "first", "--run.seed", "0", names=names, aps=[1.0, 2.0, 3.0])
    second = make_recorded_run(tmp_path / "second", "--run.seed", "1", names=names)
    (group,) = group_runs([read_run(first), read_run(second)])
    record = json.loads((second / "evaluation.json").read_text())
    _, ((name, split, *_),) = calibration_errors(calibrations([group], [[None, record]], [[None, None]]))
    assert (name, split) == (group.runs[1].name, "test") and name.endswith("seed 1")
    assert calibrations([group], [[None, None]], [[None, None]]) == [] and calibration_errors([]) is None


def test_what_is_wrong_with_several_runs_is_said_once(tmp_path):
    runs = [make_run(tmp_path / f"{m}", "--method", m, maps=[50.0, 60.0]) for m in ("an", "asl", "em")]
    few = "validation mAP was measured less than three times"
    page = Text(make_page(runs)).text
    assert page.count(few) == 1 and re.search(f"all runs : {few}", page)
    page = Text(make_page([*runs[:2], make_run(tmp_path / "more", "--method", "splc")])).text
    assert page.count(few) == 1 and re.search(f"an; asl : {few}", page)


def test_epochs_without_a_figure_are_gaps_of_the_mean(tmp_path):
    runs = [make_run(tmp_path / str(i), "--run.seed", str(i), losses=[1.0, None, 0.4, 0.2]) for i in range(2)]
    groups = group_runs([read_run(r) for r in runs])
    (figure,) = epoch_charts(groups, ["loss"])
    lines = [p for p in marks(figure.svg, "path") if "line" in p["class"]]
    assert [("pale" in p["class"], p["d"].count("M")) for p in lines] == [(True, 2), (True, 2), (False, 2)]


def test_one_name_for_a_run_everywhere(tmp_path):
    same = [make_run(tmp_path / name, "--run.seed", "0") for name in ("a", "b")]
    groups = group_runs([read_run(r) for r in same])
    names = [run.name for run in groups[0].runs]
    assert len(set(names)) == 2 and all(str(folder) in name for folder, name in zip(same, names, strict=True))
    hostile = make_run(tmp_path / "\u202egnp", "--run.seed", "0")
    assert "\u202e" not in re.sub(r"<bdi>/.*?</bdi>", "", make_page([*same, hostile]))
