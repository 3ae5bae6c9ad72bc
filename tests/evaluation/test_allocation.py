"""Budgets per layer: the least loss for the elements saved, and the price that meets a target."""

from __future__ import annotations

import gc
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from shadowllm.evaluation.allocation import (
    ENOUGH,
    LEAST,
    STEPS,
    Allocation,
    Loss,
    Sensitivity,
    _probes,
    bisect,
    measure,
    passes,
)
from shadowllm.models.decoder import Decoder
from shadowllm.models.sparsity import Budget
from shadowllm.predictor.selectors import Context, MaskedDecoder, make_selector
from tests.tiny import token_windows

MADE = Allocation(
    Sensitivity(np.array([1.0, 0.1]), rate=5.0, weights=1000), Sensitivity(np.array([1.0, 0.3]), rate=8.0, weights=4000)
)


def lost(budget):
    return sum(
        float((sense.scales * np.exp(-sense.rate * np.array(fractions))).sum())
        for sense, fractions in ((MADE.heads, budget.heads), (MADE.neurons, budget.neurons))
    )


def kept(budget):
    return 1000 * sum(budget.heads) + 4000 * sum(budget.neurons)


def test_no_allocation_of_the_same_size_loses_less():
    best = MADE.budget(1e-4)
    assert all(LEAST < f < 1 for f in (*best.heads, *best.neurons))
    for moved, (to, at), (back, there) in itertools.product(
        (0.02, -0.02), itertools.product(("heads", "neurons"), (0, 1)), itertools.product(("heads", "neurons"), (0, 1))
    ):
        if (to, at) == (back, there):
            continue
        other = {"heads": list(best.heads), "neurons": list(best.neurons)}
        other[to][at] += moved * 1000 / getattr(MADE, to).weights
        other[back][there] -= moved * 1000 / getattr(MADE, back).weights
        other = Budget(heads=tuple(other["heads"]), neurons=tuple(other["neurons"]))
        assert kept(other) == pytest.approx(kept(best))
        assert lost(other) > lost(best)


def test_prices_span_everything_and_the_least():
    low, high = MADE.prices()
    assert MADE.budget(low) == Budget(heads=(1.0, 1.0), neurons=(1.0, 1.0))
    assert MADE.budget(high) == Budget(heads=(LEAST, LEAST), neurons=(LEAST, LEAST))


def test_bisection_brackets_a_size():
    asked = []

    def go_sparser(budget):
        asked.append(kept(budget))
        return asked[-1] > 5000

    denser, sparser = bisect(MADE, go_sparser)
    assert len(asked) == STEPS
    assert kept(sparser) <= 5000 < kept(denser)
    assert kept(denser) - kept(sparser) < 300
    assert bisect(MADE, lambda _: True)[1] is None
    assert bisect(MADE, lambda _: False)[0] is None


def test_a_model_is_measured_layer_by_layer(tiny):
    spec, weights = tiny
    context = Context(spec, weights)
    loss = Loss(context, make_selector("oracle", context), token_windows(spec))
    ticks = []
    found = measure(context, loss, ticks.append)
    assert sum(ticks) == passes(2)
    for unit, sense in (("heads", found.heads), ("neurons", found.neurons)):
        low = {"heads": 0.5, "neurons": 0.25}[unit]
        alone = loss.divergences([Budget(**{unit: f}) for f in ((low, 1.0), (1.0, low))])
        np.testing.assert_allclose(sense.scales * math.exp(-sense.rate * low), alone, rtol=1e-6)


@pytest.mark.parametrize(("groups", "kept"), [(9, (4, 7)), (4, (2, 3)), (3, (1, 2)), (2, (1, 1)), (1, (1, 1))])
def test_probes_leave_out_different_numbers_of_units_where_they_can(groups, kept):
    assert tuple(round(fraction * groups) for fraction in _probes("heads", groups)) == kept


def test_losses_are_those_of_the_masked_model(llama):
    spec, weights = llama
    context, windows = Context(spec, weights), token_windows(spec)
    loss = Loss(context, make_selector("oracle", context), windows)
    with torch.no_grad():
        logits = Decoder(spec, weights)(windows)
    dense = F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    assert loss.dense_log_perplexity == pytest.approx(float(dense), rel=1e-5)
    assert loss.increase(Budget()) == pytest.approx(0, abs=1e-5)
    ticks = []
    whole, less, least = loss.divergences([Budget(), Budget(neurons=0.6), Budget(neurons=0.3)], advance=ticks.append)
    assert sum(ticks) == 3
    assert whole == pytest.approx(0, abs=1e-6)
    assert least > less > 0


def test_no_distributions_of_the_text_stay_in_memory(llama):
    spec, weights = llama
    context, windows = Context(spec, weights), token_windows(spec)
    before = distributions(spec)
    loss = Loss(context, make_selector("oracle", context), windows)
    loss.divergences([Budget(neurons=0.5), Budget(neurons=0.3)])
    loss.increase(Budget(neurons=0.3))
    assert distributions(spec) == before


def distributions(spec):
    """The number of tensors in memory that have an element for each token of the vocabulary in their last dimension."""
    gc.collect()
    return sum(issubclass(type(x), Tensor) and x.shape[-1:] == (spec.vocab_size,) for x in gc.get_objects())


def test_a_budget_clearly_above_the_limit_is_not_read_to_the_end(llama, monkeypatch):
    spec, weights = llama
    context, read = Context(spec, weights), []
    windows = token_windows(spec, 12)
    masked = MaskedDecoder.__call__
    monkeypatch.setattr(MaskedDecoder, "__call__", lambda self, one: read.append(1) or masked(self, one))
    loss = Loss(context, make_selector("random", context), windows)
    some = loss.increase(Budget(neurons=0.1), limit=-1.0)
    assert len(read) == ENOUGH
    whole = loss.increase(Budget(neurons=0.1))
    assert len(read) == ENOUGH + len(windows)
    start = Loss(context, make_selector("random", context), windows[:ENOUGH])
    assert some == pytest.approx(start.increase(Budget(neurons=0.1)), abs=1e-6)
    read.clear()
    assert loss.increase(Budget(neurons=0.1), limit=-1.0) == whole  # known, so it is not read again
    assert not read
