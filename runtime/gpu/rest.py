"""The low-bit copy of all matrices on a GPU, as inputs of the sparse ops and of ``ShortlistLogits``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shadowllm.bundle.predictor_file import Predictor
from shadowllm.bundle.quantisation import LOW_BIT_COPY
from shadowllm.bundle.selection_names import CERTIFY, REST, SHORTLIST
from shadowllm.bundle.weight_names import (
    copy_errors,
    copy_weighting,
    down_norms,
    integers,
    low_bit_copy,
    scales,
)
from shadowllm.models.sparsity import SparseLayers, Unit
from shadowllm.runtime.gpu.nested_rows import NestedRows

Inputs = Mapping[str, Any]  # tensors


@dataclass(frozen=True)
class RestInputs:
    """Inputs by the names of the ops' arguments. The scalars among them are those of the session.

    Attributes:
        layers: for each row of a sparse layer, inputs of ``SparseAttention`` (heads) and ``SparseMLP`` (neurons):
            ``rest``, the copies, and what the op needs if it chooses the units itself.
        logits: inputs of ``ShortlistLogits``.
        inside: the units that the ops choose.
    """

    layers: Sequence[Mapping[Unit, Inputs]]
    logits: Inputs
    inside: frozenset[Unit]


def chosen_inside(predictor: Predictor, rest: bool = True) -> frozenset[Unit]:
    """The units that the ops choose: all with a quantised shadow, and the heads with a network per layer.

    Without a rest, the ops choose no units, except that the ReLU of gate chooses the neurons.
    """
    if not rest:
        return frozenset(("neurons",) if predictor.kind == "relu" else ())
    if not predictor.per_layer:
        return frozenset()
    return frozenset(("heads", "neurons") if predictor.kind == "quantized-shadow" else ("heads",))


def rest_inputs(
    layers: SparseLayers,
    copies: Mapping[str, Tensor],
    predictor: Predictor,
    weights: Mapping[str, Tensor],
    matrices: Mapping[str, NestedRows],
    scalars: Inputs,
) -> RestInputs:
    """Move a low-bit copy to the device. That of nested integers is a part of them, and there already.

    Args:
        copies: tensors by their names in `bundle.weight_layout.copy_groups`.
        predictor: with tensors on the device.
        weights: canonical tensors on the device.
        matrices: those that are nested integers.
        scalars: ``rest``, ``shortlist`` and ``certify``, int32 ``()`` on the device.
    """
    table, inside = layers.spec.output_table, chosen_inside(predictor)
    device = weights["final_norm.weight"].device

    def copy_of(name: str) -> tuple[Tensor, Tensor]:
        found = matrices.get(name)
        return (found.copy, found.scales) if found else packed(layers, copies, [name], device)

    def of_parts(layer: int, parts: Sequence[str]) -> dict[str, Tensor]:
        found = {REST: scalars[REST]}
        for part in parts:
            names = (f"c_{part}", f"cs_{part}")
            found |= zip(names, copy_of(f"layers.{layer}.{part}_proj.weight"), strict=True)
        return found

    def of_layer(layer: int) -> dict[Unit, Inputs]:
        heads = of_parts(layer, ("q", "o") if layers.spec.selects_heads else ())
        neurons = of_parts(layer, ("gate", "up", "down") if layers.spec.gated else ("up", "down"))
        if "heads" in inside:
            heads |= _head_scores(layers, predictor, layers.row(layer))
        if "neurons" in inside:
            neurons["down_norms"] = copies[down_norms(layer)].to(device)
        return {"heads": heads, "neurons": neurons}

    data, factors = copy_of(table)
    logits = {
        "table": matrices[table].residual if table in matrices else weights[table],
        "copy": data,
        "scales": factors,
        "errors": copies[copy_errors(table)].to(device),
        "weighting": copies[copy_weighting(table)].to(device),
        SHORTLIST: scalars[SHORTLIST],
        CERTIFY: scalars[CERTIFY],
    }
    return RestInputs([of_layer(layer) for layer in layers.layers], logits, inside)


def packed(
    layers: SparseLayers, copies: Mapping[str, Tensor], matrices: Sequence[str], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Copies of matrices, stacked on the device: integers ``(rows, blocks, bytes)`` and scales ``(rows, blocks)``."""
    names = [low_bit_copy(name) for name in matrices]
    rows, factors = (torch.cat([copies[part(name)] for name in names]).to(device) for part in (integers, scales))
    return rows.unflatten(1, (LOW_BIT_COPY.blocks(layers.spec.hidden_size), -1)), factors


def _head_scores(layers: SparseLayers, predictor: Predictor, row: int) -> dict[str, Tensor]:
    """The linear map of the heads' scores; the score of a group is the sum of its heads' scores."""
    return {
        f"score_{part}": predictor.tensors[f"layers.heads.{part}"]
        .chunk(layers.count)[row]
        .unflatten(0, (-1, layers.spec.heads_together))
        .sum(dim=1)
        for part in ("weight", "bias")
    }
