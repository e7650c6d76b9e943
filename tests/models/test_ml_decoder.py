"""The ML-Decoder head against its formula, a query and a head at a time; its groups, maps, cost, and whole runs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from spml_kernels import map_mask
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from spml_fast.cli.parse import parse_config
from spml_fast.core.config import ModelConfig
from spml_fast.core.errors import UserError
from spml_fast.models.classifier import Classifier
from spml_fast.models.heads import MaskOptions, make_head
from spml_fast.models.heads.ml_decoder import GroupLinear, MLDecoderHead, MLDecoderOptions
from tests.support import warm
from tests.support.paths import ROOT
from tests.support.runs import Run, read_metrics

D = torch.float64
METHODS_PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
CHANNELS, GRID = 6, (2, 3)
TINY = {"hidden": 8, "ffn": 10, "heads": 2, "dropout": 0.0}
# Classes and groups, and what comes of them: queries that are computed, and classes of a group.
SHAPES = {(7, 3): (3, 3), (6, 3): (3, 2), (7, 5): (4, 2), (4, 100): (4, 1), (1, 100): (1, 1), (5, 1): (1, 5)}


def make(classes: int = 7, seed: int = 0, channels: int = CHANNELS, **options: object) -> MLDecoderHead:
    """A small head in fp64, three groups of its seven classes unless said."""
    torch.manual_seed(seed)
    head = make_head("ml_decoder", TINY | {"groups": 3} | options, channels, classes, GRID)
    assert isinstance(head, MLDecoderHead)
    with torch.no_grad():
        # Norms start as the identity and most biases as 0, which would hide where they are applied.
        for parameter in head.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return head.to(D)


def features(batch: int = 2, channels: int = CHANNELS, grid: tuple[int, int] = GRID) -> Tensor:
    """Non-negative features [B, h, w, K] in fp64, as after a ReLU."""
    return torch.rand(batch, *grid, channels, dtype=D, generator=torch.Generator().manual_seed(5))


def normalise(part: nn.Module, vector: Tensor) -> Tensor:
    """Layer norm of one vector."""
    centred = vector - vector.mean()
    return centred / (centred.square().mean() + 1e-5).sqrt() * part.weight + part.bias


def attend(part: nn.Module, query: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What one query [d] reads of tokens [L, d], head by head, and its weights [L], the mean over heads."""
    q, width = part.query.weight @ query + part.query.bias, len(query) // part.heads
    read, weights = [], []
    for head in range(part.heads):
        own = slice(head * width, (head + 1) * width)
        score = torch.stack([q[own] @ (part.key.weight @ t + part.key.bias)[own] for t in tokens])
        weight = (score / math.sqrt(width)).exp()
        weight = weight / weight.sum()
        values = [w * (part.value.weight @ t + part.value.bias)[own] for w, t in zip(weight, tokens, strict=True)]
        read.append(torch.stack(values).sum(0))
        weights.append(weight)
    return part.out.weight @ torch.cat(read) + part.out.bias, torch.stack(weights).mean(0)


def plain(head: MLDecoderHead, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, C] and attention [B, K, L], one image and one query after the other."""
    logits, attention = [], []
    for image in x:
        cells = image.flatten(0, 1)
        if isinstance(head.project, nn.Linear):
            cells = torch.stack([(head.project.weight @ cell + head.project.bias).clamp(min=0) for cell in cells])
        outputs, rows = [], []
        for number, query in enumerate(head.queries):
            state = normalise(head.norm1, query + query)
            read, weights = attend(head.attention, state, cells)
            state = normalise(head.norm2, state + read)
            feed = head.feed_forward
            hidden = (feed.up.weight @ state + feed.up.bias).clamp(min=0)
            state = normalise(head.norm3, state + feed.down.weight @ hidden + feed.down.bias)
            outputs += [state @ column for column in head.classify.weight[number].T]
            rows.append(weights)
        classes = len(head.classify.bias)
        logits.append(torch.stack(outputs[:classes]) + head.classify.bias)
        attention.append(torch.stack(rows))
    return torch.stack(logits), torch.stack(attention)


class TestAgainstTheFormula:
    @pytest.mark.parametrize(("classes", "groups"), SHAPES)
    def test_logits_and_gradients(self, classes: int, groups: int) -> None:
        self.compare(make(classes, groups=groups), features())

    @pytest.mark.parametrize("options", [{"queries": "learned"}, {"hidden": None}, {"heads": 1}, {"heads": 8}])
    def test_options(self, options: dict[str, Any]) -> None:
        head = make(**options)
        assert isinstance(head.queries, nn.Parameter) == ("queries" in options)
        assert isinstance(head.project, nn.Identity) == ("hidden" in options)
        self.compare(head, features())

    @pytest.mark.parametrize(("batch", "grid"), [(1, (1, 1)), (3, (1, 5)), (1, (4, 3))])
    def test_shapes(self, batch: int, grid: tuple[int, int]) -> None:
        self.compare(make(), features(batch, grid=grid))

    def compare(self, head: MLDecoderHead, x: Tensor) -> None:
        """Values and every gradient, in the mode of training (without dropout)."""
        x = x.requires_grad_()
        logits, mean_relu, maps, masked, attention = head.train()(x)
        assert mean_relu is None and maps is None and masked is None and attention is None
        wanted, _ = plain(head, x)
        torch.testing.assert_close(logits, wanted, atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(head.eval()(x).mean, wanted, atol=1e-12, rtol=1e-10)
        leaves = {"features": x, **dict(head.named_parameters())}
        upstream = wanted.detach().cos() + 0.5
        ours, theirs = (torch.autograd.grad((z * upstream).sum(), list(leaves.values())) for z in (logits, wanted))
        for name, slope, exact in zip(leaves, ours, theirs, strict=True):
            torch.testing.assert_close(slope, exact, atol=1e-11, rtol=1e-9, msg=name)
            # A bias of the keys moves all weights of a query alike, and one cell has all of the attention.
            if "key" not in name and "query" not in name and name != "queries":
                assert slope.abs().max() > 1e-4, name

    def test_group_layer_by_hand(self) -> None:
        layer = GroupLinear(2, 2, 3, 5)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[[1, 0, 2], [0, 1, 1]], [[2, 1, 0], [1, 1, 1]]]))
            layer.bias.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]))
        logits = layer(torch.tensor([[[1.0, 2.0], [3.0, -1.0]]]))
        assert logits[0].tolist() == pytest.approx([1.1, 2.2, 4.3, 5.4, 2.5])

    def test_attention_is_that_of_torch(self) -> None:
        """Torch's own module, so that the loops above are not alone in what they take attention for."""
        head, x = make().eval(), features(1)
        part = head.attention
        theirs = nn.MultiheadAttention(8, 2, batch_first=True, dtype=D)
        with torch.no_grad():
            theirs.in_proj_weight.copy_(torch.cat([p.weight for p in (part.query, part.key, part.value)]))
            theirs.in_proj_bias.copy_(torch.cat([p.bias for p in (part.query, part.key, part.value)]))
            theirs.out_proj.load_state_dict(part.out.state_dict())
            tokens = torch.relu(head.project(x.flatten(1, 2)))
            query = head.norm1(2 * head.queries)[None]
            read, weights = theirs(query, tokens, tokens)
        torch.testing.assert_close(read[0, 1], attend(part, query[0, 1], tokens[0])[0])
        torch.testing.assert_close(weights[0], plain(head, x)[1][0])


class TestGroups:
    @pytest.mark.parametrize(("shape", "wanted"), SHAPES.items())
    def test_sizes(self, shape: tuple[int, int], wanted: tuple[int, int]) -> None:
        head = make(shape[0], groups=shape[1])
        queries, size = wanted
        assert head.classes_per_query == size and head.queries.shape == (queries, 8)
        assert head.classify.weight.shape == (queries, 8, size) and head.classify.bias.shape == (shape[0],)

    @pytest.mark.parametrize(
        ("classes", "groups", "wanted"),
        [
            (80, 100, (80, 1)),
            (312, 100, (78, 4)),
            (9605, 100, (100, 97)),
            (9668, 100, (100, 97)),
            (150, None, (150, 1)),
            # Where adding 0.999 before cutting off would give 1.
            (2001, 2000, (1001, 2)),
        ],
    )
    def test_sizes_of_data_sets(self, classes: int, groups: int | None, wanted: tuple[int, int]) -> None:
        with torch.device("meta"):
            head = make_head("ml_decoder", {"groups": groups}, 2048, classes, (14, 14))
        assert (head.classify.weight.shape[0], head.classify.weight.shape[2]) == wanted

    def test_a_logit_is_that_of_its_group(self) -> None:
        """9,668 classes, of which no two have the same place."""
        torch.manual_seed(0)
        layer = GroupLinear(100, 4, 97, 9668).to(D)
        layer.reset_parameters(100)
        states = torch.randn(2, 100, 4, dtype=D)
        with torch.no_grad():
            layer.bias.copy_(torch.arange(9668) / 100)
            logits = layer(states)
        for c in (0, 96, 97, 98, 4849, 9602, 9603, 9667):
            exact = states[:, c // 97] @ layer.weight[c // 97, :, c % 97] + c / 100
            torch.testing.assert_close(logits[:, c], exact)
        assert logits.shape == (2, 9668)

    def test_full_decoding_does_not_depend_on_how_it_is_asked_for(self) -> None:
        x, wanted = features(), make(groups=7).eval()(features()).mean
        assert all(torch.equal(make(groups=g).eval()(x).mean, wanted) for g in (None, 8, 100))
        assert not torch.equal(make(groups=6).eval()(x).mean, wanted)

    def test_no_tensor_has_a_vector_for_each_class_of_each_image(self) -> None:
        """The point of groups: nothing of size B C d, in neither direction."""
        batch, classes, hidden = 16, 9668, 768
        # Tensors without contents, which nothing computes.
        with FakeTensorMode():
            head = make_head("ml_decoder", {}, 32, classes, (4, 4)).train()
            x = torch.zeros(batch, 4, 4, 32, requires_grad=True)
            with Largest() as largest:
                head(x, classes=torch.zeros(batch, 3, dtype=torch.int64)).mean.sum().backward()
        weights = head.classify.weight.numel()
        assert weights <= largest.numel < batch * classes * hidden / 10


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operator gives."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


class TestMaps:
    ASKED = torch.tensor([[2, 5], [0, -1], [-1, -1], [6, 3]])

    def test_a_map_is_the_attention_of_the_group_times_the_mean_feature(self) -> None:
        head, x = make().eval(), features(4)
        _, weights = plain(head, x)
        _, _, maps, masked, attention = head(x, classes=self.ASKED)
        assert masked is None and maps.shape == attention.shape == (4, 2, *GRID) and not maps.requires_grad
        for b, n in np.ndindex(4, 2):
            c = int(self.ASKED[b, n])
            row = weights[b, c // 3].unflatten(0, GRID) if c >= 0 else torch.zeros(GRID, dtype=D)
            torch.testing.assert_close(attention[b, n], row, atol=1e-12, rtol=1e-9)
            torch.testing.assert_close(maps[b, n], row * x[b].mean(-1), atol=1e-12, rtol=1e-9)
        assert torch.allclose(attention.sum((2, 3))[self.ASKED >= 0], torch.ones(5, dtype=D))

    def test_classes_of_a_group_share_a_map(self) -> None:
        asked = torch.tensor([[0, 1, 2, 3, 6]])
        first, second, third, other, last = make().eval()(features(1), classes=asked).maps[0]
        assert torch.equal(first, second) and torch.equal(first, third)
        assert not torch.allclose(first, other) and not torch.allclose(other, last)
        alone = make(groups=None).eval()(features(1), classes=asked[:, :2]).maps[0]
        assert not torch.allclose(alone[0], alone[1])

    def test_mask_is_the_one_of_the_map(self) -> None:
        head, x = make().eval(), features(4)
        images, options = torch.randn(4, 3, 24, 36, dtype=D), MaskOptions(0.5, "per_image", 16)
        _, _, maps, masked, _ = head(x, True, self.ASKED, images, options)
        assert maps is None
        wanted = map_mask(head(x, classes=self.ASKED).maps, self.ASKED, images, 0.5)
        assert torch.equal(masked, wanted) and (masked == 0).any() and torch.equal(masked[2], images[2])

    def test_maps_are_free_of_attention_noise_unless_asked(self) -> None:
        x, asked = features(4), self.ASKED
        head = make(dropout=0.5).train()
        # Noise of the queries is no part of this; it would move the attention as well.
        head.dropout.p = 0.0
        clean = head(x, classes=asked).maps
        assert torch.equal(head(x, classes=asked).maps, clean)
        head.options = MLDecoderOptions(**{**vars(head.options), "map_dropout": True})
        assert not torch.allclose(head(x, classes=asked).maps, clean)
        torch.testing.assert_close(head.eval()(x, classes=asked).maps, clean)

    def test_asking_for_maps_changes_neither_logits_nor_gradients(self) -> None:
        head, x = make(queries="learned").eval(), features(4).requires_grad_()
        leaves = [x, *head.parameters()]
        images, options = torch.randn(4, 3, 24, 36, dtype=D), MaskOptions(0.5, "per_image", 16)
        logits = head(x).mean
        expected = torch.autograd.grad(logits.cos().sum(), leaves)
        for more in ((), (images, options)):
            again = head(x, True, self.ASKED, *more).mean
            assert torch.equal(logits, again)
            ours = torch.autograd.grad(again.cos().sum(), leaves)
            assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def size_and_cost(name: str, options: dict[str, Any], classes: int) -> tuple[int, float]:
    """A head's trained parameters, and billions of products of an image: ResNet-50 at 448 px has 14 x 14 cells."""
    # The counter does not know fused attention on CPUs; nothing is computed.
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        head = make_head(name, options, 2048, classes, (14, 14)).eval()
        head(torch.zeros(1, 14, 14, 2048))
    return sum(p.numel() for p in head.parameters()), counter.get_total_flops() / 2e9


class TestHead:
    @pytest.mark.parametrize(
        ("classes", "options", "parameters", "products"),
        [
            (20, {}, 7_104_532, 0.632),
            (80, {}, 7_150_672, 0.910),
            (5000, {}, 10_934_152, 1.006),
            (9605, {}, 14_548_357, 1.010),
            (80, {"queries": "learned"}, 7_150_672 + 80 * 768, 0.910),
            # Of 100 queries of 4 classes each, 78 are enough: 22 x 768 x 4 weights fewer than in the release.
            (312, {}, 7_396_664 - 22 * 768 * 4, 0.900),
        ],
    )
    def test_size_and_cost(self, classes: int, options: dict[str, Any], parameters: int, products: float) -> None:
        found = size_and_cost("ml_decoder", options, classes)
        assert found[0] == parameters and found[1] == pytest.approx(products, abs=6e-4)

    @pytest.mark.parametrize("name", ["ml_decoder", "query2label"])
    def test_the_documented_table_of_heads(self, name: str) -> None:
        cells = []
        for classes in (80, 9605):
            parameters, products = size_and_cost(name, {}, classes)
            cells.append(f"{parameters / 1e6:.3g} M, {products:.3g} G")
        (row,) = (line for line in METHODS_PAGE.splitlines() if line.startswith(f"| `{name}` | read off"))
        assert row.endswith(f" | {cells[0]} | {cells[1]} |")

    def test_initial_values(self) -> None:
        torch.manual_seed(0)
        head = make_head("ml_decoder", {"hidden": 256, "ffn": 512, "groups": 30}, 64, 100, GRID)
        assert isinstance(head, MLDecoderHead)
        attention, feed = head.attention, head.feed_forward
        uniform = {p.weight: math.sqrt(6 / (256 * 4)) for p in (attention.query, attention.key, attention.value)}
        uniform |= {attention.out.weight: 1 / 16, feed.up.weight: 1 / 16, feed.up.bias: 1 / 16}
        uniform |= {feed.down.weight: 1 / math.sqrt(512), feed.down.bias: 1 / math.sqrt(512)}
        uniform |= {head.project.weight: 1 / 8, head.project.bias: 1 / 8}
        for parameter, bound in uniform.items():
            ends = parameter.min().item(), parameter.max().item()
            assert ends == pytest.approx((-bound, bound), rel=0.03)
            assert abs(parameter.mean().item()) < 4 * bound / math.sqrt(3 * parameter.numel())
        parts = (attention.query, attention.key, attention.value, attention.out, head.classify)
        assert not any(part.bias.any() for part in parts)
        # 300 groups of 4 classes, of which 250 are used: the spread is that of all.
        wide = make_head("ml_decoder", {"hidden": 16, "ffn": 16, "groups": 300}, 64, 1000, GRID)
        spread = wide.get_parameter("classify.weight").std().item()
        assert spread == pytest.approx(math.sqrt(2 / ((16 + 300) * 4)), rel=0.03)
        assert head.queries.std().item() == pytest.approx(1, abs=0.03) and abs(head.queries.mean().item()) < 0.05
        assert all((n.weight == 1).all() and not n.bias.any() for n in (head.norm1, head.norm2, head.norm3))

    def test_drawing_anew_leaves_nothing(self) -> None:
        head = make(queries="learned")
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.fill_(3)
        head.reset_parameters()
        assert not any((parameter == 3).any() for parameter in head.parameters())
        fixed = make()
        fixed.queries.fill_(3)
        fixed.reset_parameters()
        assert not (fixed.queries == 3).any()

    def test_fixed_queries_are_saved_and_not_trained(self) -> None:
        fixed, learned = make(), make(queries="learned")
        assert fixed.state_dict().keys() == learned.state_dict().keys()
        names = {name for name, _ in fixed.named_parameters()}
        assert set(fixed.state_dict()) - names == {"queries"}
        other = make(seed=1).eval()
        assert not torch.allclose(other(features()).mean, fixed.eval()(features()).mean)
        other.load_state_dict(fixed.state_dict())
        assert torch.equal(other(features()).mean, fixed(features()).mean)
        assert learned.eval()(features()).mean.requires_grad
        (slope,) = torch.autograd.grad(learned(features()).mean.cos().sum(), [learned.queries])
        assert slope.abs().max() > 1e-4

    def test_dropout_acts_in_training_alone(self) -> None:
        head, x = make(dropout=0.3), features(1).expand(2, -1, -1, -1)
        first, second = head.train()(x).mean
        assert not torch.equal(first, second), "each image has its own noise"
        assert torch.equal(head.eval()(x).mean, head(x).mean)
        rates = (head.dropout.p, head.feed_forward.dropout.p, head.attention.dropout)
        assert rates == (0.3, 0.3, 0.3)
        # The queries too, whatever is read with them.
        with torch.no_grad():
            for part in (head.attention.out, head.feed_forward.down):
                part.weight.zero_()
                part.bias.zero_()
        first, second = head.train()(x).mean
        assert not torch.equal(first, second)

    def test_everything_that_is_added_passes_dropout(self) -> None:
        """With all of it dropped, what is left of a query is its norms, whatever the image."""
        head, x = make().train(), features()
        head.dropout.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
        states = head.norm3(head.norm2(head.norm1(head.queries)))[None]
        torch.testing.assert_close(head(x).mean, head.classify(states).expand(2, -1))

    def test_defaults_are_the_papers(self) -> None:
        o = MLDecoderOptions()
        assert (o.groups, o.queries, o.hidden, o.ffn, o.heads, o.dropout) == (100, "fixed", 768, 2048, 8, 0.1)

    def test_logits_are_fp32_under_autocast(self) -> None:
        head, x = make(hidden=32, ffn=48).float(), features(4).float()
        wanted = head(x, classes=TestMaps.ASKED)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = head(x.bfloat16(), classes=TestMaps.ASKED)
        assert output.mean.dtype == output.maps.dtype == torch.float32
        torch.testing.assert_close(output.mean, wanted.mean, atol=0.1, rtol=0.05)
        torch.testing.assert_close(output.maps, wanted.maps, atol=0.01, rtol=0.1)
        # The group-wise layer itself computes in fp32.
        states = torch.randn(2, 3, 32)
        exact_logits = head.classify(states)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(head.classify(states), exact_logits)
        slopes, exact = (torch.autograd.grad(o.mean.sum(), list(head.parameters())) for o in (output, wanted))
        for ours, theirs in zip(slopes, exact, strict=True):
            assert ours.dtype == torch.float32 and (ours - theirs).norm() < 0.1 * theirs.norm() + 0.05

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"group": 64}, "did you mean groups"),
            ({"queries": "random"}, "queries is 'random'"),
            ({"hidden": "wide"}, "hidden is 'wide'"),
            ({"groups": 0}, "groups is 0; it must be at least 1"),
            ({"ffn": 0}, "ffn is 0; it must be at least 1"),
            ({"heads": 0}, "heads is 0; it must be at least 1"),
            ({"hidden": 0}, "hidden is 0; it must be at least 1"),
            ({"hidden": 30}, r"hidden is 30; it must be a multiple of model.head_options.heads \(8\)"),
            ({"hidden": None, "heads": 7}, r"the backbone's width is 64; it must be a multiple"),
            ({"dropout": 1.0}, r"dropout is 1.0; it must lie in \[0, 1\)"),
            ({"dropout": -0.1}, "dropout is -0.1"),
        ],
    )
    def test_bad_options(self, options: dict[str, Any], words: str) -> None:
        with pytest.raises(UserError, match=words):
            make_head("ml_decoder", options, 64, 5, GRID)


class TestClassifier:
    def test_alpha_is_one(self) -> None:
        config = ModelConfig(backbone="test_resnet", pretrained=False, head="ml_decoder", head_options=TINY)
        classifier = Classifier(config, 5, 64)
        assert config.alpha_train == 5 and classifier.alpha_train == classifier.alpha_eval == 1
        out = classifier(torch.randn(2, 3, 64, 64), alpha=1, boost=True)
        assert out.logits.shape == (2, 5) and torch.equal(out.at_alpha(1), out.logits)
        with pytest.raises(ValueError, match="alpha"):
            out.at_alpha(5)

    def test_transformer_backbone(self) -> None:
        config = ModelConfig(
            backbone="test_vit", pretrained=False, head="ml_decoder", head_options={"hidden": None, "groups": 2}
        )
        classifier = Classifier(config, 5, 160)
        out = classifier(torch.randn(2, 3, 160, 160), classes=torch.tensor([[1], [4]]))
        assert out.maps is not None and out.maps.shape == (2, 1, 10, 10)

    def test_command_line(self) -> None:
        words = ["--data.dir", "x", "--model.head", "ml_decoder", "--model.head_options", "{groups: 7}"]
        config = parse_config([*words, "--model.head_options.queries", "learned"])
        assert config.model.head_options == MLDecoderOptions(groups=7, queries="learned")
        assert config.model.alpha_train == config.model.alpha_eval == 1
        full = parse_config([*words[:4], "--model.head_options.groups", "null"]).model.head_options
        assert full == MLDecoderOptions(groups=None)
        recipe = ["--config", "openimages_v6_an", *words, "--eval.alphas", "null"]
        assert parse_config(recipe).model.alpha_train == 1
        for more, word in ((["--model.alpha_train", "3"], "alpha_train is 3"), (["--eval.alphas", "[1, 5]"], "alphas")):
            with pytest.raises(UserError, match=word):
                parse_config([*words, *more])


class TestRuns:
    """Started as a user starts them."""

    OPTIONS: ClassVar[dict[str, object]] = {
        "config": ROOT / "launch" / "configs" / "digits_q2l.yaml",
        "model__head": "ml_decoder",
        "model__head_options": "{groups: 4, hidden: 64, ffn: 64}",
        "train__batch_size": 48,
        "train__log_every": 1,
        "deepspeed__tensorboard": "false",
    }

    def words(self, data: Path, run: Path, **more: object) -> list[str]:
        given = {**self.OPTIONS, "data__dir": data, "run__dir": run, **more}
        return [w for key, value in given.items() for w in (f"--{key.replace('__', '.')}", str(value))]

    @pytest.fixture(scope="class")
    def finished(self, small_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
        """Two epochs of assumed negatives with a moving average."""
        run = tmp_path_factory.mktemp("whole") / "run"
        more = {"method": "an", "train__epochs": 2, "train__ema_decay": 0.9, "train__schedule": "constant"}
        done = warm.run_script("train.py", *self.words(small_digits, run, **more))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        yield run

    def test_resumes_bit_for_bit(self, finished: Path, small_digits: Path, run_script: Run, tmp_path: Path) -> None:
        run = tmp_path / "cut"
        more = {"method": "an", "train__ema_decay": 0.9, "train__schedule": "constant"}
        for epochs in (1, 2):
            done = run_script("train.py", *self.words(small_digits, run, train__epochs=epochs, **more))
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        assert "resuming at epoch 2" in done.stdout
        first, second = (load_file(folder / "model.safetensors") for folder in (finished, run))
        assert "head.queries" in first and first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
        losses = [[e["loss"] for e in read_metrics(folder, "epoch")] for folder in (finished, run)]
        assert losses[0] == losses[1] and losses[0][1] < losses[0][0]

    def test_explains(self, finished: Path, run_script: Run, tmp_path: Path) -> None:
        words = ["--split", "test", "--count", 2, "--top", 3, "--maps", tmp_path / "maps"]
        done = run_script("explain.py", "--run", finished, *words, "--out", tmp_path / "page.png")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        maps = json.loads((tmp_path / "maps" / "maps.json").read_text())["maps"]
        assert len(maps) == 6 and {m["kind"] for m in maps} == {"attention"}
        assert np.load(tmp_path / "maps" / maps[0]["file"]).sum() == pytest.approx(1, abs=1e-5)
        assert (tmp_path / "page.png").stat().st_size > 10_000

    def test_ignore_trains_at_stage_3_and_evaluates(self, small_digits: Path, run_script: Run, tmp_path: Path) -> None:
        run, out = tmp_path / "run", tmp_path / "out.json"
        more = {"method": "ignore", "method__warm_up": 0, "train__epochs": 1, "deepspeed__zero_stage": 3}
        more["model__head_options.queries"] = "learned"
        done = run_script("train.py", *self.words(small_digits, run, **more), ranks=2)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        assert read_metrics(run, "epoch")[-1]["selected_count"] > 0
        assert set(json.loads((run / "results.json").read_text())["alpha"]) == {"1"}
        done = run_script("evaluate.py", "--run", run, "--json", out)
        assert done.returncode == 0, done.stderr[-3000:]
        found, wanted = (json.loads(path.read_text())["alpha"]["1"]["map"] for path in (out, run / "results.json"))
        assert found == pytest.approx(wanted, rel=1e-6)
