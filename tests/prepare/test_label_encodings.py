"""Label arrays in the four encodings in the wild."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from spml_fast.core.errors import UserError
from spml_fast.data.labels import SparseLabels
from spml_fast.prepare import label_encodings, observed_labels
from spml_fast.prepare.label_encodings import import_labels

# What each encoding means, entry by entry.
MEANING = {
    "spml": {1.0: 1, 0.0: -1, -1.0: 0},
    "openimages": {1.0: 1, 0.0: 0, -1.0: -1},
    "nan": {1.0: 1, 0.0: 0, float("nan"): -1},
}


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(sorted(MEANING)),
    hnp.arrays(np.int64, st.tuples(st.integers(0, 9), st.integers(1, 7)), elements=st.integers(0, 2)),
    st.sampled_from([np.float64, np.float32, np.float16, np.int64, np.int8]),
)
def test_importers_give_the_named_meaning(fmt, choice, dtype):
    values, codes = (np.array(list(part)) for part in (MEANING[fmt].keys(), MEANING[fmt].values()))
    if fmt == "nan" and not np.issubdtype(dtype, np.floating):
        choice = np.minimum(choice, 1)
    with np.errstate(invalid="ignore"):
        array = values[choice].astype(dtype)
    imported = import_labels(array, fmt)
    assert np.array_equal(imported.labels.rows(range(len(array))), codes[choice].astype(np.int8))
    assert imported.soft is None and imported.labels.default == -1


def test_the_two_encodings_swap_zero_and_minus_one():
    array = np.array([[1, 0, -1]])
    assert import_labels(array, "spml").labels.rows([0]).tolist() == [[1, -1, 0]]
    assert import_labels(array, "openimages").labels.rows([0]).tolist() == [[1, 0, -1]]


def test_bool_and_unsigned_arrays():
    array = np.array([[True, False]])
    assert import_labels(array, "spml").labels.rows([0]).tolist() == [[1, -1]]
    assert import_labels(array, "openimages").labels.rows([0]).tolist() == [[1, 0]]
    soft = import_labels(array, "soft")
    assert soft.labels.rows([0]).tolist() == [[1, -1]] and np.isnan(soft.soft).all()
    with pytest.raises(UserError, match="row 0, column 1 holds 255"):
        import_labels(np.array([[1, 255]], np.uint8), "spml")


@settings(deadline=None, max_examples=50)
@given(
    hnp.arrays(np.float64, st.tuples(st.integers(1, 8), st.integers(1, 6)), elements=st.floats(0.01, 0.99)), st.data()
)
def test_soft_importer_keeps_values_beside_codes(array, data):
    kind = data.draw(hnp.arrays(np.int64, array.shape, elements=st.integers(0, 2)))
    values = np.choose(kind, [np.zeros_like(array), np.ones_like(array), -array])
    imported = import_labels(values, "soft")
    labels = imported.labels
    assert np.array_equal(labels.rows(range(len(array))), np.where(kind == 1, 1, -1))
    assert imported.soft is not None and len(imported.soft) == len(labels.codes) == int((kind > 0).sum())
    soft = np.full(array.shape, np.nan, np.float32)
    soft[labels.entry_rows(), labels.classes] = imported.soft
    assert np.array_equal(soft, np.where(kind == 2, array, np.nan).astype(np.float32), equal_nan=True)


@pytest.mark.parametrize(
    ("fmt", "value"),
    [
        ("spml", 2.0),
        ("spml", 0.5),
        ("spml", float("nan")),
        ("openimages", float("nan")),
        ("openimages", -2.0),
        ("openimages", float("inf")),
        ("nan", -1.0),
        ("nan", 0.5),
        ("soft", 0.5),
        ("soft", -1.0),
        ("soft", -1.5),
        ("soft", float("nan")),
    ],
)
def test_importers_refuse_values_of_other_formats(fmt, value):
    array = np.array([[0.0, 1.0], [1.0, value]])
    with pytest.raises(UserError, match=r"labels_obs\.npy: row 1, column 1 holds .*which the format " + fmt):
        import_labels(array, fmt, source="labels_obs.npy")


def test_a_soft_label_of_one_may_be_an_observed_negative():
    for fmt, value, hinted in (("soft", -1.0, True), ("soft", -1.5, False), ("nan", -1.0, False)):
        with pytest.raises(UserError) as error:
            import_labels(np.array([[0.0, value]]), fmt)
        assert ("so this may be an array in the format spml" in str(error.value)) is hinted


def test_many_classes_take_wider_ids():
    wide, tall = np.zeros((2, 40_000)), np.zeros((40_000, 2))
    wide[1, 39_999], tall[39_999, 1] = 1, 1
    labels = import_labels(wide, "spml").labels
    assert labels.classes.dtype == np.int32 and labels.classes.tolist() == [39_999] and labels.num_classes == 40_000
    assert import_labels(tall, "spml").labels.classes.dtype == np.int16


class Rows:
    """An array that notes how many rows are read at a time."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.ndim, self.dtype, self.shape = array, array.ndim, array.dtype, array.shape
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, part: slice) -> np.ndarray:
        self.read.append(len(self.array[part]))
        return self.array[part]


@pytest.mark.parametrize(("width", "read"), [(4, [2, 2, 1]), (5, [2, 2, 1]), (6, [1] * 5), (30, [1] * 5), (2, [5])])
def test_large_arrays_are_read_in_blocks_of_rows(width, read, monkeypatch):
    monkeypatch.setattr(label_encodings, "CHUNK_ENTRIES", 10)
    codes = np.random.default_rng(0).integers(-1, 2, (5, width)).astype(np.int8)
    rows = Rows(codes)
    labels = import_labels(rows, "openimages").labels
    assert rows.read == read and np.array_equal(labels.rows(range(5)), codes)


@pytest.mark.parametrize("chunk", [4, 8, 1 << 20])
def test_the_first_contradiction_is_named(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(label_encodings, "CHUNK_ENTRIES", chunk)
    known = np.random.default_rng(1).integers(-1, 2, (6, 8)).astype(np.int8)
    known[[2, 4], [5, 3]], known[3, 0] = (1, 0), -1
    observed = known.copy()
    np.save(tmp_path / "obs.npy", observed)
    labels = SparseLabels.from_dense(known)
    found = label_encodings.observed_from_file(tmp_path / "obs.npy", "openimages", labels)
    assert np.array_equal(found.rows(range(6)), known)
    # A label where nothing is annotated contradicts nothing; two others do.
    observed[[2, 4], [5, 3]], observed[3, 0] = (0, 1), 1
    np.save(tmp_path / "obs.npy", observed)
    number = (observed != -1).sum()
    with pytest.raises(UserError, match=rf"obs\.npy: 2 of {number} observed labels .* the first in row 2, column 5; "):
        label_encodings.observed_from_file(tmp_path / "obs.npy", "openimages", labels)


def test_importers_point_to_the_row_of_a_later_block(monkeypatch):
    for module in (observed_labels, label_encodings):
        monkeypatch.setattr(module, "CHUNK_ENTRIES", 4)
    array = np.zeros((11, 2))
    array[9, 1] = 7
    with pytest.raises(UserError, match="row 9, column 1 holds 7"):
        import_labels(array, "spml")


@pytest.mark.parametrize(
    ("array", "fmt", "classes", "message"),
    [
        (np.zeros(3), "spml", None, "two dimensions"),
        (np.zeros((2, 3, 4)), "nan", None, "two dimensions"),
        (np.zeros((2, 3)), "nan", 4, "3 columns, but there are 4"),
        (np.zeros((2, 0)), "nan", None, "no class"),
        (np.array([["1", "0"]]), "spml", None, "dtype"),
        (np.zeros((2, 3)), "guess", None, "does not exist"),
    ],
)
def test_importers_check_shape_dtype_and_name(array, fmt, classes, message):
    with pytest.raises(UserError, match=message):
        import_labels(array, fmt, classes)
