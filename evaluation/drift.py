"""Drift: whether a bundle's predictor still fits the text that it serves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shadowllm.errors import UserError
from shadowllm.evaluation.validation import selection_masks
from shadowllm.models.sparsity import UNITS, ActiveCounts, Budget, Unit, layer_units
from shadowllm.predictor.topk import active_mask
from shadowllm.predictor.traces import Tracer, scored_positions
from shadowllm.progress import Advance, no_progress
from shadowllm.runtime.ort.session import OrtSession


@dataclass(frozen=True)
class Recall:
    """The share of the truly important units that were active in a session, over decoded tokens.

    The truly important units are those with the highest scores of the bundle's criterion in the dense model, as many
    as the budget keeps.

    Attributes:
        heads, neurons: the share over all layers and tokens.
        expected_heads, expected_neurons: the expected share of a random selection.
        tokens: number of decoded tokens that count.
    """

    heads: float
    neurons: float
    expected_heads: float
    expected_neurons: float
    tokens: int


def runtime_recall(
    session: OrtSession,
    weights: Mapping[str, Tensor],
    windows: Tensor,
    budget: Budget | None = None,
    advance: Advance = no_progress,
) -> Recall:
    """Decode texts with a session, and compare its selections with the oracle's.

    Args:
        session: an open session of the kind "sparse".
        weights: the bundle's canonical float32 tensors, as its sparse layers compute with them.
        windows: int64 ``(n, seqlen)``; each is a separate text. The first half is the prompt, the rest is
            decoded token by token, teacher-forced. The last token is not counted if the criterion does not score it.
        budget: fractions to keep; the bundle's default if None.
        advance: called with 1 after each decoded token, ``n * (seqlen // 2)`` times in total.

    Raises:
        UserError: no decoded token of a window is scored, or the selector is exact.
    """
    if session.manifest.predictor["kind"] == "relu":
        raise UserError("the selector relu is exact, so nothing can drift", "use the bundle as it is")
    manifest = session.manifest
    criterion = str(manifest.predictor.get("criterion", "l2norm"))
    seqlen = windows.shape[-1]
    scored = scored_positions(criterion, seqlen)
    counted = scored - (seqlen - seqlen // 2)  # tokens of a window that are decoded and scored
    if windows.ndim != 2 or counted < 1:
        raise UserError("nothing to decode", "give windows of more tokens; four are always enough")
    spec, budget = manifest.spec, budget or manifest.budget
    counts = budget.counts(manifest.sparse_layers)
    tracer = Tracer(spec, weights, criterion, manifest.dense_layers)
    hits = dict.fromkeys(UNITS, 0)
    session.set_budget(budget)
    for window in windows:
        important = _important(tracer, window, counts)
        for token, chosen in _decoded(session, window.tolist(), advance):
            for unit in UNITS if token < scored else ():
                hits[unit] += int((chosen[unit] & important[unit][token]).sum())
    tokens = len(windows) * counted
    widths = layer_units(spec)
    shares = {unit: hits[unit] / (tokens * int(counts[unit].sum())) for unit in UNITS}
    # In each layer, a random selection of count units has the share count / width of any other set.
    chance = {unit: float((counts[unit] ** 2).sum() / widths[unit] / counts[unit].sum()) for unit in UNITS}
    return Recall(shares["heads"], shares["neurons"], chance["heads"], chance["neurons"], tokens)


def _decoded(session: OrtSession, tokens: list[int], advance: Advance) -> Iterator[tuple[int, Mapping[Unit, Tensor]]]:
    """Yield the position and the selection of every decoded token of a text."""
    start = len(tokens) - len(tokens) // 2
    session.reset()
    session.prefill([tokens[:start]])
    for token in range(start, len(tokens)):
        session.decode(np.array([tokens[token]], dtype=np.int64))
        advance(1)
        masks = selection_masks(session.selection, session.spec)
        yield token, {unit: mask[:, 0] for unit, mask in masks.items()}


def _important(tracer: Tracer, window: Tensor, counts: ActiveCounts) -> dict[Unit, Tensor]:
    """Return masks ``(seqlen, n_sparse, n_units)`` of the most important units in the dense model."""
    traced = tracer.trace(window[None])
    found: dict[Unit, Tensor] = {}
    for unit in UNITS:
        layers = traced.importance(unit).unbind(dim=1)
        found[unit] = torch.stack(
            [
                active_mask(tracer.spec, unit, scores, int(count))
                for scores, count in zip(layers, counts[unit], strict=True)
            ],
            dim=1,
        )
    return found
