"""Saves at the end of epochs that are written while the next epoch trains, and runs that are killed meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from spml_fast.core.io import file_record, partial_path
from spml_fast.runs.layout import RunLayout
from spml_fast.runs.weights_check import check_weights
from spml_fast.training.checkpoint import list_checkpoints
from tests.stress.kills import BASE, compare
from tests.support.runs import Run
from tests.training.test_training import succeed

# Holds the file of a checkpoint where it would reach the disk, until the next epoch has trained two updates; then the
# process gets SIGKILL. Every rank that writes does so.
KILL = """
import json, os, signal, threading, time
from pathlib import Path
from spml_fast.core import io

flush = io.flush_to_disk
metrics = Path(__file__).with_name("run") / "metrics.jsonl"

def hold(file):
    begun = any(metrics.parent.glob("checkpoints/finetune-e0002-u000000-w*"))
    if threading.current_thread().name != "checkpoint" or not begun or "HELD" not in str(file.name):
        return flush(file)
    while True:
        entries = map(json.loads, metrics.read_text().splitlines())
        if any(e["kind"] == "update" and e["epoch"] == 3 and e["update"] >= 2 for e in entries):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)

io.flush_to_disk = hold
"""
NO_VALIDATION = {"data__val_split": "null"}
# Every file takes longer to reach the disk than several updates take.
SLOW = """
import time
from spml_fast.core import io

flush = io.flush_to_disk

def wait(file):
    time.sleep(0.4)
    flush(file)

io.flush_to_disk = wait
"""


AVERAGE = {"train__average_weights": True}


def words(data: Path, run: Path, plugin: str | None = None, **more: object) -> list[str]:
    given = BASE | {"data__dir": data, "run__dir": run, "run__save_updates": 0} | more
    out = [word for key, value in given.items() for word in (f"--{key.replace('__', '.')}", str(value))]
    if plugin is None:
        return out
    path = run.with_name("plugin.py")
    path.write_text(plugin)
    return ["--plugins", str(path), *out]


@pytest.mark.parametrize(
    ("ranks", "held", "more"),
    [
        # Without validation every epoch is the best: the weights come last, and are held when all else is written.
        (1, "model.safetensors", {"method": "ll_cp", "method__delta_rel": 5, "train__ema_decay": 0.9, **NO_VALIDATION}),
        (2, "finetune-e0002-u000000", {"method": "role", "method__expected_positives": 2.5, **AVERAGE}),
    ],
)
def test_a_run_that_is_killed_while_an_epochs_end_is_written(
    ranks: int, held: str, more: dict[str, object], small_digits: Path, run_script: Run, tmp_path: Path
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    succeed(run_script("train.py", *words(small_digits, whole, **more), ranks=ranks))
    done = run_script("train.py", *words(small_digits, run, KILL.replace("HELD", held), **more), ranks=ranks)
    assert done.returncode == -9, done.stdout + done.stderr
    layout = RunLayout(run)
    listed = {one.tag: one.checkpoint for one in list_checkpoints(layout.checkpoints.folder)}
    before, cut = (f"finetune-e000{epoch}-u000000-w{ranks}" for epoch in (1, 2))
    assert listed.keys() == {before, cut} and listed[before] is not None and listed[cut] is None
    own = {f"method_rank_0000{rank}.pt" for rank in range(1, ranks)}
    assert {p.name for p in (layout.checkpoints.folder / cut).iterdir()} == {"mp_rank_00_model_states.pt", *own}
    # The weights file is that of the epoch before, whole, as its mark says.
    check_weights(layout)
    if held == "model.safetensors":
        best = listed[before].best
        assert partial_path(layout.weights).exists() and best is not None
        assert best.record == file_record(layout.weights)
    # Now on a disk that is always behind, with saves between: each waits for the one before it.
    again = words(small_digits, run, SLOW, **more, run__save_updates=2)
    assert "resuming at epoch 2 (from" in succeed(run_script("train.py", *again, ranks=ranks))
    assert compare(whole, run, exact=True) == ""
