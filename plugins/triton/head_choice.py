"""Chooses the heads of ``SparseAttention`` inside the op, and orders them: the active ones, then the others.

Heads are few. So each block that projects a head computes the order itself, and no launch is needed for it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def score_heads(
    x,
    score_weight,
    score_bias,
    count,
    scores,
    tokens,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``scores (G,)``: the mean over tokens of ``score_weight x + score_bias``, one group of heads per block.

    If all heads are active, as in a prompt, nothing is read, because any scores choose all of them.
    """
    group = tl.program_id(0)
    if tl.load(count) >= HEADS:
        return
    acc = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        weight = tl.load(score_weight + group.to(tl.int64) * WIDTH + cols, mask=cols < WIDTH, other=0.0)
        for token in range(tokens):
            place = tl.cast(token, tl.int64) * WIDTH + cols
            acc += weight * tl.load(x + place, mask=cols < WIDTH, other=0.0).to(tl.float32)
    tl.store(scores + group, tl.sum(acc, 0) / tokens + tl.load(score_bias + group))


@triton.jit
def place_head(
    head,
    scores,
    indices,
    count,
    rest,
    chosen,
    order,
    active,
    attended,
    first,
    LISTED: tl.constexpr,
    HEADS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """The slot of a head in the order, whether it is active, and whether it is attended: all are with a ``rest``.

    If this block is the first of the head, it writes its part of what later launches read: ``order (HEADS,)``, the
    numbers of ``active`` and of ``attended`` heads, and ``chosen (HEADS,)``, the active heads and -1 past their number.
    """
    BLOCK: tl.constexpr = triton.next_power_of_2(HEADS)
    full = active_heads(scores, indices, count, LISTED, HEADS, TOGETHER, BLOCK)
    heads = tl.arange(0, BLOCK)
    total = tl.sum(full, 0)
    earlier = tl.sum(tl.where(heads < head, full, 0), 0)
    is_active = tl.sum(tl.where(heads == head, full, 0), 0) != 0
    slot = tl.where(is_active, earlier, total + head - earlier)
    every = tl.load(rest) != 0
    if first:
        tl.store(order + slot, head)
        if chosen is not None:
            tl.store(chosen + slot, tl.where(is_active, head, -1))
        if head == 0:
            tl.store(active, total)
            tl.store(attended, tl.where(every, HEADS, total))
    return slot, is_active, is_active | every


@triton.jit
def active_heads(
    scores, indices, count, LISTED: tl.constexpr, HEADS: tl.constexpr, TOGETHER: tl.constexpr, BLOCK: tl.constexpr
):
    """1 for each active head, 0 for the others, int32 ``(BLOCK,)``.

    With ``indices (LISTED,)`` these are its first ``count``. Otherwise the ``count`` best are active, by ``scores`` of
    ``TOGETHER`` neighbours.
    """
    heads = tl.arange(0, BLOCK)
    n = tl.minimum(tl.maximum(tl.load(count), 0), LISTED)
    # How many heads are better, or how many indices name this head.
    found = tl.zeros((BLOCK,), tl.int32)
    if indices is None:
        n = n // TOGETHER * TOGETHER
        if n < HEADS:
            own = head_scores(scores, heads, HEADS, TOGETHER)
            for start in range(0, HEADS, 16):
                rivals = start + tl.arange(0, 16)
                score = head_scores(scores, rivals, HEADS, TOGETHER)
                tie = (score[None, :] == own[:, None]) & (rivals[None, :] < heads[:, None])
                better = (rivals < HEADS)[None, :] & ((score[None, :] > own[:, None]) | tie)
                found += tl.sum(better.to(tl.int32), 1)
        return ((heads < HEADS) & (found < n)).to(tl.int32)
    else:
        for start in range(0, LISTED, 16):
            slots = start + tl.arange(0, 16)
            index = tl.load(indices + slots, mask=slots < n, other=-1)
            found += tl.sum((index[None, :] == heads[:, None]).to(tl.int32), 1)
        return ((heads < HEADS) & (found > 0)).to(tl.int32)


@triton.jit
def head_scores(scores, heads, HEADS: tl.constexpr, TOGETHER: tl.constexpr):
    """The score of each head's group; NaN becomes -inf, because comparisons with NaN give no order."""
    score = tl.load(scores + heads // TOGETHER, mask=heads < HEADS, other=float("-inf"))
    return tl.where(score == score, score, float("-inf"))
