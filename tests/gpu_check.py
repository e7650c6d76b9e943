"""Everything that only a machine with a GPU can tell, in one call: `python tests/gpu_check.py [--only NAME]`.

Checks, each with its time and outcome, written to a CSV with GPU, versions and commit:
  decode    mixed (nvJPEG) decoding and GPU views against the CPU pipeline, every training and evaluation view
  ops       cam_pool, large_loss and label_rows on the GPU against fp64 on the CPU, twice for bit-equality
  points    the same for label_loss with point functions of methods
  ignore    the same for IGNORE's ops: masked images in all modes and layouts, statistics, losses, gradients
  stages    a few DeepSpeed updates at ZeRO stages 0 to 3 in bf16, loss finite and falling
  sanitize  every op at small odd shapes under compute-sanitizer: accesses outside of tensors, races in shared memory
  sync      the training step under torch.cuda.set_sync_debug_mode("error"): no host-device synchronisation
  quick     the README's quick start, end to end, with its test mAP
A check whose library is not installed (DALI, DeepSpeed) is recorded as such, never as passed.
Not collected by pytest: it needs a GPU and minutes. Exit status 1 when a check failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import importlib.util
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
from typing import Any, get_args
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]


class NotInstalled(Exception):
    """A library that a check needs is not on this machine."""


def need(*modules: str) -> None:
    """Raise `NotInstalled` unless all modules can be found."""
    for name in modules:
        if importlib.util.find_spec(name.split(".")[0]) is None:
            raise NotInstalled(name)


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


def check_ops() -> str:
    """cam_pool, cam_map, large_loss and label_rows on the GPU against fp64 on the CPU."""
    from spml_kernels import cam_map, cam_pool, label_rows, large_loss, select_large
    from spml_kernels.large_loss.op import Scheme

    worst = 0.0
    # The last takes the form of the backward that skips squares.
    shapes = (((3, 7, 7, 96), 10), ((2, 14, 14, 512), 80), ((5, 5, 3, 2048), 312), ((12, 14, 14, 256), 700))
    for shape, classes in shapes:
        torch.manual_seed(0)
        features = torch.randn(shape, dtype=torch.float64)
        weight = torch.randn(classes, shape[-1], dtype=torch.float64) / shape[-1] ** 0.5
        bias = torch.randn(classes, dtype=torch.float64)
        for dtype, tolerance in ((torch.float32, 2e-4), (torch.bfloat16, 4e-2)):
            inputs = [features, weight, bias]
            low = [t.to(dtype).cuda().requires_grad_() for t in inputs]
            high = [t.detach().cpu().double().requires_grad_() for t in low]
            results = []
            for tensors in (high, low, low):
                mean, relu = cam_pool(tensors[0], tensors[1], tensors[2])
                assert relu is not None
                loss = (mean.double() * 0.7 + relu.double() * 2).sum()
                grads = torch.autograd.grad(loss, tensors)
                results.append([mean, relu, *grads])
            for reference, value, again in zip(*results, strict=True):
                assert torch.equal(value, again), "two runs differ"
                scale = reference.abs().mean()
                error = float((reference - value.cpu().double()).abs().mean() / scale)
                worst = max(worst, error if dtype == torch.float32 else 0)
                assert error < tolerance, f"cam_pool {shape} {dtype}: relative error {error}"
            ids = torch.randint(-1, classes, (shape[0], 2))
            maps = [
                cam_map(x.detach(), w.detach(), b.detach(), chosen).cpu().double()
                for (x, w, b), chosen in ((low, ids.cuda()), (high, ids))
            ]
            assert float((maps[0] - maps[1]).abs().mean()) < tolerance
        logits, codes = torch.randn(64, classes), torch.randint(-1, 2, (64, classes), dtype=torch.int8)
        for k in (0, 1, 17, 64 * classes):
            args = (torch.tensor(k), 64 * classes)
            expected, threshold = select_large(logits, codes, *args)
            found, level = select_large(logits.cuda(), codes.cuda(), args[0].cuda(), args[1])
            assert torch.equal(expected, found.cpu()) and torch.equal(threshold, level.cpu())
            for scheme in get_args(Scheme):
                one = large_loss(logits.double(), codes, expected, scheme)
                two = large_loss(logits.cuda(), codes.cuda(), found, scheme)
                assert abs(float(one) - float(two)) <= 1e-5 * abs(float(one))
        listed = codes != -1
        rows, columns = torch.nonzero(listed, as_tuple=True)
        indptr = torch.cat([torch.zeros(1, dtype=torch.int64), listed.sum(1).cumsum(0)])
        index, most = torch.randperm(64), int(listed.sum(1).max())
        arrays = (indptr.cuda(), columns.to(torch.int16).cuda(), codes[rows, columns].cuda())
        dense = label_rows(arrays[0], arrays[1], arrays[2], index.cuda(), classes, -1, most)
        assert torch.equal(dense.cpu(), codes[index])
    return f"largest fp32 relative error {worst:.1e}"


def check_points() -> str:
    """label_loss and its gradient on the GPU against fp64 on the CPU, twice for bit-equality."""
    need("timm")
    from spml_kernels import label_loss

    from spml_fast.methods.pointwise import point_examples

    torch.manual_seed(0)
    worst = 0.0
    points = [(e.point, e.params) for e in point_examples() if e.point.kernel is not None]
    for shape in ((1, 1), (16, 80), (33, 81), (128, 5000)):
        codes = torch.randint(-1, 2, shape, dtype=torch.int8)
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
            logits = (torch.randn(shape) * 4).to(dtype)
            for point, params in points:
                results = []
                for leaf, known in ((logits.double(), codes), *[(logits.cuda(), codes.cuda())] * 2):
                    leaf = leaf.clone().requires_grad_()
                    loss = label_loss(leaf, known, point, params)
                    results.append([loss, *torch.autograd.grad(loss * 0.37, leaf)])
                for reference, value, again in zip(*results, strict=True):
                    assert torch.equal(value, again), f"label_loss {point.name}: two runs differ"
                    off = (reference - value.cpu().double()).detach().square().mean().sqrt()
                    error = float(off / reference.detach().square().mean().sqrt().clamp(min=1e-30))
                    worst = max(worst, error if dtype == torch.float32 else 0)
                    assert error < tolerance, f"label_loss {point.name} {shape} {dtype}: relative error {error}"
    return f"largest fp32 relative error {worst:.1e}"


def check_ignore() -> str:
    """Masked images and IGNORE's two passes on the GPU against fp64 on the CPU, twice for bit-equality."""
    from spml_kernels import cam_mask, ignore_loss, ignore_statistics
    from spml_kernels.cam_mask.op import MapNorm
    from spml_kernels.ignore_loss.op import LossForm

    def exact(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().cpu().double() if tensor.is_floating_point() else tensor.cpu()

    torch.manual_seed(0)
    worst = 0.0
    for (cells, side, channels, chosen), dtype in (
        ((14, 448, 2048, 1), torch.bfloat16),
        ((14, 448, 512, 4), torch.float32),
        ((7, 225, 96, 2), torch.float16),
    ):
        features = torch.randn(20, cells, cells, channels).to(dtype).cuda()
        weight, bias = torch.randn(80, channels).cuda() / channels**0.5, torch.randn(80).cuda()
        classes = torch.randint(-1, 80, (20, chosen)).cuda()
        for layout in (torch.channels_last, torch.contiguous_format):
            images = torch.randn(20, 3, side, side, device="cuda").to(dtype).to(memory_format=layout)
            for norm in get_args(MapNorm):
                one, two = (cam_mask(features, weight, bias, classes, images, 0.8, norm, 16) for _ in range(2))
                assert torch.equal(one, two), f"cam_mask {norm}: two runs differ"
                assert one.is_contiguous(memory_format=layout)
                x, w, b, ids, pixels = (exact(t) for t in (features, weight, bias, classes, images))
                wanted = cam_mask(x, w, b, ids, pixels, 0.8, norm, 16)
                # Pixels at the threshold itself may fall to either side.
                difference = float((one.cpu().double() != wanted).double().mean())
                worst = max(worst, difference)
                assert difference < 1e-3, f"cam_mask {norm} {dtype} {layout}: {difference:.2%} of the pixels differ"
    error = 0.0
    for rows, classes_in_all in ((16, 80), (128, 81), (128, 5000)):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
            weak, strong, masked = (torch.randn(rows, classes_in_all).mul(4).to(dtype).cuda() for _ in range(3))
            codes = torch.randint(-1, 2, (rows, classes_in_all), dtype=torch.int8).cuda()
            gap, average = torch.tensor(2.0).cuda(), torch.randn(classes_in_all).cuda()
            for form in get_args(LossForm):
                results = []
                for give in (exact, torch.Tensor.clone, torch.Tensor.clone):
                    leaves = [give(t).requires_grad_() for t in (weak, strong)]
                    views, known, limit, averages = (give(t) for t in (masked, codes, gap, average))
                    terms = ignore_loss(leaves[0], leaves[1], views, known, limit, averages, form, truth=known.abs())
                    loss = terms.spbc / rows + terms.ign / (rows * classes_in_all) - terms.reg / (rows * 7)
                    grads = torch.autograd.grad(loss, leaves)
                    results.append([*terms, *grads, ignore_statistics(leaves[0], views, known)])
                for reference, value, again in zip(*results, strict=True):
                    assert torch.equal(value, again), "ignore_loss: two runs differ"
                    off = (reference.double() - value.cpu().double()).detach().square().mean().sqrt()
                    off = float(off / reference.detach().double().square().mean().sqrt().clamp(min=1e-30))
                    error = max(error, off if dtype == torch.float32 else 0)
                    assert off < tolerance, f"ignore_loss {rows} x {classes_in_all} {dtype} {form}: error {off}"
    return f"masks differ at {worst:.1e} of the pixels, largest fp32 relative error of the losses {error:.1e}"


def small_calls(device: str) -> None:
    """Every op once or twice at small odd shapes, forward and backward, for a tool that watches what kernels access."""
    from spml_kernels import cam_mask, cam_pool, ignore_loss, ignore_statistics, label_loss, label_rows
    from spml_kernels.cam_mask.op import MapNorm
    from spml_kernels.cam_pool import tiles
    from spml_kernels.large_loss.op import _KEPT, Ties, large_loss_step

    torch.manual_seed(0)
    shapes = (("tile", torch.float16, 3, 70), ("vendor", torch.bfloat16, 16, 70), ("tile", torch.float32, 3, 9))
    for way, dtype, batch, classes in shapes:
        patched = {"cam_pool_way": lambda *_, way=way: way, "DEFAULT": (90, way)}
        with mock.patch.multiple(tiles, **patched):
            tensors = [torch.randn(batch, 5, 7, 40), torch.randn(classes, 40), torch.randn(classes)]
            leaves = [t.to(device, dtype).requires_grad_() for t in tensors]
            mean, relu = cam_pool(leaves[0], leaves[1], leaves[2])
            assert relu is not None
            torch.autograd.grad((mean * 0.7 + relu).sum(), leaves)
    # One program holds the first of the two.
    for rows, classes in ((3, 7), (28, 601)):
        logits = torch.randn(rows, classes, device=device, requires_grad=True)
        codes = torch.randint(-1, 2, (rows, classes), dtype=torch.int8, device=device)
        for ties in get_args(Ties):
            step = large_loss_step(logits, codes, torch.tensor(11, device=device), 13, "correct", ties)
            torch.autograd.grad(step.loss, logits)
        torch.autograd.grad(label_loss(logits, codes, _KEPT), logits)
        listed = codes.cpu() != -1
        entry = torch.nonzero(listed, as_tuple=True)
        indptr = torch.cat([torch.zeros(1, dtype=torch.int64), listed.sum(1).cumsum(0)])
        arrays = (indptr.to(device), entry[1].to(device, torch.int16), codes.cpu()[entry].to(device))
        index, most = torch.randperm(rows).to(device), int(listed.sum(1).max())
        label_rows(arrays[0], arrays[1], arrays[2], index, classes, -1, most)
        weak, strong = (torch.randn(rows, classes, device=device, requires_grad=True) for _ in range(2))
        masked, average = torch.randn(rows, classes, device=device), torch.randn(classes, device=device)
        gap = torch.tensor(1.0, device=device)
        terms = ignore_loss(weak, strong, masked, codes, gap, average, "logits", truth=codes.abs())
        torch.autograd.grad(terms.spbc + terms.ign - terms.reg, (weak, strong))
        ignore_statistics(weak, masked, codes)
    features, weight, bias = torch.randn(3, 5, 5, 33), torch.randn(9, 33), torch.randn(9)
    ids = torch.tensor([[3, -1], [-1, -1], [0, 8]])
    for layout in (torch.channels_last, torch.contiguous_format):
        images = torch.randn(3, 3, 37, 37).to(memory_format=layout)
        for norm in get_args(MapNorm):
            x, w, b, chosen, pixels = (t.to(device) for t in (features, weight, bias, ids, images))
            cam_mask(x, w, b, chosen, pixels, 0.5, norm, 2)


def check_sanitize() -> str:
    """`small_calls` under compute-sanitizer's memcheck and racecheck."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        raise NotInstalled("compute-sanitizer")
    # Without PyTorch's pool, so that every tensor is an allocation whose end is known.
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    env["SPML_KERNELS"] = "triton"
    notes = []
    for kind in ("memcheck", "racecheck"):
        words = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, __file__, "--small"]
        done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=400)
        assert done.returncode == 0, f"{kind}: {(done.stdout + done.stderr)[-1500:]}"
        notes.append(f"{kind}: {done.stdout.strip().splitlines()[-1].strip('= ')}")
    return ", ".join(notes)


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


def check_sync() -> str:
    """Method and head of a training step with synchronisation forbidden."""
    need("timm")
    from spml_fast.core.batch import Batch
    from spml_fast.core.config import ModelConfig
    from spml_fast.data.labels import LabelStore, SparseLabels
    from spml_fast.methods import Progress, get_method
    from spml_fast.models.classifier import Classifier

    store = LabelStore(SparseLabels.from_positives([[i % 10] for i in range(256)], 10, -1), "cuda")
    model = ModelConfig(backbone="resnet18", pretrained=False)
    classifier = Classifier(model, 10, 64).cuda().to(memory_format=torch.channels_last)
    images = torch.randn(32, 3, 64, 64, device="cuda").to(memory_format=torch.channels_last)
    index = torch.arange(32, device="cuda")
    progress = Progress(5, 10, 40, 10)
    names = ("an", "ll_r", "ll_ct", "ll_cp", "ignore")
    for name in names:
        cls = get_method(name)
        method = cls(cls.Options(name=name), store).cuda()

        def step(method: torch.nn.Module = method) -> None:
            batch = Batch({"weak": images, "strong": images}, store.rows(index), index, 32)
            method(classifier, batch, progress).loss.backward()

        step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return "none in " + ", ".join(names)


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
    "sanitize": check_sanitize,
    "sync": check_sync,
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
    parser.add_argument("--out", type=Path, help="CSV file; default benchmarks/results/gpu_check_<GPU>.csv")
    parser.add_argument("--only", nargs="+", choices=sorted(CHECKS), help="run these alone")
    parser.add_argument("--commit", help="commit to record where git is not at hand")
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no GPU on this machine; nothing was checked", file=sys.stderr)
        return 2
    if args.small:
        small_calls("cuda")
        torch.cuda.synchronize()
        return 0
    gpu = torch.cuda.get_device_name(0)
    from benchmarks.kernel_report import commit as checked_out

    commit = args.commit or checked_out()
    versions = " ".join(f"{p}={version(p)}" for p in ("torch", "triton", "timm", "deepspeed", "nvidia-dali-cuda130"))
    out = args.out or ROOT / "benchmarks" / "results" / f"gpu_check_{gpu.replace(' ', '_')}.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    rows, failed = [], False
    for name in args.only or CHECKS:
        start = time.perf_counter()
        try:
            outcome, note = "passed", CHECKS[name]()
        except NotInstalled as error:
            outcome, note = "not installed", str(error)
        except Exception:  # every failure is recorded with its traceback, and the rest still runs
            outcome, note, failed = "FAILED", traceback.format_exc()[-1500:], True
        seconds = time.perf_counter() - start
        print(f"{name:8} {outcome:14} {seconds:6.1f} s  {note}", flush=True)
        rows.append([name, outcome, f"{seconds:.1f}", note.replace("\n", " | "), gpu, versions, commit])
        # After every check, so that one that is stopped from outside takes no other with it.
        with out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["check", "outcome", "seconds", "note", "gpu", "versions", "commit"])
            writer.writerows(rows)
    print(f"written to {out}")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
