"""Maps over images: the stronger a cell, the more of the image is covered, and the image stays visible everywhere.

Each kind of map has its own colours and its own scale: evidence is red for the class and blue against it, symmetric
around 0; attention is green, from 0 on. What another head calls a map is signed and drawn as evidence is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from spml_fast.analysis.explain import Explained, Kind

# Colours that colour-blind people can tell from each other.
_FOR, _AGAINST, _LOOKED_AT = (np.array(c) for c in ((0.80, 0.04, 0.12), (0.05, 0.25, 0.78), (0.0, 0.55, 0.35)))

# How much of a pixel the map covers where it is strongest, and how much of the image's own colour stays.
_OPACITY, _COLOURED = 0.7, 0.35

# The image below a map is lightened, so that colours show over black: black and white become these.
_DARKEST, _LIGHTEST = 0.16, 0.97

Pixels = npt.NDArray[np.float64]


def colour_scales(images: Sequence[Explained]) -> dict[Kind, float]:
    """The end of the colour scale of each kind of map: 99 per cent of all its cells lie within plus and minus this."""
    ends: dict[Kind, float] = {}
    for kind in dict.fromkeys(image.kind for image in images):
        cells = np.concatenate([np.abs(image.shown).ravel() for image in images if image.kind == kind])
        end = float(np.percentile(cells, 99)) if len(cells) else 0.0
        ends[kind] = end if end > 0 else 1.0
    return ends


def tint(pixels: Pixels, value: Pixels, kind: Kind = "evidence") -> Pixels:
    """Pixels coloured by the map there, float64 [..., 3] in 0..1.

    Args:
        pixels: [..., 3] in 0..1.
        value: [...] in -1..1; 0 leaves the pixel as it is, the ends are as strong as colours get.
        kind: of the map, which says the colours.
    """
    colour = np.where(value[..., None] > 0, _LOOKED_AT if kind == "attention" else _FOR, _AGAINST)
    # The exponent lifts small values, so that weak evidence is visible too.
    weight = _OPACITY * np.abs(value)[..., None] ** 0.7
    out: Pixels = pixels * (1 - weight) + colour * weight
    return out


def overlay(
    image: npt.NDArray[np.uint8],
    cells: npt.NDArray[np.float32],
    scale: float,
    positive_only: bool = False,
    kind: Kind = "evidence",
) -> Pixels:
    """A map over the image, whose colours are paled, float64 [S, S, 3] in 0..1.

    Args:
        image: uint8 [S, S, 3].
        cells: float32 [h, w], upsampled bilinearly.
        scale: where colours are full.
        positive_only: leave out what speaks against the class.
        kind: of the map.
    """
    size = image.shape[:2]
    large = F.interpolate(torch.from_numpy(cells)[None, None], size=size, mode="bilinear", align_corners=False)
    value = np.clip(large[0, 0].double().numpy() / scale, 0 if positive_only else -1, 1)
    # The weights are those of luma.
    grey = (image @ np.array([0.299, 0.587, 0.114]))[..., None]
    paled = (_COLOURED * image + (1 - _COLOURED) * grey) / 255
    return tint(_DARKEST + (_LIGHTEST - _DARKEST) * paled, value, kind)


def scale_strip(kind: Kind, positive_only: bool) -> tuple[Pixels, float]:
    """The colours of a scale over mid grey, float64 [1, 256, 3], and the value of its left end, -1 or 0."""
    low = 0.0 if kind == "attention" or positive_only else -1.0
    return tint(np.full((1, 256, 3), 0.75), np.linspace(low, 1, 256)[None], kind), low
