"""Examples of point methods, which drive the kernels' tests, compiles and benchmark rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from spml_kernels import PointLoss
from torch import Tensor

from benchmarks.kernel_losses import label_loss_works, method_cases
from spml_fast.data.labels import LabelStore, SparseLabels
from spml_fast.methods import base
from spml_fast.methods.base import MethodOptions, Progress, register
from spml_fast.methods.pointwise import PointMethod, has_negatives, point_examples


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
