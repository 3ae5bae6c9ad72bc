"""Selectors, which choose the active heads and neurons of each sparse layer during evaluation in PyTorch.

Every position of a window has its own selection, as in a decode step. So a teacher-forced pass measures the
quality of decoding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from shadowllm.bundle.predictor_file import Kind, Predictor
from shadowllm.bundle.quantisation import LOW_BIT_COPY
from shadowllm.errors import UserError
from shadowllm.models.sparse_decoder import Certificate, CopyDecoder, SparseDecoder
from shadowllm.models.sparsity import UNITS, Budget, SparseLayers, Unit, layer_units
from shadowllm.models.spec import ModelSpec
from shadowllm.predictor.criteria import find_criterion, unit_trace
from shadowllm.predictor.low_bit_copy import low_bit_copies
from shadowllm.predictor.networks import scores
from shadowllm.predictor.per_layer import per_layer_scores
from shadowllm.predictor.topk import AGGREGATES, active_mask
from shadowllm.predictor.traces import Tracer


@dataclass(frozen=True)
class Context:
    """The data that selectors are made from. Each selector uses a part of it.

    Attributes:
        copies: values of the low-bit copy for the rest of the layers; see `low_bit_copies`.
        certificate: of the largest logit, for budgets with ``certify``.
    """

    spec: ModelSpec
    weights: Mapping[str, Tensor]
    dense_layers: int = 1
    predictor: Predictor | None = None
    criterion: str = "l2norm"
    seed: int = 0
    copies: Mapping[str, Tensor] | None = None
    certificate: Certificate | None = None

    @property
    def sparse_layers(self) -> SparseLayers:
        """The layers whose units are selected."""
        return SparseLayers(self.spec, self.dense_layers)

    @cached_property
    def copy(self) -> CopyDecoder | None:
        """The low-bit copy, which scores and rest share; None without one."""
        return CopyDecoder(self.spec, self.weights, self.copies) if self.copies else None


class Selector(ABC):
    """Scores the units of a layer. The units with the highest scores stay active."""

    def start(self, windows: Tensor, hidden: Tensor) -> None:  # noqa: B027 (most have nothing to prepare)
        """Prepare for a pass. This is called once per pass.

        Args:
            windows: the tokens ``(batch, seqlen)``.
            hidden: the input of the first sparse layer ``(batch, seqlen, hidden_size)``.
        """

    def observe(self, layer: int, unit: Unit, x: Tensor) -> None:  # noqa: B027
        """Take the normed input ``(batch, seqlen, hidden_size)`` of a block, before its units are computed."""

    @abstractmethod
    def scores(self, layer: int, unit: Unit, activation: Tensor) -> Tensor:
        """Return scores that broadcast to ``(batch, seqlen, n_units)``.

        Args:
            activation: the tensor that the decoder gives to an activation hook.
        """


SELECTORS: dict[str, Callable[[Context], Selector]] = {}


def selector(name: str) -> Callable[[Callable[[Context], Selector]], Callable[[Context], Selector]]:
    """Register a class or function that makes a `Selector` from a `Context`."""

    def register(make: Callable[[Context], Selector]) -> Callable[[Context], Selector]:
        SELECTORS[name] = make
        return make

    return register


def make_selector(name: str, context: Context) -> Selector:
    """Build a selector by name.

    Raises:
        UserError: no such selector, or the predictor that it needs is missing or does not fit.
    """
    if name not in SELECTORS:
        raise UserError(f"no selector {name!r}", f"known: {', '.join(sorted(SELECTORS))}")
    return SELECTORS[name](context)


@selector("static")
class Static(Selector):
    """The calibrated ranking, the same for every token."""

    def __init__(self, context: Context) -> None:
        predictor = _needs_predictor("static", context)
        self._scores = {unit: predictor.tensors[f"{unit}.scores"] for unit in UNITS}
        self._layers = context.sparse_layers

    def scores(self, layer: int, unit: Unit, activation: Tensor) -> Tensor:
        """Return the same scores for every token, ``(n_units,)``."""
        return self._scores[unit][self._layers.row(layer)]


@selector("shadow")
class Shadow(Selector):
    """One network at the first sparse layer, which scores the units of all sparse layers."""

    def __init__(self, context: Context) -> None:
        self._predictor = _needs_predictor("shadow", context)
        _needs_kind("shadow", self._predictor)
        self._layers = context.sparse_layers
        self._scores: dict[Unit, Tensor] = {}

    def start(self, windows: Tensor, hidden: Tensor) -> None:
        """Run the network over the window."""
        found = scores(self._predictor, hidden.flatten(0, 1))
        self._scores = {unit: one.unflatten(0, windows.shape) for unit, one in zip(UNITS, found, strict=True)}

    def scores(self, layer: int, unit: Unit, activation: Tensor) -> Tensor:
        """Return this layer's part of the network's output."""
        return self._scores[unit][:, :, self._layers.row(layer)]


class PerLayerSelector(Selector):
    """Selects per layer, from the layer's own input.

    Heads are scored by the predictor's linear fit. Neurons are scored by the predictor's network of the layer
    ("layerwise"), or by a low-bit copy of gate and up ("quantized-shadow", see `LowBitCopy`). With "relu", all neurons
    are computed, and those that do not fire add nothing.

    Args:
        bits: bits of the copy; a bundle has those of `LOW_BIT_COPY`.
    """

    def __init__(self, context: Context, kind: Kind, bits: int = LOW_BIT_COPY.bits) -> None:
        predictor = _needs_predictor(kind, context)
        if "layers.heads.weight" not in predictor.tensors:
            raise UserError("the predictor has no fit of the heads to their layers' input", "train it again")
        if kind == "layerwise":
            _needs_kind(kind, predictor)
        spec, weights, copy = context.spec, context.weights, context.copy
        if kind == "quantized-shadow" and bits != LOW_BIT_COPY.bits:
            copy = CopyDecoder(spec, weights, low_bit_copies(context.sparse_layers, weights, bits))
        self._per_layer = per_layer_scores(kind, spec, weights, predictor, copy)
        self._found: dict[tuple[int, Unit], Tensor] = {}

    def observe(self, layer: int, unit: Unit, x: Tensor) -> None:
        """Score the layer's units before they are computed.

        Raises:
            UserError: the selector is relu, and the budget leaves out neurons.
        """
        if unit == "neurons" and self._per_layer.gate_first:
            raise UserError("the selector relu takes no neuron budget", "use a neuron budget of 1")
        self._found = {(layer, unit): self._per_layer.scores(layer, unit, x)}

    def scores(self, layer: int, unit: Unit, activation: Tensor) -> Tensor:
        """Return the scores that `observe` computed."""
        return self._found[layer, unit]


SELECTORS["layerwise"] = partial(PerLayerSelector, kind="layerwise")
SELECTORS["relu"] = partial(PerLayerSelector, kind="relu")
SELECTORS["quantized-shadow"] = partial(PerLayerSelector, kind="quantized-shadow")
for _bits in (3, 2):
    SELECTORS[f"quantized-shadow-{_bits}"] = partial(PerLayerSelector, kind="quantized-shadow", bits=_bits)


@selector("random")
class Random(Selector):
    """A new random selection for each token, layer and unit. It is the lower bound in comparisons."""

    def __init__(self, context: Context) -> None:
        self._seed = context.seed
        self._generator = torch.Generator()

    def start(self, windows: Tensor, hidden: Tensor) -> None:
        """Seed the generator again, so that every pass makes the same selections."""
        self._generator.manual_seed(self._seed)

    def scores(self, layer: int, unit: Unit, activation: Tensor) -> Tensor:
        """Return scores that are uniform in [0, 1)."""
        return torch.rand(activation.shape[:3], generator=self._generator)


@selector("oracle")
def oracle(context: Context) -> Selector:
    """Make a selector that knows the true importance. It is for analysis only."""
    if find_criterion(context.criterion).needs_gradients:
        return _DenseOracle(context)
    return _PerLayerOracle(context)


class _PerLayerOracle(Selector):
    """Ranks the activations of the masked pass itself, so they include the effect of earlier masks."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._score = find_criterion(context.criterion).score

    def scores(self, layer: int, unit: Unit, activation: Tensor) -> Tensor:
        """Return the criterion of the current activation."""
        return self._score(unit_trace(self._context.spec, self._context.weights, layer, unit, activation))


class _DenseOracle(Selector):
    """Ranks a dense pass, because gradients exist only after the whole window has passed through the model."""

    def __init__(self, context: Context) -> None:
        self._tracer = Tracer(context.spec, context.weights, context.criterion, context.dense_layers)
        self._scores: dict[Unit, Tensor] = {}

    def start(self, windows: Tensor, hidden: Tensor) -> None:
        """Trace the window with the dense model."""
        with torch.enable_grad():
            traced = self._tracer.trace(windows)
        self._scores = {unit: traced.importance(unit).unflatten(0, windows.shape) for unit in UNITS}

    def scores(self, layer: int, unit: Unit, activation: Tensor) -> Tensor:
        """Return this layer's part of the trace."""
        return self._scores[unit][:, :, self._tracer.sparse_layers.row(layer)]


def _needs_predictor(name: str, context: Context) -> Predictor:
    if context.predictor is None:
        raise UserError(f"the {name} selector needs a trained predictor", "give one (shadowllm train makes it)")
    return context.predictor


def _needs_kind(kind: Kind, predictor: Predictor) -> None:
    if predictor.kind != kind:
        raise UserError(f"the predictor is {predictor.kind}, not {kind}", f"train one with --selector {kind}")


class MaskedDecoder:
    """The reference decoder with a selection of active units per token. The budget decides about the others.

    Args:
        budget: with ``rest="shadow"`` or a shortlist it needs the copies of the context.
        aggregate: a name in `AGGREGATES`. "token" selects for each token. The others make one selection for a window,
            as the paper and its code do. A decode step cannot do that, because it needs the text that follows.

    After a pass, ``masks`` has the selection: bool ``(batch, seqlen, n_units)`` by layer and unit. `recomputed` has the
    rows of the output table that were computed exactly, int64 ``(batch, seqlen)``.
    """

    def __init__(self, context: Context, chooser: Selector, budget: Budget, aggregate: str = "token") -> None:
        if aggregate not in AGGREGATES:
            raise UserError(f"no aggregation {aggregate!r}", f"known: {', '.join(AGGREGATES)}")
        self._context, self._chooser = context, chooser
        # An object of its own, so that a decoder and its functions do not hold each other: memory is free at once.
        self._selection = _Selection(context, chooser, budget, AGGREGATES[aggregate])
        self._decoder = SparseDecoder(
            context.spec,
            context.weights,
            self._selection.mask,
            self._selection.observe,
            context.copy,
            budget.rest_with(context.copies is not None),
            budget.shortlist,
            context.certificate if budget.certify else None,
        )
        self.masks = self._selection.masks

    @property
    def recomputed(self) -> Tensor | None:
        """See `SparseDecoder`."""
        return self._decoder.recomputed

    @torch.no_grad()
    def __call__(self, windows: Tensor) -> Tensor:
        """Return the logits ``(batch, seqlen, vocab_size)`` of int64 windows ``(batch, seqlen)``."""
        spec, first = self._context.spec, self._context.dense_layers
        decoder = self._decoder
        positions = torch.arange(windows.shape[1]).expand_as(windows)
        x = decoder.embed(windows, positions)
        for layer in range(spec.n_layers):
            if layer == first:
                self._chooser.start(windows, x)
            x = decoder.layer(layer, x, positions)
        return self.logits(x)

    @property
    def whole(self) -> bool:
        """Whether all units of all layers are kept, so that only `logits` can differ from the dense model."""
        return self._selection.whole

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, seqlen, vocab_size)`` of the last layer's output ``(batch, seqlen, hidden_size)``."""
        return self._decoder.logits(x)


class _Selection:
    """The units that a budget keeps in each layer, by the scores of a selector."""

    def __init__(
        self, context: Context, chooser: Selector, budget: Budget, aggregate: Callable[[Tensor], Tensor]
    ) -> None:
        self._context, self._layers = context, context.sparse_layers
        self._chooser, self._aggregate = chooser, aggregate
        self._counts, self._sizes = budget.counts(self._layers), layer_units(context.spec)
        self.masks: dict[tuple[int, Unit], Tensor] = {}

    @property
    def whole(self) -> bool:
        return all((self._counts[unit] == size).all() for unit, size in self._sizes.items())

    def observe(self, layer: int, unit: Unit, x: Tensor) -> None:
        if self._count(layer, unit) < self._sizes[unit]:
            self._chooser.observe(layer, unit, x)

    def mask(self, layer: int, unit: Unit, activation: Tensor) -> Tensor | None:
        if layer not in self._layers.layers:
            return None
        count = self._count(layer, unit)
        if count == self._sizes[unit]:  # everything is kept, so no scores are needed
            self.masks[layer, unit] = torch.ones(activation.shape[:3], dtype=torch.bool)
            return None
        scores = self._chooser.scores(layer, unit, activation)
        if scores.ndim == 3:  # otherwise the scores are already the same for all tokens
            scores = self._aggregate(scores)
        mask = active_mask(self._context.spec, unit, scores, count).expand(activation.shape[:3])
        self.masks[layer, unit] = mask
        return mask

    def _count(self, layer: int, unit: Unit) -> int:
        """Return the number of units that a layer keeps. A dense layer keeps all."""
        kept = layer in self._layers.layers
        return int(self._counts[unit][self._layers.row(layer)]) if kept else self._sizes[unit]
