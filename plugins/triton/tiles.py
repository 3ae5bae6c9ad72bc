"""Shared parts of the kernels: products of tokens with gathered rows, for one token and for many.

A tile of one token is a matrix-vector product. It keeps one partial sum per loaded weight and adds them up
at the end, so that threads exchange no data in the loop. More tokens use ``tl.dot``.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from shadowllm.models.activations import GELU_CUBIC, GELU_SQRT, QUICK_GELU_SLOPE
from shadowllm.plugins.schema import Attributes

# In tl.dot, Triton's interpreter treats the bits of bfloat16 as integers, so it gets float32 instead.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

SLOPE, SQRT, CUBIC = (tl.constexpr(number) for number in (QUICK_GELU_SLOPE, GELU_SQRT, GELU_CUBIC))

# Bytes along the summed dimension that a loop around ``tl.dot`` takes per step.
LINE = 128


@triton.jit
def dot(a, b, acc):
    """``acc + a b``, sums in float32; float32 inputs are not rounded to TF32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def token_tile(x, tokens, cols, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Load columns of this block's tokens of ``x (tokens, WIDTH)`` for `add_along`: ``(M, K)``.

    One token is repeated to ``(N, K)``. The copies come from the cache, and every thread has the values that its
    weights are multiplied by. A ``(1, K)`` tile would have to be exchanged between threads in every loop step.
    """
    if BLOCK_M == 1:
        place = tl.zeros((BLOCK_N,), tl.int32)[:, None] + cols[None, :]
        return tl.load(x + place, mask=place < WIDTH, other=0.0)
    else:
        rows = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        mask = (rows < tokens) & (cols < WIDTH)[None, :]
        return tl.load(x + rows.to(tl.int64) * WIDTH + cols[None, :], mask=mask, other=0.0)


@triton.jit
def zeros_along(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Initial sums for `add_along`."""
    if BLOCK_M == 1:
        return tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    else:
        return tl.zeros((BLOCK_M, BLOCK_N), tl.float32)


@triton.jit
def add_along(acc, x, w, BLOCK_M: tl.constexpr):
    """Add the products of a `token_tile` with rows ``w (N, K)``."""
    if BLOCK_M == 1:
        return acc + x.to(tl.float32) * w.to(tl.float32)
    else:
        return dot(x, tl.trans(w), acc)


@triton.jit
def sum_along(acc, BLOCK_M: tl.constexpr):
    """The final products ``(M, N)``, from the sums of `add_along`."""
    if BLOCK_M == 1:
        return tl.sum(acc, 1)[None, :]
    else:
        return acc


@triton.jit
def project(
    x,
    weight,
    bias,
    rows,
    live,
    tokens,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Products ``(M, N)`` of this block's tokens of ``x (tokens, WIDTH)`` with rows of a weight, plus ``bias``.

    Only live rows are read.
    """
    total = zeros_along(BLOCK_M, BLOCK_N, BLOCK_K)
    for start in range(0, WIDTH, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        place = rows.to(tl.int64)[:, None] * WIDTH + cols[None, :]
        w = tl.load(weight + place, mask=live[:, None] & (cols < WIDTH)[None, :], other=0.0)
        total = add_along(total, token_tile(x, tokens, cols, WIDTH, BLOCK_M, BLOCK_N), w, BLOCK_M)
    y = sum_along(total, BLOCK_M)
    if bias is not None:
        y += tl.load(bias + rows, mask=live, other=0.0)[None, :].to(tl.float32)
    return y


@triton.jit
def active_rows(indices, count, slots, GROUP: tl.constexpr, UNITS: tl.constexpr):
    """Rows of a weight at the slots of a selection of units, which have ``GROUP`` rows each.

    Without indices, the selection is of all units in their order.

    Returns:
        Rows, int64, and whether they are active. A slot past the count, or an index outside the weight,
        is not active and gets a row of unit 0, so that nothing outside a buffer is read.
    """
    if indices is None:
        units = tl.where(slots < count * GROUP, slots // GROUP, -1)
    else:
        units = tl.load(indices + slots // GROUP, mask=slots < count * GROUP, other=-1)
    live = (units >= 0) & (units < UNITS)
    return tl.where(live, units, 0).to(tl.int64) * GROUP + slots % GROUP, live


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, THRESHOLD: tl.constexpr):
    """Apply the MLP's activation to float32 values; see `models.activations`."""
    if ACTIVATION == "relu" or ACTIVATION == "drelu":
        return relu(x)
    elif ACTIVATION == "relu2":
        return relu(x) * relu(x)
    elif ACTIVATION == "fatrelu":
        return tl.where(x <= THRESHOLD, 0.0, x)
    elif ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "quick_gelu":
        return x * tl.sigmoid(SLOPE * x)
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(u)) / 2 is sigmoid(2 u)
        return x * tl.sigmoid(2 * SQRT * (x + CUBIC * x * x * x))
    else:
        return x * 0.5 * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def relu(x):
    """``max(x, 0)``. It keeps a NaN, which a maximum may drop."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def times_up(active, up, ACTIVATION: tl.constexpr):
    """Multiply the activated gate by up, which has a ReLU too in dReLU."""
    if ACTIVATION == "drelu":
        return active * relu(up)
    else:
        return active * up


def activation_constants(attributes: Attributes) -> dict[str, float | str]:
    """The constants of `activate`, from the attributes of a node."""
    return {"ACTIVATION": str(attributes["activation"]), "THRESHOLD": float(attributes.get("threshold", 0))}


def block_along(width: int, tokens: int, itemsize: int) -> int:
    """Columns that a loop over a row of this width takes per step, for a tile of this many tokens."""
    return min(256 if tokens == 1 else LINE // itemsize, max(16, triton.next_power_of_2(width)))


def tile_warps(tokens: int, itemsize: int) -> int:
    """Warps for a tile of this many tokens; float32 needs more registers, because it cannot use tensor cores."""
    return 8 if tokens > 1 and itemsize == 4 else 4
