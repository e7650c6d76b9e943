"""label_loss: one op for all point-wise losses; a method hands in its point function.

Forward and backward each read logits and codes once; the derivative is computed again in the backward, where it is
multiplied by the upstream gradient before it is written. A gradient kept from the forward would be written, read and
written again: 17 bytes an entry of fp32 logits in place of 9. Sums are fp32, one per program, added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spml_kernels.common.dispatch import use_triton
from spml_kernels.common.heuristics import FlatLaunch, point_launch
from spml_kernels.common.jit import LAUNCH
from spml_kernels.common.ops import define
from spml_kernels.label_loss.kernels import _label_loss_backward_kernel, _label_loss_kernel
from spml_kernels.label_loss.reference import label_loss_reference

_POINTS: dict[str, PointLoss] = {}


@dataclass(frozen=True)
class PointLoss:
    """The loss of one (logit, code) pair.

    Attributes:
        name: the method's name, for messages and benchmarks.
        reference: (logits, int8 codes, *params) -> element-wise loss of the logits' shape, in PyTorch.
        kernel: a `spml_kernels.common.jit.jit` function (fp32 logit, code, *params) -> (loss, derivative in the
            logit) with the same meaning, for the fused kernel; without one the reference runs on every device.
        elements_per_thread: of the fused kernel, a power of two; a long function takes 4, so that it does not spill.
        key: name of the kernel among all point functions; empty without one.
    """

    name: str
    reference: Callable[..., Tensor]
    kernel: Any = None
    elements_per_thread: int = 8
    key: str = field(init=False, default="")

    def __post_init__(self) -> None:
        # Ops take no functions as arguments, so the function travels as a name. It is made here and not where it is
        # used, since torch.compile misreads a function's __qualname__ in some versions (2.11).
        if self.kernel is not None:
            function = getattr(self.kernel, "fn", self.kernel)
            object.__setattr__(self, "key", f"{function.__module__}.{function.__qualname__}")
            _POINTS[self.key] = self


def label_loss(logits: Tensor, codes: Tensor, point: PointLoss, params: tuple[float, ...] = ()) -> Tensor:
    """Sum of a point-wise loss.

    Args:
        logits: [B, C], any floating dtype.
        codes: int8 [B, C], 1 positive, 0 negative, -1 unknown.
        point: the loss of one entry.
        params: the point function's numbers.

    Returns:
        0-d sum, fp32 (fp64 for fp64 logits), differentiable in the logits. Reduction to a mean is the caller's, because
        denominators are counts over all ranks.
    """
    if point.kernel is None or not use_triton(logits):
        return label_loss_reference(logits, codes, point.reference, params)
    return label_loss_op(logits, codes, point.key, [float(p) for p in params])


def _run(
    kernel: Any, launch: FlatLaunch, tensors: tuple[Tensor, ...], elements: int, point: str, params: list[float]
) -> None:
    """Launch one of the two kernels over all entries, with the point function of this name and its numbers."""
    kernel[(launch.programs,)](
        *tensors,
        tuple(params),
        elements,
        POINT=_POINTS[point].kernel,
        BLOCK=launch.block,
        num_warps=launch.warps,
        **LAUNCH,
    )


@define("spml::label_loss")
def label_loss_op(logits: Tensor, codes: Tensor, point: str, params: list[float]) -> Tensor:
    """0-d loss, fp32."""
    elements = logits.numel()
    if elements == 0:
        return torch.zeros((), dtype=torch.float32, device=logits.device)
    launch = point_launch(elements, _POINTS[point].elements_per_thread)
    partial = torch.empty(launch.programs, dtype=torch.float32, device=logits.device)
    tensors = (logits.contiguous(), codes.contiguous(), partial)
    _run(_label_loss_kernel, launch, tensors, elements, point, params)
    return partial.sum()


@label_loss_op.register_fake
def _(logits: Tensor, codes: Tensor, point: str, params: list[float]) -> Tensor:
    return logits.new_empty((), dtype=torch.float32)


@define("spml::label_loss_backward")
def label_loss_backward_op(upstream: Tensor, logits: Tensor, codes: Tensor, point: str, params: list[float]) -> Tensor:
    """Gradient of the loss in the logits, [B, C] in their dtype, times the 0-d upstream gradient."""
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    elements = logits.numel()
    if elements > 0:
        launch = point_launch(elements, _POINTS[point].elements_per_thread)
        tensors = (upstream.float(), logits.contiguous(), codes.contiguous(), grad)
        _run(_label_loss_backward_kernel, launch, tensors, elements, point, params)
    return grad


@label_loss_backward_op.register_fake
def _(upstream: Tensor, logits: Tensor, codes: Tensor, point: str, params: list[float]) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, codes, *ctx.point = inputs
    ctx.save_for_backward(logits, codes)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    return label_loss_backward_op(upstream, *ctx.saved_tensors, *ctx.point), None, None, None


label_loss_op.register_autograd(_backward, setup_context=_setup)
