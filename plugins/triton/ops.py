"""The custom ops as functions of tensors, with the arguments of the NumPy references.

They run on a CUDA device, or on the CPU where ``TRITON_INTERPRET=1`` was set before Triton was
imported. Nothing waits for the device, so all of them can be captured in a CUDA graph. Contents are
not checked: a count above the capacity is taken for it, an index outside the weight is skipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from shadowllm.plugins.schemas import SCORE_NEURONS, SELECT_TOPK, SPARSE_ATTENTION, SPARSE_MLP, OpSchema
from shadowllm.plugins.triton.schedule import GEMV, Schedule, Shape, Tier, cover, run, tiers
from shadowllm.plugins.triton.score_neurons import plan_score_neurons
from shadowllm.plugins.triton.select_topk import plan_select_topk
from shadowllm.plugins.triton.sparse_attention import plan_sparse_attention
from shadowllm.plugins.triton.sparse_mlp import plan_sparse_mlp

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = ("relu", "silu", "gelu")


def schedules(
    op: str,
    shapes: Mapping[str, Shape],
    attributes: Mapping[str, int | str],
    *,
    itemsize: int,
    max_batch: int,
    max_seqlen: int,
) -> list[Schedule]:
    """How to launch an op, in ascending order of what each schedule covers.

    Args:
        shapes: of the inputs that are there, by the schema's names; batch and seqlen in them are not read.
        attributes: of the node.
        itemsize: bytes of an element of type T.
        max_batch: most sequences of a call; for ``SelectTopK`` its number of rows.
        max_seqlen: most tokens of a sequence in a call; 1 for ``SelectTopK``.

    Raises:
        KeyError: an op without kernels.
    """
    if op == SELECT_TOPK.name:
        return [plan_select_topk(shapes, Tier(max_batch, 1, GEMV), int(attributes["cap"]))]
    ranges = tiers(max_batch, max_seqlen)
    if op == SCORE_NEURONS.name:
        return [plan_score_neurons(shapes, itemsize, tier, str(attributes["activation"])) for tier in ranges]
    if op == SPARSE_MLP.name:
        return [plan_sparse_mlp(shapes, itemsize, tier, str(attributes["activation"])) for tier in ranges]
    if op == SPARSE_ATTENTION.name:
        return [plan_sparse_attention(shapes, itemsize, tier, int(attributes["n_heads"])) for tier in ranges]
    raise KeyError(op)


def select_topk(scores: Tensor, counts: Tensor, cap: int) -> Tensor:
    """``SelectTopK``: scores float32 ``(R, N)``, counts int32 ``(R,)`` -> int32 ``(R, cap)``.

    Raises:
        ValueError: a tensor of another type, device, layout or shape, or more indices than scores.
    """
    if cap > scores.shape[-1]:
        raise ValueError(f"SelectTopK cannot choose {cap} of {scores.shape[-1]}")
    inputs = {"scores": scores, "counts": counts}
    indices = torch.empty(scores.shape[0], cap, dtype=torch.int32, device=scores.device)
    return _call(SELECT_TOPK, inputs, {"cap": cap}, "indices", indices, scores.shape[0], 1)


def score_neurons(
    x: Tensor,
    copy: Tensor,
    scales: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    lengths: Tensor,
    count: Tensor,
    *,
    activation: str,
) -> Tensor:
    """``ScoreNeurons``: x ``(B, S, D)``, copy uint8 ``(rows, blocks, bytes)``, count an int32 scalar -> ``(1, F)``.

    Raises:
        ValueError: a tensor of another type, device, layout or shape, rows that do not fit the lengths, blocks
            that do not cover x or are no power of two, or an unknown activation.
    """
    _check_activation(SCORE_NEURONS, activation)
    rows, blocks, width = copy.shape
    if rows not in (len(lengths), 2 * len(lengths)) or width < 4 or width & (width - 1):
        raise ValueError(f"ScoreNeurons has a copy {tuple(copy.shape)} for {len(lengths)} neurons")
    if not (blocks - 1) * 2 * width < x.shape[-1] <= blocks * 2 * width:
        raise ValueError(f"ScoreNeurons has a copy {tuple(copy.shape)} for x {tuple(x.shape)}")
    inputs = {
        "x": x,
        "copy": copy,
        "scales": scales,
        "b_gate": b_gate,
        "b_up": b_up,
        "lengths": lengths,
        "count": count,
    }
    scores = torch.empty(1, len(lengths), device=x.device)
    return _call(SCORE_NEURONS, inputs, {"activation": activation}, "scores", scores, *x.shape[:2])


def sparse_mlp(
    x: Tensor,
    indices: Tensor,
    count: Tensor,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    *,
    activation: str,
) -> Tensor:
    """``SparseMLP``: x ``(B, S, D)``, weights ``(F, D)``, count an int32 scalar on the device -> ``(B, S, D)``.

    Raises:
        ValueError: a tensor of another type, device, layout or shape, or an unknown activation.
    """
    _check_activation(SPARSE_MLP, activation)
    inputs = {
        "x": x,
        "indices": indices,
        "count": count,
        "w_gate": w_gate,
        "b_gate": b_gate,
        "w_up": w_up,
        "b_up": b_up,
        "w_down": w_down,
        "b_down": b_down,
    }
    return _call(SPARSE_MLP, inputs, {"activation": activation}, "y", torch.empty_like(x), *x.shape[:2])


def sparse_attention(
    x: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    indices: Tensor,
    count: Tensor,
    w_q: Tensor,
    b_q: Tensor | None,
    w_o: Tensor,
    b_o: Tensor | None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    n_heads: int,
) -> Tensor:
    """``SparseAttention``: x ``(B, S, D)``, cache ``(B, n_kv, C, d)`` with this step's in it -> ``(B, S, D)``.

    Raises:
        ValueError: a tensor of another type, device, layout or shape, or heads that do not divide.
    """
    if w_q.shape[0] != n_heads * key.shape[-1] or n_heads % key.shape[1]:
        raise ValueError(f"SparseAttention has {n_heads} heads, w_q {tuple(w_q.shape)} and key {tuple(key.shape)}")
    if (cos is None) != (sin is None) or (cos is not None and key.shape[-1] % 2):
        raise ValueError("SparseAttention needs both cos and sin or neither, and even heads to rotate")
    inputs = {
        "x": x,
        "key": key,
        "value": value,
        "lengths": lengths,
        "indices": indices,
        "count": count,
        "w_q": w_q,
        "b_q": b_q,
        "w_o": w_o,
        "b_o": b_o,
        "cos": cos,
        "sin": sin,
    }
    return _call(SPARSE_ATTENTION, inputs, {"n_heads": n_heads}, "y", torch.empty_like(x), *x.shape[:2])


def _check_activation(schema: OpSchema, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{schema.name} has no activation {activation!r}, only {', '.join(ACTIVATIONS)}")


def _call(
    schema: OpSchema,
    inputs: Mapping[str, Tensor | None],
    attributes: Mapping[str, int | str],
    output: str,
    result: Tensor,
    batch: int,
    seqlen: int,
) -> Tensor:
    present = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    _check(schema, present)
    # The kernels read packed integers as words, as an engine has them.
    present = {name: t.view(torch.int32) if t.dtype == torch.uint8 else t for name, t in present.items()}
    planned = _planned(
        schema.name,
        tuple((name, tuple(tensor.shape[-2:] if name == "x" else tensor.shape)) for name, tensor in present.items()),
        tuple(attributes.items()),
        next(tensor.element_size() for tensor in present.values() if tensor.dtype in FLOATS),
        _limit(batch),
        _limit(seqlen),
    )
    run(cover(planned, batch, seqlen), {**present, output: result}, batch, seqlen)
    return result


def _limit(size: int) -> int:
    """The next power of two: one plan serves the sizes up to it, and scratch memory is at most twice too large."""
    return 1 << (size - 1).bit_length()


@lru_cache(maxsize=256)
def _planned(
    op: str,
    shapes: tuple[tuple[str, Shape], ...],
    attributes: tuple[tuple[str, int | str], ...],
    itemsize: int,
    max_batch: int,
    max_seqlen: int,
) -> list[Schedule]:
    return schedules(op, dict(shapes), dict(attributes), itemsize=itemsize, max_batch=max_batch, max_seqlen=max_seqlen)


def _check(schema: OpSchema, tensors: Mapping[str, Tensor]) -> None:
    """Hold types, devices, layouts and shapes against the schema.

    Raises:
        ValueError: names the first that does not fit.
    """
    known: dict[str, int] = {}
    types = {"float32": torch.float32, "int32": torch.int32, "uint8": torch.uint8}
    first = next(iter(tensors.values()))
    for port in schema.inputs:
        tensor = tensors.get(port.name)
        if tensor is None:
            continue
        where = f"{schema.name}: {port.name}"
        fits = port.dtype != "T" or tensor.dtype in FLOATS
        if not fits or tensor.dtype != types.setdefault(port.dtype, tensor.dtype):
            raise ValueError(f"{where} is {tensor.dtype}, expected {types.get(port.dtype, FLOATS)}")
        if tensor.device != first.device or not tensor.is_contiguous():
            raise ValueError(f"{where} must be contiguous and on {first.device}")
        sizes = dict(zip(port.shape, tensor.shape, strict=False))
        if tensor.ndim != len(port.shape) or any(known.setdefault(s, size) != size for s, size in sizes.items()):
            raise ValueError(f"{where} has shape {tuple(tensor.shape)}, expected {list(port.shape)} with {known}")
