"""Tiers of a schedule: each call has one."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from shadowllm.plugins.triton.schedule import tiers


@pytest.mark.parametrize(("batch", "seqlen"), [(1, 1), (5, 1), (16, 1), (17, 1), (1, 9), (4, 300)])
def test_tiers_cover_every_call(batch, seqlen):
    found = tiers(batch, seqlen)
    for b in range(1, batch + 1):
        for s in (1, seqlen):
            tier = next(t for t in found if b <= t.max_batch and s <= t.max_seqlen)
            assert tier.size(b, s) == b * s
            assert tier.tiles(b, s) * tier.block >= b * s
