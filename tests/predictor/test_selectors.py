"""Selectors as masks: exact counts, the order of ties, and the dense result at full budget."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from shadowllm.config import TrainConfig
from shadowllm.errors import UserError
from shadowllm.models.decoder import Decoder
from shadowllm.models.sparsity import Budget
from shadowllm.predictor.criteria import find_criterion, unit_trace
from shadowllm.predictor.selectors import SELECTORS, Context, MaskedDecoder, PerLayerSelector, make_selector
from shadowllm.predictor.topk import active_mask, top_mask
from shadowllm.predictor.tracefile import calibrate
from shadowllm.predictor.train import train_network, train_static
from tests.tiny import split, token_windows

COUNTING = tuple(name for name in SELECTORS if name != "relu")  # with relu, the activation selects the neurons


@pytest.fixture(scope="module")
def context(tiny):
    spec, weights = tiny
    traces = calibrate(spec, weights, split(token_windows(spec)), "f00d")
    return Context(
        spec, weights, predictor=train_network(spec, traces, TrainConfig(rank=8, epochs=20, learning_rate=1e-2))
    )


def chooser(name, context):
    """A selector by name, on a predictor of its kind."""
    if name == "layerwise":
        traces = calibrate(context.spec, context.weights, split(token_windows(context.spec)), "f00d")
        config = TrainConfig(rank=8, epochs=10, learning_rate=1e-2)
        networks = train_network(context.spec, traces, config, kind="layerwise", weights=context.weights)
        context = replace(context, predictor=networks)
    return make_selector(name, context)


@pytest.mark.parametrize("n", [1, 2, 41, 123])
@pytest.mark.parametrize("levels", [2, 5, 10**6])
def test_top_mask_breaks_ties_towards_the_lower_index(n, levels):
    scores = torch.randint(0, levels, (7, n), generator=torch.Generator().manual_seed(n)).float()
    for count in {1, max(1, n // 3), n}:
        order = scores.argsort(dim=-1, descending=True, stable=True)[:, :count]
        assert torch.equal(top_mask(scores, count), torch.zeros_like(scores).scatter(1, order, 1.0).bool())


@pytest.mark.parametrize("name", SELECTORS)
def test_everything_kept_is_dense_to_the_bit(context, name):
    windows = token_windows(context.spec, n=2, seed=8)
    with torch.no_grad():
        dense = Decoder(context.spec, context.weights)(windows)
    assert torch.equal(MaskedDecoder(context, chooser(name, context), Budget())(windows), dense)


def test_a_decoder_is_freed_when_it_is_no_longer_used(context):
    """Budgets are measured by hundreds of decoders. Those that wait for the garbage collector would fill the memory."""
    decoder = MaskedDecoder(context, chooser("static", context), Budget(neurons=0.5))
    decoder(token_windows(context.spec, n=1, seed=8))
    masks = [weakref.ref(mask) for mask in decoder.masks.values()]
    gc.disable()
    try:
        del decoder
        assert [mask() for mask in masks] == [None] * len(masks)
    finally:
        gc.enable()


@pytest.mark.parametrize("name", COUNTING)
def test_each_token_has_exactly_the_counted_units(context, name):
    windows, budget = token_windows(context.spec, n=2, seed=8), Budget(neurons=(0.3, 0.7), heads=0.5)
    decoder = MaskedDecoder(context, chooser(name, context), budget)
    decoder(windows)
    counts = budget.counts(context.sparse_layers)
    assert decoder.masks.keys() == {(layer, unit) for layer in (1, 2) for unit in ("heads", "neurons")}
    for (layer, unit), mask in decoder.masks.items():
        assert mask.shape[:2] == windows.shape
        assert bool((mask.sum(dim=-1) == counts[unit][layer - 1]).all())


def test_relu_takes_no_budget_of_neurons(context):
    decoder = MaskedDecoder(context, chooser("relu", context), Budget(neurons=0.5))
    with pytest.raises(UserError, match="use a neuron budget of 1"):
        decoder(token_windows(context.spec, n=1, seed=8))


def test_heads_of_a_group_are_chosen_together_by_their_sum(llama):
    spec, weights = llama
    context = Context(replace(spec, head_unit="kv_group"), weights)
    scores = torch.tensor([[0.0, 4.0, 3.0, 2.0], [9.0, 0.0, 1.0, 2.0], [1.0, 2.0, 2.0, 1.0]])  # the last one a tie
    found = active_mask(context.spec, "heads", scores, 2)
    assert found.int().tolist() == [[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert torch.equal(active_mask(context.spec, "neurons", scores, 2), top_mask(scores, 2))
    decoder = MaskedDecoder(context, make_selector("oracle", context), Budget(heads=0.5))
    decoder(token_windows(spec, n=2, seed=8))
    for layer in (1, 2):
        pairs = decoder.masks[layer, "heads"].unflatten(-1, (2, 2))
        assert torch.equal(pairs.sum(dim=-1).sort(dim=-1).values, torch.tensor([0, 2]).expand(2, 24, 2))


@pytest.mark.parametrize("name", COUNTING)
def test_choices_depend_on_the_token_unless_static(context, name):
    decoder = MaskedDecoder(context, chooser(name, context), Budget(heads=0.5, neurons=0.3))
    decoder(token_windows(context.spec, n=2, seed=8))
    mask = decoder.masks[2, "neurons"].flatten(0, 1)
    assert bool((mask == mask[0]).all()) == (name == "static")


def test_masked_units_contribute_nothing(context):
    """Zeroed activations equal a model without the masked rows, for a selection that ignores the context."""
    spec, weights = context.spec, dict(context.weights)
    windows = token_windows(spec, n=1, seed=8)
    decoder = MaskedDecoder(context, make_selector("static", context), Budget(heads=0.5, neurons=0.3))
    logits = decoder(windows)
    for (layer, unit), mask in decoder.masks.items():
        name = f"layers.{layer}.{'o_proj' if unit == 'heads' else 'down_proj'}.weight"
        keep = mask[0, 0].repeat_interleave(spec.head_dim) if unit == "heads" else mask[0, 0]
        weights[name] = weights[name] * keep[:, None]
    with torch.no_grad():
        expected = Decoder(spec, weights)(windows)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_oracle_ranks_the_masked_model_in_place(context):
    windows, budget = token_windows(context.spec, n=1, seed=8), Budget(heads=0.5, neurons=0.3)
    decoder = MaskedDecoder(context, make_selector("oracle", context), budget)
    decoder(windows)
    seen = {}

    def replay(layer, unit, activation):
        seen[layer, unit] = activation
        mask = decoder.masks.get((layer, unit))
        return activation if mask is None else activation * (mask[..., None] if unit == "heads" else mask)

    with torch.no_grad():
        Decoder(context.spec, context.weights, replay)(windows)
    score = find_criterion("l2norm").score
    neurons = budget.counts(context.sparse_layers).neurons
    trace = unit_trace(context.spec, context.weights, 2, "neurons", seen[2, "neurons"])
    assert torch.equal(decoder.masks[2, "neurons"], top_mask(score(trace), int(neurons[1])))


def test_the_shadow_is_causal(context):
    """A token's selection must not depend on later tokens, because decoding does not know them."""
    windows = token_windows(context.spec, n=1, seed=8)
    changed = windows.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % context.spec.vocab_size
    masks = []
    for tokens in (windows, changed):
        decoder = MaskedDecoder(context, make_selector("shadow", context), Budget(heads=0.5, neurons=0.3))
        decoder(tokens)
        masks.append(decoder.masks)
    assert all(torch.equal(masks[0][key][:, :12], masks[1][key][:, :12]) for key in masks[0])


@pytest.mark.parametrize("name", ["static", "shadow", "layerwise"])
def test_trained_selectors_ask_for_a_predictor(llama, name):
    with pytest.raises(UserError, match=f"{name} selector needs a trained predictor"):
        make_selector(name, Context(*llama))


def test_unknown_selector_is_named(llama):
    with pytest.raises(UserError, match="'magic'"):
        make_selector("magic", Context(*llama))


def choices(context, chooser):
    decoder = MaskedDecoder(context, chooser, Budget(neurons=0.3))
    decoder(token_windows(context.spec, n=2, seed=8))
    return torch.stack([mask for (_, unit), mask in decoder.masks.items() if unit == "neurons"])


def test_a_copy_of_many_bits_chooses_what_the_oracle_does_and_fewer_bits_less_of_it(context):
    wanted = choices(context, make_selector("oracle", context))
    # The second sparse layer's input depends on the selection in the first, so only an exact copy gives equal results.
    recalls = [
        float((choices(context, PerLayerSelector(context, "quantized-shadow", bits)) & wanted).sum() / wanted.sum())
        for bits in (20, 4, 2)
    ]
    assert recalls[0] == 1
    assert 0.3 < recalls[2] < recalls[1] < 1


@pytest.mark.parametrize("name", ["layerwise", "quantized-shadow"])
@pytest.mark.parametrize("unit", ["heads", "neurons"])
def test_choosing_in_place_reads_the_layers_own_input(context, name, unit):
    """The selection must not depend on the activation."""
    per_layer = chooser(name, context)
    per_layer.observe(1, unit, torch.randn(1, 2, context.spec.hidden_size, generator=torch.Generator().manual_seed(5)))
    activation = torch.zeros(1, 2, {"heads": context.spec.n_heads, "neurons": context.spec.intermediate_size}[unit])
    found = per_layer.scores(1, unit, activation)
    assert found.shape == activation.shape
    assert torch.equal(found, per_layer.scores(1, unit, activation + 1))


@pytest.mark.parametrize("kind", ["shadow", "layerwise"])
def test_a_network_of_another_kind_is_refused(context, kind):
    static = train_static(context.spec, calibrate(*_model(context), split(token_windows(context.spec)), "f00d"))
    with pytest.raises(UserError, match=f"predictor is static, not {kind}"):
        make_selector(kind, replace(context, predictor=static))


def _model(context):
    return context.spec, context.weights


def test_the_heads_fit_finds_more_than_the_ranking_of_the_same_text(llama):
    """Tested on the training text, because with random weights little is true for another text."""
    spec, weights = llama
    traces = calibrate(spec, weights, split(token_windows(spec, n=40), held_out=8), "f00d")
    context = Context(spec, weights, predictor=train_static(spec, traces, kind="quantized-shadow"))

    def masks(name):
        decoder = MaskedDecoder(context, chooser(name, context), Budget(heads=0.5))
        decoder(traces.windows.train)
        return decoder.masks[1, "heads"]  # of the first sparse layer: every selector sees the same input there

    wanted = masks("oracle")
    static, found = ((masks(name) & wanted).sum() / wanted.sum() for name in ("static", "quantized-shadow"))
    assert found > static + 0.03


def test_a_predictor_without_the_fit_is_refused(context):
    bare = {name: tensor for name, tensor in context.predictor.tensors.items() if not name.startswith("layers.")}
    with pytest.raises(UserError, match="no fit of the heads"):
        PerLayerSelector(replace(context, predictor=replace(context.predictor, tensors=bare)), "quantized-shadow")
