"""``SparseAttention`` as a function of PyTorch tensors; see `triton.launch`."""

from __future__ import annotations

import torch
from torch import Tensor

from shadowllm.plugins.ops.sparse_attention.schedule import schedules
from shadowllm.plugins.ops.sparse_attention.schema import SPARSE_ATTENTION
from shadowllm.plugins.triton.launch import launch


def sparse_attention(
    x: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    indices: Tensor,
    count: Tensor,
    w_q: Tensor,
    b_q: Tensor | None,
    w_o: Tensor,
    b_o: Tensor | None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    n_heads: int,
) -> Tensor:
    """``SparseAttention``: x ``(B, S, D)``, cache ``(B, n_kv, C, d)`` that includes this step -> ``(B, S, D)``.

    Raises:
        ValueError: a tensor has the wrong type, device, layout or shape, or the heads do not divide evenly.
    """
    if w_q.shape[0] != n_heads * key.shape[-1] or n_heads % key.shape[1]:
        raise ValueError(f"SparseAttention has {n_heads} heads, w_q {tuple(w_q.shape)} and key {tuple(key.shape)}")
    if (cos is None) != (sin is None) or (cos is not None and key.shape[-1] % 2):
        raise ValueError("SparseAttention needs both cos and sin or neither, and even heads to rotate")
    inputs = {
        "x": x,
        "key": key,
        "value": value,
        "lengths": lengths,
        "indices": indices,
        "count": count,
        "w_q": w_q,
        "b_q": b_q,
        "w_o": w_o,
        "b_o": b_o,
        "cos": cos,
        "sin": sin,
    }
    return launch(SPARSE_ATTENTION, schedules, inputs, {"n_heads": n_heads}, torch.empty_like(x))
