"""The classifier: a timm backbone and a head. The only file that imports timm's models."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from spml_fast.core.config import ModelConfig
from spml_fast.core.errors import UserError
from spml_fast.models.backbone import create_backbone, frozen_parameters, needs_fixed_size
from spml_fast.models.batchnorm import BATCH_NORMS
from spml_fast.models.heads import Head, HeadOutput, MaskOptions, make_head

# Its long lists of weights that a file lacks are replaced by the check in `load_backbone`.
logging.getLogger("timm.models._builder").setLevel(logging.ERROR)


@dataclass
class ClassifierOutput:
    """What a forward gives.

    Attributes:
        mean: mean(M) [B, C] fp32, the logits at alpha 1.
        mean_relu: mean(relu M) [B, C] fp32, or None when it was not asked for.
        logits: [B, C] fp32 at the alpha of the call.
        maps: [B, N, h, w] fp32 maps of the classes asked for, else None.
        masked: [B, 3, S, S] images masked by those maps, when that was asked for, else None.
        attention: [B, N, h, w] fp32 where the queries of the classes asked for look, else None.

    Heads without a class activation map have their logits in `mean`, and alpha must be 1.
    """

    mean: Tensor
    mean_relu: Tensor | None
    logits: Tensor
    maps: Tensor | None = None
    masked: Tensor | None = None
    attention: Tensor | None = None

    def at_alpha(self, alpha: float) -> Tensor:
        """Logits [B, C] fp32 with BoostLU's factor `alpha`, from the same pass; see `boosted_logits`."""
        return boosted_logits(self.mean, self.mean_relu, alpha)


def boosted_logits(mean: Tensor, mean_relu: Tensor | None, alpha: float) -> Tensor:
    """BoostLU's logits mean(M) + (alpha - 1) mean(relu M), of the shape of `mean`; only this function computes them.

    They are the spatial mean of phi(M), phi(m) = alpha m for m > 0, else m; for alpha < 1 that is not max(m, alpha m).

    Raises:
        ValueError: alpha is not 1 and there is no mean(relu M).

    Source: BoostLU (Kim et al., CVPR 2023); docs/sources.md#boostlu.
    """
    if alpha == 1:
        return mean
    if mean_relu is None:
        raise ValueError("alpha other than 1 needs mean(relu M); call the classifier with boost=True")
    return mean + (alpha - 1) * mean_relu


def _forward_features(backbone: Any, images: Tensor) -> Tensor:
    """timm's features, as a function that `torch.compile` takes."""
    features: Tensor = backbone.forward_features(images)
    return features


def check_alpha(alpha: float, name: str) -> None:
    """Raise `UserError` unless alpha is positive."""
    if not alpha > 0:
        raise UserError(f"{name} is {alpha}; BoostLU's alpha must be greater than 0 (1 turns boosting off)")


class Classifier(nn.Module):
    """Backbone, feature map in channels-last shape, head.

    Args:
        config: backbone and head.
        num_classes: C.
        image_size: side of the square input in pixels; fixes the position codes of transformers.

    Raises:
        UserError: unknown backbone or head, unreachable pretrained weights, or an option that they do not have.
    """

    def __init__(self, config: ModelConfig, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.freeze_bn = config.freeze_bn
        self.backbone_frozen = False
        # timm's models have more than nn.Module promises.
        self.backbone = create_backbone(config, image_size)
        self.channels: int = self.backbone.num_features
        self.prefix_tokens: int = getattr(self.backbone, "num_prefix_tokens", 0)
        self.feature_size, self.layout = self._probe(image_size, config.backbone)
        self.accepts_any_size = self.layout != "NLC" and not needs_fixed_size(config.backbone)
        self.head: Head = make_head(config.head, config.head_options, self.channels, num_classes, self.feature_size)
        # The defaults are BoostLU's; a head without a map takes 1 whatever they say.
        self.alpha_train = config.alpha_train if self.head.supports_boostlu else 1.0
        self.alpha_eval = config.alpha_eval if self.head.supports_boostlu else 1.0
        self.prior_bias, self.prior_floor = config.prior_bias, config.prior_floor
        self.frozen_parameters = frozen_parameters(self.backbone, config.freeze)
        self.freeze_backbone(False)
        # See `compile_backbone`. A function of the backbone, so that copies of this module pass their own.
        self._compiled: Callable[[nn.Module, Tensor], Tensor] | None = None
        self.compiled_sizes: tuple[int, ...] = ()

    @torch.no_grad()
    def _probe(self, image_size: int, name: str) -> tuple[tuple[int, int], str]:
        """Grid (h, w) and layout of the backbone's features, found by one forward of an empty image."""
        mode = self.backbone.training
        self.backbone.eval()
        try:
            out = self.backbone.forward_features(torch.zeros(1, 3, image_size, image_size))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise UserError(f"backbone {name} does not take {image_size} px images: {error}") from error
        finally:
            self.backbone.train(mode)
        if not isinstance(out, Tensor) or out.ndim not in (3, 4) or self.channels not in out.shape[1:]:
            raise UserError(f"backbone {name} gives no feature map; choose another timm model")
        if out.ndim == 3:
            side = round((out.shape[1] - self.prefix_tokens) ** 0.5)
            if side * side != out.shape[1] - self.prefix_tokens:
                raise UserError(f"backbone {name} gives {out.shape[1]} tokens, which are no square grid")
            return (side, side), "NLC"
        # timm's own mark where there is one (Swin and other NHWC models); otherwise channels come first.
        layout = getattr(self.backbone, "output_fmt", None)
        layout = str(getattr(layout, "value", layout or ("NCHW" if out.shape[1] == self.channels else "NHWC")))
        height, width = (out.shape[2], out.shape[3]) if layout == "NCHW" else (out.shape[1], out.shape[2])
        return (int(height), int(width)), layout

    def freeze_backbone(self, frozen: bool) -> None:
        """Keep the backbone as it is (evaluation mode, no gradient), so that only the head trains; or undo that."""
        self.backbone_frozen = frozen
        self.backbone.requires_grad_(not frozen)
        for parameter in self.frozen_parameters:
            parameter.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Classifier:
        """Training mode; BatchNorm uses its running statistics with `freeze_bn`, and all of a frozen backbone does."""
        super().train(mode)
        if self.backbone_frozen:
            self.backbone.train(False)
        elif self.freeze_bn:
            for module in self.backbone.modules():
                if isinstance(module, BATCH_NORMS):
                    module.train(False)
        return self

    def compile_backbone(self) -> None:
        """Have torch.compile make training passes of batches of `compiled_sizes` images, each when it first comes.

        Others, and evaluation, go through the backbone as it is: no last batch of an epoch is compiled for, and figures
        do not depend on how a run was trained.
        """
        self._compiled = torch.compile(_forward_features, dynamic=False)

    def features(self, images: Tensor) -> Tensor:
        """Feature map [B, h, w, K] of images [B, 3, S, S]; a view, contiguous for channels_last backbones."""
        compiled = self._compiled if self.backbone.training and len(images) in self.compiled_sizes else None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.backbone_frozen):
            out = (compiled or _forward_features)(self.backbone, images)
        if self.layout == "NCHW":
            return out.permute(0, 2, 3, 1)
        if self.layout == "NHWC":
            return out
        return out[:, self.prefix_tokens :].unflatten(1, self.feature_size)

    def forward(
        self,
        images: Tensor,
        alpha: float = 1.0,
        boost: bool | None = None,
        classes: Tensor | None = None,
        mask: MaskOptions | None = None,
    ) -> ClassifierOutput:
        """Logits of a batch.

        Args:
            images: [B, 3, S, S].
            alpha: BoostLU's factor for `logits`.
            boost: compute mean(relu M) even for alpha 1, so that `ClassifierOutput.at_alpha` works for every alpha.
            classes: int64 [B, N] classes whose maps are wanted, padded with -1.
            mask: give the images masked by these maps instead of the maps.
        """
        source = images if mask is not None else None
        return self.classify(self.features(images), alpha, boost, classes, source, mask)

    def classify(
        self,
        features: Tensor,
        alpha: float = 1.0,
        boost: bool | None = None,
        classes: Tensor | None = None,
        images: Tensor | None = None,
        mask: MaskOptions | None = None,
    ) -> ClassifierOutput:
        """Logits of a feature map: for a second look at images without a second pass through the backbone.

        Args:
            features: [B, h, w, K] from `features`.
            alpha: BoostLU's factor for `logits`.
            boost: compute mean(relu M) even for alpha 1, so that `ClassifierOutput.at_alpha` works for every alpha.
            classes: int64 [B, N] classes whose maps are wanted, padded with -1.
            images: [B, 3, S, S] to be masked by these maps.
            mask: how; the masked images are given instead of the maps.

        Raises:
            ValueError: alpha is not 1 and the head has no class activation map, or `boost` is off.
        """
        head: HeadOutput = self.head(features, alpha != 1 if boost is None else boost, classes, images, mask)
        logits = boosted_logits(head.mean, head.mean_relu, alpha)
        return ClassifierOutput(head.mean, head.mean_relu, logits, head.maps, head.masked, head.attention)

    def set_prior(self, positives: Tensor, negatives: Tensor, images: int) -> None:
        """Start the head's biases as `model.prior_bias` says; nothing with `none`.

        Args:
            positives: int64 [C], observed positives of the training split.
            negatives: int64 [C], its observed negatives.
            images: training images.

        Raises:
            UserError: fractions of labels were asked for and there is no observed negative, or the floor does not lie
                between 0 and 0.5.
        """
        if self.prior_bias != "none":
            logits = prior_logits(positives, negatives, images, self.prior_bias, self.prior_floor)
            self.head.set_bias(logits, self.alpha_train)

    def input_normalisation(self) -> tuple[list[float], list[float]]:
        """Per-channel mean and standard deviation (0..1) that the backbone was trained with."""
        data = timm.data.resolve_model_data_config(self.backbone)
        return list(data["mean"]), list(data["std"])


def prior_logits(
    positives: Tensor, negatives: Tensor, images: int, kind: Literal["labels", "images", "pictures"], floor: float
) -> Tensor:
    """Logit of each class's fraction of positives, fp32 [C]; a class without a label gets the floor.

    Args:
        positives: int64 [C], observed positives.
        negatives: int64 [C], observed negatives.
        images: training images.
        kind: `labels` divides by positives and negatives, `images` (0.1.0's `pictures`) by all images.
        floor: the fraction is kept within [floor, 1 - floor].

    Raises:
        UserError: see `Classifier.set_prior`.
    """
    if not 0 < floor < 0.5:
        raise UserError(f"model.prior_floor is {floor}; it must lie between 0 and 0.5")
    if kind == "labels" and not int(negatives.sum()):
        raise UserError(
            "model.prior_bias labels takes the fraction of positives among positives and negatives, and the training "
            "split has no observed negative; use images"
        )
    total = positives + negatives if kind == "labels" else torch.full_like(positives, images)
    fraction = positives.double() / total.clamp(min=1)
    return torch.logit(fraction.clamp(floor, 1 - floor)).float()
