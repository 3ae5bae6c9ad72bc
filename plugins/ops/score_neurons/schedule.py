"""How ``ScoreNeurons`` is launched."""

from __future__ import annotations

from collections.abc import Mapping

from shadowllm.plugins.kernel_program import Size
from shadowllm.plugins.ops.score_neurons.kernel import score_neurons
from shadowllm.plugins.schema import Attributes
from shadowllm.plugins.triton.block_sync import Counters, clearing
from shadowllm.plugins.triton.low_bit import word_constants
from shadowllm.plugins.triton.schedule import DOT, GEMV, Call, Operand, Schedule, Shape, Tier, tiers
from shadowllm.plugins.triton.tiles import activation_constants, tile_warps


def schedules(
    shapes: Mapping[str, Shape], attributes: Attributes, *, itemsize: int, max_batch: int, max_seqlen: int
) -> list[Schedule]:
    """See `triton.schedule.Planner`."""
    ranges = tiers(max_batch, max_seqlen)
    return [plan_score_neurons(shapes, itemsize, tier, activation_constants(attributes)) for tier in ranges]


def plan_score_neurons(
    shapes: Mapping[str, Shape], itemsize: int, tier: Tier, activation: Mapping[str, float | str]
) -> Schedule:
    """How to launch ``ScoreNeurons`` in a tier.

    Args:
        shapes: shapes of the inputs, by name; the copy's last dimension counts int32 words.
        itemsize: bytes per element of x.
        activation: `activation_constants`.
    """
    rows = shapes["copy"][0]
    gated = rows == 2 * shapes["down_norms"][0]
    read = {"up": "copy", "up_scales": "scales"} | ({"gate": "copy", "gate_scales": "scales"} if gated else {})
    names = [name for name in ("x", "b_gate", "b_up", "down_norms", "count") if name in shapes]
    call = score_call(
        tier,
        {name: name for name in names} | read | {"scores": "scores"},
        neurons=shapes["down_norms"][0],
        first_up=rows // 2 if gated else 0,
        width=shapes["x"][-1],
        copy=shapes["copy"],
        itemsize=itemsize,
        activation=activation,
    )
    return Schedule(tier.max_batch, tier.max_seqlen, 0, (call,))


def score_call(
    tier: Tier,
    operands: Mapping[str, Operand],
    *,
    neurons: int,
    first_up: int,
    width: int,
    copy: Shape,
    itemsize: int,
    activation: Mapping[str, float | str],
    counters: Counters | None = None,
) -> Call:
    """The launch of the kernel, with all its operands except the number of tokens.

    Args:
        first_up: row of ``up`` with the first neuron.
        width: size of x.
        copy: shape of a copy; its last dimension counts int32 words.
        itemsize: bytes per element of x.
        activation: `activation_constants`.
        counters: to be set to zero for a later launch.
    """
    cleared, cleared_count = clearing(counters)
    # Prompts are rarely scored, and a larger tile of tokens would spill registers in float32.
    block_m, block_n = (GEMV, 4) if tier.block == GEMV else (DOT, 32)
    return Call(
        score_neurons,
        (Size(neurons, divisor=block_n), Size(), Size()),
        {**operands, **cleared, "tokens": tier.size},
        {
            "FIRST_UP": first_up,
            "NEURONS": neurons,
            "WIDTH": width,
            **word_constants(copy, tier, block_n),
            **activation,
            **cleared_count,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
        },
        warps=tile_warps(tier.block, itemsize),
        stages=3,
    )
