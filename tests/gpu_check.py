"""Everything that only a machine with a GPU can tell, in one call: `python tests/gpu_check.py [--only NAME ...]`.

Checks, each with its time and outcome, written to a CSV with GPU, versions and commit:
  ops        cam_pool, large_loss and label_rows on the GPU against fp64 on the CPU, twice for bit-equality
  points     the same for label_loss with point functions of methods
  ignore     the same for IGNORE's ops: masked images in all modes and layouts, statistics, losses, gradients
  repeat     every op, in every way that heuristics know, 200 times at its largest shape: all bits equal
  devices    every op on another stream, and on a card that is not the current one where there are two
  sync       the training step under torch.cuda.set_sync_debug_mode("error"): no host-device synchronisation
  memcheck   every op at small odd shapes under compute-sanitizer: accesses outside of tensors
  racecheck  the same: races in shared memory. A hit in a kernel with wgmma wants a look: there have been false ones
  decode     mixed (nvJPEG) decoding and GPU views against the CPU pipeline, every training and evaluation view
  stages     a few DeepSpeed updates at ZeRO stages 0 to 3 in bf16, loss finite and falling
  quick      the README's quick start, end to end, with its test mAP
A check whose library is not installed (DALI, DeepSpeed) is recorded as such, never as passed.
Not collected by pytest: it needs a GPU and minutes. Exit status 1 when a check failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks.kernel_gpu import prepare_process  # noqa: E402
from benchmarks.kernel_report import commit as checked_out  # noqa: E402
from benchmarks.kernel_report import merge_csv  # noqa: E402
from tests.support.gpu_ops import (  # noqa: E402
    NotInstalled,
    check_devices,
    check_ignore,
    check_ops,
    check_points,
    check_repeat,
    check_sync,
    need,
    small_calls,
)


def check_decode() -> str:
    """GPU views against CPU views on the digit scenes and on larger generated images."""
    need("nvidia.dali")
    import numpy as np
    from PIL import Image

    from spml_fast.core.config import DataConfig
    from spml_fast.data.labels import SparseLabels
    from spml_fast.data.loader import EvalLoader, TrainLoader
    from spml_fast.prepare.manifest_writer import ManifestWriter

    folder = Path(tempfile.mkdtemp())
    images = folder / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for i in range(16):
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(images / f"{i}.jpg", quality=92)
    labels = SparseLabels.from_positives([[i % 3] for i in range(16)], 3, 0)
    writer = ManifestWriter(folder / "data", "check", ["a", "b", "c"], images)
    paths = [f"{i}.jpg" for i in range(16)]
    writer.add_split("train", known=labels, paths=paths, width=[640] * 16, height=[480] * 16)
    split = writer.finish({}).split("train")
    worst = {}
    for crop in ("squash", "random_resized"):
        config = DataConfig(image_size=224, train_crop=crop)
        out = {}
        for device in (torch.device("cpu"), torch.device("cuda", 0)):
            shared: dict[str, Any] = {
                "device": device,
                "mean": [0.0] * 3,
                "std": [1 / 255.0] * 3,
                "world_size": 1,
                "rank": 0,
            }
            train = TrainLoader(split, config, views=("weak", "strong"), batch_size=8, accumulation=1, seed=1, **shared)
            views = [v for update in train.epoch(1) for v in update]
            out[device.type] = {n: torch.cat([v.views[n].cpu() for v in views]) for n in ("weak", "strong")}
            evaluation = EvalLoader(split, config, batch_size=8, **shared)
            out[device.type]["eval"] = torch.cat([v.views["eval"].cpu() for v in evaluation])
        for name in out["cpu"]:
            worst[f"{crop} {name}"] = float((out["cpu"][name] - out["cuda"][name]).abs().mean())
    assert max(worst.values()) < 1.5, f"mean difference in grey levels: {worst}"
    return "mean difference in grey levels: " + ", ".join(f"{k} {v:.3f}" for k, v in worst.items())


def check_sanitize(kind: str) -> str:
    """`small_calls` under one tool of compute-sanitizer."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        raise NotInstalled("compute-sanitizer")
    # Without PyTorch's pool, so that every tensor is an allocation whose end is known.
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    env["SPML_KERNELS"] = "triton"
    options = ["--racecheck-detect-level", "error"] if kind == "racecheck" else []
    words = [tool, "--tool", kind, *options, "--error-exitcode", "9", sys.executable, __file__, "--small"]
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=400)
    assert done.returncode == 0, (done.stdout + done.stderr)[-1500:]
    return done.stdout.strip().splitlines()[-1].strip("= ")


def train(run: Path, *options: str) -> dict[str, object]:
    """Run launch/train.py in this environment; returns results.json."""
    words = [sys.executable, str(ROOT / "launch" / "train.py"), "--run.dir", str(run), *options]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(words, capture_output=True, text=True, cwd=run.parent, env=env, timeout=560)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    result: dict[str, object] = json.loads((run / "results.json").read_text())
    return result


def check_stages() -> str:
    """One short bf16 run at every ZeRO stage."""
    need("deepspeed", "nvidia.dali", "jsonargparse")
    folder, notes = Path(tempfile.mkdtemp()), []
    recipe = str(ROOT / "launch" / "configs" / "digits.yaml")
    for stage in range(4):
        run = folder / f"stage{stage}"
        options = ["--config", recipe, "--train.epochs", "2", "--deepspeed.zero_stage", str(stage)]
        train(run, *options, "--train.precision", "bf16")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses = [entry["loss"] for entry in lines if entry["kind"] == "epoch"]
        assert losses[1] < losses[0], f"stage {stage}: {losses}"
        notes.append(f"stage {stage} {losses[0]:.3f} -> {losses[1]:.3f}")
    return ", ".join(notes)


def check_quick() -> str:
    """The quick start."""
    need("deepspeed", "nvidia.dali", "jsonargparse")
    results = train(Path(tempfile.mkdtemp()) / "quick")
    alphas = results["alpha"]
    assert isinstance(alphas, dict) and alphas["5"]["map"] > 95, alphas
    return (
        f"test mAP {alphas['1']['map']:.2f} / {alphas['5']['map']:.2f} at alpha 1 / 5, "
        f"{results['images_per_second']:.0f} images/s, data wait {results['data_wait']:.1%}"
    )


CHECKS: dict[str, Callable[[], str]] = {
    "ops": check_ops,
    "points": check_points,
    "ignore": check_ignore,
    "repeat": check_repeat,
    "devices": check_devices,
    "sync": check_sync,
    "memcheck": functools.partial(check_sanitize, "memcheck"),
    "racecheck": functools.partial(check_sanitize, "racecheck"),
    "decode": check_decode,
    "stages": check_stages,
    "quick": check_quick,
}


def version(package: str) -> str:
    """Installed version, or `none`."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def main() -> int:
    """Run the checks and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--out",
        type=Path,
        help="CSV file, to which rows are added; default benchmarks/results/gpu_check_<GPU>.csv",
    )
    parser.add_argument("--only", nargs="+", choices=sorted(CHECKS), help="run these alone")
    parser.add_argument("--commit", help="commit to record where git is not at hand")
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no GPU on this machine; nothing was checked", file=sys.stderr)
        return 2
    # Neither the reference nor one way for all names, whatever the environment says.
    prepare_process()
    if args.small:
        small_calls("cuda")
        torch.cuda.synchronize()
        return 0
    gpu = torch.cuda.get_device_name(0)
    commit = args.commit or checked_out()
    versions = " ".join(f"{p}={version(p)}" for p in ("torch", "triton", "timm", "deepspeed", "nvidia-dali-cuda130"))
    out = args.out or ROOT / "benchmarks" / "results" / f"gpu_check_{gpu.replace(' ', '_')}.csv"
    if out.exists() and not out.read_text(encoding="utf-8").startswith("check,"):
        print(f"--out {out} is no table of these checks; give another name", file=sys.stderr)
        return 2
    failed = False
    for name in args.only or CHECKS:
        start = time.perf_counter()
        try:
            outcome, note = "passed", CHECKS[name]()
        except NotInstalled as error:
            outcome, note = "not installed", str(error)
        except Exception:  # every failure is recorded with its traceback, and the rest still runs
            outcome, note, failed = "FAILED", traceback.format_exc()[-1500:], True
        seconds = time.perf_counter() - start
        print(f"{name:10} {outcome:14} {seconds:6.1f} s  {note}", flush=True)
        row = {"check": name, "outcome": outcome, "seconds": f"{seconds:.1f}", "note": note.replace("\n", " | ")}
        # After every check, so that one that is stopped from outside takes no other with it.
        merge_csv(out, [row | {"gpu": gpu, "versions": versions, "commit": commit}], key=("check",))
    print(f"written to {out}")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
