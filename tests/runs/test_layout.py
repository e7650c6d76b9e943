"""Names of a run's files: they are what older runs have, and what docs and users' scripts spell."""

from __future__ import annotations

from pathlib import Path

import pytest

from spml_fast.core.errors import UserError
from spml_fast.runs.layout import CheckpointLayout, RunLayout, rank_state, saved_rank_state

RUN = Path("runs/a")


def test_names_have_not_changed():
    layout = RunLayout(RUN)
    names = ("config", "deepspeed", "classes", "metrics", "results", "weights", "options")
    assert [str(getattr(layout, name)) for name in names] == [
        "runs/a/config.yaml",
        "runs/a/deepspeed.json",
        "runs/a/classes.txt",
        "runs/a/metrics.jsonl",
        "runs/a/results.json",
        "runs/a/model.safetensors",
        "runs/a/options.json",
    ]
    checkpoints = layout.checkpoints
    assert checkpoints == CheckpointLayout(RUN / "checkpoints")
    assert checkpoints.newest == RUN / "checkpoints" / "newest.json"
    assert checkpoints.best == RUN / "checkpoints" / "best.json"
    assert checkpoints.position("tag") == RUN / "checkpoints" / "tag" / "mark.json"
    assert rank_state(RUN, 3) == RUN / "method_rank_00003.pt" and rank_state(RUN, 3) != rank_state(RUN, 30)


def test_rank_states_of_older_versions_are_found(tmp_path):
    assert saved_rank_state(tmp_path, 1) == rank_state(tmp_path, 1), "the name for messages where there is none"
    older = tmp_path / "method_shard_00001.pt"
    older.touch()
    assert saved_rank_state(tmp_path, 1) == older and saved_rank_state(tmp_path, 0) == rank_state(tmp_path, 0)
    rank_state(tmp_path, 1).touch()
    assert saved_rank_state(tmp_path, 1) == rank_state(tmp_path, 1)


def test_what_is_a_run_and_what_has_begun(tmp_path):
    layout = RunLayout(tmp_path)
    with pytest.raises(UserError, match=r"is not a run directory \(no config\.yaml in it\)"):
        layout.require()
    layout.config.touch()
    assert layout.require() is layout and not layout.begun
    layout.checkpoints.folder.mkdir()
    layout.checkpoints.newest.touch()
    assert layout.begun
    layout.checkpoints.newest.unlink()
    layout.results.touch()
    assert layout.begun


def test_what_no_run_wrote(tmp_path):
    layout = RunLayout(tmp_path / "run")
    assert layout.foreign == []
    layout.folder.mkdir()
    # What starts that failed, launchers and file systems leave.
    layout.checkpoints.folder.mkdir()
    (layout.folder / "tensorboard").mkdir()
    layout.trackers.mkdir()
    for name in ("options.json", "metrics.jsonl", "config.yaml.partial", ".nfs0001", "slurm-17.out", "train.log"):
        (layout.folder / name).touch()
    assert layout.foreign == []
    (layout.folder / "photo.jpg").touch()
    assert layout.foreign == ["photo.jpg"]
    # A run may hold what its owner put there.
    layout.config.touch()
    assert layout.foreign == []
    # A Manifest has a list of classes, and no settings of a run.
    (layout.folder / "manifest.json").touch()
    assert layout.foreign == ["manifest.json", "photo.jpg"]
