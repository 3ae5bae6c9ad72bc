"""A linear map from the attention's input to head importance, fitted in one pass over the calibration text.

Head importance is nearly linear in the attention's input. A least-squares fit needs only the moments of the traces,
so it can read them chunk by chunk. It has one solution and needs no training.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

# Ridges to try, as fractions of the mean square of an input. Calibration text hardly covers many directions. How many
# depends on the length of the text and on the layer.
RIDGES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 2e-1, 4e-1)


class LinearFit:
    """Ridge regression of each layer's head importance on the normed input of its attention.

    The target is the square root of the importance, relative to its token's mean. With the importance itself, a few
    heads would dominate the fit; with its logarithm, the unimportant heads would.

    Args:
        n_sparse, hidden_size, n_heads: sizes of the model's sparse layers.
    """

    def __init__(self, n_sparse: int, hidden_size: int, n_heads: int) -> None:
        self._squares = torch.zeros(n_sparse, hidden_size + 1, hidden_size + 1)
        self._products = torch.zeros(n_sparse, hidden_size + 1, n_heads)
        self._tokens = 0

    def add(self, inputs: Tensor, importance: Tensor) -> None:
        """Add tokens: inputs ``(tokens, n_sparse, hidden_size)`` and importance ``(tokens, n_sparse, n_heads)``."""
        x = torch.nn.functional.pad(inputs.float(), (0, 1), value=1.0).transpose(0, 1)
        y = importance / importance.mean(dim=-1, keepdim=True).clamp_min(torch.finfo(importance.dtype).tiny)
        self._squares.baddbmm_(x.mT, x)
        self._products.baddbmm_(x.mT, y.float().sqrt().transpose(0, 1))
        self._tokens += len(inputs)

    def solve(self, judge: LinearFit) -> dict[str, Tensor]:
        """Solve the regression, with the ridge for each layer that has the least error on the tokens of ``judge``.

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
        """Return the squared error of a solution on the added tokens, up to a constant."""
        system, products = self._moments(layer)
        return float((solution * (system @ solution - 2 * products)).sum())


def _ridge_regression(system: Tensor, products: Tensor, ridge: float) -> Tensor:
    system = system.clone()
    added = ridge * system.diagonal()[:-1].mean().clamp_min(torch.finfo(torch.float32).tiny)
    system.diagonal()[:-1].add_(added)  # no penalty on the bias
    return torch.linalg.solve(system, products)
