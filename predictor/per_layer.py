"""Selection per layer: the units of a layer are scored from the input of that layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from shadowllm.bundle.predictor_file import Kind, Predictor
from shadowllm.models.decoder import Decoder
from shadowllm.models.sparse_decoder import CopyDecoder
from shadowllm.models.sparsity import SparseLayers, Unit
from shadowllm.models.spec import ModelSpec
from shadowllm.predictor.low_bit_copy import LowBitCopy, low_bit_copies
from shadowllm.predictor.networks import layer_head_scores, layer_neuron_scores


@dataclass(frozen=True)
class PerLayerScores:
    """Scores the units of any layer: heads by the predictor's linear fit, neurons by a function.

    Attributes:
        predictor: a predictor with a linear fit of the heads.
        neurons: maps a layer and its normed MLP input ``(..., hidden_size)`` to scores ``(..., intermediate_size)``.
        gate_first: all neurons whose score is not zero are active. Otherwise a budget decides.
    """

    predictor: Predictor
    neurons: Callable[[int, Tensor], Tensor]
    gate_first: bool = False

    def scores(self, layer: int, unit: Unit, x: Tensor) -> Tensor:
        """Return float32 ``(..., n_units)`` from the normed attention or MLP input ``(..., hidden_size)``."""
        return self.neurons(layer, x) if unit == "neurons" else layer_head_scores(self.predictor, layer, x)


def per_layer_scores(
    kind: Kind,
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    predictor: Predictor,
    copy: CopyDecoder | None = None,
) -> PerLayerScores:
    """Make the scores of a kind that selects per layer.

    Args:
        weights: canonical float32 tensors.
        copy: the low-bit copy with which a quantised shadow scores; made from the weights if None.
    """
    if kind == "layerwise":
        return PerLayerScores(predictor, partial(layer_neuron_scores, predictor))
    if kind == "relu":
        return PerLayerScores(predictor, Decoder(spec, weights).gate_activation, gate_first=True)
    layers = SparseLayers(spec, predictor.dense_layers)
    copy = copy or CopyDecoder(spec, weights, low_bit_copies(layers, weights))
    return PerLayerScores(predictor, LowBitCopy(layers, weights, copy).scores)
