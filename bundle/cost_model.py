"""The bytes that a decode step reads, the cost of selection in bytes, and whether sparse layers pay off.

A decode step is memory-bound, so bytes stand for time. They are a lower bound, computed from sizes alone: each weight
row in use is read once, and so are keys and values of the tokens so far. Activations, scores and cache writes are
left out (together under 1% at any real size).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from shadowllm.bundle.manifest import Manifest
from shadowllm.bundle.quantisation import LOW_BIT_COPY
from shadowllm.models.sparsity import ActiveCounts, Budget, SparseLayers, Unit, layer_units
from shadowllm.models.spec import ModelSpec

# Time of a selection inside the layers, divided by the time to read its bytes. The small nodes between the low-bit
# copy's product and the indices take extra time, and the threads wait for each other twice. Measured at float32,
# bfloat16, int8 and int4.
PER_LAYER_COST = 1.7


def unit_elements(spec: ModelSpec, unit: Unit) -> int:
    """Return the elements that skipping one head (rows of q and o) or neuron (of gate, up and down) saves."""
    if unit == "heads":
        return spec.head_dim * (2 * spec.hidden_size + spec.qkv_bias)
    matrices = 3 if spec.gated else 2
    return matrices * spec.hidden_size + spec.mlp_bias * (matrices - 1)


def row_elements(spec: ModelSpec, unit: Unit, active: int) -> int:
    """Return the elements that a layer reads for ``active`` heads or neurons, with the output bias."""
    output_bias = spec.o_bias if unit == "heads" else spec.mlp_bias
    return active * unit_elements(spec, unit) + output_bias * spec.hidden_size


def layer_elements(spec: ModelSpec, heads: int, neurons: int) -> int:
    """Return the elements that a layer reads for these heads and neurons.

    The K and V projections are not counted, because they are read for all heads.
    """
    return row_elements(spec, "heads", heads) + row_elements(spec, "neurons", neurons)


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
    active: ActiveCounts | None = None,
    *,
    choosing: float = 0,
    batch: int = 1,
    matrix_itemsize: float | None = None,
    row_itemsize: float | None = None,
) -> Traffic:
    """Return the bytes that one decode step reads.

    Args:
        itemsize: bytes of an element of a weight and of the cache.
        context: tokens in the cache, including this step's.
        active: active units of the sparse layers, which are the last layers; None for a dense step.
        choosing: bytes read by the selector, see `selector_bytes`.
        batch: sequences that advance together; the weights are read once for all.
        matrix_itemsize: bytes of a matrix element, if it differs from ``itemsize``; for integers,
            including the share of a scale.
        row_itemsize: the same for the active rows of a sparse op, if it differs from other matrices.
    """
    counts = list(active.by_layer()) if active else []
    dense_layers = spec.n_layers - len(counts)
    d, kv = spec.hidden_size, spec.n_kv_heads * spec.head_dim
    # If query heads are selected one by one, all KV heads may be in use, but at most one per active query head.
    kv_read = dense_layers * spec.n_kv_heads + sum(min(spec.n_kv_heads, n // spec.heads_together) for n, _ in counts)
    elements = {
        "embedding rows": batch * d * (2 if spec.positions == "learned" else 1),
        "norms": (2 * spec.n_layers + 1) * d * (2 if spec.norm == "layernorm" else 1),
        "k/v projections": spec.n_layers * 2 * kv * (d + spec.qkv_bias),
        "dense layers": dense_layers * layer_elements(spec, spec.n_heads, spec.intermediate_size),
        "active q/o rows": sum(row_elements(spec, "heads", heads) for heads, _ in counts),
        "active MLP rows": sum(row_elements(spec, "neurons", neurons) for _, neurons in counts),
        "lm_head": spec.vocab_size * d,
        "KV cache": batch * kv_read * 2 * context * spec.head_dim,
    }
    matrix_itemsize = itemsize if matrix_itemsize is None else matrix_itemsize
    row_itemsize = matrix_itemsize if row_itemsize is None else row_itemsize
    sizes = {"norms": itemsize, "KV cache": itemsize, "active q/o rows": row_itemsize, "active MLP rows": row_itemsize}
    parts = {name: round(count * sizes.get(name, matrix_itemsize)) for name, count in elements.items()}
    return Traffic(parts | {"predictor": round(choosing)})


def mean_traffic(
    spec: ModelSpec,
    itemsize: int,
    prompt_len: int,
    new_tokens: int,
    active: ActiveCounts | None = None,
    *,
    choosing: float = 0,
    matrix_itemsize: float | None = None,
    row_itemsize: float | None = None,
) -> Traffic:
    """Return the mean over the decode steps of a generation, in which the cache grows from the prompt length."""
    # The cost is linear in the context, so the middle context has the mean cost. Steps see
    # prompt_len + 1 .. prompt_len + new_tokens - 1 tokens.
    return step_traffic(
        spec,
        itemsize,
        prompt_len + new_tokens // 2,
        active,
        choosing=choosing,
        matrix_itemsize=matrix_itemsize,
        row_itemsize=row_itemsize,
    )


def selector_bytes(selector: str, layers: SparseLayers, itemsize: float, rank: int) -> float:
    """Return the bytes that a selector reads per token.

    It reads networks, or one score per unit, or a linear fit of the heads and a low-bit copy of weights.

    Args:
        selector: a name from `predictor.selectors`; an oracle or a random selector reads nothing.
        itemsize: bytes per element of a network's weights.
        rank: rank of the networks.
    """
    spec = layers.spec
    neurons = layers.count * spec.intermediate_size
    units = layers.count * sum(layer_units(spec).values())
    fit = layers.count * spec.n_heads * (spec.hidden_size + 1)
    if selector == "layerwise":
        return 4 * fit + (layers.count * rank * (spec.hidden_size + 1) + neurons * (rank + 1)) * itemsize
    if selector.startswith("quantized-shadow"):
        bits = selector.removeprefix("quantized-shadow").removeprefix("-")
        copied_rows = neurons * (2 if spec.gated else 1)
        copy = replace(LOW_BIT_COPY, bits=int(bits)) if bits else LOW_BIT_COPY
        return 4 * (fit + neurons) + copied_rows * spec.hidden_size * copy.itemsize
    if selector == "shadow":
        return (rank * (spec.hidden_size + 1) + units * (rank + 1)) * itemsize
    return 4 * units if selector == "static" else 0


def predictor_bytes(manifest: Manifest, itemsize: float) -> float:
    """Return `selector_bytes` of a bundle's own predictor."""
    kind, rank = manifest.predictor["kind"], int(manifest.predictor["rank"])
    return selector_bytes(kind, manifest.sparse_layers, itemsize, rank)


def sparse_pays(manifest: Manifest, budget: Budget, narrow_rows: bool = False) -> bool:
    """Return whether a sparse step with its predictor reads less than a dense step on ONNX Runtime.

    Only the rows of the sparse layers are counted. Apart from the cache, nothing else differs.

    Args:
        narrow_rows: active rows are read as 16 bits, while other weights are widened to 32.
    """
    spec, layers = manifest.spec, manifest.sparse_layers
    active = sum(layer_elements(spec, heads, neurons) for heads, neurons in budget.counts(layers).by_layer())
    every = layers.count * layer_elements(spec, spec.n_heads, spec.intermediate_size)
    return (every - active / (2 if narrow_rows else 1)) * _itemsize(manifest) > _choosing_bytes(manifest)


def dense_reasons(manifest: Manifest, budget: Budget, whole: str = "the budget keeps all of it") -> dict[str, str]:
    """Return the layers that are dense at a budget, or that read no less when sparse, each with the reason.

    Args:
        whole: the reason for a layer whose budget keeps all heads and neurons.
    """
    spec, layers, itemsize = manifest.spec, manifest.sparse_layers, _itemsize(manifest)
    reasons = {str(layer): "comes before the first selection" for layer in range(manifest.dense_layers)}
    dense = layer_elements(spec, spec.n_heads, spec.intermediate_size) * itemsize
    share = _choosing_bytes(manifest) / layers.count
    for layer, kept in zip(layers.layers, budget.counts(layers).by_layer(), strict=True):
        sparse = layer_elements(spec, *kept) * itemsize
        if sparse == dense:
            reasons[str(layer)] = whole
        elif sparse + share >= dense:
            reasons[str(layer)] = (
                "does not pay off: its sparse rows and its share of the predictor cost "
                f"{(sparse + share) / 1e6:.2f} MB, its dense rows {dense / 1e6:.2f} MB"
            )
    return reasons


def _itemsize(manifest: Manifest) -> float:
    """Return the bytes of a weight as ONNX Runtime reads it. Floats are read at 32 bits."""
    return manifest.quantisation.itemsize if manifest.quantisation else 4


def _choosing_bytes(manifest: Manifest) -> float:
    """Return the cost of selection per step, in bytes."""
    per_layer = manifest.selector == "per-layer"
    return predictor_bytes(manifest, _itemsize(manifest)) * (PER_LAYER_COST if per_layer else 1)
