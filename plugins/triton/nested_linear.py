"""A linear layer over all rows of a matrix of nested integers, for matrices that every token reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from shadowllm.plugins.kernel_program import Size
from shadowllm.plugins.triton.launch import residual_words
from shadowllm.plugins.triton.low_bit import copy_products, token_block, word_constants
from shadowllm.plugins.triton.schedule import DOT, GEMV, PREFILL, Call, Schedule, Shape, Tier, run
from shadowllm.plugins.triton.tiles import tile_warps


@dataclass(frozen=True)
class NestedRows:
    """A matrix ``(rows, width)`` of nested integers on a device; see `bundle.quantisation`.

    Attributes:
        copy: uint8 ``(rows, blocks, bytes)``.
        scales: of the copy, float32 ``(rows, blocks)``.
        residual: uint8 ``(rows, bytes)``.
        width: elements of a row, without the padding of the last block.
    """

    copy: Tensor
    scales: Tensor
    residual: Tensor
    width: int

    def split(self, sizes: Sequence[int]) -> list[NestedRows]:
        """Parts with these numbers of rows, which share the memory of the matrix."""
        copies, scales, residuals = (part.split(list(sizes)) for part in (self.copy, self.scales, self.residual))
        return [NestedRows(*part, self.width) for part in zip(copies, scales, residuals, strict=True)]

    def values(self, rows: Tensor) -> Tensor:
        """The values of some rows, float32.

        Args:
            rows: int64 of any shape ``(...)`` on the device.

        Returns:
            ``(..., width)``.
        """
        copy, scales = self.copy[rows], self.scales[rows]
        bits = 4 * self.residual.shape[1] // self.copy[0].numel()
        low = _integers(self.residual[rows], bits).view(*scales.shape, -1)
        found = (_integers(copy, 4) + low / 2**bits) * scales[..., None]
        return found.flatten(-2)[..., : self.width]


def _integers(data: Tensor, bits: int) -> Tensor:
    """The signed integers of bytes ``(..., bytes)``, float32 ``(..., integers)``."""
    places = [data >> (bits * place) & (2**bits - 1) for place in range(8 // bits)]
    return torch.stack(places, dim=-1).flatten(-2).float() - 2 ** (bits - 1)


@triton.jit
def multiply_rows(
    x,
    copy,
    scales,
    residual,
    bias,
    y,
    tokens,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Write ``y (tokens, ROWS)``: the products of ``x (tokens, WIDTH)`` with all rows, plus ``bias``."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < ROWS
    first = tl.program_id(1) * BLOCK_M
    wide = tl.where(live, rows, 0).to(tl.int64)
    products = copy_products(
        x, copy, scales, residual, wide, live, first, tokens, WIDTH, BLOCKS, BLOCK_WORDS, BLOCK_M, BLOCK_N, BLOCK_W
    )
    if bias is not None:
        products += tl.load(bias + rows, mask=live, other=0.0)[None, :].to(tl.float32)
    rows_m = first + tl.arange(0, BLOCK_M)
    place = rows_m.to(tl.int64)[:, None] * ROWS + rows[None, :]
    tl.store(y + place, products.to(y.dtype.element_ty), mask=(rows_m < tokens)[:, None] & live[None, :])


def linear_call(copy: Shape, width: int, tokens: int, itemsize: int, bias: bool) -> Call:
    """The launch of `multiply_rows`.

    Args:
        copy: ``(rows, blocks, int32 words)``.
        width: size of x.
        itemsize: bytes per element of x.
    """
    tier = Tier(1, tokens, GEMV if tokens == 1 else DOT if tokens <= DOT else PREFILL)
    block_m, block_n = token_block(tier, itemsize), 4 if tokens == 1 else 32
    names = ["x", "copy", "scales", "residual", "y"] + ["bias"] * bias
    return Call(
        multiply_rows,
        (Size(copy[0], divisor=block_n), Size(seqlen=True, divisor=block_m), Size()),
        {**{name: name for name in names}, "tokens": Size(seqlen=True)},
        {
            "ROWS": copy[0],
            "WIDTH": width,
            **word_constants(copy, tier, block_n),
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
        },
        warps=tile_warps(tier.block, itemsize),
        stages=3,
    )


def nested_linear(x: Tensor, weight: NestedRows, bias: Tensor | None = None) -> Tensor:
    """Multiply by all rows of a matrix, as ``torch.nn.functional.linear``; sums are in float32.

    Args:
        x: floats ``(..., width)`` on the device of the weight.
        bias: ``(rows,)`` of the type of x.

    Returns:
        ``(..., rows)`` of the type of x.

    Raises:
        ValueError: x has another width.
    """
    if x.shape[-1] != weight.width:
        raise ValueError(f"x has shape {tuple(x.shape)}, and a row has {weight.width} elements")
    words = weight.copy.view(torch.int32)
    y = torch.empty((*x.shape[:-1], len(words)), dtype=x.dtype, device=x.device)
    tokens = x.numel() // weight.width
    tensors = {
        "x": x.contiguous(),
        "copy": words,
        "scales": weight.scales,
        "residual": residual_words(weight.copy, weight.residual),
        "bias": bias,
        "y": y,
    }
    call = linear_call(tuple(words.shape), weight.width, tokens, x.element_size(), bias is not None)
    run(Schedule(1, tokens, 0, (call,)), tensors, 1, tokens)
    return y
