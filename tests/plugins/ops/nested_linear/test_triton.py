"""Compares the kernel of ``NestedLinear`` with float64 arithmetic, and with the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")

from shadowllm.plugins.ops.nested_linear.launcher import nested_linear
from shadowllm.plugins.ops.nested_linear.reference import nested_linear as reference
from tests.plugins.triton_ops import DEVICE, FORMATS, assert_as_exact_as, nested, with_types

pytestmark = pytest.mark.slow

SIZES = [(1, 1), (8, 3), (41, 70), (64, 33), (123, 5), (300, 7)]  # width, rows


@FORMATS
@pytest.mark.parametrize(("size", "tokens", "dtype"), with_types(SIZES, [1, 2, 21, 70]))
def test_linear(size, tokens, dtype, q):
    width, rows = size
    generator = torch.Generator().manual_seed(rows)
    copy, scales, residual, values = nested(torch.randn(rows, width, generator=generator) / width**0.5, q)
    x = torch.randn(tokens, width, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype) if rows % 2 else None
    given = [None if part is None else part.to(DEVICE) for part in (x, residual, copy, scales, bias)]
    found = nested_linear(*given)
    own, exact = (F.linear(x.to(t), values.to(t), None if bias is None else bias.to(t)) for t in (dtype, torch.float64))
    assert_as_exact_as(found, own, exact)
    if dtype == torch.float32:
        arrays = [None if part is None else part.numpy() for part in (x, residual, copy, scales, bias)]
        np.testing.assert_allclose(reference(*arrays), exact.numpy(), rtol=1e-5, atol=1e-5)


@FORMATS
def test_other_parts_are_refused(q):
    copy, scales, residual, _ = (part.to(DEVICE) for part in nested(torch.ones(5, 64), q))
    x = torch.zeros(1, 64, device=DEVICE)
    with pytest.raises(ValueError, match=r"NestedLinear: copy has shape \(5, 1, 32\) for rows of 65"):
        nested_linear(torch.zeros(1, 65, device=DEVICE), residual, copy, scales, None)
    with pytest.raises(ValueError, match="NestedLinear: w has rows of 8 bytes, and its copy 32"):
        nested_linear(x, residual[:, :8].contiguous(), copy, scales, None)
    with pytest.raises(ValueError, match=r"NestedLinear: bias has shape \(4,\)"):
        nested_linear(x, residual, copy, scales, torch.zeros(4, device=DEVICE))
