"""Top-k selection by scores, and the recall of one selection against another."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from shadowllm.models.sparsity import Unit
from shadowllm.models.spec import ModelSpec

# How scores (batch, seqlen, n_units) are combined before units are selected. A decode step selects for each token.
# "sequence" is the setting of the ShadowLLM paper, and "last-token" that of its released code.
AGGREGATES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "token": lambda scores: scores,
    "sequence": lambda scores: scores.mean(dim=1, keepdim=True),
    "last-token": lambda scores: scores[:, -1:],
}


def active_mask(spec: ModelSpec, unit: Unit, scores: Tensor, count: int) -> Tensor:
    """Mark the ``count`` active units of a layer.

    Args:
        scores: ``(..., n_units)``.
        count: one of `Budget.counts`.

    Returns:
        bool ``(..., n_units)``.
    """
    return top_mask(shared_scores(spec, unit, scores), count)


def shared_scores(spec: ModelSpec, unit: Unit, scores: Tensor) -> Tensor:
    """Give all heads of a group the sum of their scores ``(..., n_units)``, if groups are selected as a whole.

    Ties go to the lower index, so ``SelectTopK`` then selects whole groups.
    """
    together = spec.heads_together if unit == "heads" else 1
    if together == 1:
        return scores
    sums = scores.unflatten(-1, (-1, together)).sum(dim=-1, keepdim=True)
    return sums.expand(*sums.shape[:-1], together).flatten(-2)


def top_mask(scores: Tensor, count: int) -> Tensor:
    """Mark the ``count`` largest entries along the last axis. Ties go to the lower index, as in ``SelectTopK``.

    Args:
        scores: float32 or float64 ``(..., n)``, finite, on the CPU.
        count: entries to mark, ``1..n``.

    Returns:
        bool ``(..., n)``, exactly ``count`` true in each row.
    """
    n = scores.shape[-1]
    if count >= n:
        return torch.ones_like(scores, dtype=torch.bool)
    # NumPy's partition and count are several times faster than PyTorch's.
    values = scores.detach().reshape(-1, n).numpy()
    threshold = np.partition(values, n - count, axis=1)[:, n - count, None]
    chosen = values >= threshold
    surplus = np.count_nonzero(chosen, axis=1) - count
    rows = surplus > 0  # too many entries equal the threshold: drop the last of them
    tied = values[rows] == threshold[rows]
    chosen[rows] &= ~(tied & (tied[:, ::-1].cumsum(axis=1, dtype=np.int32)[:, ::-1] <= surplus[rows, None]))
    return torch.from_numpy(chosen).view(scores.shape)


def recall(chosen: Tensor, wanted: Tensor) -> float:
    """Return recall@k: the share of ``wanted`` that is in ``chosen``. Both are bool and have the same shape."""
    return float(torch.count_nonzero(chosen & wanted) / torch.count_nonzero(wanted))
