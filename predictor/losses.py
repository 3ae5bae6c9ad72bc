"""Training losses, which compare the scores of a predictor with the importance of units.

A loss is a registered function that returns a scalar. Its arguments are the scores ``(tokens, n_sparse, n_units)``,
the importance of the same shape, and the number of units that the budget keeps. The importance is not
negative, and its scale may differ between tokens and between layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from shadowllm.predictor.tracefile import OCTAVES

TINY = torch.finfo(torch.float32).tiny
Loss = Callable[[Tensor, Tensor, int], Tensor]
LOSSES: dict[str, Loss] = {}


def loss(function: Loss) -> Loss:
    """Register a training loss under its name."""
    LOSSES[function.__name__] = function
    return function


@loss
def bce(predicted: Tensor, importance: Tensor, count: int) -> Tensor:
    """Binary cross entropy of membership in the ``count`` most important units, mean over units."""
    if count >= importance.shape[-1]:
        return predicted.sum() * 0  # everything is kept: nothing to learn
    wanted = (importance >= _threshold(importance, count)).to(predicted.dtype)
    return F.binary_cross_entropy_with_logits(predicted, wanted)


@loss
def weighted_bce(predicted: Tensor, importance: Tensor, count: int) -> Tensor:
    """`bce` with each unit weighted by the cost of a wrong selection, ``|importance - threshold|``.

    The optimal score has the sign of the expected ``importance - threshold``. So near ties hardly count, and a
    unit that is rarely but extremely important is kept. Weights are relative to the mean importance of their
    token and layer.
    """
    if count >= importance.shape[-1]:
        return predicted.sum() * 0
    threshold = _threshold(importance, count)
    weight = (importance - threshold).abs() / importance.mean(dim=-1, keepdim=True).clamp_min(TINY)
    return F.binary_cross_entropy_with_logits(predicted, (importance >= threshold).to(predicted.dtype), weight)


def _threshold(importance: Tensor, count: int) -> Tensor:
    """Return the ``count``-th largest importance of each token and layer, ``(tokens, n_sparse, 1)``.

    After a ReLU it can be 0, and then every unit would count as important. In this case the threshold is the
    ``count``-th largest mean over the tokens, because the mean shows how often and how much units fire.
    """
    rank = importance.shape[-1] - count + 1
    of_token = importance.kthvalue(rank, dim=-1, keepdim=True).values
    of_mean = importance.mean(dim=0).kthvalue(rank, dim=-1, keepdim=True).values
    return torch.where(of_token > 0, of_token, of_mean)


@loss
def mse(predicted: Tensor, importance: Tensor, count: int) -> Tensor:
    """Mean squared error to the log importance, standardised within each token and layer."""
    # Importance below the range of a trace is raised to its lower end, so that silent neurons do not dominate the loss.
    floor = importance.amax(dim=-1, keepdim=True).clamp_min(TINY) * 2.0**-OCTAVES
    return F.mse_loss(predicted, standard_log(torch.maximum(importance, floor)))


@loss
def listnet(predicted: Tensor, importance: Tensor, count: int) -> Tensor:
    """``KL(p || softmax(s))``, where ``p`` is each unit's share of the importance of its token and layer.

    ``p`` is the softmax of the log importance. So this is the top-one loss of ListNet (Cao et al., ICML 2007) on log
    importance, minus a constant, the entropy of ``p``. The optimum is ``s = log E[p]`` up to a constant per
    token and layer: units are ranked by their expected share. Keeping the largest expected shares loses the
    least importance, at any budget. Silent units have the share 0. Tokens without any importance add no loss.
    """
    share = importance / importance.sum(dim=-1, keepdim=True).clamp_min(TINY)
    return F.kl_div(predicted.log_softmax(dim=-1), share, reduction="none").sum(dim=-1).mean()


def initial_bias(statistic: Tensor, count: int, loss: str) -> Tensor:
    """Return the initial output bias of a network: scores that are the same for every token.

    They are a monotone map of the statistic, so the untrained network ranks exactly as static does. `listnet`
    starts at its optimum without input, the log. `mse` starts at the standardised log. The other losses start at the
    standardised log, shifted so that ``count`` units of a layer are at or above zero.

    Args:
        statistic: mean relative importance, ``(n_sparse, n_units)``.
        count: number of units that the budget keeps.
    """
    if loss == "listnet":
        # Units that never fired start at half the least that did, so that training can still raise them.
        least = statistic.where(statistic > 0, torch.inf).amin(dim=-1, keepdim=True)
        return statistic.maximum(least.nan_to_num(posinf=1.0) / 2).log()
    standard = standard_log(statistic.clamp_min(TINY))
    if loss == "mse" or count >= statistic.shape[-1]:
        return standard
    return standard - standard.kthvalue(statistic.shape[-1] - count + 1, dim=-1, keepdim=True).values


def standard_log(importance: Tensor) -> Tensor:
    """Return logarithms, scaled to mean 0 and standard deviation 1 in each row."""
    log = importance.log()
    deviation, mean = torch.std_mean(log, dim=-1, keepdim=True, correction=0)
    return (log - mean) / deviation.clamp_min(1e-6)
