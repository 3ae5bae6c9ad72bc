"""Compares the native op with the reference: indices are equal."""

from __future__ import annotations

import numpy as np
import pytest

from shadowllm.plugins.ops.select_topk.reference import select_topk
from tests.plugins.native_model import built, run
from tests.plugins.ops.select_topk.native_inputs import scores_of

pytestmark = built


@pytest.mark.parametrize("kind", ["normal", "ties", "close", "special"])
@pytest.mark.parametrize(("rows", "n", "cap"), [(1, 1, 1), (3, 7, 7), (5, 41, 60), (29, 1536, 768), (13, 123, 100)])
def test_select_topk(kind, rows, n, cap):
    scores = scores_of(kind, rows, n)
    counts = np.random.default_rng(1).integers(0, min(cap, n) + 1, rows).astype(np.int32)
    counts[-1], counts[0] = 0, min(cap, n)
    found = run("SelectTopK", {"scores": scores, "counts": counts}, threads=2, cap=cap)
    np.testing.assert_array_equal(found, select_topk(scores, counts, cap))
