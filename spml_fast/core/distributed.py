"""Collectives that also work in a single process, and where this process stands among the ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from spml_fast.core import env
from spml_fast.core.errors import UserError

T = TypeVar("T")
_barriers = 0
# Set by whoever watches the other ranks, when one of them has left with an error.
given_up = threading.Event()


def world_size() -> int:
    """Number of ranks; 1 when torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 when torch.distributed is not initialised."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def local_rank() -> int:
    """This process's rank on its machine, from the launcher's environment."""
    return env.local_rank()


def is_main() -> bool:
    """Whether this is rank 0, the one that writes files and prints."""
    return rank() == 0


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, out of place and without gradient; the tensor itself when there is one rank."""
    if world_size() == 1:
        return tensor
    out = tensor.detach().clone()
    dist.all_reduce(out)
    return out


def all_gather_equal(tensor: Tensor) -> Tensor:
    """Stack equal-shaped tensors of all ranks to [world, ...], without gradient."""
    if world_size() == 1:
        return tensor.detach()[None]
    source = tensor.detach().contiguous()
    parts = [torch.empty_like(source) for _ in range(world_size())]
    dist.all_gather(parts, source)
    return torch.stack(parts)


def all_gather_rows(tensor: Tensor) -> Tensor:
    """Concatenate tensors [n_r, ...] of all ranks along the first axis, in rank order; n_r may differ and be 0."""
    if world_size() == 1:
        return tensor
    count = torch.tensor([len(tensor)], device=tensor.device)
    counts = all_gather_equal(count).flatten().tolist()
    padded = tensor.new_zeros((max(counts), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    gathered = all_gather_equal(padded)
    return torch.cat([gathered[r, :n] for r, n in enumerate(counts)])


def near_equal_part(size: int, parts: int, number: int) -> tuple[int, int]:
    """First and one-past-last position of a near-equal contiguous part, as `np.array_split` cuts them."""
    base, extra = divmod(size, parts)
    start = number * base + min(number, extra)
    return start, start + base + (number < extra)


def part_of(total: int, rank: int) -> slice:
    """A rank's rows of a global batch of `total`, as the sampler cuts it."""
    return slice(*near_equal_part(total, world_size(), rank))


def all_gather_parts(tensor: Tensor, total: int) -> Tensor:
    """The rows [total, ...] of a global batch of which this rank has its part, without gradient and without a wait."""
    if world_size() == 1:
        return tensor.detach()
    sizes = [(part := part_of(total, rank)).stop - part.start for rank in range(world_size())]
    padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor.detach()
    gathered = all_gather_equal(padded)
    return torch.cat([gathered[rank, :size] for rank, size in enumerate(sizes)])


def store() -> Any:
    """The key-value store that the ranks met at."""
    return dist.distributed_c10d._get_default_store()


def barrier() -> None:
    """Wait for all ranks; for rank 0 without a time limit, since it may have work that only one rank does."""
    global _barriers
    if world_size() == 1:
        return
    _barriers += 1
    key, pause = f"spml_fast/barrier/{_barriers}", 0.001
    if is_main():
        store().set(key, "1")
    while not store().check([key]):
        if given_up.wait(pause):
            # Another rank has met an error and said so.
            raise SystemExit(1)
        pause = min(2 * pause, 0.05)
    dist.barrier()


def gather_rows(tensor: Tensor) -> Tensor:
    """As `all_gather_rows`, to rank 0 alone; other ranks get their own rows back.

    Rows are sent one rank at a time, so that rank 0 never holds a padded copy of everything.
    """
    if world_size() == 1:
        return tensor
    count = torch.tensor([len(tensor)], device=tensor.device)
    counts = all_gather_equal(count).flatten().tolist()
    source = tensor.detach().contiguous()
    if not is_main():
        if len(source):
            dist.send(source, 0)
        return tensor
    parts = [source]
    for other, number in enumerate(counts[1:], 1):
        part = source.new_empty((number, *source.shape[1:]))
        if number:
            dist.recv(part, other)
        parts.append(part)
    return torch.cat(parts)


def broadcast_text(text: str) -> str:
    """Rank 0's text on every rank."""
    if world_size() == 1:
        return text
    box = [text]
    dist.broadcast_object_list(box, 0)
    return str(box[0])


def from_main(compute: Callable[[], T]) -> T:
    """What rank 0 computes, on every rank (collective); a `UserError` there is raised on all of them."""
    box: list[Any] = [None, None]
    if is_main():
        try:
            box[0] = compute()
        except UserError as error:
            if world_size() == 1:
                raise
            box[1] = str(error)
    if world_size() > 1:
        dist.broadcast_object_list(box, 0)
    if box[1] is not None:
        raise UserError(box[1])
    result: T = box[0]
    return result


def gather_objects(value: T) -> list[T]:
    """The values of all ranks on every rank, in rank order (collective)."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
