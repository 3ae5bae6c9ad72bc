"""How ``SparseMLP`` is launched."""

from __future__ import annotations

from collections.abc import Mapping

from shadowllm.plugins.kernel_program import Size
from shadowllm.plugins.ops.sparse_mlp.kernel import mlp_hidden
from shadowllm.plugins.triton.output_projection import back_calls
from shadowllm.plugins.triton.schedule import GEMV, Call, Schedule, Shape, Tier, Workspace, tiers
from shadowllm.plugins.triton.tiles import block_along, tile_warps


def schedules(
    shapes: Mapping[str, Shape], attributes: Mapping[str, int | str], *, itemsize: int, max_batch: int, max_seqlen: int
) -> list[Schedule]:
    """See `triton.schedule.Planner`."""
    ranges = tiers(max_batch, max_seqlen)
    return [plan_sparse_mlp(shapes, itemsize, tier, str(attributes["activation"])) for tier in ranges]


def plan_sparse_mlp(shapes: Mapping[str, Shape], itemsize: int, tier: Tier, activation: str) -> Schedule:
    """How to launch ``SparseMLP`` in a tier.

    Args:
        shapes: shapes of the present inputs, by name.
        itemsize: bytes per element of the weights.
    """
    neurons, width = shapes["w_up"]
    (cap,) = shapes["indices"]
    workspace = Workspace()
    hidden = workspace.take(tier.tokens * cap, "T", itemsize)
    # For one token, a block has few rows, so that many blocks load at the same time.
    rows = 8 if tier.block == GEMV else 64
    inputs = [name for name in ("x", "indices", "count", "w_gate", "b_gate", "w_up", "b_up") if name in shapes]
    up = Call(
        mlp_hidden,
        (Size(cap, divisor=rows), tier.tiles, Size()),
        {name: name for name in inputs} | {"hidden": hidden, "tokens": tier.size},
        {
            "CAP": cap,
            "NEURONS": neurons,
            "WIDTH": width,
            "ACTIVATION": activation,
            "BLOCK_M": tier.block,
            "BLOCK_N": rows,
            "BLOCK_K": block_along(width, tier.block, itemsize),
        },
        warps=tile_warps(tier.block, itemsize),
        stages=3,
    )
    back = back_calls(
        workspace,
        tier,
        hidden,
        "w_down",
        "b_down" if "b_down" in shapes else None,
        cap=cap,
        units=neurons,
        itemsize=itemsize,
        group=1,
        width=width,
        skip_zeros=activation == "relu" and "w_gate" not in shapes,
    )
    return Schedule(tier.max_batch, tier.max_seqlen, workspace.bytes, (up, *back))
