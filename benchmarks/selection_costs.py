"""Measures what a step of mixed precision takes beyond its bytes: the constants of `bundle.cost_model`.

    python -m shadowllm.benchmarks.selection_costs out/frontier/int8 --json costs.json

Sessions decode with several budgets, each in its own process, and take turns. All of them are in memory at the same
time. The time of a step is then fitted by a rate of bytes outside the low-bit copy, another one for bytes of the copy,
a time for each layer in which heads are selected, one for each layer in which neurons are, and one for each picked row.
The result has the costs in bytes that are read in the same time. Set SHADOWLLM_NATIVE_ISA=avx2 to measure the kernels
of another instruction set.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shadowllm.benchmarks.script_parser import add_json, script, script_parser
from shadowllm.bundle import cost_model
from shadowllm.bundle.manifest import Manifest, read_manifest
from shadowllm.errors import UserError
from shadowllm.evaluation.default_text import passage
from shadowllm.evaluation.speed.environment import environment
from shadowllm.evaluation.speed.harness import Contender, race, summarise
from shadowllm.evaluation.speed.traffic import traffic_of
from shadowllm.evaluation.speed.worker_command import session_command
from shadowllm.models.sparsity import UNITS, Budget, layer_units
from shadowllm.progress import progress
from shadowllm.runtime.generation.text import load_tokenizer, plain_encoder

NEURONS = (0.03, 0.1, 0.3, 1.0)
SHORTLISTS = (None, 64, 4096)
HEADS = (0.34, 0.67)  # with all neurons
FITTED = {
    "copy_cost": cost_model.COPY_COST,
    "selection_cost of heads": cost_model.SELECTION_COST["heads"],
    "selection_cost of neurons": cost_model.SELECTION_COST["neurons"],
    "picked_row_cost": cost_model.PICKED_ROW_COST,
}


def budgets() -> list[Budget]:
    """Return the budgets that are measured: all pairs of neurons and a shortlist, and some with fewer heads."""
    pairs = [Budget(neurons=neurons, shortlist=rows) for neurons in NEURONS for rows in SHORTLISTS]
    return pairs + [Budget(heads=heads) for heads in HEADS]


def features(manifest: Manifest, budget: Budget, prompt_len: int, new_tokens: int) -> list[float]:
    """Return what the time is fitted by: bytes outside the copy and in it, selections by unit, and picked rows."""
    spec = manifest.spec
    traffic = traffic_of(manifest, "ort", budget, prompt_len, new_tokens)
    copied, widths = traffic.parts.get("low-bit copy", 0), layer_units(spec)
    if not copied:  # a dense step
        return [traffic.total, 0, 0, 0, 0]
    active = [dict(zip(UNITS, kept, strict=True)) for kept in budget.counts(manifest.sparse_layers).by_layer()]
    selections = [sum(kept[unit] < widths[unit] for kept in active) for unit in UNITS]
    picked = sum(kept["neurons"] for kept in active if kept["neurons"] < widths["neurons"])
    if budget.shortlist is not None and cost_model.shortens(spec, budget.shortlist):
        picked += budget.shortlist
    return [traffic.total - copied, copied, *selections, picked]


def fit(rows: Sequence[Sequence[float]], milliseconds: Sequence[float]) -> dict[str, float]:
    """Fit times by `features`; return the costs in bytes, the rate in GB/s, and the largest error in milliseconds.

    Raises:
        UserError: the steps do not differ enough.
    """
    table = np.array(rows, dtype=float)
    sizes = np.maximum(np.abs(table).max(axis=0), 1)
    if np.linalg.matrix_rank(table / sizes) < table.shape[1]:
        raise UserError("the budgets read too similar bytes to tell the costs apart", "use a larger model")
    found = np.linalg.lstsq(table / sizes, np.array(milliseconds), rcond=None)[0] / sizes
    costs = dict(zip(FITTED, found[1:] / found[0], strict=True))
    worst = np.abs(table @ found - milliseconds).max()
    return costs | {"gigabytes_per_second": 1e-6 / found[0], "largest_error_ms": worst}


def measure(bundle: Path, prompt_len: int, new_tokens: int, runs: int, threads: int) -> list[dict[str, Any]]:
    """Return for each budget: the budget, its `features`, and the median milliseconds per token."""
    manifest = read_manifest(bundle)
    if manifest.rest != "shadow":
        raise UserError(f"{bundle} has no low-bit copy of its weights", "export it with --rest shadow")
    wanted = {f"{budget.neurons:.0%}/{budget.heads:.0%}/{budget.shortlist}": budget for budget in budgets()}
    contenders = [Contender(name, session_command(bundle, "ort", budget, threads)) for name, budget in wanted.items()]
    prompt = passage(plain_encoder(load_tokenizer(bundle, manifest), manifest), prompt_len)
    with progress("Costs", len(contenders) * (1 + runs)) as advance:
        request = {"prompt": prompt, "new_tokens": new_tokens}
        taken, _ = race(contenders, request, runs=runs, warmup=1, tick=lambda _: advance(1))
    return [
        {
            "budget": vars(budget),
            "features": features(manifest, budget, prompt_len, new_tokens),
            "itl_ms": summarise(taken[name]).itl_ms["median"],
        }
        for name, budget in wanted.items()
    ]


def print_costs(costs: Mapping[str, float]) -> None:
    """Print the costs beside those of `bundle.cost_model`."""
    for name, own in FITTED.items():
        print(f"{name:25} {costs[name]:12,.2f}   in bundle/cost_model.py {own:12,.2f}")
    print(f"bytes outside the copy: {costs['gigabytes_per_second']:.1f} GB/s")
    print(f"largest error of a step: {costs['largest_error_ms']:.2f} ms")


@script
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = script_parser("selection_costs", __doc__)
    parser.add_argument("bundle", type=Path, help="a bundle with a low-bit copy of its weights")
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    add_json(parser)
    args = parser.parse_args(arguments)
    results = measure(args.bundle, args.prompt_len, args.new_tokens, args.runs, args.threads)
    costs = fit([row["features"] for row in results], [row["itl_ms"] for row in results])
    print_costs(costs)
    if args.json:
        record = {"environment": environment(args.threads), "costs": costs, "results": results}
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
