"""Compares every kernel with its NumPy reference, and its error with PyTorch's error in the same type."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shadowllm.bundle.quantisation import LOW_BIT_COPY, dequantise, quantise
from shadowllm.models.decoder import ACTIVATIONS
from shadowllm.plugins.registry import launcher, reference

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# Relative error of one rounding of a result, which is always allowed.
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


@dataclass(frozen=True)
class Check:
    """The error of a kernel relative to its reference.

    Attributes:
        case: op and sizes.
        error: largest difference divided by the largest reference value; for indices, how many differ.
        allowed: twice PyTorch's own error in the same type, plus one rounding of the result.
    """

    case: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the error is allowed; a NaN is not."""
        return self.error <= self.allowed


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
    ScoreCase(1, 1, 48, 88),
    ScoreCase(2, 3, 130, 33, "relu", gated=False, bias=True),
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


def check_all(device: torch.device, cases: tuple[Any, ...] = CASES) -> Iterator[Check]:
    """Check cases in both 16-bit types; selection has only one type."""
    for case in cases:
        if isinstance(case, TopKCase):
            yield check_topk(case, device)
            continue
        for name, dtype in DTYPES.items():
            found = CHECKS[type(case)](case, dtype, device)
            yield Check(f"{name} {found.case}", found.error, found.allowed)


def check_mlp(case: MlpCase, dtype: torch.dtype, device: torch.device) -> Check:
    """``SparseMLP``."""
    make = _random(dtype, device)
    d, n = case.hidden, case.neurons
    x = make(case.batch, case.seqlen, d)
    up, down = (make(n, d, scale=d**-0.5) for _ in "ud")
    gate = make(n, d, scale=d**-0.5) if case.gated else None
    b_up, b_down = (make(size, scale=0.1) if case.bias else None for size in (n, d))
    b_gate = make(n, scale=0.1) if case.bias and case.gated else None
    indices, count = _selection(n, case.count, device)
    weights = (gate, b_gate, up, b_up, down, b_down)
    found = launcher("SparseMLP")(x, indices, count, *weights, activation=case.activation)
    wanted = reference("SparseMLP")(
        _wide(x), _host(indices), case.count, *map(_wide, weights), activation=case.activation
    )
    rows = indices[: case.count].long()

    def project(weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight[rows], None if bias is None else bias[rows])

    act = ACTIVATIONS[case.activation]
    product = act(project(up, b_up)) if gate is None else act(project(gate, b_gate)) * project(up, b_up)
    own = product @ down[rows]
    return _judge(case, found, own if b_down is None else own + b_down, wanted)


def check_attention(case: AttentionCase, dtype: torch.dtype, device: torch.device) -> Check:
    """``SparseAttention``."""
    make = _random(dtype, device)
    d, h, kv, n = case.head_dim, case.heads, case.kv_heads, case.hidden
    x = make(case.batch, case.seqlen, n)
    key, value = (make(case.batch, kv, case.capacity, d) for _ in range(2))
    w_q, w_o = (make(h * d, n, scale=n**-0.5) for _ in range(2))
    b_q, b_o = (make(size, scale=0.1) if case.bias else None for size in (h * d, n))
    angles = make(case.batch, case.seqlen, d // 2).float()
    cos, sin = (f(angles).to(dtype) if case.rope else None for f in (torch.cos, torch.sin))
    lengths = torch.tensor([max(case.seqlen, case.length - 3 * row) for row in range(case.batch)], dtype=torch.int32)
    lengths = lengths.to(device)
    indices, count = _selection(h, case.count, device)
    found = launcher("SparseAttention")(x, key, value, lengths, indices, count, w_q, b_q, w_o, b_o, cos, sin, n_heads=h)
    units = (_host(lengths), _host(indices), case.count)
    after = map(_wide, (w_q, b_q, w_o, b_o, cos, sin))
    wanted = reference("SparseAttention")(_wide(x), _wide(key), _wide(value), *units, *after, n_heads=h)
    own = _torch_attention(case, x, key, value, lengths, indices, w_q, b_q, w_o, b_o, cos, sin)
    return _judge(case, found, own, wanted)


def _torch_attention(
    case: AttentionCase, x: Tensor, key: Tensor, value: Tensor, lengths: Tensor, indices: Tensor,
    w_q: Tensor, b_q: Tensor | None, w_o: Tensor, b_o: Tensor | None, cos: Tensor | None, sin: Tensor | None,
) -> Tensor:  # fmt: skip
    """PyTorch's result for the same numbers in the same type."""
    heads = indices[: case.count].long()
    rows = (heads[:, None] * case.head_dim + torch.arange(case.head_dim, device=x.device)).flatten()
    query = F.linear(x, w_q[rows], None if b_q is None else b_q[rows])
    query = query.unflatten(-1, (case.count, case.head_dim)).transpose(1, 2)
    if cos is not None and sin is not None:
        first, second = query.chunk(2, dim=-1)
        c, s = cos[:, None], sin[:, None]
        query = torch.cat((first * c - second * s, second * c + first * s), dim=-1)
    groups = heads // (case.heads // case.kv_heads)
    last = lengths[:, None] - case.seqlen + torch.arange(case.seqlen, device=x.device)
    visible = torch.arange(case.capacity, device=x.device) <= last[..., None]
    if case.count:
        mask = visible[:, None]
        context = F.scaled_dot_product_attention(query, key[:, groups], value[:, groups], attn_mask=mask)
    else:
        context = query
    own = context.transpose(1, 2).flatten(2) @ w_o[rows]
    return own if b_o is None else own + b_o


def check_scores(case: ScoreCase, dtype: torch.dtype, device: torch.device) -> Check:
    """``ScoreNeurons``."""
    make = _random(dtype, device)
    rows = (1 + case.gated) * case.neurons
    data, scales = quantise(_wide(make(rows, case.hidden, scale=case.hidden**-0.5)), LOW_BIT_COPY)
    x, bias = make(case.batch, case.seqlen, case.hidden), make(rows, scale=0.1) if case.bias else None
    *gates, b_up = [None] if bias is None else bias.split(case.neurons)
    down_norms = make(case.neurons).float().abs()
    copy, given = data.reshape(rows, LOW_BIT_COPY.blocks(case.hidden), -1), torch.from_numpy(scales).to(device)
    count = torch.tensor(case.neurons // 2, dtype=torch.int32, device=device)
    words, b_gate = torch.from_numpy(copy).to(device), gates[0] if gates else None
    found = launcher("ScoreNeurons")(x, words, given, b_gate, b_up, down_norms, count, activation=case.activation)
    wanted = reference("ScoreNeurons")(
        _wide(x), copy, scales, _wide(b_gate), _wide(b_up), _wide(down_norms), activation=case.activation
    )
    weight = torch.from_numpy(dequantise(data, scales, case.hidden, LOW_BIT_COPY).copy()).to(device, dtype)
    first, *rest = F.linear(x.flatten(0, 1), weight, bias).split(case.neurons, dim=1)
    product = ACTIVATIONS[case.activation](first)
    for up in rest:
        product = product * up
    own = product.abs().float().mean(dim=0, keepdim=True) * down_norms
    return _judge(case, found, own, wanted)


def check_topk(case: TopKCase, device: torch.device) -> Check:
    """``SelectTopK``: must be exact, with ties to the lower index. Counts differ between rows."""
    generator = torch.Generator().manual_seed(case.width)
    scores = torch.randint(case.levels, (case.rows, case.width), generator=generator).float() / case.levels - 0.5
    counts = torch.tensor([max(0, case.count - row) for row in range(case.rows)], dtype=torch.int32)
    found = launcher("SelectTopK")(scores.to(device), counts.to(device), case.width)
    wanted = reference("SelectTopK")(scores.numpy(), counts.numpy(), case.width)
    return Check(str(case), float((_host(found) != wanted).sum()), 0.0)


def _judge(case: MlpCase | ScoreCase | AttentionCase, found: Tensor, own: Tensor, wanted: np.ndarray) -> Check:
    # If nothing is active and there is no bias, the result is exactly zero.
    scale = float(np.abs(wanted).max()) or 1.0
    ours, theirs = (float(np.abs(_wide(y) - wanted).max()) / scale for y in (found, own))
    allowed = 2 * theirs + ROUNDING[found.dtype]
    # Triton's interpreter truncates bfloat16, but a GPU rounds it: the error of every rounding doubles.
    return Check(str(case), ours, 2 * allowed if found.dtype == torch.bfloat16 and found.is_cpu else allowed)


CHECKS: dict[type, Callable[..., Check]] = {
    MlpCase: check_mlp,
    ScoreCase: check_scores,
    AttentionCase: check_attention,
}


def _random(dtype: torch.dtype, device: torch.device) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    return make


def _selection(width: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Evenly spaced units, ascending and padded with -1, and their number."""
    indices = torch.full((width,), -1, dtype=torch.int32)
    if count:
        indices[:count] = torch.arange(count) * width // count + (width // count - 1 if count < width else 0)
    return indices.to(device), torch.tensor(count, dtype=torch.int32, device=device)


def _host(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()


def _wide(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.float().cpu().numpy()


def summary(checks: list[Check]) -> dict[str, Any]:
    """JSON types: every check, and the largest ratio of an error to the allowed error."""
    shares = [c.error / c.allowed for c in checks if c.allowed]
    return {
        "passed": all(c.passed for c in checks),
        "worst_share_of_allowed": max((s for s in shares if math.isfinite(s)), default=0.0),
        "failed": [c.case for c in checks if not c.passed],
        "checks": [vars(c) for c in checks],
    }
