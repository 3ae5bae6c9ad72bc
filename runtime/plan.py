"""Which graphs decode: the sparse ones, but only where they read less than the dense one."""

from __future__ import annotations

from shadowllm.exporter.manifest import Manifest
from shadowllm.models.budget import Budget


def sparse_pays(manifest: Manifest, budget: Budget, narrow_rows: bool = False) -> bool:
    """Whether a sparse step with its predictor reads less than a dense one.

    A step is bound by memory, so weights are counted: of the layers where the two differ, and nearly
    all of them of one size.

    Args:
        narrow_rows: active rows are read at 16 bits where everything else is widened to 32.
    """
    spec = manifest.spec
    heads, neurons = budget.counts(spec)
    matrices = 3 if spec.gated else 2
    every = 2 * spec.head_dim * spec.n_heads + matrices * spec.intermediate_size
    active = 2 * spec.head_dim * heads + matrices * neurons
    row_width = (spec.n_layers - manifest.dense_layers) * spec.hidden_size
    return row_width * (every - active / (2 if narrow_rows else 1)) > predictor_elements(manifest)


def predictor_elements(manifest: Manifest) -> int:
    """Weights a bundle's predictor reads per step: its network's, or one score per unit."""
    spec, rank = manifest.spec, int(manifest.predictor["rank"])
    outputs = (spec.n_layers - manifest.dense_layers) * (spec.n_heads + spec.intermediate_size)
    return rank * (spec.hidden_size + 1) + outputs * (rank + 1)
