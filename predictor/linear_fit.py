"""Heads from what their layer reads: a least-squares fit in one pass over the calibration text.

How much a head will add shows in the attention's input itself, linearly: the fit needs the moments of
the traces, not the traces, so it streams, has one solution, and takes no training.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of the mean variance of an input, added to all of them: calibration text leaves many directions nearly empty.
RIDGE = 3e-3


class LinearFit:
    """Ridge regression of each layer's head importance on the normed input of its attention.

    The target is the square root of the importance relative to its token's mean: between the
    importance itself, where few heads outweigh the others, and its logarithm, where the unimportant do.

    Args:
        n_sparse, hidden_size, n_heads: sizes of the model's sparse layers.
    """

    def __init__(self, n_sparse: int, hidden_size: int, n_heads: int) -> None:
        self._squares = torch.zeros(n_sparse, hidden_size + 1, hidden_size + 1)
        self._products = torch.zeros(n_sparse, hidden_size + 1, n_heads)
        self._tokens = 0

    def add(self, inputs: Tensor, importance: Tensor) -> None:
        """Take tokens in: ``(tokens, n_sparse, hidden_size)`` and ``(tokens, n_sparse, n_heads)``."""
        x = torch.nn.functional.pad(inputs.float(), (0, 1), value=1.0).transpose(0, 1)
        y = importance / importance.mean(dim=-1, keepdim=True).clamp_min(torch.finfo(importance.dtype).tiny)
        self._squares.baddbmm_(x.mT, x)
        self._products.baddbmm_(x.mT, y.float().sqrt().transpose(0, 1))
        self._tokens += len(inputs)

    def solve(self) -> dict[str, Tensor]:
        """``weight (n_sparse * n_heads, hidden_size)`` and ``bias (n_sparse * n_heads,)``, float32."""
        solutions = []
        for squares, products in zip(self._squares, self._products, strict=True):
            system = squares.double() / self._tokens
            ridge = RIDGE * system.diagonal()[:-1].mean().clamp_min(torch.finfo(torch.float32).tiny)
            system.diagonal()[:-1].add_(ridge)  # the constant goes free
            solutions.append(torch.linalg.solve(system, products.double() / self._tokens).float())
        found = torch.stack(solutions).mT  # (n_sparse, n_heads, hidden_size + 1)
        return {"weight": found[..., :-1].flatten(0, 1).contiguous(), "bias": found[..., -1].flatten().contiguous()}
