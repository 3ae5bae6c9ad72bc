"""``shadowllm build``"""

from __future__ import annotations

import argparse
from pathlib import Path

from shadowllm.commands import options
from shadowllm.commands.flags import build
from shadowllm.config import EngineOptions

EPILOG = """examples:
  shadowllm build out/ --engine tensorrt_rtx
  shadowllm build out/ --engine tensorrt_rtx --sm 89 120 --capacity 2048 --max-batch 4"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("bundle", type=Path, metavar="OUT", help="bundle to build engines for")
    parser.add_argument("--engine", choices=options.FLAVOURS, required=True, help="which TensorRT")
    options.add_engines(parser)


def run(args: argparse.Namespace) -> None:
    """Build and list the engines."""
    from shadowllm.commands import inspect
    from shadowllm.pipeline import build_engines

    build_engines(args.bundle, build(args, EngineOptions, flavour=args.engine))
    for engine in sorted((args.bundle / "engines" / args.engine).glob("*.engine")):
        inspect.show(engine)
