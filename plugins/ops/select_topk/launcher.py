"""``SelectTopK`` as a function of PyTorch tensors; see `triton.launch`."""

from __future__ import annotations

import torch
from torch import Tensor

from shadowllm.plugins.ops.select_topk.schedule import schedules
from shadowllm.plugins.ops.select_topk.schema import SELECT_TOPK
from shadowllm.plugins.triton.launch import launch


def select_topk(scores: Tensor, counts: Tensor, cap: int) -> Tensor:
    """``SelectTopK``: scores float32 ``(R, N)``, counts int32 ``(R,)`` -> int32 ``(R, cap)``.

    Raises:
        ValueError: a tensor has the wrong type, device, layout or shape, or there are fewer scores than ``cap``.
    """
    if cap > scores.shape[-1]:
        raise ValueError(f"SelectTopK cannot choose {cap} of {scores.shape[-1]}")
    inputs = {"scores": scores, "counts": counts}
    indices = torch.empty(scores.shape[0], cap, dtype=torch.int32, device=scores.device)
    launch(SELECT_TOPK, schedules, inputs, {"cap": cap}, indices)
    return indices
