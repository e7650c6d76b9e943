"""CAM head: 1x1 class weights with bias, and the means over the cells that BoostLU's logits are made of.

alpha 1 is exactly global average pooling followed by a linear layer, so checkpoints of such models carry over.

Source: BoostLU (Kim et al., CVPR 2023); docs/sources.md#boostlu.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from spml_kernels import cam_map, cam_mask, cam_pool
from torch import Tensor, nn

from spml_fast.core.precision import no_autocast
from spml_fast.models.heads.base import Head, HeadOptions, HeadOutput, MaskOptions, register


@register("cam")
class CamHead(Head):
    """Class weights [C, K] and bias [C], both initialised uniformly in +-1/sqrt(K) as the released code's 1x1 conv."""

    supports_boostlu: ClassVar[bool] = True
    affine_in_mean: ClassVar[bool] = True
    class_parameters: ClassVar[tuple[str, ...]] = ("weight", "bias")

    def __init__(
        self, channels: int, num_classes: int, grid: tuple[int, int] = (1, 1), options: HeadOptions | None = None
    ) -> None:
        super().__init__(channels, num_classes, grid, options or HeadOptions())
        self.weight = nn.Parameter(torch.empty(num_classes, channels))
        self.bias = nn.Parameter(torch.empty(num_classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias anew."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    @torch.no_grad()
    def set_bias(self, logits: Tensor, alpha: float) -> None:
        """The bias lies inside the map, so BoostLU multiplies it where it is positive."""
        self.bias.copy_(torch.where(logits > 0, logits / alpha, logits))

    @torch.no_grad()
    def set_affine(self, weight: Tensor, bias: Tensor) -> None:
        """As `Head.set_affine`."""
        self.weight.copy_(weight)
        self.bias.copy_(bias)

    def forward(
        self,
        features: Tensor,
        boost: bool = True,
        classes: Tensor | None = None,
        images: Tensor | None = None,
        mask: MaskOptions | None = None,
    ) -> HeadOutput:
        """The two means of the map; maps are signed, unboosted, include the bias and carry no gradient.

        As `Head.forward`.
        """
        maps = masked = None
        # Autocast would take these fp32 products down to bf16; logits are ranked, so they stay fp32.
        with no_autocast(features.device):
            mean, mean_relu = cam_pool(features, self.weight, self.bias, boost)
            if classes is not None:
                with torch.no_grad():
                    if mask is None or images is None:
                        maps = cam_map(features, self.weight, self.bias, classes)
                    else:
                        masked = cam_mask(
                            features, self.weight, self.bias, classes, images, mask.threshold, mask.norm, mask.group
                        )
        return HeadOutput(mean, mean_relu, maps, masked)
