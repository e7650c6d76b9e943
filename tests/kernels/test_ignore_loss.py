"""IGNORE's statistics, rejection rule and three loss terms against values worked out by hand and literal formulas."""

from __future__ import annotations

import math

import pytest
import torch
from spml_kernels import ignore_loss, ignore_statistics

D = torch.float64
Z = [[2, 0.5, -1], [-0.5, 1.5, 0.2]]
STRONG = [[1.5, 1, -2], [0.3, 1, -0.4]]
MASKED = [[1.8, -1, -1.2], [0.1, 1.2, 0.9]]
CODES = [[1, -1, -1], [-1, 1, -1]]
GAP, AVERAGE = 0.29995, [0.10065, -0.1988, 0.04955]
GRADIENT = [[0.0535329412, -0.0833333333, 0.1666666667], [-0.1333333333, 0.0377275102, 0.1]]
STRONG_GRADIENT = [[-0.1289391565, 0.0833333333, -0.1368662745], [0.2769405880, -0.1505677690, -0.1]]


@pytest.fixture(autouse=True)
def plain_pytorch(monkeypatch):
    monkeypatch.setenv("SPML_KERNELS", "reference")


def tensor(values):
    return torch.tensor(values, dtype=D)


def golden(**options):
    z, strong = tensor(Z).requires_grad_(), tensor(STRONG).requires_grad_()
    codes = torch.tensor(CODES, dtype=torch.int8)
    given = {"form": "epsilon"} | options
    terms = ignore_loss(z, strong, tensor(MASKED), codes, tensor(GAP), tensor(AVERAGE), **given)
    return z, strong, terms


class TestGolden:
    def test_statistics(self):
        codes = torch.tensor(CODES, dtype=torch.int8)
        found = ignore_statistics(tensor(Z).requires_grad_(), tensor(MASKED), codes)
        torch.testing.assert_close(found, tensor([0.2 + 0.3, 2, 2, 1.5, 2.0, -0.8]), atol=1e-14, rtol=0)
        assert not found.requires_grad

    def test_terms_and_gradients(self):
        z, strong, terms = golden()
        assert terms.rejected.tolist() == [[False, True, False], [False, False, True]]
        values = [terms.spbc.item() / 2, terms.ign.item() / 4, terms.reg.item() / 6]
        assert values == pytest.approx([0.16415885225527, 0.37397436487111, 0.45833333333333], abs=1e-13)
        loss = 0.5 * terms.spbc / 2 + terms.ign / 4 + 0.5 * terms.reg / 6
        assert loss.item() == pytest.approx(0.68522045766541, abs=1e-13)
        loss.backward()
        torch.testing.assert_close(z.grad, tensor(GRADIENT), atol=1e-10, rtol=0)
        torch.testing.assert_close(strong.grad, tensor(STRONG_GRADIENT), atol=1e-10, rtol=0)

    def test_without_masked_view_nothing_is_rejected(self):
        z, strong = tensor(Z), tensor(STRONG)
        codes = torch.tensor(CODES, dtype=torch.int8)
        terms = ignore_loss(z, strong, None, codes, tensor(GAP), tensor(AVERAGE), "epsilon")
        assert not terms.rejected.any()
        assert terms.ign.item() / 6 == pytest.approx(0.55368675236911, abs=1e-13)

    @pytest.mark.parametrize("form", ["logits", "epsilon"])
    def test_gradients_by_finite_differences(self, form):
        codes = torch.tensor(CODES, dtype=torch.int8)

        def total(z, strong):
            terms = ignore_loss(z, strong, tensor(MASKED), codes, tensor(GAP), tensor(AVERAGE), form)
            return terms.spbc * 0.3 + terms.ign * 0.7 + terms.reg * 0.2

        torch.autograd.gradcheck(total, (tensor(Z).requires_grad_(), tensor(STRONG).requires_grad_()))


class TestRejection:
    # gap 1 against threshold, logit against average: every side of both, and equality, which keeps.
    @pytest.mark.parametrize(
        ("gap_threshold", "average", "code", "rejected"),
        [
            (0.5, 0.0, -1, True),
            (1.0, 0.0, -1, False),
            (1.5, 0.0, -1, False),
            (0.5, 2.0, -1, False),
            (0.5, 3.0, -1, False),
            (0.5, 0.0, 1, False),
            (0.5, 0.0, 0, False),
        ],
    )
    @pytest.mark.parametrize("sign", [1, -1])
    def test_truth_table(self, gap_threshold, average, code, rejected, sign):
        z = tensor([[2.0]])
        masked = z + sign
        codes = torch.tensor([[code]], dtype=torch.int8)
        terms = ignore_loss(z, z, masked, codes, tensor(gap_threshold), tensor([average]))
        assert bool(terms.rejected) is rejected
        assert (float(terms.ign) == 0) is rejected

    def test_without_the_average_the_gap_decides(self):
        codes = torch.tensor([[-1, -1]], dtype=torch.int8)
        z, masked = tensor([[-5.0, -5.0]]), tensor([[-6.0, -5.1]])
        terms = ignore_loss(z, z, masked, codes, tensor(0.5), None)
        assert terms.rejected.tolist() == [[True, False]]

    def test_rejected_entries_leave_the_ign_term_alone(self):
        _, strong, terms = golden()
        terms.ign.backward()
        assert strong.grad[terms.rejected].abs().sum() == 0
        assert (strong.grad[~terms.rejected] != 0).all()


class TestForms:
    def test_terms_against_binary_cross_entropy(self):
        z, strong, terms = golden(form="logits")
        y = (torch.tensor(CODES) == 1).to(D)
        bce = torch.nn.functional.binary_cross_entropy_with_logits
        keep = ~terms.rejected
        assert terms.ign.item() == pytest.approx(bce(strong[keep], y[keep], reduction="sum").item(), abs=1e-13)
        assert terms.spbc.item() == pytest.approx(bce(z[y == 1], y[y == 1], reduction="sum").item(), abs=1e-13)

    def test_epsilon_is_capped_and_its_gradient_vanishes(self):
        for value, gradient in ((12.0, 0.3806), (20.0, 2.06e-4), (60.0, 0.0)):
            z = tensor([[value]]).requires_grad_()
            terms = ignore_loss(z, None, None, torch.tensor([[-1]], dtype=torch.int8), tensor(0), None, "epsilon")
            terms.ign.backward()
            assert float(z.grad) == pytest.approx(gradient, abs=1e-4)
            assert terms.ign.item() < 11.5130
        assert terms.ign.item() == pytest.approx(-math.log(1e-5), abs=1e-9)
        certain = ignore_loss(
            -z.detach(), None, None, torch.tensor([[-1]], dtype=torch.int8), tensor(0), None, "epsilon"
        )
        assert float(certain.ign) == pytest.approx(-1e-5, abs=1e-9)

    def test_logits_form_is_not_capped(self):
        z = tensor([[60.0]]).requires_grad_()
        terms = ignore_loss(z, None, None, torch.tensor([[-1]], dtype=torch.int8), tensor(0), None)
        terms.ign.backward()
        assert terms.ign.item() == pytest.approx(60) and float(z.grad) == pytest.approx(1)

    @pytest.mark.parametrize("form", ["logits", "epsilon"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_finite_at_large_logits(self, form, dtype):
        z = torch.tensor([[100.0, -100.0, 100.0, -100.0]], dtype=dtype).requires_grad_()
        codes = torch.tensor([[1, 1, -1, 0]], dtype=torch.int8)
        terms = ignore_loss(z, -z.detach(), z.detach() * 0, codes, torch.tensor(0.5), None, form)
        (terms.spbc + terms.ign + terms.reg).backward()
        assert torch.isfinite(z.grad).all() and terms.ign.dtype == torch.float32
        assert all(torch.isfinite(t) for t in (terms.spbc, terms.ign, terms.reg))

    def test_unknown_form(self):
        with pytest.raises(ValueError, match="cubic"):
            golden(form="cubic")

    def test_weak_target_and_no_strong_view(self):
        z, _, weak = golden(strong_target=False)
        codes = torch.tensor(CODES, dtype=torch.int8)
        alone = ignore_loss(z, None, tensor(MASKED), codes, tensor(GAP), tensor(AVERAGE), "epsilon")
        same = ignore_loss(z, z, tensor(MASKED), codes, tensor(GAP), tensor(AVERAGE), "epsilon")
        assert float(weak.ign) == alone.ign.item() == float(same.ign)
        assert alone.reg.item() == 0 and float(weak.reg) == pytest.approx(0.45833333333333 * 6)

    def test_empty_batch(self):
        z, codes = torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int8)
        assert ignore_statistics(z, z, codes).tolist() == [0] * 6
        assert float(ignore_loss(z, z, z, codes, torch.tensor(0.0), torch.zeros(3)).ign) == 0
