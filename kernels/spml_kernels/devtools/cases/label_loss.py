"""Ahead-of-time cases of label_loss, for any point functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from spml_kernels.common.heuristics import point_launch
from spml_kernels.common.jit import jit, tl
from spml_kernels.common.math import sigmoid_jit, softplus_jit
from spml_kernels.devtools.aot import Case
from spml_kernels.label_loss.kernels import _label_loss_backward_kernel, _label_loss_kernel
from spml_kernels.label_loss.op import PointLoss


def _an_point(logits: Tensor, codes: Tensor) -> Tensor:
    return -logsigmoid(torch.where(codes == 1, logits, -logits))


@jit
def _an_point_jit(z, code):
    """Cross-entropy with unknown as negative, the plainest point function."""
    sign = tl.where(code == 1, -1.0, 1.0)
    return softplus_jit(sign * z), sign * sigmoid_jit(sign * z)[0]


AN = PointLoss("an", _an_point, _an_point_jit)


def aot_cases(arch: int = 90, points: Sequence[tuple[PointLoss, int]] = ((AN, 0),)) -> Iterator[Case]:
    """The kernel with each of these point functions.

    Args:
        arch: compute capability, times 10.
        points: point losses that have a kernel, and how many numbers each of them takes.
    """
    for point, numbers in points:
        for dtype in ("fp32", "bf16", "fp16"):
            for elements, aligned in ((128 * 80, True), (128 * 9605, True), (33 * 81, False)):
                launch = point_launch(elements, point.elements_per_thread)
                data: dict[str, str | tuple[str, ...]] = {"logits_ptr": f"*{dtype}", "codes_ptr": "*i8"}
                count: dict[str, str | tuple[str, ...]] = {"numbers": ("fp32",) * numbers, "elements": "i32"}
                forward = {**data, "partial_ptr": "*fp32"}
                backward = {"upstream_ptr": "*fp32", **data, "grad_ptr": f"*{dtype}"}
                for op, kernel, pointers in (
                    ("label_loss", _label_loss_kernel, forward),
                    ("label_loss backward", _label_loss_backward_kernel, backward),
                ):
                    yield Case(
                        op,
                        f"{point.name} {dtype} {elements} entries",
                        kernel,
                        {**pointers, **count},
                        {"POINT": point.kernel, "BLOCK": launch.block},
                        (*pointers, "elements") if aligned else tuple(pointers),
                        launch.warps,
                    )
