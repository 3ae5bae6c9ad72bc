"""Losses: their minimum, the direction of their gradient, and units that are never active."""

from __future__ import annotations

import pytest
import torch

from shadowllm.predictor.losses import LOSSES, initial_bias

COUNT = 3


def importance(seed=0, rows=(5, 2)):
    return torch.rand(*rows, 6, generator=torch.Generator().manual_seed(seed)) ** 3


def test_listnet_is_zero_at_the_log_importance_and_nowhere_else():
    wanted = importance()
    assert float(LOSSES["listnet"](wanted.log() + 7, wanted, COUNT)) == pytest.approx(0, abs=1e-6)
    assert float(LOSSES["listnet"](wanted.log() * 1.1, wanted, COUNT)) > 1e-3
    assert float(LOSSES["listnet"](wanted.log().flip(-1), wanted, COUNT)) > 0.1


def test_listnet_follows_its_formula_whatever_the_scale_of_the_importance():
    wanted, predicted = importance(), torch.randn(5, 2, 6, generator=torch.Generator().manual_seed(1))
    share = (wanted / wanted.sum(-1, keepdim=True)).double()
    softmax = predicted.double().exp() / predicted.double().exp().sum(-1, keepdim=True)
    expected = float((share * (share / softmax).log()).sum(-1).mean())
    for scale in (1.0, 1e-4):
        assert float(LOSSES["listnet"](predicted, scale * wanted, COUNT)) == pytest.approx(expected, rel=1e-4)


def test_the_best_single_ranking_of_listnet_is_by_mean_share():
    """The initial scores of the network are the best scores that are the same for every token."""
    wanted = importance(rows=(400, 2))
    mean = (wanted / wanted.mean(-1, keepdim=True)).mean(0)
    scores = initial_bias(mean, COUNT, "listnet").requires_grad_()
    LOSSES["listnet"](scores.expand_as(wanted), wanted, COUNT).backward()
    assert float(scores.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_down_ranks_the_more_important_higher(loss):
    wanted = torch.tensor([[[8.0, 1.0, 6.0, 0.5, 4.0, 2.0]]])
    predicted = torch.zeros_like(wanted, requires_grad=True)
    LOSSES[loss](predicted, wanted, COUNT).backward()
    towards = -predicted.grad[0, 0]
    assert float(towards[[0, 2]].min()) > 0 > float(towards[[1, 3]].max())


@pytest.mark.parametrize("loss", LOSSES)
def test_silent_units_and_silent_tokens_leave_finite_gradients(loss):
    wanted = importance()
    wanted[:, :, 3] = 0
    wanted[2] = 0
    predicted = torch.randn(5, 2, 6, generator=torch.Generator().manual_seed(2)).requires_grad_()
    LOSSES[loss](predicted, wanted, COUNT).backward()
    assert bool(predicted.grad.isfinite().all())


def test_a_silent_token_teaches_listnet_nothing_and_a_silent_unit_to_go_down():
    wanted = importance()
    wanted[:, :, 3] = 0
    wanted[2] = 0
    predicted = torch.zeros(5, 2, 6, requires_grad=True)
    LOSSES["listnet"](predicted, wanted, COUNT).backward()
    assert float(predicted.grad[2].abs().max()) == 0
    assert bool((predicted.grad[[0, 1, 3, 4], :, 3] > 0).all())


@pytest.mark.parametrize("loss", ["bce", "weighted_bce"])
def test_silent_units_are_not_all_important(loss):
    """After a ReLU most importances of a token may be 0. A larger budget must not make all units targets."""
    wanted = torch.tensor([[[5.0, 0.0, 3.0, 0.0, 0.0, 0.0]], [[4.0, 0.0, 0.0, 1.0, 0.0, 0.0]]])
    predicted = torch.zeros(2, 1, 6, requires_grad=True)
    LOSSES[loss](predicted, wanted, COUNT).backward()
    towards = -predicted.grad
    assert bool((towards[wanted > 0] > 0).all())
    assert bool((towards[wanted == 0] < 0).all())


@pytest.mark.parametrize("loss", LOSSES)
def test_a_network_starts_from_the_order_of_its_statistic(loss):
    statistic = torch.tensor([[0.5, 0.0, 3.0, 0.25, 1.5, 0.75]])
    bias = initial_bias(statistic, COUNT, loss)
    assert torch.equal(bias.argsort(dim=-1), statistic.argsort(dim=-1))
    if loss == "listnet":  # a unit that never fired can still be learned
        assert float(bias.max() - bias.min()) < 12
