"""DeepSpeed's configuration, made from this program's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from spml_fast.core.config import EngineConfig, TrainConfig
from spml_fast.core.errors import UserError
from spml_fast.core.precision import autocast_dtype
from spml_fast.runs.layout import TENSORBOARD

OWNED_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_optimization",
    "torch_autocast",
    "bf16",
    "fp16",
    "amp",
    "optimizer",
    "scheduler",
    # How checkpoints are written and read.
    "checkpoint",
    "nebula",
    "datastates",
)

# Sections that say how DeepSpeed itself averages gradients: where one is set, it does.
AVERAGING_KEYS = (
    "communication_data_type",
    "gradient_predivide_factor",
    "prescale_gradients",
    "sparse_gradients",
)


def micro_batch_size(train: TrainConfig, world_size: int) -> int:
    """Largest number of samples that a rank gets in one forward."""
    return -(-train.batch_size // (world_size * train.accumulation))


def deepspeed_config(
    train: TrainConfig, engine: EngineConfig, world_size: int, device: torch.device, run_dir: Path
) -> dict[str, Any]:
    """DeepSpeed's configuration from ours; written to the run directory.

    Everything whose default has moved between DeepSpeed's releases is explicit: clipping (on by default since 2026),
    precision (`bf16` breaks BatchNorm models, `torch_autocast` does not), the untested-optimizer switch.

    Args:
        train: batch size, accumulation, clipping and precision.
        engine: ZeRO stage, TensorBoard and further sections.
        world_size: number of ranks.
        device: what the ranks compute on.
        run_dir: where TensorBoard's events go.

    Raises:
        UserError: `deepspeed.extra` sets a section that other options own.
    """
    owned = sorted(set(engine.extra) & set(OWNED_KEYS))
    if owned:
        raise UserError(f"deepspeed.extra may not set {', '.join(owned)}; the options under train and deepspeed do")
    autocast = autocast_dtype(train.precision, device)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size(train, world_size),
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": train.clip,
        "zero_optimization": {"stage": engine.zero_stage},
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {"enabled": autocast is not None, "dtype": "bfloat16"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if engine.tensorboard:
        config["tensorboard"] = {"enabled": True, "output_path": str(run_dir), "job_name": TENSORBOARD}
    return config | engine.extra
