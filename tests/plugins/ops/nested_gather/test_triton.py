"""Compares the kernel of ``NestedGather`` with the values of the integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from shadowllm.bundle.quantisation import NESTED
from shadowllm.plugins.ops.nested_gather.launcher import nested_gather
from shadowllm.plugins.ops.nested_gather.reference import nested_gather as reference
from tests.plugins.triton_ops import DEVICE, FORMATS, nested

pytestmark = pytest.mark.slow


@FORMATS
@pytest.mark.parametrize(("width", "rows", "asked"), [(1, 1, 1), (41, 3, 3), (64, 70, 1), (300, 97, 9), (1100, 5, 2)])
def test_rows(width, rows, asked, q):
    generator = torch.Generator().manual_seed(width)
    copy, scales, residual, values = nested(torch.randn(rows, width, generator=generator), q)
    ids = torch.randint(rows, (asked,), generator=generator, dtype=torch.int32)
    parts = (ids, residual, copy, scales)
    for wanted in (width, 64 * -(-width // 64)):  # without and with the padding of the last block
        found = nested_gather(*(part.to(DEVICE) for part in parts), width=wanted).cpu()
        assert found.shape == (asked, wanted)
        assert torch.equal(found[:, :width], values[ids])
        assert not found[:, width:].any()
        np.testing.assert_array_equal(reference(*(part.numpy() for part in parts), width=wanted), found)


@FORMATS
def test_a_row_that_does_not_exist_is_zero(q):
    copy, scales, residual, values = nested(torch.ones(5, 70), q)
    parts = (torch.tensor([5, 4, -1], dtype=torch.int32), residual, copy, scales)
    found = nested_gather(*(part.to(DEVICE) for part in parts), width=70).cpu()
    assert torch.equal(found, torch.stack([torch.zeros(70), values[4], torch.zeros(70)]))
    with pytest.raises(IndexError, match=r"index 5 is outside 0\.\.4"):
        reference(*(part.numpy() for part in parts), width=70)


def test_another_width_is_refused():
    copy, scales, residual, _ = (part.to(DEVICE) for part in nested(torch.ones(5, 70), NESTED["int8"]))
    ids = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=r"NestedGather: copy has shape \(5, 2, 32\) for rows of 64"):
        nested_gather(ids, residual, copy, scales, width=64)
