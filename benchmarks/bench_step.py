"""Whole training steps: images per second, where the time goes, and the same training written the usual way.

    python benchmarks/bench_step.py [--methods an ll_r ignore] [--backbone resnet50] [--image-size 224]
                                    [--input {files,memory}] [--loop {deepspeed,torch}] [--json OUT] [--results DIR]

Ways to train, each with the same images, labels, weights, optimizer and threads:
    spml_fast   what launch/train.py does: DALI, DeepSpeed, channels_last, bf16 where it gains, kernels on a GPU
    reference   the same with the ops in plain PyTorch (on a GPU only; elsewhere they are what runs)
    plain       as the papers' released code trains: Pillow in a torch DataLoader with worker processes, contiguous
                fp32, PyTorch's loop, the map of every class in memory, the loss read back after every step
Before anything is timed, the losses of all of them must agree on the same images.

`--input memory` draws images on the device once instead of loading them (needs no DALI), `--loop torch` makes the
updates of the first two with PyTorch's own loop in the same precision (needs no DeepSpeed): what is left is the
network, the method and the kernels. `--results` adds rows to a table of that folder, method after method.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.kernel_report import Row, file_name, merge_csv
from benchmarks.kernel_report import machine as table_facts
from benchmarks.machine import installed, machine
from spml_fast.core import env
from spml_fast.core.batch import Batch
from spml_fast.core.config import DataConfig, EngineConfig, ModelConfig, TrainConfig
from spml_fast.core.errors import UserError, run_command
from spml_fast.core.outputs import add_json_option, json_output
from spml_fast.core.precision import autocast, autocast_dtype, set_cudnn_policy
from spml_fast.data.labels import LabelStore, SparseLabels
from spml_fast.data.manifest import Split
from spml_fast.methods import Method, Progress, get_method, method_names
from spml_fast.models.classifier import Classifier
from spml_fast.training.engine import Engine, deepspeed_config, init_distributed, shutdown_distributed
from spml_fast.training.module import TrainingModule
from spml_fast.training.optim import make_optimizer, make_schedule, parameter_groups
from tests.support.pil import ReferenceViews

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PARTS = ("data", "forward", "backward", "update")
# Relative difference of the losses of the first step, by what the forward computes in.
ALLOWED = {None: 1e-4, torch.bfloat16: 2e-2}
# After every method's warm-up, where rejection and masked images cost time.
EPOCH, EPOCHS = 6, 10


class Variant:
    """One way to train one method, from the same start as the others.

    Args:
        name: `spml_fast`, `reference` or `plain`.
        method: name of the method.
        setup: what all variants have in common.
    """

    def __init__(self, name: str, method: str, setup: Setup) -> None:
        self.name, self.setup = name, setup
        self.plain = name == "plain"
        self.classifier = copy.deepcopy(setup.classifier)
        self.store = LabelStore(setup.labels, setup.device)
        options = get_method(method).Options
        self.method: Method = get_method(method)(options(name=method), self.store)
        train = dataclasses.replace(setup.train, precision="fp32") if self.plain else setup.train
        self.dtype = autocast_dtype(train.precision, setup.device)
        module = TrainingModule(self.classifier, self.method)
        own_loop = self.plain or setup.loop == "torch"
        if own_loop:
            layout = torch.contiguous_format if self.plain else torch.channels_last
            module.to(setup.device).to(memory_format=layout)
        groups = parameter_groups(self.classifier, self.method, train, head_only=False)
        optimizer = make_optimizer(groups, train, fused=not self.plain and setup.device.type == "cuda")
        scheduler = make_schedule(optimizer, train, 10**6)
        self.engine: Engine | None = None
        if own_loop:
            self.module, self.optimizer, self.scheduler = module, optimizer, scheduler
        else:
            config = deepspeed_config(train, setup.engine, 1, setup.device, setup.scratch)
            self.engine = Engine(module, optimizer, scheduler, config)
        self.classifier.to(setup.device).train()

    def batches(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Views and sample indices, without end."""
        views, setup = self.method.views, self.setup
        if setup.split is None:
            layout = torch.contiguous_format if self.plain else torch.channels_last
            drawn = [({v: d[v].contiguous(memory_format=layout) for v in views}, i) for d, i in setup.drawn()]
            yield from itertools.cycle(drawn)
            return
        if self.plain:
            loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
                ReferenceViews(setup.split, setup.data, views, mean=MEAN, std=STD),
                batch_size=setup.train.batch_size,
                shuffle=True,
                drop_last=True,
                num_workers=setup.data.threads,
                persistent_workers=True,
                pin_memory=setup.device.type == "cuda",
            )
            for batch in itertools.chain.from_iterable(itertools.repeat(loader)):
                given = {v: batch[v].to(setup.device, non_blocking=True) for v in views}
                yield given, batch["index"].to(setup.device)
        from spml_fast.data.loader import TrainLoader

        ours = TrainLoader(
            setup.split,
            setup.data,
            views=views,
            batch_size=setup.train.batch_size,
            accumulation=1,
            seed=0,
            device=setup.device,
            mean=MEAN,
            std=STD,
        )
        for epoch in itertools.count(1):
            for (micro,) in ours.epoch(epoch):
                yield micro.views, micro.index

    def loss(self, views: dict[str, Tensor], index: Tensor) -> Tensor:
        """Loss of a step; its forward alone."""
        batch = Batch(views, self.store.rows(index), index, len(index))
        progress = Progress(EPOCH, EPOCHS, (EPOCH - 1) * 100, 100, "finetune", self.setup.train.lr)
        with contextlib.nullcontext() if self.name == "spml_fast" else env.reference_kernels():
            if self.engine is not None:
                loss: Tensor = self.engine(batch, progress)[0]
                return loss
            with autocast(self.setup.device, self.dtype):
                loss = self.module(batch, progress)[0]
        return loss

    def step(self, views: dict[str, Tensor], index: Tensor, lap: Callable[[str], None]) -> None:
        """One update; `lap(part)` is called when a part is done."""
        # Which ops run was settled in the forward.
        loss = self.loss(views, index)
        lap("forward")
        if self.engine is None:
            loss.backward()
            lap("backward")
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.plain:
                loss.item()
            else:
                self.scheduler.step()
        else:
            self.engine.backward(loss)
            lap("backward")
            self.engine.step()
        lap("update")

    def close(self) -> None:
        """Release the engine."""
        if self.engine is not None:
            self.engine.close()


@dataclasses.dataclass
class Setup:
    """What all variants have in common.

    Attributes:
        split: images as files; None where they are drawn on the device.
        labels: one observed positive per image.
        classifier: weights that all of them start from.
        loop: what makes the updates of all but `plain`: `deepspeed` or `torch`.
    """

    split: Split | None
    labels: SparseLabels
    data: DataConfig
    train: TrainConfig
    engine: EngineConfig
    classifier: Classifier
    device: torch.device
    scratch: Path
    loop: str = "deepspeed"

    def drawn(self) -> list[tuple[dict[str, Tensor], Tensor]]:
        """A few batches of normalised noise on the device, and the indices of their labels."""
        size, batch = self.data.image_size, self.train.batch_size
        generator = torch.Generator(device=self.device).manual_seed(0)
        batches = []
        for first in range(0, min(len(self.labels), 4 * batch) - batch + 1, batch):
            views = {
                name: torch.randn(batch, 3, size, size, generator=generator, device=self.device)
                for name in ("weak", "strong")
            }
            batches.append((views, torch.arange(first, first + batch, device=self.device)))
        return batches


def check(variants: list[Variant]) -> float:
    """Largest relative difference of the losses on the same images; `UserError` if it is too large to be rounding."""
    views, index = next(variants[0].batches())
    losses = {}
    for variant in variants:
        given = {k: v.contiguous() for k, v in views.items()} if variant.plain else views
        with torch.no_grad():
            losses[variant.name] = float(variant.loss(given, index))
    difference = max(abs(value - losses["plain"]) for value in losses.values()) / abs(losses["plain"])
    if not difference <= ALLOWED[variants[0].dtype]:
        raise UserError(f"the losses of a step are {losses}: not the same training, so nothing is timed")
    return difference


class Clock:
    """Times one variant: free-running rounds of steps, and the parts of a step with the device waited for after each.

    Waiting after every part would slow a GPU down, so the two are measured separately.
    """

    def __init__(self, variant: Variant, steps: int) -> None:
        self.variant, self.steps, self.batches = variant, steps, variant.batches()
        self.rates: list[float] = []
        self.parts = dict.fromkeys(PARTS, 0.0)

    def wait(self) -> None:
        """Wait until the device has nothing left to do."""
        if self.variant.setup.device.type == "cuda":
            torch.cuda.synchronize(self.variant.setup.device)

    def run(self, steps: int) -> None:
        """Train that many steps."""
        for _ in range(steps):
            self.variant.step(*next(self.batches), lambda part: None)
        self.wait()

    def round(self) -> None:
        """Images per second of one round, from when what was loaded ahead while others trained is used up."""
        self.run(2)
        start = time.perf_counter()
        self.run(self.steps)
        self.rates.append(self.variant.setup.train.batch_size * self.steps / (time.perf_counter() - start))

    def split(self) -> None:
        """Seconds of the parts of a step."""
        self.run(2)
        mark = time.perf_counter()

        def lap(part: str) -> None:
            nonlocal mark
            self.wait()
            now = time.perf_counter()
            self.parts[part] += (now - mark) / self.steps
            mark = now

        for _ in range(self.steps):
            views, index = next(self.batches)
            lap("data")
            self.variant.step(views, index, lap)

    def memory(self) -> float | None:
        """Peak GiB on the GPU of one step, weights and what the loader holds of all variants included."""
        device = self.variant.setup.device
        if device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats(device)
        self.run(1)
        return torch.cuda.max_memory_allocated(device) / 2**30


def time_all(variants: list[Variant], steps: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Figures of every variant, by name; they take turns, so that a slow moment of the machine affects all of them."""
    clocks = [Clock(variant, steps) for variant in variants]
    for turn in range(rounds):
        for clock in clocks:
            if turn == 0:
                clock.run(2)
            clock.round()
            # What its loader makes ahead must not cost the next one its time.
            time.sleep(0.5)
    figures: dict[str, dict[str, Any]] = {}
    for clock in clocks:
        clock.split()
        rate = statistics.median(clock.rates)
        ratio = statistics.median(a / b for a, b in zip(clock.rates, clocks[0].rates, strict=True))
        figures[clock.variant.name] = {
            "images_per_second": rate,
            "all": clock.rates,
            "ratio": ratio,
            "seconds": clock.parts,
            "memory_gib": clock.memory(),
        }
        time.sleep(0.5)
    return figures


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--methods", nargs="+", choices=method_names(), default=["an", "ll_r", "ignore"])
    parser.add_argument("--backbone", default="resnet50", help="a timm model, from random weights")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--input", choices=["files", "memory"], default="files", help="load images, or draw them once")
    parser.add_argument("--loop", choices=["deepspeed", "torch"], default="deepspeed", help="what makes the updates")
    parser.add_argument("--images", type=Path, help="folder of JPEG images (default: generated, 640 x 480)")
    parser.add_argument("--count", type=int, default=96, help="how many images")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=5.0, help="BoostLU's factor in training")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="of all but plain")
    parser.add_argument("--threads", type=int, default=0, help="loading threads or workers (default: all cores)")
    parser.add_argument("--steps", type=int, default=8, help="timed steps a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, metavar="DIR", help="folder of a table to add rows to")
    parser.add_argument("--commit", help="commit to record where git is not at hand")
    add_json_option(parser)
    return parser.parse_args()


def require(args: argparse.Namespace) -> None:
    """Raise `UserError` where a library that the options ask for is not installed."""
    if args.input == "files" and not installed("nvidia.dali"):
        raise UserError("NVIDIA DALI, which loads the images, is not installed; give --input memory to time without")
    if args.loop == "deepspeed" and not installed("deepspeed"):
        raise UserError("DeepSpeed, which makes the updates, is not installed; give --loop torch to time without it")
    if args.input == "memory" and args.images is not None:
        raise UserError("--images has no use with --input memory, which draws them; leave one of the two out")


def start(args: argparse.Namespace) -> torch.device:
    """The device; with DeepSpeed, in a process group."""
    if args.loop == "deepspeed":
        return init_distributed()
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def table_rows(args: argparse.Namespace, device: torch.device, method: str, figures: dict[str, Any]) -> list[Row]:
    """Rows of a method's variants for a table of benchmarks."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    shape = f"{method} {args.backbone} {args.image_size} px B {args.batch_size} C {args.classes}"
    rows = []
    for name, found in figures.items():
        row: Row = {"op": "step", "shape": shape, "provider": name, "mode": f"{args.input} {args.loop}", "status": "ok"}
        row |= {"images_per_second": found["images_per_second"], "ratio": found["ratio"]}
        row |= {"memory_gib": found["memory_gib"], **{f"{part}_s": found["seconds"][part] for part in PARTS}}
        rows.append(row | table_facts(gpu, args.commit))
    return rows


def main() -> int:
    """Check, time and print."""
    args = parse()
    require(args)
    out_file = json_output(args, "bench_step")
    device = start(args)
    # For all variants: it is PyTorch's own, and one line in anybody's code.
    set_cudnn_policy(device, deterministic=False)
    torch.manual_seed(0)
    machine_info = machine(device)
    arguments = {k: str(v) for k, v in vars(args).items()}
    result: dict[str, Any] = {"machine": machine_info, "arguments": arguments, "methods": {}}
    model = ModelConfig(backbone=args.backbone, pretrained=False, alpha_train=args.alpha)
    print(", ".join(f"{key} {value}" for key, value in machine_info.items() if value is not None))
    print(
        f"{args.backbone}, {args.classes} classes, alpha {args.alpha:g}, {args.image_size} px, batches of "
        f"{args.batch_size}; images/s, and the parts of a step in ms"
    )
    with tempfile.TemporaryDirectory() as scratch:
        split = None
        if args.input == "files":
            from benchmarks.bench_input import images

            split = images(args.images, args.count, Path(scratch))
        count = args.count if split is None else len(split)
        if count < args.batch_size:
            raise UserError(f"{count} images are too few for batches of {args.batch_size}; give more")
        observed = np.random.default_rng(0).integers(args.classes, size=count)
        setup = Setup(
            split,
            SparseLabels.from_positives([[int(c)] for c in observed], args.classes, -1),
            DataConfig(image_size=args.image_size, threads=args.threads or len(os.sched_getaffinity(0))),
            TrainConfig(batch_size=args.batch_size, precision=args.precision),
            EngineConfig(tensorboard=False),
            Classifier(model, args.classes, args.image_size),
            device,
            Path(scratch),
            args.loop,
        )
        names = ["spml_fast", "reference", "plain"] if device.type == "cuda" else ["spml_fast", "plain"]
        for method in args.methods:
            variants = [Variant(name, method, setup) for name in names]
            difference = check(variants)
            print(f"\n{method}: losses agree to {difference:.1e}")
            figures_of: dict[str, Any] = {"losses_apart": difference}
            result["methods"][method] = figures_of
            timed = time_all(variants, args.steps, args.rounds)
            if args.results is not None:
                rows = table_rows(args, device, method, timed)
                merge_csv(args.results / f"{file_name(rows[0]['gpu'])}_steps.csv", rows)
            for name, figures in timed.items():
                figures_of[name] = figures
                parts = "".join(f"{part} {1000 * figures['seconds'][part]:.0f}, " for part in PARTS)
                memory = "" if figures["memory_gib"] is None else f"{figures['memory_gib']:.1f} GiB, "
                rate = f"{figures['images_per_second']:9.1f}   {parts}{memory}{figures['ratio']:.2f} x spml_fast"
                print(f"{name:11s}{rate}", flush=True)
            for variant in variants:
                variant.close()
    if args.loop == "deepspeed":
        shutdown_distributed()
    if out_file is not None:
        out_file.write_json(result)
    return 0


if __name__ == "__main__":
    run_command(main)
