"""Ops with other launches than the shipped ones, to be timed on a GPU: ways, block sizes, chunks.

Every try is a `KernelWork` whose fused op is launched differently; it passes the same gate and is timed in the same
way. The ways are those that `heuristics` knows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, get_args
from unittest import mock

import torch
from spml_kernels.common import heuristics

from benchmarks.kernel_base import KernelWork
from benchmarks.kernel_losses import large_loss_work
from benchmarks.kernel_maps import Signs, cam_mask_work, cam_work
from benchmarks.kernel_report import Row, by_place
from benchmarks.kernel_ways import adapted, chosen, ways_of

SHIPPED = "shipped"
# The forward alone, as in inference, and with what a training adds to it.
FORWARD, BACKWARD = ("fwd", "step"), ("bwd", "step")
CHUNK_MEGABYTES = (4, 8, 16, 24, 32, 48, 96)
# Cells whose classes are ordered together in the backward that leaves some of them out.
SPARSE_CELLS = (512, 1024, 4096, 8192, 32768)
SCRATCH_MEGABYTES = (8, 16, 24, 48)
# Rows and columns of a tile of cam_mask's image, and warps.
MASK_TILES = ((8, 128, 4), (8, 256, 4), (16, 64, 4), (16, 256, 4), (8, 256, 8), (16, 128, 4), (32, 64, 4), (32, 128, 8))

Context = Callable[[], AbstractContextManager[Any]]


def _try(work: KernelWork, variant: str, modes: tuple[str, ...], *contexts: Context) -> KernelWork:
    """The fused op of a work under some contexts."""

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            yield

    modes = tuple(mode for mode in modes if mode in work.modes)
    fused = {"fused": work.providers["fused"]}
    return dataclasses.replace(work, providers=fused, variant=variant, around=around, only=modes)


def _tiles() -> Iterator[tuple[int, int, int, int]]:
    """Cells, classes, warps and stages of a tile; what cannot be held in registers is left out."""
    for rows, wide, warps, stages in itertools.product((128, 256), (64, 128, 256), (4, 8), (3, 4)):
        if rows * wide < 128 * 256 or (rows * wide == 128 * 256 and warps == 8):
            yield rows, wide, warps, stages


def _with_tile(rows: int, wide: int, warps: int, stages: int) -> Context:
    # A narrow tile is reduced whole; wider ones in parts, which fewer registers hold.
    slices = 1 if rows * wide <= 128 * 64 else rows // 64

    def change(launch: Any) -> Any:
        tiles = launch.tiles._replace(rows=rows, classes=wide, warps=warps, stages=stages)
        return launch._replace(tiles=tiles, slices=slices)

    return lambda: adapted("cam_pool_launch", change)


def _with_mask_tile(rows: int, columns: int, warps: int) -> Context:
    return lambda: adapted("mask_launch", lambda launch: launch._replace(rows=rows, columns=columns, warps=warps))


def _with_scratch(megabytes: int) -> Context:
    """Scratch of the forward by PyTorch's products, which keeps it small on its own account."""
    return lambda: adapted("map_scratch_bytes", lambda _: megabytes << 20)


def _with_chunks(megabytes: int) -> Context:
    """Chunks of the backward, whatever the card's cache."""
    return lambda: mock.patch.object(heuristics, "chunk_bytes", lambda _: megabytes << 20)


def _with_number(name: str, value: int) -> Context:
    """A number of the heuristics."""
    return lambda: mock.patch.object(heuristics, name, value)


def cam_pool_sweep(small: bool) -> Iterator[KernelWork]:
    """Every way of the forward with its own tiles and with others; chunks of the backward. Dense signs.

    Every way of the backward with dense signs and with both kinds of sparse ones. The shipped way takes as long
    whatever they are, so that what another saves or costs stands beside it.
    """
    for classes in (5000,) if small else (5000, 80):
        work = cam_work(128, 14, 2048, classes, torch.bfloat16)
        yield _try(work, SHIPPED, ("fwd", "bwd", "step"))
        for way in ways_of("cam_pool"):
            take = functools.partial(chosen, "cam_pool", way)
            yield _try(work, f"way {way}", FORWARD, take)
            if way == "vendor":
                for size in SCRATCH_MEGABYTES:
                    yield _try(work, f"way {way}, scratch of {size} MB", FORWARD, take, _with_scratch(size))
                continue
            for tile in _tiles():
                yield _try(work, f"way {way}, tile {tile}", FORWARD, take, _with_tile(*tile))
        # The gradient of few classes is one chunk, whatever its size.
        for size in CHUNK_MEGABYTES if classes > 80 else ():
            yield _try(work, f"chunks of {size} MB", BACKWARD, _with_chunks(size))
        for signs in get_args(Signs) if classes > 80 else ():
            work = cam_work(128, 14, 2048, classes, torch.bfloat16, signs)
            if signs != "dense":
                yield _try(work, SHIPPED, BACKWARD)
            for way in ways_of("cam_pool_backward"):
                if way != heuristics.CAM_POOL_BACKWARD:
                    yield _try(work, f"backward {way}", BACKWARD, functools.partial(chosen, "cam_pool_backward", way))
            take = functools.partial(chosen, "cam_pool_backward", "sparse")
            for cells in SPARSE_CELLS if signs != "dense" else ():
                number = _with_number("SPARSE_LINES", cells // heuristics.WORD)
                yield _try(work, f"backward sparse, chunks of {cells} cells", BACKWARD, take, number)
            if signs != "dense":
                narrow = functools.partial(adapted, "cam_pool_sparse_launch", lambda t: t._replace(channels=128))
                yield _try(work, "backward sparse, tiles of 128 channels", BACKWARD, take, narrow)


def large_loss_sweep(small: bool) -> Iterator[KernelWork]:
    """Every way of the selection where programs share the work; one program against several where one can do it."""
    ways = ways_of("large_loss")
    for rows, classes in ((512, 9605),) if small else ((512, 9605), (128, 5000)):
        if len(ways) < 2:
            break
        work = large_loss_work(rows, classes, rows * classes // 100, listed=False)
        yield _try(work, SHIPPED, FORWARD)
        for way in ways:
            yield _try(work, f"way {way}", FORWARD, functools.partial(chosen, "large_loss", way))
    for rows, classes in ((128, 80),) if small else ((16, 80), (64, 80), (128, 80), (128, 128)):
        work = large_loss_work(rows, classes, rows * classes // 100, listed=False)
        yield _try(work, SHIPPED, FORWARD)
        yield _try(work, "several programs", FORWARD, _with_number("SINGLE_LAUNCH_ENTRIES", 0))


def cam_mask_sweep(small: bool) -> Iterator[KernelWork]:
    """Tiles of the image in bf16, as training has it."""
    work = cam_mask_work(128, 14, 2048, 80, 448, 1, torch.bfloat16, torch.bfloat16)
    yield _try(work, SHIPPED, FORWARD)
    for rows, columns, warps in MASK_TILES[: 4 if small else None]:
        yield _try(work, f"tile {(rows, columns, warps)}", FORWARD, _with_mask_tile(rows, columns, warps))


SWEEPS: dict[str, Callable[[bool], Iterator[KernelWork]]] = {
    "sweep_cam_pool": cam_pool_sweep,
    "sweep_large_loss": large_loss_sweep,
    "sweep_cam_mask": cam_mask_sweep,
}


def best_tries(rows: list[Row]) -> list[str]:
    """A sentence for every op, shape and mode: the three fastest tries that passed the gate, and the shipped launch."""
    sentences = []
    for (op, shape, mode), tries in by_place(rows).items():
        fastest = sorted(tries.values(), key=lambda row: float(row["p50"]))
        times = [f"{row['provider']} {float(row['p50']):.4f} ms" for row in fastest[:3]]
        shipped = f"; shipped {float(tries[SHIPPED]['p50']):.4f} ms" if SHIPPED in tries else ""
        sentences.append(f"{op} {shape} {mode}, best of {len(tries)}: {', '.join(times)}{shipped}")
    return sentences
