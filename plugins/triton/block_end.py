"""The end of an attention or MLP block: the partial sums are added up, and what a decoder layer does next.

The op alone writes the sum. If it is given the hidden states, it also adds them and computes the next norm, which would
be two or more launches of their own. For one token, the blocks of `project_back` that finish last do all of this. For
more tokens it takes a launch, with blocks of its own for each token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import triton
import triton.language as tl

from shadowllm.plugins.kernel_program import Size
from shadowllm.plugins.schema import Attribute, Attributes, OpSchema, Port
from shadowllm.plugins.triton.block_sync import is_last
from shadowllm.plugins.triton.low_bit import rest_is_added
from shadowllm.plugins.triton.schedule import Call, Operand, Shape, Tier

PORTS = (
    Port("skip", ("B", "S", "D")),
    Port("norm_weight", ("D",)),
    Port("norm_bias", ("D",), optional=True),
    Port("output_norm_weight", ("D",), optional=True),
)
# Keys and values of the step, which attention then also computes and writes into the cache.
KEYS_VALUES = (
    Port("w_kv", ("2*n_kv*d", "D"), optional=True),
    Port("b_kv", ("2*n_kv*d",), optional=True),
    Port("c_kv", ("2*n_kv*d", "copy_blocks", "copy_bytes"), "uint8", optional=True),
    Port("cs_kv", ("2*n_kv*d", "copy_blocks"), "float32", optional=True),
)


@cache
def with_block_end(schema: OpSchema) -> OpSchema:
    """The signature of ``SparseAttention`` or ``SparseMLP`` as a whole block of a decoder layer, for one-token steps.

    ``y`` is then the new hidden states: ``skip`` plus the op's result, which is normed first if there is an
    ``output_norm_weight``. ``normed`` is the norm of ``y``: LayerNorm with a ``norm_bias``, else RMSNorm. With
    ``w_kv``, attention also projects keys and values and writes them into the cache, at position ``lengths - 1``. If
    ``w_kv`` is a residual, ``c_kv`` and ``cs_kv`` are its copy.
    """
    more = PORTS + KEYS_VALUES * (schema.name == "SparseAttention")
    first, *others = schema.outputs
    return replace(
        schema,
        inputs=schema.inputs + more,
        outputs=(first, Port("normed", ("B", "S", "D")), *others),
        attributes=(*schema.attributes, Attribute("norm_eps", float)),
    )


@dataclass(frozen=True)
class BlockEnd:
    """Operands of `finish_token` that are not of the sum, and the number that is added to a variance."""

    operands: Mapping[str, Operand]
    eps: float

    @classmethod
    def of(cls, shapes: Mapping[str, Shape], attributes: Attributes) -> BlockEnd | None:
        """The end of a block with these inputs; None if the op writes only its own result."""
        if "skip" not in shapes:
            return None
        present = [port.name for port in PORTS if port.name in shapes]
        return cls({name: name for name in (*present, "normed")}, float(attributes["norm_eps"]))


def sum_call(end: BlockEnd | None, tier: Tier, summed: Mapping[str, Operand], constants: Mapping[str, int]) -> Call:
    """The launch that adds up the partial sums of more than one token.

    Args:
        summed, constants: operands and constants of `sum_partials`.
    """
    if end is None:
        # Tokens are along x, because the other two axes of a grid are limited to 65,535.
        grid = (tier.size, Size(constants["WIDTH"], divisor=constants["BLOCK_D"]), Size())
        return Call(sum_partials, grid, summed, constants)
    # A block for each token, because a norm needs the whole row.
    row = row_block(constants["WIDTH"])
    return Call(
        sum_and_norm,
        (tier.size, Size(), Size()),
        {**summed, **end.operands},
        {**constants, "EPS": end.eps, "BLOCK_D": row},
        warps=max(1, min(32, row * constants["BLOCK_P"] // 1024)),
    )


def row_block(width: int) -> int:
    """The size of a block that has a whole row of the hidden states."""
    return max(128, triton.next_power_of_2(width))


def parts_block(splits: int, rest_splits: int) -> int:
    """``BLOCK_P``, which covers the partial sums, and also those of the rest."""
    return triton.next_power_of_2(max(1, splits, rest_splits))


@triton.jit
def finish_token(
    partials, bias, y, rest, active, skip, norm_weight, norm_bias, output_norm_weight, normed, finished,
    WIDTH: tl.constexpr, SPLITS: tl.constexpr, REST_SPLITS: tl.constexpr, UNITS: tl.constexpr, EPS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_ROW: tl.constexpr,
):  # fmt: skip
    """Write the result of one token, after the blocks of `project_back` have written its partial sums.

    ``finished`` counts column tiles that are added up, and from place 1 on the blocks of each tile.

    The last block of a column tile adds up the partial sums of its columns, in a fixed order. With ``skip``, the last
    of these blocks does the same as `sum_and_norm`.
    """
    if is_last(finished + 1 + tl.program_id(0), SPLITS + REST_SPLITS):
        cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = total_of_partials(
            partials, bias, rest, active, 0, 1, cols, WIDTH, SPLITS, UNITS, REST_SPLITS, BLOCK_P
        )  # fmt: skip
        if skip is None:
            tl.store(y + cols, total.to(y.dtype.element_ty), mask=cols < WIDTH)
        else:
            tl.store(partials + cols, total, mask=cols < WIDTH)
            if is_last(finished, tl.num_programs(0)):
                row = tl.arange(0, BLOCK_ROW)
                sums = tl.load(partials + row, mask=row < WIDTH, other=0.0)
                add_and_norm(sums, y, skip, norm_weight, norm_bias, output_norm_weight, normed, 0, row, WIDTH, EPS)


@triton.jit
def sum_of_splits(
    partials,
    token,
    tokens,
    cols,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Columns of the total of ``SPLITS`` of a token's partial sums. All are loaded at once: a loop waits for each."""
    splits = tl.arange(0, BLOCK_P)
    place = ((FIRST + splits)[:, None] * tokens + token) * WIDTH + cols[None, :]
    return tl.sum(tl.load(partials + place, mask=(splits < SPLITS)[:, None] & (cols < WIDTH)[None, :], other=0.0), 0)


@triton.jit
def total_of_partials(
    partials,
    bias,
    rest,
    active,
    token,
    tokens,
    cols,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    UNITS: tl.constexpr,
    REST_SPLITS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Columns of a token's result: partial sums of `project_back`, also those of a rest that is added, and a bias."""
    total = sum_of_splits(partials, token, tokens, cols, 0, WIDTH, SPLITS, BLOCK_P)
    if rest is not None:  # noqa: SIM102 -- known at compile time, and the next one is not
        if rest_is_added(rest, active, UNITS):
            total += sum_of_splits(partials, token, tokens, cols, SPLITS, WIDTH, REST_SPLITS, BLOCK_P)
    if bias is not None:
        total += tl.load(bias + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)
    return total


@triton.jit
def sum_partials(
    partials,
    bias,
    y,
    rest,
    active,
    tokens,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNITS: tl.constexpr,
    REST_SPLITS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Write ``y (tokens, WIDTH)``: the total of the partial sums."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = total_of_partials(
        partials, bias, rest, active, token, tokens, cols, WIDTH, SPLITS, UNITS, REST_SPLITS, BLOCK_P
    )  # fmt: skip
    tl.store(y + token * WIDTH + cols, total.to(y.dtype.element_ty), mask=cols < WIDTH)


@triton.jit
def sum_and_norm(
    partials,
    bias,
    y,
    rest,
    active,
    skip,
    norm_weight,
    norm_bias,
    output_norm_weight,
    normed,
    tokens,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNITS: tl.constexpr,
    REST_SPLITS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    EPS: tl.constexpr,
):
    """Write ``y (tokens, WIDTH)``, the total of the partial sums and of ``skip``, and its norm ``normed``.

    A block has one token. With ``output_norm_weight``, the total of the partial sums is normed before it is added.
    """
    token = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    total = total_of_partials(
        partials, bias, rest, active, token, tokens, cols, WIDTH, SPLITS, UNITS, REST_SPLITS, BLOCK_P
    )  # fmt: skip
    add_and_norm(total, y, skip, norm_weight, norm_bias, output_norm_weight, normed, token, cols, WIDTH, EPS)


@triton.jit
def add_and_norm(
    total,
    y,
    skip,
    norm_weight,
    norm_bias,
    output_norm_weight,
    normed,
    token,
    cols,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
):
    """Write a row of `sum_and_norm`, from the ``total`` of its partial sums, which is zero past the width."""
    inside = cols < WIDTH
    if output_norm_weight is not None:
        total = norm(total, output_norm_weight, None, cols, WIDTH, EPS)
    total += tl.load(skip + token * WIDTH + cols, mask=inside, other=0.0).to(tl.float32)
    rounded = total.to(y.dtype.element_ty)
    tl.store(y + token * WIDTH + cols, rounded, mask=inside)
    after = norm(rounded.to(tl.float32), norm_weight, norm_bias, cols, WIDTH, EPS)
    tl.store(normed + token * WIDTH + cols, after.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def norm(x, weight, bias, cols, WIDTH: tl.constexpr, EPS: tl.constexpr):
    """LayerNorm (Ba et al., arXiv 1607.06450) of a row with a bias, else RMSNorm (arXiv 1910.07467); in float32.

    Columns past ``WIDTH`` must be zero.
    """
    inside = cols < WIDTH
    if bias is not None:
        x = tl.where(inside, x - tl.sum(x, 0) / WIDTH, 0.0)
    y = x / tl.sqrt(tl.sum(x * x, 0) / WIDTH + EPS)
    y *= tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)
    return y
