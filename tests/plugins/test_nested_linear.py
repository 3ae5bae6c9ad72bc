"""Compares the linear layer of nested integers with float64 arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")

from shadowllm.plugins.triton.nested_linear import NestedRows, nested_linear
from tests.plugins.triton_ops import DEVICE, FORMATS, assert_as_exact_as, nested, with_types

pytestmark = pytest.mark.slow

SIZES = [(1, 1), (8, 3), (41, 70), (64, 33), (123, 5), (300, 7)]  # width, rows


def rows_of(width, rows, q):
    """The matrix on the device, and its values."""
    generator = torch.Generator().manual_seed(width)
    *parts, values = nested(torch.randn(rows, width, generator=generator) / width**0.5, q)
    return NestedRows(*(part.to(DEVICE) for part in parts), width), values


@FORMATS
@pytest.mark.parametrize(("size", "tokens", "dtype"), with_types(SIZES, [(), (2, 1), (3, 7), (70,)]))
def test_linear(size, tokens, dtype, q):
    width, rows = size
    weight, values = rows_of(width, rows, q)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(*tokens, width, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype) if rows % 2 else None
    found = nested_linear(x.to(DEVICE), weight, None if bias is None else bias.to(DEVICE))
    own, exact = (F.linear(x.to(t), values.to(t), None if bias is None else bias.to(t)) for t in (dtype, torch.float64))
    assert_as_exact_as(found, own, exact)


@FORMATS
def test_values_of_rows_and_parts(q):
    weight, values = rows_of(123, 70, q)
    rows = torch.tensor([[3, 69], [0, 3]])
    torch.testing.assert_close(weight.values(rows.to(DEVICE)).cpu(), values[rows])
    _, last = weight.split([67, 3])
    torch.testing.assert_close(last.values(torch.arange(3, device=DEVICE)).cpu(), values[67:])
    assert last.copy.untyped_storage().data_ptr() == weight.copy.untyped_storage().data_ptr()
    x = torch.randn(123, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(nested_linear(x.to(DEVICE), last).cpu(), F.linear(x, values[67:]))


@FORMATS
def test_another_width_is_refused(q):
    weight, _ = rows_of(41, 70, q)
    with pytest.raises(ValueError, match=r"x has shape \(1, 64\), and a row has 41 elements"):
        nested_linear(torch.zeros(1, 64, device=DEVICE), weight)
