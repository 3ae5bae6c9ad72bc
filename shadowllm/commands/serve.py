"""``shadowllm serve``"""

from __future__ import annotations

import argparse
from pathlib import Path

from shadowllm.commands import options
from shadowllm.commands.flags import add_flags, build
from shadowllm.errors import UserError
from shadowllm.serve_config import EngineConfig, ServeConfig

EPILOG = """examples:
  shadowllm serve out/                                    # http://127.0.0.1:8000, for this machine only
  shadowllm serve out/ --slots 8 --neuron-budget 0.2      # more texts at once, another budget
  shadowllm serve out/ --host 0.0.0.0 --api-keys keys.txt # for other machines, with keys

The interface is OpenAI's: /v1/completions, /v1/chat/completions, /v1/models. The address itself shows a page to try the
model. /health and /metrics are for operators. SIGTERM or Ctrl-C lets running requests finish."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    from shadowllm.runtime import SLOT_BACKENDS

    parser.add_argument("bundle", type=Path, metavar="OUT", help="bundle that `shadowllm export` made")
    options.add_slot_backend(parser, SLOT_BACKENDS)
    add_flags(parser.add_argument_group("engine"), EngineConfig)
    add_flags(parser.add_argument_group("server"), ServeConfig)
    options.add_budget(parser)


def run(args: argparse.Namespace) -> None:
    """Serve until a signal comes."""
    from shadowllm.bundle.manifest import read_manifest

    try:
        from shadowllm.serve.server import Deployment, serve
    except ModuleNotFoundError as error:
        raise UserError(
            f"serving needs the package {error.name}, which is missing", "pip install 'shadowllm[serve]'"
        ) from error
    budget = options.budget(args, read_manifest(args.bundle).budget)
    configs = build(args, ServeConfig), build(args, EngineConfig)
    serve(Deployment(args.bundle, args.backend, budget, *configs, args.threads, args.prepack))
