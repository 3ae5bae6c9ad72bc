"""How ``SparseAttention`` is launched."""

from __future__ import annotations

from collections.abc import Mapping

import triton

from shadowllm.plugins.kernel_program import Size
from shadowllm.plugins.ops.sparse_attention.kernel import decode_attention, head_queries, merge_splits, prompt_attention
from shadowllm.plugins.triton.output_projection import back_calls
from shadowllm.plugins.triton.schedule import GEMV, Call, Operand, Schedule, Scratch, Shape, Tier, Workspace, tiers
from shadowllm.plugins.triton.tiles import LINE, block_along, tile_warps

# Cache positions that one block of a decode step processes in total, and at a time.
SPAN, POSITIONS = 256, 32


def schedules(
    shapes: Mapping[str, Shape], attributes: Mapping[str, int | str], *, itemsize: int, max_batch: int, max_seqlen: int
) -> list[Schedule]:
    """See `triton.schedule.Planner`."""
    ranges = tiers(max_batch, max_seqlen)
    return [plan_sparse_attention(shapes, itemsize, tier, int(attributes["n_heads"])) for tier in ranges]


def plan_sparse_attention(shapes: Mapping[str, Shape], itemsize: int, tier: Tier, n_heads: int) -> Schedule:
    """How to launch ``SparseAttention`` in a tier.

    Args:
        shapes: shapes of the present inputs, by name.
        itemsize: bytes per element of the weights.
    """
    width = shapes["w_q"][1]
    _, kv_heads, capacity, head_dim = shapes["key"]
    (cap,) = shapes["indices"]
    workspace = Workspace()
    query, context = (workspace.take(tier.tokens * cap * head_dim, "T", itemsize) for _ in range(2))
    half = (head_dim + 1) // 2
    rows = min(8 if tier.block == GEMV else 64, max(16, triton.next_power_of_2(half)))
    inputs = [name for name in ("x", "indices", "count", "w_q", "b_q", "cos", "sin") if name in shapes]
    heads = {"CAP": cap, "HEADS": n_heads, "HEAD_DIM": head_dim}
    project = Call(
        head_queries,
        (Size(cap * triton.cdiv(half, rows)), tier.tiles, Size()),
        {name: name for name in inputs} | {"query": query, "tokens": tier.size},
        heads
        | {
            "WIDTH": width,
            "BLOCK_M": tier.block,
            "BLOCK_N": rows,
            "BLOCK_K": block_along(width, tier.block, itemsize),
        },
        warps=tile_warps(tier.block, itemsize),
        stages=3,
    )
    read: dict[str, Operand] = {name: name for name in ("key", "value", "lengths", "indices", "count")}
    constants = heads | {
        "SCALE": head_dim**-0.5,
        "KV_HEADS": kv_heads,
        "CAPACITY": capacity,
        "BLOCK_H": max(16, triton.next_power_of_2(head_dim)),
    }
    operands = read | {"query": query, "context": context}
    if tier.max_seqlen == 1:
        attend = _decode(workspace, tier, operands, constants)
    else:
        attend = [_prompt(tier, operands, constants, itemsize)]
    back = back_calls(
        workspace,
        tier,
        context,
        "w_o",
        "b_o" if "b_o" in shapes else None,
        cap=cap,
        units=n_heads,
        itemsize=itemsize,
        group=head_dim,
        width=width,
    )
    return Schedule(tier.max_batch, tier.max_seqlen, workspace.bytes, (project, *attend, *back))


def _decode(
    workspace: Workspace, tier: Tier, operands: Mapping[str, Operand], constants: Mapping[str, int | float]
) -> list[Call]:
    cap, head_dim = int(constants["CAP"]), int(constants["HEAD_DIM"])
    splits = triton.cdiv(int(constants["CAPACITY"]), SPAN)
    spans = {"SPLITS": splits, "SPAN": SPAN}
    several: dict[str, Scratch] = {}
    if splits > 1:
        several["partials"] = workspace.take(tier.max_batch * cap * splits * (head_dim + 2), "float32", 4)
    attend = Call(
        decode_attention,
        (Size(cap), tier.size, Size(splits)),
        {**operands, **several},
        {**constants, **spans, "BLOCK_P": POSITIONS},
    )
    if splits == 1:
        return [attend]
    merged = ("CAP", "HEADS", "CAPACITY", "HEAD_DIM", "BLOCK_H")
    merge = Call(
        merge_splits,
        (Size(cap), tier.size, Size()),
        {name: operands[name] for name in ("lengths", "indices", "count", "context")} | several,
        {name: constants[name] for name in merged} | spans,
        warps=1,
    )
    return [attend, merge]


def _prompt(tier: Tier, operands: Mapping[str, Operand], constants: Mapping[str, int | float], itemsize: int) -> Call:
    # At most 16 KiB of queries: queries, keys and values share the 64 KiB of shared memory of a block on sm_75.
    rows = max(16, min(tier.block, 16384 // (int(constants["BLOCK_H"]) * itemsize)))
    return Call(
        prompt_attention,
        (Size(seqlen=True, divisor=rows), Size(int(constants["CAP"])), Size(batch=True)),
        {**operands, "seqlen": Size(seqlen=True)},
        {**constants, "BLOCK_M": rows, "BLOCK_P": LINE // (2 * itemsize)},
        warps=8 if int(constants["HEAD_DIM"]) > 64 else tile_warps(rows, itemsize),
    )
