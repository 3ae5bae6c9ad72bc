"""Choice of a bundle's budgets for a target perplexity or a target speedup."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np

from shadowllm.bundle.manifest import Manifest, read_manifest
from shadowllm.bundle.sparse_pays import dense_reasons
from shadowllm.bundle.weights import read_weights
from shadowllm.config import Target
from shadowllm.errors import UserError
from shadowllm.evaluation import mixed_allocation as mixed
from shadowllm.evaluation.allocation import STEPS, Allocation, Loss, bisect, measure, passes
from shadowllm.malloc import return_freed_memory
from shadowllm.models.sparsity import Budget
from shadowllm.predictor.calibration import measuring_windows
from shadowllm.predictor.selectors import Context, make_selector
from shadowllm.progress import Advance, progress
from shadowllm.runtime.generation.text import load_tokenizer, plain_encoder
from shadowllm.runtime.ort.loaded_bundle import rounds_products
from shadowllm.runtime.ort.session import OrtSession

WHOLE = "leaving out units here costs more perplexity per byte than elsewhere"
PROMPT, DECODED, ROUNDS = 64, 16, 6
# A thread pool spins for a while after its last task, and the other session needs its cores.
SETTLE_SECONDS = 0.05


def tune(
    bundle: Path,
    target: Target,
    *,
    texts: Sequence[str] = (),
    tokens: int = 2048,
    seqlen: int = 128,
    threads: int | None = None,
) -> Manifest:
    """Find budgets that meet a target, and make them the bundle's defaults.

    If the rest comes from the low-bit copy by default, the bundle gets one fraction of heads, one of neurons and a
    shortlist, see `mixed_allocation`. Other bundles get fractions per layer, see `allocation`. The default's other
    fields stay.

    Args:
        texts: text on which losses are measured: files or dataset ids; empty for the built-in text. What the predictor
            was calibrated on is left out, see `measuring_windows`.
        tokens: number of tokens of it.
        seqlen: tokens of a window.
        threads: threads of the sessions with which a speedup is measured.

    Returns:
        The new manifest. Its ``allocation`` records the target and the measured values.

    Raises:
        UserError: no bundle, a text that cannot be used, a speedup that no budget reaches, or a bundle with the
            selector relu.
    """
    manifest = read_manifest(bundle)
    if manifest.predictor["kind"] == "relu":
        raise UserError("there is no budget to tune: the selector relu is exact", "run the bundle as it is")
    read, tokenizer = read_weights(bundle, manifest), load_tokenizer(bundle, manifest)
    windows = measuring_windows(
        manifest.spec,
        read.sparse,
        plain_encoder(tokenizer, manifest),
        manifest.predictor,
        texts=texts,
        tokens=tokens,
        seqlen=min(seqlen, manifest.spec.max_seqlen),
    )
    return_freed_memory()
    mixes = manifest.budget.rest_with(manifest.rest == "shadow") == "shadow"
    copies = read.copies if mixes else None
    context = Context(manifest.spec, read.sparse, manifest.dense_layers, read.predictor, copies=copies)
    loss = Loss(context, make_selector(read.predictor.kind, context), windows)
    budget, measured = (_choose_mixed if mixes else _choose_per_layer)(bundle, manifest, target, loss, threads)
    measured["ppl_increase"] = math.expm1(loss.increase(budget))
    budget = _as_default(manifest, budget)
    tuned = replace(
        manifest,
        budgets=asdict(budget),
        allocation={
            "target": {name: value for name, value in vars(target).items() if value is not None},
            "measured": measured,
            "tokens": windows.numel(),
        },
        dense=dense_reasons(manifest, budget) if mixes else dense_reasons(manifest, budget, WHOLE),
    )
    tuned.write(bundle)
    return tuned


def _as_default(manifest: Manifest, budget: Budget) -> Budget:
    """Return the bundle's default budget with the heads, neurons and shortlist of another one."""
    return replace(manifest.budget, heads=budget.heads, neurons=budget.neurons, shortlist=budget.shortlist)


Ask = Callable[[Budget], bool]
Chosen = tuple[Budget, dict[str, float]]  # a budget, and what was measured of it


def _choose_mixed(bundle: Path, manifest: Manifest, target: Target, loss: Loss, threads: int | None) -> Chosen:
    checks = mixed.CHECKS if target.ppl_increase is not None else STEPS
    with progress("Choosing budgets", mixed.PASSES + checks) as advance:
        steps = mixed.measure(
            manifest.sparse_layers, mixed.row_itemsizes(manifest, rounds_products(manifest)), loss, advance
        )
        if target.ppl_increase is not None:
            limit = math.log1p(target.ppl_increase)
            return mixed.least_within(steps, limit, partial(loss.increase, limit=limit), advance), {}
        return _as_fast(bundle, target, threads, lambda too_slow: mixed.densest(steps, too_slow, STEPS, advance))


def _choose_per_layer(bundle: Path, manifest: Manifest, target: Target, loss: Loss, threads: int | None) -> Chosen:
    with progress("Choosing budgets", passes(manifest.sparse_layers.count) + STEPS) as advance:
        allocation = measure(loss.context, loss, advance)
        if target.ppl_increase is not None:
            return _within(target.ppl_increase, loss, allocation, advance), {}

        def search(too_slow: Ask) -> Budget | None:
            def ask(budget: Budget) -> bool:
                advance(1)
                return too_slow(budget)

            return bisect(allocation, ask)[1]

        return _as_fast(bundle, target, threads, search)


def _within(increase: float, loss: Loss, allocation: Allocation, advance: Advance) -> Budget:
    limit = math.log1p(increase)

    def bearable(budget: Budget) -> bool:
        advance(1)
        return loss.increase(budget, limit) <= limit

    return bisect(allocation, bearable)[0] or Budget()


def _as_fast(bundle: Path, target: Target, threads: int | None, search: Callable[[Ask], Budget | None]) -> Chosen:
    """Find the densest budget that is fast enough.

    Args:
        search: finds it by asking whether budgets are too slow.
    """
    wanted, speeds = target.speedup, dict[Budget, float]()
    assert wanted is not None
    with Race(bundle, threads) as race:

        def too_slow(budget: Budget) -> bool:
            speeds[budget] = race.speedup(budget)
            return speeds[budget] < wanted

        found = search(too_slow)
    if found is None:
        best = max(speeds.values(), default=1)
        raise UserError(
            f"a speedup of {wanted:g} is out of reach: the sparsest budget tried gave {best:.2f}", "ask for less"
        )
    return found, {"speedup": speeds[found]}


class Race:
    """Times the sparse and the dense decode steps of a bundle in turns."""

    def __init__(self, bundle: Path, threads: int | None = None) -> None:
        self._sessions = [OrtSession(bundle, kind, threads=threads) for kind in ("sparse", "dense")]

    def __enter__(self) -> Self:
        for session in self._sessions:
            session.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        for session in self._sessions:
            session.__exit__(*error)

    def speedup(self, budget: Budget) -> float:
        """Return the median over rounds of dense time divided by sparse time.

        Args:
            budget: its heads, neurons and shortlist; all else is as in the bundle's default.
        """
        spec = self._sessions[0].spec
        room = spec.max_seqlen // (1 + ROUNDS) - 1
        prompt = np.random.default_rng(0).integers(0, spec.vocab_size, min(PROMPT, room)).tolist()
        self._sessions[0].set_budget(_as_default(self._sessions[0].manifest, budget))
        for session in self._sessions:
            session.reset()
            session.prefill([prompt])
        rounds = [[_seconds(session, min(DECODED, room)) for session in self._sessions] for _ in range(ROUNDS)]
        return float(np.median([dense / sparse for sparse, dense in rounds[1:]]))  # the first warms up


def _seconds(session: OrtSession, steps: int) -> float:
    token = np.zeros(1, dtype=np.int64)
    time.sleep(SETTLE_SECONDS)
    start = time.perf_counter()
    for _ in range(steps):
        session.decode(token)
    return time.perf_counter() - start
