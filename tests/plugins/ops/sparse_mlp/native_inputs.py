"""Forms, weights and inputs of a native ``SparseMLP``, and its exact result."""

from __future__ import annotations

import numpy as np

from shadowllm.plugins.reference import mlp_product
from tests.plugins.native_model import pick

MLP_SCALES = ("s_gate", "s_up", "s_down")
MLP_WEIGHTS = ("w_gate", "b_gate", "w_up", "b_up", "w_down", "b_down")
MLP_FORMS = {  # activation, gated, biases
    "llama": ("silu", True, False),
    "llama-biases": ("silu", True, True),
    "opt": ("relu", False, True),
    "opt-untied": ("relu", False, False),
    "galactica": ("gelu", False, True),
    "relu-gated": ("relu", True, False),
}


def mlp_inputs(form: str, size: tuple[int, ...], seed: int = 0) -> dict[str, np.ndarray | None]:
    hidden, neurons, batch, seqlen, count = size
    _, gated, biases = MLP_FORMS[form]
    rng = np.random.default_rng(seed)

    def normal(*shape: int, given: bool = True) -> np.ndarray | None:
        return rng.standard_normal(shape).astype(np.float32) if given else None

    return {
        "x": normal(batch, seqlen, hidden),
        "indices": pick(rng, neurons, count, neurons),
        "count": np.asarray(count, dtype=np.int32),
        "w_gate": normal(neurons, hidden, given=gated),
        "b_gate": normal(neurons, given=gated and biases),
        "w_up": normal(neurons, hidden),
        "b_up": normal(neurons, given=biases),
        "w_down": normal(neurons, hidden),
        "b_down": normal(hidden, given=biases),
    }


def exact_mlp(inputs: dict[str, np.ndarray | None], activation: str, threshold: float = 0.0) -> np.ndarray:
    """In float64. Without indices, all neurons are active."""
    wide = {k: v.astype(np.float64) for k, v in inputs.items() if v is not None and v.dtype != np.int32}
    rows = np.arange(len(wide["w_up"])) if inputs["indices"] is None else inputs["indices"][: int(inputs["count"])]
    if not len(rows):  # np.vectorize refuses empty input
        return np.broadcast_to(wide.get("b_down", 0.0), wide["x"].shape)
    up = wide["x"] @ wide["w_up"][rows].T + (wide["b_up"][rows] if "b_up" in wide else 0)
    if "w_gate" in wide:
        gate = wide["x"] @ wide["w_gate"][rows].T + (wide["b_gate"][rows] if "b_gate" in wide else 0)
        hidden = mlp_product(activation, threshold, gate, up)
    else:
        hidden = mlp_product(activation, threshold, up)
    return hidden @ wide["w_down"][rows] + wide.get("b_down", 0)
