"""What the ops' autograd registrations share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def scale_gradient(grad: Tensor, upstream: Tensor) -> Tensor:
    """grad * upstream; half precision is multiplied in fp32, since upstream is often a tiny 1 / (B C)."""
    return grad * upstream if grad.dtype == torch.float32 else (grad.float() * upstream).to(grad.dtype)


def without_gradient(ctx: Any, *outputs: Tensor) -> None:
    """Within an op's `setup_context`: these outputs have no gradient.

    Absent gradients stay None in the backward, else zeros of their outputs' sizes would be written for nobody to read.
    """
    ctx.mark_non_differentiable(*outputs)
    ctx.set_materialize_grads(False)


def register_computed_gradient(op: Any, place: int) -> None:
    """Autograd of an op that computes the gradient of its loss beside it.

    Args:
        op: a custom op; output 0 is a 0-d loss, differentiable in input 0 alone.
        place: which output holds the loss's gradient in input 0.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        without_gradient(ctx, *output[1:])
        ctx.save_for_backward(output[place])
        ctx.inputs = len(inputs)

    def backward(ctx: Any, upstream: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        return scale_gradient(ctx.saved_tensors[0], upstream), *[None] * (ctx.inputs - 1)

    op.register_autograd(backward, setup_context=setup)


def register_masking(op: Callable[..., Tensor], place: int) -> None:
    """Autograd of an op that masks images by what does not depend on them: gradients are masked in the same way.

    Args:
        op: a custom op, differentiable in its images alone; tensors before them, other arguments after.
        place: which input the images are.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:place])
        ctx.choices = inputs[place + 1 :]

    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        masked = op(*ctx.saved_tensors, upstream, *ctx.choices)
        return *[None] * place, masked, *[None] * len(ctx.choices)

    op.register_autograd(backward, setup_context=setup)  # type: ignore[attr-defined]
