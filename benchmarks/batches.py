"""Measures the time of a step over 1, 2, 4 and 8 sequences in slots: at a budget, and dense with packed weights.

    python -m shadowllm.benchmarks.batches out/frontier/float32 --neurons 0.1 --shortlist 1024 --json batches.json

The sequences have different prompts, and continue greedily. Each contender has its own process, and they take turns:
in each run, one decodes some steps after the other, as a server does, while the other one waits.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from shadowllm.benchmarks.script_parser import add_json, script, script_parser
from shadowllm.bundle.manifest import read_manifest
from shadowllm.child import Child, Progress, module_command, serve
from shadowllm.evaluation.default_text import passage
from shadowllm.evaluation.speed.environment import environment
from shadowllm.evaluation.speed.harness import SETTLE_SECONDS
from shadowllm.models.sparsity import Budget
from shadowllm.runtime.generation.text import load_tokenizer, plain_encoder
from shadowllm.runtime.ort.slots import OrtSlots
from shadowllm.threads import share_threads

SIZES = (1, 2, 4, 8)
WARM_UP = 4
WORKER = "shadowllm.benchmarks.batches"


def decode(session: OrtSlots, budget: Budget, prompts: Sequence[Sequence[int]], steps: int) -> float:
    """Continue prompts together; return the median seconds of a step after `WARM_UP` steps."""
    tokens, taken = {}, []
    for prompt in prompts:
        slot = session.join(budget)
        tokens[slot] = int(session.extend(slot, prompt).argmax())
    for _ in range(WARM_UP + steps):
        start = time.perf_counter()
        logits = session.step(tokens)
        taken.append(time.perf_counter() - start)
        tokens = {slot: int(found.argmax()) for slot, found in logits.items()}
    for slot in tokens:
        session.leave(slot)
    return float(np.median(taken[WARM_UP:]))


def work(bundle: Path, threads: int, prepack: bool) -> None:
    """Answer requests in a worker process; see `decode`."""
    share_threads()
    with OrtSlots(bundle, max(SIZES), threads, prepack=prepack) as session:

        def answer(request: Mapping[str, Any], _: Progress) -> float:
            return 1e3 * decode(session, Budget(**request["budget"]), request["prompts"], request["steps"])

        serve(answer)


def measure(
    bundle: Path, budget: Budget, steps: int, threads: int, prompt_len: int = 64, runs: int = 5
) -> list[dict[str, Any]]:
    """Return a row for each number of sequences: milliseconds of a step, of each run and their median."""
    manifest, contenders = read_manifest(bundle), {"sparse": vars(budget), "dense": {}}
    ids = passage(plain_encoder(load_tokenizer(bundle, manifest), manifest), max(SIZES) * prompt_len)
    prompts = [ids[start : start + prompt_len] for start in range(0, len(ids), prompt_len)]
    rows = []
    with ExitStack() as running:
        workers = {
            name: running.enter_context(
                Child(module_command(WORKER, "--worker", name, str(bundle), "--threads", str(threads)), name, grace=0)
            )
            for name in contenders
        }
        for size in SIZES:
            taken: dict[str, list[float]] = {name: [] for name in contenders}
            for run in range(runs):
                for name in list(contenders)[:: 1 if run % 2 else -1]:  # they take turns at going first
                    time.sleep(SETTLE_SECONDS)
                    request = {"budget": contenders[name], "prompts": prompts[:size], "steps": steps}
                    taken[name].append(workers[name].ask(request))
            medians = {f"{name}_ms": float(np.median(found)) for name, found in taken.items()}
            rows.append({"sequences": size, **medians, **{f"{name}_runs_ms": found for name, found in taken.items()}})
    return rows


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table of medians, with the tokens per second against one sequence and against dense."""
    first = {name: rows[0][f"{name}_ms"] for name in ("sparse", "dense")}
    for row in rows:
        size, parts = row["sequences"], []
        for name in first:
            median = row[f"{name}_ms"]
            parts.append(f"{name} {median:7.2f} ms, {size * first[name] / median:.2f}x tokens per second")
        ratios = np.array(row["dense_runs_ms"]) / np.array(row["sparse_runs_ms"])
        speedup = f"{np.median(ratios):.2f}x ({ratios.min():.2f} to {ratios.max():.2f}) of dense"
        print(f"{size} sequences: {'; '.join(parts)}; {speedup}")


@script
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = script_parser("batches", __doc__)
    parser.add_argument("bundle", type=Path, help="a bundle of floats or 8-bit integers")
    parser.add_argument("--neurons", type=float, default=0.1)
    parser.add_argument("--heads", type=float, default=1.0)
    parser.add_argument("--shortlist", type=int)
    parser.add_argument("--steps", type=int, default=40, help="steps of each run")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    add_json(parser)
    parser.add_argument("--worker", choices=("sparse", "dense"), help="used by the script itself: one contender")
    args = parser.parse_args(arguments)
    if args.worker:
        work(args.bundle, args.threads, prepack=args.worker == "dense")
        return
    budget = Budget(neurons=args.neurons, heads=args.heads, shortlist=args.shortlist)
    rows = measure(args.bundle, budget, args.steps, args.threads, runs=args.runs)
    print_rows(rows)
    if args.json:
        record = {"environment": environment(args.threads), "budget": vars(budget), "results": rows}
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
