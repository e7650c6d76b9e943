"""Which checkpoint a run resumes from, which are kept, and what is said about damaged files."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

from spml_fast.core.errors import UserError
from spml_fast.core.io import write_json
from spml_fast.training.checkpoint import (
    CheckpointPosition,
    clear_unfinished,
    commit_checkpoint,
    find_resume,
    load_rank_states,
    read_position,
    save_rank_state,
)


@pytest.fixture
def folder(tmp_path):
    """The checkpoint directory of a run."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    return tmp_path / "run" / "checkpoints"


def mark(epoch, update=0, phase="finetune", world_size=2):
    return CheckpointPosition(phase, epoch, update, world_size, zero_stage=0)


def save(folder, which, keep=1, best=False):
    """What the trainer does: files first, then the mark."""
    (folder / which.tag).mkdir()
    (folder / which.tag / "weights").write_text("w")
    # Directories get times a second apart, as real ones would.
    age = 10_000 * (which.phase == "finetune") + 100 * which.epoch + which.update
    os.utime(folder / which.tag, (age, age))
    commit_checkpoint(folder, which, keep, best)
    os.utime(folder / which.tag, (age, age))


def kept(folder):
    return {p.name for p in folder.iterdir() if p.is_dir()}


def test_tags_are_distinct_and_sort_by_place():
    marks = [mark(e, u, world_size=w) for e in (0, 3, 12) for u in (0, 7, 12_000) for w in (1, 16)]
    tags = [m.tag for m in marks]
    assert len(set(tags)) == len(tags) and sorted(tags) == sorted(tags, key=lambda t: t.split("-")[1:])
    assert mark(3).tag == "finetune-e0003-u000000-w2"
    assert mark(3, phase="linear").tag != mark(3).tag


def test_nothing_to_go_on_from(folder):
    assert find_resume(folder, "auto") is None
    assert find_resume(folder, "never") is None
    assert find_resume(folder.parent / "missing", "auto") is None


def test_auto_takes_the_newest(folder):
    save(folder, mark(1), keep=5)
    save(folder, mark(2), keep=5)
    assert find_resume(folder, "auto") == (folder, mark(2))


def test_never_refuses_a_run(folder):
    save(folder, mark(1))
    with pytest.raises(UserError, match=r"already holds a run; .*--run.resume auto") as error:
        find_resume(folder, "never")
    assert str(folder.parent) in str(error.value)


def test_a_path_may_be_a_run_its_checkpoints_or_one_checkpoint(folder, tmp_path):
    save(folder, mark(1), keep=5)
    save(folder, mark(2, 30), keep=5)
    elsewhere = tmp_path / "other" / "checkpoints"
    for path, expected in (
        (folder.parent, mark(2, 30)),
        (folder, mark(2, 30)),
        (folder / mark(1).tag, mark(1)),
        (f"{folder / mark(1).tag}/", mark(1)),
    ):
        assert find_resume(elsewhere, str(path)) == (folder, expected)


def test_a_path_without_a_checkpoint(folder):
    for path in (folder, folder.parent, folder / "nowhere"):
        with pytest.raises(UserError, match=r"--run.resume .*: there is no checkpoint"):
            find_resume(folder, str(path))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "7", "{}", '{"phase": "finetune"}', '{"tag": "x"}', b"\xff\xfe\x00".decode("latin-1")]
)
def test_a_damaged_mark_is_named(folder, content):
    save(folder, mark(1))
    (folder / "newest.json").write_text(content, encoding="latin-1")
    for resume in ("auto", str(folder)):
        with pytest.raises(UserError, match=r"newest.json is damaged") as error:
            find_resume(folder, resume)
        assert str(folder / "newest.json") in str(error.value) and "\n" not in str(error.value)


def test_marks_round_trip(folder):
    write_json(folder / "newest.json", dataclasses.asdict(mark(3, 4)))
    assert read_position(folder / "newest.json") == mark(3, 4)
    assert read_position(folder / "none.json") is None


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_and_the_best_are_kept(folder, keep):
    for epoch in range(1, 8):
        save(folder, mark(epoch), keep, best=epoch == 2)
        assert read_position(folder / "newest.json") == mark(epoch)
    newest = {mark(e).tag for e in range(8 - keep, 8)}
    assert kept(folder) == newest | {mark(2).tag}
    assert read_position(folder / "best.json") == mark(2)
    assert read_position(folder / mark(7).tag / "mark.json") == mark(7)


def test_a_new_best_lets_the_old_one_go(folder):
    for epoch in range(1, 5):
        save(folder, mark(epoch), best=epoch in (1, 3))
    assert kept(folder) == {mark(3).tag, mark(4).tag}


def test_within_an_epoch_and_over_phases(folder):
    save(folder, mark(2, phase="linear"), best=True)
    for update in (0, 50, 100):
        save(folder, mark(1, update))
    assert kept(folder) == {mark(2, phase="linear").tag, mark(1, 100).tag}


def test_what_is_not_ours_stays(folder):
    for name in ("my-notes", f"{mark(1).tag}.copy", "Finetune-e0001"):
        (folder / name).mkdir()
    (folder / "readme.txt").write_text("mine")
    save(folder, mark(1))
    save(folder, mark(2))
    assert kept(folder) == {"my-notes", f"{mark(1).tag}.copy", "Finetune-e0001", mark(2).tag}
    assert (folder / "readme.txt").exists()


def test_a_killed_save_takes_no_whole_checkpoints_place(folder):
    save(folder, mark(1), keep=2)
    (folder / mark(2).tag).mkdir()
    save(folder, mark(3), keep=2)
    assert kept(folder) == {mark(1).tag, mark(3).tag}


def test_clear_unfinished(folder):
    (folder / mark(2).tag).mkdir()
    (folder / mark(2).tag / "half").write_text("h")
    save(folder, mark(1))
    clear_unfinished(folder, mark(2).tag)
    clear_unfinished(folder, mark(3).tag)
    assert kept(folder) == {mark(1).tag}


def test_rank_states_round_trip_under_both_names(tmp_path):
    save_rank_state(tmp_path, {})
    assert list(tmp_path.iterdir()) == []
    save_rank_state(tmp_path, {"rows": torch.arange(3)})
    (path,) = tmp_path.iterdir()
    assert path.name == "method_rank_00000.pt"
    assert torch.equal(load_rank_states(tmp_path, 1)[0]["rows"], torch.arange(3))
    # Versions before 0.2.0.
    path.rename(tmp_path / "method_shard_00000.pt")
    assert torch.equal(load_rank_states(tmp_path, 1)[0]["rows"], torch.arange(3))
    with pytest.raises(UserError, match=r"method_rank_00001\.pt cannot be read"):
        load_rank_states(tmp_path, 2)
