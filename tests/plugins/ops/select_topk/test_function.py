"""Compares the function body on ONNX Runtime with the NumPy reference, at awkward sizes."""

from __future__ import annotations

import numpy as np
import pytest

from shadowllm.plugins.ops.select_topk.reference import select_topk
from shadowllm.plugins.ops.select_topk.schema import SELECT_TOPK
from tests.plugins.function_model import FORM, run


@pytest.mark.parametrize(("n", "counts"), [(1, [1]), (41, [0, 7, 41]), (123, [1, 122, 61]), (1000, [999])])
def test_against_reference(n, counts):
    scores = np.random.default_rng(n).standard_normal((len(counts), n)).astype(np.float32)
    counts = np.array(counts, dtype=np.int32)
    found = run(SELECT_TOPK, FORM, {"scores": scores, "counts": counts}, cap=n)
    np.testing.assert_array_equal(found, select_topk(scores, counts, n))


def test_ties_go_to_the_lower_index():
    scores = np.array([[1, 2, 2, 1, 2, 1]], dtype=np.float32)
    found = run(SELECT_TOPK, FORM, {"scores": scores, "counts": np.array([4], dtype=np.int32)}, cap=6)
    assert found.tolist() == [[0, 1, 2, 4, -1, -1]]


def test_cap_below_the_row():
    scores = np.arange(10, dtype=np.float32)[None]
    found = run(SELECT_TOPK, FORM, {"scores": scores, "counts": np.array([2], dtype=np.int32)}, cap=3)
    assert found.tolist() == [[8, 9, -1]]
