"""IGNORE: one step against a literal formula, thresholds, masks of every kind of row, ranks, exact accumulation."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from spml_fast.core import distributed
from spml_fast.core.batch import Batch
from spml_fast.core.config import ModelConfig
from spml_fast.core.errors import UserError
from spml_fast.data.labels import LabelStore, SparseLabels
from spml_fast.methods import Progress
from spml_fast.methods.ignore import PRESETS, Ignore, IgnoreOptions
from spml_fast.models.batchnorm import bn_behaviour
from spml_fast.models.classifier import Classifier
from tests.support.methods import Rig, at
from tests.support.paths import ROOT
from tests.support.runs import Run, read_metrics

D = torch.float64
Z = [[2, 0.5, -1], [-0.5, 1.5, 0.2]]
STRONG = [[1.5, 1, -2], [0.3, 1, -0.4]]
MASKED = [[1.8, -1, -1.2], [0.1, 1.2, 0.9]]
CODES = [[1, -1, -1], [-1, 1, -1]]


def epoch(number: int, update: int = 0) -> Progress:
    """A place in a run."""
    return Progress(number, 10, update, 4)


def method_for(codes: object, **options: object) -> Ignore:
    """The method in fp64 on a store with these codes [N, C]."""
    store = LabelStore(SparseLabels.from_dense(np.asarray(codes, dtype=np.int8)))
    return Ignore(IgnoreOptions(**options), store).to(D)


def batch_of(codes: object, global_size: int | None = None) -> Batch:
    """A batch without images."""
    labels = torch.as_tensor(codes, dtype=torch.int8)
    return Batch({}, labels, torch.arange(len(labels)), global_size or len(labels))


def random_case(batch: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Weak, strong, masked logits in fp64 and int8 codes: a positive or two a row, some negatives, an empty row."""
    generator = torch.Generator().manual_seed(seed)
    weak, strong, masked = (2 * torch.randn(batch, classes, generator=generator, dtype=D) for _ in range(3))
    codes = torch.full((batch, classes), -1, dtype=torch.int8)
    codes[torch.arange(batch), torch.arange(batch) % classes] = 1
    codes[torch.arange(batch), (torch.arange(batch) + 2) % classes] = (
        torch.arange(batch).remainder(2).neg().to(torch.int8)
    )
    codes[-1] = -1
    codes[0, 1] = 1
    return weak, strong, masked, codes


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
            wanted, rejected, gap, average = literal(weak, strong, masked, codes, gap, average, number, form)
            gradients = torch.autograd.grad(wanted, (weak, strong))
            out = method.combine(weak, strong, masked, batch_of(codes), epoch(number))
            out.loss.backward()
            assert out.loss.item() == pytest.approx(wanted.item(), abs=1e-12)
            assert int(out.metrics["selected_count"]) == int(rejected.sum())
            assert (int(rejected.sum()) > 0) == (number > 3)
            for found, right in zip((weak.grad, strong.grad), gradients, strict=True):
                torch.testing.assert_close(found, right, atol=1e-12, rtol=0)
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
        for decay, found in ((0.9, gap), (0.8, average[0])):
            wanted = (1 - decay) * sum(decay ** (len(means) - 1 - i) * m for i, m in enumerate(means))
            assert found.item() == pytest.approx(wanted, abs=1e-12)
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
        method = method_for(CODES, preset="released")
        assert (method.mask.norm, method.mask.threshold, method.debias) == ("batch_rawmax", 0.8, False)
        method = method_for(CODES, preset="released", cam_threshold=0.6, loss_form="logits")
        assert (method.mask.norm, method.mask.threshold, method.form) == ("batch_rawmax", 0.6, "logits")


def make_rig(name: str = "ignore", **options: object) -> Rig:
    """The shared rig with images and maps large enough to be masked: 8 x 8 cells of 64 x 64 pixels."""
    rig = Rig(name, **options)
    torch.manual_seed(3)
    config = ModelConfig(backbone="test_resnet", pretrained=False, freeze_bn=True, alpha_train=2.0, output_stride=8)
    rig.classifier = Classifier(config, 6, 64).train()
    rig.images = {view: torch.randn(len(p), 3, 64, 64) for view, p in rig.images.items()}
    return rig


def count_calls(classifier: Classifier) -> list[torch.Tensor]:
    """The images of every forward from now on."""
    calls: list[torch.Tensor] = []
    classifier.register_forward_pre_hook(lambda module, arguments: calls.append(arguments[0]))
    return calls


def three_views(rig: Rig, rows: range, alpha: float = 2.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Batch]:
    """Logits of the three views, masks made by hand from the map of the first positive."""
    batch = rig.batch(rows)
    positive = (batch.labels == 1).int().argmax(1)
    out = rig.classifier(batch.views["weak"], alpha=alpha, classes=positive[:, None])
    low, high = out.maps.amin((2, 3), keepdim=True), out.maps.amax((2, 3), keepdim=True)
    up = nn.functional.interpolate((out.maps - low) / (high - low), 64, mode="bilinear")
    keep = (up > 0.8) | ~(batch.labels == 1).any(1)[:, None, None, None]
    masked = rig.classifier(batch.views["weak"] * keep, alpha=alpha).logits
    return out.logits, rig.classifier(batch.views["strong"], alpha=alpha).logits, masked.detach(), batch


class TestStep:
    """The whole forward: which views are made, from what, and how."""

    def test_three_views_in_one_forward(self):
        rig = make_rig("ignore")
        with torch.no_grad():
            weak, strong, masked, batch = three_views(rig, range(8))
        other = rig.copy()
        wanted = other.method.combine(weak, strong, masked, batch, at(5, 0))
        calls = count_calls(rig.classifier)
        out = rig.method(rig.classifier, batch, at(5, 0))
        assert torch.equal(calls[0], batch.views["weak"]) and torch.equal(calls[1], batch.views["strong"])
        assert len(calls) == 3 and not calls[2].requires_grad
        torch.testing.assert_close(out.loss, wanted.loss)
        assert out.metrics["selected_count"] == wanted.metrics["selected_count"] > 0
        hidden = (batch.labels == -1) & (batch.truth == 1)
        assert out.metrics["hidden_positive_count"] == hidden.sum()
        assert 0 <= out.metrics["selected_true_count"] <= min(hidden.sum(), out.metrics["selected_count"])
        torch.testing.assert_close(rig.method.thresholds(), other.method.thresholds())
        # Sample 5 has no positive: its masked view is the weak one.
        assert torch.equal(calls[2][5], batch.views["weak"][5])
        assert (calls[2][0] == 0).any() and (calls[2][0] != 0).any()

    @pytest.mark.parametrize("form", ["released", "calr", "clean"])
    def test_no_gradient_for_the_masked_view_is_exact(self, form, monkeypatch):
        first, second = make_rig("ignore", preset=form, norm_group=3), make_rig("ignore", preset=form, norm_group=3)
        first.step(first.batch(range(8)), at(5, 0))
        monkeypatch.setattr(Ignore, "_masked", Ignore._masked.__wrapped__)
        second.step(second.batch(range(8)), at(5, 0))
        assert torch.equal(first.gradients(), second.gradients())

    def test_hidden_positives_found_by_an_ideal_network(self):
        # The network's logits are known, so is what must be rejected: classes whose evidence the mask removed.
        codes = np.full((2, 4), -1)
        codes[:, 0] = 1
        method = method_for(codes, lat=True)
        truth = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1]], dtype=torch.int8)
        weak = torch.where(truth == 1, 4.0, -4.0).to(D)
        masked = torch.where(truth == 1, -4.0, -4.1).to(D)
        masked[:, 0] = 3.9
        batch = dataclasses.replace(batch_of(codes), truth=truth)
        counts = method.combine(weak, weak, masked, batch, epoch(4)).metrics
        assert [int(counts[n]) for n in ("selected_count", "selected_true_count", "hidden_positive_count")] == [2, 2, 2]

    def test_several_positives_and_known_negatives(self):
        codes = np.array([[1, 1, 0, -1], [-1, 1, -1, 0]])
        method = method_for(codes)
        assert method.max_positives == 2
        weak = torch.full((2, 4), 3.0, dtype=D)
        masked = weak - torch.tensor([[1.0, 2, 9, 9], [9, 3, 1, 9]], dtype=D)
        out = method.combine(weak, weak, masked, batch_of(codes), epoch(4))
        # T_gap is the mean over all three positives.
        assert method.thresholds()[0].item() == pytest.approx(2.0)
        assert int(out.metrics["selected_count"]) == 0, "3 is not above its own mean"
        out = method.combine(weak + 1, weak, masked, batch_of(codes), epoch(4))
        # Unknown entries with large gaps: (0, 3) and (1, 0); known negatives (0, 2), (1, 3) never.
        assert int(out.metrics["selected_count"]) == 2

    @pytest.mark.parametrize("preset", ["clean", "released", "calr"])
    def test_batch_of_one(self, preset):
        rig = make_rig("ignore", preset=preset)
        calls = count_calls(rig.classifier)
        loss = rig.step(rig.batch(range(1)), at(5, 0))
        assert torch.isfinite(loss) and torch.isfinite(rig.gradients()).all()
        assert bool((calls[2] == 0).all()) is (preset != "clean")

    def test_blank_batch(self):
        rig = make_rig("ignore")
        before = [b.clone() for b in rig.method.buffers()]
        loss = rig.step(rig.batch([5, 17, 23]), at(5, 0))
        assert torch.isfinite(loss) and torch.isfinite(rig.gradients()).all()
        assert all(torch.equal(a, b) for a, b in zip(before, rig.method.buffers(), strict=True))

    def test_masked_every(self):
        rig = make_rig("ignore", masked_every=3)
        calls = count_calls(rig.classifier)
        forwards, steps = [], []
        for update in range(6):
            rig.step(rig.batch(range(8)), Progress(5, 10, update, 4))
            forwards.append(len(calls))
            steps.append(rig.method.ema_steps.item())
        assert np.diff([0, *forwards]).tolist() == [3, 2, 2, 3, 2, 2]
        # A masked step stands for the three.
        assert steps == pytest.approx([1.5, 1.5, 1.5, 3, 3, 3])

    def test_masked_scale(self):
        rig = make_rig("ignore", masked_scale=0.5)
        calls = count_calls(rig.classifier)
        rig.step(rig.batch(range(4)), at(5, 0))
        assert [c.shape[-1] for c in calls] == [64, 64, 32]
        rig.classifier = Classifier(ModelConfig(backbone="test_vit", pretrained=False), 6, 160)
        rig.images = {view: torch.randn(24, 3, 160, 160) for view in rig.images}
        with pytest.raises(UserError, match="masked_scale"):
            rig.step(rig.batch(range(4)), at(5, 0))

    def test_under_autocast(self):
        rig = make_rig("ignore")
        batch = rig.batch(range(8))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = rig.method(rig.classifier, batch, at(5, 0)).loss
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(make_rig("ignore").step(batch, at(5, 0)).item(), rel=0.05)

    def test_boost_applies_to_every_view(self):
        rig = make_rig("ignore")
        with torch.no_grad():
            weak, strong, masked, batch = three_views(rig, range(8), alpha=5.0)
        rig.classifier.alpha_train = 5.0
        out = rig.copy().method(rig.classifier, batch, at(5, 0))
        torch.testing.assert_close(out.loss, rig.method.combine(weak, strong, masked, batch, at(5, 0)).loss)


class TestBatchNorm:
    """What the masked view does to BatchNorm."""

    def norms(self, mode: str) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The logits of the three views, and the running means after a step."""
        rig = make_rig("ignore", masked_bn=mode)
        rig.classifier.freeze_bn = False
        rig.classifier.train()
        outputs: list[torch.Tensor] = []
        rig.classifier.register_forward_hook(lambda module, arguments, out: outputs.append(out.logits.detach()))
        rig.step(rig.batch(range(8)), at(5, 0))
        norms = [m for m in rig.classifier.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all(m.training and m.momentum == 0.1 for m in norms)
        return outputs, torch.cat([m.running_mean for m in norms])

    def test_modes(self):
        out = {mode: self.norms(mode) for mode in ("update", "no_update", "eval")}
        assert torch.equal(out["update"][0][2], out["no_update"][0][2]), "both use the batch's statistics"
        assert not torch.equal(out["update"][0][2], out["eval"][0][2])
        assert torch.equal(out["no_update"][1], out["eval"][1]), "neither moves the running statistics"
        assert not torch.equal(out["update"][1], out["eval"][1])

    def test_frozen_statistics_stay_frozen(self):
        rig = make_rig("ignore", masked_bn="update")
        before = {k: v.clone() for k, v in rig.classifier.state_dict().items() if "running" in k}
        rig.step(rig.batch(range(8)), at(5, 0))
        after = rig.classifier.state_dict()
        assert all(torch.equal(v, after[k]) for k, v in before.items())

    def test_behaviour_is_restored_after_an_error(self):
        norm = nn.Sequential(nn.BatchNorm2d(3)).train()
        with pytest.raises(RuntimeError, match="broken"), bn_behaviour(norm, "eval"):
            raise RuntimeError("broken")
        assert norm[0].training and norm[0].momentum == 0.1


class Ranks:
    """Threads that stand for ranks: `all_reduce_sum` and `world_size` of `spml_fast.core.distributed`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self.count, self.barrier = count, threading.Barrier(count)
        self.shared: list[torch.Tensor | None] = [None] * count
        self.local = threading.local()
        monkeypatch.setattr(distributed, "world_size", lambda: count)
        monkeypatch.setattr(distributed, "all_reduce_sum", self.all_reduce_sum)

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.shared[self.local.rank] = tensor.detach()
        self.barrier.wait(20)
        total = torch.stack(self.shared).sum(0)
        self.barrier.wait(20)
        return total

    def run(self, work) -> list[object]:
        results: list[object] = [None] * self.count

        def main(rank: int) -> None:
            self.local.rank = rank
            try:
                results[rank] = work(rank)
            except BaseException as error:
                self.barrier.abort()
                results[rank] = error

        threads = [threading.Thread(target=main, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results


class TestRanks:
    """Given equal logits, thresholds, rejections, loss and gradients do not depend on how a batch is spread."""

    STEPS = 3

    def steps(self, sizes: list[int], monkeypatch: pytest.MonkeyPatch, preset: str) -> dict[str, torch.Tensor]:
        """Three steps of 16 images in shares of these sizes; everything put together again."""
        _, _, _, codes = random_case(16, 6)
        codes[5], codes[6] = -1, -1
        with monkeypatch.context() as patch:
            ranks = Ranks(patch, len(sizes))

            def work(rank: int) -> list[tuple[torch.Tensor, ...]]:
                method, found = method_for(codes, preset=preset), []
                for step in range(self.STEPS):
                    parts = [t.split(sizes)[rank].clone() for t in random_case(16, 6, seed=step)[:3]]
                    weak, strong = parts[0].requires_grad_(), parts[1].requires_grad_()
                    labels = codes.split(sizes)[rank]
                    out = method.combine(weak, strong, parts[2], batch_of(labels, 16), epoch(5))
                    # DeepSpeed averages gradients over ranks.
                    (out.loss / len(sizes)).backward()
                    gap, average = method.thresholds()
                    found.append(
                        (out.loss.detach(), weak.grad, strong.grad, out.metrics["selected_count"], gap, average)
                    )
                return found

            results = ranks.run(work)
        together = {}
        for step in range(self.STEPS):
            losses, weak, strong, counts, gaps, averages = zip(*(r[step] for r in results), strict=True)
            assert all(torch.equal(g, gaps[0]) for g in gaps) and all(torch.equal(a, averages[0]) for a in averages)
            together |= {
                f"loss{step}": torch.stack(losses).mean(),
                f"weak{step}": torch.cat(weak),
                f"strong{step}": torch.cat(strong),
                f"count{step}": torch.stack(counts).sum(),
                f"gap{step}": gaps[0],
                f"average{step}": averages[0],
            }
        return together

    @pytest.mark.parametrize("preset", ["clean", "released"])
    @pytest.mark.parametrize("sizes", [[8, 8], [4, 4, 4, 4], [1, 2, 13], [5, 2, 9]])
    def test_any_share_equals_one_rank(self, sizes, preset, monkeypatch):
        one, many = self.steps([16], monkeypatch, preset), self.steps(sizes, monkeypatch, preset)
        torch.testing.assert_close(many, one, atol=1e-12, rtol=0)
        assert one["count2"] > 0

    @pytest.mark.parametrize("sizes", [[8, 8], [4, 4, 4, 4], [7, 9]])
    @pytest.mark.parametrize("number", [3, 4])
    def test_exact_accumulation_equals_one_large_step(self, sizes, number):
        large, small = make_rig("ignore"), make_rig("ignore")
        for update in range(3):
            start = 4 * update
            wanted = large.step(large.batch(range(start, start + 16 if start < 8 else 24)), at(number, update))
            whole = len(large.batch(range(start, start + 16 if start < 8 else 24)).index)
            bounds = list(itertools.accumulate(sizes, initial=start))
            bounds[-1] = start + whole
            batches = [small.batch(range(a, b)) for a, b in itertools.pairwise(bounds)]
            with torch.no_grad():
                forwards = [small.method.statistics_forward(small.classifier, b, at(number, update)) for b in batches]
                ahead = small.method.update_statistics(forwards, batches, at(number, update))
            total = 0.0
            for batch, statistics in zip(batches, ahead, strict=True):
                batch.update_statistics = statistics
                weight = batch.global_size / whole
                loss = small.method(small.classifier, batch, at(number, update)).loss * weight
                loss.backward()
                total += loss.item()
            assert total == pytest.approx(wanted.item(), rel=1e-5)
            torch.testing.assert_close(small.gradients(), large.gradients(), rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(small.method.state_dict(), large.method.state_dict(), rtol=1e-5, atol=1e-7)

    def test_paper_groups_are_per_rank(self):
        """Batch-normalised maps depend on the share of a rank; the default does not."""
        for preset, same in (("clean", True), ("released", False)):
            rig = make_rig("ignore", preset=preset)
            calls = count_calls(rig.classifier)
            rig.step(rig.batch(range(8)), at(5, 0))
            rig.step(rig.batch(range(4)), at(5, 0))
            assert torch.allclose(calls[2][:4], calls[5], atol=1e-6) is same


class TestRuns:
    """Started as a user starts them."""

    def options(self, data: Path, run: Path, **more: object) -> list[str]:
        base: dict[str, object] = {
            "config": ROOT / "launch" / "configs" / "digits_ignore.yaml",
            "data__dir": data,
            "run__dir": run,
            "train__epochs": 1,
            "train__batch_size": 48,
            "train__precision": "fp32",
            "train__log_every": 1,
            "model__freeze_bn": "true",
            "method__warm_up": 0,
            "deepspeed__tensorboard": "false",
        }
        return [w for key, value in (base | more).items() for w in (f"--{key.replace('__', '.')}", str(value))]

    def test_two_ranks_at_stage_3_follow_one(self, small_digits: Path, run_script: Run, tmp_path: Path) -> None:
        one, two = tmp_path / "one", tmp_path / "two"
        runs = [run_script("train.py", *self.options(small_digits, one))]
        runs.append(run_script("train.py", *self.options(small_digits, two, deepspeed__zero_stage=3), ranks=2))
        assert [r.returncode for r in runs] == [0, 0], runs[0].stderr[-2000:] + runs[1].stderr[-2000:]
        ends = [read_metrics(run, "epoch")[-1] for run in (one, two)]
        assert ends[0]["loss"] == pytest.approx(ends[1]["loss"], rel=1e-4)
        assert ends[0]["t_gap"] == pytest.approx(ends[1]["t_gap"], rel=1e-3)
        assert ends[0]["selected_count"] == pytest.approx(ends[1]["selected_count"], rel=0.02)
        assert 0 < ends[0]["selection_recall"] <= 1


def test_gap_histogram_counts_every_entry_by_what_it_is() -> None:
    method = method_for(CODES, gap_histogram=True)
    batch = batch_of(CODES)
    batch.truth = torch.tensor([[1, 1, 0], [0, 1, -1]], dtype=torch.int8)
    weak, strong, masked = (torch.tensor(v, dtype=D) for v in (Z, STRONG, MASKED))
    method.combine(weak, strong, masked, batch, epoch(1))
    method.combine(weak, strong, None, batch, epoch(1))
    found = method.on_epoch_end(epoch(1))["gap_histogram"]
    edges = np.array([-np.inf, *found["edges"], np.inf])
    # Gaps by hand: observed .2 and .3, hidden 1.5, negatives .2 and .6, not known .7.
    for kind, gaps in {
        "observed_positive": [0.2, 0.3],
        "hidden_positive": [1.5],
        "negative": [0.2, 0.6],
        "not_known": [0.7],
    }.items():
        assert found[kind] == np.histogram(gaps, edges)[0].tolist(), kind
    assert json.loads(json.dumps(found)) == found
    assert sum(map(sum, (method.on_epoch_end(epoch(2))["gap_histogram"][k] for k in found if k != "edges"))) == 0


def test_copies_keep_their_own_thresholds() -> None:
    rig = make_rig("ignore")
    other = copy.deepcopy(rig)
    rig.step(rig.batch(range(8)), at(1, 0))
    assert other.method.ema_steps == 0 and rig.method.ema_steps == 0.5
