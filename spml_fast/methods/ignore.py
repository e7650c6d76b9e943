"""An unknown label is likely a false negative if its logit drops when everything but the observed class's evidence is
masked: IGNORE.

Three views go through one network in one step: weak z, strong z_s, and masked z_m, the weak image kept only where the
map of its observed class is high.
    gap g = |z - z_m|
    T_gap <- l T_gap + (1 - l) mean of g over observed positives;   T_avg[c] <- l T_avg[c] + (1 - l) mean of z[:, c]
    rejected: g > T_gap and z > T_avg[c] and the label is unknown and epoch > warm_up
    L = w_spbc BCE(z, observed positives) + w_ign BCE(z_s, everything that is not rejected) + w_reg mean (z_s - z)^2
Thresholds are updated first, then used; each term is divided by its own number of entries over all ranks.

Rules for what the release crashes on: several observed positives of an image give the union of their masks and all
count for T_gap; known negatives are trained and never rejected; an image without a positive is not masked; a step
without any positive leaves the thresholds alone.

The released code differs from the description, and from what scales; `preset` chooses, and every option can be set
by itself:
                 clean (default)            released                        calr
cam_norm         per_image                  batch_rawmax in groups of 16    batch_minmax in groups of 16
cam_threshold    0.8                        0.8                             0.5
loss_form        logits                     epsilon: -log(p + 1e-5)         epsilon
debias           true                       false                           false
ema_partial      scaled                     whole                           whole
masked_bn        no_update                  update                          update
In all of them lambda holds for 16 images and is rescaled to the batch (l^(B/16), identical at the published batch); an
epoch's short last batch counts by its images, or, as in the releases, as a whole one (l^ceil(B/16));
the masked view is made without gradient, which is exact; the head's alpha applies to all views, masks come from the
unboosted map. CALR's linear head, whose maps lack the bias, is not imitated. Without `ignore` no masked view is made,
so BatchNorm does not see it either; under exact accumulation the masked view belongs to the pass ahead of the update,
which moves no BatchNorm statistics.

Cost: three forwards and two backwards a step, 2.3 times assumed negative (a backward is two forwards). Two speed
options change the result: masked_every (steps between two masked views; the others reject nothing) and masked_scale.

Source: IGNORE (Song et al., ECCV 2024), first released as CALR; docs/sources.md#ignore.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from spml_kernels import ignore_loss, ignore_statistics, positive_classes
from spml_kernels.cam_mask.op import MapNorm
from spml_kernels.ignore_loss.op import LossForm
from torch import Tensor
from torch.nn import functional as F

from spml_fast.core import distributed
from spml_fast.core.batch import Batch
from spml_fast.core.errors import UserError
from spml_fast.core.precision import no_autocast
from spml_fast.data.labels import POSITIVE, UNKNOWN, LabelStore
from spml_fast.methods.base import LossOutput, Method, MethodOptions, Progress, global_mean, register
from spml_fast.methods.state.gap_histogram import GapHistogram
from spml_fast.models.batchnorm import BnMode, bn_behaviour
from spml_fast.models.heads import MaskOptions

if TYPE_CHECKING:
    from spml_fast.models.classifier import Classifier

PRESETS: dict[str, dict[str, Any]] = {
    "clean": {
        "cam_norm": "per_image",
        "cam_threshold": 0.8,
        "loss_form": "logits",
        "debias": True,
        "ema_partial": "scaled",
        "masked_bn": "no_update",
    },
    "released": {
        "cam_norm": "batch_rawmax",
        "cam_threshold": 0.8,
        "loss_form": "epsilon",
        "debias": False,
        "ema_partial": "whole",
        "masked_bn": "update",
    },
    "calr": {
        "cam_norm": "batch_minmax",
        "cam_threshold": 0.5,
        "loss_form": "epsilon",
        "debias": False,
        "ema_partial": "whole",
        "masked_bn": "update",
    },
}


@dataclass(frozen=True)
class IgnoreOptions(MethodOptions):
    """IGNORE.

    Attributes:
        name: the method.
        preset: clean is the recommended form; released and calr are the authors' two releases.
        warm_up: epochs that reject nothing.
        spbc_weight: weight of the positives' loss on the weak view.
        ign_weight: weight of the loss on the strong view without the rejected entries.
        reg_weight: weight of the squared difference of the two views' logits.
        gap_lambda: decay of the gap threshold for 16 images.
        avg_lambda: decay of the average thresholds for 16 images.
        strong_aug: switch; off takes the ign loss on the weak view.
        ignore: switch; off rejects nothing.
        spbc: switch; off drops the spbc loss.
        reg: switch; off drops the reg loss.
        lat: switch; off drops the condition on the average logit.
        cam_threshold: a pixel is kept where the normalised map is greater; null takes the preset's.
        cam_norm: over what the map is normalised; null takes the preset's.
        norm_group: images of a rank that are normalised together in the batch modes.
        loss_form: logits is exact binary cross-entropy, epsilon is -log(p + eps); null takes the preset's.
        eps: of the epsilon form.
        ema_rescale: rescale the decays to the batch size; off applies them once a step whatever its size.
        ema_batch: images that the decays are meant for.
        ema_partial: with ema_rescale, what ema_batch images that are not all there count, as in an epoch's last batch:
            their number (scaled), or as much as all of them (whole), as the releases do; null takes the preset's.
        debias: divide the thresholds by the fraction of the mean that they have seen; null takes the preset's.
        masked_bn: BatchNorm in the masked view moves its running statistics, uses the batch without moving them, or
            uses the running ones; null takes the preset's.
        masked_every: steps between two masked views; other steps reject nothing. 1 is the method.
        masked_scale: side of the masked view as a fraction of the image's; 1 is the method.
        gap_histogram: write a histogram of the gaps by kind of label to metrics.jsonl every epoch; one more pass over
            the logits a step.
    """

    name: str = "ignore"
    preset: Literal["clean", "released", "calr"] = "clean"
    warm_up: int = 3
    spbc_weight: float = 0.5
    ign_weight: float = 1.0
    reg_weight: float = 0.5
    gap_lambda: float = 0.999
    avg_lambda: float = 0.999
    strong_aug: bool = True
    ignore: bool = True
    spbc: bool = True
    reg: bool = True
    lat: bool = True
    cam_threshold: float | None = None
    cam_norm: Literal["per_image", "batch_rawmax", "batch_minmax"] | None = None
    norm_group: int = 16
    loss_form: Literal["logits", "epsilon"] | None = None
    eps: float = 1e-5
    ema_rescale: bool = True
    ema_batch: int = 16
    ema_partial: Literal["scaled", "whole"] | None = None
    debias: bool | None = None
    masked_bn: Literal["update", "no_update", "eval"] | None = None
    masked_every: int = 1
    masked_scale: float = 1.0
    gap_histogram: bool = False

    def choice(self, name: str) -> Any:
        """An option that a preset fills in."""
        value = getattr(self, name)
        return PRESETS[self.preset][name] if value is None else value


class WeakAndMasked(NamedTuple):
    """Logits [B, C] of a micro-step's weak view, and of its masked view where one is made."""

    weak: Tensor
    masked: Tensor | None


class UpdateStatistics(NamedTuple):
    """What a micro-step takes from the whole update (exact accumulation).

    Attributes:
        masked: [B, C] logits of the masked view, or None.
        positives: observed positives of the update over all ranks, times this micro-step's fraction of its images.
        kept: entries of the update that are not rejected, in the same way.
    """

    masked: Tensor | None
    positives: Tensor
    kept: Tensor


def masked_size(classifier: Classifier, images: Tensor, scale: float) -> Tensor:
    """Masked images [B, 3, S, S] in the size in which the network sees them.

    Args:
        classifier: that sees them.
        images: already masked.
        scale: `masked_scale`.

    Raises:
        UserError: another size than the image's for a backbone that takes no other.
    """
    if scale == 1:
        return images
    if not classifier.accepts_any_size:
        raise UserError("method.masked_scale needs a backbone that takes images of any size; set it to 1")
    side = max(round(images.shape[-1] * scale), 1)
    return F.interpolate(images, (side, side), mode="bilinear", align_corners=False, antialias=True)


@register("ignore")
class Ignore(Method[WeakAndMasked, UpdateStatistics]):
    """The three views, the two thresholds, and the three loss terms."""

    Options: ClassVar[type[MethodOptions]] = IgnoreOptions
    options: IgnoreOptions
    views: ClassVar[tuple[str, ...]] = ("weak", "strong")
    batch_statistics: ClassVar[bool] = True

    def __init__(self, options: MethodOptions, store: LabelStore) -> None:
        super().__init__(options, store)
        o = self.options
        for name, decay in {"gap_lambda": o.gap_lambda, "avg_lambda": o.avg_lambda}.items():
            if not 0 <= decay < 1:
                raise UserError(f"method.{name} is {decay}; it must be at least 0 and less than 1")
        for name in ("norm_group", "ema_batch", "masked_every"):
            if getattr(o, name) < 1:
                raise UserError(f"method.{name} is {getattr(o, name)}; it must be at least 1")
        for name in ("warm_up", "spbc_weight", "ign_weight", "reg_weight", "eps"):
            if getattr(o, name) < 0:
                raise UserError(f"method.{name} is {getattr(o, name)}; it must not be negative")
        if not 0 < o.masked_scale <= 1:
            raise UserError(f"method.masked_scale is {o.masked_scale}; it must be greater than 0 and at most 1")
        self.form: LossForm = o.choice("loss_form")
        self.debias: bool = o.choice("debias")
        self.count_batches: Callable[[float], float] = math.ceil if o.choice("ema_partial") == "whole" else float
        self.masked_bn: BnMode = o.choice("masked_bn")
        norm: MapNorm = o.choice("cam_norm")
        self.mask = MaskOptions(o.choice("cam_threshold"), norm, o.norm_group)
        self.max_positives = max(store.max_row_count(POSITIVE), 1)
        self.gap_average: Tensor
        self.logit_average: Tensor
        self.ema_steps: Tensor
        # The averages before any debiasing, and how many batches of ema_batch images they have seen.
        self.register_buffer("gap_average", torch.zeros((), device=store.device))
        self.register_buffer("logit_average", torch.zeros(store.num_classes, device=store.device))
        self.register_buffer("ema_steps", torch.zeros((), dtype=torch.float64, device=store.device))
        self.gaps = GapHistogram(store.device) if o.gap_histogram else None

    def update_thresholds(self, statistics: Tensor, images: int, repeats: int = 1) -> None:
        """Move both averages by one micro-step; nothing moves when it had no observed positive on any rank.

        Args:
            statistics: [C + 3] from `ignore_statistics`, summed over ranks.
            images: of the micro-step over all ranks.
            repeats: steps that this one stands for.
        """
        o = self.options
        batches = images / o.ema_batch
        steps = repeats * (self.count_batches(batches) if o.ema_rescale else 1.0)
        gap_sum, positives, rows = statistics[0], statistics[1], statistics[2]
        seen = positives > 0
        gap_decay, avg_decay = o.gap_lambda**steps, o.avg_lambda**steps
        gap = gap_decay * self.gap_average + (1 - gap_decay) * (gap_sum / positives.clamp(min=1))
        average = avg_decay * self.logit_average + (1 - avg_decay) * (statistics[3:] / rows.clamp(min=1))
        self.gap_average.copy_(torch.where(seen, gap, self.gap_average))
        self.logit_average.copy_(torch.where(seen, average, self.logit_average))
        self.ema_steps.add_(seen * steps)

    def thresholds(self) -> tuple[Tensor, Tensor]:
        """T_gap (0-d) and T_avg [C] as they stand; 0 before the first update."""
        if not self.debias:
            return self.gap_average, self.logit_average

        def seen(decay: float) -> Tensor:
            fraction = 1 - torch.pow(decay, self.ema_steps)
            return torch.where(self.ema_steps > 0, fraction, 1.0).to(self.gap_average.dtype)

        return self.gap_average / seen(self.options.gap_lambda), self.logit_average / seen(self.options.avg_lambda)

    def _masks_now(self, progress: Progress) -> bool:
        return self.options.ignore and progress.update % self.options.masked_every == 0

    def _weak(self, classifier: Classifier, batch: Batch, masking: bool) -> tuple[Tensor, Tensor | None]:
        """Logits [B, C] of the weak view and, on demand, the masked images."""
        alpha, images = classifier.alpha_train, batch.views["weak"]
        if not masking:
            return classifier(images, alpha=alpha).logits, None
        classes = positive_classes(batch.labels, self.max_positives)
        out = classifier(images, alpha=alpha, classes=classes, mask=self.mask)
        return out.logits, out.masked

    @torch.no_grad()
    def _masked(self, classifier: Classifier, images: Tensor) -> Tensor:
        """Logits [B, C] of the masked view. Exact without gradient: they are constants of the loss."""
        images = masked_size(classifier, images, self.options.masked_scale)
        with bn_behaviour(classifier, self.masked_bn):
            logits: Tensor = classifier(images, alpha=classifier.alpha_train).logits
        return logits

    def forward(self, classifier: Classifier, batch: Batch, progress: Progress) -> LossOutput:
        """All views of a micro-step, in the order weak, strong, masked."""
        o, ahead = self.options, self.statistics_of(batch)
        logits, masked_images = self._weak(classifier, batch, ahead is None and self._masks_now(progress))
        strong = None
        if o.strong_aug or o.reg:
            strong = classifier(batch.views["strong"], alpha=classifier.alpha_train).logits
        masked = ahead.masked if ahead is not None else None
        if masked_images is not None:
            masked = self._masked(classifier, masked_images)
        with no_autocast(logits.device):
            return self.combine(logits, strong, masked, batch, progress)

    def combine(
        self, logits: Tensor, strong: Tensor | None, masked: Tensor | None, batch: Batch, progress: Progress
    ) -> LossOutput:
        """Thresholds, rejection and loss from the logits of the views of this rank's part of the micro-step.

        Args:
            logits: [B, C] fp32 of the weak view.
            strong: [B, C] of the strong view; None when no term needs it.
            masked: [B, C] of the masked view; None on steps that reject nothing.
            batch: codes, and the truth where it is known; its images are not looked at.
            progress: where training stands.
        """
        o, ahead = self.options, self.statistics_of(batch)
        entries = batch.global_size * logits.shape[1]
        if ahead is not None:
            positives, kept = ahead.positives, ahead.kept
        elif masked is not None:
            statistics = distributed.all_reduce_sum(ignore_statistics(logits, masked, batch.labels))
            self.update_thresholds(statistics, batch.global_size, o.masked_every)
            positives = statistics[1]
        else:
            positives = distributed.all_reduce_sum((batch.labels == POSITIVE).sum().to(logits.dtype))
        if self.gaps is not None and masked is not None:
            self.gaps.add(logits, masked, batch)
        rejects = masked is not None and progress.epoch > o.warm_up
        gap_threshold, average_threshold = self.thresholds()
        terms = ignore_loss(
            logits,
            strong,
            masked if rejects else None,
            batch.labels,
            gap_threshold,
            average_threshold if o.lat else None,
            self.form,
            o.eps,
            o.strong_aug,
            batch.truth,
        )
        rejected, rejected_true, hidden = terms.counts.unbind()
        if rejects and masked is not None and progress.ends_epoch:
            # The kernel counts and keeps no mask; the log shows some at an epoch's end.
            batch.selected = self._rejected(logits.detach(), masked, batch.labels)
        if ahead is None:
            kept = terms.ign.new_full((), entries)
            if rejects:
                kept = kept - distributed.all_reduce_sum(rejected.to(kept.dtype))
        # An update without positives, or without anything kept, has a sum of 0 and must not divide by 0.
        loss = o.ign_weight * global_mean(terms.ign, torch.where(kept > 0, kept, 1.0))
        if o.spbc:
            loss = loss + o.spbc_weight * global_mean(terms.spbc, torch.where(positives > 0, positives, 1.0))
        if o.reg:
            loss = loss + o.reg_weight * global_mean(terms.reg, entries)
        metrics = {"selected_count": rejected}
        if batch.truth is not None:
            metrics |= {"selected_true_count": rejected_true, "hidden_positive_count": hidden}
        return LossOutput(loss, metrics)

    def _rejected(self, logits: Tensor, masked: Tensor, labels: Tensor) -> Tensor:
        """The entries that are rejected, bool [B, C]."""
        gap_threshold, average_threshold = self.thresholds()
        rejected = (labels == UNKNOWN) & ((logits - masked).abs() > gap_threshold)
        return rejected & (logits > average_threshold) if self.options.lat else rejected

    def statistics_forward(self, classifier: Classifier, batch: Batch, progress: Progress) -> WeakAndMasked:
        """Logits of the weak and the masked view; the step itself then needs no masked view any more."""
        logits, images = self._weak(classifier, batch, self._masks_now(progress))
        return WeakAndMasked(logits, None if images is None else self._masked(classifier, images))

    def update_statistics(
        self, forwards: list[WeakAndMasked], batches: list[Batch], progress: Progress
    ) -> list[UpdateStatistics]:
        """One update of the thresholds and one set of denominators for all micro-steps of an update."""
        o = self.options
        weak, labels = torch.cat([f.weak for f in forwards]).float(), torch.cat([b.labels for b in batches])
        views = [f.masked for f in forwards if f.masked is not None]
        masked = torch.cat(views).float() if views else None
        images = sum(b.global_size for b in batches)
        rejected = labels.new_zeros((), dtype=weak.dtype)
        if masked is not None:
            statistics = distributed.all_reduce_sum(ignore_statistics(weak, masked, labels))
            self.update_thresholds(statistics, images, o.masked_every)
            positives = statistics[1]
            if progress.epoch > o.warm_up:
                gap, average = self.thresholds()
                terms = ignore_loss(weak, None, masked, labels, gap, average if o.lat else None)
                rejected = distributed.all_reduce_sum(terms.counts[0].to(weak.dtype))
        else:
            positives = distributed.all_reduce_sum((labels == POSITIVE).sum().to(weak.dtype))
        kept = images * weak.shape[1] - rejected
        fractions = [b.global_size / images for b in batches]
        return [
            UpdateStatistics(f.masked, positives * part, kept * part)
            for f, part in zip(forwards, fractions, strict=True)
        ]

    def on_epoch_end(self, progress: Progress) -> dict[str, Any]:
        """The thresholds as they stand, and the epoch's gaps where they are counted."""
        gap, average = self.thresholds()
        figures: dict[str, Any] = {"t_gap": float(gap), "t_avg_mean": float(average.mean())}
        if self.gaps is not None:
            figures["gap_histogram"] = self.gaps.take()
        return figures
