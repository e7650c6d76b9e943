"""How well `--data.shuffle window` mixes, against the global shuffle, on data that lie sorted by class on the disk.

    python benchmarks/bench_shuffle.py [--samples 200000] [--classes 80] [--batch-size 16] [--json OUT]

Sorted by class is the worst case: neighbours on the disk are similar. Each over some epochs:
    distance      between two neighbours on the disk, in the order of the epoch, median; a third of the data is perfect
    same batch    probability that two neighbours on the disk are in one batch, divided by that of a global shuffle
    same block    samples that have another sample of their block in the same batch, per cent
    batch         variance of how many samples a class has in a batch, divided by that of a global shuffle
    64 updates    the same for 64 consecutive updates
    reads         separate reads of 1,000 samples, by 1 rank and by one of 8 ranks
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from spml_fast.core.errors import run_command
from spml_fast.core.outputs import add_json_option, json_output
from spml_fast.data.sampler import TrainSampler, Windows

# Samples of a window, and of a block.
SETTINGS = [(1024, 64), (4096, 64), (8192, 16), (8192, 64), (8192, 256), (8192, 1024), (32768, 64), (32768, 256)]
STRETCH = 64


def spread(classes: npt.NDArray[np.int64], rows: int, num_classes: int) -> float:
    """Mean over the classes of the variance of their counts in runs of `rows` samples."""
    whole = len(classes) // rows * rows
    runs = np.repeat(np.arange(whole // rows), rows)
    counts = np.bincount(runs * num_classes + classes[:whole], minlength=whole // rows * num_classes)
    return float(counts.reshape(-1, num_classes).var(axis=0).mean())


def measure(sampler: TrainSampler, classes: npt.NDArray[np.int64], block: int, epochs: int) -> dict[str, float]:
    """What one sampler gives, not yet divided by what a global shuffle gives.

    Args:
        sampler: the sampler.
        classes: int64 [N], class of every sample.
        block: samples of a block.
        epochs: epochs to average over.
    """
    size, batch, num_classes = sampler.size, sampler.batch_size, int(classes.max()) + 1
    measured: list[dict[str, float]] = []
    for epoch in range(epochs):
        rows = sampler.permutation(epoch)
        position = np.empty(size, np.int64)
        position[rows] = np.arange(size)
        whole = size // batch * batch
        blocks = np.sort(rows[:whole].reshape(-1, batch) // block, axis=1)
        equal = blocks[:, 1:] == blocks[:, :-1]
        shared = np.zeros(blocks.shape, np.bool_)
        shared[:, 1:] |= equal
        shared[:, :-1] |= equal
        measured.append(
            {
                "distance": float(np.median(np.abs(np.diff(position)))),
                "same_batch": float((position[1:] // batch == position[:-1] // batch).mean()),
                "same_block": 100 * float(shared.mean()),
                "batch": spread(classes[rows], batch, num_classes),
                "stretch": spread(classes[rows], STRETCH * batch, num_classes),
            }
        )
    figures = {name: float(np.mean([entry[name] for entry in measured])) for name in measured[0]}
    return figures | {f"reads_{ranks}": reads(sampler, ranks) for ranks in (1, 8)}


def reads(sampler: TrainSampler, ranks: int) -> float:
    """Runs of samples that follow each other on the disk, for 1,000 samples of rank 0 of `ranks`."""
    first = TrainSampler(sampler.size, sampler.batch_size, 1, ranks, 0, sampler.seed, sampler.windows)
    together: dict[int, list[npt.NDArray[np.int64]]] = {}
    for update, micro in enumerate(first.epoch(0)):
        window = first.window(0, update)
        together.setdefault(update if window is None else window, []).append(micro[0].index)
    samples = [np.sort(np.concatenate(index)) for index in together.values()]
    pieces = sum(int((np.diff(index) > 1).sum()) + 1 for index in samples)
    return 1000 * pieces / sum(len(index) for index in samples)


def main() -> int:
    """Parse the command line, measure, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=16, help="over all ranks")
    parser.add_argument("--epochs", type=int, default=3)
    add_json_option(parser)
    args = parser.parse_args()
    out_file = json_output(args, "bench_shuffle")

    # Class sizes fall like 1 / rank, from the most frequent class to the rarest, as in real data.
    frequency = 1 / np.arange(1, args.classes + 1)
    edges = np.rint(np.cumsum(frequency / frequency.sum()) * args.samples).astype(np.int64)
    classes = np.searchsorted(edges, np.arange(args.samples), "right")
    print(f"{args.samples:,} samples of {args.classes} classes sorted by class, batches of {args.batch_size}")
    print(f"{'window':>8s}{'block':>7s}{'distance':>10s}{'same batch':>12s}{'same block':>12s}{'batch':>8s}", end="")
    print(f"{'64 updates':>12s}{'reads, 1':>10s}{'of 8':>7s}")
    rows = []
    base: dict[str, float] = {}
    for setting in [None, *SETTINGS]:
        windows = None if setting is None else Windows(*setting)
        block = 64 if windows is None else windows.block
        sampler = TrainSampler(args.samples, args.batch_size, windows=windows)
        figures = measure(sampler, classes, block, args.epochs)
        base = base or figures
        for name in ("same_batch", "batch", "stretch"):
            figures[f"{name}_ratio"] = figures[name] / base[name]
        rows.append({"window": setting and setting[0], "block": setting and setting[1], **figures})
        print(
            f"{setting[0] if setting else 'global':>8}{setting[1] if setting else '':>7}{figures['distance']:>10,.0f}"
            f"{figures['same_batch_ratio']:>12.1f}{figures['same_block']:>12.2f}{figures['batch_ratio']:>8.2f}"
            f"{figures['stretch_ratio']:>12.2f}{figures['reads_1']:>10.1f}{figures['reads_8']:>7.1f}",
            flush=True,
        )
    if out_file is not None:
        out_file.write_json({"arguments": {k: str(v) for k, v in vars(args).items()}, "rows": rows})
    return 0


if __name__ == "__main__":
    run_command(main)
