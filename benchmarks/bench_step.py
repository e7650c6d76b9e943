"""Whole training steps: images per second, where the time goes, and the same training written in other ways.

    python benchmarks/bench_step.py [--methods an ll_r ignore] [--backbone resnet50] [--image-size 224] [--ways ...]
                                    [--engine] [--compile] [--input {files,memory}] [--loop {deepspeed,torch}]
                                    [--json OUT] [--results DIR]

Ways to train, each with the same images, labels, weights, optimizer and threads:
    spml_fast   what launch/train.py does: DALI, DeepSpeed, channels_last, the precision that `train.precision auto`
                takes, freed memory kept (on a CPU), kernels on a GPU
    bare        the same with PyTorch's own loop in the place of DeepSpeed's engine, to see what the engine costs
                (`--engine` adds it)
    reference   spml_fast with the ops in plain PyTorch (on a GPU; elsewhere they are what runs)
    plain       as the papers' released code trains: Pillow in a torch DataLoader with worker processes, contiguous
                fp32, PyTorch's loop, the map of every class in memory, the loss read back after every step
    bf16        that loader and loop by somebody who knows PyTorch: bf16, channels_last, a fused optimizer
    bf16_kept   bf16 with malloc set to keep freed memory (on a CPU)
    fp32_kept   bf16_kept in fp32, which is faster on many CPUs
    compiled    spml_fast with `model.compile true`, which `auto` takes in runs that are long enough; bf16_compiled:
                bf16_kept with the network compiled in the same way (`--compile` adds both; a minute each)
Before anything is timed, the losses of all of them must agree on the same images. All take turns, and what is printed
are medians over the rounds. How malloc treats freed memory belongs to a process, so ways that differ in it run in two.

`--input memory` draws images on the device once instead of loading them (needs no DALI), `--loop torch` makes the
updates of the first ways with PyTorch's own loop in the same precision (needs no DeepSpeed): what is left is the
network, the method and the kernels. `--results` adds rows to a table of that folder, method after method.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.kernel_report import KEY, Row, file_name, merge_csv
from benchmarks.kernel_report import machine as table_facts
from benchmarks.machine import installed, machine
from spml_fast.core import env
from spml_fast.core.allocator import keep_freed_memory
from spml_fast.core.batch import Batch
from spml_fast.core.config import Config, DataConfig, EngineConfig, ModelConfig, TrainConfig
from spml_fast.core.errors import UserError, run_command
from spml_fast.core.outputs import add_json_option, json_output
from spml_fast.core.precision import autocast, autocast_dtype, set_cudnn_policy
from spml_fast.data.labels import LabelStore, SparseLabels
from spml_fast.data.manifest import Split
from spml_fast.methods import Method, Progress, get_method, method_names
from spml_fast.models.classifier import Classifier
from spml_fast.training.engine import Engine, init_distributed, shutdown_distributed
from spml_fast.training.engine_config import deepspeed_config
from spml_fast.training.module import TrainingModule
from spml_fast.training.optim import make_optimizer, make_schedule, parameter_groups
from spml_fast.training.precision_choice import settle_precision
from tests.support.pil import ReferenceViews

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PARTS = ("data", "forward", "backward", "update")
# Relative difference of the losses of the first step, by what the forward computes in.
ALLOWED = {None: 1e-4, torch.bfloat16: 2e-2}


@dataclasses.dataclass(frozen=True)
class Way:
    """How a step is made.

    Attributes:
        ours: this program's loader, memory format and precision; else Pillow in a DataLoader.
        loop: what makes the updates, `deepspeed` or `torch`; `--loop torch` changes that of all.
        kernels: whether the ops may be kernels.
        precision: of rivals.
        usual: contiguous tensors, the optimizer as torch makes it, and the loss read back every step.
        kept: whether malloc keeps freed memory (on a CPU).
        compiled: whether the network's training passes are compiled, by `model.compile` of ours.
    """

    ours: bool = False
    loop: str = "torch"
    kernels: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    usual: bool = False
    kept: bool = False
    compiled: bool = False


WAYS = {
    "spml_fast": Way(ours=True, loop="deepspeed", kernels=True, kept=True),
    "bare": Way(ours=True, kernels=True, kept=True),
    "reference": Way(ours=True, loop="deepspeed", kept=True),
    "plain": Way(usual=True),
    "bf16": Way(precision="bf16"),
    "bf16_kept": Way(precision="bf16", kept=True),
    "fp32_kept": Way(kept=True),
    "compiled": Way(ours=True, loop="deepspeed", kernels=True, kept=True, compiled=True),
    "bf16_compiled": Way(precision="bf16", kept=True, compiled=True),
}
ON_CPU = ("spml_fast", "plain", "bf16", "bf16_kept", "fp32_kept")
ON_GPU = ("spml_fast", "reference", "plain", "bf16")
# After every method's warm-up, where rejection and masked images cost time.
EPOCH, EPOCHS = 6, 10


class Variant:
    """One way to train one method, from the same start as the others.

    Args:
        name: one of `WAYS`.
        method: name of the method.
        setup: what all variants have in common.
    """

    def __init__(self, name: str, method: str, setup: Setup) -> None:
        self.name, self.setup, self.way = name, setup, WAYS[name]
        self.layout = torch.contiguous_format if self.way.usual else torch.channels_last
        self.classifier = copy.deepcopy(setup.classifier)
        self.store = LabelStore(setup.labels, setup.device)
        options = get_method(method).Options
        self.method: Method = get_method(method)(options(name=method), self.store)
        train = setup.train if self.way.ours else dataclasses.replace(setup.train, precision=self.way.precision)
        self.dtype = autocast_dtype(train.precision, setup.device)
        module = TrainingModule(self.classifier, self.method)
        own_loop = "torch" in (self.way.loop, setup.loop)
        if own_loop:
            module.to(setup.device).to(memory_format=self.layout)
        if self.way.compiled:
            self.classifier.compiled_sizes = (train.batch_size,)
            self.classifier.compile_backbone()
        groups = parameter_groups(self.classifier, self.method, train, head_only=False)
        optimizer = make_optimizer(groups, train, fused=not self.way.usual)
        scheduler = make_schedule(optimizer, train, 10**6)
        self.engine: Engine | None = None
        if own_loop:
            self.module: torch.nn.Module = module
            self.optimizer, self.scheduler = optimizer, scheduler
        else:
            config = deepspeed_config(train, setup.engine, 1, setup.device, setup.scratch)
            self.engine = Engine(module, optimizer, scheduler, config, overlap=setup.engine.overlap_gradients)
        self.classifier.to(setup.device).train()

    def batches(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Views and sample indices, without end."""
        views, setup = self.method.views, self.setup
        if setup.split is None:
            yield from itertools.cycle([({v: self.laid_out(d[v]) for v in views}, i) for d, i in setup.drawn()])
            return
        if not self.way.ours:
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
                given = {v: self.laid_out(batch[v].to(setup.device, non_blocking=True)) for v in views}
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

    def laid_out(self, images: Tensor) -> Tensor:
        """Images in the memory format of this way."""
        return images.contiguous(memory_format=self.layout)

    def loss(self, views: dict[str, Tensor], index: Tensor) -> Tensor:
        """Loss of a step; its forward alone."""
        batch = Batch(views, self.store.rows(index), index, len(index))
        progress = Progress(EPOCH, EPOCHS, (EPOCH - 1) * 100, 100, "finetune", self.setup.train.lr)
        with contextlib.nullcontext() if self.way.kernels else env.reference_kernels():
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
            if self.way.usual:
                loss.item()
            if self.way.ours:
                self.scheduler.step()
        else:
            self.engine.backward(loss)
            lap("backward")
            self.engine.step()
        lap("update")

    def close(self) -> None:
        """Release the engine, and what was compiled: only so many networks are in one process."""
        if self.engine is not None:
            self.engine.close()
        if self.way.compiled:
            torch._dynamo.reset()


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


def losses(variants: list[Variant]) -> dict[str, float]:
    """Loss of every variant on the same images, noise that depends on the setup alone."""
    views, index = variants[0].setup.drawn()[0]
    found = {}
    for variant in variants:
        given = {name: variant.laid_out(views[name]) for name in variant.method.views}
        with torch.no_grad():
            found[variant.name] = float(variant.loss(given, index))
    return found


def check(found: dict[str, float], ours: torch.dtype | None) -> float:
    """Largest relative difference of the losses; `UserError` if one is too large to be rounding.

    Args:
        found: by way.
        ours: what this program's ways compute in.
    """
    dtypes = {name: ours if WAYS[name].ours else autocast_dtype(WAYS[name].precision, CPU) for name in found}
    # fp32 among themselves, and bf16 to the first.
    first = min(found, key=lambda name: dtypes[name] is not None)
    apart = {name: abs(value - found[first]) / abs(found[first]) for name, value in found.items()}
    if not all(difference <= ALLOWED[dtypes[name]] for name, difference in apart.items()):
        raise UserError(f"the losses of a step are {found}: not the same training, so nothing is timed")
    return max(apart.values())


class Clock:
    """Times one variant: free-running rounds of steps, and the parts of a step with the device waited for after each.

    Waiting after every part would slow a GPU down, so the two are measured separately.
    """

    def __init__(self, variant: Variant, steps: int) -> None:
        self.variant, self.steps, self.batches = variant, steps, variant.batches()
        self.warm = False

    def wait(self) -> None:
        """Wait until the device has nothing left to do."""
        if self.variant.setup.device.type == "cuda":
            torch.cuda.synchronize(self.variant.setup.device)

    def run(self, steps: int) -> None:
        """Train that many steps."""
        for _ in range(steps):
            self.variant.step(*next(self.batches), lambda part: None)
        self.wait()

    def round(self) -> float:
        """Images per second of one round, from when what was loaded ahead while others trained is used up."""
        self.run(2 if self.warm else 4)
        self.warm = True
        start = time.perf_counter()
        self.run(self.steps)
        return self.variant.setup.train.batch_size * self.steps / (time.perf_counter() - start)

    def split(self) -> dict[str, float]:
        """Seconds of the parts of a step."""
        parts = dict.fromkeys(PARTS, 0.0)
        self.run(2)
        mark = time.perf_counter()

        def lap(part: str) -> None:
            nonlocal mark
            self.wait()
            now = time.perf_counter()
            parts[part] += (now - mark) / self.steps
            mark = now

        for _ in range(self.steps):
            views, index = next(self.batches)
            lap("data")
            self.variant.step(views, index, lap)
        return parts

    def memory(self) -> float | None:
        """Peak GiB on the GPU of one step, weights and what the loader holds of all variants included."""
        device = self.variant.setup.device
        if device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats(device)
        self.run(1)
        return torch.cuda.max_memory_allocated(device) / 2**30


class Helper:
    """Another process of this program, which has the ways that give freed memory back to the system.

    Args:
        names: these ways.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--serve", *names]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, **pipes)

    def ask(self, question: str, *arguments: str) -> Any:
        """Have it do something and give its answer. `UserError` where it ended instead."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps([question, *arguments]) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        raise UserError("the process with the other ways of training failed; its error stands above")

    def close(self) -> None:
        """End it."""
        self.process.communicate()


# How a line with an answer begins; libraries print others.
ANSWER = "@answer "


def serve(args: argparse.Namespace) -> None:
    """Answer what `Helper.ask` asks, until nobody does any more."""
    variants: list[Variant] = []
    clocks: dict[str, Clock] = {}
    with tempfile.TemporaryDirectory() as scratch:
        setup = make_setup(args, CPU, Path(scratch))
        for line in sys.stdin:
            question, *arguments = json.loads(line)
            answer: Any = None
            if question == "losses":
                variants = [Variant(name, arguments[0], setup) for name in args.serve]
                clocks = {v.name: Clock(v, args.steps) for v in variants}
                answer = losses(variants)
            elif question == "round":
                answer = clocks[arguments[0]].round()
            elif question == "split":
                answer = clocks[arguments[0]].split()
            print(ANSWER + json.dumps(answer), flush=True)


class HelpersClock:
    """As `Clock`, of a way that the helper has."""

    def __init__(self, name: str, helper: Helper) -> None:
        self.name, self.helper = name, helper

    def round(self) -> float:
        """As `Clock.round`."""
        return float(self.helper.ask("round", self.name))

    def split(self) -> dict[str, float]:
        """As `Clock.split`."""
        return dict(self.helper.ask("split", self.name))

    def memory(self) -> None:
        """Nothing: it is a CPU's."""


def time_all(clocks: dict[str, Clock | HelpersClock], rounds: int) -> dict[str, dict[str, Any]]:
    """Figures of every way, by name; they take turns, so that a slow moment of the machine affects all of them.

    Args:
        clocks: by way; ratios are to the first.
        rounds: how many.
    """
    rates: dict[str, list[float]] = {name: [] for name in clocks}
    for _ in range(rounds):
        for name, clock in clocks.items():
            rates[name].append(clock.round())
            # What its loader makes ahead must not cost the next one its time.
            time.sleep(0.5)
    first = next(iter(rates.values()))
    figures: dict[str, dict[str, Any]] = {}
    for name, clock in clocks.items():
        figures[name] = {
            "images_per_second": statistics.median(rates[name]),
            "all": rates[name],
            "ratio": statistics.median(a / b for a, b in zip(rates[name], first, strict=True)),
            "seconds": clock.split(),
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
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), help="ways to train (default: all of the device)")
    parser.add_argument("--engine", action="store_true", help="add `bare`, and say what DeepSpeed's engine costs")
    parser.add_argument("--compile", action="store_true", help="add `compiled` and `bf16_compiled`")
    parser.add_argument("--serve", nargs="+", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--input", choices=["files", "memory"], default="files", help="load images, or draw them once")
    parser.add_argument("--loop", choices=["deepspeed", "torch"], default="deepspeed", help="what makes the updates")
    parser.add_argument("--images", type=Path, help="folder of JPEG images (default: generated, 640 x 480)")
    parser.add_argument("--count", type=int, default=96, help="how many images")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=5.0, help="BoostLU's factor in training")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="of our own ways")
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
    return torch.device("cuda", 0) if torch.cuda.is_available() else CPU


def table_rows(args: argparse.Namespace, setup: Setup, method: str, figures: dict[str, Any]) -> list[Row]:
    """Rows of a method's variants for a table of benchmarks."""
    device = setup.device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    shape = f"{method} {args.backbone} {args.image_size} px B {args.batch_size} C {args.classes}"
    facts = table_facts(gpu, args.commit) | {"date": time.strftime("%Y-%m-%d")}
    if device.type != "cuda":
        facts |= {name: value for name, value in machine(device).items() if name in ("cpu", "cores")}
    rows = []
    for name, found in figures.items():
        row: Row = {"op": "step", "shape": shape, "provider": name, "mode": f"{args.input} {args.loop}", "status": "ok"}
        way = WAYS[name]
        row["precision"] = setup.train.precision if way.ours else way.precision
        row |= {"images_per_second": found["images_per_second"], "ratio": found["ratio"]}
        row |= {"memory_gib": found["memory_gib"], **{f"{part}_s": found["seconds"][part] for part in PARTS}}
        rows.append(row | facts)
    return rows


def add_to_table(folder: Path, rows: list[Row]) -> None:
    """Put a method's rows into the table of their GPU, or into the one of CPUs, where every processor has rows."""
    gpu = rows[0]["gpu"]
    if gpu == "none":
        merge_csv(folder / "no_gpu_steps.csv", rows, key=(*KEY, "cpu", "cores"))
    else:
        merge_csv(folder / f"{file_name(gpu)}_steps.csv", rows)


def make_setup(args: argparse.Namespace, device: torch.device, scratch: Path) -> Setup:
    """What all ways have in common: the same in every process."""
    torch.manual_seed(0)
    model = ModelConfig(backbone=args.backbone, pretrained=False, alpha_train=args.alpha)
    split = None
    if args.input == "files":
        from benchmarks.bench_input import images

        split = images(args.images, args.count, scratch)
    count = args.count if split is None else len(split)
    if count < args.batch_size:
        raise UserError(f"{count} images are too few for batches of {args.batch_size}; give more")
    observed = np.random.default_rng(0).integers(args.classes, size=count)
    return Setup(
        split,
        SparseLabels.from_positives([[int(c)] for c in observed], args.classes, -1),
        DataConfig(image_size=args.image_size, threads=args.threads or len(os.sched_getaffinity(0)), keep_decoded=0),
        TrainConfig(batch_size=args.batch_size, precision=args.precision),
        EngineConfig(tensorboard=False),
        Classifier(model, args.classes, args.image_size),
        device,
        scratch,
        args.loop,
    )


def settle(setup: Setup, args: argparse.Namespace) -> None:
    """Put fp32 or bf16 in the place of `auto`, as a run does, and say why."""
    model = ModelConfig(backbone=args.backbone, pretrained=False, alpha_train=args.alpha)
    options = get_method("an").Options(name="an")
    config, notes = settle_precision(
        Config(options, setup.data, model, setup.train), setup.classifier, None, setup.device
    )
    setup.train = config.train
    for note in notes:
        print(note)


def report(timed: dict[str, dict[str, Any]]) -> None:
    """Print the figures of a method."""
    first = next(iter(timed))
    for name, figures in timed.items():
        parts = "".join(f"{part} {1000 * figures['seconds'][part]:.0f}, " for part in PARTS)
        memory = "" if figures["memory_gib"] is None else f"{figures['memory_gib']:.1f} GiB, "
        rate = f"{figures['images_per_second']:9.1f}   {parts}{memory}{figures['ratio']:.2f} x {first}"
        print(f"{name:11s}{rate}", flush=True)
    if {"spml_fast", "bare"} <= set(timed):
        pairs = zip(timed["spml_fast"]["all"], timed["bare"]["all"], strict=True)
        part = statistics.median(1 - ours / bare for ours, bare in pairs)
        print(f"DeepSpeed's engine takes {100 * part:.1f}% of a step")


def measure(args: argparse.Namespace, setup: Setup, names: list[str], helper: Helper | None) -> dict[str, Any]:
    """Check and time every method.

    Args:
        args: the command line.
        setup: what all ways have in common.
        names: of the ways, in the order of the table.
        helper: has some of them, or is not there.
    """
    result: dict[str, Any] = {}
    device, theirs = setup.device, [] if helper is None else helper.names
    for method in args.methods:
        variants = {name: Variant(name, method, setup) for name in names if name not in theirs}
        found = losses(list(variants.values())) | ({} if helper is None else helper.ask("losses", method))
        difference = check(found, autocast_dtype(setup.train.precision, device))
        print(f"\n{method}: losses agree to {difference:.1e}")
        clocks: dict[str, Clock | HelpersClock] = {}
        for name in names:
            own = variants.get(name)
            if own is not None:
                clocks[name] = Clock(own, args.steps)
            elif helper is not None:
                clocks[name] = HelpersClock(name, helper)
        timed = time_all(clocks, args.rounds)
        if args.results is not None:
            add_to_table(args.results, table_rows(args, setup, method, timed))
        report(timed)
        result[method] = {"losses_apart": difference, **timed}
        for variant in variants.values():
            variant.close()
    return result


def main() -> int:
    """Check, time and print."""
    args = parse()
    require(args)
    if args.serve:
        serve(args)
        return 0
    out_file = json_output(args, "bench_step")
    device = start(args)
    on_gpu = device.type == "cuda"
    # For all ways: they are PyTorch's and the system's own, and one line in anybody's code.
    set_cudnn_policy(device, deterministic=False)
    names = list(args.ways or (ON_GPU if on_gpu else ON_CPU))
    added = ["bare"] * args.engine + ["compiled", "bf16_compiled"] * args.compile
    names += [name for name in added if name not in names]
    apart = [] if on_gpu else [name for name in names if not WAYS[name].kept]
    if not on_gpu and not keep_freed_memory() and apart:
        raise UserError(
            "malloc has settings of its own here, or is not glibc's (docs/environment.md), so that ways that differ in "
            "it cannot be timed; give --ways spml_fast, or others of our own"
        )
    machine_info = machine(device)
    print(", ".join(f"{key} {value}" for key, value in machine_info.items() if value is not None))
    with tempfile.TemporaryDirectory() as scratch:
        setup = make_setup(args, device, Path(scratch))
        if any(WAYS[name].ours for name in names):
            settle(setup, args)
        print(
            f"{args.backbone}, {args.classes} classes, alpha {args.alpha:g}, {args.image_size} px, batches of "
            f"{args.batch_size}, {torch.get_num_threads()} threads; images/s, and the parts of a step in ms"
        )
        helper = Helper(apart) if apart else None
        methods = measure(args, setup, names, helper)
        if helper is not None:
            helper.close()
    if args.loop == "deepspeed":
        shutdown_distributed()
    if out_file is not None:
        arguments = {k: str(v) for k, v in vars(args).items()}
        out_file.write_json({"machine": machine_info, "arguments": arguments, "methods": methods})
    return 0


if __name__ == "__main__":
    run_command(main)
