"""``SparseMLP`` as a function of PyTorch tensors; see `triton.launch`."""

from __future__ import annotations

import torch
from torch import Tensor

from shadowllm.plugins.ops.sparse_mlp.schedule import schedules
from shadowllm.plugins.ops.sparse_mlp.schema import SPARSE_MLP
from shadowllm.plugins.triton.launch import check_activation, launch


def sparse_mlp(
    x: Tensor,
    indices: Tensor,
    count: Tensor,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    *,
    activation: str,
) -> Tensor:
    """``SparseMLP``: x ``(B, S, D)``, weights ``(F, D)``, count an int32 scalar on the device -> ``(B, S, D)``.

    Raises:
        ValueError: a tensor has the wrong type, device, layout or shape, or the activation is unknown.
    """
    check_activation(SPARSE_MLP, activation)
    inputs = {
        "x": x,
        "indices": indices,
        "count": count,
        "w_gate": w_gate,
        "b_gate": b_gate,
        "w_up": w_up,
        "b_up": b_up,
        "w_down": w_down,
        "b_down": b_down,
    }
    return launch(SPARSE_MLP, schedules, inputs, {"activation": activation}, torch.empty_like(x))
