"""Forms, weights and inputs of a native ``SparseMLP``, and its exact result."""

from __future__ import annotations

import numpy as np

from shadowllm.plugins.reference import ACTIVATIONS
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


def exact_mlp(inputs: dict[str, np.ndarray | None], activation: str) -> np.ndarray:
    wide = {k: v.astype(np.float64) for k, v in inputs.items() if v is not None and v.dtype != np.int32}
    rows = inputs["indices"][: int(inputs["count"])]
    up = wide["x"] @ wide["w_up"][rows].T + (wide["b_up"][rows] if "b_up" in wide else 0)
    act = ACTIVATIONS[activation] if len(rows) else np.asarray  # np.vectorize refuses empty input
    hidden = (
        act(up)
        if "w_gate" not in wide
        else up * act(wide["x"] @ wide["w_gate"][rows].T + (wide["b_gate"][rows] if "b_gate" in wide else 0))
    )
    return hidden @ wide["w_down"][rows] + wide.get("b_down", 0)
