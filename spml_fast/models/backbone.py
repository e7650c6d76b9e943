"""timm backbones: made, loaded, partly frozen."""

from __future__ import annotations

import fnmatch
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from spml_fast.core.config import ModelConfig
from spml_fast.core.errors import UserError


def needs_fixed_size(name: str) -> bool:
    """Whether a timm model takes images of the size it was made for alone."""
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return bool(cfg is not None and getattr(cfg, "fixed_input_size", False))


def frozen_parameters(backbone: nn.Module, patterns: list[str]) -> list[nn.Parameter]:
    """Parameters whose names match one of the shell patterns. `UserError` for a pattern that matches none."""
    named = dict(backbone.named_parameters())
    for pattern in patterns:
        if not fnmatch.filter(named, pattern):
            some = ", ".join(list(named)[:3])
            raise UserError(f"model.freeze: {pattern!r} matches no parameter of the backbone; it has {some}, ...")
    return [p for name, p in named.items() if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def create_backbone(config: ModelConfig, image_size: int) -> Any:
    """The timm model without its own pooling and classifier.

    Raises:
        UserError: see `Classifier`.
    """
    if not timm.is_model(config.backbone):
        close = timm.list_models(f"*{config.backbone.split('.')[0]}*")[:5]
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise UserError(f"timm has no model {config.backbone!r}{hint}")
    options: dict[str, Any] = {"num_classes": 0, "global_pool": ""}
    if config.output_stride is not None:
        options["output_stride"] = config.output_stride
    if config.drop_path is not None:
        options["drop_path_rate"] = config.drop_path
    if needs_fixed_size(config.backbone):
        options["img_size"] = image_size
    if config.weights is not None:
        if not Path(config.weights).is_file():
            raise UserError(f"model.weights: {config.weights} does not exist")
        options["pretrained_cfg_overlay"] = {"file": config.weights}
    loads = config.pretrained or config.weights is not None
    # Made without weights first: what is wrong with the options is then told apart from what is wrong with the weights.
    try:
        with torch.random.fork_rng(devices=[], enabled=loads):
            model = timm.create_model(config.backbone, pretrained=False, **options)
    except (TypeError, ValueError, RuntimeError, NotImplementedError, AssertionError, KeyError) as error:
        given = ", ".join(f"{k} {options[k]}" for k in ("output_stride", "drop_path_rate", "img_size") if k in options)
        reason = f"{type(error).__name__} {error}".strip()
        raise UserError(
            f"backbone {config.backbone} cannot be made with {given or 'its defaults'}: {reason}"
        ) from error
    if loads:
        model = load_backbone(model, config, options)
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True)
    return model


def create_whole_model(name: str, num_classes: int, options: dict[str, Any]) -> Any:
    """timm's own model of that name with its pooling and classifier, as its users make it; random weights.

    Args:
        name: of a backbone that `create_backbone` takes.
        num_classes: outputs of timm's classifier.
        options: further arguments of `timm.create_model`.
    """
    return timm.create_model(name, pretrained=False, num_classes=num_classes, **options)


def timm_config(model: nn.Module, classes: list[str], data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What stands in the `config.json` of a model folder, by timm's own means.

    Args:
        model: from `create_whole_model`.
        classes: class names in class-id order.
        data: timm's options of the input: `input_size`, `mean`, `std`, `interpolation`, `crop_pct`, `crop_mode`.
        folder: where timm may write for a moment, as much as the weights take.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".timm-") as name:
        save_for_hf(model, name, model_config={"label_names": classes}, safe_serialization=True, data_config=data)
        values: dict[str, Any] = json.loads(Path(name, "config.json").read_text(encoding="utf-8"))
    # The tag names weights that these no longer are.
    values["pretrained_cfg"].pop("tag", None)
    return values


def load_backbone(fresh: nn.Module, config: ModelConfig, options: dict[str, Any]) -> nn.Module:
    """The backbone with weights from `config.weights`, or by timm's own means.

    Args:
        fresh: the same model, made with random weights from the generator's present state.
        config: backbone and weights.
        options: what the model was made with.

    Raises:
        UserError: the weights cannot be read or downloaded, or belong to another model.
    """
    try:
        model = timm.create_model(config.backbone, pretrained=True, **options)
    except Exception as error:
        # Reading somebody's weight file, or fetching one, may raise anything.
        lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.endswith(":")]
        reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        if config.weights is not None:
            raise UserError(f"{config.weights} cannot be loaded into backbone {config.backbone} ({reason})") from error
        raise UserError(
            f"the pretrained weights of {config.backbone} could not be downloaded ({reason}); give a local file with "
            "--model.weights FILE, or start from random weights with --model.pretrained false"
        ) from error
    if config.weights is not None:
        # timm passes over weights that a file lacks; those still equal the fresh model's, made from the same seed.
        initial = {k: v for k, v in fresh.named_parameters() if v.ndim > 1}
        lacking = [k for k, v in model.named_parameters() if k in initial and torch.equal(v, initial[k])]
        if lacking:
            raise UserError(
                f"{config.weights} has no weights for {len(lacking)} of {len(initial)} tensors of backbone "
                f"{config.backbone}, for example {lacking[0]}; it belongs to another model"
            )
    return model


def resample_state(state: dict[str, Tensor], backbone: nn.Module) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """A backbone's state as the same model has it at another image size, by timm's own means.

    Args:
        state: `state_dict()` of a timm model.
        backbone: the same model, made for another image size (or for the same, when nothing changes).

    Returns:
        The state, and the names of tensors that were resampled. Tensors that timm cannot resample have the shape they
        had.
    """
    own = backbone.state_dict()
    other = tuple(name for name, value in state.items() if name in own and value.shape != own[name].shape)
    # What timm does with the weights that it downloads for this kind of model.
    convert = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    if not other or convert is None:
        return state, ()
    made = convert(dict(state), backbone)
    done = tuple(name for name in other if name in made and made[name].shape == own[name].shape)
    return {name: made[name] if name in done else value for name, value in state.items()}, done
