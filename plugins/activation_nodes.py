"""Activation functions of MLPs as ONNX nodes, for graphs and for function bodies; see `models.activations`."""

from __future__ import annotations

from typing import Any, Protocol

import onnx_ir as ir

from shadowllm.models.activations import QUICK_GELU_SLOPE


class NodeBuilder(Protocol):
    """Adds nodes to a graph or to a function."""

    def op(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """Add a node and return its output."""
        ...

    def number(self, value: float) -> ir.Value:
        """A scalar constant of the type of the activations."""
        ...


def activate(g: NodeBuilder, activation: str, threshold: float, x: ir.Value) -> ir.Value:
    """Apply the activation function of an MLP to gate, or to up without a gate. A NaN stays one."""
    if activation in ("relu", "drelu"):
        return g.op("Relu", x)
    if activation == "relu2":
        positive = g.op("Relu", x)
        return g.op("Mul", positive, positive)
    if activation == "fatrelu":
        return g.op("Where", g.op("LessOrEqual", x, g.number(threshold)), g.number(0.0), x)
    if activation in ("silu", "quick_gelu"):
        argument = x if activation == "silu" else g.op("Mul", x, g.number(QUICK_GELU_SLOPE))
        return g.op("Mul", x, g.op("Sigmoid", argument))
    return g.op("Gelu", x, approximate={"gelu": "none", "gelu_tanh": "tanh"}[activation])


def times_up(g: NodeBuilder, activation: str, active: ir.Value, up: ir.Value) -> ir.Value:
    """Multiply the activated gate by up, which has a ReLU too in dReLU."""
    return g.op("Mul", active, g.op("Relu", up) if activation == "drelu" else up)
