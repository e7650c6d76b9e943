"""The Query2Label head against torch's own attention modules, its maps, and its place beside the other head."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from spml_kernels import map_mask
from torch import Tensor, nn

from spml_fast.cli.parse import parse_config
from spml_fast.core.config import Config, ModelConfig
from spml_fast.core.errors import UserError
from spml_fast.evaluation.evaluate import evaluate_split
from spml_fast.models.classifier import Classifier
from spml_fast.models.heads import MaskOptions, make_head
from spml_fast.models.heads.attention import Attention
from spml_fast.models.heads.query2label import Query2LabelHead, Query2LabelOptions, sine_position
from tests.support.paths import ROOT
from tests.support.runs import Run, read_metrics

D = torch.float64
# Of seed 0 with the options TINY: the first biases, and what the generator gives next.
GOLDEN_BIAS, GOLDEN_NEXT = (0.154488578, -0.038089875), (0.210354686, 0.735527039)
CHANNELS, CLASSES, GRID = 24, 7, (3, 5)
TINY = {"hidden": 32, "ffn": 48, "heads": 4, "dropout": 0.0}


def make(channels: int = CHANNELS, seed: int = 0, **options: object) -> Query2LabelHead:
    """A small head in fp64."""
    torch.manual_seed(seed)
    head = make_head("query2label", TINY | options, channels, CLASSES, GRID)
    assert isinstance(head, Query2LabelHead)
    with torch.no_grad():
        # Norms start as the identity and attention biases as 0, which would hide where they are applied.
        for name, parameter in head.named_parameters():
            if parameter.ndim == 1 and not name.startswith("classify"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return head.to(D)


def features(batch: int = 4, channels: int = CHANNELS, grid: tuple[int, int] = GRID) -> Tensor:
    """Non-negative features [B, h, w, K] in fp64, as after a ReLU."""
    return torch.rand(batch, *grid, channels, dtype=D, generator=torch.Generator().manual_seed(5))


def torch_attention(part: nn.Module) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """torch's multi-head attention, as a function of query, key and value, with the parameters of one of ours."""
    projections = (part.query, part.key, part.value)

    def attention(*tokens: Tensor) -> tuple[Tensor, Tensor]:
        out, weights = nn.functional.multi_head_attention_forward(
            *(t.transpose(0, 1) for t in tokens),
            part.out.in_features,
            part.heads,
            torch.cat([p.weight for p in projections]),
            torch.cat([p.bias for p in projections]),
            None,
            None,
            False,
            0.0,
            part.out.weight,
            part.out.bias,
        )
        assert weights is not None
        return out.transpose(0, 1), weights

    return attention


def slow_position(height: int, width: int, dim: int) -> Tensor:
    """The sine code written out cell by cell, [h * w, dim] fp64."""
    out, half = torch.zeros(height, width, dim, dtype=D), dim // 2
    for y, x, i in np.ndindex(height, width, half):
        period = 10000 ** (2 * (i // 2) / half)
        wave = math.sin if i % 2 == 0 else math.cos
        out[y, x, i] = wave((y + 1) / (height + 1e-6) * 2 * math.pi / period)
        out[y, x, half + i] = wave((x + 1) / (width + 1e-6) * 2 * math.pi / period)
    return out.flatten(0, 1)


def plain(head: Query2LabelHead, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, C] and the last layer's attention of all classes [B, C, L], with torch's modules and full matrices."""

    def feed(part: nn.Module, tokens: Tensor) -> Tensor:
        return part.down(torch.relu(part.up(tokens)))

    batch, height, width, _ = x.shape
    dim = head.norm.normalized_shape[0]
    tokens = head.project(x.flatten(1, 2))
    position = slow_position(height, width, dim)[None].expand(batch, -1, -1)
    for layer in head.encoder:
        attention = torch_attention(layer.attention)
        tokens = layer.norm1(tokens + attention(tokens + position, tokens + position, tokens)[0])
        tokens = layer.norm2(tokens + feed(layer.feed_forward, tokens))
    query = head.queries.weight[None].expand(batch, -1, -1)
    target = torch.zeros_like(query)
    for layer in head.decoder:
        read, weights = torch_attention(layer.attention)(target + query, tokens + position, tokens)
        target = layer.norm1(target + read)
        target = layer.norm2(target + feed(layer.feed_forward, target))
    states = head.norm(target)
    logits = torch.stack([states[:, c] @ head.classify.weight[c] + head.classify.bias[c] for c in range(CLASSES)], 1)
    return logits, weights


class TestAgainstTorch:
    @pytest.mark.parametrize("channels", [CHANNELS, 32])
    @pytest.mark.parametrize("layers", [(1, 2), (0, 1), (2, 3)])
    def test_logits_and_gradients(self, channels, layers):
        head = make(channels, encoder_layers=layers[0], decoder_layers=layers[1]).train()
        x = features(channels=channels).requires_grad_()
        logits, mean_relu, maps, masked, attention = head(x)
        assert mean_relu is None and maps is None and masked is None and attention is None
        wanted, _ = plain(head, x)
        # The position code is kept in fp32.
        torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=0)
        leaves = {"features": x, **dict(head.named_parameters())}
        upstream = wanted.detach().cos()
        ours, theirs = (torch.autograd.grad((z * upstream).sum(), list(leaves.values())) for z in (logits, wanted))
        for name, slope, exact in zip(leaves, ours, theirs, strict=True):
            torch.testing.assert_close(slope, exact, atol=2e-5, rtol=2e-5, msg=name)
            # A bias of the keys moves all weights of a query alike.
            assert name.endswith("key.bias") or slope.abs().max() > 1e-3, name

    def test_position_code(self):
        torch.testing.assert_close(sine_position(3, 5, 32).to(D), slow_position(3, 5, 32), atol=1e-6, rtol=0)
        code = sine_position(14, 14, 2048)
        assert code.shape == (196, 2048) and code.dtype == torch.float32
        angle = 2 * math.pi / (14 + 1e-6)
        assert code[0, 0].item() == pytest.approx(math.sin(angle), abs=1e-6)
        assert code[14, 0].item() == pytest.approx(math.sin(2 * angle), abs=1e-6), "y moves after a row of 14"
        assert code[1, 0] == code[0, 0] and code[1, 1024] != code[0, 1024]

    def test_order_of_tokens_matters_through_the_position_alone(self):
        head = make().eval()
        x = features()
        assert not torch.allclose(head(x)[0], head(x.flip(1))[0], atol=1e-4)
        head.position.zero_()
        torch.testing.assert_close(head(x)[0], head(x.flip(1))[0])


class TestMaps:
    CLASSES_OF_ROWS = torch.tensor([[2, 5], [0, -1], [-1, -1], [6, 6]])

    def test_factorised_map_is_the_channel_mean_of_the_product(self):
        head, x = make().eval(), features()
        _, weights = plain(head, x)
        maps = head(x, classes=self.CLASSES_OF_ROWS)[2]
        assert maps.shape == (4, 2, *GRID) and not maps.requires_grad
        for b in range(4):
            for n, c in enumerate(self.CLASSES_OF_ROWS[b].tolist()):
                product = x[b] * weights[b, c].unflatten(0, GRID)[..., None]
                wanted = product.mean(-1) if c >= 0 else torch.zeros(GRID, dtype=D)
                torch.testing.assert_close(maps[b, n], wanted, atol=1e-7, rtol=1e-5)

    def test_mask_is_the_one_of_the_map(self):
        head, x = make().eval(), features()
        images = torch.randn(4, 3, 24, 40, dtype=D)
        options = MaskOptions(0.5, "per_image", 16)
        _, _, maps, masked, _ = head(x, True, self.CLASSES_OF_ROWS, images, options)
        assert maps is None
        wanted = map_mask(head(x, classes=self.CLASSES_OF_ROWS)[2], self.CLASSES_OF_ROWS, images, 0.5)
        assert torch.equal(masked, wanted) and (masked == 0).any()
        # Without a mask, or without images to mask, there are maps.
        for given in ((images, None), (None, options)):
            _, _, maps, masked_too, _ = head(x, True, self.CLASSES_OF_ROWS, *given)
            assert masked_too is None and maps.shape == (4, 2, *GRID)
        assert torch.equal(masked[2], images[2])

    def test_map_is_free_of_dropout_noise_unless_asked(self):
        x, classes = features(), self.CLASSES_OF_ROWS
        # Dropout on the attention of one layer only: queries and keys of it are then the same in both modes.
        head = make(dropout=0.5, encoder_layers=0, decoder_layers=1)
        clean = head.eval()(x, classes=classes)[2]
        torch.testing.assert_close(head.train()(x, classes=classes)[2], clean)
        head.options = dataclasses.replace(head.options, map_dropout=True)
        noisy = head(x, classes=classes)[2]
        assert not torch.allclose(noisy, clean)
        torch.testing.assert_close(head.eval()(x, classes=classes)[2], clean)

    def test_weights_of_a_layer_are_free_of_dropout_noise_unless_asked(self):
        torch.manual_seed(0)
        layer, rows = Attention(32, 4, 0.5), torch.tensor([[0, 2]])
        query, tokens = torch.randn(1, 3, 32), torch.randn(1, 6, 32)
        clean = layer.eval()(query, tokens, tokens, rows)[1]
        assert torch.equal(layer.train()(query, tokens, tokens, rows)[1], clean)
        assert not torch.equal(layer(query, tokens, tokens, rows, True)[1], clean)

    def test_asking_for_maps_changes_neither_logits_nor_gradients(self):
        head, x = make().eval(), features().requires_grad_()
        leaves = [x, *head.parameters()]
        images, options = torch.randn(4, 3, 24, 40, dtype=D), MaskOptions(0.5, "per_image", 16)
        plain_logits = head(x)[0]
        expected = torch.autograd.grad(plain_logits.cos().sum(), leaves)
        for asked in ((), (images, options)):
            logits = head(x, True, self.CLASSES_OF_ROWS, *asked)[0]
            assert torch.equal(plain_logits, logits)
            ours = torch.autograd.grad(logits.cos().sum(), leaves)
            assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


class TestHead:
    def test_paper_size(self):
        with torch.device("meta"):
            head = Query2LabelHead(2048, 20, (14, 14), Query2LabelHead.Options())
        assert isinstance(head.project, nn.Identity)
        # 174.6 M with 20 classes and 174.9 M with 80, with the convolutions of ResNet-50 (its BatchNorm is buffers).
        count = sum(p.numel() for p in head.parameters()) + 23_454_912
        assert round(count / 1e6, 1) == 174.6 and round((count + 60 * 4097) / 1e6, 1) == 174.9

    @pytest.mark.parametrize(
        ("preset", "hidden", "ffn"), [("paper", 2048, 8192), ("small", 512, 2048), ("tiny", 128, 256)]
    )
    def test_sizes_of_the_presets(self, preset, hidden, ffn):
        with torch.device("meta"):
            head = Query2LabelHead(96, 20, (2, 2), Query2LabelOptions(preset=preset))
        assert len(head.encoder) == 1 and len(head.decoder) == 2
        for layer in (*head.encoder, *head.decoder):
            assert layer.feed_forward.up.weight.shape == (ffn, hidden) and layer.attention.heads == 4
            rates = (layer.dropout.p, layer.feed_forward.dropout.p, layer.attention.dropout)
            assert rates == (0.1, 0.1, 0.1), "as published"

    def test_initial_values(self):
        torch.manual_seed(0)
        head = make_head("query2label", {"hidden": 256, "ffn": 512}, 64, 50, GRID)
        uniform = {head.classify.weight: 1 / 16, head.classify.bias: 1 / 16}
        uniform |= {head.project.weight: 1 / 8, head.project.bias: 1 / 8}
        for layer in (*head.encoder, *head.decoder):
            attention, feed = layer.attention, layer.feed_forward
            uniform |= {p.weight: math.sqrt(6 / (256 * 4)) for p in (attention.query, attention.key, attention.value)}
            uniform |= {attention.out.weight: math.sqrt(6 / 512)}
            uniform |= {p.weight: math.sqrt(6 / 768) for p in (feed.up, feed.down)}
            uniform |= {feed.up.bias: 1 / 16, feed.down.bias: math.sqrt(1 / 512)}
            for part in (attention.query, attention.key, attention.value, attention.out):
                assert not part.bias.any()
            assert all((norm.weight == 1).all() and not norm.bias.any() for norm in (layer.norm1, layer.norm2))
        for parameter, bound in uniform.items():
            ends = parameter.min().item(), parameter.max().item()
            assert ends == pytest.approx((-bound, bound), rel=0.01 if parameter.numel() > 999 else 0.15)
            assert abs(parameter.mean().item()) < 4 * bound / math.sqrt(3 * parameter.numel())
        assert head.queries.weight.std().item() == pytest.approx(1, abs=0.05)
        assert (head.norm.weight == 1).all() and not head.norm.bias.any()
        before = {name: p.clone() for name, p in head.named_parameters()}
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.fill_(3)
        head.reset_parameters()
        for name, parameter in head.named_parameters():
            assert not (parameter == 3).any(), name
            assert torch.equal(parameter, before[name]) == (parameter.unique().numel() == 1), name

    def test_weights_are_all_that_is_saved(self):
        head = make()
        assert set(head.state_dict()) == {name for name, _ in head.named_parameters()}
        assert {name for name, _ in head.named_buffers()} == {"position", "class_ids"}

    def test_equal_seeds_start_equal(self):
        """What is drawn, and in which order, is part of a run's result."""
        torch.manual_seed(0)
        head = make_head("query2label", TINY, CHANNELS, CLASSES, GRID)
        last = torch.rand(2)
        assert head.classify.bias[:2].tolist() == pytest.approx(GOLDEN_BIAS, abs=1e-6)
        assert last.tolist() == pytest.approx(GOLDEN_NEXT, abs=1e-6)

    def test_dropout_acts_in_training_alone(self):
        head, x = make(dropout=0.3), features()
        assert not torch.equal(head.train()(x)[0], head(x)[0])
        assert torch.equal(head.eval()(x)[0], head(x)[0])

    def test_other_grid_than_configured(self):
        head = make().eval()
        for grid in ((2, 2), (2, 3)):
            x = features(grid=grid)
            torch.testing.assert_close(head(x)[0], plain(head, x)[0], atol=1e-5, rtol=0)

    def test_logits_are_fp32_under_autocast(self):
        head, x = make().float(), features().float()
        wanted = head(x, classes=TestMaps.CLASSES_OF_ROWS)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = head(x.bfloat16(), classes=TestMaps.CLASSES_OF_ROWS)
        assert output[0].dtype == output[2].dtype == torch.float32
        torch.testing.assert_close(output[0], wanted[0], atol=0.1, rtol=0.05)
        torch.testing.assert_close(output[2], wanted[2], atol=0.01, rtol=0.1)
        slopes, exact = (torch.autograd.grad(o[0].sum(), list(head.parameters())) for o in (output, wanted))
        for ours, theirs in zip(slopes, exact, strict=True):
            assert ours.dtype == torch.float32 and (ours - theirs).norm() < 0.1 * theirs.norm() + 0.05

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"hiden": 64}, "did you mean hidden"),
            ({"hidden": "wide"}, "hidden is 'wide'"),
            ({"hidden": True}, "hidden is True"),
            ({"preset": "huge"}, "preset"),
            ({"hidden": 30}, "multiple of 4"),
            ({"heads": 3, "hidden": 32}, "multiple of 4 and of heads"),
            ({"decoder_layers": 0}, "decoder_layers"),
            ({"dropout": 1.0}, "dropout"),
        ],
    )
    def test_bad_options(self, options, words):
        with pytest.raises(UserError, match=words):
            make_head("query2label", options, 64, 5, GRID)

    def test_cam_head_has_no_options(self):
        with pytest.raises(UserError, match="hidden"):
            make_head("cam", {"hidden": 64}, 64, 5, GRID)


class TestClassifier:
    CONFIG = ModelConfig(
        backbone="test_resnet", pretrained=False, output_stride=16, head="query2label", head_options={"preset": "tiny"}
    )

    def test_alpha_is_one(self):
        classifier = Classifier(self.CONFIG, 5, 64)
        assert self.CONFIG.alpha_train == 5 and classifier.alpha_train == classifier.alpha_eval == 1
        out = classifier(torch.randn(2, 3, 64, 64), alpha=classifier.alpha_train, boost=True)
        assert out.logits.shape == (2, 5) and torch.equal(out.at_alpha(1), out.logits)
        with pytest.raises(ValueError, match="alpha"):
            out.at_alpha(5)

    def test_transformer_backbone(self):
        config = ModelConfig(backbone="test_vit", pretrained=False, head="query2label", head_options=TINY)
        classifier = Classifier(config, 5, 160)
        out = classifier(torch.randn(2, 3, 160, 160), classes=torch.tensor([[1], [4]]))
        assert out.maps.shape == (2, 1, 10, 10)

    def test_frozen_parts(self):
        config = ModelConfig(**{**vars(self.CONFIG), "freeze": ["conv1.*", "layer1.*", "*bn*"], "freeze_bn": True})
        classifier = Classifier(config, 5, 64)
        classifier.freeze_backbone(True)
        classifier.freeze_backbone(False)
        for name, parameter in classifier.backbone.named_parameters():
            fixed = name.startswith(("conv1.", "layer1.")) or "bn" in name
            assert parameter.requires_grad is not fixed, name
        with pytest.raises(UserError, match=r"layer9\.\*"):
            Classifier(dataclasses.replace(config, freeze=["layer9.*"]), 5, 64)

    def test_evaluation_refuses_other_alphas(self):
        config = Config(method=None, model=self.CONFIG)
        classifier = Classifier(self.CONFIG, 5, 64)
        with pytest.raises(UserError, match="no class activation map"):
            evaluate_split(classifier, None, None, [1.0, 5.0], config, [])

    def test_command_line(self):
        words = ["--data.dir", "x", "--model.head", "query2label", "--model.head_options", '{"preset": "tiny"}']
        config = parse_config(words)
        assert config.model.head_options == Query2LabelOptions(preset="tiny")
        assert config.model.alpha_train == config.model.alpha_eval == 1
        assert parse_config([*words, "--model.head_options.heads", "8"]).model.head_options.heads == 8
        for more, word in (
            (["--model.alpha_train", "3"], "alpha_train is 3"),
            (["--eval.alphas", "[1, 5]"], "eval.alphas"),
            (["--model.head", "query3label"], "query3label"),
            (["--model.head_options", '{"hiden": 3}'], "hiden"),
        ):
            with pytest.raises(UserError, match=word):
                parse_config([*words, *more])
        assert parse_config(["--data.dir", "x"]).model.alpha_train == 5


class TestRuns:
    """Started as a user starts them."""

    def options(self, data: Path, run: Path, **more: object) -> list[str]:
        base: dict[str, object] = {
            "config": ROOT / "launch" / "configs" / "digits_q2l.yaml",
            "data__dir": data,
            "run__dir": run,
            "train__epochs": 1,
            "train__batch_size": 48,
            "train__precision": "fp32",
            "train__log_every": 1,
            "deepspeed__tensorboard": "false",
        }
        return [w for key, value in (base | more).items() for w in (f"--{key.replace('__', '.')}", str(value))]

    def test_ignore_trains_at_stage_3_and_evaluates(self, small_digits: Path, run_script: Run, tmp_path: Path) -> None:
        run, out = tmp_path / "run", tmp_path / "out.json"
        more = {"method": "ignore", "method__warm_up": 0, "deepspeed__zero_stage": 3}
        done = run_script("train.py", *self.options(small_digits, run, **more), ranks=2)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        assert read_metrics(run, "epoch")[-1]["selected_count"] > 0
        assert set(json.loads((run / "results.json").read_text())["alpha"]) == {"1"}
        done = run_script("evaluate.py", "--run", run, "--json", out)
        assert done.returncode == 0, done.stderr[-3000:]
        found, wanted = (json.loads(path.read_text())["alpha"]["1"] for path in (out, run / "results.json"))
        # One rank and two have other batches, and a transformer's products other last bits: a mean of probabilities
        # shows them, where ranks and counts do not.
        for name in ("expected_calibration_error", "expected_calibration_error_uncalibrated"):
            assert found["decisions"].pop(name) == pytest.approx(wanted["decisions"].pop(name), rel=1e-6)
        assert found == wanted
