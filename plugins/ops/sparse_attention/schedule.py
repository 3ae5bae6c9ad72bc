"""How ``SparseAttention`` is launched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import triton

from shadowllm.plugins.kernel_program import Size
from shadowllm.plugins.ops.sparse_attention.kernel import decode_attention, prompt_attention
from shadowllm.plugins.ops.sparse_attention.projection_kernel import project_heads
from shadowllm.plugins.schema import Attributes
from shadowllm.plugins.triton.block_end import BlockEnd
from shadowllm.plugins.triton.block_sync import clearing
from shadowllm.plugins.triton.head_choice import score_heads
from shadowllm.plugins.triton.hidden_values import Spans
from shadowllm.plugins.triton.low_bit import token_block, word_constants
from shadowllm.plugins.triton.output_projection import Rest, back_calls, counters_of
from shadowllm.plugins.triton.schedule import GEMV, Call, Operand, Schedule, Scratch, Shape, Tier, Workspace, tiers
from shadowllm.plugins.triton.tiles import LINE, block_along, tile_warps

# Cache positions that one block of a decode step processes at a time, the least that it does in total, and the most
# blocks per head. Their results are merged by the next launch.
POSITIONS, LEAST_SPAN, MOST_SPANS = 32, 64, 64


def schedules(
    shapes: Mapping[str, Shape], attributes: Attributes, *, itemsize: int, max_batch: int, max_seqlen: int
) -> list[Schedule]:
    """See `triton.schedule.Planner`."""
    ranges = tiers(max_batch, max_seqlen)
    end = BlockEnd.of(shapes, attributes)
    n_heads, window = int(attributes["n_heads"]), int(attributes.get("window", 0))
    return [plan_sparse_attention(shapes, itemsize, tier, n_heads, end, window) for tier in ranges]


def plan_sparse_attention(
    shapes: Mapping[str, Shape], itemsize: int, tier: Tier, n_heads: int, end: BlockEnd | None = None, window: int = 0
) -> Schedule:
    """How to launch ``SparseAttention`` in a tier.

    Args:
        shapes: shapes of the present inputs, by name.
        itemsize: bytes per element of the weights.
        end: if the op is a whole block of a layer.
        window: how many of the last positions a token sees; 0 means all.
    """
    width = shapes["x"][-1]
    _, kv_heads, capacity, head_dim = shapes["key"]
    workspace = Workspace()
    choice = _choose(workspace, shapes, tier, n_heads)
    cap = choice.cap
    query, context = (workspace.take(tier.tokens * cap * head_dim, "T", itemsize) for _ in range(2))
    listed: dict[str, Operand] = {"indices": choice.indices, "count": choice.attended}
    constants = {"CAP": cap, "HEADS": n_heads, "HEAD_DIM": head_dim, "KV_HEADS": kv_heads, "CAPACITY": capacity}
    counters = counters_of(workspace, tier, width, itemsize)
    cleared, cleared_count = clearing(counters)
    written = {**choice.operands, **cleared, "query": query}
    project = _project(shapes, tier, choice, written, constants | cleared_count, itemsize)
    read: dict[str, Operand] = {name: name for name in ("key", "value", "lengths")}
    sizes = constants | {
        "SCALE": head_dim**-0.5,
        "WINDOW": window,
        "BLOCK_H": max(16, triton.next_power_of_2(head_dim)),
    }
    operands = read | listed | {"query": query, "context": context}
    hidden, spans = context, None
    if tier.max_seqlen > 1:
        attend = _prompt(tier, operands, sizes, itemsize)
    else:
        attend, partials = _decode(workspace, tier, operands, sizes)
        if partials is not None:
            hidden, spans = partials, spans_of(capacity)
    rest = None
    if choice.active is not None:
        rest = Rest("c_o", "cs_o", None, *shapes["c_o"][1:])
    back = back_calls(
        workspace,
        tier,
        hidden,
        "w_o",
        "b_o" if "b_o" in shapes else None,
        cap=cap,
        units=n_heads,
        itemsize=itemsize,
        group=head_dim,
        width=width,
        indices=choice.indices,
        count=choice.active or "count",
        rest=rest,
        spans=spans,
        end=end,
        counters=counters,
    )
    return Schedule(tier.max_batch, tier.max_seqlen, workspace.bytes, (*choice.calls, project, attend, *back))


@dataclass(frozen=True)
class Choice:
    """The heads that are attended.

    Attributes:
        calls: the launches that score them.
        operands, constants: those of `project_heads` that list or order the heads.
        indices, attended: the heads, and their number, after this launch.
        cap: length of the indices.
        active: number of heads at the start of the indices that have full rows; the others have rows of the low-bit
            copy. None without a copy.
    """

    calls: tuple[Call, ...]
    operands: Mapping[str, Operand]
    constants: Mapping[str, int]
    indices: Operand
    attended: Operand
    cap: int
    active: Operand | None


def _choose(workspace: Workspace, shapes: Mapping[str, Shape], tier: Tier, n_heads: int) -> Choice:
    listed = shapes["indices"][0] if "indices" in shapes else n_heads
    constants = {"LISTED": listed, "TOGETHER": 1}
    operands: dict[str, Operand] = {
        name: name for name in ("count", "indices", "rest", "c_q", "cs_q") if name in shapes
    }
    if "c_q" not in shapes:
        return Choice((), operands, constants, "indices", "count", listed, None)
    order = workspace.take(n_heads, "int32", 4)
    active, attended = (workspace.take(1, "int32", 4) for _ in range(2))
    operands |= {"order": order, "active": active, "attended": attended}
    if "indices" in shapes:
        return Choice((), operands, constants, order, attended, n_heads, active)
    groups, width = shapes["score_weight"]
    scores = workspace.take(groups, "float32", 4)
    names = ("x", "score_weight", "score_bias", "count")
    score = Call(
        score_heads,
        (Size(groups), Size(), Size()),
        {name: name for name in names} | {"scores": scores, "tokens": tier.size},
        {"HEADS": n_heads, "WIDTH": width, "BLOCK_K": min(2048, max(128, triton.next_power_of_2(width)))},
    )
    operands |= {"scores": scores, "chosen": "chosen"}
    return Choice((score,), operands, constants | {"TOGETHER": n_heads // groups}, order, attended, n_heads, active)


def _project(
    shapes: Mapping[str, Shape],
    tier: Tier,
    choice: Choice,
    operands: Mapping[str, Operand],
    constants: Mapping[str, int],
    itemsize: int,
) -> Call:
    width, head_dim = shapes["x"][-1], constants["HEAD_DIM"]
    half = (head_dim + 1) // 2
    one = tier.block == GEMV
    rows = min(8 if one else 64, max(16, triton.next_power_of_2(half)))
    inputs = [name for name in ("x", "w_q", "b_q", "w_kv", "b_kv", "c_kv", "cs_kv", "cos", "sin") if name in shapes]
    heads = constants["CAP"]
    if "w_kv" in shapes:
        inputs += ["lengths", "key", "value"]
        heads += 2 * constants["KV_HEADS"]
    block = tier.block if choice.active is None else token_block(tier, itemsize)
    return Call(
        project_heads,
        (Size(heads * triton.cdiv(half, rows)), replace(tier.size, divisor=block), Size()),
        {name: name for name in inputs} | {**operands, "tokens": tier.size},
        {
            **constants,
            **choice.constants,
            "WIDTH": width,
            **word_constants(shapes.get("c_q"), tier, rows),
            "BLOCK_M": block,
            "BLOCK_N": rows,
            "BLOCK_K": block_along(width, tier.block, itemsize),
        },
        warps=tile_warps(tier.block, itemsize),
        stages=3,
    )


def spans_of(capacity: int) -> Spans:
    """The spans into which a decode step splits a cache."""
    span = max(LEAST_SPAN, triton.next_power_of_2(triton.cdiv(capacity, MOST_SPANS)))
    return Spans(triton.cdiv(capacity, span), span, capacity)


def _decode(
    workspace: Workspace, tier: Tier, operands: Mapping[str, Operand], constants: Mapping[str, int | float]
) -> tuple[Call, Scratch | None]:
    """The launch of a step's attention, and its partial results if there are several spans."""
    cap, head_dim = int(constants["CAP"]), int(constants["HEAD_DIM"])
    found = spans_of(int(constants["CAPACITY"]))
    several: dict[str, Scratch] = {}
    if found.splits > 1:
        several["partials"] = workspace.take(tier.max_batch * cap * found.splits * (head_dim + 2), "float32", 4)
    attend = Call(
        decode_attention,
        (Size(cap), tier.size, Size(found.splits)),
        {**operands, **several},
        {**constants, "SPLITS": found.splits, "SPAN": found.span, "BLOCK_P": POSITIONS},
    )
    return attend, several.get("partials")


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
