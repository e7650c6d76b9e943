"""Two machines, played by processes on one, started by the launchers that people use.

A ViT has no BatchNorm, so losses do not depend on how images are spread over ranks. Class-balanced order, the
head's starting biases and ZeRO stage 1 come along, since they must not depend on it either.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support import warm
from tests.support.paths import ROOT
from tests.support.runs import environment, free_port, read_metrics

NODES = 2


def options(data: Path, run: Path, **more: object) -> list[str]:
    """Options of a run of eight updates over two epochs, the second of which rejects labels."""
    base: dict[str, object] = {
        "config": ROOT / "launch" / "configs" / "digits.yaml",
        "data__dir": data,
        "data__val_split": "null",
        "data__test_split": "null",
        "model__backbone": "test_vit",
        "model__output_stride": "null",
        "model__prior_bias": "pictures",
        "train__epochs": 2,
        "train__batch_size": 48,
        "train__precision": "fp32",
        "train__sampling": "repeat_factor",
        "train__repeat_threshold": 0.15,
        "train__log_every": 1,
        "method__delta_rel": 3,
        "deepspeed__tensorboard": "false",
        "run__dir": run,
    }
    return [w for key, value in (base | more).items() for w in (f"--{key.replace('__', '.')}", str(value))]


def launch(heads: list[list[str]], arguments: list[str]) -> str:
    """Start one launcher a machine and wait for all of them; the first machine's output."""
    script = str(ROOT / "launch" / "train.py")
    processes = [
        subprocess.Popen(
            [*head, script, *arguments],
            env=environment(),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for head in heads
    ]
    try:
        out = [p.communicate(timeout=300)[0] for p in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0] * len(heads), out
    return out[0]


def torchrun_heads(ranks: int) -> list[list[str]]:
    """torchrun on every machine."""
    words = [str(Path(sys.executable).parent / "torchrun"), "--nnodes", str(NODES), "--nproc_per_node", str(ranks)]
    words += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    return [[*words, "--node_rank", str(node)] for node in range(NODES)]


def deepspeed_heads(ranks: int) -> list[list[str]]:
    """What DeepSpeed's launcher starts on every machine of a hostfile over ssh."""
    world = json.dumps({f"node{node}": list(range(ranks)) for node in range(NODES)})
    words = [sys.executable, "-m", "deepspeed.launcher.launch", "--master_addr", "127.0.0.1"]
    words += ["--master_port", str(free_port()), "--world_info", base64.urlsafe_b64encode(world.encode()).decode()]
    return [[*words, "--node_rank", str(node)] for node in range(NODES)]


def losses(run: Path) -> list[float]:
    """Running mean loss after every update and epoch, in order."""
    entries = sorted(read_metrics(run, "update") + read_metrics(run, "epoch"), key=lambda e: e["time"])
    return [e["loss"] for e in entries]


@pytest.fixture(scope="module")
def alone(small_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that one process makes."""
    run = tmp_path_factory.mktemp("alone") / "run"
    done = warm.run_script("train.py", *options(small_digits, run))
    assert done.returncode == 0, done.stdout + done.stderr
    return run


@pytest.mark.parametrize(("launcher", "ranks", "stage"), [("torchrun", 2, 0), ("deepspeed", 2, 1)])
def test_two_machines_follow_one_process(
    launcher: str, ranks: int, stage: int, alone: Path, small_digits: Path, tmp_path: Path
) -> None:
    heads = torchrun_heads(ranks) if launcher == "torchrun" else deepspeed_heads(ranks)
    run = tmp_path / "run"
    out = launch(heads, options(small_digits, run, deepspeed__zero_stage=stage))
    assert f"{NODES * ranks} x cpu" in out
    assert len(losses(run)) == len(losses(alone)) > 8
    # Stage 1 sums gradients in another order.
    np.testing.assert_allclose(losses(run), losses(alone), rtol=1e-4 if stage else 2e-5)
    selected = [[e["selected_count"] for e in read_metrics(r, "epoch")] for r in (alone, run)]
    assert selected[0] == selected[1] and selected[0][1] > 0
    files = {p.name for p in (run / "checkpoints").glob("finetune-e0002-*/*optim_states.pt")}
    assert len(files) == (NODES * ranks if stage else 0), "every rank keeps its part of the optimizer state at stage 1"
