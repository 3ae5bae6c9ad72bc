"""Compares the NumPy reference with the plain dense formula."""

from __future__ import annotations

import numpy as np

from shadowllm.plugins.ops.sparse_mlp.reference import sparse_mlp


def test_all_active_mlp_is_the_dense_mlp():
    rng = np.random.default_rng(0)
    x, (up, down) = rng.standard_normal((1, 2, 5)), rng.standard_normal((2, 7, 5))
    found = sparse_mlp(x, np.arange(7), 7, None, None, up, None, down, None, activation="relu")[0]
    np.testing.assert_allclose(found, np.maximum(x @ up.T, 0) @ down, rtol=1e-5)
