"""Sparse label arrays and the label store with its corrections."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from spml_fast.core.errors import UserError
from spml_fast.data.labels import LabelStore, SparseLabels, class_dtype

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
    with pytest.raises(UserError, match=f"label files in {tmp_path}"):
        SparseLabels.load(tmp_path)


@settings(deadline=None, max_examples=40)
@given(codes_arrays, defaults, st.data())
def test_store_rows_are_sparse_rows(codes, default, data):
    labels = SparseLabels.from_dense(codes, default)
    store = LabelStore(labels)
    index = data.draw(st.lists(st.integers(0, len(codes) - 1), min_size=1, max_size=12))
    rows = store.rows(torch.tensor(index))
    assert rows.dtype == torch.int8
    assert np.array_equal(rows.numpy(), labels.rows(index))


corrections = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(-1, 1), st.booleans()), max_size=12)


@settings(deadline=None, max_examples=60)
@given(hnp.arrays(np.int8, (6, 4), elements=st.integers(-1, 1)), defaults, corrections, corrections, st.booleans())
def test_corrections_take_effect_at_commit_and_survive_a_restart(codes, default, first, second, restart):
    labels = SparseLabels.from_dense(codes, default)
    store = LabelStore(labels)
    everything = torch.arange(6)
    expected = codes.copy()
    corrected: set[tuple[int, int]] = set()

    def record(batch):
        for row, column, code, valid in batch:
            store.correct(torch.tensor([row]), torch.tensor([column]), code, torch.tensor([valid]))

    for batch in (first, second):
        record(batch)
        assert np.array_equal(store.rows(everything).numpy(), expected), "corrections must wait for commit"
        if restart:
            state = {k: v.clone() for k, v in store.state_dict().items()}
            store = LabelStore(labels)
            store.load_state_dict(state)
        new = {(r, c) for r, c, _, v in batch if v} - corrected
        assert store.commit() == len(new)
        corrected |= new
        for row, column, code, valid in batch:
            if valid:
                expected[row, column] = code
        assert np.array_equal(store.rows(everything).numpy(), expected)
        assert store.num_corrections == len(corrected)
    assert np.array_equal(store.rows(everything, corrected=False).numpy(), codes), "observed codes are never written"
    copy = LabelStore(labels)
    copy.load_state_dict(store.state_dict())
    assert np.array_equal(copy.rows(everything).numpy(), expected)


def test_corrections_of_other_data_are_refused():
    store = LabelStore(SparseLabels.from_positives([[0], [1], [0]], 2, -1))
    store.correct(torch.tensor([2]), torch.tensor([1]), 1)
    store.commit()
    smaller = LabelStore(SparseLabels.from_positives([[0], [1]], 2, -1))
    with pytest.raises(UserError, match=r"other training labels \(3 samples, 2 classes, 3 labels; now 2, 2 and 2\)"):
        smaller.load_state_dict(store.state_dict())
    # The same size, but other images.
    other = LabelStore(SparseLabels.from_positives([[0], [0], [1]], 2, -1))
    with pytest.raises(UserError, match="with other content"):
        other.load_state_dict(store.state_dict())
