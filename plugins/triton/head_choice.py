"""Chooses the heads of ``SparseAttention`` inside the op, and orders them: the active ones, then the others."""

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
def order_heads(
    scores,
    indices,
    count,
    rest,
    chosen,
    order,
    active,
    attended,
    CAP: tl.constexpr,
    HEADS: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write ``order (HEADS,)``: the active heads, ascending, then the others. One block.

    ``active`` gets the number of active heads, and ``attended`` the number of heads that contribute: all if ``rest``
    is not zero. With ``indices (CAP,)`` these are the active heads. Otherwise the ``count`` best are, by ``scores`` of
    ``TOGETHER`` neighbours, and ``chosen (HEADS,)`` gets them, -1 past their number.
    """
    heads = tl.arange(0, BLOCK)
    inside = heads < HEADS
    n = tl.minimum(tl.maximum(tl.load(count), 0), CAP)
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
        full = (inside & (found < n)).to(tl.int32)
    else:
        for start in range(0, CAP, 16):
            slots = start + tl.arange(0, 16)
            index = tl.load(indices + slots, mask=slots < n, other=-1)
            found += tl.sum((index[None, :] == heads[:, None]).to(tl.int32), 1)
        full = (inside & (found > 0)).to(tl.int32)
    total = tl.sum(full, 0)
    others = inside.to(tl.int32) - full
    first = tl.cumsum(full, 0) - full
    tl.store(order + tl.where(full != 0, first, total + tl.cumsum(others, 0) - others), heads, mask=inside)
    tl.store(active, total)
    tl.store(attended, tl.where(tl.load(rest) != 0, HEADS, total))
    if chosen is not None:
        tl.store(chosen + first, heads, mask=full != 0)
        tl.store(chosen + heads, -1, mask=inside & (heads >= total))


@triton.jit
def head_scores(scores, heads, HEADS: tl.constexpr, TOGETHER: tl.constexpr):
    """The score of each head's group; NaN becomes -inf, because comparisons with NaN give no order."""
    score = tl.load(scores + heads // TOGETHER, mask=heads < HEADS, other=float("-inf"))
    return tl.where(score == score, score, float("-inf"))
