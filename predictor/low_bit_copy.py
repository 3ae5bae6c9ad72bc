"""The low-bit copy of a model's matrices: it scores neurons, and gives the units that are not active."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from shadowllm.bundle.quantisation import LOW_BIT_COPY, Quantisation, rounded, rounded_copy
from shadowllm.bundle.quantised_tensors import row_norms
from shadowllm.bundle.weight_names import copied_names
from shadowllm.models.decoder import Decoder
from shadowllm.models.sparsity import SparseLayers


def low_bit_copies(
    layers: SparseLayers,
    weights: Mapping[str, Tensor],
    bits: int = LOW_BIT_COPY.bits,
    rest: bool = False,
    stored: Quantisation | None = None,
) -> dict[str, Tensor]:
    """Return float32 values of the low-bit copy by canonical name: gate and up of the given layers.

    With ``rest``, all matrices with a copy are returned; see `weight_names.copied_names`.

    Args:
        weights: canonical float32 tensors.
        bits: of the copy; bundles have those of `LOW_BIT_COPY`.
        rest: whether the copy also gives the units that are not active.
        stored: the integers to which the weights are rounded; see `quantisation.rounded_copy`.
    """
    q = replace(LOW_BIT_COPY, bits=bits)

    def copy(matrix: np.ndarray) -> np.ndarray:
        return rounded_copy(matrix, stored) if bits == LOW_BIT_COPY.bits else rounded(matrix, q)

    return {name: torch.from_numpy(copy(weights[name].numpy())) for name in copied_names(layers, rest)}


class LowBitCopy:
    """Scores the neurons of a layer from the MLP's input. A score is nearly the norm of what the neuron adds.

    Args:
        layers: the layers to score.
        weights: canonical float32 tensors.
        copy: the model with the values of `low_bit_copies`. Norms, biases and ``||w_down||`` are exact.
    """

    def __init__(self, layers: SparseLayers, weights: Mapping[str, Tensor], copy: Decoder) -> None:
        self._down_norms = {layer: row_norms(weights[f"layers.{layer}.down_proj.weight"]) for layer in layers.layers}
        self._copy = copy

    def scores(self, layer: int, x: Tensor) -> Tensor:
        """Return ``|product of the copy| * ||w_down||``.

        Args:
            x: normed MLP input ``(..., hidden_size)``.

        Returns:
            Float32 ``(..., intermediate_size)``.
        """
        return self._copy.mlp_activation(layer, x).abs() * self._down_norms[layer]
