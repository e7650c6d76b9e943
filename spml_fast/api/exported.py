"""Models that `spml-fast export` wrote, opened again: ONNX graphs and safetensors."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from spml_fast.core.config import Config, DataConfig, ModelConfig, TrainConfig
from spml_fast.core.errors import UserError
from spml_fast.core.text import parse_json
from spml_fast.evaluation.decisions import Decisions, decisions_of_metadata
from spml_fast.methods import get_method, method_names
from spml_fast.models.classifier import Classifier
from spml_fast.models.heads import head_names
from spml_fast.models.heads.base import head_options
from spml_fast.runs.options import DEFAULT_METHOD

AGAIN = "export the run again"


@dataclass
class OnnxOutput:
    """What an ONNX model gives, as `Classifier` gives it.

    Attributes:
        mean: fp32 [B, C], logits at the graph's own alpha.
        mean_relu: None; the factor is part of the graph.
    """

    mean: Tensor
    mean_relu: Tensor | None = None

    def at_alpha(self, alpha: float) -> Tensor:
        """The logits; `alpha` 1 stands for the graph's own."""
        if alpha != 1:
            raise ValueError("alpha is fixed in an ONNX graph")
        return self.mean


class _OnnxHead:
    """What evaluation asks of a head."""

    supports_boostlu = False


class OnnxClassifier(nn.Module):
    """An ONNX Runtime session in the place of a `Classifier`.

    Args:
        session: of a model with input `images` and output `logits`.
    """

    def __init__(self, session: Any) -> None:
        super().__init__()
        self.session = session
        self.head = _OnnxHead()

    def input_normalisation(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation that leave the values at 0 to 255; the graph normalises by itself."""
        return [0.0] * 3, [1 / 255] * 3

    def forward(self, images: Tensor, alpha: float = 1.0, boost: bool | None = None) -> OnnxOutput:
        """Logits of images [B, 3, S, S], fp32 with values 0 to 255; `alpha` 1 stands for the graph's own."""
        values = images.round().clamp(0, 255).contiguous(memory_format=torch.contiguous_format).cpu().numpy()
        return OnnxOutput(torch.from_numpy(self.session.run(["logits"], {"images": values})[0]))


def _config(about: Mapping[str, str], path: Path, normalised: bool) -> Config:
    """The configuration that an export's metadata describe.

    Args:
        about: the metadata.
        path: the file, for messages.
        normalised: whether the model takes normalised images.
    """
    lacking = [name for name in ("classes", "image_size", "mean", "std", "backbone", "head") if name not in about]
    if lacking:
        raise UserError(
            f"{path} is no export of spml_fast (its metadata lack {', '.join(lacking)}); give a run directory, or a "
            "file that `spml-fast export` wrote"
        )
    method = about["method"] if about.get("method") in method_names() else DEFAULT_METHOD
    # As the run computes. Others who use an export that does not say compute in fp32, whatever the machine prefers.
    precision = about.get("precision", "fp32")
    try:
        mean, std = (parse_json(about[name]) if normalised else None for name in ("mean", "std"))
        alpha = float(about.get("alpha", 1))
        data = DataConfig(image_size=int(about["image_size"]), mean=mean, std=std)
        if precision not in get_args(get_type_hints(TrainConfig)["precision"]):
            raise ValueError(f"precision {precision!r}")
        train = TrainConfig(precision=precision)  # type: ignore[arg-type]
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{path} has damaged metadata ({error}); {AGAIN}") from error
    return Config(
        method=get_method(method).Options(name=method),
        data=data,
        train=train,
        model=ModelConfig(backbone=about["backbone"], pretrained=False, alpha_train=alpha, alpha_eval=alpha),
    )


def _classes(about: Mapping[str, str], path: Path) -> list[str]:
    """Class names of an export."""
    try:
        classes = parse_json(about["classes"])
    except ValueError as error:
        raise UserError(f"{path} has damaged metadata ({error}); {AGAIN}") from error
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{path} has damaged metadata (its classes are no list of names); {AGAIN}")
    return classes


def _options(about: Mapping[str, str], name: str, path: Path) -> dict[str, Any]:
    """Options by name that stand in an export's metadata; none where it has none."""
    try:
        options = parse_json(about.get(name, "{}"))
    except ValueError as error:
        raise UserError(f"{path} has damaged metadata ({name}: {error}); {AGAIN}") from error
    if not isinstance(options, dict):
        raise UserError(f"{path} has damaged metadata ({name} are no options by name); {AGAIN}")
    return options


def _decisions(about: Mapping[str, str], path: Path, classes: list[str]) -> Decisions | None:
    """Thresholds and calibration of an export; None where it has none."""
    try:
        return decisions_of_metadata(about, len(classes))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} has damaged thresholds ({error}); export the run again") from error


def load_onnx(path: Path) -> tuple[Config, list[str], OnnxClassifier, Decisions | None]:
    """Configuration, class names, classifier and decisions of an ONNX export.

    Raises:
        UserError: onnxruntime is not installed, or the file is no export.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise UserError(f"{path} needs onnxruntime, which is not installed; run pip install 'spml_fast[onnx]' first")
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        # The classes of their errors are not public.
        raise UserError(f"{path} is no ONNX model that can be run: {' '.join(str(error).split())}") from error
    about = session.get_modelmeta().custom_metadata_map
    config = _config(about, path, normalised=False)
    classes = _classes(about, path)
    return config, classes, OnnxClassifier(session), _decisions(about, path, classes)


def load_safetensors(path: Path, device: torch.device) -> tuple[Config, list[str], Classifier, Decisions | None]:
    """Configuration, class names, classifier and decisions of a safetensors export, under timm's names or the run's.

    Args:
        path: the file.
        device: where the classifier goes.

    Raises:
        UserError: the file is no export, or it is one of an older version that lacks what its head needs.
    """
    try:
        with safe_open(str(path), "pt") as file:
            about = file.metadata() or {}
            state: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no safetensors file: {error}") from error
    config, classes = _config(about, path, normalised=True), _classes(about, path)
    if about["head"] not in head_names():
        raise UserError(f"{path} has head {about['head']!r}, which is not known here; import what registers it")
    if "head_options" not in about and about["head"] != ModelConfig.head:
        raise UserError(f"{path} does not say which options its head has; export the run again")
    model = dataclasses.replace(
        config.model,
        head=about["head"],
        head_options=head_options(about["head"], _options(about, "head_options", path)),
        output_stride=_options(about, "timm_options", path).get("output_stride"),
    )
    config = dataclasses.replace(config, model=model)
    classifier = Classifier(model, len(classes), config.data.image_size)
    if about.get("layout") == "timm":
        state = _from_timm(state, classifier)
    try:
        classifier.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit its metadata: {' '.join(str(error).split())}") from error
    classifier.to(device).to(memory_format=torch.channels_last).eval()
    return config, classes, classifier, _decisions(about, path, classes)


def _from_timm(state: dict[str, Tensor], classifier: Classifier) -> dict[str, Tensor]:
    """timm's whole model as backbone and CAM head: what the backbone lacks is its classifier."""
    backbone = classifier.backbone.state_dict()
    out = {f"backbone.{name}": tensor for name, tensor in state.items() if name in backbone}
    for name, tensor in state.items():
        if name not in backbone:
            part = name.rpartition(".")[2]
            own = classifier.head.state_dict().get(part)
            # One that does not fit is named when the classifier takes them.
            fits = own is not None and own.numel() == tensor.numel()
            out[f"head.{part}"] = tensor.reshape(own.shape) if own is not None and fits else tensor
    return out
