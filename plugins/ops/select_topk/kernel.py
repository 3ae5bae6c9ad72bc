"""``SelectTopK``: finds the threshold by radix selection, then writes the active indices in order."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ordered_keys(scores, places, N: tl.constexpr):
    """Scores as uint32 keys with the same order: -0 equals 0, and NaN is below everything."""
    value = tl.load(scores + places, mask=places < N, other=0.0)
    bits = tl.where(value == 0, 0.0, value).to(tl.uint32, bitcast=True)
    key = tl.where(bits >> 31 != 0, ~bits, bits | 0x80000000)
    return tl.where(value == value, key, 0)


@triton.jit
def largest_keys(scores, count, N: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest of the ``count`` largest keys of ``scores (N,)``, and how many of the keys equal to it they include.

    The key is found eight bits at a time, from the top. Each step makes a histogram of the next eight bits, over the
    keys that share the bits found so far. Integer arithmetic makes the result independent of the thread order.
    """
    lanes = tl.arange(0, BLOCK)
    digits = tl.arange(0, 256)
    threshold = tl.zeros((), tl.uint32)
    need = count  # how many keys to select among those that share the threshold's bits so far
    for step in tl.static_range(4):
        histogram = tl.zeros((256,), tl.int32)
        for start in range(0, N, BLOCK):
            places = start + lanes
            key = ordered_keys(scores, places, N)
            same = places < N
            if step > 0:
                same = same & ((key >> (32 - 8 * step)) == (threshold >> (32 - 8 * step)))
            histogram += tl.histogram(((key >> (24 - 8 * step)) & 255).to(tl.int32), 256, mask=same)
        at_least = tl.cumsum(histogram, 0, reverse=True)
        digit = tl.max(tl.where(at_least >= need, digits, 0), 0)
        need -= tl.sum(tl.where(digits == digit, at_least - histogram, 0), 0)
        threshold = threshold | (digit.to(tl.uint32) << (24 - 8 * step))
    return threshold, need


@triton.jit
def select_topk(scores, counts, indices, N: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """Write ``indices (rows, CAP)`` of the ``counts[row]`` largest of ``scores (rows, N)``, one row per block."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.minimum(tl.maximum(tl.load(counts + row), 0), CAP)
    scores += row * N
    indices += row * CAP
    lanes = tl.arange(0, BLOCK)
    threshold, need = largest_keys(scores, count, N, BLOCK)

    written = tl.zeros((), tl.int32)
    ties = tl.zeros((), tl.int32)
    for start in range(0, N, BLOCK):
        places = start + lanes
        key = ordered_keys(scores, places, N)
        inside = (places < N) & (count > 0)
        equal = (inside & (key == threshold)).to(tl.int32)
        earlier = ties + tl.cumsum(equal, 0) - equal
        taken = (inside & ((key > threshold) | ((equal != 0) & (earlier < need)))).to(tl.int32)
        slot = written + tl.cumsum(taken, 0) - taken
        tl.store(indices + slot, places, mask=taken != 0)
        written += tl.sum(taken, 0)
        ties += tl.sum(equal, 0)
    for start in range(0, CAP, BLOCK):
        slot = start + lanes
        tl.store(indices + slot, -1, mask=(slot >= written) & (slot < CAP))
