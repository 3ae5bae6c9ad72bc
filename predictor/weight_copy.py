"""The low-bit copy of gate and up by which a quantised shadow scores neurons before they are computed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from shadowllm.models.decoder import Decoder
from shadowllm.models.spec import ModelSpec
from shadowllm.plugins.quantisation import Quantisation, rounded

# With a scale for every 64 elements of a row the copy is under a fifth of a 16-bit MLP.
COPY = Quantisation(bits=4, block=64)


def copied(spec: ModelSpec, layer: int) -> list[str]:
    """Canonical names of the matrices of a layer that the copy holds, in the order they lie in a bundle."""
    parts = ("gate_proj", "up_proj") if spec.gated else ("up_proj",)
    return [f"layers.{layer}.{part}.weight" for part in parts]


def lengths(down_proj: Tensor) -> Tensor:
    """``||w_down[f]||`` of each neuron, float32 ``(intermediate_size,)``."""
    return down_proj.float().norm(dim=-1)


class WeightCopy:
    """Scores the neurons of a layer on the MLP's own input: nearly the length of what each will add.

    Args:
        spec: the model.
        weights: canonical float32 tensors.
        dense_layers: layers at the bottom that need no copy.
        q: how gate and up are rounded; norms, biases and ``||w_down||`` are exact.
    """

    def __init__(
        self, spec: ModelSpec, weights: Mapping[str, Tensor], dense_layers: int, q: Quantisation = COPY
    ) -> None:
        layers = range(dense_layers, spec.n_layers)
        copies = {
            name: torch.from_numpy(rounded(weights[name].numpy(), q))
            for layer in layers
            for name in copied(spec, layer)
        }
        self._lengths = {layer: lengths(weights[f"layers.{layer}.down_proj.weight"]) for layer in layers}
        self._decoder = Decoder(spec, {**weights, **copies})

    def scores(self, layer: int, x: Tensor) -> Tensor:
        """``|product of the copy| * ||w_down||``.

        Args:
            x: normed MLP input ``(..., hidden_size)``.

        Returns:
            Float32 ``(..., intermediate_size)``.
        """
        return self._decoder.product(layer, x).abs() * self._lengths[layer]
