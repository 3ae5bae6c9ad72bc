"""``shadowllm bench``"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from shadowllm.commands import options
from shadowllm.commands.flags import build
from shadowllm.errors import UserError

EPILOG = """examples:
  shadowllm bench out/ --against ort-dense
  shadowllm bench out/ --neuron-budget 0.3 --json bench.json --plot bench.png
  shadowllm bench out/ --lossless                       # dense's own text, drafted sparse
  shadowllm bench out/ --prompt-len 512 --new-tokens 64 --iterations 10 --threads 2

Each backend runs in its own process. They take turns, so that a slow period of the machine
affects all of them."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    from shadowllm.runtime import BACKENDS

    parser.add_argument("bundle", type=Path, metavar="OUT", help="bundle that `shadowllm export` made")
    parser.add_argument("--backend", choices=BACKENDS, default="ort", help="backend of the sparse path (default: ort)")
    parser.add_argument(
        "--against",
        choices=BACKENDS,
        nargs="+",
        default=["ort-dense"],
        help="backends to compare it with (default: ort-dense)",
    )
    options.add_whole(parser, "--prompt-len", default=128, metavar="N", help="tokens of the prompt (default: 128)")
    options.add_whole(parser, "--new-tokens", default=128, metavar="N", help="tokens to generate (default: 128)")
    options.add_whole(parser, "--iterations", default=5, metavar="N", help="measured runs (default: 5)")
    options.add_whole(
        parser,
        "--warmup-runs",
        least=0,
        default=1,
        metavar="N",
        help="runs before them that are not measured (default: 1)",
    )
    options.add_whole(
        parser,
        "--quality-tokens",
        least=0,
        metavar="N",
        help="length of each of the two texts for measuring quality; 0 for none (default: 128; 0 with --lossless)",
    )
    parser.add_argument(
        "--percentile",
        type=_percentile,
        nargs="+",
        default=[],
        metavar="P",
        help="percentiles of the latency, in addition to 50, 90 and 99",
    )
    options.add_threads(parser, help="threads of each operator on the CPU (default: the backend's own)")
    parser.add_argument("--json", type=options.output_file, metavar="FILE", help="write the report to this file")
    parser.add_argument("--plot", type=options.figure_file, metavar="FILE", help="draw it to this PNG file")
    options.add_prefill(parser)
    options.add_budget(parser)
    options.add_drafting(parser)


def _percentile(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 100:
        raise UserError(f"--percentile is {text}", "give numbers from 0 to 100")
    return value


def run(args: argparse.Namespace) -> None:
    """Measure, print, and write the requested files."""
    from rich.console import Console

    from shadowllm.bundle.manifest import read_manifest
    from shadowllm.draft_config import Drafting
    from shadowllm.evaluation.speed.bench import bench

    manifest, drafting = read_manifest(args.bundle), build(args, Drafting)
    budget = options.budget(args, manifest.draft_budget if drafting.lossless else manifest.budget)
    report = bench(
        args.bundle,
        args.against,
        backend=args.backend,
        budget=budget,
        prompt_len=args.prompt_len,
        new_tokens=args.new_tokens,
        runs=args.iterations,
        warmup=args.warmup_runs,
        quality_tokens=args.quality_tokens,
        threads=args.threads,
        percentiles=args.percentile,
        prefill=args.prefill,
        drafting=drafting,
        prepack=args.prepack,
    )
    report.print(Console())
    if args.json:
        report.save_json(args.json)
        print(f"report: {args.json}")
    if args.plot:
        from shadowllm.evaluation.speed.figure import draw

        draw(report, args.plot)
        print(f"plot: {args.plot}")
