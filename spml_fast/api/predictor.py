"""A trained classifier for notebooks and services: classes of new images, class activation maps, metrics."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from spml_fast.analysis.explain import explain, seen_pixels
from spml_fast.analysis.predict import load_images, predict
from spml_fast.api.exported import OnnxClassifier, load_onnx, load_safetensors
from spml_fast.api.images import Images, open_images
from spml_fast.core.config import Config
from spml_fast.core.errors import UserError
from spml_fast.data.manifest import Manifest
from spml_fast.evaluation.decisions import Decisions
from spml_fast.evaluation.evaluate import check_alphas, class_groups, evaluate_split
from spml_fast.models.cam_model import CamModel
from spml_fast.models.classifier import Classifier, check_alpha
from spml_fast.runs.decisions import load_decisions
from spml_fast.runs.export_record import check_export_folder
from spml_fast.runs.hub import PREFIX, download_model
from spml_fast.runs.layout import ExportLayout
from spml_fast.runs.open import load_classifier, load_run_config, make_eval_loader, run_classes

TOP = 5

COLUMNS = pa.schema(
    [("path", pa.string()), ("class", pa.string()), ("probability", pa.float64()), ("rank", pa.int32())]
)

CALIBRATED = COLUMNS.append(pa.field("calibrated_probability", pa.float64()))


class Predictor:
    """A trained classifier, ready for new images; made by `spml_fast.load`.

    Images go through the loader that evaluation uses, so that probabilities are those of `spml-fast predict`.

    Attributes:
        classes: class names in class-id order, C of them.
        config: the run's configuration, or what an export tells of it.
        alpha: BoostLU's factor that is used unless another is asked for; 1 for heads without a map.
        source: the run directory, or the exported file or folder.
        decisions: thresholds of the classes and calibration for `alpha`; None where there are none.
        device: where images are made ready and the network runs.
    """

    def __init__(
        self,
        classifier: Classifier | OnnxClassifier,
        config: Config,
        classes: Sequence[str],
        source: Path,
        device: torch.device,
        decisions: Decisions | None = None,
    ) -> None:
        self._classifier: Any = classifier
        self.config, self.classes, self.source, self.device = config, list(classes), source, device
        # A head without maps has alpha 1 whatever the configuration says.
        self.alpha = classifier.alpha_eval if isinstance(classifier, Classifier) else config.model.alpha_eval
        self.decisions = decisions if decisions is not None and decisions.alpha == self.alpha else None

    def __repr__(self) -> str:
        return f"Predictor({str(self.source)!r}, {len(self.classes)} classes, alpha {self.alpha:g}, {self.device})"

    @property
    def thresholds(self) -> dict[str, float] | None:
        """Class name -> probability from which `predict` gives it, infinite where it never does; None without any."""
        if self.decisions is None:
            return None
        return dict(zip(self.classes, self.decisions.threshold.tolist(), strict=True))

    @property
    def _fixed_alpha(self) -> bool:
        return isinstance(self._classifier, OnnxClassifier)

    def _alpha(self, alpha: float | None) -> float:
        """The factor to use; 1 stands for that of an ONNX graph."""
        if self._fixed_alpha:
            if alpha is not None and alpha != self.alpha:
                raise UserError(
                    f"{self.source} has alpha {self.alpha:g} in its graph; export the run with --alpha {alpha:g}"
                )
            return 1.0
        chosen: float = self.alpha if alpha is None else alpha
        check_alpha(chosen, "alpha")
        check_alphas([chosen], self._classifier, self.config)
        return chosen

    def _with_batch(self, batch_size: int | None, most: int) -> Config:
        """The configuration with so many images a forward, not more than there are."""
        size = self.config.eval.batch_size if batch_size is None else batch_size
        if size < 1:
            raise UserError(f"batch_size is {size}; it must be at least 1")
        return dataclasses.replace(self.config, eval=dataclasses.replace(self.config.eval, batch_size=min(size, most)))

    def predict(
        self,
        images: Images,
        *,
        top: int | None = None,
        threshold: float | None = None,
        alpha: float | None = None,
        batch_size: int | None = None,
        skip_invalid: bool = False,
    ) -> pa.Table:
        """The classes of images.

        Args:
            images: one image or several: paths, directories to search, PIL images, or uint8 RGB arrays [H, W, 3]
                or [N, H, W, 3].
            top: classes an image, the most probable first; None gives those above `thresholds` or, where there are
                none, 5, or all of them with `threshold`.
            threshold: of these, give those of this probability (0 to 1) or more, in place of `thresholds`.
            alpha: BoostLU's factor; None takes the predictor's.
            batch_size: images a forward; None takes the run's.
            skip_invalid: leave out images that cannot be read, with a warning; else the first one is an error.

        Returns:
            A table with a row a class of an image, in the order of the images: `path` (text: the path, the file name of
            a PIL image, or the image's number), `class` (text), `probability` (float64), `rank` (int32, from 1) and,
            where the model is calibrated, `calibrated_probability` (float64), which thresholds and ranks are about.
            `to_pylist` gives dictionaries, and `to_pandas` a data frame where pandas is installed.

        Raises:
            UserError: an argument without meaning, or an image that cannot be read.
        """
        if top is not None and top < 1:
            raise UserError(f"top is {top}; it must be at least 1")
        if threshold is not None and not 0 <= threshold <= 1:
            raise UserError(f"threshold is {threshold:g}; it is a probability and must lie between 0 and 1")
        factor = self._alpha(alpha)
        decisions = self.decisions if alpha is None or alpha == self.alpha else None
        schema = CALIBRATED if decisions is not None and decisions.calibrated else COLUMNS
        columns: dict[str, list[Any]] = {name: [] for name in schema.names}
        limit: float | None = threshold or 0.0
        if top is None and threshold is None:
            top, limit = (TOP, 0.0) if decisions is None else (None, None)
        with open_images(images, skip_invalid) as opened:
            found = predict(
                self._classifier,
                self._with_batch(batch_size, max(1, len(opened.files))),
                opened.files,
                self.device,
                alpha=factor,
                classes=self.classes,
                top=top,
                threshold=limit,
                decisions=decisions,
            )
            for name, image in zip(opened.names, found, strict=True):
                if image.reason is not None and not skip_invalid:
                    raise UserError(f"{name} cannot be used: {image.reason}")
                shown = name.encode("utf-8", "backslashreplace").decode()
                columns["path"] += [shown] * len(image.classes)
                columns["class"] += [self.classes[c] for c in image.classes.tolist()]
                columns["probability"] += image.probability.tolist()
                columns["rank"] += range(1, len(image.classes) + 1)
                if image.calibrated is not None:
                    columns["calibrated_probability"] += image.calibrated.tolist()
        return pa.table(columns, schema=schema)

    def maps(
        self, images: Images, classes: Sequence[str | int], *, batch_size: int | None = None
    ) -> npt.NDArray[np.float32]:
        """Class activation maps of images.

        Args:
            images: N images, as in `predict`.
            classes: names or ids of the k classes whose maps are wanted.
            batch_size: images a forward; None takes the run's.

        Returns:
            float32 [N, k, h, w]: positive where a cell is evidence for the class, negative where it is against it;
            without the boost and with the bias. (h, w) is the grid of the backbone's features. Of a head with
            queries (Query2Label, ML-Decoder) the map that IGNORE masks images by, attention times mean feature;
            classes that share a query have the same one.

        Raises:
            UserError: no such class, an image that cannot be read, or a model without maps.
        """
        if self._fixed_alpha:
            raise UserError(f"{self.source} is an ONNX graph without maps; load the run, or a safetensors export of it")
        ids = [self._class_id(c) for c in classes]
        if not ids:
            raise UserError("no class given; name those whose maps are wanted")
        wanted = list(dict.fromkeys(ids))
        columns = [wanted.index(i) for i in ids]
        with open_images(images) as opened:
            found = explain(
                self._classifier,
                self._with_batch(batch_size, len(opened.files)),
                opened.files,
                self.device,
                alpha=1.0,
                classes=self.classes,
                top=len(wanted),
                first=[wanted] * len(opened.files),
            )
            maps = []
            for name, image in zip(opened.names, found, strict=True):
                if image.refused is not None:
                    raise UserError(f"{name} cannot be used: {image.refused}")
                maps.append(image.maps[columns])
        return np.stack(maps)

    def cam_model(self, alpha: float | None = None) -> CamModel:
        """The classifier for tools that draw class activation maps, such as pytorch-grad-cam and torch-cam.

        Args:
            alpha: BoostLU's factor of the logits; None takes the predictor's.

        Returns:
            A module from images [B, 3, S, S], as `inputs` gives them, to logits [B, C], with `target_layers`; its
            parameters are the predictor's own.

        Raises:
            UserError: an alpha without meaning, or an ONNX graph, which has no layers to look at.
        """
        if self._fixed_alpha:
            raise UserError(f"{self.source} is an ONNX graph without layers; load the run, or a safetensors export")
        return CamModel(self._classifier, self._alpha(alpha))

    def inputs(self, images: Images, *, batch_size: int | None = None) -> torch.Tensor:
        """Images as the network takes them: decoded, resized and normalised by the loader of evaluation.

        Args:
            images: N images, as in `predict`.
            batch_size: images that are made at once; None takes the run's.

        Returns:
            float32 [N, 3, S, S] on the predictor's device.

        Raises:
            UserError: an image that cannot be read.
        """
        parts = []
        with open_images(images) as opened:
            config = self._with_batch(batch_size, max(1, len(opened.files)))
            for start, views in load_images(self._classifier, config, opened.files, self.device):
                if views is None:
                    raise UserError(f"{opened.names[start]} cannot be used: the loader does not decode it")
                # The loader may use its memory again.
                parts.append(views.clone())
        return torch.cat(parts)

    def pixels(self, inputs: torch.Tensor) -> npt.NDArray[np.uint8]:
        """What `inputs` [N, 3, S, S] show, uint8 RGB [N, S, S, 3]: the normalisation undone."""
        return seen_pixels(inputs, self.config, self._classifier)

    def _class_id(self, name: str | int) -> int:
        if isinstance(name, int):
            if not 0 <= name < len(self.classes):
                raise UserError(f"there is no class {name}; ids go from 0 to {len(self.classes) - 1}")
            return name
        if name not in self.classes:
            close = difflib.get_close_matches(name, self.classes, n=3)
            hint = f"did you mean {', '.join(close)}?" if close else "`classes` lists them"
            raise UserError(f"there is no class {name!r}; {hint}")
        return self.classes.index(name)

    def evaluate(
        self,
        manifest: str | os.PathLike[str] | Manifest,
        *,
        split: str | None = None,
        alpha: float | None = None,
        batch_size: int | None = None,
    ) -> dict[str, Any]:
        """Metrics of a split, as `spml-fast evaluate` gives them.

        Args:
            manifest: the folder that `spml-fast prepare` made, or a `Manifest`; its classes must be the model's.
            split: its split; None takes the run's test split.
            alpha: BoostLU's factor; None takes the predictor's.
            batch_size: images a forward; None takes the run's.

        Returns:
            Metrics in per cent by name: `map`, `OF1`, `CF1`, `per_class_ap`, `decisions` (with `thresholds`, where
            there are any), and the rest.

        Raises:
            UserError: no such data set or split, other classes, or an image that cannot be read.
        """
        data = manifest if isinstance(manifest, Manifest) else Manifest(os.fspath(manifest))
        if data.classes != self.classes:
            raise UserError(f"{data.folder} has other classes than {self.source}; give a data set with the same ones")
        factor = self._alpha(alpha)
        chosen = data.split(split or self.config.data.test_split or self.config.data.train_split)
        if len(chosen) == 0:
            raise UserError(f"split {chosen.name!r} of {data.folder} has no images")
        # An export does not say how many images its run took at once.
        config = self.config if batch_size is None else self._with_batch(batch_size, batch_size)
        loader = make_eval_loader(config, chosen, self._classifier, self.device)
        groups = class_groups(data, config)
        decisions = self.decisions if alpha is None or alpha == self.alpha else None
        if decisions is not None:
            # 1 stands for the alpha of an ONNX graph.
            decisions = dataclasses.replace(decisions, alpha=factor)
        with data.reading():
            found = evaluate_split(self._classifier, loader, chosen, [factor], config, data.classes, groups, decisions)
        return found[factor]


def load_predictor(source: str | os.PathLike[str], device: str | None = None, decisions: bool = True) -> Predictor:
    """See `spml_fast.load`."""
    text = os.fspath(source)
    path = download_model(text.removeprefix(PREFIX)) if text.startswith(PREFIX) else Path(source)
    name = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"there is no device {name!r}; give cpu, or cuda:0 for the first GPU") from error
    if path.suffix == ".onnx" and path.is_file():
        cpu = torch.device("cpu")
        config, classes, model, found = load_onnx(path)
        return Predictor(model, config, classes, path, cpu, found if decisions else None)
    if path.suffix == ".safetensors" and path.is_file():
        config, classes, classifier, found = load_safetensors(path, chosen)
        return Predictor(classifier, config, classes, path, chosen, found if decisions else None)
    if not path.is_dir():
        raise UserError(f"{path} is neither a run directory nor an exported .onnx or .safetensors file, or its folder")
    if (exported := ExportLayout(path)).record.is_file():
        config, classes, classifier, found = load_safetensors(check_export_folder(exported), chosen)
        return Predictor(classifier, config, classes, path, chosen, found if decisions else None)
    config = load_run_config(path)
    classes = run_classes(path, config)
    classifier, _ = load_classifier(path, config, len(classes), chosen)
    saved = load_decisions(path, classes) if decisions else None
    return Predictor(classifier, config, classes, path, chosen, None if saved is None else saved.decisions)
