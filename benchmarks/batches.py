"""Measures the time of a step over 1, 2, 4 and 8 sequences in slots: at a budget, and dense with packed weights.

    python -m shadowllm.benchmarks.batches out/frontier/float32 --neurons 0.1 --shortlist 1024 --json batches.json

The sequences have different prompts of random tokens, and continue greedily. Both sessions are in this process, and
their steps take turns. The threads of each sleep before the other one runs.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shadowllm.benchmarks.script_parser import script, script_parser
from shadowllm.evaluation.speed.environment import environment
from shadowllm.evaluation.speed.harness import SETTLE_SECONDS
from shadowllm.models.sparsity import Budget
from shadowllm.runtime.ort.slots import OrtSlots

SIZES = (1, 2, 4, 8)
WARM_UP = 4


class Batch:
    """Sequences in the slots of a session that decode together."""

    def __init__(self, session: OrtSlots, budget: Budget, size: int, prompt_len: int) -> None:
        self._session = session
        random = np.random.default_rng(0)
        prompts = random.integers(0, session.spec.vocab_size, (size, prompt_len)).tolist()
        self._tokens: dict[int, int] = {}
        for prompt in prompts:
            slot = session.join(budget)
            self._tokens[slot] = int(session.extend(slot, prompt).argmax())

    def step(self) -> float:
        """Decode one token of each sequence; return the seconds that the session took."""
        time.sleep(SETTLE_SECONDS)
        start = time.perf_counter()
        logits = self._session.step(self._tokens)
        seconds = time.perf_counter() - start
        self._tokens = {slot: int(found.argmax()) for slot, found in logits.items()}
        return seconds

    def close(self) -> None:
        """Leave the slots."""
        for slot in self._tokens:
            self._session.leave(slot)


def measure(
    bundle: Path, budget: Budget, steps: int, threads: int | None = None, prompt_len: int = 64
) -> list[dict[str, Any]]:
    """Return a row for each number of sequences: median milliseconds of a step, sparse and dense."""
    rows = []
    slots = max(SIZES)
    with OrtSlots(bundle, slots, threads) as sparse, OrtSlots(bundle, slots, threads, prepack=True) as dense:
        for size in SIZES:
            batches = {
                "sparse": Batch(sparse, budget, size, prompt_len),
                "dense": Batch(dense, Budget(), size, prompt_len),
            }
            taken: dict[str, list[float]] = {name: [] for name in batches}
            for _ in range(WARM_UP + steps):
                for name, batch in batches.items():
                    taken[name].append(batch.step())
            times = {f"{name}_ms": 1e3 * float(np.median(found[WARM_UP:])) for name, found in taken.items()}
            for batch in batches.values():
                batch.close()
            rows.append({"sequences": size, **times})
    return rows


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table, with the tokens per second against one sequence."""
    first = rows[0]
    for row in rows:
        size = row["sequences"]
        gains = {name: size * first[f"{name}_ms"] / row[f"{name}_ms"] for name in ("sparse", "dense")}
        parts = [f"{name} {row[f'{name}_ms']:7.2f} ms, {gain:.2f}x tokens per second" for name, gain in gains.items()]
        print(f"{size} sequences: {'; '.join(parts)}")


@script
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = script_parser("batches", __doc__)
    parser.add_argument("bundle", type=Path, help="a bundle of floats or 8-bit integers")
    parser.add_argument("--neurons", type=float, default=0.1)
    parser.add_argument("--heads", type=float, default=1.0)
    parser.add_argument("--shortlist", type=int)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    args = parser.parse_args(arguments)
    budget = Budget(neurons=args.neurons, heads=args.heads, shortlist=args.shortlist)
    rows = measure(args.bundle, budget, args.steps, args.threads)
    print_rows(rows)
    if args.json:
        record = {"environment": environment(args.threads), "budget": vars(budget), "results": rows}
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
