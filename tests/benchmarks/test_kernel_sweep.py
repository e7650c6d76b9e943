"""Launches that a GPU would be swept over: every way that heuristics know, and what each try really changes."""

from __future__ import annotations

import ast
import inspect

import pytest
import torch
from spml_kernels.cam_mask import op as cam_mask_op
from spml_kernels.cam_pool import forward, tiles
from spml_kernels.common import heuristics
from spml_kernels.common.jit import HAVE_TRITON, INTERPRETED
from spml_kernels.devtools.counting import count
from spml_kernels.large_loss import op as large_loss_op

from benchmarks.kernel_base import KernelWork, make_call
from benchmarks.kernel_sweep import SHIPPED, SWEEPS, best_tries
from benchmarks.kernel_ways import adapted, chosen, ways_of

TRIES = {name: {(w.shape, w.variant): w for w in make(False)} for name, make in SWEEPS.items()}
SMALL = {name: [w.variant for w in make(True)] for name, make in SWEEPS.items()}


def of(op: str, variant: str) -> list[KernelWork]:
    found = [work for (_, name), work in TRIES[f"sweep_{op}"].items() if name == variant]
    assert found
    return found


def test_ways_are_those_that_heuristics_know(monkeypatch):
    assert {"tile", "vendor"} <= set(ways_of("cam_pool"))
    assert ways_of("cam_mask") == []
    # One that is never chosen by itself, as long as nobody has timed it.
    monkeypatch.setattr(heuristics, "CAM_POOL_WAYS", (*heuristics.CAM_POOL_WAYS, "another"))
    assert "another" in ways_of("cam_pool")
    variants = [work.variant for work in SWEEPS["sweep_cam_pool"](True)]
    assert "way another" in variants and "way another, tile (256, 128, 8, 3)" in variants


@pytest.mark.parametrize("environment", ["tile", "vendor", None])
def test_a_way_is_taken_whatever_the_environment_says(environment, monkeypatch):
    features = torch.empty(128, 14, 14, 2048, dtype=torch.bfloat16, device="meta")
    if environment is not None:
        monkeypatch.setenv("SPML_CAM_POOL", environment)
        monkeypatch.setenv("SPML_LARGE_LOSS", "counts" if environment == "tile" else "histogram")
    for way in ways_of("cam_pool"):
        with chosen("cam_pool", way):
            assert tiles.launch_of(features, 5000).way == way
    for way in ways_of("large_loss"):
        with chosen("large_loss", way):
            assert large_loss_op.way_of(1 << 23) == way
    assert tiles.launch_of(features, 5000).way == (environment or "tile")


def test_an_answer_that_nobody_asks_for_cannot_be_adapted(monkeypatch):
    monkeypatch.setattr(heuristics, "unasked", lambda: 1, raising=False)
    with pytest.raises(LookupError, match=r"no op of spml_kernels asks heuristics\.unasked"), adapted("unasked", str):
        pass


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_begins_as_shipped_and_knows_all_ways(name):
    op = name.removeprefix("sweep_")
    for shape in {shape for shape, _ in TRIES[name]}:
        variants = [variant for at, variant in TRIES[name] if at == shape]
        assert variants[0] == SHIPPED and len(set(variants)) == len(variants) > 1
    assert {f"way {way}" for way in ways_of(op)} <= {variant for _, variant in TRIES[name]}
    assert {f"way {way}" for way in ways_of(op)} <= set(SMALL[name]) <= {variant for _, variant in TRIES[name]}
    for work in TRIES[name].values():
        assert set(work.providers) == {"fused"} and work.rows and {mode for _, mode in work.rows} <= set(work.modes)


def test_numbers_of_the_sweep_reach_the_ops():
    for work in of("cam_pool", "chunks of 8 MB"):
        shape = (25088, 5000, 5000, 2048, 2, True)
        shipped = len(heuristics.cam_pool_chunks(*shape))
        with work.around():
            assert len(heuristics.cam_pool_chunks(*shape)) > shipped
    for work in of("cam_pool", "way vendor, scratch of 16 MB"):
        with work.around():
            assert forward.map_scratch_bytes(10, 10, 2, 128) == 16 << 20
    for work in of("large_loss", "several programs"):
        assert heuristics.large_loss_single_launch(16) is not None
        with work.around():
            assert heuristics.large_loss_single_launch(16) is None
    # Elements of a row of memory and of a pixel, where it asks for them.
    asked = (1344, 3)[: len(inspect.signature(heuristics.mask_launch).parameters)]
    for work in of("cam_mask", "tile (32, 128, 8)"):
        with work.around():
            assert cam_mask_op.mask_launch(*asked)[:3] == (32, 128, 8)


@pytest.mark.skipif(not HAVE_TRITON or INTERPRETED, reason="meta tensors are for kernels that are not interpreted")
def test_a_tile_of_the_sweep_is_launched(monkeypatch):
    monkeypatch.setenv("SPML_KERNELS", "triton")
    for rows, wide, warps, stages in ((128, 256, 8, 4), (256, 64, 4, 3)):
        for work in of("cam_pool", f"way tile, tile {(rows, wide, warps, stages)}"):
            with work.around():
                launches = count(make_call(work, "fused", "fwd", work.inputs("meta")))
            (tiled,) = [launch for launch in launches if launch.name == "_cam_pool_fwd_kernel"]
            found = [tiled.arguments[k] for k in ("BLOCK_R", "BLOCK_C", "num_warps", "num_stages", "SLICES")]
            assert found == [rows, wide, warps, stages, rows // 64]


@pytest.mark.skipif(not HAVE_TRITON or INTERPRETED, reason="meta tensors are for kernels that are not interpreted")
def test_a_backward_of_the_sweep_is_launched(monkeypatch):
    """The way that leaves classes out at every kind of signs, dense ones too, where it cannot win."""
    monkeypatch.setenv("SPML_KERNELS", "triton")
    found = {work.shape.split()[-1] for work in of("cam_pool", "backward sparse")}
    assert found == {"dense", "sparse", "zipf"}
    tries = of("cam_pool", "backward sparse, chunks of 4096 cells")
    assert {work.shape.split()[-1] for work in tries} == {"sparse", "zipf"}
    for work in tries:
        with work.around():
            launches = count(make_call(work, "fused", "step", work.inputs("meta")))
        products = [launch for launch in launches if launch.name == "_cam_pool_sparse_w_kernel"]
        assert len(products) == 7 and {launch.arguments["LINES"] for launch in products} == {128}
    for work in of("cam_pool", "backward sparse, tiles of 128 channels"):
        with work.around():
            launches = count(make_call(work, "fused", "step", work.inputs("meta")))
        products = [launch for launch in launches if launch.name.startswith("_cam_pool_sparse")]
        assert len(products) == 14 and {launch.arguments["BLOCK_K"] for launch in products} == {128}


def test_no_tile_is_larger_than_registers():
    held = [ast.literal_eval(v[v.index("(") :]) for v in SMALL["sweep_cam_pool"] if "tile (" in v]
    assert len(set(held)) == 16 and all(rows * wide <= 32 * warps * 128 for rows, wide, warps, _ in held)


def test_the_best_tries_are_named():
    row = {"op": "cam_pool", "shape": "some", "mode": "fwd", "status": "ok"}
    times = {SHIPPED: 2.0, "a": 1.0, "b": 4.0, "c": 3.0}
    rows = [{**row, "provider": name, "p50": time} for name, time in times.items()]
    rows.append({**row, "provider": "d", "status": "FAILED AssertionError", "p50": 0.1})
    assert best_tries(rows) == [
        "cam_pool some fwd, best of 4: a 1.0000 ms, shipped 2.0000 ms, c 3.0000 ms; shipped 2.0000 ms"
    ]
