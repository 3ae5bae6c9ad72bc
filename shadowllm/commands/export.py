"""``shadowllm export``"""

from __future__ import annotations

import argparse
from pathlib import Path

from shadowllm.bundle.quantisation import WEIGHT_DTYPES
from shadowllm.commands import options

EPILOG = """examples:
  shadowllm export MODEL out/ --neuron-budget 0.5 --head-budget 0.75
  shadowllm export MODEL out/ --predictor predictor.safetensors --dtype fp16 --engine tensorrt_rtx --sm 89 120
  shadowllm export MODEL out/ --weight-dtype int4
  shadowllm export MODEL out/ --selector quantized-shadow --target-ppl-increase 2%
  shadowllm export opt-1.3b/ out/ --selector static --calibration-text corpus.txt --overwrite

A predictor is trained on the spot unless --predictor names one. The budgets are defaults: `run` and
`bench` take others without a new export."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    options.add_model(parser)
    parser.add_argument("out", type=Path, metavar="OUT", help="bundle folder to make")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is a bundle")
    parser.add_argument(
        "--dtype", choices=tuple(options.DTYPES), default="fp32", help="of weights and activations (default: fp32)"
    )
    parser.add_argument(
        "--weight-dtype",
        choices=tuple(WEIGHT_DTYPES),
        help="store matrices as integers with a scale per 32 of them (ONNX Runtime only; default: as --dtype)",
    )
    parser.add_argument("--predictor", type=Path, metavar="FILE", help="use this predictor instead of training one")
    parser.add_argument(
        "--engine", choices=options.FLAVOURS, action="append", default=[], help="build engines too; may be repeated"
    )
    parser.add_argument(
        "--skip-validation",
        action="store_true",
        help="do not hold the graphs against PyTorch (the manifest then says so)",
    )
    options.add_budget(parser)
    options.add_head_unit(parser, "query_head")
    options.add_target(parser)
    options.add_calibration(parser)
    options.add_training(parser)
    options.add_engines(parser)


def run(args: argparse.Namespace) -> None:
    """Export and say what was made."""
    from shadowllm.bundle.predictor_file import Predictor
    from shadowllm.commands import inspect
    from shadowllm.pipeline import Export, export_model

    predictor = Predictor.load(args.predictor) if args.predictor else None
    bundle = Export(
        args.selector,
        options.budget(args),
        options.DTYPES[args.dtype],
        not args.skip_validation,
        [options.engines(args, flavour) for flavour in args.engine],
        args.weight_dtype,
        options.target(args),
        args.head_unit,
    )
    export_model(
        options.source(args),
        args.out,
        bundle,
        predictor=predictor,
        calibration=options.calibration(args),
        train_config=options.train_config(args),
        overwrite=args.overwrite,
    )
    inspect.show(args.out)
