"""``NestedLinear`` as a function of PyTorch tensors; see `triton.launch`."""

from __future__ import annotations

import torch
from torch import Tensor

from shadowllm.plugins.ops.nested_linear.schedule import schedules
from shadowllm.plugins.ops.nested_linear.schema import NESTED_LINEAR
from shadowllm.plugins.triton.launch import check_copy, launch


def nested_linear(x: Tensor, w: Tensor, copy: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """``NestedLinear``: x ``(R, D)``, w uint8 ``(N, bytes)``, copy uint8 ``(N, blocks, bytes)`` -> ``(R, N)``.

    Raises:
        ValueError: a tensor has the wrong type, device, layout or shape; or the blocks do not cover x, or their size
            is not a power of two.
    """
    check_copy(NESTED_LINEAR, "copy", copy, x.shape[-1])
    y = torch.empty(len(x), len(copy), dtype=x.dtype, device=x.device)
    inputs = {"x": x, "w": w, "copy": copy, "scales": scales, "bias": bias}
    launch(NESTED_LINEAR, schedules, inputs, {}, y)
    return y
