"""``ShortlistLogits`` as a function of PyTorch tensors; see `triton.launch`."""

from __future__ import annotations

import torch
from torch import Tensor

from shadowllm.plugins.ops.shortlist_logits.schedule import schedules
from shadowllm.plugins.ops.shortlist_logits.schema import SHORTLIST_LOGITS
from shadowllm.plugins.triton.launch import launch


def shortlist_logits(
    x: Tensor,
    table: Tensor,
    copy: Tensor,
    scales: Tensor,
    errors: Tensor,
    shortlist: Tensor,
    certify: Tensor,
    weighting: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``ShortlistLogits``: x ``(R, D)``, table ``(V, D)`` -> logits float32 ``(R, V)``, recomputed int32 ``(R,)``.

    A negative shortlist is taken for 0.

    Raises:
        ValueError: a tensor has the wrong type, device, layout or shape; or the blocks do not cover x, or their size is
            not a power of two.
    """
    rows, blocks, width = copy.shape
    if width < 4 or width & (width - 1) or not (blocks - 1) * 2 * width < x.shape[-1] <= blocks * 2 * width:
        raise ValueError(f"ShortlistLogits has a copy {tuple(copy.shape)} for x {tuple(x.shape)}")
    inputs = {
        "x": x,
        "table": table,
        "copy": copy,
        "scales": scales,
        "errors": errors,
        "shortlist": shortlist,
        "certify": certify,
        "weighting": weighting,
    }
    logits = torch.empty(len(x), rows, device=x.device)
    recomputed = torch.empty(len(x), dtype=torch.int32, device=x.device)
    launch(SHORTLIST_LOGITS, schedules, inputs, {}, logits, recomputed)
    return logits, recomputed
