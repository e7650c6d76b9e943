"""label_loss: one op for all point-wise losses; a method hands in its point function.

The kernel reads logits and codes once and writes the gradient beside the partial sums of the loss, so the backward is
one multiplication by the upstream gradient. Sums are fp32, one per program, added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spml_kernels.common.dispatch import use_triton
from spml_kernels.common.heuristics import point_launch
from spml_kernels.common.jit import LAUNCH, jit, tl
from spml_kernels.common.math import sigmoid_jit, softplus_jit
from spml_kernels.devtools.aot import Case
from spml_kernels.label_loss.reference import label_loss_reference

_POINTS: dict[str, Any] = {}


@dataclass(frozen=True)
class PointLoss:
    """The loss of one (logit, code) pair.

    Attributes:
        name: the method's name, for messages and benchmarks.
        reference: (logits, int8 codes, *params) -> element-wise loss of the logits' shape, in PyTorch.
        kernel: a `spml_kernels.common.jit.jit` function (fp32 logit, code, *params) -> (loss, derivative in the
            logit) with the same meaning, for the fused kernel; without one the reference runs on every device.
        key: name of the kernel among all point functions; empty without one.
    """

    name: str
    reference: Callable[..., Tensor]
    kernel: Any = None
    key: str = field(init=False, default="")

    def __post_init__(self) -> None:
        # Ops take no functions as arguments, so the function travels as a name. It is made here and not where it is
        # used, since torch.compile misreads a function's __qualname__ in some versions (2.11).
        if self.kernel is not None:
            function = getattr(self.kernel, "fn", self.kernel)
            object.__setattr__(self, "key", f"{function.__module__}.{function.__qualname__}")
            _POINTS[self.key] = self.kernel


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
    wanted = logits.requires_grad and torch.is_grad_enabled()
    return label_loss_op(logits, codes, point.key, [float(p) for p in params], wanted)[0]


@jit
def _an_point_jit(z, code):
    """Cross-entropy with unknown as negative, the plainest point function."""
    sign = tl.where(code == 1, -1.0, 1.0)
    return softplus_jit(sign * z), sign * sigmoid_jit(sign * z)[0]


@jit
def _store_points(logits_ptr, codes_ptr, grad_ptr, offsets, params, mask, POINT: tl.constexpr, GRAD: tl.constexpr):
    """Loss of one block, summed; its gradient stored. `mask` is None where the whole block is inside."""
    if mask is None:
        z = tl.load(logits_ptr + offsets).to(tl.float32)
        code = tl.load(codes_ptr + offsets).to(tl.int32)
        loss, slope = POINT(z, code, *params)
    else:
        z = tl.load(logits_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        code = tl.load(codes_ptr + offsets, mask=mask, other=0).to(tl.int32)
        loss, slope = POINT(z, code, *params)
        loss = tl.where(mask, loss, 0.0)
    if GRAD:
        tl.store(grad_ptr + offsets, slope.to(grad_ptr.dtype.element_ty), mask=mask)
    return tl.sum(loss, 0)


@jit
def _label_loss_kernel(
    logits_ptr,
    codes_ptr,
    grad_ptr,
    partial_ptr,
    numbers,
    elements,
    POINT: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of entries a program: its part of the loss, and the gradient.

    Args:
        logits_ptr, codes_ptr, grad_ptr: [elements]; grad is not touched without GRAD.
        partial_ptr: fp32 [programs].
        numbers: the point function's. (A kernel's parameter cannot be called `params`: the code that Triton makes for
            its launch has a variable of that name.)
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    # Without a mask on whole blocks loads stay 128 bits wide whatever the number of entries is.
    if start + BLOCK <= elements:
        total = _store_points(logits_ptr, codes_ptr, grad_ptr, offsets, numbers, None, POINT, GRAD)
    else:
        total = _store_points(logits_ptr, codes_ptr, grad_ptr, offsets, numbers, offsets < elements, POINT, GRAD)
    tl.store(partial_ptr + tl.program_id(0), total)


@torch.library.custom_op("spml::label_loss", mutates_args=())
def label_loss_op(
    logits: Tensor, codes: Tensor, point: str, params: list[float], gradient: bool
) -> tuple[Tensor, Tensor]:
    """0-d loss, and its gradient (empty unless asked for)."""
    logits, codes = logits.contiguous(), codes.contiguous()
    grad = torch.empty_like(logits) if gradient else logits.new_empty(0)
    elements = logits.numel()
    if elements == 0:
        return torch.zeros((), dtype=torch.float32, device=logits.device), grad
    launch = point_launch(elements)
    partial = torch.empty(launch.programs, dtype=torch.float32, device=logits.device)
    _label_loss_kernel[(launch.programs,)](
        logits,
        codes,
        grad,
        partial,
        tuple(params),
        elements,
        POINT=_POINTS[point],
        GRAD=gradient,
        BLOCK=launch.block,
        num_warps=launch.warps,
        **LAUNCH,
    )
    return partial.sum(), grad


@label_loss_op.register_fake
def _(logits: Tensor, codes: Tensor, point: str, params: list[float], gradient: bool) -> tuple[Tensor, Tensor]:
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format) if gradient else logits.new_empty(0)
    return logits.new_empty((), dtype=torch.float32), grad


def scale_gradient(grad: Tensor, upstream: Tensor) -> Tensor:
    """grad * upstream; half precision is multiplied in fp32, since upstream is often a tiny 1 / (B C)."""
    return grad * upstream if grad.dtype == torch.float32 else (grad.float() * upstream).to(grad.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    # Else zeros of the gradient's size would be written for a gradient that nobody reads.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, upstream: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (grad,) = ctx.saved_tensors
    return scale_gradient(grad, upstream), None, None, None, None


label_loss_op.register_autograd(_backward, setup_context=_setup)


def aot_cases(arch: int = 90, points: dict[str, tuple[Any, int]] | None = None) -> Iterator[Case]:
    """The kernel for compiles without a GPU.

    Args:
        points: name -> (point function, how many numbers it takes); None takes assume-negative.
    """
    for name, (point, numbers) in (points or {"an": (_an_point_jit, 0)}).items():
        for dtype in ("fp32", "bf16", "fp16"):
            for elements, aligned in ((128 * 80, True), (128 * 9605, True), (33 * 81, False)):
                launch = point_launch(elements)
                pointers = ("logits_ptr", "codes_ptr", "grad_ptr", "partial_ptr")
                yield Case(
                    "label_loss",
                    f"{name} {dtype} {elements} entries",
                    _label_loss_kernel,
                    {
                        "logits_ptr": f"*{dtype}",
                        "codes_ptr": "*i8",
                        "grad_ptr": f"*{dtype}",
                        "partial_ptr": "*fp32",
                        "numbers": ("fp32",) * numbers,
                        "elements": "i32",
                    },
                    {"POINT": point, "GRAD": True, "BLOCK": launch.block},
                    (*pointers, "elements") if aligned else pointers,
                    launch.warps,
                )
