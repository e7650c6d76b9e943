"""Block sizes and grids as pure functions of shapes, so that every rank and every run launches the same programs.

Nothing here looks at a device; `sms` and the like are arguments. No number here has been tuned on a GPU yet: they come
from register and shared-memory counts of ahead-of-time compiles (see docs/performance.md).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from spml_kernels.common.jit import cdiv


class FlatLaunch(NamedTuple):
    """Launch of a kernel that walks a tensor as one long row.

    Attributes:
        block: elements per program.
        warps: warps per program.
        programs: grid size.
    """

    block: int
    warps: int
    programs: int


def flat_launch(elements: int) -> FlatLaunch:
    """Point-wise kernels. 16 elements per thread: one 128-bit load of int8 codes, four of fp32 logits."""
    block = 2048 if elements > 2048 * 64 else 512
    return FlatLaunch(block, block // 512, cdiv(elements, block))


def point_launch(elements: int, each: int = 8) -> FlatLaunch:
    """The kernel into which methods hand a point function. Long functions take fewer elements per thread, or spill.

    Args:
        elements: B * C.
        each: elements per thread, a power of two (`PointLoss.elements_per_thread`).
    """
    block = (256 if elements > 2048 * 64 else 64) * each
    return FlatLaunch(block, block // (32 * each), cdiv(elements, block))


class LargeLossSelect(NamedTuple):
    """How large_loss finds its threshold where several programs share the work.

    Attributes:
        widths: bits of the 32-bit key that each pass counts by, from the highest on.
        bins: counts of a pass, at least two to the power of each width.
        turns: blocks that a program counts before it adds up what its threads hold; 0 for histograms.
    """

    widths: tuple[int, ...]
    bins: int
    turns: int


# `tl.histogram`, and counts of 16 digits packed into one number a thread's entry (see `_packed_counts_jit`).
LARGE_LOSS_SELECTS = {
    "histogram": LargeLossSelect((11, 11, 10), 2048, 0),
    "counts": LargeLossSelect((4,) * 8, 16, 15),
}
# Programs of a pass with histograms, each of which adds 2048 counts to those in memory.
HISTOGRAM_PROGRAMS = 128
HISTOGRAM_BLOCK = 2048


def large_loss_way(elements: int, alone: bool, version: tuple[int, ...]) -> str:
    """How large_loss counts.

    Args:
        elements: B * C.
        alone: whether no other rank takes part. Ranks must count alike, and may hold different numbers of entries.
        version: triton's.

    triton before 3.7 makes a histogram by votes over all bins, hundreds of instructions an entry (counted); eight
    passes of counts are five launches more, which by an estimate costs more up to one block a program. Over ranks they
    are five exchanges more as well.
    """
    slow = version < (3, 7) and elements > HISTOGRAM_PROGRAMS * HISTOGRAM_BLOCK
    return "counts" if alone and slow else "histogram"


def histogram_launch(elements: int, way: str = "histogram") -> FlatLaunch:
    """Passes of the radix select. Programs with histograms are few; counts are few, so that programs need not be."""
    programs = HISTOGRAM_PROGRAMS * (1 if way == "histogram" else 4)
    block = HISTOGRAM_BLOCK
    return FlatLaunch(block, 8, max(1, min(cdiv(elements, block), programs)))


class LargeLossSingleLaunch(NamedTuple):
    """Launch of large_loss in one program.

    Attributes:
        block: entries held while the threshold is found.
        part: entries written at a time.
        warps: of the program.
    """

    block: int
    part: int
    warps: int


# Entries that one program holds: 32 per thread of 16 warps, with up to 128 registers each. 32 warps, which leave 64,
# spill on some cards.
SINGLE_LAUNCH_ENTRIES = 16384


def large_loss_single_launch(elements: int) -> LargeLossSingleLaunch | None:
    """All passes of large_loss in one program, 16 entries per thread while threads suffice; None if it is too large."""
    if elements > SINGLE_LAUNCH_ENTRIES:
        return None
    block = max(1024, next_power_of_two(elements))
    warps = max(4, min(block // 512, 16))
    return LargeLossSingleLaunch(block, 128 * warps, warps)


class LabelRowsLaunch(NamedTuple):
    """Launch of `label_rows`.

    Attributes:
        block: columns filled at a time.
        entries: listed entries read at a time.
        warps: warps per program.
    """

    block: int
    entries: int
    warps: int


def label_rows_launch(num_classes: int) -> LabelRowsLaunch:
    """Rows of few classes take one small block; rows of many are filled 16 bytes per thread at a time."""
    block = min(max(128, next_power_of_two(num_classes)), 2048)
    return LabelRowsLaunch(block, 32 if block < 2048 else 128, 1 if block < 2048 else 4)


def next_power_of_two(value: int) -> int:
    """The smallest power of two that is at least `value`."""
    return 1 << max(value - 1, 0).bit_length()


# Programs that fill a GPU once (an A100 has 108 multiprocessors, an H100 132, a B200 148); one number for all cards, so
# that sums which are split over programs are split in the same way everywhere.
FULL_GPU = 128

# A 32-bit word of sign bits covers this many consecutive cells of one class.
WORD = 32


class CamPoolTiles(NamedTuple):
    """Launch of a matrix kernel.

    Attributes:
        rows: cells per tile.
        classes: classes per tile.
        channels: channels a step.
        warps, stages: of a program.
    """

    rows: int
    classes: int
    channels: int
    warps: int
    stages: int


class CamPoolLaunch(NamedTuple):
    """Launch of cam_pool's forward.

    Attributes:
        way: one of `CAM_POOL_WAYS`.
        tiles: of the map.
        slices: parts of a tile that are reduced one after the other.
        programs: at most, each of which takes tile after tile; 0 for a program a tile.
    """

    way: str
    tiles: CamPoolTiles
    slices: int
    programs: int = 0


# Classes of a row of signs are a multiple of this.
LANES = 64


# Products and sums in one kernel, a program a tile; the same with tensor descriptors and programs that take tile after
# tile; products by PyTorch, a chunk of classes at a time, and a kernel for the sums.
CAM_POOL_WAYS = ("tile", "persistent", "vendor")


def cam_pool_way(
    capability: int,
    version: tuple[int, ...],
    batch: int = 1,
    cells: int = 1,
    classes: int = 1,
    half: bool = True,
) -> str:
    """Who multiplies in cam_pool's forward.

    Args:
        capability: the card's compute capability, times 10.
        version: triton's.
        batch: B images.
        cells: H * W of the feature map.
        classes: C.
        half: whether products run in half precision.

    Cards before Ampere have neither bf16 nor asynchronous copies: there the tile spills kilobytes a thread. On Hopper
    triton before 3.7.1 leaves out the fence between a copy to shared memory and the matrix instruction that reads it,
    which the instruction set asks for. Wide tiles leave room for one program a multiprocessor, which then waits alone
    for its first operands and for its sums; the persistent kernel copies the next tile's operands meanwhile.
    """
    if capability < 80 or (capability == 90 and version < (3, 7, 1)):
        return "vendor"
    return "persistent" if capability == 90 and cam_pool_wide(batch, cells, classes, half) else "tile"


def cam_pool_wide(batch: int, cells: int, classes: int, half: bool) -> bool:
    """Whether tiles of 256 cells by 128 classes compile without spills on Hopper, and there are enough of them.

    Args:
        batch: B images.
        cells: H * W of the feature map.
        classes: C.
        half: whether products run in half precision.
    """
    large = classes > 64 and batch * cells * classes >= 128 * 256 * FULL_GPU
    return half and large and images_per_tile(256, cells) <= 4


def cam_pool_launch(
    batch: int,
    cells: int,
    classes: int,
    channels: int,
    half: bool,
    capability: int = 90,
    way: str = "tile",
    sms: int = FULL_GPU,
) -> CamPoolLaunch:
    """Block sizes of cam_pool's forward.

    Args:
        batch: B images.
        cells: H * W of the feature map.
        classes: C.
        channels: K.
        half: whether products run in half precision (else in three of tf32).
        capability: the card's compute capability, times 10.
        way: from `cam_pool_way`; operands that descriptors cannot describe take `tile` for `persistent`.
        sms: multiprocessors of the card, for the persistent kernel.

    Classes are the rows of the tile, cells its columns: sums over cells then run along the accumulator's rows, mostly
    within a thread. The wide tile halves what is read from the level-2 cache, but only on Hopper and with few images in
    a tile does it compile without spills. Narrow tiles are reduced whole: cutting them makes the compiler spread a
    row over more threads, which doubles the instructions.
    """
    large = half and classes > 64 and batch * cells * classes >= 128 * 128 * FULL_GPU
    step = 64 if half else 32
    if channels < step:
        step = max(16, next_power_of_two(channels))
    if way == "vendor":
        # Tall tiles have few sums of images that lie in several. 4 loads of 128 bits a thread in 61 registers: 32 warps
        # a multiprocessor on Hopper.
        return CamPoolLaunch(way, CamPoolTiles(256, 32, step, 16, 1), 1)
    programs = 0
    # Rows of operands begin at multiples of 16 bytes, and cards before Hopper have no engine for copies of tiles.
    if way == "persistent" and half and channels % 8 == 0 and capability >= 90:
        programs = sms
    else:
        way = "tile"
    if capability == 90 and cam_pool_wide(batch, cells, classes, half):
        return CamPoolLaunch(way, CamPoolTiles(256, 128, step, 8, 4 if programs else 3), 4, programs)
    if large:
        return CamPoolLaunch(way, CamPoolTiles(128, 128, step, 8, 3), 2, programs)
    return CamPoolLaunch(way, CamPoolTiles(128, 64, step, 8, 3 if half else 2), 1, programs)


# PyTorch's products of the gradient of the whole map, and products of our own that leave out classes without a positive
# cell (see `cam_pool.sparse`).
CAM_POOL_BACKWARD_WAYS = ("vendor", "sparse")

# Which of them is taken where SPML_CAM_POOL_BACKWARD does not say: at every shape the one whose time does not depend on
# the signs. How many classes have a positive cell is known on the device alone, and the host does not wait for it.
CAM_POOL_BACKWARD = "vendor"


class CamPoolSparse(NamedTuple):
    """Launch of cam_pool's backward that leaves out classes without a positive cell.

    Attributes:
        lines: of 32 cells, of a chunk whose classes are ordered, a power of two; every chunk reads and writes the
            gradient of the weights of its classes.
        classes: in the order, that share a list of lines and a tile of the weights' gradient.
        step: classes of a list that the features' gradient takes at a time.
        channels: of a tile of either gradient.
        listed, counted: classes that programs without products look at together.
        warps, stages: of the products.
    """

    lines: int
    classes: int
    step: int
    channels: int
    listed: int
    counted: int
    warps: int
    stages: int


# 10 to 11 images of 14 x 14 cells; fewer lines have fewer classes, and take more launches.
SPARSE_LINES = 64


def cam_pool_sparse_launch(channels: int, half: bool) -> CamPoolSparse:
    """Block sizes of cam_pool's backward that leaves out classes without a positive cell.

    Args:
        channels: K.
        half: whether products run in half precision (else in three of tf32).

    Making the operand from signs costs the same whatever the number of channels, so tiles are wide in channels.
    """
    wide = min(256 if half else 64, max(16, next_power_of_two(channels)))
    return CamPoolSparse(SPARSE_LINES, 64, 32, wide, 1024, 128, 8, 3 if half else 2)


# Most cells and classes of one program that writes a chunk of the map's gradient; chunks begin at multiples of them.
EXPAND_ROWS = 256
EXPAND_CLASSES = 256

# Elements that a row of scratch is a multiple of: what Triton looks for in a number to make wide loads and stores.
ALIGNED = 16

# Scratch that stays in the level-2 cache between the kernel that writes it and the product that reads it (50 MB on an
# H100, 40 on an A100), and scratch that is never worth avoiding; a whole map may be twice as large, for which a second
# chunk would be three launches more.
CHUNK_BYTES = 32 << 20
SMALL_BYTES = 4 << 20


def chunk_bytes(cache: int) -> int:
    """Bytes of a chunk of the map's gradient: two thirds of the cache where that is more than `CHUNK_BYTES`.

    Args:
        cache: bytes of the card's level-2 cache; 0 where it is not known.

    Every chunk reads and writes the weights' gradient and reads the weights, 10 C K bytes with bf16 features; a chunk
    that leaves the cache is written to memory and read twice, 6 C bytes a cell. So below 5/3 K cells (34 MB at C 5000,
    K 2048) a chunk costs more than its staying in the cache saves: small caches do not make chunks small.
    """
    return max(CHUNK_BYTES, cache * 2 // 3)


def expand_rows(classes: int) -> int:
    """Cells of one program that writes a chunk: fewer where few classes make few programs. Sums are kept for each."""
    return EXPAND_ROWS if classes > EXPAND_CLASSES else 64


def expand_classes(classes: int) -> int:
    """Classes of one program that writes a chunk.

    Few classes are cut into small pieces: 128 at once by 8 warps take up to 128 registers, of which one is spilled in
    fp32 with triton 3.8 on Hopper, 64 spill one with triton 3.6; 32 by 4 warps take 70 to 92 with every version on
    record. Programs are many enough, and move the same bytes.
    """
    return EXPAND_CLASSES if classes > 128 else 32


def expand_warps(classes: int) -> int:
    """Warps of one program that writes a chunk."""
    return 8 if classes > 128 else 4


class Chunk(NamedTuple):
    """Cells whose gradient of the map is made together.

    Attributes:
        first: of them.
        rows: how many.
        own: whether the scratch is memory of its own; else it is the end of the features' gradient, not yet written.
    """

    first: int
    rows: int
    own: bool


def _allowed(rows: int, classes: int, size: int, tenth: int) -> int:
    """Scratch of cam_pool for some cells of the map: all of a small map, else what a tenth of the map leaves."""
    whole = rows * cdiv(classes, ALIGNED) * ALIGNED * size
    return whole if whole <= 2 * SMALL_BYTES else min(CHUNK_BYTES, max(SMALL_BYTES, tenth))


def scratch_bytes(rows: int, classes: int, size: int) -> int:
    """Memory of its own that cam_pool's backward may take for a chunk: with signs and sums, a tenth of the map.

    Args:
        rows: cells of all images.
        classes: C.
        size: bytes of an element of the features.
    """
    # The signs' rows of classes are a little longer than C.
    kept = rows * (classes + LANES) // 8 + 4 * classes * cdiv(rows, expand_rows(classes))
    return _allowed(rows, classes, size, rows * classes * size // 10 - kept)


def map_scratch_bytes(rows: int, classes: int, size: int, tile: int) -> int:
    """Memory that the forward by PyTorch's products may take for a chunk of the map: with sums, a tenth of the map.

    Args:
        rows: cells of all images.
        classes: C.
        size: bytes of an element of the features.
        tile: cells of a tile, for which there are four sums a class.

    Signs, where they are kept, come on top: they are less than the features' gradient up to C = 16 K, which is not
    there yet, so that the most memory is taken in the backward.
    """
    # Products are kept in fp32, whatever the features are.
    return _allowed(rows, classes, 4, rows * classes * size // 10 - 16 * classes * cdiv(rows, tile))


def cam_pool_chunks(
    rows: int, classes: int, stride: int, channels: int, size: int, spare: bool, cache: int = 0
) -> list[Chunk]:
    """Chunks of cells for cam_pool's backward, from the first to the last.

    Args:
        rows: cells of all images.
        classes: C.
        stride: elements of a row of scratch.
        channels: K.
        size: bytes of an element.
        spare: whether the features' gradient is made, so that its end can be lent.
        cache: bytes of the card's level-2 cache; 0 where it is not known.

    Every chunk reads and writes the weights' gradient, so there should be few; a chunk that leaves the cache is read
    from memory by both products.
    """
    most = chunk_bytes(cache) // (stride * size)
    own = min(scratch_bytes(rows, classes, size) // (stride * size), most)
    chunks: list[Chunk] = []
    first = 0
    while first < rows:
        left = rows - first
        # The chunk's own gradient and its scratch fit into what is left, less what aligning the scratch takes.
        lent = min(most, (left * channels - stride) // (stride + channels)) if spare else 0
        fit = max(own, lent, EXPAND_ROWS)
        # Chunks begin at multiples, and the last may end anywhere.
        number = left if fit >= left else fit // EXPAND_ROWS * EXPAND_ROWS
        chunks.append(Chunk(first, number, number > lent))
        first += number
    return chunks


def images_per_tile(rows: int, cells: int) -> int:
    """Most images of `cells` cells that a tile of `rows` consecutive cells touches, wherever it starts."""
    # Tiles start at multiples of `rows`, so within an image only at multiples of this.
    step = math.gcd(rows, cells)
    return cdiv(rows + cells - step, cells)


class ColumnsLaunch(NamedTuple):
    """Launch of a kernel that sums the rows of a table class by class.

    Attributes:
        rows, classes: of a tile.
        turns: tiles that a program sums, one below the other.
        warps: warps per program.
    """

    rows: int
    classes: int
    turns: int
    warps: int


def columns_launch(rows: int, classes: int) -> ColumnsLaunch:
    """8 elements per thread: 64 bits of codes, at least 128 of logits. Rows are split over programs to fill a GPU."""
    tile = 8
    across = min(128, max(16, next_power_of_two(classes)))
    parts = min(cdiv(rows, tile), cdiv(FULL_GPU, cdiv(classes, across)))
    return ColumnsLaunch(tile, across, cdiv(cdiv(rows, tile), max(parts, 1)), max(1, tile * across // 256))


class ClassMapLaunch(NamedTuple):
    """Launch of the maps of a few classes.

    Attributes:
        cells: of one image, a program.
        channels: a step of the sum.
        chosen: classes summed at a time.
        warps: warps per program.
    """

    cells: int
    channels: int
    chosen: int
    warps: int


def class_map_launch(channels: int, chosen: int) -> ClassMapLaunch:
    """One class (a single observed positive) takes long steps; more of them share what is read, four at a time."""
    together = min(4, next_power_of_two(max(chosen, 1)))
    step = min(256 // together, max(16, next_power_of_two(channels)))
    return ClassMapLaunch(16, step, together, 4)


class MaskLaunch(NamedTuple):
    """Launch of the masked image.

    Attributes:
        rows: of pixels.
        columns: elements of a row of memory: pixels, or pixels by channels where channels are innermost.
        warps: warps per program.
    """

    rows: int
    columns: int
    warps: int


def mask_launch(row: int, step: int) -> MaskLaunch:
    """Tiles that hide three waits in a row (class ids, cells, image) and still lie mostly inside or outside of a mask.

    Args:
        row: elements of a row of memory.
        step: of these, elements of a pixel: the channels where they are innermost, else 1.

    16 elements a thread in 64 registers: 8 programs a multiprocessor, 4 kB of a bf16 image each. Where planes are
    apart, three loads follow one decision, so that half of the columns do.
    """
    columns = min(256 if step > 1 else 128, max(64, next_power_of_two(row)))
    return MaskLaunch(8, columns, min(4, 8 * columns // 256))


class NormaliseLaunch(NamedTuple):
    """Launch of the normalisation of maps.

    Attributes:
        image: cells of one map read at a time.
        rows, cells: maps and cells of a tile where maps of several images are compared.
        warps: warps per program.
    """

    image: int
    rows: int
    cells: int
    warps: int


def normalise_launch(cells: int) -> NormaliseLaunch:
    """Maps are small: one block where it holds them, and blocks of few cells where a cell's maps are compared."""
    return NormaliseLaunch(min(1024, max(32, next_power_of_two(cells))), 16, 32, 2)
