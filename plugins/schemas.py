"""The custom ops: the only place that spells their names, inputs and attributes.

Domain ``shadowllm``, version 1. Shapes use batch B, seqlen S, hidden size D, intermediate size F,
query heads H of dimension d, and capacity C of the KV cache. Every index input is int32, ascending,
and carries a count; entries past the count are -1 and are never read.

A weight matrix may be of integers (see `quantisation`): its ``w_`` input is then uint8, ``(rows, D)``
for 8 bits or ``(rows, D/2)`` for 4, and its ``s_`` input holds the scales, ``(rows, blocks)``. A low-bit copy
always is, and its rows are cut into their blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Port:
    """An input or output.

    Attributes:
        name: as it stands in the ONNX function body.
        shape: symbolic dimensions; ``()`` is a scalar.
        dtype: "T" is the type of the weights and activations.
        optional: may be left out (an empty name in ONNX).
    """

    name: str
    shape: tuple[str, ...]
    dtype: Literal["T", "float32", "int32", "uint8"] = "T"
    optional: bool = False


@dataclass(frozen=True)
class Attribute:
    """A node attribute: ``int`` or ``str``."""

    name: str
    type: type[int] | type[str]


@dataclass(frozen=True)
class OpSchema:
    """Signature of one custom op."""

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    attributes: tuple[Attribute, ...]
    doc: str


SELECT_TOPK = OpSchema(
    name="SelectTopK",
    inputs=(Port("scores", ("R", "N"), "float32"), Port("counts", ("R",), "int32")),
    outputs=(Port("indices", ("R", "cap"), "int32"),),
    attributes=(Attribute("cap", int),),
    doc="Ascending indices of the counts[r] largest scores of each row; equal scores go to the lower index.",
)

SCORE_NEURONS = OpSchema(
    name="ScoreNeurons",
    inputs=(
        Port("x", ("B", "S", "D")),
        Port("copy", ("rows", "blocks", "bytes"), "uint8"),
        Port("scales", ("rows", "blocks"), "float32"),
        Port("b_gate", ("F",), optional=True),
        Port("b_up", ("F",), optional=True),
        Port("lengths", ("F",), "float32"),
        Port("count", (), "int32"),
    ),
    outputs=(Port("scores", ("1", "F"), "float32"),),
    attributes=(Attribute("activation", str), Attribute("layer", int)),
    doc="How much each neuron will add, going by a 4-bit copy of gate and up, their rows one after the other: the "
    "mean over all tokens of lengths[f] * |act(gate[f] x) * (up[f] x)|; without gate of lengths[f] * |act(up[f] x)|. "
    "If count is F, all will be chosen, and scores may be anything.",
)

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

SPARSE_ATTENTION = OpSchema(
    name="SparseAttention",
    inputs=(
        Port("x", ("B", "S", "D")),
        Port("key", ("B", "n_kv", "C", "d")),
        Port("value", ("B", "n_kv", "C", "d")),
        Port("lengths", ("B",), "int32"),
        Port("indices", ("cap",), "int32"),
        Port("count", (), "int32"),
        Port("w_q", ("H*d", "D")),
        Port("b_q", ("H*d",), optional=True),
        Port("w_o", ("H*d", "D")),
        Port("b_o", ("D",), optional=True),
        Port("cos", ("B", "S", "d/2"), optional=True),
        Port("sin", ("B", "S", "d/2"), optional=True),
        *(Port(f"s_{part}", ("H*d", "blocks"), "float32", optional=True) for part in ("q", "o")),
    ),
    outputs=(Port("y", ("B", "S", "D")),),
    attributes=(Attribute("n_heads", int), Attribute("layer", int)),
    doc="b_o plus the output projection of the active query heads' attention over the cache. The cache already "
    "holds this step's keys and values; query s of row b sees positions 0 .. lengths[b] - S + s.",
)

SCHEMAS = {schema.name: schema for schema in (SELECT_TOPK, SCORE_NEURONS, SPARSE_MLP, SPARSE_ATTENTION)}
