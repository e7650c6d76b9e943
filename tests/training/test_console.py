"""What a run prints."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from spml_fast.methods import get_method, method_names
from spml_fast.training import console
from spml_fast.training.checkpoint import CheckpointPosition
from spml_fast.training.logs import Meter
from spml_fast.training.setup import Phase

FINETUNE, LINEAR = Phase("finetune", 12), Phase("linear", 4)
FIGURES = {"loss": 0.12345, "images_per_second": 99.6, "data_wait": 0.04, "memory_gib": 1.25, "seconds": 3.21}
SELECTION = {"selected_count": 875.0, "selection_precision": 0.1, "selection_recall": 0.01}


def test_epochs_are_named_within_their_phase():
    assert console.epoch_name(FINETUNE, 1) == "epoch 1/12"
    assert console.epoch_name(LINEAR, 1) == "linear epoch 1/4"


@pytest.mark.parametrize(
    ("phase", "epoch", "update", "line"),
    [
        (FINETUNE, 1, 8, "resuming at epoch 2, update 9 (from ck/finetune-e0001-u000008-w2)"),
        (FINETUNE, 0, 3, "resuming at epoch 1, update 4 (from ck/finetune-e0000-u000003-w2)"),
        (FINETUNE, 3, 0, "resuming at epoch 4 (from ck/finetune-e0003-u000000-w2)"),
        (LINEAR, 1, 0, "resuming at linear epoch 2 (from ck/linear-e0001-u000000-w2)"),
        (FINETUNE, 12, 0, "resuming after epoch 12, the last (from ck/finetune-e0012-u000000-w2)"),
        (LINEAR, 4, 0, "resuming after linear epoch 4, the last (from ck/linear-e0004-u000000-w2)"),
    ],
)
def test_where_a_run_is_resumed(phase, epoch, update, line):
    position = CheckpointPosition(phase.name, epoch, update, world_size=2, zero_stage=0)
    assert console.resume_line(phase, position, update, Path("ck")) == line


def test_fields_of_an_epoch():
    fields = ["epoch 1/12", "loss 0.1235", "val mAP 61.00", "100 images/s", "data wait 4%", "1.2 GiB", "3.2 s"]
    assert console.epoch_fields("epoch 1/12", FIGURES, 61.0, False) == fields
    assert console.epoch_fields("epoch 1/12", FIGURES, None, False) == [*fields[:2], *fields[3:]]
    selected = "875 labels rejected (10% of them hidden positives, 1% of all found)"
    assert console.epoch_fields("epoch 1/12", FIGURES | SELECTION, 61.0, False) == [*fields, selected]
    corrected = selected.replace("rejected", "corrected")
    assert console.epoch_fields("epoch 1/12", FIGURES | SELECTION, 61.0, True) == [*fields, corrected]


def test_a_selection_without_labels_or_without_truth_is_not_shown():
    assert console.selection_text(SELECTION | {"selected_count": 0.0}, False) == ""
    assert console.selection_text({"selected_count": 875.0}, False) == ""


def test_methods_that_correct_say_so():
    correcting = {name for name in method_names() if get_method(name).corrects_labels}
    assert {"ll_ct", "ll_cp", "splc"} <= correcting and not {"ll_r", "ignore", "p_asl", "an"} & correcting


def test_notes_of_an_epoch_under_way():
    meter, device = Meter(), torch.device("cpu")
    assert console.live_notes(None, -math.inf, meter, device)[:2] == ["0 images/s", "data wait 0%"]
    notes = console.live_notes(0.5, 61.0, meter, device)
    assert notes[:4] == ["loss 0.5000", "best val mAP 61.00", "0 images/s", "data wait 0%"] and notes[4].endswith("GiB")


def test_closing_table():
    results = {
        "split": "test",
        "alpha": {
            "1": {"map": 95.918, "groups": [{"map": 90.0}, {"map": None}]},
            "5": {"map": 97.87},
            "2.5": {"map": math.nan},
        },
        "best_val_map": 96.5,
        "best_epoch": 7,
        "images_per_second": 411.6,
        "data_wait": 0.034,
        "train_seconds": 61.7,
        "ranks": 2,
    }
    rows = [
        ("test mAP, plain", "95.92"),
        ("test mAP, BoostLU x5", "97.87"),
        ("test mAP, BoostLU x2.5", "not defined (no positive among the known labels)"),
        ("groups of classes, rarest first, plain", "90.00 / -"),
        ("best validation mAP", "96.50 (epoch 7)"),
        ("training speed", "412 images/s over 2 ranks"),
        ("waiting for data", "3.4% of the training time"),
        ("training time", "62 s"),
        ("run directory", "runs/a"),
    ]
    assert console.closing_rows(results, Path("runs/a")) == rows
    without = {k: v for k, v in results.items() if k not in ("split", "alpha")} | {"best_val_map": None}
    assert console.closing_rows(without, Path("runs/a")) == rows[5:]


def test_columns_show_names_as_they_are(capsys):
    console.print_columns("[b]val, AP", ["class", "AP, alpha 1"], [("a[/b]c", "50.00"), ("red\x1b[31m", "-")])
    out = capsys.readouterr().out
    assert "[b]val, AP" in out and "a[/b]c" in out and "50.00" in out and "\x1b" not in out
