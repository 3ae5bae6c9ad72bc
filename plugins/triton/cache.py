"""Rotates the queries and keys of a step, and writes keys and values into the KV cache, before attention.

In PyTorch this takes a dozen small kernels per layer, which at one token cost more than the layer's attention.
(An engine uses TensorRT's own ``RotaryEmbedding`` and ``TensorScatter``.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shadowllm.plugins.triton.schedule import FLOATS_FUSED

WARPS = 1


@triton.jit
def write_step(
    projected,
    query,
    keys,
    values,
    positions,
    cos,
    sin,
    seqlen,
    capacity,
    n_query,
    n_kv,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROTARY: tl.constexpr,
):
    """One program per token and head; heads are queries, then keys, then values, as in ``projected``."""
    token, head = tl.program_id(0), tl.program_id(1)
    batch, step = token // seqlen, token % seqlen
    n_heads = n_query + 2 * n_kv
    place = tl.load(positions + token)
    lane = tl.arange(0, BLOCK)
    inside = lane < HEAD_DIM
    source = projected + (token.to(tl.int64) * n_heads + head) * HEAD_DIM
    x = tl.load(source + lane, mask=inside).to(tl.float32)
    if ROTARY and head < n_query + n_kv:
        half: tl.constexpr = HEAD_DIM // 2
        partner = tl.load(source + tl.where(lane < half, lane + half, lane - half), mask=inside).to(tl.float32)
        angle = token.to(tl.int64) * half + lane % half
        c = tl.load(cos + angle, mask=inside).to(tl.float32)
        s = tl.load(sin + angle, mask=inside).to(tl.float32)
        x = x * c + tl.where(lane < half, -partner, partner) * s
    if head < n_query:
        row = (batch.to(tl.int64) * n_query + head) * seqlen + step
        tl.store(query + row * HEAD_DIM + lane, x.to(query.dtype.element_ty), mask=inside)
    else:
        # Nothing is written for a position past the capacity.
        inside = lane < tl.where(place < capacity, HEAD_DIM, 0)
        if head < n_query + n_kv:
            row = (batch.to(tl.int64) * n_kv + head - n_query) * capacity + place
            tl.store(keys + row * HEAD_DIM + lane, x.to(keys.dtype.element_ty), mask=inside)
        else:
            row = (batch.to(tl.int64) * n_kv + head - n_query - n_kv) * capacity + place
            tl.store(values + row * HEAD_DIM + lane, x.to(values.dtype.element_ty), mask=inside)


def constants(head_dim: int, rotary: bool) -> dict[str, int]:
    """Values of the ``constexpr`` parameters of `write_step`."""
    return {"HEAD_DIM": head_dim, "BLOCK": triton.next_power_of_2(head_dim), "ROTARY": rotary}


def write_cache(
    projected: Tensor, keys: Tensor, values: Tensor, position_ids: Tensor, cos: Tensor | None, sin: Tensor | None
) -> Tensor:
    """Rotate queries and keys of a step, write keys and values at their positions, and return the queries.

    The rotation pairs element i of a head with element i + head_dim / 2.

    Args:
        projected: ``(batch, seqlen, (n_query + 2 * n_kv) * head_dim)``, contiguous: queries, keys and
            values side by side; there may be no queries.
        keys, values: ``(batch, n_kv, capacity, head_dim)``, contiguous, written in place.
        position_ids: int64 ``(batch, seqlen)``, contiguous.
        cos, sin: ``(batch, seqlen, head_dim / 2)``, contiguous; None means no rotation.

    Returns:
        ``(batch, n_query, seqlen, head_dim)``.
    """
    batch, seqlen, width = projected.shape
    _, n_kv, capacity, head_dim = keys.shape
    n_heads = width // head_dim
    for tensor in (projected, keys, values, position_ids, *(t for t in (cos, sin) if t is not None)):
        if not tensor.is_contiguous():
            raise ValueError("write_cache takes contiguous tensors")
    query = torch.empty((batch, n_heads - 2 * n_kv, seqlen, head_dim), dtype=projected.dtype, device=projected.device)
    write_step[(batch * seqlen, n_heads)](
        projected,
        query,
        keys,
        values,
        position_ids,
        projected if cos is None else cos,
        projected if sin is None else sin,
        seqlen,
        capacity,
        n_heads - 2 * n_kv,
        n_kv,
        **constants(head_dim, cos is not None),
        num_warps=WARPS,
        **FLOATS_FUSED,
    )
    return query
