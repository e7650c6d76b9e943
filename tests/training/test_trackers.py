"""Trackers: what they are given, that none of them ends a run, and what the real ones keep."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import re
import sqlite3
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spml_fast.cli.parse import parse_config
from spml_fast.core.config import Config
from spml_fast.core.errors import UserError
from spml_fast.data.manifest import Manifest
from spml_fast.evaluation.calibration import Calibration
from spml_fast.evaluation.decisions import Decisions
from spml_fast.models.classifier import Classifier
from spml_fast.runs.layout import RunLayout
from spml_fast.training import tracking
from spml_fast.training.final import example_images
from spml_fast.training.trackers import base, tracker_names
from spml_fast.training.trackers.base import Ended, Example, Started, Summary, TrackedRun, Tracker
from spml_fast.training.tracking import Trackers
from tests.support import warm
from tests.support.paths import ROOT
from tests.support.runs import read_metrics

HOSTILE = "<b>x</b> | [y](http://z) `w` \x1b[31m"
PIXELS = np.arange(3 * 16, dtype=np.uint8).reshape(4, 4, 3)
SUMMARY = Summary(
    {"test/alpha_1/map": 50.0},
    64,
    ("class", "AP, alpha 1"),
    [("dog", 75.0), (HOSTILE, None)],
    [Example(PIXELS, [("dog", 0.75)], [HOSTILE])],
)


def configured(*words: str) -> Config:
    return parse_config(["--config", "digits", *words])


class Recorder(Tracker):
    """Keeps what it is told; `fails` names a method that raises, `hangs` one that does not return."""

    fails, hangs = "", ""
    told: list[Any]

    def _tell(self, name: str, *values: Any) -> None:
        if name == self.fails:
            raise ConnectionError("the network is gone\nand so on")
        if name == self.hangs:
            threading.Event().wait()
        self.told.append((name, *values))

    def start(self, run: TrackedRun) -> Started:
        self.told = []
        self._tell("start", run.known)
        return Started("id-1", "somewhere")

    def log(self, figures: Mapping[str, float], images: int) -> None:
        self._tell("log", dict(figures), images)

    def finish(self, summary: Summary) -> None:
        self._tell("finish", summary.figures)

    def close(self, ended: Ended) -> None:
        self._tell("close", ended)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, type[Recorder]]:
    """Trackers `good` and `bad`, known while the test runs."""
    monkeypatch.setattr(base, "TRACKERS", base.TRACKERS.copy())
    made: dict[str, type[Recorder]] = {}
    for name in ("good", "bad"):
        made[name] = base.register(name)(type(name, (Recorder,), {}))
    return made


def start(folder: Path, config: Config, lines: list[str], resumed: bool = False) -> Trackers:
    trackers = Trackers(config)
    trackers.start(RunLayout(folder), {"train": {"lr": 0.5}}, "train:\n  lr: 0.5\n", resumed, lines.append)
    return trackers


def told(trackers: Trackers, place: int = 0) -> list[Any]:
    tracker = trackers._workers[place]._tracker
    assert isinstance(tracker, Recorder)
    return tracker.told


BOTH = ("--run.trackers", "[bad, good]")


class TestGroup:
    def test_what_a_tracker_is_told(self, registered: Any, tmp_path: Path) -> None:
        lines: list[str] = []
        with start(tmp_path, configured("--run.trackers", "[good]"), lines) as trackers:
            seen = told(trackers)
            trackers.log({"train/loss": 1.0}, 16)
            trackers.finish(SUMMARY)
        wanted = [("start", None), ("log", {"train/loss": 1.0}, 16), ("finish", SUMMARY.figures), ("close", "finished")]
        assert seen == wanted and lines == ["tracker good: somewhere"] and trackers.images == 16
        # A resumed run is the tracker's same one.
        with start(tmp_path, configured("--run.trackers", "[good]"), lines, resumed=True) as trackers:
            assert told(trackers) == [("start", "id-1")]

    @pytest.mark.parametrize(("error", "ended"), [(KeyboardInterrupt, "stopped"), (ValueError, "failed")])
    def test_how_a_run_ended(self, registered: Any, tmp_path: Path, error: Any, ended: str) -> None:
        with pytest.raises(error), start(tmp_path, configured("--run.trackers", "[good]"), []) as trackers:
            seen = told(trackers)
            raise error
        assert seen[-1] == ("close", ended)

    @pytest.mark.parametrize("method", ["log", "finish", "close"])
    def test_one_that_fails_is_named_once_and_ends_nothing(self, registered: Any, tmp_path: Path, method: str) -> None:
        registered["bad"].fails = method
        lines: list[str] = []
        with start(tmp_path, configured(*BOTH), lines) as trackers:
            seen = told(trackers, 1)
            for images in range(3):
                trackers.log({"a": 1.0}, images)
            trackers.finish(SUMMARY)
        warnings = [line for line in lines if line.startswith("warning")]
        assert warnings == ["warning: tracker bad is left out from now on: ConnectionError: the network is gone"]
        assert [name for name, *_ in seen] == ["start", "log", "log", "log", "finish", "close"]

    def test_one_that_hangs_is_not_waited_for(
        self, registered: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tracking, "PATIENCE", 0.1)
        monkeypatch.setattr(tracking, "_WAITING", 2)
        registered["bad"].hangs = "log"
        lines: list[str] = []
        with start(tmp_path, configured(*BOTH), lines) as trackers:
            trackers.log({"a": 1.0}, 0)
        assert (
            lines[-1] == "warning: tracker bad is left out from now on: it has not taken everything within 0.1 seconds"
        )
        with start(tmp_path, configured("--run.trackers", "[bad]"), lines) as trackers:
            for images in range(4):
                trackers.log({"a": 1.0}, images)
            assert lines[-1] == "warning: tracker bad is left out from now on: it has not taken 2 figures"
        with start(tmp_path, configured("--run.trackers", "[bad]"), lines) as trackers:
            trackers.log({"a": 1.0}, 0)
            while trackers._workers[0]._calls.qsize():
                time.sleep(0.01)
            # One waits, and what ends the tracker takes the last place: nothing may wait for another one.
            trackers.log({"a": 1.0}, 1)
        assert lines[-1].startswith("warning: tracker bad is left out from now on: it has not taken")

    def test_one_that_does_not_start(self, registered: Any, tmp_path: Path) -> None:
        registered["bad"].fails = "start"
        with pytest.raises(UserError, match=r"^tracker bad does not start \(ConnectionError: the network is gone\);"):
            start(tmp_path, configured(*BOTH), [])
        lines: list[str] = []
        with start(tmp_path, configured(*BOTH), lines, resumed=True) as trackers:
            assert len(trackers._workers) == 1
        assert lines[0].startswith("warning: tracker bad does not start") and lines[1] == "tracker good: somewhere"
        RunLayout(tmp_path).tracker("good").write_text("{")
        with pytest.raises(UserError, match=r"good\.json is damaged"):
            start(tmp_path, configured("--run.trackers", "[good]"), [])
        with start(tmp_path, configured("--run.trackers", "[good]"), lines, resumed=True) as trackers:
            assert not trackers._workers
        assert "good.json is damaged" in lines[-1] and lines[-1].endswith("the run goes on without it")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["[tensorbord]"], "there is no tracker 'tensorbord'; choose one of .*did you mean tensorboard"),
            (
                ["[lacking]"],
                r"has lacking, whose package no_such_package is not installed; run pip install 'spml_fast\[",
            ),
            (
                ["[good]", "--run.tracker_options", "{wandb: {}}"],
                "tracker_options has wandb, which run.trackers does not",
            ),
            (
                ["[good]", "--run.tracker_options", "{good: 3}"],
                r"tracker_options\.good is 3; it must be options by name",
            ),
            (["[mlflow]", "--run.tracker_options", "{mlflow: {uri: a}}"], "mlflow.* (has no uri|is not installed)"),
        ],
    )
    def test_what_users_get_wrong(self, registered: Any, words: list[str], message: str) -> None:
        base.register("lacking")(type("Lacking", (Recorder,), {"package": "no_such_package", "extra": "lacking"}))
        with pytest.raises(UserError, match=message):
            Trackers(configured("--run.trackers", *words))

    def test_twice_and_off(self) -> None:
        with pytest.raises(UserError, match=r"run\.trackers has tensorboard twice"):
            configured("--run.trackers", "[tensorboard, tensorboard]")
        assert Trackers(configured()).names == ["tensorboard"]
        assert not Trackers(configured("--deepspeed.tensorboard", "false"))
        assert not Trackers(configured("--run.trackers", "[]"))

    @pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
    def test_a_missing_package_is_said_before_anything_else(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        assert {"tensorboard", "wandb", "mlflow", "trackio"} == set(tracker_names())
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda p, *a: None if p == name else find(p, *a))
        with pytest.raises(UserError, match=rf"run pip install 'spml_fast\[{name}\]' first, or leave {name} out"):
            Trackers(configured("--run.trackers", f"[{name}]"))


@pytest.mark.parametrize("kind", ["none", "temperature"])
def test_example_images(small_digits: Path, kind: Any) -> None:
    split, device = Manifest(small_digits).split("test"), torch.device("cpu")
    config = configured("--data.image_size", "64", "--run.tracker_images", "3", "--model.alpha_eval", "5")
    torch.manual_seed(0)
    classifier = Classifier(config.model, 10, 64).to(memory_format=torch.channels_last).eval()
    names, decisions = [f"digit {i}" for i in range(10)], None
    if kind != "none":
        threshold = np.array([0.0, 1.0] * 5)
        decisions = Decisions(5.0, threshold, Calibration(kind, np.full(10, 0.5), np.zeros(10)))
    examples = example_images(classifier, config, split, names, device, decisions)
    assert len(examples) == 3 and not classifier.training
    for index, example in enumerate(examples):
        pixels = np.asarray(Image.open(split.path(index)).convert("RGB"))
        assert example.image.dtype == np.uint8
        # DALI and Pillow round a JPEG's colours differently.
        assert np.abs(example.image.astype(int) - pixels).max() <= 4
        codes = split.known.rows([index])[0]
        assert example.known == [names[c] for c in (codes == 1).nonzero()[0]] and example.known
        view = (torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
        with torch.no_grad():
            logits = classifier(view.contiguous(memory_format=torch.channels_last), alpha=5.0).logits[0]
        chosen = logits.argsort(descending=True)[:5] if decisions is None else torch.arange(0, 10, 2)
        scaled = logits if decisions is None else logits * 0.5
        assert {name for name, _ in example.predicted} == {names[c] for c in chosen.tolist()}
        for name, probability in example.predicted:
            assert probability == pytest.approx(float(torch.sigmoid(scaled[names.index(name)])), abs=0.02)


def used(tracker: Tracker, folder: Path, known: str | None = None, **options: Any) -> Started:
    """Give a tracker a run as the group gives it one."""
    RunLayout(folder).trackers.mkdir(parents=True, exist_ok=True)
    values = {"train": {"lr": 0.5, "betas": [0.9, 0.99]}, "model": {"weights": None}, **options}
    started = tracker.start(TrackedRun(folder, "first", values, "train:\n  lr: 0.5\n", known))
    tracker.log({"train/loss": 1.5, "train/lr": 0.5}, 16)
    tracker.log({"train/loss": math.nan}, 32)
    tracker.finish(SUMMARY)
    tracker.close("finished")
    return started


def test_tensorboard(tmp_path: Path) -> None:
    assert used(base.get_tracker("tensorboard")({}), tmp_path) == Started()
    events = EventAccumulator(str(RunLayout(tmp_path).tensorboard), size_guidance={"tensors": 0, "images": 0}).Reload()
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert "    train:\n      lr: 0.5" in texts["config/text_summary"]
    (table,) = [text for tag, text in texts.items() if tag.startswith("test/classes")]
    assert "| dog | 75.00 |" in table and "<b>" not in table and "](" not in table and "\x1b" not in table
    assert table.count("\n") == 3 and len(re.findall(r"(?m)^\|.*\|.*\|$", table)) == 4
    assert [e.value for e in events.Scalars("test/alpha_1/map")] == [50.0]
    assert (events.Images("examples/0")[0].width, events.Images("examples/0")[0].height) == (4, 4)
    (caption,) = [text for tag, text in texts.items() if tag.startswith("examples/0")]
    assert caption.startswith("predicted&#58; dog 0.75") and "<b>" not in caption


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed (pip install 'spml_fast[wandb]')")
    monkeypatch.setenv("WANDB_MODE", "offline")
    started = used(base.get_tracker("wandb")({"project": "p"}), tmp_path)
    folder = RunLayout(tmp_path).trackers / "wandb"
    (first,) = folder.glob("offline-run-*")
    assert started.id is not None and first.name.endswith(started.id)
    assert started.place is not None and f"wandb sync {first}" in started.place
    (table,) = first.rglob("*.table.json")
    content = json.loads(table.read_text(encoding="utf-8"))
    assert content["columns"] == list(SUMMARY.columns) and content["data"] == [list(row) for row in SUMMARY.rows]
    (image,) = first.rglob("*.png")
    assert (np.asarray(Image.open(image)) == PIXELS).all()
    assert (first / f"run-{started.id}.wandb").stat().st_size > 0
    again = used(base.get_tracker("wandb")({"project": "p"}), tmp_path, started.id, train={"lr": 0.25})
    assert again.id == started.id and all(p.name.endswith(started.id) for p in folder.glob("offline-run-*"))


def test_mlflow(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed (pip install 'spml_fast[mlflow]')")
    options = {"tracking_uri": f"sqlite:///{tmp_path}/m.db", "experiment": "birds", "tags": {"a": "b"}}
    client = mlflow.MlflowClient(options["tracking_uri"])
    client.create_experiment("birds", artifact_location=f"file://{tmp_path}/artifacts")
    started = used(base.get_tracker("mlflow")(options), tmp_path)
    assert started.id is not None
    again = used(base.get_tracker("mlflow")(options), tmp_path, started.id, train={"lr": 0.25}, more=1)
    assert again.id == started.id
    run = client.get_run(started.id)
    assert run.info.status == "FINISHED" and run.info.run_name == "first" and run.data.tags["a"] == "b"
    assert run.data.params["train.lr"] == "0.5" and run.data.params["more"] == "1"
    history = client.get_metric_history(started.id, "train/loss")
    assert sorted((m.step, m.value) for m in history if not math.isnan(m.value)) == [(16, 1.5)] * 2
    assert run.data.metrics["test/alpha_1/map"] == 50.0
    (file,) = tmp_path.rglob("classes.csv")
    rows = list(csv.reader(file.read_text(encoding="utf-8").splitlines()))
    assert rows == [list(SUMMARY.columns), ["dog", "75.0"], [HOSTILE, ""]]
    (image,) = tmp_path.rglob("0.png")
    assert (np.asarray(Image.open(image)) == PIXELS).all()
    (options_file,) = tmp_path.rglob("options.yaml")
    assert options_file.read_text(encoding="utf-8") == "train:\n  lr: 0.5\n"


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed (pip install 'spml_fast[trackio]')")
    # It reads its folders when it is imported, and each of its modules keeps them.
    for name, module in list(sys.modules.items()):
        if name.startswith("trackio"):
            for constant, folder in (("TRACKIO_DIR", tmp_path / "db"), ("MEDIA_DIR", tmp_path / "db" / "media")):
                if hasattr(module, constant):
                    monkeypatch.setattr(module, constant, folder)
    options = {"project": "birds", "auto_log_cpu": False}
    started = used(base.get_tracker("trackio")(options), tmp_path)
    assert started.id is not None and started.id.startswith("first-")
    again = used(base.get_tracker("trackio")(options), tmp_path, started.id)
    assert again.id == started.id
    with sqlite3.connect(tmp_path / "db" / "birds.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, *_ in rows} == {started.id} and [step for _, step, _ in rows] == [16, 32, 64] * 2
    assert json.loads(rows[0][2]) == {"train/loss": 1.5, "train/lr": 0.5}
    final = json.loads(rows[2][2])
    assert final["test/alpha_1/map"] == 50.0 and "dog" in json.dumps(final["test/classes"])
    assert len(list(tmp_path.rglob("*.png"))) == 2


PLUGIN = '''
import json
from pathlib import Path
from spml_fast.training.trackers.base import Started, Tracker, register

@register("lines")
class Lines(Tracker):
    """Writes what it is told to a file, and fails at the final figures of a run that is called so."""

    def start(self, run):
        self.path = Path(self.options["file"])
        self.tell("start", run.known, run.options["train"]["epochs"], len(run.text) > 100)
        return Started("own-name", "a file")

    def tell(self, *values):
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\\n")

    def log(self, figures, images):
        self.tell("log", figures, images)

    def finish(self, summary):
        if self.options.get("fails"):
            raise ConnectionError("no network")
        self.tell("finish", summary.figures, summary.columns, summary.rows, [e.caption for e in summary.examples])

    def close(self, ended):
        self.tell("close", ended)
'''


def test_a_whole_run_and_its_resume(small_digits: Path, tmp_path: Path) -> None:
    """A tracker in a file of one's own, which fails at the first end; of two ranks that resume the run one tells it."""
    (tmp_path / "lines.py").write_text(PLUGIN)
    run, out = tmp_path / "run", tmp_path / "out.jsonl"
    words = ["--config", str(ROOT / "launch" / "configs" / "digits.yaml"), "--data.dir", str(small_digits)]
    words += ["--run.dir", str(run), "--run.plugins", f"[{tmp_path / 'lines.py'}]", "--train.log_every", "1"]
    words += ["--run.trackers", "[lines]", "--data.threads", "1"]

    def train(epochs: int, options: str, ranks: int = 1) -> str:
        given = [*words, "--train.epochs", str(epochs), "--run.tracker_options", f"{{lines: {options}}}"]
        done = warm.run_script("train.py", *given, ranks=ranks, launcher="torchrun" if ranks > 1 else "python")
        assert done.returncode == 0, done.stdout + done.stderr
        return str(done.stdout)

    said = train(1, f"{{file: {out}, fails: true}}")
    assert "tracker lines: a file" in said
    assert said.count("warning: tracker lines is left out from now on: ConnectionError: no network") == 1
    assert (run / "results.json").is_file() and not (run / "tensorboard").exists()
    first = [json.loads(line) for line in out.read_text().splitlines()]
    assert first[0] == ["start", None, 1, True]
    logged = [line[1] for line in first if line[0] == "log"]
    updates = read_metrics(run, "update")
    assert [figures["train/loss"] for figures in logged[:-1]] == [entry["loss"] for entry in updates] and updates
    (epoch,) = read_metrics(run, "epoch")
    assert logged[-1]["epoch/loss"] == epoch["loss"] and logged[-1]["epoch/val_map"] == epoch["val_map"]
    out.unlink()
    assert "resuming at epoch 2" in train(2, f"{{file: {out}}}", ranks=2)
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert again[0] == ["start", "own-name", 2, True] and again[-1] == ["close", "finished"]
    results = json.loads((run / "results.json").read_text())
    _, figures, columns, rows, captions = again[-2]
    assert columns == ["class", *(f"AP, alpha {alpha}" for alpha in results["alpha"])]
    for alpha, metrics in results["alpha"].items():
        assert figures[f"test/alpha_{alpha}/map"] == pytest.approx(metrics["map"])
        place = columns.index(f"AP, alpha {alpha}")
        assert [row[place] for row in rows] == pytest.approx(metrics["per_class_ap"])
    assert len(captions) == 8 and all(c.startswith("predicted: ") and "; known: " in c for c in captions)
