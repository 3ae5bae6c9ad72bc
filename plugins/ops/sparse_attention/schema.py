"""The signature of ``SparseAttention``."""

from __future__ import annotations

from shadowllm.plugins.schema import Attribute, OpSchema, Port

PARTS = ("q", "o")

SPARSE_ATTENTION = OpSchema(
    name="SparseAttention",
    inputs=(
        Port("x", ("B", "S", "D")),
        Port("key", ("B", "n_kv", "C", "d")),
        Port("value", ("B", "n_kv", "C", "d")),
        Port("lengths", ("B",), "int32"),
        Port("indices", ("cap",), "int32", optional=True),
        Port("count", (), "int32"),
        Port("w_q", ("H*d", "D")),
        Port("b_q", ("H*d",), optional=True),
        Port("w_o", ("H*d", "D")),
        Port("b_o", ("D",), optional=True),
        Port("cos", ("B", "S", "d/2"), optional=True),
        Port("sin", ("B", "S", "d/2"), optional=True),
        *(Port(f"s_{part}", ("H*d", "blocks"), "float32", optional=True) for part in PARTS),
        Port("rest", (), "int32", optional=True),
        *(Port(f"c_{part}", ("H*d", "copy_blocks", "copy_bytes"), "uint8", optional=True) for part in PARTS),
        *(Port(f"cs_{part}", ("H*d", "copy_blocks"), "float32", optional=True) for part in PARTS),
        Port("score_weight", ("G", "D"), "float32", optional=True),
        Port("score_bias", ("G",), "float32", optional=True),
    ),
    outputs=(Port("y", ("B", "S", "D")), Port("chosen", ("n_heads",), "int32", optional=True)),
    attributes=(Attribute("n_heads", int), Attribute("layer", int), Attribute("window", int, default=0)),
    doc="b_o plus the output projection of the active query heads' attention over the cache. The cache already "
    "holds this step's keys and values; query s of row b sees positions 0 .. lengths[b] - S + s. With a window that is "
    "not 0, it sees only the last `window` of them. With a low-bit copy (c_ and cs_) and rest = 1, the other heads are "
    "added too, with their rows of q and o from the copy; with rest = 0 "
    "they are dropped. Without indices, the op chooses the active heads itself, in G groups of H/G neighbours: the "
    "count * G/H groups with the largest means over the tokens of a selection of score_weight x + score_bias, where "
    "ties go to the lower index. It then writes the heads to chosen, ascending and -1 past the count.",
)
