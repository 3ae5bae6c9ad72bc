"""``shadowllm eval``"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from shadowllm.commands import options
from shadowllm.errors import UserError
from shadowllm.models.sparsity import Budget, parse_fractions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from shadowllm.bundle.manifest import Manifest
    from shadowllm.evaluation.quality import Result
    from shadowllm.models.sparsity import Fractions

EPILOG = """examples:
  shadowllm eval out/ --text book.txt --neuron-budget 0.3 0.5 0.7
  shadowllm eval out/ --text book.txt --selector static shadow oracle --head-budget 0.67 --json eval.json
  shadowllm eval out/ --tasks arc_easy lambada_openai --limit 100

Teacher-forced perplexity under the decode regime: every position has its own selection."""


# Options that only one of the two kinds of evaluation reads, with their defaults.
OF_TEXT = {
    "text": (),
    "tokens": 2048,
    "seqlen": 512,
    "head_unit": None,
    "aggregate": "token",
    "layers": False,
    "plot": None,
}
OF_TASKS = {"limit": None}
OWN = "fractions to keep, each with each; layer by layer with commas (default: the bundle's own)"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("bundle", type=Path, metavar="OUT", help="bundle to evaluate")
    parser.add_argument(
        "--text",
        nargs="+",
        default=(),
        metavar="FILE",
        help="text files or a Hugging Face dataset id (default: Python module docs, not calibrated on)",
    )
    options.add_whole(parser, "--tokens", default=2048, metavar="N", help="tokens to evaluate (default: 2048)")
    options.add_whole(
        parser,
        "--seqlen",
        least=2,
        default=512,
        metavar="N",
        help="tokens of a window (default: 512)",
    )
    parser.add_argument(
        "--selector",
        nargs="+",
        help="static, shadow, layerwise, oracle, random, quantized-shadow, or quantized-shadow-3 or -2 for fewer bits "
        "(default: static, the bundle's own, oracle)",
    )
    parser.add_argument("--neuron-budget", nargs="+", type=parse_fractions, metavar="FRACTION", help=OWN)
    parser.add_argument("--head-budget", nargs="+", type=parse_fractions, metavar="FRACTION", help=OWN)
    options.add_head_unit(parser)
    parser.add_argument(
        "--aggregate",
        choices=("token", "sequence", "last-token"),
        default="token",
        help="what chooses: each token for itself as decoding does, or once for a whole window the mean of its "
        "tokens' scores (the paper's setting) or its last token's (default: token)",
    )
    parser.add_argument("--layers", action="store_true", help="recall layer by layer too, here and in the JSON")
    group = parser.add_argument_group("tasks of lm-evaluation-harness, instead of text")
    group.add_argument("--tasks", nargs="+", metavar="NAME", help="tasks to run, by name or as YAML files")
    options.add_whole(group, "--limit", metavar="N", help="documents of each task (default: all)")
    parser.add_argument("--json", type=options.output_file, metavar="FILE", help="write the results there too")
    parser.add_argument(
        "--plot", type=options.output_file, metavar="FILE", help="draw perplexity over bytes per token there, as PNG"
    )


def run(args: argparse.Namespace) -> None:
    """Evaluate a sweep and print it."""
    unused = OF_TEXT if args.tasks else OF_TASKS
    for option, default in unused.items():
        if getattr(args, option) != default:
            flag = f"--{option.replace('_', '-')}"
            raise UserError(f"{flag} does nothing {'with' if args.tasks else 'without'} --tasks", "leave it out")
    if args.tasks:
        _tasks(args)
    else:
        _text(args)


def _text(args: argparse.Namespace) -> None:
    from shadowllm.bundle.manifest import read_manifest
    from shadowllm.bundle.weights import read_weights
    from shadowllm.evaluation.quality import evaluate
    from shadowllm.malloc import keep_freed_memory
    from shadowllm.progress import progress

    if args.tokens < args.seqlen:
        raise UserError(
            f"{args.tokens} tokens are less than one window of {args.seqlen}", "raise --tokens or lower --seqlen"
        )
    keep_freed_memory()
    manifest = read_manifest(args.bundle)
    manifest = replace(manifest, spec=replace(manifest.spec, head_unit=args.head_unit or manifest.spec.head_unit))
    windows = _windows(args, manifest)
    read = read_weights(args.bundle, manifest)
    selectors, heads, neurons = _sweep(args, manifest)
    passes = len(windows) * (1 + len(selectors) * len(heads) * len(neurons))
    with progress("Evaluating", passes) as advance:
        results = evaluate(
            manifest.spec,
            read.sparse,
            read.predictor,
            selectors,
            windows,
            head_budgets=heads,
            neuron_budgets=neurons,
            aggregate=args.aggregate,
            advance=advance,
        )
    _print_table(results)
    if args.layers:
        _print_layers(results)
    _keep(args, manifest, results, windows)


def _windows(args: argparse.Namespace, manifest: Manifest) -> Tensor:
    """The tokens to evaluate, int64 ``(windows, seqlen)``."""
    import torch

    from shadowllm.evaluation.passage import passage
    from shadowllm.predictor.calibration import token_windows
    from shadowllm.runtime.generation.text import load_tokenizer, plain_encoder

    encode = plain_encoder(load_tokenizer(args.bundle, manifest), manifest)
    seqlen, limit = min(args.seqlen, manifest.spec.max_seqlen), args.tokens // args.seqlen
    if args.text:
        return token_windows(args.text, encode, seqlen, limit)
    return torch.tensor(passage(encode, limit * seqlen)).view(limit, seqlen)


def _keep(args: argparse.Namespace, manifest: Manifest, results: Sequence[Result], windows: Tensor) -> None:
    """Write the results, and draw them, where that was asked for."""
    import torch

    from shadowllm.evaluation import quality_report as quality
    from shadowllm.evaluation.speed.environment import environment

    settings = {
        "model": manifest.model,
        "text": list(args.text) or "Python module documentation",
        "tokens": windows.numel(),
        "seqlen": windows.shape[1],
        "head_unit": manifest.spec.head_unit,
        "aggregate": args.aggregate,
        "predictor": manifest.predictor,
    }
    found = quality.rows(results, manifest, args.layers) | {
        "settings": settings,
        "environment": environment(torch.get_num_threads()),
    }
    if args.plot:
        quality.plot(found, args.plot, f"{manifest.model}, {windows.numel()} tokens")
        print(f"figure: {args.plot}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
        print(f"results: {args.json}")


def _tasks(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from shadowllm.bundle.manifest import read_manifest
    from shadowllm.evaluation.speed.environment import environment

    try:
        from shadowllm.evaluation.lm_tasks import run_tasks
    except ImportError as error:
        raise UserError(f"--tasks needs lm-evaluation-harness ({error})", "pip install 'shadowllm[lm-eval]'") from error

    selectors, heads, neurons = _sweep(args, read_manifest(args.bundle))
    selections = [(name, Budget(heads=h, neurons=n)) for name in selectors for h in heads for n in neurons]
    table = Table("selector", "neurons", "heads", "task", "metrics")
    rows = []
    for row in run_tasks(args.bundle, args.tasks, selections, args.limit):
        rows.append(row)
        figures = ", ".join(f"{name} {value:.4g}" for name, value in row["metrics"].items())
        table.add_row(row["selector"], f"{row['neuron_budget']:.0%}", f"{row['head_budget']:.0%}", row["task"], figures)
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps({"tasks": rows, "environment": environment()}, indent=2) + "\n")
        print(f"results: {args.json}")


def _sweep(args: argparse.Namespace, manifest: Manifest) -> tuple[list[str], list[Fractions], list[Fractions]]:
    """Selectors, head budgets and neuron budgets to try; of tasks, the bundle's own selector by itself."""
    own = manifest.predictor["kind"]
    selectors = args.selector or ([own] if args.tasks else list(dict.fromkeys(("static", own, "oracle"))))
    budget = Budget(**manifest.budgets)
    return selectors, args.head_budget or [budget.heads], args.neuron_budget or [budget.neurons]


def _print_table(results: Sequence[Result]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in (
        "selector",
        "neurons",
        "heads",
        "perplexity",
        "KL, nats",
        "top-1",
        "neuron recall",
        "head recall",
        "gap",
    ):
        table.add_column(column, justify="left" if column == "selector" else "right", no_wrap=True)
    for r in results:
        closure = "" if r.gap_closure is None else f"{r.gap_closure:.0%}"
        table.add_row(
            r.selector,
            f"{r.neuron_budget:.0%}",
            f"{r.head_budget:.0%}",
            f"{r.perplexity:.2f}",
            f"{r.kl:.3f}",
            f"{r.top1_agreement:.1%}",
            f"{r.neuron_recall:.1%}",
            f"{r.head_recall:.1%}",
            closure,
        )
    console = Console()
    console.width = max(console.width, 110)  # a file has no width: columns must not be cut
    console.print(table)
    print(
        "top-1: agreement with dense; gap: share of the gap between static and oracle that is closed (log perplexity)"
    )


def _print_layers(results: Sequence[Result]) -> None:
    """Recall of each sparse layer, neurons and heads, a column for each selector and budget."""
    from rich.console import Console
    from rich.table import Table

    shown = results[1:]
    table = Table(title="recall of neurons / of heads")
    table.add_column("layer", justify="right")
    for r in shown:
        table.add_column(f"{r.selector}\n{r.neuron_budget:.0%}, {r.head_budget:.0%}", justify="right", no_wrap=True)
    for row, first in enumerate(shown[0].layers):
        cells = (f"{r.layers[row].neuron_recall:.0%} / {r.layers[row].head_recall:.0%}" for r in shown)
        table.add_row(str(first.layer), *cells)
    console = Console()
    console.width = max(console.width, 20 * (1 + len(shown)))
    console.print(table)
