"""The programs of known models, compiled without a model: for measurements of kernels that need no weights."""

from __future__ import annotations

from dataclasses import dataclass

from shadowllm.bundle.quantisation import LOW_BIT_COPY
from shadowllm.plugins.kernel_program import Kernel, Program
from shadowllm.plugins.schema import Attributes, copy_of
from shadowllm.plugins.triton import cache
from shadowllm.plugins.triton.compile import POINTERS, Tensor, compile_kernel, compile_program

Inputs = dict[str, Tensor]
WORDS = LOW_BIT_COPY.block * LOW_BIT_COPY.bits // 32  # int32 words in a block of a low-bit copy
BATCH = 8  # most sequences in a step of the Triton session


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder whose kernels are compiled."""

    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    gated: bool
    capacity: int = 1024
    vocab_size: int = 32000


SHAPES = {
    "smollm2-135m": Shape(576, 1536, 30, 9, 3, 64, gated=True, vocab_size=49152),
    "opt-1.3b": Shape(2048, 8192, 24, 32, 32, 64, gated=False, vocab_size=50272),
    "opt-6.7b": Shape(4096, 16384, 32, 32, 32, 128, gated=False, vocab_size=50272),
    "llama-2-7b": Shape(4096, 11008, 32, 32, 32, 128, gated=True),
}


def sparse_inputs(shape: Shape, dtype: str) -> tuple[Inputs, Inputs]:
    """Inputs of ``SparseAttention`` and of ``SparseMLP`` of a model, with given units and no low-bit copy."""
    width, neurons, heads, dim = shape.hidden_size, shape.intermediate_size, shape.n_heads, shape.head_dim
    count = Tensor("int32", ())
    x = Tensor(dtype, ("batch", "seqlen", width))
    rows = Tensor(dtype, (neurons, width))
    mlp = {"x": x, "indices": Tensor("int32", (neurons,)), "count": count, "w_up": rows, "w_down": rows}
    cache = Tensor(dtype, ("batch", shape.n_kv_heads, shape.capacity, dim))
    attention = {
        "x": x,
        "key": cache,
        "value": cache,
        "lengths": Tensor("int32", ("batch",)),
        "indices": Tensor("int32", (heads,)),
        "count": count,
        "w_q": Tensor(dtype, (heads * dim, width)),
        "w_o": Tensor(dtype, (heads * dim, width)),
    }
    if shape.gated:
        mlp["w_gate"] = rows
        attention |= {name: Tensor(dtype, ("batch", "seqlen", dim // 2)) for name in ("cos", "sin")}
    else:
        mlp |= {"b_up": Tensor(dtype, (neurons,)), "b_down": Tensor(dtype, (width,))}
        attention |= {"b_q": Tensor(dtype, (heads * dim,)), "b_o": Tensor(dtype, (width,))}
    return attention, mlp


def sparse_attributes(shape: Shape) -> tuple[Attributes, Attributes]:
    """Attributes of both ops."""
    return {"n_heads": shape.n_heads}, {"activation": "silu" if shape.gated else "relu"}


def block_inputs(shape: Shape, dtype: str) -> tuple[Inputs, Inputs]:
    """`sparse_inputs` of whole blocks of a layer, as a step of the Triton session launches them."""
    attention, mlp = sparse_inputs(shape, dtype)
    row = Tensor(dtype, (shape.hidden_size,))
    end = {"skip": attention["x"], "norm_weight": row} | ({} if shape.gated else {"norm_bias": row})
    rows = 2 * shape.n_kv_heads * shape.head_dim
    kv = {"w_kv": Tensor(dtype, (rows, shape.hidden_size))}
    kv |= {} if shape.gated else {"b_kv": Tensor(dtype, (rows,))}
    return attention | end | kv, mlp | end


@dataclass(frozen=True)
class Node:
    """A node of a graph, as far as its program depends on it.

    Attributes:
        inputs: the present inputs; uint8 as int32 words.
        max_seqlen: most tokens of a sequence in a call.
        max_batch: most sequences in a call, or most rows.
    """

    op: str
    inputs: Inputs
    attributes: Attributes
    max_seqlen: int = 512
    max_batch: int = 1

    def program(self, sms: tuple[int, ...], programmatic_dependent_launch: bool = False) -> Program:
        """Compile its program, see `compile_program`."""
        return compile_program(
            self.op,
            self.inputs,
            self.attributes,
            max_batch=self.max_batch,
            max_seqlen=self.max_seqlen,
            sms=sms,
            programmatic_dependent_launch=programmatic_dependent_launch,
        )


def block_nodes(
    shape: Shape, dtype: str, *, rest: bool = False, residual_bits: int | None = None, max_batch: int = 1
) -> tuple[Node, Node]:
    """The two blocks of a sparse layer in a one-token step of the Triton session.

    Args:
        rest: whether they choose the units and add the others from a low-bit copy.
        residual_bits: if the weights are nested integers. Then there is a rest.
        max_batch: most sequences in a call.
    """
    attention, mlp = block_inputs(shape, dtype)
    if rest or residual_bits:
        attention, mlp = _rest_of_both(shape, attention, mlp)
    if residual_bits:
        attention, mlp = nested(_with_copies(attention, "kv"), residual_bits), nested(mlp, residual_bits)
    heads, activation = sparse_attributes(shape)
    eps = {"norm_eps": 1e-5}
    return (
        Node("SparseAttention", attention, {**heads, **eps}, 1, max_batch),
        Node("SparseMLP", mlp, {**activation, **eps}, 1, max_batch),
    )


def nodes(shape: Shape, dtype: str) -> list[Node]:
    """The nodes of a model of this shape: those that engines have, and the blocks of the Triton session."""
    width, neurons = shape.hidden_size, shape.intermediate_size
    attention, mlp = sparse_inputs(shape, dtype)
    mixed_attention, mixed_mlp = _rest_of_both(shape, attention, mlp)
    scores = {
        "scores": Tensor("float32", (shape.n_layers - 1, neurons)),
        "counts": Tensor("int32", (shape.n_layers - 1,)),
    }
    matrices = 2 if shape.gated else 1
    scored = {
        "x": mlp["x"],
        "copy": Tensor("int32", (matrices * neurons, LOW_BIT_COPY.blocks(width), WORDS)),
        "scales": Tensor("float32", (matrices * neurons, LOW_BIT_COPY.blocks(width))),
        "down_norms": Tensor("float32", (neurons,)),
        "count": mlp["count"],
    }
    gate_first = {name: port for name, port in mlp.items() if name != "indices"}
    heads, activation = sparse_attributes(shape)
    return [
        Node("SelectTopK", scores, {"cap": neurons}),
        Node("ScoreNeurons", scored, activation),
        Node("SparseMLP", mlp, activation),
        Node("SparseMLP", mixed_mlp, activation),
        Node("SparseMLP", gate_first, {"activation": "relu"}),
        Node("SparseAttention", attention, heads),
        Node("SparseAttention", mixed_attention, heads),
        Node("ShortlistLogits", _table(shape, dtype), {}),
        *block_nodes(shape, dtype, max_batch=BATCH),
        *block_nodes(shape, dtype, rest=True, max_batch=BATCH),
    ]


def nested_nodes(shape: Shape, dtype: str) -> list[Node]:
    """The nodes of a model with nested integers: residuals of 4 bits in the blocks of the Triton session, else of 2.

    The products that every token reads have one node with each.
    """
    attention, mlp = _rest_of_both(shape, *sparse_inputs(shape, dtype))
    heads, activation = sparse_attributes(shape)
    return [
        Node("SparseAttention", nested(attention, 2), heads),
        Node("SparseMLP", nested(mlp, 2), activation),
        Node("ShortlistLogits", nested(_table(shape, dtype), 2), {}),
        *block_nodes(shape, dtype, residual_bits=4, max_batch=BATCH),
        *(Node("NestedLinear", nested(_linear(shape, dtype), bits), {}, max_batch=512) for bits in (4, 2)),
        Node("NestedGather", nested(_gather(shape), 2), {"width": shape.hidden_size}),
    ]


def nested(inputs: Inputs, residual_bits: int) -> Inputs:
    """Inputs of an op, with residuals in place of all matrices that have a low-bit copy."""
    words = {4: "int32", 2: "int16"}[residual_bits]
    residuals = {name: inputs[copy_of(name)] for name in inputs if copy_of(name) in inputs}
    return inputs | {name: Tensor(words, copy.shape) for name, copy in residuals.items()}


def _rest_of_both(shape: Shape, attention: Inputs, mlp: Inputs) -> tuple[Inputs, Inputs]:
    groups = shape.n_kv_heads
    scores = {
        "score_weight": Tensor("float32", (groups, shape.hidden_size)),
        "score_bias": Tensor("float32", (groups,)),
    }
    norms = {"down_norms": Tensor("float32", (shape.intermediate_size,))}
    return _with_rest(attention, "q", "o") | scores, _with_rest(mlp, "gate", "up", "down") | norms


def _table(shape: Shape, dtype: str) -> dict[str, Tensor]:
    """Inputs of the logits of one token."""
    return {
        "x": Tensor(dtype, ("batch", shape.hidden_size)),
        "table": Tensor(dtype, (shape.vocab_size, shape.hidden_size)),
        **_packed(shape.vocab_size, shape.hidden_size),
        "errors": Tensor("float32", (shape.vocab_size,)),
        "shortlist": Tensor("int32", ()),
        "certify": Tensor("int32", ()),
        "weighting": Tensor("float32", (shape.hidden_size,)),
    }


def _linear(shape: Shape, dtype: str) -> Inputs:
    """Inputs of the down projection of one layer's dense step, for one token or a batch."""
    copied = _packed(shape.hidden_size, shape.intermediate_size)
    bias = Tensor(dtype, (shape.hidden_size,))
    return {"x": Tensor(dtype, ("rows", shape.intermediate_size)), "w": copied["copy"], **copied, "bias": bias}


def _gather(shape: Shape) -> Inputs:
    """Inputs of the embedding of tokens."""
    copied = _packed(shape.vocab_size, shape.hidden_size)
    return {"ids": Tensor("int32", ("rows",)), "w": copied["copy"], **copied}


def _packed(rows: int, width: int) -> dict[str, Tensor]:
    """A low-bit copy and its scales."""
    size = (rows, LOW_BIT_COPY.blocks(width))
    return {"copy": Tensor("int32", (*size, WORDS)), "scales": Tensor("float32", size)}


def _with_rest(inputs: Inputs, *parts: str) -> Inputs:
    """Inputs of a sparse op that adds a rest from a low-bit copy, and chooses the active units itself."""
    found = {name: port for name, port in inputs.items() if name != "indices"} | {"rest": Tensor("int32", ())}
    return _with_copies(found, *parts)


def _with_copies(inputs: Inputs, *parts: str) -> Inputs:
    """The same inputs, with low-bit copies of those parts that there are."""
    found = dict(inputs)
    for part in parts:
        if f"w_{part}" in inputs:
            rows, width = (int(size) for size in inputs[f"w_{part}"].shape)
            copied = _packed(rows, width)
            found |= {f"c_{part}": copied["copy"], f"cs_{part}": copied["scales"]}
    return found


def cache_writer(shape: Shape, dtype: str, sms: tuple[int, ...]) -> Kernel:
    """The kernel that writes keys and values into PyTorch's KV cache; no program contains it."""
    rows = ("projected", "query", "keys", "values", "cos", "sin")
    sizes = ("seqlen", "capacity", "n_query", "n_kv")
    types = dict.fromkeys(rows, POINTERS[dtype]) | {"positions": "*i64"} | dict.fromkeys(sizes, "i32")
    passed = {name: types[name] for name in cache.write_step.arg_names if name in types}
    constants = cache.constants(shape.head_dim, rotary=shape.gated)
    return compile_kernel(cache.write_step, passed, constants, warps=cache.WARPS, stages=1, sms=sms)
