"""Inputs of ``DenseMLP``, and its linear layers as nodes of their own."""

from __future__ import annotations

import numpy as np

from shadowllm.plugins.reference import mlp_product
from tests.plugins.native_model import run
from tests.plugins.ops.nested_linear.native_inputs import linear_inputs

Inputs = dict[str, np.ndarray | None]
Size = tuple[int, int, int]  # T, D, F
WEIGHTS = tuple(f"{part}_{name}" for part in ("up", "down") for name in ("w", "copy", "scales", "bias"))


def dense_mlp_inputs(size: Size, gated: bool = True, bias: bool = True, block: int = 64) -> Inputs:
    """Scales are small, so that results are about as large as inputs."""
    tokens, hidden, neurons = size
    up = linear_inputs((tokens, hidden, neurons * (1 + gated), block), bias, seed=hidden)
    down = linear_inputs((tokens, neurons, hidden, block), bias, seed=neurons)
    layers = {"up": up, "down": down}
    parts = {f"{part}_{name}": value for part, inputs in layers.items() for name, value in inputs.items()}
    small = {name: value * np.float32(1 / 4) for name, value in parts.items() if name.endswith("_scales")}
    return {"x": up["x"]} | {name: value for name, value in parts.items() if not name.endswith("_x")} | small


def mlp_in_parts(inputs: Inputs, *, activation: str, gated: int, threshold: float = 0.0, **attributes) -> np.ndarray:
    """The MLP with a node for each of its linear layers."""

    def linear(part: str, x: np.ndarray) -> np.ndarray:
        own = {name: inputs.get(f"{part}_{name}") for name in ("w", "copy", "scales", "bias")}
        return run("NestedLinear", {"x": x} | own, **attributes)

    parts = np.split(linear("up", inputs["x"]), 1 + gated, axis=1)
    return linear("down", mlp_product(activation, threshold, *parts))
