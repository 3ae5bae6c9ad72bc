"""``SparseAttention`` as a function of PyTorch tensors; see `triton.launch`."""

from __future__ import annotations

import torch
from torch import Tensor

from shadowllm.plugins.ops.sparse_attention.schedule import schedules
from shadowllm.plugins.ops.sparse_attention.schema import SPARSE_ATTENTION
from shadowllm.plugins.triton.launch import BlockInputs, check_rest, launch_op


def sparse_attention(
    x: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    indices: Tensor | None,
    count: Tensor,
    w_q: Tensor,
    b_q: Tensor | None,
    w_o: Tensor,
    b_o: Tensor | None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    rest: Tensor | None = None,
    c_q: Tensor | None = None,
    c_o: Tensor | None = None,
    cs_q: Tensor | None = None,
    cs_o: Tensor | None = None,
    score_weight: Tensor | None = None,
    score_bias: Tensor | None = None,
    *,
    n_heads: int,
    window: int = 0,
    block: BlockInputs | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``SparseAttention``: x ``(B, S, D)``, cache ``(B, n_kv, C, d)`` that includes this step -> ``(B, S, D)``.

    Args:
        block: makes the op a whole block of a layer in a one-token step. If it has ``w_kv``, the cache need not include
            the step yet: its keys and values are computed and written.

    Returns:
        y, and the heads that the op chose, int32 ``(H,)``; None with indices.

    Raises:
        ValueError: a tensor has the wrong type, device, layout or shape; the heads do not divide evenly; the window
            is negative; or inputs for the rest or the choice are missing.
    """
    if w_q.shape[0] != n_heads * key.shape[-1] or n_heads % key.shape[1]:
        raise ValueError(f"SparseAttention has {n_heads} heads, w_q {tuple(w_q.shape)} and key {tuple(key.shape)}")
    if window < 0:
        raise ValueError(f"SparseAttention has a window of {window} positions")
    if (cos is None) != (sin is None) or (cos is not None and key.shape[-1] % 2):
        raise ValueError("SparseAttention needs both cos and sin or neither, and even heads to rotate")
    copies = {"c_q": c_q, "c_o": c_o, "cs_q": cs_q, "cs_o": cs_o}
    check_rest(SPARSE_ATTENTION, rest, copies, x.shape[-1])
    if block is not None and block.w_kv is not None and len(block.w_kv) != 2 * key.shape[1] * key.shape[-1]:
        raise ValueError(f"SparseAttention has w_kv {tuple(block.w_kv.shape)} and key {tuple(key.shape)}")
    if indices is None:
        _check_choice(n_heads, c_q, score_weight, score_bias)
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
        "rest": rest,
        **copies,
        "score_weight": score_weight,
        "score_bias": score_bias,
    }
    chosen = None if indices is not None else torch.empty(n_heads, dtype=torch.int32, device=x.device)
    return launch_op(SPARSE_ATTENTION, schedules, inputs, {"n_heads": n_heads, "window": window}, chosen, block), chosen


def _check_choice(n_heads: int, copy: Tensor | None, score_weight: Tensor | None, score_bias: Tensor | None) -> None:
    """Check that there is something to choose the heads by: a low-bit copy, and scores of groups of heads."""
    if copy is None or score_weight is None or score_bias is None:
        raise ValueError("SparseAttention needs indices, or a low-bit copy, score_weight and score_bias")
    if not 0 < len(score_weight) <= n_heads or n_heads % len(score_weight):
        raise ValueError(f"SparseAttention cannot choose {n_heads} heads in {len(score_weight)} groups")
