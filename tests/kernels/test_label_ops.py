"""label_loss and label_rows against loops and dense arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spml_kernels import PointLoss, label_loss, label_rows


@pytest.fixture(autouse=True)
def plain_pytorch(monkeypatch):
    monkeypatch.setenv("SPML_KERNELS", "reference")


def shifted_square(logits, codes, positive, other):
    return torch.where(codes == 1, positive, other) * (logits - codes) ** 2


POINT = PointLoss("shifted_square", shifted_square)


def test_sum_and_gradient_with_parameters():
    logits = torch.tensor([[1.0, 2.0], [3.0, 5.0]], dtype=torch.float64, requires_grad=True)
    codes = torch.tensor([[1, 0], [-1, 1]], dtype=torch.int8)
    total = label_loss(logits, codes, POINT, (2.0, 3.0))
    assert total.shape == () and total.dtype == torch.float64
    assert total.item() == 2 * 0 + 3 * 4 + 3 * 16 + 2 * 16
    (2 * total).backward()
    assert logits.grad.tolist() == [[0, 24], [48, 32]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_are_fp32(dtype):
    # 3000 terms of 1 + 1/8: a half-precision sum would stop growing long before.
    logits = torch.full((30, 100), 1.0, dtype=dtype, requires_grad=True)
    codes = torch.zeros(30, 100, dtype=torch.int8)
    point = PointLoss("ramp", lambda z, c: z + z / 8)
    total = label_loss(logits, codes, point)
    assert total.dtype == torch.float32 and total.item() == 3375
    total.backward()
    assert logits.grad.dtype == dtype and (logits.grad == 1.125).all()


def test_layout_does_not_matter():
    logits = torch.randn(5, 7, dtype=torch.float64)
    codes = torch.randint(-1, 2, (5, 7), dtype=torch.int8)
    expected = label_loss(logits, codes, POINT, (2.0, 3.0))
    turned = label_loss(logits.T.contiguous().T, codes.T.contiguous().T, POINT, (2.0, 3.0))
    torch.testing.assert_close(turned, expected, rtol=1e-14, atol=0)
    assert label_loss(logits[:0], codes[:0], POINT, (2.0, 3.0)).item() == 0


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=st.integers(1, 8), width=st.integers(1, 9), default=st.sampled_from([-1, 0]))
def test_rows_of_a_sparse_array_equal_the_dense_one(data, n, width, default):
    codes = st.sampled_from([-2, -1, 0, 1])
    dense = np.array(data.draw(st.lists(st.lists(codes, min_size=width, max_size=width), min_size=n, max_size=n)))
    listed = dense != -2
    expected = np.where(listed, dense, default).astype(np.int8)
    indptr = torch.from_numpy(np.concatenate([[0], listed.sum(1).cumsum()]))
    classes = torch.from_numpy(np.nonzero(listed)[1].astype(np.int16))
    values = torch.from_numpy(dense[listed].astype(np.int8))
    index = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), max_size=6)), dtype=torch.int64)
    longest = int(listed.sum(1).max())
    found = label_rows(indptr, classes, values, index, width, default, longest)
    assert found.dtype == torch.int8 and found.shape == (len(index), width)
    np.testing.assert_array_equal(found.numpy(), expected[index.numpy()].reshape(-1, width))
    # A looser bound of the row length changes nothing.
    if longest:
        looser = label_rows(indptr, classes, values, index, width, default, longest + 3)
        np.testing.assert_array_equal(looser.numpy(), found.numpy())


def test_wide_class_ids():
    indptr = torch.tensor([0, 2, 2, 3])
    classes = torch.tensor([1, 39_999, 7], dtype=torch.int32)
    codes = torch.tensor([1, 0, 1], dtype=torch.int8)
    rows = label_rows(indptr, classes, codes, torch.tensor([2, 1, 0, 0]), 40_000, -1, 2)
    assert (rows != -1).sum(1).tolist() == [1, 0, 2, 2]
    assert rows[2, 39_999] == 0 and rows[0, 7] == 1
