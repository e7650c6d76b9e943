"""How an op is registered with PyTorch: one function, so that no op forgets the device that its tensors are on.

Triton launches on the current CUDA device, and a custom op does not change it: with cuda:0 current, a kernel for
tensors on cuda:1 would run on the wrong card, where it reads foreign memory or crashes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def device_guard(name: str, values: tuple[Any, ...]) -> contextlib.AbstractContextManager[Any]:
    """Makes the device that the tensors among an op's arguments are on the current one.

    Raises:
        ValueError: tensors on different devices; a kernel would read addresses of the other.
    """
    tensors = [value for value in values if isinstance(value, Tensor)]
    device = tensors[0].device
    for tensor in tensors:
        if tensor.device != device:
            raise ValueError(f"{name}: its tensors are on {device} and {tensor.device}; move them to one device")
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def define(name: str) -> Callable[[Callable[..., Any]], torch._library.custom_ops.CustomOpDef]:
    """`torch.library.custom_op` for an op that changes none of its arguments, with `device_guard` around its function.

    Args:
        name: of the op, `spml::...`.
    """

    def register(function: Callable[..., Any]) -> torch._library.custom_ops.CustomOpDef:
        # The schema is that of the function itself; the wrapper's annotations would be looked up in this file.
        schema = torch.library.infer_schema(function, mutates_args=())

        @functools.wraps(function)
        def guarded(*values: Any) -> Any:
            with device_guard(name, values):
                return function(*values)

        return torch.library.custom_op(name, guarded, mutates_args=(), schema=schema)

    return register
