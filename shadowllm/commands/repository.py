"""``shadowllm repository``"""

from __future__ import annotations

import argparse
from pathlib import Path

from shadowllm.commands import options
from shadowllm.commands.flags import add_flags, build
from shadowllm.serve_config import EngineConfig

EPILOG = """examples:
  shadowllm repository out/ models/                 # models/NAME with a copy of the bundle
  shadowllm repository out/ models/ --slots 8 --model-name small
  tritonserver --model-repository models/

The server's Python needs shadowllm[serve]. TensorRT engines are not used. docs/serving.md shows requests."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    from shadowllm.runtime import SLOT_BACKENDS

    parser.add_argument("bundle", type=Path, metavar="OUT", help="bundle that `shadowllm export` made")
    parser.add_argument("repository", type=Path, metavar="DIR", help="folder to make")
    parser.add_argument("--model-name", metavar="NAME", help="name of the model (default: the name in the bundle)")
    options.add_slot_backend(parser, SLOT_BACKENDS)
    add_flags(parser.add_argument_group("engine"), EngineConfig)


def run(args: argparse.Namespace) -> None:
    """Write the repository."""
    from shadowllm.serve.repository import write_repository

    engine = build(args, EngineConfig)
    name = write_repository(
        args.bundle, args.repository, args.backend, engine, args.model_name, args.threads, args.prepack
    )
    print(f"{args.repository / name}: a model for tritonserver --model-repository {args.repository}")
