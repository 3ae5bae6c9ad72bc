"""How ``SparseMLP`` is launched."""

from __future__ import annotations

from collections.abc import Mapping

from shadowllm.plugins.kernel_program import Size
from shadowllm.plugins.ops.score_neurons.schedule import score_call
from shadowllm.plugins.ops.select_topk.schedule import topk_call
from shadowllm.plugins.ops.sparse_mlp.kernel import mlp_hidden
from shadowllm.plugins.triton.output_projection import back_calls
from shadowllm.plugins.triton.rest_projection import Rest
from shadowllm.plugins.triton.schedule import GEMV, Call, Operand, Schedule, Scratch, Shape, Tier, Workspace, tiers
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
    workspace = Workspace()
    copied, products = _copied(workspace, shapes, itemsize, tier, activation)
    indices = "indices" if "indices" in shapes else "chosen"
    cap = shapes.get("indices", (neurons,))[0]
    hidden = workspace.take(tier.tokens * cap, "T", itemsize)
    # For one token, a block has few rows, so that many blocks load at the same time.
    rows = 8 if tier.block == GEMV else 64
    inputs = [name for name in ("x", "count", "w_gate", "b_gate", "w_up", "b_up") if name in shapes]
    zeroed: dict[str, Operand] = {} if products is None else {"products": products}
    up = Call(
        mlp_hidden,
        (Size(cap, divisor=rows), tier.tiles, Size()),
        {name: name for name in inputs} | zeroed | {"indices": indices, "hidden": hidden, "tokens": tier.size},
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
        indices=indices,
        rest=None if products is None else Rest(products, None, "count", "c_down", "cs_down", *shapes["c_down"][1:]),
    )
    return Schedule(tier.max_batch, tier.max_seqlen, workspace.bytes, (*copied, up, *back))


def _copied(
    workspace: Workspace, shapes: Mapping[str, Shape], itemsize: int, tier: Tier, activation: str
) -> tuple[list[Call], Scratch | None]:
    """The launches before the active neurons are computed, and the products of all neurons from the copy.

    Without indices the active neurons are chosen, from scores that are made in the same pass over the copy.
    """
    if "c_up" not in shapes:
        return [], None
    neurons, width = shapes["w_up"]
    products = workspace.take(tier.tokens * neurons, "T", itemsize)
    read = {"up": "c_up", "up_scales": "cs_up"}
    if "c_gate" in shapes:
        read |= {"gate": "c_gate", "gate_scales": "cs_gate"}
    read |= {name: name for name in ("x", "b_gate", "b_up", "count", "rest") if name in shapes}
    operands: dict[str, Operand] = {**read, "products": products}
    choose = []
    if "indices" not in shapes:
        scores = workspace.take(neurons, "float32", 4)
        operands |= {"scores": scores, "down_norms": "down_norms"}
        choose.append(topk_call(scores, "count", "chosen", rows=Size(), width=neurons, cap=neurons))
    call = score_call(
        tier,
        operands,
        neurons=neurons,
        first_up=0,
        width=width,
        copy=shapes["c_up"],
        itemsize=itemsize,
        activation=activation,
    )
    return [call, *choose], products
