"""Images per second and processor time of the loaders, against the usual ways, in one run on one machine.

    python benchmarks/bench_input.py [--images DIR] [--image-size 448] [--batch-size 16] [--json OUT] [--results DIR]
    python benchmarks/bench_input.py --quick      a look at everything in a minute: few images, one round

Loaders, each with the same decoding threads (or workers):
    spml_fast      spml_fast.data.loader, from files
    shards         the same, with the images in tar shards
    dali_readers   DALI with readers.file, random numbers and RandAugment of DALI's own
    pil            torchvision transforms on Pillow images in a torch DataLoader with worker processes, always as the
                   papers have it: every image decoded, RandAugment of the strong view on the image in its own size
A row is a view with an option of ours: `resized` has data.strong_from resized, `reduced` data.decode reduced (which
wants images twice as large as the view: --image-size 224 for those of 640 x 480), `cached` data.cache, `kept`
data.keep_decoded (the others decode every image in every epoch, as larger sets have to). The loaders of a row take
turns, and its figures are medians over the rounds. Processor time, of all threads and workers, says more
than images per second where other programs use the machine. First the views are compared with Pillow's and
torchvision's; wrong views are not timed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.kernel_report import commit, merge_csv
from benchmarks.machine import machine
from spml_fast.core.config import DataConfig
from spml_fast.core.errors import UserError, run_command
from spml_fast.core.outputs import add_json_option, json_output
from spml_fast.data.decoded_images import room_for
from spml_fast.data.loader import EvalLoader, TrainLoader
from spml_fast.data.manifest import Split
from spml_fast.prepare.pack import PackOptions, pack
from tests.support.pil import ReferenceViews, make_split, photo

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MODES: dict[str, tuple[str, ...]] = {"eval": ("eval",), "weak": ("weak",), "weak+strong": ("weak", "strong")}
FIGURES = ("images_per_second", "cpu_ms_per_image", "speed_over_pil", "cpu_over_pil")
# A row of a table is replaced by a new one with the same of these.
KEY = ("row", "loader", "images", "image_size", "cpu", "cores", "gpu")


@dataclass(frozen=True)
class Row:
    """What is timed against each other.

    Attributes:
        mode: the views, of `MODES`.
        options: of the `data` section, for our loaders.
        loaders: methods of `Loaders`.
    """

    mode: str
    options: dict[str, Any]
    loaders: tuple[str, ...]


def rows(cache: Path) -> dict[str, Row]:
    """All rows by name; caches go to the folder `cache`."""
    plain, ours = ("spml_fast", "shards", "dali_readers", "pil"), ("spml_fast", "pil")
    resized, cached, reduced = {"strong_from": "resized"}, {"cache": str(cache)}, {"decode": "reduced"}
    kept = {"keep_decoded": 1e3}
    return {
        **{mode: Row(mode, {}, plain) for mode in MODES},
        "weak+strong resized": Row("weak+strong", resized, ours),
        "eval reduced": Row("eval", reduced, ours),
        "weak reduced": Row("weak", reduced, ours),
        "weak+strong resized reduced": Row("weak+strong", {**resized, **reduced}, ours),
        **{f"{mode} kept": Row(mode, kept, ours) for mode in MODES},
        "eval cached": Row("eval", cached, ours),
        "weak cached": Row("weak", cached, ours),
        "weak+strong resized cached": Row("weak+strong", {**resized, **cached}, ours),
    }


def cpu_seconds() -> float:
    """Processor time of this process and the workers that it has started."""
    total, tick = time.process_time(), os.sysconf("SC_CLK_TCK")
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / tick
    return total


# Largest mean distance in grey levels from Pillow's and torchvision's views.
ALLOWED = {"eval": 1.0, "weak": 1.0, "strong": 1.5}


def images(folder: Path | None, count: int, scratch: Path) -> Split:
    """The images to load: the first of a folder, or generated ones of 640 x 480."""
    if folder is None:
        root, names = scratch, [f"{i}.jpg" for i in range(count)]
        for i, name in enumerate(names):
            photo(i, 640, 480).save(root / name, quality=90)
    else:
        root = folder.resolve()
        names = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
        if not names:
            raise UserError(f"{folder} has no JPEG images; give another --images")
        names = names[:count]
    return make_split(scratch / "manifest", root, names)


class Loaders:
    """One set of images, and the loaders to compare.

    Each loader is a method that takes the mode and options of the `data` section and returns a function of the epoch,
    which loads one epoch and yields the number of images of every batch.

    Args:
        split: the images as files.
        config: the `data` section.
        batch_size: images of a batch.
        device: where the views are made.
        packed: the images in shards.
    """

    def __init__(self, split: Split, config: DataConfig, batch_size: int, device: torch.device, packed: Split) -> None:
        self.split, self.config, self.batch_size, self.device = split, config, batch_size, device
        self.packed = packed

    def spml_fast(self, mode: str, **options: Any) -> Callable[[int], Iterator[int]]:
        """Our loaders, from files."""
        return self._ours(self.split, mode, options)

    def shards(self, mode: str, **options: Any) -> Callable[[int], Iterator[int]]:
        """Our loaders, from shards."""
        return self._ours(self.packed, mode, options)

    def _ours(self, split: Split, mode: str, changes: dict[str, Any]) -> Callable[[int], Iterator[int]]:
        options: dict[str, Any] = {"batch_size": self.batch_size, "device": self.device, "mean": MEAN, "std": STD}
        config = replace(self.config, **changes)
        if mode == "eval":
            evaluation = EvalLoader(split, config, decoded=room_for(split, config), **options)
            return lambda epoch: (views.real for views in evaluation)
        train = TrainLoader(split, config, views=MODES[mode], accumulation=1, seed=0, **options)
        return lambda epoch: (views.real for update in train.epoch(epoch) for views in update)

    def dali_readers(self, mode: str, **_: Any) -> Callable[[int], Iterator[int]]:
        """DALI with its own reader and RandAugment."""
        from nvidia.dali import fn, pipeline_def, types
        from nvidia.dali.auto_aug import rand_augment
        from nvidia.dali.plugin.base_iterator import LastBatchPolicy
        from nvidia.dali.plugin.pytorch import DALIGenericIterator

        gpu = self.device.type == "cuda"
        side, config, split = self.config.image_size, self.config, self.split
        files = [split.path(i) for i in range(len(split))]

        @pipeline_def(enable_conditionals=True)
        def graph() -> Any:
            encoded, index = fn.readers.file(
                files=files, labels=list(range(len(files))), shuffle_after_epoch=mode != "eval", name="reader"
            )
            image = fn.decoders.image(encoded, device="mixed" if gpu else "cpu", output_type=types.RGB)
            outputs = []
            for view in MODES[mode]:
                out = image
                if view == "strong":
                    out = rand_augment.rand_augment(
                        out,
                        n=config.randaugment_ops,
                        m=config.randaugment_magnitude,
                        shape=fn.peek_image_shape(encoded),
                        fill_value=0,
                        interp_type=types.INTERP_NN,
                        max_translate_rel=150 / 331,
                    )
                out = fn.resize(out, size=[side, side], interp_type=types.INTERP_TRIANGULAR, antialias=True)
                outputs.append(
                    fn.crop_mirror_normalize(
                        out,
                        mirror=0 if view == "eval" else fn.random.coin_flip(probability=config.hflip),
                        mean=[255 * m for m in MEAN],
                        std=[255 * s for s in STD],
                        output_layout="HWC",
                        dtype=types.FLOAT,
                    )
                )
            return (*outputs, index)

        pipe = graph(
            batch_size=self.batch_size,
            num_threads=config.threads,
            device_id=(self.device.index or 0) if gpu else None,
            prefetch_queue_depth=config.prefetch,
        )
        names = [*MODES[mode], "index"]
        iterator = DALIGenericIterator(
            pipe, names, reader_name="reader", last_batch_policy=LastBatchPolicy.PARTIAL, auto_reset=True
        )
        return lambda epoch: (len(batch[0]["index"]) for batch in iterator)

    def pil(self, mode: str, **_: Any) -> Callable[[int], Iterator[int]]:
        """torchvision transforms on Pillow images, in worker processes."""
        data = ReferenceViews(self.split, self.config, MODES[mode], mean=MEAN, std=STD)
        loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
            data,
            batch_size=self.batch_size,
            shuffle=mode != "eval",
            num_workers=self.config.threads,
            persistent_workers=True,
            pin_memory=self.device.type == "cuda",
        )

        def epoch(_: int) -> Iterator[int]:
            for batch in loader:
                for name in MODES[mode]:
                    # Channels last is what the model is fed.
                    batch[name].to(self.device, memory_format=torch.channels_last, non_blocking=True)
                yield len(batch["index"])

        return epoch

    def rate(self, batches: Iterator[int]) -> tuple[float, float]:
        """Images per second, and milliseconds of processor time per image.

        The batches that may have been made ahead of the epoch are left out of the first, and count in the second:
        about as many are made ahead of the next one.
        """
        cpu, ahead = cpu_seconds(), 0
        for _ in range(self.config.prefetch + 1):
            ahead += next(batches)
        start = time.perf_counter()
        count = sum(batches)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        return count / seconds, 1000 * (cpu_seconds() - cpu) / (count + ahead)

    def check(self, count: int = 24) -> dict[str, float]:
        """Mean distance in grey levels of our views from Pillow's and torchvision's, over some images."""
        distance: dict[str, list[float]] = {}
        options: dict[str, Any] = {"batch_size": self.batch_size, "device": self.device, "mean": MEAN, "std": STD}
        train = TrainLoader(self.split, self.config, views=("weak", "strong"), accumulation=1, seed=0, **options)
        batches = [next(iter(EvalLoader(self.split, self.config, **options))), next(train.epoch(0))[0]]
        reference = ReferenceViews(self.split, self.config, ("eval", "weak", "strong"), mean=MEAN, std=STD)
        scale = 255 * torch.tensor(STD).view(3, 1, 1)
        for views in batches:
            for position in range(min(views.real, count)):
                index = int(views.index[position])
                image = reference.image(index)
                for name, tensor in views.views.items():
                    difference = (tensor[position].cpu() - reference.view(image, name, index)) * scale
                    distance.setdefault(name, []).append(float(difference.abs().mean()))
        return {name: statistics.mean(values) for name, values in distance.items()}


def slow_reads(loaders: Loaders, latency: float, rounds: int) -> dict[str, float]:
    """Images per second of the weak view from shards on a mount where every read takes `latency` milliseconds more."""
    preadv, config = os.preadv, loaders.config
    rates = {}

    def slow(*arguments: Any) -> int:
        time.sleep(latency / 1000)
        return preadv(*arguments)

    print(f"\nevery read of a shard takes {latency:g} ms more, {config.read_threads} reading threads: images/s")
    for shuffle in ("global", "window"):
        # Several windows per epoch, so that images are read while others are decoded.
        window = max(64, len(loaders.split) // 4)
        loaders.config = replace(config, shuffle=shuffle, shuffle_window=window, shuffle_block=32)
        epoch = loaders.shards("weak")
        sum(epoch(0))
        os.preadv = slow
        rates[shuffle] = statistics.median(loaders.rate(epoch(turn))[0] for turn in range(1, rounds + 1))
        os.preadv = preadv
        print(f"{shuffle:12s}{rates[shuffle]:12.1f}", flush=True)
    loaders.config = config
    return rates


def time_row(loaders: Loaders, row: Row, rounds: int) -> dict[str, Any]:
    """Figures of every loader of a row, in turns, so that a slow moment of the machine affects all of them."""
    epochs = {name: getattr(loaders, name)(row.mode, **row.options) for name in row.loaders}
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in epochs}
    for epoch in epochs.values():
        sum(epoch(0))
    for turn in range(1, rounds + 1):
        for name, epoch in epochs.items():
            measured[name].append(loaders.rate(epoch(turn)))
            # A loader's work ahead of its next epoch must not slow down the next loader.
            time.sleep(0.5)
    result = {}
    for name, values in measured.items():
        # Round by round: loaders that took turns ran on the same machine.
        pairs = list(zip(values, measured["pil"], strict=True))
        result[name] = {
            "images_per_second": statistics.median(rate for rate, _ in values),
            "cpu_ms_per_image": statistics.median(cpu for _, cpu in values),
            "speed_over_pil": statistics.median(ours[0] / theirs[0] for ours, theirs in pairs),
            "cpu_over_pil": statistics.median(theirs[1] / ours[1] for ours, theirs in pairs),
            "all": values,
        }
    return result


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--images", type=Path, help="folder of JPEG images (default: generated, 640 x 480)")
    parser.add_argument("--count", type=int, help="how many images (default: 256; 48 with --quick)")
    parser.add_argument("--quick", action="store_true", help="few images and one round: a look, not a measurement")
    parser.add_argument("--image-size", type=int, default=448)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=0, help="threads or workers (default: all cores)")
    parser.add_argument("--rounds", type=int, help="timed epochs of every loader (default: 3; 1 with --quick)")
    parser.add_argument("--rows", nargs="*", choices=list(rows(Path())), default=list(rows(Path())))
    parser.add_argument("--shuffle", choices=["global", "window"], default="global", help="of spml_fast and shards")
    parser.add_argument("--shard-size", type=float, default=256, metavar="MB", help="of shards, in 10^6 bytes")
    parser.add_argument("--read-latency", type=float, default=0, metavar="MS", help="also time shards on a slow mount")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, metavar="DIR", help="folder of the table input.csv to add rows to")
    add_json_option(parser)
    args = parser.parse_args()
    args.count = args.count or (48 if args.quick else 256)
    args.rounds = args.rounds or (1 if args.quick else 3)
    if args.quick:
        args.batch_size = min(args.batch_size, 8)
    return args


def compare(args: argparse.Namespace, loaders: Loaders, cache: Path) -> dict[str, Any]:
    """Check the views, time all loaders and print a table; returns the results."""
    distance = loaders.check()
    result: dict[str, Any] = {"grey_levels_from_reference": distance, "rows": {}}
    print("grey levels from Pillow and torchvision: " + ", ".join(f"{k} {v:.2f}" for k, v in distance.items()))
    for view, value in distance.items():
        if value > ALLOWED[view]:
            raise UserError(f"the {view} view is {value:.2f} grey levels from the reference; nothing is timed")
    print(f"\nmedians of {args.rounds}: images/s, milliseconds of processor time per image, and both over pil's")
    for name in args.rows:
        timed = result["rows"][name] = time_row(loaders, rows(cache)[name], args.rounds)
        for loader, figures in timed.items():
            print(
                f"{name:28s}{loader:14s}{figures['images_per_second']:9.1f}/s{figures['cpu_ms_per_image']:9.2f} ms"
                f"{figures['speed_over_pil']:8.2f} x{figures['cpu_over_pil']:7.2f} x",
                flush=True,
            )
    if args.read_latency:
        result["slow_reads"] = slow_reads(loaders, args.read_latency, args.rounds)
    return result


def table_rows(result: dict[str, Any], images: str, rounds: int) -> list[dict[str, Any]]:
    """Rows for a table of benchmarks.

    Args:
        result: what is written to --json.
        images: which ones were loaded.
        rounds: that figures are medians of.
    """
    facts = {"images": images, "image_size": result["image_size"], "rounds": rounds, **result["machine"]}
    facts |= {"date": time.strftime("%Y-%m-%d"), "commit": commit()}
    return [
        {"row": row, "loader": loader, **{figure: figures[figure] for figure in FIGURES}, **facts}
        for row, loaders in result["rows"].items()
        for loader, figures in loaders.items()
    ]


def main() -> int:
    """Parse the command line, compare, write the results."""
    args = parse()
    out_file = json_output(args, "bench_input")
    # DALI's own RandAugment calls operators by their old names, and DALI turns the filters for its warnings back on.
    warnings.showwarning = lambda *args, **kwargs: None
    device = torch.device(args.device)
    threads = args.threads or len(os.sched_getaffinity(0))
    config = DataConfig(image_size=args.image_size, threads=threads, shuffle=args.shuffle, keep_decoded=0)
    hardware = machine(device)
    with tempfile.TemporaryDirectory() as scratch:
        split = images(args.images, args.count, Path(scratch))
        packing = PackOptions(
            split.folder.parent, Path(scratch) / "packed", shard_size=int(args.shard_size * 1e6), progress=False
        )
        loaders = Loaders(split, config, args.batch_size, device, pack(packing).split("train"))
        if len(split) < (config.prefetch + 3) * args.batch_size:
            raise UserError(f"{len(split)} images are too few for batches of {args.batch_size}; give more")
        print(", ".join(f"{key} {value}" for key, value in hardware.items() if value is not None))
        print(
            f"{len(split)} images of {args.images or 'generated noise, 640 x 480'}, to {args.image_size} px, "
            f"batches of {args.batch_size}, {threads} threads or workers"
        )
        settings = {"machine": hardware, "threads": threads, "image_size": args.image_size}
        result = {**settings, **compare(args, loaders, Path(scratch) / "cache")}
    if args.results is not None:
        kind = "640 x 480" if args.images is None else args.images.name
        merge_csv(args.results / "input.csv", table_rows(result, kind, args.rounds), key=KEY)
    if out_file is not None:
        out_file.write_json(result)
    return 0


if __name__ == "__main__":
    run_command(main)
