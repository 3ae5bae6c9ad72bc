"""Inputs of a ``SparseMLP`` that computes the gates first: no indices, no low-bit copy, and some neurons are silent."""

from __future__ import annotations

import numpy as np

from tests.plugins.ops.sparse_mlp.native_inputs import mlp_inputs

# Activation, threshold and form. Their gates are random, so about half of the neurons fire for a token.
CASES = [
    ("relu", 0.0, "llama-biases"),
    ("relu", 0.0, "llama"),
    ("relu", 0.0, "opt"),
    ("relu2", 0.0, "llama"),
    ("relu2", 0.0, "opt-untied"),
    ("fatrelu", 5.0, "llama-biases"),
    ("fatrelu", 5.0, "opt"),
    ("drelu", 0.0, "llama-biases"),
]
SIZES = [(41, 7, 1, 1), (123, 88, 1, 1), (123, 88, 2, 3), (64, 88, 4, 17), (1, 1, 1, 1)]  # D, F, B, S
SILENT = 3  # every neuron whose index this divides is silent for all tokens


def gate_first_inputs(form: str, size: tuple[int, ...]) -> dict[str, np.ndarray | None]:
    """Without biases, the gates of silent neurons are zero because their rows are; with biases, the bias is low."""
    inputs = mlp_inputs(form, (*size, 0)) | {"indices": None}
    first = "up" if inputs["w_gate"] is None else "gate"
    inputs[f"w_{first}"][::SILENT] = 0
    if (bias := inputs[f"b_{first}"]) is not None:
        bias[::SILENT] = -1
    return inputs
