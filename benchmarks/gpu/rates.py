"""Measures the share of the card's copy bandwidth that the kernels reach, for the bytes that they must read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shadowllm.benchmarks.gpu.timing import milliseconds
from shadowllm.bundle.quantisation import LOW_BIT_COPY, dequantise
from shadowllm.plugins.ops.score_neurons.launcher import score_neurons
from shadowllm.plugins.ops.select_topk.launcher import select_topk
from shadowllm.plugins.ops.shortlist_logits.launcher import shortlist_logits
from shadowllm.plugins.ops.sparse_attention.launcher import sparse_attention
from shadowllm.plugins.ops.sparse_mlp.launcher import sparse_mlp

# A work set is enough copies of an op's data to fill this size, used in turn; far larger than any last-level cache.
WORK_SET_BYTES = 1 << 30


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measured layer.

    Attributes:
        context: tokens in the KV cache when attention is measured.
    """

    hidden: int = 4096
    neurons: int = 16384
    heads: int = 32
    head_dim: int = 128
    capacity: int = 2048
    context: int = 2048
    sparse_layers: int = 31
    work_set: int = WORK_SET_BYTES
    vocab: int = 50272
    shortlist: int = 1024


OPT_67B = Sizes()
TINY = Sizes(48, 88, 4, 12, 40, 33, 2, 1, 97, 9)


def copy_bandwidth(device: torch.device, size: int = WORK_SET_BYTES) -> float | None:
    """GB/s (1e9) at which the card copies a buffer; counts bytes read and bytes written."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    taken = milliseconds(lambda: target.copy_(source), device)
    return None if taken is None else 2 * size / taken["median"] / 1e6


def measure_rates(device: torch.device, sizes: Sizes = OPT_67B) -> dict[str, Any]:
    """Measure every op at one token and half of its units, and PyTorch's dense MLP with the same matrices.

    Returns:
        JSON types: ``copy_gb_per_s``; per op and type its milliseconds, bytes, GB/s and ``share`` of the
        copy bandwidth (only milliseconds for ``SelectTopK``). Times are None on a CPU.
    """
    copy = copy_bandwidth(device, sizes.work_set)
    found: dict[str, Any] = {"sizes": vars(sizes), "copy_gb_per_s": copy}
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for op, (data, call) in _ops(device, dtype, sizes).items():
            found[f"{op} {name}"] = _rate(data, call, device, sizes.work_set, copy)
    selected = _selection_work(device, sizes)
    found["SelectTopK"] = {"milliseconds": milliseconds(selected, device), "rows": [sizes.sparse_layers, sizes.neurons]}
    return found


# A function that makes one set of an op's weights and caches, and the bytes that a call with such a set reads. A sparse
# op reads fewer than the set has: it skips half of the rows, and those of down whose hidden value ReLU sets to zero.
Data = tuple[Callable[[], tuple[Tensor, ...]], Callable[..., int]]


Ops = dict[str, tuple[Data, Callable[..., Any]]]


def _ops(device: torch.device, dtype: torch.dtype, s: Sizes) -> Ops:
    """For each name, the data and the op on it."""
    width, item = s.heads * s.head_dim, dtype.itemsize
    make, x = partial(_random, device, dtype), _random(device, dtype, (1, 1, s.hidden))()[0]
    heads, neurons = (_spread(n, device) for n in (s.heads, s.neurons))
    one, many = (torch.tensor([n], dtype=torch.int32, device=device) for n in (1, s.context))

    def mlp(up: Tensor, down: Tensor) -> Tensor:
        return sparse_mlp(x, *neurons, None, None, up, None, down, None, activation="relu")[0]

    def attention(lengths: Tensor) -> Callable[..., Tensor]:
        return lambda key, value, q, o: sparse_attention(
            x, key, value, lengths, *heads, q, None, o, None, n_heads=s.heads
        )[0]

    def dense(up: Tensor, down: Tensor) -> Tensor:
        return F.relu(F.linear(x, up)) @ down

    def mlp_bytes(up: Tensor, _down: Tensor) -> int:
        active = up[neurons[0][: int(neurons[1])]]
        return (len(active) + fired(x, active)) * s.hidden * item

    matrices = ((s.neurons, s.hidden),) * 2
    cache = ((1, s.heads, s.capacity, s.head_dim),) * 2
    rows = ((width, s.hidden),) * 2
    row_bytes = width * s.hidden * item
    cache_bytes = s.context * width * item  # keys and values together, for half of the heads
    return {
        "SparseMLP": ((make(*matrices), mlp_bytes), mlp),
        "projections (SparseAttention over one token)": ((make(*cache, *rows), _always(row_bytes)), attention(one)),
        "SparseAttention over the context": ((make(*cache, *rows), _always(row_bytes + cache_bytes)), attention(many)),
        "PyTorch dense MLP": ((make(*matrices), _always(2 * s.neurons * s.hidden * item)), dense),
    } | _copy_ops(device, dtype, s)


def _copy_ops(device: torch.device, dtype: torch.dtype, s: Sizes) -> Ops:
    """The same for the ops that read a low-bit copy."""
    item, count = dtype.itemsize, _spread(s.neurons, device)[1]
    make, x = partial(_random, device, dtype), _random(device, dtype, (1, 1, s.hidden))()[0]
    rest, certify, shortlist = (torch.tensor(n, dtype=torch.int32, device=device) for n in (1, 0, s.shortlist))

    def packed(count: int = s.neurons) -> tuple[Tensor, ...]:
        """A low-bit copy of a matrix, with random integers, and a number for each row."""
        rows = (count, LOW_BIT_COPY.blocks(s.hidden))
        copy = torch.randint(256, (*rows, LOW_BIT_COPY.block // 2), dtype=torch.uint8, device=device)
        return copy, torch.rand(rows, device=device), torch.rand(count, device=device)

    def scores(copy: Tensor, scales: Tensor, down_norms: Tensor) -> Tensor:
        return score_neurons(x, copy, scales, None, None, down_norms, count, activation="relu")

    def with_rest(
        up: Tensor, down: Tensor, c_up: Tensor, cs_up: Tensor, down_norms: Tensor, c_down: Tensor, cs_down: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        of_copy: dict[str, Any] = {"c_up": c_up, "c_down": c_down, "cs_up": cs_up, "cs_down": cs_down}
        of_copy |= {"rest": rest, "down_norms": down_norms}
        return sparse_mlp(x, None, count, None, None, up, None, down, None, **of_copy, activation="relu")

    def logits(table: Tensor, copy: Tensor, scales: Tensor, errors: Tensor) -> Tensor:
        return shortlist_logits(x[0], table, copy, scales, errors, shortlist, certify)[0]

    matrices, copy_bytes = ((s.neurons, s.hidden),) * 2, sum(t.nbytes for t in packed())

    def mlp_bytes(up: Tensor, down: Tensor, c_up: Tensor, cs_up: Tensor, *others: Tensor) -> int:
        """Up of the active half, the copy of up, and rows of down or of its copy where a hidden value is not zero."""
        _, chosen = with_rest(up, down, c_up, cs_up, *others)
        assert chosen is not None
        active = chosen[chosen >= 0]
        data, scales = (tensor.cpu().numpy() for tensor in (c_up.flatten(1), cs_up))
        low = torch.from_numpy(dequantise(data, scales, s.hidden, LOW_BIT_COPY)).to(up)
        low[active] = 0
        row = c_up[0].nbytes + cs_up[0].nbytes
        return (len(active) + fired(x, up[active])) * s.hidden * item + copy_bytes + fired(x, low) * row

    table_bytes = copy_bytes * s.vocab // s.neurons + s.shortlist * s.hidden * item
    return {
        "ScoreNeurons": ((packed, _always(copy_bytes)), scores),
        "SparseMLP with a rest": ((lambda: (*make(*matrices)(), *packed(), *packed()[:2]), mlp_bytes), with_rest),
        "ShortlistLogits": ((lambda: (*make((s.vocab, s.hidden))(), *packed(s.vocab)), _always(table_bytes)), logits),
    }


def fired(x: Tensor, rows: Tensor) -> int:
    """How many rows of a weight have a product with ``x`` above zero."""
    return int((rows @ x.flatten() > 0).sum())


def _always(size: int) -> Callable[..., int]:
    return lambda *_tensors: size


def _random(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: tuple(torch.randn(shape, dtype=dtype, device=device) * 0.02 for shape in shapes)


def _rate(
    data: Data, call: Callable[..., Any], device: torch.device, work_set: int, copy: float | None
) -> dict[str, Any]:
    make, bytes_of = data
    first = make()
    copies = max(1, math.ceil(work_set / sum(t.nbytes for t in first)))
    sets = [first, *(make() for _ in range(copies - 1))]
    read = sum(bytes_of(*tensors) for tensors in sets) / copies

    def work() -> None:
        for tensors in sets:
            call(*tensors)

    taken = milliseconds(work, device)
    found: dict[str, Any] = {"bytes": read, "milliseconds": None, "gb_per_s": None, "share": None}
    if taken is not None and copy is not None:
        each = {name: value / copies for name, value in taken.items()}
        rate = read / each["median"] / 1e6
        found |= {"milliseconds": each, "gb_per_s": rate, "share": rate / copy}
    return found


def _selection_work(device: torch.device, s: Sizes) -> Callable[[], Any]:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn((s.sparse_layers, s.neurons), generator=generator).to(device)
    counts = torch.full((s.sparse_layers,), s.neurons // 2, dtype=torch.int32, device=device)
    return lambda: select_topk(scores, counts, s.neurons)


def _spread(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A random half of the units, ascending, and their number."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(width, generator=generator)[: width // 2].sort().values.to(torch.int32)
    padded = torch.cat([chosen, torch.full((width - len(chosen),), -1, dtype=torch.int32)])
    return padded.to(device), torch.tensor(len(chosen), dtype=torch.int32, device=device)
