"""What the papers measure of class activation maps: are they like a fully supervised model's, do they find the object?

BoostLU: Spearman's rank correlation, per (image, positive class), of a model's map with the map of a model trained with
full labels, beside the correlation of a centred Gaussian with the latter; means of the highest and lowest five per cent
of a map's cells, for positive and for negative labels. Where training hides labels that are known, positive labels are
told apart further: those that it sees, and hidden ones, which the loss of assumed negatives takes for absent.
Large Loss: the pointing game, whether a map's peak lies in a box of its class. MaxBoxAcc, on request: whether a box
around the high part of a map fits one of its class (localisation.py has both).

What the papers leave open is decided here: maps are the head's own, not upsampled, signed, with the bias and without
the boost (which is monotone: it changes neither ranks nor peaks); a peak is the centre of the highest cell, the first
of equals; no tolerance around boxes.

Source: docs/sources.md#boostlu (analysis of explanations), docs/sources.md#large-loss (pointing game),
docs/sources.md#maxboxacc.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import rankdata

from spml_fast.analysis.localisation import (
    THRESHOLDS,
    FloatArray,
    IntArray,
    box_accuracy,
    boxes_of,
    cells_in_boxes,
    overlaps,
    peak_in_boxes,
)
from spml_fast.core import distributed
from spml_fast.core.errors import UserError
from spml_fast.core.precision import autocast, inference_dtype
from spml_fast.data.labels import NEGATIVE, POSITIVE
from spml_fast.data.loader import EvalLoader
from spml_fast.data.manifest import Split
from spml_fast.models.classifier import Classifier

FRACTION = 0.05


def extremes(maps: npt.ArrayLike, fraction: float = FRACTION) -> tuple[FloatArray, FloatArray]:
    """Mean of the highest and of the lowest cells of every map.

    Args:
        maps: [n, h, w].
        fraction: of the cells; at least one is taken.

    Returns:
        Two float64 [n].
    """
    cells = np.sort(np.asarray(maps, np.float64).reshape(len(np.asarray(maps)), -1), axis=1)
    count = max(1, round(fraction * cells.shape[1]))
    return cells[:, -count:].mean(1), cells[:, :count].mean(1)


def rank_correlation(first: npt.ArrayLike, second: npt.ArrayLike) -> FloatArray:
    """Spearman's correlation of each map with its partner, float64 [n]; NaN where one of the two is flat.

    Args:
        first: [n, h, w]; equal cells have their mean rank.
        second: [n, h, w], likewise.
    """
    ranks = [rankdata(np.asarray(m).reshape(len(np.asarray(m)), -1), axis=1) for m in (first, second)]
    a, b = (r - r.mean(1, keepdims=True) for r in ranks)
    scale = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return np.divide((a * b).sum(1), scale, out=np.full(len(a), np.nan), where=scale > 0)


def centred_gaussian(height: int, width: int) -> FloatArray:
    """A Gaussian at the image's centre, float64 [h, w]. Its width does not matter to ranks."""
    y, x = ((np.arange(n) + 0.5) / n - 0.5 for n in (height, width))
    return np.exp(-(y[:, None] ** 2 + x[None, :] ** 2) / 0.125)


def chosen_classes(codes: npt.NDArray[np.int8], index: int, negatives: int, seed: int) -> IntArray:
    """Classes of one image to look at: its positives, and a fixed draw of at most `negatives` known negatives.

    Args:
        codes: known labels int8 [C].
        index: the sample, on which the draw depends beside the seed.
        negatives: known negatives at most.
        seed: of the draw.

    Returns:
        Class ids int64 [k], positives first, each part in ascending order.
    """
    absent = np.flatnonzero(codes == NEGATIVE)
    if len(absent) > negatives:
        absent = np.random.default_rng((seed, index)).choice(absent, negatives, replace=False)
    return np.concatenate([np.flatnonzero(codes == POSITIVE), np.sort(absent)]).astype(np.int64)


@dataclass
class MapTable:
    """One row per (image, class) pair that was looked at, in sample order; NaN where a figure does not apply.

    Attributes:
        index: int64 [n] sample.
        class_id: int64 [n].
        positive: whether the label is positive, float64 0 or 1.
        hidden: 1 where it is positive and training does not see it (`Split.observed`), 0 elsewhere; NaN where
            this was not asked for.
        top, bottom: means of the highest and lowest cells.
        full_top, full_bottom: the same of the fully supervised model.
        correlation: of the map with that model's, for positive labels.
        control: of the centred Gaussian with that model's, for positive labels.
        hit: 1 where the peak lies in a box of the class, 0 where not, NaN without a box.
        chance: fraction of cells that lie in a box of the class.
        largest: IoU of MaxBoxAcc at each threshold, float32 [n, T], NaN without a box; [n, 0] where it was not asked
            for.
        best: the same of MaxBoxAccV2.
    """

    index: IntArray
    class_id: IntArray
    positive: FloatArray
    hidden: FloatArray
    top: FloatArray
    bottom: FloatArray
    full_top: FloatArray
    full_bottom: FloatArray
    correlation: FloatArray
    control: FloatArray
    hit: FloatArray
    chance: FloatArray
    largest: npt.NDArray[np.float32]
    best: npt.NDArray[np.float32]


def _class_maps(
    classifier: Classifier, images: torch.Tensor, classes: torch.Tensor, dtype: torch.dtype | None
) -> npt.NDArray[np.float32]:
    """Maps fp32 [B, N, h, w] of the classes int64 [B, N]."""
    with autocast(images.device, dtype):
        maps = classifier(images, boost=False, classes=classes).maps
    array: npt.NDArray[np.float32] = maps.float().cpu().numpy()
    return array


@torch.no_grad()
def measure_maps(
    classifier: Classifier,
    loader: EvalLoader,
    split: Split,
    *,
    full: Classifier | None = None,
    negatives: int = 20,
    seed: int = 0,
    precision: str = "auto",
    tell_hidden: bool = False,
    fit_boxes: bool = False,
    task: str | None = None,
) -> MapTable | None:
    """Run one or two models over a split and measure the maps of known labels (collective).

    Args:
        classifier: in evaluation mode.
        loader: this rank's batches of the split.
        split: its labels, and its boxes where it has any.
        full: a model trained with full labels on the same classes, for correlations.
        negatives: known negatives of an image that are looked at, at most.
        seed: of their draw.
        precision: as `train.precision`.
        tell_hidden: tell positive labels that training sees from hidden ones; for the split that was trained on.
        fit_boxes: find the boxes of the maps of positive labels, too, which takes longer than the maps.
        task: what its progress is called; None shows none.

    Returns:
        The table on rank 0, None elsewhere.

    Raises:
        UserError: the two models' maps differ in size, the split has no known positive, or no boxes to fit.
    """
    if fit_boxes and split.boxes is None:
        raise UserError(
            f"split {split.name!r} has no boxes to fit; prepare the data set from annotations with boxes "
            "(docs/data.md), or leave --box-accuracy out"
        )
    dtype = inference_dtype(precision, loader.device)
    names = [f.name for f in fields(MapTable)]
    columns: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in names}
    with contextlib.nullcontext(loader) if task is None else loader.watched(task) as batches:
        for batch in batches:
            index = batch.index[: batch.real].cpu().numpy()
            known = split.known.rows(index)
            chosen = [chosen_classes(codes, int(i), negatives, seed) for codes, i in zip(known, index, strict=True)]
            width = max((len(c) for c in chosen), default=0) or 1
            # Ranks with a surplus batch forward it like the others; its maps are dropped.
            classes = np.full((len(batch.index), width), -1, np.int64)
            for place, ids in enumerate(chosen):
                classes[place, : len(ids)] = ids
            on_device = torch.from_numpy(classes).to(loader.device)
            images = batch.views["eval"]
            row, column = np.nonzero(classes[: batch.real] >= 0)
            maps = _class_maps(classifier, images, on_device, dtype)[row, column]
            other = None if full is None else _class_maps(full, images, on_device, dtype)[row, column]
            if other is not None and other.shape != maps.shape:
                raise UserError(
                    f"the maps of the two runs differ in size ({maps.shape[1]} x {maps.shape[2]} and "
                    f"{other.shape[1]} x {other.shape[2]} cells); compare runs with the same backbone and image size"
                )
            if len(row) == 0:
                continue
            part = _measure(maps, other, split, index[row], classes[row, column])
            part["positive"] = (known[row, classes[row, column]] == POSITIVE).astype(np.float64)
            part["hidden"] = part["positive"] * (1.0 - _seen(split, index, tell_hidden)[row, classes[row, column]])
            part |= _box_overlaps(maps, split, index[row], classes[row, column], part["positive"] == 1, fit_boxes)
            for name in ("correlation", "control"):
                part[name][part["positive"] == 0] = np.nan
            for name in names:
                columns[name].append(part[name])
    arrays = _gathered(columns, fit_boxes, loader.device)
    if arrays is None:
        return None
    order = np.lexsort((arrays["class_id"], arrays["index"]))
    table = MapTable(**{name: array[order] for name, array in arrays.items()})
    if not table.positive.any():
        raise UserError(f"split {split.name!r} has no known positive label; there are no maps to look at")
    return table


def _seen(split: Split, index: IntArray, told: bool) -> FloatArray:
    """Whether training sees that a label is positive, float64 [len(index), C]; NaN where this is not `told`."""
    seen = (split.observed.rows(index) == POSITIVE).astype(np.float64)
    return seen if told else np.full_like(seen, np.nan)


def _gathered(
    columns: dict[str, list[npt.NDArray[Any]]], fit_boxes: bool, device: torch.device
) -> dict[str, npt.NDArray[Any]] | None:
    """Columns of all ranks on rank 0, None elsewhere (collective).

    Args:
        columns: this rank's parts.
        fit_boxes: whether there are columns of MaxBoxAcc.
        device: over which ranks talk.
    """
    gathered = {}
    for name, parts in columns.items():
        if name in _BOX_COLUMNS and not fit_boxes:
            # Rows without columns are nothing to send.
            continue
        local = np.concatenate(parts) if parts else _no_rows(name)
        gathered[name] = distributed.gather_rows(torch.from_numpy(local).to(device))
    if not distributed.is_main():
        return None
    arrays = {name: tensor.cpu().numpy() for name, tensor in gathered.items()}
    for name in _BOX_COLUMNS:
        arrays.setdefault(name, np.empty((len(arrays["index"]), 0), np.float32))
    return arrays


def _measure(
    maps: npt.NDArray[np.float32],
    other: npt.NDArray[np.float32] | None,
    split: Split,
    index: IntArray,
    class_id: IntArray,
) -> dict[str, npt.NDArray[Any]]:
    """Columns of `MapTable`, except those of labels and MaxBoxAcc's, for n pairs with maps [n, h, w]."""
    count, height, width = maps.shape
    part: dict[str, npt.NDArray[Any]] = {"index": index.astype(np.int64), "class_id": class_id}
    part["top"], part["bottom"] = extremes(maps)
    for name in ("full_top", "full_bottom", "correlation", "control", "hit", "chance"):
        part[name] = np.full(count, np.nan)
    if other is not None:
        part["full_top"], part["full_bottom"] = extremes(other)
        part["correlation"] = rank_correlation(maps, other)
        centred = np.broadcast_to(centred_gaussian(height, width), other.shape)
        part["control"] = rank_correlation(centred, other)
    if split.boxes is not None:
        for pair, (sample, wanted) in enumerate(zip(index, class_id, strict=True)):
            of_class = boxes_of(split.boxes, sample, wanted)
            if len(of_class):
                part["hit"][pair] = peak_in_boxes(maps[pair], of_class)
                part["chance"][pair] = cells_in_boxes(of_class, height, width).mean()
    return part


# Of `MapTable`, one number for each threshold.
_BOX_COLUMNS = ("largest", "best")


def _no_rows(name: str) -> npt.NDArray[Any]:
    """A column of `MapTable` without rows."""
    if name in _BOX_COLUMNS:
        return np.empty((0, len(THRESHOLDS)), np.float32)
    return np.empty(0, np.int64 if name in ("index", "class_id") else np.float64)


def _box_overlaps(
    maps: npt.NDArray[np.float32],
    split: Split,
    index: IntArray,
    class_id: IntArray,
    positive: npt.NDArray[np.bool_],
    wanted: bool,
) -> dict[str, npt.NDArray[np.float32]]:
    """Columns `largest` and `best` of `MapTable` for n pairs with maps [n, h, w]."""
    width = len(THRESHOLDS) if wanted else 0
    part = {name: np.full((len(maps), width), np.nan, np.float32) for name in _BOX_COLUMNS}
    if wanted and split.boxes is not None:
        for pair in np.flatnonzero(positive):
            of_class = boxes_of(split.boxes, index[pair], class_id[pair])
            if len(of_class):
                part["largest"][pair], part["best"][pair] = overlaps(maps[pair], of_class)
    return part


def _quartiles(values: FloatArray) -> dict[str, float] | None:
    """Quartiles and mean of the values that are defined; None when there are none."""
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    low, middle, high = np.percentile(values, (25, 50, 75))
    return {"p25": float(low), "p50": float(middle), "p75": float(high), "mean": float(values.mean())}


def groups(table: MapTable) -> dict[str, npt.NDArray[np.bool_]]:
    """Which pairs bool [n] have a label of each kind: `positive` and `negative`.

    Where positives are hidden, `observed_positive` and `hidden_positive` are the two parts of `positive`.
    """
    positive, hidden = table.positive == 1, table.hidden == 1
    found = {"positive": positive, "negative": ~positive}
    if hidden.any():
        found |= {"observed_positive": positive & ~hidden, "hidden_positive": hidden}
    return found


def summarise(table: MapTable) -> dict[str, Any]:
    """Figures for a report.

    Returns:
        `pairs`: how many (image, class) pairs by label, as `groups` has them; `top` and `bottom`: quartiles by label
        of the model's `model` and the fully supervised `full` maps; `correlation` and its `control`, over positive
        labels; `correlation_by_label`: the same of the parts of positive labels; `pointing`: `accuracy` over pairs
        and `class_mean` over classes in per cent, `chance` for a peak anywhere, `pairs`; `boxes`: MaxBoxAcc as
        `localisation.BoxAccuracy` has it. Parts that need another model, hidden labels or boxes are None without.
    """
    by_label = groups(table)
    positive = by_label["positive"]
    out: dict[str, Any] = {"pairs": {name: int(chosen.sum()) for name, chosen in by_label.items()}}
    for end in ("top", "bottom"):
        model, full = getattr(table, end), getattr(table, f"full_{end}")
        out[end] = {
            name: {"model": _quartiles(model[chosen]), "full": _quartiles(full[chosen])}
            for name, chosen in by_label.items()
        }
    out["correlation"], out["control"] = _quartiles(table.correlation), _quartiles(table.control)
    parts = {name: _quartiles(table.correlation[chosen]) for name, chosen in by_label.items() if "_" in name}
    out["correlation_by_label"] = parts if out["correlation"] is not None and parts else None
    boxed = ~np.isnan(table.hit) & positive
    out["pointing"] = out["boxes"] = None
    if boxed.any() and table.largest.shape[1]:
        found = box_accuracy(table.largest[boxed], table.best[boxed], table.class_id[boxed])
        out["boxes"] = {"pairs": int(boxed.sum()), **asdict(found)}
    if boxed.any():
        classes = np.unique(table.class_id[boxed])
        per_class = [table.hit[boxed & (table.class_id == c)].mean() for c in classes]
        out["pointing"] = {
            "pairs": int(boxed.sum()),
            "accuracy": 100 * float(table.hit[boxed].mean()),
            "class_mean": 100 * float(np.mean(per_class)),
            "chance": 100 * float(table.chance[boxed].mean()),
        }
    return out
