"""The signature of ``SparseAttention``."""

from __future__ import annotations

from shadowllm.plugins.schema import Attribute, OpSchema, Port

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
