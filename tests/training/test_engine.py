"""DeepSpeed's configuration, and what is used of it though it is private."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spml_fast.core import precision
from spml_fast.core.config import EngineConfig, TrainConfig
from spml_fast.core.errors import UserError
from spml_fast.training import engine
from spml_fast.training.engine_config import OWNED_KEYS, deepspeed_config, micro_batch_size

CPU = torch.device("cpu")


def configured(train=None, engine_config=None, world_size=2):
    return deepspeed_config(
        TrainConfig(**(train or {"precision": "fp32"})),
        EngineConfig(**(engine_config or {})),
        world_size,
        CPU,
        Path("runs/x"),
    )


def test_whole_configuration():
    train = {"batch_size": 24, "accumulation": 3, "clip": 1.5, "precision": "bf16"}
    assert configured(train, {"zero_stage": 1}) == {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 1.5,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        "tensorboard": {"enabled": True, "output_path": "runs/x", "job_name": "tensorboard"},
    }


def test_clipping_is_always_written():
    """DeepSpeed's own default has become 1.0."""
    assert configured()["gradient_clipping"] == 0.0


def test_precision_never_turns_parameters_into_bf16():
    for name, on in (("fp32", False), ("bf16", True)):
        config = configured({"precision": name})
        assert config["torch_autocast"]["enabled"] is on
        assert not {"bf16", "fp16", "amp", "optimizer", "scheduler"} & set(config)


@pytest.mark.parametrize("able", [True, False])
def test_automatic_precision_asks_the_hardware(monkeypatch, able):
    monkeypatch.setattr(precision, "prefers_bf16", lambda device: able)
    assert configured({"precision": "auto"})["torch_autocast"]["enabled"] is able


@pytest.mark.parametrize("key", OWNED_KEYS)
def test_owned_sections_are_refused(key):
    with pytest.raises(UserError, match=f"deepspeed.extra may not set {key};"):
        configured(engine_config={"extra": {key: {}, "wandb": {}}})


def test_other_sections_pass_through():
    extra = {"wandb": {"enabled": True, "project": "p"}, "comms_logger": {"enabled": True}, "steps_per_print": 5}
    config = configured(engine_config={"extra": extra, "tensorboard": False})
    assert extra.items() <= config.items() and "tensorboard" not in config


@pytest.mark.parametrize(
    ("batch", "world", "accumulation", "expected"),
    [(16, 1, 1, 16), (16, 4, 1, 4), (10, 4, 1, 3), (10, 2, 3, 2), (3, 3, 1, 1)],
)
def test_micro_batch_size(batch, world, accumulation, expected):
    assert micro_batch_size(TrainConfig(batch_size=batch, accumulation=accumulation), world) == expected


def test_deepspeed_still_has_what_is_used():
    """The switch that keeps its optional C++ build off machines without a GPU."""
    code = (
        "from spml_fast.training.cluster import set_environment; set_environment()\n"
        "import deepspeed\n"
        "assert 'deepspeed_shm_comm' in deepspeed.ops.__compatible_ops__\n"
        "assert callable(deepspeed.initialize) and callable(deepspeed.init_distributed)\n"
        "assert callable(deepspeed.zero.GatheredParameters)\n"
        "engine = deepspeed.DeepSpeedEngine\n"
        "assert callable(engine.wall_clock_breakdown) and callable(engine.flops_profiler_enabled)\n"
        "import inspect\n"
        "assert 'if self.enable_backward_allreduce' in inspect.getsource(deepspeed.DeepSpeedEngine)\n"
    )
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def logger(monkeypatch):
    """A logger as DeepSpeed makes its own when it is imported."""
    logger = logging.Logger("DeepSpeed of a test", logging.WARNING)
    handler = logging.StreamHandler(sys.stdout)
    handler.setLevel(logging.WARNING)
    logger.addHandler(handler)
    monkeypatch.setattr(engine, "_LOGGER", logger)
    engine._log_level.cache_clear()
    yield logger
    engine._log_level.cache_clear()


@pytest.mark.parametrize(
    ("level", "shown"),
    [(None, ["e"]), ("", ["e"]), ("WARNING", ["w", "e"]), ("info", ["i", "w", "e"]), ("debug", ["d", "i", "w", "e"])],
)
def test_what_deepspeed_logs(logger, level, shown, monkeypatch, capsys):
    monkeypatch.delenv("SPML_DEEPSPEED_LOG", raising=False)
    if level is not None:
        monkeypatch.setenv("SPML_DEEPSPEED_LOG", level)
    logger.handlers[0].stream = sys.stdout
    engine._deepspeed()
    for name, say in (("d", logger.debug), ("i", logger.info), ("w", logger.warning), ("e", logger.error)):
        say(name)
    assert capsys.readouterr().out.split() == shown


def test_deepspeed_may_not_raise_its_voice_again(logger, monkeypatch, capsys):
    """Some of its releases set the level of their logger when an engine is made."""
    monkeypatch.delenv("SPML_DEEPSPEED_LOG", raising=False)
    logger.handlers[0].stream = sys.stdout
    engine._deepspeed()
    logger.setLevel(logging.DEBUG)
    logger.handlers[0].setLevel(logging.DEBUG)
    logger.warning("settings")
    assert capsys.readouterr().out == ""


def test_a_level_that_does_not_exist(logger, monkeypatch):
    monkeypatch.setenv("SPML_DEEPSPEED_LOG", "loud")
    with pytest.raises(UserError, match="SPML_DEEPSPEED_LOG is 'loud'; it must be debug, info, warning or error"):
        engine._deepspeed()


ONE_RANK = """
import gc, sys, weakref
from pathlib import Path
import torch
from spml_fast.core.config import EngineConfig, TrainConfig
from spml_fast.training.engine import Engine, init_distributed, shutdown_distributed
from spml_fast.training.engine_config import deepspeed_config
from spml_fast.training.optim import make_optimizer, make_schedule

device = init_distributed()
torch.manual_seed(0)
layers = torch.nn.ModuleDict({"used": torch.nn.Conv2d(3, 4, 3), "idle": torch.nn.Conv2d(4, 4, 3)})
layers.forward = lambda images: layers["used"](images).square().mean()
train = TrainConfig(precision="fp32", batch_size=4, accumulation=2, optimizer="adamw")
config = deepspeed_config(train, EngineConfig(tensorboard=False), 1, device, Path(sys.argv[1]))
groups = [{"params": list(layers.parameters()), "lr": 0.1, "weight_decay": 0.5}]
optimizer = make_optimizer(groups, train, fused=True)
engine = Engine(layers, optimizer, make_schedule(optimizer, train, 10), config)
copies = []
engine._engine.buffered_allreduce_fallback = lambda **_: copies.append(1)

images = torch.randn(2, 2, 3, 8, 8)
used, idle = layers["used"].weight, layers["idle"].weight
expected = torch.autograd.grad(sum(layers(part) for part in images) / 2, used)[0]
before = idle.detach().clone()
for number, part in enumerate(images):
    engine.backward(engine(part))
    assert (idle.grad is None) == (number == 0)
    if number:
        torch.testing.assert_close(used.grad, expected)
        assert idle.grad.stride() == idle.stride() and not idle.grad.any()
    engine.step()
assert not copies
torch.testing.assert_close(idle.detach(), before * (1 - 0.1 * 0.5))

gc.disable()
state = weakref.ref(optimizer.state[used]["exp_avg"])
# DeepSpeed's hooks on a module keep its engine; in a training each phase has a module of its own.
del optimizer, layers
assert state() is not None
engine.close()
assert state() is None, "the next phase has its own"
shutdown_distributed()
"""


def test_one_rank_averages_nothing(run_script, tmp_path):
    """No gradient is copied, and parameters without one are updated all the same, as on several ranks."""
    script = tmp_path / "one_rank.py"
    script.write_text(ONE_RANK)
    done = run_script(script, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


OTHER_FORM = """
import sys
from pathlib import Path
import torch
from spml_fast.core.config import EngineConfig, TrainConfig
from spml_fast.training.engine import Engine, init_distributed, shutdown_distributed
from spml_fast.training.engine_config import deepspeed_config
from spml_fast.training.optim import make_optimizer, make_schedule

device, folder, stage = init_distributed(), Path(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(1)
images = torch.randn(6, 4, 3, 8, 8)

def start(fused):
    torch.manual_seed(0)
    layers = torch.nn.ModuleList([torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 3)])
    layers.forward = lambda x: layers[1](layers[0](x)).square().mean()
    train = TrainConfig(precision="fp32", batch_size=4, optimizer="adamw")
    config = deepspeed_config(train, EngineConfig(tensorboard=False, zero_stage=stage), 1, device, folder)
    optimizer = make_optimizer([{"params": list(layers.parameters()), "lr": 0.1, "weight_decay": 0.1}], train, fused)
    return Engine(layers, optimizer, make_schedule(optimizer, train, 10), config)

def end(engine, parts):
    for part in parts:
        engine.backward(engine(part))
        engine.step()
    with engine.gathered_parameters():
        return [p.detach().clone() for p in engine.module.parameters()]

for began in (False, True):
    whole = end(start(began), images)
    first = start(began)
    end(first, images[:3])
    first.save(folder, f"began-{began}", {})
    other = start(not began)
    other.load(folder, f"began-{began}")
    other.place_schedule(3)
    assert all(map(torch.equal, end(other, images[3:]), whole))
shutdown_distributed()
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_run_without_fused_updates_is_resumed_with_them(stage, run_script, tmp_path):
    """And the other way round: the checkpoint brings its own way, and the run ends bit for bit where it would have."""
    script = tmp_path / "other_form.py"
    script.write_text(OTHER_FORM)
    done = run_script(script, tmp_path, stage)
    assert done.returncode == 0, done.stdout + done.stderr
