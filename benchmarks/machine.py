"""The machine that figures are of, and what is installed on it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

import torch


def installed(module: str) -> bool:
    """Whether a module can be found. `nvidia` alone says nothing: parts of CUDA are packages in it too."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


# What makes processors of one name differ most, the best one first: flags of /proc/cpuinfo and what they are called.
_VECTORS = (
    ("amx_bf16", "AMX"),
    ("avx512_bf16", "AVX512-BF16"),
    ("avx512f", "AVX-512"),
    ("avx2", "AVX2"),
    ("bf16", "NEON with bf16"),
    ("asimd", "NEON"),
)


def processor(cpuinfo: str, otherwise: str) -> str:
    """Name of a processor with its best vector instructions: virtual machines call several generations by one name.

    Args:
        cpuinfo: text of /proc/cpuinfo.
        otherwise: name where that has none.
    """
    values: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        values.setdefault(key.strip(), value.strip())
    name = values.get("model name") or otherwise
    flags = (values.get("flags") or values.get("Features") or "").split()
    best = next((called for flag, called in _VECTORS if flag in flags), None)
    return name if best is None else f"{name} ({best})"


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware and versions that results are of; None for what there is not."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        cpu = processor(Path("/proc/cpuinfo").read_text(encoding="utf-8"), cpu)
    names = {"torchvision": "torchvision", "dali": "nvidia.dali", "pillow": "PIL"}
    versions = {n: importlib.import_module(m).__version__ if installed(m) else None for n, m in names.items()}
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        **versions,
    }
