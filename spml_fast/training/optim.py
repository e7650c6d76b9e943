"""torch optimizers and schedules from the configuration."""

from __future__ import annotations

import math
import warnings

import torch
from torch import nn
from torch.optim import lr_scheduler

from spml_fast.core.config import TrainConfig
from spml_fast.models.classifier import Classifier


def parameter_groups(
    classifier: Classifier, method: nn.Module, train: TrainConfig, head_only: bool
) -> list[dict[str, object]]:
    """Parameter groups: backbone, head (lr times head_lr_multiplier), method; each split by weight decay.

    Biases, norms and other one-dimensional parameters get no weight decay unless `train.decay_all`. Empty groups are
    never made: DeepSpeed drops them, which would desynchronise the schedule.

    Args:
        classifier: backbone and head; parameters that do not require gradients are left out.
        method: its own parameters learn as fast as the head.
        train: learning rates and weight decay.
        head_only: the linear phase, in which the backbone does not train.
    """
    head_lr = train.lr * train.head_lr_multiplier
    if head_only and train.linear_lr is not None:
        head_lr = train.linear_lr
    sources: list[tuple[nn.Module, float]] = [(classifier.head, head_lr), (method, head_lr)]
    if not head_only:
        sources.insert(0, (classifier.backbone, train.lr))
    groups: list[dict[str, object]] = []
    for module, lr in sources:
        parameters = [p for p in module.parameters() if p.requires_grad]
        flat = [p for p in parameters if p.ndim <= 1 and not train.decay_all]
        rest = [p for p in parameters if p.ndim > 1 or train.decay_all]
        for params, decay in ((rest, train.weight_decay), (flat, 0.0)):
            if params:
                groups.append({"params": params, "lr": lr, "weight_decay": decay})
    return groups


def make_optimizer(groups: list[dict[str, object]], train: TrainConfig, fused: bool = True) -> torch.optim.Optimizer:
    """The torch optimizer.

    Args:
        groups: from `parameter_groups`.
        train: names it, and has its options.
        fused: update all parameters in one kernel, which spares memory traffic and launches (on a CPU 28 ms in the
            place of 74 for ResNet-50's 24 million parameters, 1.6 of 3.8 for the 0.4 million of digit scenes); the
            parameters may still be elsewhere. A checkpoint that is loaded brings its own choice, so that a run goes on
            as it began.
    """
    betas = (train.betas[0], train.betas[1])
    # False would switch off what torch chooses by itself, too.
    chosen = True if fused else None
    if train.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum, fused=chosen)
    cls = torch.optim.Adam if train.optimizer == "adam" else torch.optim.AdamW
    return cls(groups, lr=train.lr, betas=betas, fused=chosen)


def make_schedule(optimizer: torch.optim.Optimizer, train: TrainConfig, updates: int) -> lr_scheduler.LRScheduler:
    """Learning rate over `updates`, stepped once per update.

    one_cycle is torch's OneCycleLR (cosine, and it cycles beta1 or the momentum between 0.95 and 0.85 as the released
    Query2Label recipes do); cosine rises linearly for warmup_share, then falls to 0.

    Source: docs/sources.md#ignore.
    """
    if train.schedule == "one_cycle":
        peaks = [float(g["lr"]) for g in optimizer.param_groups]
        # As published: the last update has the lowest rate. A rise to the very end needs one step more to fall in, and
        # two steps are the least that OneCycleLR can be made of.
        total = max(updates, 2) if train.warmup_share < 1 else updates + 1
        rise = min(float(train.warmup_share), updates / total)
        if rise * total <= 1 + 1e-6:
            # A rise of one step or none starts at the peak; OneCycleLR divides by zero on exactly one step.
            rise = (1 - 1e-6) / total
        return lr_scheduler.OneCycleLR(optimizer, max_lr=peaks, total_steps=total, pct_start=rise)
    if train.schedule == "cosine":
        warm = round(updates * train.warmup_share)

        def factor(step: int) -> float:
            if step < warm:
                return (step + 1) / (warm + 1)
            return 0.5 * (1 + math.cos(math.pi * min((step - warm) / max(updates - warm, 1), 1.0)))

        return lr_scheduler.LambdaLR(optimizer, factor)
    return lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def match_layouts(optimizer: torch.optim.Optimizer) -> None:
    """Give the state of every parameter the parameter's memory layout, as after loading a checkpoint of another one.

    A fused update walks through parameter, gradient and state side by side in memory, whatever their strides say.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for name, value in state.items():
                whole = isinstance(value, torch.Tensor) and value.shape == parameter.shape
                if whole and value.stride() != parameter.stride():
                    state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


GROUP_OPTIONS = ("weight_decay", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum")
# one_cycle moves these; under other schedules they are options like any other.
CYCLED_OPTIONS = ("betas", "momentum")


def schedule_options(optimizer: torch.optim.Optimizer, scheduler: lr_scheduler.LRScheduler) -> list[dict[str, object]]:
    """What the configuration says of each parameter group, to be put back after a checkpoint was loaded over it.

    A checkpoint holds the options of the run that saved it; a run that is resumed with more epochs or another learning
    rate must follow the new ones from where it stands.
    """
    names = GROUP_OPTIONS if isinstance(scheduler, lr_scheduler.OneCycleLR) else GROUP_OPTIONS + CYCLED_OPTIONS
    return [{k: g[k] for k in names if k in g} for g in optimizer.param_groups]


def restore_schedule_options(
    optimizer: torch.optim.Optimizer,
    scheduler: lr_scheduler.LRScheduler,
    options: list[dict[str, object]],
    updates: int,
) -> None:
    """Put `schedule_options` back, and the learning rate where the schedule has it now.

    Args:
        optimizer: what the checkpoint was loaded into.
        scheduler: of that optimizer, as it was configured.
        options: from before.
        updates: updates of the schedule that are done.
    """
    for group, values in zip(optimizer.param_groups, options, strict=True):
        group.update(values)
    scheduler.last_epoch = updates
    with warnings.catch_warnings():
        # torch wants it to be called within `step`, which would also move on.
        warnings.simplefilter("ignore", UserWarning)
        rates = scheduler.get_lr()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = list(rates)
