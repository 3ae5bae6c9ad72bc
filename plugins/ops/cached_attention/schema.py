"""The signature of ``CachedAttention``, which only the native library has; see `plugins.registry`."""

from __future__ import annotations

from shadowllm.plugins.schema import Attribute, OpSchema, Port

CACHED_ATTENTION = OpSchema(
    name="CachedAttention",
    inputs=(
        Port("projected", ("B*S", "(H+2*n_kv)*d"), "float32"),
        Port("past_key", ("B", "n_kv", "C", "d"), "float32"),
        Port("past_value", ("B", "n_kv", "C", "d"), "float32"),
        Port("last", ("B",), "int32"),
        Port("cos", ("P", "d/2"), "float32", optional=True),
        Port("sin", ("P", "d/2"), "float32", optional=True),
    ),
    outputs=(
        Port("y", ("B*S", "H*d"), "float32"),
        Port("key", ("B", "n_kv", "C", "d"), "float32", optional=True),
        Port("value", ("B", "n_kv", "C", "d"), "float32", optional=True),
    ),
    attributes=(Attribute("n_heads", int), Attribute("window", int, default=0)),
    doc="The attention of all heads over the cache, after this step's keys and values were written to it. Each row of "
    "projected has the query, key and value of a token side by side. Token s of row b is at position "
    "last[b] - S + 1 + s; query and key are rotated by the row of cos and sin for it (half-split), and the query sees "
    "the positions up to it. With a window that is not 0, it sees only the last `window` of them. The new "
    "positions are written to the outputs of the cache, and the others are copied unless an output is the memory of "
    "its input. Without these outputs, the new positions are written to the inputs, which must then be writable, and "
    "be read by no other node.",
)
