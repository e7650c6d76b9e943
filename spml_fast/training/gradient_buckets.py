"""Gradients averaged over ranks while the backward still computes, for weights that every rank holds (ZeRO stage 0).

DeepSpeed averages them when the backward is over, and nothing computes meanwhile. Here parameters stand in buckets in
the order in which a network is defined, and a bucket's sum over ranks begins as soon as its last gradient is there, the
output side first. Buckets begin in the same order on every rank. Method: Li et al., "PyTorch Distributed", VLDB 2020.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from spml_fast.core.errors import UserError

# Bytes of gradients in a bucket: large enough that a network's start-up time is small beside them.
BUCKET_BYTES = 25 << 20
# Of the one nearest to the images: nothing is left to compute when it begins.
LAST_BUCKET_BYTES = 1 << 20
# What to do where gradients cannot be averaged here.
ELSE = "set deepspeed.overlap_gradients false, so that gradients are averaged after the backward"
# Elements at whose multiples gradients begin in a bucket, for kernels that load several at once.
ALIGNMENT = 16


class Reduce(Protocol):
    """Begins the sum of a tensor over ranks, in place."""

    def __call__(self, tensor: Tensor, *, async_op: bool) -> Any:
        """Returns what waits for the sum (`wait()`)."""


@dataclass(eq=False)
class Bucket:
    """Parameters whose gradients travel together.

    Attributes:
        parameters: of one dtype on one device.
        offsets: first element of each one's gradient in the buffer.
        size: elements of the buffer.
        missing: parameters without a gradient so far, by id.
        buffer: [size], the gradients of this backward, once all of them are there.
        work: the sum over ranks that was begun.
    """

    parameters: list[nn.Parameter]
    offsets: list[int]
    size: int
    missing: set[int] = field(default_factory=set)
    buffer: Tensor | None = None
    work: Any = None

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Each gradient's place in a buffer, in the memory layout of its parameter."""
        return [
            buffer.as_strided(p.shape, p.stride(), offset)
            for p, offset in zip(self.parameters, self.offsets, strict=True)
        ]


def deal(parameters: Iterable[nn.Parameter], limit: int, last: int) -> list[Bucket]:
    """Buckets in the order in which a backward fills them.

    Args:
        parameters: in the order in which the network is defined.
        limit: bytes after which a bucket takes no more.
        last: the same for the last bucket, that of the first parameters.
    """
    groups: list[list[nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        alike = groups and (groups[-1][0].dtype, groups[-1][0].device) == (parameter.dtype, parameter.device)
        if not alike or room <= 0:
            room = limit if groups else last
            groups.append([])
        groups[-1].append(parameter)
        room -= parameter.numel() * parameter.element_size()
    buckets = []
    for group in reversed(groups):
        offsets, size = [], 0
        for parameter in group:
            offsets.append(size)
            size += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        buckets.append(Bucket(group, offsets, size))
    return buckets


class GradientBuckets:
    """Averages the gradients of parameters over ranks, bucket by bucket, during `averaged`.

    The mean is the sum over ranks times 1 / ranks, as DeepSpeed's: with two ranks both give the same bits. A gradient
    is afterwards a view of its bucket's buffer, so that nothing is copied back.

    Args:
        parameters: those that train, dense in memory, the same on every rank.
        reduce: begins a sum over ranks.
        ranks: how many there are.
        limit: bytes of a bucket.
        last: bytes of the bucket nearest to the images.

    Raises:
        UserError: a parameter is not dense; within `averaged`, a backward reaches one twice (checkpointing that enters
            the backward again).
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        reduce: Reduce,
        ranks: int,
        limit: int = BUCKET_BYTES,
        last: int = LAST_BUCKET_BYTES,
    ) -> None:
        chosen = [parameter for parameter in parameters if parameter.requires_grad]
        if any(torch.empty_like(p, device="meta").stride() != p.stride() for p in chosen):
            raise UserError(f"a parameter is a part of a larger tensor in memory; {ELSE}")
        self._reduce, self._factor = reduce, 1.0 / ranks
        self.buckets = deal(chosen, limit, last)
        self._of = {id(parameter): bucket for bucket in self.buckets for parameter in bucket.parameters}
        self._active = False
        # Buckets of this backward whose sums have begun.
        self._begun = 0
        self._handles = [parameter.register_post_accumulate_grad_hook(self._take) for parameter in chosen]

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Around the backward that completes the gradients of an update; after it they are means over ranks.

        A parameter that the backward does not reach has a gradient of zeros then, as DeepSpeed gives it: optimizers
        pass over those without one, and it may have had one on another rank.
        """
        for bucket in self.buckets:
            bucket.missing = {id(parameter) for parameter in bucket.parameters}
        self._begun = 0
        self._active = True
        try:
            yield
            self.finish()
        finally:
            self._active = False
            for bucket in self.buckets:
                bucket.buffer = bucket.work = None

    def finish(self) -> None:
        """Begin the sums that have not begun, wait for all, and divide."""
        for bucket in self.buckets[self._begun :]:
            self._begin(bucket)
        for bucket in self.buckets:
            assert bucket.buffer is not None
            bucket.work.wait()
            bucket.buffer.mul_(self._factor)

    def close(self) -> None:
        """Leave the parameters alone from now on."""
        for handle in self._handles:
            handle.remove()

    def _take(self, parameter: Tensor) -> None:
        """A parameter has its gradient."""
        if not self._active:
            return
        bucket = self._of[id(parameter)]
        if id(parameter) not in bucket.missing:
            raise UserError(f"a parameter got a second gradient within a backward; {ELSE}")
        bucket.missing.remove(id(parameter))
        while self._begun < len(self.buckets) and not self.buckets[self._begun].missing:
            self._begin(self.buckets[self._begun])

    @torch.no_grad()
    def _begin(self, bucket: Bucket) -> None:
        """Begin the sum of a bucket."""
        first = bucket.parameters[0]
        buffer = torch.empty(bucket.size, dtype=first.dtype, device=first.device)
        places: list[Tensor] = []
        gradients: list[Tensor] = []
        for parameter, view in zip(bucket.parameters, bucket.views(buffer), strict=True):
            if parameter.grad is None:
                view.zero_()
            else:
                places.append(view)
                gradients.append(parameter.grad)
            parameter.grad = view
        if places:
            torch._foreach_copy_(places, gradients)
        bucket.buffer, bucket.work = buffer, self._reduce(buffer, async_op=True)
        self._begun += 1
