"""``SelectTopK``: finds the threshold by bisection, then writes the active indices in order."""

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
    """A threshold for the ``count`` largest keys of ``scores (N,)``: they are the keys above it, and some equal to it.

    Also returns how many of the equal keys to take at most. The threshold is found bit by bit from the top: it is the
    largest number that enough keys are not below, or the first one found that exactly ``count`` keys are not below.
    """
    lanes = tl.arange(0, BLOCK)
    threshold = tl.zeros((), tl.uint32)
    bit = tl.full((), 1 << 31, tl.uint32)
    found = tl.full((), -1, tl.int32)  # number of keys that are not below the last number that was tried
    while (bit != 0) & (found != count):
        tried = threshold | bit
        found = keys_not_below(scores, tried, lanes, N, BLOCK)
        threshold = tl.where(found >= count, tried, threshold)
        bit = bit >> 1
    above = tl.zeros((), tl.int32)
    if found != count:
        above = keys_not_below(scores, threshold + 1, lanes, N, BLOCK)
    return threshold, count - above


@triton.jit
def keys_not_below(scores, threshold, lanes, N: tl.constexpr, BLOCK: tl.constexpr):
    """How many keys of ``scores (N,)`` are not below a threshold."""
    found = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, N, BLOCK):
        places = start + lanes
        found += ((ordered_keys(scores, places, N) >= threshold) & (places < N)).to(tl.int32)
    return tl.sum(found, 0)


@triton.jit
def select_topk(scores, counts, indices, N: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """Write ``indices (rows, CAP)`` of the ``counts[row]`` largest of ``scores (rows, N)``, one row per block."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.minimum(tl.maximum(tl.load(counts + row), 0), min(CAP, N))
    write_largest(scores + row * N, indices + row * CAP, count, N, CAP, BLOCK)


@triton.jit
def write_largest(scores, indices, count, N: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """Write ``indices (CAP,)`` of the ``count`` largest of ``scores (N,)``, ascending, and -1 past the count.

    ``count`` is at most ``N`` and ``CAP``. If all are selected, no score is read.
    """
    lanes = tl.arange(0, BLOCK)
    if (count > 0) & (count < N):
        threshold, need = largest_keys(scores, count, N, BLOCK)
        written = tl.zeros((), tl.int32)
        ties = tl.zeros((), tl.int32)
        for start in range(0, N, BLOCK):
            places = start + lanes
            key = ordered_keys(scores, places, N)
            inside = places < N
            equal = (inside & (key == threshold)).to(tl.int32)
            earlier = ties + tl.cumsum(equal, 0) - equal
            taken = (inside & ((key > threshold) | ((equal != 0) & (earlier < need)))).to(tl.int32)
            slot = written + tl.cumsum(taken, 0) - taken
            tl.store(indices + slot, places, mask=taken != 0)
            written += tl.sum(taken, 0)
            ties += tl.sum(equal, 0)
    for start in range(0, CAP, BLOCK):
        slot = start + lanes
        if count == N:
            tl.store(indices + slot, slot, mask=slot < N)
        tl.store(indices + slot, -1, mask=(slot >= count) & (slot < CAP))
