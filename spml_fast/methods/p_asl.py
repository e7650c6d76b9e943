"""P-ASL with class-aware selection, CSL.

L = sum [ a+ (1 - p)^g+ l+ on observed positives, a- pm^g- l-(pm) on observed negatives, w au pm^gu l-(pm) on unknown ],
pm = max(p - m, 0), focal weights without gradient, values clamped at 1e-8 before the logarithm; a sum over B C.
w = 0 for unknown entries whose class has a prior above eta, and for the K B unknown entries of highest p in the whole
batch of B images (of all ranks; chosen among all unknown entries, those dropped by the prior included); else w = 1.
K = 5, eta = 0.05 (0.5 in the COCO runs of the README), m = 0, a+ = a- = au = 1; (g+, g-, gu) = (0, 1, 4) for randomly
kept labels (RPS), (0, 3, 4) where the labels of a class are kept or missing in all images (FPC), (0, 1, 2) in the
class.

The prior of a class is its mean sigmoid over the training images. The published way takes two runs: one with
mode ignore and prior_out FILE, then one with prior_file FILE. prior running uses the mean of this run's own training
predictions over all earlier steps, kept in the checkpoint; without either nothing is dropped by prior.
Modes: selective as above; ignore (w = 0 everywhere); negative (w = 1 everywhere); ignore_normalize_classes (w = 0, and
known entries times 1 / (1 + number of known labels of the image) + 1).

Where released code differs: its batch is that of one process. It trains Adam 2e-4, 30 epochs, batch 64, one-cycle with
warmup_share 0.2, weight decay 1e-4, EMA 0.9997, 448 px, images in 0..1.

Source: Ben-Baruch et al., "Multi-label Classification with Partial Annotations using Class-aware Selective Loss",
CVPR 2022; docs/sources.md#p-asl.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from spml_kernels import IGNORED, PointLoss, label_loss, select_large
from spml_kernels.common.jit import jit, tl
from torch import Tensor

from spml_fast.core import distributed
from spml_fast.core.batch import Batch
from spml_fast.core.errors import UserError
from spml_fast.core.io import read_text, write_text
from spml_fast.data.labels import NEGATIVE, POSITIVE, UNKNOWN, LabelStore, SparseLabels
from spml_fast.methods.asl import focal_negative, focal_negative_jit, focal_positive, focal_positive_jit
from spml_fast.methods.base import LossOutput, MethodOptions, Progress, register
from spml_fast.methods.pointwise import (
    ASL_CLAMP,
    LogForm,
    PointMethod,
    Reduction,
    hidden_positives,
    require_fraction,
    require_negatives,
    require_not_negative,
)


def p_asl_point(
    logits: Tensor,
    codes: Tensor,
    a_positive: float,
    a_negative: float,
    a_unknown: float,
    g_positive: float,
    g_negative: float,
    g_unknown: float,
    margin: float,
    clamp: float,
) -> Tensor:
    """The three asymmetric terms, 0 on other codes; element-wise.

    Args:
        logits: floating, any shape.
        codes: int8, the same shape.
        a_positive: weight of observed positives.
        a_negative: weight of observed negatives.
        a_unknown: weight of unknown labels.
        g_positive: focal exponent of observed positives.
        g_negative: focal exponent of observed negatives.
        g_unknown: focal exponent of unknown labels.
        margin: probability up to which a negative or unknown label costs nothing.
        clamp: lower end of probabilities inside the logarithms; 0 takes them from the logits.
    """
    positive = a_positive * focal_positive(logits, g_positive, clamp, False)
    negative = a_negative * focal_negative(logits, g_negative, margin, clamp, False)
    unknown = a_unknown * focal_negative(logits, g_unknown, margin, clamp, False)
    rest = torch.where(codes == UNKNOWN, unknown, 0)
    return torch.where(codes == POSITIVE, positive, torch.where(codes == NEGATIVE, negative, rest))


@jit
def p_asl_point_jit(z, code, a_positive, a_negative, a_unknown, g_positive, g_negative, g_unknown, margin, clamp):
    """`p_asl_point` and its derivative, for the fused kernel."""
    positive, d_positive = focal_positive_jit(z, g_positive, clamp, 0.0)
    unknown = code == -1
    gamma = tl.where(unknown, g_unknown, g_negative)
    weight = tl.where(unknown, a_unknown, tl.where(code == 0, a_negative, 0.0))
    negative, d_negative = focal_negative_jit(z, gamma, margin, clamp, 0.0)
    loss = tl.where(code == 1, a_positive * positive, weight * negative)
    return loss, tl.where(code == 1, a_positive * d_positive, weight * d_negative)


@dataclass(frozen=True)
class PASLOptions(MethodOptions):
    """P-ASL with class-aware selective loss (CSL).

    Attributes:
        name: the method.
        mode: selective leaves out unknown entries by prior and by score; ignore leaves out all of them; negative none;
            ignore_normalize_classes all of them, and weighs images by their number of known labels.
        top_k: K, unknown entries left out per image, chosen by score over the whole batch.
        eta: class prior above which unknown entries of the class are left out.
        prior_file: file with one prior a class, in class order (one number a line, or name,number); null for none.
        prior: running uses the mean of this run's own predictions where there is no prior_file; none does not.
        prior_out: file to write this run's running mean to after every epoch, for a later prior_file; null for none.
        g_positive: focal exponent of observed positives.
        g_negative: focal exponent of observed negatives (3 where whole classes are unannotated).
        g_unknown: focal exponent of unknown labels.
        a_positive: weight of observed positives.
        a_negative: weight of observed negatives.
        a_unknown: weight of unknown labels.
        margin: probability below which a negative or unknown label costs nothing.
        log_form: released clamps at 1e-8 before the logarithm; logits takes it from the logits where there is no
            margin.
        reduction: sum over all B x C entries of the update (released), or their mean.
    """

    name: str = "p_asl"
    mode: Literal["selective", "ignore", "negative", "ignore_normalize_classes"] = "selective"
    top_k: int = 5
    eta: float = 0.05
    prior_file: str | None = None
    prior: Literal["none", "running"] = "none"
    prior_out: str | None = None
    g_positive: float = 0.0
    g_negative: float = 1.0
    g_unknown: float = 4.0
    a_positive: float = 1.0
    a_negative: float = 1.0
    a_unknown: float = 1.0
    margin: float = 0.0
    log_form: LogForm = "released"
    reduction: Reduction = "sum"


# A line of the file that `prior_out` names.
_NUMBER = re.compile(rb"[0-9.e+-]+|nan")


def read_prior(path: str, num_classes: int) -> Tensor:
    """Class priors from a file, fp32 [C]. Raises `UserError` naming file and line."""
    lines = read_text(Path(path)).splitlines()
    values = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = float(line.rpartition(",")[2])
        except ValueError:
            value = -1.0
        if not 0 <= value <= 1:
            raise UserError(f"{path} line {number}: {line.strip()!r} does not end in a probability")
        values.append(value)
    if len(values) != num_classes:
        raise UserError(f"{path} has {len(values)} priors, but the data have {num_classes} classes")
    return torch.tensor(values)


def check_prior_out(path: Path) -> None:
    """Raise `UserError` where a file is in the way that does not hold what `prior_out` writes: a number per line."""
    try:
        lines = path.read_bytes().splitlines() if path.is_file() else []
    except OSError as error:
        raise UserError(f"method.prior_out {path}: {error.strerror}") from error
    if (path.exists() and not path.is_file()) or not all(_NUMBER.fullmatch(line) for line in lines):
        raise UserError(f"method.prior_out {path} exists and does not hold priors alone; give another name")


@register("p_asl")
class PartialASL(PointMethod):
    """Asymmetric loss for known and unknown labels, likely hidden positives left out.

    Attributes:
        prior_sum: fp64 [C], sum of sigmoid over the training predictions so far.
        prior_count: fp64 [], how many they are.
        given_prior: fp32 [C], the prior file's (not in checkpoints).
    """

    Options: ClassVar[type[MethodOptions]] = PASLOptions
    options: PASLOptions
    batch_statistics: ClassVar[bool] = True
    point: ClassVar[PointLoss] = PointLoss("p_asl", p_asl_point, p_asl_point_jit)
    examples: ClassVar[tuple[MethodOptions, ...]] = (
        PASLOptions(a_negative=0.8, a_unknown=0.6),
        PASLOptions(a_negative=0.8, a_unknown=0.6, g_positive=1.0, g_negative=3.0, margin=0.05),
    )
    guard: ClassVar[float] = ASL_CLAMP
    prior_sum: Tensor
    prior_count: Tensor
    given_prior: Tensor | None

    def __init__(self, options: MethodOptions, store: LabelStore) -> None:
        super().__init__(options, store)
        o = self.options
        require_not_negative(o, "top_k", "g_positive", "g_negative", "g_unknown")
        require_not_negative(o, "a_positive", "a_negative", "a_unknown")
        require_fraction(o, "eta", "margin")
        if o.prior_out is not None:
            check_prior_out(Path(o.prior_out))
        self.tracks = o.prior_out is not None or (o.prior == "running" and o.prior_file is None)
        self.register_buffer("prior_sum", torch.zeros(store.num_classes, dtype=torch.float64, device=store.device))
        self.register_buffer("prior_count", torch.zeros((), dtype=torch.float64, device=store.device))
        given = None if o.prior_file is None else read_prior(o.prior_file, store.num_classes).to(store.device)
        self.register_buffer("given_prior", given, persistent=False)

    @classmethod
    def check_labels(cls, labels: SparseLabels, options: MethodOptions) -> None:
        """Modes that drop all unknown labels, at the start at least, need known negatives."""
        assert isinstance(options, PASLOptions)
        if options.prior_file is not None:
            read_prior(options.prior_file, labels.num_classes)
        running = options.mode == "selective" and options.prior == "running" and options.prior_file is None
        if options.mode.startswith("ignore") or running:
            require_negatives(labels, f"p_asl with {'prior running' if running else 'mode ' + options.mode}")

    def class_prior(self) -> Tensor | None:
        """The prior in use, [C]: the file's, the running mean of earlier steps (0 before the first), or None."""
        if self.given_prior is not None:
            return self.given_prior
        if self.options.prior == "running":
            return self.prior_sum / self.prior_count.clamp(min=1)
        return None

    def params(self, progress: Progress) -> tuple[float, ...]:
        """Weights, exponents, margin, clamp."""
        o = self.options
        weights = (o.a_positive, o.a_negative, o.a_unknown)
        return (*weights, o.g_positive, o.g_negative, o.g_unknown, o.margin, self.log_guard)

    def _highest(self, logits: Tensor, labels: Tensor, rows: int) -> Tensor:
        """The K * rows unknown entries of highest score over all ranks, bool [B, C]."""
        k_max = min(self.options.top_k * rows, rows * logits.shape[1])
        if k_max == 0:
            return torch.zeros_like(labels, dtype=torch.bool)
        k = torch.full((), k_max, device=logits.device, dtype=torch.int64)
        gather = distributed.all_gather_equal if distributed.world_size() > 1 else None
        return select_large(logits.detach(), labels, k, k_max, "exact", gather, distributed.rank())[0]

    def update_statistics(self, forwards: list[Tensor], batches: list[Batch], progress: Progress) -> list[Tensor]:
        """The highest scores over a whole update, bool [B, C] per micro-step."""
        rows = sum(b.global_size for b in batches)
        highest = self._highest(torch.cat(forwards), torch.cat([b.labels for b in batches]), rows)
        return list(highest.split([len(z) for z in forwards]))

    def codes(self, logits: Tensor, batch: Batch, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        """The labels, with `IGNORED` where w is 0."""
        unknown = batch.labels == UNKNOWN
        if self.options.mode == "negative":
            return batch.labels, {}
        if self.options.mode != "selective":
            return torch.where(unknown, IGNORED, batch.labels), {}
        highest: Tensor | None = self.statistics_of(batch)
        if highest is None:
            highest = self._highest(logits, batch.labels, batch.global_size)
        prior = self.class_prior()
        dropped = highest if prior is None else highest | (unknown & (prior > self.options.eta))
        return torch.where(dropped, IGNORED, batch.labels), hidden_positives(dropped, batch)

    def loss(self, logits: Tensor, batch: Batch, progress: Progress) -> LossOutput:
        """The reduced point loss; then this step's predictions enter the running prior."""
        codes, metrics = self.codes(logits, batch, progress)
        if self.options.mode == "ignore_normalize_classes":
            known = (batch.labels != UNKNOWN).sum(1, keepdim=True).to(logits.dtype)
            total = (self.point.reference(logits, codes, *self.params(progress)) * (1 / (1 + known) + 1)).sum()
        else:
            total = label_loss(logits, codes, self.point, self.params(progress))
        if self.tracks and self.training:
            self.prior_sum += distributed.all_reduce_sum(torch.sigmoid(logits.detach()).double().sum(0))
            self.prior_count += batch.global_size
        return LossOutput(self.reduce(total, batch), metrics)

    def on_epoch_end(self, progress: Progress) -> dict[str, float]:
        """Write the running prior, if it was asked for."""
        if self.options.prior_out is not None and distributed.is_main():
            prior = (self.prior_sum / self.prior_count.clamp(min=1)).tolist()
            try:
                write_text(Path(self.options.prior_out), "".join(f"{p:.8g}\n" for p in prior))
            except OSError as error:
                raise UserError(f"method.prior_out {self.options.prior_out}: {error.strerror}") from error
        return {}
