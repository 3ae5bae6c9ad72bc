"""Sizes and options of the calls with which the kernels are checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Whether the other units come from a low-bit copy, and then whether the op is given the active ones or chooses them.
Rest = Literal["none", "given", "chosen"]


@dataclass(frozen=True)
class MlpCase:
    """Sizes and options of a ``SparseMLP`` call."""

    batch: int
    seqlen: int
    hidden: int
    neurons: int
    count: int
    activation: str = "silu"
    gated: bool = True
    bias: bool = False
    rest: Rest = "none"


@dataclass(frozen=True)
class ScoreCase:
    """Sizes and options of a ``ScoreNeurons`` call."""

    batch: int
    seqlen: int
    hidden: int
    neurons: int
    activation: str = "silu"
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True)
class AttentionCase:
    """Sizes and options of a ``SparseAttention`` call; ``length`` tokens are cached, fewer in later sequences."""

    batch: int
    seqlen: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    capacity: int
    length: int
    count: int
    rope: bool = True
    bias: bool = False
    rest: Rest = "none"


@dataclass(frozen=True)
class LogitsCase:
    """Sizes of a ``ShortlistLogits`` call."""

    tokens: int
    hidden: int
    vocab: int
    shortlist: int
    certify: bool = False


@dataclass(frozen=True)
class TopKCase:
    """Sizes of a ``SelectTopK`` call; scores are rounded to ``levels`` values so that they tie."""

    rows: int
    width: int
    count: int
    levels: int = 1 << 20


TINY = (
    MlpCase(1, 1, 48, 88, 37),
    MlpCase(2, 1, 80, 33, 33, "relu", gated=False, bias=True),
    MlpCase(2, 3, 48, 40, 21, "gelu", bias=True),
    AttentionCase(1, 1, 4, 2, 12, 48, 40, 33, 3),
    AttentionCase(2, 1, 3, 3, 16, 48, 24, 24, 2, rope=False, bias=True),
    AttentionCase(2, 3, 4, 1, 20, 40, 16, 9, 4),
    MlpCase(1, 1, 48, 88, 37, rest="chosen"),
    MlpCase(2, 3, 80, 33, 9, "relu", gated=False, bias=True, rest="given"),
    AttentionCase(1, 1, 4, 2, 12, 48, 40, 33, 2, rest="chosen"),
    AttentionCase(2, 3, 4, 1, 20, 40, 16, 9, 1, bias=True, rest="given"),
    ScoreCase(1, 1, 48, 88),
    ScoreCase(2, 3, 130, 33, "relu", gated=False, bias=True),
    LogitsCase(1, 48, 97, 9),
    LogitsCase(3, 130, 60, 60),
    TopKCase(2, 88, 40),
    TopKCase(3, 31, 31, levels=4),
)
# Real sizes, and also: one unit, none, all; widths that no block divides; ties; batches of different lengths.
CASES = (
    *TINY,
    MlpCase(1, 1, 576, 1536, 768),
    MlpCase(1, 1, 2048, 8192, 4096, "relu", gated=False, bias=True),
    MlpCase(1, 1, 4096, 16384, 8192, "relu", gated=False, bias=True),
    MlpCase(1, 1, 4096, 11008, 5504),
    MlpCase(1, 1, 1000, 777, 1),
    MlpCase(1, 1, 1000, 777, 0, bias=True),
    MlpCase(3, 1, 1000, 777, 777),
    MlpCase(8, 1, 2048, 5632, 2816),
    MlpCase(2, 37, 576, 1536, 700),
    MlpCase(1, 128, 2048, 8192, 4096, "relu", gated=False, bias=True),
    AttentionCase(1, 1, 32, 32, 64, 2048, 1024, 200, 16, rope=False, bias=True),
    AttentionCase(1, 1, 32, 32, 128, 4096, 2048, 2048, 16),
    AttentionCase(1, 1, 32, 4, 64, 2048, 1024, 777, 13),
    AttentionCase(1, 1, 9, 3, 64, 576, 300, 1, 5),
    AttentionCase(1, 1, 7, 7, 80, 333, 100, 50, 0, bias=True),
    AttentionCase(8, 1, 32, 8, 128, 4096, 512, 500, 16),
    AttentionCase(2, 37, 9, 3, 64, 576, 64, 50, 6),
    AttentionCase(1, 128, 32, 32, 64, 2048, 256, 128, 32, rope=False, bias=True),
    MlpCase(1, 1, 576, 1536, 230, rest="chosen"),
    MlpCase(1, 1, 4096, 16384, 1638, "relu", gated=False, bias=True, rest="chosen"),
    MlpCase(8, 1, 2048, 5632, 563, rest="chosen"),
    MlpCase(2, 37, 576, 1536, 230, rest="chosen"),
    MlpCase(1, 200, 576, 1536, 300, rest="chosen"),
    MlpCase(1, 1, 1000, 777, 0, bias=True, rest="chosen"),
    MlpCase(2, 37, 576, 1536, 1536, rest="given"),
    MlpCase(1, 1, 1000, 777, 0, bias=True, rest="given"),
    AttentionCase(1, 1, 32, 32, 128, 4096, 2048, 2048, 16, rest="chosen"),
    AttentionCase(1, 1, 9, 3, 64, 576, 300, 200, 3, rest="chosen"),
    AttentionCase(8, 1, 32, 8, 128, 4096, 512, 500, 16, rest="given"),
    AttentionCase(2, 37, 9, 3, 64, 576, 64, 50, 6, bias=True, rest="chosen"),
    LogitsCase(1, 576, 49152, 1024),
    LogitsCase(1, 4096, 50272, 1),
    LogitsCase(1, 2048, 32000, 256, certify=True),
    LogitsCase(8, 2048, 32000, 1024),
    LogitsCase(1, 2048, 32000, 32000),
    ScoreCase(1, 1, 576, 1536),
    ScoreCase(1, 1, 4096, 16384, "relu", gated=False, bias=True),
    ScoreCase(1, 1, 4096, 11008),
    ScoreCase(8, 1, 2048, 5632),
    ScoreCase(2, 37, 1000, 777, bias=True),
    TopKCase(31, 16384, 8192),
    TopKCase(23, 32, 16),
    TopKCase(1, 65536, 12345, levels=50),
    TopKCase(5, 1, 1),
    TopKCase(4, 4097, 1, levels=1),
)
