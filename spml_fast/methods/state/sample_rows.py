"""State of one row per training sample, spread over ranks: rank r keeps the rows of samples r, r + W, r + 2 W, ...

Methods that keep something for every sample hold their rank's rows only, look up a micro-step's rows together (every
rank learns them from their owners), and hand their rows to the checkpoint in a file of each rank's own, so that neither
memory nor files hold anything twice. A checkpoint can be read by any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spml_fast.core import distributed
from spml_fast.core.errors import UserError


def owned_count(samples: int) -> int:
    """Rows that this rank keeps of so many samples."""
    return -(-(samples - distributed.rank()) // distributed.world_size()) if samples > distributed.rank() else 0


def owned(index: Tensor) -> Tensor:
    """Which samples' rows this rank keeps, bool [n]."""
    return index % distributed.world_size() == distributed.rank()


def place(index: Tensor) -> Tensor:
    """Where the owner of each sample keeps its row, int64 [n]."""
    return index // distributed.world_size()


def gather_batch(index: Tensor, global_size: int) -> tuple[Tensor, Tensor]:
    """Samples of the whole micro-step on every rank (collective).

    Args:
        index: int64 [n], this rank's samples; ranks differ by one sample at most.
        global_size: samples of all ranks.

    Returns:
        int64 [global_size] in rank order, and int64 [n], where this rank's samples stand in it.
    """
    world = distributed.world_size()
    if world == 1:
        return index, torch.arange(len(index), device=index.device)
    # The shorter ones are padded, and nothing is read back unless some are.
    longest = -(-global_size // world)
    padded = index.new_full((longest,), -1)
    padded[: len(index)] = index
    everything = distributed.all_gather_equal(padded).flatten()
    own = torch.arange(len(index), device=index.device) + longest * distributed.rank()
    if len(everything) == global_size:
        return everything, own
    real = everything >= 0
    return everything[real], (real.cumsum(0) - 1)[own]


def from_owners(rows: Tensor, index: Tensor) -> Tensor:
    """Rows [n, C] of samples that every rank asked for alike, each taken from its owner (collective).

    Args:
        rows: [n, C] on every rank; only those of owned samples count.
        index: int64 [n], equal on all ranks.
    """
    if distributed.world_size() == 1:
        return rows
    kept = owned(index).view(-1, *[1] * (rows.ndim - 1))
    return distributed.all_reduce_sum(torch.where(kept, rows, torch.zeros((), dtype=rows.dtype, device=rows.device)))


def reshard(rank_rows: Sequence[Tensor], samples: int) -> Tensor:
    """This rank's rows out of those that the ranks of another run saved, on the CPU.

    Args:
        rank_rows: one tensor per rank of the run that saved them, rows in the order of that rank's samples.
        samples: N.

    Raises:
        UserError: the run that saved them had another number of samples.
    """
    saved = sum(len(rows) for rows in rank_rows)
    if saved != samples:
        raise UserError(
            f"the checkpoint's method keeps a row for each of {saved:,} images, but the training split has "
            f"{samples:,}; resume with the data set that the run began with"
        )
    own = torch.arange(distributed.rank(), samples, distributed.world_size())
    out = rank_rows[0].new_empty((len(own), *rank_rows[0].shape[1:]))
    for source, rows in enumerate(rank_rows):
        from_source = own % len(rank_rows) == source
        out[from_source] = rows[own[from_source] // len(rank_rows)]
    return out
