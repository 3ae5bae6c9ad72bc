"""A matrix of nested integers on a device: its values, its parts, and products of any shape."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="triton is not installed (pip install 'shadowllm[triton]')")

from shadowllm.runtime.gpu.nested_rows import NestedRows
from tests.plugins.triton_ops import DEVICE, FORMATS, nested

pytestmark = pytest.mark.slow


def rows_of(width, rows, q):
    """The matrix on the device, and its values."""
    *parts, values = nested(torch.randn(rows, width, generator=torch.Generator().manual_seed(width)), q)
    return NestedRows(*(part.to(DEVICE) for part in parts), width), values


@FORMATS
def test_values_of_rows_and_parts(q):
    weight, values = rows_of(123, 70, q)
    rows = torch.tensor([[3, 69], [0, 3]])
    torch.testing.assert_close(weight.values(rows.to(DEVICE)).cpu(), values[rows])
    _, last = weight.split([67, 3])
    torch.testing.assert_close(last.values(torch.arange(3, device=DEVICE)).cpu(), values[67:])
    assert last.copy.untyped_storage().data_ptr() == weight.copy.untyped_storage().data_ptr()
    for shape in ((123,), (2, 1, 123), (3, 7, 123)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        found = last.linear(x.to(DEVICE)).cpu()
        torch.testing.assert_close(found, F.linear(x, values[67:]), rtol=1e-5, atol=1e-4)


@FORMATS
def test_another_width_is_refused(q):
    weight, _ = rows_of(41, 70, q)
    with pytest.raises(ValueError, match=r"x has shape \(1, 64\), and a row has 41 elements"):
        weight.linear(torch.zeros(1, 64, device=DEVICE))
