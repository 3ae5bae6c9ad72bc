"""The signature of ``SparseMLP``."""

from __future__ import annotations

from shadowllm.plugins.schema import Attribute, OpSchema, Port

PARTS = ("gate", "up", "down")

SPARSE_MLP = OpSchema(
    name="SparseMLP",
    inputs=(
        Port("x", ("B", "S", "D")),
        Port("indices", ("cap",), "int32", optional=True),
        Port("count", (), "int32"),
        Port("w_gate", ("F", "D"), optional=True),
        Port("b_gate", ("F",), optional=True),
        Port("w_up", ("F", "D")),
        Port("b_up", ("F",), optional=True),
        Port("w_down", ("F", "D")),
        Port("b_down", ("D",), optional=True),
        *(Port(f"s_{part}", ("F", "blocks"), "float32", optional=True) for part in PARTS),
        Port("rest", (), "int32", optional=True),
        *(Port(f"c_{part}", ("F", "copy_blocks", "copy_bytes"), "uint8", optional=True) for part in PARTS),
        *(Port(f"cs_{part}", ("F", "copy_blocks"), "float32", optional=True) for part in PARTS),
        Port("down_norms", ("F",), "float32", optional=True),
    ),
    outputs=(Port("y", ("B", "S", "D")), Port("chosen", ("F",), "int32", optional=True)),
    attributes=(Attribute("activation", str), Attribute("threshold", float, default=0.0), Attribute("layer", int)),
    doc="b_down plus the sum over active neurons f of act(w_gate[f] x) * (w_up[f] x) * w_down[f]; "
    "without w_gate, of act(w_up[f] x) * w_down[f]. With a low-bit copy (c_ and cs_) and rest = 1, the other neurons "
    "are added too, computed in the same way from the copy; with rest = 0 they are dropped. Without indices, the op "
    "chooses the active neurons itself: the count largest means over the tokens of a selection of down_norms[f] * |the "
    "product of f from the copy|, where ties go to the lower index. It then writes them to chosen, ascending and -1 "
    "past the count. "
    "Without indices and without a copy, the active neurons are those whose act(w_gate[f] x), or act(w_up[f] x) in the "
    "absence of w_gate, is not zero for some token of the selection. This needs an activation like ReLU. The result is "
    "that of all neurons, and count is not read.",
)
