"""``shadowllm export``"""

from __future__ import annotations

import argparse
from pathlib import Path

from shadowllm.commands import options
from shadowllm.commands.flags import add_flags, build
from shadowllm.config import Calibration, EngineOptions, Export
from shadowllm.errors import UserError

EPILOG = """examples:
  shadowllm export MODEL out/                                 # the fastest budget within +5% perplexity
  shadowllm export MODEL out/ --target-ppl-increase 2%
  shadowllm export MODEL out/ --neuron-budget 0.1 --head-budget 0.5 --shortlist 1024
  shadowllm export MODEL out/ --predictor predictor.safetensors --dtype fp16 --engine tensorrt_rtx --sm 89 120
  shadowllm export MODEL out/ --selector shadow --rest drop --neuron-budget 0.5 --head-budget 0.75    # as in the paper
  shadowllm export MODEL out/ --weight-dtype int4

A predictor is made unless --predictor names one. The budget is a default: `run` and `bench` accept others without a
new export. If no part of it is given, it is chosen for the target, which is +5% perplexity by default. With --rest drop
or int4 weights there is no default target: without one, 50% of the neurons and 75% of the heads are kept. With
--selector relu everything is. --rest is shadow by default, or drop with int4 weights and with --selector relu."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    options.add_model(parser)
    parser.add_argument("out", type=Path, metavar="OUT", help="bundle folder to make")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is a bundle")
    add_flags(parser, Export, "dtype", "weight_dtype")
    parser.add_argument("--predictor", type=Path, metavar="FILE", help="use this predictor instead of training one")
    parser.add_argument(
        "--engine", choices=options.FLAVOURS, action="append", default=[], help="build engines too; may be repeated"
    )
    add_flags(parser, Export, "validate")
    options.add_budget(parser, "all if another part of the budget is given, else see below", requested=False)
    add_flags(parser, Export, "head_unit")
    options.add_target(parser)
    options.add_calibration(parser)
    options.add_training(parser)
    options.add_engines(parser)


def run(args: argparse.Namespace) -> None:
    """Export a model and print a summary of the bundle."""
    from shadowllm.bundle.predictor_file import Predictor
    from shadowllm.commands import inspect
    from shadowllm.pipeline import export_model

    unused = build(args, EngineOptions, flavour=options.FLAVOURS[0])
    if not args.engine and unused != EngineOptions(options.FLAVOURS[0]):
        raise UserError("options of engines do nothing without --engine", "leave them out, or add --engine")
    predictor = Predictor.load(args.predictor) if args.predictor else None
    bundle = build(
        args,
        Export,
        budget=options.export_budget(args),
        rest=args.rest,
        engines=[build(args, EngineOptions, flavour=flavour) for flavour in args.engine],
        target=options.target(args),
    )
    export_model(
        options.source(args),
        args.out,
        bundle,
        predictor=predictor,
        calibration=build(args, Calibration),
        train_config=options.train_config(args),
        overwrite=args.overwrite,
    )
    inspect.show(args.out)
