"""Images a second of the input pipeline, against the usual ways of feeding a GPU, in one run on one machine.

    python benchmarks/bench_input.py [--images DIR] [--image-size 448] [--batch-size 16] [--json OUT]

Loaders, each with the same decoding threads (or workers) and the same work to do:
    spml_fast      spml_fast.pipeline: DALI fed with what order.py decides
    shards         the same, with the images in tar shards
    dali_readers   DALI with readers.file, random numbers and RandAugment of DALI's own
    pil            torchvision transforms on Pillow images in a torch DataLoader with worker processes
First the views are compared with Pillow's and torchvision's; a pipeline that is fast and wrong is not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from spml_fast.core.config import DataConfig
from spml_fast.core.errors import UserError, run_command
from spml_fast.data.loader import EvalLoader, TrainLoader
from spml_fast.data.manifest import Split
from spml_fast.prepare.pack import PackOptions, pack
from tests.support.pil import ReferenceViews, make_split, photo

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MODES: dict[str, tuple[str, ...]] = {"eval": ("eval",), "weak": ("weak",), "weak+strong": ("weak", "strong")}
# Mean distance in grey levels from Pillow's and torchvision's view that is still the same view.
ALLOWED = {"eval": 1.0, "weak": 1.0, "strong": 1.5}


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were taken on."""
    import nvidia.dali
    import PIL
    import torchvision

    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "dali": nvidia.dali.__version__,
        "pillow": PIL.__version__,
    }


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


class Bench:
    """One set of images and everything that loads them."""

    def __init__(self, split: Split, config: DataConfig, batch_size: int, device: torch.device, packed: Split) -> None:
        self.split, self.config, self.batch_size, self.device = split, config, batch_size, device
        self.packed = packed

    def ours(self, mode: str) -> Callable[[int], Iterator[int]]:
        """Returns a function that loads one epoch and yields the images of every batch; so do the others."""
        return self._ours(self.split, mode)

    def shards(self, mode: str) -> Callable[[int], Iterator[int]]:
        return self._ours(self.packed, mode)

    def _ours(self, split: Split, mode: str) -> Callable[[int], Iterator[int]]:
        options: dict[str, Any] = {"batch_size": self.batch_size, "device": self.device, "mean": MEAN, "std": STD}
        if mode == "eval":
            evaluation = EvalLoader(split, self.config, **options)
            return lambda epoch: (views.real for views in evaluation)
        train = TrainLoader(split, self.config, views=MODES[mode], accumulation=1, seed=0, **options)
        return lambda epoch: (views.real for update in train.epoch(epoch) for views in update)

    def dali_readers(self, mode: str) -> Callable[[int], Iterator[int]]:
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

    def pil(self, mode: str) -> Callable[[int], Iterator[int]]:
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

    def rate(self, batches: Iterator[int]) -> float:
        """Images a second, from when the batches that may have been made ahead of the epoch are used up."""
        for _ in range(self.config.prefetch):
            next(batches)
        start = time.perf_counter()
        count = sum(batches)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return count / (time.perf_counter() - start)

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
                    apart = (tensor[position].cpu() - reference.view(image, name, index)) * scale
                    distance.setdefault(name, []).append(float(apart.abs().mean()))
        return {name: statistics.mean(values) for name, values in distance.items()}


def slow_reads(bench: Bench, latency: float, rounds: int) -> dict[str, float]:
    """Images a second of the weak view from shards on a mount where every read takes `latency` milliseconds more."""
    preadv, config = os.preadv, bench.config
    found = {}

    def slow(*arguments: Any) -> int:
        time.sleep(latency / 1000)
        return preadv(*arguments)

    print(f"\nevery read of a shard takes {latency:g} ms more, {config.read_threads} reading threads: images/s")
    for shuffle in ("global", "window"):
        # Several windows an epoch, so that reading goes on while decoding does.
        bench.config = replace(config, shuffle=shuffle, shuffle_window=max(64, len(bench.split) // 4), shuffle_block=32)
        epoch = bench.shards("weak")
        sum(epoch(0))
        os.preadv = slow
        found[shuffle] = statistics.median(bench.rate(epoch(turn)) for turn in range(1, rounds + 1))
        os.preadv = preadv
        print(f"{shuffle:12s}{found[shuffle]:12.1f}", flush=True)
    bench.config = config
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--images", type=Path, help="folder of JPEG images (default: generated, 640 x 480)")
    parser.add_argument("--count", type=int, default=256, help="how many images")
    parser.add_argument("--image-size", type=int, default=448)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=0, help="threads or workers (default: all cores)")
    parser.add_argument("--rounds", type=int, default=3, help="timed epochs of every loader")
    parser.add_argument("--modes", nargs="*", choices=list(MODES), default=list(MODES))
    parser.add_argument("--shuffle", choices=["global", "window"], default="global", help="of spml_fast and shards")
    parser.add_argument("--shard-size", type=float, default=256, metavar="MB", help="of shards, in 10^6 bytes")
    parser.add_argument("--read-latency", type=float, default=0, metavar="MS", help="also time shards on a slow mount")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()

    # DALI's own RandAugment calls operators by their old names, and DALI turns the filters for its warnings back on.
    warnings.showwarning = lambda *args, **kwargs: None
    device = torch.device(args.device)
    threads = args.threads or len(os.sched_getaffinity(0))
    config = DataConfig(image_size=args.image_size, threads=threads, shuffle=args.shuffle)
    about = machine(device)
    result: dict[str, Any] = {"machine": about, "threads": threads, "image_size": args.image_size}
    with tempfile.TemporaryDirectory() as scratch:
        split = images(args.images, args.count, Path(scratch))
        packing = PackOptions(
            split.folder.parent, Path(scratch) / "packed", shard_size=int(args.shard_size * 1e6), progress=False
        )
        bench = Bench(split, config, args.batch_size, device, pack(packing).split("train"))
        if len(bench.split) < (config.prefetch + 2) * args.batch_size:
            raise UserError(f"{len(bench.split)} images are too few for batches of {args.batch_size}; give more")
        print(", ".join(f"{key} {value}" for key, value in about.items() if value is not None))
        print(
            f"{len(bench.split)} images of {args.images or 'generated noise, 640 x 480'}, to {args.image_size} px, "
            f"batches of {args.batch_size}, {threads} threads or workers"
        )
        apart = result["grey_levels_from_reference"] = bench.check()
        print("grey levels from Pillow and torchvision: " + ", ".join(f"{k} {v:.2f}" for k, v in apart.items()))
        for view, value in apart.items():
            if value > ALLOWED[view]:
                raise UserError(f"the {view} view is {value:.2f} grey levels from the reference; nothing is timed")

        head = f"{'spml_fast':>12s}{'shards':>9s}{'dali_readers':>14s}{'pil':>8s}"
        print(f"\n{'':12s}{head}   images/s (median of {args.rounds})")
        result["images_per_second"] = {}
        for mode in args.modes:
            loaders = {"spml_fast": bench.ours, "shards": bench.shards}
            loaders |= {"dali_readers": bench.dali_readers, "pil": bench.pil}
            epochs = {name: make(mode) for name, make in loaders.items()}
            rates: dict[str, list[float]] = {name: [] for name in epochs}
            for epoch in epochs.values():
                sum(epoch(0))
            # In turns, so that a slow moment of the machine meets all of them.
            for turn in range(1, args.rounds + 1):
                for name, epoch in epochs.items():
                    rates[name].append(bench.rate(epoch(turn)))
                    # What a loader makes ahead of the next epoch must not cost the next loader its time.
                    time.sleep(0.5)
            rate = {name: statistics.median(values) for name, values in rates.items()}
            # Round by round: loaders that took turns met the same machine.
            ratio = {
                name: statistics.median(a / b for a, b in zip(rates["spml_fast"], rates[name], strict=True))
                for name in ("shards", "dali_readers", "pil")
            }
            result["images_per_second"][mode] = {"median": rate, "all": rates, "ratio": ratio}
            print(
                f"{mode:12s}{rate['spml_fast']:12.1f}{rate['shards']:9.1f}{rate['dali_readers']:14.1f}"
                f"{rate['pil']:8.1f}   " + ", ".join(f"{value:.2f} x {name}" for name, value in ratio.items()),
                flush=True,
            )
        if args.read_latency:
            result["slow_reads"] = slow_reads(bench, args.read_latency, args.rounds)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    run_command(main)
