"""Options of methods outside of their range are refused by name; the ends of the range are taken."""

from __future__ import annotations

import math
from typing import Any

import pytest

from spml_fast.core.errors import UserError
from tests.support.formulas import CODES, make
from tests.support.large_loss import LARGE_LOSS

NOT_NEGATIVE = {
    "asl": ("gamma_positive", "gamma_negative"),
    "em": ("alpha",),
    "em_apl": ("alpha", "beta", "warm_up"),
    "epr": ("penalty",),
    "hill": ("gamma",),
    "p_asl": ("top_k", "g_positive", "g_negative", "g_unknown", "a_positive", "a_negative", "a_unknown"),
    "role": ("penalty", "table_lr_multiplier"),
    "splc": ("gamma", "change_epoch"),
    "wan": ("gamma",),
}
FRACTIONS = {
    "an_ls": ("smoothing",),
    "asl": ("margin",),
    "em_apl": ("theta",),
    "full_ls": ("smoothing",),
    "p_asl": ("eta", "margin"),
    "splc": ("tau",),
}
# Values of other ranges, and whether they fit.
OTHERS: dict[tuple[str, str], dict[float, bool]] = {
    ("ignore", "gap_lambda"): {0: True, 0.999: True, 1: False, -0.001: False, math.nan: False},
    ("ignore", "avg_lambda"): {0: True, 0.999: True, 1: False, -0.001: False, math.nan: False},
    **{(name, "paper_batch"): {0: False, 1: True} for name in LARGE_LOSS},
}
WHOLE = {"warm_up", "top_k", "change_epoch"}
CASES: list[tuple[str, str, Any, bool]] = []
for method, names in NOT_NEGATIVE.items():
    for name in names:
        bad = [-1] if name in WHOLE else [-0.001, math.nan]
        CASES += [(method, name, value, False) for value in bad] + [(method, name, 0, True)]
for method, names in FRACTIONS.items():
    CASES += [(method, name, value, False) for name in names for value in (-0.001, 1.001, math.nan)]
    CASES += [(method, name, value, True) for name in names for value in (0, 1)]
CASES += [(method, name, value, fits) for (method, name), values in OTHERS.items() for value, fits in values.items()]


@pytest.mark.parametrize(("method", "option", "value", "fits"), CASES)
def test_the_range_of_an_option(method: str, option: str, value: Any, fits: bool) -> None:
    if fits:
        assert getattr(make(method, CODES, **{option: value}).options, option) == value
        return
    with pytest.raises(UserError) as error:
        make(method, CODES, **{option: value})
    assert str(error.value).startswith(f"method.{option} is {value}; it must ")


@pytest.mark.parametrize("method", ["epr", "role"])
@pytest.mark.parametrize("value", [None, 0.0, -1.5, math.nan])
def test_expected_positives_must_be_given(method: str, value: float | None) -> None:
    with pytest.raises(UserError, match=f"method {method} needs --method.expected_positives"):
        make(method, CODES, expected_positives=value)


@pytest.mark.parametrize("method", ["epr", "role"])
def test_images_may_have_less_than_one_positive_on_average(method: str) -> None:
    assert make(method, CODES, expected_positives=0.25).expected_positives == 0.25
