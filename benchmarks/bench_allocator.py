"""A training step on a CPU with memory given back to the system and with memory kept, in turn.

    python benchmarks/bench_allocator.py [--backbone resnet50] [--image-size 224] [--batch-size 8] [--json OUT]

Each round starts two processes, of which one calls `spml_fast.core.allocator.keep_freed_memory`, as every process of
the program does that computes on a CPU. A step is forward, backward and a fused Adam of a plain timm model in fp32 and
channels_last; both end with the same loss, bit for bit, or the benchmark fails. Printed are wall time of the median
step, time that the system spent for the process in a step, and the peak of the process's memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import machine
from spml_fast.core.allocator import keep_freed_memory
from spml_fast.core.errors import UserError, run_command
from spml_fast.core.outputs import add_json_option, json_output

CLASSES = 80
# Steps before times are taken: the first ones make what later ones find.
WARM_UP = 2


def steps(args: argparse.Namespace) -> dict[str, Any]:
    """Times of steps in this process."""
    if args.worker == "kept" and not keep_freed_memory():
        raise UserError("malloc has settings of its own here, or is not glibc's; see docs/environment.md")
    torch.manual_seed(0)
    model = timm.create_model(args.backbone, num_classes=CLASSES).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), 1e-5, fused=True)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size)
    images, labels = images.to(memory_format=torch.channels_last), torch.zeros(args.batch_size, CLASSES)
    wall, system = [], []
    for _ in range(WARM_UP + args.steps):
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_stime
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wall.append(1000 * (time.perf_counter() - start))
        system.append(1000 * (resource.getrusage(resource.RUSAGE_SELF).ru_stime - before))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    times = {"wall_ms": statistics.median(wall[WARM_UP:]), "system_ms": statistics.median(system[WARM_UP:])}
    return times | {"peak_mib": peak, "loss": loss.item()}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", choices=("given back", "kept"), help=argparse.SUPPRESS)
    add_json_option(parser)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(steps(args)))
        return
    found: dict[str, list[dict[str, Any]]] = {"given back": [], "kept": []}
    output = json_output(args, "bench_allocator")
    for _ in range(args.rounds):
        for way, rounds in found.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--worker", way]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                raise UserError("a process of this benchmark failed; its error stands above")
            rounds.append(json.loads(done.stdout.splitlines()[-1]))
    if len(losses := {one["loss"] for rounds in found.values() for one in rounds}) > 1:
        raise UserError(f"processes disagree on the loss: {sorted(losses)}")
    for way, rounds in found.items():
        wall, system, peak = (statistics.median(one[k] for one in rounds) for k in ("wall_ms", "system_ms", "peak_mib"))
        print(f"memory {way:10}  step {wall:6.0f} ms, system {system:5.0f} ms of processor time, peak {peak:6.0f} MiB")
    pairs = zip(found["given back"], found["kept"], strict=True)
    ratios = [back["wall_ms"] / kept["wall_ms"] for back, kept in pairs]
    print(f"kept is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})")
    if output is not None:
        setting = {name: getattr(args, name) for name in ("backbone", "image_size", "batch_size", "steps")}
        output.write_json({"machine": machine(torch.device("cpu")), "setting": setting, "rounds": found})


if __name__ == "__main__":
    run_command(main)
