"""spml_fast: fast distributed training of multi-label image classifiers from partly labelled images.

The Python API is three functions, which import what they need when they are called:

    run = spml_fast.train("digits", {"train.epochs": 2})
    predictor = spml_fast.load(run.folder)
    table = predictor.predict(["a.jpg", "photos/"])
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spml_fast.api.predictor import Predictor
    from spml_fast.api.runs import Run
    from spml_fast.core.config import Config

__version__ = "0.2.0"

__all__ = ["__version__", "load", "open_run", "train"]


def load(run_or_export: str | os.PathLike[str], device: str | None = None, decisions: bool = True) -> Predictor:
    """A trained classifier, ready for new images.

    Args:
        run_or_export: a run directory, whose best weights are taken, or what `spml-fast export` wrote: an `.onnx`
            (needs onnxruntime) or `.safetensors` file, or a folder; or `hf-hub:OWNER/NAME[@REVISION]`, a model that
            `spml-fast push` sent to the Hugging Face Hub (needs huggingface_hub).
        device: such as `cpu` or `cuda:1`; None takes the first GPU, or the CPU where there is none. ONNX models run on
            the CPU.
        decisions: take the thresholds and the calibration that the run or the export has (`spml-fast calibrate`).

    Raises:
        UserError: neither a run directory nor an export, no weights yet, thresholds that are for other weights, or a
            package that is missing.
    """
    from spml_fast.api.predictor import load_predictor

    return load_predictor(run_or_export, device, decisions)


def open_run(path: str | os.PathLike[str]) -> Run:
    """A run directory, finished or not, to look at: configuration, metrics of its epochs, results.

    Raises:
        UserError: the folder is no run directory, or its configuration cannot be read.
    """
    from spml_fast.api.runs import Run

    return Run(path)


def train(
    config: Config | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
) -> Run:
    """Train in this process, as `spml-fast train` does.

    For several GPUs start a script that calls this function with `torchrun` or `deepspeed`: every process calls it, and
    gets the same run.

    Args:
        config: a recipe: the name of a packaged one, the path of a YAML file, a dictionary of sections, or a `Config`;
            None takes what the command line takes: the embedded digit scenes or, where `overrides` names `data.dir`,
            `finetune` (`scratch` with `model.pretrained` false).
        overrides: options that win over the recipe's: a dictionary, with keys such as `train.lr` or with sections
            within it, or words such as `train.lr=1e-4`.

    Returns:
        The finished run. Given the `run.dir` of an interrupted one, it resumes.

    Raises:
        UserError: an option that does not exist or has a wrong value, or anything else that a user can put right.
    """
    from spml_fast.api.training import train_run

    return train_run(config, overrides)
