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


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware and versions that results are of; None for what there is not."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    names = {"torchvision": "torchvision", "dali": "nvidia.dali", "pillow": "PIL"}
    versions = {n: importlib.import_module(m).__version__ if installed(m) else None for n, m in names.items()}
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        **versions,
    }
