"""The decoder for a GPU: merged projections, one write to the cache per layer, and sparse layers with the kernels.

A sparse layer whose units are chosen before it has five launches: keys, values and queries; attention; the output
projection, with the sum of the hidden states and the norm; gate and up; the down projection, with its sum and the next
norm. In steps of several tokens, the two sums are launches of their own. A layer that chooses from a low-bit copy has
two more: scores of the heads, and of the neurons.

Nothing in a step waits for the host or reads a value on the host, so a step can be captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shadowllm.bundle.weight_names import transposed
from shadowllm.models.decoder import Decoder, KVCache
from shadowllm.models.rope import RopeSpec
from shadowllm.models.sparsity import SparseLayers, Unit
from shadowllm.models.weights import tensor_shape
from shadowllm.plugins.ops.shortlist_logits.launcher import shortlist_logits
from shadowllm.plugins.ops.sparse_attention.launcher import sparse_attention
from shadowllm.plugins.ops.sparse_mlp.launcher import sparse_mlp
from shadowllm.plugins.triton.cache import write_cache
from shadowllm.plugins.triton.launch import BlockInputs
from shadowllm.runtime.gpu.nested_rows import NestedRows
from shadowllm.runtime.gpu.rest import RestInputs
from shadowllm.runtime.gpu.selection import Selection


@dataclass(frozen=True)
class Shared:
    """Values that all layers of one step share.

    Attributes:
        masks: by the window of a layer, ``(batch, 1, seqlen, length)``: 0 for cached tokens that a token sees and -inf
            for others. ``length`` is the capacity, or ``seqlen`` for prompts, which attend to their own tokens only.
            None for prompts within the window: they use causal attention.
        lengths: int32 ``(batch,)``, tokens in the cache after the step's tokens are written.
        rotary: cos and sin ``(batch, seqlen, head_dim / 2)`` of each RoPE of the model.
    """

    masks: Mapping[int | None, Tensor | None]
    lengths: Tensor
    rotary: Mapping[RopeSpec, tuple[Tensor, ...]]


class StepDecoder(Decoder):
    """A `Decoder` for one step of a session at a time: call `begin`, then the layers.

    Args:
        layers: the sparse layers.
        weights: from `device_weights.merged`, on the device of the session.
        matrices: from `device_weights.nested`, if the matrices are integers.
        rest: the low-bit copy from which sparse steps compute what is not active; None if it is dropped.
    """

    def __init__(
        self,
        layers: SparseLayers,
        weights: Mapping[str, Tensor],
        matrices: Mapping[str, NestedRows],
        rest: RestInputs | None = None,
    ) -> None:
        spec = layers.spec
        super().__init__(spec, weights)
        self._layers, self._nested, self._rest = layers, matrices, rest
        self._device, self._dtype = weights["final_norm.weight"].device, weights["final_norm.weight"].dtype
        self.rotary = {rope: tuple(table.to(self._device) for table in tables) for rope, tables in self.rotary.items()}

    def begin(self, position_ids: Tensor, capacity: int | None = None) -> None:
        """Prepare a step.

        Args:
            position_ids: int64 ``(batch, seqlen)`` on the device. Prompts have ``0 .. seqlen - 1`` in every row.
            capacity: capacity of the cache if the tokens follow others; None for prompts.
        """
        windows = {self.spec.window_of(layer) for layer in range(self.spec.n_layers)}
        masks = {window: self._mask(position_ids, capacity, window) for window in windows}
        lengths = (position_ids[:, -1] + 1).to(torch.int32)
        rotary = {
            rope: tuple(table[position_ids].to(self._dtype) for table in tables) for rope, tables in self.rotary.items()
        }
        self._shared = Shared(masks, lengths, rotary)

    def _mask(self, position_ids: Tensor, capacity: int | None, window: int | None) -> Tensor | None:
        """The mask of layers with a window, or without one; see `Shared`."""
        if capacity is None and (window is None or window >= position_ids.shape[1]):
            return None
        length = position_ids.shape[1] if capacity is None else capacity
        slots, own = torch.arange(length, device=self._device), position_ids[:, None, :, None]
        hidden = slots > own if window is None else (slots > own) | (slots <= own - window)
        # An additive mask: PyTorch would convert a boolean mask again in every layer.
        return torch.zeros(hidden.shape, dtype=self._dtype, device=self._device).masked_fill_(hidden, -torch.inf)

    def sparse_logits(self, x: Tensor, position_ids: Tensor, cache: KVCache, selection: Selection) -> Tensor:
        """Run the sparse layers of a one-token step, and the output projection.

        Args:
            x: hidden states ``(batch, 1, hidden_size)``, the input of the first sparse layer.
            selection: of the units; all sequences share it.

        Returns:
            ``(batch, 1, vocab_size)``; with a low-bit copy, those outside of the shortlist come from the copy.
        """
        spec = self.spec
        first, *_ = spec.norms_of(self._layers.dense_layers)
        normed = self._norm(first, x) if spec.pre_norm else x
        for layer in self._layers.layers:
            after = self._norms_after(layer)
            x, normed = self._attention_block(layer, x, normed, after[0], position_ids, cache, selection)
            x, normed = self._mlp_block(layer, x, normed, after[1], selection)
        if self._rest is None:
            return self._table_logits(normed)
        found, _ = shortlist_logits(normed.flatten(0, 1), **self._rest.logits)
        return found.view(*x.shape[:2], -1)

    def _norms_after(self, layer: int) -> tuple[str, str]:
        """The norms of the hidden states after attention, and after the MLP."""
        own = self.spec.norms_of(layer)
        if not self.spec.pre_norm:
            return own[0], own[1] if len(own) > 1 else "final_norm"
        last = layer == self.spec.n_layers - 1
        return own[1], "final_norm" if last else self.spec.norms_of(layer + 1)[0]

    def _attention_block(
        self, layer: int, x: Tensor, normed: Tensor, after: str, position_ids: Tensor, cache: KVCache, chosen: Selection
    ) -> tuple[Tensor, Tensor]:
        """Hidden states after attention, and their norm ``after``; ``normed`` is attention's input."""
        place, spec = f"layers.{layer}", self.spec
        if not spec.selects_heads:
            x = x + self._output(f"{place}.attention", self._attention(layer, normed, position_ids, cache))
            return x, self._norm(after, x)
        rope = spec.rope_of(layer)
        cos, sin = self._shared.rotary[rope] if rope else (None, None)
        indices, count = chosen.active("heads", self._layers.row(layer), normed)
        block = self._block(f"{place}.attention", x, after)
        block = replace(block, **self._matrices(place, "kv"))
        if (kv := self._nested.get(f"{place}.kv_proj.weight")) is not None:
            block = replace(block, c_kv=kv.copy, cs_kv=kv.scales)
        y, _ = sparse_attention(
            normed,
            cache.keys[layer],
            cache.values[layer],
            self._shared.lengths,
            indices,
            count,
            **self._matrices(place, "q", "o"),
            **self._copies(layer, "heads"),
            cos=cos,
            sin=sin,
            n_heads=spec.n_heads,
            window=spec.window_of(layer) or 0,
            block=block,
        )
        return (y if spec.pre_norm else block.normed), block.normed

    def _mlp_block(self, layer: int, x: Tensor, normed: Tensor, after: str, chosen: Selection) -> tuple[Tensor, Tensor]:
        """As `_attention_block`, for the MLP."""
        place, spec = f"layers.{layer}", self.spec
        indices, count = chosen.active("neurons", self._layers.row(layer), normed)
        inputs = {**self._matrices(place, "gate", "up", "down"), **self._copies(layer, "neurons")}
        block = self._block(f"{place}.mlp", x, after)
        y, _ = sparse_mlp(
            normed,
            indices,
            count,
            **inputs,
            activation=spec.activation,
            threshold=spec.activation_threshold,
            block=block,
        )
        return (y if spec.pre_norm else block.normed), block.normed

    def _block(self, place: str, x: Tensor, after: str) -> BlockInputs:
        return BlockInputs(
            x,
            self.weights[f"{after}.weight"],
            self.weights.get(f"{after}.bias"),
            self.spec.norm_eps,
            torch.empty_like(x),
            self.weights[f"{place}_output_norm.weight"] if self.spec.output_norms else None,
        )

    def _attention(self, layer: int, x: Tensor, position_ids: Tensor, cache: KVCache | None) -> Tensor:
        assert cache is not None
        keys, values = cache.keys[layer], cache.values[layer]
        rope = self.spec.rope_of(layer)
        rotary = self._shared.rotary[rope] if rope else (None, None)
        projected = self._normed_heads(layer, self._linear(f"layers.{layer}.qkv_proj", x))
        query = write_cache(projected, keys, values, position_ids, *rotary)
        return self._rows(
            f"layers.{layer}.o_proj", self._context(layer, query, keys, values).transpose(1, 2).flatten(2)
        )

    def _normed_heads(self, layer: int, projected: Tensor) -> Tensor:
        """Norm each head of query and key in ``(batch, seqlen, (n_heads + 2 * n_kv_heads) * head_dim)`` of q, k, v."""
        if not self.spec.qk_norm:
            return projected
        kv = self.spec.n_kv_heads
        query, key, value = projected.unflatten(-1, (-1, self.spec.head_dim)).split([self.spec.n_heads, kv, kv], dim=2)
        query, key = (self._norm(f"layers.{layer}.{part}_norm", x) for part, x in (("q", query), ("k", key)))
        return torch.cat((query, key, value), dim=2).flatten(2)

    def _context(self, layer: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Dense attention, ``(batch, n_heads, seqlen, head_dim)`` in and out."""
        seqlen, mask = query.shape[2], self._shared.masks[self.spec.window_of(layer)]
        if mask is None:
            own = (keys[:, :, :seqlen], values[:, :, :seqlen])
            return F.scaled_dot_product_attention(query, *own, is_causal=True, enable_gqa=self.spec.group_size > 1)
        if seqlen > 1:
            keys, values = (cache[:, :, : mask.shape[3]] for cache in (keys, values))
            grouped_queries = self.spec.group_size > 1
            return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=grouped_queries)
        # At one token, treat the query heads of a group as tokens of its KV head, which every fused kernel supports.
        grouped = query.view(len(query), self.spec.n_kv_heads, self.spec.group_size, self.spec.head_dim)
        return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask).reshape(query.shape)

    def _copies(self, layer: int, unit: Unit) -> Mapping[str, Any]:
        return self._rest.layers[self._layers.row(layer)][unit] if self._rest else {}

    def _matrices(self, place: str, *parts: str) -> dict[str, Any]:
        """Weight and bias of each part, by the names of the ops' arguments; None if the model has none.

        The weight of a matrix of integers is its residual, which completes the low-bit copy.
        """
        found: dict[str, Any] = {}
        for part in parts:
            name = f"{place}.{part}_proj"
            nested = self._nested.get(f"{name}.weight")
            found[f"w_{part}"] = nested.residual if nested else self.weights.get(f"{name}.weight")
            found[f"b_{part}"] = self.weights.get(f"{name}.bias")
        return found

    def _projected(self, place: str, parts: Sequence[str], x: Tensor) -> Sequence[Tensor]:
        if len(parts) == 1:
            return super()._projected(place, parts, x)
        sizes = [tensor_shape(self.spec, f"{place}.{part}_proj.weight")[0] for part in parts]
        return self._linear(f"{place}.{''.join(parts)}_proj", x).split(sizes, dim=-1)

    def _embedded(self, input_ids: Tensor) -> Tensor:
        nested = self._nested.get("embed_tokens.weight")
        return super()._embedded(input_ids) if nested is None else nested.values(input_ids).to(self._dtype)

    def _table_logits(self, x: Tensor) -> Tensor:
        nested = self._nested.get(self.spec.output_table)
        return super()._table_logits(x) if nested is None else nested.linear(x)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        nested = self._nested.get(f"{name}.weight")
        return super()._linear(name, x) if nested is None else nested.linear(x, self._bias(name))

    def _rows(self, name: str, x: Tensor) -> Tensor:
        nested = self._nested.get(transposed(f"{name}.weight"))
        return super()._rows(name, x) if nested is None else nested.linear(x, self._bias(name))

    def _bias(self, name: str) -> Tensor | None:
        return self.weights.get(f"{name}.bias")
