"""Which rank sees which sample when: pure functions of (seed, epoch).

The order of an epoch depends on the seed and the epoch alone (and on the windows that it is shuffled within, if any,
and their batch size); ranks and accumulation steps take slices of the same global batch, so the number of samples done
and that batch size are all that a resume has to know.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spml_fast.core.distributed import near_equal_part
from spml_fast.core.errors import UserError

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Windows:
    """How an epoch is shuffled so that every rank reads the disk in long pieces.

    Blocks of consecutive samples are permuted and the sequence is cut into windows of whole batches. A window's
    sequence is cut again into as many lanes as a batch has samples, each lane is shuffled, and every batch of the
    window takes one sample of each lane, in the order of the lanes. A rank's slice of the batch is a run of lanes: its
    part of the window is a run of whole blocks, whatever the number of ranks, and no other rank reads them.

    Attributes:
        samples: of a window, at most; at least one batch.
        block: consecutive samples of a block.

    Raises:
        UserError: a block has no sample, or is larger than a window.
    """

    samples: int
    block: int

    def __post_init__(self) -> None:
        if not 1 <= self.block <= self.samples:
            raise UserError(
                f"data.shuffle_block is {self.block} and data.shuffle_window {self.samples}; a block needs 1 sample or "
                "more, and a window a block or more"
            )


@dataclass(frozen=True)
class MicroBatchIndex:
    """One rank's part of one micro-step.

    Attributes:
        index: int64 [n], n >= 1, sample indices within the split.
        global_size: samples of this micro-step over all ranks.
        update_size: samples of the whole optimizer update over all ranks and accumulation steps.
        offset: position of this rank's first sample within the global micro-step.
    """

    index: IntArray
    global_size: int
    update_size: int
    offset: int


@dataclass(frozen=True)
class EpochCut:
    """From where on the rest of an epoch is cut into batches, when training was resumed within it.

    Attributes:
        update: number of the first update that is left, such that the epoch ends at `updates_per_epoch`.
        samples: samples of the epoch's order that were trained on before.
        order_batch_size: batch size that made the epoch's order, which windows depend on.
    """

    update: int
    samples: int
    order_batch_size: int


class TrainSampler:
    """The training samples of one rank.

    Update u of an epoch takes rows [u * batch_size, (u + 1) * batch_size) of the epoch's permutation; its micro-step a
    takes the a-th of `accumulation` near-equal contiguous parts, and rank r the r-th near-equal part of that. The
    last, smaller batch is kept unless it has fewer than accumulation * world_size samples: then it is dropped,
    because no rank may get an empty micro-batch; with `drop_last` it is dropped always.

    Args:
        size: samples of the split.
        batch_size: samples of one optimizer update over all ranks and accumulation steps.
        accumulation: micro-steps of one update.
        world_size: ranks of the data-parallel group.
        rank: of this process in that group.
        seed: of the run.
        windows: shuffle within windows of blocks; None shuffles all samples at once.
        drop_last: drop the last, smaller batch.

    Attributes:
        updates_per_epoch: optimizer updates of one epoch.
        samples_per_epoch: samples that one epoch visits over all ranks.

    Raises:
        UserError: batch or split are too small to give every rank a sample in every micro-step, or the seed is out of
            range.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        accumulation: int = 1,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
        windows: Windows | None = None,
        drop_last: bool = False,
    ) -> None:
        if accumulation < 1 or world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"accumulation {accumulation}, world size {world_size}, rank {rank}")
        if not 0 <= seed < 2**63:
            raise UserError(f"run.seed is {seed}; it must be 0 or more and less than 2**63")
        smallest = accumulation * world_size
        for value, name in ((batch_size, "a batch"), (size, "a training split")):
            if value < smallest:
                raise UserError(
                    f"{name} of {value} samples cannot be shared by {world_size} ranks with {accumulation} accumulation"
                    f" steps; it needs {smallest} samples, or use fewer ranks or accumulation steps"
                )
        self.size, self.batch_size, self.accumulation = size, batch_size, accumulation
        self.world_size, self.rank, self.seed, self.windows = world_size, rank, seed, windows
        if drop_last and size < batch_size:
            raise UserError(
                f"train.drop_last leaves nothing of a training split of {size} samples, with train.batch_size "
                f"{batch_size}"
            )
        # Samples that a last, smaller batch must have to be kept.
        self._smallest = batch_size if drop_last else smallest
        full, rest = divmod(size, batch_size)
        self.updates_per_epoch = full + (rest >= self._smallest)
        self._cuts: dict[int, EpochCut] = {}
        self.samples_per_epoch = min(size, self.updates_per_epoch * batch_size)

    @property
    def largest_micro_batch(self) -> int:
        """Samples of the largest micro-batch of this rank."""
        update = min(self.size, self.batch_size)
        start, stop = near_equal_part(near_equal_part(update, self.accumulation, 0)[1], self.world_size, self.rank)
        return stop - start

    def _generator(self, epoch: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=np.array([self.seed, epoch], np.uint64)))

    def cut(self, epoch: int) -> EpochCut:
        """Where the batches of `epoch` are counted from: its start, unless it was resumed with `resume`."""
        return self._cuts.get(epoch, EpochCut(0, 0, self.batch_size))

    def resume(self, epoch: int, samples: int, order_batch_size: int) -> int:
        """Cut what is left of an epoch into batches of this sampler, whatever batch size came before.

        No sample comes twice and none is left out, but for an end that is too small for the ranks, as in every epoch.

        Args:
            epoch: the epoch that is resumed.
            samples: how many of its samples were trained on.
            order_batch_size: batch size that made its order.

        Returns:
            The update to resume at, for `epoch`: as many updates before the end as the rest takes.
        """
        full, rest = divmod(max(0, self.size - samples), self.batch_size)
        left = full + (rest >= self._smallest)
        self._cuts = {epoch: EpochCut(self.updates_per_epoch - left, samples, order_batch_size)}
        return self._cuts[epoch].update

    def samples_before(self, epoch: int, update: int) -> int:
        """Samples of an epoch that come before one of its updates, over all ranks."""
        cut = self.cut(epoch)
        return min(self.size, cut.samples + (update - cut.update) * self.batch_size)

    def permutation(self, epoch: int) -> IntArray:
        """Sample indices in the order of `epoch`, int64 [size]; the same on every rank."""
        generator = self._generator(epoch)
        if self.windows is None:
            return generator.permutation(self.size)
        order = self._blocks(generator)
        self.shuffle_windows(order, generator, self.cut(epoch).order_batch_size)
        return order

    def blocks(self, epoch: int) -> IntArray:
        """The sequence of blocks that the windows of `epoch` are cut from, as sample indices int64 [size]."""
        return self._blocks(self._generator(epoch))

    def _blocks(self, generator: np.random.Generator) -> IntArray:
        assert self.windows is not None
        block = self.windows.block
        starts = generator.permutation(np.arange(0, self.size, block))
        lengths = np.minimum(block, self.size - starts)
        # Position minus its block's first position, plus the block's first sample.
        return np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(self.size)

    def shuffle_windows(self, order: IntArray, generator: np.random.Generator, batch_size: int) -> None:
        """Shuffle a sequence of blocks, int64 [size], within its windows for that batch size, in place; see `Windows`.

        The same sequence, generator and batch size give the same order.
        """
        width = self._window_width(batch_size)
        for first in range(0, len(order), width):
            part = order[first : first + width]
            steps, rest = divmod(len(part), batch_size)
            # The last, smaller batch of an epoch takes the one sample more of the first `rest` lanes.
            longer = part[: rest * (steps + 1)].reshape(rest, steps + 1)
            lanes = part[rest * (steps + 1) :].reshape(batch_size - rest, steps)
            longer, lanes = generator.permuted(longer, axis=1), generator.permuted(lanes, axis=1)
            part[:] = np.concatenate([np.concatenate([longer[:, :steps], lanes]).T.ravel(), longer[:, steps]])

    def _window_width(self, batch_size: int) -> int:
        """Samples of a window of whole batches."""
        assert self.windows is not None
        return max(1, self.windows.samples // batch_size) * batch_size

    @property
    def updates_per_window(self) -> int:
        """Updates that one window lasts for."""
        if self.windows is None:
            return self.updates_per_epoch
        return self._window_width(self.batch_size) // self.batch_size

    def window(self, epoch: int, update: int) -> int | None:
        """Number of the window that an update of an epoch starts in; None without windows."""
        if self.windows is None:
            return None
        return self.samples_before(epoch, update) // self._window_width(self.cut(epoch).order_batch_size)

    def stand_in_row(self, epoch: int, update: int, step: int, place: int, attempt: int) -> int:
        """Position in an epoch's permutation of the sample that may stand in for another.

        It is that of the same place `attempt` updates later, round the epoch's end and never within the same update.
        Places of one update have different ones, so that no sample comes twice, unless an epoch is a single update.

        Args:
            epoch: the epoch.
            update: the update that the other one is in.
            step: its micro-step.
            place: its position in the micro-step over all ranks.
            attempt: from 1 on.
        """
        start = self.samples_before(epoch, update)
        row = start + near_equal_part(min(self.batch_size, self.size - start), self.accumulation, step)[0] + place
        if self.size <= self.batch_size:
            return (row + attempt) % self.size
        while attempt:
            row = (row + self.batch_size) % self.size
            attempt -= not start <= row < start + self.batch_size
        return row

    def epoch(self, epoch: int, start_update: int = 0) -> Iterator[list[MicroBatchIndex]]:
        """Yield the updates of `epoch` from `start_update` on, each a list of `accumulation` micro-batches."""
        order = self.permutation(epoch)
        for update in range(start_update, self.updates_per_epoch):
            first_row = self.samples_before(epoch, update)
            rows = order[first_row : first_row + self.batch_size]
            micro = []
            for step in range(self.accumulation):
                first, last = near_equal_part(len(rows), self.accumulation, step)
                start, stop = near_equal_part(last - first, self.world_size, self.rank)
                micro.append(MicroBatchIndex(rows[first + start : first + stop], last - first, len(rows), start))
            yield micro


@dataclass(frozen=True)
class EvalBatchIndex:
    """One rank's evaluation batch.

    Attributes:
        index: int64 [batch_size]; after the first `real` entries the last one is repeated.
        real: how many leading samples count; 0 in a surplus batch.
        global_size: real samples of this step over all ranks.
    """

    index: IntArray
    real: int
    global_size: int


class EvalSampler:
    """The evaluation samples of one rank: every sample once, in batches that do not depend on the world size.

    Batch j holds the samples [j * batch_size, (j + 1) * batch_size) and goes to rank j % world_size. All batches are
    padded to full size and all ranks get the same number of them, so that collectives in the forward stay in step;
    surplus batches count nothing and repeat sample 0.

    Args:
        size: samples of the split, at least 1.
        batch_size: samples of one batch of one rank.
        world_size: ranks of the data-parallel group.
        rank: of this process in that group.

    Raises:
        UserError: the split is empty.
    """

    def __init__(self, size: int, batch_size: int, world_size: int = 1, rank: int = 0) -> None:
        if size < 1:
            raise UserError("the split to evaluate has no samples; choose another one or prepare the data again")
        if batch_size < 1 or world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch size {batch_size}, world size {world_size}, rank {rank}")
        self.size, self.batch_size, self.world_size, self.rank = size, batch_size, world_size, rank
        self.batches = math.ceil(math.ceil(size / batch_size) / world_size)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[EvalBatchIndex]:
        width = self.batch_size
        for step in range(self.batches):
            first = (step * self.world_size + self.rank) * width
            real = max(0, min(width, self.size - first))
            index = np.arange(first, first + width, dtype=np.int64) if real else np.zeros(width, np.int64)
            np.minimum(index, self.size - 1, out=index)
            start = step * self.world_size * width
            yield EvalBatchIndex(index, real, min(self.size - start, self.world_size * width))
