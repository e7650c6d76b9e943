"""Bytes that each kernel moves, by formula from the arguments of its launch, at any size.

`moved` takes what `counting.count` recorded. Where tensors hold values, formulas of kernels whose work depends on them
use the values and are exact, save for those in `BOUNDS`; on meta tensors they take the most: entries at a threshold
counted, every pixel kept. Tests compare each formula with what the interpreter counts. Atomics are
left out: they stay within 8 kB of cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spml_kernels.common.jit import cdiv
from spml_kernels.devtools.counting import Launch, Moved

Formula = Callable[[dict[str, Any], tuple[int, ...]], Moved]
_FORMULAS: dict[str, Formula] = {}
# Kernels that leave out reads by what they find in tensors that are not theirs to look up: the most they read.
BOUNDS = ("_mask_kernel",)


def formula(kernel: str) -> Callable[[Formula], Formula]:
    """Decorator: the formula of the kernel of this name."""

    def add(function: Formula) -> Formula:
        _FORMULAS[kernel] = function
        return function

    return add


def moved(launch: Launch) -> Moved:
    """Bytes of a launch by formula; those of a PyTorch operation are already known.

    Raises:
        KeyError: a kernel without a formula.
    """
    if launch.kernel is None and launch.moved is not None:
        return launch.moved
    if launch.name not in _FORMULAS:
        raise KeyError(f"{launch.name} has no formula in spml_kernels.devtools.traffic")
    return _FORMULAS[launch.name](launch.arguments, launch.grid)


def formulas() -> set[str]:
    """Names of the kernels that have one."""
    return set(_FORMULAS)


def has_formula(kernel: str) -> bool:
    """Whether a kernel of this name has one."""
    return kernel in _FORMULAS


def _width(tensor: Tensor) -> int:
    return tensor.element_size()


def _values(tensor: Tensor) -> list[int] | None:
    """A tensor's values, None where it has none."""
    values: list[int] | None = None if tensor.is_meta else tensor.flatten().tolist()
    return values


@formula("_label_loss_kernel")
def _label_loss(a: dict[str, Any], grid: tuple[int, ...]) -> Moved:
    read = a["elements"] * (_width(a["logits_ptr"]) + 1)
    return Moved(read, read, 4 * grid[0])


@formula("_label_loss_backward_kernel")
def _label_loss_backward(a: dict[str, Any], grid: tuple[int, ...]) -> Moved:
    read = a["elements"] * (_width(a["logits_ptr"]) + 1)
    return Moved(read + 4, read + 4 * grid[0], a["elements"] * _width(a["grad_ptr"]))


@formula("_label_rows_kernel")
def _label_rows(a: dict[str, Any], grid: tuple[int, ...]) -> Moved:
    rows, indptr = grid[0], a["indptr_ptr"]
    entry = _width(a["classes_ptr"]) + 1
    if indptr.is_meta:
        # The mean number of entries, all rows different and none next to another.
        entries = len(a["codes_ptr"]) * rows // max(len(indptr) - 1, 1)
        unique, ends = entries, 2 * rows
    else:
        index = a["index_ptr"]
        size = indptr.diff()
        entries, unique = int(size[index].sum()), int(size[index.unique()].sum())
        ends = len(set(index.tolist()) | {i + 1 for i in index.tolist()})
    written = rows * a["num_classes"] + entries
    return Moved(8 * rows + 8 * ends + entry * unique, 24 * rows + entry * entries, written)


@formula("_large_histogram_kernel")
def _large_histogram(a: dict[str, Any], grid: tuple[int, ...]) -> Moved:
    data = a["elements"] * (_width(a["logits_ptr"]) + 1)
    # Counts of the pass before; pass 1 reads k beside them, later ones the state.
    before = 0 if a["DONE"] == 0 else 4 * a["BINS"] + (8 if a["DONE"] == a["BEFORE"] else 12)
    return Moved(data + before, data + before * grid[0], 12 if a["DONE"] else 0)


@formula("_large_threshold_kernel")
def _large_threshold(a: dict[str, Any], grid: tuple[int, ...]) -> Moved:
    data, before = a["elements"] * (_width(a["logits_ptr"]) + 1), 4 * a["BINS"] + 12
    if a["INCLUSIVE"] and not a["LIST"]:
        return Moved(before, before, 12)
    if not a["LIST"] and not a["hist_ptr"].is_meta:
        # Read where some of the entries at the threshold are left out: none of the sums from the top is what is left.
        _, left, mode = a["state_ptr"].tolist()
        data *= mode == 0 and left not in a["hist_ptr"].flip(0).cumsum(0).tolist()
    return Moved(data + before, data + before * grid[0], 8 * grid[0] + 12)


@formula("_large_select_kernel")
def _large_select(a: dict[str, Any], grid: tuple[int, ...]) -> Moved:
    elements, programs = a["elements"], grid[0]
    data = elements * (_width(a["logits_ptr"]) + 1)
    # Every program adds up the counts of those before it: at the threshold, and with a list above it too. Those that
    # end a part of the list add up all of them.
    sums = int(not a["INCLUSIVE"] or a["LIST"]) + int(a["LIST"])
    ends = cdiv(a["length"], a["BLOCK"])
    unique = data + 12 + sums * 4 * (programs if ends else programs - 1)
    added = ends * programs + programs * (programs - 1) // 2 - ends * (ends - 1) // 2
    return Moved(unique, data + 12 * programs + sums * 4 * added, _large_written(a, programs))


def _large_written(a: dict[str, Any], sums: int) -> int:
    """Selection, list, and with a loss its sums and the gradient."""
    written = a["elements"] + 17 * a["length"]
    if a["LOSS"]:
        written += 4 * sums + (a["elements"] * _width(a["grad_ptr"]) if a["GRAD"] else 0)
    return int(written)


@formula("_large_single_kernel")
def _large_single(a: dict[str, Any], grid: tuple[int, ...]) -> Moved:
    # Read to find the threshold, and again to write; with k.
    data = a["elements"] * (_width(a["logits_ptr"]) + 1)
    return Moved(data + 8, 2 * data + 8, 4 + _large_written(a, 1))


def _tiles_touched(image: int, cells: int, block: int) -> int:
    """Tiles of `block` cells that an image lies in."""
    return (image * cells + cells - 1) // block - image * cells // block + 1


@formula("_cam_pool_persistent_kernel")
def _cam_pool_persistent(a: dict[str, Any], grid: tuple[int, ...]) -> Moved:
    # The same tiles, whoever makes them.
    operands = {"features_ptr": a["features_tiles"].base, "weight_ptr": a["weight_tiles"].base}
    return _cam_pool_forward({**a, **operands}, grid)


@formula("_cam_pool_fwd_kernel")
def _cam_pool_forward(a: dict[str, Any], grid: tuple[int, ...]) -> Moved:
    rows, classes, channels, cells = a["rows"], a["classes"], a["channels"], a["cells"]
    tiles_r, tiles_c = cdiv(rows, a["BLOCK_R"]), cdiv(classes, a["BLOCK_C"])
    features, weight = rows * channels * _width(a["features_ptr"]), classes * channels * _width(a["weight_ptr"])
    # Every tile of classes reads all features, every tile of cells all weights and biases.
    read = tiles_c * features + tiles_r * (weight + 4 * classes)
    touched = [_tiles_touched(p, cells, a["BLOCK_R"]) for p in range(rows // cells)]
    # Two sums per class: in the place of the result for an image within one tile, in one slot a tile for the others.
    written = 8 * classes * sum(touched)
    if a["BITS"]:
        written += 4 * cdiv(rows, 32) * a["stride"]
    return Moved(features + weight + 4 * classes, read, written)


@formula("_cam_pool_finish_kernel")
def _cam_pool_finish(a: dict[str, Any], grid: tuple[int, ...]) -> Moved:
    touched = [_tiles_touched(p, a["cells"], a["BLOCK_R"]) for p in range(grid[0])]
    read = 8 * a["classes"] * sum(n for n in touched if n > 1)
    return Moved(read, read, 8 * a["classes"] * sum(n > 1 for n in touched))


@formula("_cam_pool_reduce_kernel")
def _cam_pool_reduce(a: dict[str, Any], grid: tuple[int, ...]) -> Moved:
    first, number, cells, classes = a["first"], a["number"], a["cells"], a["classes"]
    data = number * a["map_stride"] * _width(a["map_ptr"])
    tiles = range(first // a["BLOCK_R"], cdiv(first + number, a["BLOCK_R"]))
    # An image is in a tile's sums where they share a cell.
    ends = [(t * a["BLOCK_R"], min((t + 1) * a["BLOCK_R"], a["rows"])) for t in tiles]
    touched = sum((stop - 1) // cells - start // cells + 1 for start, stop in ends)
    bits = 4 * cdiv(number, 32) * a["stride"] if a["BITS"] else 0
    return Moved(data + 4 * classes, data + 4 * classes * len(tiles), 8 * classes * touched + bits)


@formula("_cam_pool_expand_kernel")
def _cam_pool_expand(a: dict[str, Any], grid: tuple[int, ...]) -> Moved:
    first, number, classes, cells = a["first"], a["number"], a["classes"], a["cells"]
    scale = 4 if a["SCALED"] else 0
    bits = 4 * cdiv(number, 32) * classes
    # Each word of 32 cells, those past the end too, reads the gradients of as many images as it may lie in.
    images: set[int] = set()
    read = 0
    for line in range(grid[0] * a["LINES"]):
        begin = (first + 32 * line) // cells
        seen = range(begin, min(begin + a["TOUCHED"], a["rows"] // cells))
        images.update(seen)
        read += 8 * classes * len(seen)
    written = number * a["out_stride"] * _width(a["out_ptr"]) + 4 * grid[0] * classes
    return Moved(bits + 8 * classes * len(images) + scale, bits + read + scale * grid[0] * grid[1], written)


def _live(a: dict[str, Any]) -> Tensor:
    """Which words of signs are not 0, [lines, classes]; without values all, which is the most."""
    words = a["bits_ptr"][:, : a.get("classes")]
    return torch.ones(words.shape, dtype=torch.bool) if words.is_meta else words != 0


def _images_of(line: int, a: dict[str, Any]) -> range:
    """Images whose gradients are read for the cells from this line of 32 on."""
    begin = 32 * line // a["cells"]
    return range(begin, min(begin + a["TOUCHED"], a["rows"] // a["cells"]))


@formula("_cam_pool_count_kernel")
def _cam_pool_count(a: dict[str, Any], grid: tuple[int, ...]) -> Moved:
    classes, lines = a["classes"], cdiv(a["rows"], 32)
    bits, seen = 4 * lines * classes, [_images_of(line, a) for line in range(lines)]
    images = len({image for part in seen for image in part})
    read = bits + 4 * classes * sum(len(part) for part in seen)
    return Moved(bits + 4 * classes * images, read, 8 * grid[0] * classes)


@formula("_cam_pool_list_kernel")
def _cam_pool_list(a: dict[str, Any], grid: tuple[int, ...]) -> Moved:
    read = 4 * a["lines"] * a["stride"]
    written = _width(a["list_ptr"]) * sum(int(part.any(0).sum()) for part in _live(a).split(2))
    return Moved(read, read, written + 4 * grid[0])


def _blocks(a: dict[str, Any], chunk: int, block: int) -> list[Tensor]:
    """Classes of every block of a chunk's order that have a positive cell."""
    part = _live(a)[chunk * a["LINES"] : (chunk + 1) * a["LINES"]]
    live = part.any(0)
    order = torch.arange(a["classes"]) if a["order_ptr"].is_meta else a["order_ptr"][chunk]
    return [own[live[own]] for own in order.split(block)]


@formula("_cam_pool_lines_kernel")
def _cam_pool_lines(a: dict[str, Any], grid: tuple[int, ...]) -> Moved:
    live = _live(a)
    read, written = 4 * grid[0] * a["classes"], 4 * grid[0] * grid[1]
    for chunk in range(grid[0]):
        part = live[chunk * a["LINES"] : (chunk + 1) * a["LINES"]]
        for own in _blocks(a, chunk, a["BLOCK"]):
            read += 8 * len(own) + 4 * len(own) * len(part)
            written += 4 * int(part[:, own].any(1).sum())
    return Moved(read, read, written)


@formula("_cam_pool_sparse_x_kernel")
def _cam_pool_sparse_x(a: dict[str, Any], grid: tuple[int, ...]) -> Moved:
    rows, cells, channels, width = a["rows"], a["cells"], a["channels"], _width(a["weight_ptr"])
    entry = _width(a["list_ptr"])
    live, tiles_k = _live(a), cdiv(channels, a["BLOCK_K"])
    parts = live.split(2)
    scale = 4 if a["SCALED"] else 0
    gradients = torch.zeros(rows // cells, a["classes"], dtype=torch.bool)
    # Read by every tile of channels, and by all of them together.
    each = together = lists = 0
    for tile, part in enumerate(parts):
        own = part.any(0)
        number = int(own.sum())
        seen = _images_of(2 * tile, a)
        gradients[seen.start : seen.stop] |= own
        lists += 4 + entry * number + 4 * number * len(part)
        each += 4 + entry * number + 4 * number * len(part) + 4 * number * len(seen) + scale
        last = min((tile + 1) * 64, rows) - 1
        together += number * channels * width + 4 * channels * (last // cells - tile * 64 // cells + 1)
    unique = lists + 4 * int(gradients.sum()) + int(live.any(0).sum()) * channels * width
    unique += 4 * (rows // cells) * channels + scale
    return Moved(unique, each * tiles_k + together, rows * channels * _width(a["out_ptr"]))


@formula("_cam_pool_sparse_w_kernel")
def _cam_pool_sparse_w(a: dict[str, Any], grid: tuple[int, ...]) -> Moved:
    rows, channels, classes = a["rows"], a["channels"], a["classes"]
    width, tiles_k = _width(a["features_ptr"]), cdiv(channels, a["BLOCK_K"])
    first = a["chunk"] * a["LINES"]
    live = _live(a)[first : first + a["LINES"]]
    scale = 4 if a["SCALED"] else 0
    gradients = torch.zeros(rows // a["cells"], classes, dtype=torch.bool)
    used = torch.zeros(len(live), dtype=torch.bool)
    blocks = _blocks(a, a["chunk"], a["BLOCK_C"])
    unique, each, together, working = 4 * len(blocks), 0, 0, False
    for place, own in enumerate(blocks):
        each += 4
        lines = live[:, own].any(1)
        number = int(lines.sum())
        if number == 0:
            continue
        working = True
        inside = min(a["BLOCK_C"], classes - place * a["BLOCK_C"])
        head = 4 * inside + 8 * len(own) + 4 * number + 4 * number * len(own)
        unique += head
        each += head + scale
        used |= lines
        for line in lines.nonzero().flatten().tolist():
            seen = _images_of(first + line, a)
            gradients[seen.start : seen.stop, own] = True
            each += 4 * len(own) * len(seen)
            together += (min((first + line + 1) * 32, rows) - (first + line) * 32) * channels * width
        together += 4 * len(own) * channels
        unique += 4 * len(own) * channels
    cells = sum(min((first + n + 1) * 32, rows) - (first + n) * 32 for n in used.nonzero().flatten().tolist())
    unique += 4 * int(gradients.sum()) + cells * channels * width + scale * working
    written = 4 * sum(len(own) for own in blocks) * channels
    return Moved(unique, each * tiles_k + together, written)


@formula("_ignore_statistics_kernel")
def _ignore_statistics(a: dict[str, Any], grid: tuple[int, ...]) -> Moved:
    classes = a["CLASSES"]
    read = a["rows"] * classes * (_width(a["logits_ptr"]) + _width(a["masked_ptr"]) + 1)
    parts = grid[0] // cdiv(classes, a["BLOCK_C"])
    return Moved(read, read, 4 * parts * classes + 8 * grid[0])


@formula("_ignore_finish_kernel")
def _ignore_finish(a: dict[str, Any], grid: tuple[int, ...]) -> Moved:
    read = 4 * a["parts"] * a["CLASSES"] + 8 * a["programs"]
    return Moved(read, read, 4 * (a["CLASSES"] + 3))


@formula("_ignore_loss_kernel")
def _ignore_loss(a: dict[str, Any], grid: tuple[int, ...]) -> Moved:
    elements, width = a["elements"], _width(a["logits_ptr"])
    data = elements * (width + 1)
    data += elements * (_width(a["strong_ptr"]) * a["STRONG"] + _width(a["masked_ptr"]) * a["REJECT"] + a["TRUTH"])
    unique = read = data
    if a["REJECT"]:
        unique, read = unique + 4, read + 4 * grid[0]
        if a["AVERAGE"]:
            unique += 4 * min(a["CLASSES"], grid[0] * a["BLOCK"])
            read += 4 * min(a["CLASSES"], a["BLOCK"]) * grid[0]
    return Moved(unique, read, elements + 24 * grid[0])


@formula("_ignore_backward_kernel")
def _ignore_backward(a: dict[str, Any], grid: tuple[int, ...]) -> Moved:
    elements, width, strong = a["elements"], _width(a["logits_ptr"]), _width(a["strong_ptr"])
    data = elements * (width + 2 + strong * a["STRONG"])
    return Moved(data + 12, data + 12 * grid[0], elements * (width * a["WEAK_GRAD"] + strong * a["STRONG_GRAD"]))


@formula("_class_map_kernel")
def _class_map(a: dict[str, Any], grid: tuple[int, ...]) -> Moved:
    cells, channels, chosen, together = a["cells"], a["channels"], a["chosen"], a["BLOCK_N"]
    blocks = cdiv(cells, a["BLOCK_P"])
    images = grid[0] // blocks
    features, weight, bias = (_width(a[name]) for name in ("features_ptr", "weight_ptr", "bias_ptr"))
    ids = _values(a["ids_ptr"])
    if ids is None:
        # All there, and all different.
        ids = [place % len(a["weight_ptr"]) for place in range(images * chosen)]
    ids = [i if i < len(a["weight_ptr"]) else -1 for i in ids]
    read = seen = 0
    written = 8 * images * chosen
    used: set[int] = set()
    for image in range(images):
        row = ids[image * chosen :][:chosen]
        written += 4 * cells * sum(i >= 0 for i in row)
        seen += any(i >= 0 for i in row)
        for first in range(0, chosen, together):
            part = row[first : first + together]
            if max(part) >= 0:
                # Lanes without a class read the weights of class 0 and drop what comes of it.
                lanes = {max(i, 0) for i in part} | ({0} if len(part) < together else set())
                used |= lanes
                read += cells * channels * features + blocks * len(lanes) * (channels * weight + bias)
        # The first program of an image reads its ids twice.
        read += 8 * (blocks + 1) * chosen
    unique = seen * cells * channels * features + len(used) * (channels * weight + bias) + 8 * images * chosen
    return Moved(unique, read, written)


@formula("_normalise_image_kernel")
def _normalise_image(a: dict[str, Any], grid: tuple[int, ...]) -> Moved:
    ids = _values(a["ids_ptr"])
    rows = grid[0] if ids is None else sum(i >= 0 for i in ids)
    data = rows * a["cells"]
    return Moved(8 * grid[0] + data * _width(a["maps_ptr"]), 8 * grid[0] + 2 * data * _width(a["maps_ptr"]), 4 * data)


@formula("_normalise_batch_kernel")
def _normalise_batch(a: dict[str, Any], grid: tuple[int, ...]) -> Moved:
    ids = _values(a["ids_ptr"])
    rows = a["rows"] if ids is None else sum(i >= 0 for i in ids)
    data, width = rows * a["cells"], _width(a["maps_ptr"])
    named = 8 * a["rows"]
    return Moved(named + data * width, 2 * (named * cdiv(a["cells"], a["BLOCK_P"]) + data * width), 4 * data)


@formula("_mask_kernel")
def _mask(a: dict[str, Any], grid: tuple[int, ...]) -> Moved:
    images = a["images_ptr"].numel() * _width(a["images_ptr"])
    ids = a["ids_ptr"].numel()
    # A tile reads the cells that it touches to decide, and once more above and once below its pixels to upsample.
    window = 3 * 4 * a["CELLS_Y"] * a["CELLS_X"]
    unique = images + 8 * ids + 4 * ids * a["down"] * a["across"]
    return Moved(unique, images + grid[0] * a["chosen"] * (8 + window), images)
