"""GR: generalised robust loss.

L = 1/(B C) sum [ -log(p + 1e-7) on observed positives,
                  v(p) { k(p) (1 - p^q2)/q2 + (1 - k(p)) (1 - (1 - p)^q3)/q3 } on unknown ],
k = sigmoid(w p + b), the belief that the entry is a hidden positive, v = exp(-(p - mu)^2 / (2 s^2)), both without
gradient. Observed negatives, which the published data do not have, get -log(1 - p + 1e-7).

In epoch t of E (from 1): (w, b) = start + (end - start) (t - 1)/E, which reaches (E - 1)/E of the way, and
(mu, s) = start + (end - start) t/E. Linear-init epochs stand at the start and do not count.
(w, b) from (0, -2) to (2, -2) for VOC, to (10, -8) for COCO, NUS-WIDE and CUB; (mu, s) from (0.5, 2) to (0.8, 0.5);
q2 = 0.01; q3 = 1 (CUB 1.5). Adam 1e-5, head learning rate x 10, batch 8, 8 to 10 epochs, train.stop_after_drop 2.

Where released code differs: it takes 1 - p in single precision, whose rounding is as large as the guard; here 1 - p
comes from the logits. Its options for the schedules cannot be set from a shell. Its learned k, off by default, is left
out.

Source: Chen et al., "Boosting Single Positive Multi-label Classification with Generalized Robust Loss", IJCAI 2024;
docs/sources.md#gr.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from spml_kernels import PointLoss
from spml_kernels.common.jit import jit, tl
from spml_kernels.common.math import expm1_jit, log_terms_jit, sigmoid_jit, softplus_jit
from torch import Tensor
from torch.nn.functional import logsigmoid

from spml_fast.core.errors import UserError
from spml_fast.data.labels import NEGATIVE, POSITIVE, LabelStore
from spml_fast.methods.base import MethodOptions, Progress, register
from spml_fast.methods.pointwise import GR_GUARD, LogForm, PointMethod, log_terms


def gr_point(
    logits: Tensor,
    codes: Tensor,
    w: float,
    b: float,
    mu: float,
    s: float,
    q2: float,
    q3: float,
    guard: float,
) -> Tensor:
    """Cross-entropy on known entries, the weighted robust loss on unknown ones; element-wise.

    Args:
        logits: floating, any shape.
        codes: int8, the same shape.
        w: slope of the belief that an unknown label is positive.
        b: offset of that belief.
        mu: centre of the weight over probabilities.
        s: width of that weight.
        q2: exponent of the loss as a positive.
        q3: exponent of the loss as a negative.
        guard: added inside the logarithms of known entries; 0 takes them from the logits.
    """
    positive, negative = log_terms(logits, guard)
    p = torch.sigmoid(logits.detach())
    belief = torch.sigmoid(w * p + b)
    weight = torch.exp(-((p - mu) ** 2) / (2 * s**2))
    # (1 - x^q)/q of x = p and x = 1 - p, from log x: no digits lost for small q, finite where x underflows.
    as_positive = -torch.expm1(q2 * logsigmoid(logits)) / q2
    as_negative = -torch.expm1(q3 * logsigmoid(-logits)) / q3
    robust = weight * (belief * as_positive + (1 - belief) * as_negative)
    return torch.where(codes == POSITIVE, positive, torch.where(codes == NEGATIVE, negative, robust))


@jit
def gr_point_jit(z, code, w, b, mu, s, q2, q3, guard):
    """`gr_point` and its derivative, for the fused kernel."""
    positive, d_positive, negative, d_negative = log_terms_jit(z, guard)
    p, q = sigmoid_jit(z)
    belief, doubt = sigmoid_jit(w * p + b)
    weight = tl.exp(-(p - mu) * (p - mu) / (2.0 * s * s))
    log_p, log_q = -softplus_jit(-z), -softplus_jit(z)
    robust = weight * -(belief * expm1_jit(q2 * log_p) / q2 + doubt * expm1_jit(q3 * log_q) / q3)
    d_robust = weight * (doubt * tl.exp(q3 * log_q) * p - belief * tl.exp(q2 * log_p) * q)
    loss = tl.where(code == 1, positive, tl.where(code == 0, negative, robust))
    return loss, tl.where(code == 1, d_positive, tl.where(code == 0, d_negative, d_robust))


@dataclass(frozen=True)
class GROptions(MethodOptions):
    """Generalised robust loss.

    Attributes:
        name: the method.
        w_start: slope of the belief that an unknown label is positive, in the first epoch.
        w_end: its end value (VOC 2; COCO, NUS-WIDE and CUB 10).
        b_start: offset of that belief, in the first epoch.
        b_end: its end value (VOC -2; COCO, NUS-WIDE and CUB -8).
        mu_start: centre of the weight over probabilities, at the start.
        mu_end: its end value.
        s_start: width of that weight, at the start.
        s_end: its end value.
        q2: exponent of the loss as a positive.
        q3: exponent of the loss as a negative (CUB 1.5).
        log_form: released guards the logarithms of known labels with 1e-7; logits is exact cross-entropy.
    """

    name: str = "gr"
    w_start: float = 0.0
    w_end: float = 2.0
    b_start: float = -2.0
    b_end: float = -2.0
    mu_start: float = 0.5
    mu_end: float = 0.8
    s_start: float = 2.0
    s_end: float = 0.5
    q2: float = 0.01
    q3: float = 1.0
    log_form: LogForm = "released"


def gr_schedule(options: GROptions, progress: Progress) -> tuple[float, float, float, float]:
    """(w, b, mu, s) of an epoch."""
    linear = progress.phase == "linear"
    early = 0.0 if linear else (progress.epoch - 1) / progress.epochs
    late = 0.0 if linear else progress.epoch / progress.epochs
    o = options
    return (
        o.w_start + (o.w_end - o.w_start) * early,
        o.b_start + (o.b_end - o.b_start) * early,
        o.mu_start + (o.mu_end - o.mu_start) * late,
        o.s_start + (o.s_end - o.s_start) * late,
    )


@register("gr")
class GeneralisedRobust(PointMethod):
    """Unknown labels as a mixture of both labels, by what the model believes of them."""

    Options: ClassVar[type[MethodOptions]] = GROptions
    options: GROptions
    point: ClassVar[PointLoss] = PointLoss("gr", gr_point, gr_point_jit, elements_per_thread=4)
    examples: ClassVar[tuple[MethodOptions, ...]] = (
        GROptions(w_start=10.0, w_end=10.0, b_start=-8.0, b_end=-8.0, mu_start=0.8, s_start=0.5, q3=1.5),
        GROptions(
            w_start=10.0, w_end=10.0, b_start=-8.0, b_end=-8.0, mu_start=0.8, s_start=0.5, q3=1.5, log_form="logits"
        ),
    )
    guard: ClassVar[float] = GR_GUARD

    def __init__(self, options: MethodOptions, store: LabelStore) -> None:
        super().__init__(options, store)
        for name in ("q2", "q3", "s_start", "s_end"):
            if not getattr(options, name) > 0:
                raise UserError(f"method.{name} is {getattr(options, name)}; it must be greater than 0")

    def params(self, progress: Progress) -> tuple[float, ...]:
        """The epoch's (w, b, mu, s), exponents, guard."""
        return (*gr_schedule(self.options, progress), self.options.q2, self.options.q3, self.log_guard)
