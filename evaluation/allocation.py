"""Budgets per layer: layers that tolerate it keep few units, the others keep more.

If one layer keeps a fraction ``f`` of its units, the loss is modelled as ``scale * exp(-rate * f)``. The scale is
measured for each layer, the rate over all layers together. For a given price per byte, one allocation
loses least: in every layer, for heads and for neurons, the last byte saved costs the price. So only the
price must be searched to meet a target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shadowllm.bundle.cost_model import unit_elements
from shadowllm.models.decoder import Decoder
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

    It keeps what the dense model gave in memory: next-token distributions, float32 ``(tokens, vocab_size)``, and the
    outputs of the last layer.

    Args:
        windows: int64 ``(n, seqlen)``.
    """

    def __init__(self, context: Context, chooser: Selector, windows: Tensor) -> None:
        self.context, self._chooser, self._windows = context, chooser, windows
        self._known: dict[Budget, float] = {}
        with torch.no_grad():
            decoder = Decoder(context.spec, context.weights)
            self._hidden = [decoder.hidden(window) for window in windows.split(1)]
            self._dense = [decoder.logits(hidden)[0, :-1].log_softmax(dim=-1) for hidden in self._hidden]
        pairs = zip(self._dense, windows.unbind(), strict=True)
        self._entropies = [float(F.nll_loss(dense, window[1:])) for dense, window in pairs]
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
        for window, logits, dense in zip(self._windows.unbind(), self._logits(budget), self._entropies, strict=True):
            found.append(float(F.cross_entropy(logits, window[1:])) - dense)
            if len(found) >= ENOUGH and fmean(found) - CLEARLY * stdev(found) / math.sqrt(len(found)) > limit:
                return fmean(found)
        self._known[budget] = fmean(found)
        return self._known[budget]

    def divergence(self, budget: Budget, share: float = 1.0) -> float:
        """Return the mean KL divergence from the dense model, nats, over the first windows or all.

        Args:
            share: share of the windows that are read.
        """
        n = max(1, round(share * len(self._windows)))
        pairs = zip(self._dense[:n], self._logits(budget), strict=False)
        return fmean(
            float(F.kl_div(logits.log_softmax(dim=-1), dense, reduction="batchmean", log_target=True))
            for dense, logits in pairs
        )

    def _logits(self, budget: Budget) -> Iterator[Tensor]:
        """Yield the logits of each window, without those of its last token: ``(seqlen - 1, vocab_size)``."""
        decoder = MaskedDecoder(self.context, self._chooser, budget)
        for window, hidden in zip(self._windows.split(1), self._hidden, strict=True):
            # With all units, the layers give what they give in the dense model.
            yield (decoder.logits(hidden) if decoder.whole else decoder(window))[0, :-1]


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

        def lost(fractions: tuple[float, ...], unit: Unit = unit) -> float:
            advance(1)
            return max(loss.divergence(_of_unit(unit, fractions)), TINY)

        whole = [lost((fraction,) * n_sparse) for fraction in (low, high)]
        rate = max(math.log(whole[0] / whole[1]) / (high - low), 1.0) if n_units > 2 else RATE_OF_TWO
        alone = [lost(tuple(low if i == row else 1.0 for i in range(n_sparse))) for row in range(n_sparse)]
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
