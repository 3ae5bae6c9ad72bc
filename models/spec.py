"""The architecture of a decoder-only model, independent of its family and file format."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from shadowllm.errors import UserError
from shadowllm.models.activations import Activation

Norm = Literal["layernorm", "rmsnorm"]
Positions = Literal["learned", "rope"]
RopeScaling = Literal["default", "linear", "llama3"]
HeadUnit = Literal["query_head", "kv_group"]
# The limit exists because position tables are computed for all positions.
MOST_POSITIONS = 1 << 24


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding (Su et al., arXiv 2104.09864) with the scalings Llama uses.

    Attributes:
        theta: base of the geometric frequency series.
        scaling: "default", "linear" (all frequencies divided by ``factor``) or "llama3" (only
            low frequencies are divided, with a smooth ramp between the two bounds).
        factor, low_freq_factor, high_freq_factor, original_max_seqlen: parameters of the scaling,
            named as in Hugging Face ``rope_parameters``.
    """

    theta: float = 10000.0
    scaling: RopeScaling = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seqlen: int = 8192

    def __post_init__(self) -> None:
        _require(self.scaling in get_args(RopeScaling), f"RoPE scaling {self.scaling!r}")
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_seqlen"):
            value = getattr(self, name)
            _require(_is_number(value) and value > 0, f"RoPE {name} must be a positive number, got {value!r}")
        _require(
            self.high_freq_factor > self.low_freq_factor,
            f"RoPE high_freq_factor {self.high_freq_factor} is not above low_freq_factor {self.low_freq_factor}",
        )

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """Return the angle per position of each rotated pair, float64 ``(head_dim / 2,)``."""
        freq = self.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.scaling == "linear":
            return freq / self.factor
        if self.scaling == "llama3":
            return self._llama3(freq)
        return freq

    def _llama3(self, freq: np.ndarray) -> np.ndarray:
        # keep = 1 leaves a frequency unchanged, 0 divides it by factor. Llama 3.1 uses a linear ramp between them.
        turns = self.original_max_seqlen * freq / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        keep = np.clip((turns - self.low_freq_factor) / span, 0.0, 1.0)
        return keep * freq + (1 - keep) * freq / self.factor

    def tables(self, head_dim: int, max_seqlen: int) -> tuple[np.ndarray, np.ndarray]:
        """Return cosine and sine per position, float32 ``(max_seqlen, head_dim / 2)`` each."""
        # float32 angles as in transformers, so that both agree at long positions too.
        freq = self.inverse_frequencies(head_dim).astype(np.float32)
        angles = np.arange(max_seqlen, dtype=np.float32)[:, None] * freq[None, :]
        return np.cos(angles), np.sin(angles)


@dataclass(frozen=True)
class ModelSpec:
    """Sizes and options of an OPT- or Llama-like decoder. The constructor refuses values that do not fit.

    Attributes:
        family: the adapter that produced the spec ("opt", "llama").
        n_kv_heads: number of K and V heads; ``n_heads`` for MHA, fewer for GQA, 1 for MQA.
        max_seqlen: positions the model was trained for.
        activation_threshold: of FATReLU; 0 for all others.
        gated: the MLP computes ``act(gate) * up`` (Llama) instead of ``act(up)`` (OPT).
        position_offset: rows of a learned position table that come before position 0 (OPT has 2).
        rope: rotary parameters; None for learned positions.
        qkv_bias, o_bias, mlp_bias: whether these projections have a bias.
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
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tied_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = field(default=())
    head_unit: HeadUnit = "query_head"
    activation_threshold: float = 0.0

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
        _require(self.rope is None or self.head_dim % 2 == 0, f"head_dim {self.head_dim} is odd: RoPE rotates pairs")

    @property
    def group_size(self) -> int:
        """Number of query heads that share one KV head."""
        return self.n_heads // self.n_kv_heads

    @property
    def heads_together(self) -> int:
        """Number of neighbouring query heads that are selected together."""
        return self.group_size if self.head_unit == "kv_group" else 1

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
        matrices = 3 if self.gated else 2
        mlp = matrices * d * f + self.mlp_bias * (d + (matrices - 1) * f)
        tables = self.vocab_size * d * (1 if self.tied_embeddings else 2)
        if self.positions == "learned":
            tables += (self.max_seqlen + self.position_offset) * d
        return self.n_layers * (attention + mlp + 2 * norm) + norm + tables

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
            if fields.get("rope") is not None:
                fields["rope"] = RopeSpec(**fields["rope"])
            fields["eos_token_ids"] = tuple(fields.get("eos_token_ids", ()))
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
        raise UserError(f"unsupported model: {problem}", "check its config.json; the README says what is supported")
