"""The selection of a step's sparse layers on a GPU: upfront for all layers, or in each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from shadowllm.bundle.predictor_file import Predictor
from shadowllm.bundle.weight_names import copied, down_norms
from shadowllm.models.sparsity import SparseLayers, Unit
from shadowllm.models.spec import ModelSpec
from shadowllm.plugins.ops.score_neurons.launcher import score_neurons
from shadowllm.plugins.ops.select_topk.launcher import select_topk
from shadowllm.predictor.networks import layer_head_scores, layer_neuron_scores
from shadowllm.predictor.topk import shared_scores
from shadowllm.runtime.gpu.rest import packed

Counts = Mapping[Unit, Tensor]  # int32 ``(n_sparse,)``


class Selection(Protocol):
    """The active units of a step's sparse layers; all sequences share them."""

    def active(self, unit: Unit, row: int, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """The active units of a sparse layer.

        Args:
            row: the layer's row in the selection.
            x: the normed attention or MLP input, ``(batch, 1, hidden_size)``.

        Returns:
            Indices int32 ``(n_units,)``, ascending, -1 past the count, and the count, an int32 scalar. The indices are
            None if the op chooses the units itself.
        """
        ...


@dataclass(frozen=True)
class UpfrontSelection:
    """A selection made before the sparse layers: indices int32 ``(n_sparse, n_units)``."""

    indices: Mapping[Unit, Tensor]
    counts: Counts

    def active(self, unit: Unit, row: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Selection`."""
        return self.indices[unit][row], self.counts[unit][row]


@dataclass(frozen=True)
class PerLayerSelection:
    """A selection that each layer makes from its own attention and MLP inputs.

    Attributes:
        predictor: with tensors on the device; those of a network have the model's dtype.
        copies: arguments of ``ScoreNeurons`` for each sparse layer, from `device_copies`; None if there is none.
        inside: the units that the ops choose themselves.
    """

    spec: ModelSpec
    predictor: Predictor
    counts: Counts
    copies: list[dict[str, Any]] | None
    inside: frozenset[Unit] = frozenset()

    def active(self, unit: Unit, row: int, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """See `Selection`."""
        count = self.counts[unit][row]
        if unit in self.inside:
            return None, count
        return choose(self.spec, unit, self._scores(unit, row, x, count), count[None])[0], count

    def _scores(self, unit: Unit, row: int, x: Tensor, count: Tensor) -> Tensor:
        layer, tokens = SparseLayers(self.spec, self.predictor.dense_layers).layer(row), x.flatten(0, 1)
        if unit == "neurons" and self.copies is not None:
            spec, copy = self.spec, self.copies[row]
            return score_neurons(
                x, **copy, count=count, activation=spec.activation, threshold=spec.activation_threshold
            )
        found = (
            layer_head_scores(self.predictor, layer, tokens.float())
            if unit == "heads"
            else layer_neuron_scores(self.predictor, layer, tokens).float()
        )
        return found.mean(dim=0, keepdim=True)


def choose(spec: ModelSpec, unit: Unit, scores: Tensor, counts: Tensor) -> Tensor:
    """Indices int32 ``(rows, n_units)`` of the ``counts`` largest float32 scores of each row."""
    shared = shared_scores(spec, unit, scores)
    return select_topk(shared.contiguous(), counts, shared.shape[-1])


def device_copies(
    layers: SparseLayers,
    copies: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    device: torch.device,
) -> list[dict[str, Any]]:
    """The low-bit copy of each sparse layer, as arguments of ``ScoreNeurons``.

    Args:
        copies: tensors by their names in `bundle.weight_layout.copy_groups`.
        weights: canonical tensors on the device, for the biases.
    """

    def layer_copy(layer: int) -> dict[str, Any]:
        rows, factors = packed(layers, copies, copied(layers.spec, layer), device)
        return {
            "copy": rows,
            "scales": factors,
            **{f"b_{part}": weights.get(f"layers.{layer}.{part}_proj.bias") for part in ("gate", "up")},
            "down_norms": copies[down_norms(layer)].to(device),
        }

    return [layer_copy(layer) for layer in layers.layers]
