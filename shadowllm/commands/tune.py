"""``shadowllm tune``"""

from __future__ import annotations

import argparse
from pathlib import Path

from shadowllm.commands import options

EPILOG = """examples:
  shadowllm tune out/ --target-ppl-increase 2%
  shadowllm tune out/ --target-speedup 1.2 --threads 2
  shadowllm tune out/ --target-ppl-increase 0.05 --text corpus.txt --tokens 8192
  shadowllm tune out/ --lossless                        # the fastest drafts of lossless decoding on this machine

The start of a file that the predictor was calibrated on is left out. Files are known by their names.

The new budget becomes the bundle's default. It has a fraction per layer if the rest is dropped, else one for all layers
and a shortlist. With --lossless, it becomes the default of drafts only. No graph or engine changes."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("bundle", type=Path, metavar="OUT", help="bundle to choose budgets for")
    options.add_target(parser).add_argument(
        "--lossless",
        action="store_true",
        help="choose budget and length of the drafts of lossless decoding (backend ort)",
    )
    options.add_prepack(parser)
    parser.add_argument(
        "--text",
        nargs="+",
        default=(),
        metavar="FILE",
        help="text for measuring losses (default: text that the model writes, and Python's documentation)",
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
    options.add_threads(parser, help="threads of each operator, for a speedup or drafts (default: ONNX Runtime's own)")


def run(args: argparse.Namespace) -> None:
    """Tune the budgets and print a summary of the bundle."""
    from shadowllm.commands import inspect
    from shadowllm.errors import UserError
    from shadowllm.evaluation.draft_tuning import tune_drafts
    from shadowllm.evaluation.tuning import tune

    target = options.target(args)
    if not args.lossless:
        options.refuse_unused(args, {"prepack": False}, "without --lossless")
        if args.target_speedup is None:
            options.refuse_unused(args, {"threads": None}, "without --target-speedup or --lossless")
    text = {"texts": args.text, "tokens": args.tokens, "seqlen": args.seqlen, "threads": args.threads}
    if args.lossless:
        for found in tune_drafts(args.bundle, prepack=args.prepack, **text)[1]:
            print(found)
    elif target is not None:
        tune(args.bundle, target, **text)
    else:
        raise UserError("no target was given", "add --target-ppl-increase, --target-speedup or --lossless")
    inspect.show(args.bundle)
