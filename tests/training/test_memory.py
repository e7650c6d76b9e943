"""Running out of memory ends in a sentence that says which settings to lower."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spml_fast.core.config import Config, DataConfig, MethodOptions, ModelConfig, TrainConfig
from spml_fast.core.errors import UserError
from spml_fast.data.dali_graph import GraphOptions
from spml_fast.training.memory import explain_out_of_memory
from spml_fast.training.trainer import Trainer
from tests.support.loading import data_config, make_photos, train_loader

CPU = torch.device("cpu")
CONFIG = Config(MethodOptions("an"), DataConfig(shuffle="window"), ModelConfig(), TrainConfig(batch_size=48))


@pytest.mark.parametrize(
    "allocate",
    [lambda: torch.empty(2**55, dtype=torch.uint8), lambda: np.empty(2**55, np.uint8), lambda: bytearray(2**55)],
)
def test_memory_that_cannot_be_had(allocate):
    """Asks PyTorch, NumPy and Python for more than any machine has."""
    with (
        pytest.raises(UserError, match=r"machine's memory ran out \(.+\); lower train\.batch_size \(48\)") as caught,
        explain_out_of_memory(CONFIG, CPU),
    ):
        allocate()
    for setting in ("train.accumulation (1)", "data.image_size (448)", "eval.batch_size (64)", "data.shuffle_window"):
        assert setting in str(caught.value)


@pytest.mark.parametrize("in_threads, says", [(True, "Unable to allocate"), (False, "bad_alloc")])
def test_the_loader_says_it_too(in_threads, says, tmp_path, monkeypatch):
    """Threads, or DALI, are asked for views of more than a million pixels a side."""
    monkeypatch.setattr(GraphOptions, "in_threads", in_threads)
    loader = train_loader(make_photos(tmp_path), data_config(image_size=1500000), views=("weak",))
    with (
        pytest.raises(UserError, match=rf"memory ran out \(.*{says}.*\); lower"),
        explain_out_of_memory(CONFIG, CPU),
    ):
        next(loader.epoch(0))


def test_a_run_explains_it():
    trainer = Trainer.__new__(Trainer)
    trainer.config, trainer.device = CONFIG, CPU
    trainer._run = lambda: torch.empty(2**55, dtype=torch.uint8)
    with pytest.raises(UserError, match="lower train"):
        trainer.run()


def test_a_gpu_is_named_and_what_is_set_already_is_not_advised():
    config = Config(
        MethodOptions("an"), model=ModelConfig(grad_checkpointing=True), train=TrainConfig(precision="fp32")
    )
    with (
        pytest.raises(UserError, match=r"the memory of cuda:1 ran out .*precision bf16") as caught,
        explain_out_of_memory(config, torch.device("cuda", 1)),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    assert "grad_checkpointing" not in str(caught.value)


def test_other_errors_are_left_alone():
    with pytest.raises(RuntimeError, match="mat1 and mat2"), explain_out_of_memory(CONFIG, CPU):
        torch.ones(2, 3) @ torch.ones(2, 3)
