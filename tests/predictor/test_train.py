"""Networks and their training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shadowllm.errors import UserError
from shadowllm.models.budget import Budget
from shadowllm.predictor.networks import default_rank, scores
from shadowllm.predictor.tracefile import calibrate
from shadowllm.predictor.traces import Tracer
from shadowllm.predictor.train import LOSSES, Recipe, train_shadow, train_static
from tests.predictor.conftest import LearnableTraces, split, token_windows

RECIPE = Recipe(rank=16, epochs=12, learning_rate=1e-2, weight_decay=0.0, batch_tokens=64)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_learnable_task_is_learned(llama, loss):
    spec, _ = llama
    record = train_shadow(spec, LearnableTraces(spec), replace(RECIPE, loss=loss)).record["held_out"]
    assert record["shadow"]["loss"] < 0.7 * record["static"]["loss"]
    assert record["shadow"]["neuron_recall"] > record["static"]["neuron_recall"] + 0.1
    assert record["shadow"]["head_recall"] > record["static"]["head_recall"] + 0.02


@pytest.mark.parametrize("loss", LOSSES)
def test_untrained_shadow_ranks_as_static(llama, loss):
    spec, _ = llama
    traces = LearnableTraces(spec)
    shadow = train_shadow(spec, traces, replace(RECIPE, epochs=1, learning_rate=1e-12, loss=loss))
    static = train_static(spec, traces)
    for mine, theirs in zip(scores(shadow, traces.all.hidden[:7]), scores(static, traces.all.hidden[:7]), strict=True):
        assert mine.shape == theirs.shape
        assert torch.equal(mine.argsort(dim=-1), theirs.argsort(dim=-1))


def test_scores_follow_the_formula(llama):
    spec, _ = llama
    traces = LearnableTraces(spec)
    shadow = train_shadow(spec, traces, replace(RECIPE, epochs=1))
    x = traces.all.hidden[:5].double()
    t = {name: tensor.double() for name, tensor in shadow.tensors.items()}
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    z = (x @ t["trunk.weight"].T + t["trunk.bias"]).clamp_min(0)
    expected = (z @ t["neurons.weight"].T + t["neurons.bias"]).view(5, spec.n_layers - 1, spec.intermediate_size)
    torch.testing.assert_close(scores(shadow, traces.all.hidden[:5])[1].double(), expected, atol=1e-5, rtol=1e-5)


def test_seed_decides_everything(llama):
    spec, _ = llama
    first, again, other = (
        train_shadow(spec, LearnableTraces(spec), replace(RECIPE, epochs=1, seed=seed)) for seed in (1, 1, 2)
    )
    assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in first.tensors)
    assert first.record == again.record
    assert not torch.equal(first.tensors["trunk.weight"], other.tensors["trunk.weight"])


def test_training_on_kept_and_on_live_traces(tiny):
    spec, weights = tiny
    windows = split(token_windows(spec, n=12), held_out=4)
    recipe = Recipe(rank=8, epochs=3, batch_tokens=24)
    live = train_shadow(spec, calibrate(spec, weights, windows, "f00d", limit_bytes=0), recipe, weights=weights)
    kept = train_shadow(spec, calibrate(spec, weights, windows, "f00d"), recipe)
    for name in ("loss", "neuron_recall", "head_recall"):
        # One byte a score, and another chunking of the shuffle: close, not equal.
        assert abs(live.record["held_out"]["shadow"][name] - kept.record["held_out"]["shadow"][name]) < 0.03
    assert live.record["tokens"] == 8 * 24


def test_static_is_the_mean_relative_importance(llama):
    spec, weights = llama
    traces = calibrate(spec, weights, split(token_windows(spec)), "f00d")
    static = train_static(spec, traces, budget=Budget(0.25, 0.5))
    assert torch.equal(static.tensors["neurons.scores"], traces.statistics["neurons"])
    held = Tracer(spec, weights, "l2norm").trace(traces.windows.held_out).neurons
    truth = held.topk(22, dim=-1).indices
    mine = static.tensors["neurons.scores"].topk(22, dim=-1).indices.expand_as(truth)
    hits = (truth.unsqueeze(-1) == mine.unsqueeze(-2)).any(-1).float().mean()
    # Codes of 4% steps may swap a unit at the edge of the top k.
    assert abs(float(hits) - static.record["held_out"]["static"]["neuron_recall"]) < 0.02


def test_default_rank_stays_under_four_percent(llama):
    spec, _ = llama
    smollm = replace(
        spec,
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        head_dim=64,
        tied_embeddings=True,
    )
    rank, outputs = default_rank(smollm, 1), 29 * (1536 + 9)
    size = lambda r: r * 577 + outputs * (r + 1)  # noqa: E731
    assert rank % 16 == 0
    assert size(rank) <= 0.04 * smollm.n_parameters < size(rank + 16)
    with pytest.raises(UserError, match="--rank"):
        default_rank(spec, 1)


@pytest.mark.parametrize("options", [{"loss": "magic"}, {"epochs": 0}, {"rank": 0}, {"learning_rate": 0.0}])
def test_senseless_recipes_are_refused(options):
    with pytest.raises(UserError):
        Recipe(**options)


@pytest.mark.parametrize("loss", ["bce", "weighted_bce"])
def test_silent_units_are_not_all_important(loss):
    """After a ReLU most of a token's importance may be 0: at a larger budget that must not make everything wanted."""
    importance = torch.tensor([[[5.0, 0.0, 3.0, 0.0, 0.0, 0.0]], [[4.0, 0.0, 0.0, 1.0, 0.0, 0.0]]])
    predicted = torch.zeros(2, 1, 6, requires_grad=True)
    LOSSES[loss](predicted, importance, 3).backward()
    towards = -predicted.grad
    assert bool((towards[importance > 0] > 0).all())
    assert bool((towards[importance == 0] < 0).all())
