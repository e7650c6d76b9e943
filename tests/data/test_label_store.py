"""The label store: rows, and corrections over ranks, restarts and checkpoints."""

from __future__ import annotations

import io
import threading
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from spml_fast.core.errors import UserError
from spml_fast.data import labels as labels_module
from spml_fast.data.labels import UNKNOWN, LabelStore, SparseLabels
from tests.support.data import some_labels

codes_arrays = hnp.arrays(np.int8, st.tuples(st.integers(1, 10), st.integers(1, 8)), elements=st.integers(-1, 1))
defaults = st.sampled_from([0, -1])


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


def test_many_corrections_over_epochs_and_checkpoints(monkeypatch):
    """Against a dictionary; with packing on the way and a restart through a file inside the second epoch."""
    monkeypatch.setattr(labels_module, "_MAX_WAITING", 5000)
    known = some_labels(4000, 500, 3)
    store, expected = LabelStore(known), {}
    rng = np.random.default_rng(1)
    for epoch in range(3):
        for step in range(40):
            index, classes = torch.from_numpy(rng.integers(0, 4000, 400)), torch.from_numpy(rng.integers(0, 500, 400))
            valid = torch.from_numpy(rng.random(400) < 0.7)
            code = int(rng.integers(-1, 2))
            store.correct(index, classes, code, valid)
            kept = (index * 500 + classes)[valid].tolist()
            expected.update(dict.fromkeys(kept, code))
            if epoch == 1 and step == 20:
                file = io.BytesIO()
                torch.save(store.state_dict(), file)
                file.seek(0)
                store = LabelStore(known)
                store.load_state_dict(torch.load(file))
        before = store.num_corrections
        assert store.commit() == len(expected) - before
    assert store.num_corrections == len(expected) > 30_000
    codes = known.rows(range(4000))
    for key, code in expected.items():
        codes[divmod(key, 500)] = code
    assert np.array_equal(store.rows(torch.arange(4000)).numpy(), codes)
    state = store.state_dict()
    assert (
        sum(t.nbytes for t in state.values()) == 9 * len(expected) + state["calls"].nbytes + state["fingerprint"].nbytes
    )
    assert store.nbytes == known.indptr.nbytes * 2 + 3 * (len(known.codes) + len(expected))
    assert store.commit() == 0


@settings(deadline=None, max_examples=60)
@given(codes_arrays, defaults, st.integers(1, 4))
def test_the_most_entries_of_a_sample(codes, default, rows):
    """Counted some rows at a time; what is not listed does not count."""
    store = LabelStore(SparseLabels.from_dense(codes, default))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labels_module, "_COUNT_ROWS", rows)
        for code in {1, 0, -1} - {default}:
            assert store.max_row_count(code) == (codes == code).sum(1).max()
        assert store.max_row_count(default) == 0


def test_a_store_without_samples():
    store = LabelStore(SparseLabels.from_positives([], 3, UNKNOWN))
    assert len(store) == 0 and store.max_row_count(1) == 0
    assert store.rows(torch.empty(0, dtype=torch.int64)).shape == (0, 3)
    # One offset; neither labels nor corrections.
    assert store.nbytes == 8


def test_labels_are_known_by_their_size_and_the_checksum_of_their_arrays():
    """CRC-32 of the bytes one after the other: checkpoints of other versions have the same."""
    labels = SparseLabels.from_positives([[0, 2], [], [1]], 3, UNKNOWN)
    content = b"".join(a.tobytes() for a in (labels.indptr, labels.classes, labels.codes))
    assert LabelStore(labels).fingerprint.tolist() == [3, 3, 3, zlib.crc32(content)]


def test_waiting_corrections_take_bounded_memory(monkeypatch):
    """Padding is dropped on the way, so that only real corrections pile up."""
    monkeypatch.setattr(labels_module, "_MAX_WAITING", 24)
    store = LabelStore(SparseLabels.from_positives([[0]] * 8, 4, UNKNOWN))
    index, classes = torch.arange(8), torch.ones(8, dtype=torch.int64)
    for call in range(20):
        store.correct(index, classes, 1, index == call % 8)
        # Three calls fit, and the fourth is more than may wait.
        assert sum(len(keys) for keys, *_ in store._waiting) == 8 * ((call + 1) % 4)
    assert sum(len(keys) for keys, *_ in store._packed) <= 20
    assert store.commit() == 8 and (store.rows(index)[:, 1] == 1).all()


def test_what_waited_before_a_restart_is_forgotten():
    labels = SparseLabels.from_positives([[0], [1]], 3, UNKNOWN)
    store = LabelStore(labels)
    store.correct(torch.tensor([0]), torch.tensor([2]), 1)
    fresh = LabelStore(labels).state_dict()
    store.load_state_dict(fresh)
    assert store.commit() == 0 and store.num_corrections == 0
    store.correct(torch.tensor([0]), torch.tensor([2]), 1)
    store._pack()
    store.load_state_dict(fresh)
    assert store.commit() == 0
    # The first correction after it packs what it counts, and no more.
    store.correct(torch.tensor([1]), torch.tensor([2]), 0)
    assert store.commit() == 1 and store.rows(torch.arange(2)).tolist() == [[1, -1, -1], [-1, 1, 0]]


def on_ranks(world: int, work: Any, monkeypatch: Any) -> list[Any]:
    """Run work(rank) in threads that stand for ranks, with a gather between them."""
    meet, slots, local = threading.Barrier(world, timeout=30), {}, threading.local()

    def gather(tensor: torch.Tensor) -> torch.Tensor:
        slots[local.rank] = tensor
        meet.wait()
        whole = torch.cat([slots[r] for r in range(world)])
        meet.wait()
        return whole

    monkeypatch.setattr(labels_module, "all_gather_rows", gather)
    monkeypatch.setattr(labels_module, "is_main", lambda: local.rank == 0)
    results: list[Any] = [None] * world

    def run(rank: int) -> None:
        local.rank = rank
        results[rank] = work(rank)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("restart", [False, True])
def test_order_of_corrections_survives_ranks_and_a_restart(restart, monkeypatch):
    """Of two codes for one entry the later call wins, also when ranks and a checkpoint lie between them."""
    known = SparseLabels.from_positives([[0], [1], [2]], 4, UNKNOWN)
    first = {0: [(0, 1, 0), (1, 0, 1)], 1: [(0, 1, 1), (2, 3, 1)]}
    second = {0: [(2, 3, 0), (0, 2, 1)], 1: [(1, 0, 0), (0, 2, 0)]}

    def work(rank: int) -> tuple[int, list[list[int]]]:
        store = LabelStore(known)

        def record(calls: list[tuple[int, int, int]]) -> None:
            for row, column, code in calls:
                store.correct(torch.tensor([row]), torch.tensor([column]), code)

        record(first[rank])
        if restart:
            state = store.state_dict()
            store = LabelStore(known)
            store.load_state_dict(state)
        record(second[rank])
        return store.commit(), store.rows(torch.arange(3)).tolist()

    results = on_ranks(2, work, monkeypatch)
    # Entry (0, 1): both ranks in their first call, the higher rank wins. (2, 3) and (1, 0): the later call, whoever
    # made it. (0, 2): both in the last call.
    assert results[0] == results[1] == (4, [[1, 1, 0, -1], [0, 1, -1, -1], [-1, -1, 1, 0]])


def test_labels_are_shared_with_the_file_on_a_cpu(tmp_path):
    known = some_labels(50, 20, 3)
    known.save(tmp_path)
    mapped = SparseLabels.load(tmp_path)
    store = LabelStore(mapped)
    assert store._codes.data_ptr() == mapped.codes.ctypes.data
    store.correct(torch.arange(50), torch.zeros(50, dtype=torch.int64), 1)
    store.commit()
    assert (store.rows(torch.arange(50))[:, 0] == 1).all()
    assert np.array_equal(np.load(tmp_path / "codes.npy"), known.codes), "files never change"
    frozen = known.codes.copy()
    frozen.flags.writeable = False
    again = LabelStore(SparseLabels(known.indptr, known.classes, frozen, 20, UNKNOWN))
    assert again._codes.data_ptr() != frozen.ctypes.data, "tensors may be written to, so what may not is copied"
    assert torch.equal(again.rows(torch.arange(50), corrected=False), store.rows(torch.arange(50), corrected=False))
