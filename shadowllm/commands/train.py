"""``shadowllm train``"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from shadowllm.commands import options
from shadowllm.commands.flags import add_flags
from shadowllm.config import DEFAULT_BUDGET, TrainConfig

EPILOG = """examples:
  shadowllm train MODEL --traces traces.safetensors -o predictor.safetensors
  shadowllm train MODEL --traces traces.safetensors -o static.safetensors --selector static
  shadowllm train MODEL --traces traces.safetensors -o imported.safetensors --powerinfer ReluLLaMA-7B-Predictor
  torchrun --nproc-per-node 2 -m shadowllm.cli train MODEL --traces traces.safetensors -o predictor.safetensors
  shadowllm export MODEL out/ --predictor predictor.safetensors"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    options.add_model(parser)
    parser.add_argument(
        "--traces", type=Path, required=True, metavar="FILE", help="trace file that `shadowllm calibrate` wrote"
    )
    parser.add_argument(
        "-o", "--output", type=options.replaced_file, required=True, metavar="FILE", help="predictor to write"
    )
    add_flags(parser, TrainConfig, "seed")
    options.add_fractions(parser, DEFAULT_BUDGET)
    options.add_training(parser)


def run(args: argparse.Namespace) -> None:
    """Train a predictor, write it, and print its quality on held-out tokens."""
    from shadowllm.pipeline import train_predictor
    from shadowllm.predictor.tracefile import Traces
    from shadowllm.progress import is_first

    kind = args.selector or ("layerwise" if args.powerinfer else "shadow")
    predictor = train_predictor(options.source(args), Traces.load(args.traces), kind, options.train_config(args))
    if not is_first():  # only the first of several processes writes
        return
    predictor.save(args.output)
    print(f"{args.output}: {predictor.kind} predictor, {args.output.stat().st_size / 1e6:.1f} MB")
    print(held_out(predictor.record))


def held_out(record: dict[str, Any]) -> str:
    """Return the figures on held-out tokens, with one line per evaluated predictor."""
    lines = [
        f"  {name:7s} " + "  ".join(f"{key} {value:.3f}" for key, value in found.items())
        for name, found in record.get("held_out", {}).items()
    ]
    return "\n".join(["held-out tokens:", *lines]) if lines else ""
