"""The low-bit copy of gate and up. A quantised shadow scores neurons with it before they are computed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from shadowllm.bundle.quantisation import LOW_BIT_COPY, Quantisation, rounded
from shadowllm.bundle.quantised_tensors import row_norms
from shadowllm.bundle.weight_names import copied
from shadowllm.models.decoder import Decoder
from shadowllm.models.sparsity import SparseLayers


class LowBitCopy:
    """Scores the neurons of a layer from the MLP's input. A score is nearly the norm of what the neuron adds.

    Args:
        layers: the layers to copy and score.
        weights: canonical float32 tensors.
        q: rounding of gate and up. Norms, biases and ``||w_down||`` are exact.
    """

    def __init__(self, layers: SparseLayers, weights: Mapping[str, Tensor], q: Quantisation = LOW_BIT_COPY) -> None:
        copies = {
            name: torch.from_numpy(rounded(weights[name].numpy(), q))
            for layer in layers.layers
            for name in copied(layers.spec, layer)
        }
        self._down_norms = {layer: row_norms(weights[f"layers.{layer}.down_proj.weight"]) for layer in layers.layers}
        self._decoder = Decoder(layers.spec, {**weights, **copies})

    def scores(self, layer: int, x: Tensor) -> Tensor:
        """Return ``|product of the copy| * ||w_down||``.

        Args:
            x: normed MLP input ``(..., hidden_size)``.

        Returns:
            Float32 ``(..., intermediate_size)``.
        """
        return self._decoder.mlp_activation(layer, x).abs() * self._down_norms[layer]
