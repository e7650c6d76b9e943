"""The generator of OpenImages releases."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.make_openimages import make_release
from benchmarks.openimages_content import draw_rows, hex_ids, zipf_cdf
from spml_fast.prepare.datasets.openimages.ids import ids_from_hex


def test_generator():
    rng = np.random.default_rng(0)
    image, classes = draw_rows(rng, 50, 400, zipf_cdf(30))
    assert len(image) == 400 and len(set(zip(image.tolist(), classes.tolist(), strict=True))) == 400
    assert set(image.tolist()) == set(range(50)) and (np.diff(image) >= 0).all()
    counts = np.bincount(classes, minlength=30)
    assert counts[:5].min() > counts[-5:].max()
    ids = np.array([0, 7, 2**64 - 1], np.uint64)
    assert hex_ids(ids).to_pylist() == ["0" * 16, "0" * 15 + "7", "f" * 16]
    digits = np.frombuffer("".join(hex_ids(ids).to_pylist()).encode(), np.uint8).reshape(-1, 16)
    assert ids_from_hex(digits)[0].tolist() == ids.tolist()
    for rows in (49, 1501):
        with pytest.raises(ValueError, match="rows are too"):
            draw_rows(rng, 50, rows, zipf_cdf(30))


def test_generator_is_a_function_of_its_seed(tmp_path):
    texts = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        made = make_release(tmp_path / folder, "v7", images={"train": 20}, seed=seed)
        texts.append(made.labels["train"].read_text())
    assert texts[0] == texts[1] != texts[2]
