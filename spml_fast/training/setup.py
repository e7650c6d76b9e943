"""What a run needs before its first update: data, run directory, model, loader."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from spml_fast.core import distributed, lock
from spml_fast.core.config import Config, ModelConfig
from spml_fast.core.errors import UserError
from spml_fast.data.labels import NEGATIVE, POSITIVE, LabelStore, SparseLabels
from spml_fast.data.loader import TrainLoader
from spml_fast.data.manifest import Manifest, Split
from spml_fast.data.repeat_factor import RepeatFactorSampler, repeat_factors
from spml_fast.data.sampler import TrainSampler
from spml_fast.methods import Method, get_method
from spml_fast.models.batchnorm import synchronised
from spml_fast.models.classifier import Classifier
from spml_fast.models.heads import get_head
from spml_fast.models.weights import load_weights
from spml_fast.runs.layout import RunLayout
from spml_fast.runs.open import input_normalisation, open_data
from spml_fast.runs.warm_start import without_source
from spml_fast.training.engine import Engine
from spml_fast.training.engine_config import deepspeed_config
from spml_fast.training.module import TrainingModule
from spml_fast.training.optim import make_optimizer, make_schedule, parameter_groups


@dataclass(frozen=True)
class Phase:
    """A part of training with an optimizer of its own.

    Attributes:
        name: `linear` trains the head on a frozen backbone, `finetune` everything.
        epochs: its length.
        solved: its one epoch solves for the head (`train.linear solve`).
    """

    name: str
    epochs: int
    solved: bool = False


# What `train.epochs null` means at so many training images, and its limits.
EPOCHS_AT, EPOCHS, FEWEST_EPOCHS, MOST_EPOCHS = 2000, 8, 3, 30


def suitable_epochs(images: int) -> int:
    """Epochs of a phase for a number of training images: 8 at 2,000, and fewer the more images there are.

    A network sees every image less often the more there are, and all of them together more often: epochs fall with the
    square root. 200 images have 25 epochs, 14,000 or more have 3.
    """
    return min(max(round(EPOCHS * math.sqrt(EPOCHS_AT / images)), FEWEST_EPOCHS), MOST_EPOCHS)


def resolve_phases(config: Config, images: int) -> tuple[Config, list[str]]:
    """The configuration with numbers in place of `null` epochs and a way in place of `train.linear auto`, and notes.

    Args:
        config: as it was given.
        images: of the training split.

    Raises:
        UserError: `train.linear solve` with something that it does not go with.
    """
    train, suitable = config.train, suitable_epochs(images)
    way, notes = _linear_way(config)
    epochs = suitable if train.epochs is None else train.epochs
    linear = (1 if way == "solve" else suitable) if train.linear_epochs is None else train.linear_epochs
    resolved = dataclasses.replace(train, epochs=epochs, linear=way, linear_epochs=linear)
    return dataclasses.replace(config, train=resolved), notes


def _linear_way(config: Config) -> tuple[Literal["sgd", "solve"], list[str]]:
    """How the head of the linear phase is trained, and what to say of it where the run chooses."""
    train, obstacle = config.train, obstacle_to_solving(config)
    if train.linear == "solve" and obstacle is not None:
        raise UserError(f"train.linear solve cannot be used here: {obstacle}; set train.linear to sgd")
    if train.linear != "auto":
        return train.linear, []
    if train.linear_epochs == 0:
        return "sgd", []
    if train.linear_epochs is not None:
        why = f"train.linear_epochs asks for {train.linear_epochs} epochs"
    elif obstacle is not None:
        why = obstacle
    else:
        return "solve", ["train.linear auto: the head of the linear phase is solved for, in one pass"]
    return "sgd", [f"train.linear auto: the head of the linear phase is trained by steps, not solved for: {why}"]


def obstacle_to_solving(config: Config) -> str | None:
    """Why the head of the linear phase cannot be solved for; None where it can."""
    method, head = config.method.name, config.model.head
    if not get_method(method).solvable:
        return f"method {method} has no loss that a head can be solved for"
    if not get_head(head).affine_in_mean:
        return f"head {head} reads more than the mean feature"
    if config.train.sampling != "uniform":
        return f"train.sampling {config.train.sampling} weighs images differently"
    return None


def make_phases(config: Config) -> list[Phase]:
    """The phases of a run in order, of a configuration that `resolve_phases` gave."""
    train = config.train
    assert train.epochs is not None
    linear = [Phase("linear", train.linear_epochs, train.linear == "solve")] if train.linear_epochs else []
    return [*linear, Phase("finetune", train.epochs)]


def phase_index(phases: Sequence[Phase], name: str) -> int:
    """Place of the phase that a checkpoint belongs to. `UserError` for a phase that the run does not have."""
    names = [phase.name for phase in phases]
    if name not in names:
        raise UserError(f"the checkpoint is from phase {name!r}, which this run does not have")
    return names.index(name)


@dataclass(frozen=True)
class RunData:
    """A run's data set.

    Attributes:
        manifest: all of it.
        train: the split to train on.
        val: the split for model selection, or None.
        test: the split for the final figures, or None.
        labels: the labels of `train` that the method may see.
    """

    manifest: Manifest
    train: Split
    val: Split | None
    test: Split | None
    labels: SparseLabels


def sees_observed(config: Config) -> bool:
    """Whether training sees the observed labels, and not all that are known."""
    return get_method(config.method.name).label_source == "observed" and config.data.train_labels == "observed"


def load_data(config: Config) -> RunData:
    """Open a run's data set and check that it suits the method (collective: rank 0 builds the digit scenes first).

    Raises:
        UserError: no such data set or split, an empty split, or labels that the method cannot train on.
    """
    if distributed.is_main() and config.data.dir is None:
        open_data(config)
    distributed.barrier()
    manifest = open_data(config)
    method = get_method(config.method.name)
    train = manifest.split(config.data.train_split)
    val = _optional_split(manifest, config.data.val_split, "val")
    test = _optional_split(manifest, config.data.test_split, "test")
    for split in (train, val, test):
        if split is not None and len(split) == 0:
            raise UserError(f"split {split.name!r} of {manifest.source} has no images")
    labels = train.observed if sees_observed(config) else train.known
    if not (labels.codes == POSITIVE).any():
        raise UserError(f"no image of split {train.name!r} has a positive label; nothing to learn from")
    method.check_labels(train.known if method.uses_truth else labels, config.method)
    return RunData(manifest, train, val, test, labels)


def _optional_split(manifest: Manifest, name: str | None, default: str) -> Split | None:
    """The split called `name`. One that nobody asked for by name may be missing; the opening lines say so."""
    if name is None or (name == default and name not in manifest.splits):
        return None
    return manifest.split(name)


def make_run_dir(config: Config, data_name: str) -> Path:
    """Make the run directory on rank 0, and tell all ranks where it is (collective).

    Args:
        config: `run.dir` names it; without one it is a new folder under runs/.
        data_name: the data set's name, for such a folder.

    Raises:
        UserError: it cannot be written, holds something else than a run, or another process trains in it.
    """
    folder = config.run.dir
    if folder is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        folder = f"runs/{data_name}-{config.method.name}-{stamp}"
        if distributed.is_main():
            number, base = 2, folder
            while Path(folder).exists():
                folder, number = f"{base}-{number}", number + 1
    path = Path(distributed.broadcast_text(folder))
    distributed.from_main(lambda: _prepare_run_dir(path))
    return path


def _prepare_run_dir(path: Path) -> None:
    """Make the folder, or see that it is a run's. Raises `UserError`."""
    layout = RunLayout(path)
    try:
        foreign = layout.foreign
        if foreign:
            more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
            raise UserError(
                f"--run.dir {path} is no run directory: it holds {', '.join(foreign[:3])}{more}; give a new or empty "
                "folder"
            )
        layout.checkpoints.folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(layout.lock, f"run directory {path}")
    except OSError as error:
        raise UserError(f"run directory {path} cannot be written: {error.strerror}") from error


def make_classifier(
    model: ModelConfig, num_classes: int, image_size: int, device: torch.device, initial: bool = True
) -> Classifier:
    """A classifier on the CPU, with what the run asks of it in training.

    Args:
        model: backbone and head.
        num_classes: C.
        image_size: side of the square input in pixels.
        device: where it will train.
        initial: with the weights that the options name; without, nothing is downloaded or read for them.

    Raises:
        UserError: no such backbone, head or weights; `model.sync_bn` without a GPU.
    """
    model = without_source(model) if initial else dataclasses.replace(model, pretrained=False, weights=None)
    classifier = Classifier(model, num_classes, image_size)
    if model.sync_bn:
        if device.type != "cuda":
            raise UserError("model.sync_bn needs GPUs; leave it off (statistics are averaged over ranks anyway)")
        classifier.backbone = synchronised(classifier.backbone)
    return classifier


def load_best_classifier(
    config: Config, layout: RunLayout, num_classes: int, device: torch.device
) -> tuple[Classifier, dict[str, str]]:
    """A new classifier on the CPU with a run's best weights so far, and their metadata (collective).

    The one that was trained cannot take them: ZeRO stage 3 leaves it in pieces.

    Args:
        config: the run's.
        layout: the run's.
        num_classes: C.
        device: where it will compute.

    Raises:
        UserError: there are no weights that fit.
    """
    distributed.barrier()
    classifier = make_classifier(config.model, num_classes, config.data.image_size, device, initial=False)
    return classifier, load_weights(layout.weights, classifier)


def set_prior(classifier: Classifier, config: Config, store: LabelStore, images: int) -> None:
    """Start the head's biases where `model.prior_bias` wants them.

    Args:
        classifier: changed in place.
        config: the run's.
        store: the labels that training sees.
        images: number of training images.
    """
    if config.model.prior_bias != "none":
        positives, negatives = (store.class_counts(code).cpu() for code in (POSITIVE, NEGATIVE))
        classifier.set_prior(positives, negatives, images)


def make_truth(config: Config, train: Split, device: torch.device) -> LabelStore | None:
    """All known labels, where they are more than the method may see: a simulation, or an oracle's diagnostics."""
    if sees_observed(config) and train.hides_labels:
        return LabelStore(train.known, device)
    return None


def make_sampler(config: Config, labels: SparseLabels) -> Callable[..., TrainSampler]:
    """How often images come (`train.sampling`), from the labels that training sees; makes the loader's sampler.

    Raises:
        UserError: the method must not see an image twice in a step, but the sampling may show it so.
    """
    train = config.train
    if train.sampling == "uniform":
        return functools.partial(TrainSampler, drop_last=train.drop_last)
    if get_method(config.method.name).one_visit_per_step:
        raise UserError(
            f"method {config.method.name} keeps a row for every image, which must not come twice in a step; "
            f"it does not go with train.sampling {train.sampling}"
        )
    factors = repeat_factors(labels, train.repeat_threshold)
    return functools.partial(RepeatFactorSampler, factors, drop_last=train.drop_last)


def make_train_loader(config: Config, data: RunData, classifier: Classifier, device: torch.device) -> TrainLoader:
    """The loader of this rank's training images.

    Args:
        config: the run's.
        data: the run's.
        classifier: its backbone knows the normalisation where the configuration has none.
        device: where the images go.
    """
    mean, std = input_normalisation(config, classifier)
    return TrainLoader(
        data.train,
        config.data,
        views=get_method(config.method.name).views,
        batch_size=config.train.batch_size,
        accumulation=config.train.accumulation,
        seed=config.run.seed,
        device=device,
        mean=mean,
        std=std,
        make_sampler=make_sampler(config, data.labels),
    )


def phase_engine(
    config: Config,
    classifier: Classifier,
    method: Method,
    head_only: bool,
    updates: int,
    run_dir: Path,
    device: torch.device,
    monitored: bool,
) -> tuple[Engine, dict[str, Any]]:
    """The engine of a phase, and DeepSpeed's configuration.

    Nothing else refers to the optimizer and the module, so that closing the engine frees what the next phase has anew.

    Args:
        config: of the run.
        classifier: what trains.
        method: by which.
        head_only: the backbone stays as it is.
        updates: of the phase.
        run_dir: the run directory.
        device: of this rank.
        monitored: DeepSpeed writes its figures for TensorBoard.
    """
    train, settings = config.train, dataclasses.replace(config.deepspeed, tensorboard=monitored)
    optimizer = make_optimizer(parameter_groups(classifier, method, train, head_only=head_only), train)
    schedule = make_schedule(optimizer, train, updates)
    about = deepspeed_config(train, settings, distributed.world_size(), device, run_dir)
    module = TrainingModule(classifier, method)
    return Engine(module, optimizer, schedule, about, overlap=settings.overlap_gradients), about


def resolved_config(
    config: Config, data: RunData, run_dir: Path, classifier: Classifier, started_from: Mapping[str, Any] | None
) -> Config:
    """The configuration with what was decided on the way, so that the run can be repeated from it.

    Args:
        config: as it was given.
        data: the run's.
        run_dir: the run directory.
        classifier: knows the normalisation.
        started_from: the run that it started from and the checksum of its weights, where it did.
    """
    mean, std = input_normalisation(config, classifier)
    folder = data.manifest.where
    model = config.model
    if started_from is not None:
        model = dataclasses.replace(model, weights=started_from["run"], weights_crc32=started_from["weights_crc32"])
    return dataclasses.replace(
        config,
        model=model,
        data=dataclasses.replace(config.data, dir=folder, mean=mean, std=std),
        # A repeat need not be looked at as this one was.
        run=dataclasses.replace(config.run, dir=str(run_dir), profile=None),
    )
