"""Whether a sparse step costs less than a dense one on ONNX Runtime, and which layers stay dense."""

from __future__ import annotations

from shadowllm.bundle.cost_model import (
    Itemsizes,
    active_bytes,
    copied_table_bytes,
    fired_shares,
    gate_first_elements,
    layer_copy_bytes,
    layer_elements,
    predictor_bytes,
    row_elements,
    shortens,
)
from shadowllm.bundle.manifest import Manifest
from shadowllm.models.sparsity import UNITS, ActiveCounts, Budget, Rest, layer_units
from shadowllm.models.spec import ModelSpec

# Time of a selection inside the layers, divided by the time to read its bytes. The small nodes between the low-bit
# copy's product and the indices take extra time, and the threads wait for each other twice. Measured at float32,
# bfloat16, int8 and int4. Bundles whose rest comes from the copy have no such nodes.
PER_LAYER_COST = 1.7
# Time to read a row of up or down of a neuron that fired, divided by the time to read it among all rows in their order.
# An estimate, not a measurement.
SCATTERED_COST = 1.15


def sparse_pays(manifest: Manifest, budget: Budget, narrow_rows: bool = False, rounds: bool = False) -> bool:
    """Return whether a sparse step with its predictor reads less than a dense step on ONNX Runtime.

    Only what differs is counted: the rows and the copy of the sparse layers, the output table, and what is rounded. The
    other costs of a selection (see `cost_model.mixed_cost`) are left out, so a budget that a user gave is kept.
    (The cache differs too, if whole groups of heads are dropped.)

    Args:
        narrow_rows: active rows are read as 16 bits, while other weights are widened to 32.
        rounds: what a step with a rest from the low-bit copy reads is rounded to 8 bits, but for the output table.
    """
    spec, layers, rest = manifest.spec, manifest.sparse_layers, _rest(manifest, budget)
    rounding = rounds and mixes(manifest, budget)
    active, dense = budget.counts(layers), _dense_bytes(manifest)
    counts = list(active.by_layer())
    sizes = _itemsizes(manifest, narrow_rows, rounding)
    saved = sum(dense - _sparse_bytes(manifest, row, kept, rest, sizes) for row, kept in enumerate(counts))
    saved += _common_elements(spec, len(counts)) * (sizes.matrices - sizes.common)
    if budget.shortlist is not None and shortens(spec, budget.shortlist):
        saved += spec.hidden_size * (spec.vocab_size * sizes.matrices - budget.shortlist * sizes.shortlist)
        saved -= copied_table_bytes(spec)
    return saved > (_choosing_bytes(manifest, rest, active) if selects(manifest, budget) else 0)


def selects(manifest: Manifest, budget: Budget) -> bool:
    """Return whether some heads or neurons are not active at a budget. If all are, nothing is predicted."""
    everything = tuple(layer_units(manifest.spec).values())
    return any(kept != everything for kept in budget.counts(manifest.sparse_layers).by_layer())


def mixes(manifest: Manifest, budget: Budget) -> bool:
    """Return whether some heads or neurons come from the low-bit copy at a budget."""
    return _rest(manifest, budget) == "shadow" and selects(manifest, budget)


def dense_reasons(manifest: Manifest, budget: Budget, whole: str = "the budget keeps all of it") -> dict[str, str]:
    """Return the layers that are dense at a budget, or that read no less when sparse, each with the reason.

    Args:
        whole: the reason for a layer whose budget keeps all heads and neurons.
    """
    layers, rest, dense = manifest.sparse_layers, _rest(manifest, budget), _dense_bytes(manifest)
    reasons = {str(layer): "comes before the first selection" for layer in range(manifest.dense_layers)}
    active = budget.counts(layers)
    share = _choosing_bytes(manifest, rest, active) / layers.count
    for layer, kept in zip(layers.layers, active.by_layer(), strict=True):
        sparse = _sparse_bytes(manifest, layers.row(layer), kept, rest, _itemsizes(manifest))
        if sparse == dense:
            reasons[str(layer)] = whole
        elif sparse + share >= dense:
            copy = " and low-bit copy" if rest == "shadow" else ""
            reasons[str(layer)] = (
                f"does not pay off: its sparse rows{copy} and its share of the predictor cost "
                f"{(sparse + share) / 1e6:.2f} MB, its dense rows {dense / 1e6:.2f} MB"
            )
    return reasons


def _common_elements(spec: ModelSpec, sparse_layers: int) -> int:
    """Return the elements of matrices that every token reads: K, V, and the dense layers."""
    elements = spec.n_layers * 2 * spec.n_kv_heads * spec.head_dim * spec.hidden_size
    return elements + (spec.n_layers - sparse_layers) * layer_elements(spec, **layer_units(spec))


def _rest(manifest: Manifest, budget: Budget) -> Rest:
    return budget.rest_with(manifest.rest == "shadow")


def _itemsize(manifest: Manifest) -> float:
    """Return the bytes of a weight as a session reads it. Floats are read at 32 bits."""
    return manifest.quantisation.itemsize if manifest.quantisation else 4


def _dense_bytes(manifest: Manifest) -> float:
    """Return the bytes of all rows of a layer."""
    return layer_elements(manifest.spec, **layer_units(manifest.spec)) * _itemsize(manifest)


def _itemsizes(manifest: Manifest, narrow_rows: bool = False, rounding: bool = False) -> Itemsizes:
    """Return the bytes of an element on ONNX Runtime.

    Whole rows of nested integers cost what they cost in a dense step, which reads both of their parts too.
    """
    q, whole = manifest.quantisation, _itemsize(manifest)
    rows = whole / (2 if narrow_rows else 1)
    sizes = Itemsizes.of(4, matrices=whole, rows=rows, beside_copy=q.itemsize_beside_copy if q else rows)
    return sizes.rounded() if rounding else sizes


def _sparse_bytes(manifest: Manifest, row: int, kept: tuple[int, int], rest: Rest, sizes: Itemsizes) -> float:
    """Return the cost of the active rows and of the low-bit copy of a sparse layer, in bytes."""
    spec, fired = manifest.spec, fired_shares(manifest)
    if fired is not None:
        heads = row_elements(spec, "heads", kept[0])
        return sizes.rows * (heads + gate_first_elements(spec, fired[row], SCATTERED_COST))
    rows = sum(
        active_bytes(spec, unit, [count], rest, sizes.rows, sizes.beside_copy)
        for unit, count in zip(UNITS, kept, strict=True)
    )
    return rows + (layer_copy_bytes(spec, *kept) if rest == "shadow" else 0)


def _choosing_bytes(manifest: Manifest, rest: Rest, active: ActiveCounts) -> float:
    """Return the cost of selection per step, in bytes."""
    inside_nodes = manifest.selector == "per-layer" and manifest.rest != "shadow"
    return predictor_bytes(manifest, _itemsize(manifest), rest, active) * (PER_LAYER_COST if inside_nodes else 1)
