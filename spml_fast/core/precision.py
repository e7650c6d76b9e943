"""Autocast and cuDNN policy: in which precision, and by which algorithms, a run computes."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator

import torch

from spml_fast.core import env


def has_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16: GPUs from sm_80, CPUs with AVX512-BF16 or AMX, ARM's with BF16.

    Others compute in bf16 too, by converting every operand, which is never faster than fp32.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if platform.machine().lower() in ("aarch64", "arm64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def prefers_bf16(device: torch.device) -> bool:
    """What `auto` means where nothing was measured: bf16 on GPUs from sm_80 and on CPUs with AMX.

    A training decides by measuring on a CPU (`training/precision_choice.py`) and keeps what it found in its
    config.yaml; `auto` stands in those of runs before 0.2.0 alone.
    """
    if device.type == "cuda":
        return has_bf16(device)
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


def inference_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """As `autocast_dtype`, of a network that is trained, which may be used on another machine than it was trained on.

    Where there are no instructions for bf16 it computes in fp32: emulated convolutions would take many times as long.
    """
    dtype = autocast_dtype(precision, device)
    return dtype if dtype is None or has_bf16(device) else None


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
