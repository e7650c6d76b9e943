"""Block sizes are pure functions; what they promise holds for every shape."""

from __future__ import annotations

import itertools

import pytest
from spml_kernels.cam_pool.chunked import chunk_size
from spml_kernels.common.heuristics import (
    SKIP,
    WORD,
    cam_pool_launch,
    class_map_launch,
    columns_launch,
    flat_launch,
    histogram_launch,
    images_per_tile,
    label_rows_launch,
    large_loss_single_launch,
    next_power_of_two,
    normalise_launch,
    point_launch,
    skips_empty_tiles,
)

CLASSES = (1, 10, 20, 80, 81, 312, 5000, 9605)
CHANNELS = (1, 96, 512, 768, 1280, 2048)
CELLS = (16, 49, 196, 256, 1024)
BATCHES = (1, 16, 128, 512)
# Shared memory of one program, in bytes, by compute capability.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def power_of_two(value):
    return value > 0 and value & (value - 1) == 0


@pytest.mark.parametrize("elements", [1, 511, 512, 4096, 131073, 2**31 + 7, 512 * 9605])
def test_flat_launches_cover_everything_once(elements):
    for launch, each in ((flat_launch(elements), 16), (point_launch(elements), 8)):
        assert power_of_two(launch.block) and (launch.programs - 1) * launch.block < elements
        assert launch.programs * launch.block >= elements and launch.programs < 2**31
        assert launch.block // (32 * launch.warps) == each
    assert 1 <= histogram_launch(elements).programs <= 128


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


@pytest.mark.parametrize("tile", [64, 128, 256])
@pytest.mark.parametrize("cells", [1, 2, 7, 16, 49, 64, 100, 128, 196, 255, 256, 257, 1024])
def test_images_per_tile_is_the_most_there_are(tile, cells):
    most = max((start + tile - 1) // cells - start // cells + 1 for start in range(0, tile * cells, tile))
    assert images_per_tile(tile, cells) == most


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_cam_pool_launches_are_possible(half, capability):
    for batch, cells, classes, channels in itertools.product(BATCHES, CELLS, CLASSES, CHANNELS):
        launch = cam_pool_launch(batch, cells, classes, channels, half, capability)
        for tiles in (launch.forward, launch.d_features, launch.d_weight):
            assert all(power_of_two(n) and n >= 16 for n in (tiles.rows, tiles.classes, tiles.channels))
        size = 2 if half else 4
        forward = launch.forward
        assert (forward.rows + forward.classes) * forward.channels * size * forward.stages <= SHARED[capability]
        # A slice of the tile holds whole words of sign bits, and one bit of slack for the reshape.
        assert forward.rows // launch.slices % WORD == 0
        # Work lists are made of squares: steps and tiles are their multiples or parts.
        for length in (launch.d_features.rows, launch.d_features.classes, launch.d_weight.rows):
            assert length % SKIP == 0 or SKIP % length == 0
        assert 1 <= launch.splits <= 128
        # No grid is too long, also where the number of features passes 2^31.
        assert (batch * cells // forward.rows + 1) * (classes // forward.classes + 1) < 2**31


def test_memory_of_cam_pool_beside_its_outputs():
    # One bit a cell, and two slots of two fp32 sums a tile: within 1/10 of a bf16 map on Hopper.
    batch, cells, classes, channels = 128, 196, 5000, 2048
    launch = cam_pool_launch(batch, cells, classes, channels, True, 90)
    rows, stride = batch * cells, -(-classes // SKIP) * SKIP
    bits = -(-rows // WORD) * stride * 4
    tiles = -(-rows // launch.forward.rows)
    assert bits + tiles * 4 * classes * 4 + batch * channels * 2 <= rows * classes * 2 / 10
    # In the backward the bits, shares of cells, mean features and mean part, flags, and lists of steps. The gradient of
    # the weights is made in place, not in parts.
    assert launch.skip_empty_tiles and launch.splits == 1
    squares = -(-rows // SKIP) * (stride // SKIP)
    lists = 4 * squares * (SKIP / launch.d_features.rows + SKIP / launch.d_weight.classes)
    small = 2 * batch * stride * 2 + 2 * batch * channels * 2 + squares + lists
    assert bits + small <= rows * classes * 2 / 10


def test_squares_are_skipped_where_products_take_long():
    assert not any(skips_empty_tiles(128 * 196, classes) for classes in (20, 80, 312))
    assert skips_empty_tiles(128 * 196, 1000) and skips_empty_tiles(128 * 196, 5000)
    # Few cells: reading the weights takes longer than the products.
    assert not skips_empty_tiles(196, 5000) and not skips_empty_tiles(0, 5000) and skips_empty_tiles(8 * 196, 5000)


def test_small_shapes_split_their_sums_and_large_ones_do_not():
    assert cam_pool_launch(128, 196, 20, 2048, True).splits > 1
    assert cam_pool_launch(128, 196, 5000, 2048, True).splits == 1
    assert cam_pool_launch(1, 16, 20, 96, True).splits == 1


def test_next_power_of_two():
    assert [next_power_of_two(n) for n in (0, 1, 2, 3, 4, 5, 1000)] == [1, 1, 2, 4, 4, 8, 1024]


def test_chunks_fit_in_the_cache():
    assert chunk_size(25088, 5000, 2) == 448 and chunk_size(49, 80, 2) == 128
    assert chunk_size(10**7, 5000, 2) == 64
