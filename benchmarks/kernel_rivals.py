"""What the fused ops are compared with: the same results in PyTorch, written by somebody who knows what costs time.

Everything here is plain PyTorch, in the types of its inputs with sums in fp32. `compiled` hands it to torch.compile;
what the reference of an op does for several ranks, or to keep equal logits in order, is left out where one card with
distinct logits does not need it. Inductor's own chunks (auto_chunker) are no rival of cam_pool: it finds no rule for
the view of cells as images and leaves the graph whole (tried with PyTorch 2.14), so chunks are compiled here.
"""

from __future__ import annotations

from typing import Any

import torch
from spml_kernels.cam_pool.chunked import CACHE_BYTES
from spml_kernels.cam_pool.products import wide_product
from torch import Tensor
from torch.nn.functional import linear, logsigmoid

from benchmarks.kernel_base import Call, compiled


def cam_plain(features: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Both means from one map, so that the features are read once: forward by one product, backward by one each.

    Args:
        features: [B, H, W, K]; weight: [C, K]; bias: [C].

    Returns:
        mean(M) and mean(relu M), [B, C] fp32.
    """
    cells = features.flatten(1, 2)
    cam = linear(cells, weight.to(cells.dtype), bias.to(cells.dtype))
    return cam.mean(1, dtype=torch.float32), cam.relu().mean(1, dtype=torch.float32)


def cam_pooled(features: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """As `cam_plain` with mean(M) from pooled features: reads features twice, and the map once less."""
    cells = features.flatten(1, 2)
    pooled = cells.mean(1, dtype=torch.float32)
    cam = linear(cells, weight.to(cells.dtype), bias.to(cells.dtype))
    return linear(pooled, weight.float(), bias.float()), cam.relu().mean(1, dtype=torch.float32)


def images_per_chunk(batch: int, cells: int, classes: int, itemsize: int, cache: int = CACHE_BYTES) -> int:
    """Images whose map fits in the cache, at least one.

    Args:
        batch: B.
        cells: H W.
        classes: C.
        itemsize: bytes of an element of the map.
        cache: bytes.
    """
    return max(1, min(batch, cache // max(cells * classes * itemsize, 1)))


def _chunk_means(cells: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Both means of a few images; cells: [n, H W, K]."""
    cam = linear(cells, weight, bias)
    return cam.mean(1, dtype=torch.float32), cam.relu().mean(1, dtype=torch.float32)


def _chunk_gradient(cells: Tensor, weight: Tensor, bias: Tensor, off: Tensor, on: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of a few images' map, [n H W, C], and its sum over cells, [C] fp32.

    Args:
        cells: [n, H W, K].
        off, on: [n, C], the gradient of a cell that is not positive, and of one that is.
    """
    share = torch.where(linear(cells, weight, bias) > 0, on[:, None], off[:, None]).flatten(0, 1)
    return share, share.sum(0, dtype=torch.float32)


class _ImageChunks(torch.autograd.Function):
    """Both means over chunks of images; the map is made again in the backward, and never leaves its type.

    Cut by images and not by classes, the features' gradient of a chunk is one product, complete; that of the weights is
    summed in fp32 by the products themselves.
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor, means: Call, gradient: Call
    ) -> tuple[Tensor, Tensor]:
        cells, w = features.flatten(1, 2), weight.to(features.dtype)
        b = bias.to(features.dtype)
        number = images_per_chunk(len(cells), cells.shape[1], len(w), cells.element_size())
        parts = [means(part, w, b) for part in cells.split(number)]
        ctx.save_for_backward(features, weight, bias)
        ctx.gradient, ctx.number = gradient, number
        return torch.cat([mean for mean, _ in parts]), torch.cat([relu for _, relu in parts])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        features, weight, bias = ctx.saved_tensors
        cells, w, b = features.flatten(1, 2), weight.to(features.dtype), bias.to(features.dtype)
        grad_mean, grad_relu = (grad / cells.shape[1] for grad in upstream)
        off, on = grad_mean.to(w.dtype), (grad_mean + grad_relu).to(w.dtype)
        d_cells = torch.empty_like(cells)
        d_weight = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        d_bias = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
        for first in range(0, len(cells), ctx.number):
            part = slice(first, first + ctx.number)
            share, total = ctx.gradient(cells[part], w, b, off[part], on[part])
            torch.mm(share, w, out=d_cells[part].flatten(0, 1))
            wide_product(share.T, cells[part].flatten(0, 1), d_weight, add=first > 0)
            d_bias += total
        return d_cells.view_as(features), d_weight.to(weight.dtype), d_bias.to(bias.dtype), None, None


def cam_image_chunks(compile_chunks: bool) -> Call:
    """cam_pool over chunks of images in PyTorch, each chunk's map eager or compiled."""
    bodies: tuple[Call, Call] = (_chunk_means, _chunk_gradient)
    if compile_chunks:
        bodies = (compiled(_chunk_means), compiled(_chunk_gradient))

    def call(features: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = _ImageChunks.apply(features, weight, bias, *bodies)
        return results

    return call


# Operations of a product from which on its own time is what counts, and choosing among kernels for it may help.
LARGE_PRODUCT = 1e11


def cam_rivals(flops: float) -> dict[str, Call]:
    """Rivals of cam_pool by the names that rows have.

    Args:
        flops: of the product of all features and weights. Tuning takes the compiler a minute, so only large ones are.
    """
    rivals: dict[str, Call] = {
        "eager": cam_plain,
        "eager_pooled": cam_pooled,
        "eager_chunks": cam_image_chunks(False),
        "compile": compiled(cam_plain),
        "compile_pooled": compiled(cam_pooled),
        "compile_chunks": cam_image_chunks(True),
    }
    if flops >= LARGE_PRODUCT:
        rivals["compile_tuned"] = compiled(cam_plain, "max-autotune-no-cudagraphs")
    return rivals


def large_loss_lean(k: int, listed: bool) -> Call:
    """The k largest by topk, a mask of them, and the loss; no order of equal logits, no ranks.

    Args:
        k: how many, at most the unobserved entries.
        listed: whether rows, classes and validity of the selected entries are wanted, by position.
    """

    def call(logits: Tensor, codes: Tensor, number: Tensor) -> tuple[Tensor, ...]:
        unknown = codes == -1
        score = torch.where(unknown, logits.detach(), -torch.inf).flatten()
        places = score.topk(k, sorted=False).indices
        selected = torch.zeros_like(score, dtype=torch.bool).scatter(0, places, True).view_as(codes) & unknown
        loss = -logsigmoid(torch.where(codes == 1, logits, -logits))
        results = (torch.where(selected, 0, loss).sum(), selected)
        if not listed:
            return results
        entry = places.sort().values
        valid = torch.ones_like(entry, dtype=torch.bool)
        return (*results, entry // codes.shape[1], entry % codes.shape[1], valid)

    return call


def loss_rivals(plain: Call, lean: Call | None = None) -> dict[str, Call]:
    """Rivals of a loss by the names that rows have: a CUDA graph of the compiled one too, for it is a few launches.

    Args:
        plain: the loss in PyTorch.
        lean: the same without what one card does not need.
    """
    rivals: dict[str, Call] = {"eager": plain, "compile": compiled(plain)}
    if lean is not None:
        rivals |= {"eager_lean": lean, "compile_lean": compiled(lean)}
    return rivals | {"compile_graphs": compiled(lean or plain, "reduce-overhead")}
