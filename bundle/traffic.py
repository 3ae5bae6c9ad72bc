"""Bytes a decode step has to read, part by part: what the hardware's bandwidth sets a floor to.

An algorithm's own minimum, from sizes alone: every weight row in use once, keys and values of the
tokens so far. Activations, scores and cache writes are left out (together under 1% at any real size).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shadowllm.models.spec import ModelSpec


@dataclass(frozen=True)
class Active:
    """What a sparse step keeps of each sparse layer.

    Attributes:
        heads, neurons: active query heads and neurons of each sparse layer.
        dense_layers: leading layers that stay dense.
        predictor_bytes: read once a step to score heads and neurons.
    """

    heads: Sequence[int]
    neurons: Sequence[int]
    dense_layers: int = 1
    predictor_bytes: int = 0


@dataclass(frozen=True)
class Traffic:
    """Bytes read per decode step, by part."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Sum over parts."""
        return sum(self.parts.values())


def step_traffic(
    spec: ModelSpec,
    itemsize: int,
    context: int,
    active: Active | None = None,
    batch: int = 1,
    matrix_itemsize: float | None = None,
    row_itemsize: float | None = None,
) -> Traffic:
    """Bytes of one decode step.

    Args:
        itemsize: bytes of a weight and of a cache entry.
        context: tokens in the cache, this step's included.
        active: None for a dense step.
        batch: sequences that advance together; weights are read once for all.
        matrix_itemsize: bytes of an element of a matrix, where it is not as long as the others; of
            integers, their share of a scale included.
        row_itemsize: the same of the active rows of a sparse op, where they differ from other matrices.
    """
    dense_layers = spec.n_layers if active is None else active.dense_layers
    heads, neurons = (active.heads, active.neurons) if active else ((), ())
    d, kv = spec.hidden_size, spec.n_kv_heads * spec.head_dim
    # With query heads selected one by one, all KV heads may be in use, but never more than query heads are.
    kv_read = dense_layers * spec.n_kv_heads + sum(min(spec.n_kv_heads, n // spec.heads_together) for n in heads)
    elements = {
        "embedding rows": batch * d * (2 if spec.positions == "learned" else 1),
        "norms": (2 * spec.n_layers + 1) * d * (2 if spec.norm == "layernorm" else 1),
        "k/v projections": spec.n_layers * 2 * kv * (d + spec.qkv_bias),
        "dense layers": dense_layers * (_head_rows(spec, spec.n_heads) + _neuron_rows(spec, spec.intermediate_size)),
        "active q/o rows": sum(_head_rows(spec, count) for count in heads),
        "active MLP rows": sum(_neuron_rows(spec, count) for count in neurons),
        "lm_head": spec.vocab_size * d,
        "KV cache": batch * kv_read * 2 * context * spec.head_dim,
    }
    matrix_itemsize = itemsize if matrix_itemsize is None else matrix_itemsize
    row_itemsize = matrix_itemsize if row_itemsize is None else row_itemsize
    sizes = {"norms": itemsize, "KV cache": itemsize, "active q/o rows": row_itemsize, "active MLP rows": row_itemsize}
    parts = {name: round(count * sizes.get(name, matrix_itemsize)) for name, count in elements.items()}
    return Traffic(parts | {"predictor": active.predictor_bytes if active else 0})


def mean_traffic(
    spec: ModelSpec,
    itemsize: int,
    prompt_len: int,
    new_tokens: int,
    active: Active | None = None,
    matrix_itemsize: float | None = None,
    row_itemsize: float | None = None,
) -> Traffic:
    """Mean over the decode steps of a generation: the cache grows from the prompt's length, one token a step."""
    # The cost is linear in the context, so the middle context has the mean cost. Steps see
    # prompt_len + 1 .. prompt_len + new_tokens - 1 tokens.
    context = prompt_len + new_tokens // 2
    return step_traffic(spec, itemsize, context, active, matrix_itemsize=matrix_itemsize, row_itemsize=row_itemsize)


def _head_rows(spec: ModelSpec, heads: int) -> int:
    rows = heads * spec.head_dim
    return rows * (2 * spec.hidden_size + spec.qkv_bias) + spec.o_bias * spec.hidden_size


def _neuron_rows(spec: ModelSpec, neurons: int) -> int:
    matrices = 3 if spec.gated else 2
    return neurons * (matrices * spec.hidden_size + spec.mlp_bias * (matrices - 1)) + spec.mlp_bias * spec.hidden_size
