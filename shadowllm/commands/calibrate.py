"""``shadowllm calibrate``"""

from __future__ import annotations

import argparse

from shadowllm.commands import options
from shadowllm.commands.flags import build
from shadowllm.config import Calibration

EPILOG = """examples:
  shadowllm calibrate MODEL -o traces.safetensors
  shadowllm calibrate MODEL -o traces.safetensors --calibration-text corpus.txt --calibration-tokens 100000
  shadowllm train MODEL --traces traces.safetensors -o predictor.safetensors"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    options.add_model(parser)
    parser.add_argument(
        "-o", "--output", type=options.replaced_file, required=True, metavar="FILE", help="trace file to write"
    )
    options.add_calibration(parser)


def run(args: argparse.Namespace) -> None:
    """Trace the model and write the traces."""
    from shadowllm.pipeline import calibrate_model

    traces = calibrate_model(options.source(args), build(args, Calibration))
    traces.save(args.output)
    tokens = traces.windows.train.numel() + traces.windows.held_out.numel()
    print(
        f"{args.output}: {tokens} tokens traced by {traces.criterion} ({traces.windows.source}), "
        f"{args.output.stat().st_size / 1e6:.1f} MB"
    )
