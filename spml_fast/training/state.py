"""What a checkpoint holds beside DeepSpeed's module, optimizer and schedule, and how it is put back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spml_fast import __version__
from spml_fast.core import distributed
from spml_fast.core.errors import UserError
from spml_fast.runs.layout import CheckpointLayout
from spml_fast.runs.read import default_options
from spml_fast.training import console
from spml_fast.training.batchnorm_state import restore_statistics
from spml_fast.training.checkpoint import Checkpoint, load_rank_states
from spml_fast.training.logs import Meter
from spml_fast.training.resume import Resume, recipe_of
from spml_fast.training.setup import Phase

if TYPE_CHECKING:
    from spml_fast.training.trainer import Trainer


def run_state(trainer: Trainer, epoch: int, update: int) -> dict[str, Any]:
    """Plain values and tensors that a run resumes from (collective).

    Args:
        trainer: the run.
        epoch: epochs done in the phase.
        update: updates done in the epoch that comes next.
    """
    train, sampler = trainer.config.train, trainer.loader.sampler
    state = {
        "version": __version__,
        "labels": trainer.store.state_dict(),
        "ema": trainer.ema.module.state_dict() if trainer.ema is not None else None,
        "best": trainer.score.state(),
        "trained": (trainer.trained_samples, trainer.trained_seconds, trainer.waited_seconds),
        "optimizer": train.optimizer,
        "linear": train.linear,
        "updates_per_epoch": trainer.loader.updates_per_epoch,
        "started_from": trainer.started_from,
    }
    if update and trainer.running is not None:
        meter, sums = trainer.running
        state["epoch"] = {
            # The place in the data, whatever the batch size will be.
            "samples": sampler.samples_before(epoch + 1, update),
            "order_batch_size": sampler.cut(epoch + 1).order_batch_size,
            "meter": (meter.samples, meter.waited, meter.seconds),
            "sums": distributed.gather_objects({name: value.to("cpu") for name, value in sums.items()}),
        }
    return state


def restore_state(trainer: Trainer, phase: Phase, resume: Resume) -> tuple[int, int]:
    """Load a checkpoint into a trainer whose engine is fresh (collective); returns the epoch and update to resume at.

    Raises:
        UserError: it does not fit the run.
    """
    checkpoint, position = resume.checkpoint, resume.checkpoint.position
    _check_fit(trainer, phase, checkpoint)
    state = trainer.engine.load(checkpoint.folder, position.tag)["spml_fast"]
    _check_optimizer(trainer, checkpoint, state)
    _check_linear(trainer, checkpoint, state)
    trainer.started_from = state.get("started_from")
    trainer.store.load_state_dict(state["labels"])
    if trainer.method.rank_state():
        trainer.method.load_rank_state(load_rank_states(checkpoint.path, position.world_size))
    if trainer.ema is not None:
        if state["ema"] is None:
            raise UserError(
                f"checkpoint {checkpoint.path} has no average of the weights; resume with train.ema_decay 0 and "
                "train.average_weights false"
            )
        trainer.ema.module.load_state_dict(state["ema"])
    restore_statistics(trainer.classifier, trainer.ema, checkpoint.path, position.world_size)
    trainer.score.load_state(state["best"])
    trainer.trained_samples, trainer.trained_seconds, trainer.waited_seconds = state["trained"]
    start_update = _restore_epoch(trainer, checkpoint, state.get("epoch")) if position.update else 0
    updates = position.epoch * trainer.loader.updates_per_epoch + start_update
    _check_counting(trainer, checkpoint, state)
    trainer.engine.place_schedule(updates)
    trainer.log.say(console.resume_line(phase, position, start_update, checkpoint.folder))
    if not checkpoint.files:
        trainer.log.say("this checkpoint is of a version before 0.2.0 and has no checksums")
    if position.epoch >= phase.epochs and phase is trainer.phases[-1]:
        trainer.log.say("nothing left to train: the run has all its epochs")
    lost = trainer.checkpoints.adopt(resume, trainer.config.model.backbone, trainer.score.latest, trainer.log.say)
    if lost:
        trainer.score.load_state((trainer.score.latest, trainer.score.latest))
    return position.epoch + 1, start_update


def _check_fit(trainer: Trainer, phase: Phase, checkpoint: Checkpoint) -> None:
    """What can be told before anything is loaded."""
    position, engine = checkpoint.position, trainer.engine
    saved, current = (position.world_size, position.zero_stage), (trainer.world, engine.stage)
    if saved != current and (position.zero_stage or engine.stage):
        raise UserError(
            f"checkpoint {checkpoint.path} was saved by {saved[0]} ranks at ZeRO stage {saved[1]}; "
            f"resume with the same, not with {trainer.world} ranks at stage {engine.stage} "
            "(stage 0 alone allows another number of ranks)"
        )
    if phase.solved and (position.epoch > 1 or position.update):
        raise UserError(_other_linear(checkpoint, "sgd", "solve"))
    if position.epoch > phase.epochs:
        option = "train.linear_epochs" if phase.name == "linear" else "train.epochs"
        raise UserError(
            f"{option} is {phase.epochs}, but checkpoint {checkpoint.path} has {position.epoch} epochs behind it; "
            f"give {position.epoch} or more, or another --run.dir"
        )


def _check_optimizer(trainer: Trainer, checkpoint: Checkpoint, state: dict[str, Any]) -> None:
    """Adam and AdamW keep the same state, SGD another."""
    before = state.get("optimizer") or _old_option(checkpoint, "train.optimizer") or trainer.config.train.optimizer
    now = trainer.config.train.optimizer
    if (before == "sgd") != (now == "sgd"):
        raise UserError(
            f"train.optimizer cannot change from {before} to {now}: the checkpoint holds the state of {before}; resume "
            f"with {before}, or start a new run in another --run.dir"
        )


def _check_linear(trainer: Trainer, checkpoint: Checkpoint, state: dict[str, Any]) -> None:
    """A head that was trained by steps is no solution, and the other way round."""
    # Versions before 0.2.0 could not solve.
    before, now = state.get("linear", "sgd"), trainer.config.train.linear
    if checkpoint.position.phase == "linear" and before != now:
        raise UserError(_other_linear(checkpoint, before, now))


def _other_linear(checkpoint: Checkpoint, before: str, now: str) -> str:
    return (
        f"train.linear cannot change from {before} to {now} within the linear phase, in which checkpoint "
        f"{checkpoint.path} was saved; resume with {before}, or start a new run in another --run.dir"
    )


def _check_counting(trainer: Trainer, checkpoint: Checkpoint, state: dict[str, Any]) -> None:
    """A method whose state is numbered by updates needs the batch size that it began with."""
    loader, batch_size = trainer.loader, trainer.config.train.batch_size
    if "updates_per_epoch" in state:
        same = state["updates_per_epoch"] == loader.updates_per_epoch
    else:
        same = _old_option(checkpoint, "train.batch_size") in (None, batch_size)
    if trainer.method.counts_updates and not same:
        raise UserError(
            f"train.batch_size cannot change within a run of method {trainer.config.method.name}, whose state is "
            "numbered by updates; resume with the batch size that it began with"
        )


def _old_option(checkpoint: Checkpoint, name: str) -> Any:
    """An option of the run that a checkpoint lies in, from its recipe; None where that cannot be read."""
    recipe = recipe_of(CheckpointLayout(checkpoint.folder).run)
    return (default_options(recipe.get("method.name")) | recipe).get(name) if recipe else None


def _restore_epoch(trainer: Trainer, checkpoint: Checkpoint, saved: dict[str, Any] | None) -> int:
    """Go on within an epoch: the place in its data, and the figures of its beginning; returns the update."""
    position, sampler = checkpoint.position, trainer.loader.sampler
    if saved is None:
        # Versions before 0.2.0 counted in updates.
        size = int(_old_option(checkpoint, "train.batch_size") or sampler.batch_size)
        return sampler.resume(position.epoch + 1, position.update * size, size)
    sums: list[dict[str, Tensor]] = saved["sums"]
    if len(sums) == trainer.world:
        own = sums[trainer.rank]
    else:
        own = {name: torch.stack([part[name] for part in sums]).sum(0) for name in sums[0]}
        if trainer.rank:
            own = {name: torch.zeros_like(value) for name, value in own.items()}
    trainer.running = Meter(*saved["meter"]), {name: value.to(trainer.device) for name, value in own.items()}
    return sampler.resume(position.epoch + 1, saved["samples"], saved["order_batch_size"])
