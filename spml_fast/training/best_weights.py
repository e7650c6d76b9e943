"""The file of a run's best weights: whether it holds them, and how it is written again from a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from spml_fast.core import lock
from spml_fast.core.errors import UserError
from spml_fast.core.io import (
    FileNotWritten,
    copy_file,
    failure_reason,
    file_record,
    move_into_place,
    partial_path,
    sync_folder,
    write_json,
)
from spml_fast.models.weights import damaged_weights, read_metadata, write_weights
from spml_fast.runs.layout import CheckpointLayout, RunLayout
from spml_fast.runs.open import load_run_config
from spml_fast.runs.weights_check import recorded_weights
from spml_fast.training.checkpoint import (
    BestWeights,
    Checkpoint,
    Listed,
    list_checkpoints,
    read_mark,
    read_position,
)
from spml_fast.training.tensor_files import read_tensors


class Recovered(NamedTuple):
    """The best weights at the time of a checkpoint.

    Attributes:
        best: as the run's file holds them now; None where there were none.
        note: what was done about the file, for the user; None for nothing.
        lost: whether they are gone, and the checkpoint's own stand in for them.
    """

    best: BestWeights | None
    note: str | None = None
    lost: bool = False


def recover(layout: RunLayout, checkpoint: Checkpoint, backbone: str, latest: float | None) -> Recovered:
    """See that a run's weights file holds the best weights of the time of a checkpoint (rank 0).

    Args:
        layout: the run's.
        checkpoint: of this run or of another one.
        backbone: the run's, for the metadata of weights that have to be written again.
        latest: the checkpoint's own validation mAP, with which its weights stand in for lost ones; None where they must
            not.

    Raises:
        UserError: the weights cannot be written, or are lost.
    """
    path, source = layout.weights, CheckpointLayout(checkpoint.folder).run
    best = checkpoint.best if checkpoint.serial else _best_before_0_2(checkpoint)
    if best is None:
        return Recovered(None)
    try:
        if _holds(path, best):
            return Recovered(_recorded(path, best))
        for other in (partial_path(path), source.weights):
            # What a killed save left under the partial name is known by its checksum alone.
            known = best.record is not None or other == source.weights
            if known and other.absolute() != path.absolute() and _holds(other, best):
                if other != partial_path(path):
                    copy_file(other, partial_path(path))
                return Recovered(_put(layout, best))
        wrong = "its checksum differs" if path.exists() else "it is missing"
        told = f"{path} does not hold the best weights of that time ({wrong}); "
        for folder in dict.fromkeys((layout.checkpoints.folder, checkpoint.folder)):
            if (metadata := _rewrite(layout, folder, best.tag, best.metadata, backbone)) is not None:
                put = _put(layout, BestWeights(best.tag, None, metadata))
                return Recovered(put, f"{told}written again from checkpoint {best.tag}")
        metadata = None
        if latest is not None:
            own = {"phase": checkpoint.position.phase, "epoch": str(checkpoint.position.epoch)}
            own["val_map"] = f"{latest:.6f}"
            metadata = _rewrite(layout, checkpoint.folder, checkpoint.position.tag, own, backbone)
    except OSError as error:
        size = error.size if isinstance(error, FileNotWritten) else 0
        reason = failure_reason(path, error.errno, error.strerror, size)
        raise UserError(f"{path} cannot be written: {reason}") from error
    if metadata is None:
        raise UserError(
            f"{told}no checkpoint has them any more: repeat the run in another --run.dir, or restore the file"
        )
    put = _put(layout, BestWeights(checkpoint.position.tag, None, metadata))
    note = f"{told}checkpoint {best.tag} has gone too: those of {checkpoint.position.tag} stand in"
    return Recovered(put, note, lost=True)


def _put(layout: RunLayout, best: BestWeights) -> BestWeights:
    """Give the partial weights file its name."""
    move_into_place(partial_path(layout.weights), layout.weights)
    sync_folder(layout.folder)
    best = _recorded(layout.weights, best)
    known = recorded_weights(layout)
    if known and best.record is not None and best.record not in known:
        # Weights that stand in for lost ones: whoever opens the run compares the file with what is recorded.
        mark = read_mark(layout.checkpoints.folder, best.tag)
        if mark is not None:
            values = asdict(mark.position) | {"weights": asdict(best.record)}
            write_json(layout.checkpoints.best, values, durable=True)
    return best


def _rewrite(
    layout: RunLayout, folder: Path, tag: str, metadata: dict[str, str], backbone: str
) -> dict[str, str] | None:
    """Write the weights of a checkpoint to the partial weights file; None where it is gone or not whole."""
    names = CheckpointLayout(folder)
    try:
        checkpoint = read_mark(folder, tag)
    except UserError:
        return None
    if checkpoint is None or checkpoint.damage() is not None:
        return None
    partial = partial_path(layout.weights)
    if (whole := names.weights(tag)).is_file():
        copy_file(whole, partial)
        return metadata or read_metadata(whole)
    if not names.model_states(tag).is_file():
        return None
    states = read_tensors(names.model_states(tag), mmap=True)
    ours, prefix = states["spml_fast"], "classifier."
    weights = ours["ema"]
    if weights is None:
        weights = {k.removeprefix(prefix): v for k, v in states["module"].items() if k.startswith(prefix)}
    if "version" not in metadata:
        place = {"phase": checkpoint.position.phase, "epoch": str(checkpoint.position.epoch)}
        known = place | {"val_map": f"{ours['best'][0]:.6f}"} | metadata
        metadata = known | {"backbone": backbone, "version": str(ours.get("version", ""))}
    write_weights(partial, weights, metadata)
    return metadata


def _best_before_0_2(checkpoint: Checkpoint) -> BestWeights | None:
    """The best weights of a run whose marks do not tell: those of best.json, if anything was ever the best."""
    layout = CheckpointLayout(checkpoint.folder)
    try:
        position = read_position(layout.best)
    except UserError:
        position = None
    if position is None:
        return BestWeights(checkpoint.position.tag, None) if layout.run.weights.exists() else None
    return BestWeights(position.tag, None)


def _holds(path: Path, best: BestWeights) -> bool:
    """Whether a file is there and holds those weights; of an older version's, whether it can be opened."""
    if not path.is_file():
        return False
    if best.record is None:
        return damaged_weights(path) is None
    return path.stat().st_size == best.record.size and file_record(path) == best.record


def _recorded(path: Path, best: BestWeights) -> BestWeights:
    """The same with the checksum of the file that holds them."""
    if best.record is not None:
        return best
    return BestWeights(best.tag, file_record(path), best.metadata or read_metadata(path))


def _newest(listed: Sequence[Listed]) -> Checkpoint | None:
    return next((one.checkpoint for one in listed if one.checkpoint is not None), None)


def damaged_best(layout: RunLayout, listed: Sequence[Listed]) -> str | None:
    """What is wrong with the file of the best weights that a run's newest checkpoint knows; None where nothing is.

    Args:
        layout: the run's.
        listed: its checkpoints, newest first.
    """
    newest = _newest(listed)
    best = None if newest is None else newest.best if newest.serial else _best_before_0_2(newest)
    if best is None or _holds(layout.weights, best):
        return None
    if not layout.weights.exists():
        return "it is missing"
    if best.record is not None and file_record(layout.weights) in recorded_weights(layout):
        # Those of another checkpoint stand in.
        return None
    return "its checksum is not that of the best checkpoint's weights"


def repair(layout: RunLayout) -> str:
    """Write a run's weights file again from the best checkpoint where it is damaged; says what was done.

    Raises:
        UserError: the run trains now, there is no checkpoint with the weights, or the file cannot be written.
    """
    backbone = load_run_config(layout.folder).model.backbone
    try:
        lock.acquire(layout.lock, f"run directory {layout.folder}")
    except OSError as error:
        raise UserError(f"run directory {layout.folder} cannot be written: {error.strerror}") from error
    try:
        listed = list_checkpoints(layout.checkpoints.folder)
        newest = _newest(listed)
        if newest is None:
            raise UserError(f"{layout.folder} has no checkpoint to write {layout.weights.name} from")
        if damaged_best(layout, listed) is None:
            return f"{layout.weights} is whole"
        return recover(layout, newest, backbone, None).note or f"{layout.weights} was put back"
    finally:
        lock.release(layout.lock)
