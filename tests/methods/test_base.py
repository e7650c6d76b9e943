"""What methods say of themselves, and their published defaults."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch

from spml_fast.methods import Method, Progress, get_method, method_names
from tests.support.formulas import EPOCH_1, N, P, batch_of, make

# What the trainer, losses alone and `train.linear solve` go by.
FLAGS = (
    "batch_statistics",
    "uses_truth",
    "one_visit_per_step",
    "needs_samples",
    "corrects_labels",
    "counts_updates",
    "solvable",
)
LARGE = {"batch_statistics", "solvable"}
SAYS: dict[str, set[str]] = {
    "an": {"solvable"},
    "an_ls": {"solvable"},
    "asl": set(),
    "durand": set(),
    "em": {"solvable"},
    "em_apl": {"needs_samples", "solvable"},
    "epr": {"batch_statistics"},
    "full": {"solvable"},
    "full_ls": {"solvable"},
    "gr": set(),
    "hill": set(),
    "ignore": {"batch_statistics"},
    "iu": {"solvable"},
    "iun": {"uses_truth"},
    "ll_cp": {*LARGE, "corrects_labels"},
    "ll_ct": {*LARGE, "corrects_labels"},
    "ll_r": LARGE,
    "p_asl": {"batch_statistics"},
    "partial": {"batch_statistics", "solvable"},
    "role": {"batch_statistics", "one_visit_per_step", "needs_samples", "counts_updates"},
    "splc": {"corrects_labels"},
    "wan": {"solvable"},
}
LARGE_LOSS: dict[str, Any] = {
    "k_rule": "accumulator",
    "base": "all",
    "ties": "exact",
    "batch_semantics": "global",
    "paper_batch": 16,
}
# docs/methods.md: of several data sets COCO's, of paper and code the one that the page calls the default.
DEFAULTS: dict[str, dict[str, Any]] = {
    "an": {},
    "an_ls": {"smoothing": 0.1, "form": "cole", "log_form": "released"},
    "asl": {
        **{"gamma_positive": 0.0, "gamma_negative": 4.0, "margin": 0.05},
        **{"focal_weight": "detached", "log_form": "released", "reduction": "sum"},
    },
    "durand": {"a": -4.45, "b": 5.45, "gamma": 1.0, "log_form": "logits"},
    "em": {"alpha": 0.1, "log_form": "released"},
    "em_apl": {
        **{"alpha": 0.1, "log_form": "released", "theta": 0.9, "warm_up": 5, "beta": 0.9},
        "memory_limit": None,
    },
    "epr": {"expected_positives": None, "penalty": 1.0, "log_form": "released"},
    "full": {},
    "full_ls": {"smoothing": 0.1, "form": "cole", "log_form": "released"},
    "gr": {
        **{"w_start": 0.0, "w_end": 2.0, "b_start": -2.0, "b_end": -2.0, "mu_start": 0.5, "mu_end": 0.8},
        **{"s_start": 2.0, "s_end": 0.5, "q2": 0.01, "q3": 1.0, "log_form": "released"},
    },
    "hill": {"lam": 1.5, "margin": 1.0, "gamma": 2.0, "focal_weight": "attached", "reduction": "sum"},
    "ignore": {
        **{"preset": "clean", "warm_up": 3, "spbc_weight": 0.5, "ign_weight": 1.0, "reg_weight": 0.5},
        **{"gap_lambda": 0.999, "avg_lambda": 0.999, "strong_aug": True, "ignore": True, "spbc": True, "reg": True},
        **{"lat": True, "cam_threshold": None, "cam_norm": None, "norm_group": 16, "loss_form": None, "eps": 1e-5},
        **{"ema_rescale": True, "ema_batch": 16, "ema_partial": None, "debias": None, "masked_bn": None},
        **{"masked_every": 1, "masked_scale": 1.0, "gap_histogram": False},
    },
    "iu": {"log_form": "released"},
    "iun": {"log_form": "released"},
    "ll_cp": {"delta_rel": 0.1, **LARGE_LOSS},
    "ll_ct": {"delta_rel": 0.2, **LARGE_LOSS},
    "ll_r": {"delta_rel": 0.5, **LARGE_LOSS},
    "p_asl": {
        **{"mode": "selective", "top_k": 5, "eta": 0.05, "prior_file": None, "prior": "none", "prior_out": None},
        **{"g_positive": 0.0, "g_negative": 1.0, "g_unknown": 4.0},
        **{"a_positive": 1.0, "a_negative": 1.0, "a_unknown": 1.0, "margin": 0.0},
        **{"log_form": "released", "reduction": "sum"},
    },
    "partial": {},
    "role": {
        **{"expected_positives": None, "penalty": 1.0, "log_form": "released"},
        **{"table_lr_multiplier": 10.0, "memory_limit": None},
    },
    "splc": {
        **{"tau": 0.6, "margin": 1.0, "gamma": 2.0, "change_epoch": 1},
        **{"focal_weight": "attached", "reduction": "sum"},
    },
    "wan": {"gamma": None, "log_form": "released"},
}
# Everything known, which every method takes.
KNOWN = np.array([[P, N], [N, P]], np.int8)


def test_every_method_is_in_both_tables() -> None:
    assert set(method_names()) == set(SAYS) == set(DEFAULTS)


@pytest.mark.parametrize("name", SAYS)
def test_what_a_method_says_of_itself(name: str) -> None:
    method: Method[Any, Any] = make(name, KNOWN)
    assert {flag for flag in FLAGS if getattr(method, flag)} == SAYS[name]
    assert method.label_source == ("known" if name in ("full", "full_ls") else "observed")
    assert method.views == (("weak", "strong") if name == "ignore" else ("weak",))
    # Nor does it need more for a loss than what it names, but for a second view.
    if method.views == ("weak",):
        batch = batch_of(KNOWN, truth=KNOWN if method.uses_truth else None)
        assert method.loss(torch.zeros(2, 2), batch, EPOCH_1).loss.isfinite()


@pytest.mark.parametrize("name", DEFAULTS)
def test_published_defaults(name: str) -> None:
    method_class = get_method(name)
    assert asdict(method_class.Options(name=name)) == {"name": name, **DEFAULTS[name]}
    # A method made of them, but for what has no default, keeps them.
    kept = asdict(make(name, KNOWN).options)
    assert {n: v for n, v in kept.items() if n != "expected_positives"} == {
        n: v for n, v in {"name": name, **DEFAULTS[name]}.items() if n != "expected_positives"
    }


def test_of_itself_a_method_asks_for_nothing_and_a_place_has_no_learning_rate() -> None:
    place, method = Progress(epoch=2, epochs=3, update=4, updates_per_epoch=5), make("an", KNOWN)
    assert (place.phase, place.lr) == ("finetune", 0.0)
    assert not method.needs_train_scores(place) and method.on_epoch_end(place) == {} == method.rank_state()
