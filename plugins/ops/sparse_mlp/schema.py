"""The signature of ``SparseMLP``."""

from __future__ import annotations

from shadowllm.plugins.schema import Attribute, OpSchema, Port

SPARSE_MLP = OpSchema(
    name="SparseMLP",
    inputs=(
        Port("x", ("B", "S", "D")),
        Port("indices", ("cap",), "int32"),
        Port("count", (), "int32"),
        Port("w_gate", ("F", "D"), optional=True),
        Port("b_gate", ("F",), optional=True),
        Port("w_up", ("F", "D")),
        Port("b_up", ("F",), optional=True),
        Port("w_down", ("F", "D")),
        Port("b_down", ("D",), optional=True),
        *(Port(f"s_{part}", ("F", "blocks"), "float32", optional=True) for part in ("gate", "up", "down")),
    ),
    outputs=(Port("y", ("B", "S", "D")),),
    attributes=(Attribute("activation", str), Attribute("layer", int)),
    doc="b_down plus the sum over active neurons f of act(w_gate[f] x) * (w_up[f] x) * w_down[f]; "
    "without w_gate, of act(w_up[f] x) * w_down[f].",
)
