"""The order of tensors in a bundle's data file.

Tensors that a dense graph multiplies together (q, k, v; gate, up) are stored back to back. A dense
graph may use them as a single initializer, while a sparse graph uses one of them. Both refer to the
same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shadowllm.bundle.quantisation import LOW_BIT_COPY, Quantisation
from shadowllm.bundle.weight_names import (
    copied,
    copied_for_rest,
    copy_errors,
    copy_weighting,
    down_norms,
    integers,
    low_bit_copy,
    residual,
    scales,
    transposed,
)
from shadowllm.models.sparsity import SparseLayers
from shadowllm.models.spec import ModelSpec
from shadowllm.models.weights import tensor_shape

# A run of (name, shape, dtype) that are stored back to back.
Group = list[tuple[str, tuple[int, ...], str]]


def model_groups(spec: ModelSpec, dtype: str, q: Quantisation | None = None) -> Iterator[Group]:
    """Yield the layout of a model's canonical tensors, in the order in which a decode step reads them.

    With a quantisation, matrices are integers and scales (see `quantised_groups`). ``o_proj`` and
    ``down_proj`` are stored twice: ``MatMulNBits`` reads along the inputs, a sparse op along a row.
    """

    def floats(*names: str) -> Group:
        return [(name, tensor_shape(spec, name), dtype) for name in names]

    def matrices(*names: str) -> Iterator[Group]:
        if q is None:
            yield floats(*names)
        else:
            yield from quantised_groups({name: tensor_shape(spec, name) for name in names}, q)

    def norm(place: str) -> list[str]:
        return [f"{place}.weight"] + ([f"{place}.bias"] if spec.norm == "layernorm" else [])

    yield from matrices("embed_tokens.weight")
    if spec.positions == "learned":
        yield floats("embed_positions.weight")
    mlp = ("gate_proj", "up_proj") if spec.gated else ("up_proj",)
    for i in range(spec.n_layers):
        place = f"layers.{i}"
        yield floats(*(name for place in spec.norms_of(i) for name in norm(place)))
        if spec.qk_norm:
            yield floats(f"{place}.q_norm.weight", f"{place}.k_norm.weight")
        for parts, biased in (
            (("q_proj", "k_proj", "v_proj"), spec.qkv_bias),
            (("o_proj",), spec.o_bias),
            (mlp, spec.mlp_bias),
            (("down_proj",), spec.mlp_bias),
        ):
            yield from matrices(*(f"{place}.{part}.weight" for part in parts))
            if biased:
                yield floats(*(f"{place}.{part}.bias" for part in parts))
        if q is not None:
            for part in ("o_proj", "down_proj"):
                name = f"{place}.{part}.weight"
                yield from quantised_groups({transposed(name): tensor_shape(spec, name)[::-1]}, q)
    yield floats(*norm("final_norm"))
    if not spec.tied_embeddings:
        yield from matrices("lm_head.weight")


def copy_groups(layers: SparseLayers, rest: bool, nested: bool = False) -> Iterator[Group]:
    """Yield the layout of the low-bit copy: per sparse layer, the copy of gate and up, and ``||w_down||``.

    Args:
        rest: whether the rest of a layer is computed from the copy. Then down, q and o of each sparse layer and the
            output table are copied too, and the table has bounds of its copy's errors.
        nested: whether the copy is a part of the weights, which `model_groups` has. Then only what belongs to the copy
            is left: norms, errors and weighting.
    """
    spec = layers.spec

    def copies(names: list[str]) -> Iterator[Group]:
        shapes = {} if nested else {low_bit_copy(name): tensor_shape(spec, name) for name in names}
        return quantised_groups(shapes, LOW_BIT_COPY)

    for layer in layers.layers:
        yield from copies(copied(spec, layer))
        yield [(down_norms(layer), (spec.intermediate_size,), "float32")]
        for name in copied_for_rest(spec, layer) if rest else ():
            yield from copies([name])
    if rest:
        table = spec.output_table
        yield from copies([table])
        yield [(copy_errors(table), (spec.vocab_size,), "float32")]
        yield [(copy_weighting(table), (spec.hidden_size,), "float32")]


def quantised_groups(shapes: Mapping[str, tuple[int, ...]], q: Quantisation) -> Iterator[Group]:
    """Yield the layout of matrices ``(rows, width)`` that are read together: integers, then scales; then residuals."""
    if q.residual_bits:
        yield from quantised_groups({low_bit_copy(name): shape for name, shape in shapes.items()}, q.copy)
        yield [(residual(name), (rows, q.residual.bytes(width)), "uint8") for name, (rows, width) in shapes.items()]
        return
    yield [(integers(name), (rows, q.bytes(width)), "uint8") for name, (rows, width) in shapes.items()]
    yield [(scales(name), (rows, q.blocks(width)), "float32") for name, (rows, width) in shapes.items()]
