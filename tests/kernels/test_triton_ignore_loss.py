"""IGNORE's two passes and their gradients against fp64, the golden values of the spec, and what the ops promise."""

from __future__ import annotations

import pytest
import torch
from spml_kernels import ignore_loss, ignore_statistics
from spml_kernels.common.heuristics import columns_launch
from spml_kernels.ignore_loss.op import ignore_loss_backward_op
from spml_kernels.ignore_loss.reference import ignore_loss_reference, ignore_statistics_reference

from tests.support.kernels import TOLERANCE, assert_close, assert_op_sound, draw_codes, draw_logits

pytestmark = pytest.mark.usefixtures("triton_on")

# Gradients of the three sums, as denominators would make them: all different, none of them 1.
UPSTREAM = (0.3, 0.07, -0.011)


def draw(shape, dtype, device, seed=0):
    """Weak, strong and masked logits, codes, both thresholds."""
    views = [draw_logits(shape, dtype, device, seed + i) for i in range(3)]
    # Most gaps small, as those of a trained network; all exact in the type.
    views[2] = torch.where(torch.arange(views[0].numel(), device=device).view(shape) % 3 > 0, views[0], views[2])
    average = torch.randn(shape[1], generator=torch.Generator().manual_seed(seed)).to(device)
    return *views, draw_codes(shape, device), torch.tensor(0.75, device=device), average


def double(tensor):
    return None if tensor is None else tensor.detach().cpu().double()


def total(terms, upstream):
    return sum(t * u for t, u in zip(terms, upstream, strict=True))


def check(inputs, form="logits", eps=1e-5, strong_target=True, upstream=UPSTREAM):
    weak, strong, masked, codes, gap, average = inputs
    leaves = [None if t is None else t.detach().requires_grad_() for t in (weak, strong)]
    exact = [None if t is None else double(t).requires_grad_() for t in (weak, strong)]
    truth = draw_codes(weak.shape, weak.device.type, seed=9, unknown=0.2)
    terms = ignore_loss(leaves[0], leaves[1], masked, codes, gap, average, form, eps, strong_target, truth)
    tensors = [double(t) for t in (masked, gap, average)]
    *sums, rejected = ignore_loss_reference(*exact, tensors[0], codes.cpu(), *tensors[1:], form, eps, strong_target)
    assert terms.rejected.dtype == torch.bool and torch.equal(terms.rejected.cpu(), rejected)
    hidden = (codes.cpu() == -1) & (truth.cpu() == 1)
    assert terms.counts.dtype == torch.int64
    assert terms.counts.tolist() == [rejected.sum(), (rejected & hidden).sum(), hidden.sum()]
    for name, found, wanted in zip(("spbc", "ign", "reg"), terms[:3], sums, strict=True):
        assert found.dtype == torch.float32 and found.shape == ()
        assert_close(name, found, wanted, 5e-6)
    wanted = [t for t in leaves if t is not None]
    grads = torch.autograd.grad(total(terms[:3], upstream), wanted)
    slopes = torch.autograd.grad(total(sums, upstream), [t for t in exact if t is not None])
    for name, leaf, grad, slope in zip(("weak", "strong"), wanted, grads, slopes, strict=False):
        assert grad.dtype == leaf.dtype and grad.shape == leaf.shape
        assert_close(f"gradient of {name}", grad, slope, TOLERANCE[leaf.dtype])
    return terms, grads


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("form", ["logits", "epsilon"])
@pytest.mark.parametrize("strong_target", [True, False])
def test_equals_the_reference(strong_target, form, dtype, device):
    # Row 0 is all unknown and row 1 has no positive; logits of size 100 and exact zeros are among them.
    terms, _ = check(draw((37, 81), dtype, device), form, strong_target=strong_target)
    assert 0 < terms.counts[1] < terms.counts[0] < 37 * 81


@pytest.mark.parametrize("missing", ["strong", "masked", "average", "strong masked average"])
@pytest.mark.parametrize("form", ["logits", "epsilon"])
def test_inputs_that_may_be_missing(form, missing, device):
    inputs = list(draw((13, 40), torch.float32, device))
    for place, name in ((1, "strong"), (2, "masked"), (5, "average")):
        if name in missing:
            inputs[place] = None
    terms, _ = check(inputs, form)
    assert ("masked" in missing) != bool(terms.rejected.any())
    if "strong" in missing:
        assert terms.reg == 0


@pytest.mark.parametrize("shape", [(1, 1), (1, 20), (3, 1), (3, 1500), (130, 33)])
def test_shapes(shape, device):
    inputs = draw(shape, torch.float32, device)
    check(inputs)
    check_statistics(inputs[0], inputs[2], inputs[3])


def check_statistics(weak, masked, codes):
    found = ignore_statistics(weak.requires_grad_(), masked, codes)
    assert found.dtype == torch.float32 and not found.requires_grad
    wanted = ignore_statistics_reference(double(weak), double(masked), codes.cpu())
    assert_close("gap", found[0], wanted[0], 5e-6)
    assert torch.equal(found[1:3].cpu().double(), wanted[1:3])
    # Logits of size 100 of both signs cancel in a class.
    assert_close("class sums", found[3:], wanted[3:], 2e-5)
    return found


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("full", [1, 4, 1000])
def test_statistics(full, dtype, device, monkeypatch):
    # Nine tiles of rows in one program, in two parts, or in nine.
    monkeypatch.setattr("spml_kernels.common.heuristics.FULL_GPU", full)
    assert columns_launch(70, 200).turns == {1: 9, 4: 5, 1000: 1}[full]
    weak, _, masked, codes, *_ = draw((70, 200), dtype, device)
    check_statistics(weak, masked, codes)


def golden(device, **options):
    tensors = [
        torch.tensor(values, device=device)
        for values in (
            [[2, 0.5, -1], [-0.5, 1.5, 0.2]],
            [[1.5, 1, -2], [0.3, 1, -0.4]],
            [[1.8, -1, -1.2], [0.1, 1.2, 0.9]],
        )
    ]
    codes = torch.tensor([[1, -1, -1], [-1, 1, -1]], dtype=torch.int8, device=device)
    leaves = [t.requires_grad_() for t in tensors[:2]]
    gap, average = torch.tensor(0.29995, device=device), torch.tensor([0.10065, -0.1988, 0.04955], device=device)
    return leaves, codes, tensors[2], ignore_loss(*leaves, tensors[2], codes, gap, average, "epsilon", **options)


def test_golden_values(device):
    leaves, codes, masked, terms = golden(device)
    found = ignore_statistics(leaves[0], masked, codes)
    torch.testing.assert_close(found.cpu(), torch.tensor([0.5, 2, 2, 1.5, 2.0, -0.8]), atol=1e-6, rtol=0)
    assert terms.rejected.tolist() == [[False, True, False], [False, False, True]]
    assert terms.counts.tolist() == [2, 0, 0]
    values = [float(terms.spbc) / 2, float(terms.ign) / 4, float(terms.reg) / 6]
    assert values == pytest.approx([0.16415885225527, 0.37397436487111, 0.45833333333333], abs=2e-7)
    loss = 0.5 * terms.spbc / 2 + terms.ign / (6 - terms.counts[0]) + 0.5 * terms.reg / 6
    assert float(loss) == pytest.approx(0.68522045766541, abs=2e-7)
    loss.backward()
    weak = [[0.0535329412, -0.0833333333, 0.1666666667], [-0.1333333333, 0.0377275102, 0.1]]
    strong = [[-0.1289391565, 0.0833333333, -0.1368662745], [0.2769405880, -0.1505677690, -0.1]]
    for leaf, gradient in zip(leaves, (weak, strong), strict=True):
        torch.testing.assert_close(leaf.grad.cpu(), torch.tensor(gradient), atol=1e-7, rtol=0)


def test_equal_to_a_threshold_is_kept(device):
    z = torch.tensor([[2.0, 2.0, 2.0, 2.0]], device=device)
    masked = z - torch.tensor([[1.0, 1.5, 1.5, -1.5]], device=device)
    codes = torch.full((1, 4), -1, dtype=torch.int8, device=device)
    average = torch.tensor([0.0, 2.0, 1.0, 1.0], device=device)
    terms = ignore_loss(z, z, masked, codes, torch.tensor(1.0, device=device), average)
    assert terms.rejected.tolist() == [[False, False, True, True]]
    for code in (0, 1):
        assert not ignore_loss(z, z, masked, torch.full_like(codes, code), terms.reg, average).rejected.any()


@pytest.mark.parametrize("form", ["logits", "epsilon"])
def test_infinite_loss_at_a_rejected_entry_is_dropped(form, device):
    z = torch.tensor([[torch.inf, 1.0]], device=device)
    strong = torch.tensor([[torch.inf, 1.0]], device=device, requires_grad=True)
    codes = torch.full((1, 2), -1, dtype=torch.int8, device=device)
    masked = torch.tensor([[0.0, 1.0]], device=device)
    terms = ignore_loss(z, strong, masked, codes, torch.tensor(0.5, device=device), None, form)
    assert terms.rejected.tolist() == [[True, False]] and torch.isfinite(terms.ign)


def test_eps_zero_is_the_exact_form(device):
    inputs = draw((13, 40), torch.float32, device)
    one, two = (ignore_loss(*inputs, form, 0.0) for form in ("epsilon", "logits"))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_no_positive_and_all_unknown(device):
    inputs = list(draw((9, 20), torch.float32, device))
    for code in (-1, 0, 1):
        inputs[3] = torch.full_like(inputs[3], code)
        terms, _ = check(inputs)
        assert (terms.spbc == 0) == (code < 1) and bool(terms.rejected.any()) == (code == -1)
        check_statistics(inputs[0], inputs[2], inputs[3])


def test_empty(device):
    for shape in ((0, 7), (4, 0)):
        weak, strong = (torch.zeros(shape, device=device, requires_grad=True) for _ in range(2))
        codes = torch.zeros(shape, dtype=torch.int8, device=device)
        found = ignore_statistics(weak, strong, codes)
        assert found.tolist() == [0, 0, shape[0], *[0] * shape[1]]
        terms = ignore_loss(weak, strong, weak, codes, torch.tensor(0.0, device=device), found[3:])
        grads = torch.autograd.grad(total(terms[:3], UPSTREAM), [weak, strong])
        assert terms.ign == 0 and terms.rejected.shape == shape and [g.shape for g in grads] == [shape, shape]


def test_layouts(device):
    weak, strong, masked, _, gap, _ = draw((40, 13), torch.float32, device)
    codes, average = draw_codes((40, 13), device).T, torch.randn(80, device=device)[::2]
    inputs = [weak.T, strong.T, masked.T, codes, gap, average]
    terms, grads = check(inputs)
    plain = [t.contiguous() for t in inputs]
    again, slopes = check(plain)
    for a, b in zip((*terms, *grads), (*again, *slopes), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(ignore_statistics(weak.T, masked.T, codes), ignore_statistics(plain[0], plain[2], plain[3]))


def test_two_runs_are_bit_equal(device):
    inputs = draw((23, 81), torch.float16, device)
    one, two = (check(inputs) for _ in range(2))
    for a, b in zip((*one[0], *one[1]), (*two[0], *two[1]), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(*(ignore_statistics(inputs[0], inputs[2], inputs[3]) for _ in range(2)))


def test_upstream_that_is_zero_or_missing(device):
    inputs = draw((9, 20), torch.float32, device)
    check(inputs, upstream=(0.0, 2.0, 0.0))
    leaves = [t.detach().requires_grad_() for t in inputs[:2]]
    terms = ignore_loss(*leaves, *inputs[2:])
    d_weak, d_strong = torch.autograd.grad(terms.spbc * 3, leaves)
    assert torch.equal(d_weak != 0, inputs[3] == 1) and not d_strong.any()


def test_only_wanted_gradients_are_made(device):
    weak, strong, masked, codes, gap, average = draw((9, 20), torch.float32, device)
    rejected = ignore_loss(weak, strong, masked, codes, gap, average).rejected
    upstream = torch.tensor(UPSTREAM, device=device)
    both = ignore_loss_backward_op(upstream, weak, strong, codes, rejected, 0.0, True, True, True)
    for wanted in ((True, False), (False, True), (False, False)):
        found = ignore_loss_backward_op(upstream, weak, strong, codes, rejected, 0.0, True, *wanted)
        for grad, whole, want in zip(found, both, wanted, strict=True):
            assert torch.equal(grad, whole) if want else grad.numel() == 0
    terms = ignore_loss(weak, strong.requires_grad_(), masked, codes, gap, average)
    assert torch.equal(torch.autograd.grad(total(terms[:3], UPSTREAM), strong)[0], both[1])


def test_unknown_form(device):
    with pytest.raises(ValueError, match="cubic"):
        ignore_loss(*draw((2, 3), torch.float32, device), "cubic")


def test_ops_are_sound(device):
    weak, strong, masked, codes, gap, average = draw((9, 20), torch.float32, device)
    assert_op_sound(torch.ops.spml.ignore_statistics.default, (weak, masked, codes))
    leaves = [weak.requires_grad_(), strong.requires_grad_()]
    op = torch.ops.spml.ignore_loss.default
    assert_op_sound(op, (*leaves, masked, codes, gap, average, codes, 1e-5, True))
    assert_op_sound(op, (weak, None, None, codes, gap, None, None, 0.0, False))
    rejected = ignore_loss(*leaves, masked, codes, gap, average).rejected
    upstream = torch.tensor(UPSTREAM, device=device)
    plain = [t.detach() for t in leaves]
    assert_op_sound(
        torch.ops.spml.ignore_loss_backward.default, (upstream, *plain, codes, rejected, 1e-5, True, True, True)
    )


def test_compiles_into_one_graph(device):
    weak, strong, masked, codes, gap, average = draw((9, 20), torch.float32, device)

    def step(z, s):
        found = ignore_statistics(z, masked, codes)
        limit = 0.9 * gap + 0.1 * found[0] / found[1].clamp(min=1)
        terms = ignore_loss(z, s, masked, codes, limit, average, "epsilon")
        return terms.spbc / found[1] + terms.ign / (180 - terms.counts[0]) + terms.reg / 180

    leaves = [weak.requires_grad_(), strong.requires_grad_()]
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        value = function(*leaves)
        results.append([value, *torch.autograd.grad(value * 0.37, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
