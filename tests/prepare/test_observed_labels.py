"""Which labels training sees: the published draw and split, bit for bit, and random fractions."""

from __future__ import annotations

import hashlib
import os
import pickle
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from spml_fast.core.errors import UserError
from spml_fast.data.labels import SparseLabels
from spml_fast.prepare import label_encodings, observed_labels
from spml_fast.prepare.observed_labels import ObservationScheme, draw_fraction, draw_published, published_split
from tests.support.payload import Payload

# Source: docs/sources.md#protocol. Rows, sum(train), sum(val), sha256 heads, first rows of both.
SPLITS = {
    "voc": (
        5717,
        13097125,
        3242061,
        "b3eebaf1f95fb36a",
        "f5709e6ab75fb71e",
        [0, 1, 2, 3, 4, 7],
        [5, 6, 11, 15, 22, 23],
    ),
    "coco": (
        *(82081, 2700718682, 667885558, "d7f76149fea1d8a9", "bd52756686feb243"),
        *([0, 1, 2, 5, 6, 7], [3, 4, 34, 37, 48, 64]),
    ),
    "nus": (
        *(150000, 9005956263, 2243968737, "d3497c92da3b7a1a", "f4211856213c6679"),
        *([0, 1, 3, 6, 8, 10], [2, 4, 5, 7, 9, 11]),
    ),
    "cub": (
        5994,
        14402787,
        3558234,
        "6ff6212dff135810",
        "b80f54f4cba60862",
        [0, 1, 2, 3, 4, 7],
        [5, 6, 11, 15, 22, 23],
    ),
}


@pytest.mark.parametrize("name", SPLITS)
def test_published_split_golden(name):
    rows, sum_train, sum_val, sha_train, sha_val, head_train, head_val = SPLITS[name]
    train, val = published_split(rows)
    assert (int(train.sum()), int(val.sum())) == (sum_train, sum_val)
    digests = [hashlib.sha256(a.astype("<i8").tobytes()).hexdigest()[:16] for a in (train, val)]
    assert digests == [sha_train, sha_val]
    assert train[:6].tolist() == head_train and val[:6].tolist() == head_val
    assert len(val) == round(0.2 * rows) and np.array_equal(np.sort(np.concatenate([train, val])), np.arange(rows))


def toy() -> SparseLabels:
    labels = np.array([[(7 * i + 3 * c) % 5 == 0 for c in range(8)] for i in range(6)], np.int8)
    return SparseLabels.from_dense(labels, default=0)


def test_published_draw_golden():
    observed = draw_published(toy())
    assert observed.classes.tolist() == [0, 6, 7, 3, 4, 0]
    assert observed.indptr.tolist() == list(range(7))
    assert set(observed.codes.tolist()) == {1} and observed.default == -1


def published_reference(labels: np.ndarray, seed: int, num_pos: int, num_neg: int) -> np.ndarray:
    """The draw as protocol.md 1.2 words it, densely: shuffle positives, keep the first, then shuffle the negatives."""
    rng = np.random.RandomState(seed)
    out = np.full(labels.shape, -1, np.int8)
    for row, codes in enumerate(labels):
        positives = np.nonzero(codes == 1)[0]
        rng.shuffle(positives)
        out[row, positives[:num_pos]] = 1
        negatives = np.nonzero(codes == 0)[0]
        rng.shuffle(negatives)
        out[row, negatives[:num_neg]] = 0
    return out


codes_arrays = hnp.arrays(np.int8, st.tuples(st.integers(1, 12), st.integers(1, 9)), elements=st.integers(-1, 1))


@settings(deadline=None, max_examples=60)
@given(codes_arrays, st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(0, 3), st.sampled_from([0, -1]))
def test_published_draw_is_the_dense_draw(codes, seed, positives, negatives, default):
    known = SparseLabels.from_dense(codes, default)
    observed = draw_published(known, seed, positives, negatives)
    assert np.array_equal(observed.rows(range(len(codes))), published_reference(codes, seed, positives, negatives))
    assert all(
        (np.diff(observed.classes[a:b]) > 0).all() for a, b in zip(observed.indptr, observed.indptr[1:], strict=False)
    )


def test_negative_shuffle_matters():
    # Without it the toy gives 0..5; a test that could not tell the variants apart would prove nothing.
    assert draw_published(toy()).classes.tolist() != [0, 1, 2, 3, 4, 5]
    rng = np.random.RandomState(1200)
    wrong = []
    for codes in toy().rows(range(6)):
        positives = np.nonzero(codes == 1)[0]
        rng.shuffle(positives)
        wrong.append(int(positives[0]))
    assert wrong == [0, 1, 2, 3, 4, 5]


def test_each_phase_starts_afresh():
    known = toy()
    spec = ObservationScheme.parse("single")
    first, second = spec.draw(known, 1200, "train"), spec.draw(known, 1200, "test")
    assert first is not None and second is not None
    assert first.classes.tolist() == second.classes.tolist() == [0, 6, 7, 3, 4, 0]


def test_rows_without_positives_observe_nothing():
    known = SparseLabels.from_positives([[], [2], []], 4, 0)
    assert draw_published(known).rows([0, 1, 2]).tolist() == [[-1] * 4, [-1, -1, 1, -1], [-1] * 4]


@settings(deadline=None, max_examples=60)
@given(codes_arrays, st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]), st.integers(0, 99), st.sampled_from([0, -1]))
def test_fraction_only_hides(codes, fraction, seed, default):
    index = range(len(codes))
    observed = draw_fraction(SparseLabels.from_dense(codes, default), fraction, seed).rows(index)
    assert ((observed == codes) | (observed == -1)).all()
    if fraction == 1:
        assert np.array_equal(observed, codes)
    if fraction == 0:
        assert (observed == -1).all()


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("default", [0, -1])
def test_fraction_keeps_both_signs_alike(fraction, default, monkeypatch):
    rng = np.random.default_rng(5)
    codes = (rng.random((3000, 20)) < 0.15).astype(np.int8)
    known = SparseLabels.from_dense(codes, default)
    observed = draw_fraction(known, fraction, 3).rows(range(3000))
    for sign in (0, 1):
        kept = (observed[codes == sign] == sign).mean()
        # Five standard errors of a binomial share.
        assert abs(kept - fraction) < 5 * np.sqrt(fraction * (1 - fraction) / (codes == sign).sum())
    assert np.array_equal(observed, draw_fraction(known, fraction, 3).rows(range(3000)))
    assert not np.array_equal(observed, draw_fraction(known, fraction, 4).rows(range(3000)))
    assert not np.array_equal(observed, draw_fraction(known, fraction, 3, "test").rows(range(3000)))
    # The size of the blocks that it works in is no part of the result.
    for module in (observed_labels, label_encodings):
        monkeypatch.setattr(module, "CHUNK_ENTRIES", 512)
    assert np.array_equal(observed, draw_fraction(known, fraction, 3).rows(range(3000)))


@pytest.mark.parametrize("chunk", [4, 1 << 20])
@pytest.mark.parametrize(("default", "dtype"), [(-1, np.float64), (0, np.float32)])
def test_a_label_is_kept_where_its_number_is_below_the_fraction(default, dtype, chunk, monkeypatch):
    """Bit for bit: PCG64 seeded with (seed, CRC-32 of the phase), one number for each label; an equal one hides it."""
    monkeypatch.setattr(observed_labels, "CHUNK_ENTRIES", chunk)
    codes = toy().rows(range(6))
    numbers = np.random.default_rng([5, zlib.crc32(b"val")]).random(codes.shape, dtype)
    fraction = float(numbers[1, 2])
    observed = draw_fraction(SparseLabels.from_dense(codes, default), fraction, 5, "val").rows(range(6))
    assert np.array_equal(observed, np.where(numbers < fraction, codes, -1)) and observed[1, 2] == -1
    scheme = ObservationScheme("keep", fraction=fraction)
    drawn = scheme.draw(SparseLabels.from_dense(codes, default), 5, "val")
    assert drawn is not None and np.array_equal(drawn.rows(range(6)), observed)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_fraction_is_a_probability(fraction):
    with pytest.raises(ValueError, match="is not a probability"):
        draw_fraction(toy(), fraction, 0)


def test_of_itself_keeping_keeps_everything():
    drawn = ObservationScheme("keep").draw(toy(), 3, "train")
    assert drawn is not None and np.array_equal(drawn.rows(range(6)), toy().rows(range(6)))


def test_fraction_lists_the_shorter_side():
    known = SparseLabels.from_positives([[0]] * 1000, 20, 0)
    assert len(draw_fraction(known, 0.9, 0).codes) < 0.25 * 20000
    assert len(draw_fraction(known, 0.1, 0).codes) < 0.25 * 20000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", ObservationScheme("all")),
        ("single", ObservationScheme("single", positives=1)),
        ("single=3", ObservationScheme("single", positives=3)),
        ("single=1,negatives=2", ObservationScheme("single", positives=1, negatives=2)),
        ("single,negatives=1", ObservationScheme("single", negatives=1)),
        ("keep=0.25", ObservationScheme("keep", fraction=0.25)),
        ("keep=1", ObservationScheme("keep", fraction=1.0)),
    ],
)
def test_observe_parse(text, expected):
    assert ObservationScheme.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "none", "all=1", "single=0", "single=-1", "single=x", "keep", "keep=", "keep=0", "keep=1.5", "keep=nan"],
)
def test_observe_parse_refuses(text):
    with pytest.raises(UserError, match="--observe"):
        ObservationScheme.parse(text)


@pytest.mark.parametrize(
    "text", ["single=1,", "single=1,negatives", "single=1,negatives=x", "single=1,positives=1", "all,negatives=1"]
)
def test_observe_parse_refuses_what_follows_a_comma(text):
    with pytest.raises(UserError, match="what follows a comma is negatives=L"):
        ObservationScheme.parse(text)


def test_published_arrays_take_the_place_of_the_draw(tmp_path):
    known = toy()
    drawn = draw_published(known, seed=77, negatives=1)
    dense = drawn.rows(range(6))
    assert (dense == 0).sum(1).tolist() == [1] * 6 and (dense == 1).sum(1).tolist() == [1] * 6
    encoded = {
        "spml": np.select([dense == 1, dense == 0], [1.0, -1.0], 0.0),
        "openimages": dense.astype(np.int64),
        "nan": np.where(dense == -1, np.nan, dense),
    }
    for name, values in encoded.items():
        np.save(tmp_path / f"{name}.npy", values)
        found = label_encodings.observed_from_file(tmp_path / f"{name}.npy", name, known)
        assert np.array_equal(found.rows(range(6)), dense)


@pytest.mark.parametrize(
    ("values", "fmt", "message"),
    [
        (np.ones((5, 8)), "spml", "has 5 rows, but there are 6 official training images"),
        (np.ones((6, 7)), "spml", "has 7 columns, but there are 8 classes"),
        (
            toy().rows(range(6))[::-1],
            "spml",
            r"\d+ of \d+ observed labels contradict the annotations, the first in row \d",
        ),
        (
            np.zeros((6, 8)),
            "openimages",
            "10 of 48 observed labels contradict the annotations, the first in row 0, column 0",
        ),
        (np.full((6, 8), 0.5), "spml", "row 0, column 0 holds 0.5"),
        (np.zeros((6, 8)), "soft", "soft labels are a method's state"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, values, fmt, message, monkeypatch):
    # Blocks of one row.
    monkeypatch.setattr(label_encodings, "CHUNK_ENTRIES", 8)
    np.save(tmp_path / "obs.npy", values)
    with pytest.raises(UserError, match=message):
        label_encodings.observed_from_file(tmp_path / "obs.npy", fmt, toy())


def test_an_array_of_objects_is_never_loaded(tmp_path):
    np.save(tmp_path / "obs.npy", np.array([[print]], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="is not a NumPy array of text or numbers"):
        label_encodings.observed_from_file(tmp_path / "obs.npy", "spml", toy())


def test_a_pickle_in_the_place_of_an_array_runs_nothing(tmp_path):
    path = tmp_path / "obs.npy"
    path.write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(UserError, match=r"obs\.npy is not a NumPy array of text or numbers"):
        label_encodings.observed_from_file(path, "spml", toy())
    assert not (tmp_path / "ran").exists()
    pickle.loads(path.read_bytes())
    assert (tmp_path / "ran").exists(), "the payload works"


def test_an_archive_in_the_place_of_an_array_is_refused(tmp_path):
    """One array inside has the length of one row."""
    np.savez(tmp_path / "obs.npz", toy().rows(range(6)))
    (tmp_path / "obs.npz").rename(tmp_path / "obs.npy")
    for known in (toy(), toy().select([0])):
        with pytest.raises(UserError, match=r"obs\.npy is not a NumPy array of text or numbers"):
            label_encodings.observed_from_file(tmp_path / "obs.npy", "openimages", known)


def test_at_one_half_the_kept_labels_are_listed():
    """The default tells whether a split is partly annotated, so it must not depend on chance."""
    known = SparseLabels.from_dense(np.array([[1, 0], [0, 1]], np.int8), 0)
    assert [draw_fraction(known, f, 0).default for f in (0.4, 0.5, 0.6)] == [-1, -1, 0]


def test_a_pipe_in_the_place_of_an_array_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "obs.npy")
    with pytest.raises(UserError, match=r"obs\.npy"):
        label_encodings.observed_from_file(tmp_path / "obs.npy", "spml", toy())
