"""ROLE: its table against dense Adam, at the start, between phases and on other numbers of ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from spml_fast.core.errors import UserError
from spml_fast.data.labels import LabelStore, SparseLabels
from spml_fast.methods import Progress, get_method, role
from spml_fast.methods.role import AdamTable, initial_table
from tests.support.formulas import (
    CODES,
    N,
    P,
    U,
    batch_of,
    make,
    role_schedule,
    run,
    some_codes,
    some_logits,
)
from tests.support.methods import on_ranks


def role_by_the_letter(table: Tensor, logits: Tensor, codes: Tensor, k: float) -> Tensor:
    """The loss with everything attached as published, for a table under autograd."""
    f, g = torch.sigmoid(logits), torch.sigmoid(table)

    def guarded(x: Tensor) -> Tensor:
        return -torch.log(x + 1e-5)

    def epr(x: Tensor) -> Tensor:
        return (guarded(x) * (codes == 1)).mean() + (x.sum(1).mean() - k) ** 2 / x.shape[1] ** 2

    def cross(x: Tensor, target: Tensor) -> Tensor:
        return (target * guarded(x) + (1 - target) * guarded(1 - x)).mean()

    return (epr(f) + cross(f, g.detach())) / 2 + (epr(g) + cross(g, f.detach())) / 2


class DenseRole:
    """ROLE as released: the whole table a parameter under torch's dense Adam, all rows moved in every step."""

    def __init__(self, table: Tensor, codes: np.ndarray, k: float) -> None:
        self.table = table.double().clone().requires_grad_()
        self.codes, self.k = torch.from_numpy(codes), k
        self.adam = torch.optim.Adam([self.table])

    def step(self, index: np.ndarray, logits: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        z = logits.clone().requires_grad_()
        loss = role_by_the_letter(self.table[index], z, self.codes[index], self.k)
        self.adam.zero_grad()
        loss.backward()
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        return loss.detach(), z.grad


def test_role_follows_dense_adam() -> None:
    """Loss, gradient and all label estimates equal the released way's, though only met rows are touched."""
    codes = some_codes(40, 6)
    method = make("role", codes, expected_positives=2.0)
    dense = DenseRole(method.table.value[:-1], codes, 2.0)
    start = method.estimates(torch.arange(40)).double()
    for index, logits, progress in role_schedule(40, 6, 12, 6):
        if progress.update % progress.updates_per_epoch == 0:
            method.on_epoch_start(progress)
        loss, gradient = run(method, logits, batch_of(codes, index), progress)
        want_loss, want_gradient = dense.step(index, logits, 10 * progress.lr)
        assert loss.item() == pytest.approx(want_loss.item(), rel=2e-5)
        torch.testing.assert_close(gradient, want_gradient, rtol=1e-3, atol=2e-6)
    estimates = method.estimates(torch.arange(40)).double()
    want = torch.sigmoid(dense.table.detach())
    assert (want - start).abs().max() > 0.2, "the test moves too little to tell"
    torch.testing.assert_close(estimates, want, rtol=0, atol=1e-4)


def test_role_table_at_the_start() -> None:
    codes = some_codes(300, 6)
    method = make("role", codes)
    p = method.estimates(torch.arange(300)).numpy()
    np.testing.assert_allclose(p[codes == P], 0.995, rtol=1e-5)
    np.testing.assert_allclose(p[codes == N], 0.005, rtol=1e-4)
    free = p[codes == U]
    assert free.min() >= 0.4 and free.max() <= 0.6 and free.std() > 0.05 and abs(free.mean() - 0.5) < 0.01
    # Equal on all ranks whatever was drawn before: it follows the seed alone.
    torch.manual_seed(3)
    one = get_method("role")(method.options, method.store)
    torch.manual_seed(3)
    torch.rand(11)
    two = get_method("role")(method.options, method.store)
    assert torch.equal(one.table.value, two.table.value)
    assert not torch.equal(one.table.value, method.table.value)


def test_rows_are_worked_off_in_parts_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the part, a table starts with the same numbers, and restarts with the same ones."""
    codes, tables = some_codes(50, 6), []
    for rows in (2**16, 7, 1):
        monkeypatch.setattr(role, "_CHUNK", rows)
        table = make("role", codes).table
        start = table.value.clone()
        table.reserve(1)
        table.write(torch.arange(50), table.read(torch.arange(50), 0), some_logits(50, 6).float(), 1, lr=0.5)
        table.restart(3.0)
        tables.append((start, table.value))
    assert not torch.equal(*tables[0])
    for start, restarted in tables[1:]:
        assert torch.equal(start, tables[0][0]) and torch.equal(restarted, tables[0][1])


def test_without_a_learning_rate_the_table_stays() -> None:
    method = make("role", CODES)
    before = method.table.value.clone()
    run(method, some_logits(*CODES.shape), batch_of(CODES), Progress(1, 2, 0, 4))
    assert method.table.first.abs().max() > 0 and torch.equal(method.table.value, before)


def test_role_new_phase_keeps_estimates_and_forgets_momentum() -> None:
    codes = some_codes(12, 4)
    method = make("role", codes, table_lr_multiplier=3000.0)
    for index, logits, progress in role_schedule(12, 4, 3, 4):
        if progress.update % progress.updates_per_epoch == 0:
            method.on_epoch_start(replace(progress, phase="linear"))
        run(method, logits, batch_of(codes, index), progress)
    before = method.estimates(torch.arange(12))
    assert before.max() > 1 - 1e-5 or before.min() < 1e-5, "the clamp has nothing to do"
    method.on_epoch_start(Progress(1, 5, 0, 3))
    after = method.estimates(torch.arange(12))
    torch.testing.assert_close(after, before.clamp(1e-5, 1 - 1e-5), rtol=1e-3, atol=1e-7)
    assert method.table.first.abs().sum() == 0 and method.table.second.sum() == 0 and method.table.done == 0
    assert len(method.table.rates) >= 16


def test_role_evaluation_leaves_the_table_alone() -> None:
    method = make("role", CODES).eval()
    before = {k: v.clone() for k, v in method.state_dict().items() if isinstance(v, Tensor)}
    run(method, some_logits(*CODES.shape), batch_of(CODES))
    assert all(torch.equal(before[k], v) for k, v in method.state_dict().items() if isinstance(v, Tensor))


@pytest.mark.parametrize("worlds", [(1, 3), (3, 2)])
def test_role_goes_on_with_another_number_of_ranks(worlds: tuple[int, int]) -> None:
    codes = some_codes(11, 4)

    def begin(rank: int) -> tuple[dict[str, Tensor], Tensor]:
        method = make("role", codes)
        method.table.value += torch.arange(len(method.table.value))[:, None] * 0.01
        return method.rank_state(), method.estimates(torch.arange(11))

    saved = on_ranks(worlds[0], begin)

    def resume(rank: int) -> Tensor:
        method = make("role", codes)
        method.load_rank_state([shard for shard, _ in saved])
        return method.estimates(torch.arange(11))

    for estimates in on_ranks(worlds[1], resume):
        assert torch.equal(estimates, saved[0][1])


def test_statistics_of_an_update_of_one_micro_step_change_nothing() -> None:
    """Neither loss nor gradient nor what the table learns: the penalty's slope passes through the update's mean."""
    logits = some_logits(*CODES.shape)
    alone, ahead = (make("role", CODES, expected_positives=1.5, penalty=50.0) for _ in range(2))
    for step in range(3):
        place = Progress(1, 4, step, 4, lr=0.05)
        batch, other = batch_of(CODES), batch_of(CODES)
        (other.update_statistics,) = ahead.update_statistics([logits], [other], place)
        loss, gradient = run(alone, logits, batch, place)
        loss_ahead, gradient_ahead = run(ahead, logits, other, place)
        torch.testing.assert_close(loss_ahead, loss, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(gradient_ahead, gradient, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(ahead.table.value, alone.table.value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("first", "second", "ratio"), [(0.4, 0.09, 0.4 / 0.3), (1e-8, 1e-16, 0.5)])
def test_missed_steps_are_made_up_for_over_the_whole_window(
    first: float, second: float, ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many steps as the window is wide, by hand; Adam's 1e-8 keeps tiny moments from moving much."""
    monkeypatch.setattr(AdamTable, "window", 3)
    table = AdamTable(torch.zeros(2, 1))
    assert table.get_extra_state()["done"] == 0
    table.reserve(4)
    table.first.fill_(first), table.second.fill_(second)
    table.rates[1:4] = torch.tensor([0.1, 0.2, 0.4])
    decay = 0.9 / 0.999**0.5
    moved = ratio * (0.1 * decay + 0.2 * decay**2 + 0.4 * decay**3)
    rows = table.read(torch.tensor([0, 1]), 3)
    torch.testing.assert_close(rows.value, torch.full((2, 1), -moved), rtol=1e-5, atol=0)
    torch.testing.assert_close(rows.first, torch.full((2, 1), first * 0.9**3), rtol=1e-5, atol=0)


def test_a_gradient_as_small_as_adams_constant_moves_half_as_far() -> None:
    table = AdamTable(torch.zeros(2, 1))
    table.reserve(1)
    index = torch.tensor([1])
    table.write(index, table.read(index, 0), torch.tensor([[1e-8]]), 1, lr=0.2)
    torch.testing.assert_close(table.value, torch.tensor([[0.0], [-0.1]]), rtol=1e-4, atol=0)


def test_role_table_learns_from_its_half_of_the_loss() -> None:
    """Adam hides a factor of the gradient, its first moment does not."""
    logits = some_logits(*CODES.shape)
    method = make("role", CODES, expected_positives=2.0)
    table = method.table.value[:-1].double().requires_grad_()
    role_by_the_letter(table, logits, torch.from_numpy(CODES), 2.0).backward()
    run(method, logits, batch_of(CODES), Progress(1, 2, 0, 4, lr=0.1))
    torch.testing.assert_close(method.table.first[:-1].double(), 0.1 * table.grad, rtol=1e-3, atol=1e-7)


def test_role_corrections_do_not_enter_the_table() -> None:
    """Only what was annotated is known: nothing on the way to another start of the same run may change it."""
    labels = SparseLabels.from_dense(np.array([[P, U], [U, N]], np.int8))
    store = LabelStore(labels)
    store.correct(torch.tensor([0]), torch.tensor([1]), P)
    assert store.commit() == 1
    assert torch.equal(initial_table(store), initial_table(LabelStore(labels)))


def test_role_logarithms_are_guarded_as_released_only() -> None:
    assert make("role", CODES, log_form="logits").guard == 0
    assert make("role", CODES).guard == 1e-5


def test_role_table_needs_three_floats_an_entry_and_a_number_a_row() -> None:
    labels = SparseLabels.from_dense(np.full((4, 5), U, np.int8))
    cls = get_method("role")
    need = 4 * (3 * 4 * 5 + 4)
    for size, fits in ((need, True), (need - 1, False)):
        options = cls.Options(name="role", expected_positives=2.0, memory_limit=size / 2**30)
        if fits:
            cls.check_labels(labels, options)
        else:
            with pytest.raises(UserError, match="role's table of 4 samples x 5 classes needs"):
                cls.check_labels(labels, options)


def test_role_statistics_of_an_update_are_those_of_all_ranks() -> None:
    logits, place = some_logits(*CODES.shape), Progress(1, 4, 0, 4, lr=0.05)
    (expected,) = make("role", CODES).update_statistics([logits], [batch_of(CODES)], place)

    def work(rank: int) -> list[float]:
        part = range(3) if rank == 0 else range(3, 5)
        batch = batch_of(CODES, index=part, size=5)
        (found,) = make("role", CODES).update_statistics([logits[list(part)]], [batch], place)
        return [float(value) for value in found]

    for found in on_ranks(2, work):
        assert found == pytest.approx([float(value) for value in expected], rel=1e-6)
