"""Weights as safetensors."""

from __future__ import annotations

import textwrap
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from spml_fast.core import distributed
from spml_fast.core.errors import UserError
from spml_fast.core.io import atomic_write


def save_weights(path: Path, module: nn.Module, metadata: dict[str, str]) -> None:
    """Write a module's weights as safetensors, whole or not at all (rank 0 only; parameters must be whole)."""
    if not distributed.is_main():
        return
    state = {k: v.detach().to("cpu").contiguous() for k, v in module.state_dict().items()}
    with atomic_write(path) as partial:
        save_file(state, partial, metadata=metadata)


def load_weights(path: Path, module: nn.Module) -> dict[str, str]:
    """Load `save_weights`' file into a module of the same shape; returns the metadata.

    Raises:
        UserError: the file is missing, damaged, or belongs to another model.
    """
    try:
        state = load_file(path)
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); has the run finished an epoch?") from error
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        # The last line may list every tensor of a large model.
        reason = textwrap.shorten(str(error).splitlines()[-1], 300)
        raise UserError(f"{path} does not fit the model: {reason}") from error
    return metadata
