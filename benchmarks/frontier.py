"""Measures time per token against perplexity: dense bundles of each weight type, and budgets of a mixed one.

    python -m shadowllm.benchmarks.noisy_model "$(python benchmarks/model_path.py)" out/noisy
    python -m shadowllm.benchmarks.frontier out/noisy out/frontier --json frontier.json --plot frontier.png

Every contender is a session in its own process, and their runs are interleaved. Perplexity is measured by the same
sessions, token by token after a prompt, on text that no budget was chosen on. "chosen" is the budget that ``export``
chooses by default for the weight type. The others are named by neurons/heads/shortlist at full precision.

With the options ``--gguf out/noisy.gguf --llama-cpp-python .peers/llamacpp/bin/python``, the types of llama.cpp are
contenders too. This makes the file and the environment; llama.cpp compiles for about half an hour:

    python -m shadowllm.benchmarks.gguf_model out/noisy "$(python benchmarks/model_path.py)" out/noisy.gguf
    make .peers/llamacpp
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from shadowllm.benchmarks.llama_cpp_rivals import NAME, Rival, llama_cpp_rivals
from shadowllm.benchmarks.script_parser import add_json, script, script_parser
from shadowllm.bundle.manifest import file_hash, read_manifest
from shadowllm.bundle.predictor_file import Predictor
from shadowllm.bundle.weights import PREDICTOR_FILE
from shadowllm.commands.options import figure_file
from shadowllm.config import Export, Source
from shadowllm.errors import UserError
from shadowllm.evaluation.default_text import passage
from shadowllm.evaluation.speed.environment import environment
from shadowllm.evaluation.speed.figure import new_figure, save
from shadowllm.evaluation.speed.harness import Contender, Generation, Worker, race, speedup, summarise
from shadowllm.evaluation.speed.traffic import traffic_of
from shadowllm.evaluation.speed.worker_command import session_command
from shadowllm.models.registry import load_model
from shadowllm.models.sparsity import Budget
from shadowllm.pipeline import export_model
from shadowllm.progress import progress
from shadowllm.runtime.generation.text import load_tokenizer, plain_encoder

INTEGERS = ("int8", "int6", "int4")
# Points of the dial from slow and good to fast: neurons, heads, rows of the output table.
DIAL = ((0.3, 1.0, 4096), (0.1, 1.0, 2048), (0.05, 1.0, 2048), (0.03, 1.0, 1024))
SHORT_DIAL = DIAL[1:3]
MIXED = "mixed,"
SIZES = {"prompt_len": 128, "new_tokens": 128, "seqlen": 512}  # tokens; ``seqlen`` is of a window
# Where the labels of a weight type are beside its points, so that they do not cover those of another one.
SIDES: Mapping[str, Mapping[str, Any]] = {
    "int6": {"ha": "right", "xytext": (-6, -2)},
    "int8": {"ha": "center", "xytext": (0, 6)},
    "float32": {"ha": "center", "xytext": (0, -12)},
}


def export_all(
    model: str, folder: Path, dtype: str, integers: Sequence[str] = INTEGERS, bundle: Path | None = None
) -> dict[str, Path]:
    """Export a bundle of each weight type; those that exist, or are given, are kept.

    The first is of floats, and its predictor is used for integers too. Each type has the budget that is chosen for it.

    Raises:
        UserError: a bundle that exists is of another model, or another version wrote it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    bundles = {dtype: bundle or folder / dtype} | {name: folder / name for name in integers}
    wanted = load_model(model)[1].fingerprint(), version("shadowllm")
    for path in filter(Path.exists, bundles.values()):
        manifest = read_manifest(path)
        if (manifest.base_fingerprint, manifest.tools["shadowllm"]) != wanted:
            raise UserError(
                f"{path} is of another model, or another version wrote it", "remove it, or name another folder"
            )
    if not bundles[dtype].exists():
        export_model(Source(model), bundles[dtype], Export(dtype=dtype, validate=False))
    predictor = Predictor.load(bundles[dtype] / PREDICTOR_FILE)
    for name in integers:
        if not bundles[name].exists():
            plan = Export(weight_dtype=name, budget=Budget() if name == "int4" else None, validate=False)
            export_model(Source(model), bundles[name], plan, predictor=predictor)
    return bundles


def contenders_of(bundles: Mapping[str, Path], short: bool = False) -> dict[str, tuple[Path, str, Budget]]:
    """Return bundle, backend and budget of each contender; the first is dense, of floats.

    ONNX Runtime has no products of 6 bits, so there is no dense int6. "everything" is a dense step of nested integers
    on the native ops. For floats, `benchmarks.lossless` has this contender.

    Args:
        bundles: by weight type.
        short: with budgets for floats only, and with two points of the dial only.
    """
    found = {f"{name} dense": (bundle, "ort-dense", Budget()) for name, bundle in bundles.items() if name != "int6"}
    for name, bundle in bundles.items():
        if name == "int4" or (short and name in INTEGERS):  # int4 has no low-bit copy
            continue
        if name in INTEGERS:
            found[f"{name} everything"] = bundle, "ort", Budget()
        found[f"{name} chosen"] = bundle, "ort", read_manifest(bundle).budget
        for neurons, heads, rows in SHORT_DIAL if short else DIAL:
            budget = Budget(neurons=neurons, heads=heads, shortlist=rows)
            found[f"{name} {neurons:.0%}/{heads:.0%}/{rows}"] = bundle, "ort", budget
    return found


def measure(
    bundles: Mapping[str, Path],
    texts: Sequence[Path],
    *,
    prompt_len: int,
    new_tokens: int,
    seqlen: int,
    runs: int = 5,
    windows: int = 3,
    threads: int = 2,
    rivals: Sequence[Rival] = (),
    short: bool = False,
) -> list[dict[str, Any]]:
    """Return a row for each contender: latency (ms), bytes per token, perplexity, speedup over dense, peak RSS (MB).

    Args:
        short: as for `contenders_of`.
    """
    wanted = contenders_of(bundles, short)
    contenders = [Contender(name, session_command(*one, threads)) for name, one in wanted.items()]
    contenders += [rival.contender for rival in rivals]
    floats, dense = next(iter(bundles.values())), next(iter(wanted))
    manifest = read_manifest(floats)
    encode = plain_encoder(load_tokenizer(floats, manifest), manifest)
    ids = _tokens(encode, texts, windows * seqlen + prompt_len)
    prompt, rest = ids[:prompt_len], ids[prompt_len:]
    with progress("Frontier", len(contenders) * (1 + runs + windows)) as advance:

        def score(workers: Mapping[str, Worker], _: Any) -> dict[str, float]:
            return {name: _perplexity(worker, rest, windows, seqlen, advance) for name, worker in workers.items()}

        request = {"prompt": prompt, "new_tokens": new_tokens}
        taken, perplexities = race(contenders, request, runs=runs, warmup=1, tick=lambda _: advance(1), after=score)
    read: dict[str, tuple[Budget | None, int]] = {
        rival.contender.name: (None, rival.bytes_per_token) for rival in rivals
    }
    for name, (bundle, backend, budget) in wanted.items():
        traffic = traffic_of(read_manifest(bundle), backend, budget, prompt_len, new_tokens)
        read[name] = budget if backend == "ort" else None, traffic.total
    return [_row(name, *read[name], taken[name], taken[dense]) | {"perplexity": perplexities[name]} for name in taken]


def _row(
    name: str, budget: Budget | None, size: int, taken: Sequence[Generation], dense: Sequence[Generation]
) -> dict[str, Any]:
    summary = summarise(taken)
    return {
        "name": name,
        "budget": None if budget is None else vars(budget),
        "itl_ms": summary.itl_ms["median"],
        "ttft_ms": summary.ttft_ms["median"],
        "speedup": speedup(dense, taken),
        "bytes_per_token": size,
        "peak_rss_mb": summary.peak_rss_mb,
    }


def _tokens(encode: Any, texts: Sequence[Path], length: int) -> list[int]:
    if not texts:
        return passage(encode, length)
    ids = list(encode("\n".join(path.read_text() for path in texts)))
    if len(ids) < length:
        raise UserError(f"the text has {len(ids)} tokens, {length} are needed", "give more text or fewer windows")
    return ids[:length]


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
    figure = new_figure((9, 7))
    axes = figure.subplots()
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for row in sorted(rows, key=lambda row: row["perplexity"]):
        label, text = _labels(row)
        lines.setdefault(label, []).append((row["itl_ms"], row["perplexity"], text))
    for label, points in lines.items():
        ours = label.startswith(MIXED)
        times, perplexities, texts = zip(*points, strict=True)
        (line,) = axes.plot(times, perplexities, "o-" if ours else "s", markersize=4, label=label)
        side: Mapping[str, Any] = SIDES.get(label.removeprefix(f"{MIXED} "), {"ha": "left", "xytext": (5, -2)})
        for time, perplexity, text in zip(times, perplexities, texts, strict=True):
            axes.annotate(
                text, (time, perplexity), fontsize=7, color=line.get_color(), textcoords="offset points", **side
            )
    axes.set(xlabel="ms per token", ylabel="perplexity", xscale="log")
    for formatted in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        formatted("{x:g}")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")
    save(figure, path)


def _labels(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return the line of a contender, and its label there: of a budget on the dial, the share of the neurons."""
    first, rest = row["name"].split(" ", 1)
    if row["budget"] is not None:
        return f"{MIXED} {first}", rest.split("/")[0]
    return (NAME, rest) if first == NAME else ("ONNX Runtime, dense", first)


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
    parser.add_argument("--integers", nargs="+", choices=INTEGERS, default=INTEGERS, help="default: all")
    parser.add_argument("--short", action="store_true", help="integer weights dense only, and two points of the dial")
    parser.add_argument("--text", nargs="+", type=Path, default=(), help="default: documentation of Python modules")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-cpp-python", type=Path, metavar="PYTHON", help="interpreter with llama-cpp-python")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the model as a float32 GGUF file, for llama.cpp")
    add_json(parser)
    parser.add_argument("--plot", type=figure_file, metavar="FILE", help="also write a figure to this file")
    args = parser.parse_args(arguments)
    if (args.gguf is None) != (args.llama_cpp_python is None):
        raise UserError("llama.cpp needs --gguf and --llama-cpp-python", "give both, or none of them")
    bundles = export_all(args.model, args.out, args.dtype, args.integers, args.bundle)
    rivals = llama_cpp_rivals(args.llama_cpp_python, args.gguf, args.out, args.threads) if args.gguf else []
    sizes = SIZES | {"runs": args.runs, "windows": args.windows, "threads": args.threads}
    rows = measure(bundles, args.text, rivals=rivals, short=args.short, **sizes)
    print_rows(rows)
    if args.json:
        text = {path.name: file_hash(path) for path in args.text} or "Python module documentation"
        settings = sizes | {"text": text}
        record = {"environment": environment(args.threads), "model": Path(args.model).name, "settings": settings}
        args.json.write_text(json.dumps(record | {"results": rows}, indent=2) + "\n")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    sys.exit(main())
