"""`model.weights RUN`: a run that starts from another run's best weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spml_fast.core.config import Config, ModelConfig
from spml_fast.core.errors import UserError
from spml_fast.core.io import file_record
from spml_fast.models.classifier import Classifier
from spml_fast.models.warm_start import WarmStart, start_from
from spml_fast.models.weights import damaged_weights, read_metadata, read_weights
from spml_fast.runs.layout import RunLayout
from spml_fast.runs.open import load_run_config, run_classes
from spml_fast.runs.weights_check import check_weights

# Classes of each kind that the opening line names.
MAX_NAMED = 5


def source_run(weights: str | None) -> Path | None:
    """The run that `model.weights` names: its directory, or its weights file; None for a file of a backbone.

    Raises:
        UserError: a folder that is no run, or the weights of a run without its directory.
    """
    if weights is None:
        return None
    path = Path(weights)
    layout = RunLayout(path if path.is_dir() else path.parent)
    if path.is_dir():
        if not layout.config.is_file():
            raise UserError(
                f"model.weights: {path} is a folder and no run directory (no {layout.config.name} in it); give a run, "
                "or a file"
            )
        return path
    if not path.is_file():
        return None
    if path.name == layout.weights.name and layout.config.is_file():
        return path.parent
    # Marks that the weights of a run bear, and those of nobody else.
    of_a_run = {"phase", "epoch", "val_map"}
    if path.suffix == ".safetensors" and damaged_weights(path) is None and of_a_run <= read_metadata(path).keys():
        raise UserError(
            f"model.weights: {path} has been taken out of its run directory, which knows the names of its classes; "
            "give the run, or a file that `spml-fast export --format safetensors` made of it"
        )
    return None


def without_source(model: ModelConfig) -> ModelConfig:
    """The options of a classifier that gets its weights from a run later; others are as they were.

    Raises:
        UserError: see `source_run`, or a weights file with another checksum than `model.weights_crc32`.
    """
    if source_run(model.weights) is not None:
        return dataclasses.replace(model, pretrained=False, weights=None)
    if model.weights_crc32 is not None and model.weights is not None and Path(model.weights).is_file():
        _check_crc32(model, Path(model.weights))
    return model


def warm_start(config: Config, classifier: Classifier, classes: Sequence[str]) -> tuple[str, dict[str, Any]] | None:
    """Start a classifier from the run that `model.weights` names.

    Args:
        config: of the new run.
        classifier: of the new run; changed in place.
        classes: its class names in class-id order.

    Returns:
        A sentence on what was taken over, and the same for results.json; None where `model.weights` names no run.

    Raises:
        UserError: the run has another backbone, its weights are missing, damaged or not those of
            `model.weights_crc32`, or they do not fit.
    """
    run = source_run(config.model.weights)
    if run is None:
        return None
    layout = RunLayout(run)
    source = load_run_config(run)
    if source.model.backbone != config.model.backbone:
        raise UserError(
            f"model.weights: {run} has the backbone {source.model.backbone}, not {config.model.backbone}; give "
            f"--model.backbone {source.model.backbone}"
        )
    there = run_classes(run, source)
    check_weights(layout)
    state, metadata = read_weights(layout.weights)
    crc32 = _check_crc32(config.model, layout.weights)
    other_head = source.model.head != config.model.head
    if other_head:
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
    started = start_from(classifier, state, there, classes, str(layout.weights))
    record = {
        "run": str(run.resolve()),
        "weights_crc32": crc32,
        "epoch": int(metadata.get("epoch", 0)),
        "classes_matched": started.matched,
        "classes_new": len(started.new),
        "classes_left_out": len(started.left_out),
    }
    text = (
        f"starting from {run} (epoch {record['epoch']}, checksum {crc32}): {_parts(started, source, config, classes)}"
    )
    return text + _differences(source, config), record


def _check_crc32(model: ModelConfig, path: Path) -> str:
    """The checksum of a weights file. `UserError` where it is not the one that was asked for."""
    try:
        found = file_record(path).crc32
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    if model.weights_crc32 not in (None, found):
        raise UserError(
            f"model.weights: {path} has the checksum {found}, not {model.weights_crc32} (model.weights_crc32); its run "
            "has been trained on since, or it is damaged; leave model.weights_crc32 out to take it as it is"
        )
    return found


def _parts(started: WarmStart, source: Config, config: Config, classes: Sequence[str]) -> str:
    """What was taken over."""
    here, there = config.model.head, source.model.head
    if not started.head:
        why = f"the run has {there}" if here != there else started.obstacle
        text = f"backbone alone; the head {here} starts fresh, since {why}"
    else:
        text = f"backbone and head, {started.matched} of {len(classes)} classes matched by name"
        if started.new:
            text += f"; {_counted(started.new)} new and fresh"
        if started.left_out:
            text += f"; {_counted(started.left_out)} of the run left out"
    if started.resampled:
        sizes = f"{source.data.image_size} to {config.data.image_size} px"
        text += f"; positions resampled from {sizes} ({len(started.resampled)} tensors)"
    return text


def _counted(names: Sequence[str]) -> str:
    """`2 classes (ant, bee)`."""
    more = ", ..." if len(names) > MAX_NAMED else ""
    return f"{len(names)} {'class' if len(names) == 1 else 'classes'} ({', '.join(names[:MAX_NAMED])}{more})"


def _differences(source: Config, config: Config) -> str:
    """Options that change what the weights mean and are not taken over."""
    pairs = [
        ("model.alpha_train", source.model.alpha_train, config.model.alpha_train),
        ("model.alpha_eval", source.model.alpha_eval, config.model.alpha_eval),
        ("data.image_size", source.data.image_size, config.data.image_size),
    ]
    texts = [f"{name} {there:g} there, {here:g} here" for name, there, here in pairs if there != here]
    return f"; {', '.join(texts)}" if texts else ""
