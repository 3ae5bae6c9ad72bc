"""The networks of predictors and their training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shadowllm.config import TrainConfig
from shadowllm.errors import UserError
from shadowllm.models.sparsity import Budget, SparseLayers
from shadowllm.predictor.losses import LOSSES
from shadowllm.predictor.networks import (
    default_rank,
    layer_head_scores,
    layer_neuron_scores,
    layerwise_scores,
    scores,
)
from shadowllm.predictor.tracefile import calibrate
from shadowllm.predictor.traces import Tracer
from shadowllm.predictor.train import chunk_scores, initial, train_network, train_static
from tests.tiny import LearnableTraces, split, token_windows

RECIPE = TrainConfig(rank=16, epochs=8, learning_rate=1e-2, weight_decay=0.0, batch_tokens=64)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "loss"), [*(("shadow", loss) for loss in LOSSES), ("layerwise", "mse")])
def test_a_learnable_task_is_learned(llama, kind, loss):
    spec, _ = llama
    record = train_network(spec, LearnableTraces(spec), replace(RECIPE, loss=loss), kind=kind).record["held_out"]
    assert record[kind]["loss"] < 0.7 * record["static"]["loss"]
    assert record[kind]["neuron_recall"] > record["static"]["neuron_recall"] + 0.1
    if kind == "shadow":  # the heads of the other have their fit
        assert record[kind]["head_recall"] > record["static"]["head_recall"] + 0.02


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", ["shadow", "layerwise"])
def test_an_untrained_network_ranks_as_static(llama, kind, loss):
    spec, _ = llama
    traces = LearnableTraces(spec)
    untrained = initial(kind, spec, traces, replace(RECIPE, loss=loss))
    few = traces.all[torch.arange(7)]
    mine, theirs = (chunk_scores(predictor, few) for predictor in (untrained, train_static(spec, traces)))
    for unit in ("heads", "neurons") if kind == "shadow" else ("neurons",):
        assert mine[unit].shape == theirs[unit].shape
        assert torch.equal(mine[unit].argsort(dim=-1), theirs[unit].argsort(dim=-1))


def test_scores_follow_the_formula(llama):
    spec, _ = llama
    traces = LearnableTraces(spec)
    shadow = train_network(spec, traces, replace(RECIPE, epochs=1))
    x = traces.all.hidden[:5].double()
    t = {name: tensor.double() for name, tensor in shadow.tensors.items()}
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    z = (x @ t["trunk.weight"].T + t["trunk.bias"]).clamp_min(0)
    expected = (z @ t["neurons.weight"].T + t["neurons.bias"]).view(5, spec.n_layers - 1, spec.intermediate_size)
    torch.testing.assert_close(scores(shadow, traces.all.hidden[:5])[1].double(), expected, atol=1e-5, rtol=1e-5)


def test_scores_of_a_layer_follow_the_formula(llama):
    spec, _ = llama
    networks = train_network(spec, LearnableTraces(spec), replace(RECIPE, epochs=1), kind="layerwise")
    x = torch.randn(5, spec.hidden_size, generator=torch.Generator().manual_seed(4)).double()
    t = {name: tensor.double() for name, tensor in networks.tensors.items()}
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    for row, layer in enumerate(range(1, spec.n_layers)):
        trunk, outputs = slice(row * 16, (row + 1) * 16), slice(*(spec.intermediate_size * i for i in (row, row + 1)))
        z = (normed @ t["layers.trunk.weight"][trunk].T + t["layers.trunk.bias"][trunk]).clamp_min(0)
        expected = z @ t["layers.neurons.weight"][outputs].T + t["layers.neurons.bias"][outputs]
        found = layer_neuron_scores(networks, layer, x.float())
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_seed_decides_everything(llama):
    spec, _ = llama
    first, again, other = (
        train_network(spec, LearnableTraces(spec), replace(RECIPE, epochs=1, seed=seed)) for seed in (1, 1, 2)
    )
    assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in first.tensors)
    assert first.record == again.record
    assert not torch.equal(first.tensors["trunk.weight"], other.tensors["trunk.weight"])


def test_training_on_kept_and_on_live_traces(tiny):
    spec, weights = tiny
    windows = replace(split(token_windows(spec, n=12), held_out=4), seed=7)
    config = TrainConfig(rank=8, epochs=3, batch_tokens=24)
    live = train_network(spec, calibrate(spec, weights, windows, "f00d", limit_bytes=0), config, weights=weights)
    kept = train_network(spec, calibrate(spec, weights, windows, "f00d"), config)
    for name in ("loss", "neuron_recall", "head_recall"):
        # Scores have one byte, and the shuffle has other chunks, so results are close but not equal.
        assert abs(live.record["held_out"]["shadow"][name] - kept.record["held_out"]["shadow"][name]) < 0.03
    assert live.record["tokens"] == 8 * 24
    assert live.record["text_seed"] == 7


def test_layerwise_networks_learn_from_live_traces_alone(llama):
    spec, weights = llama
    traces = calibrate(spec, weights, split(token_windows(spec, n=12), held_out=4), "f00d")
    config = TrainConfig(rank=8, epochs=6, batch_tokens=24)
    judged = train_network(spec, traces, config, kind="layerwise", weights=weights).record["held_out"]
    assert judged["layerwise"]["loss"] < judged["static"]["loss"]
    with pytest.raises(UserError, match="give the model"):
        train_network(spec, traces, config, kind="layerwise")


def test_text_that_is_traced_anew_is_read_once(llama):
    spec, weights = llama
    traces = calibrate(spec, weights, split(token_windows(spec, n=12), held_out=4), "f00d")
    read = []
    for live in (weights, None):
        tokens = []
        train_network(spec, traces, TrainConfig(rank=8), weights=live, advance=tokens.append)
        read.append(sum(tokens))
    assert read == [8 * 24, 4 * 8 * 24]


def test_static_is_the_mean_relative_importance(llama):
    spec, weights = llama
    traces = calibrate(spec, weights, split(token_windows(spec)), "f00d")
    static = train_static(spec, traces, budget=Budget(heads=0.5, neurons=0.25))
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
    sizes = {
        "shadow": lambda r: r * 577 + 29 * (1536 + 9) * (r + 1),
        "layerwise": lambda r: 29 * (r * 577 + 1536 * (r + 1)),
    }
    for kind, size in sizes.items():
        rank = default_rank(SparseLayers(smollm, 1), kind)
        assert rank % 16 == 0
        assert size(rank) <= 0.04 * smollm.n_parameters < size(rank + 16)
    with pytest.raises(UserError, match="--rank"):
        default_rank(SparseLayers(spec, 1))


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "magic"},
        {"epochs": 0},
        {"rank": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"learning_rate": float("inf")},
        {"weight_decay": float("nan")},
        {"weight_decay": -0.1},
        {"weight_decay": "0.1"},
        {"epochs": "2"},
        {"batch_tokens": 64.0},
        {"budget": 0.5},
        {"powerinfer": 5},
    ],
)
def test_senseless_recipes_are_refused(options):
    with pytest.raises(UserError):
        TrainConfig(**options)


def test_layers_scored_at_once_are_those_scored_one_by_one(llama):
    spec, _ = llama
    start = initial("layerwise", spec, LearnableTraces(spec), RECIPE)
    generator = torch.Generator().manual_seed(1)
    # Every tensor is random, so that swapped layers, weights or biases are found.
    tensors = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in start.tensors.items()}
    networks = replace(start, tensors=tensors)
    shape = (7, networks.n_sparse, spec.hidden_size)
    inputs = {unit: torch.randn(shape, generator=generator) for unit in ("heads", "neurons")}
    found = layerwise_scores(networks, inputs)
    for unit, score in {"heads": layer_head_scores, "neurons": layer_neuron_scores}.items():
        for i in range(networks.n_sparse):
            expected = score(networks, networks.dense_layers + i, inputs[unit][:, i])
            torch.testing.assert_close(found[unit][:, i], expected, rtol=1e-4, atol=1e-4)
