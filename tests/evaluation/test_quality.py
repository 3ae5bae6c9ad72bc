"""Quality measurement on tiny models of both families."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from shadowllm.config import TrainConfig
from shadowllm.errors import UserError
from shadowllm.evaluation.quality import evaluate
from shadowllm.models.decoder import Decoder
from shadowllm.models.sparsity import Budget, SparseLayers
from shadowllm.predictor.low_bit_copy import low_bit_copies
from shadowllm.predictor.selectors import Context, MaskedDecoder, make_selector
from shadowllm.predictor.topk import top_mask
from shadowllm.predictor.tracefile import calibrate
from shadowllm.predictor.traces import Tracer
from shadowllm.predictor.train import train_network, train_static
from tests.tiny import split, token_windows

SELECTORS = ["static", "shadow", "random", "oracle"]


@pytest.fixture(scope="module", params=["l2norm", "plainact"])
def evaluated(request, tiny):
    spec, weights = tiny
    traces = calibrate(spec, weights, split(token_windows(spec)), "f00d", criterion=request.param)
    predictor = train_network(spec, traces, TrainConfig(rank=8, epochs=2))
    windows = token_windows(spec, n=3, seed=8)
    return windows, evaluate(
        spec, weights, predictor, SELECTORS, windows, neuron_budgets=[1.0, 0.4], head_budgets=[1.0, 0.5]
    )


def test_dense_perplexity_is_that_of_the_logits(evaluated, tiny):
    spec, weights = tiny
    windows, results = evaluated
    with torch.no_grad():
        logits = Decoder(spec, weights)(windows)[:, :-1].double()
    expected = math.exp(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))
    assert results[0].selector == "dense"
    assert results[0].perplexity == pytest.approx(expected, rel=1e-5)
    assert (results[0].kl, results[0].top1_agreement) == (0.0, 1.0)


def test_every_selector_runs_at_every_budget(evaluated):
    _, results = evaluated
    expected = [(name, n, h) for name in SELECTORS for h in (1.0, 0.5) for n in (1.0, 0.4)]
    assert [(r.selector, r.neuron_budget, r.head_budget) for r in results[1:]] == expected


def test_full_budget_is_dense_and_less_is_not(evaluated):
    _, results = evaluated
    dense = results[0].perplexity
    for result in results[1:]:
        if result.neuron_budget == result.head_budget == 1.0:
            assert (result.perplexity, result.kl, result.top1_agreement) == (dense, 0.0, 1.0)
            assert result.neuron_recall == result.head_recall == 1.0
        else:
            assert result.kl > 0
            assert 0 < result.top1_agreement < 1


def test_the_oracle_keeps_more_of_what_matters_than_chance(evaluated):
    _, results = evaluated
    found = {(r.selector, r.neuron_budget, r.head_budget): r for r in results}
    oracle, random = (found[name, 0.4, 0.5] for name in ("oracle", "random"))
    assert abs(random.neuron_recall - 0.4) < 0.05
    assert oracle.neuron_recall > random.neuron_recall + 0.3
    assert found["oracle", 0.4, 1.0].kl < found["random", 0.4, 1.0].kl


def test_gap_closure_spans_static_to_oracle(evaluated):
    _, results = evaluated
    for result in results:
        if result.neuron_budget == result.head_budget == 1.0:
            assert result.gap_closure is None
        elif result.selector in ("static", "oracle"):
            assert result.gap_closure == pytest.approx(0.0 if result.selector == "static" else 1.0)


def test_layers_add_up(evaluated):
    _, results = evaluated
    assert results[0].layers == ()
    for result in results[1:]:
        assert [found.layer for found in result.layers] == [1, 2]
        # Every layer keeps the same number of units, so the mean over layers is the mean over units.
        for unit in ("neuron", "head"):
            recalls = [getattr(found, f"{unit}_recall") for found in result.layers]
            assert sum(recalls) / 2 == pytest.approx(getattr(result, f"{unit}_recall"))
        static = next(r for r in results if (r.selector, r.neuron_budget, r.head_budget) == ("static", 0.4, 0.5))
        if (result.neuron_budget, result.head_budget) == (0.4, 0.5):
            mine, base = result.layers[1], static.layers[1]
            expected = (mine.neuron_recall - base.neuron_recall) / (1 - base.neuron_recall)
            assert mine.neuron_gap_closure == pytest.approx(expected)
        if result.neuron_budget == 1:
            assert result.layers[0].neuron_gap_closure is None


@pytest.mark.parametrize("aggregate", ["sequence", "last-token"])
def test_one_choice_for_a_window(llama, aggregate):
    spec, weights = llama
    context, windows = Context(spec, weights), token_windows(spec, n=2, seed=8)
    decoder = MaskedDecoder(context, make_selector("oracle", context), Budget(heads=0.5, neurons=0.4), aggregate)
    decoder(windows)
    first = {key: mask for key, mask in decoder.masks.items() if key[0] == 1}
    assert all(torch.equal(mask, mask[:, :1].expand_as(mask)) for mask in decoder.masks.values())
    # Nothing before the first sparse layer is masked, so its importance is that of the dense model.
    traced = Tracer(spec, weights, "l2norm").trace(windows).heads[:, 0].unflatten(0, windows.shape)
    scores = traced.mean(dim=1) if aggregate == "sequence" else traced[:, -1]
    assert torch.equal(first[1, "heads"][:, 0], top_mask(scores, 2))


def test_one_choice_for_a_window_is_worse_than_one_for_each_token(llama):
    spec, weights = llama
    windows = token_windows(spec, n=3, seed=8)
    token, sequence, last = (
        evaluate(spec, weights, None, "oracle", windows, neuron_budgets=[0.4], aggregate=name)[1]
        for name in ("token", "sequence", "last-token")
    )
    assert token.kl < sequence.kl < last.kl
    with pytest.raises(UserError, match="no aggregation 'word'"):
        evaluate(spec, weights, None, "oracle", windows, neuron_budgets=[0.4], aggregate="word")


def test_results_repeat(llama):
    spec, weights = llama
    windows = token_windows(spec, n=2)
    first, again = (evaluate(spec, weights, None, "random", windows, neuron_budgets=[0.4], seed=5) for _ in range(2))
    assert first == again
    assert first != evaluate(spec, weights, None, "random", windows, neuron_budgets=[0.4], seed=6)


def test_senseless_requests_are_refused(llama):
    spec, weights = llama
    with pytest.raises(UserError, match="budget"):
        evaluate(spec, weights, None, "oracle", token_windows(spec), neuron_budgets=[1.5])
    with pytest.raises(UserError, match="at least one window"):
        evaluate(spec, weights, None, "oracle", torch.zeros(0, 8, dtype=torch.int64), neuron_budgets=[0.5])
    with pytest.raises(UserError, match="needs a trained predictor"):
        evaluate(spec, weights, None, "static", token_windows(spec), neuron_budgets=[0.5])


def test_gap_closure_goes_by_the_budgets_themselves_not_by_their_means(tiny):
    spec, weights = tiny
    n_sparse = spec.n_layers - 1
    uneven = tuple(np.linspace(0.2, 0.8, n_sparse))
    traces = calibrate(spec, weights, split(token_windows(spec)), "f00d")
    predictor = train_network(spec, traces, TrainConfig(rank=8, epochs=2))
    windows = token_windows(spec, n=2, seed=8)
    both = evaluate(spec, weights, predictor, SELECTORS, windows, neuron_budgets=[0.5, uneven])
    assert all(result.neuron_budget == pytest.approx(0.5) for result in both[1:])
    for position, budget in enumerate((0.5, uneven)):
        alone = evaluate(spec, weights, predictor, SELECTORS, windows, neuron_budgets=[budget])
        assert [r.gap_closure for r in both[1 + position :: 2]] == [r.gap_closure for r in alone[1:]]


@pytest.fixture(scope="module")
def mixed(llama):
    spec, weights = llama
    return spec, weights, low_bit_copies(SparseLayers(spec, 1), weights, rest=True)


def test_a_rest_from_the_low_bit_copy_is_nearer_to_dense_than_none(mixed):
    spec, weights, copies = mixed
    found = evaluate(
        spec,
        weights,
        None,
        ["oracle", "random"],
        token_windows(spec, n=2, seed=8),
        neuron_budgets=[0.2],
        head_budgets=[0.5],
        rests=["shadow", "drop"],
        shortlists=[None, 10, spec.vocab_size],
        copies=copies,
    )
    expected = [("dense", None, None)]
    expected += [
        (name, *b) for name in ("oracle", "random") for b in itertools.product(("shadow", "drop"), (None, 10, 97))
    ]
    assert [(r.selector, r.rest, r.shortlist) for r in found] == expected
    for results in (found[1:7], found[7:]):
        shadow, shadow_10, shadow_all, drop, drop_10, _ = results
        assert 0 < shadow.kl < drop.kl
        assert shadow_10.kl > shadow.kl == shadow_all.kl
        assert drop_10.kl != drop.kl
        assert (shadow.neuron_recall, shadow.head_recall) == (shadow_10.neuron_recall, shadow_10.head_recall)


def test_copies_are_used_unless_a_budget_says_otherwise(mixed):
    spec, weights, copies = mixed
    windows = token_windows(spec, n=1)
    assert evaluate(spec, weights, None, "oracle", windows, neuron_budgets=[0.2], copies=copies)[1].rest == "shadow"
    assert evaluate(spec, weights, None, "oracle", windows, neuron_budgets=[0.2])[1].rest == "drop"
    with pytest.raises(UserError, match="no low-bit copy"):
        evaluate(spec, weights, None, "oracle", windows, neuron_budgets=[0.2], shortlists=[10])


@pytest.mark.parametrize(("criterion", "positions"), [("l2norm", 24), ("plainact", 23)])
def test_recall_is_counted_at_the_positions_that_the_criterion_scores(tiny, criterion, positions):
    """With gradients, the scores of the last position are 0, and its most important units would be the first ones."""
    spec, weights = tiny
    traces = calibrate(spec, weights, split(token_windows(spec)), "f00d", criterion=criterion)
    window = token_windows(spec, n=1, seed=8)
    static = evaluate(spec, weights, train_static(spec, traces), "static", window, neuron_budgets=[0.25])[1]
    count = round(0.25 * spec.intermediate_size)
    kept = traces.statistics["neurons"].topk(count).indices.tolist()
    scores = Tracer(spec, weights, criterion).trace(window).neurons[:positions]
    hits = sum(len(set(row.topk(count).indices.tolist()) & set(kept[i])) for t in scores for i, row in enumerate(t))
    assert static.neuron_recall == pytest.approx(hits / (positions * len(kept) * count))
