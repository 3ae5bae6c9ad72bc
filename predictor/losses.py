"""Training losses: how far a layer's scores are from the importance they should rank by.

A loss is a registered function of the scores ``(tokens, n_sparse, n_units)``, the criterion's importance of
the same shape (not negative, of any scale within a token and layer), and how many units the budget keeps.
It returns a scalar.
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
    """Binary cross entropy of being among the ``count`` most important, mean over units."""
    if count >= importance.shape[-1]:
        return predicted.sum() * 0  # everything is kept: nothing to learn
    wanted = (importance >= _threshold(importance, count)).to(predicted.dtype)
    return F.binary_cross_entropy_with_logits(predicted, wanted)


@loss
def weighted_bce(predicted: Tensor, importance: Tensor, count: int) -> Tensor:
    """`bce` with each unit weighted by how much a wrong choice costs, ``|importance - threshold|``.

    The optimum's sign is that of the expected ``importance - threshold``: near ties count for
    nothing, and a rarely but hugely important unit is kept. Weights are relative to the mean
    importance of their token and layer.
    """
    if count >= importance.shape[-1]:
        return predicted.sum() * 0
    threshold = _threshold(importance, count)
    weight = (importance - threshold).abs() / importance.mean(dim=-1, keepdim=True).clamp_min(TINY)
    return F.binary_cross_entropy_with_logits(predicted, (importance >= threshold).to(predicted.dtype), weight)


def _threshold(importance: Tensor, count: int) -> Tensor:
    """The ``count``-th largest importance of each token and layer, ``(tokens, n_sparse, 1)``.

    After a ReLU that may be 0, and everything would count as important. What then tells units apart
    is how often and how much they fire: the ``count``-th largest mean over the tokens takes its place.
    """
    rank = importance.shape[-1] - count + 1
    of_token = importance.kthvalue(rank, dim=-1, keepdim=True).values
    of_mean = importance.mean(dim=0).kthvalue(rank, dim=-1, keepdim=True).values
    return torch.where(of_token > 0, of_token, of_mean)


@loss
def mse(predicted: Tensor, importance: Tensor, count: int) -> Tensor:
    """Mean squared error to the log importance, standardised within each token and layer."""
    # What is below the range of a trace counts as its end: silent neurons must not outweigh all others.
    floor = importance.amax(dim=-1, keepdim=True).clamp_min(TINY) * 2.0**-OCTAVES
    return F.mse_loss(predicted, standard_log(torch.maximum(importance, floor)))


@loss
def listnet(predicted: Tensor, importance: Tensor, count: int) -> Tensor:
    """Divergence of the scores' softmax from each unit's share of its token's importance, ``KL(p || softmax(s))``.

    ``p`` is the softmax of the log importance, so this is the top-one loss of ListNet (Cao et al., ICML
    2007) on log importance, less its constant, the entropy of ``p``. Its optimum is ``s = log E[p]`` up to a
    constant of the token and layer: units are ranked by the share they are expected to have, and to
    keep the largest expected shares is to lose the least importance, at any budget. Silent units have the
    share 0, and a silent token teaches nothing.
    """
    share = importance / importance.sum(dim=-1, keepdim=True).clamp_min(TINY)
    return F.kl_div(predicted.log_softmax(dim=-1), share, reduction="none").sum(dim=-1).mean()


def initial_bias(statistic: Tensor, count: int, loss: str) -> Tensor:
    """Scores that are the same for every token, to start a network of the loss from.

    A monotone map of the statistic, so that the untrained network ranks exactly as static does: for `listnet`
    its own optimum without input, for `mse` the mean of its targets, and for the others the latter shifted so
    that ``count`` units of a layer lie above zero, which is a fair first logit.

    Args:
        statistic: mean relative importance, ``(n_sparse, n_units)``.
        count: units the budget keeps.
    """
    if loss == "listnet":
        # What never fired must stay within reach of training: just below the least that did.
        least = statistic.where(statistic > 0, torch.inf).amin(dim=-1, keepdim=True)
        return statistic.maximum(least.nan_to_num(posinf=1.0) / 2).log()
    standard = standard_log(statistic.clamp_min(TINY))
    if loss == "mse" or count >= statistic.shape[-1]:
        return standard
    return standard - standard.kthvalue(statistic.shape[-1] - count + 1, dim=-1, keepdim=True).values


def standard_log(importance: Tensor) -> Tensor:
    """Logarithms with mean 0 and deviation 1 in each row."""
    log = importance.log()
    deviation, mean = torch.std_mean(log, dim=-1, keepdim=True, correction=0)
    return (log - mean) / deviation.clamp_min(1e-6)
