"""Measures time per token against perplexity: dense bundles of each weight type, and budgets of a mixed one.

    python -m shadowllm.benchmarks.noisy_model "$(python benchmarks/model_path.py)" out/noisy
    python -m shadowllm.benchmarks.frontier out/noisy out/frontier --json frontier.json --plot frontier.png

Every contender is a session in its own process, and their runs are interleaved. Perplexity is measured by the same
sessions, token by token after a prompt, on text that no budget was chosen on. "chosen" is the budget that ``export``
chooses by default for floats. The others are named by neurons/heads/shortlist at full precision.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shadowllm.benchmarks.script_parser import script, script_parser
from shadowllm.bundle.manifest import read_manifest
from shadowllm.bundle.predictor_file import Predictor
from shadowllm.bundle.weights import PREDICTOR_FILE
from shadowllm.config import Export, Source
from shadowllm.evaluation.default_text import passage
from shadowllm.evaluation.speed.bench import SPARSE, session_command, traffic_of
from shadowllm.evaluation.speed.environment import environment
from shadowllm.evaluation.speed.figure import new_figure, save
from shadowllm.evaluation.speed.harness import Contender, Worker, race, speedup, summarise
from shadowllm.models.sparsity import Budget
from shadowllm.pipeline import export_model
from shadowllm.progress import progress
from shadowllm.runtime.generation.text import load_tokenizer, plain_encoder

DENSE = "float32 dense"
# Points of the dial from slow and good to fast: neurons, heads, rows of the output table.
DIAL = ((0.3, 1.0, 4096), (0.1, 1.0, 1024), (0.1, 0.34, 1024), (0.05, 0.12, 256))


def export_all(model: str, folder: Path, dtype: str, bundle: Path | None = None) -> dict[str, Path]:
    """Export a bundle of each weight type; those that exist, or are given, are kept.

    The first is of floats, and its predictor and the budget chosen for it are used for int8 too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    bundles = {name: folder / name for name in ("float32", "int8", "int4")} | ({"float32": bundle} if bundle else {})
    if not bundles["float32"].exists():
        export_model(Source(model), bundles["float32"], Export(dtype=dtype, validate=False))
    predictor = Predictor.load(bundles["float32"] / PREDICTOR_FILE)
    plans = {
        "int8": Export(weight_dtype="int8", budget=read_manifest(bundles["float32"]).budget, validate=False),
        "int4": Export(weight_dtype="int4", budget=Budget(), validate=False),
    }
    for name, plan in plans.items():
        if not bundles[name].exists():
            export_model(Source(model), bundles[name], plan, predictor=predictor)
    return bundles


def contenders_of(bundles: Mapping[str, Path]) -> dict[str, tuple[Path, str, Budget]]:
    """Return bundle, backend and budget of each contender."""
    found = {f"{name} dense": (bundle, "ort-dense", Budget()) for name, bundle in bundles.items()}
    for name in ("float32", "int8"):
        bundle = bundles[name]
        found[f"{name} chosen"] = bundle, "ort", read_manifest(bundle).budget
        for neurons, heads, rows in DIAL:
            budget = Budget(neurons=neurons, heads=heads, shortlist=rows)
            found[f"{name} {neurons:.0%}/{heads:.0%}/{rows}"] = bundle, "ort", budget
    return found


def measure(
    bundles: Mapping[str, Path],
    texts: Sequence[Path],
    *,
    prompt_len: int = 128,
    new_tokens: int = 128,
    runs: int = 5,
    windows: int = 3,
    seqlen: int = 512,
    threads: int = 2,
) -> list[dict[str, Any]]:
    """Return a row for each contender: latency (ms), bytes per token, perplexity, speedup over dense, peak RSS (MB)."""
    wanted = contenders_of(bundles)
    contenders = [Contender(name, session_command(*one, threads)) for name, one in wanted.items()]
    manifest = read_manifest(bundles["float32"])
    encode = plain_encoder(load_tokenizer(bundles["float32"], manifest), manifest)
    ids = _tokens(encode, texts, windows * seqlen + prompt_len)
    prompt, rest = ids[:prompt_len], ids[prompt_len:]
    with progress("Frontier", len(contenders) * (1 + runs + windows)) as advance:

        def score(workers: Mapping[str, Worker], _: Any) -> dict[str, float]:
            return {name: _perplexity(worker, rest, windows, seqlen, advance) for name, worker in workers.items()}

        request = {"prompt": prompt, "new_tokens": new_tokens}
        taken, perplexities = race(contenders, request, runs=runs, warmup=1, tick=lambda _: advance(1), after=score)
    rows = []
    for name, (bundle, backend, budget) in wanted.items():
        summary, kind = summarise(taken[name]), SPARSE if backend == "ort" else name
        traffic = traffic_of(read_manifest(bundle), kind, backend, budget, prompt_len, new_tokens)
        rows.append(
            {
                "name": name,
                "budget": vars(budget) if kind == SPARSE else None,
                "itl_ms": summary.itl_ms["median"],
                "ttft_ms": summary.ttft_ms["median"],
                "speedup": speedup(taken[DENSE], taken[name]),
                "bytes_per_token": traffic.total,
                "perplexity": perplexities[name],
                "peak_rss_mb": summary.peak_rss_mb,
            }
        )
    return rows


def _tokens(encode: Any, texts: Sequence[Path], length: int) -> list[int]:
    if not texts:
        return passage(encode, length)
    return list(encode("\n".join(path.read_text() for path in texts)))[:length]


def _perplexity(worker: Worker, ids: Sequence[int], windows: int, seqlen: int, advance: Any) -> float:
    """Return the perplexity of windows; the first eighth of each is the prompt, which is prefilled dense."""
    nll: list[float] = []
    for start in range(0, windows * seqlen, seqlen):
        window, cut = list(ids[start : start + seqlen]), seqlen // 8
        nll += worker.ask("score", context=window[:cut], continuation=window[cut:])["nll"]
        advance(1)
    return float(np.exp(np.mean(nll)))


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot perplexity over the time per token.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    figure = new_figure((6.4, 4.4))
    axes = figure.subplots()
    kinds = {"ONNX Runtime, dense": "", "mixed, float32": "float32 ", "mixed, int8": "int8 "}
    for label, prefix in kinds.items():
        points = [row for row in rows if row["budget"] is not None and prefix and row["name"].startswith(prefix)]
        points = points or [row for row in rows if row["budget"] is None]
        points.sort(key=lambda row: row["itl_ms"])
        axes.plot([row["itl_ms"] for row in points], [row["perplexity"] for row in points], marker="o", label=label)
        for row in points:
            text = row["name"].removesuffix(" dense").removeprefix(prefix or " ")
            axes.annotate(text, (row["itl_ms"], row["perplexity"]), fontsize=7)
    axes.set(xlabel="ms per token", ylabel="perplexity")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    save(figure, path)


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table."""
    base = rows[0]["perplexity"]
    for row in rows:
        gain = row["speedup"]
        speed = f"{row['itl_ms']:7.2f} ms  {gain['median']:.2f}x ({gain['min']:.2f} to {gain['max']:.2f})"
        quality = f"perplexity {row['perplexity']:.2f} ({row['perplexity'] / base - 1:+.1%})"
        megabytes = f"{row['bytes_per_token'] / 1e6:6.0f} MB  {quality}  peak RSS {row['peak_rss_mb']:.0f} MB"
        print(f"{row['name']:24} {speed}  {megabytes}")


@script
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = script_parser("frontier", __doc__)
    parser.add_argument("model", help="folder with safetensors, or .gguf file")
    parser.add_argument("out", type=Path, help="folder for the bundles; those that exist are used")
    parser.add_argument("--bundle", type=Path, metavar="BUNDLE", help="a bundle of the model in floats, to use instead")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--text", nargs="+", type=Path, default=(), help="default: documentation of Python modules")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also write a figure to this file")
    args = parser.parse_args(arguments)
    bundles = export_all(args.model, args.out, args.dtype, args.bundle)
    rows = measure(bundles, args.text, runs=args.runs, windows=args.windows, threads=args.threads)
    print_rows(rows)
    if args.json:
        record = {"environment": environment(args.threads), "model": Path(args.model).name, "results": rows}
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    sys.exit(main())
