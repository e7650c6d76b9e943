"""EPR: expected positive regularisation.

L = 1/(B C) sum over observed positives of -log(p + 1e-5)  +  lambda ( (1/B sum_b sum_c p) - k )^2 / C^2, lambda = 1.
Unknown entries, and observed negatives too, act through the second term alone. k is the expected number of positives of
an image, a statistic of the fully labelled data that single-positive labels do not tell:
    VOC 1.5, COCO 2.9 (2.5 in one revision), NUS-WIDE 1.9, CUB 31.4.

The mean over b runs over the micro-step of all ranks (over the whole update with train.exact_accumulation).

Source: Cole et al., CVPR 2021; docs/sources.md#cole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from spml_kernels import PointLoss, label_loss
from spml_kernels.common.jit import jit, tl
from spml_kernels.common.math import log_terms_jit
from torch import Tensor

from spml_fast.core import distributed
from spml_fast.core.batch import Batch
from spml_fast.core.errors import UserError
from spml_fast.data.labels import POSITIVE, LabelStore, SparseLabels
from spml_fast.methods.base import LossOutput, MethodOptions, Progress, attached_global_sum, register
from spml_fast.methods.pointwise import LogForm, PointMethod, log_terms, require_not_negative


def epr_point(logits: Tensor, codes: Tensor, guard: float) -> Tensor:
    """-log p on observed positives, 0 elsewhere, element-wise."""
    return torch.where(codes == POSITIVE, log_terms(logits, guard)[0], 0)


@jit
def epr_point_jit(z, code, guard):
    """`epr_point` and its derivative, for the fused kernel."""
    positive, d_positive, _, _ = log_terms_jit(z, guard)
    return tl.where(code == 1, positive, 0.0), tl.where(code == 1, d_positive, 0.0)


def require_expected_positives(options: MethodOptions) -> float:
    """k of EPR's and ROLE's options; raises `UserError` unless it is given."""
    k: float | None = getattr(options, "expected_positives", None)
    if k is None or not k > 0:
        raise UserError(
            f"method {options.name} needs --method.expected_positives, the mean number of positives of an image when "
            "all labels are known; published values: VOC 1.5, COCO 2.9, NUS-WIDE 1.9, CUB 31.4"
        )
    return k


def mean_positives(logits: Tensor, global_size: int, update_mean: Tensor | None) -> Tensor:
    """1/B sum p over all ranks, 0-d, differentiable (see `attached_global_sum`).

    Args:
        logits: [B, C] of this rank.
        global_size: images of the micro-step over all ranks.
        update_mean: the value, when it was computed for a whole update beforehand; the gradient is still this
            micro-step's.
    """
    local = torch.sigmoid(logits).sum()
    if update_mean is None:
        return attached_global_sum(local) / global_size
    return update_mean + (distributed.world_size() / global_size) * (local - local.detach())


@dataclass(frozen=True)
class EPROptions(MethodOptions):
    """Expected positive regularisation.

    Attributes:
        name: the method.
        expected_positives: k, mean number of positives of an image when all labels are known; must be given
            (VOC 1.5, COCO 2.9, NUS-WIDE 1.9, CUB 31.4).
        penalty: lambda, weight of the regularisation.
        log_form: released guards the logarithms with 1e-5; logits is exact cross-entropy.
    """

    name: str = "epr"
    expected_positives: float | None = None
    penalty: float = 1.0
    log_form: LogForm = "released"


@register("epr")
class ExpectedPositives(PointMethod):
    """Observed positives up, the mean number of predicted positives towards k."""

    Options: ClassVar[type[MethodOptions]] = EPROptions
    options: EPROptions
    batch_statistics: ClassVar[bool] = True
    point: ClassVar[PointLoss] = PointLoss("epr", epr_point, epr_point_jit)
    examples: ClassVar[tuple[MethodOptions, ...]] = (
        EPROptions(expected_positives=2.9),
        EPROptions(expected_positives=2.9, log_form="logits"),
    )

    def __init__(self, options: MethodOptions, store: LabelStore) -> None:
        super().__init__(options, store)
        self.expected_positives = require_expected_positives(options)
        require_not_negative(options, "penalty")

    @classmethod
    def check_labels(cls, labels: SparseLabels, options: MethodOptions) -> None:
        """k must be given."""
        require_expected_positives(options)

    def params(self, progress: Progress) -> tuple[float, ...]:
        """Guard."""
        return (self.log_guard,)

    def update_statistics(self, forwards: list[Tensor], batches: list[Batch], progress: Progress) -> list[Tensor]:
        """The mean number of predicted positives over a whole update."""
        total = distributed.all_reduce_sum(torch.stack([torch.sigmoid(z).sum() for z in forwards]).sum())
        return [total / sum(b.global_size for b in batches)] * len(batches)

    def loss(self, logits: Tensor, batch: Batch, progress: Progress) -> LossOutput:
        """Positives' mean over B x C plus the regularisation."""
        positives = self.reduce(label_loss(logits, batch.labels, self.point, self.params(progress)), batch)
        mean = mean_positives(logits, batch.global_size, self.statistics_of(batch))
        gap = (mean - self.expected_positives) / logits.shape[1]
        metrics = {"predicted_positives_count": torch.sigmoid(logits.detach()).sum()}
        return LossOutput(positives + self.options.penalty * gap**2, metrics)
