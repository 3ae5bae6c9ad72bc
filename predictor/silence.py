"""How many neurons of a ReLU model fire: the others contribute exactly nothing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from shadowllm.models.decoder import Decoder
from shadowllm.models.sparsity import SparseLayers, Unit

TOKENS = 4096  # of the windows that are measured


@torch.no_grad()
def fired_shares(layers: SparseLayers, weights: Mapping[str, Tensor], windows: Tensor) -> list[float]:
    """Return the mean share of neurons per token whose gate is not zero, for each sparse layer.

    Args:
        weights: canonical float32 tensors.
        windows: tokens, int64 ``(n_windows, seqlen)``; the first `TOKENS` of them are enough.
    """
    fired = torch.zeros(layers.count, dtype=torch.float64)

    def input_hook(layer: int, unit: Unit, x: Tensor) -> None:
        if unit == "neurons" and layer in layers.layers:
            fired[layers.row(layer)] += decoder.gate_activation(layer, x).ne(0).sum()

    decoder = Decoder(layers.spec, weights, input_hook=input_hook)
    sample = windows[: max(1, TOKENS // windows.shape[1])]
    for window in sample.split(1):
        decoder(window)
    return [round(share, 6) for share in (fired / (sample.numel() * layers.spec.intermediate_size)).tolist()]
