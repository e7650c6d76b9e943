"""The fused point-wise loss against fp64, with every method's point function."""

from __future__ import annotations

import pytest
import torch
from spml_kernels import IGNORED, PointLoss, label_loss
from spml_kernels.label_loss.op import label_loss_op

from spml_fast.methods import get_method, method_names
from spml_fast.methods.pointwise import PointExample, PointMethod, point_examples
from tests.support.kernels import TOLERANCE, assert_close, assert_op_sound, draw_codes, draw_logits, value_and_gradients

pytestmark = pytest.mark.usefixtures("triton_on")

AN, PARTIAL, WAN = (get_method(name).point for name in ("an", "partial", "wan"))
EXAMPLES = point_examples()


def check(logits, codes, point, params, upstream=0.37):
    assert point.kernel is not None
    total, (grad,) = value_and_gradients(lambda z: label_loss(z, codes, point, params), [logits], upstream)
    exact, (slope,) = value_and_gradients(
        lambda z: label_loss(z, codes.cpu(), point, params), [logits.detach().double().cpu()], upstream
    )
    assert total.dtype == torch.float32 and grad.dtype == logits.dtype
    assert torch.isfinite(grad).all()
    tolerance = TOLERANCE[logits.dtype]
    assert_close("loss", total, exact, 2e-6)
    assert_close("gradient", grad, slope, tolerance)
    # Entries that take no part get no gradient at all (1 - p of the reference may round to 0, ours is 1e-44 there).
    assert not grad.cpu()[slope == 0].abs().gt(1e-40).any()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.name)
def test_every_point_function(example, device):
    if example.point.kernel is None:
        pytest.skip(f"method {example.method} has no kernel: its reference runs on every device")
    codes = draw_codes((37, 81), device)
    codes[5:7] = IGNORED
    check(draw_logits((37, 81), torch.float32, device), codes, example.point, example.params)


BOUNDARIES = [
    # A logit of 0 lies on the margin or threshold of 0.5; a margin below the clamp leaves the clamp to do its work.
    ("asl", (0.0, 0.0, 0.5, 1e-8, 1.0)),
    ("asl", (0.0, 2.0, 0.5, 0.0, 1.0)),
    ("asl", (0.0, 0.0, 1e-9, 1e-8, 0.0)),
    ("splc", (0.5, 1.0, 2.0, 1.0, 1.0)),
]


@pytest.mark.parametrize(
    "example", [PointExample(n, get_method(n).point, p) for n, p in BOUNDARIES], ids=lambda e: e.name
)
def test_boundaries_of_point_functions(example, device):
    logits = draw_logits((5, 40), torch.float32, device)
    assert (logits == 0).any() and (logits == 100).any()
    check(logits, draw_codes((5, 40), device), example.point, example.params)


def test_every_point_method_has_an_example():
    tested = {example.point for example in EXAMPLES}
    methods = [get_method(name) for name in method_names()]
    assert {m.point for m in methods if issubclass(m, PointMethod)} == tested and len(tested) >= 12


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", [(1, 1), (3, 20), (16, 80), (129, 312), (2, 9605), (1, 4097)])
def test_shapes_and_dtypes(shape, dtype, device):
    check(draw_logits(shape, dtype, device), draw_codes(shape, device), AN, ())


def test_many_programs(device):
    shape = (300, 500)
    check(draw_logits(shape, torch.float32, device), draw_codes(shape, device), AN, (), 1 / 150000)


def test_all_unknown_is_zero_for_known_labels_only(device):
    logits, codes = draw_logits((4, 81), torch.float32, device), torch.full((4, 81), -1, dtype=torch.int8).to(device)
    total, (grad,) = value_and_gradients(lambda z: label_loss(z, codes, PARTIAL), [logits])
    assert total.item() == 0 and not grad.any()


@pytest.mark.parametrize("shape", [(0, 80), (5, 0)])
def test_empty(shape, device):
    logits, codes = torch.zeros(shape, device=device), torch.zeros(shape, dtype=torch.int8, device=device)
    total, (grad,) = value_and_gradients(lambda z: label_loss(z, codes, AN), [logits])
    assert total.item() == 0 and grad.shape == shape


def test_layouts(device):
    logits, codes = draw_logits((81, 40), torch.float32, device), draw_codes((81, 40), device)
    wide = torch.zeros(40, 162, device=device)
    wide[:, ::2] = logits.T
    expected = label_loss(logits.T.contiguous(), codes.T.contiguous(), AN)
    assert label_loss(logits.T, codes.T, AN) == expected == label_loss(wide[:, ::2], codes.T, AN)
    check(logits.T, codes.T, AN, ())


def test_two_runs_are_bit_equal(device):
    logits, codes = draw_logits((64, 312), torch.float32, device), draw_codes((64, 312), device)
    one, two = (value_and_gradients(lambda z: label_loss(z, codes, AN), [logits]) for _ in range(2))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1][0], two[1][0])


def test_leaves_its_inputs_alone(device):
    logits, codes = draw_logits((9, 33), torch.float32, device), draw_codes((9, 33), device)
    before, version = logits.clone(), logits._version
    value_and_gradients(lambda z: label_loss(z, codes, AN), [logits])
    assert torch.equal(logits, before) and logits._version == version


def test_no_graph_is_made_when_no_gradient_is_wanted(device):
    logits, codes = draw_logits((9, 33), torch.float32, device), draw_codes((9, 33), device)
    with torch.no_grad():
        assert not label_loss(logits.requires_grad_(), codes, AN).requires_grad


def test_without_a_kernel_the_reference_runs(device):
    logits, codes = draw_logits((9, 33), torch.float32, device), draw_codes((9, 33), device)
    assert label_loss(logits, codes, PointLoss("square", lambda z, c: z * z)) == (logits * logits).sum()


def test_op_is_sound(device):
    logits, codes = draw_logits((9, 33), torch.float32, device).requires_grad_(), draw_codes((9, 33), device)
    assert_op_sound(torch.ops.spml.label_loss.default, (logits, codes, AN.key, []))
    assert_op_sound(torch.ops.spml.label_loss.default, (logits.detach(), codes, WAN.key, [0.1, 0.0]))
    upstream = torch.tensor(0.3, device=device)
    assert_op_sound(torch.ops.spml.label_loss_backward.default, (upstream, logits.detach(), codes, WAN.key, [0.1, 0.0]))
    assert label_loss_op(logits.to("meta"), codes.to("meta"), AN.key, []).shape == ()


def test_nothing_but_the_inputs_is_kept_for_the_backward(device):
    logits, codes = draw_logits((9, 33), torch.bfloat16, device).requires_grad_(), draw_codes((9, 33), device)
    loss = label_loss(logits, codes, WAN, (0.1, 0.0))
    kept = [t for t in loss.grad_fn.saved_tensors if t is not None]
    assert {t.data_ptr() for t in kept} == {logits.data_ptr(), codes.data_ptr()}


def test_a_tiny_factor_is_not_lost_in_half_precision(device):
    # A mean over 10^8 entries: the product is made in fp32 and rounded once.
    logits, codes = draw_logits((9, 33), torch.bfloat16, device).clamp(-8, 8), draw_codes((9, 33), device)
    (one,), (tiny,) = (value_and_gradients(lambda z: label_loss(z, codes, AN), [logits], u)[1] for u in (1.0, 2.0**-30))
    assert torch.equal(tiny * 2.0**30, one)


def test_compiles_into_one_graph(device):
    codes = draw_codes((9, 33), device)

    def step(z):
        return label_loss(z, codes, AN) * 2 + label_loss(z * 3, codes, WAN, (0.1, 1e-5))

    logits = draw_logits((9, 33), torch.float32, device)
    plain, (slope,) = value_and_gradients(step, [logits])
    value, (grad,) = value_and_gradients(torch.compile(step, fullgraph=True, backend="aot_eager"), [logits])
    assert torch.equal(value, plain) and torch.equal(grad, slope)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.name)
def test_a_nan_logit_is_a_nan_loss(example, device):
    if example.point.kernel is None:
        pytest.skip(f"method {example.method} has no kernel: its reference runs on every device")
    # Each of the three codes at three logits: usual ones say which entries take part at all.
    codes = torch.tensor([1, 0, -1], dtype=torch.int8, device=device).repeat(3, 1)
    logits = torch.tensor([-3.0, 0.5, 3.0], device=device)[:, None].repeat(1, 3)

    def loss(z):
        return label_loss(z, codes, example.point, example.params)

    _, (usual,) = value_and_gradients(loss, [logits], 1.0)
    total, (slope,) = value_and_gradients(loss, [logits * torch.nan], 1.0)
    taking_part = (usual != 0).any(0).expand(3, 3)
    assert taking_part.any() and total.isnan()
    assert slope[taking_part].isnan().all()
