"""Saving and restoring a run: its checkpoints, and the file of its best weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from spml_fast.core import distributed
from spml_fast.core.errors import UserError
from spml_fast.core.io import (
    FileNotWritten,
    FileRecord,
    failure_reason,
    move_into_place,
    partial_path,
    sync_folder,
)
from spml_fast.models.weights import write_weights
from spml_fast.runs.layout import RunLayout
from spml_fast.runs.layout import rank_state as rank_state_path
from spml_fast.training.async_save import BackgroundSave, FileContent, HostCopy
from spml_fast.training.best_weights import recover
from spml_fast.training.checkpoint import (
    BestWeights,
    Checkpoint,
    CheckpointPosition,
    Listed,
    clear_unfinished,
    commit_checkpoint,
    delete_old,
    free_position,
    remove_checkpoint,
    save_rank_state,
)
from spml_fast.training.engine import Engine
from spml_fast.training.resume import Resume
from spml_fast.training.tensor_files import write_tensors

Say = Callable[[str], None]
# The classifier whose weights are the best so far, and what their file says of itself.
Best = tuple[nn.Module, dict[str, str]]


class _Weights(NamedTuple):
    """What goes into a weights file."""

    state: dict[str, Tensor]
    metadata: dict[str, str]


def _write(path: Path, content: Any) -> FileRecord:
    """Write a file of a checkpoint, or the weights file. Raises `OSError`."""
    if isinstance(content, _Weights):
        return write_weights(path, content.state, content.metadata)
    return write_tensors(path, content)


class _Writing(NamedTuple):
    """A checkpoint that is being written; `metadata` is that of new best weights."""

    position: CheckpointPosition
    save: BackgroundSave
    metadata: dict[str, str] | None


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
        self._writing: _Writing | None = None

    @property
    def writing(self) -> CheckpointPosition | None:
        """The checkpoint that `begin` began and `finish` has not made whole yet."""
        return None if self._writing is None else self._writing.position

    @property
    def busy(self) -> bool:
        """Whether this rank still writes it."""
        return self._writing is not None and self._writing.save.busy

    def begin(
        self,
        position: CheckpointPosition,
        engine: Engine,
        state: dict[str, Any],
        rank_state: dict[str, Tensor],
        best: Best | None,
    ) -> None:
        """Begin to save a checkpoint at ZeRO stage 0 while training goes on (collective); `finish` makes it whole.

        Args:
            position: as in `save`.
            engine: as in `save`.
            state: as in `save`.
            rank_state: as in `save`.
            best: as in `save`.

        Raises:
            UserError: the one before it could not be written.
        """
        self.finish()
        folder = self.layout.checkpoints.folder
        position = distributed.from_main(lambda: free_position(folder, position))
        clear_unfinished(folder, position.tag)
        copy = HostCopy()
        files: list[FileContent] = engine.copy_state(folder, position.tag, state, copy)
        if rank_state:
            files.append((rank_state_path(folder / position.tag, distributed.rank()), copy(rank_state)))
        if best is not None and distributed.is_main():
            model, metadata = best
            files.append((partial_path(self.layout.weights), _Weights(copy(model.state_dict()), metadata)))
        self._writing = _Writing(position, BackgroundSave(files, _write), best and best[1])

    def finish(self) -> None:
        """Wait for what `begin` began, and make it whole (collective); nothing where there is none.

        Raises:
            UserError: it could not be written; the checkpoints before it are kept.
        """
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        writing.save.wait()
        records = dict(writing.save.records)
        weights = records.pop(partial_path(self.layout.weights).name, None)
        self._complete(writing.position, records, weights, writing.save.errors, writing.metadata)

    def save(
        self,
        position: CheckpointPosition,
        engine: Engine,
        state: dict[str, Any],
        rank_state: dict[str, Tensor],
        best: Best | None,
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
        reason = failure_reason(path, number, reason, size)
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
        self.best, note, lost = distributed.from_main(lambda: recover(self.layout, checkpoint, backbone, latest))
        if note is not None:
            say(note)
        return lost

    def ensure_best(self, backbone: str, latest: float, say: Say) -> None:
        """See that the run's weights file holds the best weights, before they are used (collective). As `adopt`."""
        self.finish()
        if self.saved is None:
            return
        checkpoint = dataclasses.replace(self.saved, best=self.best)
        self.best, note, _ = distributed.from_main(lambda: recover(self.layout, checkpoint, backbone, latest))
        if note is not None:
            say(note)


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
