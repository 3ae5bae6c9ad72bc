r"""Measures end-to-end decoding on shapes of about 1B parameters: the speedup, and the speedup that the bytes allow.

    python -m shadowllm.benchmarks.shapes --json shapes.json
    python -m shadowllm.benchmarks.shapes --shapes llama-1.1b --weight-dtype int4
    python -m shadowllm.benchmarks.shapes --shapes llama-1.1b --selector quantized-shadow --dtype bfloat16
    python -m shadowllm.benchmarks.shapes --shapes llama-1.1b --selector quantized-shadow --rest shadow \
      --weight-dtype int6 --dense-weight-dtype int4

Weights are random. The predictor is an untrained network of the default size, or a low-bit copy of the
weights. So every cost is real, but the text has no meaning. Both contenders are in memory at the same time: with
1.1B parameters in float32 and a rest from the low-bit copy, they take about 10 GB together.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from shadowllm.benchmarks.random_model import SHAPES, untrained, write_random_model
from shadowllm.benchmarks.script_parser import add_json, script, script_parser
from shadowllm.bundle.manifest import ITEMSIZE, read_manifest
from shadowllm.bundle.predictor_file import Kind
from shadowllm.bundle.quantisation import NESTED, WEIGHT_DTYPES, bundle_format
from shadowllm.evaluation.speed.bandwidth import read_bandwidth
from shadowllm.evaluation.speed.bench import SPARSE
from shadowllm.evaluation.speed.environment import environment
from shadowllm.evaluation.speed.harness import Contender, race, speedup, summarise
from shadowllm.evaluation.speed.traffic import traffic_of
from shadowllm.evaluation.speed.worker_command import session_command
from shadowllm.exporter.write_bundle import write_bundle
from shadowllm.models.sparsity import Budget, Rest
from shadowllm.progress import progress

DENSE = "ort-dense"


def export_random(
    shape: str,
    folder: Path,
    kind: Kind,
    dtype: str,
    weight_dtype: str | None,
    rank: int | None = None,
    rest: Rest = "drop",
    budget: Budget | None = None,
) -> Path:
    """Export a bundle of a random model to a new folder.

    Args:
        rank: of the predictor, None for the default.
        budget: the bundle's own, dense if None. A session is opened with it, and packs dense weights if it is dense.
    """
    from shadowllm.models.registry import load_model

    bundle_format(weight_dtype, rest)  # an error comes before the model is written
    model, bundle = folder / shape, folder / "bundle"
    for path in (model, bundle):
        path.mkdir(parents=True)
    write_random_model(shape, model)
    spec, weights, checkpoint = load_model(str(model))
    predictor = untrained(kind, spec, weights.fingerprint(), rank=rank)
    options = {"dtype": dtype, "weight_dtype": weight_dtype, "budget": budget or Budget(), "rest": rest}
    write_bundle(bundle, shape, weights, checkpoint, predictor, **options)  # type: ignore[arg-type]
    return bundle


def measure(
    shape: str,
    *,
    budget: Budget,
    kind: Kind = "shadow",
    dtype: str = "float32",
    weight_dtype: str | None = None,
    dense_weight_dtype: str | None = None,
    prompt_len: int = 128,
    new_tokens: int = 128,
    runs: int = 3,
    threads: int = 2,
) -> dict[str, Any]:
    """Compare the speed of the sparse path of a shape with its dense graph.

    Args:
        dense_weight_dtype: of the dense contender, None for the same.

    Returns:
        Latencies (ms) and bytes of both, ``speedup`` (median, min and max over runs), ``allowed`` (dense
        bytes over sparse bytes), ``share_of_allowed``, ``ttft_ratio`` and ``predictor_share`` of a step
        (0 for a quantised shadow, which selects inside ``body``).
    """
    with tempfile.TemporaryDirectory() as folder:
        rest = budget.rest or "drop"
        bundle = export_random(shape, Path(folder), kind, dtype, weight_dtype, rest=rest, budget=budget)
        bundles, backends = {SPARSE: bundle, DENSE: bundle}, {SPARSE: "ort", DENSE: DENSE}
        if dense_weight_dtype:
            bundles[DENSE] = export_random(shape, Path(folder) / "dense", kind, dtype, dense_weight_dtype)
        manifests = {name: read_manifest(path) for name, path in bundles.items()}
        budgets = {SPARSE: budget, DENSE: Budget()}
        contenders = [Contender(n, session_command(bundles[n], b, budgets[n], threads)) for n, b in backends.items()]
        prompt = np.random.default_rng(0).integers(3, manifests[SPARSE].spec.vocab_size, prompt_len).tolist()
        with progress(shape, len(contenders) * (1 + runs)) as advance:
            request = {"prompt": prompt, "new_tokens": new_tokens}
            taken, _ = race(contenders, request, runs=runs, warmup=1, tick=lambda _: advance(1))
        roof = read_bandwidth(threads)
    summaries = {name: summarise(generations) for name, generations in taken.items()}
    traffic = {n: traffic_of(manifests[n], b, budgets[n], prompt_len, new_tokens) for n, b in backends.items()}
    gain, allowed = speedup(taken[DENSE], taken[SPARSE]), traffic[DENSE].total / traffic[SPARSE].total
    parts = summaries[SPARSE].parts_ms
    return {
        "shape": shape,
        "selector": kind,
        "weight_dtype": weight_dtype or dtype,
        "dense_weight_dtype": dense_weight_dtype or weight_dtype or dtype,
        "budget": vars(budget),
        "prompt_len": prompt_len,
        "new_tokens": new_tokens,
        "runs": runs,
        "read_gb_per_s": roof,
        "contenders": {name: vars(s) | {"bytes_per_token": traffic[name].total} for name, s in summaries.items()},
        "speedup": gain,
        "allowed": allowed,
        "share_of_allowed": gain["median"] / allowed,
        "ttft_ratio": summaries[SPARSE].ttft_ms["median"] / summaries[DENSE].ttft_ms["median"],
        "predictor_share": parts.get("predictor", 0) / sum(parts.values()),
    }


def print_result(found: dict[str, Any]) -> None:
    """Print a short summary."""
    sparse, dense = found["contenders"][SPARSE], found["contenders"][DENSE]
    gain = found["speedup"]
    types = f"{found['weight_dtype']} beside dense {found['dense_weight_dtype']}"
    print(f"{found['shape']} {types}, {found['selector']}, {found['budget']}, {found['runs']} runs")
    for name, one in ((SPARSE, sparse), (DENSE, dense)):
        rate = one["bytes_per_token"] / one["itl_ms"]["median"] / 1e6
        print(
            f"  {name:9} ITL median {one['itl_ms']['median']:7.2f} ms, TTFT {one['ttft_ms']['median']:7.0f} ms, "
            f"{one['bytes_per_token'] / 1e6:6.0f} MB/token, {rate:.1f} of {found['read_gb_per_s']:.1f} GB/s, "
            f"peak RSS {one['peak_rss_mb']:.0f} MB"
        )
    print(
        f"  speedup {gain['median']:.2f}x ({gain['min']:.2f} to {gain['max']:.2f}), {found['share_of_allowed']:.2f} of "
        f"the {found['allowed']:.2f}x the bytes allow; TTFT {found['ttft_ratio']:.2f} of dense; predictor and "
        f"selection {found['predictor_share']:.1%} of a step"
    )


@script
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = script_parser("shapes", __doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--selector", choices=("shadow", "layerwise", "quantized-shadow"), default="shadow")
    parser.add_argument("--dtype", choices=ITEMSIZE, default="float32")
    parser.add_argument("--weight-dtype", choices=sorted({*WEIGHT_DTYPES, *NESTED}), help="default: as --dtype")
    parser.add_argument("--dense-weight-dtype", choices=WEIGHT_DTYPES, help="of the dense contender; default: the same")
    parser.add_argument("--neuron-budget", type=float, default=0.5)
    parser.add_argument("--head-budget", type=float, default=0.5)
    parser.add_argument("--shortlist", type=int, help="rows of the output table at full precision; needs --rest shadow")
    parser.add_argument("--rest", choices=get_args(Rest), default="drop", help="as for `shadowllm export`")
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    add_json(parser)
    args = parser.parse_args(arguments)
    results = []
    for shape in args.shapes:
        results.append(
            measure(
                shape,
                budget=Budget(
                    heads=args.head_budget, neurons=args.neuron_budget, shortlist=args.shortlist, rest=args.rest
                ),
                kind=args.selector,
                dtype=args.dtype,
                weight_dtype=args.weight_dtype,
                dense_weight_dtype=args.dense_weight_dtype,
                prompt_len=args.prompt_len,
                new_tokens=args.new_tokens,
                runs=args.runs,
                threads=args.threads,
            )
        )
        print_result(results[-1])
    if args.json:
        record = {"environment": environment(args.threads), "results": results}
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
