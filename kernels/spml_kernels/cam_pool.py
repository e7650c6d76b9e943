"""cam_pool: 1x1 class weights, BoostLU and the spatial mean, without asking for the map.

With M[b,c,p] = <w_c, X[b,p]> + bias_c, BoostLU's logit is mean_p phi(M) = mean(M) + (alpha - 1) mean(relu M)
(spec/boostlu_large_loss.md 1.1), so the two means give the logits of every alpha in one pass.
"""

from __future__ import annotations

from torch import Tensor

from spml_kernels.reference.cam_pool import cam_map_reference, cam_pool_reference


def cam_pool(features: Tensor, weight: Tensor, bias: Tensor, boost: bool = True) -> tuple[Tensor, Tensor | None]:
    """The two spatial means of the class activation map.

    Args:
        features: [B, H, W, K], any floating dtype; channels-last feature memory is contiguous in this shape.
        weight: [C, K] class weights.
        bias: [C].
        boost: whether mean(relu M) is needed; without it (alpha 1) no map is computed at all.

    Returns:
        mean(M) [B, C] and mean(relu M) [B, C] (None without `boost`), fp32 (fp64 for fp64 input). Both differentiable;
        the derivative of relu at 0 is 0 (strict ">", as the released code).
    """
    return cam_pool_reference(features, weight, bias, boost)


def cam_map(features: Tensor, weight: Tensor, bias: Tensor, classes: Tensor) -> Tensor:
    """Class activation maps of a few chosen classes per picture.

    Args:
        features: [B, H, W, K].
        weight: [C, K].
        bias: [C].
        classes: int64 [B, N] class ids; -1 gives a map of zeros.

    Returns:
        [B, N, H, W], fp32 (fp64 for fp64 input), signed, bias included.
    """
    return cam_map_reference(features, weight, bias, classes)
