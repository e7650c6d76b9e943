"""Who sees which sample when."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spml_fast.core.errors import UserError
from spml_fast.data.repeat_factor import RepeatFactorSampler
from spml_fast.data.sampler import EvalSampler, TrainSampler, Windows

# Samples of a window and of a block; None is the global shuffle.
WINDOWS = st.none() | st.tuples(st.integers(1, 80), st.integers(1, 30)).map(lambda w: Windows(w[0] + w[1], w[1]))


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 200),
    batch=st.integers(1, 64),
    steps=st.integers(1, 4),
    world=st.integers(1, 4),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 5),
    windows=WINDOWS,
)
def test_ranks_slice_the_same_global_batch(size, batch, steps, world, seed, epoch, windows):
    if min(size, batch) < steps * world:
        with pytest.raises(UserError, match=f"of {batch if batch < steps * world else size} samples"):
            TrainSampler(size, batch, steps, world, 0, seed, windows)
        return
    ranks = [TrainSampler(size, batch, steps, world, r, seed, windows) for r in range(world)]
    whole = TrainSampler(size, batch, 1, 1, 0, seed, windows).permutation(epoch)
    assert sorted(whole) == list(range(size))
    seen = []
    updates = list(zip(*(r.epoch(epoch) for r in ranks), strict=True))
    assert len(updates) == ranks[0].updates_per_epoch
    for number, by_rank in enumerate(updates):
        rows = []
        for step in range(steps):
            micro = [by_rank[r][step] for r in range(world)]
            total = sum(len(m.index) for m in micro)
            position = 0
            for r, m in enumerate(micro):
                assert len(m.index) >= 1 and m.global_size == total and m.offset == position
                assert len(m.index) <= ranks[r].largest_micro_batch
                position += len(m.index)
            assert max(len(m.index) for m in micro) - min(len(m.index) for m in micro) <= 1
            rows.append(np.concatenate([m.index for m in micro]))
        expected = whole[number * batch : (number + 1) * batch]
        assert [len(r) for r in rows] == [len(part) for part in np.array_split(expected, steps)]
        np.testing.assert_array_equal(np.concatenate(rows), expected)
        assert {m.update_size for parts in by_rank for m in parts} == {len(expected)}
        seen.extend(expected)
    assert len(seen) == len(set(seen)) == ranks[0].samples_per_epoch
    # Only a last batch that cannot be shared is left out.
    assert size - len(seen) < steps * world
    assert max(len(m.index) for u in updates for m in u[0]) == ranks[0].largest_micro_batch


def test_epochs_and_seeds_differ_and_repeat():
    a = TrainSampler(500, 10, seed=3)
    np.testing.assert_array_equal(a.permutation(4), TrainSampler(500, 20, 2, 5, 1, seed=3).permutation(4))
    assert (a.permutation(4) != a.permutation(5)).any()
    assert (a.permutation(4) != TrainSampler(500, 10, seed=4).permutation(4)).any()


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(40, 400),
    batch=st.integers(1, 40),
    world=st.integers(1, 4),
    windows=WINDOWS.filter(bool),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 5),
)
def test_ranks_read_runs_of_blocks(size, batch, world, windows, seed, epoch):
    world = min(world, batch)
    ranks = [TrainSampler(size, batch, 1, world, r, seed, windows) for r in range(world)]
    sampler = ranks[0].permutation(epoch)
    assert sampler.dtype == np.int64 and sorted(sampler) == list(range(size))
    width = ranks[0].updates_per_window * batch
    assert width <= max(windows.samples, batch)
    # The blocks as they follow each other, which is what the windows and their lanes are cut from.
    whole = TrainSampler(size, size, seed=seed, windows=Windows(size, min(size, windows.block))).permutation(epoch)
    for update, by_rank in enumerate(zip(*(r.epoch(epoch) for r in ranks), strict=True)):
        first = ranks[0].window(1, update) * width
        window = whole[first : first + width]
        lanes = np.array_split(window, min(batch, len(window)))
        rows = np.concatenate([micro[0].index for micro in by_rank])
        assert all(row in lane for row, lane in zip(rows, lanes, strict=False))
    assert TrainSampler(size, 1, seed=seed).window(1, 3) is None


def test_a_rank_reads_its_own_blocks():
    windows = Windows(800, 20)
    ranks = [TrainSampler(4000, 40, 2, 4, r, 1, windows) for r in range(4)]
    assert ranks[0].updates_per_window == 20 and ranks[0].window(1, 19) == 0 and ranks[0].window(1, 20) == 1
    epochs = [list(r.epoch(0)) for r in ranks]
    for window in range(5):
        seen = [
            {int(i) for update in epoch[20 * window : 20 * window + 20] for micro in update for i in micro.index // 20}
            for epoch in epochs
        ]
        assert [len(blocks) for blocks in seen] == [10] * 4 and len(set.union(*seen)) == 40


def test_windows_mix_blocks_and_repeat():
    ours = TrainSampler(1000, 10, seed=3, windows=Windows(200, 20))
    first, second = ours.permutation(0), ours.permutation(1)
    assert (first != second).any()
    np.testing.assert_array_equal(TrainSampler(1000, 10, 2, 5, 1, 3, Windows(200, 20)).permutation(0), first)
    # A window has other blocks in another epoch, and its samples are in no order.
    assert set(first[:200] // 20) != set(second[:200] // 20)
    assert abs((np.diff(first[:200].reshape(20, 10), axis=0) > 0).mean() - 0.5) < 0.15
    # A batch has no two samples of a block that is no longer than a lane.
    assert all(len(set(batch // 20)) == 10 for batch in first.reshape(100, 10))
    for samples, block in ((5, 6), (5, 0)):
        with pytest.raises(UserError, match=f"shuffle_block is {block} and data.shuffle_window {samples}"):
            Windows(samples, block)


@pytest.mark.parametrize("windows", [None, Windows(103, 5), Windows(30, 4)])
def test_start_update_gives_the_rest(windows):
    ours = TrainSampler(103, 10, 2, 2, 1, 1, windows)
    whole = [[m.index.tolist() for m in update] for update in ours.epoch(2)]
    assert [[m.index.tolist() for m in update] for update in ours.epoch(2, 4)] == whole[4:]
    assert list(ours.epoch(2, len(whole))) == []


@settings(max_examples=80, deadline=None)
@given(
    size=st.integers(1, 200),
    first=st.tuples(st.integers(1, 40), st.integers(1, 2), st.integers(1, 2)),
    second=st.tuples(st.integers(1, 40), st.integers(1, 2), st.integers(1, 3)),
    done=st.floats(0, 1),
    windows=WINDOWS,
)
def test_another_batch_size_goes_on_with_the_same_samples(size, first, second, done, windows):
    """None twice and none left out but for an end that is too small for the ranks, even if it changes twice."""
    if min(size, first[0]) < first[1] * first[2] or min(size, second[0]) < second[1] * second[2]:
        return
    before = TrainSampler(size, *first, 0, 3, windows)
    update = round(done * before.updates_per_epoch)
    samples = before.samples_before(1, update)
    ranks = [TrainSampler(size, *second, r, 3, windows) for r in range(second[2])]
    starts = {r.resume(1, samples, before.cut(1).order_batch_size) for r in ranks}
    (start,) = starts
    assert 0 <= start <= ranks[0].updates_per_epoch
    order = before.permutation(1)
    batches = list(zip(*(r.epoch(1, start) for r in ranks), strict=True))
    seen = [i for by_rank in batches for step in range(second[1]) for micro in by_rank for i in micro[step].index]
    np.testing.assert_array_equal(seen, order[samples : samples + len(seen)])
    assert size - samples - len(seen) < second[1] * second[2]
    # What is saved in its middle leads back to the same place and order.
    if batches:
        middle = ranks[0].samples_before(1, start + 1)
        assert middle == samples + batches[0][0][0].update_size
        again = TrainSampler(size, *first, 0, 3, windows)
        rest = again.resume(1, middle, ranks[0].cut(1).order_batch_size)
        got = [i for u in again.epoch(1, rest) for m in u for i in m.index] if first[2] == 1 else []
        np.testing.assert_array_equal(got, order[middle : middle + len(got)])
    # The next epoch is one like any other.
    assert ranks[0].cut(2) == TrainSampler(size, *second, 0, 3, windows).cut(2)


@pytest.mark.parametrize("windows", [None, Windows(103, 5), Windows(30, 4)])
@pytest.mark.parametrize("update", [0, 4, 10, 11])
def test_the_same_batch_size_resumes_at_the_same_update(windows, update):
    ours = TrainSampler(103, 10, 1, 1, 0, 1, windows)
    whole = [m.index.tolist() for (m,) in ours.epoch(2)]
    assert len(whole) == 11
    resumed = TrainSampler(103, 10, 1, 1, 0, 1, windows)
    assert resumed.resume(2, ours.samples_before(2, update), 10) == update
    assert [m.index.tolist() for (m,) in resumed.epoch(2, update)] == whole[update:]


def test_repeated_images_go_on_too():
    factors = np.linspace(1, 3, 50)
    for windows in (None, Windows(20, 4)):
        before, after = (RepeatFactorSampler(factors, 50, size, windows=windows) for size in (7, 11))
        start = after.resume(1, before.samples_before(1, 3), 7)
        rest = np.concatenate([m.index for (m,) in after.epoch(1, start)])
        np.testing.assert_array_equal(rest, before.permutation(1)[21:])


def test_too_small_names_the_sizes():
    with pytest.raises(UserError, match=r"split of 5 samples .* 3 ranks with 2 .* needs 6"):
        TrainSampler(5, 64, 2, 3)
    with pytest.raises(UserError, match=r"batch of 5 samples .* 3 ranks with 2 .* needs 6"):
        TrainSampler(500, 5, 2, 3)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 150), batch=st.integers(1, 40), world=st.integers(1, 5))
def test_evaluation_counts_every_sample_once(size, batch, world):
    ranks = [list(EvalSampler(size, batch, world, r)) for r in range(world)]
    single = {tuple(b.index[: b.real]): tuple(b.index) for b in EvalSampler(size, batch)}
    assert {len(r) for r in ranks} == {len(EvalSampler(size, batch, world))}
    counted = []
    for step in zip(*ranks, strict=True):
        assert {b.global_size for b in step} == {sum(b.real for b in step)}
        assert step[0].real > 0
        for b in step:
            assert b.index.shape == (batch,) and b.index.dtype == np.int64
            real = b.index[: b.real].tolist()
            counted += real
            assert (b.index[b.real :] == (real[-1] if real else 0)).all()
            if real:
                # The same batch, padding included, as a single rank makes: equal logits to the bit.
                assert single[tuple(real)] == tuple(b.index)
    assert counted == list(range(size)) if world == 1 else sorted(counted) == list(range(size))


def test_empty_evaluation_is_a_user_error():
    with pytest.raises(UserError, match="no samples"):
        EvalSampler(0, 4)


@pytest.mark.parametrize("samples", [0, 9])
def test_stand_ins_of_an_update_are_distinct_and_not_in_it(samples):
    """For an image that cannot be used; the epoch may have been resumed after some samples with another batch size."""
    sampler = TrainSampler(23, 4, accumulation=2, seed=3)
    start = sampler.resume(1, samples, 3) if samples else 0
    order = sampler.permutation(1).tolist()
    for update, micro in enumerate(sampler.epoch(1, start), start):
        shown = [sample for part in micro for sample in part.index.tolist()]
        for attempt in (1, 2):
            rows = [
                sampler.stand_in_row(1, update, step, place, attempt)
                for step, part in enumerate(micro)
                for place in range(part.global_size)
            ]
            assert len({*rows}) == len(shown) and not {order[row] for row in rows} & {*shown}
    assert sampler.stand_in_row(1, start, 0, 0, 1) == (samples + 4) % 23


@pytest.mark.parametrize("windows", [None, Windows(16, 2)])
def test_the_last_batch_can_be_dropped(windows):
    """Whole batches alone, also after a resume with another batch size; other images are left out in every epoch."""
    samplers = [TrainSampler(38, 8, 1, 2, rank, 3, windows, drop_last=True) for rank in range(2)]
    assert samplers[0].updates_per_epoch == 4 and samplers[0].samples_per_epoch == 32
    left_out = []
    for epoch in (1, 2):
        updates = [[micro[0] for micro in sampler.epoch(epoch)] for sampler in samplers]
        assert all(len(m.index) == 4 and m.update_size == 8 for rank in updates for m in rank)
        seen = np.concatenate([m.index for rank in updates for m in rank])
        assert len(seen) == len(set(seen.tolist())) == 32
        left_out.append(set(range(38)) - set(seen.tolist()))
    assert left_out[0] != left_out[1]
    again = TrainSampler(38, 5, 1, 1, 0, 3, windows, drop_last=True)
    start = again.resume(1, 16, 8)
    rest = [micro[0].index for micro in again.epoch(1, start)]
    assert [len(index) for index in rest] == [5] * 4
    before = {i for sampler in samplers for micro in list(sampler.epoch(1))[:2] for i in micro[0].index.tolist()}
    assert not before & set(np.concatenate(rest).tolist())
    with pytest.raises(UserError, match=r"train\.drop_last leaves nothing of a training split of 5 samples"):
        TrainSampler(5, 8, drop_last=True)
