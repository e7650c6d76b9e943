"""What to do when memory runs out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from spml_fast.core.config import Config
from spml_fast.core.errors import UserError, is_out_of_memory


def memory_advice(config: Config, on_gpu: bool) -> str:
    """The settings that lower the memory of a run, each with its value now.

    Args:
        config: the run's.
        on_gpu: the memory of a GPU ran out, not that of the host.
    """
    train, model, data = config.train, config.model, config.data
    ways = [f"lower train.batch_size ({train.batch_size})", f"raise train.accumulation ({train.accumulation})"]
    ways += [
        f"lower data.image_size ({data.image_size})",
        f"in evaluation lower eval.batch_size ({config.eval.batch_size})",
    ]
    if not model.grad_checkpointing:
        ways.append("set model.grad_checkpointing true")
    if on_gpu and train.precision == "fp32":
        ways.append("set train.precision bf16")
    if config.deepspeed.zero_stage == 0:
        ways.append("with several ranks set deepspeed.zero_stage 1")
    if data.prefetch > 1:
        ways.append(f"lower data.prefetch ({data.prefetch})")
    if data.shuffle == "window":
        ways.append(f"lower data.shuffle_window ({data.shuffle_window})")
    return ", ".join(ways[:-1]) + f", or {ways[-1]}"


@contextlib.contextmanager
def explain_out_of_memory(config: Config, device: torch.device) -> Iterator[None]:
    """Inside, running out of memory is a `UserError` that says which settings to lower.

    Args:
        config: the run's.
        device: what the run computes on.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        on_gpu = device.type == "cuda" and "CPU" not in str(error) and not isinstance(error, MemoryError)
        where = f"the memory of {device}" if on_gpu else "this machine's memory"
        lines = [line.strip() for line in str(error).splitlines()]
        # DALI wraps the line that says it into others.
        telling = (line for line in lines if is_out_of_memory(RuntimeError(line)))
        said = next(telling, lines[0] if lines else type(error).__name__)
        raise UserError(f"{where} ran out ({said}); {memory_advice(config, on_gpu)}") from error
