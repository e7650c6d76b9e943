"""Labels at OpenImages size: preparing them, the label store, and label corrections.

    python benchmarks/bench_labels.py [--parts import store] [--json OUT] [--results DIR]
                                      [--images 9011219] [--labels 58783034] [--classes 9668]
                                      [--release DIR] [--rounds 3] [--corrections 1000000] [--epochs 3] [--batch 512]

Sizes default to the training set of OpenImages V7.

import  a made-up training file in the official format (2.7 GB; or the one that make_openimages.py wrote to --release)
        is read by pyarrow, which is the floor, and prepared by `spml-fast prepare openimages`, in turn, each as a
        process of its own. Goal: at most three times the mere reading, and at most 2 GB. A row goes into a table of
        --results.
store   labels are random (class ids evenly spread over a row, two in three positive). Reported are the bytes of the
        store and the time of a batch of rows with and without corrections; then, for each of some epochs of LL-Cp:
        time to collect the corrections step by step, to merge them when the epoch ends, to make and write their part
        of a checkpoint, and to read it back, with its bytes. One rank; other ranks add one gather.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import label_import
from benchmarks.kernel_report import commit, merge_csv
from benchmarks.machine import machine
from benchmarks.make_openimages import make_release
from spml_fast.core.outputs import add_json_option, json_output
from spml_fast.data.labels import UNKNOWN, LabelStore, SparseLabels, class_dtype


def random_labels(images: int, labels: int, classes: int) -> SparseLabels:
    """Partly known labels of that size; every row has at most twice labels / images of them."""
    rng = np.random.default_rng(0)
    counts = rng.integers(1, max(2, 2 * labels // images), images)
    indptr = np.zeros(images + 1, np.int64)
    np.cumsum(counts, out=indptr[1:])
    number = np.arange(indptr[-1]) - np.repeat(indptr[:-1], counts)
    step, first = classes // counts, rng.integers(0, classes // counts.max(), images)
    class_id = (np.repeat(first, counts) + number * np.repeat(step, counts)).astype(class_dtype(classes))
    return SparseLabels(indptr, class_id, (rng.random(len(number)) < 0.66).astype(np.int8), classes, UNKNOWN)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Wall seconds of one call, and its result."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def rows_seconds(store: LabelStore, batch: int, repeats: int = 20) -> float:
    """Median seconds of the codes of one batch."""
    generator = torch.Generator().manual_seed(0)
    indices = [torch.randint(len(store), (batch,), generator=generator) for _ in range(repeats)]
    return float(np.median([timed(partial(store.rows, index))[0] for index in indices]))


def epoch_of_corrections(store: LabelStore, number: int, batch: int, epoch: int, folder: Path) -> dict[str, Any]:
    """One epoch: as many calls of `correct` as there are steps, the merge, and the checkpoint's part.

    Args:
        store: the label store.
        number: corrections of the epoch.
        batch: samples per step.
        epoch: number of the epoch.
        folder: for the checkpoint.
    """
    rng = np.random.default_rng(epoch)
    steps = max(1, len(store) // batch)
    each = -(-number // steps)
    index = torch.from_numpy(rng.integers(0, len(store), (steps, each)))
    classes = torch.from_numpy(rng.integers(0, store.num_classes, (steps, each)))

    def collect() -> None:
        for step in range(steps):
            store.correct(index[step], classes[step], 1)

    row: dict[str, Any] = {"epoch": epoch, "steps": steps, "corrections": steps * each}
    row["collect_s"], _ = timed(collect)
    row["merge_s"], row["new"] = timed(store.commit)
    path = folder / "labels.pt"

    def save() -> None:
        torch.save(store.state_dict(), path)

    row["save_s"], _ = timed(save)
    row["checkpoint_bytes"] = path.stat().st_size
    row["load_s"], _ = timed(lambda: store.load_state_dict(torch.load(path)))
    row["total"] = store.num_corrections
    row["store_bytes"] = store.nbytes
    return row


def measure_import(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prepare label files beside the mere reading of them; print and return what it took."""
    made = args.release
    if made is None:
        made = folder / "release"
        make_release(
            made,
            "v7",
            images={"train": args.images},
            rows={"train": args.labels},
            classes=args.classes,
            other_classes=max(1, args.classes // 10),
        )
    row = label_import.measure(label_import.find_release(made), folder / "manifest", args.rounds)
    print("\n".join(label_import.sentences(row)), flush=True)
    if args.results is not None:
        facts = {k: v for k, v in machine(torch.device("cpu")).items() if k in ("cpu", "cores")}
        facts |= {"date": time.strftime("%Y-%m-%d"), "commit": commit()}
        merge_csv(args.results / "label_import.csv", [row | facts], key=("rows", "cpu", "cores"))
    return row


def measure_store(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The label store and its corrections; print and return what they took."""
    labels = random_labels(args.images, args.labels, args.classes)
    out: dict[str, Any] = {"images": len(labels), "classes": args.classes, "labels": len(labels.codes)}
    labels.save(folder / "known")
    del labels
    out["open_s"], store = timed(lambda: LabelStore(SparseLabels.load(folder / "known")))
    out["store_bytes"], out["rows_s"] = store.nbytes, rows_seconds(store, args.batch)
    out["largest_row_s"], out["largest_row"] = timed(lambda: store.max_row_count(1))
    print(f"{out['images']:,} images, {out['classes']:,} classes, {out['labels']:,} labels:", end=" ")
    print(f"{out['store_bytes'] / 1e6:.0f} MB, opened in {out['open_s']:.2f} s,", end=" ")
    print(f"{args.batch} rows in {1e3 * out['rows_s']:.1f} ms", flush=True)
    print(f"{'epoch':>5}{'corrections':>13}{'collect s':>11}{'merge s':>9}{'save s':>8}{'load s':>8}", end="")
    print(f"{'checkpoint MB':>15}{'in effect':>12}{'store MB':>10}")
    out["epochs"] = []
    for epoch in range(1, args.epochs + 1):
        row = epoch_of_corrections(store, args.corrections, args.batch, epoch, folder)
        out["epochs"].append(row)
        print(f"{epoch:5}{row['corrections']:13,}{row['collect_s']:11.2f}{row['merge_s']:9.2f}", end="")
        print(f"{row['save_s']:8.2f}{row['load_s']:8.2f}{row['checkpoint_bytes'] / 1e6:15.1f}", end="")
        print(f"{row['total']:12,}{row['store_bytes'] / 1e6:10.0f}", flush=True)
    out["rows_corrected_s"] = rows_seconds(store, args.batch)
    out["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{args.batch} rows with corrections in {1e3 * out['rows_corrected_s']:.1f} ms;", end=" ")
    print(f"peak memory of the process {out['peak_rss_bytes'] / 1e9:.1f} GB, labels and PyTorch included")
    return out


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json_option(parser)
    parser.add_argument("--parts", nargs="+", choices=["import", "store"], default=["import", "store"])
    parser.add_argument("--images", type=int, default=9_011_219)
    parser.add_argument("--labels", type=int, default=58_783_034)
    parser.add_argument("--classes", type=int, default=9668)
    parser.add_argument("--release", type=Path, help="what make_openimages.py --version v7 wrote; default: made anew")
    parser.add_argument("--rounds", type=int, default=3, help="of reading and preparing, in turn")
    parser.add_argument("--results", type=Path, help="folder of the table that a row is added to")
    parser.add_argument("--corrections", type=int, default=1_000_000, help="per epoch")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=512)
    args = parser.parse_args()
    out_file = json_output(args, "bench_labels")

    out: dict[str, Any] = {"machine": machine(torch.device("cpu"))}
    with tempfile.TemporaryDirectory() as name:
        if "import" in args.parts:
            out["import"] = measure_import(args, Path(name))
        if "store" in args.parts:
            out["store"] = measure_store(args, Path(name))
    if out_file is not None:
        out_file.write_json(out)


if __name__ == "__main__":
    main()
