"""Measures how well each importance criterion ranks units by the real cost of their removal.

    python -m shadowllm.benchmarks.criteria "$(python benchmarks/model_path.py)" --json criteria.json

The cost is measured, not approximated: a head or neuron is zeroed at one token of one layer, and the
loss of the window is computed again. The result is Spearman's rank correlation with ``|change of the loss|``
over the units of that layer and token, averaged over random places.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shadowllm.benchmarks.script_parser import add_json, script, script_parser
from shadowllm.evaluation.default_text import passage
from shadowllm.evaluation.speed.environment import environment
from shadowllm.models.decoder import Decoder
from shadowllm.models.registry import load_model
from shadowllm.models.sparsity import UNITS, Unit
from shadowllm.models.spec import ModelSpec
from shadowllm.predictor.criteria import CRITERIA
from shadowllm.predictor.traces import Tracer
from shadowllm.progress import Advance, no_progress, progress

BATCH = 32  # removals per forward pass
Place = tuple[int, int]  # layer, token


@torch.no_grad()
def removal_losses(
    spec: ModelSpec, weights: Mapping[str, Tensor], window: Tensor, place: Place, unit: Unit, units: Tensor
) -> Tensor:
    """Change of the summed next-token cross entropy when one unit is zeroed at one token, float64 ``(len(units),)``.

    Args:
        window: int64 ``(seqlen,)``.
        units: int64, the units to remove, one at a time.
    """
    layer, token = place

    def loss(removed: Tensor) -> Tensor:
        def activation_hook(at: int, kind: Unit, activation: Tensor) -> Tensor:
            if (at, kind) == (layer, unit):
                activation = activation.clone()
                activation[torch.arange(len(removed)), token, removed] = 0
            return activation

        windows = window.expand(max(1, len(removed)), -1)
        logits = Decoder(spec, weights, activation_hook if len(removed) else None)(windows)
        found = F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), windows[:, 1:].flatten(), reduction="none")
        return found.unflatten(0, (len(windows), -1)).sum(dim=1)

    return torch.cat([loss(part) for part in units.split(BATCH)]) - loss(units[:0])


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation; ties share their mean rank, and the correlation with a constant is 0."""
    first, second = (_ranks(x) for x in (a, b))
    if first.std() == 0 or second.std() == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def agreement(
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    window: Tensor,
    places: Sequence[Place],
    most_units: int = 256,
    seed: int = 0,
    advance: Advance = no_progress,
) -> dict[str, dict[str, float]]:
    """Mean Spearman correlation by criterion and unit.

    Args:
        window: int64 ``(seqlen,)``.
        places: where units are removed.
        most_units: largest number of units per layer; a random sample if it has more.
        advance: called with 1 after each place and kind of unit.
    """
    generator = torch.Generator().manual_seed(seed)
    traced = {name: Tracer(spec, weights, name, 1).trace(window[None]) for name in sorted(CRITERIA)}
    found: dict[str, dict[str, list[float]]] = {name: {unit: [] for unit in UNITS} for name in traced}
    for layer, token in places:
        for unit in UNITS:
            size = spec.n_heads if unit == "heads" else spec.intermediate_size
            units = torch.randperm(size, generator=generator)[:most_units]
            truth = removal_losses(spec, weights, window, (layer, token), unit, units).abs().numpy()
            for name, trace in traced.items():
                scores = getattr(trace, unit)[token, layer - 1, units]
                found[name][unit].append(spearman(scores.double().numpy(), truth))
            advance(1)
    return {name: {unit: float(np.mean(values)) for unit, values in by.items()} for name, by in found.items()}


def draw_places(spec: ModelSpec, seqlen: int, n: int, seed: int = 0) -> list[Place]:
    """Random sparse layers and tokens; never the last token, because no loss follows it."""
    draw = np.random.default_rng(seed)
    return [(int(draw.integers(1, spec.n_layers)), int(draw.integers(0, seqlen - 1))) for _ in range(n)]


def _ranks(x: np.ndarray) -> np.ndarray:
    ordered = np.sort(x)
    return (np.searchsorted(ordered, x, "left") + np.searchsorted(ordered, x, "right") - 1) / 2


@script
def main() -> None:
    """Command line."""
    parser = script_parser("criteria", __doc__)
    parser.add_argument("model", help="folder with safetensors, or .gguf file")
    parser.add_argument("--places", type=int, default=24, help="layers and tokens to remove units at (default: 24)")
    parser.add_argument("--seqlen", type=int, default=64)
    parser.add_argument("--units", type=int, default=128, help="neurons to remove at each place (default: 128)")
    add_json(parser)
    args = parser.parse_args()
    spec, weights, checkpoint = load_model(args.model)
    tokenizer = checkpoint.tokenizer()
    text = passage(lambda part: list(tokenizer(part, add_special_tokens=False).input_ids), args.seqlen)
    places = draw_places(spec, args.seqlen, args.places)
    with progress("Removing units", len(places) * len(UNITS)) as advance:
        found = agreement(spec, weights.load(), torch.tensor(text), places, args.units, advance=advance)
    for name, by in sorted(found.items(), key=lambda item: -item[1]["neurons"]):
        print(f"{name:10} heads {by['heads']:6.3f}   neurons {by['neurons']:6.3f}")
    if args.json:
        settings: dict[str, Any] = {"places": args.places, "seqlen": args.seqlen, "units": args.units}
        record = {"environment": environment(None), "settings": settings, "spearman": found}
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
