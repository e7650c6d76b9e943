"""What checkpoints hold, which are kept, and what is said about damaged files."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
import torch

from spml_fast.core.errors import UserError
from spml_fast.core.io import file_record, write_json
from spml_fast.training.checkpoint import (
    BestWeights,
    Checkpoint,
    CheckpointPosition,
    clear_unfinished,
    commit_checkpoint,
    delete_old,
    free_position,
    list_checkpoints,
    load_rank_states,
    read_mark,
    read_position,
    save_rank_state,
)
from spml_fast.training.resume import Resume, check_same_run, find_resume


@pytest.fixture
def folder(tmp_path):
    """The checkpoint directory of a run."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    return tmp_path / "run" / "checkpoints"


def mark(epoch, update=0, phase="finetune", world_size=2):
    return CheckpointPosition(phase, epoch, update, world_size, zero_stage=0)


def save(folder, which, keep=1, best=None, files=("weights",), defines=None):
    """What the trainer does: files first, then the mark, then what is old goes; `best` is a position."""
    (folder / which.tag).mkdir()
    for name in files:
        (folder / which.tag / name).write_text(f"{which.tag} {name}")
    records = {name: file_record(folder / which.tag / name) for name in files}
    kept = None if best is None else BestWeights(best.tag, None)
    saved = commit_checkpoint(Checkpoint(folder, which, files=records, defines=defines or {}, best=kept))
    delete_old(saved, keep)
    return saved


def found(folder, resume):
    """Folder and position of what a run resumes from."""
    resumed = find_resume(folder, str(resume))
    return None if resumed is None else (resumed.checkpoint.folder, resumed.checkpoint.position)


def kept(folder):
    return {p.name for p in folder.iterdir() if p.is_dir()}


def flip(path, place=0):
    """Change one bit of a file, and nothing of its size and time."""
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_tags_are_distinct_and_sort_by_place():
    marks = [mark(e, u, world_size=w) for e in (0, 3, 12) for u in (0, 7, 12_000) for w in (1, 16)]
    tags = [m.tag for m in marks]
    assert len(set(tags)) == len(tags) and sorted(tags) == sorted(tags, key=lambda t: t.split("-")[1:])
    assert mark(3).tag == "finetune-e0003-u000000-w2"
    assert mark(3, phase="linear").tag != mark(3).tag
    assert dataclasses.replace(mark(3), attempt=2).tag == "finetune-e0003-u000000-w2-2"


def test_nothing_to_go_on_from(folder):
    assert find_resume(folder, "auto") is None
    assert find_resume(folder, "never") is None
    assert find_resume(folder.parent / "missing", "auto") is None


def test_auto_takes_the_newest(folder):
    save(folder, mark(1), keep=5)
    save(folder, mark(2), keep=5)
    assert found(folder, "auto") == found(folder, "force") == (folder, mark(2))
    assert find_resume(folder, "force").force and not find_resume(folder, "auto").force


@pytest.mark.parametrize(
    "content", [None, "", "{", "[]", "7", "{}", '{"phase": "finetune"}', '{"epoch": "x"}', "\x00ÿ"]
)
def test_the_newest_is_found_without_its_pointer(folder, content):
    """Not by the files' times, which copying changes."""
    for epoch in (1, 2, 3):
        save(folder, mark(epoch), keep=5)
        os.utime(folder / mark(epoch).tag, (10 - epoch, 10 - epoch))
    newest = folder / "newest.json"
    newest.unlink() if content is None else newest.write_text(content, encoding="latin-1")
    resume = find_resume(folder, "auto")
    assert resume.checkpoint.position == mark(3)
    assert len(resume.notes) == (content is not None) and all(str(newest) in note for note in resume.notes)


def test_what_was_saved_last_is_the_newest_after_going_back(folder):
    for epoch in (1, 2, 3):
        save(folder, mark(epoch), keep=5)
    again = free_position(folder, mark(2))
    assert again == dataclasses.replace(mark(2), attempt=2)
    save(folder, again, keep=5)
    (folder / "newest.json").unlink()
    assert found(folder, "auto") == (folder, again)


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
        (f"force:{folder / mark(1).tag}", mark(1)),
    ):
        assert found(elsewhere, path) == (folder, expected)
    # A run that has checkpoints of its own goes on with them.
    elsewhere.mkdir(parents=True)
    save(elsewhere, mark(7))
    assert found(elsewhere, folder.parent) == (elsewhere, mark(7))
    # Unless one of its own is asked for.
    assert found(folder, folder / mark(1).tag) == (folder, mark(1))
    assert found(folder, folder.parent) == found(folder, folder) == (folder, mark(2, 30))


def test_a_path_without_a_checkpoint(folder, tmp_path):
    for path in (folder, folder.parent, folder / "nowhere", tmp_path / "x"):
        with pytest.raises(UserError, match=r"--run.resume.*: there is no checkpoint"):
            find_resume(tmp_path / "new" / "checkpoints", str(path))
    save(folder, mark(1))
    (folder / mark(2).tag).mkdir()
    for tag, said in ((mark(2).tag, "was not saved to its end"), (mark(3).tag, "is not there")):
        with pytest.raises(UserError, match=rf"{said}; others there: {mark(1).tag}"):
            find_resume(folder, str(folder / tag))


@pytest.mark.parametrize("harm", ["flipped bit", "zero bytes", "cut off", "missing file", "mark"])
def test_a_damaged_checkpoint_gives_way_to_the_newest_whole_one(folder, harm):
    for epoch in (1, 2, 3):
        save(folder, mark(epoch), keep=5, files=("rank_0", "rank_1"))
    path = folder / mark(3).tag / ("mark.json" if harm == "mark" else "rank_1")
    if harm == "flipped bit":
        flip(path, 3)
    elif harm == "zero bytes":
        path.write_bytes(b"")
    elif harm == "missing file":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    resume = find_resume(folder, "auto")
    assert resume.checkpoint.position == mark(2) and resume.damaged == (mark(3).tag,)
    damaged, instead = resume.notes
    assert mark(3).tag in damaged and path.name in damaged and "damaged" in damaged
    assert instead == f"resuming from {mark(2).tag}, the newest whole checkpoint"
    with pytest.raises(UserError, match=r"damaged"):
        find_resume(folder, str(folder / mark(3).tag))
    # The damaged one goes with the next save, and takes no whole one's place.
    again = free_position(folder, mark(3)) if harm != "mark" else dataclasses.replace(mark(3), attempt=2)
    (folder / again.tag).mkdir()
    saved = commit_checkpoint(Checkpoint(folder, again))
    delete_old(saved, 2, resume.damaged)
    assert kept(folder) == {again.tag, mark(2).tag}


def test_training_does_not_start_over_in_silence(folder):
    save(folder, mark(1), files=("weights",))
    flip(folder / mark(1).tag / "weights")
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole: .*weights has another checksum.*--run.dir"):
        find_resume(folder, "auto")
    for path in sorted((folder / mark(1).tag).iterdir()):
        path.unlink()
    with pytest.raises(UserError, match=r"has newest.json but no checkpoint to resume from"):
        find_resume(folder, "auto")
    (folder / "newest.json").unlink()
    # A first save that was killed.
    assert find_resume(folder, "auto") is None
    (folder.parent / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"has model.safetensors but no checkpoint"):
        find_resume(folder, "auto")


def test_marks_round_trip(folder):
    write_json(folder / "newest.json", dataclasses.asdict(mark(3, 4)))
    assert read_position(folder / "newest.json") == mark(3, 4)
    assert read_position(folder / "none.json") is None
    saved = save(folder, mark(1), best=mark(1), files=("a", "b"), defines={"method.name": "an", "run.seed": 3})
    assert read_mark(folder, mark(1).tag) == saved and saved.serial == 1 and saved.best.tag == mark(1).tag
    assert list(json.loads((folder / mark(1).tag / "mark.json").read_text())["files"]) == ["a", "b"]
    assert read_position(folder / "best.json") == mark(1)
    with pytest.raises(UserError, match="it is the mark of"):
        (folder / mark(1).tag).rename(folder / mark(2).tag)
        read_mark(folder, mark(2).tag)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_and_the_best_are_kept(folder, keep):
    for epoch in range(1, 8):
        save(folder, mark(epoch), keep, best=mark(min(epoch, 2)))
        assert read_position(folder / "newest.json") == mark(epoch)
    newest = {mark(e).tag for e in range(8 - keep, 8)}
    assert kept(folder) == newest | {mark(2).tag}
    assert read_position(folder / "best.json") == mark(2)
    assert read_position(folder / mark(7).tag / "mark.json") == mark(7)


def test_a_new_best_lets_the_old_one_go(folder):
    for epoch in range(1, 5):
        save(folder, mark(epoch), best=mark(1 if epoch < 3 else 3))
    assert kept(folder) == {mark(3).tag, mark(4).tag}


def test_within_an_epoch_and_over_phases(folder):
    linear = mark(2, phase="linear")
    save(folder, linear, best=linear)
    for update in (0, 50, 100):
        save(folder, mark(1, update), best=linear)
    assert kept(folder) == {linear.tag, mark(1, 100).tag}


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
    assert [(one.tag, one.checkpoint is None) for one in list_checkpoints(folder)] == [
        (mark(1).tag, False),
        (mark(2).tag, True),
    ]
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
    assert save_rank_state(tmp_path, {}) == {} and list(tmp_path.iterdir()) == []
    records = save_rank_state(tmp_path, {"rows": torch.arange(3)})
    (path,) = tmp_path.iterdir()
    assert path.name == "method_rank_00000.pt" and records == {path.name: file_record(path)}
    assert torch.equal(load_rank_states(tmp_path, 1)[0]["rows"], torch.arange(3))
    # Versions before 0.2.0.
    path.rename(tmp_path / "method_shard_00000.pt")
    assert torch.equal(load_rank_states(tmp_path, 1)[0]["rows"], torch.arange(3))
    with pytest.raises(UserError, match=r"method_rank_00001\.pt cannot be read"):
        load_rank_states(tmp_path, 2)


def test_old_checkpoints_are_compared_with_their_formats_own_checksums(folder):
    path = folder / mark(1).tag
    path.mkdir()
    torch.save({"w": torch.arange(1000)}, path / "mp_rank_00_model_states.pt")
    write_json(path / "mark.json", {k: v for k, v in dataclasses.asdict(mark(1)).items() if k != "attempt"})
    checkpoint = find_resume(folder, "auto").checkpoint
    assert checkpoint.position == mark(1) and not checkpoint.files and checkpoint.serial == 0
    flip(path / "mp_rank_00_model_states.pt", 2000)
    assert "mp_rank_00_model_states.pt has another checksum" in checkpoint.damage()
    (path / "mp_rank_00_model_states.pt").write_bytes(b"")
    assert "mp_rank_00_model_states.pt cannot be read" in checkpoint.damage()
    (path / "mp_rank_00_model_states.pt").unlink()
    assert checkpoint.damage() == "its files are missing"


def test_another_run_is_refused_with_what_differs(folder, tmp_path):
    saved = save(folder, mark(1), defines={"method.name": "ll_r", "run.seed": 0, "model.head": "cam"})
    defines = {"method.name": "an", "run.seed": 1, "model.head": "cam", "data.version": "2"}
    changes = "method.name ll_r -> an, run.seed 0 -> 1"
    assert check_same_run(Resume(saved), {"method.name": "ll_r", "run.seed": 0}, folder.parent) is None
    with pytest.raises(UserError) as error:
        check_same_run(Resume(saved), defines, folder.parent)
    assert f"({changes}); give another --run.dir" in str(error.value) and "--run.resume force " in str(error.value)
    with pytest.raises(UserError, match=rf"--run.resume force:{saved.path}"):
        check_same_run(Resume(saved), defines, tmp_path / "other")
    assert changes in check_same_run(Resume(saved, force=True), defines, folder.parent)
    # Marks of versions before 0.2.0 do not say; the recipe beside them does.
    (folder.parent / "config.yaml").write_text("method: {name: ll_r}\nrun: {seed: 0}\n")
    with pytest.raises(UserError, match=changes):
        check_same_run(Resume(dataclasses.replace(saved, defines={})), defines, folder.parent)
    (folder.parent / "config.yaml").write_text("{")
    assert check_same_run(Resume(dataclasses.replace(saved, defines={})), defines, folder.parent) is None
