"""Heads from what their layer reads: a least-squares fit in one pass over the calibration text.

How much a head will add shows in the attention's input itself, linearly: the fit needs the moments of
the traces, not the traces, so it streams, has one solution, and takes no training.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

# Of the mean square of an input, added to all of them: calibration text leaves many directions nearly empty, and how
# many depends on its length and on the layer.
RIDGES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 2e-1, 4e-1)


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

    def solve(self, judge: LinearFit) -> dict[str, Tensor]:
        """The regression whose ridge, layer by layer, has the least error on the tokens of ``judge``.

        Returns:
            ``weight (n_sparse * n_heads, hidden_size)`` and ``bias (n_sparse * n_heads,)``, float32.
        """
        solutions = []
        for layer in range(len(self._squares)):
            system, products = self._moments(layer)
            tried = [_ridge_regression(system, products, ridge) for ridge in RIDGES]
            solutions.append(min(tried, key=partial(judge._error, layer)).float())
        found = torch.stack(solutions).mT  # (n_sparse, n_heads, hidden_size + 1)
        return {"weight": found[..., :-1].flatten(0, 1).contiguous(), "bias": found[..., -1].flatten().contiguous()}

    def _moments(self, layer: int) -> tuple[Tensor, Tensor]:
        return self._squares[layer].double() / self._tokens, self._products[layer].double() / self._tokens

    def _error(self, layer: int, solution: Tensor) -> float:
        """Mean squared error of a solution on the tokens taken in, but for a constant."""
        system, products = self._moments(layer)
        return float((solution * (system @ solution - 2 * products)).sum())


def _ridge_regression(system: Tensor, products: Tensor, ridge: float) -> Tensor:
    system = system.clone()
    added = ridge * system.diagonal()[:-1].mean().clamp_min(torch.finfo(torch.float32).tiny)
    system.diagonal()[:-1].add_(added)  # the constant goes free
    return torch.linalg.solve(system, products)
