"""IGNORE: loss, thresholds and switches against a literal formula."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from spml_fast.core.errors import UserError
from spml_fast.methods.ignore import PRESETS, Ignore, IgnoreOptions, WeakAndMasked
from tests.support.ignore import (
    CODES,
    MASKED,
    STRONG,
    D,
    Z,
    batch_of,
    count_calls,
    epoch,
    make_rig,
    method_for,
    random_case,
)
from tests.support.methods import at


def literal(weak, strong, masked, codes, gap, average, number, options, repeats=1):
    """Loss, rejections and new thresholds, with boolean indexing and without any shared code."""
    y, n = codes == 1, len(codes)
    g = (weak.detach() - masked).abs()
    if y.any():
        decay = 0.999 ** (n / 16 * repeats)
        gap = decay * gap + (1 - decay) * g[y].mean()
        average = decay * average + (1 - decay) * weak.detach().mean(0)
    r = (g > gap) & (weak.detach() > average) & (codes == -1)
    if number <= 3:
        r[:] = False

    def log_p(z):
        return torch.log(torch.sigmoid(z) + 1e-5) if options == "epsilon" else torch.nn.functional.logsigmoid(z)

    spbc = -log_p(weak[y]).mean() if y.any() else weak.sum() * 0
    ign = -torch.cat([log_p(strong[y]), log_p(-strong[~y & ~r])]).mean()
    reg = ((strong - weak) ** 2).mean()
    return 0.5 * spbc + ign + 0.5 * reg, r, gap, average


class TestGolden:
    def prepared(self, **options: object) -> Ignore:
        method = method_for(CODES, preset="released", ema_rescale=False, **options)
        method.gap_average.fill_(0.3)
        method.logit_average.copy_(torch.tensor([0.1, -0.2, 0.05], dtype=D))
        return method

    @pytest.mark.parametrize(
        ("number", "rejected", "ign"), [(4, 2, 0.37397436487111), (3, 0, 0.55368675236911), (1, 0, 0.55368675236911)]
    )
    def test_epochs_3_and_4(self, number, rejected, ign):
        method = self.prepared()
        z, strong = torch.tensor(Z, dtype=D).requires_grad_(), torch.tensor(STRONG, dtype=D).requires_grad_()
        out = method.combine(z, strong, torch.tensor(MASKED, dtype=D), batch_of(CODES), epoch(number))
        assert int(out.metrics["selected_count"]) == rejected
        assert out.loss.item() == pytest.approx(0.5 * 0.16415885225527 + ign + 0.5 * 0.45833333333333, abs=1e-10)
        gap, average = method.thresholds()
        assert gap.item() == pytest.approx(0.29995, abs=1e-10)
        assert average.tolist() == pytest.approx([0.10065, -0.1988, 0.04955], abs=1e-10)

    def test_loss_and_gradients(self):
        method = self.prepared()
        z, strong = torch.tensor(Z, dtype=D).requires_grad_(), torch.tensor(STRONG, dtype=D).requires_grad_()
        masked = torch.tensor(MASKED, dtype=D).requires_grad_()
        out = method.combine(z, strong, masked, batch_of(CODES), epoch(4))
        out.loss.backward()
        assert out.loss.item() == pytest.approx(0.68522045766541, abs=1e-10)
        wanted = [[0.0535329412, -0.0833333333, 0.1666666667], [-0.1333333333, 0.0377275102, 0.1]]
        torch.testing.assert_close(z.grad, torch.tensor(wanted, dtype=D), atol=1e-10, rtol=0)
        wanted = [[-0.1289391565, 0.0833333333, -0.1368662745], [0.2769405880, -0.1505677690, -0.1]]
        torch.testing.assert_close(strong.grad, torch.tensor(wanted, dtype=D), atol=1e-10, rtol=0)
        assert masked.grad is None

    @pytest.mark.parametrize("preset", ["released", "clean"])
    @pytest.mark.parametrize("number", [2, 6])
    def test_steps_follow_the_literal_formula(self, preset, number):
        method = method_for(random_case(9, 5)[3], preset=preset, debias=False)
        form = PRESETS[preset]["loss_form"]
        gap, average = torch.zeros((), dtype=D), torch.zeros(5, dtype=D)
        for step in range(4):
            weak, strong, masked, codes = random_case(9, 5, seed=step)
            weak.requires_grad_(), strong.requires_grad_()
            # Nine images move the averages of the release as sixteen would.
            repeats = 16 / 9 if preset == "released" else 1
            wanted, rejected, gap, average = literal(weak, strong, masked, codes, gap, average, number, form, repeats)
            gradients = torch.autograd.grad(wanted, (weak, strong))
            out = method.combine(weak, strong, masked, batch_of(codes), epoch(number))
            out.loss.backward()
            assert out.loss.item() == pytest.approx(wanted.item(), abs=1e-12)
            assert int(out.metrics["selected_count"]) == int(rejected.sum())
            assert (int(rejected.sum()) > 0) == (number > 3)
            for value, right in zip((weak.grad, strong.grad), gradients, strict=True):
                torch.testing.assert_close(value, right, atol=1e-12, rtol=0)
            torch.testing.assert_close(method.thresholds(), (gap, average), atol=1e-12, rtol=0)


class TestThresholds:
    def run(self, method: Ignore, means: list[float], images: int = 16) -> None:
        for mean in means:
            statistics = torch.tensor([mean * 4, 4, images, mean * images, 0, 2 * images], dtype=D)
            method.update_thresholds(statistics, images)

    def test_closed_form(self):
        means = torch.rand(50, dtype=D, generator=torch.Generator().manual_seed(1)).tolist()
        method = method_for(CODES, debias=False, gap_lambda=0.9, avg_lambda=0.8)
        self.run(method, means)
        gap, average = method.thresholds()
        for decay, value in ((0.9, gap), (0.8, average[0])):
            wanted = (1 - decay) * sum(decay ** (len(means) - 1 - i) * m for i, m in enumerate(means))
            assert value.item() == pytest.approx(wanted, abs=1e-12)
        assert average[1] == 0

    @pytest.mark.parametrize(("updates", "share"), [(858, 0.5762), (900, 0.5936)])
    def test_share_of_the_mean_after_the_warm_up(self, updates, share):
        method = method_for(CODES, preset="released")
        self.run(method, [1.0] * updates)
        gap, average = method.thresholds()
        assert gap.item() == pytest.approx(share, abs=5e-5)
        assert average[2].item() == pytest.approx(2 * share, abs=1e-4)

    def test_decay_is_rescaled_to_the_batch(self):
        large = method_for(CODES, debias=False)
        self.run(large, [1.0], images=256)
        assert 1 - large.thresholds()[0].item() == pytest.approx(0.98412, abs=5e-6)
        small = method_for(CODES, debias=False)
        self.run(small, [1.0] * 16, images=16)
        assert small.thresholds()[0].item() == pytest.approx(large.thresholds()[0].item(), abs=1e-12)
        fixed = method_for(CODES, debias=False, ema_rescale=False)
        self.run(fixed, [1.0], images=256)
        assert fixed.thresholds()[0].item() == pytest.approx(0.001, abs=1e-12)

    def test_a_short_last_batch(self):
        """The releases take lambda once a step: seven images move the averages as sixteen do."""
        for preset, images, steps in (("released", 7, 1), ("calr", 16, 1), ("released", 250, 16), ("clean", 7, 7 / 16)):
            method = method_for(CODES, preset=preset, debias=False)
            self.run(method, [1.0], images=images)
            assert method.thresholds()[0].item() == pytest.approx(1 - 0.999**steps, abs=1e-12)
        method = method_for(CODES, preset="released", ema_partial="scaled")
        self.run(method, [1.0], images=7)
        assert method.thresholds()[0].item() == pytest.approx(1 - 0.999 ** (7 / 16), abs=1e-12)

    def test_debias_gives_the_mean_from_the_first_step_on(self):
        method = method_for(CODES)
        assert [float(t.abs().sum()) for t in method.thresholds()] == [0, 0]
        self.run(method, [0.7])
        assert method.thresholds()[0].item() == pytest.approx(0.7, abs=1e-10)
        self.run(method, [0.7] * 30, images=40)
        assert method.thresholds()[0].item() == pytest.approx(0.7, abs=1e-10)
        assert method.thresholds()[1].tolist() == pytest.approx([0.7, 0, 2], abs=1e-10)

    @pytest.mark.parametrize("rows", [0, 3])
    def test_no_positive_anywhere_changes_nothing(self, rows):
        method = method_for(CODES)
        self.run(method, [0.7, 0.2])
        before = [t.clone() for t in method.buffers()]
        z = torch.randn(rows, 3, dtype=D, requires_grad=True)
        out = method.combine(z, z + 1, z.detach() - 2, batch_of(np.full((rows, 3), -1), rows), epoch(5))
        assert all(torch.equal(a, b) for a, b in zip(before, method.buffers(), strict=True))
        if rows:
            out.loss.backward()
            assert torch.isfinite(out.loss) and torch.isfinite(z.grad).all() and out.metrics["selected_count"] > 0

    def test_everything_rejected_is_finite(self):
        method = method_for(CODES, reg=False)
        z = torch.full((2, 3), 4.0, dtype=D, requires_grad=True)
        out = method.combine(z, z, z.detach() - 2, batch_of(np.full((2, 3), -1)), epoch(5))
        out.loss.backward()
        assert out.metrics["selected_count"] == 6 and out.loss.item() == 0 and not z.grad.any()

    def test_survive_a_checkpoint(self):
        method, other = method_for(CODES), method_for(CODES)
        self.run(method, [0.7, 0.2], images=24)
        other.load_state_dict(method.state_dict())
        torch.testing.assert_close(other.thresholds(), method.thresholds(), atol=0, rtol=0)
        self.run(method, [0.4]), self.run(other, [0.4])
        torch.testing.assert_close(other.thresholds(), method.thresholds(), atol=0, rtol=0)


def test_statistics_of_an_update_without_masked_views():
    """Positives and entries of the whole update, shared out by images; thresholds stay as they are."""
    codes = [[1, -1, 0], [1, 1, -1], [-1, -1, -1], [0, 1, -1]]
    method = method_for(codes)
    batches = [batch_of(codes[:3]), batch_of(codes[3:])]
    forwards = [WeakAndMasked(torch.zeros(len(b.labels), 3, dtype=D), None) for b in batches]
    before = [t.clone() for t in method.thresholds()]
    ahead = method.update_statistics(forwards, batches, epoch(3, 1))
    assert [a.masked for a in ahead] == [None, None]
    assert [(a.positives.item(), a.kept.item()) for a in ahead] == [(3.0, 9.0), (1.0, 3.0)]
    assert all(torch.equal(a, b) for a, b in zip(before, method.thresholds(), strict=True))


def test_an_update_with_one_positive_and_one_entry_kept():
    """Shares below 1 of both denominators in two micro-steps: the loss of one step, and its gradient."""
    codes = torch.tensor([[1], [-1]], dtype=torch.int8)
    weak, masked = torch.tensor([[3.0], [2.0]], dtype=D), torch.tensor([[2.9], [-5.0]], dtype=D)
    options = {"lat": False, "warm_up": 0, "reg": False, "spbc": True, "strong_aug": False}
    whole, cut = method_for(codes, **options), method_for(codes, **options)
    z = weak.clone().requires_grad_()
    out = whole.combine(z, None, masked, batch_of(codes), epoch(2))
    assert out.metrics["selected_count"] == 1
    (gradient,) = torch.autograd.grad(out.loss, z)
    batches = [batch_of(codes[:1]), batch_of(codes[1:])]
    forwards = [WeakAndMasked(weak[i : i + 1], masked[i : i + 1]) for i in range(2)]
    ahead = cut.update_statistics(forwards, batches, epoch(2))
    assert [(a.positives.item(), a.kept.item()) for a in ahead] == [(0.5, 0.5)] * 2
    total, slopes = 0.0, []
    for i, batch in enumerate(batches):
        batch.update_statistics = ahead[i]
        part = weak[i : i + 1].clone().requires_grad_()
        loss = cut.combine(part, None, ahead[i].masked, batch, epoch(2)).loss / 2
        slopes.append(torch.autograd.grad(loss, part)[0])
        total += loss.item()
    assert total == pytest.approx(out.loss.item(), rel=1e-12)
    torch.testing.assert_close(torch.cat(slopes), gradient, rtol=1e-12, atol=0)


def test_one_positive_moves_the_thresholds():
    """Gap .4 of the one positive; the mean logits of two rows."""
    method = method_for(CODES, ema_rescale=False, debias=False, gap_lambda=0.75, avg_lambda=0.5)
    method.update_thresholds(torch.tensor([0.4, 1.0, 2.0, 2.0, 4.0, -6.0], dtype=D), 2)
    gap, average = method.thresholds()
    assert gap.item() == pytest.approx(0.1) and average.tolist() == pytest.approx([0.5, 1.0, -1.5])
    assert method.ema_steps == 1


def test_an_update_moves_the_averages_by_its_images():
    """Four images of two micro-steps are two batches of three, one of them not full."""
    codes = [[1, -1, 0], [1, 1, -1], [-1, -1, -1], [0, 1, -1]]
    method = method_for(codes, ema_partial="whole", ema_rescale=True, ema_batch=3)
    batches = [batch_of(codes[:2]), batch_of(codes[2:])]
    forwards = [WeakAndMasked(torch.ones(2, 3, dtype=D), torch.zeros(2, 3, dtype=D)) for _ in batches]
    method.update_statistics(forwards, batches, epoch(3))
    assert method.ema_steps == 2


def test_without_a_masked_view_the_positives_term_is_their_mean():
    options = {"loss_form": "logits", "spbc": True, "spbc_weight": 1.0, "ign_weight": 0.0, "reg": False}
    weak, strong = torch.tensor(Z, dtype=D), torch.tensor(STRONG, dtype=D)
    loss = method_for(CODES, **options).combine(weak, strong, None, batch_of(CODES), epoch(4)).loss
    # Positive are the logits 2 and 1.5.
    assert loss.item() == pytest.approx((np.log1p(np.exp(-2)) + np.log1p(np.exp(-1.5))) / 2, rel=1e-12)


class TestSwitches:
    """Every switch against the terms of the loss that it drops."""

    def loss(self, **options: object) -> tuple[float, int]:
        weak, strong, masked, codes = random_case(6, 4)
        out = method_for(codes, **options).combine(weak, strong, masked, batch_of(codes), epoch(4))
        return out.loss.item(), int(out.metrics["selected_count"])

    def test_terms_add_up(self):
        whole, rejected = self.loss()
        parts = [
            self.loss(spbc_weight=s, ign_weight=i, reg_weight=r)[0] for s, i, r in ((0.5, 0, 0), (0, 1, 0), (0, 0, 0.5))
        ]
        assert whole == pytest.approx(sum(parts), abs=1e-12)
        assert self.loss(spbc=False)[0] == pytest.approx(whole - parts[0], abs=1e-12)
        assert self.loss(reg=False)[0] == pytest.approx(whole - parts[2], abs=1e-12)
        assert rejected > 0 and all(p > 0 for p in parts)

    def test_strong_aug_off_takes_the_weak_view(self):
        weak, strong, masked, codes = random_case(6, 4)
        method = method_for(codes, strong_aug=False, reg=False)
        first = method.combine(weak, strong, masked, batch_of(codes), epoch(4)).loss
        second = method_for(codes, reg=False).combine(weak, weak, masked, batch_of(codes), epoch(4)).loss
        assert first.item() == second.item()
        assert self.loss(strong_aug=False)[0] != self.loss()[0]

    def test_ignore_off_is_assumed_negative(self):
        rig = make_rig("ignore", ignore=False, spbc=False, reg=False)
        calls = count_calls(rig.classifier)
        batch = rig.batch(range(8))
        loss = rig.step(batch, at(5, 0))
        logits = rig.classifier(batch.views["strong"], alpha=2.0).logits
        wanted = nn.functional.binary_cross_entropy_with_logits(logits, (batch.labels == 1).float())
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
        assert len(calls) == 3, "no masked view may be made"

    def test_lat_off_rejects_more(self):
        assert self.loss(lat=False)[1] > self.loss()[1]

    @pytest.mark.parametrize("name", ["gap_lambda", "avg_lambda"])
    def test_decays_are_checked(self, name):
        for value in (1.0, -0.1):
            with pytest.raises(UserError, match=name):
                method_for(CODES, **{name: value})

    @pytest.mark.parametrize(
        ("name", "value"),
        [("norm_group", 0), ("masked_every", 0), ("masked_scale", 0.0), ("warm_up", -1), ("ema_batch", 0)],
    )
    def test_other_options_are_checked(self, name, value):
        with pytest.raises(UserError, match=name):
            method_for(CODES, **{name: value})

    def test_presets(self):
        names = {f.name for f in dataclasses.fields(IgnoreOptions)}
        assert all(set(values) <= names for values in PRESETS.values())
        method = method_for(CODES, preset="calr")
        assert (method.mask.norm, method.mask.threshold, method.form) == ("batch_minmax", 0.5, "epsilon")
        assert (method.debias, method.masked_bn, method.count_batches(0.25)) == (False, "update", 1)
        method = method_for(CODES)
        assert (method.mask.norm, method.mask.threshold, method.form) == ("per_image", 0.8, "logits")
        assert (method.debias, method.masked_bn, method.count_batches(0.25)) == (True, "no_update", 0.25)
        method = method_for(CODES, preset="released")
        assert (method.mask.norm, method.mask.threshold, method.debias) == ("batch_rawmax", 0.8, False)
        method = method_for(CODES, preset="released", cam_threshold=0.6, loss_form="logits")
        assert (method.mask.norm, method.mask.threshold, method.form) == ("batch_rawmax", 0.6, "logits")


def test_masks_have_room_for_one_class_where_no_image_has_a_positive() -> None:
    """A list of classes is padded to the most positives that an image has, and is never of no width at all."""
    assert [method_for(codes).max_positives for codes in ([[-1, 0]], [[1, 0], [0, -1]], [[1, 1], [1, -1]])] == [1, 1, 2]


def test_copies_keep_their_own_thresholds() -> None:
    rig = make_rig("ignore")
    other = copy.deepcopy(rig)
    rig.step(rig.batch(range(8)), at(1, 0))
    assert other.method.ema_steps == 0 and rig.method.ema_steps == 0.5
