"""Which graphs decode: the sparse ones, but only where they read less than the dense one."""

from __future__ import annotations

from shadowllm.exporter.manifest import Manifest
from shadowllm.models.budget import Budget


def sparse_pays(manifest: Manifest, budget: Budget) -> bool:
    """Whether the weights a sparse step leaves out are more than those its predictor adds.

    A step is bound by memory, and all weights of a bundle are of one size, so elements are compared.
    """
    spec = manifest.spec
    heads, neurons = budget.counts(spec)
    rows = 2 * spec.head_dim * (spec.n_heads - heads) + (3 if spec.gated else 2) * (spec.intermediate_size - neurons)
    left_out = (spec.n_layers - manifest.dense_layers) * rows * spec.hidden_size
    return left_out > predictor_elements(manifest)


def predictor_elements(manifest: Manifest) -> int:
    """Weights a bundle's predictor reads per step: its network's, or one score per unit."""
    spec, rank = manifest.spec, int(manifest.predictor["rank"])
    outputs = (spec.n_layers - manifest.dense_layers) * (spec.n_heads + spec.intermediate_size)
    return rank * (spec.hidden_size + 1) + outputs * (rank + 1)
