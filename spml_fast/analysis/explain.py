"""Class activation maps drawn over images: where a trained run sees evidence for a class, and where against it.

A CAM head's logit is the mean of its signed map: above 0 a cell is evidence for the class, below 0 against it. Maps are
the head's own, with the bias and without the boost. A head with queries (Query2Label, ML-Decoder) shows its attention:
where the query of the class looks in the last layer, the mean over attention heads, never negative and 1 in sum. That
is no evidence, and never drawn in the colours of it. Classes that share a query have one map, which the page says. What
IGNORE masks the images of such a head by is another map, the attention times the channel mean of the features; the mask
and the masked image are those of training.

Maps are made of the chosen classes alone, never of all C.

Source: docs/sources.md#boostlu (the CAM head), docs/sources.md#ignore (the map of a head with queries).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spml_fast.analysis.localisation import boxes_of, peak_in_boxes
from spml_fast.analysis.predict import check_numbers, load_images, place_of, why_refused
from spml_fast.analysis.suggest import Suggestions
from spml_fast.core.config import Config
from spml_fast.core.errors import UserError
from spml_fast.core.precision import autocast, inference_dtype
from spml_fast.data.image_files import ImageFiles
from spml_fast.data.labels import NEGATIVE, POSITIVE
from spml_fast.data.manifest import Split
from spml_fast.methods.ignore import masked_size
from spml_fast.models.classifier import Classifier
from spml_fast.models.heads import MaskOptions
from spml_fast.runs.open import input_normalisation

# A class counts as predicted from here on.
PREDICTED = 0.5

# More images make a page that viewers refuse.
MAX_IMAGES = 100

# What a map says: evidence, whose mean is the logit; attention of a query; or what another head calls a map.
Kind = Literal["evidence", "attention", "map"]


@dataclass(frozen=True)
class MaskedView:
    """How a run of IGNORE masks images.

    Attributes:
        options: of the mask, as in training.
        scale: side of the masked image as a fraction of the image's.
    """

    options: MaskOptions
    scale: float


@dataclass(frozen=True)
class Explained:
    """One image with the maps of its chosen classes.

    Attributes:
        path: as it is displayed.
        image: uint8 [S, S, 3] as the network saw it, normalisation undone.
        aspect: width / height of the original, 1 when unknown.
        classes: int64 [k] class ids.
        probability: float64 [k], sigmoid of `logit`.
        logit: float32 [k] at the alpha asked for.
        plain: float32 [k], logit at alpha 1.
        maps: float32 [k, h, w], the head's own.
        kind: what `shown` says.
        attention: float32 [k, h, w] of the classes' queries, None for heads without queries.
        classes_per_query: classes that share a query, and so its attention.
        predicted: class ids of probability `PREDICTED` or more, the most probable first.
        known: int8 [k] label of each class, or None where nothing is known of the image.
        labels: (observed positives, positives that training does not see), class ids; None as `known`.
        reason: why the image was chosen, or "".
        refused: why the loader refused the image, which then has no classes; None when it did not.
        kept: bool [k, S, S], where the map of each class is so high that IGNORE keeps the image; None unless asked for.
        full_logit: float32 [k], the logit of each class on the whole image at the alpha of training; None as `kept`.
        masked_logit: float32 [k], the same on what is kept; None as `kept`.
        boxes: float32 [n, 4] of each class (x0, y0, x1, y1 as fractions of the image), or None where none are known.
    """

    path: str
    image: npt.NDArray[np.uint8]
    aspect: float
    classes: npt.NDArray[np.int64]
    probability: npt.NDArray[np.float64]
    logit: npt.NDArray[np.float32]
    plain: npt.NDArray[np.float32]
    maps: npt.NDArray[np.float32]
    kind: Kind
    predicted: tuple[int, ...]
    known: npt.NDArray[np.int8] | None = None
    labels: tuple[list[int], list[int]] | None = None
    reason: str = ""
    refused: str | None = None
    kept: npt.NDArray[np.bool_] | None = None
    full_logit: npt.NDArray[np.float32] | None = None
    masked_logit: npt.NDArray[np.float32] | None = None
    attention: npt.NDArray[np.float32] | None = None
    classes_per_query: int = 1
    boxes: tuple[npt.NDArray[np.float32], ...] | None = None

    @property
    def shown(self) -> npt.NDArray[np.float32]:
        """The maps to draw, float32 [k, h, w]: the attention where there is one."""
        return self.maps if self.attention is None else self.attention

    def hit(self, place: int) -> bool | None:
        """Whether the peak of the map at `place` lies in a box of its class; None where it has none."""
        if self.boxes is None or not len(self.boxes[place]):
            return None
        return peak_in_boxes(self.shown[place], self.boxes[place])

    @property
    def positive_fraction(self) -> npt.NDArray[np.float64]:
        """Fraction of cells above 0 of each map, float64 [k]."""
        return (self.maps > 0).mean((1, 2))

    def wrong(self, place: int) -> bool:
        """Whether the prediction of the class at `place` contradicts its label."""
        if self.known is None:
            return False
        return bool(self.known[place] == (NEGATIVE if self.probability[place] >= PREDICTED else POSITIVE))


def choose_classes(logits: Tensor, top: int, first: Sequence[Sequence[int]] | None = None) -> Tensor:
    """Classes of each image to look at: those in `first`, then the most probable ones, `top` in all.

    Args:
        logits: [B, C].
        top: classes per image; C where there are fewer.
        first: class ids of each image that come first, or None.

    Returns:
        int64 [B, min(top, C)], no class twice; equal logits by class id.
    """
    order = torch.sort(logits, dim=1, descending=True, stable=True).indices
    if first is not None:
        # A class's rank in its row: given ones before all others.
        rank = torch.empty_like(order)
        rank.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order).contiguous())
        for row, given in enumerate(first):
            for place, class_id in enumerate(given):
                rank[row, class_id] = place - len(given)
        order = torch.argsort(rank, dim=1)
    return order[:, :top]


def seen_pixels(views: Tensor, config: Config, classifier: Classifier) -> npt.NDArray[np.uint8]:
    """Views [b, 3, S, S] as images, uint8 [b, S, S, 3]: what the network saw, normalisation undone."""
    mean, std = (
        torch.tensor(v, device=views.device)[:, None, None] * 255 for v in input_normalisation(config, classifier)
    )
    pixels = (views * std + mean).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


@torch.no_grad()
def explain(
    classifier: Classifier,
    config: Config,
    files: ImageFiles,
    device: torch.device,
    *,
    alpha: float,
    classes: Sequence[str],
    top: int,
    first: Sequence[Sequence[int]] | None = None,
    aspects: Sequence[float] | None = None,
    mask: MaskedView | None = None,
) -> Iterator[Explained]:
    """Maps of each image, in order, a batch at a time.

    An image that passed its check but that the loader cannot decode is reported with its reason, and the others are
    explained all the same.

    Args:
        classifier: on `device`, in eval mode.
        config: the run's; `eval.batch_size` images go through the network at once.
        files: the images, at least one.
        device: where the views are made and the network runs.
        alpha: BoostLU's factor of the probabilities, 1 for heads that do not boost.
        classes: names for error messages.
        top: classes per image.
        first: class ids of each image that are looked at before the most probable ones, or None.
        aspects: width / height of each original, or None.
        mask: look at the image masked by the map of each class too, as IGNORE does; each image by itself.

    Raises:
        UserError: a logit is not a number, or the head has no maps.
    """
    dtype = inference_dtype(config.train.precision, device)
    for start, views in load_images(classifier, config, files, device):
        if views is None:
            yield _refused(files.path(start))
            continue
        number = len(views)
        with autocast(device, dtype):
            features = classifier.features(views)
            output = classifier.classify(features, alpha, boost=True if mask is not None else None)
            plain, logits = output.mean, output.logits
            check_numbers(logits, classes, functools.partial(place_of, files, start))
            given = None if first is None else first[start : start + number]
            chosen = choose_classes(logits, top, given)
            found = classifier.classify(features, classes=chosen)
        maps, kind = found.maps, map_kind(classifier, found.attention)
        if maps is None:
            raise UserError(f"head {config.model.head} has no class maps; use a run with head cam")
        pixels = seen_pixels(views, config, classifier)
        masked, trained = None, plain
        if mask is not None:
            with autocast(device, dtype):
                masked = [_masked(classifier, views, features, chosen[:, k], mask) for k in range(chosen.shape[1])]
                trained = output.at_alpha(classifier.alpha_train)
        logit, at_one, at_trained = (t.gather(1, chosen).float().cpu().numpy() for t in (logits, plain, trained))
        cells, ids = maps.float().cpu().numpy(), chosen.cpu().numpy()
        attention = None if found.attention is None else found.attention.float().cpu().numpy()
        order = torch.sort(logits, dim=1, descending=True, stable=True)
        count = (torch.sigmoid(order.values.double()) >= PREDICTED).sum(1).tolist()
        for row in range(number):
            yield Explained(
                path=files.path(start + row),
                image=pixels[row],
                aspect=1.0 if aspects is None else aspects[start + row],
                classes=ids[row],
                probability=torch.sigmoid(torch.from_numpy(logit[row]).double()).numpy(),
                logit=logit[row],
                plain=at_one[row],
                maps=cells[row],
                kind=kind,
                attention=None if attention is None else attention[row],
                classes_per_query=classifier.head.classes_per_query,
                predicted=tuple(order.indices[row, : count[row]].tolist()),
                kept=None if masked is None else np.stack([kept[row] for kept, _ in masked]),
                full_logit=None if masked is None else at_trained[row],
                masked_logit=None if masked is None else np.array([z[row] for _, z in masked], np.float32),
            )


def map_kind(classifier: Classifier, attention: Tensor | None) -> Kind:
    """What the maps of a classifier say, given its attention or None."""
    if attention is not None:
        return "attention"
    return "evidence" if classifier.head.supports_boostlu else "map"


def _masked(
    classifier: Classifier, views: Tensor, features: Tensor, class_id: Tensor, mask: MaskedView
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
    """Where IGNORE keeps images by the map of a class each, bool [b, S, S], and the logits [b] of these classes there.

    Args:
        classifier: whose own masks these are.
        views: [b, 3, S, S].
        features: [b, h, w, K] of the views.
        class_id: int64 [b].
        mask: as in training.
    """
    # Maps are normalised image by image: a page has whatever images were asked for beside each other.
    alone = replace(mask.options, norm="per_image")
    classes = class_id[:, None]
    masked = classifier.classify(features, classes=classes, images=views, mask=alone).masked
    # A pixel that is kept may be 0 itself, so the mask is that of an image without zeros.
    kept = classifier.classify(features, classes=classes, images=torch.ones_like(views[:, :1]), mask=alone).masked
    assert masked is not None and kept is not None
    seen = masked_size(classifier, masked, mask.scale)
    logits = classifier(seen, alpha=classifier.alpha_train).logits.gather(1, classes)[:, 0]
    return (kept[:, 0] > 0).cpu().numpy(), logits.float().cpu().numpy()


def _refused(path: str) -> Explained:
    """An image that the loader cannot decode: no classes, and the reason."""
    empty = np.empty(0, np.float32)
    return Explained(
        path=path,
        image=np.empty((0, 0, 3), np.uint8),
        aspect=1.0,
        classes=np.empty(0, np.int64),
        probability=np.empty(0, np.float64),
        logit=empty,
        plain=empty,
        maps=empty.reshape(0, 1, 1),
        kind="map",
        predicted=(),
        refused=why_refused(path),
    )


@dataclass(frozen=True)
class Choice:
    """A sample to draw: its index, why, and the class that it stands for (None for random ones)."""

    index: int
    reason: str
    class_id: int | None = None


def choose_samples(mistakes: Sequence[Suggestions], size: int, count: int, seed: int) -> list[Choice]:
    """Samples for a sheet: a third where the model is most wrong in each direction, the rest at random.

    Args:
        mistakes: ranked lists of labels that the model contradicts; an image is taken once.
        size: samples of the split.
        count: samples wanted; fewer where the split has fewer.
        seed: of the random ones.
    """
    chosen: dict[int, Choice] = {}
    reasons = {NEGATIVE: "false positive", POSITIVE: "missed positive"}
    for ranked in mistakes:
        # What a direction with few mistakes leaves free goes to the random ones.
        goal = min(count, len(chosen) + max(1, count // 3))
        for index, class_id in zip(ranked.index.tolist(), ranked.class_id.tolist(), strict=True):
            if len(chosen) >= goal:
                break
            chosen.setdefault(index, Choice(index, reasons[ranked.code], class_id))
    for index in np.random.default_rng(seed).permutation(size).tolist():
        if len(chosen) >= min(count, size):
            break
        chosen.setdefault(index, Choice(index, "at random"))
    return list(chosen.values())


def with_labels(explained: Explained, split: Split, choice: Choice, classes: Sequence[str]) -> Explained:
    """The image with its known labels, and its boxes where the split has any.

    Args:
        explained: the image with its maps.
        split: the split that it belongs to.
        choice: which sample it is, and why it was chosen.
        classes: class names in class-id order.
    """
    known, observed = split.known.rows([choice.index])[0], split.observed.rows([choice.index])[0]
    seen = np.flatnonzero(observed == POSITIVE)
    hidden = np.flatnonzero((known == POSITIVE) & (observed != POSITIVE))
    boxes = None
    if split.boxes is not None:
        boxes = tuple(boxes_of(split.boxes, choice.index, c) for c in explained.classes.tolist())
    return replace(
        explained,
        boxes=boxes,
        path=split.relative_path(choice.index),
        known=known[explained.classes],
        labels=(seen.tolist(), hidden.tolist()),
        reason=choice.reason if choice.class_id is None else f"{choice.reason}: {classes[choice.class_id]}",
    )
