"""Training and evaluation with timm's own parts, and with ours, on the same machine.

    python benchmarks/bench_vs_timm.py [--parts step metric] [--quick] [--json OUT] [--results DIR]
                                       [--data.dir MANIFEST] [--backbone test_resnet] [--image-size 64] [--loss bce]

step    the same images, labels, network, loss, optimizer, learning rate and precision, from random weights: our
        loader, classifier, method, engine and evaluation, and timm's loader, task, optimizer and evaluator (what
        differs from timm's script: timm_rival.py). Images per second, time to a mAP of --target on the evaluated split
        (training and evaluations), time of an evaluation, and memory: of all processes on a CPU, on the GPU where
        there is one. Default: the digit scenes.
metric  the scores of a whole split to its metrics, and nothing else, at the sizes of COCO (40,137 x 80, all labels
        known) and OpenImages V6 (125,436 x 9,605, of which 1,799,883 pairs are annotated). Dense: `evaluate_scores`
        (every convention of mAP, threshold metrics) and `compute` of timm's evaluator (mAP and F1). Pairs: timm has no
        unknown labels, so the exact rival is its average precision of one class after the other, on the annotated
        pairs alone, grouped by class before its clock starts; ours is `average_precision_pairs`.

Before anything is timed both must say the same: the losses of the same logits, and the AP of every class, to 1e-9;
ties are one threshold, and classes without a positive count as 0, in both. Every measurement is a process of its own;
the two take turns, and medians are reported. Goals: a step 1.2 times as fast, an evaluation 5 times on dense labels and
100 times on pairs, half the memory.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench_evaluation import dense_data, pair_data
from benchmarks.child_usage import usage_of
from benchmarks.kernel_report import Row, commit, merge_csv
from benchmarks.machine import machine
from benchmarks.openimages_run import run_stage
from spml_fast.core.errors import UserError, run_command
from spml_fast.core.outputs import add_json_option, json_output

SIDES = ("spml_fast", "timm")
TOLERANCE = 1e-9
GOALS = {"step": 1.2, "dense": 5.0, "pairs": 100.0, "memory": 2.0}
# Images, classes, and mean positives of an image or annotated pairs.
CASES: dict[str, tuple[int, int, float]] = {"coco": (40_137, 80, 2.9), "openimages": (125_436, 9605, 1_799_883)}
QUICK_CASES: dict[str, tuple[int, int, float]] = {"coco": (40_137, 80, 2.9), "openimages": (12_543, 960, 179_988)}


def peak_beside(function: Callable[[], Any]) -> tuple[Any, int]:
    """A call's result, and the most bytes that the process has beside what it had before."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

    # What was freed before would be taken again, and not be seen.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    # The peak starts anew.
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS:")
    return function(), max(0, status("VmHWM:") - before)


def timm_classes(
    classes: npt.NDArray[np.int32], scores: npt.NDArray[np.float32], codes: npt.NDArray[np.int8], num_classes: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Scores [n, 1] and targets [n, 1] of every class's annotated pairs, for timm's average precision.

    Args:
        classes: int [P].
        scores: float32 [P].
        codes: int8 [P], 0 or 1.
        num_classes: C.
    """
    order = np.argsort(classes, kind="stable")
    bounds = np.searchsorted(classes[order], np.arange(1, num_classes))
    parts = (np.split(values[order], bounds) for values in (scores, codes == 1))
    return [tuple(torch.from_numpy(v)[:, None] for v in pair) for pair in zip(*parts, strict=True)]  # type: ignore[misc]


def metric_calls(side: str, case: str, size: tuple[int, int, float]) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """The call that is timed, and what makes AP of every class, 0 without a positive, of its result.

    Args:
        side: `spml_fast` or `timm`.
        case: `coco` or `openimages`.
        size: images, classes, and positives or pairs.
    """
    from spml_fast.evaluation import average_precision, metrics

    images, num_classes, amount = size
    if case == "coco":
        scores, codes = dense_data(images, num_classes, amount)
        if side == "spml_fast":
            return lambda: metrics.evaluate_scores(scores, codes), lambda r: [a or 0.0 for a in r["per_class_ap"]]
        from timm.task.evaluator import MultiLabelClassificationEvaluator, _average_precision

        evaluator = MultiLabelClassificationEvaluator()
        output, target = torch.from_numpy(scores), torch.from_numpy((codes == 1).astype(np.float32))
        for start in range(0, images, 256):
            evaluator.update(output[start : start + 256], target[start : start + 256])

        def checked(result: dict[str, float]) -> list[float]:
            ap = 100 * _average_precision(output, target)
            if abs(float(ap.mean()) - result["map"]) > 100 * TOLERANCE:
                raise UserError("timm's mAP is not the mean of its AP, so nothing is timed")
            return [float(a) for a in ap]

        return evaluator.compute, checked
    pairs = pair_data(images, num_classes, int(amount))
    if side == "spml_fast":
        return (
            lambda: average_precision.average_precision_pairs(
                pairs.classes, pairs.scores, pairs.codes, num_classes, row=pairs.rows
            ),
            lambda result: (100 * np.nan_to_num(result.ap)).tolist(),
        )
    from timm.task.evaluator import _average_precision

    columns = timm_classes(pairs.classes, pairs.scores, pairs.codes, num_classes)
    return (
        lambda: [_average_precision(score, target) for score, target in columns],
        lambda result: [100 * float(ap[0]) for ap in result],
    )


def metric_worker(side: str, case: str, size: tuple[int, int, float], repeats: int) -> dict[str, Any]:
    """Seconds of `repeats` calls, memory beside the scores, and AP of every class in per cent.

    Args:
        side: `spml_fast` or `timm`.
        case: `coco` or `openimages`.
        size: images, classes, and positives or pairs.
        repeats: timed calls, after one that warms up and tells the memory.
    """
    call, ap_of = metric_calls(side, case, size)
    result, extra = peak_beside(call)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return {"seconds": times, "extra_bytes": extra, "ap": ap_of(result)}


def step_worker(side: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train some epochs and evaluate after each; what every epoch took.

    Args:
        side: `spml_fast` or `timm`.
        options: the command line.
        folder: of the Manifest.
    """
    from spml_fast.data.manifest import Manifest
    from spml_fast.training.engine import init_distributed, shutdown_distributed

    device = init_distributed()
    torch.manual_seed(options.seed)
    manifest = Manifest(folder)
    splits = [manifest.split(name) for name in (options.train_split, options.eval_split)]
    training: Any
    if side == "timm":
        from benchmarks.timm_rival import TimmTraining

        training = TimmTraining(splits, manifest.num_classes, options, device)
    else:
        from benchmarks.own_training import OwnTraining

        training = OwnTraining(splits, manifest.classes, options, device, folder)
    epochs = []
    for epoch in range(1, options.epochs + 1):
        marks = [time.perf_counter()]
        images = training.train_epoch(epoch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        marks.append(time.perf_counter())
        score = training.evaluate()
        marks.append(time.perf_counter())
        epochs.append({"images": images, "train_s": marks[1] - marks[0], "eval_s": marks[2] - marks[1], "map": score})
    training.close()
    gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    shutdown_distributed()
    return {"epochs": epochs, "gpu_bytes": gpu}


def same_losses(name: str) -> float:
    """Relative difference of both losses and their gradients on the same logits; `UserError` where they differ."""
    from timm.loss import create_classification_loss

    from benchmarks.timm_rival import LOSSES
    from spml_fast.methods import loss

    theirs, method, own = LOSSES[name]
    generator = torch.Generator().manual_seed(0)
    codes = (torch.rand(16, 12, generator=generator) < 0.3).to(torch.int8)
    values, slopes = [], []
    for function in (
        lambda z: loss(method, z, codes, **own),
        lambda z: create_classification_loss(multi_label=True, **theirs)(z, codes.float()),
    ):
        logits = torch.randn(16, 12, generator=torch.Generator().manual_seed(1)).mul(3).requires_grad_()
        value = function(logits)
        value.backward()
        assert logits.grad is not None
        values.append(value.detach())
        slopes.append(logits.grad)
    worst = max(float((a - b).norm() / b.norm()) for a, b in (values, slopes))
    if not worst <= 1e-5:
        raise UserError(f"the losses {name} of both differ by {worst:.1e} on the same logits, so nothing is timed")
    return worst


def time_to(epochs: Sequence[dict[str, float]], target: float) -> float | None:
    """Seconds of training and evaluating until mAP is at least `target`; None where it is not reached."""
    taken = 0.0
    for epoch in epochs:
        taken += epoch["train_s"] + epoch["eval_s"]
        if epoch["map"] >= target:
            return taken
    return None


def ask(worker: Sequence[str], out: Path) -> dict[str, Any]:
    """What a worker of this program writes."""
    usage_of([sys.executable, __file__, *worker, "--worker-out", str(out)])
    answer: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return answer


def compare_metrics(options: argparse.Namespace, scratch: Path) -> list[Row]:
    """Rows of the metric part."""
    rows = []
    cases = QUICK_CASES if options.quick else CASES
    for case, size in cases.items():
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for _ in range(options.rounds):
            for side in SIDES:
                found[side].append(ask(["--worker", "metric", side, case, *options.words], scratch / "out.json"))
        ap = {side: np.array(answers[0]["ap"]) for side, answers in found.items()}
        worst = float(np.abs(ap["timm"] - ap["spml_fast"]).max())
        if not worst <= 100 * TOLERANCE:
            raise UserError(f"{case}: AP of a class differs by {worst:.2g} points between the two; nothing is compared")
        seconds = {s: statistics.median(t for a in found[s] for t in a["seconds"]) for s in SIDES}
        memory = {s: max(a["extra_bytes"] for a in found[s]) for s in SIDES}
        shape = f"{size[0]} x {size[1]}" + ("" if case == "coco" else f", {int(size[2])} pairs")
        goal = "dense" if case == "coco" else "pairs"
        rows.append(row_of("metric", shape, "evaluation s", seconds, GOALS[goal]))
        rows.append(row_of("metric", shape, "memory bytes", memory, GOALS["memory"]))
        rows[-2]["apart"] = worst
    return rows


def compare_steps(options: argparse.Namespace, scratch: Path) -> list[Row]:
    """Rows of the step part."""
    apart = same_losses(options.loss)
    folder = Path(options.data_dir) if options.data_dir else make_digits(scratch)
    words = ["--data.dir", str(folder), *options.words]
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    memory: dict[str, float] = {}
    for side in SIDES:
        # Looking at the memory of all processes takes time, so this training is not timed.
        out = scratch / f"{side}.json"
        command = [sys.executable, __file__, "--worker", "step", side, "-", *words, "--epochs", "1"]
        stage, _ = run_stage(side, [*command, "--worker-out", str(out)], scratch / f"{side}.log", out)
        gpu = json.loads(out.read_text(encoding="utf-8"))["gpu_bytes"]
        memory[side] = gpu if gpu is not None else stage.peak_gib * 2**30
    for _ in range(options.rounds):
        for side in SIDES:
            found[side].append(ask(["--worker", "step", side, "-", *words], scratch / "out.json"))
    # Processes of loaders start in the first epoch.
    warm = {s: [e for a in found[s] for e in (a["epochs"][1:] or a["epochs"])] for s in SIDES}
    rate = {s: statistics.median(e["images"] / e["train_s"] for e in warm[s]) for s in SIDES}
    reached = {s: [time_to(a["epochs"], options.target) for a in found[s]] for s in SIDES}
    until = {s: None if None in reached[s] else statistics.median(filter(None, reached[s])) for s in SIDES}
    last = {s: statistics.median(a["epochs"][-1]["map"] for a in found[s]) for s in SIDES}
    evaluation = {s: statistics.median(e["eval_s"] for e in warm[s]) for s in SIDES}
    shape = f"{options.backbone} {options.image_size} px B {options.batch_size} {options.loss} {options.precision}"
    rows = [
        row_of("step", shape, "images/s", rate, GOALS["step"], larger=True),
        row_of("step", shape, f"s to mAP {options.target:g}", until, None),
        row_of("step", shape, "evaluation with forward s", evaluation, None),
        row_of("step", shape, "memory bytes", memory, GOALS["memory"]),
        row_of("step", shape, f"mAP after {options.epochs} epochs", last, None, larger=True),
    ]
    rows[0]["apart"] = apart
    return rows


def make_digits(scratch: Path) -> Path:
    """The digit scenes, every label known."""
    from spml_fast.prepare.datasets.digits import prepare_digits

    folder = scratch / "digits"
    prepare_digits(folder)
    return folder


def row_of(
    part: str, case: str, figure: str, values: Mapping[str, float | None], goal: float | None, larger: bool = False
) -> Row:
    """One line of the table.

    Args:
        part: `step` or `metric`.
        case: what was measured.
        figure: name and unit.
        values: of both sides; None where there is none.
        goal: how many times better ours should be; None where none is set.
        larger: whether more is better.
    """
    own, theirs = (values[side] for side in SIDES)
    ratio = None if not own or not theirs else own / theirs if larger else theirs / own
    row: Row = {"part": part, "case": case, "figure": figure, "spml_fast": own, "timm": theirs, "ratio": ratio}
    return row | {"goal": goal, "reached": None if goal is None or ratio is None else ratio >= goal, "apart": None}


def line(row: Row) -> str:
    """A row as text."""

    def text(value: float | None) -> str:
        return "-" if value is None else f"{value / 1e6:,.0f} MB" if "bytes" in row["figure"] else f"{value:,.4g}"

    ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
    goal = "" if row["goal"] is None else f"  goal {row['goal']:g}: {'reached' if row['reached'] else 'missed'}"
    own, theirs = text(row["spml_fast"]), text(row["timm"])
    return f"{row['case']:34}  {row['figure']:26}{own:>12}{theirs:>12}{ratio:>8}{goal}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; `words` are those that workers need too."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--parts", nargs="+", choices=["step", "metric"], default=["step", "metric"])
    parser.add_argument(
        "--quick", action="store_true", help="fewer epochs and rounds, a tenth of OpenImages: 2 minutes"
    )
    parser.add_argument("--data.dir", dest="data_dir", metavar="MANIFEST", help="default: the digit scenes")
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--eval-split", default="test")
    parser.add_argument("--backbone", default="test_resnet", help="a timm model, from random weights")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--eval-batch-size", type=int, default=250)
    parser.add_argument("--loss", choices=["bce", "asl"], default="bce")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="of both")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the loaders")
    parser.add_argument("--epochs", type=int, help="default 8, with --quick 2")
    parser.add_argument("--rounds", type=int, help="of both in turn; default 3, with --quick 1")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of a metric in a process")
    parser.add_argument("--target", type=float, default=90.0, help="mAP in per cent that is waited for")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, metavar="DIR", help="folder of the table vs_timm.csv to add rows to")
    parser.add_argument("--worker", nargs=3, metavar=("PART", "SIDE", "CASE"), help=argparse.SUPPRESS)
    parser.add_argument("--worker-out", type=Path, help=argparse.SUPPRESS)
    add_json_option(parser)
    options = parser.parse_args(arguments)
    options.epochs = options.epochs or (2 if options.quick else 8)
    options.rounds = options.rounds or (1 if options.quick else 3)
    names = "train-split eval-split backbone image-size batch-size eval-batch-size loss precision lr weight-decay"
    options.words = ["--quick"] if options.quick else []
    for name in (*names.split(), "threads", "epochs", "repeats", "seed"):
        options.words += [f"--{name}", str(getattr(options, name.replace("-", "_")))]
    return options


def main() -> int:
    """Check, measure, print."""
    options = parse()
    if options.worker is not None:
        part, side, case = options.worker
        if part == "metric":
            size = (QUICK_CASES if options.quick else CASES)[case]
            answer = metric_worker(side, case, size, options.repeats)
        else:
            answer = step_worker(side, options, Path(options.data_dir))
        options.worker_out.write_text(json.dumps(answer), encoding="utf-8")
        return 0
    import timm

    out_file = json_output(options, "bench_vs_timm")
    facts = machine(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    facts |= {"timm_version": timm.__version__, "date": time.strftime("%Y-%m-%d"), "commit": commit()}
    print(", ".join(f"{key} {value}" for key, value in facts.items() if value is not None))
    print(f"{'':34}  {'':26}{'spml_fast':>12}{'timm':>12}{'ratio':>8}", flush=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        for part, compare in (("metric", compare_metrics), ("step", compare_steps)):
            if part in options.parts:
                new = compare(options, Path(name))
                print("\n".join(map(line, new)), flush=True)
                rows += new
    if options.results is not None:
        key = ("part", "case", "figure", "cpu", "gpu")
        merge_csv(options.results / "vs_timm.csv", [row | facts for row in rows], key=key)
    if out_file is not None:
        out_file.write_json({"machine": facts, "rows": rows})
    return 0


if __name__ == "__main__":
    run_command(main)
