"""CAM head: 1x1 class weights with bias, BoostLU and the spatial mean (spec/boostlu_large_loss.md 1.1).

alpha 1 is exactly global average pooling followed by a linear layer, so checkpoints of such models carry over.
"""

from __future__ import annotations

import math

import torch
from spml_kernels import cam_map, cam_pool
from torch import Tensor, nn


class CamHead(nn.Module):
    """Class weights [C, K] and bias [C], both initialised uniformly in +-1/sqrt(K) as the released code's 1x1 conv.

    Args:
        channels: K.
        num_classes: C.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, channels))
        self.bias = nn.Parameter(torch.empty(num_classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias anew."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self, features: Tensor, boost: bool = True, classes: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Plain tensors only, so that ZeRO stage 3 can hook them.

        Args:
            features: [B, H, W, K].
            boost: whether mean(relu M) is wanted.
            classes: int64 [B, N]; maps of these classes are wanted as well.

        Returns:
            mean(M) [B, C] fp32, mean(relu M) [B, C] fp32 or None, maps [B, N, H, W] fp32 or None.
        """
        # Autocast would take these fp32 products down to bf16; logits are ranked, so they stay fp32.
        with torch.autocast(features.device.type, enabled=False):
            mean, mean_relu = cam_pool(features, self.weight, self.bias, boost)
            maps = None if classes is None else cam_map(features, self.weight, self.bias, classes)
        return mean, mean_relu, maps
