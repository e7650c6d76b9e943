"""`suggest --folds K`: every image is judged by a run that has not seen it."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from spml_fast.analysis.folds import HELD, cost, fold_of, make_folds
from spml_fast.analysis.suggest import Suggestions, merge_lists
from spml_fast.cli import suggest as command
from spml_fast.cli.parse import parse_config
from spml_fast.core.config import Config
from spml_fast.core.errors import UserError
from spml_fast.data.labels import NEGATIVE, POSITIVE, SparseLabels
from spml_fast.data.manifest import Manifest
from spml_fast.prepare.manifest_writer import ManifestWriter
from spml_fast.prepare.pack.options import PackOptions
from spml_fast.prepare.pack.run import pack
from spml_fast.runs.layout import RunLayout
from spml_fast.runs.recipe import load_config, to_yaml


def config_of(data: Path, *words: str) -> Config:
    given = ["--config", "digits", "--train.epochs", "1", "--data.threads", "1", "--deepspeed.tensorboard", "false"]
    return parse_config([*given, "--data.dir", str(data), *words])


@pytest.fixture
def run(small_digits: Path, tmp_path: Path) -> Path:
    """A run of which `--folds` needs no more than its options."""
    layout = RunLayout(tmp_path / "run")
    layout.folder.mkdir()
    layout.config.write_text(to_yaml(config_of(small_digits)), encoding="utf-8")
    return layout.folder


def test_folds_are_even_and_repeat() -> None:
    fold = fold_of(103, 5, 7)
    assert sorted(np.bincount(fold).tolist()) == [20, 20, 21, 21, 21] and np.array_equal(fold, fold_of(103, 5, 7))
    assert not np.array_equal(fold, fold_of(103, 5, 8)) and len(set(fold[:10])) > 2


@pytest.mark.parametrize(("code", "top", "per_class"), [(POSITIVE, 9, None), (NEGATIVE, None, 2), (NEGATIVE, 5, 2)])
def test_lists_are_merged(code: int, top: int | None, per_class: int | None) -> None:
    """Against sorting everything; few values, so that ties decide often."""
    rng = np.random.default_rng(3)
    rows, parts, every = [np.arange(0, 20, 2), np.arange(1, 20, 2)], [], []
    for k in range(2):
        pairs = sorted(rng.choice(40, 15, replace=False).tolist())
        index, class_id = np.divmod(np.array(pairs), 4)
        probability = rng.integers(1, 4, 15) / 4
        order = np.lexsort((class_id, index, probability if code == POSITIVE else -probability))
        parts.append([Suggestions(code, index[order], class_id[order], probability[order], 100 + k)])
        every += [
            (p if code == POSITIVE else -p, int(rows[k][i]), int(c), k)
            for i, c, p in zip(index, class_id, probability, strict=True)
        ]
    every.sort()
    if per_class is not None:
        every = sorted(e for c in range(4) for e in [x for x in every if x[2] == c][:per_class])
    (found,) = merge_lists(parts, rows, ["a", "b"], top, per_class)
    expected = every[:top]
    assert [(i, c) for _, i, c, _ in expected] == list(zip(found.index, found.class_id, strict=True))
    assert found.run_of is not None and [k for *_, k in expected] == found.run_of.tolist()
    assert np.abs([s for s, *_ in expected]).tolist() == found.probability.tolist()
    assert found.reach == 201 and found.runs == ("a", "b")


def check_fold(folds, k: int) -> Manifest:
    """A fold's data set has every image once, with the labels, places and content that it had."""
    folds.write_data(k)
    data, split = Manifest(folds.layout.data(k)), folds.split
    place = {split.relative_path(row): row for row in range(len(split))}
    seen = []
    for name in (split.name, HELD):
        part = data.split(name)
        rows = [place[part.relative_path(i)] for i in range(len(part))]
        assert (name == HELD) == all(folds.fold[row] == k for row in rows)
        for labels in ("known", "observed"):
            old, new = (getattr(s, labels) for s in (split, part))
            assert np.array_equal(new.rows(range(len(part))), old.rows(rows)) and new.default == old.default
        assert part.hides_labels == split.hides_labels and part.width.tolist() == split.width[rows].tolist()
        assert [part.read(i) for i in range(3)] == [split.read(row) for row in rows[:3]]
        seen += rows
    assert sorted(seen) == list(range(len(split)))
    return data


def test_data_of_folds(run: Path, small_digits: Path, tmp_path: Path) -> None:
    """Of files, of tar shards, and of paths from a template that has the split's name in it."""
    folds = make_folds(run, config_of(small_digits), Manifest(small_digits), 3, None)
    data = check_fold(folds, 1)
    assert set(data.splits) == {"train", HELD, "val"} and len(data.split("val")) == 60
    assert folds.layout.folder == run / "folds-3" and not folds.finished(1)
    config = folds.config_of(1)
    # Folds are nobody's to look at: their runs go to no tracker but TensorBoard.
    words = ["--run.trackers", "[tensorboard, wandb]", "--run.tracker_options", "{wandb: {}}"]
    watched = dataclasses.replace(folds, config=config_of(small_digits, *words)).config_of(1).run
    assert watched.trackers == ["tensorboard"] and watched.tracker_options == {}
    assert config.data.dir == str(data.folder) and config.data.test_split is None and config.model == folds.config.model
    packed = pack(PackOptions(manifest=small_digits, out=tmp_path / "packed", shard_size=200_000, workers=1))
    check_fold(make_folds(run, config_of(packed.folder), packed, 2, tmp_path / "folds"), 0)
    writer = ManifestWriter(tmp_path / "ids", "ids", ["a"], small_digits / "images")
    labels = SparseLabels.from_positives([[0], [], [0], [0], [0], []], 1, 0)
    side = np.full(6, 64)
    writer.add_split("train", known=labels, width=side, height=side, ids=range(6), template="{split}/{id:05d}.jpg")
    check_fold(make_folds(run, config_of(tmp_path / "ids"), writer.finish({}), 2, tmp_path / "folds-of-ids"), 1)


def test_what_users_get_wrong(run: Path, small_digits: Path, tmp_path: Path) -> None:
    config, manifest = config_of(small_digits), Manifest(small_digits)
    for number in (1, 193):
        with pytest.raises(UserError, match=f"--folds is {number}; it must lie between 2 and the 192 images"):
            make_folds(run, config, manifest, number, None)
    make_folds(run, config, manifest, 3, tmp_path / "folds")
    with pytest.raises(UserError, match=r"folds of something else \(folds differ\); delete it"):
        make_folds(run, config, manifest, 4, tmp_path / "folds")
    with pytest.raises(UserError, match="is not empty and has no folds"):
        make_folds(run, config, manifest, 3, small_digits)
    with pytest.raises(UserError, match="the run has not seen val: leave --folds out to judge it"):
        command.main(["--run", str(run), "--folds", "2", "--split", "val"])
    with pytest.raises(UserError, match="--folds-dir is for --folds K"):
        command.main(["--run", str(run), "--folds-dir", "x"])


@pytest.mark.parametrize("words", [["--run.seed", "7"], ["--train.epochs", "9"]])
def test_folds_of_another_seed_or_of_other_options_are_refused(
    run: Path, small_digits: Path, tmp_path: Path, words: list[str]
) -> None:
    manifest = Manifest(small_digits)
    make_folds(run, config_of(small_digits), manifest, 3, tmp_path / "folds")
    make_folds(run, config_of(small_digits, "--run.dir", "elsewhere"), manifest, 3, tmp_path / "folds")
    with pytest.raises(UserError, match="has folds of something else"):
        make_folds(run, config_of(small_digits, *words), manifest, 3, tmp_path / "folds")


def test_what_it_costs(run: Path, small_digits: Path, tmp_path: Path) -> None:
    config, manifest = config_of(small_digits), Manifest(small_digits)
    folds = make_folds(run, config, manifest, 4, tmp_path / "folds")
    assert cost(folds, run) == [f"4 runs of 144 of 192 images each, as {run} was trained; in {tmp_path / 'folds'}"]
    RunLayout(run).results.write_text(json.dumps({"train_seconds": 1200.0}), encoding="utf-8")
    layout = folds.layout.run(2)
    layout.folder.mkdir(parents=True)
    layout.results.write_text("{}", encoding="utf-8")
    layout.weights.write_bytes(b"")
    (line,) = cost(folds, run)
    assert "1 of them are there; about 3 x 75% of its 20.0 minutes: 45.0 minutes; in" in line
    started = dataclasses.replace(config, model=dataclasses.replace(config.model, weights=str(run)))
    note = cost(make_folds(run, started, manifest, 4, tmp_path / "others"), run)[1]
    assert note.startswith(f"note: {run} started from {run}, and so do these runs: images that")


def test_judged_by_runs_that_have_not_seen_them(run_script, run: Path, small_digits: Path, tmp_path: Path) -> None:
    """Trained, judged, merged; a second time nothing is trained."""
    words = ["--run", run, "--folds", 2, "--csv", tmp_path / "out.csv", "--per-class", 1000, "--min-probability", 0]
    done = run_script("suggest.py", *words)
    assert done.returncode == 0, done.stderr
    assert "2 runs of 96 of 192 images each" in " ".join(done.stdout.split()) and "fold 2 of 2" in done.stdout
    assert "precision of the first 10" in done.stdout
    split, fold = Manifest(small_digits).split("train"), fold_of(192, 2, 0)
    place = {split.relative_path(row): row for row in range(192)}
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    # Every pair whose label is unknown or positive has its row.
    assert len(rows) == 1920 and {r["split"] for r in rows} == {"train"}
    runs = [RunLayout(run).folds(2).run(k) for k in range(2)]
    assert all(r["run"] == str(runs[fold[place[r["path"]]]].folder) for r in rows)
    trained = load_config(runs[1].config)
    assert trained.data.dir is not None and len(Manifest(trained.data.dir).split("train")) == 96
    before = [layout.weights.stat().st_mtime_ns for layout in runs]
    again = run_script("suggest.py", *words)
    assert (
        again.returncode == 0
        and "fold 1 of 2" not in again.stdout
        and "2 of them are there" in " ".join(again.stdout.split())
    )
    assert [layout.weights.stat().st_mtime_ns for layout in runs] == before
