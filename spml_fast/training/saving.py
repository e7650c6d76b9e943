"""Saving and restoring a run: its checkpoints, and the file of its best weights."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spml_fast.core import distributed
from spml_fast.core.errors import UserError
from spml_fast.core.io import (
    FileNotWritten,
    FileRecord,
    copy_file,
    file_record,
    move_into_place,
    partial_path,
    sync_folder,
)
from spml_fast.models.weights import damaged_weights, read_metadata, write_weights
from spml_fast.runs.layout import CheckpointLayout, RunLayout
from spml_fast.runs.layout import rank_state as rank_state_path
from spml_fast.training.async_save import BackgroundSave, host_copy
from spml_fast.training.checkpoint import (
    BestWeights,
    Checkpoint,
    CheckpointPosition,
    Listed,
    clear_unfinished,
    commit_checkpoint,
    delete_old,
    free_position,
    read_mark,
    read_position,
    remove_checkpoint,
    save_rank_state,
)
from spml_fast.training.engine import Engine
from spml_fast.training.resume import Resume
from spml_fast.training.tensor_files import read_tensors, write_tensors

Say = Callable[[str], None]


class RunCheckpoints:
    """What a run keeps on the disk to resume from: checkpoints, and the best weights so far.

    Args:
        layout: the run's.
        keep: checkpoints that stay beside the best one.
        defines: what defines the run, which marks carry.

    Attributes:
        best: the best weights so far; None before the first.
        saved: the newest checkpoint that was saved or resumed from.
    """

    def __init__(self, layout: RunLayout, keep: int, defines: Mapping[str, Any]) -> None:
        self.layout, self.keep, self.defines = layout, keep, defines
        self.best: BestWeights | None = None
        self.saved: Checkpoint | None = None
        self._damaged: tuple[str, ...] = ()
        self._writing: tuple[CheckpointPosition, BackgroundSave] | None = None

    @property
    def writing(self) -> CheckpointPosition | None:
        """The checkpoint that `begin` began and `finish` has not made whole yet."""
        return None if self._writing is None else self._writing[0]

    @property
    def busy(self) -> bool:
        """Whether this rank still writes it."""
        return self._writing is not None and self._writing[1].busy

    def begin(
        self, position: CheckpointPosition, engine: Engine, state: dict[str, Any], rank_state: dict[str, Tensor]
    ) -> None:
        """Begin to save a checkpoint at ZeRO stage 0 while training goes on (collective); `finish` makes it whole.

        Args:
            position: as in `save`.
            engine: as in `save`.
            state: as in `save`.
            rank_state: as in `save`.

        Raises:
            UserError: the one before it could not be written.
        """
        self.finish()
        folder = self.layout.checkpoints.folder
        position = distributed.from_main(lambda: free_position(folder, position))
        clear_unfinished(folder, position.tag)
        files = engine.copy_state(folder, position.tag, state)
        if rank_state:
            files.append((rank_state_path(folder / position.tag, distributed.rank()), host_copy(rank_state)))
        self._writing = position, BackgroundSave(files, write_tensors)

    def finish(self) -> None:
        """Wait for what `begin` began, and make it whole (collective); nothing where there is none.

        Raises:
            UserError: it could not be written; the checkpoints before it are kept.
        """
        if self._writing is None:
            return
        (position, save), self._writing = self._writing, None
        save.wait()
        self._complete(position, save.records, None, save.errors, None)

    def save(
        self,
        position: CheckpointPosition,
        engine: Engine,
        state: dict[str, Any],
        rank_state: dict[str, Tensor],
        best: tuple[nn.Module, dict[str, str]] | None,
    ) -> None:
        """Save a checkpoint (collective); what it replaces goes once it is whole.

        Args:
            position: where training stands.
            engine: saves module, optimizer and schedule.
            state: plain values and tensors, the same on all ranks.
            rank_state: this rank's part of the method's state.
            best: the classifier whose weights are the best so far, and what its file says of itself.

        Raises:
            UserError: it cannot be written; the checkpoints before it are kept.
        """
        self.finish()
        folder = self.layout.checkpoints.folder
        position = distributed.from_main(lambda: free_position(folder, position))
        path = folder / position.tag
        clear_unfinished(folder, position.tag)
        records: dict[str, FileRecord] = {}
        record: FileRecord | None = None
        errors: list[OSError] = []
        for step in (lambda: engine.save(folder, position.tag, state), lambda: save_rank_state(path, rank_state)):
            try:
                records |= step()
            except OSError as error:
                errors.append(error)
        if best is not None:
            with engine.gathered_parameters():
                try:
                    record = self._write_best(position, *best, records)
                except OSError as error:
                    errors.append(error)
        self._complete(position, records, record, errors, best and best[1])

    def _complete(
        self,
        position: CheckpointPosition,
        records: dict[str, FileRecord],
        weights: FileRecord | None,
        errors: list[OSError],
        metadata: dict[str, str] | None,
    ) -> None:
        """Make a checkpoint whole whose files are written; `metadata` is that of new best weights."""
        folder = self.layout.checkpoints.folder
        self._raise_together(folder / position.tag, records, weights, errors)
        mark = Checkpoint(
            folder,
            position,
            files={name: one for part in distributed.gather_objects(records) for name, one in part.items()},
            defines=self.defines,
            best=self.best if metadata is None else BestWeights(position.tag, weights, metadata),
        )
        self.saved = distributed.from_main(lambda: self._commit(mark))
        self.best, self._damaged = self.saved.best, ()

    def _write_best(
        self,
        position: CheckpointPosition,
        model: nn.Module,
        metadata: dict[str, str],
        records: dict[str, FileRecord],
    ) -> FileRecord | None:
        """Write the weights file under its partial name (rank 0); it gets its own once the checkpoint is whole."""
        if not distributed.is_main():
            return None
        state = model.state_dict()
        if position.zero_stage == 3:
            # No file of the checkpoint has whole weights that the run's file could be written from again.
            inside = self.layout.checkpoints.weights(position.tag)
            records[inside.name] = write_weights(inside, state, metadata)
        return write_weights(partial_path(self.layout.weights), state, metadata)

    def _raise_together(
        self, path: Path, records: dict[str, FileRecord], record: FileRecord | None, errors: list[OSError]
    ) -> None:
        """Raise `UserError` on every rank if any of them could not write, and remove what was written."""
        sizes = [one.size for one in (*records.values(), record) if one is not None]
        sizes += [error.size for error in errors if isinstance(error, FileNotWritten)]
        told = [(error.errno or 0, error.strerror or str(error)) for error in errors]
        gathered = distributed.gather_objects((sum(sizes), told))
        first = next((one for _, told in gathered for one in told), None)
        if first is None:
            return
        if distributed.is_main():
            partial_path(self.layout.weights).unlink(missing_ok=True)
            if path.is_dir():
                remove_checkpoint(path.parent, path.name)
        distributed.barrier()
        raise UserError(self._not_written(path, *first, sum(size for size, _ in gathered)))

    def _not_written(self, path: Path, number: int, reason: str, size: int) -> str:
        kept = f"checkpoint {self.saved.position.tag} is kept" if self.saved else "there is none before it"
        reason = _reason(path, number, reason, size)
        return f"checkpoint {path} cannot be written: {reason}; {kept}, and the same command resumes the run"

    def _commit(self, mark: Checkpoint) -> Checkpoint:
        path = mark.path
        try:
            saved = commit_checkpoint(mark)
            if mark.best is not None and mark.best.tag == mark.position.tag:
                move_into_place(partial_path(self.layout.weights), self.layout.weights)
                sync_folder(self.layout.folder)
            delete_old(saved, self.keep, self._damaged)
        except OSError as error:
            raise UserError(self._not_written(path, error.errno or 0, error.strerror or str(error), 0)) from error
        return saved

    def adopt(self, resume: Resume, backbone: str, latest: float, say: Say) -> bool:
        """Take over where a checkpoint left off, and see to the file of the best weights (collective).

        Args:
            resume: the checkpoint, of this run or of another one.
            backbone: the run's, for the metadata of weights that have to be written again.
            latest: the checkpoint's own validation mAP.
            say: prints a line.

        Returns:
            Whether the best weights are lost, and the checkpoint's own stand in for them.

        Raises:
            UserError: the weights cannot be written.
        """
        checkpoint = self.saved = resume.checkpoint
        self._damaged = resume.damaged
        self.best, note, lost = distributed.from_main(lambda: self._recover(checkpoint, backbone, latest))
        if note is not None:
            say(note)
        return lost

    def ensure_best(self, backbone: str, latest: float, say: Say) -> None:
        """See that the run's weights file holds the best weights, before they are used (collective). As `adopt`."""
        if self.saved is None:
            return
        checkpoint = dataclasses.replace(self.saved, best=self.best)
        self.best, note, _ = distributed.from_main(lambda: self._recover(checkpoint, backbone, latest))
        if note is not None:
            say(note)

    def _recover(
        self, checkpoint: Checkpoint, backbone: str, latest: float
    ) -> tuple[BestWeights | None, str | None, bool]:
        """The best weights at the time of a checkpoint, what was done about their file, and whether they are lost."""
        path, source = self.layout.weights, CheckpointLayout(checkpoint.folder).run
        best = checkpoint.best if checkpoint.serial else _best_before_0_2(checkpoint)
        if best is None:
            return None, None, False
        try:
            if _holds(path, best):
                return _recorded(path, best), None, False
            for other in (partial_path(path), source.weights):
                # What a killed save left under the partial name is known by its checksum alone.
                known = best.record is not None or other == source.weights
                if known and other.absolute() != path.absolute() and _holds(other, best):
                    if other != partial_path(path):
                        copy_file(other, partial_path(path))
                    return self._put(best), None, False
            wrong = "its checksum differs" if path.exists() else "it is missing"
            told = f"{path} does not hold the best weights of that time ({wrong}); "
            for folder in dict.fromkeys((self.layout.checkpoints.folder, checkpoint.folder)):
                if (metadata := self._rewrite(folder, best.tag, best.metadata, backbone)) is not None:
                    put = self._put(BestWeights(best.tag, None, metadata))
                    return put, f"{told}written again from checkpoint {best.tag}", False
            own = {"phase": checkpoint.position.phase, "epoch": str(checkpoint.position.epoch)}
            own["val_map"] = f"{latest:.6f}"
            metadata = self._rewrite(checkpoint.folder, checkpoint.position.tag, own, backbone)
        except OSError as error:
            size = error.size if isinstance(error, FileNotWritten) else 0
            raise UserError(f"{path} cannot be written: {_reason(path, error.errno, error.strerror, size)}") from error
        if metadata is None:
            raise UserError(
                f"{told}no checkpoint has them any more: repeat the run in another --run.dir, or restore the file"
            )
        put = self._put(BestWeights(checkpoint.position.tag, None, metadata))
        return put, f"{told}checkpoint {best.tag} has gone too: those of {checkpoint.position.tag} stand in", True

    def _put(self, best: BestWeights) -> BestWeights:
        """Give the partial weights file its name."""
        move_into_place(partial_path(self.layout.weights), self.layout.weights)
        sync_folder(self.layout.folder)
        return _recorded(self.layout.weights, best)

    def _rewrite(self, folder: Path, tag: str, metadata: dict[str, str], backbone: str) -> dict[str, str] | None:
        """Write the weights of a checkpoint to the partial weights file; None where it is gone or not whole."""
        layout = CheckpointLayout(folder)
        try:
            checkpoint = read_mark(folder, tag)
        except UserError:
            return None
        if checkpoint is None or checkpoint.damage() is not None:
            return None
        partial = partial_path(self.layout.weights)
        if (whole := layout.weights(tag)).is_file():
            copy_file(whole, partial)
            return metadata or read_metadata(whole)
        if not layout.model_states(tag).is_file():
            return None
        states = read_tensors(layout.model_states(tag), mmap=True)
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


def _reason(path: Path, number: int | None, reason: str | None, size: int) -> str:
    """Why a file was not written; of a full disk, which one it is and the bytes that it must hold."""
    if number not in (errno.ENOSPC, errno.EDQUOT):
        return reason or "unknown error"
    mount = path.absolute().parent
    while not os.path.ismount(mount):
        mount = mount.parent
    megabytes = f", {max(1, -(-size // 10**6)):,} MB needed" if size else ""
    return f"no space left on {mount}{megabytes}"


def checkpoint_state(listed: Listed) -> tuple[str, Checkpoint | None]:
    """What `spml-fast checkpoints` says of one checkpoint, and what its mark says.

    `whole`, `whole (no checksums)`, `damaged: FILE ...` or `unfinished`. Reads all its files.
    """
    if listed.checkpoint is None:
        return ("unfinished" if listed.damage is None else f"damaged: {listed.damage}"), None
    damage = listed.checkpoint.damage()
    if damage is not None:
        return f"damaged: {damage}", listed.checkpoint
    return ("whole" if listed.checkpoint.files else "whole (no checksums)"), listed.checkpoint


def damaged_best(layout: RunLayout, listed: Sequence[Listed]) -> str | None:
    """What is wrong with the file of the best weights that a run's newest checkpoint knows; None where nothing is."""
    newest = next((one.checkpoint for one in listed if one.checkpoint is not None), None)
    best = None if newest is None else newest.best if newest.serial else _best_before_0_2(newest)
    if best is None or _holds(layout.weights, best):
        return None
    return "its checksum is not that of the best checkpoint's weights" if layout.weights.exists() else "it is missing"
