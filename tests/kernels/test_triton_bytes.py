"""The byte counter, and the formulas of `traffic` against what it counts of every kernel."""

from __future__ import annotations

import pytest
import torch
from spml_kernels import LargeLossStep, cam_mask, cam_pool, large_loss_step
from spml_kernels.cam_pool import tiles
from spml_kernels.common import heuristics
from spml_kernels.common.jit import INTERPRETED, jit, tl
from spml_kernels.devtools.counting import Launch, Moved, count, total
from spml_kernels.devtools.traffic import BOUNDS, formulas, has_formula, moved

from benchmarks.kernel_base import KernelWork, make_call
from benchmarks.kernel_losses import (
    ignore_loss_work,
    ignore_statistics_work,
    label_loss_work,
    label_rows_work,
    large_loss_work,
)
from benchmarks.kernel_maps import cam_mask_work, cam_work
from spml_fast.core.batch import Batch
from spml_fast.data.labels import LabelStore, SparseLabels
from spml_fast.methods import Progress, get_method
from spml_fast.methods.assume_negative import AssumeNegative
from tests import gpu_check

pytestmark = [
    pytest.mark.usefixtures("triton_on"),
    pytest.mark.skipif(not INTERPRETED, reason="bytes are counted under Triton's interpreter"),
]


@jit
def _reverse_kernel(source_ptr, target_ptr, number, BLOCK: tl.constexpr):
    """Two programs read the same; lanes past `number` are masked off in the load, and read place 0 in the second."""
    lane = tl.arange(0, BLOCK)
    there = lane < number
    one = tl.load(source_ptr + lane, mask=there, other=0.0)
    two = tl.load(source_ptr + tl.where(there, lane, 0))
    tl.store(target_ptr + tl.program_id(0) * number + lane, one + two, mask=there)


@jit
def _tally_kernel(source_ptr, tally_ptr, BLOCK: tl.constexpr):
    value = tl.load(source_ptr + tl.arange(0, BLOCK))
    tl.atomic_add(tally_ptr + value, tl.full((BLOCK,), 1, tl.int32), mask=value > 0, sem="relaxed")


def kernels(launches: list[Launch]) -> list[Launch]:
    return [launch for launch in launches if launch.kernel is not None]


def test_counts_lanes_that_take_part_and_no_others():
    source, target = torch.arange(6, dtype=torch.float16), torch.zeros(12, dtype=torch.float16)
    (launch,) = count(lambda: _reverse_kernel[(2,)](source, target, 6, BLOCK=16))
    # Six halves in each of two loads of two programs; each program writes six.
    assert launch.moved == Moved(unique_read=12, read=48, written=24)
    assert launch.grid == (2,) and launch.arguments["number"] == 6
    assert target.tolist() == [0, 2, 4, 6, 8, 10] * 2


def test_counts_atomics_by_themselves():
    source, tally = torch.tensor([0, 1, 2, 1], dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    (launch,) = count(lambda: _tally_kernel[(1,)](source, tally, BLOCK=4))
    assert launch.moved == Moved(unique_read=16, read=16, atomic=12)
    assert tally.tolist() == [0, 2, 1]


@pytest.mark.parametrize("length", [5, 11])
def test_accesses_outside_of_the_tensors_are_found(length):
    source = torch.zeros(6 if length == 11 else 5, dtype=torch.float16)
    with pytest.raises(Exception, match="outside of the tensors"):
        count(lambda: _reverse_kernel[(2,)](source, torch.zeros(length, dtype=torch.float16), 6, BLOCK=16))


def test_operations_inside_an_op_are_counted_too():
    """A loss is one kernel and the sum of its parts; its backward one kernel more."""
    work = label_loss_work(37, 81, AssumeNegative.point, ())
    names = [launch.name for launch in count(make_call(work, "fused", "step", work.inputs("cpu")))]
    assert names[:2] == ["_label_loss_kernel", "aten.sum.default"] and names[-1] == "_label_loss_backward_kernel"
    assert len(names) == 3


# Small forms of the benchmark's shapes: tiles that hold several images, images over several tiles, an odd number of
# 64 classes under tiles of 128, channels that are no multiple of a step, lists of several programs.
WORKS = [
    label_loss_work(37, 81, AssumeNegative.point, ()),
    large_loss_work(37, 81, 30),
    large_loss_work(37, 81, 30, listed=False),
    label_rows_work(5, 300, samples=50),
    cam_work(2, 9, 40, 10, torch.float32),
    cam_work(3, 14, 64, 130, torch.float16),
    cam_work(5, 7, 33, 65, torch.bfloat16),
    ignore_statistics_work(37, 300),
    ignore_loss_work(13, 81),
    cam_mask_work(3, 6, 40, 7, 50, 1, torch.float32),
    cam_mask_work(2, 5, 33, 9, 40, 6, torch.bfloat16),
]
# Products here or by PyTorch, in few chunks or many; one launch or five.
TWO_FORMS = ("cam_pool", "large_loss")
PASSES = [*["_large_histogram_kernel"] * 3, "_large_threshold_kernel", "_large_select_kernel"]


def test_counts_of_four_bits_take_eight_passes(monkeypatch):
    monkeypatch.setattr(heuristics, "SINGLE_LAUNCH_ENTRIES", 0)
    monkeypatch.setenv("SPML_LARGE_LOSS", "counts")
    work = large_loss_work(37, 81, 30)
    seen = kernels(count(make_call(work, "fused", "fwd", work.inputs("cpu"))))
    assert [launch.name for launch in seen] == ["_large_histogram_kernel"] * 5 + PASSES
    for launch in seen:
        assert launch.moved is not None and launch.moved._replace(atomic=0) == moved(launch), launch.name


@pytest.mark.parametrize(
    ("work", "other"),
    [(work, other) for work in WORKS for other in ((False, True) if work.op in TWO_FORMS else (False,))],
    ids=lambda v: v.name.replace(" ", "_") if isinstance(v, KernelWork) else "other" if v else "usual",
)
def test_formulas_give_what_is_counted(work: KernelWork, other: bool, monkeypatch):
    monkeypatch.setattr(heuristics, "SINGLE_LAUNCH_ENTRIES", 0 if other else 10**4)
    if other:
        monkeypatch.setattr(tiles, "DEFAULT", (90, "vendor"))
        monkeypatch.setattr(heuristics, "SMALL_BYTES", 1)
        monkeypatch.setattr(heuristics, "chunk_bytes", lambda _: 64 << 10)
    inputs = work.inputs("cpu")
    seen = kernels(count(make_call(work, "fused", "step" if work.leaves else "fwd", inputs)))
    assert seen
    for launch in seen:
        assert launch.moved is not None and has_formula(launch.name)
        expected = moved(launch)
        if launch.name in BOUNDS:
            assert launch.moved.unique_read <= expected.unique_read and launch.moved.read <= expected.read
            assert launch.moved.written == expected.written
        else:
            assert launch.moved._replace(atomic=0) == expected, launch.name


def test_persistent_programs_move_what_tiles_do(monkeypatch):
    work = cam_work(3, 14, 64, 130, torch.float16)
    monkeypatch.setattr(tiles, "FULL_GPU", 2)
    found = {}
    for way in ("tile", "persistent"):
        monkeypatch.setenv("SPML_CAM_POOL", way)
        found[way] = kernels(count(make_call(work, "fused", "fwd", work.inputs("cpu"))))[0]
        assert found[way].moved == moved(found[way])
    assert found["persistent"].name == "_cam_pool_persistent_kernel" and found["persistent"].grid == (2,)
    assert found["tile"].grid[0] > 2 and found["tile"].moved == found["persistent"].moved


@pytest.mark.parametrize("signs", ["dense", "zipf"])
@pytest.mark.parametrize("work", [(9, 2, 40, 10, torch.float32), (3, 14, 300, 130, torch.float16)], ids=str)
def test_formulas_of_the_backward_that_leaves_classes_out(work, signs, monkeypatch):
    monkeypatch.setenv("SPML_CAM_POOL_BACKWARD", "sparse")
    monkeypatch.setattr(heuristics, "SPARSE_LINES", 4)
    work = cam_work(work[0], max(work[1], 4), *work[2:], signs)
    seen = kernels(count(make_call(work, "fused", "step", work.inputs("cpu"))))
    names = {launch.name for launch in seen}
    assert {f"_cam_pool_{n}_kernel" for n in ("count", "list", "lines", "sparse_x", "sparse_w")} < names
    for launch in seen:
        assert launch.moved == moved(launch), launch.name


def test_tiling_of_cam_pool_and_no_map_in_memory(monkeypatch):
    """Every tile of classes reads the features once, every tile of cells the weights; no map is in memory at once."""
    monkeypatch.setattr(heuristics, "EXPAND_ROWS", 64)
    monkeypatch.setattr(heuristics, "SMALL_BYTES", 1)
    monkeypatch.setattr(heuristics, "chunk_bytes", lambda _: 64 * 320 * 4)
    # Products whose result is wider than their operands are made of fp32 copies without a GPU; fp32 needs none.
    work = cam_work(2, 16, 16, 320, torch.float32)
    cam = 512 * 320 * 4
    inputs = [t.requires_grad_() for t in work.inputs("cpu")]
    features, weight, bias = (t.numel() * t.element_size() for t in inputs)
    outputs = []
    forward = count(lambda: outputs.extend(cam_pool(*inputs)))
    first = forward[0]
    rows, classes = first.arguments["BLOCK_R"], first.arguments["BLOCK_C"]
    assert first.moved is not None
    assert first.moved.read == -(-320 // classes) * features + -(-512 // rows) * (weight + bias)
    assert first.moved.unique_read == features + weight + bias
    backward = count(lambda: torch.autograd.grad(sum(o.sum() for o in outputs), inputs))
    gradients = 4 * (320 * 16 + 320)
    assert total(forward).written < cam / 4
    # A chunk of the map's gradient, an eighth of it, with its sums.
    chunk = 64 * 320 * 4 + 4 * 320
    assert all(m.moved.written <= max(features, gradients, chunk) < cam / 4 for m in backward if m.moved)


@pytest.mark.parametrize(("threshold", "kept"), [(-1.0, True), (1.5, False)])
def test_images_are_read_where_something_of_them_is_kept(threshold, kept):
    features, weight, bias, classes, images = cam_mask_work(2, 5, 16, 9, 33, 2, torch.float32).inputs("cpu")
    results = []
    seen = kernels(count(lambda: results.append(cam_mask(features, weight, bias, classes, images, threshold))))
    assert torch.equal(results[0], images if kept else torch.zeros_like(images))
    mask = next(launch for launch in seen if launch.name == "_mask_kernel")
    # Ids of two classes an image, and their maps of 25 cells.
    rest = 2 * 2 * (8 + 25 * 4)
    assert mask.moved is not None and mask.moved.unique_read == kept * images.numel() * 4 + rest
    assert (moved(mask).unique_read == mask.moved.unique_read) == kept


@pytest.mark.parametrize("limit", [480, 479])
def test_large_loss_is_made_with_its_selection(limit, monkeypatch):
    """In one launch where one program holds the batch, in the last of five passes where not; no operation beside."""
    monkeypatch.setattr("spml_kernels.common.heuristics.SINGLE_LAUNCH_ENTRIES", limit)
    logits = torch.randn(8, 60, generator=torch.Generator().manual_seed(0))
    codes = torch.full((8, 60), -1, dtype=torch.int8)
    codes[:, 0] = 1
    k = torch.tensor(20)
    for length in (0, 20, 25):
        seen = count(lambda length=length: large_loss_step(logits, codes, k, 20, "correct", length=length))
        assert [launch.name for launch in seen] == (
            ["_large_single_kernel"] if limit == 480 else ["aten.zeros.default", *PASSES, "aten.sum.default"]
        )
    for name in ("ll_r", "ll_ct", "ll_cp"):
        cls = get_method(name)
        method = cls(cls.Options(name=name, delta_rel=5.0), LabelStore(SparseLabels.from_dense(codes.numpy())))
        batch = Batch({}, codes, torch.arange(8), 8)
        seen = kernels(count(lambda method=method, batch=batch: method.loss(logits, batch, Progress(3, 9, 0, 1))))
        assert [launch.name for launch in seen] == (["_large_single_kernel"] if limit == 480 else PASSES)


def test_entries_at_the_threshold_are_counted_where_some_of_them_are_left_out(monkeypatch):
    """Without a list, and with exact ties; the data is not read for nothing."""
    monkeypatch.setattr("spml_kernels.common.heuristics.SINGLE_LAUNCH_ENTRIES", 0)
    logits = torch.arange(600).view(6, 100) // 4 / 8
    codes = torch.full((6, 100), -1, dtype=torch.int8)
    codes[0, :3] = 1
    for k, ties, length, read in (
        (8, "exact", 0, False),
        (9, "exact", 0, True),
        (11, "exact", 0, True),
        (9, "inclusive", 0, False),
        (8, "exact", 8, True),
        (9, "inclusive", 9, True),
        (0, "exact", 0, False),
        (597, "exact", 0, False),
        (598, "exact", 0, False),
    ):

        def call(k=k, ties=ties, length=length):
            return large_loss_step(logits, codes, torch.tensor(k), k, "reject", ties, length=length)

        launch = next(launch for launch in kernels(count(call)) if launch.name == "_large_threshold_kernel")
        assert launch.moved is not None and launch.moved == moved(launch)
        # A histogram of 8 kB and the state; five bytes an entry.
        assert launch.moved.unique_read == 8204 + read * 5 * logits.numel()


def test_list_of_inclusive_ties_may_be_longer_than_k():
    logits = torch.zeros(3, 50)
    codes = torch.full((3, 50), -1, dtype=torch.int8)

    def step(length: int | None) -> LargeLossStep:
        return large_loss_step(logits, codes, torch.tensor(4), 4, "correct", "inclusive", length=length)

    assert step(None).valid.sum() == 4 and step(0).valid.numel() == 0
    whole = step(150)
    assert whole.selected.all() and whole.valid.all()
    assert torch.equal(whole.rows * 50 + whole.classes, torch.arange(150))


def test_no_op_reads_or_writes_outside_of_its_tensors():
    """The calls that compute-sanitizer watches on a GPU, under the counter, which refuses what lies outside."""
    seen = {launch.name for launch in kernels(count(lambda: gpu_check.small_calls("cpu")))}
    assert seen == formulas()
