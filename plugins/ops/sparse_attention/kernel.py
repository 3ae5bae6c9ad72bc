"""``SparseAttention``: attention of the active heads over the KV cache; `projection_kernel` makes their queries.

A decode step splits the cache among blocks (flash decoding). A prompt is processed in tiles of queries (flash
attention, Dao, arXiv 2307.08691), causal within the step. `plugins.triton.output_projection` merges the softmaxes of
the splits, and multiplies the result by the heads' rows of ``w_o``. With a low-bit copy, `plugins.triton.head_choice`
lists the active heads first and the others after them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shadowllm.plugins.ops.sparse_attention.projection_kernel import active_head
from shadowllm.plugins.triton.hidden_values import LOWEST
from shadowllm.plugins.triton.tiles import dot


@triton.jit
def decode_attention(
    query,
    key,
    value,
    lengths,
    indices,
    count,
    context,
    partials,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    CAPACITY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    SPAN: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Attention of one token's active heads over one span of the cache, of which the token sees ``WINDOW`` positions.

    With one split the result is ``context (batch, CAP, HEAD_DIM)``, zero if the sequence is empty. With several it is
    unnormalised, in ``partials (batch, CAP, SPLITS, HEAD_DIM + 2)``, followed by the maximum and the sum of its
    softmax. Those of a span before the window are -inf and 0.
    """
    slot, split = tl.program_id(0), tl.program_id(2)
    row = tl.program_id(1).to(tl.int64)
    head = active_head(indices, count, slot, HEADS, CAP)
    length = tl.minimum(tl.maximum(tl.load(lengths + row), 0), CAPACITY)
    if head < 0 or split * SPAN >= tl.maximum(length, 1):  # the first span is written even if it is empty
        return
    dims = tl.arange(0, BLOCK_H)
    inside = dims < HEAD_DIM
    q = tl.load(query + (row * CAP + slot) * HEAD_DIM + dims, mask=inside, other=0.0).to(tl.float32) * SCALE
    cache = (row * KV_HEADS + head // (HEADS // KV_HEADS)) * CAPACITY * HEAD_DIM
    top = tl.full((), float("-inf"), tl.float32)
    mass = tl.zeros((), tl.float32)
    acc = tl.zeros((BLOCK_H,), tl.float32)
    first = first_visible(length, WINDOW)
    begin = tl.maximum(split * SPAN, first // BLOCK_P * BLOCK_P)
    for start in range(begin, tl.minimum((split + 1) * SPAN, length), BLOCK_P):
        positions = start + tl.arange(0, BLOCK_P)
        seen = (positions >= first) & (positions < length)
        place = cache + positions[:, None] * HEAD_DIM + dims[None, :]
        mask = seen[:, None] & inside[None, :]
        k = tl.load(key + place, mask=mask, other=0.0)
        v = tl.load(value + place, mask=mask, other=0.0).to(tl.float32)  # before k is used, so that both are in flight
        score = tl.sum(k.to(tl.float32) * q[None, :], 1)
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 0))
        weight = tl.exp(score - higher)
        shrink = tl.exp(top - higher)
        mass = mass * shrink + tl.sum(weight, 0)
        acc = acc * shrink + tl.sum(weight[:, None] * v, 0)
        top = higher
    if SPLITS == 1:
        out = context + (row * CAP + slot) * HEAD_DIM + dims
        tl.store(out, (acc / tl.where(mass == 0, 1.0, mass)).to(context.dtype.element_ty), mask=inside)
    else:
        out = partials + ((row * CAP + slot) * SPLITS + split) * (HEAD_DIM + 2)
        tl.store(out + dims, acc, mask=inside)
        tl.store(out + HEAD_DIM, top)
        tl.store(out + HEAD_DIM + 1, mass)


@triton.jit
def first_visible(end, WINDOW: tl.constexpr):
    """The first of the ``WINDOW`` positions before ``end``; 0 means that there is no window."""
    if WINDOW == 0:
        return tl.zeros_like(end)
    else:
        return tl.maximum(end - WINDOW, 0)


@triton.jit
def prompt_attention(
    query,
    key,
    value,
    lengths,
    indices,
    count,
    context,
    seqlen,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    CAPACITY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Write ``context (batch, seqlen, CAP, HEAD_DIM)`` for a tile of queries of one active head.

    Query ``s`` of a row sees positions up to ``lengths[row] - seqlen + s``, and only the last ``WINDOW`` of them. The
    result of a query that sees none is zero.
    """
    slot, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = active_head(indices, count, slot, HEADS, CAP)
    if head < 0:
        return
    step = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens = tl.maximum(tl.load(lengths + row), 0)
    length = tl.minimum(tokens, CAPACITY)
    last = tl.minimum(tokens - seqlen + step, length - 1)
    first = first_visible(last + 1, WINDOW)
    dims = tl.arange(0, BLOCK_H)
    inside = (dims < HEAD_DIM)[None, :]
    inside_m = (step < seqlen)[:, None]
    place = ((row * seqlen + step)[:, None] * CAP + slot) * HEAD_DIM + dims[None, :]
    q = tl.load(query + place, mask=inside_m & inside, other=0.0)
    cache = (row * KV_HEADS + head // (HEADS // KV_HEADS)) * CAPACITY * HEAD_DIM
    # Finite: a query may see no position of the first blocks, and the difference of two infinities is not a number.
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    for start in range(tl.min(first, 0), tl.max(tl.where(step < seqlen, last, -1), 0) + 1, BLOCK_P):
        positions = start + tl.arange(0, BLOCK_P)
        kv = cache + positions[:, None] * HEAD_DIM + dims[None, :]
        # Positions past the length are not read: they may hold NaN from an earlier text, and zero times NaN is NaN.
        mask = (positions < length)[:, None] & inside
        k = tl.load(key + kv, mask=mask, other=0.0)
        score = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_P), tl.float32)) * SCALE
        seen = (positions[None, :] >= first[:, None]) & (positions[None, :] <= last[:, None])
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp(score - higher[:, None])
        shrink = tl.exp(top - higher)
        mass = mass * shrink + tl.sum(weight, 1)
        v = tl.load(value + kv, mask=mask, other=0.0)
        acc = dot(weight.to(v.dtype), v, acc * shrink[:, None])
        top = higher
    found = acc / tl.where(mass == 0, 1.0, mass)[:, None]
    tl.store(context + place, found.to(context.dtype.element_ty), mask=inside_m & inside)
