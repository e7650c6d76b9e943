"""Evaluation of partly known labels: annotated pairs alone, conventions, groups of classes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from spml_fast.core import distributed
from spml_fast.core.batch import MicroBatch
from spml_fast.core.config import Config, DataConfig, EvalConfig, MethodOptions, ModelConfig, TrainConfig
from spml_fast.core.errors import UserError
from spml_fast.data.labels import NEGATIVE, POSITIVE, SparseLabels
from spml_fast.data.manifest import Manifest
from spml_fast.evaluation.calibration import Calibration, reliability, uncalibrated
from spml_fast.evaluation.decisions import Decisions
from spml_fast.evaluation.evaluate import (
    check_alphas,
    class_groups,
    class_rows,
    evaluate_split,
    known_entries,
    score_split,
    table_rows,
    top_k_rows,
)
from spml_fast.evaluation.metrics import evaluate_scores, groups_by_count
from spml_fast.evaluation.thresholds import logit_threshold, top_k_mask
from spml_fast.methods import get_method
from spml_fast.models.classifier import ClassifierOutput, boosted_logits
from tests.support.data import some_labels
from tests.support.methods import on_ranks

CPU = torch.device("cpu")


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 8)), elements=st.sampled_from([-1, 0, 0.5, 2])),
    st.integers(1, 4),
)
def test_top_k_where_the_scores_are(scores, k):
    assert np.array_equal(top_k_rows(torch.from_numpy(scores), k).numpy(), top_k_mask(scores, k))


class Scripted:
    """A classifier and loader whose two means of image i are given."""

    def __init__(self, mean: torch.Tensor, relu: torch.Tensor, batch: int) -> None:
        self.mean, self.relu, self.batch, self.device = mean, relu, batch, CPU
        self.training, self.head = False, SimpleNamespace(supports_boostlu=True)
        self.widest = 0

    def eval(self) -> None:
        self.training = False

    def train(self, mode: bool) -> None:
        self.training = mode

    def __call__(self, images: torch.Tensor, boost: bool) -> ClassifierOutput:
        assert not self.training, "statistics and dropout of training"
        index = images[:, 0, 0, 0].long()
        self.widest = max(self.widest, len(index))
        return ClassifierOutput(self.mean[index], self.relu[index] if boost else None, self.mean[index])

    def __iter__(self) -> Any:
        for start in range(0, len(self.mean), self.batch):
            index = torch.arange(start, start + self.batch).clamp(max=len(self.mean) - 1)
            images = index.float()[:, None, None, None].expand(-1, 3, 1, 1)
            real = min(self.batch, len(self.mean) - start)
            yield MicroBatch({"eval": images}, index, real, real, real)


@pytest.fixture(scope="module")
def partly() -> tuple[Scripted, SparseLabels]:
    """300 images, 9,605 classes, about 13 labels an image."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(300, 9605, generator=generator)
    return Scripted(mean, mean.clamp(min=0) + 0.1, 64), some_labels(300, 9605, 13)


def test_scores_of_annotated_pairs_alone_are_held(partly):
    scripted, known = partly
    scores = score_split(scripted, scripted, known, [1.0, 5.0], None)
    pairs = len(known.codes)
    assert scores is not None and scores.nbytes == pairs * 19 < scripted.mean.nbytes // 50
    assert scripted.widest == 64
    rows = known.entry_rows()
    assert np.array_equal(scores.index, rows) and np.array_equal(scores.class_id, known.classes)
    assert np.array_equal(scores.mean, scripted.mean.numpy()[rows, known.classes])


def test_pairs_give_what_dense_scores_give(partly):
    scripted, known = partly
    config = Config(method=get_method("an").Options(name="an"))
    groups = groups_by_count(known.class_counts(POSITIVE) + known.class_counts(NEGATIVE))
    split = SimpleNamespace(known=known)
    names = [str(c) for c in range(9605)]
    found = evaluate_split(scripted, scripted, split, [1.0, 5.0], config, names, groups)
    for alpha in (1.0, 5.0):
        dense = scripted.mean + (alpha - 1) * scripted.relu
        expected = evaluate_scores(
            dense.numpy(), known.rows(range(300)), empty_classes="skip_unlabelled", groups=groups
        )
        assert found[alpha] == expected
        assert [g["num_classes"] for g in found[alpha]["groups"]] == [1921] * 5
    config = dataclasses.replace(config, eval=EvalConfig(empty_classes="zero"))
    again = evaluate_split(scripted, scripted, split, [5.0], config, names)[5.0]
    assert again["map"] == found[5.0]["map_zero"] < found[5.0]["map"] and "groups" not in again


def test_a_pass_that_has_a_name_is_watched(partly):
    scripted, known = partly
    entered: list[tuple[str, int]] = []

    class Watched(Scripted):
        @contextlib.contextmanager
        def watched(self, task: str) -> Any:
            batches = list(self)
            yield iter(batches)
            entered.append((task, len(batches)))

    loader = Watched(scripted.mean, scripted.relu, 64)
    config = Config(method=get_method("an").Options(name="an"))
    names = [str(c) for c in range(9605)]
    results = [
        evaluate_split(scripted, loader, SimpleNamespace(known=known), [1.0], config, names, task=task)[1.0]["map"]
        for task in (None, "validation")
    ]
    assert results[0] == results[1] and entered == [("validation", 5)]


class Backwards(Scripted):
    """Hands the batches in from the last to the first, as ranks that take turns may."""

    def __iter__(self) -> Any:
        yield from reversed(list(super().__iter__()))


@pytest.mark.parametrize("alphas", [[1.0], [1.0, 5.0], [0.5]])
def test_whole_rows_of_a_fully_annotated_split(alphas):
    """Scores come back in the order of the images; mean(relu M) is held only where an alpha needs it."""
    generator = torch.Generator().manual_seed(3)
    mean = torch.randn(50, 6, generator=generator)
    scripted = Backwards(mean, mean.clamp(min=0) + torch.rand(50, 6, generator=generator), 16)
    codes = (torch.rand(50, 6, generator=generator) < 0.3).to(torch.int8).numpy()
    known = SparseLabels.from_dense(codes, 0)
    scores = score_split(scripted, scripted, known, alphas, None)
    assert scores is not None and scores.class_id is None and scores.code is None
    assert np.array_equal(scores.index, np.arange(50)) and np.array_equal(scores.mean, mean.numpy())
    if alphas == [1.0]:
        assert scores.mean_relu is None
    else:
        assert np.array_equal(scores.mean_relu, scripted.relu.numpy())
    config = Config(method=get_method("an").Options(name="an"))
    scripted.training = True
    found = evaluate_split(scripted, scripted, SimpleNamespace(known=known), alphas, config, list("abcdef"))
    assert list(found) == alphas and scripted.training, "the classifier's mode is kept"
    for alpha in alphas:
        dense = mean + (alpha - 1) * scripted.relu
        assert found[alpha] == evaluate_scores(dense.numpy(), codes)


class Batches:
    """The batches of a scripted classifier, which cannot classify."""

    def __init__(self, scripted: Scripted) -> None:
        self.scripted, self.device = scripted, CPU

    def __iter__(self) -> Any:
        return iter(self.scripted)


class NotesPrecision(Scripted):
    """Notes the autocast dtype under which it runs."""

    dtype: torch.dtype | None = None

    def __call__(self, images: torch.Tensor, boost: bool) -> ClassifierOutput:
        self.dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        return super().__call__(images, boost)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", None)])
def test_the_network_runs_in_the_precision_of_training(precision, dtype, monkeypatch):
    monkeypatch.setattr("spml_fast.core.precision.has_bf16", lambda device: True)
    mean = torch.tensor([[0.5], [-1.0]])
    scripted = NotesPrecision(mean, mean, 2)
    config = Config(method=get_method("an").Options(name="an"), train=TrainConfig(precision=precision))
    split = SimpleNamespace(known=SparseLabels.from_dense(np.array([[1], [0]]), 0))
    assert evaluate_split(scripted, Batches(scripted), split, [1.0], config, ["a"])[1.0]["map"] == 100
    assert scripted.dtype is dtype


@pytest.mark.parametrize("alphas", [[1.0], [1.0, 5.0]])
@pytest.mark.parametrize("default", [0, -1])
def test_a_rank_without_images_has_empty_columns_of_the_right_types(default, alphas):
    """Ranks join what they have, so that one with nothing must have the columns and types of the others."""
    mean = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    codes = np.array([[1, 0, 1]] * 4, np.int8)
    some, none = (
        score_split(scripted, scripted, SparseLabels.from_dense(codes[: len(scripted.mean)], default), alphas, None)
        for scripted in (Scripted(mean, mean, 2), Scripted(mean[:0], mean[:0], 2))
    )
    assert len(some.index) in (4, 12)
    for name in ("index", "mean", "mean_relu", "class_id", "code"):
        full, empty = getattr(some, name), getattr(none, name)
        assert (full is None) == (empty is None), name
        if full is not None:
            assert empty.dtype == full.dtype and empty.shape == (0, *full.shape[1:]), name
    assert (some.mean_relu is None) == (alphas == [1.0]) and (some.top is None) == (default == 0)
    for alpha in some.top or {}:
        assert none.top[alpha].shape == (0,) and none.top[alpha].dtype == bool


@pytest.mark.parametrize("alphas", [[1.0], [1.0, 5.0]])
@pytest.mark.parametrize("default", [0, -1])
def test_ranks_without_images_add_nothing(default, alphas, monkeypatch):
    """The first of two ranks has no batch; together they have what one has alone."""
    generator = torch.Generator().manual_seed(2)
    mean, relu = torch.randn(4, 3, generator=generator), torch.rand(4, 3, generator=generator)
    known = SparseLabels.from_dense(np.array([[1, 0, 1]] * 4, np.int8), default)
    whole, nothing = Scripted(mean, relu, 2), Scripted(mean[:0], relu[:0], 2)
    alone = score_split(whole, whole, known, alphas, None)
    # Threads send nothing to a single one.
    monkeypatch.setattr(distributed, "gather_rows", distributed.all_gather_rows)

    def work(rank: int) -> Any:
        scripted = whole if rank == 1 else nothing
        return score_split(scripted, scripted, known, alphas, None)

    first, second = on_ranks(2, work)
    assert second is None, "rank 0 alone has the scores"
    for name in ("index", "mean", "mean_relu", "class_id", "code"):
        found, expected = getattr(first, name), getattr(alone, name)
        assert np.array_equal(found, expected), name
    assert (first.top or {}).keys() == (alone.top or {}).keys()
    assert all(np.array_equal(first.top[alpha], alone.top[alpha]) for alpha in first.top or {})


def test_a_head_without_a_map_takes_alpha_1_alone(partly):
    scripted = partly[0]
    head = SimpleNamespace(supports_boostlu=False)
    config = Config(method=get_method("an").Options(name="an"), model=ModelConfig(head="query2label"))
    check_alphas([1.0], SimpleNamespace(head=head), config)
    check_alphas([1.0, 0.5, 5.0], scripted, config)
    for alpha in (0.5, 5.0):
        with pytest.raises(UserError, match=f"alpha {alpha:g} has no meaning for head query2label"):
            check_alphas([1.0, alpha], SimpleNamespace(head=head), config)


@pytest.mark.parametrize("alpha", [0.0, -2.0, float("nan")])
def test_an_alpha_that_is_not_positive_is_refused(partly, alpha):
    scripted, known = partly
    config = Config(method=get_method("an").Options(name="an"))
    with pytest.raises(UserError, match=r"^alpha is .*; BoostLU's alpha must be greater than 0"):
        evaluate_split(scripted, scripted, SimpleNamespace(known=known), [1.0, alpha], config, [])


def test_table_shows_conventions_and_groups(partly):
    scripted, known = partly
    config = Config(method=get_method("an").Options(name="an"))
    groups = groups_by_count(known.class_counts(POSITIVE) + known.class_counts(NEGATIVE))
    found = evaluate_split(scripted, scripted, SimpleNamespace(known=known), [1.0], config, ["x"] * 9605, groups)[1.0]
    rows = dict(table_rows(found))
    assert rows["mAP (skip_unlabelled)"] == f"{found['map']:.2f}"
    assert rows["mAP, classes without a positive count 0"] == f"{found['map_zero']:.2f}"
    assert rows["mAP, classes without a positive left out"] == f"{found['map_skipping']:.2f}"
    (shown,) = (value for name, value in rows.items() if "5 groups of about 1921" in name)
    # The rarest classes have no label in these images.
    assert shown.split(" / ")[0] == "not defined" and shown.split(" / ")[-1] == f"{found['groups'][-1]['map']:.2f}"
    assert rows["classes without a label"] == str(found["classes_without_label"])
    assert (
        rows["classes without a positive"] == str(found["classes_without_positive"]) != rows["classes without a label"]
    )
    uneven = evaluate_scores(np.zeros((2, 3), np.float32), np.array([[1, 1, 1], [0, 0, 0]]), groups=[0, 0, 1])
    assert "mAP of 2 groups of about 2 classes, rarest in training first" in dict(table_rows(uneven))


def test_figures_that_agree_are_shown_once():
    scores = np.array([[2.0, -1.0], [1.0, 0.5], [-1.0, 2.0]], np.float32)
    complete = dict(table_rows(evaluate_scores(scores, np.array([[1, 0], [0, 1], [1, 1]]))))
    assert [name for name in complete if name.startswith("mAP")] == ["mAP"]
    lacking = dict(table_rows(evaluate_scores(scores, np.array([[1, 0], [0, 0], [1, 0]]))))
    assert lacking["mAP (zero)"] == "41.67"
    # A complete set with classes of different sizes needs no other convention.
    scores4 = np.array([[2.0, -1.0], [1.0, 0.5], [-1.0, 2.0], [0.0, 1.0]], np.float32)
    uneven = dict(table_rows(evaluate_scores(scores4, np.array([[1, 0], [0, 1], [1, 1], [1, 0]]))))
    assert [name for name in uneven if name.startswith("mAP")] == ["mAP"]
    # Classes without a positive left out, and those with one alone, are the same class.
    assert [n for n in lacking if n.startswith("mAP,")] == ["mAP, classes without a positive left out"]


def test_conventions_that_differ_are_all_shown():
    """Classes of every kind: with both signs, with positives alone, with negatives alone, without a label."""
    codes = np.array([[1, 1, 0, -1, 1], [0, 1, 0, -1, 0], [1, -1, 0, -1, 0], [0, 1, -1, -1, 0]])
    scores = np.array([[2, 0, 1, 1, 0], [3, 1, 0, 0, 1], [1, 0, 2, 0, 2], [0, 2, 0, 1, 3]], np.float32)
    metrics = evaluate_scores(scores, codes, empty_classes="skip_unlabelled")
    rows = dict(table_rows(metrics))
    # AP by hand: (1/2 + 2/3) / 2, 1 without a negative, 1/4; the third class has no positive.
    zero, one, last = 7 / 12, 1.0, 1 / 4
    assert {name: value for name, value in rows.items() if name.startswith("mAP")} == {
        "mAP (skip_unlabelled)": f"{100 * (zero + one + last) / 4:.2f}",
        "mAP, classes without a positive count 0": f"{100 * (zero + one + last) / 5:.2f}",
        "mAP, classes without a positive left out": f"{100 * (zero + one + last) / 3:.2f}",
        "mAP, classes without a positive or a negative left out": f"{100 * (zero + last) / 2:.2f}",
        "mAP weighted by positives": f"{100 * (2 * zero + 3 * one + last) / 6:.2f}",
    }


def test_table_shows_the_measures_at_a_threshold():
    scores = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)
    metrics = evaluate_scores(scores, (scores > 0.3).astype(np.int8), top_k=3)
    rows = dict(table_rows(metrics))
    for name in ("OF1", "CF1", "OF1_top3", "CF1_top3"):
        assert rows[name] == f"{metrics[name]:.2f}"


def test_classes_without_negatives_alone_bring_their_conventions():
    scores = np.array([[2.0, -1.0], [1.0, 0.5], [-1.0, 2.0]], np.float32)
    rows = dict(table_rows(evaluate_scores(scores, np.array([[1, 0], [1, 1], [1, 0]]))))
    assert {name: value for name, value in rows.items() if name.startswith("mAP")} == {
        "mAP (zero)": "75.00",
        "mAP, classes without a positive or a negative left out": "50.00",
        "mAP weighted by positives": "87.50",
    }
    # Nobody weighs where there is no negative at all.
    positives = dict(table_rows(evaluate_scores(scores, np.ones((3, 2), np.int8))))
    assert [name for name in positives if "weighted" in name] == []


@pytest.mark.parametrize("default", [NEGATIVE, -1])
def test_what_a_runs_decisions_reach(default):
    """Thresholds and probabilities of the run at its alpha, over the known labels alone, against sums by hand."""
    generator, rng = torch.Generator().manual_seed(1), np.random.default_rng(1)
    mean = torch.randn(40, 5, generator=generator) * 2
    relu = mean.clamp(min=0) + 0.3
    scripted = Scripted(mean, relu, 16)
    codes = rng.choice([1, 0] if default == NEGATIVE else [1, 0, -1], (40, 5))
    known = SparseLabels.from_dense(codes, default)
    scale, shift = rng.uniform(0.3, 2, 5), rng.normal(size=5)
    boosted = boosted_logits(mean, relu, 3.0).double().numpy()
    probability = 1 / (1 + np.exp(-(boosted * scale + shift)))
    threshold = np.array([0.5, 0.2, 0.8, 1.0, 0.4])
    # A threshold of 1 predicts nothing.
    decisions = Decisions(3.0, threshold, Calibration("per-class", scale, shift))
    predicted = probability >= threshold
    hits = (predicted & (codes == 1)).sum(0)
    claims, positives = (predicted & (codes != -1)).sum(0), (codes == 1).sum(0)
    config = Config(method=get_method("an").Options(name="an"))
    split, names = SimpleNamespace(known=known), list("abcde")
    found = evaluate_split(scripted, scripted, split, [1.0, 3.0], config, names, None, decisions)
    assert "decisions" not in found[1.0], "they are for another alpha"
    figures = found[3.0]["decisions"]
    op, orr = hits.sum() / claims.sum(), hits.sum() / positives.sum()
    assert figures["OP"] == pytest.approx(100 * op) and figures["OR"] == pytest.approx(100 * orr)
    assert figures["OF1"] == pytest.approx(100 * 2 * op * orr / (op + orr))
    seen = codes != -1
    column = np.broadcast_to(np.arange(5), codes.shape)[seen]
    for name, values in (("", boosted[seen] * scale[column] + shift[column]), ("_uncalibrated", boosted[seen])):
        error = reliability(values, codes[seen] == 1)["expected_calibration_error"]
        assert figures[f"expected_calibration_error{name}"] == pytest.approx(error, rel=1e-5)
    rows = dict(table_rows(found[3.0]))
    assert rows["OF1 with the run's thresholds"] == f"{figures['OF1']:.2f}" != rows["OF1"]
    assert rows["CF1 with the run's thresholds"] == f"{figures['CF1']:.2f}"
    assert rows["expected calibration error"] == (
        f"{figures['expected_calibration_error']:.2f} / uncalibrated "
        f"{figures['expected_calibration_error_uncalibrated']:.2f}"
    )
    scores = score_split(scripted, scripted, known, [3.0], None)
    entries = known_entries(scores, known, 3.0, names)
    order = np.lexsort((entries.class_id, entries.logit))
    wanted = np.lexsort((column, boosted[seen]))
    assert np.allclose(entries.logit[order], boosted[seen][wanted])
    assert np.array_equal(entries.class_id[order], column[wanted])
    assert np.array_equal(entries.positive[order], (codes[seen] == 1)[wanted])


def test_a_probability_that_is_the_threshold_is_predicted():
    for default in (NEGATIVE, -1):
        mean = torch.tensor([[0.0], [-1.0]])
        known = SparseLabels.from_dense(np.array([[1], [0]]), default)
        decisions = Decisions(1.0, np.array([0.5]), uncalibrated(1))
        scripted = Scripted(mean, mean, 2)
        config = Config(method=get_method("an").Options(name="an"))
        found = evaluate_split(scripted, scripted, SimpleNamespace(known=known), [1.0], config, ["a"], None, decisions)
        assert found[1.0]["decisions"]["OF1"] == 100


@pytest.mark.parametrize(("probability", "logit"), [(0.5, 0.0), (0.75, logit_threshold(0.75)), (1e-9, -20.7232658)])
def test_reported_thresholds_are_probabilities(probability, logit):
    found = evaluate_scores(np.zeros((2, 1), np.float32), np.array([[1], [0]]), threshold=logit)
    assert found["threshold_probability"] == pytest.approx(probability, abs=1e-12) and "threshold" not in found
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("default", [0, -1])
def test_rows_by_class(default):
    codes = np.array([[1, 0, -1], [1, 1, -1], [0, 1, -1]], np.int8)
    labels = SparseLabels.from_dense(codes, default)
    found = {1.0: {"per_class_ap": [50.0, 25.125, None]}, 5.0: {"per_class_ap": [60.0, 100.0, None]}}
    assert class_rows(found, labels, ["a", "b", "c"]) == [
        ("a", "2", "3", "50.00", "60.00"),
        ("b", "2", "3", "25.12", "100.00"),
        ("c", "0", "0", "-", "-"),
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 0, 1, 2, 3, 4]),
        ({"groups": 2}, [0, 0, 0, 1, 1, 1]),
        ({"groups": 2, "group_by": "positives"}, [1, 0, 0, 1, 1, 0]),
        ({"groups": 0}, None),
    ],
)
def test_groups_by_training_labels(options, expected):
    # Classes 0 to 5 have 2, 3, 4, 5, 6, 7 labels, of which 2, 0, 1, 3, 4, 1 are positive.
    positives, total = [2, 0, 1, 3, 4, 1], [2, 3, 4, 5, 6, 7]
    entries = [(row, c, int(row < positives[c])) for c in range(6) for row in range(total[c])]
    rows, classes, codes = zip(*entries, strict=True)
    known = SparseLabels.from_entries(rows, classes, codes, 7, 6)
    manifest = SimpleNamespace(splits={"train": None}, split=lambda name: SimpleNamespace(known=known), num_classes=6)
    groups = class_groups(manifest, Config(method=MethodOptions(), eval=EvalConfig(**options)))
    assert (None if groups is None else groups.tolist()) == expected


@pytest.mark.parametrize(("classes", "expected"), [(4, None), (5, [0, 1, 2, 3, 4])])
def test_five_classes_are_enough_for_five_groups(classes, expected):
    codes = np.where(np.arange(classes) >= np.arange(9)[:, None], 1, -1)
    known = SparseLabels.from_dense(codes)
    manifest = SimpleNamespace(
        splits={"train": None}, split=lambda _: SimpleNamespace(known=known), num_classes=classes
    )
    groups = class_groups(manifest, Config(method=MethodOptions()))
    assert (None if groups is None else groups.tolist()) == expected


def test_groups_are_for_partly_known_data_unless_asked_for(small_digits):
    manifest = Manifest(small_digits)

    def groups(count: int | None, split: str = "train") -> np.ndarray | None:
        data, evaluation = DataConfig(train_split=split), EvalConfig(groups=count)
        return class_groups(manifest, Config(method=MethodOptions(), data=data, eval=evaluation))

    assert groups(None) is None
    assert np.bincount(groups(2)).tolist() == [5, 5]
    with pytest.raises(UserError, match=r"'trian', which .* does not have; set eval.groups to 0"):
        groups(2, "trian")
    assert groups(None, "trian") is None
    with pytest.raises(UserError, match="10 classes cannot be cut into 11 groups"):
        groups(11)
    with pytest.raises(UserError, match=r"eval.groups is -1"):
        groups(-1)
