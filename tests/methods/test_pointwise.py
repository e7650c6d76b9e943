"""Examples of point methods, which drive the kernels' tests, compiles and benchmark rows."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np
import pytest
import torch
from spml_kernels import PointLoss
from torch import Tensor

from benchmarks.kernel_losses import label_loss_works, method_cases
from spml_fast.data.labels import LabelStore, SparseLabels
from spml_fast.methods import base, get_method
from spml_fast.methods.base import MethodOptions, Progress, register
from spml_fast.methods.pointwise import PointMethod, has_negatives, point_examples
from tests.support.formulas import EPOCH_1, make


def power_point(logits: Tensor, codes: Tensor, exponent: float) -> Tensor:
    return torch.where(codes == 1, -logits, logits).sigmoid() ** exponent


@dataclass(frozen=True)
class PowerOptions(MethodOptions):
    """Power loss."""

    name: str = "power"
    exponent: float = 2.0


@pytest.fixture
def methods(monkeypatch):
    """A registry of its own, with all methods in it."""
    registry = base.METHODS.copy()
    for module in ("spml_fast.methods.base", "spml_fast.methods.pointwise"):
        monkeypatch.setattr(f"{module}.METHODS", registry)
    return registry


def examples_of(*names: str) -> list[tuple[str, tuple[float, ...]]]:
    return [(e.method, e.params) for e in point_examples() if e.method in names]


def test_a_method_in_one_file_brings_its_examples(methods):
    @register("power")
    class Power(PointMethod):
        Options: ClassVar[type[MethodOptions]] = PowerOptions
        point: ClassVar[PointLoss] = PointLoss("power", power_point)

        def params(self, progress: Progress) -> tuple[float, ...]:
            return (self.options.exponent,)

    assert "power" in methods.names()
    # Without a list, the defaults.
    assert examples_of("power") == [("power", (2.0,))]
    Power.examples = (PowerOptions(exponent=1.0), PowerOptions(exponent=3.0))
    assert examples_of("power") == [("power", (1.0,)), ("power", (3.0,))]

    # One that inherits point and examples has nothing of its own to be tested; one with a list has.
    @register("heir")
    class Heir(Power):
        def __init__(self, options: MethodOptions, store: LabelStore) -> None:
            raise AssertionError("is not made")

    @register("other_heir")
    class OtherHeir(Power):
        examples: ClassVar[tuple[MethodOptions, ...]] = (PowerOptions(exponent=5.0),)

    assert examples_of("heir", "other_heir") == [("other_heir", (5.0,))]
    # Without a kernel there is nothing to compile and nothing to compare with PyTorch.
    assert not any("power" in case.shape for case in method_cases(90))
    assert not any("power" in work.shape for work in label_loss_works(small=False))


def test_every_method_with_a_kernel_has_cases_and_rows():
    kernels = {e.point.name for e in point_examples() if e.point.kernel is not None}
    assert len(kernels) >= 12 and {case.shape.split()[0] for case in method_cases(90)} == kernels
    assert {work.shape.split()[0] for work in label_loss_works(small=False)} == kernels


def test_examples_are_of_eighty_classes_in_the_second_of_three_epochs(methods):
    """Two images with a positive each, and one update an epoch; a head is solved for at the start of a linear phase."""

    @register("place")
    class Place(PointMethod):
        point: ClassVar[PointLoss] = PointLoss("place", power_point)

        def params(self, progress: Progress) -> tuple[float, ...]:
            counts = self.store.class_counts(1)
            place = (progress.epoch, progress.epochs, progress.update, progress.updates_per_epoch)
            labels = (self.store.num_classes, len(self.store), int(counts[0]), int(counts[1]))
            return (*labels, *place, progress.phase == "linear")

    assert examples_of("place") == [("place", (80, 2, 1, 1, 2, 3, 1, 1, False))]
    method = Place(MethodOptions(name="place"), LabelStore(SparseLabels.from_positives([[0], [0, 1], []], 4, -1)))
    assert method.linear_loss() == (Place.point, (4, 3, 2, 1, 1, 1, 0, 1, True))


COCO = {"w_start": 10.0, "w_end": 10.0, "b_start": -8.0, "b_end": -8.0, "mu_start": 0.8, "s_start": 0.5, "q3": 1.5}
CSL = {"a_negative": 0.8, "a_unknown": 0.6}
FOCAL = {"gamma_positive": 2.0, "gamma_negative": 2.0, "margin": 0.0}
# What differs from the defaults: published sets, and between them every branch of the point functions.
EXAMPLES: dict[str, list[dict[str, object]]] = {
    "an": [],
    "an_ls": [{}, {"log_form": "logits"}],
    "asl": [
        {},
        {"gamma_positive": 1.0, "focal_weight": "attached"},
        {**FOCAL, "log_form": "logits", "focal_weight": "attached"},
        {"gamma_negative": 0.0, "margin": 0.0},
    ],
    "em": [{"alpha": 0.2}, {"alpha": 0.2, "log_form": "logits"}],
    "epr": [{"expected_positives": 2.9}, {"expected_positives": 2.9, "log_form": "logits"}],
    "gr": [COCO, {**COCO, "log_form": "logits"}],
    "hill": [{}, {"margin": 0.0, "gamma": 0.0, "focal_weight": "detached"}],
    "iu": [{}, {"log_form": "logits"}],
    "p_asl": [CSL, {**CSL, "g_positive": 1.0, "g_negative": 3.0, "margin": 0.05}],
    "partial": [],
    "splc": [{}, {"change_epoch": 3}, {"margin": 0.0, "focal_weight": "detached"}],
    "wan": [{"gamma": 1 / 80}, {"gamma": 1 / 80, "log_form": "logits"}],
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_which_parameters_kernels_are_tested_with(name):
    method_class = get_method(name)
    named = [{f.name: getattr(o, f.name) for f in fields(o)} for o in method_class.examples]
    usual = {f.name: f.default for f in fields(method_class.Options)}
    assert [{n: v for n, v in o.items() if v != usual[n]} for o in named] == EXAMPLES[name]
    assert len(examples_of(name)) == max(len(named), 1)


def test_all_examples_are_among_them():
    assert {e.method for e in point_examples()} == set(EXAMPLES)


def test_blocks_of_point_functions_are_powers_of_two():
    sizes = {e.point.name: e.point.elements_per_thread for e in point_examples()}
    assert {name: size for name, size in sizes.items() if size not in (1, 2, 4, 8, 16)} == {}
    assert sizes["gr"] < sizes["an"], "a long function has to keep its values in registers"


@pytest.mark.parametrize(
    ("name", "guard"), [("an_ls", 1e-5), ("em", 1e-5), ("epr", 1e-5), ("gr", 1e-7), ("asl", 1e-8), ("p_asl", 1e-8)]
)
def test_logarithms_are_guarded_as_released_or_not_at_all(name, guard):
    codes = np.array([[1, -1, 0]], np.int8)
    assert make(name, codes).params(EPOCH_1).count(guard) == 1
    exact = make(name, codes, log_form="logits")
    assert exact.log_guard == 0 and guard not in exact.params(EPOCH_1)


def test_of_one_class_a_negative_weighs_as_much_as_a_positive():
    """1 / (C - 1) of the weak assume negative has no meaning there."""
    assert make("wan", np.array([[1], [-1]], np.int8)).params(EPOCH_1) == (1, 1e-5)
    assert make("wan", np.array([[1, -1, -1]], np.int8)).params(EPOCH_1) == (0.5, 1e-5)


def test_names_of_examples_differ():
    names = [example.name for example in point_examples()]
    assert len(set(names)) == len(names) and "wan-0.0125-1e-05" in names


@pytest.mark.parametrize(
    ("codes", "default", "expected"),
    [
        ([[1, 1], [1, 1]], 0, False),
        ([[1, 1], [1, -1]], 0, False),
        ([[1, 1], [1, 0]], 0, True),
        ([[0, 1], [1, 1]], 0, True),
        ([[1, 1], [1, -1]], -1, False),
        ([[1, 0], [1, -1]], -1, True),
    ],
)
def test_whether_any_label_is_a_known_negative(codes, default, expected):
    """Listed, or not listed where what is not listed is negative."""
    assert has_negatives(SparseLabels.from_dense(np.array(codes, np.int8), default)) is expected


def test_a_negative_may_be_listed_where_nothing_is_left_out():
    indptr, classes = np.array([0, 2, 4]), np.array([0, 1, 0, 1], np.int16)
    for codes, expected in (([1, 1, 1, 0], True), ([1, -1, 1, 1], False)):
        assert has_negatives(SparseLabels(indptr, classes, np.array(codes, np.int8), 2, 0)) is expected
