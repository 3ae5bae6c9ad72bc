"""The reference decoder: one plain PyTorch forward pass for every family, with hooks.

Every other backend is compared with this one. It also computes the importance traces and the masked evaluations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from shadowllm.models.activations import QUICK_GELU_SLOPE
from shadowllm.models.sparsity import Unit
from shadowllm.models.spec import ModelSpec
from shadowllm.models.weights import table_product, table_rows

# Receives the activation of one layer's units and returns the activation that the layer uses instead:
#   heads    attention context before the output projection (batch, seqlen, n_heads, head_dim)
#   neurons  product before the down projection             (batch, seqlen, intermediate_size)
ActivationHook = Callable[[int, Unit, Tensor], Tensor]
# Receives the normalised input of one layer's units, (batch, seqlen, hidden_size).
InputHook = Callable[[int, Unit, Tensor], None]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "drelu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(QUICK_GELU_SLOPE * x),
}


def activate(activation: str, threshold: float, x: Tensor) -> Tensor:
    """Apply the activation function of an MLP to the output of gate, or of up without a gate.

    Args:
        threshold: of FATReLU.
    """
    return F.threshold(x, threshold, 0.0) if activation == "fatrelu" else ACTIVATIONS[activation](x)


def mlp_product(activation: str, threshold: float, first: Tensor, up: Tensor | None = None) -> Tensor:
    """The products that the rows of down are multiplied by: ``act(first)``, times up if there is a gate.

    Args:
        threshold: of FATReLU.
        first: output of gate, or of up without a gate; any shape.
        up: of the same shape; None without a gate.
    """
    active = activate(activation, threshold, first)
    if up is None:
        return active
    return active * (F.relu(up) if activation == "drelu" else up)


@dataclass(frozen=True)
class Visible:
    """Keys and values ``(batch, n_kv_heads, length, head_dim)``, and which of them each token attends to.

    Attributes:
        mask: bool ``(batch, 1, seqlen, length)``.
    """

    key: Tensor
    value: Tensor
    mask: Tensor


@dataclass
class KVCache:
    """A KV cache of fixed capacity: keys and values ``(batch, n_kv_heads, capacity, head_dim)`` per layer.

    A step writes its tokens at their positions and attends to every position up to its own. The
    position ids alone therefore define the length of each sequence.
    """

    keys: list[Tensor]
    values: list[Tensor]

    @classmethod
    def empty(
        cls,
        spec: ModelSpec,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> KVCache:
        """Return a cache of zeros for ``batch`` sequences of up to ``capacity`` tokens."""
        shape = (batch, spec.n_kv_heads, capacity, spec.head_dim)
        keys, values = ([torch.zeros(shape, dtype=dtype, device=device) for _ in range(spec.n_layers)] for _ in "kv")
        return cls(keys, values)

    def update(self, layer: int, key: Tensor, value: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``(batch, n_kv_heads, seqlen, head_dim)`` at ``position_ids``; return all of the layer's K and V."""
        rows = torch.arange(key.shape[0])[:, None]
        self.keys[layer][rows, :, position_ids] = key.transpose(1, 2)
        self.values[layer][rows, :, position_ids] = value.transpose(1, 2)
        return self.keys[layer], self.values[layer]


class Decoder:
    """Forward pass of a `ModelSpec` over canonical weights.

    Args:
        spec: the model.
        weights: canonical tensors, all of one dtype (the dtype of the computation).
        activation_hook: called once per layer and unit; None leaves activations as they are.
        input_hook: called once per layer and unit, before the activation hook, with the input of the units.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, Tensor],
        activation_hook: ActivationHook | None = None,
        input_hook: InputHook | None = None,
    ) -> None:
        self.spec = spec
        self.weights = weights
        self.activation_hook = activation_hook
        self.input_hook = input_hook
        # Cosine and sine per position, by the RoPE that layers have.
        self.rotary = {
            rope: tuple(map(torch.from_numpy, rope.tables(spec.head_dim, spec.max_seqlen)))
            for rope in filter(None, (spec.rope, spec.second_rope))
        }

    def __call__(self, input_ids: Tensor, position_ids: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Compute the logits of every position.

        Args:
            input_ids: int64 ``(batch, seqlen)``.
            position_ids: int64 ``(batch, seqlen)``, consecutive within a row; 0, 1, ... when None.
            cache: written and read if given. Without a cache, the call must contain the whole sequence.

        Returns:
            Tensor ``(batch, seqlen, vocab_size)``.
        """
        return self.logits(self.hidden(input_ids, position_ids, cache))

    def hidden(self, input_ids: Tensor, position_ids: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Compute the output of the last layer, ``(batch, seqlen, hidden_size)``, from the arguments of a call."""
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        x = self.embed(input_ids, position_ids)
        for layer in range(self.spec.n_layers):
            x = self.layer(layer, x, position_ids, cache)
        return x

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Return the token embeddings, plus learned position embeddings if any, ``(batch, seqlen, hidden_size)``."""
        x = self._embedded(input_ids)
        if self.spec.positions == "learned":
            x = x + table_rows(self.weights, "embed_positions.weight", position_ids + self.spec.position_offset)
        return x

    def layer(self, layer: int, x: Tensor, position_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Run one layer, ``(batch, seqlen, hidden_size)`` in and out."""
        first, *second = self.spec.norms_of(layer)
        if self.spec.pre_norm:
            y = self._attention(layer, self._norm(first, x), position_ids, cache)
            x = x + self._output(f"layers.{layer}.attention", y)
            return x + self._output(f"layers.{layer}.mlp", self._mlp(layer, self._norm(second[0], x)))
        x = self._norm(first, x + self._attention(layer, x, position_ids, cache))
        x = x + self._mlp(layer, x)
        return self._norm(second[0], x) if second else x

    def _output(self, block: str, y: Tensor) -> Tensor:
        return self._norm(f"{block}_output_norm", y) if self.spec.output_norms else y

    def logits(self, x: Tensor) -> Tensor:
        """Apply the final norm and the output projection."""
        return self._table_logits(self.final_hidden(x))

    def final_hidden(self, x: Tensor) -> Tensor:
        """Apply the final norm; the result is the input of the output projection."""
        return self._norm("final_norm", x)

    def _attention(self, layer: int, x: Tensor, position_ids: Tensor, cache: KVCache | None) -> Tensor:
        if self.input_hook:
            self.input_hook(layer, "heads", x)
        context = self.context(layer, x, position_ids, self.visible(layer, x, position_ids, cache))
        return self._rows(f"layers.{layer}.o_proj", self._hooked(layer, "heads", context).flatten(2))

    def visible(self, layer: int, x: Tensor, position_ids: Tensor, cache: KVCache | None) -> Visible:
        """Return the keys and values that a layer's tokens attend to. Those of ``x`` are written to the cache."""
        place = f"layers.{layer}"
        key, value = (self._heads(f"{place}.{part}_proj", x) for part in ("k", "v"))
        key, key_positions = self._positioned(layer, "k", key, position_ids), position_ids
        if cache is not None:
            key, value = cache.update(layer, key, value, position_ids)
            key_positions = torch.arange(key.shape[2]).expand(x.shape[0], -1)
        keys, own = key_positions[:, None, None, :], position_ids[:, None, :, None]
        mask, window = keys <= own, self.spec.window_of(layer)
        return Visible(key, value, mask if window is None else mask & (keys > own - window))

    def context(self, layer: int, x: Tensor, position_ids: Tensor, visible: Visible) -> Tensor:
        """Return what the query heads read from keys and values, ``(batch, seqlen, n_heads, head_dim)``."""
        query = self._positioned(layer, "q", self._heads(f"layers.{layer}.q_proj", x), position_ids)
        return F.scaled_dot_product_attention(
            query, visible.key, visible.value, attn_mask=visible.mask, enable_gqa=True
        ).transpose(1, 2)

    def _heads(self, name: str, x: Tensor) -> Tensor:
        """Apply a projection, ``(batch, heads, seqlen, head_dim)``."""
        return self._linear(name, x).unflatten(-1, (-1, self.spec.head_dim)).transpose(1, 2)

    def mlp_activation(self, layer: int, x: Tensor) -> Tensor:
        """Compute a layer's neuron activations from the normalised input, ``(batch, seqlen, intermediate_size)``."""
        spec, parts = self.spec, ("gate", "up") if self.spec.gated else ("up",)
        return mlp_product(spec.activation, spec.activation_threshold, *self._projected(f"layers.{layer}", parts, x))

    def gate_activation(self, layer: int, x: Tensor) -> Tensor:
        """Compute ``act(gate)``, or ``act(up)`` without a gate; shapes as for `mlp_activation`.

        A neuron where it is zero contributes nothing.
        """
        spec, first = self.spec, "gate" if self.spec.gated else "up"
        return activate(spec.activation, spec.activation_threshold, self._linear(f"layers.{layer}.{first}_proj", x))

    def _mlp(self, layer: int, x: Tensor) -> Tensor:
        if self.input_hook:
            self.input_hook(layer, "neurons", x)
        return self._rows(f"layers.{layer}.down_proj", self._hooked(layer, "neurons", self.mlp_activation(layer, x)))

    def _hooked(self, layer: int, unit: Unit, activation: Tensor) -> Tensor:
        return self.activation_hook(layer, unit, activation) if self.activation_hook else activation

    def _projected(self, place: str, parts: Sequence[str], x: Tensor) -> Sequence[Tensor]:
        """Apply several projections to one input."""
        return [self._linear(f"{place}.{part}_proj", x) for part in parts]

    def _embedded(self, input_ids: Tensor) -> Tensor:
        return table_rows(self.weights, "embed_tokens.weight", input_ids)

    def _table_logits(self, x: Tensor) -> Tensor:
        return table_product(self.weights, self.spec.output_table, x)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _rows(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.weights[f"{name}.weight"]
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    def _positioned(self, layer: int, part: str, x: Tensor, position_ids: Tensor) -> Tensor:
        """Norm and rotate the queries or keys of a layer's heads."""
        if self.spec.qk_norm:
            x = self._norm(f"layers.{layer}.{part}_norm", x)
        rope = self.spec.rope_of(layer)
        if rope is None:
            return x
        # Half-split rotation: element i pairs with element i + head_dim / 2, as in Hugging Face's Llama.
        cos, sin = (table[position_ids].to(x.dtype)[:, None] for table in self.rotary[rope])
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        if self.spec.norm == "layernorm":
            return F.layer_norm(x, weight.shape, weight, self.weights[f"{name}.bias"], self.spec.norm_eps)
        return F.rms_norm(x, weight.shape, weight, self.spec.norm_eps)
