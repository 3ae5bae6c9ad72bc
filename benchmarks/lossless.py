"""Checks that lossless decoding writes the dense model's text, and measures its speed beside ONNX Runtime dense.

    python -m shadowllm.benchmarks.noisy_model "$(python benchmarks/model_path.py)" out/noisy
    python -m shadowllm.benchmarks.frontier out/noisy out/frontier
    python -m shadowllm.benchmarks.lossless out/frontier/float32 --json lossless.json

Text (alone: ``--parts text``): greedy continuations in batches of 1 to 4, token by token against dense text. Places
where the two largest logits differ by less than rounding changes are counted as ties.

Speed: each contender runs in its own process, and their runs are interleaved. "dense" is ONNX Runtime's, and "dense,
native ops" a session with everything active, which has the dense steps of lossless decoding. Drafts have the budget and
first length that `tune --lossless` would find. "random" is a prompt of random tokens, sampled at a temperature: fewer
drafted tokens are accepted. In "weak", drafts have a budget that predicts little, so most drafted tokens are rejected.

Costs: the times of drafts and verifications, and the speedup that they imply at given acceptances. This is what a model
with random weights can show::

    python -m shadowllm.benchmarks.lossless --shape llama-1.1b --weight-dtype int8
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from shadowllm.benchmarks.random_model import SHAPES
from shadowllm.benchmarks.script_parser import add_json, script, script_parser
from shadowllm.benchmarks.shapes import export_random
from shadowllm.bundle.manifest import Manifest, read_manifest
from shadowllm.bundle.quantisation import NESTED
from shadowllm.draft_config import Drafting
from shadowllm.errors import UserError
from shadowllm.evaluation.default_text import passage
from shadowllm.evaluation.draft_tuning import Measured, measure_drafts, with_fastest
from shadowllm.evaluation.lossless_check import compare_lossless
from shadowllm.evaluation.speed.environment import environment
from shadowllm.evaluation.speed.harness import Contender, race, speedup, summarise
from shadowllm.evaluation.speed.worker_command import drafting_options, session_command
from shadowllm.models.sparsity import Budget
from shadowllm.progress import Advance, progress
from shadowllm.runtime.generation.draft_length import DraftLength
from shadowllm.runtime.generation.text import load_tokenizer, plain_encoder
from shadowllm.runtime.ort.loaded_bundle import Kind
from shadowllm.runtime.ort.session import OrtSession

PARTS = ("text", "speed", "costs")
ACCEPTANCES = (0.7, 0.8, 0.9)
TEMPERATURE = 2.0  # of the random prompt. At 100, all tokens are nearly as probable, and every draft is accepted.
WEAK = Budget(neurons=0.01, rest="drop")  # drafts without the low-bit copy
BATCHES = (1, 2, 3, 4)
DRAFT_LENGTHS = (1, 2, 3, 4, 6, 8)  # of one text after the other. Lengths that adapt would draft only where it pays.


def check_text(
    bundle: Path,
    prompts: int = 20,
    new_tokens: int = 256,
    prompt_len: int = 64,
    threads: int | None = None,
    batches: Sequence[int] = BATCHES,
) -> dict[str, Any]:
    """Compare greedy texts, with drafts at the bundle's budget, with dense texts."""
    ids = _passage(bundle, prompts * prompt_len)
    # Integers round in another way in a session of kind "dense". Floats do not, and it has other kernels.
    kind: Kind = "dense" if read_manifest(bundle).quantisation is None else "auto"
    starts = [ids[start : start + prompt_len] for start in range(0, len(ids), prompt_len)]
    with (
        OrtSession(bundle, "sparse", threads) as lossless,
        OrtSession(bundle, kind, threads) as dense,
        progress("Text", prompts) as advance,
    ):
        dense.set_budget(Budget())
        lossless.set_budget(read_manifest(bundle).draft_budget)
        lengths = cycle(DRAFT_LENGTHS)
        found = compare_lossless(
            lossless, dense, starts, new_tokens, lambda: DraftLength(next(lengths)), advance=advance, batches=batches
        )
    drafted, accepted = (sum(getattr(record, name) for record in found.drafts) for name in ("drafted", "accepted"))
    return {
        "prompts": prompts,
        "batches": list(batches),
        "tokens": found.tokens,
        "ties": [asdict(one) for one in found.ties],
        "wrong": [asdict(one) for one in found.wrong],
        "drafted": drafted,
        "accepted": accepted,
    }


def measure_speed(
    bundle: Path,
    manifest: Manifest,
    prompt_len: int = 128,
    new_tokens: int = 128,
    runs: int = 5,
    threads: int | None = None,
    temperature: float = TEMPERATURE,
) -> dict[str, Any]:
    """Return latencies (ms per token) and speedups over dense for each case; float weights are also packed.

    Args:
        manifest: has the budget and the first length of drafts.
        temperature: of the random prompt.
    """
    random = np.random.default_rng(0).integers(0, manifest.spec.vocab_size, prompt_len).tolist()
    text, budget = _passage(bundle, prompt_len), manifest.draft_budget
    cases = {"text": (text, 0.0, budget), "random": (random, temperature, budget), "weak": (text, 0.0, WEAK)}
    drafting = drafting_options(Drafting(lossless=True), manifest)
    result = {}
    for case, (prompt, heat, budget) in cases.items():
        backends = {
            "dense": ("ort-dense", budget, ["--loop"]),
            "dense, native ops": ("ort", Budget(), ["--loop"]),
            "lossless": ("ort", budget, drafting),
        }
        if manifest.quantisation is None:
            backends["lossless, packed weights"] = "ort", budget, [*drafting, "--prepack"]
        hot = ["--temperature", str(heat)]
        contenders = [
            Contender(name, session_command(bundle, backend, own, threads, [*more, *hot]))
            for name, (backend, own, more) in backends.items()
        ]
        with progress(f"Speed, {case}", len(contenders) * (1 + runs)) as advance:
            request = {"prompt": prompt, "new_tokens": new_tokens}
            taken, _ = race(contenders, request, runs=runs, warmup=1, tick=partial(_tick, advance))
        result[case] = {
            name: {
                "itl_ms": summarise(generations).itl_ms["mean"],
                "ttft_ms": summarise(generations).ttft_ms["median"],
                "peak_rss_mb": summarise(generations).peak_rss_mb,
                "speedup": speedup(taken["dense"], generations, np.mean),
                "same_tokens": generations[0].tokens == taken["dense, native ops"][0].tokens if not heat else None,
                "acceptance": _acceptance([generation.lossless for generation in generations if generation.lossless]),
                "drafts": [generation.lossless for generation in generations if generation.lossless],
            }
            for name, generations in taken.items()
        }
    return result


def _acceptance(drafts: Sequence[dict[str, Any]]) -> float | None:
    drafted = sum(record["drafted"] for record in drafts)
    return sum(record["accepted"] for record in drafts) / drafted if drafted else None


def costs(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Return the times of drafts of several budgets, and the speedups at their best lengths by acceptance."""
    rows = []
    for found in measured:
        implied = {share: replace(found, acceptance=share) for share in ACCEPTANCES}
        rows.append(
            {
                "budget": asdict(found.budget),
                "acceptance": found.acceptance,
                "draft_ms": 1e3 * found.draft_seconds,
                "verify_ms": {size: 1e3 * seconds for size, seconds in found.verify_seconds.items()},
                "speedup": found.speedup(found.best_length),
                "speedup_at": {share: one.speedup(one.best_length) for share, one in implied.items()},
            }
        )
    return rows


def costs_of_shape(shape: str, weight_dtype: str | None, threads: int | None = None) -> list[dict[str, Any]]:
    """Return the `costs` of a model with random weights, after prompts of random tokens."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = export_random(shape, Path(folder), "quantized-shadow", "float32", weight_dtype, rest="shadow")
        spec = read_manifest(bundle).spec
        size = 16, min(64, spec.max_seqlen // 2)
        prompts = np.random.default_rng(0).integers(3, spec.vocab_size, size).tolist()
        return costs(measure_drafts(bundle, prompts=prompts, threads=threads))


def _tick(advance: Advance, _: str) -> None:
    advance(1)


def _passage(bundle: Path, length: int) -> list[int]:
    manifest = read_manifest(bundle)
    return passage(plain_encoder(load_tokenizer(bundle, manifest), manifest), length)


def print_results(found: dict[str, Any]) -> None:
    """Print what was measured."""
    if text := found.get("text"):
        same = text["tokens"] - len(text["ties"]) - len(text["wrong"])
        print(f"text, batches {text['batches']}: {same} of {text['tokens']} tokens are the same", end="; ")
        print(f"ties: {len(text['ties'])}; wrong: {len(text['wrong'])}", end="; ")
        print(f"accepted {text['accepted']} of {text['drafted']} drafted tokens")
        for one in text["ties"]:
            print(f"  tie: {json.dumps(one)}")
    for case, rows in found.get("speed", {}).items():
        for name, row in rows.items():
            gain = row["speedup"]
            spread = f"{gain['median']:.2f}x ({gain['min']:.2f} to {gain['max']:.2f})"
            share = "" if row["acceptance"] is None else f"  {row['acceptance']:.0%} of drafted tokens accepted"
            print(f"{case:6} {name:25} {row['itl_ms']:7.2f} ms per token  {spread}  {row['peak_rss_mb']:.0f} MB{share}")
    for row in found.get("costs", ()):
        print(json.dumps(row))


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "text" in args.parts:
        found["text"] = check_text(
            args.bundle, args.prompts, args.new_tokens, threads=args.threads, batches=args.batches
        )
    if {"speed", "costs"} & set(args.parts):
        measured = measure_drafts(args.bundle, threads=args.threads)
    if "speed" in args.parts:
        tuned = with_fastest(read_manifest(args.bundle), measured)
        found["drafting"] = tuned.drafting
        found["speed"] = measure_speed(
            args.bundle, tuned, runs=args.runs, threads=args.threads, temperature=args.temperature
        )
    if "costs" in args.parts:
        found["costs"] = costs(measured)
    return found


@script
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = script_parser("lossless", __doc__)
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--shape", choices=SHAPES, help="measure the costs of this shape, with random weights, instead")
    parser.add_argument("--weight-dtype", choices=NESTED, help="of --shape; default: float32")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--prompts", type=int, default=20, help="number of texts that are compared")
    parser.add_argument("--new-tokens", type=int, default=256, help="of each of them")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, help="texts decoded together")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--temperature", type=float, default=TEMPERATURE, help="of the random prompt")
    parser.add_argument("--threads", type=int, default=2)
    add_json(parser)
    args = parser.parse_args(arguments)
    if (args.bundle is None) == (args.shape is None):
        parser.error("give a bundle or --shape")
    if args.shape and set(args.parts) not in ({"costs"}, set(PARTS)):
        parser.error("with --shape, only costs are measured")
    if args.weight_dtype and not args.shape:
        parser.error("--weight-dtype is that of --shape")
    model: Any
    found: dict[str, Any]
    if args.shape:
        model = {"shape": args.shape, "weight_dtype": args.weight_dtype or "float32"}
        found = {"costs": costs_of_shape(args.shape, args.weight_dtype, args.threads)}
    else:
        model, found = read_manifest(args.bundle).model, _measure(args)
    print_results(found)
    if args.json:
        record = {"environment": environment(args.threads), "model": model, **found}
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    if found.get("text", {}).get("wrong"):
        raise UserError("the text is not that of the dense model", "report this with the JSON of --json")


if __name__ == "__main__":
    sys.exit(main())
