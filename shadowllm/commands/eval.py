"""``shadowllm eval``"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from shadowllm.commands import options
from shadowllm.commands.flags import add_flags, build
from shadowllm.config import Evaluation
from shadowllm.errors import UserError
from shadowllm.models.sparsity import parse_fractions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shadowllm.evaluation.quality import Result
    from shadowllm.evaluation.sweep import Evaluated

EPILOG = """examples:
  shadowllm eval out/ --text book.txt --neuron-budget 0.3 0.5 0.7
  shadowllm eval out/ --text book.txt --selector static shadow oracle --head-budget 0.67 --json eval.json
  shadowllm eval out/ --tasks arc_easy lambada_openai --limit 100

Perplexity is teacher-forced. As in decoding, every position has its own selection, unless --aggregate
says otherwise."""


# Options that only one of the two kinds of evaluation uses, with their defaults.
OF_TEXT = {
    "text": Evaluation.texts,
    "tokens": Evaluation.tokens,
    "seqlen": Evaluation.seqlen,
    "head_unit": Evaluation.head_unit,
    "aggregate": Evaluation.aggregate,
    "layers": False,
    "plot": None,
}
OF_TASKS = {"limit": None}


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("bundle", type=Path, metavar="OUT", help="bundle to evaluate")
    add_flags(parser, Evaluation, parse={"neurons": parse_fractions, "heads": parse_fractions})
    parser.add_argument(
        "--layers", action="store_true", help="report recall per layer too, in the output and in the JSON"
    )
    group = parser.add_argument_group("tasks of lm-evaluation-harness, instead of text")
    group.add_argument("--tasks", nargs="+", metavar="NAME", help="tasks to run, by name or as YAML files")
    options.add_whole(group, "--limit", metavar="N", help="number of documents per task (default: all)")
    parser.add_argument("--json", type=options.output_file, metavar="FILE", help="also write the results to this file")
    parser.add_argument(
        "--plot", type=options.output_file, metavar="FILE", help="draw perplexity over bytes per token to this PNG file"
    )


def run(args: argparse.Namespace) -> None:
    """Evaluate all selectors and budgets, and print the results."""
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
    from shadowllm.evaluation.quality_report import plot
    from shadowllm.evaluation.sweep import evaluate_text

    evaluated = evaluate_text(args.bundle, build(args, Evaluation))
    _print_table(evaluated)
    if args.layers:
        _print_layers(evaluated.results)
    found = evaluated.to_dict(args.layers)
    if args.plot:
        plot(found, args.plot, f"{evaluated.manifest.model}, {evaluated.tokens} tokens")
        print(f"figure: {args.plot}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
        print(f"results: {args.json}")


def _tasks(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from shadowllm.evaluation.speed.environment import environment
    from shadowllm.evaluation.sweep import evaluate_tasks

    rows = evaluate_tasks(args.bundle, args.tasks, build(args, Evaluation), args.limit)
    table = Table("selector", "neurons", "heads", "task", "metrics")
    for row in rows:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in row["metrics"].items())
        table.add_row(row["selector"], f"{row['neuron_budget']:.0%}", f"{row['head_budget']:.0%}", row["task"], figures)
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps({"tasks": rows, "environment": environment()}, indent=2) + "\n")
        print(f"results: {args.json}")


def _print_table(evaluated: Evaluated) -> None:
    from rich.console import Console
    from rich.table import Table

    from shadowllm.evaluation.quality_report import rival_bits

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
        "equal bytes",
    ):
        table.add_column(column, justify="left" if column == "selector" else "right", no_wrap=True)
    for r in evaluated.results:
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
            _rival(evaluated.uniform, None if r is evaluated.results[0] else rival_bits(r, evaluated.manifest)),
        )
    console = Console()
    console.width = max(console.width, 125)  # a file has no width, and columns must not be cut
    console.print(table)
    print(
        "top-1: agreement with dense; gap: share of the gap between static and oracle that is closed (log perplexity)\n"
        "equal bytes: perplexity of the dense model, quantised until it reads as many bytes per token (and its bits)"
    )


def _rival(uniform: Mapping[int, Result], bits: int | None) -> str:
    return f"{uniform[bits].perplexity:.2f} (int{bits})" if bits else ""


def _print_layers(results: Sequence[Result]) -> None:
    """Print the recall of neurons and heads per sparse layer, with a column per selector and budget."""
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
