"""Inputs of ``DecoderLayer`` and ``DenseDecoderLayer``, and their parts as nodes of their own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shadowllm.bundle.quantisation import LOW_BIT_COPY, NESTED, Quantisation
from shadowllm.plugins.ops.decoder_layer.reference import rms_norm
from shadowllm.plugins.ops.decoder_layer.schema import stages
from shadowllm.plugins.ops.dense_mlp.schema import DENSE_MLP
from shadowllm.plugins.ops.sparse_mlp.schema import SPARSE_MLP
from shadowllm.plugins.registry import NATIVE_SCHEMAS
from tests.plugins.native_model import run_all
from tests.plugins.ops.cached_attention.native_inputs import cached_inputs
from tests.plugins.ops.dense_mlp.native_inputs import dense_mlp_inputs
from tests.plugins.ops.nested_linear.native_inputs import linear_inputs
from tests.plugins.ops.sparse_mlp.mixed_inputs import with_copy
from tests.plugins.ops.sparse_mlp.native_inputs import mlp_inputs

Inputs = dict[str, np.ndarray | None]
REPLACED = ("qkv_x", "attention_projected", "out_x", "mlp_x")  # results of the part before
GIVEN = ("x", "mlp_count", "mlp_rest", "mlp_indices")  # with those of the attention, which are no weights


def weights_of(op: str) -> tuple[str, ...]:
    names = (port.name for port in NATIVE_SCHEMAS[op].inputs)
    return tuple(name for name in names if not name.startswith("attention_") and name not in GIVEN)


WEIGHTS, DENSE_WEIGHTS = weights_of("DecoderLayer"), weights_of("DenseDecoderLayer")


@dataclass(frozen=True)
class Size:
    """The last position of each sequence says how many there are."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    neurons: int
    seqlen: int
    last: tuple[int, ...]
    capacity: int = 40

    @property
    def tokens(self) -> int:
        return len(self.last) * self.seqlen


def layer_inputs(
    size: Size, form: str = "llama", *, rope: bool = True, choosing: bool = True, q: Quantisation | None = LOW_BIT_COPY
) -> Inputs:
    """A layer whose MLP has a low-bit copy, unless ``q`` is None, and as many active neurons as a third of all."""
    mlp = mlp_inputs(form, (size.hidden, size.neurons, 1, size.tokens, size.neurons // 3))
    if q is not None:
        mlp = with_copy(mlp, choosing=choosing, q=q)
    mlp = {name: _small(v) if name.startswith("w_") else v for name, v in mlp.items()}
    return _with_attention(size, rope, mlp, q.residual_bits if q in NESTED.values() else 4)


def dense_layer_inputs(size: Size, *, rope: bool = True, gated: bool = True, bias: bool = True) -> Inputs:
    return _with_attention(size, rope, dense_mlp_inputs((size.tokens, size.hidden, size.neurons), gated, bias))


def _with_attention(size: Size, rope: bool, mlp: Inputs, residual_bits: int = 4) -> Inputs:
    width = size.heads * size.head_dim
    whole = width + 2 * size.kv_heads * size.head_dim
    rng = np.random.default_rng(size.hidden)
    cache = (size.heads, size.kv_heads, size.head_dim, size.capacity, size.seqlen, size.last)
    parts = {
        "qkv": _scaled(linear_inputs((size.tokens, size.hidden, whole, 64), seed=1, residual_bits=residual_bits)),
        "attention": cached_inputs(cache, rope),
        "out": _scaled(linear_inputs((size.tokens, width, size.hidden, 64), seed=2, residual_bits=residual_bits)),
        "mlp": mlp,
    }
    own = {
        "x": rng.standard_normal((size.tokens, size.hidden)).astype(np.float32),
        "norm": rng.uniform(0.5, 1.5, size.hidden).astype(np.float32),
        "post_norm": rng.uniform(0.5, 1.5, size.hidden).astype(np.float32),
    }
    given = {f"{part}_{name}": value for part, inputs in parts.items() for name, value in inputs.items()}
    return own | {name: value for name, value in given.items() if name not in REPLACED}


def _scaled(inputs: Inputs) -> Inputs:
    """The same layer with results of about the size of its inputs."""
    scales = inputs["scales"]
    assert scales is not None
    return inputs | {"scales": scales * np.float32(1 / 4)}


def _small(weights: np.ndarray | None) -> np.ndarray | None:
    return weights * np.float32(0.1) if weights is not None and weights.dtype == np.float32 else weights


def in_parts(
    inputs: Inputs, *, n_heads: int, epsilon: float = 1e-5, window: int = 0, **attributes
) -> tuple[np.ndarray, ...]:
    """The layer with a node for each of its parts, whose inputs are not rounded to 8 bits."""
    mlp = SPARSE_MLP if "mlp_w_up" in inputs else DENSE_MLP
    parts = stages(mlp)

    def part(index, x, **more):
        prefix, schema = parts[index]
        own = {name.removeprefix(f"{prefix}_"): v for name, v in inputs.items() if name.startswith(f"{prefix}_")}
        return run_all(schema.name, {schema.inputs[0].name: x} | own, exact_copies=1, **more)

    (projected,) = part(0, rms_norm(inputs["x"], inputs["norm"], epsilon))
    attended, key, value = part(1, projected, n_heads=n_heads, window=window)
    hidden = inputs["x"] + part(2, attended)[0]
    normed = rms_norm(hidden, inputs["post_norm"], epsilon)
    y, *chosen = part(3, normed, **attributes, **({"layer": 1} if mlp is SPARSE_MLP else {}))
    return hidden + y, key, value, *chosen
