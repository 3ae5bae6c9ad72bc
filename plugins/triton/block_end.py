"""The end of an attention or MLP block: the partial sums are added up, and what a decoder layer does next.

The op alone writes the sum. If it is given the hidden states, one launch also adds them and computes the next norm,
which would be two or more launches of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import triton
import triton.language as tl

from shadowllm.plugins.kernel_program import Size
from shadowllm.plugins.schema import Attribute, Attributes, OpSchema, Port
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
    """Operands of `sum_and_norm` that are not of the sum, and the number that is added to a variance."""

    operands: Mapping[str, Operand]
    eps: float

    @classmethod
    def of(cls, shapes: Mapping[str, Shape], attributes: Attributes) -> BlockEnd | None:
        """The end of a block with these inputs; None if the op writes only its own result."""
        if "skip" not in shapes:
            return None
        present = [port.name for port in PORTS if port.name in shapes]
        return cls({name: name for name in (*present, "normed")}, float(attributes["norm_eps"]))


def end_call(end: BlockEnd, tier: Tier, summed: Mapping[str, Operand], constants: Mapping[str, int]) -> Call:
    """The launch of `sum_and_norm`: a block for each token, because a norm needs the whole row.

    Args:
        summed, constants: operands and constants of `sum_partials`, without its block size.
    """
    block = max(128, triton.next_power_of_2(constants["WIDTH"]))
    blocks = split_blocks(constants["SPLITS"], constants["REST_SPLITS"])
    return Call(
        sum_and_norm,
        (tier.size, Size(), Size()),
        {**summed, **end.operands},
        {**constants, **blocks, "EPS": end.eps, "BLOCK_D": block},
        warps=max(1, min(32, block * max(blocks.values()) // 1024)),
    )


def split_blocks(splits: int, rest_splits: int) -> dict[str, int]:
    """The sizes of `sum_of_splits`, for the partial sums and for those of the rest."""
    return {"BLOCK_S": triton.next_power_of_2(splits), "BLOCK_R": triton.next_power_of_2(max(1, rest_splits))}


@triton.jit
def sum_of_splits(
    partials,
    token,
    tokens,
    cols,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Columns of the total of ``SPLITS`` of a token's partial sums. All are loaded at once: a loop waits for each."""
    splits = tl.arange(0, BLOCK_S)
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
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Columns of a token's result: partial sums of `project_back`, also those of a rest that is added, and a bias."""
    total = sum_of_splits(partials, token, tokens, cols, 0, WIDTH, SPLITS, BLOCK_S)
    if rest is not None:  # noqa: SIM102 -- known at compile time, and the next one is not
        if rest_is_added(rest, active, UNITS):
            total += sum_of_splits(partials, token, tokens, cols, SPLITS, WIDTH, REST_SPLITS, BLOCK_R)
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
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Write ``y (tokens, WIDTH)``: the total of the partial sums."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = total_of_partials(
        partials, bias, rest, active, token, tokens, cols, WIDTH, SPLITS, UNITS, REST_SPLITS, BLOCK_S, BLOCK_R
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
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EPS: tl.constexpr,
):
    """Write ``y (tokens, WIDTH)``, the total of the partial sums and of ``skip``, and its norm ``normed``.

    A block has one token. With ``output_norm_weight``, the total of the partial sums is normed before it is added.
    """
    token = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    inside = cols < WIDTH
    total = total_of_partials(
        partials, bias, rest, active, token, tokens, cols, WIDTH, SPLITS, UNITS, REST_SPLITS, BLOCK_S, BLOCK_R
    )  # fmt: skip
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
