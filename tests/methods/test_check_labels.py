"""Labels, options and sizes that do not suit a baseline are refused in one sentence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from spml_fast.core.errors import UserError
from spml_fast.data.labels import NEGATIVE, UNKNOWN, SparseLabels
from spml_fast.methods import get_method
from tests.support.formulas import (
    CODES,
    make,
    some_codes,
)
from tests.support.methods import on_ranks


def check(name: str, codes: np.ndarray, default: int = UNKNOWN, **options: Any) -> None:
    cls = get_method(name)
    cls.check_labels(SparseLabels.from_dense(codes, default), cls.Options(**{"name": name, **options}))


def test_unsuitable_labels_and_options() -> None:
    single = some_codes(4, 5, negatives=False)
    for name, options in (
        ("iu", {}),
        ("iun", {}),
        ("durand", {}),
        ("p_asl", {"mode": "ignore"}),
        ("p_asl", {"prior": "running"}),
    ):
        with pytest.raises(UserError, match=f"method {name}.* no known negative"):
            check(name, single, **options)
        check(name, CODES, **options)
    check("p_asl", single)
    full = np.maximum(single, 0)
    check("iun", full, default=NEGATIVE)
    with pytest.raises(UserError, match="method full_ls needs every label"):
        check("full_ls", CODES)
    check("full_ls", full, default=NEGATIVE)
    for name in ("epr", "role"):
        with pytest.raises(UserError, match=r"expected_positives.*VOC 1\.5, COCO 2\.9, NUS-WIDE 1\.9, CUB 31\.4"):
            check(name, CODES)
        check(name, CODES, expected_positives=2.9)
    for name, option, value in (("em", "alpha", -1.0), ("an_ls", "smoothing", 2.0), ("gr", "q2", 0.0)):
        with pytest.raises(UserError, match=f"method.{option} is"):
            make(name, CODES, **{option: value})


def openimages_like() -> SparseLabels:
    """Nine million images, ten thousand classes, no labels; costs nothing to say."""
    indptr = np.broadcast_to(np.int64(0), 9_000_001)
    return SparseLabels(indptr, np.empty(0, np.int16), np.empty(0, np.int8), 9605, UNKNOWN)


def test_state_that_cannot_fit_is_refused() -> None:
    """One sentence with the need and the limit."""
    big = openimages_like()
    for name, need in (("role", "966.1"), ("em_apl", "2,028.8")):
        cls = get_method(name)
        options = cls.Options(name=name, **({"expected_positives": 2.0} if name == "role" else {}))
        with pytest.raises(UserError, match=rf"needs {need} GiB on every rank, and half of the free memory allows"):
            cls.check_labels(big, options)
        with pytest.raises(
            UserError, match=rf"needs {need} GiB on every rank, and method.memory_limit allows 100.0 GiB"
        ):
            cls.check_labels(big, replace(options, memory_limit=100.0))
        cls.check_labels(big, replace(options, memory_limit=3000.0))


def test_soft_labels_take_memory_for_every_unknown_label() -> None:
    """Half of 100 unknown ones at 28 bytes: 1,400 bytes, whether they are listed or the rest of the rows."""
    cls = get_method("em_apl")
    codes = np.full((20, 10), NEGATIVE, np.int8)
    codes[:10] = UNKNOWN
    for default in (NEGATIVE, UNKNOWN):
        labels = SparseLabels.from_dense(codes, default)
        options = cls.Options(name="em_apl", theta=0.5, memory_limit=1401 / 2**30)
        cls.check_labels(labels, options)
        with pytest.raises(UserError, match=r"soft labels of 0\.5 of 20 x 10 entries needs"):
            cls.check_labels(labels, replace(options, memory_limit=1399 / 2**30))

        def on_two_ranks(rank: int, labels: SparseLabels = labels, options: Any = options) -> None:
            cls.check_labels(labels, replace(options, memory_limit=701 / 2**30))
            with pytest.raises(UserError, match="needs"):
                cls.check_labels(labels, replace(options, memory_limit=699 / 2**30))

        on_ranks(2, on_two_ranks)
