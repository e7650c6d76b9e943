"""Block sizes are pure functions; what they promise holds for every shape."""

from __future__ import annotations

import itertools

import pytest
from spml_kernels.cam_pool.chunked import chunk_size
from spml_kernels.common.heuristics import (
    ALIGNED,
    CAM_POOL_WAYS,
    CHUNK_BYTES,
    EXPAND_ROWS,
    LANES,
    LARGE_LOSS_SELECTS,
    WORD,
    cam_pool_chunks,
    cam_pool_launch,
    cam_pool_sparse_launch,
    cam_pool_way,
    cam_pool_wide,
    chunk_bytes,
    class_map_launch,
    columns_launch,
    expand_rows,
    flat_launch,
    histogram_launch,
    images_per_tile,
    label_rows_launch,
    large_loss_single_launch,
    large_loss_way,
    map_scratch_bytes,
    mask_launch,
    next_power_of_two,
    normalise_launch,
    point_launch,
    scratch_bytes,
)

CLASSES = (1, 10, 20, 80, 81, 312, 5000, 9605)
CHANNELS = (1, 96, 512, 768, 1280, 2048)
CELLS = (16, 49, 196, 256, 1024)
BATCHES = (1, 16, 128, 512)
# Shared memory of one program, in bytes, by compute capability.
SHARED = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


def power_of_two(value):
    return value > 0 and value & (value - 1) == 0


@pytest.mark.parametrize("elements", [1, 511, 512, 4096, 131073, 2**31 + 7, 512 * 9605])
def test_flat_launches_cover_everything_once(elements):
    for launch, each in ((flat_launch(elements), 16), (point_launch(elements), 8)):
        assert power_of_two(launch.block) and (launch.programs - 1) * launch.block < elements
        assert launch.programs * launch.block >= elements and launch.programs < 2**31
        assert launch.block // (32 * launch.warps) == each
    for way, select in LARGE_LOSS_SELECTS.items():
        launch = histogram_launch(elements, way)
        assert 1 <= launch.programs <= (128 if way == "histogram" else 512)
        # Every key is told from every other, and what a program adds up fits into 16 bits and a sign.
        assert sum(select.widths) == 32 and 2 ** max(select.widths) <= select.bins
        assert select.turns <= 15 and launch.block * select.turns < 2**15


def test_who_counts():
    large, small = 512 * 9605, 128 * 2048
    assert large_loss_way(large, True, (3, 6, 0)) == "counts"
    assert large_loss_way(small, True, (3, 6, 0)) == large_loss_way(large, False, (3, 6, 0)) == "histogram"
    assert {large_loss_way(large, True, version) for version in ((3, 7, 0), (3, 8, 0), (4, 0, 0))} == {"histogram"}


@pytest.mark.parametrize("elements", [0, 1, 320, 1025, 5120, 10240, 128 * 81, 16384])
def test_one_program_holds_small_batches(elements):
    launch = large_loss_single_launch(elements)
    assert (
        launch is not None and power_of_two(launch.block) and power_of_two(launch.part) and power_of_two(launch.warps)
    )
    assert elements <= launch.block <= max(2 * elements, 1024) and launch.block <= 32 * 32 * launch.warps
    assert 32 * launch.warps <= launch.part <= launch.block
    assert large_loss_single_launch(16385) is None


@pytest.mark.parametrize("classes", [*CLASSES, 40000])
def test_rows_launch(classes):
    launch = label_rows_launch(classes)
    assert power_of_two(launch.block) and power_of_two(launch.entries)
    assert launch.block >= min(classes, 2048)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("rows", [1, 7, 16, 128, 1000, 40000])
def test_columns_launches_cover_all_rows_with_few_parts(rows, classes):
    launch = columns_launch(rows, classes)
    assert power_of_two(launch.rows) and power_of_two(launch.classes) and power_of_two(launch.warps)
    parts = -(-rows // (launch.rows * launch.turns))
    assert parts * -(-classes // launch.classes) <= 256
    assert (parts - 1) * launch.rows * launch.turns < rows


@pytest.mark.parametrize("channels", [*CHANNELS, 3, 4096])
def test_launches_of_masks_hold_their_sums_in_registers(channels):
    for chosen in (1, 2, 3, 4, 50):
        launch = class_map_launch(channels, chosen)
        assert all(power_of_two(n) for n in launch)
        assert launch.cells * launch.channels * launch.chosen <= 32 * 32 * launch.warps
    for cells in (1, *CELLS, 65536):
        launch = normalise_launch(cells)
        assert all(power_of_two(n) for n in launch) and launch.image <= 1024


@pytest.mark.parametrize(("row", "step"), [(448 * 3, 3), (448, 1), (64 * 3, 3), (1, 1), (225 * 3, 3)])
def test_launches_of_masked_images(row, step):
    launch = mask_launch(row, step)
    assert all(power_of_two(n) for n in launch) and launch.columns <= max(64, 2 * row)
    # 8 elements of 16 bits are a load of 128.
    assert 8 <= launch.rows * launch.columns // (32 * launch.warps) <= 16
    if row == 448 * 3:
        # Bytes in flight of a bf16 image, where 64 registers a thread let 8 programs run: see docs/performance.md.
        assert 8 * launch.rows * launch.columns * 2 == 32 << 10


@pytest.mark.parametrize("tile", [64, 128, 256])
@pytest.mark.parametrize("cells", [1, 2, 7, 16, 49, 64, 100, 128, 196, 255, 256, 257, 1024])
def test_images_per_tile_is_the_most_there_are(tile, cells):
    most = max((start + tile - 1) // cells - start // cells + 1 for start in range(0, tile * cells, tile))
    assert images_per_tile(tile, cells) == most


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("capability", [80, 86, 90, 100, 120])
@pytest.mark.parametrize("way", CAM_POOL_WAYS)
def test_cam_pool_launches_are_possible(half, capability, way):
    for batch, cells, classes, channels in itertools.product(BATCHES, CELLS, CLASSES, CHANNELS):
        launch = cam_pool_launch(batch, cells, classes, channels, half, capability, way, 132)
        tiles = launch.tiles
        described = half and channels % 8 == 0 and capability >= 90
        assert launch.way == ("tile" if way == "persistent" and not described else way)
        assert launch.programs == (132 if launch.way == "persistent" else 0)
        assert all(power_of_two(n) and n >= 16 for n in (tiles.rows, tiles.classes, tiles.channels))
        size = 2 if half else 4
        assert (tiles.rows + tiles.classes) * tiles.channels * size * tiles.stages <= SHARED[capability]
        # A slice of the tile holds whole words of sign bits, and one bit of slack for the reshape.
        assert tiles.rows // launch.slices % WORD == 0
        # Chunks of classes end where tiles do.
        assert LANES % tiles.classes == 0 or tiles.classes % LANES == 0
        # No grid is too long, also where the number of features passes 2^31.
        assert (batch * cells // tiles.rows + 1) * (classes // tiles.classes + 1) < 2**31


def test_who_multiplies():
    assert cam_pool_way(90, (3, 6, 0)) == cam_pool_way(90, (3, 7, 0)) == cam_pool_way(75, (3, 9, 0)) == "vendor"
    assert cam_pool_way(90, (3, 7, 1)) == cam_pool_way(90, (3, 8, 0)) == "tile"
    assert {cam_pool_way(c, (3, 6, 0)) for c in (80, 86, 89, 100, 103, 120, 121)} == {"tile"}
    # Wide tiles are Hopper's.
    large = (128, 196, 5000, True)
    assert cam_pool_way(90, (3, 7, 1), *large) == "persistent" and cam_pool_way(90, (3, 6, 0), *large) == "vendor"
    assert {cam_pool_way(c, (3, 9, 0), *large) for c in (80, 86, 89, 100, 103, 120, 121)} == {"tile"}
    assert cam_pool_wide(128, 196, 5000, True) and not cam_pool_wide(128, 196, 5000, False)
    assert not cam_pool_wide(128, 196, 80, True) and not cam_pool_wide(128, 49, 5000, True)


@pytest.mark.parametrize("spare", [True, False])
def test_chunks_cover_all_cells_and_their_scratch_is_free(spare):
    for batch, cells, classes, channels in itertools.product(BATCHES, CELLS, CLASSES, CHANNELS):
        rows, stride = batch * cells, -(-classes // 16) * 16
        chunks = cam_pool_chunks(rows, classes, stride, channels, 2, spare)
        assert sum(c.rows for c in chunks) == rows
        place = 0
        for chunk in chunks:
            assert chunk.first == place and place % EXPAND_ROWS == 0 and chunk.rows > 0
            place += chunk.rows
            # Aligned to 16 elements, the scratch ends where dX does and begins after what this chunk writes of it.
            start = (rows * channels - chunk.rows * stride) // 16 * 16
            assert chunk.own or (spare and start >= place * channels)
        assert all(c.own for c in chunks if not spare)


def test_memory_of_cam_pool_beside_its_outputs():
    # One bit a cell, and two slots of two fp32 sums a tile: within 1/10 of a bf16 map on Hopper.
    batch, cells, classes, channels = 128, 196, 5000, 2048
    launch = cam_pool_launch(batch, cells, classes, channels, True, 90)
    rows = batch * cells
    cam = rows * classes * 2
    bits = -(-rows // WORD) * (-(-classes // LANES) * LANES) * 4
    tiles = -(-rows // launch.tiles.rows)
    assert bits + tiles * 4 * classes * 4 <= cam / 10
    # In the backward the bits, the scratch of the last chunks, and sums for the bias; weights in fp32.
    chunks = cam_pool_chunks(rows, classes, 5008, channels, 2, True)
    own = max(c.rows for c in chunks if c.own) * 5008 * 2
    sums = -(-rows // expand_rows(classes)) * classes * 4
    assert own <= scratch_bytes(rows, classes, 2) and bits + own + sums <= cam / 10
    assert len(chunks) <= 14 and max(c.rows for c in chunks) * 5000 * 2 <= CHUNK_BYTES


@pytest.mark.parametrize("shape", [(128, 196, 5000), (32, 1024, 5000), (64, 196, 9605)])
def test_memory_of_products_by_pytorch(shape):
    """In inference a tenth of a bf16 map, and chunks that fill 132 multiprocessors with tiles of 128 x 128."""
    batch, cells, classes = shape
    rows, tiles = batch * cells, cam_pool_launch(*shape, 2048, True, 90, "vendor").tiles
    cam, stride = rows * classes * 2, -(-classes // ALIGNED) * ALIGNED
    scratch = map_scratch_bytes(rows, classes, 2, tiles.rows)
    chunk = scratch // (4 * stride) // tiles.rows * tiles.rows
    slots = 16 * classes * -(-rows // tiles.rows)
    assert chunk // 128 * -(-classes // 128) >= 132 and scratch + slots <= cam / 10


def test_chunks_grow_with_the_cache_and_do_not_shrink_with_it():
    assert [chunk_bytes(mib << 20) >> 20 for mib in (0, 6, 40, 50, 126)] == [32, 32, 32, 33, 84]
    shape = (128 * 196, 5000, 5008, 2048, 2, True)
    assert cam_pool_chunks(*shape) == cam_pool_chunks(*shape, 6 << 20) == cam_pool_chunks(*shape, 50 << 20)
    assert len(cam_pool_chunks(*shape, 126 << 20)) < len(cam_pool_chunks(*shape))


def test_few_classes_are_one_chunk():
    for classes in (20, 80):
        assert len(cam_pool_chunks(128 * 196, classes, -(-classes // 16) * 16, 2048, 2, True)) == 1
    assert len(cam_pool_chunks(128 * 196, 80, 80, 2048, 2, False)) == 1
    # The last cells of a map of 49 * 128 are no multiple of a program's.
    assert len(cam_pool_chunks(128 * 49, 312, 320, 1280, 2, True)) == 1
    # In fp32 too; and where PyTorch multiplies, so that features are read once.
    assert len(cam_pool_chunks(128 * 196, 80, 80, 2048, 4, True)) == 1
    assert map_scratch_bytes(128 * 196, 80, 2, 256) == 128 * 196 * 80 * 4
    assert len(cam_pool_chunks(128 * 196, 312, 320, 2048, 2, True)) == 2


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("channels", [*CHANNELS, 3])
def test_launches_that_leave_classes_out_are_possible(channels, half):
    launch = cam_pool_sparse_launch(channels, half)
    assert all(power_of_two(n) for n in launch[:-1]) and launch.channels >= 16
    # Operands of a step, as many times as there are stages, on the cards with the least shared memory.
    size = 2 if half else 4
    for rows, step in ((64, launch.step), (launch.classes, WORD)):
        assert (rows + launch.channels) * step * size * launch.stages <= SHARED[86]
    # Accumulators of a thread: half of what 128 registers hold.
    assert 64 * launch.channels <= 64 * 32 * launch.warps


def test_next_power_of_two():
    assert [next_power_of_two(n) for n in (0, 1, 2, 3, 4, 5, 1000)] == [1, 1, 2, 4, 4, 8, 1024]


def test_chunks_fit_in_the_cache():
    assert chunk_size(25088, 5000, 2) == 448 and chunk_size(49, 80, 2) == 128
    assert chunk_size(10**7, 5000, 2) == 64
