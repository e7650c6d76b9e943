"""Class-balanced sampling: images of rare classes come more often.

Repeat-factor sampling:

    f_c = fraction of the training images with an observed positive of class c
    r_c = max(1, sqrt(t / f_c))            t: classes in a smaller fraction of the images are repeated
    r_i = max of r_c over the observed positives of image i, 1 without any

An image comes r_i times an epoch on average, at least once. Where the released code rounds every r_i at random by
itself, so that epochs differ in length, here one random offset rounds the running sum (systematic sampling): every
image comes floor(r_i) or ceil(r_i) times with the same mean, and all epochs have the same number of samples,
ceil(sum r_i), which schedules need. For that the r_i are stretched by less than one sample over the epoch.

Source: Gupta, Dollar and Girshick, "LVIS: A Dataset for Large Vocabulary Instance Segmentation", CVPR 2019;
Madow, "On the Theory of Systematic Sampling, II", 1949; docs/sources.md#repeat-factor.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from spml_fast.core.errors import UserError
from spml_fast.data.sampler import IntArray, TrainSampler, Windows
from spml_fast.data.sparse_labels import POSITIVE, SparseLabels

# Rows handled at a time.
_ROWS = 1 << 20
# Gives other random numbers than `TrainSampler.permutation` draws for the same seed and epoch.
_STREAM = np.uint64(1 << 63)


def repeat_factors(labels: SparseLabels, threshold: float) -> npt.NDArray[np.float32]:
    """r_i of every image, as in the module's docstring.

    Args:
        labels: observed labels of the training split; unlisted entries are no positives.
        threshold: t, in 0..1.

    Returns:
        float32 [N], at least 1.

    Raises:
        UserError: t is no fraction.
    """
    if not 0 < threshold <= 1:
        raise UserError(f"train.repeat_threshold is {threshold}; it is a fraction of the images, above 0 and at most 1")
    fraction = labels.class_counts(POSITIVE) / max(len(labels), 1)
    by_class = np.maximum(1.0, np.sqrt(threshold / np.maximum(fraction, np.finfo(np.float64).tiny)))
    factors = np.ones(len(labels), np.float32)
    for start in range(0, len(labels), _ROWS):
        bounds = np.asarray(labels.indptr[start : start + _ROWS + 1])
        entries = slice(int(bounds[0]), int(bounds[-1]))
        values = np.where(labels.codes[entries] == POSITIVE, by_class[labels.classes[entries]], 1.0)
        filled = np.flatnonzero(np.diff(bounds))
        if len(filled):
            factors[start + filled] = np.maximum.reduceat(values, bounds[filled] - bounds[0])
    return factors


class RepeatFactorSampler(TrainSampler):
    """Training samples of which sample i comes factors[i] times per epoch on average; otherwise as `TrainSampler`.

    The order is that of `TrainSampler`, every sample repeated in its place, and shuffled again (within windows, where
    there are some), so that repeats do not follow each other. It depends on factors, seed and epoch alone. Flips and
    other augmentation depend on epoch and sample, so the repeats of one epoch look the same.

    Args:
        factors: float [N], at least 1, one per sample.
        size: N.
        batch_size: as in `TrainSampler`.
        accumulation: as in `TrainSampler`.
        world_size: as in `TrainSampler`.
        rank: as in `TrainSampler`.
        seed: as in `TrainSampler`.
        windows: as in `TrainSampler`.
        drop_last: as in `TrainSampler`.

    Attributes:
        size: samples of an epoch, ceil(sum of factors).
    """

    def __init__(
        self,
        factors: npt.NDArray[np.floating],
        size: int,
        batch_size: int,
        accumulation: int = 1,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
        windows: Windows | None = None,
        drop_last: bool = False,
    ) -> None:
        if factors.shape != (size,) or (size and factors.min() < 1):
            raise ValueError(f"factors must be [{size}] and at least 1, not {factors.shape}")
        self._unrepeated = TrainSampler(size, batch_size, accumulation, world_size, rank, seed, windows)
        total = float(factors.sum(dtype=np.float64))
        length = math.ceil(total)
        super().__init__(length, batch_size, accumulation, world_size, rank, seed, windows, drop_last)
        self._factors, self._stretch = factors, length / total

    def permutation(self, epoch: int) -> IntArray:
        """Sample indices in the order of `epoch`, int64 [size], some of them more than once; the same on every rank."""
        order = self._unrepeated.permutation(epoch) if self.windows is None else self._unrepeated.blocks(epoch)
        generator = np.random.Generator(np.random.Philox(key=np.array([self.seed, epoch], np.uint64) ^ _STREAM))
        ends = np.cumsum(self._factors[order], dtype=np.float64) * self._stretch
        ends[-1] = self.size
        totals: IntArray = np.floor(ends + generator.random()).astype(np.int64)
        counts = np.concatenate([totals[:1], totals[1:] - totals[:-1]])
        order = np.repeat(order, counts)
        if self.windows is None:
            generator.shuffle(order)
        else:
            self.shuffle_windows(order, generator, self.cut(epoch).order_batch_size)
        return order
