"""Gradients that are averaged during the backward: the same as after it, from the same collectives on every rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from spml_fast.core.errors import UserError
from spml_fast.training.gradient_buckets import ALIGNMENT, GradientBuckets, deal
from tests.conftest import Run


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape, dtype=dtype))


def numbers(buckets: list, of: list[nn.Parameter]) -> list[list[int]]:
    """The parameters of buckets, by their places in a list."""
    place = {id(p): number for number, p in enumerate(of)}
    return [[place[id(p)] for p in bucket.parameters] for bucket in buckets]


class TestDealing:
    def test_the_output_side_comes_first_and_the_last_bucket_is_small(self) -> None:
        of = [parameter(10) for _ in range(7)]
        # 40 bytes each: one fills the last bucket, two the others.
        assert numbers(deal(of, limit=80, last=40), of) == [[5, 6], [3, 4], [1, 2], [0]]

    def test_a_bucket_takes_what_begins_below_its_limit(self) -> None:
        of = [parameter(10) for _ in range(5)]
        assert numbers(deal(of, limit=81, last=1), of) == [[4], [1, 2, 3], [0]]

    def test_a_large_one_fills_its_bucket(self) -> None:
        of = [parameter(1), parameter(1000), parameter(1), parameter(1)]
        assert numbers(deal(of, limit=64, last=4), of) == [[2, 3], [1], [0]]

    def test_dtypes_are_not_mixed(self) -> None:
        of = [parameter(2), parameter(2), parameter(2, dtype=torch.float64), parameter(2)]
        assert numbers(deal(of, limit=999, last=999), of) == [[3], [2], [0, 1]]

    def test_nothing_to_deal(self) -> None:
        assert deal([], limit=8, last=8) == []

    def test_gradients_do_not_overlap_and_begin_aligned(self) -> None:
        of = [parameter(5), parameter(3, 7), parameter(ALIGNMENT), parameter(1)]
        (bucket,) = deal(of, limit=10**6, last=10**6)
        assert bucket.offsets == [0, 16, 48, 64] and bucket.size == 80
        buffer = torch.full((bucket.size,), -1.0)
        for number, view in enumerate(bucket.views(buffer)):
            assert view.shape == of[number].shape and bool((view == -1).all())
            view.fill_(number)
        assert [int((buffer == number).sum()) for number in range(-1, 4)] == [80 - 43, 5, 21, 16, 1]


class Sum:
    """What `all_reduce` of two ranks does where the other one's gradients are `factor` times these."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.events: list[str] = []

    def __call__(self, tensor: Tensor, *, async_op: bool) -> Sum:
        assert async_op
        self.events.append(f"begin {tensor.numel()}")
        self.pending = [*getattr(self, "pending", []), tensor]
        return self

    def wait(self) -> None:
        tensor = self.pending.pop(0)
        tensor.mul_(1 + self.factor)


@pytest.fixture
def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(80, 2)).to(
        memory_format=torch.channels_last
    )


def gradients(network: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in network.parameters()]


class TestAveraging:
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    def test_gradients_are_means_in_the_layout_of_their_parameters(self, network: nn.Sequential) -> None:
        expected = torch.autograd.grad(network(self.images).square().sum(), list(network.parameters()))
        buckets = GradientBuckets(network.parameters(), Sum(2.0), ranks=2, limit=400, last=400)
        assert len(buckets.buckets) > 1
        with buckets.averaged():
            network(self.images).square().sum().backward()
        for found, value, p in zip(gradients(network), expected, network.parameters(), strict=True):
            assert found is not None and found.stride() == p.stride()
            torch.testing.assert_close(found, 1.5 * value)

    def test_sums_begin_within_the_backward(self, network: nn.Sequential) -> None:
        reduce = Sum(1.0)
        buckets = GradientBuckets(network.parameters(), reduce, ranks=2, limit=1, last=1)
        network[0].register_full_backward_pre_hook(lambda *_: reduce.events.append("first layer"))
        for _ in range(2):
            reduce.events.clear()
            network.zero_grad()
            with buckets.averaged():
                network(self.images).square().sum().backward()
                meanwhile = len(reduce.events)
            assert reduce.events.index("first layer") == 4 and meanwhile == 7 == len(reduce.events)

    def test_what_the_backward_does_not_reach_is_zero_in_its_turn(self, network: nn.Sequential) -> None:
        idle = nn.Linear(3, 2)
        reduce = Sum(0.0)
        given = [*network[:3].parameters(), *idle.parameters(), *network[4].parameters()]
        buckets = GradientBuckets(given, reduce, ranks=1, limit=1, last=1)
        with buckets.averaged():
            network(self.images).square().sum().backward()
            # The head's two; behind them, in the order of all ranks, the layer that has none.
            assert len(reduce.events) == 2
        assert len(reduce.events) == len(given)
        assert idle.weight.grad is not None and not idle.weight.grad.any()

    def test_accumulated_gradients_are_averaged_once(self, network: nn.Sequential) -> None:
        expected = torch.autograd.grad(2 * network(self.images).square().sum(), list(network.parameters()))
        reduce = Sum(1.0)
        buckets = GradientBuckets(network.parameters(), reduce, ranks=2)
        network(self.images).square().sum().backward()
        assert not reduce.events
        with buckets.averaged():
            network(self.images).square().sum().backward()
        for found, value in zip(gradients(network), expected, strict=True):
            torch.testing.assert_close(found, value)

    def test_one_that_only_an_earlier_backward_reached_keeps_its_gradient(self) -> None:
        early, late = parameter(3), parameter(3)
        buckets = GradientBuckets([early, late], Sum(1.0), ranks=2, limit=1, last=1)
        early.sum().backward()
        with buckets.averaged():
            late.sum().backward()
        assert torch.equal(early.grad, torch.ones(3)) and torch.equal(late.grad, torch.ones(3))

    def test_two_uses_are_one_gradient(self) -> None:
        shared = parameter(3)
        buckets = GradientBuckets([shared], Sum(1.0), ranks=2)
        with buckets.averaged():
            (shared.sum() + (2 * shared).sum()).backward()
        assert torch.equal(shared.grad, torch.full((3,), 3.0))

    def test_a_second_gradient_is_refused(self) -> None:
        twice = parameter(3)
        buckets = GradientBuckets([twice], Sum(1.0), ranks=2)
        with (
            pytest.raises(UserError, match=r"second gradient within a backward; set deepspeed.overlap_gradients false"),
            buckets.averaged(),
        ):
            twice.sum().backward()
            twice.sum().backward()

    def test_a_part_of_a_tensor_is_refused(self) -> None:
        part = nn.Parameter(torch.zeros(4, 4)[:, :2])
        with pytest.raises(UserError, match=r"part of a larger tensor in memory; set deepspeed.overlap_gradients"):
            GradientBuckets([part], Sum(1.0), ranks=2)

    def test_a_backward_that_fails_averages_nothing_and_the_next_one_does(self, network: nn.Sequential) -> None:
        reduce = Sum(1.0)
        buckets = GradientBuckets(network.parameters(), reduce, ranks=2)
        with pytest.raises(ZeroDivisionError), buckets.averaged():
            raise ZeroDivisionError
        network(self.images).square().sum().backward()
        assert not reduce.events
        network.zero_grad()
        with buckets.averaged():
            network(self.images).square().sum().backward()
        assert len(reduce.events) == len(buckets.buckets)

    def test_frozen_parameters_take_no_part(self, network: nn.Sequential) -> None:
        network[0].requires_grad_(False)
        buckets = GradientBuckets(network.parameters(), Sum(1.0), ranks=2)
        assert sum(len(bucket.parameters) for bucket in buckets.buckets) == 4
        with buckets.averaged():
            network(self.images).square().sum().backward()
        assert network[0].weight.grad is None

    def test_closed_buckets_leave_parameters_alone(self, network: nn.Sequential) -> None:
        reduce = Sum(1.0)
        buckets = GradientBuckets(network.parameters(), reduce, ranks=2, limit=1, last=1)
        buckets.close()
        with buckets.averaged():
            network(self.images).square().sum().backward()
            assert not reduce.events

    def test_buffers_are_kept_by_gradients_alone(self, network: nn.Sequential) -> None:
        buckets = GradientBuckets(network.parameters(), Sum(1.0), ranks=2)
        with buckets.averaged():
            network(self.images).square().sum().backward()
        assert all(bucket.buffer is None and bucket.work is None for bucket in buckets.buckets)


SAME_AS_DEEPSPEED = """
import os
import sys
from pathlib import Path
import torch
from spml_fast.core.config import EngineConfig, TrainConfig
from spml_fast.training import gradient_buckets
from spml_fast.training.engine import Engine, init_distributed, shutdown_distributed
from spml_fast.training.engine_config import deepspeed_config
from spml_fast.training.optim import make_optimizer, make_schedule

device, folder = init_distributed(), Path(sys.argv[1])
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
gradient_buckets.GradientBuckets.__init__.__defaults__ = (600, 100)
torch.manual_seed(rank)
images = torch.randn(3, 2, 2, 3, 8, 8)

def trained(overlap, extra):
    torch.manual_seed(0)
    parts = [torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 5, 3), torch.nn.Conv2d(5, 2, 3), torch.nn.Linear(3, 3)]
    layers = torch.nn.ModuleList(parts)
    def forward(x):
        # One layer is reached on rank 1 alone, the last on none.
        x = layers[1](layers[0](x))
        return (layers[2](x) if rank else x).square().mean()
    layers.forward = forward
    train = TrainConfig(precision="fp32", batch_size=4 * world, accumulation=2, clip=0.5, optimizer="adamw")
    config = deepspeed_config(train, EngineConfig(tensorboard=False, extra=extra), world, device, folder)
    optimizer = make_optimizer([{"params": list(layers.parameters()), "lr": 0.1, "weight_decay": 0.1}], train, True)
    engine = Engine(layers, optimizer, make_schedule(optimizer, train, 10), config, overlap=overlap)
    found, behind, average = [], [], engine._engine.buffered_allreduce_fallback
    engine._engine.buffered_allreduce_fallback = lambda **how: behind.append(1) or average(**how)
    for update in images:
        for part in update:
            engine.backward(engine(part))
            found += [p.grad.clone() for p in layers.parameters() if p.grad is not None and engine.at_boundary]
            engine.step()
    found += [p.detach().clone() for p in layers.parameters()]
    engine.close()
    assert len(behind) == (0 if overlap and not extra else 3), behind
    return found

before = trained(False, {})
for found in (before, trained(True, {}), trained(True, {"prescale_gradients": False})):
    assert len(found) == len(before) == 4 * 8
    for one, other in zip(found, before):
        if world == 2:
            assert torch.equal(one, other)
        else:
            torch.testing.assert_close(one, other)
        others = [torch.empty_like(one.contiguous()) for _ in range(world)]
        torch.distributed.all_gather(others, one.contiguous())
        assert all(torch.equal(o, others[0]) for o in others)
print("same")
shutdown_distributed()
"""


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_same_as_deepspeeds_averages(ranks: int, run_script: Run, tmp_path: Path) -> None:
    """Bit for bit with two ranks: accumulation, clipping, layers that only some ranks reach, fused updates."""
    script = tmp_path / "same.py"
    script.write_text(SAME_AS_DEEPSPEED)
    done = run_script(script, tmp_path, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("same") >= 1
