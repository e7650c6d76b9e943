"""Autocast and cuDNN policy: in which precision, and by which algorithms, a run computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from spml_fast.core import env


def prefers_bf16(device: torch.device) -> bool:
    """Whether bf16 is the faster choice: GPUs from sm_80, CPUs with AMX.

    CPUs with AVX512-BF16 alone have the instructions too, but autocast costs more than they save: a ResNet-50 step took
    1.2 to 1.3 times as long as in fp32, measured on such a machine. `train.precision bf16` is there for them.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.cpu._is_amx_tile_supported())


def set_cudnn_policy(device: torch.device, deterministic: bool) -> None:
    """How PyTorch chooses among algorithms that differ in speed and rounding; for the whole process.

    Args:
        device: where training runs; nothing is changed for a CPU, whose runs repeat bit for bit.
        deterministic: take those that repeat bit for bit, with a warning where there is none (`run.deterministic`);
            else cuDNN times its convolutions at each new shape, of which a run has few.
    """
    if device.type != "cuda":
        return
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    if deterministic:
        # Read when cuBLAS is first used; without it two streams may share a workspace.
        env.default_cublas_workspace(":4096:8")


@contextlib.contextmanager
def no_cudnn_benchmark() -> Iterator[None]:
    """Inside, cuDNN chooses convolutions without timing, so that figures do not depend on which process makes them."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Autocast dtype for `train.precision`; None for fp32. Parameters and BatchNorm statistics stay fp32 always."""
    if precision == "bf16" or (precision == "auto" and prefers_bf16(device)):
        return torch.bfloat16
    return None


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Context of a network's forward.

    Args:
        device: where the network runs.
        dtype: from `autocast_dtype`; None computes in the tensors' own precision.
    """
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def no_autocast(device: torch.device) -> torch.autocast:
    """Context of what must keep its tensors' own precision whatever surrounds it: losses, pooling, attention maps."""
    return torch.autocast(device.type, enabled=False)
