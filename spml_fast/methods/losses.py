"""Losses alone: any method's loss from logits and label codes, without a trainer, a data set or a classifier.

    from spml_fast.methods import Loss, loss

    value = loss("em", logits, codes, alpha=0.2)        one batch
    value = loss("ll_r", logits, codes, epoch=3)        methods with a schedule want the epoch

    criterion = Loss("ignore", num_classes=80)          state from batch to batch: IGNORE's thresholds
    value = criterion(weak, codes, strong=strong, masked=masked, epoch=4)

Options are those of `--method.NAME`. The value is the one that training would have for this batch, gradient included;
state that a method keeps for single samples is what a batch alone cannot have, so role and em_apl are refused. LL-Cp's
labels are trained as positives in the batch; keeping them for later epochs is the caller's.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from spml_fast.core import distributed
from spml_fast.core.batch import Batch
from spml_fast.core.errors import UserError
from spml_fast.data.labels import UNKNOWN, LabelStore, SparseLabels, class_dtype
from spml_fast.methods.base import Progress, get_method
from spml_fast.methods.ignore import Ignore

_NOT_GIVEN = -1


class _NoSamples(LabelStore):
    """Labels of no sample at all: a method learns the number of classes from it, and corrections are dropped."""

    def __init__(self, num_classes: int) -> None:
        indptr, classes = np.zeros(1, np.int64), np.empty(0, class_dtype(num_classes))
        super().__init__(SparseLabels(indptr, classes, np.empty(0, np.int8), num_classes, UNKNOWN))

    def correct(self, index: Tensor, classes: Tensor, code: int, valid: Tensor | None = None) -> None:
        """Nothing: there is no later epoch."""


@dataclass(frozen=True)
class _Place(Progress):
    """A place in training of which the epochs may not have been given; a method that looks at them then says so."""

    def __getattribute__(self, name: str) -> object:
        value: object = super().__getattribute__(name)
        if value == _NOT_GIVEN and name in ("epoch", "epochs"):
            what = "epoch (counted from 1)" if name == "epoch" else "epochs (the length of the training)"
            raise UserError(f"this method's loss depends on the epoch; give {what}")
        return value


class Loss(nn.Module):
    """One method's loss as a criterion; what a method keeps from batch to batch lies in its buffers.

    Args:
        name: a method, see `method_names`.
        num_classes: C.
        options: the method's options by name; the others keep their defaults.

    Attributes:
        method: the method itself, for instance `criterion.method.thresholds()` of IGNORE.

    Raises:
        UserError: no such method or option, an invalid value of an option, or a method that keeps a state for single
            samples.
    """

    def __init__(self, name: str, num_classes: int, **options: object) -> None:
        super().__init__()
        method_class = get_method(name)
        if method_class.needs_samples:
            raise UserError(
                f"method {name} keeps a state for every training sample, so logits and codes alone do not tell its "
                "loss; train with it, or use em or ll_r"
            )
        known = [f.name for f in dataclasses.fields(method_class.Options) if f.name != "name"]
        for option in options:
            if option not in known:
                raise UserError(f"method {name} has no option {option!r}; it has {', '.join(known) or 'none'}")
        self.num_classes = num_classes
        self.method = method_class(method_class.Options(name=name, **options), _NoSamples(num_classes))

    def forward(
        self,
        logits: Tensor,
        codes: Tensor,
        *,
        epoch: int | None = None,
        epochs: int | None = None,
        truth: Tensor | None = None,
        strong: Tensor | None = None,
        masked: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch, 0-d, reduced as the method reduces it (a mean or, as published, a sum over B x C).

        In a process group every rank gives its own part of the batch and gets its part of the loss: the mean over ranks
        is the loss of all parts together, and averaged gradients are its gradients.

        Args:
            logits: floating [B, C]; for IGNORE those of the weak view.
            codes: integer [B, C] on the same device: 1 positive, 0 negative, -1 unknown.
            epoch: current epoch, counted from 1; methods with a schedule need it (ll_r, ll_ct, ll_cp, splc, gr, and
                ignore where there is a masked view).
            epochs: length of the training; gr needs it.
            truth: integer [B, C] known labels, for the oracle iun; without it the codes are all that is known.
            strong: floating [B, C] logits of the strong view, for ignore.
            masked: floating [B, C] logits of the masked view, for ignore, which takes them as constants; without them
                nothing is rejected and no threshold moves.

        Raises:
            UserError: the method depends on something that was not given, or does not know a view.
            ValueError: shapes that do not fit.
        """
        given = {"logits": logits, "codes": codes, "truth": truth, "strong": strong, "masked": masked}
        for name, tensor in given.items():
            if tensor is not None and tensor.shape != (len(logits), self.num_classes):
                shape = tuple(tensor.shape)
                raise ValueError(f"{name} must be [{len(logits)}, {self.num_classes}] as logits and codes, not {shape}")
        index = torch.arange(len(logits), device=logits.device)
        known = None if truth is None else truth.to(torch.int8)
        batch = Batch({}, codes.to(torch.int8), index, _global_size(logits), known)
        place = _Place(epoch or _NOT_GIVEN, epochs or _NOT_GIVEN, update=0, updates_per_epoch=1)
        if not isinstance(self.method, Ignore):
            if strong is not None or masked is not None:
                raise UserError(f"method {self.method.options.name} knows neither a strong nor a masked view")
            value: Tensor = self.method.loss(_full(logits), batch, place).loss
            return value
        options = self.method.options
        if strong is None and (options.strong_aug or options.reg):
            raise UserError("ignore needs the strong view's logits; give strong, or set strong_aug and reg to False")
        views = (None if strong is None else _full(strong), None if masked is None else _full(masked.detach()))
        return self.method.combine(_full(logits), *views, batch, place).loss


def loss(
    name: str,
    logits: Tensor,
    codes: Tensor,
    *,
    epoch: int | None = None,
    epochs: int | None = None,
    truth: Tensor | None = None,
    **options: object,
) -> Tensor:
    """A method's loss of one batch, 0-d; for a state from batch to batch (ignore, p_asl's running prior) see `Loss`.

    Args:
        name: a method, see `method_names`.
        logits: floating [B, C].
        codes: integer [B, C] on the same device: 1 positive, 0 negative, -1 unknown.
        epoch: current epoch, counted from 1; methods with a schedule need it.
        epochs: length of the training; gr needs it.
        truth: integer [B, C] known labels, for the oracle iun.
        options: the method's options by name, as `alpha=0.2` for `--method.alpha 0.2`.

    Raises:
        UserError: no such method or option, or something missing that the method depends on.
        ValueError: shapes that do not fit.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must be [B, C], not {tuple(logits.shape)}")
    criterion = Loss(name, logits.shape[1], **options).to(logits.device)
    value: Tensor = criterion(logits, codes, epoch=epoch, epochs=epochs, truth=truth)
    return value


def _full(logits: Tensor) -> Tensor:
    """Logits in at least fp32: losses are not computed in half precision."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def _global_size(logits: Tensor) -> int:
    """Images of the batch over all ranks (collective)."""
    if distributed.world_size() == 1:
        return len(logits)
    return int(distributed.all_reduce_sum(torch.tensor(len(logits), device=logits.device)))
