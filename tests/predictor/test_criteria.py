"""Criteria against their formulas written out, and against finite differences of the true loss."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from shadowllm.errors import UserError
from shadowllm.models import Decoder
from shadowllm.predictor.criteria import CRITERIA, UnitTrace, find_criterion
from shadowllm.predictor.traces import Tracer
from tests.predictor.conftest import token_windows


def activations(spec, weights, windows):
    seen = {}
    with torch.no_grad():
        Decoder(spec, weights, lambda layer, unit, a: seen.setdefault((layer, unit), a))(windows)
    return seen


def test_l2norm_is_the_length_of_each_contribution(tiny):
    spec, weights = tiny
    windows = token_windows(spec, n=2, seqlen=9)
    traced, seen = Tracer(spec, weights, "l2norm").trace(windows), activations(*tiny, windows)
    for layer in range(1, spec.n_layers):
        rows = weights[f"layers.{layer}.down_proj.weight"]
        neurons = (seen[layer, "neurons"][..., None] * rows).norm(dim=-1).flatten(0, 1)
        torch.testing.assert_close(traced.neurons[:, layer - 1], neurons, atol=1e-6, rtol=1e-5)
        blocks = weights[f"layers.{layer}.o_proj.weight"].unflatten(0, (spec.n_heads, spec.head_dim))
        heads = torch.einsum("bshd,hdo->bsho", seen[layer, "heads"], blocks).norm(dim=-1).flatten(0, 1)
        torch.testing.assert_close(traced.heads[:, layer - 1], heads, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("unit", ["heads", "neurons"])
def test_plainact_is_the_slope_of_the_loss_as_a_unit_fades(tiny, unit):
    """d loss / d scale of one unit at one token is A * dL/dA; central differences in float64."""
    spec, weights = tiny
    exact = {name: tensor.double() for name, tensor in weights.items()}
    windows = token_windows(spec, n=1, seqlen=9)
    scores = getattr(Tracer(spec, exact, "plainact").trace(windows), unit)

    def loss(layer, token, index, scale):
        def tap(at, kind, activation):
            if (at, kind) != (layer, unit):
                return activation
            changed = activation.clone()
            changed[0, token, index] *= scale
            return changed

        with torch.no_grad():
            logits = Decoder(spec, exact, tap)(windows)
        return float(F.cross_entropy(logits[0, :-1], windows[0, 1:], reduction="sum"))

    step = 1e-5
    for layer, token, index in ((1, 0, 0), (1, 5, 3), (2, 7, 2), (2, 3, 1)):
        slope = (loss(layer, token, index, 1 + step) - loss(layer, token, index, 1 - step)) / (2 * step)
        # Central differences: truncation about step^2, rounding about eps * loss / step = 5e-10.
        assert abs(scores[token, layer - 1, index].item() - abs(slope)) < 1e-8


def test_gradients_reach_every_sparse_unit_and_no_weight(tiny):
    spec, weights = tiny
    windows = token_windows(spec)
    traced, active = (Tracer(spec, weights, name).trace(windows) for name in ("plainact", "l2norm"))
    last = torch.arange(windows.numel()) % 24 == 23  # no loss follows the last position of a window
    for scores, size in ((traced.heads, active.heads), (traced.neurons, active.neurons)):
        assert torch.equal(scores[~last] > 0, size[~last] > 0)
    assert not any(scores.requires_grad for scores in (traced.hidden, traced.heads, traced.neurons))
    assert all(tensor.grad is None and not tensor.requires_grad for tensor in weights.values())


def test_last_position_has_no_loss_to_influence(llama):
    spec, weights = llama
    traced = Tracer(spec, weights, "plainact").trace(token_windows(spec, n=1))
    assert traced.neurons[-1].max() == 0
    assert traced.neurons[-2].max() > 0


def test_plainact_refuses_to_guess_without_gradients():
    with pytest.raises(ValueError, match="gradients"):
        CRITERIA["plainact"].score(UnitTrace(torch.ones(1, 2, 1), torch.ones(2, 1, 3)))


def test_unknown_criterion_is_named():
    with pytest.raises(UserError, match=r"'magic'.*l2norm, plainact"):
        find_criterion("magic")
