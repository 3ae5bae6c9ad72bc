"""Choosing in place: a layer's units are scored on what the layer computes them from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from shadowllm.bundle.predictor_file import Kind, Predictor
from shadowllm.bundle.quantisation import LOW_BIT_COPY, Quantisation
from shadowllm.models.sparsity import SparseLayers, Unit
from shadowllm.models.spec import ModelSpec
from shadowllm.predictor.networks import layer_head_scores, layer_neuron_scores
from shadowllm.predictor.weight_copy import WeightCopy


@dataclass(frozen=True)
class PerLayerScores:
    """Scores of every layer's units: heads by the predictor's linear fit, neurons by whatever the kind has.

    Attributes:
        predictor: any with a fit of the heads.
        neurons: scores ``(..., intermediate_size)`` of a layer's normed MLP input ``(..., hidden_size)``.
    """

    predictor: Predictor
    neurons: Callable[[int, Tensor], Tensor]

    def scores(self, layer: int, unit: Unit, x: Tensor) -> Tensor:
        """Float32 ``(..., n_units)`` of normed attention or MLP input ``(..., hidden_size)``."""
        return self.neurons(layer, x) if unit == "neurons" else layer_head_scores(self.predictor, layer, x)


def per_layer_scores(
    kind: Kind, spec: ModelSpec, weights: Mapping[str, Tensor], predictor: Predictor, q: Quantisation = LOW_BIT_COPY
) -> PerLayerScores:
    """The scores of a kind that chooses in place.

    Args:
        weights: canonical float32 tensors; a quantised shadow copies them.
        q: how its copy is rounded.
    """
    if kind == "layerwise":
        return PerLayerScores(predictor, partial(layer_neuron_scores, predictor))
    return PerLayerScores(predictor, WeightCopy(SparseLayers(spec, predictor.dense_layers), weights, q).scores)
