"""The signature of ``DecoderLayer``, which only the native library has; see `plugins.registry`."""

from __future__ import annotations

from shadowllm.plugins.ops.cached_attention.schema import CACHED_ATTENTION
from shadowllm.plugins.ops.nested_linear.schema import NESTED_LINEAR
from shadowllm.plugins.ops.sparse_mlp.schema import SPARSE_MLP
from shadowllm.plugins.schema import Attribute, OpSchema, Port, ports_of_part


def stages(mlp: OpSchema) -> tuple[tuple[str, OpSchema], ...]:
    """The parts of a layer, in their order: prefixes of their inputs, and their schemas.

    The first input of each is the result of the one before it.
    """
    return ("qkv", NESTED_LINEAR), ("attention", CACHED_ATTENTION), ("out", NESTED_LINEAR), ("mlp", mlp)


def layer_schema(name: str, mlp: OpSchema) -> OpSchema:
    """The signature of an op that is a layer with this MLP."""
    return OpSchema(
        name=name,
        inputs=(
            Port("x", ("T", "D"), "float32"),
            Port("norm", ("D",), "float32"),
            Port("post_norm", ("D",), "float32"),
            *(port for prefix, part in stages(mlp) for port in ports_of_part(prefix, part)),
        ),
        outputs=(Port("y", ("T", "D"), "float32"), *CACHED_ATTENTION.outputs[1:], *mlp.outputs[1:]),
        attributes=(*CACHED_ATTENTION.attributes, *mlp.attributes, Attribute("epsilon", float, default=1e-5)),
        doc="A layer of a Llama-like model: h = x + out(attention(qkv(x normalised with norm))), and y = h + mlp(h "
        f"normalised with post_norm), where qkv and out are NestedLinear, attention is CachedAttention, and mlp is "
        f"{mlp.name}. Their other inputs are inputs of the node, in the order of their schemas. A row is normalised "
        "when it is divided by the root of its mean square plus epsilon, and multiplied by the weights.",
    )


DECODER_LAYER = layer_schema("DecoderLayer", SPARSE_MLP)
