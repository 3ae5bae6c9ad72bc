"""Importance traces per token, computed chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from shadowllm.models.decoder import Decoder, InputHook
from shadowllm.models.sparsity import UNITS, SparseLayers, Unit
from shadowllm.models.spec import ModelSpec
from shadowllm.predictor.criteria import find_criterion, unit_trace

CHUNK_TOKENS = 512


def windows_per_chunk(seqlen: int, tokens: int) -> int:
    """Return the number of windows of ``seqlen`` tokens in a chunk of about ``tokens``, at least one."""
    return max(1, tokens // seqlen)


def scored_positions(criterion: str, seqlen: int) -> int:
    """Return how many positions of a window a criterion scores.

    A criterion with gradients does not score the last one, because no loss depends on it.
    """
    return seqlen - find_criterion(criterion).needs_gradients


@dataclass(frozen=True)
class Chunk:
    """Traces of some tokens, float32.

    Attributes:
        hidden: input of the first sparse layer, ``(tokens, hidden_size)``.
        heads: importance of each head, ``(tokens, n_sparse, n_heads)``.
        neurons: importance of each neuron, ``(tokens, n_sparse, intermediate_size)``.
        inputs: normed inputs of each layer's attention ("heads") and MLP ("neurons"),
            ``(tokens, n_sparse, hidden_size)`` each. Empty if the traces were read from a file.
        final: normed input of the output table, ``(tokens, hidden_size)``. None if the traces were read from a file.
    """

    hidden: Tensor
    heads: Tensor
    neurons: Tensor
    inputs: dict[Unit, Tensor] = field(default_factory=dict)
    final: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return len(self.hidden)

    def importance(self, unit: Unit) -> Tensor:
        """Return the importance of the heads or of the neurons."""
        return self.heads if unit == "heads" else self.neurons

    def scored(self, criterion: str, seqlen: int) -> Chunk:
        """Return the chunk of the positions that a criterion scores, of a chunk of whole windows."""
        if (positions := scored_positions(criterion, seqlen)) == seqlen:
            return self
        return self[torch.arange(self.tokens).view(-1, seqlen)[:, :positions].flatten()]

    def __getitem__(self, rows: Tensor) -> Chunk:
        """Return the chunk of the tokens with the given indices."""
        inputs = {unit: x[rows] for unit, x in self.inputs.items()}
        final = None if self.final is None else self.final[rows]
        return Chunk(self.hidden[rows], self.heads[rows], self.neurons[rows], inputs, final)


# Hidden states ``(batch, seqlen, hidden_size)`` at the first sparse layer and after the last layer, and scores.
_Pass = tuple[Tensor, Tensor, dict[tuple[int, Unit], Tensor]]


class Tracer:
    """Runs the reference decoder over token windows and scores every head and neuron per token.

    Args:
        spec: the model.
        weights: canonical tensors, float32 when they are read.
        criterion: name of a registered criterion.
        dense_layers: number of first layers that stay dense and are not traced.

    Raises:
        UserError: no such criterion.
    """

    def __init__(self, spec: ModelSpec, weights: Mapping[str, Tensor], criterion: str, dense_layers: int = 1) -> None:
        self.spec = spec
        self.sparse_layers = SparseLayers(spec, dense_layers)
        self._weights = weights
        self._criterion = find_criterion(criterion)

    def chunks(self, windows: Tensor, tokens: int = CHUNK_TOKENS) -> Iterator[Chunk]:
        """Trace int64 ``(n_windows, seqlen)`` in order, about ``tokens`` tokens at a time."""
        for part in windows.split(windows_per_chunk(windows.shape[1], tokens)):
            yield self.trace(part)

    def trace(self, windows: Tensor) -> Chunk:
        """Trace int64 ``(n_windows, seqlen)`` in one pass. Windows are independent of each other."""
        scores = self._with_gradients if self._criterion.needs_gradients else self._forward_only
        inputs: dict[tuple[int, Unit], Tensor] = {}

        def input_hook(layer: int, unit: Unit, x: Tensor) -> None:
            if layer in self.sparse_layers.layers:
                inputs[layer, unit] = x.detach()

        hidden, last, found = scores(windows, input_hook)
        heads, neurons = (self._by_token(found, unit) for unit in UNITS)
        with torch.no_grad():
            final = Decoder(self.spec, self._weights).final_hidden(last).flatten(0, 1)
        by_unit = {unit: self._by_token(inputs, unit) for unit in UNITS}
        return Chunk(hidden.flatten(0, 1), heads, neurons, by_unit, final)

    def _by_token(self, found: Mapping[tuple[int, Unit], Tensor], unit: Unit) -> Tensor:
        """Stack the ``(batch, seqlen, width)`` tensors of one unit into ``(tokens, n_sparse, width)``."""
        return torch.stack([found[layer, unit].flatten(0, 1) for layer in self.sparse_layers.layers], dim=1)

    def _forward_only(self, windows: Tensor, input_hook: InputHook) -> _Pass:
        found: dict[tuple[int, Unit], Tensor] = {}

        def activation_hook(layer: int, unit: Unit, activation: Tensor) -> Tensor:
            # Score here, so that the activation can be freed after its layer.
            if layer in self.sparse_layers.layers:
                found[layer, unit] = self._score(layer, unit, activation)
            return activation

        with torch.no_grad():
            hidden, last = self._run(Decoder(self.spec, self._weights, activation_hook, input_hook), windows)
        return hidden, last, found

    def _with_gradients(self, windows: Tensor, input_hook: InputHook) -> _Pass:
        seen: dict[tuple[int, Unit], Tensor] = {}

        def activation_hook(layer: int, unit: Unit, activation: Tensor) -> Tensor:
            if layer in self.sparse_layers.layers:
                seen[layer, unit] = activation
            return activation

        decoder = Decoder(self.spec, self._weights, activation_hook, input_hook)
        second = self._criterion.derivatives > 1
        # The fused attention kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH) if second else nullcontext():
            hidden, last = self._run(decoder, windows)
            logits = decoder.logits(last)
        # A sum, not a mean: a token's score must not depend on the length of its window.
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten(), reduction="sum")
        gradients = torch.autograd.grad(loss, list(seen.values()), create_graph=second)
        curvatures: Sequence[Tensor | None] = [None] * len(gradients)
        if second:
            half_square = torch.stack([gradient.square().sum() for gradient in gradients]).sum() / 2
            curvatures = torch.autograd.grad(half_square, list(seen.values()))
        targets = F.pad(windows[:, 1:], (0, 1), value=-1)
        with torch.no_grad():
            found = {
                key: self._score(*key, activation, gradient, curvature, targets)
                for (key, activation), gradient, curvature in zip(seen.items(), gradients, curvatures, strict=True)
            }
        return hidden.detach(), last.detach(), found

    def _score(self, layer: int, unit: Unit, activation: Tensor, *more: Tensor | None) -> Tensor:
        return self._criterion.score(unit_trace(self.spec, self._weights, layer, unit, activation, *more))

    def _run(self, decoder: Decoder, windows: Tensor) -> tuple[Tensor, Tensor]:
        positions = torch.arange(windows.shape[1]).expand_as(windows)
        with torch.no_grad():
            hidden = decoder.embed(windows, positions)
            for layer in range(self.sparse_layers.dense_layers):
                hidden = decoder.layer(layer, hidden, positions)
        # Gradients are needed only in the layers after the dense ones, and never for weights.
        hidden = hidden.requires_grad_(self._criterion.needs_gradients)
        last = hidden
        for layer in self.sparse_layers.layers:
            last = decoder.layer(layer, last, positions)
        return hidden, last
