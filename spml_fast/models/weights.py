"""Weights as safetensors."""

from __future__ import annotations

import json
import struct
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from spml_fast.core import distributed
from spml_fast.core.errors import UserError
from spml_fast.core.io import FileRecord, RecordedFile, atomic_write

# Names that safetensors gives to dtypes.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_weights(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> FileRecord:
    """Write tensors as safetensors, to the disk; the same tensors and metadata give the same bytes.

    The library's own writer puts the metadata in an order that differs between processes, and gives the file to its
    owner alone.

    Args:
        path: the file to make or replace.
        state: name -> tensor of any layout and device.
        metadata: what is said about them.

    Returns:
        Size and checksum.

    Raises:
        OSError: it cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    # Large elements first, so that every tensor is aligned.
    names = sorted(state, key=lambda name: (-state[name].element_size(), name))
    start = 0
    for name in names:
        tensor = state[name]
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file = RecordedFile(path)
    file.write(struct.pack("<Q", len(text)))
    file.write(text)
    for name in names:
        if state[name].numel():
            file.write(state[name].detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy())
    return file.record()


def save_weights(path: Path, module: nn.Module, metadata: dict[str, str]) -> None:
    """Write a module's weights as safetensors, whole or not at all (rank 0 only; parameters must be whole)."""
    if not distributed.is_main():
        return
    with atomic_write(path) as partial:
        write_weights(partial, module.state_dict(), metadata)


def damaged_weights(path: Path) -> str | None:
    """What is wrong with a safetensors file as far as its header tells; None for one that can be opened."""
    try:
        with safe_open(path, "pt"):
            return None
    except (OSError, SafetensorError) as error:
        return str(error)


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself. OSError or SafetensorError where it cannot be read."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a run's weights file. Raises `UserError` where it is missing or damaged."""
    try:
        return load_file(path), read_metadata(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); has the run finished an epoch?") from error


def load_weights(path: Path, module: nn.Module) -> dict[str, str]:
    """Load `save_weights`' file into a module of the same shape; returns the metadata.

    Raises:
        UserError: the file is missing, damaged, or belongs to another model.
    """
    state, metadata = read_weights(path)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        # The last line may list every tensor of a large model.
        reason = textwrap.shorten(str(error).splitlines()[-1], 300)
        raise UserError(f"{path} does not fit the model: {reason}") from error
    return metadata
