"""Options of methods outside of their range are refused by name; the ends of the range are taken."""

from __future__ import annotations

import math
from typing import Any

import pytest

from spml_fast.core.errors import UserError
from tests.support.formulas import CODES, make

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
WHOLE = {"warm_up", "top_k", "change_epoch"}
CASES: list[tuple[str, str, Any, bool]] = []
for method, names in NOT_NEGATIVE.items():
    for name in names:
        bad = [-1] if name in WHOLE else [-0.001, math.nan]
        CASES += [(method, name, value, False) for value in bad] + [(method, name, 0, True)]
for method, names in FRACTIONS.items():
    CASES += [(method, name, value, False) for name in names for value in (-0.001, 1.001, math.nan)]
    CASES += [(method, name, value, True) for name in names for value in (0, 1)]


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
