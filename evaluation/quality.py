"""Quality of selectors at budgets: perplexity, distance from the dense model, and recall of important units.

It is measured teacher-forced over token windows. Every position has its own selection, as in decoding.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shadowllm.bundle.predictor_file import Predictor
from shadowllm.errors import UserError
from shadowllm.models.decoder import Decoder
from shadowllm.models.sparse_decoder import Certificate
from shadowllm.models.sparsity import UNITS, Budget, Fractions, Rest, Unit
from shadowllm.models.spec import ModelSpec
from shadowllm.predictor.criteria import find_criterion
from shadowllm.predictor.selectors import Context, MaskedDecoder, Selector, make_selector
from shadowllm.predictor.topk import active_mask
from shadowllm.predictor.traces import Tracer
from shadowllm.progress import Advance, no_progress
from shadowllm.runtime.recomputed_rows import RecomputedRows

DENSE = "dense"
Place = tuple[int, Unit]  # a layer's heads or neurons


@dataclass(frozen=True)
class LayerResult:
    """The recall of a selector in one sparse layer.

    Attributes:
        head_recall, neuron_recall: share of the truly important units that were selected.
        head_gap_closure, neuron_gap_closure: (recall - static's) / (1 - static's) at the same budget. This is the
            share of what static misses that was found. None if static was not run or misses nothing.
    """

    layer: int
    head_recall: float
    neuron_recall: float
    head_gap_closure: float | None = None
    neuron_gap_closure: float | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of one selector at one budget. Figures are means over all predicted tokens.

    Attributes:
        selector: its name; "dense" for the model without sparsity.
        head_budget, neuron_budget: fractions kept in the sparse layers, on average.
        shortlist: rows of the output table that were computed exactly; None for all.
        rest: what the other heads and neurons contributed; None for a dense model.
        perplexity: exp of the mean next-token cross entropy (nats).
        kl: KL divergence of the selector's next-token distribution from the dense model's, nats.
        top1_agreement: share of positions with the same most probable token as the dense model.
        head_recall, neuron_recall: share of the truly important units (the criterion's top k in the
            dense pass) that were selected; 1 for dense.
        gap_closure: (ln ppl_static - ln ppl) / (ln ppl_static - ln ppl_oracle) at the same budget.
            None if static or oracle was not run, or if they do not differ.
        layers: recall per layer; empty for dense.
        certify: whether the largest logit was proved to be that of the whole table.
        recomputed_rows: ``mean`` and ``fallback_share`` of the rows of the output table that were computed exactly, see
            `RecomputedRows.summary`; empty without a shortlist.
        budget: what was evaluated, with the fractions of each layer.
    """

    selector: str
    head_budget: float
    neuron_budget: float
    perplexity: float
    kl: float
    top1_agreement: float
    head_recall: float
    neuron_recall: float
    gap_closure: float | None = None
    layers: tuple[LayerResult, ...] = ()
    shortlist: int | None = None
    rest: Rest | None = None
    certify: bool = False
    recomputed_rows: Mapping[str, float] = field(default_factory=dict)
    budget: Budget = field(default_factory=Budget)

    def row(self) -> dict[str, Any]:
        """Return the JSON of the result, in which budgets are means over the layers."""
        return {name: value for name, value in asdict(self).items() if name != "budget"}


def evaluate(
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    predictor: Predictor | None,
    selector: str | Sequence[str] | Mapping[str, Selector],
    windows: Tensor,
    *,
    head_budgets: Sequence[Fractions] = (1.0,),
    neuron_budgets: Sequence[Fractions],
    shortlists: Sequence[int | None] = (None,),
    rests: Sequence[Rest | None] = (None,),
    copies: Mapping[str, Tensor] | None = None,
    certificate: Certificate | None = None,
    dense_layers: int = 1,
    criterion: str | None = None,
    aggregate: str = "token",
    seed: int = 0,
    advance: Advance = no_progress,
) -> list[Result]:
    """Run selectors at every combination of a head budget, a neuron budget, a rest and a shortlist.

    Args:
        weights: canonical tensors, float32 when they are read.
        predictor: needed by all selectors except ``random`` and ``oracle``. If given, its ``dense_layers`` is used.
        selector: one name, several names, or a mapping from names in the results to selectors.
        windows: int64 ``(n, seqlen)``; each is a separate text.
        shortlists, rests: see `Budget`.
        copies: values of the low-bit copy (`low_bit_copies` with ``rest``), which a shortlist and ``rest="shadow"``
            need.
        certificate: proves the largest logit of every position with a shortlist; None for no proof.
        criterion: defines the true importance. If None: that of the predictor, or ``l2norm`` without one.
        aggregate: whether every token has its own selection; see `MaskedDecoder`.
        seed: seed of the random selector.
        advance: called with 1 after each pass, ``n * (1 + selectors * budgets)`` times in total.

    Returns:
        The dense result first, then the results of each selector, with budgets in the given order.

    Raises:
        UserError: no windows, windows of one token, an unknown name, a budget outside (0, 1], a missing predictor or
            missing copies.
    """
    if windows.ndim != 2 or not len(windows) or windows.shape[1] < 2:
        raise UserError("nothing to evaluate on", "give at least one window of two tokens")
    if predictor is not None:
        dense_layers = predictor.dense_layers
        criterion = criterion or predictor.record.get("criterion")
    context = Context(spec, weights, dense_layers, predictor, criterion or "l2norm", seed, copies, certificate)
    if not isinstance(selector, Mapping):
        names = [selector] if isinstance(selector, str) else selector
        selector = {name: make_selector(name, context) for name in names}
    runs = [
        _Run(name, chooser, budget, context, aggregate)
        for name, chooser in selector.items()
        for budget in combinations(head_budgets, neuron_budgets, shortlists, rests, certificate is not None)
    ]
    dense = Sums()
    for window in windows.split(1):
        logits, truth = _dense_pass(context, window)
        dense.add(window, logits, logits)
        advance(1)
        for run in runs:
            run.add(window, logits, truth)
            advance(1)
    return [dense.result(DENSE, Budget()), *_with_gap_closure(runs)]


def combinations(
    heads: Sequence[Fractions],
    neurons: Sequence[Fractions],
    shortlists: Sequence[int | None] = (None,),
    rests: Sequence[Rest | None] = (None,),
    certify: bool = False,
) -> list[Budget]:
    """Return the budgets of all combinations, in the order in which they are evaluated."""
    return [
        Budget(heads=h, neurons=n, shortlist=rows, rest=rest, certify=certify)
        for h, n, rest, rows in product(heads, neurons, rests, shortlists)
    ]


@torch.no_grad()
def _dense_pass(context: Context, window: Tensor) -> tuple[Tensor, dict[Unit, Tensor]]:
    """Return the dense logits, and the true importance of every unit, ``(positions, n_sparse, n_units)``.

    The positions are those that the criterion scores.
    """
    tracer = Tracer(context.spec, context.weights, context.criterion, context.dense_layers)
    with torch.set_grad_enabled(find_criterion(context.criterion).needs_gradients):
        traced = tracer.trace(window).scored(context.criterion, window.shape[1])
    return Decoder(context.spec, context.weights)(window), {unit: traced.importance(unit) for unit in UNITS}


@dataclass
class Sums:
    """Sums over the windows so far, from which a `Result` is made."""

    tokens: int = 0
    nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    hit: Counter[Place] = field(default_factory=Counter)
    wanted: Counter[Place] = field(default_factory=Counter)

    def add(self, window: Tensor, logits: Tensor, dense: Tensor) -> None:
        """Compare the logits of one window ``(1, seqlen)`` with the dense model's."""
        mine, theirs = (x[0, :-1].log_softmax(dim=-1) for x in (logits, dense))
        self.tokens += len(mine)
        self.nll += float(F.nll_loss(mine, window[0, 1:], reduction="sum"))
        self.kl += float(F.kl_div(mine, theirs, reduction="sum", log_target=True))
        self.agreed += int((mine.argmax(dim=-1) == theirs.argmax(dim=-1)).sum())

    def recall(self, unit: Unit, layer: int | None = None) -> float:
        """Return the recall of one layer, or of all."""
        places = [place for place in self.wanted if place[1] == unit and layer in (None, place[0])]
        wanted = sum(self.wanted[place] for place in places)
        return sum(self.hit[place] for place in places) / wanted if wanted else 1.0

    def result(self, name: str, budget: Budget) -> Result:
        """Return the means over all tokens, under the name of a selector and its budget."""
        layers = sorted({layer for layer, _ in self.wanted})
        return Result(
            selector=name,
            head_budget=float(np.mean(budget.heads)),
            neuron_budget=float(np.mean(budget.neurons)),
            perplexity=math.exp(self.nll / self.tokens),
            kl=self.kl / self.tokens,
            top1_agreement=self.agreed / self.tokens,
            head_recall=self.recall("heads"),
            neuron_recall=self.recall("neurons"),
            layers=tuple(LayerResult(layer, *(self.recall(unit, layer) for unit in UNITS)) for layer in layers),
            shortlist=budget.shortlist,
            rest=budget.rest,
            certify=budget.certify,
            budget=budget,
        )


class _Run:
    """One selector at one budget."""

    def __init__(self, name: str, chooser: Selector, budget: Budget, context: Context, aggregate: str) -> None:
        self.name, self.budget = name, budget
        self._layers = context.sparse_layers
        self._counts = budget.counts(self._layers)
        self._decoder = MaskedDecoder(context, chooser, budget, aggregate)
        self._rest = budget.rest_with(context.copies is not None)
        self._sums, self._recomputed = Sums(), RecomputedRows(budget)

    def add(self, window: Tensor, dense: Tensor, truth: Mapping[Unit, Tensor]) -> None:
        self._sums.add(window, self._decoder(window), dense)
        assert self._decoder.recomputed is not None
        self._recomputed.add(self._decoder.recomputed.numpy())
        for (layer, unit), chosen in self._decoder.masks.items():
            row = self._layers.row(layer)
            wanted = active_mask(self._layers.spec, unit, truth[unit][:, row], int(self._counts[unit][row]))
            self._sums.hit[layer, unit] += int((chosen[0][: len(wanted)] & wanted).sum())
            self._sums.wanted[layer, unit] += int(wanted.sum())

    def result(self) -> Result:
        found = self._sums.result(self.name, replace(self.budget, rest=self._rest))
        return replace(found, recomputed_rows=self._recomputed.summary())


def _with_gap_closure(runs: Sequence[_Run]) -> Iterator[Result]:
    # The key is what was asked for: the budget of a result also has the rest that was used.
    found = {(run.name, run.budget): run.result() for run in runs}
    for (_, budget), result in found.items():
        static, oracle = (found.get((name, budget)) for name in ("static", "oracle"))
        yield result if static is None else _closed(result, static, oracle)


def _closed(result: Result, static: Result, oracle: Result | None) -> Result:
    closure = None
    if oracle is not None and static.perplexity != oracle.perplexity:
        mine, low, high = (math.log(r.perplexity) for r in (result, static, oracle))
        closure = (low - mine) / (low - high)
    layers = (_closed_layer(mine, theirs) for mine, theirs in zip(result.layers, static.layers, strict=True))
    return replace(result, gap_closure=closure, layers=tuple(layers))


def _closed_layer(mine: LayerResult, static: LayerResult) -> LayerResult:
    def closure(recall: float, base: float) -> float | None:
        return (recall - base) / (1 - base) if base < 1 else None

    return replace(
        mine,
        head_gap_closure=closure(mine.head_recall, static.head_recall),
        neuron_gap_closure=closure(mine.neuron_recall, static.neuron_recall),
    )
