"""The fused point-wise loss against fp64, with every method's point function."""

from __future__ import annotations

import pytest
import torch
from spml_kernels import PointLoss, label_loss
from spml_kernels.label_loss.op import label_loss_op

from spml_fast.methods import an_ls, asl, assume_negative, em, epr, gr, hill, iu, p_asl, partial, splc, wan
from tests.support.kernels import TOLERANCE, assert_close, assert_op_sound, draw_codes, draw_logits, value_and_gradients

pytestmark = pytest.mark.usefixtures("triton_on")

AN = assume_negative.AN_POINT
GUARDS = (0.0, 1e-5)
POINTS = [
    (AN, ()),
    (partial.PARTIAL_POINT, ()),
    *[(an_ls.AssumeNegativeSmoothed.point, (0.1, g)) for g in GUARDS],
    *[(wan.WeakAssumeNegative.point, (1 / 80, g)) for g in GUARDS],
    *[(iu.IgnoreUnknown.point, (g,)) for g in GUARDS],
    *[(epr.EPR_POINT, (g,)) for g in GUARDS],
    *[(em.EntropyMaximisation.point, (0.2, g)) for g in GUARDS],
    (asl.AsymmetricLoss.point, (0.0, 4.0, 0.05, 1e-8, 0.0)),
    (asl.AsymmetricLoss.point, (1.0, 4.0, 0.05, 1e-8, 1.0)),
    (asl.AsymmetricLoss.point, (2.0, 2.0, 0.0, 0.0, 1.0)),
    (asl.AsymmetricLoss.point, (0.0, 0.0, 0.0, 1e-8, 0.0)),
    (p_asl.PartialASL.point, (1.0, 0.8, 0.6, 0.0, 1.0, 4.0, 0.0, 1e-8)),
    (p_asl.PartialASL.point, (1.0, 0.8, 0.6, 1.0, 3.0, 4.0, 0.05, 1e-8)),
    (splc.SelfPacedLossCorrection.point, (0.6, 1.0, 2.0, 0.0, 1.0)),
    (splc.SelfPacedLossCorrection.point, (0.6, 1.0, 2.0, 1.0, 1.0)),
    (splc.SelfPacedLossCorrection.point, (0.6, 0.0, 2.0, 1.0, 0.0)),
    (hill.Hill.point, (1.5, 1.0, 2.0, 1.0)),
    (hill.Hill.point, (1.5, 0.0, 0.0, 0.0)),
    *[(gr.GeneralisedRobust.point, (10.0, -8.0, 0.8, 0.5, 0.01, 1.5, g)) for g in (0.0, 1e-7)],
]
IDS = [f"{p.name}-{'-'.join(f'{x:g}' for x in v)}" for p, v in POINTS]


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


@pytest.mark.parametrize(("point", "params"), POINTS, ids=IDS)
def test_every_point_function(point, params, device):
    logits = draw_logits((37, 81), torch.float32, device)
    codes = draw_codes((37, 81), device)
    codes[5:7] = -2
    if point in (AN, partial.PARTIAL_POINT):
        codes[5:7] = 0
    check(logits, codes, point, params)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", [(1, 1), (3, 20), (16, 80), (129, 312), (2, 9605), (1, 4097)])
def test_shapes_and_dtypes(shape, dtype, device):
    check(draw_logits(shape, dtype, device), draw_codes(shape, device), AN, ())


def test_many_programs(device):
    shape = (300, 500)
    check(draw_logits(shape, torch.float32, device), draw_codes(shape, device), AN, (), 1 / 150000)


def test_all_unknown_is_zero_for_known_labels_only(device):
    logits, codes = draw_logits((4, 81), torch.float32, device), torch.full((4, 81), -1, dtype=torch.int8).to(device)
    total, (grad,) = value_and_gradients(lambda z: label_loss(z, codes, partial.PARTIAL_POINT), [logits])
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


def test_no_gradient_is_made_when_none_is_wanted(device):
    logits, codes = draw_logits((9, 33), torch.float32, device), draw_codes((9, 33), device)
    assert label_loss_op(logits, codes, AN.key, [], False)[1].numel() == 0
    with torch.no_grad():
        assert not label_loss(logits.requires_grad_(), codes, AN).requires_grad


def test_without_a_kernel_the_reference_runs(device):
    logits, codes = draw_logits((9, 33), torch.float32, device), draw_codes((9, 33), device)
    assert label_loss(logits, codes, PointLoss("square", lambda z, c: z * z)) == (logits * logits).sum()


def test_op_is_sound(device):
    logits, codes = draw_logits((9, 33), torch.float32, device).requires_grad_(), draw_codes((9, 33), device)
    assert_op_sound(torch.ops.spml.label_loss.default, (logits, codes, AN.key, [], True))
    point = an_ls.AssumeNegativeSmoothed.point
    assert_op_sound(torch.ops.spml.label_loss.default, (logits.detach(), codes, point.key, [0.1, 0.0], False))
    assert label_loss_op(logits.to("meta"), codes.to("meta"), AN.key, [], True)[1].shape == (9, 33)


def test_compiles_into_one_graph(device):
    codes = draw_codes((9, 33), device)
    point = wan.WeakAssumeNegative.point

    def step(z):
        return label_loss(z, codes, AN) * 2 + label_loss(z * 3, codes, point, (0.1, 1e-5))

    logits = draw_logits((9, 33), torch.float32, device)
    plain, (slope,) = value_and_gradients(step, [logits])
    value, (grad,) = value_and_gradients(torch.compile(step, fullgraph=True, backend="aot_eager"), [logits])
    assert torch.equal(value, plain) and torch.equal(grad, slope)
