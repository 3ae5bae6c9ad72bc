"""How ``SparseMLP`` is launched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import triton

from shadowllm.models.activations import RELU_LIKE
from shadowllm.plugins.kernel_program import Size
from shadowllm.plugins.ops.score_neurons.schedule import score_call
from shadowllm.plugins.ops.sparse_mlp.kernel import gate_first, list_fired, mlp_hidden
from shadowllm.plugins.schema import Attributes
from shadowllm.plugins.triton.block_end import BlockEnd
from shadowllm.plugins.triton.block_sync import Counters, clearing
from shadowllm.plugins.triton.low_bit import is_residual, token_block, word_constants
from shadowllm.plugins.triton.output_projection import Rest, back_calls, counters_of
from shadowllm.plugins.triton.schedule import GEMV, Call, Operand, Schedule, Scratch, Shape, Tier, Workspace, tiers
from shadowllm.plugins.triton.tiles import activation_constants, block_along, tile_warps

CHOICE_BLOCK = 4096  # scores that a block of `mlp_hidden` loads at a time to choose the neurons


def schedules(
    shapes: Mapping[str, Shape], attributes: Attributes, *, itemsize: int, max_batch: int, max_seqlen: int
) -> list[Schedule]:
    """See `triton.schedule.Planner`."""
    plan = plan_gate_first if shapes.keys().isdisjoint(("indices", "c_up")) else plan_sparse_mlp
    activation = activation_constants(attributes)
    end = BlockEnd.of(shapes, attributes)
    return [plan(shapes, itemsize, tier, activation, end) for tier in tiers(max_batch, max_seqlen)]


def plan_gate_first(
    shapes: Mapping[str, Shape],
    itemsize: int,
    tier: Tier,
    activation: Mapping[str, float | str],
    end: BlockEnd | None,
) -> Schedule:
    """How to launch ``SparseMLP`` without indices and without a copy; arguments as for `plan_sparse_mlp`."""
    neurons, width = shapes["w_up"]
    workspace = Workspace()
    hidden = workspace.take(tier.tokens * neurons, "T", itemsize)
    fired = workspace.take(-(-tier.tokens // tier.block) * neurons, "int32", 4)
    names = {"w_first": "w_gate", "b_first": "b_gate", "w_up": "w_up", "b_up": "b_up"}
    if "w_gate" not in shapes:
        names = {"w_first": "w_up", "b_first": "b_up"}
    counters = counters_of(workspace, tier, width, itemsize)
    cleared, cleared_count = clearing(counters)
    operands: dict[str, Operand] = {"x": "x", "hidden": hidden, "fired": fired, **cleared, "tokens": tier.size}
    first = Call(
        gate_first,
        (Size(neurons, divisor=_rows(tier)), tier.tiles, Size()),
        operands | {parameter: name for parameter, name in names.items() if name in shapes},
        {"NEURONS": neurons, "WIDTH": width, **activation, **cleared_count, **_tile(tier, width, itemsize)},
        warps=tile_warps(tier.block, itemsize),
        stages=3,
    )
    listed = Call(
        list_fired,
        (Size(), Size(), Size()),
        {"fired": fired, "chosen": "chosen", "tiles": tier.tiles},
        {"NEURONS": neurons, "BLOCK": 1024},
    )
    back = back_calls(
        workspace,
        tier,
        hidden,
        "w_down",
        "b_down" if "b_down" in shapes else None,
        cap=neurons,
        units=neurons,
        group=1,
        itemsize=itemsize,
        width=width,
        skip_zeros=True,
        indices=None,
        count=None,
        end=end,
        counters=counters,
    )
    # A block of a layer does not list the neurons, because nothing reads the list.
    listing = () if end is not None else (listed,)
    return Schedule(tier.max_batch, tier.max_seqlen, workspace.bytes, (first, *listing, *back))


def _rows(tier: Tier) -> int:
    """Rows of gate and up in a block. For one token, they are few, so that many blocks load at the same time."""
    return 8 if tier.block == GEMV else 64


def _tile(tier: Tier, width: int, itemsize: int) -> dict[str, int]:
    return {"BLOCK_M": tier.block, "BLOCK_N": _rows(tier), "BLOCK_K": block_along(width, tier.block, itemsize)}


def plan_sparse_mlp(
    shapes: Mapping[str, Shape],
    itemsize: int,
    tier: Tier,
    activation: Mapping[str, float | str],
    end: BlockEnd | None,
) -> Schedule:
    """How to launch ``SparseMLP`` in a tier.

    Args:
        shapes: shapes of the present inputs, by name.
        itemsize: bytes per element of the weights.
        activation: `activation_constants`.
        end: if the op is a whole block of a layer.
    """
    neurons, width, nested = shapes["w_up"][0], shapes["x"][-1], is_residual(shapes["w_up"])
    workspace = Workspace()
    counters = counters_of(workspace, tier, width, itemsize)
    cleared, cleared_count = clearing(counters)
    score, products, choice = _copied(workspace, shapes, itemsize, tier, activation)
    indices = "indices" if "indices" in shapes else "chosen"
    cap = shapes.get("indices", (neurons,))[0]
    hidden = workspace.take(tier.tokens * cap, "T", itemsize)
    inputs = [name for name in ("x", "count", "w_gate", "b_gate", "w_up", "b_up") if name in shapes]
    inputs += [name for name in ("c_gate", "cs_gate", "c_up", "cs_up") if nested and name in shapes]
    zeroed: dict[str, Operand] = {} if products is None else {"products": products}
    tile = _tile(tier, width, itemsize) | word_constants(shapes["c_up"] if nested else None, tier, _rows(tier))
    tile |= {"BLOCK_M": token_block(tier, itemsize)} if nested else {}
    up = Call(
        mlp_hidden,
        (Size(cap, divisor=_rows(tier)), replace(tier.size, divisor=tile["BLOCK_M"]), Size()),
        {name: name for name in inputs}
        | {**zeroed, **choice, **cleared, "indices": indices, "hidden": hidden, "tokens": tier.size},
        {"CAP": cap, "NEURONS": neurons, "WIDTH": width, **activation, **tile, **cleared_count}
        | {"BLOCK_C": min(CHOICE_BLOCK, max(16, triton.next_power_of_2(neurons)))},
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
        skip_zeros=activation["ACTIVATION"] in RELU_LIKE,
        indices=indices,
        rest=None if products is None else Rest("c_down", "cs_down", products, *shapes["c_down"][1:]),
        end=end,
        counters=counters,
    )
    return Schedule(tier.max_batch, tier.max_seqlen, workspace.bytes, (*score, up, *back))


def _copied(
    workspace: Workspace,
    shapes: Mapping[str, Shape],
    itemsize: int,
    tier: Tier,
    activation: Mapping[str, float | str],
) -> tuple[list[Call], Scratch | None, dict[str, Operand]]:
    """The launch that reads the copy, the products of all neurons from it, and the operands with which others choose.

    Without indices the active neurons are chosen, from scores that are made in the same pass over the copy.
    """
    if "c_up" not in shapes:
        return [], None, {}
    neurons, width = shapes["w_up"][0], shapes["x"][-1]
    products = workspace.take(tier.tokens * neurons, "T", itemsize)
    read = {"up": "c_up", "up_scales": "cs_up"}
    if "c_gate" in shapes:
        read |= {"gate": "c_gate", "gate_scales": "cs_gate"}
    read |= {name: name for name in ("x", "b_gate", "b_up", "count", "rest") if name in shapes}
    operands: dict[str, Operand] = {**read, "products": products}
    counters = None
    choice: dict[str, Operand] = {}
    if "indices" not in shapes:
        scores, counters = workspace.take(neurons, "float32", 4), Counters.take(workspace, 2)
        operands |= {"scores": scores, "down_norms": "down_norms"}
        choice = {"scores": scores, "choosing": counters.memory}
    call = score_call(
        tier,
        operands,
        neurons=neurons,
        first_up=0,
        width=width,
        copy=shapes["c_up"],
        itemsize=itemsize,
        activation=activation,
        counters=counters,
    )
    return [call], products, choice
