"""The heads' fit against the same regression in NumPy, and on importance it can express exactly."""

from __future__ import annotations

import numpy as np
import torch

from shadowllm.predictor.linear_fit import RIDGE, LinearFit

TOKENS, LAYERS, WIDTH, HEADS = 301, 2, 12, 5


def drawn(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, LAYERS, WIDTH, generator=generator) + 0.5
    return x, torch.rand(TOKENS, LAYERS, HEADS, generator=generator) + 0.1


def fitted(x, importance, chunk):
    fit = LinearFit(LAYERS, WIDTH, HEADS)
    for rows in zip(x.split(chunk), importance.split(chunk), strict=True):
        fit.add(*rows)
    found = fit.solve()
    return found["weight"].unflatten(0, (LAYERS, HEADS)), found["bias"].unflatten(0, (LAYERS, HEADS))


def test_it_is_ridge_regression_whatever_the_chunks():
    x, importance = drawn()
    for chunk in (TOKENS, 64):
        weight, bias = fitted(x, importance, chunk)
        for layer in range(LAYERS):
            design = np.concatenate([x[:, layer].numpy().astype(np.float64), np.ones((TOKENS, 1))], axis=1)
            share = importance[:, layer] / importance[:, layer].mean(dim=-1, keepdim=True)
            moments = design.T @ design / TOKENS
            penalty = RIDGE * np.diag(moments)[:-1].mean() * np.diag([1.0] * WIDTH + [0.0])
            wanted = np.linalg.solve(moments + penalty, design.T @ share.sqrt().numpy().astype(np.float64) / TOKENS)
            np.testing.assert_allclose(weight[layer].numpy(), wanted[:-1].T, atol=1e-5)
            np.testing.assert_allclose(bias[layer].numpy(), wanted[-1], atol=1e-5)


def test_it_ranks_heads_that_follow_their_input():
    x, _ = drawn()
    mix = torch.randn(LAYERS, WIDTH, HEADS, generator=torch.Generator().manual_seed(1))
    importance = (torch.einsum("tlw,lwh->tlh", x, mix) + 20).square()  # its root is linear, but for the token's scale
    weight, bias = fitted(x, importance, 100)
    found = torch.einsum("tlw,lhw->tlh", x, weight) + bias
    assert (found.argmax(dim=-1) == importance.argmax(dim=-1)).float().mean() > 0.95


def test_inputs_that_never_vary_do_no_harm():
    x, importance = drawn()
    weight, bias = fitted(torch.zeros_like(x), importance, 100)
    assert weight.abs().max() == 0
    assert bool(bias.isfinite().all())
