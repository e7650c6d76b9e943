#!/usr/bin/env python
"""A whole OpenImages run on made-up data in the official formats: every stage's time, memory and bytes on disk.

    python benchmarks/openimages_run.py --out DIR [--json OUT]              labels of the whole V3 release
    python benchmarks/openimages_run.py --out DIR --images 300 60 80 --classes 40 --pictures 1 --batch-size 64 ...

Stages: make the release (label files of all images, and one per cent of the images as small JPEG files), prepare
it, pack the images into shards, train LL-Cp with BoostLU with two ranks, kill every process of it in the middle,
resume, evaluate with groups of classes. All of it through the commands that a user types. Memory is the largest sum
over a stage's processes of the memory that only they use and their part of what they share (PSS), sampled.

The images are noise, so mAP means nothing; the run shows that everything fits, ends, and resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from spml_fast.core.outputs import add_json_option, json_output

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "launch" / "configs"
POLL_SECONDS = 0.2
# Looking at the memory of a rank takes 30 ms of a core, and holds the rank up; at most this fraction of the time.
LOOKING = 0.1
# What a run says when it resumes.
RESUME_WORDS = ("resuming", "going on from")


@dataclass
class Stage:
    """What one stage took.

    Attributes:
        name: of the stage.
        seconds: wall clock.
        peak_gib: largest sum over its processes, GiB.
        disk_bytes: bytes of its files.
        note: its results.
    """

    name: str
    seconds: float
    peak_gib: float
    disk_bytes: int
    note: str = ""


class StageError(RuntimeError):
    """A stage failed; the message has its last lines."""


def folder_bytes(path: Path) -> int:
    """Bytes of all files below a folder, or of one file; links do not count."""
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file() and not p.is_symlink())


def tree_gib(process: psutil.Process) -> float:
    """Memory of a process and all below it, GiB; processes that end meanwhile do not count."""
    total = 0
    try:
        members = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    for member in members:
        try:
            total += member.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total / 2**30


def run_stage(
    name: str, command: list[str], log: Path, result: Path, kill_when: Callable[[], bool] | None = None
) -> tuple[Stage, str]:
    """Run a command to its end, or kill all its processes as soon as `kill_when` is true.

    Args:
        name: of the stage.
        command: the words of the command.
        log: file that its output goes to.
        result: file or folder whose bytes are counted afterwards.
        kill_when: called a few times per second; None lets the command end.

    Returns:
        The stage and its output.

    Raises:
        StageError: it failed, or it ended before it could be killed.
    """
    print(f"{name}: {shlex.join(command)}", flush=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    start, peak, killed, next_look = time.perf_counter(), 0.0, False, 0.0
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
        observed = psutil.Process(process.pid)
        while process.poll() is None:
            now = time.perf_counter()
            if now >= next_look:
                peak = max(peak, tree_gib(observed))
                next_look = now + (time.perf_counter() - now) / LOOKING
            if kill_when is not None and kill_when():
                # Children first: without their launcher they are not found. Launchers put their workers into sessions
                # of their own.
                for member in [*observed.children(recursive=True), observed]:
                    try:
                        member.send_signal(signal.SIGKILL)
                    except psutil.NoSuchProcess:
                        continue
                killed = True
                process.wait()
                break
            time.sleep(POLL_SECONDS)
    seconds = time.perf_counter() - start
    text = log.read_text(encoding="utf-8", errors="replace")
    if kill_when is not None and not killed:
        raise StageError(f"{name} ended before it was killed:\n{text[-2000:]}")
    if not killed and process.returncode != 0:
        raise StageError(f"{name} failed with status {process.returncode}:\n{text[-2000:]}")
    return Stage(name, seconds, peak, folder_bytes(result)), text


@dataclass(frozen=True)
class Folders:
    """Where the stages write, below `out`."""

    out: Path

    @property
    def raw(self) -> Path:
        """The release."""
        return self.out / "raw"

    @property
    def labels(self) -> Path:
        """The Manifest of loose files."""
        return self.out / "manifest"

    @property
    def packed(self) -> Path:
        """The Manifest of shards."""
        return self.out / "shards"

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.out / "run"

    def clear(self) -> None:
        """Delete what an earlier call wrote. Raises `StageError` when the folders are not from this program."""
        self.out.mkdir(parents=True, exist_ok=True)
        for folder in (self.raw, self.labels, self.packed, self.run):
            if folder.exists():
                # A user's own data may be called raw.
                if not (self.out / "make.log").is_file():
                    raise StageError(f"{folder} exists and is not from this program; choose another --out")
                shutil.rmtree(folder)


def simulate(options: argparse.Namespace) -> list[Stage]:
    """Run all stages; see the module. Raises `StageError`."""
    folders = Folders(options.out)
    folders.clear()
    stages, data = _make_data(options, folders)
    stages += _train(options, folders, data)
    report = folders.out / "test.json"
    evaluate = [sys.executable, str(ROOT / "launch" / "evaluate.py"), "--run", str(folders.run), "--json", str(report)]
    stage, _ = run_stage("evaluate", evaluate, folders.out / "evaluate.log", report)
    stage.note = _evaluation(report)
    return [*stages, stage]


def _make_data(options: argparse.Namespace, folders: Folders) -> tuple[list[Stage], Path]:
    """Make the release, prepare it and pack it; returns the stages and the Manifest to train from."""
    out, python = folders.out, sys.executable
    make = [python, str(ROOT / "benchmarks" / "make_openimages.py"), "--out", str(folders.raw)]
    make += ["--version", options.version]
    make += ["--pictures", str(options.pictures), "--layout", "bucket", "--seed", "0"]
    if options.images is None:
        make.append("--full")
    else:
        make += ["--images", *map(str, options.images), "--classes", str(options.classes)]
    made, text = run_stage("make the release", make, out / "make.log", folders.raw)
    # It ends with the command that prepares what it made.
    prepare = shlex.split(text.strip().splitlines()[-1])
    prepare = [python, str(ROOT / prepare[1]), *prepare[2:-1], str(folders.labels), "--verify", "header"]
    prepared, _ = run_stage("prepare", prepare, out / "prepare.log", folders.labels)
    prepared.note = _splits(folders.labels)
    if not options.shards:
        return [made, prepared], folders.labels
    pack = [python, str(ROOT / "launch" / "prepare.py"), "shard"]
    pack += ["--manifest", str(folders.labels), "--out", str(folders.packed)]
    packed, _ = run_stage("pack into shards", pack, out / "shard.log", folders.packed)
    return [made, prepared, packed], folders.packed


def _train(options: argparse.Namespace, folders: Folders, data: Path) -> list[Stage]:
    """Train, kill the run within its second epoch, and resume it."""
    out, run = folders.out, folders.run
    train = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(options.ranks)]
    train += ["--master_port", str(options.port)]
    train += [str(ROOT / "launch" / "train.py"), "--config", str(CONFIGS / f"openimages_{options.version}_an.yaml")]
    train += ["--config", str(CONFIGS / "openimages_ll_cp.yaml"), "--data.dir", str(data), "--run.dir", str(run)]
    train += ["--data.image_size", "64", "--model.backbone", "test_resnet", "--model.pretrained", "false"]
    train += ["--train.batch_size", str(options.batch_size), "--train.epochs", str(options.epochs)]
    train += ["--train.lr", "1e-3", "--train.head_lr_multiplier", "1", "--train.log_every", str(options.log_every)]
    train += ["--run.save_updates", str(options.save_updates), "--eval.batch_size", "128"]
    train += ["--deepspeed.tensorboard", "false", *options.more]
    newest = run / "checkpoints" / "newest.json"

    def halfway() -> bool:
        # Killed within the second epoch, when corrections are pending that only a checkpoint holds.
        if not newest.is_file():
            return False
        position = json.loads(newest.read_text(encoding="utf-8"))
        return bool(position["epoch"] >= 1 and position["update"] > 0)

    killed, _ = run_stage("train until killed", train, out / "train.log", run, kill_when=halfway)
    position = json.loads(newest.read_text(encoding="utf-8"))
    killed.note = f"killed after epoch {position['epoch']} and {position['update']} updates"
    resumed, text = run_stage("resume to the end", train, out / "resume.log", run)
    if not any(words in text for words in RESUME_WORDS):
        raise StageError(f"the second start did not resume from a checkpoint:\n{text[-2000:]}")
    resumed.note = _training(run)
    return [killed, resumed]


def _splits(manifest: Path) -> str:
    """Sizes of the splits."""
    meta = json.loads((manifest / "manifest.json").read_text(encoding="utf-8"))
    return ", ".join(f"{name} {split['size']:,}" for name, split in meta["splits"].items()) + " images"


def _training(run: Path) -> str:
    """Speed, memory and corrections of the last epoch."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [line for line in lines if line["kind"] == "epoch"][-1]
    # Not the epochs' own counts: in the epoch that was cut off, corrections before the kill are not counted.
    corrected = last.get("corrected_total", 0)
    speed, memory = last["images_per_second"], last["memory_gib"]
    return f"{speed:.0f} images/s, {memory:.1f} GiB per rank, {corrected:,.0f} labels corrected"


def _evaluation(report: Path) -> str:
    """mAP over all classes and by group."""
    results = json.loads(report.read_text(encoding="utf-8"))["alpha"]["1"]
    groups = " ".join("-" if g["map"] is None else f"{g['map']:.1f}" for g in results["groups"])
    return f"mAP {results['map']:.2f} (the images are noise); groups {groups}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for everything; older stages in it are replaced"
    )
    parser.add_argument("--version", choices=["v3", "v6", "v7"], default="v3")
    parser.add_argument(
        "--images", type=int, nargs=3, metavar=("TRAIN", "VALIDATION", "TEST"), help="default: the whole release"
    )
    parser.add_argument("--classes", type=int, default=40, help="with --images; else the release's (5,000 in V3)")
    parser.add_argument("--pictures", type=float, default=0.01, help="fraction of the ids that get a JPEG file")
    parser.add_argument("--no-shards", dest="shards", action="store_false", help="train from loose files")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--port", type=int, default=29588)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--save-updates", type=int, default=100)
    parser.add_argument("--log-every", type=int, default=50)
    add_json_option(parser)
    parser.add_argument("more", nargs="*", help="after --: further options of train.py")
    return parser.parse_args(arguments)


def main() -> int:
    """Run, print a table, write the JSON."""
    options = parse()
    out_file = json_output(options, "openimages_run")
    stages = simulate(options)
    width = max(len(s.name) for s in stages)
    print(f"\n{'stage':<{width}}  {'seconds':>8}  {'peak GiB':>8}  {'disk MB':>9}")
    for s in stages:
        print(f"{s.name:<{width}}  {s.seconds:8.1f}  {s.peak_gib:8.2f}  {s.disk_bytes / 1e6:9.1f}  {s.note}")
    if out_file is not None:
        machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        report = {"machine": machine, "stages": [asdict(s) for s in stages]}
        out_file.write_json(report)
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except StageError as error:
        raise SystemExit(f"error: {error}") from error
