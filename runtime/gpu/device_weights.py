"""A model's weights on a GPU, where matrices that are multiplied together are one; floats, or nested integers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from shadowllm.bundle.weight_names import (
    base,
    integers,
    is_part,
    is_transposed,
    low_bit_copy,
    matrix,
    residual,
    rows_are_inputs,
    scales,
)
from shadowllm.models.sparsity import SparseLayers
from shadowllm.models.spec import ModelSpec
from shadowllm.models.weights import tensor_shape
from shadowllm.runtime.gpu.nested_rows import NestedRows

# Projections of the same input, which become one product with the stacked matrix.
RUNS = {"qkv": ("q", "k", "v"), "gateup": ("gate", "up")}


def merged(spec: ModelSpec, weights: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Move a model's float weights to a device, and add names for stacked matrices that share their memory.

    q, k and v of a layer are parts of one ``qkv_proj``, whose last rows are ``kv_proj``. Gate and up are parts of
    ``gateup_proj``. Tensors are read and moved one at a time. Matrices of integers are left out, see `nested`.

    Args:
        weights: canonical tensors, all of the dtype to compute in, or a result of this function.
    """
    if "layers.0.qkv_proj.weight" in weights:
        return dict(weights)
    found: dict[str, Tensor] = {}
    for run, names in _runs(spec, weights):
        found |= _stacked(spec, weights, names, run, device)
        if "qkv_proj" in run:
            found[run.replace("qkv", "kv")] = found[run][spec.n_heads * spec.head_dim :]
    return found | {name: weights[name].to(device) for name in weights if name not in found and not is_part(name)}


def _runs(spec: ModelSpec, names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """The names of stacked tensors, and of their parts, for all parts that are among the names."""
    known, found = set(names), list[tuple[str, list[str]]]()
    for place in (f"layers.{layer}" for layer in range(spec.n_layers)):
        for run, parts in RUNS.items():
            for kind in ("weight", "bias"):
                own = [f"{place}.{part}_proj.{kind}" for part in parts]
                found += [(f"{place}.{run}_proj.{kind}", own)] if own[0] in known else []
    return found


def _stacked(
    spec: ModelSpec, weights: Mapping[str, Tensor], names: list[str], run: str, device: torch.device
) -> dict[str, Tensor]:
    """Stack several tensors into one, and return it and its parts, which share its memory."""
    shapes, dtype = [tensor_shape(spec, name) for name in names], weights[names[0]].dtype
    rows = [shape[0] for shape in shapes]
    whole = torch.empty((sum(rows), *shapes[0][1:]), dtype=dtype, device=device)
    parts = dict(zip(names, whole.split(rows), strict=True))
    for name, part in parts.items():
        part.copy_(weights[name])
    return {run: whole, **parts}


def nested(layers: SparseLayers, stored: Mapping[str, Tensor], device: torch.device) -> dict[str, NestedRows]:
    """Move a model's matrices of nested integers to a device, with the names of `merged`; empty if there are none.

    ``o_proj`` and ``down_proj`` have a form for dense steps, see `weight_names.transposed`. The form whose rows are
    units is for sparse steps, and moved for sparse layers only.

    Args:
        layers: the sparse layers of the session.
        stored: a bundle's tensors by their names in `weight_layout.model_groups`.
    """
    spec = layers.spec
    units = ("o", "down") if spec.selects_heads else ("down",)
    sparse = {f"layers.{layer}.{part}_proj.weight" for layer in layers.layers for part in units}
    names = {matrix(name): None for name in stored if is_part(name)}  # ordered, without duplicates
    names = {name: None for name in names if not rows_are_inputs(name) or name in sparse}
    found: dict[str, NestedRows] = {}
    for run, parts in _runs(spec, names):
        found[run] = _rows(spec, stored, parts, device)
        found |= zip(parts, found[run].split([tensor_shape(spec, part)[0] for part in parts]), strict=True)
        if "qkv_proj" in run:
            heads = spec.n_heads * spec.head_dim
            found[run.replace("qkv", "kv")] = found[run].split([heads, len(found[run].scales) - heads])[1]
    return found | {name: _rows(spec, stored, [name], device) for name in names if name not in found}


def _rows(spec: ModelSpec, stored: Mapping[str, Tensor], names: list[str], device: torch.device) -> NestedRows:
    """Matrices of nested integers, one below the other."""
    rows, columns = tensor_shape(spec, base(names[0]))
    copies = [low_bit_copy(name) for name in names]
    parts = (map(integers, copies), map(scales, copies), map(residual, names))
    copy, factors, low = (torch.cat([stored[part] for part in own]).to(device) for own in parts)
    width = rows if is_transposed(names[0]) else columns
    return NestedRows(copy.unflatten(1, (factors.shape[1], -1)), factors, low, width)
