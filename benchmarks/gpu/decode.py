"""Measures end-to-end decoding: a random model of a known shape, sparse and dense, on one copy of the weights."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from shadowllm.benchmarks.gpu.timing import milliseconds
from shadowllm.benchmarks.random_model import RandomCopies, RandomWeights, shape_spec, untrained
from shadowllm.bundle.cost_model import Itemsizes, mean_traffic, selector_bytes
from shadowllm.bundle.predictor_file import Predictor
from shadowllm.models.activations import RELU_LIKE
from shadowllm.models.decoder import Decoder
from shadowllm.models.sparsity import Budget, SparseLayers
from shadowllm.models.spec import ModelSpec
from shadowllm.runtime.generation.generate import generate
from shadowllm.runtime.gpu.device_weights import merged
from shadowllm.runtime.gpu.triton_session import TritonSession
from shadowllm.runtime.session import Session

SPARSE, QUANTISED, DENSE = "triton", "triton, quantized shadow", "torch dense"


@dataclass(frozen=True)
class Setting:
    """Settings of a comparison; the defaults are those of the paper's table.

    Attributes:
        runs: measured generations of each contender, after one warm-up.
        rank: rank of the predictor; None for the default.
    """

    prompt_len: int = 128
    new_tokens: int = 128
    runs: int = 5
    budget: Budget = field(default_factory=lambda: Budget(heads=0.5, neurons=0.5))
    dtype: torch.dtype = torch.float16
    rank: int | None = None


QUICK = Setting(128, 32, 2)
TINY = Setting(4, 4, 1, rank=2)


def measure_shape(shape: str, device: torch.device, setting: Setting) -> dict[str, Any]:
    """Compare the Triton session at a budget, with a shadow or a quantised shadow, with the same session dense.

    Returns:
        JSON types. For each contender: milliseconds per token and to the first token, GB/s, memory, the ``speedup``
        over dense, and the speedup ``allowed`` by the bytes. Also the share of a sparse step that the shadow and its
        selection take, and the error of logits with everything active, relative to dense.
    """
    spec = shape_spec(shape)
    torch.manual_seed(0)
    weights = merged(spec, RandomWeights(spec, setting.dtype, device), device)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in weights.values()}
    held = sum(storage.nbytes() for storage in storages.values())
    shadow, quantised = untrained("shadow", spec, "", rank=setting.rank), untrained("quantized-shadow", spec, "")
    choosers = {SPARSE: shadow, QUANTISED: quantised, DENSE: None}
    copies = RandomCopies(SparseLayers(spec, quantised.dense_layers), device)
    end = setting.prompt_len + setting.new_tokens
    block = -(-end // 256) * 256
    with ExitStack() as stack:
        sessions: dict[str, TritonSession] = {}
        memory: dict[str, float | None] = {}
        for name, chooser in choosers.items():
            before = _allocated(device)
            made = TritonSession(spec, weights, chooser, setting.budget, cache_block=block, copies=copies)
            session = stack.enter_context(made)
            sessions[name] = session
            _generate(session, setting)  # warm-up, so that lazy allocations are done
            after = _allocated(device)
            memory[name] = None if after is None or before is None else (held + after - before) / 1e6
        errors = {name: _all_active_error(sessions[name], sessions[DENSE], setting) for name in (SPARSE, QUANTISED)}
        taken = interleaved(sessions, setting)
        chosen = _selection_ms(sessions[SPARSE])
    fired = fired_share(spec, weights, device)
    report = _report(shape, spec, choosers, setting, taken, memory, chosen, fired)
    return report | {"all_active_error": max(errors.values()), "fired_share": fired}


@torch.no_grad()
def fired_share(spec: ModelSpec, weights: Mapping[str, torch.Tensor], device: torch.device, tokens: int = 16) -> float:
    """The share of neurons that are not zero, for random tokens; 1 unless the activation is like ReLU.

    The down projection of a sparse step reads no rows of neurons that are zero.
    """
    if spec.activation not in RELU_LIKE:
        return 1.0
    shares: list[float] = []

    def note(_layer: int, unit: str, activation: torch.Tensor) -> torch.Tensor:
        if unit == "neurons":
            shares.append(float((activation != 0).float().mean()))
        return activation

    decoder = Decoder(spec, weights, note)
    decoder.rotary = {rope: tuple(table.to(device) for table in tables) for rope, tables in decoder.rotary.items()}
    ids = torch.randint(3, spec.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    decoder(ids, torch.arange(tokens, device=device)[None])
    return float(np.mean(shares))


def interleaved(sessions: Mapping[str, Session], setting: Setting) -> dict[str, list[tuple[float, float]]]:
    """Times of every contender, which take turns: milliseconds to the first token, and per token after it."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sessions}
    names = list(sessions)
    for run in range(setting.runs):
        first = run % len(names)
        for name in names[first:] + names[:first]:
            taken[name].append(_generate(sessions[name], setting))
    return taken


def _generate(session: Session, setting: Setting) -> tuple[float, float]:
    prompt = np.random.default_rng(0).integers(3, session.spec.vocab_size, setting.prompt_len).tolist()
    start = time.perf_counter()
    tokens = generate(session, [prompt], setting.new_tokens)
    next(tokens)
    first = time.perf_counter()
    count = sum(1 for _ in tokens)
    return 1e3 * (first - start), 1e3 * (time.perf_counter() - first) / count


def _all_active_error(sparse: TritonSession, dense: TritonSession, setting: Setting) -> float:
    """Largest difference of logits divided by the largest logit, one decode step after the prompt."""
    prompt, token = [5] * setting.prompt_len, np.array([7])
    found = []
    sparse.set_budget(Budget())
    for session in (sparse, dense):
        session.reset()
        session.prefill([prompt])
        found.append(session.decode(token).copy())
    sparse.set_budget(setting.budget)
    return float(np.abs(found[0] - found[1]).max() / np.abs(found[1]).max())


def _selection_ms(session: TritonSession) -> dict[str, float] | None:
    hidden = torch.randn((1, 1, session.spec.hidden_size), device=session.device).to(session.dtype)
    return milliseconds(lambda: session.select(hidden), session.device)


def _allocated(device: torch.device) -> int | None:
    if device.type == "cpu":
        return None
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device)


def _report(
    shape: str,
    spec: ModelSpec,
    choosers: Mapping[str, Predictor | None],
    setting: Setting,
    taken: Mapping[str, Sequence[tuple[float, float]]],
    memory: Mapping[str, float | None],
    chosen: dict[str, float] | None,
    fired: float,
) -> dict[str, Any]:
    timed = chosen is not None
    read = {name: _bytes(spec, chooser, setting, fired) for name, chooser in choosers.items()}
    contenders = {
        name: {
            "bytes_per_token": read[name],
            "memory_mb": memory[name],
            "ttft_ms": spread([first for first, _ in times]) if timed else None,
            "ms_per_token": spread([each for _, each in times]) if timed else None,
            "gb_per_s": read[name] / spread([each for _, each in times])["median"] / 1e6 if timed else None,
            "speedup": spread([slow / fast for (_, slow), (_, fast) in zip(taken[DENSE], times, strict=True)])
            if timed
            else None,
            "allowed": read[DENSE] / read[name],
        }
        for name, times in taken.items()
    }
    shadow = choosers[SPARSE]
    step = float(np.median([each for _, each in taken[SPARSE]]))
    return {
        "shape": shape,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "prompt_len": setting.prompt_len,
        "new_tokens": setting.new_tokens,
        "runs": setting.runs,
        "budget": vars(setting.budget),
        "predictor_rank": shadow.rank if shadow else 0,
        "contenders": contenders,
        "selection_ms": chosen,
        "selection_share": chosen["median"] / step if chosen else None,
    }


def _bytes(spec: ModelSpec, chooser: Predictor | None, setting: Setting, fired: float) -> int:
    """Bytes read per token by a sparse step or, without a predictor, by a dense one.

    Args:
        fired: share of the active neurons whose rows of down a sparse step reads.
    """
    itemsize, active, choosing = setting.dtype.itemsize, None, 0.0
    if chooser is not None:
        layers = SparseLayers(spec, chooser.dense_layers)
        active = setting.budget.counts(layers)
        choosing = selector_bytes(chooser.kind, layers, itemsize, chooser.rank, active=active)
    total = mean_traffic(
        spec, Itemsizes.of(itemsize), setting.prompt_len, setting.new_tokens, active, choosing=choosing
    ).total
    skipped = 0 if active is None else (1 - fired) * float(active["neurons"].sum()) * spec.hidden_size * itemsize
    return round(total - skipped)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, min and max."""
    return {"median": float(np.median(values)), "min": min(values), "max": max(values)}
