"""Partial BCE with Durand's normalisation.

L = 1/B sum_b g(r_b) / C sum over known c of cross-entropy, r_b = fraction of image b's labels that is known,
g(r) = a r^gamma + b with a = -4.45, b = 5.45, gamma = 1, so g(1) = 1 and an image with few known labels weighs more a
label, up to 5.45 times. An image without known labels gives 0.

The authors' code is not public; three independent re-implementations agree on the numbers. CSL's variant of g,
1 / (1 + number known) + 1, is the mode ignore_normalize_classes of p_asl.

Source: Durand et al., CVPR 2019; docs/sources.md#durand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from spml_fast.core.batch import Batch
from spml_fast.data.labels import UNKNOWN, SparseLabels
from spml_fast.methods.base import LossOutput, Method, MethodOptions, Progress, global_mean, register
from spml_fast.methods.iu import iu_point
from spml_fast.methods.pointwise import COLE_GUARD, LogForm, require_negatives


@dataclass(frozen=True)
class DurandOptions(MethodOptions):
    """Partial BCE with Durand's normalisation.

    Attributes:
        name: the method.
        a: slope of the weight a r^gamma + b of an image of whose labels the fraction r is known.
        b: its value at r = 0.
        gamma: its exponent.
        log_form: released guards the logarithms with 1e-5 (as the Cole line would); logits is exact cross-entropy.
    """

    name: str = "durand"
    a: float = -4.45
    b: float = 5.45
    gamma: float = 1.0
    log_form: LogForm = "logits"


@register("durand")
class DurandPartialBCE(Method):
    """Cross-entropy on known labels, weighted by how few of an image's labels are known."""

    Options: ClassVar[type[MethodOptions]] = DurandOptions
    options: DurandOptions

    @classmethod
    def check_labels(cls, labels: SparseLabels, options: MethodOptions) -> None:
        """There must be known negatives."""
        require_negatives(labels, options.name)

    def loss(self, logits: Tensor, batch: Batch, progress: Progress) -> LossOutput:
        """Mean over B x C of the weighted entries."""
        o = self.options
        entries = iu_point(logits, batch.labels, 0.0 if o.log_form == "logits" else COLE_GUARD)
        known = (batch.labels != UNKNOWN).to(logits.dtype).mean(1)
        total = (entries.sum(1) * (o.a * known**o.gamma + o.b)).sum()
        return LossOutput(global_mean(total, batch.global_size * logits.shape[1]), {})
