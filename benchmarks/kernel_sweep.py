"""Other block sizes of cam_pool, timed on a GPU."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from spml_kernels.cam_pool import forward
from spml_kernels.cam_pool.tiles import launch_of
from spml_kernels.common import heuristics
from spml_kernels.common.heuristics import CamPoolLaunch, CamPoolTiles

from benchmarks.kernel_base import make_call
from benchmarks.kernel_gpu import Card
from benchmarks.kernel_maps import cam_work
from benchmarks.kernel_report import Row, file_name, machine, merge_csv


@contextlib.contextmanager
def launched(launch: CamPoolLaunch) -> Iterator[None]:
    """cam_pool with these block sizes, whatever the shape."""
    with mock.patch.object(forward, "launch_of", lambda *_: launch):
        yield


def sweep(card: Card, results: Path, seconds: float, small: bool, known: str | None) -> int:
    """Other ways, block sizes and chunks of cam_pool at two shapes, dense signs; the best are printed last.

    Nothing is compared with fp64 here: sizes that are taken over into `heuristics.py` meet the gate and the tests.
    """
    os.environ["SPML_KERNELS"] = "auto"
    stop, facts = time.monotonic() + seconds, machine(torch.cuda.get_device_name(), known)
    table = results / f"{file_name(facts['gpu'])}_sweep.csv"
    rows: list[Row] = []
    for classes in (5000,) if small else (5000, 80):
        work = cam_work(128, 14, 2048, classes, torch.bfloat16)
        inputs = work.inputs(card.device)
        shipped = launch_of(inputs[0], classes)
        size = heuristics.CHUNK_BYTES
        tries = [("shipped", "fwd", shipped, size)]
        tries += [(f"chunks of {n} MB", "bwd", shipped, n << 20) for n in (4, 8, 16, 24, 32, 48, 96)]
        vendor = heuristics.cam_pool_launch(128, 196, classes, 2048, True, way="vendor")
        tries += [(f"vendor, scratch of {n} MB", "fwd", vendor, n << 20) for n in (8, 16, 24, 48)]
        for rows_, wide, warps, stages in itertools.product((128, 256), (64, 128, 256), (4, 8), (3, 4)):
            if rows_ * wide > 128 * 256 or (rows_ * wide == 128 * 256 and warps == 4):
                continue
            tiles = CamPoolTiles(rows_, wide, shipped.tiles.channels, warps, stages)
            tries.append((f"tile {tuple(tiles)}", "fwd", CamPoolLaunch("tile", tiles, rows_ // 64), size))
        for name, mode, launch, bytes_ in tries:
            row: Row = {"op": "cam_pool", "shape": work.shape, "provider": name, "mode": mode, **facts}
            if time.monotonic() > stop:
                row["status"] = "no time left"
            else:
                # The vendor's forward has its scratch from this function, which keeps it small on its own account.
                scratch = (lambda *_, n=bytes_: n) if launch.way == "vendor" else heuristics.scratch_bytes
                sizes = mock.patch.object(heuristics, "CHUNK_BYTES", bytes_)
                with launched(launch), sizes, mock.patch.object(forward, "scratch_bytes", scratch):
                    try:
                        row |= {**card.times(make_call(work, "fused", mode, inputs)), "status": "ok"}
                    except Exception as error:
                        row["status"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
                        # Too much shared memory is a refusal; a broken card raises here, and ends the sweep.
                        card.synchronize()
            rows.append(row)
            merge_csv(table, [row])
            print(f"C {classes} {mode} {row.get('p50', float('nan')):8.4f} ms  {name}  {row['status']}", flush=True)
    for key in dict.fromkeys((r["shape"], r["mode"]) for r in rows):
        timed = sorted(
            (r for r in rows if (r["shape"], r["mode"]) == key and r["status"] == "ok"), key=lambda r: r["p50"]
        )
        print(
            f"best of {len(timed)} at {key[0]} {key[1]}: "
            + ", ".join(f"{r['provider']} {r['p50']:.4f} ms" for r in timed[:3])
        )
    print(f"written to {table}")
    return int(any(r["status"] == "no time left" for r in rows))
