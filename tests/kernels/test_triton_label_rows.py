"""CSR rows to dense codes, against the reference."""

from __future__ import annotations

import pytest
import torch
from spml_kernels import label_rows
from spml_kernels.label_rows.reference import label_rows_reference

from tests.support.kernels import assert_op_sound

pytestmark = pytest.mark.usefixtures("triton_on")


def csr(rows, num_classes, kind, share, seed=0):
    generator = torch.Generator().manual_seed(seed)
    listed = torch.rand(rows, num_classes, generator=generator) < share
    listed[rows // 2] = False
    if rows > 1:
        listed[0] = True
    row, column = torch.nonzero(listed, as_tuple=True)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), listed.sum(1).cumsum(0)])
    codes = torch.randint(0, 2, (len(row),), generator=generator, dtype=torch.int8)
    return indptr, column.to(kind), codes, int(listed.sum(1).max())


@pytest.mark.parametrize("default", [-1, 0, -2])
@pytest.mark.parametrize(
    ("num_classes", "kind", "share"),
    [
        (1, torch.int16, 0.5),
        (20, torch.int16, 0.3),
        (81, torch.int16, 1.0),
        (9605, torch.int16, 0.01),
        (40000, torch.int32, 0.001),
    ],
)
def test_equals_the_reference(num_classes, kind, share, default, device):
    indptr, classes, codes, longest = csr(13, num_classes, kind, share)
    index = torch.tensor([3, 0, 12, 6, 0])
    expected = label_rows_reference(indptr, classes, codes, index, num_classes, default, longest)
    arrays = [t.to(device) for t in (indptr, classes, codes, index)]
    found = label_rows(*arrays, num_classes, default, longest)
    assert found.dtype == torch.int8 and torch.equal(found.cpu(), expected)
    assert torch.equal(label_rows(*arrays, num_classes, default, longest), found)
    strided = torch.stack([arrays[3], arrays[3] * 0], 1)[:, 0]
    assert torch.equal(label_rows(*arrays[:3], strided, num_classes, default, longest), found)


@pytest.mark.parametrize("kind", [torch.int16, torch.int32])
def test_ids_out_of_range_are_written_nowhere(device, kind):
    """Neither into the row of another image nor outside of the block."""
    indptr = torch.tensor([0, 3, 5, 8])
    far = torch.iinfo(kind)
    classes = torch.tensor([-1, 2, 7, 6, -7, far.max, far.min, 0], dtype=kind)
    codes = torch.ones(8, dtype=torch.int8)
    expected = torch.zeros(3, 7, dtype=torch.int8)
    expected[0, 2] = expected[1, 6] = expected[2, 0] = 1
    arrays = [t.to(device) for t in (indptr, classes, codes, torch.arange(3))]
    assert torch.equal(label_rows(*arrays, 7, 0, 3).cpu(), expected)
    assert torch.equal(label_rows_reference(*arrays, 7, 0, 3).cpu(), expected)


def test_empty(device):
    indptr, classes, codes, longest = (t.to(device) if torch.is_tensor(t) else t for t in csr(4, 20, torch.int16, 0.3))
    none = torch.zeros(0, dtype=torch.int64, device=device)
    assert label_rows(indptr, classes, codes, none, 20, -1, longest).shape == (0, 20)
    unlisted = torch.zeros(5, dtype=torch.int64, device=device)
    out = label_rows(unlisted, classes[:0], codes[:0], torch.arange(4, device=device), 20, -1, 0)
    assert torch.equal(out, torch.full((4, 20), -1, dtype=torch.int8, device=device))


def test_op_is_sound_and_compiles(device):
    indptr, classes, codes, longest = (t.to(device) if torch.is_tensor(t) else t for t in csr(9, 33, torch.int16, 0.3))
    index = torch.arange(7, device=device)
    assert_op_sound(torch.ops.spml.label_rows.default, (indptr, classes, codes, index, 33, -1))

    def rows(index):
        return label_rows(indptr, classes, codes, index, 33, -1, longest).float().sum(1)

    assert torch.equal(torch.compile(rows, fullgraph=True, backend="aot_eager")(index), rows(index))
