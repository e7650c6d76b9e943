"""Compiling in many processes: workers that die, break or hang cost the item they were at, and nothing else."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
import threading
import time

import pytest
import torch

from benchmarks import kernel_precompile
from benchmarks.kernel_losses import large_loss_work
from benchmarks.kernel_maps import cam_work
from benchmarks.kernel_precompile import MARK, Item, Pool, items, work_off
from tests.support import gpu_ops

# A worker that dies at `die`, breaks its card at `break`, never ends at `hang`, and answers everything else.
WORKER = f"""
import json, sys, time
for order in sys.stdin:
    kind, name = json.loads(order)
    print("noise from a compiler", flush=True)
    if name == "die":
        sys.exit(9)
    if name == "hang":
        time.sleep(60)
    answer = {{"status": "FAILED CUDA error" if name == "break" else "ok", "note": name, "seconds": 0.1}}
    print({MARK!r} + json.dumps({{**answer, "last": name == "break"}}), flush=True)
    if name == "break":
        sys.exit(1)
"""


def pooled(names: list[str], processes: int, seconds: float) -> dict[str, str]:
    """Statuses by item."""
    rows, lock = {}, threading.Lock()

    def write(item: Item, answer: dict) -> None:
        with lock:
            assert item.name not in rows and "last" not in answer
            rows[item.name] = answer["status"]

    pool = Pool([sys.executable, "-c", WORKER], [Item("set", name, 1.0) for name in names], write)
    pool.run(processes, seconds)
    assert set(rows) == set(names)
    return rows


@pytest.mark.parametrize("processes", [1, 3])
def test_a_worker_that_dies_or_breaks_is_followed_by_another(processes):
    rows = pooled(["a", "die", "b", "break", "c", "d"], processes, 60)
    assert rows.pop("die") == "FAILED worker died" and rows.pop("break") == "FAILED CUDA error"
    assert set(rows.values()) == {"ok"} and len(rows) == 4


def test_what_was_not_reached_is_said_and_nothing_runs_on():
    start = time.monotonic()
    rows = pooled(["a", "hang", "b"], 1, 2.5)
    assert rows == {"a": "ok", "hang": "FAILED no time left", "b": "FAILED no time left"}
    assert time.monotonic() - start < 30


class Few:
    """A set of two works, whose compiled rivals are left out: they take the compiler."""

    ways = False

    def works(self):
        found = [cam_work(2, 5, 8, 4, torch.float32), dataclasses.replace(large_loss_work(5, 7, 3), variant="a try")]
        return [dataclasses.replace(w, providers={n: w.providers[n] for n in ("eager", "fused")}) for w in found]


def test_a_worker_calls_everything_of_an_item(monkeypatch):
    monkeypatch.setattr(kernel_precompile, "SELECTIONS", {"few": Few()})
    monkeypatch.setattr(gpu_ops, "PIECES", {"good": lambda: "fine", "bad": lambda: 1 // 0})
    monkeypatch.setattr(gpu_ops, "small_pieces", lambda device: {"one": lambda: made.append(device)})
    made: list[str] = []
    monkeypatch.setenv("SPML_KERNELS", "reference")
    monkeypatch.setenv("SPML_CAM_POOL", "vendor")
    monkeypatch.setenv("TRITON_CACHE_DIR", "somewhere")
    config = __import__("torch._functorch.config", fromlist=["config"])
    monkeypatch.setattr(config, "donated_buffer", config.donated_buffer)
    found = items(["few", "checks", "small"])
    assert [item.name for item in found if item.kind == "few"] == [
        "cam_pool fp32 B 2 HW 5x5 K 8 C 4 dense | fused",
        "large_loss 5 x 7 k 3: a try | fused",
    ]
    orders = io.StringIO("".join(json.dumps([item.kind, item.name]) + "\n" for item in found))
    answers = io.StringIO()
    assert work_off("cpu", orders, answers) == 0
    lines = [json.loads(line.removeprefix(MARK)) for line in answers.getvalue().splitlines()]
    by_name = {item.name: line for item, line in zip(found, lines, strict=True)}
    assert by_name["good"]["status"] == "ok" and by_name["good"]["note"] == "fine"
    assert by_name["bad"]["status"].startswith("FAILED ZeroDivisionError")
    assert {by_name[item.name]["status"] for item in found if item.kind in ("few", "small")} == {"ok"}
    assert made == ["cpu"] and by_name["one"]["note"] == ""
    assert not any(line["last"] for line in lines) and not config.donated_buffer
    # The environment chooses neither reference nor way; where Triton's files are is the user's affair.
    found = [os.environ.get(name) for name in ("SPML_KERNELS", "SPML_CAM_POOL", "TRITON_CACHE_DIR")]
    assert found == ["auto", None, "somewhere"]
