"""Checkpoints: which exist, which one to resume from, which to delete.

The names of the files stand in runs/layout.py. The folder of a checkpoint is named for its position, such as
`finetune-e0003-u000000-w2`; the number of ranks is in the name, because saving over the files of another number of
ranks mixes them.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from spml_fast.core import distributed
from spml_fast.core.errors import UserError
from spml_fast.core.io import write_json
from spml_fast.runs.layout import CheckpointLayout, RunLayout, rank_state, saved_rank_state

TAG = re.compile(r"[a-z]+-e\d{4,}-u\d{6,}-w\d+")


@dataclass(frozen=True)
class CheckpointPosition:
    """Where in training a checkpoint was saved.

    Attributes:
        phase: `linear` or `finetune`.
        epoch: epochs done in the phase.
        update: updates done in the epoch that comes next; 0 at an epoch's end.
        world_size: ranks that saved it.
        zero_stage: ZeRO stage that saved it.
    """

    phase: str
    epoch: int
    update: int
    world_size: int
    zero_stage: int

    @property
    def tag(self) -> str:
        """Name of the checkpoint's folder."""
        return f"{self.phase}-e{self.epoch:04d}-u{self.update:06d}-w{self.world_size}"


def read_position(path: Path) -> CheckpointPosition | None:
    """The position in newest.json or best.json; None when there is none. `UserError` when damaged."""
    if not path.is_file():
        return None
    try:
        return CheckpointPosition(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it to start afresh") from error


def find_resume(folder: Path, resume: str) -> tuple[Path, CheckpointPosition] | None:
    """The checkpoint to resume from.

    Args:
        folder: the run's checkpoint directory.
        resume: `auto`, `never`, or the path of a checkpoint folder (or of a run directory) to start from.

    Returns:
        Checkpoint directory and position, or None to start afresh.

    Raises:
        UserError: `never` and there is one, or the path holds none.
    """
    own = read_position(CheckpointLayout(folder).newest)
    if resume != "never" and own is not None:
        # A run that was started from a path and then killed resumes from its own checkpoints.
        return folder, own
    if resume == "auto":
        return None
    if resume == "never":
        if own is not None:
            raise UserError(
                f"{folder.parent} already holds a run; choose another --run.dir, or resume it with --run.resume auto"
            )
        return None
    path = Path(resume)
    inside = RunLayout(path).checkpoints.folder
    path = inside if inside.is_dir() else path
    newest = CheckpointLayout(path).newest
    if newest.is_file():
        position = read_position(newest)
        assert position is not None
        return path, position
    position = read_position(CheckpointLayout(path.parent).position(path.name))
    if position is None:
        raise UserError(f"--run.resume {resume}: there is no checkpoint (give a run directory or a checkpoint folder)")
    return path.parent, position


def commit_checkpoint(folder: Path, position: CheckpointPosition, keep: int, best: bool) -> None:
    """Make a saved checkpoint the newest, and delete older ones (rank 0; call after all ranks saved).

    Args:
        folder: the run's checkpoint directory.
        position: the checkpoint's.
        keep: how many checkpoints stay beside the best one.
        best: whether this one has the best weights.
    """
    layout = CheckpointLayout(folder)
    if distributed.is_main():
        write_json(layout.position(position.tag), asdict(position))
        write_json(layout.newest, asdict(position))
        if best:
            write_json(layout.best, asdict(position))
        best_position = read_position(layout.best)
        # Copies that a user put beside ours have other names and stay.
        # What a killed save left has no position and goes.
        ours = [p for p in folder.iterdir() if p.is_dir() and TAG.fullmatch(p.name)]
        ours.sort(key=lambda p: (layout.position(p.name).is_file(), p.stat().st_mtime), reverse=True)
        for number, path in enumerate(ours):
            kept_whole = number < keep and layout.position(path.name).is_file()
            if (
                not kept_whole
                and path.name != position.tag
                and (best_position is None or path.name != best_position.tag)
            ):
                shutil.rmtree(path)
    distributed.barrier()


def clear_unfinished(folder: Path, tag: str) -> None:
    """Remove what a killed save of the same tag left (rank 0), before saving again."""
    if distributed.is_main() and (folder / tag).exists():
        shutil.rmtree(folder / tag)
    distributed.barrier()


def save_rank_state(folder: Path, state: dict[str, Tensor]) -> None:
    """Write this rank's part of a method's state beside what DeepSpeed saved (collective); nothing when it is empty.

    The checkpoint counts only once `commit_checkpoint` has written its position, so a part that a killed save left
    does no harm.
    """
    if state:
        torch.save({name: tensor.to("cpu") for name, tensor in state.items()}, rank_state(folder, distributed.rank()))
    distributed.barrier()


def load_rank_states(folder: Path, world_size: int) -> list[dict[str, Tensor]]:
    """The parts that `world_size` ranks saved, memory-mapped. `UserError` when one is missing or damaged."""
    states = []
    for rank in range(world_size):
        path = saved_rank_state(folder, rank)
        try:
            states.append(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        except (OSError, RuntimeError, UnpicklingError) as error:
            raise UserError(f"checkpoint part {path} cannot be read ({error})") from error
    return states
