"""``ScoreNeurons`` as a function of PyTorch tensors; see `triton.launch`."""

from __future__ import annotations

import torch
from torch import Tensor

from shadowllm.plugins.ops.score_neurons.schedule import schedules
from shadowllm.plugins.ops.score_neurons.schema import SCORE_NEURONS
from shadowllm.plugins.triton.launch import check_activation, launch


def score_neurons(
    x: Tensor,
    copy: Tensor,
    scales: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    down_norms: Tensor,
    count: Tensor,
    *,
    activation: str,
    threshold: float = 0.0,
) -> Tensor:
    """``ScoreNeurons``: x ``(B, S, D)``, copy uint8 ``(rows, blocks, bytes)``, count an int32 scalar -> ``(1, F)``.

    Raises:
        ValueError: a tensor has the wrong type, device, layout or shape; the rows do not match the neurons; the
            blocks do not cover x, or their size is not a power of two; or the activation is unknown.
    """
    check_activation(SCORE_NEURONS, activation)
    rows, blocks, width = copy.shape
    if rows not in (len(down_norms), 2 * len(down_norms)) or width < 4 or width & (width - 1):
        raise ValueError(f"ScoreNeurons has a copy {tuple(copy.shape)} for {len(down_norms)} neurons")
    if not (blocks - 1) * 2 * width < x.shape[-1] <= blocks * 2 * width:
        raise ValueError(f"ScoreNeurons has a copy {tuple(copy.shape)} for x {tuple(x.shape)}")
    inputs = {
        "x": x,
        "copy": copy,
        "scales": scales,
        "b_gate": b_gate,
        "b_up": b_up,
        "down_norms": down_norms,
        "count": count,
    }
    scores = torch.empty(1, len(down_norms), device=x.device)
    launch(SCORE_NEURONS, schedules, inputs, {"activation": activation, "threshold": threshold}, scores)
    return scores
