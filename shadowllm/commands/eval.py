"""``shadowllm eval``"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from shadowllm.commands import options
from shadowllm.commands.flags import add_flags, build, whole
from shadowllm.errors import writing
from shadowllm.eval_config import Evaluation, Generation
from shadowllm.limits import LARGEST
from shadowllm.models.sparsity import parse_fractions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from shadowllm.evaluation.decoded import Decoded, Decoding
    from shadowllm.evaluation.quality import Result
    from shadowllm.evaluation.sweep import Evaluated

EPILOG = """examples:
  shadowllm eval out/ --generate --neuron-budget 0.5 --json eval.json
  shadowllm eval out/ --text book.txt --neuron-budget 0.3 0.5 0.7
  shadowllm eval out/ --text book.txt --selector static shadow oracle --head-budget 0.67 --json eval.json
  shadowllm eval out/ --neuron-budget 0.1 0.2 --rest shadow drop --shortlist 256 1024
  shadowllm eval out/ --tasks arc_easy lambada_openai --limit 100

Perplexity is teacher-forced. As in decoding, every position has its own selection, unless --aggregate
says otherwise."""


# Options of decoding, and those that decoding cannot follow: a session has the bundle's own unit, for each token.
OF_GENERATION = {name: getattr(Generation, name) for name in ("prompts", "new_tokens", "problems")}
NOT_OF_GENERATION = {name: getattr(Evaluation, name) for name in ("head_unit", "aggregate")}
# Options that only one of the two kinds of evaluation uses, with their defaults.
OF_TEXT = {
    "text": Evaluation.texts,
    "tokens": Evaluation.tokens,
    "seqlen": Evaluation.seqlen,
    "head_unit": Evaluation.head_unit,
    "aggregate": Evaluation.aggregate,
    "layers": False,
    "plot": None,
    "generate": False,
}
OF_TASKS = {"limit": None}
PARSE = {
    "neurons": parse_fractions,
    "heads": parse_fractions,
    "shortlist": lambda text: LARGEST if text == "all" else whole("--shortlist", 1, LARGEST)(text),
}
COPY_COLUMNS = ("rest", "shortlist")  # of a bundle with a low-bit copy of all matrices


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("bundle", type=Path, metavar="OUT", help="bundle to evaluate")
    add_flags(parser, Evaluation, parse=PARSE)
    parser.add_argument(
        "--layers", action="store_true", help="report recall per layer too, in the output and in the JSON"
    )
    group = parser.add_argument_group("tasks of lm-evaluation-harness, instead of text")
    group.add_argument("--tasks", nargs="+", metavar="NAME", help="tasks to run, by name or as YAML files")
    options.add_whole(group, "--limit", metavar="N", help="number of documents per task (default: all)")
    group = parser.add_argument_group("decoding, in addition to text")
    group.add_argument(
        "--generate",
        action="store_true",
        help="also compare decoded text, and answers to generated problems, with the dense model's",
    )
    add_flags(group, Generation)
    parser.add_argument("--json", type=options.output_file, metavar="FILE", help="also write the results to this file")
    parser.add_argument(
        "--plot", type=options.figure_file, metavar="FILE", help="draw perplexity over bytes per token to this PNG file"
    )


def run(args: argparse.Namespace) -> None:
    """Evaluate all selectors and budgets, and print the results."""
    options.refuse_unused(
        args, OF_TEXT if args.tasks else OF_TASKS, "with --tasks" if args.tasks else "without --tasks"
    )
    if args.generate:
        options.refuse_unused(args, NOT_OF_GENERATION, "with --generate")
    else:
        options.refuse_unused(args, OF_GENERATION, "without --generate")
    if args.tasks:
        _tasks(args)
    else:
        _text(args)


def _text(args: argparse.Namespace) -> None:
    from shadowllm.evaluation.quality_report import plot
    from shadowllm.evaluation.sweep import evaluate_text

    decoding = _decoding(args) if args.generate else None
    evaluated = evaluate_text(args.bundle, build(args, Evaluation))
    _print_table(evaluated)
    _print_recomputed(evaluated.results)
    if args.layers:
        _print_layers(evaluated.results)
    found = evaluated.to_dict(args.layers)
    if args.json:
        _save(found, args.json)
    if decoding:  # it may take hours, so what there is was saved before
        found |= _print_decoded(decoding.run())
        if args.json:
            _save(found, args.json)
    if args.plot:
        plot(found, args.plot, f"{evaluated.manifest.model}, {evaluated.tokens} tokens")
        print(f"figure: {args.plot}")


def _decoding(args: argparse.Namespace) -> Decoding:
    from shadowllm.bundle.manifest import read_manifest
    from shadowllm.evaluation.decoded import Decoding
    from shadowllm.evaluation.sweep import settings

    manifest, text = read_manifest(args.bundle), build(args, Evaluation)
    return Decoding(args.bundle, settings(manifest, text).budgets(), build(args, Generation), text.texts)


def _print_decoded(decoded: Sequence[Decoded]) -> dict[str, list[dict[str, Any]]]:
    """Print texts and answers, and return them for the JSON."""
    from rich.console import Console
    from rich.table import Table

    from shadowllm.evaluation.decoded import rows

    found = rows(decoded)
    texts = Table("budget", "texts", "identical", "same token", "mean", "median", title="decoded text")
    for row in found["generation"]:
        shares = (f"{row[name]:.1%}" for name in ("identical", "agreement"))
        tokens = (f"{row[name]:.0f}" for name in ("mean_divergence", "median_divergence"))
        texts.add_row(_kept(row), str(len(row["lengths"])), *shares, *tokens)
    answers = Table("budget", "task", "dense", "sparse", "same answer", title="answers, exact match")
    for row in found["reasoning"]:
        answers.add_row(_kept(row), row["task"], *(f"{row[name]:.0%}" for name in ("dense", "sparse", "agreement")))
    console = Console()
    console.width = max(console.width, 120)
    console.print(texts, answers)
    print(
        "same token, same answer: as dense, the tokens after the same text; mean, median: new tokens before the first\n"
        "different one"
    )
    return found


def _kept(row: Mapping[str, Any]) -> str:
    parts = [f"{row['neuron_budget']:.0%} of neurons", f"{row['head_budget']:.0%} of heads"]
    parts += [f"rest {row['rest']}"] if row["rest"] else []
    parts += [f"{row['shortlist']} exact rows"] if row["shortlist"] else []
    if row["certify"] and row.get("recomputed_rows"):
        parts += [_certified(row["recomputed_rows"])]
    return ", ".join(parts)


def _tasks(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from shadowllm.evaluation.speed.environment import environment
    from shadowllm.evaluation.sweep import evaluate_tasks

    rows = evaluate_tasks(args.bundle, args.tasks, build(args, Evaluation), args.limit)
    copies = any(row["rest"] == "shadow" or row["shortlist"] for row in rows)
    table = Table("selector", "neurons", "heads", *(COPY_COLUMNS if copies else ()), "task", "metrics")
    for row in rows:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in row["metrics"].items())
        shared = _of_copies(row["rest"], row["shortlist"]) if copies else ()
        budget = f"{row['neuron_budget']:.0%}", f"{row['head_budget']:.0%}", *shared
        table.add_row(row["selector"], *budget, row["task"], figures)
    Console().print(table)
    if args.json:
        _save({"tasks": rows, "environment": environment()}, args.json)


def _save(found: Mapping[str, Any], path: Path) -> None:
    with writing(path) as file:
        file.write_text(json.dumps(found, indent=2) + "\n")
    print(f"results: {path}")


def _print_table(evaluated: Evaluated) -> None:
    from rich.console import Console
    from rich.table import Table

    from shadowllm.evaluation.quality_report import rival_bits

    table, copies = Table(), evaluated.manifest.rest == "shadow"
    for column in (
        "selector",
        "neurons",
        "heads",
        *(COPY_COLUMNS if copies else ()),
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
            *(_of_copies(r.rest, r.shortlist) if copies else ()),
            f"{r.perplexity:.2f}",
            f"{r.kl:.3f}",
            f"{r.top1_agreement:.1%}",
            f"{r.neuron_recall:.1%}",
            f"{r.head_recall:.1%}",
            closure,
            _rival(evaluated.uniform, None if r is evaluated.results[0] else rival_bits(r, evaluated.manifest)),
        )
    console = Console()
    console.width = max(console.width, 145 if copies else 125)  # a file has no width, and columns must not be cut
    console.print(table)
    print(
        "top-1: agreement with dense; gap: share of the gap between static and oracle that is closed (log perplexity)\n"
        "equal bytes: perplexity of the dense model, quantised until it reads as many bytes per token (and its bits)"
    )


def _of_copies(rest: str | None, shortlist: int | None) -> tuple[str, str]:
    """Return the cells of `COPY_COLUMNS`."""
    return rest or "", str(shortlist or "all")


def _print_recomputed(results: Sequence[Result]) -> None:
    """Print what the certificate cost."""
    for r in results:
        if r.certify and r.recomputed_rows:
            budget = f"{r.neuron_budget:.0%} of neurons, {r.head_budget:.0%} of heads, shortlist {r.shortlist}"
            print(f"{r.selector}, {budget}: {_certified(r.recomputed_rows)}")


def _certified(rows: Mapping[str, float]) -> str:
    return (
        f"certified with {rows['mean']:.0f} exact rows, beyond the shortlist {rows['fallback_share']:.1%} of the time"
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
        copies = f"\n{r.rest}, {r.shortlist or 'all'} rows" if r.rest == "shadow" or r.shortlist else ""
        name = f"{r.selector}\n{r.neuron_budget:.0%}, {r.head_budget:.0%}{copies}"
        table.add_column(name, justify="right", no_wrap=True)
    for row, first in enumerate(shown[0].layers):
        cells = (f"{r.layers[row].neuron_recall:.0%} / {r.layers[row].head_recall:.0%}" for r in shown)
        table.add_row(str(first.layer), *cells)
    console = Console()
    console.width = max(console.width, 20 * (1 + len(shown)))
    console.print(table)
