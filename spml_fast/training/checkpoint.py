"""Checkpoints on the disk: which exist, which are whole, which to delete.

The names of the files stand in runs/layout.py. The folder of a checkpoint is named for its position, such as
`finetune-e0003-u000000-w2`; the number of ranks is in the name, because saving over the files of another number of
ranks mixes them. A checkpoint counts once its mark is there, which is written last and holds the checksums of all other
files. Marks are numbered, so that the newest is known whatever happened to newest.json or to the files' times.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from spml_fast.core import distributed
from spml_fast.core.errors import UserError
from spml_fast.core.io import FileRecord, file_record, read_text, sync_folder, write_json
from spml_fast.core.text import parse_json
from spml_fast.runs.layout import CheckpointLayout, rank_state, saved_rank_state
from spml_fast.training.tensor_files import read_tensors, write_tensors

TAG = re.compile(r"[a-z]+-e\d{4,}-u\d{6,}-w\d+(-\d+)?")
PHASES = ("linear", "finetune")


@dataclass(frozen=True)
class CheckpointPosition:
    """Where in training a checkpoint was saved.

    Attributes:
        phase: `linear` or `finetune`.
        epoch: epochs done in the phase.
        update: updates done in the epoch that comes next; 0 at an epoch's end.
        world_size: ranks that saved it.
        zero_stage: ZeRO stage that saved it.
        attempt: 1; larger where a checkpoint of the same place was there, which stays until this one is whole.
    """

    phase: str
    epoch: int
    update: int
    world_size: int
    zero_stage: int
    attempt: int = 1

    @property
    def tag(self) -> str:
        """Name of the checkpoint's folder."""
        more = f"-{self.attempt}" if self.attempt > 1 else ""
        return f"{self.phase}-e{self.epoch:04d}-u{self.update:06d}-w{self.world_size}{more}"


@dataclass(frozen=True)
class BestWeights:
    """The best weights at the time of a checkpoint, as the run's weights file holds them.

    Attributes:
        tag: checkpoint with the same weights.
        record: size and checksum of the weights file; None where an older version wrote it.
        metadata: what the file says of itself.
    """

    tag: str
    record: FileRecord | None
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that its mark calls whole.

    Attributes:
        folder: the checkpoint directory that it lies in.
        position: where in training it was saved.
        serial: number of the save among those of the run; 0 for versions before 0.2.0.
        files: name -> what each file must hold; empty for versions before 0.2.0, which wrote no checksums.
        defines: what defines the run, by the name of the option; empty for versions before 0.2.0.
        best: the best weights at that time; None where there were none, or an older version saved it.
    """

    folder: Path
    position: CheckpointPosition
    serial: int = 0
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    defines: Mapping[str, Any] = field(default_factory=dict)
    best: BestWeights | None = None

    @property
    def path(self) -> Path:
        """The checkpoint's own folder."""
        return self.folder / self.position.tag

    @property
    def order(self) -> tuple[int, int, int, int]:
        """Sorts checkpoints of a run by age."""
        place = PHASES.index(self.position.phase) if self.position.phase in PHASES else -1
        return self.serial, place, self.position.epoch, self.position.update

    def damage(self) -> str | None:
        """The first file that is not what was saved, and why; None when all are. Reads the files once.

        Without checksums, files that `torch.save` wrote are compared with those that its format has within.
        """
        for name, record in self.files.items():
            try:
                if (self.path / name).stat().st_size != record.size:
                    return f"{name} has {(self.path / name).stat().st_size:,} bytes, not {record.size:,}"
                if file_record(self.path / name) != record:
                    return f"{name} has another checksum than when it was saved"
            except OSError as error:
                return f"{name} cannot be read: {error.strerror}"
        return None if self.files else self._old_damage()

    def _old_damage(self) -> str | None:
        states = sorted(p for p in self.path.iterdir() if p.suffix == ".pt")
        if not states:
            return "its files are missing"
        for path in states:
            try:
                with zipfile.ZipFile(path) as archive:
                    broken = archive.testzip()
            except (OSError, zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
                return f"{path.name} cannot be read: {error}"
            if broken is not None:
                return f"{path.name} has another checksum than when it was saved"
        return None


def _position(values: Mapping[str, Any]) -> CheckpointPosition:
    """The position among the values of a JSON file. ValueError, KeyError or TypeError where it is none."""
    known = {f.name: values[f.name] for f in dataclasses.fields(CheckpointPosition) if f.name in values}
    position = CheckpointPosition(**known)
    numbers = (position.epoch, position.update, position.world_size, position.zero_stage, position.attempt)
    if not isinstance(position.phase, str) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"{known} is no position")
    return position


def _best(values: Mapping[str, Any]) -> BestWeights:
    """The best weights that a mark tells of."""
    record = values["weights"] and FileRecord.read(values["weights"])
    return BestWeights(str(values["tag"]), record, dict(values["metadata"]))


def read_position(path: Path) -> CheckpointPosition | None:
    """The position in newest.json or best.json; None when there is none. `UserError` when damaged."""
    if not path.is_file():
        return None
    try:
        return _position(parse_json(read_text(path, "utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} is damaged ({error})") from error


def read_mark(folder: Path, tag: str) -> Checkpoint | None:
    """The checkpoint of a folder's name; None where it has no mark, which is written last.

    Raises:
        UserError: the mark is damaged.
    """
    path = CheckpointLayout(folder).position(tag)
    if not path.is_file():
        return None
    try:
        values = parse_json(read_text(path, "utf-8"))
        position, best = _position(values), values.get("best")
        if position.tag != tag:
            raise ValueError(f"it is the mark of {position.tag}")
        return Checkpoint(
            folder,
            position,
            int(values.get("serial", 0)),
            {str(name): FileRecord.read(record) for name, record in values.get("files", {}).items()},
            dict(values.get("defines", {})),
            best and _best(best),
        )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} is damaged ({error})") from error


def write_mark(checkpoint: Checkpoint) -> None:
    """Declare a checkpoint whole: its files and its name are on the disk. Raises `OSError`."""
    best = checkpoint.best
    values = asdict(checkpoint.position) | {
        "serial": checkpoint.serial,
        "files": {name: asdict(record) for name, record in sorted(checkpoint.files.items())},
        "defines": dict(checkpoint.defines),
        "best": best
        and {"tag": best.tag, "weights": best.record and asdict(best.record), "metadata": dict(best.metadata)},
    }
    write_json(CheckpointLayout(checkpoint.folder).position(checkpoint.position.tag), values, durable=True)
    sync_folder(checkpoint.folder)


@dataclass(frozen=True)
class Listed:
    """One folder of a checkpoint directory.

    Attributes:
        tag: its name.
        checkpoint: what its mark says; None without a readable one.
        damage: what is wrong with its mark; None for an unfinished save.
    """

    tag: str
    checkpoint: Checkpoint | None
    damage: str | None = None


def list_checkpoints(folder: Path) -> list[Listed]:
    """What is in a checkpoint directory, newest first; files other than marks are not looked at.

    Copies that a user put beside ours have other names and are left out.
    """
    if not folder.is_dir():
        return []
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and TAG.fullmatch(path.name):
            try:
                found.append(Listed(path.name, read_mark(folder, path.name)))
            except UserError as error:
                found.append(Listed(path.name, None, str(error)))
    return sorted(found, key=lambda one: one.checkpoint.order if one.checkpoint else (-1, 0, 0, 0), reverse=True)


def free_position(folder: Path, position: CheckpointPosition) -> CheckpointPosition:
    """The position with an attempt whose folder is free: no whole checkpoint is written over (rank 0)."""
    layout = CheckpointLayout(folder)
    while layout.position(position.tag).exists():
        position = dataclasses.replace(position, attempt=position.attempt + 1)
    return position


def clear_unfinished(folder: Path, tag: str) -> None:
    """Remove what a killed save of the same tag left (rank 0), before saving again."""
    if distributed.is_main() and (folder / tag).exists():
        remove_checkpoint(folder, tag)
    distributed.barrier()


def remove_checkpoint(folder: Path, tag: str) -> None:
    """Delete a checkpoint: its mark first, so that what a kill leaves of it is an unfinished one."""
    CheckpointLayout(folder).position(tag).unlink(missing_ok=True)
    shutil.rmtree(folder / tag)


def commit_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """Make a saved checkpoint whole and the newest (rank 0; call after all ranks saved); returns it with its number.

    Raises:
        OSError: the files that say so cannot be written.
    """
    layout = CheckpointLayout(checkpoint.folder)
    serials = [one.checkpoint.serial for one in list_checkpoints(checkpoint.folder) if one.checkpoint]
    numbered = dataclasses.replace(checkpoint, serial=1 + max(serials, default=0))
    write_mark(numbered)
    write_json(layout.newest, asdict(checkpoint.position), durable=True)
    if checkpoint.best is not None and checkpoint.best.tag == checkpoint.position.tag:
        weights = checkpoint.best.record and asdict(checkpoint.best.record)
        write_json(layout.best, asdict(checkpoint.position) | {"weights": weights}, durable=True)
    return numbered


def delete_old(checkpoint: Checkpoint, keep: int, damaged: Iterable[str] = ()) -> None:
    """Delete checkpoints older than a whole one that was just saved (rank 0), the best one's aside.

    Args:
        checkpoint: the newest.
        keep: how many whole checkpoints stay beside the best one.
        damaged: names of those that are not whole in spite of their marks; these go.
    """
    folder, bad = checkpoint.folder, set(damaged)
    best = None if checkpoint.best is None else checkpoint.best.tag
    listed = list_checkpoints(folder)
    whole = [one.tag for one in listed if one.checkpoint is not None and one.tag not in bad]
    kept = {*whole[:keep], checkpoint.position.tag, *({best} - bad if best is not None else ())}
    for one in listed:
        # What a killed save left has no mark and goes too.
        if one.tag not in kept:
            remove_checkpoint(folder, one.tag)


def save_rank_state(folder: Path, state: dict[str, Tensor]) -> dict[str, FileRecord]:
    """Write this rank's part of a method's state beside what DeepSpeed saved; nothing when it is empty.

    The checkpoint counts only once it has its mark, so a part that a killed save left does no harm.

    Returns:
        Name and checksum of the file, if there is one.

    Raises:
        OSError: it cannot be written.
    """
    if not state:
        return {}
    path = rank_state(folder, distributed.rank())
    return {path.name: write_tensors(path, {name: tensor.to("cpu") for name, tensor in state.items()})}


def load_rank_states(folder: Path, world_size: int) -> list[dict[str, Tensor]]:
    """The parts that `world_size` ranks saved, memory-mapped. `UserError` when one is missing or damaged."""
    states = []
    for rank in range(world_size):
        path = saved_rank_state(folder, rank)
        try:
            states.append(read_tensors(path, mmap=True))
        except OSError as error:
            raise UserError(f"checkpoint part {path} cannot be read ({error})") from error
    return states
