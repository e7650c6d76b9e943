"""IGNORE: the whole step, which views are made, from what and how, on any number of ranks."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from spml_fast.core.batch import Batch
from spml_fast.core.config import ModelConfig
from spml_fast.core.errors import UserError
from spml_fast.methods import Progress
from spml_fast.methods.ignore import Ignore
from spml_fast.models.batchnorm import bn_behaviour
from spml_fast.models.classifier import Classifier
from tests.support.ignore import (
    D,
    batch_of,
    count_calls,
    epoch,
    make_rig,
    method_for,
    random_case,
)
from tests.support.methods import Rig, at, on_ranks
from tests.support.paths import ROOT
from tests.support.runs import Run, read_metrics


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
        rig, other = make_rig("ignore"), make_rig("ignore")
        weak, strong, masked, batch = three_views(other, range(8))
        wanted = other.method.combine(weak, strong, masked, batch, at(5, 0))
        wanted.loss.backward()
        calls = count_calls(rig.classifier)
        out = rig.method(rig.classifier, batch, at(5, 0))
        out.loss.backward()
        assert torch.equal(calls[0], batch.views["weak"]) and torch.equal(calls[1], batch.views["strong"])
        assert len(calls) == 3 and not calls[2].requires_grad
        torch.testing.assert_close(out.loss, wanted.loss)
        # Both views teach: what either of them alone gives is another gradient.
        gradients = rig.gradients()
        torch.testing.assert_close(gradients, other.gradients(), rtol=1e-4, atol=1e-7)
        for part in (0, 1):
            alone = make_rig("ignore")
            views = list(three_views(alone, range(8))[:3])
            views[part] = views[part].detach()
            alone.method.combine(*views, batch, at(5, 0)).loss.backward()
            assert (alone.gradients() - gradients).norm() > 0.05 * gradients.norm()
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
        whole = make_rig("ignore")
        masked = count_calls(whole.classifier)
        whole.step(whole.batch(range(4)), at(5, 0))
        # The mask is made at full size; the masked picture is then made smaller as pictures are.
        smaller = nn.functional.interpolate(masked[2], (32, 32), mode="bilinear", antialias=True)
        torch.testing.assert_close(calls[2], smaller)
        rig = make_rig("ignore", masked_scale=0.001)
        calls = count_calls(rig.classifier)
        rig.step(rig.batch(range(4)), at(5, 0))
        assert [c.shape[-1] for c in calls] == [64, 64, 1], "a pixel is the least that is left"
        rig.classifier = Classifier(ModelConfig(backbone="test_vit", pretrained=False), 6, 160)
        rig.images = {view: torch.randn(24, 3, 160, 160) for view in rig.images}
        with pytest.raises(UserError, match="masked_scale"):
            rig.step(rig.batch(range(4)), at(5, 0))

    def test_a_backbone_of_one_size_takes_masked_views_of_that_size(self):
        rig = make_rig("ignore")
        rig.classifier.accepts_any_size = False
        assert torch.isfinite(rig.step(rig.batch(range(4)), at(5, 0)))

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


class TestRanks:
    """Given equal logits, thresholds, rejections, loss and gradients do not depend on how a batch is spread."""

    STEPS = 3

    def steps(self, sizes: list[int], preset: str) -> dict[str, torch.Tensor]:
        """Three steps of 16 images in shares of these sizes; everything put together again."""
        _, _, _, codes = random_case(16, 6)
        codes[5], codes[6] = -1, -1

        def work(rank: int) -> list[tuple[torch.Tensor, ...]]:
            method, steps = method_for(codes, preset=preset), []
            for step in range(self.STEPS):
                parts = [t.split(sizes)[rank].clone() for t in random_case(16, 6, seed=step)[:3]]
                weak, strong = parts[0].requires_grad_(), parts[1].requires_grad_()
                labels = codes.split(sizes)[rank]
                out = method.combine(weak, strong, parts[2], batch_of(labels, 16), epoch(5))
                # DeepSpeed averages gradients over ranks.
                (out.loss / len(sizes)).backward()
                gap, average = method.thresholds()
                steps.append((out.loss.detach(), weak.grad, strong.grad, out.metrics["selected_count"], gap, average))
            return steps

        results = on_ranks(len(sizes), work)
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
    def test_any_share_equals_one_rank(self, sizes, preset):
        one, many = self.steps([16], preset), self.steps(sizes, preset)
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
