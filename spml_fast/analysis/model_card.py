"""The model card of a run: Markdown with a YAML header, as the Hugging Face Hub shows it.

Everything that comes from data, such as class names, is escaped, so that it is text there and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from spml_fast import __version__
from spml_fast.core.config import Config
from spml_fast.core.errors import UserError
from spml_fast.core.outputs import markdown_mark
from spml_fast.core.text import markdown_safe, printable
from spml_fast.data.labels import NEGATIVE, POSITIVE, UNKNOWN, SparseLabels
from spml_fast.data.manifest import Manifest
from spml_fast.methods import get_method
from spml_fast.models.classifier import Classifier
from spml_fast.runs.decisions import SavedDecisions
from spml_fast.runs.hub import PREFIX
from spml_fast.runs.open import DIGITS_DIR
from spml_fast.runs.read import read_run

# Classes that the card lists one by one.
MOST_CLASSES = 200
CONVENTIONS = {
    "zero": "classes without a known positive count 0",
    "skip_unlabelled": "classes without any known label are left out",
    "skip": "classes without a known positive are left out",
    "skip_one_sided": "classes without a known positive or without a known negative are left out",
}
DEFINITIONS = {"sklearn": "scikit-learn's", "rank": "by rank", "voc": "VOC's, interpolated"}


@dataclass(frozen=True)
class CardSource:
    """What a card is made of.

    Attributes:
        name: OWNER/NAME or NAME on the Hub.
        run: the run directory.
        config: the run's.
        classifier: with the run's weights.
        classes: class names in class-id order.
        saved: the run's decisions that the model has, or None.
        timm: whether timm opens the folder.
    """

    name: str
    run: Path
    config: Config
    classifier: Classifier
    classes: Sequence[str]
    saved: SavedDecisions | None
    timm: bool


def model_card(source: CardSource, mark: str) -> str:
    """The text of the card; `mark` is the command's name."""
    results = read_run(source.run).results or {}
    data = _data_set(source.config)
    title = source.name.rpartition("/")[2]
    parts = [
        f"---\n{_header(source, results, data)}---",
        markdown_mark(mark),
        f"# {title}",
        _opening(source),
        "## Use\n\n" + _use(source),
        "## Figures\n\n" + _figures(results),
        "## Data\n\n" + _data(source, data),
        "## Training\n\n" + _training(source),
        "## Decisions\n\n" + _decisions(source),
        "## Limits\n\n" + _limits(source),
    ]
    if table := _classes(source, results):
        parts.append("## Classes\n\n" + table)
    return "\n\n".join(parts) + "\n"


def _data_set(config: Config) -> Manifest | None:
    """The run's data set; None where it is no longer there."""
    try:
        return Manifest.configured(config.data, DIGITS_DIR)
    except UserError:
        return None


def _header(source: CardSource, results: dict[str, Any], data: Manifest | None) -> str:
    """The YAML header, which the Hub reads; names are single lines in it."""
    values: dict[str, Any] = {
        "library_name": "timm" if source.timm else "spml_fast",
        "pipeline_tag": "image-classification",
        "tags": ["multi-label", "partial-labels", "spml_fast", source.config.method.name],
    }
    metrics = [
        {"type": "mAP", "name": f"mAP, alpha {alpha}", "value": figures["map"]}
        for alpha, figures in results.get("alpha", {}).items()
        if figures.get("map") is not None
    ]
    if metrics:
        name = "unknown" if data is None else printable(data.name)
        task = {"type": "image-classification", "name": "Multi-label image classification"}
        split = {"name": name, "type": name, "split": printable(str(results.get("split", "test")))}
        values["model-index"] = [
            {
                "name": source.name.rpartition("/")[2],
                "results": [{"task": task, "dataset": split, "metrics": metrics}],
            }
        ]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=10**6)


def _opening(source: CardSource) -> str:
    model = source.config.model
    return (
        f"A multi-label image classifier of {len(source.classes):,} classes, trained on partly labelled images: "
        f"`{model.backbone}` with head `{model.head}`, method `{source.config.method.name}`. Written by spml_fast "
        f"{__version__}."
    )


def _use(source: CardSource) -> str:
    lines = [
        "```python",
        "import spml_fast",
        "",
        f'predictor = spml_fast.load("{PREFIX}{source.name}")',
        'table = predictor.predict(["photo.jpg"])',
        "```",
    ]
    if source.timm:
        lines += [
            "",
            "or, without spml_fast:",
            "",
            "```python",
            "import timm, torch",
            "from PIL import Image",
            "",
            f'model = timm.create_model("{PREFIX}{source.name}", pretrained=True).eval()',
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)",
            'images = transform(Image.open("photo.jpg").convert("RGB"))[None]',
            "probabilities = torch.sigmoid(model(images))[0]",
            'classes = model.pretrained_cfg["label_names"]',
            "```",
        ]
        if (alpha := source.classifier.alpha_eval) != 1:
            lines += [
                "",
                f"timm's model gives the logits at alpha 1. spml_fast uses BoostLU's alpha {alpha:g}, for which the "
                "thresholds are too.",
            ]
    return "\n".join(lines)


def _figures(results: dict[str, Any]) -> str:
    alphas: dict[str, dict[str, Any]] = results.get("alpha", {})
    if not alphas:
        return "The run has no test figures."
    lines = [
        "| | mAP | mAP over classes with a positive | OF1 | CF1 |",
        "|---|--:|--:|--:|--:|",
    ]
    for alpha, m in alphas.items():
        cells = (_number(m.get(name)) for name in ("map", "map_skipping", "OF1", "CF1"))
        lines.append(f"| {'plain (alpha 1)' if alpha == '1' else f'BoostLU, alpha {alpha}'} | {' | '.join(cells)} |")
    first = next(iter(alphas.values()))
    definition = DEFINITIONS.get(str(first.get("definition")), str(first.get("definition")))
    convention = CONVENTIONS.get(str(first.get("empty_classes")), str(first.get("empty_classes")))
    lines += [
        "",
        f"In per cent, on split {markdown_safe(str(results.get('split')))}: {first.get('num_positives', 0):,} known "
        f"positives and {first.get('num_negatives', 0):,} known negatives of {first.get('num_classes', 0):,} classes; "
        f"unknown labels do not count. Average precision is {definition}; {convention}. OF1 and CF1 are at probability "
        f"{first.get('threshold_probability')}.",
    ]
    if results.get("best_val_map") is not None:
        lines.append(
            f"The weights are those of the best validation mAP, {_number(results['best_val_map'])} in epoch "
            f"{results.get('best_epoch')}."
        )
    return "\n".join(lines)


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.2f}"


def _labels(labels: SparseLabels) -> str:
    """Counts of a split's label codes in words."""
    listed = {code: int((labels.codes == code).sum()) for code in (POSITIVE, NEGATIVE, UNKNOWN)}
    total = len(labels) * labels.num_classes
    listed[labels.default] = total - sum(count for code, count in listed.items() if code != labels.default)
    fractions = 100 * np.array([listed[code] for code in (POSITIVE, NEGATIVE, UNKNOWN)]) / max(total, 1)
    words = ("positive", "negative", "unknown")
    return ", ".join(f"{fraction:.3g}% {word}" for fraction, word in zip(fractions, words, strict=True))


def _data(source: CardSource, data: Manifest | None) -> str:
    if data is None:
        return "The data set was not there when this card was written."
    config = source.config.data
    sees_observed = (
        config.train_labels == "observed" and get_method(source.config.method.name).label_source == "observed"
    )
    lines = [f"Data set {markdown_safe(data.name)}, {data.num_classes:,} classes.", ""]
    roles = {"trained on": config.train_split, "chosen by": config.val_split, "tested on": config.test_split}
    for role, name in roles.items():
        if name is None or name not in data.splits:
            continue
        split = data.split(name)
        labels = split.observed if role == "trained on" and sees_observed else split.known
        lines.append(f"- {role} {markdown_safe(name)}: {len(split):,} images; of all labels {_labels(labels)}")
    train = data.splits.get(config.train_split)
    if train is not None and train.hides_labels:
        lines += ["", "Labels of the training split were hidden on purpose (a simulation of partly known labels)."]
    return "\n".join(lines)


def _training(source: CardSource) -> str:
    config, train = source.config, source.config.train
    # Without paths, which are nobody's business.
    options = dataclasses.asdict(config.method).items()
    method = {k: v for k, v in options if k != "name" and not (isinstance(v, str) and "/" in v)}
    rows = {
        "method": config.method.name,
        **{f"method.{name}": value for name, value in method.items()},
        "image size": f"{config.data.image_size} px on both sides, whatever the aspect ratio was",
        "BoostLU's alpha in training": f"{source.classifier.alpha_train:g}",
        "epochs": train.epochs,
        "batch size": train.batch_size,
        "optimizer": f"{train.optimizer}, learning rate {train.lr:g}, {train.schedule}",
        "pretrained backbone": "yes" if config.model.pretrained or config.model.weights else "no",
        "seed": config.run.seed,
    }
    lines = ["| | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {markdown_safe(str(k))} | {markdown_safe(str(v))} |" for k, v in rows.items())])


def _decisions(source: CardSource) -> str:
    if source.saved is None:
        return "The model has no thresholds of its own: 0.5 is a guess, and probabilities are not calibrated."
    options, decisions = source.saved.options, source.saved.decisions
    rule = "of the highest F1" if options.thresholds == "f1" else f"of precision {options.precision:g} or more"
    calibrated = "calibrated" if decisions.calibrated else "not calibrated"
    return (
        f"Every class has a threshold, the one {rule} on split {markdown_safe(source.saved.split)} at alpha "
        f"{decisions.alpha:g}; classes with fewer than {options.min_labels} known positives or negatives share one. "
        f"Probabilities are {calibrated}. They are in the metadata of the weights, and `predict` uses them."
    )


def _limits(source: CardSource) -> str:
    lines = [
        "- Figures are about known labels alone, of images like those of the test split; it was not tested on others.",
        "- The model knows its classes and nothing else: an image without any of them still gets probabilities.",
        "- Trained where many labels are unknown, it may have learned from wrong negatives; rare classes most of all.",
        f"- Images are resized to {source.config.data.image_size} px on both sides; small objects may be lost.",
    ]
    if source.saved is None or not source.saved.decisions.calibrated:
        lines.append("- A probability is a score to rank by, and no frequency.")
    lines.append(
        "- No licence is given here. Those of the training images and of the weights that training began with may bind."
    )
    return "\n".join(lines)


def _classes(source: CardSource, results: dict[str, Any]) -> str:
    alphas: dict[str, dict[str, Any]] = results.get("alpha", {})
    lists = [m.get("per_class_ap") or [] for m in alphas.values()]
    threshold = None if source.saved is None else source.saved.decisions.threshold
    titles = ["class", *(f"AP, alpha {alpha}" for alpha in alphas), *([] if threshold is None else ["threshold"])]
    lines = [f"| {' | '.join(titles)} |", f"|---|{'--:|' * (len(titles) - 1)}"]
    for i, name in enumerate(source.classes[:MOST_CLASSES]):
        cells = [markdown_safe(name), *(_number(values[i]) if i < len(values) else "" for values in lists)]
        if threshold is not None:
            cells.append(f"{threshold[i]:.4f}" if np.isfinite(threshold[i]) else "never")
        lines.append(f"| {' | '.join(cells)} |")
    if len(source.classes) > MOST_CLASSES:
        lines += ["", f"The first {MOST_CLASSES} of {len(source.classes):,}; all of them are in the weights' metadata."]
    return "\n".join(lines)
