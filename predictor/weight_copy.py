"""The low-bit copy of gate and up by which a quantised shadow scores neurons before they are computed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from shadowllm.bundle.quantisation import LOW_BIT_COPY, Quantisation, rounded
from shadowllm.bundle.quantised_tensors import row_norms
from shadowllm.bundle.weight_names import copied
from shadowllm.models.decoder import Decoder
from shadowllm.models.sparsity import SparseLayers


class WeightCopy:
    """Scores the neurons of a layer on the MLP's own input: nearly the length of what each will add.

    Args:
        layers: that are scored, and need a copy.
        weights: canonical float32 tensors.
        q: how gate and up are rounded; norms, biases and ``||w_down||`` are exact.
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
        """``|product of the copy| * ||w_down||``.

        Args:
            x: normed MLP input ``(..., hidden_size)``.

        Returns:
            Float32 ``(..., intermediate_size)``.
        """
        return self._decoder.mlp_activation(layer, x).abs() * self._down_norms[layer]
