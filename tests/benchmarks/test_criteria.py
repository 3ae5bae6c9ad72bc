"""Compares the scores of criteria with the loss that removing a unit really adds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from shadowllm.benchmarks.criteria import agreement, draw_places, removal_losses, spearman
from shadowllm.models.decoder import Decoder
from shadowllm.models.registry import load_model


@pytest.fixture(scope="module", params=["llama-gqa", "opt"])
def model(request, checkpoint):
    spec, weights, _ = load_model(checkpoint(request.param))
    return spec, weights.load(), torch.randint(0, spec.vocab_size, (16,), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("unit", ["heads", "neurons"])
def test_removal_is_a_pass_without_the_unit(model, unit):
    spec, weights, window = model

    def loss(index):
        def activation_hook(layer, kind, activation):
            if (layer, kind) == (2, unit) and index is not None:
                activation = activation.clone()
                activation[:, 5, index] = 0
            return activation

        with torch.no_grad():
            logits = Decoder(spec, weights, activation_hook)(window[None])
        return float(F.cross_entropy(logits[0, :-1].double(), window[1:], reduction="sum"))

    found = removal_losses(spec, weights, window, (2, 5), unit, torch.arange(4))
    assert found.tolist() == pytest.approx([loss(i) - loss(None) for i in range(4)], abs=1e-4)


def test_spearman_by_hand():
    assert spearman(np.array([1.0, 5.0, 9.0]), np.array([2.0, 3.0, 100.0])) == pytest.approx(1)
    assert spearman(np.array([1.0, 5.0, 9.0]), np.array([3.0, 2.0, 1.0])) == pytest.approx(-1)
    # Ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3: covariance 4.5 / sqrt(4.5 * 5).
    assert spearman(np.array([1.0, 2.0, 2.0, 3.0]), np.arange(4.0)) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert spearman(np.ones(4), np.arange(4.0)) == 0


@pytest.mark.slow
def test_plainact_ranks_by_removal_loss_better_than_magnitude(model):
    """The paper's claim, with an exact gradient, on the text on which the loss is measured."""
    spec, weights, window = model
    found = agreement(spec, weights, window, draw_places(spec, 16, 12))
    assert found["plainact"]["neurons"] > 0.9
    for unit in ("heads", "neurons"):
        assert found["plainact"][unit] > found["l2norm"][unit] + 0.02  # ReLU: both know the zeros
        assert found["plainact"][unit] >= found["grad_norm"][unit]
    assert found["fisher"]["neurons"] == pytest.approx(found["plainact"]["neurons"], abs=1e-3)
    assert found["jacov"]["neurons"] == 0  # one value has no correlation
