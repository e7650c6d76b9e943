"""Label codes and sparse label arrays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from spml_fast.core.errors import UserError
from spml_fast.data.labels import NEGATIVE, POSITIVE, UNKNOWN, SparseLabels, class_dtype

codes_arrays = hnp.arrays(np.int8, st.tuples(st.integers(1, 10), st.integers(1, 8)), elements=st.integers(-1, 1))
defaults = st.sampled_from([0, -1])


@settings(deadline=None, max_examples=60)
@given(codes_arrays, defaults, st.randoms(use_true_random=False))
def test_entries_in_any_order(codes, default, random):
    rows, classes = np.nonzero(codes != default)
    order = list(range(len(rows)))
    random.shuffle(order)
    args = rows[order], classes[order], codes[rows, classes][order]
    labels = SparseLabels.from_entries(*args, len(codes), codes.shape[1], default)
    assert np.array_equal(labels.rows(range(len(codes))), codes)
    assert len(labels) == len(codes) and labels.indptr.dtype == np.int64 and labels.codes.dtype == np.int8
    for start, stop in zip(labels.indptr, labels.indptr[1:], strict=False):
        assert (np.diff(labels.classes[start:stop].astype(int)) > 0).all()
    assert np.array_equal(labels.entry_rows(), rows)


@settings(deadline=None, max_examples=60)
@given(codes_arrays, defaults, st.data())
def test_select_is_row_indexing(codes, default, data):
    labels = SparseLabels.from_dense(codes, default)
    index = data.draw(st.lists(st.integers(-len(codes), len(codes) - 1), max_size=12))
    picked = labels.select(index)
    assert np.array_equal(picked.rows(range(len(index))), codes[index])
    again = picked.select(range(len(index)))
    assert np.array_equal(again.indptr, picked.indptr) and np.array_equal(again.classes, picked.classes)


@settings(deadline=None, max_examples=40)
@given(codes_arrays, defaults)
def test_counts(codes, default):
    labels = SparseLabels.from_dense(codes, default)
    for code in {1, 0, -1} - {default}:
        assert np.array_equal(labels.class_counts(code), (codes == code).sum(0))
        assert np.array_equal(labels.row_counts(code), (codes == code).sum(1))


def test_codes_are_those_that_files_hold():
    labels = SparseLabels.from_dense(np.array([[POSITIVE, NEGATIVE, UNKNOWN]], np.int8))
    assert labels.rows([0]).tolist() == [[1, 0, -1]]


def test_positives_count_once():
    labels = SparseLabels.from_positives([[2, 0, 2], [], (1,)], 3, 0)
    assert labels.rows([0, 1, 2]).tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    empty = SparseLabels.from_positives([], 3, 0)
    assert len(empty) == 0 and empty.rows([]).shape == (0, 3)


@pytest.mark.parametrize(
    ("rows", "classes", "codes", "message"),
    [
        ([0, 0], [1, 1], [1, 0], "twice"),
        ([0], [3], [1], "class id"),
        ([0], [-1], [1], "class id"),
        ([2], [0], [1], "row"),
        ([-1], [0], [1], "row"),
        ([0], [0], [2], "code"),
        ([0, 1, 0], [-1, 1, 2], [1, 1, 1], "class id"),
        ([0, 1, 0], [0, 3, 2], [1, 1, 1], "class id"),
        ([-1, 1, 0], [0, 1, 2], [1, 1, 1], "row"),
        ([0, 2, 0], [0, 1, 2], [1, 1, 1], "row"),
        ([0, 1, 0], [0, 1, 2], [1, -2, 1], "code"),
        ([0, 1, 0], [2, 1, 2], [1, 0, 1], "twice"),
        ([0, 1, 1], [0, 2, 2], [1, 0, 1], "twice"),
        ([0, 1, 0], [0, 1, 2], [-1, 2, 0], "code"),
    ],
)
def test_bad_entries(rows, classes, codes, message):
    with pytest.raises(ValueError, match=message):
        SparseLabels.from_entries(rows, classes, codes, 2, 3)


def test_class_dtype_at_its_limit():
    assert class_dtype(32767) == np.int16 and class_dtype(32768) == np.int32
    wide = SparseLabels.from_positives([[0, 39_999]], 40_000, -1)
    assert wide.classes.dtype == np.int32 and wide.rows([0])[0, 39_999] == 1


@settings(deadline=None, max_examples=20)
@given(codes_arrays, defaults)
def test_save_and_load(tmp_path_factory, codes, default):
    folder = tmp_path_factory.mktemp("labels")
    SparseLabels.from_dense(codes, default).save(folder)
    loaded = SparseLabels.load(folder)
    assert isinstance(loaded.codes, np.memmap)
    assert (loaded.default, loaded.num_classes) == (default, codes.shape[1])
    assert np.array_equal(loaded.rows(range(len(codes))), codes)


@pytest.mark.parametrize("damage", ["codes.npy", "labels.json"])
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_damaged_files_are_named(tmp_path, damage, how):
    SparseLabels.from_positives([[0], [1]], 2, 0).save(tmp_path)
    path = tmp_path / damage
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:5])
    with pytest.raises(UserError, match=f"{path} (cannot be read|is damaged)"):
        SparseLabels.load(tmp_path)


@settings(deadline=None, max_examples=60)
@given(codes_arrays, defaults, st.data())
def test_other_codes_of_some_pairs(codes, default, data):
    """`codes_at` reads them and `with_codes` sets them, in any order, listed before or not."""
    labels = SparseLabels.from_dense(codes, default)
    pairs = [(i, c) for i in range(codes.shape[0]) for c in range(codes.shape[1])]
    chosen = data.draw(st.lists(st.sampled_from(pairs), unique=True))
    rows, classes = [i for i, _ in chosen], [c for _, c in chosen]
    assert labels.codes_at(rows, classes).tolist() == codes[rows, classes].tolist()
    new = data.draw(st.lists(st.integers(-1, 1), min_size=len(chosen), max_size=len(chosen)))
    changed = labels.with_codes(rows, classes, new)
    expected = codes.copy()
    expected[rows, classes] = new
    again = SparseLabels.from_dense(expected, default)
    assert np.array_equal(changed.rows(range(len(codes))), expected)
    for name in ("indptr", "classes", "codes"):
        assert np.array_equal(getattr(changed, name), getattr(again, name))
        assert getattr(changed, name).dtype == getattr(labels, name).dtype


def test_rows_counted_from_the_end_may_stand_first():
    """Ascending places whose first is negative are not ascending rows."""
    codes = np.array([[-1, 1, -1], [1, -1, -1], [-1, 1, 0]], np.int8)
    labels = SparseLabels.from_dense(codes)
    for index in ([-2, 2], [-1, 0, 1], [-3, -1]):
        assert np.array_equal(labels.select(index).rows(range(len(index))), codes[index])


@pytest.mark.parametrize("entries", [255, 256, 65_536])
def test_counts_of_as_many_entries_as_a_type_just_holds(entries):
    width = 5
    codes = np.ones((-(-entries // width), width), np.int8)
    codes.reshape(-1)[entries:] = -1
    counts = SparseLabels.from_dense(codes).row_counts(1)
    assert counts.dtype == np.int64 and np.array_equal(counts, (codes == 1).sum(1))


def test_pairs_are_a_row_and_a_class_each():
    with pytest.raises(ValueError, match="zip"):
        SparseLabels.from_positives([[0], [1]], 2, 0).codes_at([0, 1], [0])


def test_folders_above_are_made(tmp_path):
    SparseLabels.from_positives([[0], [1]], 2, 0).save(tmp_path / "split" / "known")
    assert SparseLabels.load(tmp_path / "split" / "known").rows([1]).tolist() == [[0, 1]]
