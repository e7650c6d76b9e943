"""Rejected labels that the log shows, noted at an epoch's last update; and where a run's time goes."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from spml_fast.core.batch import Batch
from spml_fast.methods import Progress, get_method
from spml_fast.training.examples import IMAGES, selected_examples
from spml_fast.training.spent import Spent
from tests.support.ignore import MASKED, STRONG, Z, batch_of, method_for

SPLIT = SimpleNamespace(relative_path=lambda sample: f"photos/{sample}.jpg")


def batch(selected: torch.Tensor | None, truth: torch.Tensor | None) -> Batch:
    labels = torch.full((20, 4), -1, dtype=torch.int8)
    return Batch({}, labels, torch.arange(100, 120), 20, truth, selected=selected)


def test_a_few_images_are_shown_each_once():
    selected = torch.zeros(20, 4, dtype=torch.bool)
    selected[::2, 1] = selected[::2, 3] = True
    truth = torch.zeros(20, 4, dtype=torch.int8)
    truth[0, 1], truth[18, 1] = 1, -1
    found = selected_examples(batch(selected, truth), SPLIT)
    assert len(found) == IMAGES and [row[0] for row in found] == sorted({row[0] for row in found})
    # The first and the last of those that have any, and of each the first class.
    assert found[0] == [100, "photos/100.jpg", 1, True] and found[-1] == [118, "photos/118.jpg", 1, None]
    assert {row[3] for row in found[1:-1]} == {False}
    assert selected_examples(batch(selected, None), SPLIT)[0][3] is None


def test_nothing_selected_shows_nothing():
    assert selected_examples(batch(None, None), SPLIT) == []
    assert selected_examples(batch(torch.zeros(20, 4, dtype=torch.bool), None), SPLIT) == []


def test_the_last_update_of_an_epoch():
    ends = [Progress(epoch, 3, update, 4).ends_epoch for epoch in (1, 2) for update in range(4 * epoch - 4, 4 * epoch)]
    assert ends == [False, False, False, True] * 2


@pytest.mark.parametrize("lat", [True, False])
def test_ignore_notes_what_it_rejects(lat):
    """The mask has as many entries as the kernel counts, and is made at an epoch's end alone."""
    codes = [[1, -1, -1], [-1, 1, -1]]
    logits, strong, masked = (torch.tensor(values, dtype=torch.float64) for values in (Z, STRONG, MASKED))
    for update, noted in ((6, False), (7, True)):
        method = method_for(codes, warm_up=0, lat=lat)
        one = batch_of(codes)
        out = method.combine(logits, strong, masked, one, Progress(2, 10, update, 4))
        count = int(out.metrics["selected_count"])
        assert count > 0
        if noted:
            assert one.selected is not None and int(one.selected.sum()) == count
            assert not one.selected[one.labels != -1].any()
        else:
            assert one.selected is None
    # Epochs that reject nothing note nothing.
    method, one = method_for(codes, warm_up=5), batch_of(codes)
    method.combine(logits, strong, masked, one, Progress(1, 10, 3, 4))
    assert one.selected is None


@pytest.mark.parametrize("name", ["ll_r", "ll_ct", "ll_cp", "splc"])
def test_methods_note_what_they_select(name):
    from spml_fast.data.labels import LabelStore, SparseLabels

    codes = torch.full((8, 5), -1, dtype=torch.int8)
    codes[:, 0] = 1
    options = get_method(name).Options(name=name)
    method = get_method(name)(options, LabelStore(SparseLabels.from_dense(codes.numpy())))
    one = Batch({}, codes, torch.arange(8), 8)
    torch.manual_seed(0)
    out = method.loss(3 * torch.randn(8, 5), one, Progress(9, 10, 35, 4))
    assert one.selected is not None and int(one.selected.sum()) == int(out.metrics["selected_count"]) > 0


def test_seconds_are_taken_once():
    spent = Spent()
    assert spent.take() == {}
    with spent.on("saving"):
        time.sleep(0.01)
    with pytest.raises(RuntimeError), spent.on("validation"):
        raise RuntimeError
    with spent.on("saving"):
        time.sleep(0.01)
    taken = spent.take()
    assert list(taken) == ["validation_seconds", "saving_seconds"] and taken["saving_seconds"] >= 0.02
    assert spent.take() == {}
    with pytest.raises(AssertionError), spent.on("other"):
        pass
