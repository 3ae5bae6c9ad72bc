"""Compares every kernel with its NumPy reference, and its error with PyTorch's error in the same type."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shadowllm.benchmarks.gpu.cases import CASES, AttentionCase, LogitsCase, MlpCase, Rest, ScoreCase, TopKCase
from shadowllm.bundle.certificate import copy_errors
from shadowllm.bundle.quantisation import LOW_BIT_COPY, dequantise, quantise, rounded
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
    inside = case.rest == "chosen"
    copies, numbers = _copies(case.rest, {"gate": gate, "up": up, "down": down})
    extra = copies | ({"down_norms": make(n).float().abs()} if inside else {})
    given = None if inside else indices
    found, chosen = launcher("SparseMLP")(x, given, count, *weights, **extra, activation=case.activation)
    indices = indices if chosen is None else chosen
    wanted, _ = reference("SparseMLP")(
        _wide(x), _host(indices), case.count, *map(_wide, weights), **numbers, activation=case.activation
    )
    rows = indices[: case.count].long()
    if case.rest != "none":
        up, down = (_mixed(w, rows) for w in (up, down))
        gate, rows = None if gate is None else _mixed(gate, rows), torch.arange(n, device=device)

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
    inside = case.rest == "chosen"
    copies, numbers = _copies(case.rest, {"q": w_q, "o": w_o})
    extra = copies | ({"score_weight": make(h, n).float(), "score_bias": make(h).float()} if inside else {})
    tensors = (x, key, value, lengths, None if inside else indices, count, w_q, b_q, w_o, b_o, cos, sin)
    found, chosen = launcher("SparseAttention")(*tensors, **extra, n_heads=h)
    indices = indices if chosen is None else chosen
    units = (_host(lengths), _host(indices), case.count)
    after = map(_wide, (w_q, b_q, w_o, b_o, cos, sin))
    wanted, _ = reference("SparseAttention")(_wide(x), _wide(key), _wide(value), *units, *after, **numbers, n_heads=h)
    if case.rest != "none":
        rows = (indices[: case.count, None] * d + torch.arange(d, device=device)).flatten().long()
        w_q, w_o = (_mixed(w, rows) for w in (w_q, w_o))
        indices, _ = _selection(h, h, device)
    active = replace(case, count=h) if case.rest != "none" else case
    own = _torch_attention(active, x, key, value, lengths, indices, w_q, b_q, w_o, b_o, cos, sin)
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


def check_logits(case: LogitsCase, dtype: torch.dtype, device: torch.device) -> Check:
    """``ShortlistLogits``. Rows whose logits in the copy nearly tie with the shortlist's last could differ."""
    make = _random(dtype, device)
    x, table = make(case.tokens, case.hidden), make(case.vocab, case.hidden, scale=case.hidden**-0.5)
    data, scales = quantise(_wide(table), LOW_BIT_COPY)
    copy = data.reshape(case.vocab, LOW_BIT_COPY.blocks(case.hidden), -1)
    errors = copy_errors(_wide(table), copy, scales)
    numbers = [torch.tensor(n, dtype=torch.int32, device=device) for n in (case.shortlist, int(case.certify))]
    packed = (torch.from_numpy(array).to(device) for array in (copy, scales, errors))
    found, _ = launcher("ShortlistLogits")(x, table, *packed, *numbers)
    wanted, _ = reference("ShortlistLogits")(
        _wide(x), _wide(table), copy, scales, errors, case.shortlist, int(case.certify)
    )
    low, exact = (F.linear(x, w).float() for w in (_mixed(table, torch.empty(0, dtype=torch.int64)), table))
    near = (exact - found).abs() <= (low - found).abs()  # the rows that were recomputed, as far as it matters
    return _judge(case, found, torch.where(near, exact, low), wanted)


def _copies(rest: Rest, matrices: Mapping[str, Tensor | None]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The inputs of a sparse op for a rest from low-bit copies, as tensors and for the reference."""
    copies: dict[str, Tensor] = {}
    if rest == "none":
        return copies, {}
    for part, matrix in matrices.items():
        if matrix is not None:
            data, scales = (torch.from_numpy(a).to(matrix.device) for a in quantise(_wide(matrix), LOW_BIT_COPY))
            copies |= {f"c_{part}": data.unflatten(1, (scales.shape[1], -1)), f"cs_{part}": scales}
    some = next(iter(copies.values()))
    numbers = {name: _host(tensor) for name, tensor in copies.items()}
    return {"rest": torch.tensor(1, dtype=torch.int32, device=some.device), **copies}, {"rest": 1, **numbers}


def _mixed(matrix: Tensor, rows: Tensor) -> Tensor:
    """The given rows of a matrix, and the other rows from its low-bit copy."""
    mixed = torch.from_numpy(rounded(_wide(matrix), LOW_BIT_COPY)).to(matrix)
    mixed[rows] = matrix[rows]
    return mixed


def check_topk(case: TopKCase, device: torch.device) -> Check:
    """``SelectTopK``: must be exact, with ties to the lower index. Counts differ between rows."""
    generator = torch.Generator().manual_seed(case.width)
    scores = torch.randint(case.levels, (case.rows, case.width), generator=generator).float() / case.levels - 0.5
    counts = torch.tensor([max(0, case.count - row) for row in range(case.rows)], dtype=torch.int32)
    found = launcher("SelectTopK")(scores.to(device), counts.to(device), case.width)
    wanted = reference("SelectTopK")(scores.numpy(), counts.numpy(), case.width)
    return Check(str(case), float((_host(found) != wanted).sum()), 0.0)


def _judge(
    case: MlpCase | ScoreCase | AttentionCase | LogitsCase, found: Tensor, own: Tensor, wanted: np.ndarray
) -> Check:
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
    LogitsCase: check_logits,
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
