"""``shadowllm tune``"""

from __future__ import annotations

import argparse
from pathlib import Path

from shadowllm.commands import options

EPILOG = """examples:
  shadowllm tune out/ --target-ppl-increase 2%
  shadowllm tune out/ --target-speedup 1.2 --threads 2
  shadowllm tune out/ --target-ppl-increase 0.05 --text corpus.txt --tokens 8192

The new budget becomes the bundle's default. It has a fraction per layer if the rest is dropped, else one for all layers
and a shortlist. No graph or engine changes."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("bundle", type=Path, metavar="OUT", help="bundle to choose budgets for")
    options.add_target(parser)
    parser.add_argument(
        "--text", nargs="+", default=(), metavar="FILE", help="text for measuring losses (default: as in calibration)"
    )
    options.add_whole(parser, "--tokens", default=2048, metavar="N", help="tokens of that text (default: 2048)")
    options.add_whole(
        parser,
        "--seqlen",
        least=2,
        default=128,
        metavar="N",
        help="tokens per window (default: 128)",
    )
    options.add_threads(parser, help="threads of each operator, for a speedup (default: ONNX Runtime's own)")


def run(args: argparse.Namespace) -> None:
    """Tune the budgets and print a summary of the bundle."""
    from shadowllm.commands import inspect
    from shadowllm.errors import UserError
    from shadowllm.evaluation.tuning import tune

    target = options.target(args)
    if target is None:
        raise UserError("no target was given", "add --target-ppl-increase or --target-speedup")
    tune(args.bundle, target, texts=args.text, tokens=args.tokens, seqlen=args.seqlen, threads=args.threads)
    inspect.show(args.bundle)
