"""Map statistics against values by hand and SciPy, and a look at real scenes with boxes."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from spml_fast.analysis import diagnostics
from spml_fast.analysis.diagnostics import (
    centred_gaussian,
    chosen_classes,
    extremes,
    measure_maps,
    rank_correlation,
    summarise,
)
from spml_fast.analysis.diagnostics_plot import plot
from spml_fast.analysis.localisation import THRESHOLDS, cells_in_boxes, overlaps
from spml_fast.cli.diagnose import table_rows
from spml_fast.core.config import DataConfig, ModelConfig
from spml_fast.core.errors import UserError
from spml_fast.core.outputs import OutputFile
from spml_fast.data.loader import EvalLoader
from spml_fast.data.manifest import Manifest
from spml_fast.models.classifier import Classifier


def test_extremes_are_means_of_five_per_cent() -> None:
    cells = np.random.default_rng(0).permutation(196).reshape(1, 14, 14)
    top, bottom = extremes(cells)
    # 9.8 cells are ten: 186..195 and 0..9.
    assert top.tolist() == [190.5] and bottom.tolist() == [4.5]
    top, bottom = extremes(np.array([[[3.0, -1.0]]]))
    assert (top[0], bottom[0]) == (3, -1)


def test_rank_correlation_is_spearmans_with_ties() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.integers(0, 5, (4, 6, 7)), rng.normal(size=(4, 6, 7))
    second[3] = 1.5
    correlations = rank_correlation(first, second)
    for i in range(3):
        assert correlations[i] == pytest.approx(spearmanr(first[i].ravel(), second[i].ravel()).statistic, abs=1e-12)
    # A flat map has no ranks.
    assert math.isnan(correlations[3])
    # Neither BoostLU nor any other growing function changes it.
    boosted = np.where(second > 0, 5 * second, second)
    assert np.allclose(rank_correlation(first, boosted), correlations, equal_nan=True)


def test_centred_gaussian_falls_from_the_centre() -> None:
    map_ = centred_gaussian(5, 7)
    assert map_.argmax() == 2 * 7 + 3 and map_[2, 3] == 1
    assert np.allclose(map_, map_[::-1, ::-1]) and map_[0, 0] < map_[1, 1] < map_[2, 2]


def test_chosen_classes_are_fixed_and_never_unknown() -> None:
    codes = np.full(50, 0, np.int8)
    codes[[3, 7]], codes[20:] = 1, -1
    first = chosen_classes(codes, 5, 4, 0)
    assert first[:2].tolist() == [3, 7] and len(first) == 6 and (codes[first[2:]] == 0).all()
    assert chosen_classes(codes, 5, 4, 0).tolist() == first.tolist()
    others = {tuple(chosen_classes(codes, i, 4, 0)) for i in range(8)}
    assert len(others) > 1
    assert chosen_classes(codes, 5, 100, 0)[2:].tolist() == [c for c in range(20) if c not in (3, 7)]


class Perfect(nn.Module):
    """Stands where a classifier stands: its map of a class is 1 in the cells of that digit's boxes, else 0."""

    def __init__(self, manifest: Manifest, order: list[int], cells: int) -> None:
        super().__init__()
        self.split, self.order, self.cells = manifest.split("test"), iter(order), cells

    def forward(self, images: torch.Tensor, boost: bool, classes: torch.Tensor) -> object:
        maps = torch.zeros(*classes.shape, self.cells, self.cells)
        assert self.split.boxes is not None
        indptr, boxes = self.split.boxes
        for row in range(len(images)):
            sample = next(self.order, None)
            if sample is None:
                break
            rows = boxes[indptr[sample] : indptr[sample + 1]]
            for place, wanted in enumerate(classes[row].tolist()):
                of_class = rows[rows[:, 0] == wanted, 1:]
                if len(of_class):
                    maps[row, place] = torch.from_numpy(cells_in_boxes(of_class, self.cells, self.cells)).float()
        return type("Output", (), {"maps": maps})()


def loader_for(manifest: Manifest, batch: int = 32) -> EvalLoader:
    """The test split, 64 px."""
    split, half = manifest.split("test"), [0.5, 0.5, 0.5]
    return EvalLoader(
        split, DataConfig(image_size=64), batch_size=batch, device=torch.device("cpu"), mean=half, std=half
    )


def test_a_perfect_map_wins_the_pointing_game(small_digits: Path) -> None:
    manifest = Manifest(small_digits)
    split = manifest.split("test")
    table = measure_maps(Perfect(manifest, list(range(len(split))), 16), loader_for(manifest), split, negatives=2)
    assert table is not None
    assert table.largest.shape == table.best.shape == (len(table.index), 0)
    summary = summarise(table)
    assert summary["boxes"] is None
    positives = int((split.known.rows(range(len(split))) == 1).sum())
    assert summary["pairs"] == {"positive": positives, "negative": 2 * len(split)}
    assert summary["pointing"]["pairs"] == positives and summary["pointing"]["accuracy"] == 100
    assert 2 < summary["pointing"]["chance"] < 20
    assert summary["top"]["positive"]["model"]["p50"] == 1 and summary["top"]["negative"]["model"]["p75"] == 0
    assert summary["correlation"] is None and summary["top"]["positive"]["full"] is None


def test_boxes_of_perfect_maps(small_digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps that are the boxes themselves, in cells of 2 pixels, find all but neighbours that grow together."""
    manifest = Manifest(small_digits)
    split = manifest.split("test")
    # Fewer pixels take less time.
    monkeypatch.setattr(diagnostics, "overlaps", functools.partial(overlaps, side=32))
    perfect = Perfect(manifest, list(range(len(split))), 32)
    table = measure_maps(perfect, loader_for(manifest), split, negatives=2, fit_boxes=True)
    assert table is not None and table.largest.shape == (len(table.index), len(THRESHOLDS))
    positive = table.positive == 1
    assert np.isnan(table.largest[~positive]).all() and (table.best[positive] >= table.largest[positive]).all()
    found = summarise(table)["boxes"]
    assert found["pairs"] == positive.sum() and found["by_overlap"]["0.3"] == 100
    assert found["max_box_acc"] > 95 and found["class_mean"] > 95 and 0 < found["threshold"] < 0.9
    assert found["max_box_acc_v2"] == pytest.approx(np.mean(list(found["by_overlap"].values())))


def test_without_boxes_there_is_nothing_to_fit(small_digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = Manifest(small_digits).split("test")
    monkeypatch.setattr(split, "boxes", None)
    with pytest.raises(UserError, match="split 'test' has no boxes to fit; prepare the data set from annotations"):
        measure_maps(Perfect(Manifest(small_digits), [], 16), loader_for(Manifest(small_digits)), split, fit_boxes=True)


def test_two_networks_on_scenes(small_digits: Path, tmp_path: Path) -> None:
    manifest = Manifest(small_digits)
    split = manifest.split("test")
    torch.manual_seed(0)
    config = ModelConfig(backbone="test_resnet", pretrained=False, output_stride=8)
    first, second = (Classifier(config, 10, 64).eval() for _ in range(2))
    table = measure_maps(first, loader_for(manifest), split, full=second, negatives=3)
    assert table is not None
    positive = table.positive == 1
    assert np.isnan(table.correlation[~positive]).all() and np.isfinite(table.correlation[positive]).all()
    assert np.abs(table.correlation[positive]).max() <= 1 + 1e-9
    # In sample order whatever the batches are.
    again = measure_maps(first, loader_for(manifest, 7), split, full=second, negatives=3)
    assert again is not None and np.array_equal(again.index, table.index)
    assert np.allclose(again.top, table.top, atol=1e-5) and np.array_equal(again.hit, table.hit, equal_nan=True)
    itself = measure_maps(first, loader_for(manifest), split, full=first, negatives=0)
    assert itself is not None and np.allclose(itself.correlation, 1) and (itself.positive == 1).all()
    gap = {"epoch": 3, "t_gap": 1.0, "gap_histogram": {"edges": [0.5, 1, 2], "negative": [3, 2, 1, 0]}}
    plot(tmp_path / "maps.png", table, [gap])
    assert (tmp_path / "maps.png").stat().st_size > 10_000
    # Known as its own the next time.
    OutputFile(tmp_path / "maps.png", "png", "spml_fast diagnose", "--plot").check()


def test_hidden_positives_are_a_kind_of_their_own(small_digits: Path, tmp_path: Path) -> None:
    """One positive of an image is observed: the others are the hidden ones."""
    manifest = Manifest(small_digits)
    split = manifest.split("train")
    assert split.hides_labels
    torch.manual_seed(0)
    first, second = (Classifier(ModelConfig(backbone="test_resnet", pretrained=False), 10, 64).eval() for _ in range(2))
    half = [0.5, 0.5, 0.5]
    loader = EvalLoader(
        split, DataConfig(image_size=64), batch_size=32, device=torch.device("cpu"), mean=half, std=half
    )
    table = measure_maps(first, loader, split, full=second, negatives=2, tell_hidden=True)
    assert table is not None
    positives = int((split.known.rows(range(len(split))) == 1).sum())
    summary = summarise(table)
    assert summary["pairs"] == {
        "positive": positives,
        "negative": 2 * len(split),
        "observed_positive": len(split),
        "hidden_positive": positives - len(split),
    }
    seen = split.observed.rows(range(len(split)))
    assert np.array_equal(table.hidden == 1, (table.positive == 1) & (seen[table.index, table.class_id] != 1))
    for end in ("top", "bottom"):
        chosen = getattr(table, end)[table.hidden == 1]
        assert summary[end]["hidden_positive"]["model"]["p50"] == pytest.approx(np.median(chosen))
    correlations = summary["correlation_by_label"]
    assert set(correlations) == {"observed_positive", "hidden_positive"}
    values = table.correlation[table.hidden == 1]
    assert correlations["hidden_positive"]["mean"] == pytest.approx(np.nanmean(values))
    words = dict(table_rows(summary))
    assert words["pairs looked at"] == (
        f"{len(split)} observed positive, {positives - len(split)} hidden positive, {2 * len(split)} negative"
    )
    assert [name for name in words if name.startswith("rank correlation")] == [
        "rank correlation with the full-label map, observed positive labels",
        "rank correlation with the full-label map, hidden positive labels",
    ]
    plot(tmp_path / "maps.png", table, [])
    test = manifest.split("test")
    assert test.hides_labels, "which nobody trains on"
    alone = measure_maps(first, loader_for(manifest), test, negatives=2)
    assert alone is not None and np.isnan(alone.hidden).all()
    assert set(summarise(alone)["pairs"]) == {"positive", "negative"}
    assert summarise(alone)["correlation_by_label"] is None


def test_maps_of_different_sizes_are_refused(small_digits: Path) -> None:
    manifest = Manifest(small_digits)
    coarse = Classifier(ModelConfig(backbone="test_resnet", pretrained=False), 10, 64).eval()
    order = list(range(len(manifest.split("test"))))
    with pytest.raises(UserError, match=r"differ in size \(16 x 16 and 2 x 2 cells\)"):
        measure_maps(Perfect(manifest, order, 16), loader_for(manifest), manifest.split("test"), full=coarse)
