"""The reference decoder of a sparse step: active units at full precision, the rest from a low-bit copy or dropped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from shadowllm.models.decoder import Decoder, InputHook, KVCache
from shadowllm.models.sparsity import Rest, Unit
from shadowllm.models.spec import ModelSpec

TOKENS_AT_ONCE = 32  # whose exact logits are computed together, beside those of the copy
# Receives the activation of one layer's units (see `decoder.ActivationHook`) and returns which units are active: bool,
# broadcast to ``(batch, seqlen, n_units)``; None if all of them are.
Selection = Callable[[int, Unit, Tensor], Tensor | None]


@dataclass(frozen=True)
class Certificate:
    """A bound on the error of each logit of the low-bit copy, ``errors[v] * |weighting * x|``.

    `bundle.certificate` explains and makes it.

    Attributes:
        errors: float32 ``(vocab_size,)``.
        weighting: float32 ``(hidden_size,)``.
    """

    errors: Tensor
    weighting: Tensor

    def bound(self, x: Tensor) -> Tensor:
        """Return the bound ``(..., vocab_size)`` for inputs of the output table ``(..., hidden_size)``."""
        return (x * self.weighting).double().norm(dim=-1, keepdim=True).float() * self.errors


class ComputedCopies(Mapping[str, Tensor], ABC):
    """Float32 values of a low-bit copy, by canonical name. They are computed whenever they are read."""

    @abstractmethod
    def parts(self, name: str) -> Iterator[Tensor]:
        """Yield the rows of a matrix, some at a time, so that they are not in memory together."""


class CopyDecoder(Decoder):
    """A `Decoder` with the matrices of the low-bit copy. Scores and the rest need the same products of the neurons.

    So the last ones are kept, and computed again only for another input or layer.

    Args:
        spec: the model.
        weights: canonical float32 tensors.
        copies: float32 values of the low-bit copy, by canonical name.
    """

    def __init__(self, spec: ModelSpec, weights: Mapping[str, Tensor], copies: Mapping[str, Tensor]) -> None:
        super().__init__(spec, ChainMap(copies, weights))  # type: ignore[arg-type]  # nothing is written
        self._copies = copies
        self._last: tuple[int, Tensor, Tensor] | None = None  # layer, input and result

    def mlp_activation(self, layer: int, x: Tensor) -> Tensor:
        """See `Decoder.mlp_activation`. The result must not be changed."""
        if self._last is None or self._last[0] != layer or self._last[1] is not x:
            self._last = layer, x, super().mlp_activation(layer, x)
        return self._last[2]

    def logits(self, x: Tensor) -> Tensor:
        """See `Decoder.logits`."""
        if not isinstance(self._copies, ComputedCopies):
            return super().logits(x)
        hidden, end = self.final_hidden(x), 0
        found = hidden.new_empty(*hidden.shape[:-1], self.spec.vocab_size)
        for rows in self._copies.parts(self.spec.output_table):
            start, end = end, end + len(rows)
            found[..., start:end] = F.linear(hidden, rows)
        return found


class SparseDecoder(Decoder):
    """A `Decoder` in which some units of a layer are active, and the others come from a low-bit copy or are dropped.

    Keys and values are exact for all heads.

    Args:
        spec: the model.
        weights: canonical float32 tensors.
        select: called once per layer and unit.
        input_hook: called once per layer and unit, before ``select``, with the input of the units.
        copy: the low-bit copy of gate, up, down, q and o of the sparse layers, and of the output table.
        rest: what units that are not active contribute; "shadow" needs ``copy``.
        shortlist: rows of the output table that are computed exactly; None for all. The others need ``copy``.
        certificate: compute more rows exactly, so that the largest logit is that of the whole table; None for no proof.

    Attributes:
        recomputed: rows that the last call of `logits` computed exactly, int64 ``(batch, seqlen)``; None before it.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, Tensor],
        select: Selection,
        input_hook: InputHook | None = None,
        copy: CopyDecoder | None = None,
        rest: Rest = "drop",
        shortlist: int | None = None,
        certificate: Certificate | None = None,
    ) -> None:
        super().__init__(spec, weights, input_hook=input_hook)
        self._select, self._shortlist, self._certificate = select, shortlist, certificate
        self.recomputed: Tensor | None = None
        self._copy = copy
        self._rest = copy if rest == "shadow" else None

    def logits(self, x: Tensor) -> Tensor:
        """See `Decoder.logits`. Rows outside of the shortlist are the copy's."""
        if self._shortlist is None or self._shortlist >= self.spec.vocab_size:
            self.recomputed = torch.full(x.shape[:2], self.spec.vocab_size)
            return super().logits(x)
        assert self._copy is not None
        logits = self._copy.logits(x)
        # Logits of many tokens are larger than the weights of a small model. So the exact ones are of a few at a time.
        parts = zip(x.split(TOKENS_AT_ONCE, dim=1), logits.split(TOKENS_AT_ONCE, dim=1), strict=True)
        self.recomputed = torch.cat([self._recompute(part, low, self._shortlist) for part, low in parts], dim=1)
        return logits

    def _recompute(self, x: Tensor, low: Tensor, shortlist: int) -> Tensor:
        """Replace the copy's logits of the shortlist by exact ones; return how many rows that are, by token."""
        exact = super().logits(x)
        best = low.topk(shortlist, dim=-1, sorted=False).indices
        recomputed = torch.zeros_like(low, dtype=torch.bool).scatter(-1, best, value=True)
        if self._certificate is not None:
            largest = exact.gather(-1, best).amax(dim=-1, keepdim=True)
            recomputed |= low + self._certificate.bound(self.final_hidden(x)) >= largest
        torch.where(recomputed, exact, low, out=low)
        return recomputed.sum(dim=-1)

    def _attention(self, layer: int, x: Tensor, position_ids: Tensor, cache: KVCache | None) -> Tensor:
        if self.input_hook:
            self.input_hook(layer, "heads", x)
        visible, name = self.visible(layer, x, position_ids, cache), f"layers.{layer}.o_proj"
        context = self.context(layer, x, position_ids, visible)
        active = self._select(layer, "heads", context)
        if active is None:
            return self._rows(name, context.flatten(2))
        y = self._rows(name, (context * active[..., None]).flatten(2))
        if self._rest is None or active.all():
            return y
        rest = self._rest.context(layer, x, position_ids, visible) * ~active[..., None]
        return y + rest.flatten(2) @ self._rest.weights[f"{name}.weight"]

    def _mlp(self, layer: int, x: Tensor) -> Tensor:
        if self.input_hook:
            self.input_hook(layer, "neurons", x)
        activation, name = self.mlp_activation(layer, x), f"layers.{layer}.down_proj"
        active = self._select(layer, "neurons", activation)
        if active is None:
            return self._rows(name, activation)
        y = self._rows(name, activation * active)
        if self._rest is None or active.all():
            return y
        return y + (self._rest.mlp_activation(layer, x) * ~active) @ self._rest.weights[f"{name}.weight"]
