"""Parameter groups, optimizers and schedules."""

from __future__ import annotations

import pytest
import torch

from spml_fast.core.config import ModelConfig, TrainConfig
from spml_fast.models.classifier import Classifier
from spml_fast.training import optim


@pytest.fixture(scope="module")
def classifier():
    return Classifier(ModelConfig(backbone="test_vit", pretrained=False), 5, 64)


class WithParameters(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(3, 4))
        self.scale = torch.nn.Parameter(torch.zeros(()))


def test_parameter_groups(classifier):
    train = TrainConfig(lr=0.5, head_lr_multiplier=4, weight_decay=0.1)
    method = WithParameters()
    groups = optim.parameter_groups(classifier, method, train, head_only=False)
    placed = {id(p): group for group in groups for p in group["params"]}
    everything = [*classifier.parameters(), *method.parameters()]
    assert sum(len(g["params"]) for g in groups) == len(placed) == len(everything)
    for name, parameter in [*classifier.named_parameters(), *method.named_parameters()]:
        group = placed[id(parameter)]
        assert group["lr"] == (0.5 if name.startswith("backbone.") else 2.0), name
        assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0), name
    decay_all = TrainConfig(weight_decay=0.1, decay_all=True)
    assert {g["weight_decay"] for g in optim.parameter_groups(classifier, method, decay_all, False)} == {0.1}


def test_linear_phase_trains_the_head_alone(classifier):
    method = torch.nn.Module()
    for linear_lr, expected in ((None, 2.0), (0.25, 0.25)):
        train = TrainConfig(lr=0.5, head_lr_multiplier=4, linear_lr=linear_lr)
        groups = optim.parameter_groups(classifier, method, train, head_only=True)
        assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in classifier.head.parameters()}
        assert {g["lr"] for g in groups} == {expected}
        both = optim.parameter_groups(classifier, method, train, head_only=False)
        assert {g["lr"] for g in both} == {0.5, 2.0}, "linear_lr is for the linear phase alone"


def test_there_are_no_empty_groups_and_no_frozen_parameters():
    model = Classifier(ModelConfig(backbone="test_resnet", pretrained=False), 5, 64)
    model.freeze_backbone(True)
    groups = optim.parameter_groups(model, torch.nn.Module(), TrainConfig(decay_all=True), head_only=False)
    assert len(groups) == 1 and len(groups[0]["params"]) == 2


def a_group(lr=1.0):
    return [{"params": [torch.nn.Parameter(torch.ones(2, 2))], "lr": lr, "weight_decay": 0.1}]


def test_optimizers():
    adam = optim.make_optimizer(a_group(), TrainConfig(optimizer="adam", betas=[0.8, 0.9]), fused=False)
    assert type(adam) is torch.optim.Adam and adam.param_groups[0]["betas"] == (0.8, 0.9)
    assert adam.defaults["eps"] == 1e-8
    assert type(optim.make_optimizer(a_group(), TrainConfig(optimizer="adamw"), fused=False)) is torch.optim.AdamW
    sgd = optim.make_optimizer(a_group(), TrainConfig(optimizer="sgd", momentum=0.7), fused=False)
    assert type(sgd) is torch.optim.SGD and sgd.param_groups[0]["momentum"] == 0.7
    assert sgd.param_groups[0]["weight_decay"] == 0.1


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_fused_optimizers_do_the_same(name):
    """What a GPU gets, here on the CPU; schedules change rates and beta1 of both."""
    train = TrainConfig(optimizer=name, schedule="one_cycle", lr=0.1)
    ends = []
    for fused in (False, True):
        groups = a_group(0.1)
        optimizer = optim.make_optimizer(groups, train, fused)
        assert bool(optimizer.param_groups[0]["fused"]) == fused
        schedule = optim.make_schedule(optimizer, train, 5)
        for step in range(5):
            groups[0]["params"][0].grad = torch.tensor([[1.0, -2.0], [0.5, step - 2.0]])
            optimizer.step()
            if step < 4:
                schedule.step()
        ends.append(groups[0]["params"][0].detach())
    assert not torch.allclose(ends[0], torch.ones(2, 2)) and torch.allclose(*ends, rtol=1e-5)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_all_parameters_are_updated_in_one_kernel(name):
    optimizer = optim.make_optimizer(a_group(0.1), TrainConfig(optimizer=name))
    assert optimizer.param_groups[0]["fused"] is True


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_a_run_goes_on_as_it_began(name):
    """A checkpoint brings its own way of updating, and state of another memory layout is taken over whole."""
    train = TrainConfig(optimizer=name, lr=0.1)
    torch.manual_seed(0)
    gradients = torch.randn(4, 8, 4, 3, 3)

    def start(fused, layout):
        parameter = torch.nn.Parameter(torch.ones(8, 4, 3, 3).contiguous(memory_format=layout))
        groups = [{"params": [parameter], "lr": 0.1, "weight_decay": 0.1}]
        return parameter, optim.make_optimizer(groups, train, fused)

    def steps(parameter, optimizer, gradients):
        for gradient in gradients:
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
            optimizer.step()
        return parameter.detach()

    for began in (False, True):
        for layout in (torch.contiguous_format, torch.channels_last):
            whole = steps(*start(began, layout), gradients)
            first, saved = start(began, layout)
            values = steps(first, saved, gradients[:2])
            parameter, optimizer = start(not began, torch.channels_last)
            with torch.no_grad():
                parameter.copy_(values)
            optimizer.load_state_dict(saved.state_dict())
            optim.match_layouts(optimizer)
            assert bool(optimizer.param_groups[0]["fused"]) == began
            assert torch.equal(steps(parameter, optimizer, gradients[2:]), whole)


def learning_rates(updates, peaks=(1.0,), **train):
    """Rates of each update, and the one after the last, per group."""
    train = TrainConfig(optimizer="adamw", **train)
    optimizer = optim.make_optimizer([g for lr in peaks for g in a_group(lr)], train, fused=False)
    schedule = optim.make_schedule(optimizer, train, updates)
    rates = []
    for _ in range(updates + 1):
        rates.append([g["lr"] for g in optimizer.param_groups])
        optimizer.step()
        if len(rates) <= updates:
            schedule.step()
    return torch.tensor(rates).T


def test_constant_schedule():
    assert (learning_rates(5, (1.0, 10.0), schedule="constant") == torch.tensor([[1.0], [10.0]])).all()


def test_cosine_schedule():
    rates = learning_rates(10, (1.0, 3.0), schedule="cosine", warmup_share=0.2)
    torch.testing.assert_close(rates[1], 3 * rates[0])
    torch.testing.assert_close(rates[0, :3], torch.tensor([1 / 3, 2 / 3, 1.0]))
    assert (rates[0, 2:].diff() < 0).all()
    assert rates[0, 6] == pytest.approx(0.5, abs=1e-6) and rates[0, 10] == pytest.approx(0, abs=1e-9)
    assert learning_rates(10, schedule="cosine", warmup_share=0.0)[0, 0] == 1


def test_one_cycle_schedule():
    rates = learning_rates(100, (1.0, 3.0), schedule="one_cycle", warmup_share=0.2)
    torch.testing.assert_close(rates[1], 3 * rates[0])
    assert rates[0, 0] == pytest.approx(1 / 25)
    assert rates[0].max() == pytest.approx(1, abs=2e-3) and rates[0].argmax() in (19, 20)
    # Published end points: a 25th of the peak, the peak, 4e-6 of it in the last update. Source: docs/sources.md#ignore.
    assert rates[0, 99] == pytest.approx(4e-6, rel=1e-3)


def test_one_cycle_cycles_beta1():
    """0.95, 0.85 at the peak, 0.95: the stated 0.9 is never held. Source: docs/sources.md#ignore."""
    train = TrainConfig(optimizer="adamw", schedule="one_cycle", warmup_share=0.2)
    optimizer = optim.make_optimizer(a_group(1e-5), train, fused=False)
    schedule = optim.make_schedule(optimizer, train, 100)
    found = []
    for _ in range(100):
        found.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"][0]))
        optimizer.step()
        if len(found) < 100:
            schedule.step()
    rates, betas = torch.tensor(found, dtype=torch.float64).T
    assert (betas[0], betas[-1]) == pytest.approx((0.95, 0.95)) and betas.min() == pytest.approx(0.85, abs=1e-4)
    assert betas.argmin() == rates.argmax() == 19
    assert (rates[0], rates.max(), rates[-1]) == pytest.approx((4e-7, 1e-5, 4e-11), rel=1e-3)


@pytest.mark.parametrize("updates", [1, 2, 3, 4, 5, 9, 24, 49])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("name", ["one_cycle", "cosine"])
def test_schedules_of_short_runs(name, updates, share):
    rates = learning_rates(updates, schedule=name, warmup_share=share)[0, :updates]
    assert torch.isfinite(rates).all() and (rates >= 0).all() and 0 < rates.max() <= 1 + 1e-6
    if share == 0:
        assert rates[0] == pytest.approx(1, abs=1e-4) and (rates.diff() < 0).all()
    if share == 1:
        assert rates.argmax() == updates - 1


def stepped(train, total, updates):
    """An optimizer and its schedule after so many updates."""
    optimizer = optim.make_optimizer(a_group(1e-3), train, fused=False)
    schedule = optim.make_schedule(optimizer, train, total)
    for _ in range(updates):
        optimizer.step()
        schedule.step()
    return optimizer, schedule


@pytest.mark.parametrize("old", ["constant", "cosine", "one_cycle"])
@pytest.mark.parametrize("new", ["constant", "cosine", "one_cycle"])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_resumed_run_is_where_its_own_schedule_is(name, old, new):
    """To the bit, whatever schedule, length and batch size the checkpoint had."""
    before, after = (TrainConfig(optimizer=name, schedule=s, weight_decay=w) for s, w in ((old, 0.5), (new, 0.1)))
    saved = stepped(before, 40, 30)[0].state_dict()
    optimizer, schedule = stepped(after, 20, 0)
    options = optim.schedule_options(optimizer, schedule)
    optimizer.load_state_dict(saved)
    optim.restore_schedule_options(optimizer, schedule, options, 15)
    expected = stepped(after, 20, 15)
    for number in range(5):
        for key in ("lr", "betas", "momentum", "weight_decay"):
            group, other = optimizer.param_groups[0], expected[0].param_groups[0]
            assert group.get(key) == other.get(key), (key, number)
        assert schedule.get_last_lr() == expected[1].get_last_lr()
        for part in (optimizer, schedule, *expected):
            part.step()
