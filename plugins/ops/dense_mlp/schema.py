"""The signature of ``DenseMLP``, which only the native library has; see `plugins.registry`."""

from __future__ import annotations

from shadowllm.plugins.ops.nested_linear.schema import NESTED_LINEAR
from shadowllm.plugins.schema import Attribute, OpSchema, Port, ports_of_part

DENSE_MLP = OpSchema(
    name="DenseMLP",
    inputs=(*ports_of_part("up", NESTED_LINEAR, computed=False), *ports_of_part("down", NESTED_LINEAR)),
    outputs=(Port("y", ("T", "D"), "float32"),),
    attributes=(
        Attribute("activation", str),
        Attribute("threshold", float, default=0.0),
        Attribute("gated", int),
    ),
    doc="All neurons of an MLP: y = down(h), where up and down are NestedLinear. If the MLP is gated, up has the rows "
    "of the gate, then those of up, and h = activation(gate(x)) * up(x). Otherwise h = activation(up(x)). Every row of "
    "y has the bits that it has alone.",
)
