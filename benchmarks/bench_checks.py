"""What the checks of a training cost: the CPU time of each as a part of an update's.

    python benchmarks/bench_checks.py [--backbone resnet50] [--image-size 224] [--batch-size 8] [--json OUT]
    torchrun --nproc_per_node 2 benchmarks/bench_checks.py

CPU time, of all threads, is what a busy machine changes least. On a GPU the first three parts are launches, and the
fractions say nothing; whole steps with and without do. The parts, of every update:
    gradient norm   over all parameters, by PyTorch
    mark            whether losses and norm are finite, noted on the device
    reading         the marks of all ranks, every `train.log_every` updates
    agreement       ranks agree on signals and saves, over gloo; nothing where there is one
    heartbeat       a rank writes its line and reads the others', once a second, as one of --ranks; with the store
    header          the images' sizes are compared with their limits before they are decoded
    regular         a file is a file, looked at when an image is seen for the first time
Then whole steps with the checks of the update and without, in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench_input import images
from benchmarks.bench_step import EPOCH, EPOCHS, Setup, Variant
from benchmarks.machine import machine
from spml_fast.core import distributed
from spml_fast.core.config import DataConfig, EngineConfig, ModelConfig, TrainConfig
from spml_fast.core.errors import UserError, run_command
from spml_fast.core.io import require_regular
from spml_fast.core.outputs import add_json_option, json_output
from spml_fast.core.precision import set_cudnn_policy
from spml_fast.data.bad_images import pixel_limits
from spml_fast.data.labels import SparseLabels
from spml_fast.data.loader import TrainLoader
from spml_fast.data.manifest import Split
from spml_fast.methods import Progress
from spml_fast.models.classifier import Classifier
from spml_fast.runs.layout import RunLayout
from spml_fast.training import peers
from spml_fast.training.agreement import Agreement
from spml_fast.training.engine import init_distributed, shutdown_distributed
from spml_fast.training.nonfinite import NonFiniteGuard
from spml_fast.training.saving import RunCheckpoints


def cpu_ms(work: Callable[[], object], repeat: int) -> float:
    """CPU time of one call in milliseconds, the median of five rounds of `repeat` calls."""
    work()
    rounds = []
    for _ in range(5):
        start = time.process_time()
        for _ in range(repeat):
            work()
        rounds.append(1000 * (time.process_time() - start) / repeat)
    return statistics.median(rounds)


class Checked:
    """Updates of one method with the checks that a training makes, or without.

    Args:
        variant: makes the updates.
        checkpoints: as a run has them.
    """

    def __init__(self, variant: Variant, checkpoints: RunCheckpoints) -> None:
        self.variant, self.setup = variant, variant.setup
        assert variant.engine is not None and variant.setup.split is not None
        self.engine = variant.engine
        setup = self.setup
        loader = TrainLoader(
            variant.setup.split,
            setup.data,
            views=variant.method.views,
            batch_size=setup.train.batch_size,
            accumulation=1,
            seed=0,
            device=setup.device,
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
        )
        self.guard = NonFiniteGuard(setup.train, self.engine, variant.classifier, loader, checkpoints)
        self.agreement = Agreement(3)
        self.progress = Progress(EPOCH, EPOCHS, (EPOCH - 1) * 100, 100, "finetune", setup.train.lr)
        self.batches = variant.batches()
        self.loss = torch.zeros(())

    def backward(self) -> None:
        """Everything before the step."""
        views, index = next(self.batches)
        self.loss = self.variant.loss(views, index)
        self.engine.backward(self.loss)

    def step(self, checks: bool) -> float:
        """CPU seconds of an update."""
        start = time.process_time()
        if checks:
            peers.begin_update()
            self.guard.begin()
        self.backward()
        if checks:
            self.guard.step(self.loss.detach(), self.progress)
            peers.end_update("finetune", EPOCH, 1)
            self.agreement.exchange([0, 0, 0])
        else:
            self.engine.step()
        if self.setup.device.type == "cuda":
            torch.cuda.synchronize(self.setup.device)
        return time.process_time() - start

    def parts(self) -> dict[str, float]:
        """CPU milliseconds an update of what is checked on the way."""
        self.backward()
        norm = self.engine.gradient_norm_on_device()
        losses = [self.loss.detach()]
        found = {
            "gradient norm": cpu_ms(self.engine.gradient_norm_on_device, 5),
            "mark": cpu_ms(lambda: self.guard._note(losses, norm, self.progress), 200),
            "reading": cpu_ms(self.guard.check, 50) / self.setup.train.log_every,
            "agreement": cpu_ms(lambda: self.agreement.exchange([0, 0, 0]), 200),
        }
        self.engine.step()
        self.agreement.agree([0, 0, 0])
        return found


def heartbeat_ms(ranks: int) -> float:
    """CPU milliseconds a second of one of so many ranks' watch over the others, the store's part for it included."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store: Any = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, None, True, timedelta(seconds=10), wait_for_workers=False
    )
    line = json.dumps([socket.gethostname(), os.getpid(), ["finetune", 12, 12345], 24690, 100000])
    for rank in range(1, ranks):
        store.set(f"spml_fast/rank/{rank}", line)
    watch = peers.Peers(store, 0, ranks, 600.0)
    watch.stop()
    watch.thread.join()

    def beat() -> None:
        watch._write()
        store.check([peers.FAILED])
        watch.read()

    return cpu_ms(beat, 20)


def image_ms(split: Split, batch_size: int) -> dict[str, float]:
    """CPU milliseconds an update of the checks of its images.

    Args:
        split: the images.
        batch_size: images an update.
    """
    from nvidia.dali import fn, pipeline_def, types

    from spml_fast.data.dali_graph import _within_limit

    paths = [np.frombuffer(split.path(i % len(split)).encode(), np.uint8) for i in range(batch_size)]
    index = np.arange(batch_size) % len(split)

    @pipeline_def(batch_size=batch_size, num_threads=1, device_id=None, prefetch_queue_depth=1)  # type: ignore[untyped-decorator]
    def read(checked: bool) -> Any:
        encoded = fn.io.file.read(fn.external_source(name="path", dtype=types.UINT8, ndim=1))
        limit = fn.external_source(name="max_pixels", dtype=types.INT64, ndim=0)
        return (_within_limit(encoded, limit) if checked else encoded), limit

    times = {}
    for checked in (True, False):
        pipe = read(checked=checked)
        pipe.build()

        def run(pipe: Any = pipe, checked: bool = checked) -> None:
            limits = pixel_limits(split, index, 10**9) if checked else np.full(batch_size, 10**9, np.int64)
            pipe.feed_input("path", paths)
            pipe.feed_input("max_pixels", limits)
            pipe.run()

        times[checked] = cpu_ms(run, 50)
    files = [split.path(int(i)) for i in index]
    return {"header": times[True] - times[False], "regular": cpu_ms(lambda: [require_regular(p) for p in files], 50)}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--method", default="an")
    parser.add_argument("--backbone", default="resnet50", help="a timm model, from random weights")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--count", type=int, default=32, help="how many images, generated, 640 x 480")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8, help="of all ranks")
    parser.add_argument("--ranks", type=int, default=64, help="that the heartbeat is counted for")
    parser.add_argument("--rounds", type=int, default=5, help="of an update with the checks and one without")
    add_json_option(parser)
    return parser.parse_args()


def measure(args: argparse.Namespace, device: torch.device, scratch: Path) -> dict[str, Any]:
    """All figures: CPU milliseconds an update of each part, and of whole updates.

    Args:
        args: the command line.
        device: this rank's.
        scratch: a folder for images.
    """
    split = images(None, args.count, scratch)
    observed = np.random.default_rng(0).integers(args.classes, size=len(split))
    model = ModelConfig(backbone=args.backbone, pretrained=False)
    setup = Setup(
        split,
        SparseLabels.from_positives([[int(c)] for c in observed], args.classes, -1),
        DataConfig(image_size=args.image_size, threads=1, keep_decoded=0),
        TrainConfig(batch_size=args.batch_size),
        EngineConfig(tensorboard=False),
        Classifier(model, args.classes, args.image_size),
        device,
        scratch,
    )
    variant = Variant("spml_fast", args.method, setup)
    checked = Checked(variant, RunCheckpoints(RunLayout(scratch / "run"), 1, {}))
    checked.step(True)
    steps = [(checked.step(True), checked.step(False)) for _ in range(args.rounds)]
    plain = 1000 * statistics.median(without for _, without in steps)
    parts = checked.parts()
    # The heartbeat comes once a second of the clock, in which an update has had all threads.
    parts["heartbeat"] = heartbeat_ms(args.ranks) * plain / 1000 / torch.get_num_threads()
    parts |= image_ms(split, args.batch_size // distributed.world_size())
    checked.agreement.close()
    variant.close()
    ratio = statistics.median(with_checks / without for with_checks, without in steps)
    return {"update_ms": plain, "parts_ms": parts, "with_over_without": ratio}


def main() -> int:
    """Measure and print."""
    args = parse()
    out_file = json_output(args, "bench_checks")
    device = init_distributed()
    if args.batch_size % distributed.world_size():
        raise UserError(f"--batch-size is {args.batch_size}; it must be divisible by the number of ranks")
    set_cudnn_policy(device, deterministic=False)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(args, device, Path(scratch))
    if distributed.is_main():
        info = machine(device)
        print(", ".join(f"{key} {value}" for key, value in info.items() if value is not None))
        print(
            f"{args.backbone}, {args.image_size} px, batch {args.batch_size}, {distributed.world_size()} ranks: "
            f"{found['update_ms']:.0f} ms of CPU an update on a rank"
        )
        for name, value in found["parts_ms"].items():
            print(f"  {name:14s} {value:8.3f} ms  {100 * value / found['update_ms']:6.3f} %")
        total = sum(found["parts_ms"].values())
        print(f"  {'all':14s} {total:8.3f} ms  {100 * total / found['update_ms']:6.3f} %")
        print(f"whole updates with the checks over those without: {found['with_over_without']:.4f}")
        if out_file is not None:
            out_file.write_json({"machine": info, "arguments": {k: str(v) for k, v in vars(args).items()}, **found})
    shutdown_distributed()
    return 0


if __name__ == "__main__":
    run_command(main)
