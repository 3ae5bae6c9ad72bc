"""Compares the fit for heads with the same regression in NumPy, and tests it on importance that it can fit exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shadowllm.predictor.linear_fit import RIDGES, LinearFit

TOKENS, LAYERS, WIDTH, HEADS = 301, 2, 12, 5


def drawn(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, LAYERS, WIDTH, generator=generator) + 0.5
    return x, torch.rand(TOKENS, LAYERS, HEADS, generator=generator) + 0.1


def taken_in(x, importance, chunk=100):
    fit = LinearFit(LAYERS, WIDTH, HEADS)
    for rows in zip(x.split(chunk), importance.split(chunk), strict=True):
        fit.add(*rows)
    return fit


def fitted(x, importance, chunk=100, judge=None):
    fit = taken_in(x, importance, chunk)
    found = fit.solve(judge or fit)  # on the training tokens the smallest ridge is best
    return found["weight"].unflatten(0, (LAYERS, HEADS)), found["bias"].unflatten(0, (LAYERS, HEADS))


def test_it_is_ridge_regression_whatever_the_chunks():
    x, importance = drawn()
    for chunk in (TOKENS, 64):
        weight, bias = fitted(x, importance, chunk)
        for layer in range(LAYERS):
            design = np.concatenate([x[:, layer].numpy().astype(np.float64), np.ones((TOKENS, 1))], axis=1)
            share = importance[:, layer] / importance[:, layer].mean(dim=-1, keepdim=True)
            moments = design.T @ design / TOKENS
            penalty = RIDGES[0] * np.diag(moments)[:-1].mean() * np.diag([1.0] * WIDTH + [0.0])
            wanted = np.linalg.solve(moments + penalty, design.T @ share.sqrt().numpy().astype(np.float64) / TOKENS)
            np.testing.assert_allclose(weight[layer].numpy(), wanted[:-1].T, atol=1e-5)
            np.testing.assert_allclose(bias[layer].numpy(), wanted[-1], atol=1e-5)


def test_it_ranks_heads_that_follow_their_input():
    x, _ = drawn()
    mix = torch.randn(LAYERS, WIDTH, HEADS, generator=torch.Generator().manual_seed(1))
    importance = (torch.einsum("tlw,lwh->tlh", x, mix) + 20).square()  # its root is linear, but for the token's scale
    weight, bias = fitted(x, importance)
    found = torch.einsum("tlw,lhw->tlh", x, weight) + bias
    assert (found.argmax(dim=-1) == importance.argmax(dim=-1)).float().mean() > 0.95


def test_the_ridge_is_the_best_one_for_other_tokens():
    x, importance = drawn()
    others, theirs = drawn(seed=1)
    weight, bias = fitted(x, importance, judge=taken_in(others, theirs))
    share = (theirs / theirs.mean(dim=-1, keepdim=True)).sqrt()
    found = (torch.einsum("tlw,lhw->tlh", others, weight) + bias - share).square().mean(dim=(0, 2))
    design = torch.nn.functional.pad(x, (0, 1), value=1.0).double()
    wanted = (importance / importance.mean(dim=-1, keepdim=True)).sqrt().double()
    for layer in range(LAYERS):
        moments = design[:, layer].T @ design[:, layer] / TOKENS
        errors = []
        for ridge in RIDGES:
            penalty = torch.eye(WIDTH + 1, dtype=torch.float64) * ridge * moments.diagonal()[:-1].mean()
            penalty[-1, -1] = 0
            solution = torch.linalg.solve(moments + penalty, design[:, layer].T @ wanted[:, layer] / TOKENS)
            predicted = torch.nn.functional.pad(others[:, layer], (0, 1), value=1.0).double() @ solution
            errors.append(float((predicted - share[:, layer]).square().mean()))
        assert float(found[layer]) == pytest.approx(min(errors), rel=1e-4)
        assert errors.index(min(errors)) > 0  # noise: the smallest ridge is not the best one here


def test_inputs_that_never_vary_do_no_harm():
    x, importance = drawn()
    weight, bias = fitted(torch.zeros_like(x), importance)
    assert weight.abs().max() == 0
    assert bool(bias.isfinite().all())
