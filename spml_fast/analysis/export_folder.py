"""A trained run as a folder: weights, timm's config.json where timm has such a model, and a record of checksums.

`timm.create_model("local-dir:FOLDER", pretrained=True)` opens it with normalisation, input size and class names, and
`spml_fast.load` opens it with BoostLU, thresholds and calibration.
"""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spml_fast.analysis.export import as_timm_model, check_finite, describe, difference, sample_images, timm_options
from spml_fast.core.config import Config
from spml_fast.core.errors import UserError
from spml_fast.core.io import atomic_write, printable, write_json
from spml_fast.core.outputs import WRITTEN_BY, OutputFile
from spml_fast.core.progress import watched
from spml_fast.evaluation.decisions import Decisions
from spml_fast.models.backbone import timm_config
from spml_fast.models.classifier import Classifier
from spml_fast.models.weights import write_weights
from spml_fast.runs.export_record import card_edited, write_record
from spml_fast.runs.layout import MANIFEST, ExportLayout, RunLayout
from spml_fast.runs.open import input_normalisation

# Forms of timm's models, of which one may be the mean over the map: most CNNs as they are; transformers that pool their
# tokens in place of reading a class token, with the norm before the pooling.
FORMS: tuple[dict[str, Any], ...] = ({}, {"global_pool": "avg"}, {"global_pool": "avg", "fc_norm": False})


@dataclass(frozen=True)
class TimmForm:
    """A run's classifier as timm has it.

    Attributes:
        model: timm's, with the run's weights, in eval mode; None where timm has no such model.
        options: arguments of `timm.create_model` beside name and number of classes.
        max_difference: largest difference of a logit from the run's at alpha 1.
        images: on which images.
    """

    model: nn.Module | None
    options: dict[str, Any]
    max_difference: float
    images: str


def find_timm_form(classifier: Classifier, config: Config, num_classes: int) -> TimmForm:
    """The form of timm's model that gives the run's logits at alpha 1, if there is one.

    Args:
        classifier: on the CPU, in eval mode.
        config: the run's.
        num_classes: C.

    Raises:
        UserError: the run's logits are not finite.
    """
    images, source = sample_images(config, classifier)
    mean, std = (255 * torch.tensor(v).view(3, 1, 1) for v in input_normalisation(config, classifier))
    views = (images - mean) / std
    with torch.no_grad(), watched(FORMS, "comparing with timm's model", "ways") as forms:
        expected = classifier(views).logits
        check_finite(expected)
        for form in forms:
            options = timm_options(config) | form
            try:
                model = as_timm_model(classifier, config, num_classes, options)
            except (TypeError, ValueError, RuntimeError, NotImplementedError, AssertionError, KeyError):
                # This model does not know these options; without any it is the run's own.
                if not form:
                    raise
                continue
            if model is None:
                continue
            bias = classifier.head.bias
            assert isinstance(bias, Tensor)
            max_difference, same = difference(model(views), expected, bias)
            if same:
                return TimmForm(model, options, max_difference, source)
    return TimmForm(None, timm_options(config), 0.0, source)


def require_timm(form: TimmForm, config: Config) -> nn.Module:
    """The form's model; `UserError` where timm has none."""
    if form.model is not None:
        return form.model
    other = "use --format safetensors or onnx"
    if config.model.head != "cam":
        raise UserError(
            f"head {config.model.head} is not part of any timm model, which end in pooling and a linear layer; {other}"
        )
    raise UserError(
        f"timm's {config.model.backbone} has no form whose logits are the run's (the mean of a linear layer over its "
        f"last features); {other}"
    )


@dataclass(frozen=True)
class ExportFolder:
    """A folder that a user has named for a model, or the command's own default.

    Attributes:
        layout: of the folder.
        mark: name of the command, which its files bear.
        option: that named it, for messages.
        overwrite: replace files of the same names that another program made.
    """

    layout: ExportLayout
    mark: str
    option: str
    overwrite: bool = False

    def check(self, card: bool = False) -> None:
        """Refuse a folder that must not be written to: before the work begins, and again before it is written.

        Args:
            card: a model card will be written as well.

        Raises:
            UserError: it is a file, a run or a data set, its parent does not exist, or it holds files of the names to
                be written that this command did not write.
        """
        folder, name = self.layout.folder, printable(str(self.layout.folder))
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{self.option} {name} is a file; give the name of a folder")
        if not folder.parent.is_dir():
            raise UserError(f"{self.option} {name} cannot be written: there is no directory {folder.parent}")
        if RunLayout(folder).config.is_file() or (folder / MANIFEST).is_file():
            raise UserError(f"{self.option} {name} is a run or a data set; give a new or empty folder")
        files = [
            OutputFile(self.layout.weights, "safetensors", self.mark, self.option, self.overwrite),
            OutputFile(self.layout.timm_config, "json", self.mark, self.option, self.overwrite),
            OutputFile(self.layout.record, "json", self.mark, self.option, self.overwrite),
        ]
        if card:
            files.append(OutputFile(self.layout.card, "markdown", self.mark, self.option, self.overwrite))
        for file in files:
            file.check(parent=False)
        if card and not self.overwrite and card_edited(self.layout):
            raise UserError(
                f"{self.option} {printable(str(self.layout.card))} was edited since it was written; give another "
                "folder, or --overwrite to replace it"
            )

    def write(
        self,
        classifier: Classifier,
        config: Config,
        classes: list[str],
        form: TimmForm,
        decisions: Decisions | None = None,
        card: str | None = None,
    ) -> None:
        """Write the model.

        Args:
            classifier: on the CPU, in eval mode.
            config: the run's.
            classes: class names in class-id order.
            form: the run's, from `find_timm_form`; where timm has none there is no config.json.
            decisions: the run's, which go into the metadata; or None.
            card: Markdown text with the mark, or None.

        Raises:
            UserError: as `check`, or a file cannot be written.
        """
        self.check(card is not None)
        layout, module = self.layout, form.model if form.model is not None else classifier
        metadata = describe(config, classifier, classes, classifier.alpha_eval, decisions) | {
            # transformers asks for it.
            "format": "pt",
            "layout": "parts" if form.model is None else "timm",
            "timm_options": json.dumps(form.options),
            "timm": importlib.metadata.version("timm"),
        }
        try:
            layout.folder.mkdir(exist_ok=True)
            with atomic_write(layout.weights) as partial:
                write_weights(partial, module.state_dict(), metadata)
            if form.model is None:
                # Of an earlier model of this folder.
                layout.timm_config.unlink(missing_ok=True)
            else:
                values = timm_config(form.model, classes, timm_input(config, classifier), layout.folder)
                write_json(layout.timm_config, {WRITTEN_BY: self.mark, **values})
            if card is not None:
                with atomic_write(layout.card) as partial:
                    partial.write_text(card, encoding="utf-8")
            write_record(layout, self.mark, card is not None)
        except OSError as error:
            raise UserError(f"{printable(str(layout.folder))} cannot be written: {error.strerror or error}") from error


def timm_input(config: Config, classifier: Classifier) -> dict[str, Any]:
    """The run's input in timm's words; its transform then resizes both sides to the size, as evaluation does."""
    mean, std = input_normalisation(config, classifier)
    side = config.data.image_size
    return {
        "input_size": (3, side, side),
        "mean": tuple(mean),
        "std": tuple(std),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }
