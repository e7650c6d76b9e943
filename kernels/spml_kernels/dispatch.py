"""Chooses between Triton and the plain PyTorch reference. The one place that reads `SPML_KERNELS`.

SPML_KERNELS: `auto` (default) takes Triton for CUDA tensors where an op has a kernel and the reference otherwise;
`reference` always takes the reference; `triton` takes Triton always (on CPU tensors this needs Triton's interpreter).
"""

from __future__ import annotations

import os

from torch import Tensor

CHOICES = ("auto", "triton", "reference")


def use_triton(tensor: Tensor) -> bool:
    """Whether an op on `tensor` should launch its Triton kernel. Raises `ValueError` on a bad SPML_KERNELS."""
    choice = os.environ.get("SPML_KERNELS", "auto")
    if choice not in CHOICES:
        raise ValueError(f"SPML_KERNELS is {choice!r}; it must be one of {', '.join(CHOICES)}")
    if choice == "reference":
        return False
    if choice == "triton":
        return True
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
