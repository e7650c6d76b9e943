"""A plugin with a network of a few small layers, for what takes its time by the layer, as compiling does."""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg

# Where timm looks for them.
default_cfgs = generate_default_cfgs(
    {"tiny_network.none": {"input_size": (3, 64, 64), "mean": (0.5,) * 3, "std": (0.5,) * 3}}
)


@register_model
def tiny_network(pretrained: bool = False, **options: Any) -> ByobNet:
    """Seven convolutions with BatchNorm, 16 channels at stride 8, 5 thousand parameters."""
    blocks = tuple(ByoBlockCfg(type="basic", d=1, c=channels, s=2, gs=None, br=1.0) for channels in (8, 16))
    layers = ByoModelCfg(blocks=blocks, stem_chs=8, stem_type="3x3", stem_pool="")
    feature_cfg = {"flatten_sequential": True}
    return build_model_with_cfg(
        ByobNet, "tiny_network", pretrained, model_cfg=layers, feature_cfg=feature_cfg, **options
    )
