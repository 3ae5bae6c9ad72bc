"""The architecture of a decoder-only model, independent of its family and file format."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from shadowllm.errors import UserError
from shadowllm.limits import MOST_LAYERS
from shadowllm.models.activations import Activation
from shadowllm.models.rope import RopeSpec

Norm = Literal["layernorm", "rmsnorm"]
Positions = Literal["learned", "rope"]
HeadUnit = Literal["query_head", "kv_group"]
# The limit exists because position tables are computed for all positions.
MOST_POSITIONS = 1 << 24


@dataclass(frozen=True)
class ModelSpec:
    """Sizes and options of a decoder. The constructor refuses values that do not fit.

    Attributes:
        family: the adapter that produced the spec, a row of `registry.FAMILIES`.
        n_kv_heads: number of K and V heads; ``n_heads`` for MHA, fewer for GQA, 1 for MQA.
        max_seqlen: longest text that the model's description is right for.
        activation_threshold: of FATReLU; 0 for all others.
        pre_norm: attention and MLP read the normed hidden states. Otherwise (OPT-350m) they read the hidden states
            themselves, and the sum of both is normed; the last of these norms is the model's ``final_norm``.
        output_norms: whether the outputs of attention and MLP are normed before they are added to the hidden states.
        gated: the MLP computes ``act(gate) * up`` (Llama) instead of ``act(up)`` (OPT).
        position_offset: rows of a learned position table that come before position 0 (OPT has 2).
        rope: rotary parameters; None for learned positions.
        second_rope, second_rope_layers: rotary parameters of layers that differ from the others, and these layers.
        window, window_layers: layers with a sliding window, whose tokens attend to the last ``window`` positions, their
            own included (Beltagy et al., arXiv 2004.05150); None if all layers attend to all earlier positions.
        qkv_bias, o_bias, mlp_bias: whether these projections have a bias.
        qk_norm: whether each head's query and key are normed (RMSNorm over head_dim) before they are rotated. Then
            all heads are always active, because a sparse op does not norm its queries.
        tied_embeddings: whether the output projection is the embedding table.
        head_unit: the unit of head selection: one query head, or all query heads of one KV head.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    max_seqlen: int
    norm: Norm
    norm_eps: float
    activation: Activation
    gated: bool
    positions: Positions
    position_offset: int = 0
    rope: RopeSpec | None = None
    second_rope: RopeSpec | None = None
    second_rope_layers: tuple[int, ...] = ()
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = field(default=())
    head_unit: HeadUnit = "query_head"
    activation_threshold: float = 0.0
    pre_norm: bool = True
    output_norms: bool = False
    window: int | None = None
    window_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "head_dim",
            "max_seqlen",
        ):
            value = getattr(self, name)
            _require(type(value) is int and value > 0, f"{name} must be a positive whole number, got {value!r}")
        _require(
            self.n_heads % self.n_kv_heads == 0,
            f"{self.n_heads} query heads do not divide over {self.n_kv_heads} KV heads",
        )
        _require(self.max_seqlen <= MOST_POSITIONS, f"{self.max_seqlen} positions, more than {MOST_POSITIONS}")
        _require(self.n_layers <= MOST_LAYERS, f"{self.n_layers} layers, more than {MOST_LAYERS}")
        eps = self.norm_eps
        _require(_is_number(eps) and eps >= 0, f"norm_eps must be a number of at least 0, got {eps!r}")
        _require(self.norm in get_args(Norm), f"norm {self.norm!r}")
        _require(self.activation in get_args(Activation), f"activation {self.activation!r}")
        threshold = self.activation_threshold
        _require(_is_number(threshold) and threshold >= 0, f"activation threshold {threshold!r}")
        _require(self.activation == "fatrelu" or threshold == 0, f"{self.activation} with a threshold")
        _require(self.activation != "drelu" or self.gated, "dReLU without a gate")
        _require(self.positions in get_args(Positions), f"positions {self.positions!r}")
        _require(self.head_unit in get_args(HeadUnit), f"head unit {self.head_unit!r}")
        _require((self.rope is not None) == (self.positions == "rope"), "rope spec and positions disagree")
        _require(self.pre_norm or not self.output_norms, "norms of outputs in a post-norm model")
        self._check_ropes()
        layers, window = self.window_layers, self.window
        _require((window is not None) == bool(layers), "the sliding window and its layers disagree")
        _require(window is None or (type(window) is int and window > 0), f"a sliding window of {window!r} positions")
        _require(self._are_layers(layers), f"layers {layers!r} of a sliding window")

    def _check_ropes(self) -> None:
        for rope in filter(None, (self.rope, self.second_rope)):
            _require(
                self.head_dim % 2 == 0 and len(rope.frequencies) <= self.head_dim // 2,
                f"{2 * len(rope.frequencies)} of {self.head_dim} dimensions of a head are rotated: RoPE rotates pairs",
            )
        layers = self.second_rope_layers
        _require((self.second_rope is not None) == bool(layers), "the second RoPE and its layers disagree")
        _require(
            self._are_layers(layers) and (self.rope is not None or not layers), f"layers {layers!r} of a second RoPE"
        )

    def _are_layers(self, layers: tuple[int, ...]) -> bool:
        return all(type(layer) is int and 0 <= layer < self.n_layers for layer in layers)

    @property
    def selects_heads(self) -> bool:
        """Whether heads can be selected; otherwise all of them are always active."""
        return not self.qk_norm

    def norms_of(self, layer: int) -> tuple[str, ...]:
        """Return the canonical names of a layer's norms over hidden states."""
        place = f"layers.{layer}"
        first, second = f"{place}.input_norm", f"{place}.post_norm"
        if self.output_norms:
            return first, second, f"{place}.attention_output_norm", f"{place}.mlp_output_norm"
        return (first, second) if self.pre_norm or layer < self.n_layers - 1 else (first,)

    def rope_of(self, layer: int) -> RopeSpec | None:
        """Return the rotary parameters of a layer."""
        return self.second_rope if layer in self.second_rope_layers else self.rope

    def window_of(self, layer: int) -> int | None:
        """Return the number of positions that a token of a layer attends to; None for all up to its own."""
        return self.window if layer in self.window_layers else None

    @property
    def group_size(self) -> int:
        """Number of query heads that share one KV head."""
        return self.n_heads // self.n_kv_heads

    @property
    def heads_together(self) -> int:
        """Number of neighbouring query heads that are selected together: all, if heads cannot be selected."""
        if not self.selects_heads:
            return self.n_heads
        return self.group_size if self.head_unit == "kv_group" else 1

    @property
    def output_table(self) -> str:
        """Canonical name of the matrix that maps hidden states to logits."""
        return "embed_tokens.weight" if self.tied_embeddings else "lm_head.weight"

    @property
    def n_parameters(self) -> int:
        """Number of parameters, with biases and norms; tied embeddings count once."""
        d, f, heads, kv = (
            self.hidden_size,
            self.intermediate_size,
            self.n_heads * self.head_dim,
            self.n_kv_heads * self.head_dim,
        )
        norm = d * (2 if self.norm == "layernorm" else 1)
        attention = d * (2 * heads + 2 * kv) + self.qkv_bias * (heads + 2 * kv) + self.o_bias * d
        attention += 2 * self.qk_norm * self.head_dim
        matrices = 3 if self.gated else 2
        mlp = matrices * d * f + self.mlp_bias * (d + (matrices - 1) * f)
        tables = self.vocab_size * d * (1 if self.tied_embeddings else 2)
        if self.positions == "learned":
            tables += (self.max_seqlen + self.position_offset) * d
        norms = sum(len(self.norms_of(layer)) for layer in range(self.n_layers)) + 1
        return self.n_layers * (attention + mlp) + norms * norm + tables

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelSpec:
        """Inverse of `to_dict`.

        Raises:
            UserError: a field is missing, unknown or out of range.
        """
        fields = dict(data)
        try:
            for name in ("rope", "second_rope"):
                if fields.get(name) is not None:
                    fields[name] = RopeSpec(**fields[name])
            for name in ("eos_token_ids", "second_rope_layers", "window_layers"):
                fields[name] = tuple(fields.get(name, ()))
            return cls(**fields)
        except (TypeError, KeyError) as error:
            raise UserError(
                f"the model description is not readable ({error})",
                "it was written by another version: export the model again",
            ) from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise UserError(f"unsupported model: {problem}", "see `shadowllm families`, and check its config.json")
