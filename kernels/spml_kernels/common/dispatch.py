"""Chooses between Triton and the plain PyTorch reference. The one place that reads the kernels' environment variables.

SPML_KERNELS: `auto` (default) takes Triton for CUDA tensors where an op has a kernel and the reference otherwise (and
with PyTorch for ROCm, whose devices are called cuda as well);
`reference` always takes the reference; `triton` also takes Triton for CPU tensors, which needs Triton's interpreter
(TRITON_INTERPRET=1 in the environment before Python starts). fp64 tensors always take the reference.

SPML_CAM_POOL, SPML_CAM_POOL_BACKWARD, SPML_LARGE_LOSS: `auto` (default) takes the way that `heuristics` chooses for
shape, card and version of triton; another word takes that way, on every rank of a run the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor

from spml_kernels.common.heuristics import CAM_POOL_BACKWARD_WAYS, CAM_POOL_WAYS, LARGE_LOSS_SELECTS
from spml_kernels.common.jit import HAVE_TRITON, INTERPRETED

CHOICES = ("auto", "triton", "reference")


def _choice(variable: str, choices: Iterable[str]) -> str:
    """The variable's value, `auto` where it is not set.

    Raises:
        ValueError: it is none of the choices.
    """
    choice = os.environ.get(variable, "auto")
    if choice not in choices:
        raise ValueError(f"{variable} is {choice!r}; it must be one of {', '.join(choices)}")
    return choice


def cam_pool_override() -> str | None:
    """SPML_CAM_POOL: the way of cam_pool's forward; None to choose it.

    Raises:
        ValueError: an unknown way.
    """
    choice = _choice("SPML_CAM_POOL", ("auto", *CAM_POOL_WAYS))
    return None if choice == "auto" else choice


def cam_pool_backward_override() -> str | None:
    """SPML_CAM_POOL_BACKWARD: the way of cam_pool's backward; None to take what heuristics say.

    Raises:
        ValueError: an unknown way.
    """
    choice = _choice("SPML_CAM_POOL_BACKWARD", ("auto", *CAM_POOL_BACKWARD_WAYS))
    return None if choice == "auto" else choice


def large_loss_override() -> str | None:
    """SPML_LARGE_LOSS: how large_loss counts; None to choose it.

    Raises:
        ValueError: an unknown way.
    """
    choice = _choice("SPML_LARGE_LOSS", ("auto", *LARGE_LOSS_SELECTS))
    return None if choice == "auto" else choice


def use_triton(tensor: Tensor) -> bool:
    """Whether an op on `tensor` should launch its Triton kernel.

    Raises:
        ValueError: a bad SPML_KERNELS.
        RuntimeError: SPML_KERNELS=triton where no kernel can run.
    """
    choice = _choice("SPML_KERNELS", CHOICES)
    if choice == "reference" or tensor.dtype == torch.float64:
        return False
    # Block sizes, tf32x3 and the launch options are NVIDIA's, and no AMD card has been tried.
    other = torch.version.hip is not None
    if choice == "auto":
        return HAVE_TRITON and tensor.is_cuda and not other
    if other:
        raise RuntimeError("SPML_KERNELS=triton with PyTorch for ROCm: the kernels are NVIDIA's; use auto or reference")
    if not HAVE_TRITON:
        raise RuntimeError("SPML_KERNELS=triton, but triton is not installed; use auto or reference")
    # Meta tensors hold nothing: there the op's fake answers, and no kernel runs.
    if not (tensor.is_cuda or tensor.is_meta or INTERPRETED):
        raise RuntimeError(
            f"SPML_KERNELS=triton with a tensor on {tensor.device.type}: set TRITON_INTERPRET=1 before Python starts, "
            "or use auto or reference"
        )
    return True
