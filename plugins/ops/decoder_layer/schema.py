"""The signature of ``DecoderLayer``, which only the native library has; see `plugins.registry`."""

from __future__ import annotations

from dataclasses import replace

from shadowllm.plugins.ops.cached_attention.schema import CACHED_ATTENTION
from shadowllm.plugins.ops.linear_w8a8.schema import LINEAR_W8A8
from shadowllm.plugins.ops.sparse_mlp.schema import SPARSE_MLP
from shadowllm.plugins.schema import Attribute, OpSchema, Port

# Its parts, in their order. The first input of each is the result of the one before it, so the node does not have it.
STAGES = (("qkv", LINEAR_W8A8), ("attention", CACHED_ATTENTION), ("out", LINEAR_W8A8), ("mlp", SPARSE_MLP))


def _ports(prefix: str, part: OpSchema) -> tuple[Port, ...]:
    found = [replace(port, name=f"{prefix}_{port.name}") for port in part.inputs]
    return (replace(found[0], optional=True), *found[1:])


DECODER_LAYER = OpSchema(
    name="DecoderLayer",
    inputs=(
        Port("x", ("T", "D"), "float32"),
        Port("norm", ("D",), "float32"),
        Port("post_norm", ("D",), "float32"),
        *(port for prefix, part in STAGES for port in _ports(prefix, part)),
    ),
    outputs=(Port("y", ("T", "D"), "float32"), *CACHED_ATTENTION.outputs[1:], SPARSE_MLP.outputs[1]),
    attributes=(*CACHED_ATTENTION.attributes, *SPARSE_MLP.attributes, Attribute("epsilon", float, default=1e-5)),
    doc="A layer of a Llama-like model: h = x + out(attention(qkv(x normalised with norm))), and y = h + mlp(h "
    "normalised with post_norm), where qkv and out are LinearW8A8, attention is CachedAttention, and mlp is SparseMLP. "
    "Their other inputs are inputs of the node, in the order of their schemas. A row is normalised when it is divided "
    "by the root of its mean square plus epsilon, and multiplied by the weights.",
)
