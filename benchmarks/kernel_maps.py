"""The ops on feature maps at the shapes that matter: cam_pool and cam_mask."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from spml_kernels import cam_mask, cam_pool
from spml_kernels.cam_mask.reference import cam_mask_reference, map_mask_reference
from spml_kernels.cam_pool.chunked import cam_pool_chunked
from spml_kernels.cam_pool.reference import cam_pool_reference, map_of_known
from spml_kernels.common.heuristics import ALIGNED, LANES, WORD, cam_pool_chunks, cam_pool_launch, expand_rows
from spml_kernels.common.jit import cdiv
from torch import Tensor

from benchmarks.kernel_base import NAMES, Call, KernelWork, Specs, size
from benchmarks.kernel_rivals import cam_plain, cam_rivals, loss_rivals

# What the level-2 cache is expected to hold, though it counts as bytes moved.
IN_CACHE = "gradient of the map, chunk by chunk, written and read by two products"


Signs = Literal["dense", "sparse", "zipf"]


def _cam_inputs(specs: Specs, signs: Signs, device: str) -> list[Tensor]:
    """Features (positive where they matter), weights and bias.

    dense: about half of the cells are positive, in no order.
    sparse: all but a few classes of an image are negative everywhere, and those are positive in half of their cells, so
        that one cell in a hundred is positive. The positive classes of an image are every fiftieth, so that every tile
        of classes has some: the worst case.
    zipf: as many positive cells, but neighbouring classes are positive together and the first are in many images, the
        last in none: a vocabulary in the order of its frequencies, of which group g is in a share of 1 / (g + 1).
    """
    (shape, dtype), ((classes, channels), _), (_, bias_dtype) = specs
    batch, side = shape[0], shape[1]
    draw: dict[str, Any] = {"generator": torch.Generator(device=device).manual_seed(0), "device": device}
    features = torch.randn(shape, **draw)
    weight = torch.randn(classes, channels, **draw) / channels**0.5
    bias = torch.zeros(classes, device=device)
    if signs != "dense":
        # One channel per group of classes switches them on in a fiftieth of the images, or as many as Zipf's law gives.
        bias -= 8.0
        groups = min(50, channels, classes)
        # All shares together are those of `sparse`.
        most = groups / 50 / sum(1 / (group + 1) for group in range(groups))
        for group in range(groups):
            if signs == "sparse":
                members, chosen = slice(group, None, groups), torch.arange(group % batch, batch, 50, device=device)
            else:
                members = slice(group * classes // groups, (group + 1) * classes // groups)
                chosen = torch.randperm(batch, **draw)[: int(batch * most / (group + 1))]
            weight[members, group] = 4.0
            features[..., group] = 0.0
            features[chosen, : max(side // 2, 1), :, group] = 4.0
    return [features.to(dtype), weight.to(dtype), bias.to(bias_dtype)]


def _both(means: tuple[Tensor, Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(m for m in means if m is not None)


def cam_work(
    batch: int, side: int, channels: int, classes: int, dtype: torch.dtype, signs: Signs = "dense"
) -> KernelWork:
    """cam_pool at one shape."""
    specs: Specs = [
        ((batch, side, side, channels), dtype),
        ((classes, channels), dtype),
        ((classes,), torch.float32),
    ]
    rows, cells, half = batch * side * side, side * side, dtype != torch.float32
    flops = 2.0 * rows * classes * channels
    outputs = 2 * batch * classes * 4
    bits = 4 * cdiv(rows, WORD) * cdiv(classes, LANES) * LANES
    providers: dict[str, Call] = {"fused": lambda *t: _both(cam_pool(*t)), "chunked": cam_pool_chunked}
    if signs == "dense":
        # The others do not care about signs.
        providers |= {**cam_rivals(flops), "matmul": cam_plain}
    launch = cam_pool_launch(batch, cells, classes, channels, half)
    touched = [(p * cells + cells - 1) // launch.tiles.rows - p * cells // launch.tiles.rows for p in range(batch)]
    slots = 8 * classes * sum(n + 1 for n in touched if n)
    slotted = {"sums of images that lie in several tiles, written and read": 2.0 * slots}
    stride = cdiv(classes, ALIGNED) * ALIGNED
    chunks = cam_pool_chunks(rows, classes, stride, channels, dtype.itemsize, True)
    beyond = {**slotted, IN_CACHE: rows * (stride + 2.0 * classes) * dtype.itemsize}
    beyond["sums of the bias's gradient, written and read"] = 8.0 * cdiv(rows, expand_rows(classes)) * classes
    # Every product reads all weights, and all but the first read the sum for the weights' gradient.
    beyond["weights, once for every chunk but the first"] = (len(chunks) - 1.0) * classes * channels * dtype.itemsize
    wide = 4 if len(chunks) > 1 or dtype == torch.float16 else dtype.itemsize
    beyond["sum of the weights' gradient, read and written by every chunk but the first"] = (
        2.0 * (len(chunks) - 1) * classes * channels * wide
    )
    if wide != dtype.itemsize:
        beyond["sum of the weights' gradient in fp32, written and read"] = 8.0 * classes * channels
    if dtype == torch.float16:
        beyond["largest gradient"] = 4.0 * outputs
        # The features' are products in fp32 first, written and read.
        beyond["gradients scaled back"] = 8.0 * rows * channels + 8.0 * classes * channels
    return KernelWork(
        op="cam_pool",
        shape=f"{NAMES[dtype]} B {batch} HW {side}x{side} K {channels} C {classes} {signs}",
        specs=specs,
        draw=lambda device: _cam_inputs(specs, signs, device),
        leaves=3,
        providers=providers,
        exact=lambda features, weight, bias: _both(cam_pool_reference(features, weight, bias, True)),
        # A step reads features and weights forward and backward, and the upstream gradients; it writes the gradients.
        floor={"fwd": size(specs) + outputs, "step": 3 * size(specs) + 2 * outputs + 2 * bits},
        residuals={
            "fwd": slotted,
            "step": beyond,
        },
        flops={"fwd": flops, "bwd": 2 * flops, "step": 3 * flops},
        products=1 if half else 3,
        tolerance=1e-2 if half else 1e-4,
        # Sums are fp32 in every type; a cell too few or too many moves a mean by more than this.
        value_tolerance=5e-4 if half else 0.0,
        cam=2.0 * rows * classes,
    )


def cam_works(small: bool) -> Iterator[KernelWork]:
    """Dense, sparse and Zipf's signs; the large vocabulary first, since it has the goals."""
    shapes = [(128, 14, 2048, 5000), (128, 14, 2048, 80)]
    if not small:
        shapes += [(16, 14, 2048, 20), (64, 16, 768, 81), (128, 7, 1280, 312), (512, 7, 2048, 80)]
        shapes += [(32, 32, 512, 5000), (64, 14, 2048, 9605), (1, 14, 2048, 5000), (128, 8, 96, 10)]
    for shape, signs in itertools.product(shapes, get_args(Signs)):
        yield cam_work(*shape, torch.bfloat16, signs)
    if not small:
        yield cam_work(*shapes[1], torch.float32)
        for shape in shapes[:2]:
            yield cam_work(*shape, torch.float16)


def cam_mask_work(
    batch: int,
    side: int,
    channels: int,
    classes: int,
    pixels: int,
    chosen: int,
    dtype: torch.dtype,
    image_dtype: torch.dtype = torch.float32,
) -> KernelWork:
    """Images of `pixels` x `pixels`, masked by the maps of `chosen` classes each.

    Args:
        batch, side, channels, classes: of features and weights.
        pixels: a side of the images.
        chosen: classes of an image.
        dtype, image_dtype: of features and weights, of images.
    """
    specs: Specs = [
        ((batch, side, side, channels), dtype),
        ((classes, channels), dtype),
        ((classes,), torch.float32),
        ((batch, chosen), torch.int64),
        ((batch, 3, pixels, pixels), image_dtype),
    ]

    def draw(device: str) -> list[Tensor]:
        """Maps that fall off from a point of the image, so that about a third of it is kept, in one piece."""
        draw: dict[str, Any] = {"generator": torch.Generator(device=device).manual_seed(0), "device": device}
        place = torch.arange(side, device=device) / side
        centre = torch.rand(2, batch, 1, 1, **draw)
        far = (place[None, :, None] - centre[0]).square() + (place[None, None, :] - centre[1]).square()
        direction = torch.rand(channels, **draw)
        features = torch.exp(-4 * far)[..., None] * direction + 0.02 * torch.randn(specs[0][0], **draw)
        weight = (direction + 0.1 * torch.randn(classes, channels, **draw)) / channels
        ids = (torch.randint(0, classes, (batch, 1), **draw) + torch.arange(chosen, device=device)) % classes
        images = torch.randn(batch, 3, pixels, pixels, **draw).to(memory_format=torch.channels_last)
        return [features.to(dtype), weight.to(dtype), torch.zeros(classes, device=device), ids, images.to(image_dtype)]

    def reference(features: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, images: Tensor) -> tuple[Tensor, ...]:
        return (cam_mask_reference(features, weight, bias, ids, images, 0.5, "per_image", 16),)

    def plain(features: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, images: Tensor) -> tuple[Tensor, ...]:
        # Without the reference's look for ids that are no class: here all are.
        maps = map_of_known(features, weight, bias, ids)
        return (map_mask_reference(maps, ids, images, 0.5, "per_image", 16),)

    def fused(features: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, images: Tensor) -> tuple[Tensor, ...]:
        return (cam_mask(features, weight, bias, ids, images, threshold=0.5),)

    image = "" if image_dtype == torch.float32 else f" image {NAMES[image_dtype]}"
    maps = 4.0 * batch * chosen * side * side
    rows = min(classes, batch * chosen)
    head = size(specs[:1]) + rows * (channels * dtype.itemsize + 4) + 8 * batch * chosen
    return KernelWork(
        op="cam_mask",
        shape=f"{NAMES[dtype]} B {batch} HW {side}x{side} K {channels} S {pixels} N {chosen}{image}",
        specs=specs,
        draw=draw,
        leaves=0,
        providers={**loss_rivals(plain), "fused": fused},
        exact=reference,
        # Every image read and written; kernels may do with less where nothing is kept.
        floor={"fwd": head + 2 * size(specs[4:])},
        residuals={"fwd": {"maps written, normalised, and read": 4 * maps, "names of classes": 24.0 * batch * chosen}},
        # A pixel on the threshold may fall to either side.
        tolerance=1e-2,
    )


def cam_mask_works(small: bool) -> Iterator[KernelWork]:
    """One observed positive, and six."""
    yield cam_mask_work(128, 14, 2048, 80, 448, 1, torch.bfloat16)
    yield cam_mask_work(128, 14, 2048, 80, 448, 1, torch.bfloat16, torch.bfloat16)
    if not small:
        yield cam_mask_work(128, 14, 2048, 80, 448, 6, torch.bfloat16)
        yield cam_mask_work(16, 14, 2048, 20, 448, 1, torch.bfloat16)
        yield cam_mask_work(64, 16, 768, 81, 225, 1, torch.bfloat16)
        yield cam_mask_work(32, 8, 96, 10, 64, 1, torch.float32)
