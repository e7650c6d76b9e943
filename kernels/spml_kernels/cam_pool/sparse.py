"""Gradients of cam_pool for signs of which most are negative: classes without a positive cell are left out.

The gradient of the map is taken apart, G = (m + r P) / (H W) with m and r the gradients of the two means and P the
signs (`backward` has the whole). What m adds is the same in all cells of an image, so that it is a product over
images, not over cells, and complete for every class:
    dX = (m W) / (H W) + ...,   dW = m' mean(X) + ...,   dbias = sum m + ...
What r adds is 0 where no cell is positive, so that leaving out these classes changes nothing but the order of sums.
Which classes are left is found on the device and stays there; the host launches what would do for all of them, and
programs that are left with nothing end at once. For dX every 64 cells have a list of classes. For dW every chunk of
cells has its classes in the order of their positive cells, ties by class, so that common ones share blocks, and every
block of them has a list of the lines of 32 cells in which one of them is positive. (Cut Cross-Entropy, Wijmans et al.,
orders its vocabulary and filters blocks to the same end.) Chunks follow each other, and nothing is added by atomics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spml_kernels.cam_pool.products import wide_product
from spml_kernels.cam_pool.sparse_kernels import (
    _cam_pool_count_kernel,
    _cam_pool_lines_kernel,
    _cam_pool_list_kernel,
    _cam_pool_sparse_w_kernel,
    _cam_pool_sparse_x_kernel,
)
from spml_kernels.cam_pool.tiles import precision
from spml_kernels.common.heuristics import WORD, CamPoolSparse, cam_pool_sparse_launch, images_per_tile
from spml_kernels.common.jit import INTERPRETED, LAUNCH, cdiv

# Lines of a tile of the features' gradient, fixed in the kernels.
TILE_LINES = 2


def sparse_gradients(
    grad_mean: Tensor, grad_relu: Tensor, x: Tensor, weight: Tensor, bits: Tensor, want_x: bool, want_w: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of features, weight and bias, the latter fp32; empty where unwanted.

    Args:
        grad_mean: fp32 [B, C], contiguous, of mean(M).
        grad_relu: the same of mean(relu M).
        x: [B, H W, K], contiguous, not empty.
        weight: [C, K].
        bits: as `cam_pool_op` gives them.
        want_x: whether the first is wanted.
        want_w: whether the two others are.
    """
    dtype = x.dtype
    work = _Work(grad_mean, grad_relu, x, bits)
    # What fp16 cannot hold are the tiny gradients of a mean: they are scaled to 1, and sums scaled back in fp32.
    mean = (grad_mean if work.scale is None else grad_mean / work.scale).to(dtype)
    d_x, d_w = x.new_empty(x.shape if want_x else (0,)), weight.new_empty(0)
    d_bias = torch.empty(0, dtype=torch.float32, device=x.device)
    if want_x:
        w = weight.to(dtype).contiguous()
        base = torch.empty(len(x), x.shape[2], dtype=torch.float32, device=x.device)
        wide_product(mean, w, base)
        work.features_gradient(base, w, d_x)
    if want_w:
        total = torch.empty(weight.shape, dtype=torch.float32, device=x.device)
        wide_product(mean.T, x.mean(1, dtype=torch.float32).to(dtype), total)
        if work.scale is not None:
            total.mul_(work.scale)
        part = work.weights_gradient(total)
        d_w, d_bias = total.to(weight.dtype), grad_mean.sum(0) + part
    return d_x, d_w, d_bias


class _Work:
    """Launches of the kernels for one backward.

    Args:
        grad_mean, grad_relu: fp32 [B, C].
        x: [B, H W, K].
        bits: the signs.
    """

    def __init__(self, grad_mean: Tensor, grad_relu: Tensor, x: Tensor, bits: Tensor) -> None:
        self.relu, self.x, self.bits = grad_relu, x, bits
        self.batch, self.cells, self.channels = x.shape
        self.rows, self.classes = self.batch * self.cells, grad_mean.shape[1]
        self.lines, self.stride = bits.shape
        self.launch: CamPoolSparse = cam_pool_sparse_launch(self.channels, x.dtype != torch.float32)
        self.scale: Tensor | None = None
        if x.dtype == torch.float16:
            self.scale = torch.maximum(grad_mean.abs().amax(), grad_relu.abs().amax()).clamp(min=1e-30)
        self.products: dict[str, Any] = {
            "SCALED": self.scale is not None,
            "PRECISION": precision(x.dtype),
            "UPCAST": INTERPRETED and x.dtype != torch.float32,
            "BLOCK_K": self.launch.channels,
            "num_warps": self.launch.warps,
            "num_stages": self.launch.stages,
            **LAUNCH,
        }

    def _numbers(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=self.x.device)

    def features_gradient(self, base: Tensor, w: Tensor, out: Tensor) -> None:
        """Write dX [B, H W, K]; `base` [B, K] is what all cells of an image have in common, before the mean's share."""
        tiles, launch = cdiv(self.lines, TILE_LINES), self.launch
        # With signs, a tenth of the map at most, which four bytes a class would pass.
        short = torch.int16 if self.stride < 2**15 else torch.int32
        classes = torch.empty(tiles, self.stride, dtype=short, device=self.x.device)
        number = self._numbers(tiles)
        _cam_pool_list_kernel[(tiles,)](
            self.bits, classes, number, self.lines, self.stride, BLOCK=launch.listed, num_warps=4, **LAUNCH
        )
        _cam_pool_sparse_x_kernel[(tiles * cdiv(self.channels, launch.channels),)](
            self.relu,
            base,
            base if self.scale is None else self.scale,
            self.bits,
            w,
            classes,
            number,
            out,
            self.rows,
            self.classes,
            self.channels,
            self.cells,
            self.stride,
            1.0 / self.cells,
            TOUCHED=images_per_tile(TILE_LINES * WORD, self.cells),
            BLOCK_C=launch.step,
            **self.products,
        )

    def weights_gradient(self, total: Tensor) -> Tensor:
        """Add to dW, fp32 [C, K], chunk by chunk; gives what positive cells add to the bias's gradient."""
        launch = self.launch
        chunks, blocks = cdiv(self.lines, launch.lines), cdiv(self.classes, launch.classes)
        positive, part = self._numbers(chunks, self.classes), total.new_empty(chunks, self.classes)
        touched = images_per_tile(WORD, self.cells)
        _cam_pool_count_kernel[(chunks, cdiv(self.classes, launch.counted))](
            self.relu,
            self.bits,
            positive,
            part,
            self.rows,
            self.classes,
            self.cells,
            self.stride,
            1.0 / self.cells,
            TOUCHED=touched,
            LINES=launch.lines,
            BLOCK=launch.counted,
            num_warps=4,
            **LAUNCH,
        )
        # Stable, so that ties have one order.
        most, order = torch.sort(positive, dim=1, descending=True, stable=True)
        lists, number = self._numbers(chunks, blocks, launch.lines), self._numbers(chunks, blocks)
        _cam_pool_lines_kernel[(chunks, blocks)](
            self.bits,
            order,
            most,
            lists,
            number,
            self.lines,
            self.classes,
            self.stride,
            LINES=launch.lines,
            STEP=min(launch.lines, WORD),
            BLOCK=launch.classes,
            num_warps=4,
            **LAUNCH,
        )
        for chunk in range(chunks):
            _cam_pool_sparse_w_kernel[(blocks * cdiv(self.channels, launch.channels),)](
                self.relu,
                total if self.scale is None else self.scale,
                self.bits,
                self.x,
                order,
                most,
                lists,
                number,
                total,
                chunk,
                self.rows,
                self.classes,
                self.channels,
                self.cells,
                self.stride,
                1.0 / self.cells,
                TOUCHED=touched,
                LINES=launch.lines,
                BLOCK_C=launch.classes,
                **self.products,
            )
        return part.sum(0)
