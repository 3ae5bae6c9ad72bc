"""Which graphs decode: the sparse ones, but only where they read less than the dense one."""

from __future__ import annotations

from dataclasses import replace

from shadowllm.bundle.manifest import Manifest
from shadowllm.bundle.quantisation import LOW_BIT_COPY
from shadowllm.models.sparsity import Budget
from shadowllm.models.spec import ModelSpec

# Time of choosing inside the layers, over that of its bytes: what the small nodes between the copy's product and the
# indices add, and twice the threads' waiting for each other. Measured at float32, bfloat16, int8 and int4.
PER_LAYER_COST = 1.7


def sparse_pays(manifest: Manifest, budget: Budget, narrow_rows: bool = False) -> bool:
    """Whether a sparse step with its predictor reads less than a dense one.

    A step is bound by memory, so weights are counted: of the layers where the two differ, and nearly
    all of them of one size.

    Args:
        narrow_rows: active rows are read at 16 bits where everything else is widened to 32.
    """
    spec, itemsize = manifest.spec, _itemsize(manifest)
    counts = zip(*budget.counts(spec, spec.n_layers - manifest.dense_layers), strict=True)
    active = sum(_row_elements(spec, heads, neurons) for heads, neurons in counts)
    every = (spec.n_layers - manifest.dense_layers) * _row_elements(spec, spec.n_heads, spec.intermediate_size)
    return (every - active / (2 if narrow_rows else 1)) * itemsize > _choosing_bytes(manifest)


def dense_layers(manifest: Manifest, budget: Budget, whole: str = "the budget keeps all of it") -> dict[str, str]:
    """Layers that are dense at a budget, or read no less for being sparse, each with the reason.

    Args:
        whole: the reason for a layer whose budget keeps all heads and neurons.
    """
    spec, itemsize = manifest.spec, _itemsize(manifest)
    reasons = {str(layer): "comes before the choice" for layer in range(manifest.dense_layers)}
    n_sparse = spec.n_layers - manifest.dense_layers
    dense = _row_elements(spec, spec.n_heads, spec.intermediate_size) * itemsize
    share = _choosing_bytes(manifest) / n_sparse
    for layer, heads, neurons in zip(
        range(manifest.dense_layers, spec.n_layers), *budget.counts(spec, n_sparse), strict=True
    ):
        sparse = _row_elements(spec, heads, neurons) * itemsize
        if sparse == dense:
            reasons[str(layer)] = whole
        elif sparse + share >= dense:
            reasons[str(layer)] = (
                f"does not pay: its rows and its share of the predictor cost as {(sparse + share) / 1e6:.2f} MB do, "
                f"dense {dense / 1e6:.2f} MB"
            )
    return reasons


def _row_elements(spec: ModelSpec, heads: int, neurons: int) -> int:
    """Elements of a layer's rows that a choice of heads and neurons reads."""
    matrices = 3 if spec.gated else 2
    return spec.hidden_size * (2 * spec.head_dim * int(heads) + matrices * int(neurons))


def _itemsize(manifest: Manifest) -> float:
    """Bytes of a weight as ONNX Runtime reads it: floats at 32 bits."""
    return manifest.quantisation.itemsize if manifest.quantisation else 4


def _choosing_bytes(manifest: Manifest) -> float:
    """What choosing costs a step, as bytes."""
    per_layer = manifest.selector == "per-layer"
    return predictor_bytes(manifest, _itemsize(manifest)) * (PER_LAYER_COST if per_layer else 1)


def predictor_bytes(manifest: Manifest, itemsize: float) -> float:
    """Bytes a step reads to choose, with a network's weights of ``itemsize`` bytes each."""
    kind, rank = manifest.predictor["kind"], int(manifest.predictor["rank"])
    return selector_bytes(kind, manifest.spec, manifest.dense_layers, itemsize, rank)


def selector_bytes(selector: str, spec: ModelSpec, dense_layers: int, itemsize: float, rank: int) -> float:
    """Bytes a selector reads per token: networks, one score per unit, or a fit of the heads and a copy of weights.

    Args:
        selector: as `predictor.selectors` names it; an oracle or a random choice reads nothing.
        itemsize: bytes per element of a network's weights.
        rank: of the networks.
    """
    n_sparse = spec.n_layers - dense_layers
    units = n_sparse * (spec.n_heads + spec.intermediate_size)
    fit = n_sparse * spec.n_heads * (spec.hidden_size + 1)
    if selector == "layerwise":
        return 4 * fit + n_sparse * (rank * (spec.hidden_size + 1) + spec.intermediate_size * (rank + 1)) * itemsize
    if selector.startswith("quantized-shadow"):
        bits = selector.removeprefix("quantized-shadow").removeprefix("-")
        lengths = n_sparse * spec.intermediate_size
        copied_rows = lengths * (2 if spec.gated else 1)
        copy = replace(LOW_BIT_COPY, bits=int(bits)) if bits else LOW_BIT_COPY
        return 4 * (fit + lengths) + copied_rows * spec.hidden_size * copy.itemsize
    if selector == "shadow":
        return (rank * (spec.hidden_size + 1) + units * (rank + 1)) * itemsize
    return 4 * units if selector == "static" else 0
