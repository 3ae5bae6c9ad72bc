"""The reference against a plain search, and the bound that certifies a largest logit."""

from __future__ import annotations

import numpy as np
import pytest

from shadowllm.bundle.certificate import ROWS, best_weighting, copy_errors
from shadowllm.plugins.ops.shortlist_logits.reference import shortlist_logits
from shadowllm.plugins.reference import copy_rows
from tests.plugins.ops.shortlist_logits.table_inputs import (
    KINDS,
    SIZES,
    assert_certified,
    exact_logits,
    table_inputs,
    with_counts,
)


@pytest.mark.parametrize("shortlist", [0, 1, 5, 513, 600])
def test_the_best_rows_of_the_copy_are_exact(shortlist):
    inputs = table_inputs("normal", 513, 3, 123)
    logits, recomputed = shortlist_logits(**with_counts(inputs, shortlist, certify=False))
    exact, low = exact_logits(inputs), inputs["x"] @ copy_rows(inputs["copy"], inputs["scales"], 123).T
    assert recomputed.tolist() == [min(shortlist, 513)] * 3
    for row in range(3):
        best = sorted(range(513), key=lambda v, row=row: (-low[row, v], v))[:shortlist]
        wanted = [exact[row, v] if v in best else low[row, v] for v in range(513)]
        np.testing.assert_allclose(logits[row], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shortlist", [0, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_certified_logit_is_the_largest_of_the_table(kind, size, shortlist, weighted):
    inputs = table_inputs(kind, *size, weighted=weighted)
    logits, recomputed = shortlist_logits(**with_counts(inputs, shortlist, certify=True))
    assert_certified(inputs, logits)
    assert ((recomputed >= min(size[0], max(shortlist, 1))) & (recomputed <= size[0])).all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_holds_for_every_row(kind, weighted):
    inputs = table_inputs(kind, 513, 3, 123, weighted=weighted)
    low = inputs["x"].astype(np.float64) @ copy_rows(inputs["copy"], inputs["scales"], 123).astype(np.float64).T
    weighting = inputs["weighting"] if weighted else 1
    norms = np.linalg.norm(inputs["x"].astype(np.float64) * weighting, axis=1, keepdims=True)
    assert (np.abs(exact_logits(inputs) - low) <= norms * inputs["errors"]).all()


def test_a_weighting_makes_the_bound_tighter_where_x_has_outliers():
    counts = [
        shortlist_logits(**with_counts(table_inputs("outlier", 5000, 3, 576, weighted), 64, certify=True))[1].mean()
        for weighted in (False, True)
    ]
    assert counts[1] < counts[0] / 2


def test_an_error_in_the_direction_of_x_reaches_the_bound():
    table = np.full((2, 64), 0.5, np.float32)
    table[1] = 0.49
    copy, scales = np.full((2, 1, 32), 8 | 8 << 4, np.uint8), np.ones((2, 1), np.float32)
    inputs = {"x": np.ones((1, 64), np.float32), "table": table, "copy": copy, "scales": scales}
    inputs |= {"errors": copy_errors(table, copy, scales)}
    logits, recomputed = shortlist_logits(**with_counts(inputs, 1, certify=False))
    np.testing.assert_allclose(logits, [[32, 0]])
    assert recomputed.tolist() == [1]
    # The bound of the other row is its exact product, 31.36, which is below the largest.
    _, recomputed = shortlist_logits(**with_counts(inputs, 1, certify=True))
    assert recomputed.tolist() == [1]
    inputs["errors"] = copy_errors(table * np.float32(32.1 / 31.36), copy, scales)
    assert shortlist_logits(**with_counts(inputs, 1, certify=True))[1].tolist() == [2]


def test_errors_of_many_rows_are_computed_in_parts():
    rng = np.random.default_rng(0)
    table = rng.standard_normal((ROWS + 5, 3)).astype(np.float32)
    copy = rng.integers(0, 256, (ROWS + 5, 1, 32), dtype=np.uint8)
    scales = rng.random((ROWS + 5, 1)).astype(np.float32)
    wanted = np.linalg.norm(table - copy_rows(copy, scales, 3), axis=1)
    found = copy_errors(table, copy, scales)
    assert (found >= wanted).all()
    assert (found <= wanted + 0.02).all()


def test_the_best_weighting_stands_zeros():
    weights = best_weighting(np.array([0.0, 1.0, 1e6, 1.0]), np.array([1.0, 1.0, 1.0, 0.0]))
    assert (weights > 0).all()
    assert np.isfinite(weights).all()
    assert (best_weighting(np.zeros(3), np.zeros(3)) > 0).all()
    assert weights[2] < weights[1]


def test_a_negative_shortlist_is_refused():
    with pytest.raises(IndexError, match="shortlist -1 is negative"):
        shortlist_logits(**with_counts(table_inputs("normal", 7, 1, 64), -1, certify=False))
