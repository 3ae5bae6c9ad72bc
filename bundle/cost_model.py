"""The bytes that a decode step reads, and the cost of selection in bytes.

A decode step is memory-bound, so bytes stand for time. They are a lower bound, computed from sizes alone: each weight
row in use is read once, and so are keys and values of the tokens so far. Activations, scores and cache writes are
left out (together under 1% at any real size).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import mul
from typing import Any, Self

from shadowllm.bundle.manifest import Manifest
from shadowllm.bundle.quantisation import LOW_BIT_COPY, ROUNDED, Quantisation
from shadowllm.models.sparsity import UNITS, ActiveCounts, Rest, SparseLayers, Unit, layer_units
from shadowllm.models.spec import ModelSpec

# What a step of mixed precision takes beyond its bytes, as bytes that are read in the same time. The command
# `python -m shadowllm.benchmarks.selection_costs BUNDLE` measures this. With the native ops on a CPU with AVX-512 VNNI,
# two threads, SmolLM2-135M at int8 and int6, with the kernels for VNNI and with those for AVX2, it found for a byte of
# the copy 1.04 to 1.53, for heads 1.6 to 3.5 MB, for neurons 0.15 to 0.63 MB, and for a picked row 0.7 to 1.5 kB. Other
# bytes were read at 27 to 36 GB/s there.
COPY_COST = 1.12  # for a byte of the low-bit copy
SELECTION_COST: Mapping[Unit, int] = {"heads": 2_000_000, "neurons": 300_000}  # for each layer that selects some
PICKED_ROW_COST = 1_000  # for each active neuron, and for each row of a shortlist: rows that do not follow each other
ROWS: dict[Unit, str] = {"heads": "active q/o rows", "neurons": "active MLP rows"}  # parts of a step's bytes


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


def gate_first_elements(spec: ModelSpec, fired: float, scattered: float = 1.0) -> float:
    """Return the elements that an MLP reads if gate decides: gate, or up without a gate, and other rows if it fired.

    Args:
        fired: share of the neurons whose gate is not zero.
        scattered: cost of an element of the other rows.
    """
    first = spec.hidden_size + spec.mlp_bias
    others = unit_elements(spec, "neurons") - first
    output_bias = spec.mlp_bias * spec.hidden_size
    return spec.intermediate_size * (first + scattered * fired * others) + output_bias


def fired_shares(manifest: Manifest) -> list[float] | None:
    """Return the share of neurons of each sparse layer that fired on the calibration text; None if none decides so.

    If they were not measured, all neurons count as fired.
    """
    if manifest.predictor["kind"] != "relu":
        return None
    return list(manifest.predictor.get("fired") or [1.0] * manifest.sparse_layers.count)


def copy_row_bytes(spec: ModelSpec, q: Quantisation = LOW_BIT_COPY) -> int:
    """Return the bytes of one row of a low-bit copy. All of its rows have ``hidden_size`` elements."""
    return q.bytes(spec.hidden_size) + q.scale_bytes * q.blocks(spec.hidden_size)


def unit_copy_bytes(spec: ModelSpec, unit: Unit) -> int:
    """Return the bytes of one head (rows of q and o) or neuron (of gate, up and down) in the low-bit copy."""
    rows = 2 * spec.head_dim if unit == "heads" else 3 if spec.gated else 2
    return rows * copy_row_bytes(spec)


def layer_copy_bytes(spec: ModelSpec, heads: int, neurons: int) -> int:
    """Return the bytes of the low-bit copy that a layer reads for its rest, the scores of neurons included.

    A pass reads the copy of all heads or neurons, also of the active ones; none if all of them are active.
    """
    active, widths = {"heads": heads, "neurons": neurons}, layer_units(spec)
    return sum(widths[unit] * unit_copy_bytes(spec, unit) for unit in UNITS if active[unit] < widths[unit])


def mixed_cost(spec: ModelSpec, unit: Unit, active: int, whole: float, beside_copy: float) -> float:
    """Return the cost of a layer's heads or neurons, in bytes, if those that are not active come from the copy.

    Args:
        whole, beside_copy: bytes of an element if all units are active, and if not.
    """
    width = layer_units(spec)[unit]
    if active == width:
        return row_elements(spec, unit, active) * whole
    picked = PICKED_ROW_COST * active if unit == "neurons" else 0  # a head has many rows, which follow each other
    copy = COPY_COST * width * unit_copy_bytes(spec, unit)
    return row_elements(spec, unit, active) * beside_copy + copy + picked + SELECTION_COST[unit]


def table_cost(spec: ModelSpec, shortlist: int | None, sizes: Itemsizes) -> float:
    """Return the cost of the output table, in bytes."""
    if shortlist is None or not shortens(spec, shortlist):
        return spec.vocab_size * spec.hidden_size * sizes.matrices
    row = spec.hidden_size * sizes.shortlist + PICKED_ROW_COST
    return shortlist * row + COPY_COST * copied_table_bytes(spec)


def shortens(spec: ModelSpec, shortlist: int | None) -> bool:
    """Return whether a shortlist leaves out rows of the output table."""
    return shortlist is not None and shortlist < spec.vocab_size


def copied_table_bytes(spec: ModelSpec) -> int:
    """Return the bytes of the output table in the low-bit copy, with the error of each row."""
    return spec.vocab_size * (copy_row_bytes(spec) + 4)


@dataclass(frozen=True)
class Traffic:
    """Bytes read per decode step, by part."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Sum over parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Itemsizes:
    """Bytes of an element, by where a step reads it; for integers, including the share of a scale.

    Attributes:
        floats: in norms and the cache.
        matrices: in matrices of which all rows are read.
        rows: in active rows of a sparse op.
        beside_copy: in active rows whose low-bit copy is read in any case. (If a quantised shadow chooses neurons, and
            the others are left out, then the copy of gate and up of active neurons is counted twice.)
        common: in matrices that every token reads: those of K and V and of the dense layers, and the rows of heads if
            all of them are active.
        shortlist: in the exact rows of the output table, beside its low-bit copy.
    """

    floats: float
    matrices: float
    rows: float
    beside_copy: float
    common: float
    shortlist: float

    @classmethod
    def of(
        cls,
        floats: float,
        *,
        matrices: float | None = None,
        rows: float | None = None,
        beside_copy: float | None = None,
        common: float | None = None,
    ) -> Self:
        """Return sizes of which some are alike.

        By default matrices are like floats, rows and common matrices like matrices, and rows beside a copy like rows.
        Rows of a shortlist are like rows beside a copy.
        """
        matrices = floats if matrices is None else matrices
        rows = matrices if rows is None else rows
        beside_copy = rows if beside_copy is None else beside_copy
        common = matrices if common is None else common
        return cls(floats, matrices, rows, beside_copy, common, shortlist=beside_copy)

    def rounded(self) -> Self:
        """Return those of a step that rounds float matrices to integers, but not the output table."""
        rows, beside_copy = ROUNDED.itemsize, ROUNDED.itemsize_beside_copy
        return replace(self, rows=rows, beside_copy=beside_copy, common=ROUNDED.itemsize)


def step_traffic(
    spec: ModelSpec,
    sizes: Itemsizes,
    context: int,
    active: ActiveCounts | None = None,
    *,
    choosing: float = 0,
    batch: int = 1,
    rest: Rest = "drop",
    shortlist: int | None = None,
    fired: Sequence[float] | None = None,
) -> Traffic:
    """Return the bytes that one decode step reads.

    Args:
        sizes: bytes per element.
        context: tokens in the cache, including this step's.
        active: active units of the sparse layers, which are the last layers; None for a dense step.
        choosing: bytes read by the selector, see `selector_bytes` (with the same ``rest``).
        batch: sequences that advance together; the weights are read once for all.
        rest: what units that are not active contribute. From a low-bit copy, all heads read their keys and values.
        shortlist: rows of the output table that are read exactly, beside its low-bit copy; None for all.
        fired: with the selector relu, the share of neurons of each sparse layer whose gate is not zero. ``active`` then
            decides about heads only.
    """
    counts = list(active.by_layer()) if active else []
    dense_layers = spec.n_layers - len(counts)
    d, kv = spec.hidden_size, spec.n_kv_heads * spec.head_dim
    elements = {
        "embedding rows": batch * d * (2 if spec.positions == "learned" else 1),
        "norms": _norm_elements(spec),
        "k/v projections": spec.n_layers * 2 * kv * (d + spec.qkv_bias),
        "dense layers": dense_layers * layer_elements(spec, spec.n_heads, spec.intermediate_size),
        "lm_head": 0 if shortens(spec, shortlist) else spec.vocab_size * d,
        "KV cache": batch * _cache_elements(spec, counts, context, rest),
    }
    by_part = {"norms": sizes.floats, "KV cache": sizes.floats}
    by_part |= dict.fromkeys(("k/v projections", "dense layers"), sizes.common)
    parts = {name: round(count * by_part.get(name, sizes.matrices)) for name, count in elements.items()}
    copied = _copied_bytes(spec, counts, rest, shortlist)
    for place, unit in enumerate(UNITS):
        kept = [count[place] for count in counts]
        all_heads = unit == "heads" and all(count == spec.n_heads for count in kept)
        # In steps that read the copy, q and o of all heads are matrices like those of K and V.
        of_all = sizes.common if copied else min(sizes.rows, sizes.common)
        whole = of_all if all_heads else sizes.rows
        parts[ROWS[unit]] = round(active_bytes(spec, unit, kept, rest, whole, sizes.beside_copy))
    if fired is not None:
        parts[ROWS["neurons"]] = round(sizes.rows * sum(gate_first_elements(spec, share) for share in fired))
    parts["predictor"] = round(choosing)
    if copied:
        parts["low-bit copy"] = copied
    if shortlist is not None and shortens(spec, shortlist):
        parts["shortlist"] = round(shortlist * d * sizes.shortlist)
    return Traffic(parts)


def _norm_elements(spec: ModelSpec) -> int:
    """Return the weights and biases of the norms of all layers, and of the final norm."""
    norms = sum(len(spec.norms_of(layer)) for layer in range(spec.n_layers)) + 1
    return norms * spec.hidden_size * (2 if spec.norm == "layernorm" else 1)


def _cache_elements(spec: ModelSpec, counts: list[tuple[int, int]], context: int, rest: Rest) -> int:
    """Return the elements of keys and values that one sequence reads."""
    # If query heads are selected one by one, all KV heads may be in use, but at most one per active query head.
    used = [spec.n_heads if rest == "shadow" else heads // spec.heads_together for heads, _ in counts]
    heads = [spec.n_kv_heads] * (spec.n_layers - len(counts)) + [min(spec.n_kv_heads, n) for n in used]
    positions = [min(context, spec.window_of(layer) or context) for layer in range(spec.n_layers)]
    return 2 * spec.head_dim * sum(map(mul, heads, positions))


def active_bytes(
    spec: ModelSpec, unit: Unit, kept: Iterable[int], rest: Rest, whole: float, beside_copy: float
) -> float:
    """Return the bytes of the active rows of all layers. The other arguments are bytes per element."""
    width = layer_units(spec)[unit]
    return sum(
        row_elements(spec, unit, count) * (beside_copy if rest == "shadow" and count < width else whole)
        for count in kept
    )


def _copied_bytes(spec: ModelSpec, counts: list[tuple[int, int]], rest: Rest, shortlist: int | None) -> int:
    """Return the bytes of the low-bit copy that a step reads in addition to those of the selector."""
    layers = sum(layer_copy_bytes(spec, *kept) for kept in counts) if rest == "shadow" else 0
    return layers + (copied_table_bytes(spec) if shortens(spec, shortlist) else 0)


def mean_traffic(
    spec: ModelSpec,
    sizes: Itemsizes,
    prompt_len: int,
    new_tokens: int,
    active: ActiveCounts | None = None,
    **options: Any,
) -> Traffic:
    """Return the mean over the decode steps of a generation, in which the cache grows from the prompt length.

    Args:
        options: the other arguments of `step_traffic`.
    """
    # The cost is linear in the context, so the middle context has the mean cost (nearly, if the text grows beyond a
    # sliding window). Steps see prompt_len + 1 .. prompt_len + new_tokens - 1 tokens.
    return step_traffic(spec, sizes, prompt_len + new_tokens // 2, active, **options)


def selector_bytes(
    selector: str,
    layers: SparseLayers,
    itemsize: float,
    rank: int,
    rest: Rest = "drop",
    active: ActiveCounts | None = None,
) -> float:
    """Return the bytes that a selector reads per token.

    It reads networks, or one score per unit, or a linear fit of the heads and a low-bit copy of weights.

    Args:
        selector: a name from `predictor.selectors`; an oracle or a random selector reads nothing.
        itemsize: bytes per element of a network's weights.
        rank: rank of the networks.
        rest: if units that are not active come from the low-bit copy, a quantised shadow scores in the same pass, and
            the copy is not counted here.
        active: active units of the sparse layers, of which some are not; None if some heads and some neurons are not.
    """
    spec = layers.spec
    neurons = layers.count * spec.intermediate_size
    units = layers.count * sum(layer_units(spec).values())
    fit = layers.count * spec.n_heads * (spec.hidden_size + 1)
    # With all heads and the rest dropped, the graph scores heads too. (With relu, nothing is predicted then.)
    scored_anyway = rest == "drop" and selector != "relu" and spec.selects_heads
    if active is not None and (active.heads == spec.n_heads).all() and not scored_anyway:
        fit = 0
    if selector == "relu":
        return 4 * fit
    if selector == "layerwise":
        return 4 * fit + (layers.count * rank * (spec.hidden_size + 1) + neurons * (rank + 1)) * itemsize
    if selector.startswith("quantized-shadow"):
        bits = selector.removeprefix("quantized-shadow").removeprefix("-")
        if rest == "shadow" and not bits:
            return 4 * (fit + neurons)
        copied_rows = neurons * (2 if spec.gated else 1)
        # A product of ONNX Runtime reads it, and its scales in 32 bits.
        copy = replace(LOW_BIT_COPY, bits=int(bits or LOW_BIT_COPY.bits), scale_bytes=4)
        return 4 * (fit + neurons) + copied_rows * copy_row_bytes(spec, copy)
    if selector == "shadow":
        return (rank * (spec.hidden_size + 1) + units * (rank + 1)) * itemsize
    return 4 * units if selector == "static" else 0


def predictor_bytes(
    manifest: Manifest, itemsize: float, rest: Rest = "drop", active: ActiveCounts | None = None
) -> float:
    """Return `selector_bytes` of a bundle's own predictor."""
    kind, rank = manifest.predictor["kind"], int(manifest.predictor["rank"])
    return selector_bytes(kind, manifest.sparse_layers, itemsize, rank, rest, active)
