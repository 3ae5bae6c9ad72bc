"""Hidden values that an output projection multiplies; those of attention may be in several spans of the cache."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

# Below every score. It is finite, because the difference of two infinities is not a number.
LOWEST = tl.constexpr(-1e38)


@dataclass(frozen=True)
class Spans:
    """How the hidden values of `project_back` are stored if attention left them in several spans of the cache.

    Attributes:
        splits: number of spans; the hidden values are ``partials`` of `sparse_attention.kernel.decode_attention`.
        span: positions of a span.
        capacity: positions of the cache.
    """

    splits: int = 1
    span: int = 0
    capacity: int = 0

    @property
    def constants(self) -> dict[str, int]:
        """Constants of `project_back`."""
        block = triton.next_power_of_2(self.splits)
        return {"SPANS": self.splits, "SPAN": self.span, "CAPACITY": self.capacity, "BLOCK_S": block}


@triton.jit
def hidden_values(
    hidden,
    lengths,
    rows_m,
    slots,
    live,
    tokens,
    CAP: tl.constexpr,
    GROUP: tl.constexpr,
    SPANS: tl.constexpr,
    SPAN: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Hidden values ``(M, N)`` at the live slots; of one token ``(N,)``, so that threads exchange nothing in a loop."""
    if BLOCK_M == 1 and lengths is None:
        return tl.load(hidden + slots, mask=live, other=0.0)
    elif BLOCK_M == 1:
        return merged_token(hidden, lengths, slots, live, GROUP, SPANS, SPAN, CAPACITY, BLOCK_S).to(TYPE)
    else:
        mask = (rows_m < tokens)[:, None] & live[None, :]
        if lengths is None:
            place = rows_m[:, None].to(tl.int64) * (CAP * GROUP) + slots[None, :]
            return tl.load(hidden + place, mask=mask, other=0.0)
        else:
            h = merged_spans(hidden, lengths, rows_m, slots, mask, tokens, CAP, GROUP, SPANS, SPAN, CAPACITY)
            return h.to(TYPE)


@triton.jit
def merged_token(
    partials,
    lengths,
    slots,
    live,
    GROUP: tl.constexpr,
    SPANS: tl.constexpr,
    SPAN: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """`merged_spans` of one token, ``(N,)``; all spans are loaded at once, because a loop would wait for each."""
    spans = tl.arange(0, BLOCK_S)
    length = tl.minimum(tl.load(lengths), CAPACITY)
    there = live[:, None] & (spans * SPAN < length)[None, :]
    part = partials + ((slots // GROUP).to(tl.int64)[:, None] * SPANS + spans[None, :]) * (GROUP + 2)
    tops = tl.load(part + GROUP, mask=there, other=LOWEST)
    weights = tl.where(there, tl.exp(tops - tl.max(tops, 1)[:, None]), 0.0)
    mass = tl.sum(weights * tl.load(part + GROUP + 1, mask=there, other=0.0), 1)
    acc = tl.sum(weights * tl.load(part + (slots % GROUP)[:, None], mask=there, other=0.0), 1)
    return tl.where(live & (length > 0), acc / tl.where(mass == 0, 1.0, mass), 0.0)


@triton.jit
def merged_spans(
    partials,
    lengths,
    rows_m,
    slots,
    mask,
    tokens,
    CAP: tl.constexpr,
    GROUP: tl.constexpr,
    SPANS: tl.constexpr,
    SPAN: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """The attention's results ``(M, N)``, merged from the spans of the cache that a sequence fills.

    ``partials (tokens, CAP, SPANS, GROUP + 2)`` has the unnormalised result of each span, and the maximum and the sum
    of its softmax (`decode_attention`).
    """
    length = tl.minimum(tl.load(lengths + rows_m, mask=rows_m < tokens, other=0), CAPACITY)
    head = (rows_m[:, None].to(tl.int64) * CAP + (slots // GROUP)[None, :]) * SPANS
    place = (slots % GROUP)[None, :]
    top = tl.full(mask.shape, LOWEST, tl.float32)
    mass = tl.zeros(mask.shape, tl.float32)
    acc = tl.zeros(mask.shape, tl.float32)
    for span in range(tl.cdiv(tl.max(length, 0), SPAN)):
        there = mask & (span * SPAN < length)[:, None]
        part = partials + (head + span) * (GROUP + 2)
        part_top = tl.where(there, tl.load(part + GROUP, mask=there, other=0.0), top)
        higher = tl.maximum(top, part_top)
        shrink, part_shrink = tl.exp(top - higher), tl.where(there, tl.exp(part_top - higher), 0.0)
        mass = mass * shrink + tl.load(part + GROUP + 1, mask=there, other=0.0) * part_shrink
        acc = acc * shrink + tl.load(part + place, mask=there, other=0.0) * part_shrink
        top = higher
    return tl.where(mask & (length > 0)[:, None], acc / tl.where(mass == 0, 1.0, mass), 0.0)
