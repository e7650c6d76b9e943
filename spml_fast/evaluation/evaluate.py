"""Evaluation: one pass over a split, any number of alphas, the same numbers for any number of ranks.

Batches are cut and padded in the same way whatever the world size (sampler.EvalSampler), so an image's logits do not
depend on how many ranks do the work; scores are brought together in sample order before anything is averaged.

Where a split is partly annotated, what is kept of a batch's [B, C] logits are the annotated pairs: 13 bytes each (17
with BoostLU's second mean) and one for each alpha, 38 MB for the two million pairs of the OpenImages V7 test set with
two alphas, against 9.7 GB of the two dense means.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spml_fast.core import distributed
from spml_fast.core.batch import MicroBatch
from spml_fast.core.config import Config, EvalConfig
from spml_fast.core.errors import UserError
from spml_fast.core.precision import autocast, inference_dtype, no_cudnn_benchmark
from spml_fast.data.labels import NEGATIVE, POSITIVE, UNKNOWN, LabelStore, SparseLabels
from spml_fast.data.loader import EvalLoader
from spml_fast.data.manifest import Manifest, Split
from spml_fast.evaluation.calibration import KnownEntries, entries_of_pairs, entries_of_scores, reliability
from spml_fast.evaluation.decisions import Decisions
from spml_fast.evaluation.entries import per_cent
from spml_fast.evaluation.metrics import evaluate_pairs, evaluate_scores, groups_by_count
from spml_fast.evaluation.thresholds import count_at_threshold_pairs, dense_threshold_counts, logit_threshold
from spml_fast.models.classifier import Classifier, boosted_logits, check_alpha

TOP_K, GROUPS = 3, 5


@dataclass
class Scores:
    """The two means of the head for a whole split, on rank 0 in sample order.

    Attributes:
        mean: fp32 [N, C], or [M] for the M annotated pairs of a partly annotated split.
        mean_relu: the same shape, or None when only alpha 1 was asked for.
        index: int64 [N] sample of each row, or int32 [M] of each pair.
        class_id: int32 [M] for pairs, else None.
        code: int8 [M] for pairs, else None (the labels are then read from the split).
        top: alpha -> bool [M], whether the pair's class is among its image's TOP_K highest.
    """

    mean: npt.NDArray[np.float32]
    mean_relu: npt.NDArray[np.float32] | None
    index: npt.NDArray[np.signedinteger]
    class_id: npt.NDArray[np.int32] | None = None
    code: npt.NDArray[np.int8] | None = None
    top: dict[float, npt.NDArray[np.bool_]] | None = None

    def at_alpha(self, alpha: float) -> npt.NDArray[np.float32]:
        """fp32 logits of the shape of `mean`."""
        relu = None if self.mean_relu is None else torch.from_numpy(self.mean_relu)
        return boosted_logits(torch.from_numpy(self.mean), relu, alpha).numpy()

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        arrays = [self.mean, self.mean_relu, self.index, self.class_id, self.code, *(self.top or {}).values()]
        return sum(a.nbytes for a in arrays if a is not None)


def top_k_rows(scores: Tensor, k: int) -> Tensor:
    """`metrics.top_k_mask` where the scores are: the k highest of each row, bool [B, C], smaller class ids first."""
    if scores.shape[1] <= k:
        return torch.ones_like(scores, dtype=torch.bool)
    edge = scores.topk(k, dim=1).values[:, -1:]
    above, level = scores > edge, scores == edge
    places = k - above.sum(1, keepdim=True)
    return above | (level & (level.cumsum(1) <= places))


def _columns(
    index: Tensor, mean: Tensor, relu: Tensor | None, store: LabelStore | None, alphas: Sequence[float]
) -> list[Tensor]:
    """What is kept of a batch: index, means, and with a store class, code and top-k of each annotated pair.

    Args:
        index: int64 [B] samples.
        mean: fp32 [B, C], mean(M).
        relu: fp32 [B, C], mean(relu M), or None.
        store: labels of a partly annotated split; None keeps whole rows.
        alphas: BoostLU's factors whose top-k are wanted.
    """
    if store is None:
        return [index, mean] + ([] if relu is None else [relu])
    codes = store.rows(index)
    row, column = torch.nonzero(codes != UNKNOWN, as_tuple=True)
    part = [index[row].int(), mean[row, column]] + ([] if relu is None else [relu[row, column]])
    part += [column.int(), codes[row, column]]
    for alpha in alphas:
        top = top_k_rows(boosted_logits(mean, relu, alpha), TOP_K)
        part.append(top[row, column].to(torch.int8))
    return part


@torch.no_grad()
def score_split(
    classifier: Classifier,
    loader: EvalLoader,
    labels: SparseLabels,
    alphas: Sequence[float],
    dtype: torch.dtype | None,
    task: str | None = None,
) -> Scores | None:
    """Run the classifier over a split (collective).

    Fully annotated splits keep whole score rows; partly annotated ones keep the annotated pairs alone, so that nothing
    of N x C is held where C is large.

    Args:
        classifier: put into eval mode by the caller.
        loader: this rank's batches.
        labels: known labels of the split.
        alphas: BoostLU factors that will be asked for.
        dtype: autocast dtype of the network, or None.
        task: what its progress is called; None shows none.

    Returns:
        Scores on rank 0, None elsewhere.
    """
    boost = any(a != 1 for a in alphas)

    def outputs(batches: Iterable[MicroBatch]) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        for batch in batches:
            with autocast(loader.device, dtype), no_cudnn_benchmark():
                output = classifier(batch.views["eval"], boost=boost)
            relu = None if output.mean_relu is None else output.mean_relu[: batch.real]
            yield batch.index[: batch.real], output.mean[: batch.real], relu

    with contextlib.nullcontext(loader) if task is None else loader.watched(task) as batches:
        return gather_scores(outputs(batches), labels, alphas, loader.device)


def gather_scores(
    outputs: Iterable[tuple[Tensor, Tensor, Tensor | None]],
    labels: SparseLabels,
    alphas: Sequence[float],
    device: torch.device,
) -> Scores | None:
    """The scores of a split from what each rank has of it (collective); kept as in `score_split`.

    Args:
        outputs: this rank's, some images at a time: samples int64 [n], mean(M) fp32 [n, C], and mean(relu M) of the
            same shape where an alpha is not 1.
        labels: known labels of the split.
        alphas: BoostLU factors that will be asked for.
        device: where the ranks exchange them.

    Returns:
        Scores on rank 0, None elsewhere.
    """
    pairs, boost = labels.default == UNKNOWN, any(a != 1 for a in alphas)
    store = LabelStore(labels, device) if pairs else None
    parts = [[t.cpu() for t in _columns(*output, store, alphas)] for output in outputs if len(output[0])]
    width = labels.num_classes
    shapes: list[tuple[tuple[int, ...], torch.dtype]] = [((0,), torch.int32 if pairs else torch.int64)]
    shapes += [((0,) if pairs else (0, width), torch.float32)] * (2 if boost else 1)
    if pairs:
        shapes += [((0,), torch.int32), ((0,), torch.int8)] + [((0,), torch.int8)] * len(alphas)
    columns = [
        torch.cat([p[i] for p in parts]) if parts else torch.empty(shape, dtype=kind)
        for i, (shape, kind) in enumerate(shapes)
    ]
    gathered = [distributed.gather_rows(c.to(device)) for c in columns]
    if not distributed.is_main():
        return None
    index_all = gathered[0].cpu().numpy()
    order = np.argsort(index_all, kind="stable")
    arrays = [g.cpu().numpy()[order] for g in gathered]
    relu_all = arrays[2] if boost else None
    if not pairs:
        return Scores(arrays[1], relu_all, arrays[0])
    rest = arrays[3:] if boost else arrays[2:]
    tops = {alpha: rest[2 + i].astype(bool) for i, alpha in enumerate(alphas)}
    return Scores(arrays[1], relu_all, arrays[0], rest[0], rest[1], tops)


def measure(
    scores: Scores,
    labels: SparseLabels,
    alpha: float,
    config: EvalConfig,
    classes: Sequence[str],
    groups: npt.NDArray[np.int64] | None = None,
    decisions: Decisions | None = None,
) -> dict[str, Any]:
    """All metrics at one alpha, in per cent; see `metrics.evaluate_scores`.

    Args:
        scores: of the split, with this alpha's top-k where they are pairs.
        labels: known labels of the split.
        alpha: BoostLU's factor.
        config: definition of average precision, threshold, and the convention for classes without positives.
        classes: names for error messages.
        groups: int64 [C], group of each class, or None.
        decisions: of the run; where they are for this alpha the metrics have `decisions`, see `decided_metrics`.
    """
    logits = scores.at_alpha(alpha)
    decided = {}
    if decisions is not None and decisions.alpha == alpha:
        decided = {"decisions": decided_metrics(scores, labels, decisions, classes)}
    options: dict[str, Any] = {
        "definition": config.definition,
        "threshold": logit_threshold(config.threshold),
        "class_names": classes,
        "top_k": TOP_K,
        "groups": groups,
    }
    if config.empty_classes is not None:
        options["empty_classes"] = config.empty_classes
    if scores.class_id is None:
        return evaluate_scores(logits, labels.rows(scores.index), **options) | decided
    assert scores.code is not None and scores.top is not None
    metrics = evaluate_pairs(
        scores.class_id,
        logits,
        scores.code,
        labels.num_classes,
        row=scores.index,
        in_top_k=scores.top[alpha],
        **options,
    )
    return metrics | decided


def known_entries(scores: Scores, labels: SparseLabels, alpha: float, classes: Sequence[str]) -> KnownEntries:
    """The known labels of a split with their logits at one alpha.

    Args:
        scores: of the split.
        labels: known labels of the split.
        alpha: BoostLU's factor.
        classes: names for error messages.

    Raises:
        UserError: a score is not a number.
    """
    logits = scores.at_alpha(alpha)
    if scores.class_id is None:
        return entries_of_scores(logits, labels.rows(scores.index), classes)
    assert scores.code is not None
    return entries_of_pairs(scores.class_id, logits, scores.code, labels.num_classes, classes)


def decided_metrics(
    scores: Scores, labels: SparseLabels, decisions: Decisions, classes: Sequence[str]
) -> dict[str, float | None]:
    """What a run's thresholds and calibration reach on a split, in per cent.

    Args:
        scores: of the split.
        labels: known labels of the split.
        decisions: of the run.
        classes: names for error messages.

    Returns:
        `OP`, `OR`, `OF1`, `CP`, `CR`, `CF1`, `CF1_mean` with its thresholds, and `expected_calibration_error` of its
        probabilities beside `expected_calibration_error_uncalibrated` of the sigmoid of the logits.

    Raises:
        UserError: a score is not a number.
    """
    logits = scores.at_alpha(decisions.alpha)
    entries = known_entries(scores, labels, decisions.alpha, classes)
    margins = decisions.margins(logits, scores.class_id)
    if scores.class_id is None:
        rows = labels.rows(scores.index)
        counts = dense_threshold_counts(margins, rows, 0.0, inclusive=True, top_ks=[None], class_names=classes)[0]
    else:
        assert scores.code is not None
        counts = count_at_threshold_pairs(scores.class_id, margins, scores.code, labels.num_classes, inclusive=True)
    out = {name: per_cent(value) for name, value in counts.metrics().items()}
    calibrated = decisions.calibration.logits(entries.logit, entries.class_id)
    name = "expected_calibration_error"
    out[name] = reliability(calibrated, entries.positive)[name]
    out[f"{name}_uncalibrated"] = reliability(entries.logit, entries.positive)[name]
    return out


def class_groups(manifest: Manifest, config: Config) -> npt.NDArray[np.int64] | None:
    """Groups of classes by how often the training split annotates them (OpenImages: five groups, rarest first).

    By default (`eval.groups` null) five groups where the training labels are partly known, and none where they are
    complete, where there is no training split, or where there are fewer than five classes.

    Returns:
        int64 [C], or None without groups.

    Raises:
        UserError: groups were asked for and there is no training split, or there are fewer classes than groups.

    Source: the groups of BoostLU's and Large Loss's OpenImages V3 tables; docs/sources.md#openimages.
    """
    number, name = config.eval.groups, config.data.train_split
    if number == 0:
        return None
    if name not in manifest.splits:
        if number is None:
            return None
        raise UserError(
            f"eval.groups sorts classes by their labels in split {name!r}, which {manifest.source} does not have; "
            "set eval.groups to 0"
        )
    known = manifest.split(name).known
    partly = known.default == UNKNOWN
    if number is None:
        if not partly or manifest.num_classes < GROUPS:
            return None
        number = GROUPS
    counts = known.class_counts(POSITIVE)
    if partly and config.eval.group_by == "labels":
        counts = counts + known.class_counts(NEGATIVE)
    return groups_by_count(counts, number)


def table_rows(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures of one alpha for people: (name, value) pairs of a table."""

    def text(value: float | None) -> str:
        return "not defined" if value is None else f"{value:.2f}"

    one_sided = metrics["classes_without_positive"] or metrics["classes_without_negative"]
    names = {"map": f"mAP ({metrics['empty_classes']})" if one_sided else "mAP"}
    if metrics["classes_without_positive"]:
        names |= {
            "map_zero": "mAP, classes without a positive count 0",
            "map_skip_unlabelled": "mAP, classes without a label left out",
            "map_skipping": "mAP, classes without a positive left out",
        }
    if metrics["classes_without_negative"]:
        names["map_skip_one_sided"] = "mAP, classes without a positive or a negative left out"
    if metrics["num_negatives"] and one_sided:
        names["map_weighted"] = "mAP weighted by positives"
    # Conventions that agree are one figure, shown once.
    rows, shown = list[tuple[str, str]](), set[float | None]()
    for name, title in names.items():
        if metrics[name] not in shown:
            rows.append((title, text(metrics[name])))
            shown.add(metrics[name])
    if "groups" in metrics:
        size = metrics["groups"][0]["num_classes"]
        title = f"mAP of {len(metrics['groups'])} groups of about {size} classes, rarest in training first"
        rows.append((title, " / ".join(text(g["map"]) for g in metrics["groups"])))
    rows += [(name, text(metrics[name])) for name in ("OF1", "CF1", "OF1_top3", "CF1_top3") if name in metrics]
    if "decisions" in metrics:
        decided = metrics["decisions"]
        rows += [(f"{name} with the run's thresholds", text(decided[name])) for name in ("OF1", "CF1")]
        errors = [decided[f"expected_calibration_error{end}"] for end in ("", "_uncalibrated")]
        rows.append(("expected calibration error", " / uncalibrated ".join(map(text, dict.fromkeys(errors)))))
    rows.append(("classes without a positive", str(metrics["classes_without_positive"])))
    rows.append(("classes without a label", str(metrics["classes_without_label"])))
    return rows


def class_rows(
    found: Mapping[float, dict[str, Any]], labels: SparseLabels, classes: Sequence[str]
) -> list[tuple[str, ...]]:
    """A row for each class: name, positive and known images of the split, and the AP at every alpha, in per cent.

    Args:
        found: alpha -> metrics, from `evaluate_split`.
        labels: known labels of the split.
        classes: class names.
    """
    positives, negatives = labels.class_counts(POSITIVE), labels.class_counts(NEGATIVE)
    if labels.default == NEGATIVE:
        listed = sum(labels.class_counts(code) for code in (POSITIVE, NEGATIVE, UNKNOWN))
        negatives = negatives + len(labels) - listed
    per_class = [metrics["per_class_ap"] for metrics in found.values()]
    return [
        (name, f"{positives[i]:,}", f"{positives[i] + negatives[i]:,}", *(_ap_text(ap[i]) for ap in per_class))
        for i, name in enumerate(classes)
    ]


def _ap_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def check_alphas(alphas: Sequence[float], classifier: Classifier, config: Config) -> None:
    """Raise `UserError` for a BoostLU factor that is not positive, or is not 1 where the head has no map to boost."""
    for alpha in alphas:
        check_alpha(alpha, "alpha")
        if alpha != 1 and not classifier.head.supports_boostlu:
            raise UserError(
                f"alpha {alpha:g} has no meaning for head {config.model.head}, which has no class activation map; "
                "use alpha 1"
            )


def evaluate_split(
    classifier: Classifier,
    loader: EvalLoader,
    split: Split,
    alphas: Sequence[float],
    config: Config,
    classes: Sequence[str],
    groups: npt.NDArray[np.int64] | None = None,
    decisions: Decisions | None = None,
    task: str | None = None,
    look: Callable[[Scores], None] = lambda _: None,
) -> dict[float, dict[str, Any]]:
    """Metrics of a split at every alpha, on every rank (collective).

    Args:
        classifier: on the loader's device; its mode is kept.
        loader: this rank's batches of the split.
        split: whose known labels are the truth.
        alphas: BoostLU factors.
        config: precision, head, and how to evaluate.
        classes: names for error messages.
        groups: int64 [C] from `class_groups`, or None.
        decisions: of the run, as in `measure`; rank 0's count.
        task: what its progress is called; None shows none.
        look: called with the scores on rank 0, for what else is to be made of them.

    Returns:
        alpha -> metrics (per cent); ranks other than 0 get `map` alone.
    """
    check_alphas(alphas, classifier, config)
    was_training = classifier.training
    classifier.eval()
    dtype = inference_dtype(config.train.precision, loader.device)
    scores = score_split(classifier, loader, split.known, alphas, dtype, task)
    classifier.train(was_training)
    results: dict[float, dict[str, Any]] = {alpha: {} for alpha in alphas}
    maps = torch.zeros(len(alphas), dtype=torch.float64, device=loader.device)
    if scores is not None:
        for i, alpha in enumerate(alphas):
            results[alpha] = metrics = measure(scores, split.known, alpha, config.eval, classes, groups, decisions)
            maps[i] = float("nan") if metrics["map"] is None else metrics["map"]
        look(scores)
    # Rank 0 alone has measured, perhaps for longer than a collective waits.
    distributed.barrier()
    # NaN survives the sum, so every rank takes the same decisions.
    maps = distributed.all_reduce_sum(maps)
    for i, alpha in enumerate(alphas):
        results[alpha]["map"] = float(maps[i])
    return results
