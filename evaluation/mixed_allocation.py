"""Budgets of bundles with a low-bit copy of all matrices: full precision where it is worth its bytes.

Three things are read at full precision or from the copy: heads, neurons, and rows of the output table (the shortlist).
What a step loses by reading few of them is measured for each kind alone, at a few settings, as the KL divergence
from the dense model. It is interpolated between these settings, and losses are assumed to add up. Budgets than which no
other one both costs less and loses less form a path, from the whole model to the fewest bytes. Only the place on the
path is searched, by measuring whole budgets.

All layers have the same fractions: the losses are small, and finding them layer by layer takes a pass for each layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from shadowllm.bundle.cost_model import Itemsizes, mixed_cost, table_cost
from shadowllm.bundle.manifest import Manifest
from shadowllm.evaluation.allocation import TINY, Loss
from shadowllm.models.sparsity import Budget, SparseLayers, Unit, layer_units
from shadowllm.progress import Advance, no_progress

# What is measured: fractions of units (rounded to whole units, at least one), and numbers of rows.
PROBES: Mapping[Unit, Sequence[float]] = {"heads": (0.1, 0.34, 0.67), "neurons": (0.02, 0.1, 0.3)}
SHORTLISTS = (64, 256, 1024, 4096)
LEAST_NEURONS, LEAST_ROWS = 0.01, 16  # smallest settings of a budget
PASSES = sum(map(len, PROBES.values())) + len(SHORTLISTS)
PROBED = 0.25  # share of the windows that are read for that; the divergence varies little from window to window
CHECKS = 6  # measurements of whole budgets in the search for a perplexity
GUESSES = 4  # of them by prediction; the others halve what is left
NEAR = 0.9  # a budget with at least this share of the allowed increase is good enough
ToBudget = Callable[[int], Budget]


@dataclass(frozen=True)
class Knob:
    """The settings of one kind: how many units a budget reads at full precision.

    Attributes:
        settings: numbers of units, ascending; the last one is all of them.
        sizes: cost per step of each setting, in bytes.
        losses: loss of each setting, nats, not ascending; the last one is 0.
    """

    settings: Sequence[int]
    sizes: Sequence[float]
    losses: Sequence[float]


@dataclass(frozen=True)
class Step:
    """A budget on the path.

    Attributes:
        loss: its predicted loss, nats.
        size: cost per step of all that the budget decides about, in bytes.
    """

    budget: Budget
    loss: float
    size: float


def path(heads: Knob, neurons: Knob, rows: Knob) -> list[Step]:
    """Return the budgets than which none both costs less and loses less, from the whole model to the fewest bytes."""
    knobs = heads, neurons, rows
    sizes, losses = _sums([knob.sizes for knob in knobs]), _sums([knob.losses for knob in knobs]).ravel()
    ascending = np.lexsort((losses, sizes.ravel()))
    least = np.minimum.accumulate(losses[ascending])
    better = losses[ascending] < np.concatenate(([np.inf], least[:-1]))
    places = np.unravel_index(ascending[better][::-1], sizes.shape)
    return [_step(knobs, at) for at in zip(*(place.tolist() for place in places), strict=True)]


def _sums(numbers: Sequence[Sequence[float]]) -> np.ndarray:
    """Return the sums of one number of each kind, with a dimension for each kind."""
    return reduce(np.add.outer, [np.array(of_kind) for of_kind in numbers])


def _step(knobs: tuple[Knob, Knob, Knob], at: Sequence[int]) -> Step:
    heads, neurons, rows = (knob.settings[i] for knob, i in zip(knobs, at, strict=True))
    every_head, every_neuron, every_row = (knob.settings[-1] for knob in knobs)
    return Step(
        Budget(heads=heads / every_head, neurons=neurons / every_neuron, shortlist=rows if rows < every_row else None),
        sum(knob.losses[i] for knob, i in zip(knobs, at, strict=True)),
        sum(knob.sizes[i] for knob, i in zip(knobs, at, strict=True)),
    )


def row_itemsizes(manifest: Manifest, rounds: bool) -> Itemsizes:
    """What rows cost in a step of mixed precision, in bytes per element.

    Args:
        rounds: such steps round float rows to 8 bits, but not those of the output table.
    """
    sizes = Itemsizes.of(manifest.itemsize, beside_copy=manifest.itemsize_beside_copy)
    return sizes.rounded() if rounds else sizes


def measure(layers: SparseLayers, sizes: Itemsizes, loss: Loss, advance: Advance = no_progress) -> list[Step]:
    """Measure what each kind loses alone, and return the path of the best budgets.

    Args:
        sizes: what rows cost, see `row_itemsizes`.
        advance: called with 1 after each pass, `PASSES` times in total.
    """

    def knob(settings: Sequence[int], sizes: Sequence[float], probes: Sequence[float], budget: ToBudget) -> Knob:
        fewer = settings[:-1]  # the last setting loses nothing
        counts = sorted({min(fewer, key=lambda count: abs(count - probe)) for probe in probes}) if fewer else []
        losses = loss.divergences([budget(count) for count in counts], PROBED, advance)
        found = dict(zip(counts, losses, strict=True))
        advance(len(probes) - len(found))  # a small model has fewer settings
        return Knob(settings, sizes, interpolated(settings, found))

    spec, widths = layers.spec, layer_units(layers.spec)
    heads = range(spec.heads_together, spec.n_heads + 1, spec.heads_together)
    neurons = _spread(max(1, round(LEAST_NEURONS * spec.intermediate_size)), spec.intermediate_size)
    rows = _spread(min(LEAST_ROWS, spec.vocab_size), spec.vocab_size)
    probed = {unit: [fraction * widths[unit] for fraction in PROBES[unit]] for unit in widths}
    return path(
        knob(
            heads,
            [layers.count * mixed_cost(spec, "heads", n, sizes.common, sizes.beside_copy) for n in heads],
            probed["heads"],
            lambda n: Budget(heads=n / heads[-1]),
        ),
        knob(
            neurons,
            [layers.count * mixed_cost(spec, "neurons", n, sizes.matrices, sizes.beside_copy) for n in neurons],
            probed["neurons"],
            lambda n: Budget(neurons=n / neurons[-1]),
        ),
        knob(rows, [table_cost(spec, n, sizes) for n in rows], SHORTLISTS, lambda n: Budget(shortlist=n)),
    )


def _spread(least: int, most: int) -> list[int]:
    """Return numbers from ``least`` to ``most``, each about 1.2 times the one before."""
    steps = max(1, round(4 * math.log2(most / least)))
    return sorted({round(least * (most / least) ** (i / steps)) for i in range(steps + 1)})


def interpolated(settings: Sequence[int], measured: Mapping[int, float]) -> list[float]:
    """Return the loss of each setting, from losses measured at some of them.

    The logarithm of the loss is linear in the logarithm of the number between two measured ones, and beyond them
    with the slope of the nearest two (-1 if only one was measured). The loss never rises with the number, and the
    last setting loses nothing.
    """
    if not measured:
        return [0.0] * len(settings)
    x = np.log(sorted(measured))
    y = np.log(np.minimum.accumulate([max(measured[count], TINY) for count in sorted(measured)]))
    slopes = np.diff(y) / np.diff(x) if len(x) > 1 else np.array([-1.0])
    at = np.log(settings)
    found = np.interp(at, x, y)
    found += slopes[0] * np.minimum(at - x[0], 0) + slopes[-1] * np.maximum(at - x[-1], 0)
    return [*np.exp(found[:-1]).tolist(), 0.0]


def least_within(
    steps: Sequence[Step], limit: float, increase: Callable[[Budget], float], advance: Advance = no_progress
) -> Budget:
    """Return the budget of the fewest bytes on a path of which a measured increase is at most ``limit``.

    Args:
        limit: nats.
        increase: measures the loss of a budget, nats.
        advance: called with 1 after each measurement, and once for those not needed: `CHECKS` in total.

    Returns:
        The whole model if no other budget was good enough.
    """
    good, bad, ratio, checks, near = 0, len(steps), 1.0, 0, False
    while bad - good > 1 and checks < CHECKS and not near:
        at = (good + bad) // 2
        if checks < GUESSES:
            at = max((i for i in range(good + 1, bad) if steps[i].loss * ratio <= limit), default=good + 1)
        found = increase(steps[at].budget)
        checks += 1
        advance(1)
        ratio = max(found, TINY) / max(steps[at].loss, TINY)
        good, bad = (good, at) if found > limit else (at, bad)
        near = NEAR * limit <= found <= limit
    advance(CHECKS - checks)
    return steps[good].budget


def densest(
    steps: Sequence[Step], go_sparser: Callable[[Budget], bool], most: int, advance: Advance = no_progress
) -> Budget | None:
    """Return the budget nearest to the whole model that need not be sparser; None if all must be.

    Args:
        most: largest number of questions.
        advance: called with 1 after each question, and once for those not needed: ``most`` in total.
    """
    low, high, asked = 0, len(steps), 0
    while high - low > 1 and asked < most:
        middle = (low + high) // 2
        asked += 1
        if go_sparser(steps[middle].budget):
            low = middle
        else:
            high = middle
        advance(1)
    advance(most - asked)
    return steps[high].budget if high < len(steps) else None
