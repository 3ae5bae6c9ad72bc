"""``SparseMLP`` as a function of PyTorch tensors; see `triton.launch`."""

from __future__ import annotations

import torch
from torch import Tensor

from shadowllm.models.activations import RELU_LIKE
from shadowllm.plugins.ops.sparse_mlp.schedule import schedules
from shadowllm.plugins.ops.sparse_mlp.schema import SPARSE_MLP
from shadowllm.plugins.schema import Attributes
from shadowllm.plugins.triton.launch import BlockInputs, check_activation, check_rest, launch_op


def sparse_mlp(
    x: Tensor,
    indices: Tensor | None,
    count: Tensor,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    rest: Tensor | None = None,
    c_gate: Tensor | None = None,
    c_up: Tensor | None = None,
    c_down: Tensor | None = None,
    cs_gate: Tensor | None = None,
    cs_up: Tensor | None = None,
    cs_down: Tensor | None = None,
    down_norms: Tensor | None = None,
    *,
    activation: str,
    threshold: float = 0.0,
    block: BlockInputs | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``SparseMLP``: x ``(B, S, D)``, weights ``(F, D)``, count and rest int32 scalars on the device -> ``(B, S, D)``.

    Args:
        block: makes the op a whole block of a layer in a one-token step.

    Returns:
        y, and the neurons that the op chose, int32 ``(F,)``; None with indices, and for a block that chooses by gate.

    Raises:
        ValueError: a tensor has the wrong type, device, layout or shape; inputs for the rest or the choice are missing;
            or the activation is unknown.
    """
    check_activation(SPARSE_MLP, activation)
    copies = {
        "c_gate": c_gate,
        "c_up": c_up,
        "c_down": c_down,
        "cs_gate": cs_gate,
        "cs_up": cs_up,
        "cs_down": cs_down,
    }
    gated = w_gate is not None
    if (c_gate is not None or cs_gate is not None) and not gated:
        raise ValueError("SparseMLP has a copy of gate and no w_gate")
    check_rest(SPARSE_MLP, rest, {n: t for n, t in copies.items() if gated or "gate" not in n}, x.shape[-1])
    _check_choice(indices, c_up, down_norms, activation)
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
        "rest": rest,
        **copies,
        "down_norms": down_norms,
    }
    attributes: Attributes = {"activation": activation, "threshold": threshold}
    chosen = None
    if indices is None and (block is None or c_up is not None):
        chosen = torch.empty(len(w_up), dtype=torch.int32, device=x.device)
    return launch_op(SPARSE_MLP, schedules, inputs, attributes, chosen, block), chosen


def _check_choice(indices: Tensor | None, copy: Tensor | None, down_norms: Tensor | None, activation: str) -> None:
    """Check that there is something to choose the neurons by: a low-bit copy, or gates that may be zero."""
    if indices is not None:
        return
    if (copy is None) != (down_norms is None):
        raise ValueError("SparseMLP needs indices, or both a low-bit copy and down_norms to choose by")
    if copy is None and activation not in RELU_LIKE:
        raise ValueError(f"SparseMLP needs indices or a low-bit copy, because {activation} is never zero")
