"""``NestedGather`` as a function of PyTorch tensors; see `triton.launch`."""

from __future__ import annotations

import torch
from torch import Tensor

from shadowllm.plugins.ops.nested_gather.schedule import schedules
from shadowllm.plugins.ops.nested_gather.schema import NESTED_GATHER
from shadowllm.plugins.triton.launch import check_copy, launch


def nested_gather(ids: Tensor, w: Tensor, copy: Tensor, scales: Tensor, *, width: int) -> Tensor:
    """``NestedGather``: ids int32 ``(R,)``, w uint8 ``(N, bytes)``, copy ``(N, blocks, bytes)`` -> ``(R, width)``.

    Raises:
        ValueError: a tensor has the wrong type, device, layout or shape; or a row has not ``width`` elements, or the
            size of a block is not a power of two.
    """
    check_copy(NESTED_GATHER, "copy", copy, width)
    y = torch.empty(len(ids), width, device=copy.device)
    launch(NESTED_GATHER, schedules, {"ids": ids, "w": w, "copy": copy, "scales": scales}, {"width": width}, y)
    return y
