"""How a training step grows with the number of GPUs: collectives counted, times modelled, weak scaling measured.

    python benchmarks/scaling_model.py [--methods an ll_r ...] [--backbone ResNet-50] [--image-size 448]
                                       [--classes 5000] [--batch-size 32] [--gpus 1 8 16 64] [--json OUT]
    python benchmarks/scaling_model.py --measure        # 1 and 2 ranks of this machine, a thread each

Counted: two ranks train a small network with the asked number of classes and images a rank, and every collective of an
update is noted: by whom (the method, or the gradients), which kind, how many bytes. Gradients are scaled to the asked
network's parameters; what a method sends does not depend on the network.

Modelled, NOT measured: a GPU computes as long as `model_costs.py` says. A collective of n ranks takes a start, which
grows with the logarithm of the number of machines, and its bytes through the slower of the links within a machine and
between machines: an all-reduce moves 2 (n - 1) / n of them, an all-gather (n - 1) times what a rank gives. Gradients
are summed bucket by bucket during the backward, two thirds of computing; what is longer than that stays visible, and so
does the last bucket, for which nothing is left to compute. `after` is the efficiency with
`deepspeed.overlap_gradients false`, where DeepSpeed sums all of them when the backward is over. Links and starts are
assumptions for 8 H100 a machine and can be given. Reading images is assumed to keep up: the last column is what that
takes on a machine.

Measured (`--measure`): updates of a rank alone and of two ranks side by side, the same number of images a rank, one
thread each, in turn: with gradients averaged `during` the backward, `after` it by DeepSpeed, and by PyTorch's own
DistributedDataParallel without DeepSpeed (`ddp`). Two ranks of one machine share its memory and caches, which two
machines do not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench_step import Setup, Variant
from benchmarks.machine import machine
from benchmarks.model_costs import MODELS, backbone_row, model_row
from spml_fast.core import distributed
from spml_fast.core.config import DataConfig, EngineConfig, ModelConfig, TrainConfig
from spml_fast.core.errors import UserError, run_command
from spml_fast.core.outputs import add_json_option, json_output
from spml_fast.data.labels import SparseLabels
from spml_fast.methods import method_names
from spml_fast.models.classifier import Classifier
from spml_fast.training.engine import init_distributed, shutdown_distributed
from spml_fast.training.gradient_buckets import BUCKET_BYTES, LAST_BUCKET_BYTES

GPUS_A_MACHINE = 8
# What stands for the network where collectives are counted, and where CPUs are measured.
SMALL, SMALL_SIZE = "resnet10t", 64
# How gradients are averaged where that is measured.
AVERAGES = ("during", "after", "ddp")
# Forwards of IGNORE beside those of assumed negative (docs/operations.md, "What a model costs").
COMPUTE = {"ignore": 2.3}


@dataclass(frozen=True)
class Collective:
    """One of an update.

    Attributes:
        owner: `gradients` or `method`.
        kind: `all_reduce` or `all_gather`.
        size: bytes that a rank gives.
    """

    owner: str
    kind: str
    size: int


@dataclass(frozen=True)
class Links:
    """Assumed rates of a machine.

    Attributes:
        inside: GB/s of a GPU to the others of its machine.
        between: GB/s of a GPU's share of the network.
        start: microseconds that a collective of one machine takes whatever it sends.
        hop: microseconds more each time the number of machines doubles.
    """

    inside: float
    between: float
    start: float
    hop: float

    def seconds(self, collective: Collective, ranks: int) -> float:
        """Time of a collective over so many ranks."""
        if ranks == 1:
            return 0.0
        machines = math.ceil(ranks / GPUS_A_MACHINE)
        moved = collective.size * (2 * (ranks - 1) / ranks if collective.kind == "all_reduce" else ranks - 1)
        rate = self.inside if machines == 1 else min(self.inside, self.between)
        return (self.start + self.hop * math.log2(machines)) * 1e-6 + moved / rate / 1e9

    def visible(self, size: int, ranks: int, backward: float) -> float:
        """Time after the backward that gradients take which are summed during it, bucket by bucket.

        Args:
            size: bytes of all gradients.
            ranks: number of GPUs.
            backward: seconds that it computes.
        """
        last = min(size, LAST_BUCKET_BYTES)
        buckets = [last, *[BUCKET_BYTES] * ((size - last) // BUCKET_BYTES), (size - last) % BUCKET_BYTES]
        sums = [self.seconds(Collective("gradients", "all_reduce", part), ranks) for part in buckets if part]
        # For the last bucket nothing is left to compute.
        return max(sums[0], sum(sums) - backward)


@contextmanager
def counted(owner: list[str], found: list[Collective]) -> Iterator[None]:
    """Inside, what goes through PyTorch's collectives is noted as `owner[0]`'s."""

    def noted(name: str, kind: str, given: int) -> Any:
        call: Callable[..., Any] = getattr(dist, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            tensor = args[given] if len(args) > given else kwargs["tensor" if "tensor" in kwargs else "input_tensor"]
            found.append(Collective(owner[0], kind, tensor.numel() * tensor.element_size()))
            return call(*args, **kwargs)

        return mock.patch.object(dist, name, run)

    gathers = noted("all_gather", "all_gather", 1), noted("all_gather_into_tensor", "all_gather", 1)
    with noted("all_reduce", "all_reduce", 0), gathers[0], gathers[1]:
        yield


def variant_of(
    method: str, args: argparse.Namespace, classes: int, size: int, folder: Path, averages: str = "during"
) -> Variant:
    """A method on drawn images, as a training has it.

    Args:
        method: its name.
        args: the command line; `batch_size` is of a rank.
        classes: C.
        size: side of the images, pixels.
        folder: for files of the engine.
        averages: how gradients are averaged, one of `AVERAGES`.
    """
    images = 4 * args.batch_size
    observed = np.random.default_rng(0).integers(classes, size=images)
    setup = Setup(
        None,
        SparseLabels.from_positives([[int(c)] for c in observed], classes, -1),
        DataConfig(image_size=size, threads=1, keep_decoded=0),
        # Every rank draws its own part.
        TrainConfig(batch_size=args.batch_size, precision="fp32"),
        EngineConfig(tensorboard=False, overlap_gradients=averages == "during"),
        Classifier(ModelConfig(backbone=args.measured if args.measure else SMALL, pretrained=False), classes, size),
        torch.device("cpu"),
        folder,
    )
    if averages != "ddp":
        return Variant("spml_fast", method, setup)
    variant = Variant("bare", method, setup)
    if distributed.world_size() > 1:
        variant.module = DistributedDataParallel(variant.module, gradient_as_bucket_view=True)
    return variant


def count_update(method: str, args: argparse.Namespace, folder: Path) -> tuple[list[Collective], int]:
    """Collectives of one update, and the bytes of the small network's gradients."""
    variant = variant_of(method, args, args.classes, SMALL_SIZE, folder)
    assert variant.engine is not None
    batches, owner = variant.batches(), ["method"]
    found: list[Collective] = []
    # The first update may prepare something.
    for _ in range(2):
        views, index = next(batches)
        found = []
        with counted(owner, found):
            owner[0] = "method"
            loss = variant.loss(views, index)
            owner[0] = "gradients"
            variant.engine.backward(loss)
            variant.engine.step()
    gradients = 4 * sum(p.numel() for p in variant.classifier.parameters() if p.requires_grad)
    variant.close()
    return found, gradients


def measure_updates(method: str, args: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Seconds of updates of this rank, by how gradients are averaged; all take turns."""
    found: dict[str, list[float]] = {}
    variants = {averages: variant_of(method, args, 80, args.image_size, folder, averages) for averages in AVERAGES}
    batches = {averages: variant.batches() for averages, variant in variants.items()}
    for step in range(2 + args.steps):
        for averages, variant in variants.items():
            distributed.barrier()
            start = time.perf_counter()
            variant.step(*next(batches[averages]), lambda part: None)
            if step >= 2:
                found.setdefault(averages, []).append(time.perf_counter() - start)
    for variant in variants.values():
        variant.close()
    return found


def worker(args: argparse.Namespace) -> None:
    """A rank: counts or measures, and rank 0 writes what it found."""
    init_distributed()
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for method in args.methods:
            if args.measure:
                found[method] = measure_updates(method, args, Path(folder))
            else:
                collectives, gradients = count_update(method, args, Path(folder))
                found[method] = {"collectives": [asdict(c) for c in collectives], "gradients": gradients}
    if distributed.is_main():
        args.worker.write_text(json.dumps(found), encoding="utf-8")
    shutdown_distributed()


def ranks(number: int) -> dict[str, Any]:
    """What rank 0 of so many processes of this program found."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
        command = [*torchrun, __file__, *sys.argv[1:], "--worker", str(out)]
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, check=False
        )
        if done.returncode:
            raise UserError("the processes of this benchmark failed; their error stands above")
        return dict(json.loads(out.read_text(encoding="utf-8")))


def modelled(args: argparse.Namespace) -> dict[str, Any]:
    """Counted collectives, and the model's rows."""
    links = Links(args.inside, args.between, args.start, args.hop)
    model = next((m for m in MODELS if m.title == args.backbone), None)
    if model is None:
        raise UserError(f"--backbone is one of {', '.join(m.title for m in MODELS)}; got {args.backbone}")
    row, channels = backbone_row(model, args.image_size, False)
    costs = model_row(row, model, channels, args.classes, 1)
    found = ranks(2)
    rows = []
    print(f"{args.backbone}, {args.image_size} px, {args.classes:,} classes, {args.batch_size} images a GPU; {links}")
    print("collectives of an update are counted, all times are modelled\n")
    print(
        "| method | GPUs | collectives of the method, bytes | computing | method | gradients | efficiency | after |",
        end="",
    )
    print(" images/s | of a machine |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for method in args.methods:
        collectives = [Collective(**c) for c in found[method]["collectives"]]
        own = [c for c in collectives if c.owner == "method"]
        # Of the asked network, not of the small one that was counted.
        size = round(4 * costs.parameters)
        compute = args.batch_size / costs.images_per_second * COMPUTE.get(method, 1.0)
        for gpus in args.gpus:
            mine = sum(links.seconds(c, gpus) for c in own)
            theirs = links.seconds(Collective("gradients", "all_reduce", size), gpus)
            seen = links.visible(size, gpus, compute * 2 / 3)
            step = compute + mine + seen
            after = compute + mine + theirs
            rate = gpus * args.batch_size / step
            rows.append(
                {"method": method, "gpus": gpus, "compute_s": compute, "method_s": mine, "gradients_s": theirs}
                | {"efficiency": compute / step, "after": compute / after, "images_per_second": rate}
            )
            print(
                f"| {method} | {gpus} | {len(own)}, {sum(c.size for c in own):,} | {1e3 * compute:.1f} ms | "
                f"{1e3 * mine:.2f} ms | {1e3 * theirs:.2f} ms | {compute / step:.1%} | {compute / after:.1%} | "
                f"{rate:,.0f} | {rate / max(gpus / GPUS_A_MACHINE, 1):,.0f} |"
            )
    return {"counted": found, "modelled": rows, "links": asdict(links)}


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Weak scaling of this machine: seconds of an update on one and on two ranks, in turn."""
    times: dict[str, dict[str, dict[int, list[float]]]] = {
        method: {averages: {1: [], 2: []} for averages in AVERAGES} for method in args.methods
    }
    for _ in range(args.rounds):
        for number in (1, 2):
            for method, found in ranks(number).items():
                for averages, values in found.items():
                    times[method][averages][number].append(statistics.median(values))
    print(f"{args.measured}, {args.image_size} px, {args.batch_size} images a rank, one thread a rank")
    for method, ways in times.items():
        for averages, of in ways.items():
            ratios = [one / two for one, two in zip(of[1], of[2], strict=True)]
            print(
                f"{method:8} {averages:6} update on 1 rank {1e3 * statistics.median(of[1]):7.1f} ms, on 2 ranks "
                f"{1e3 * statistics.median(of[2]):7.1f} ms; efficiency {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f})"
            )
    return {"measured": times}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--methods", nargs="+", choices=method_names(), default=["an", "ll_r", "ll_cp", "em", "gr", "p_asl", "ignore"]
    )
    parser.add_argument("--backbone", default="ResNet-50", help="title of a model of model_costs.py")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--classes", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, help="images a GPU or rank")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 16, 64])
    parser.add_argument("--inside", type=float, default=300.0, help="GB/s within a machine (default: %(default)s)")
    parser.add_argument("--between", type=float, default=40.0, help="GB/s of a GPU's network (default: %(default)s)")
    parser.add_argument("--start", type=float, default=20.0, help="microseconds of a collective (default: %(default)s)")
    parser.add_argument("--hop", type=float, default=10.0, help="more for twice the machines (default: %(default)s)")
    parser.add_argument("--measure", action="store_true", help="time 1 and 2 ranks of this machine instead")
    parser.add_argument("--measured", default=SMALL, help="backbone of what is timed (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    add_json_option(parser)
    args = parser.parse_args()
    args.image_size = args.image_size or (128 if args.measure else 448)
    args.batch_size = args.batch_size or (8 if args.measure else 32)
    if args.worker is not None:
        return worker(args)
    output = json_output(args, "scaling_model")
    facts = machine(torch.device("cpu"))
    print(", ".join(f"{key} {value}" for key, value in facts.items() if value is not None))
    found = measured(args) if args.measure else modelled(args)
    if output is not None:
        output.write_json({"machine": facts, **found})
    return None


if __name__ == "__main__":
    run_command(main)
