"""The signature of ``ScoreNeurons``."""

from __future__ import annotations

from shadowllm.plugins.schema import Attribute, OpSchema, Port

SCORE_NEURONS = OpSchema(
    name="ScoreNeurons",
    inputs=(
        Port("x", ("B", "S", "D")),
        Port("copy", ("rows", "blocks", "bytes"), "uint8"),
        Port("scales", ("rows", "blocks"), "float32"),
        Port("b_gate", ("F",), optional=True),
        Port("b_up", ("F",), optional=True),
        Port("down_norms", ("F",), "float32"),
        Port("count", (), "int32"),
    ),
    outputs=(Port("scores", ("1", "F"), "float32"),),
    attributes=(Attribute("activation", str), Attribute("threshold", float, default=0.0), Attribute("layer", int)),
    doc="The importance score of each neuron, from a 4-bit copy that has the rows of gate, then those of up. The score "
    "is the mean over the tokens of a selection of down_norms[f] * |act(gate[f] x) * (up[f] x)|; without gate, of "
    "down_norms[f] * |act(up[f] x)|. The norms are those of the rows of w_down. If count is F, all neurons are "
    "selected, and scores may be anything.",
)
