"""The linear phase of a run that solves for its head: one pass over the images, then `linear_probe.solve`.

The phase is one step: without its checkpoint it begins anew.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spml_fast.core import distributed
from spml_fast.core.precision import autocast, autocast_dtype, no_cudnn_benchmark
from spml_fast.core.progress import Task, duration, under_way
from spml_fast.data.loader import EvalLoader
from spml_fast.evaluation.evaluate import gather_scores, measure
from spml_fast.training.linear_probe import (
    DEFAULT_PENALTY,
    PENALTIES,
    HeadObjective,
    Solution,
    require_memory,
    solve,
)
from spml_fast.training.logs import Meter, memory_gib
from spml_fast.training.pace import ENOUGH_SECONDS
from spml_fast.training.scoring import training_scorer

if TYPE_CHECKING:
    from spml_fast.training.setup import Phase
    from spml_fast.training.trainer import Trainer


@torch.no_grad()
def solve_phase(trainer: Trainer, phase: Phase) -> dict[str, Any]:
    """Give the classifier the head that is the optimum of the linear phase (collective).

    Args:
        trainer: the run, its engine made for this phase.
        phase: the linear one.

    Returns:
        Figures of the phase's one epoch for the log: `loss` (of a label, without the penalty), the speed of the pass,
        and how the head was found: `linear`, `penalty`, and a list `penalties` of those that were tried.

    Raises:
        UserError: the features do not fit into memory, or are not finite.
        Interrupted: a signal came.
    """
    classifier, train, val = trainer.classifier, trainer.data.train, trainer.val_loader
    width, images = classifier.channels, len(train) + (0 if val is None else len(val.split))
    size = require_memory(-(-images // trainer.world), width, train.known.num_classes)
    trainer.log.say(
        f"linear phase: one pass over {images:,} images for their mean features ({width:,} numbers each, "
        f"{size / 2**30:.2f} GiB a rank with what belongs to them), then the head is solved for"
    )
    classifier.eval()
    meter = Meter()
    index, features = _mean_features(trainer, training_scorer(trainer), meter, "linear phase: features")
    trainer.trained_samples += meter.samples
    if bad := sorted(trainer.loader.bad_images.reasons):
        # Another image was shown in the place of each.
        shown = ~torch.isin(index, torch.tensor(bad, device=index.device))
        index, features = index[shown], features[shown]
    objective = HeadObjective(features, trainer.store.rows(index), trainer.method.linear_loss())
    held_out = None if val is None else _mean_features(trainer, val, meter, "linear phase: validation features")
    # Of the passes alone: solving takes no images.
    speed = {"images_per_second": meter.rate, "data_wait": meter.wait_fraction}
    started = time.perf_counter()
    solution, tried = _choose(trainer, objective, held_out)
    with trainer.engine.gathered_parameters(change=True):
        classifier.head.set_affine(*objective.head(solution.parameters))
    if trainer.ema is not None:
        # An average over one step is that step.
        trainer.ema.set(classifier)
    trainer.log.say(_line(solution, tried, time.perf_counter() - started))
    trainer.trained_seconds += meter.seconds
    trainer.waited_seconds += meter.waited
    classifier.train()
    return {
        "loss": solution.loss / objective.classes,
        **speed,
        "memory_gib": memory_gib(trainer.device),
        "seconds": meter.seconds,
        "linear": "solve",
        "penalty": solution.penalty,
        "penalties": tried,
    }


def _mean_features(trainer: Trainer, loader: EvalLoader, meter: Meter, task: str) -> tuple[Tensor, Tensor]:
    """Samples int64 [n] of this rank, and their mean features fp32 [n, K], on its device (collective).

    Args:
        trainer: the run.
        loader: this rank's batches.
        meter: counts the images.
        task: what its progress is called.
    """
    device, classifier = trainer.device, trainer.classifier
    dtype = autocast_dtype(trainer.config.train.precision, device)
    # Filled in place: memory for them is asked for once.
    rows = min(len(loader) * loader.sampler.batch_size, len(loader.split))
    index = torch.empty(rows, dtype=torch.int64, device=device)
    features = torch.empty(rows, classifier.channels, device=device)
    done = 0
    with loader.watched(task) as batches:
        while True:
            with meter.waiting():
                batch = next(batches, None)
            if batch is None:
                break
            with autocast(device, dtype), no_cudnn_benchmark():
                maps = classifier.features(batch.views["eval"])
            index[done : done + batch.real] = batch.index[: batch.real]
            features[done : done + batch.real] = maps[: batch.real].float().mean((1, 2))
            done += batch.real
            meter.samples += batch.global_size
            if trainer.pace.rate is None and meter.seconds > ENOUGH_SECONDS:
                trainer.log.say(trainer.pace.measured(meter.rate, meter.samples))
            trainer.saves.stop_between()
    return index[:done], features[:done]


def _choose(
    trainer: Trainer, objective: HeadObjective, held_out: tuple[Tensor, Tensor] | None
) -> tuple[Solution, list[dict[str, float | int | None]]]:
    """The solution whose penalty suits the validation split best, and what is known of all that were tried."""
    penalties: tuple[float, ...] = PENALTIES
    if held_out is None:
        penalties = tuple(penalty for penalty in PENALTIES if penalty >= DEFAULT_PENALTY)
    tried: list[dict[str, float | int | None]] = []
    best: tuple[float, Solution] | None = None
    for solution in _solutions(objective, penalties):
        score = None if held_out is None else _val_map(trainer, objective, solution, *held_out)
        tried.append(
            {
                "penalty": solution.penalty,
                "val_map": score,
                "loss": solution.loss / objective.classes,
                "evaluations": solution.evaluations,
                "gradient": solution.gradient,
            }
        )
        # Where nothing tells them apart the default one is taken.
        value = score if score is not None else -solution.penalty if solution.penalty >= DEFAULT_PENALTY else -math.inf
        if best is None or value > best[0]:
            best = value, solution
        trainer.saves.stop_between()
    assert best is not None
    return best[1], tried


def _solutions(objective: HeadObjective, penalties: Sequence[float]) -> Iterator[Solution]:
    """As `solve`, while it is shown how far that is."""
    task = Task("linear phase: solving for the head", len(penalties), "penalties", notes=[])
    evaluations = 0

    def evaluated() -> None:
        nonlocal evaluations
        evaluations += 1
        left = task.seconds / task.done * (task.total - task.done) if task.done else None
        task.change(task.name, task.done, [f"{evaluations:,} evaluations"], left)

    with under_way(task, distributed.is_main()):
        for solution in solve(objective, penalties, evaluated):
            task.advance(1)
            yield solution


def _val_map(
    trainer: Trainer, objective: HeadObjective, solution: Solution, index: Tensor, features: Tensor
) -> float | None:
    """Validation mAP at alpha 1 in per cent, the same on all ranks (collective); None where it is not defined."""
    split, config = trainer.data.val, trainer.config
    assert split is not None
    weight, bias = objective.head(solution.parameters)
    step = config.eval.batch_size
    outputs = (
        (i, torch.addmm(bias, x, weight.T), None) for i, x in zip(index.split(step), features.split(step), strict=True)
    )
    scores = gather_scores(outputs, split.known, [1.0], trainer.device)

    def value() -> float | None:
        assert scores is not None
        found = measure(scores, split.known, 1.0, config.eval, trainer.data.manifest.classes)["map"]
        return None if found is None or not math.isfinite(found) else float(found)

    return distributed.from_main(value)


def _line(solution: Solution, tried: list[dict[str, float | int | None]], seconds: float) -> str:
    """What was tried and taken, and how long that took, in one line."""
    if tried[-1]["val_map"] is None:
        line = f"linear phase: solved with penalty {solution.penalty:g}, since no validation split chooses one"
        return f"{line} | {duration(seconds)}"
    maps = ", ".join(f"{one['penalty']:g}: {one['val_map']:.2f}" for one in tried if one["val_map"] is not None)
    line = f"linear phase: solved; penalty: validation mAP, plain | {maps} | {solution.penalty:g} is taken"
    return f"{line} | {duration(seconds)}"
