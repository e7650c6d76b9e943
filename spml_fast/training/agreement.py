"""What ranks agree on between two updates, without waiting for each other or for a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from spml_fast.core import distributed


class Agreement:
    """The largest of every rank's numbers, an update later.

    Each update begins a reduction of a few numbers over gloo, on the host, and takes the outcome of the one that the
    update before began: it has run behind the update's computation, and no rank waits for a GPU. All ranks take the
    outcome of the same reduction, so they act at the same update. One rank has its own numbers at once.

    Args:
        size: how many numbers.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._group: dist.ProcessGroup | None = None
        if distributed.world_size() > 1:
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup)
            self._group = group
        self._work: dist.Work | None = None
        self._numbers = torch.zeros(size, dtype=torch.int64)

    def exchange(self, numbers: Sequence[int]) -> list[int]:
        """Begin to agree on these, and return what was agreed on those before them; zeros at first (collective)."""
        if self._group is None:
            return list(numbers)
        agreed = self._finish()
        self._numbers = torch.tensor(numbers, dtype=torch.int64)
        self._work = dist.all_reduce(self._numbers, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed

    def agree(self, numbers: Sequence[int]) -> list[int]:
        """Agree on these and wait for it (collective)."""
        before = self.exchange(numbers)
        return (
            list(numbers) if self._group is None else [max(a, b) for a, b in zip(before, self._finish(), strict=True)]
        )

    def _finish(self) -> list[int]:
        if self._work is None:
            return [0] * self.size
        self._work.wait()
        self._work = None
        return [int(n) for n in self._numbers.tolist()]

    def close(self) -> None:
        """Leave the group once everything is agreed on (collective)."""
        if self._group is not None:
            self._finish()
            dist.destroy_process_group(self._group)
            self._group = None
