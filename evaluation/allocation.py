"""Budgets per layer: layers that tolerate it keep few units, the others keep more.

If one layer keeps a fraction ``f`` of its units, the loss is modelled as ``scale * exp(-rate * f)``. The scale is
measured for each layer, the rate over all layers together. For a given price per byte, one allocation
loses least: in every layer, for heads and for neurons, the last byte saved costs the price. So only the
price must be searched to meet a target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shadowllm.bundle.cost_model import unit_elements
from shadowllm.malloc import return_freed_memory
from shadowllm.models.decoder import Decoder
from shadowllm.models.sparse_decoder import TOKENS_AT_ONCE
from shadowllm.models.sparsity import Budget, Unit, layer_units
from shadowllm.predictor.selectors import Context, MaskedDecoder, Selector
from shadowllm.progress import Advance, no_progress

# Fractions at which losses are measured. The first is low enough for a clear loss; the second gives the rate.
PROBES: Mapping[Unit, tuple[float, float]] = {"heads": (0.5, 0.75), "neurons": (0.25, 0.5)}
# With two groups of heads, only one can be left out, and one loss gives no rate. With this rate, the price at which a
# group is left out is near the measured loss per element saved.
RATE_OF_TWO = 4.0
LEAST = 0.05  # smallest fraction
STEPS = 8  # steps of the search for a price
# A loss is clearly above a limit if its mean over so many windows is by so many standard errors.
ENOUGH, CLEARLY = 5, 3.0
TINY = 1e-9


@dataclass(frozen=True)
class Sensitivity:
    """The loss model of one kind of unit.

    Attributes:
        scales: scale of each sparse layer, nats.
        rate: how fast the loss falls as the fraction grows.
        weights: number of weights that a layer saves by leaving out all units.
    """

    scales: np.ndarray
    rate: float
    weights: int

    def fractions(self, price: float) -> tuple[float, ...]:
        """Return the fraction of each layer at which one more weight saves ``price`` nats."""
        found = np.log(np.maximum(self.scales, TINY) * self.rate / (price * self.weights)) / self.rate
        return tuple(np.clip(found, LEAST, 1.0).tolist())


@dataclass(frozen=True)
class Allocation:
    """The loss models of heads and neurons, which give a budget for every price."""

    heads: Sensitivity
    neurons: Sensitivity

    def budget(self, price: float) -> Budget:
        """Return the best budget at a price in nats per weight."""
        return Budget(heads=self.heads.fractions(price), neurons=self.neurons.fractions(price))

    def prices(self) -> tuple[float, float]:
        """Return a price at which everything is kept, and one at which all layers keep the fraction `LEAST`."""
        units = (self.heads, self.neurons)
        low = min(float((s.scales.min() + TINY) * s.rate / s.weights * math.exp(-s.rate)) for s in units)
        high = max(float((s.scales.max() + TINY) * s.rate / s.weights * math.exp(-s.rate * LEAST)) for s in units)
        return low / 2, high


class Loss:
    """Measures the perplexity of a selector, and its mean KL divergence from the dense model.

    It keeps the outputs of the dense model's last layer in memory. Next-token distributions of the whole text can be
    larger than the weights of a small model. So they are computed for one window at a time, and freed memory is handed
    back after each: temporaries of many sizes would else leave more and more gaps.

    Args:
        windows: int64 ``(n, seqlen)``.
    """

    def __init__(self, context: Context, chooser: Selector, windows: Tensor) -> None:
        self.context, self._chooser, self._windows = context, chooser, windows
        self._known: dict[Budget, float] = {}
        with torch.no_grad():
            self._dense = Decoder(context.spec, context.weights)
            self._hidden = [self._dense.hidden(window) for window in windows.split(1)]
        self._entropies = [float(F.nll_loss(self._distributions(i), windows[i, 1:])) for i in range(len(windows))]
        self.dense_log_perplexity = fmean(self._entropies)

    def increase(self, budget: Budget, limit: float = math.inf) -> float:
        """Return by how much the mean next-token cross entropy is above the dense model's, nats.

        A budget is measured only once.

        Args:
            limit: a budget that is clearly above it after some windows is read no further. The mean of these windows
                is returned, which is above the limit too.
        """
        if budget in self._known:
            return self._known[budget]
        found: list[float] = []
        decoder = self._decoder(budget)
        for i, dense in enumerate(self._entropies):
            found.append(float(F.cross_entropy(self._logits(decoder, i), self._windows[i, 1:])) - dense)
            return_freed_memory()
            if len(found) >= ENOUGH and fmean(found) - CLEARLY * stdev(found) / math.sqrt(len(found)) > limit:
                return fmean(found)
        self._known[budget] = fmean(found)
        return self._known[budget]

    def divergences(self, budgets: Sequence[Budget], share: float = 1.0, advance: Advance = no_progress) -> list[float]:
        """Return the mean KL divergence of each budget from the dense model, nats, over the first windows or all.

        Each window is read with all budgets before the next one, so that its dense distributions are computed once.

        Args:
            share: share of the windows that are read.
            advance: called with 1 for each budget, spread evenly over the windows.
        """
        n = max(1, round(share * len(self._windows)))
        found: list[list[float]] = [[] for _ in budgets]
        for i in range(n):
            dense = self._distributions(i)
            for budget, values in zip(budgets, found, strict=True):
                values.append(_divergence(self._logits(self._decoder(budget), i), dense))
            return_freed_memory()
            advance(len(budgets) * (i + 1) // n - len(budgets) * i // n)
        return list(map(fmean, found))

    @torch.no_grad()
    def _distributions(self, i: int) -> Tensor:
        """Return the logarithms of the dense model's next-token distributions in a window; shapes as `_logits`."""
        return self._dense.logits(self._hidden[i])[0, :-1].log_softmax(dim=-1)

    def _decoder(self, budget: Budget) -> MaskedDecoder:
        return MaskedDecoder(self.context, self._chooser, budget)

    def _logits(self, decoder: MaskedDecoder, i: int) -> Tensor:
        """Return the logits of a window, without those of its last token: ``(seqlen - 1, vocab_size)``."""
        # With all units, the layers give what they give in the dense model.
        logits = decoder.logits(self._hidden[i]) if decoder.whole else decoder(self._windows[i : i + 1])
        return logits[0, :-1]


def _divergence(logits: Tensor, dense: Tensor) -> float:
    """Return the mean KL divergence of logits from logarithms of distributions, a few tokens at a time, nats."""
    parts = zip(logits.split(TOKENS_AT_ONCE), dense.split(TOKENS_AT_ONCE), strict=True)
    found = (F.kl_div(part.log_softmax(dim=-1), of, reduction="sum", log_target=True) for part, of in parts)
    return float(sum(found)) / len(logits)


def passes(n_sparse: int) -> int:
    """Return the number of passes over the text that `measure` makes."""
    return 2 * (n_sparse + 2)


def measure(context: Context, loss: Loss, advance: Advance = no_progress) -> Allocation:
    """Measure how much each layer loses by leaving out units.

    Args:
        advance: called with 1 after each pass, `passes` times in total.
    """
    spec, n_sparse = context.spec, context.sparse_layers.count
    found: dict[Unit, Sensitivity] = {}
    for unit, width in layer_units(spec).items():
        n_units = width // spec.heads_together if unit == "heads" else width
        low, high = _probes(unit, n_units)
        together = [(fraction,) * n_sparse for fraction in (low, high)]
        single = [tuple(low if i == row else 1.0 for i in range(n_sparse)) for row in range(n_sparse)]
        lost = loss.divergences([_of_unit(unit, fractions) for fractions in together + single], advance=advance)
        at_low, at_high, *alone = np.maximum(lost, TINY)
        rate = max(math.log(at_low / at_high) / (high - low), 1.0) if n_units > 2 else RATE_OF_TWO
        found[unit] = Sensitivity(np.array(alone) * math.exp(rate * low), rate, width * unit_elements(spec, unit))
    return Allocation(found["heads"], found["neurons"])


def _of_unit(unit: Unit, fractions: tuple[float, ...]) -> Budget:
    return Budget(heads=fractions) if unit == "heads" else Budget(neurons=fractions)


def _probes(unit: Unit, n_units: int) -> tuple[float, float]:
    """Return two fractions that leave out different numbers of units. With few groups of heads: two and one."""
    low, high = PROBES[unit]
    if round(low * n_units) < round(high * n_units) < n_units:
        return low, high
    return max(n_units - 2, 1) / n_units, max(n_units - 1, 1) / n_units


def bisect(allocation: Allocation, go_sparser: Callable[[Budget], bool]) -> tuple[Budget | None, Budget | None]:
    """Search for the price at which ``go_sparser`` changes from true to false. It is called `STEPS` times.

    Returns:
        The sparsest budget for which it was true, and the densest for which it was false. None if there was none.
    """
    low, high = (math.log(price) for price in allocation.prices())
    denser = sparser = None
    for _ in range(STEPS):
        middle = (low + high) / 2
        budget = allocation.budget(math.exp(middle))
        if go_sparser(budget):
            denser, low = budget, middle
        else:
            sparser, high = budget, middle
    return denser, sparser
