"""Sources of canonical tensors."""

from __future__ import annotations

import torch

from shadowllm.models.weights import Source
from tests.allocations import Allocations


def test_a_scaled_tensor_is_one_copy_of_the_stored_one():
    stored = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    before = stored.clone()
    with Allocations() as made:
        found = Source("table", scale=0.3, shift=1.0).convert(stored)
    assert made.sizes == [(stored.numel(), torch.float32)]
    assert torch.equal(found, 0.3 * (before.float() + 1.0))
    assert torch.equal(stored, before)
