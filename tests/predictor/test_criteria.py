"""Compares criteria with their formulas and with finite differences of the true loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from shadowllm.errors import UserError
from shadowllm.models.decoder import Decoder
from shadowllm.predictor.criteria import CRITERIA, RIDGE, UnitTrace, find_criterion
from shadowllm.predictor.traces import Tracer
from tests.tiny import token_windows


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


def scaled(spec, weights, windows, place, scale):
    """Logits, and every sparse activation, with one unit of one token scaled.

    The change is a constant: nothing upstream feels the scale in its own gradient.
    """
    layer, unit, token, index = place
    seen = {}

    def activation_hook(at, kind, activation):
        if (at, kind) == (layer, unit):
            change = torch.zeros_like(activation)
            change[0, token, index] = activation[0, token, index].detach() * (scale - 1)
            activation = activation + change
        if at >= 1:
            seen[at, kind] = activation
        return activation

    return Decoder(spec, weights, activation_hook)(windows), seen


def loss_of(logits, windows):
    return F.cross_entropy(logits[0, :-1], windows[0, 1:], reduction="sum")


PLACES = ((1, 0, 0), (1, 5, 3), (2, 7, 2), (2, 3, 1))  # layer, token, index of a unit


@pytest.mark.parametrize("unit", ["heads", "neurons"])
def test_plainact_is_the_slope_of_the_loss_as_a_unit_fades(tiny, unit):
    """d loss / d scale of one unit at one token is A * dL/dA; central differences in float64."""
    spec, weights = tiny
    exact = {name: tensor.double() for name, tensor in weights.items()}
    windows = token_windows(spec, n=1, seqlen=9)
    scores = getattr(Tracer(spec, exact, "plainact").trace(windows), unit)

    def loss(layer, token, index, scale):
        with torch.no_grad():
            return float(loss_of(scaled(spec, exact, windows, (layer, unit, token, index), scale)[0], windows))

    step = 1e-5
    for place in PLACES:
        layer, token, index = place
        slope = (loss(*place, 1 + step) - loss(*place, 1 - step)) / (2 * step)
        # Central differences: truncation about step^2, rounding about eps * loss / step = 5e-10.
        assert abs(scores[token, layer - 1, index].item() - abs(slope)) < 1e-8


@pytest.mark.parametrize("unit", ["heads", "neurons"])
def test_grasp_is_the_slope_of_half_the_squared_gradient(tiny, unit):
    spec, weights = tiny
    exact = {name: tensor.double().requires_grad_() for name, tensor in weights.items()}
    windows = token_windows(spec, n=1, seqlen=9)
    scores = getattr(Tracer(spec, {n: w.detach() for n, w in exact.items()}, "grasp").trace(windows), unit)

    def half_square(layer, token, index, scale):
        logits, seen = scaled(spec, exact, windows, (layer, unit, token, index), scale)
        return sum(float(g.square().sum()) for g in torch.autograd.grad(loss_of(logits, windows), seen.values())) / 2

    step = 1e-4
    for place in PLACES:
        layer, token, index = place
        slope = (half_square(*place, 1 + step) - half_square(*place, 1 - step)) / (2 * step)
        torch.testing.assert_close(scores[token, layer - 1, index].item(), abs(slope), rtol=1e-5, atol=1e-9)


def a_trace(width, seed=0):
    draw = torch.Generator().manual_seed(seed)
    activation, gradient, curvature = (torch.randn(2, 7, 3, width, generator=draw, dtype=torch.float64) for _ in "Agc")
    targets = torch.tensor([[1, 2, 1, 3, 2, 1, -1], [5, 5, 5, 5, 5, 5, -1]])
    return UnitTrace(activation, torch.ones(3, width, 4, dtype=torch.float64), gradient, curvature, targets)


@pytest.mark.parametrize("width", [1, 8])
def test_formulas_written_out(width):
    trace = a_trace(width)
    for b, t, u in ((0, 0, 0), (0, 4, 2), (1, 6, 1)):
        a, g, c = trace.activation[b, t, u], trace.gradient[b, t, u], trace.curvature[b, t, u]
        expected = {
            "plainact": abs(float(a @ g)),
            "grad_norm": float(g @ g) ** 0.5,
            "fisher": sum(float(x * y) ** 2 for x, y in zip(a, g, strict=True)),
            "snip": sum(abs(float(x * y)) for x, y in zip(a, g, strict=True)),
            "grasp": abs(float(a @ c)),
        }
        found = {name: float(find_criterion(name).score(trace)[b, t, u]) for name in expected}
        assert found == pytest.approx(expected)


@pytest.mark.parametrize("width", [1, 8])
def test_the_windows_nwot_and_jacov_are_sums_over_its_tokens(width):
    trace = a_trace(width)
    nwot, jacov = (find_criterion(name).score(trace) for name in ("nwot", "jacov"))
    ridge = RIDGE * np.eye(7)
    for b, u in ((0, 0), (1, 2)):
        code = trace.activation[b, :, u].numpy() > 0
        agree = (code[:, None] == code[None]).mean(axis=-1) + ridge
        assert float(nwot[b, :, u].log().sum()) == pytest.approx(np.linalg.slogdet(agree)[1])
        gradient = trace.gradient[b, :, u].numpy()
        correlation = np.corrcoef(gradient) if width > 1 else np.zeros((7, 7))
        values = np.linalg.eigvalsh(correlation) + RIDGE
        terms = jacov[b, :, u].reciprocal() - 1 + np.log(RIDGE)
        # Eigenvalues near the ridge lose 16 - 5 digits on the way.
        assert float(terms.sum()) == pytest.approx(float((np.log(values) + 1 / values).sum()), rel=1e-6)


def test_epenas_sets_a_tokens_own_class_against_the_others():
    trace = a_trace(8)
    found = find_criterion("epenas").score(trace)
    likeness = np.log(np.abs(np.corrcoef(trace.gradient[0, :, 1].numpy())) + RIDGE)
    first = 1 + abs(likeness[0, [0, 2, 5]].mean() - likeness[0, [1, 3, 4]].mean())
    alone = 1 + abs(likeness[3, 3] - likeness[3, [0, 1, 2, 4, 5]].mean())
    assert found[0, [0, 3], 1].tolist() == pytest.approx([first, alone])
    assert found[0, 6].tolist() == [1, 1, 1]  # no token follows the last one
    assert found[1].unique().tolist() == [1]  # with one class there is no comparison


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_every_criterion_gives_a_finite_score_to_every_unit(tiny, name):
    spec, weights = tiny
    traced = Tracer(spec, weights, name).trace(token_windows(spec))
    for scores, size in ((traced.heads, spec.n_heads), (traced.neurons, spec.intermediate_size)):
        assert scores.shape == (96, spec.n_layers - 1, size)
        assert scores.dtype == torch.float32
        assert bool((scores >= 0).all() and scores.isfinite().all() and scores.max() > 0)


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


@pytest.mark.parametrize(("name", "lacks"), [("plainact", "gradient"), ("grasp", "curvature"), ("epenas", "targets")])
def test_criteria_refuse_to_guess_what_they_were_not_given(name, lacks):
    with pytest.raises(ValueError, match=lacks):
        CRITERIA[name].score(UnitTrace(torch.ones(1, 2, 1), torch.ones(2, 1, 3)))


def test_unknown_criterion_is_named():
    with pytest.raises(UserError, match=r"'magic'.*l2norm, nwot, plainact"):
        find_criterion("magic")
